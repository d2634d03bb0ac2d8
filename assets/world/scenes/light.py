"""Times of day: the sky, and what its light does to the colours below."""

from __future__ import annotations

from typing import NamedTuple

from .canvas import Canvas, darker, mix
from .chance import Rng


class Light(NamedTuple):
    """A time of day."""

    hour: str
    strength: float  # how far colours move towards the tint, 0..1
    tint: str
    zenith: str  # the sky at its top
    middle: str
    horizon: str  # the sky at its foot
    clouds: str
    disc: str = ""  # the sun, or the moon; none behind an overcast sky

    @property
    def lamps(self) -> bool:
        """Whether it is so dark that lamps are on."""
        return self.hour in ("dusk", "night")


LIGHTS = (
    Light("dawn", 0.14, "ffbaaa", "7a96ce", "f0babe", "ffe4c2", "ffded6", "fff4ce"),
    Light("dawn", 0.14, "ffcea0", "9ebad6", "fad4c0", "fff0d0", "ffecde", "fff4ce"),
    Light("day", 0.0, "ffffff", "4096da", "86c8f0", "d8f0fa", "fcfdff", "ffde70"),
    Light("day", 0.05, "fffadc", "56b6da", "9cd8e4", "e6f5ec", "fafefc", "ffde70"),
    Light("day", 0.08, "fff4d6", "5ca0e2", "aad2f2", "faf2de", "fffcf4", "ffde70"),
    Light("dusk", 0.26, "78325a", "483e7c", "d06c78", "ffbe7c", "e88480", "ffe2a0"),
    Light("dusk", 0.22, "aa5050", "68528a", "e88e76", "ffd292", "f4a88c", "ffeab0"),
    Light("sunset", 0.24, "e46828", "e47046", "f9a454", "ffd686", "ffc482", "fff0b4"),
    Light("sunset", 0.22, "f08c3c", "f0945c", "fcc070", "ffe6a4", "ffdca4", "fff6ce"),
    Light("night", 0.5, "121c54", "0e1436", "1e2c60", "445892", "3a487c", "f6f0d6"),
    Light("night", 0.46, "221a56", "1a1a42", "363272", "6c5e9a", "544e88", "f6f0d6"),
    Light("grey", 0.16, "969ca4", "a4acb4", "c0c6ca", "dcdedc", "d2d6d8"),
    Light("grey", 0.16, "beac8c", "c6baa4", "d8ceb8", "e8e0cc", "e8e0d0"),
)


def choose_light(rng: Rng, hours: str) -> Light:
    """A light of one of the hours, "day 60, night 40"."""
    hour = rng.lots(hours)
    return rng.pick([light for light in LIGHTS if light.hour == hour])


def paint_sky(canvas: Canvas, rng: Rng, light: Light, horizon: float, clouds: int) -> None:
    """Sky down to the horizon, with stars, the sun or moon, and clouds."""
    sky = canvas.of("Sky")
    sky.band(0, horizon + 0.02, (light.zenith, light.middle, light.horizon))
    if light.hour == "night":
        for _ in range(int(rng.integers(7, 13))):
            x, y = rng.uniform(0.02, 0.98), rng.uniform(0.02, horizon * 0.75)
            sky.ellipse(x, y, 0.007, 0.007, "fff8d6")
    if light.disc:
        low = light.hour in ("dawn", "dusk", "sunset")
        y = horizon * (rng.uniform(0.5, 0.8) if low else rng.uniform(0.2, 0.5))
        x, radius = rng.uniform(0.12, 0.88), rng.uniform(0.05, 0.075)
        for spread, alpha in ((2.6, "21"), (1.7, "33"), (1, "")):  # a soft glow around it
            sky.ellipse(x, y, radius * spread, radius * spread, light.disc + alpha)
        if light.hour == "night":
            for dx, dy, size in ((-0.3, -0.2, 0.28), (0.32, 0.3, 0.22)):
                crater = (x + dx * radius, y + dy * radius, size * radius, size * radius)
                sky.ellipse(*crater, darker(light.disc, 0.12))
    for place in rng.permutation(5)[:clouds]:
        x = 0.1 + 0.2 * place + rng.uniform(-0.06, 0.06)
        y = horizon * rng.uniform(0.12, 0.6)
        cloud = sky.at(x, y, rng.uniform(0.16, 0.28))
        left, right = rng.uniform(0.13, 0.19, 2)
        # A flat-bottomed heap of three puffs, first its darker lower side.
        for drop, colour in ((0.05, mix(light.clouds, light.middle, 0.35)), (0, light.clouds)):
            cloud.box(-0.5, -0.12 + drop, 0.5, 0.1 + drop, colour, round_by=0.11)
            cloud.ellipse(-0.2, -0.08 + drop, left, left, colour)
            cloud.ellipse(0.08, -0.14 + drop, 0.22, 0.22, colour)
            cloud.ellipse(0.3, -0.04 + drop, right * 0.85, right * 0.85, colour)


def paint_weather(canvas: Canvas, rng: Rng, snow: bool) -> None:
    """Falling snow or rain over the finished scene."""
    for place, (dx, dy) in enumerate(rng.uniform(0, 1, (36, 2))):
        # One in each field of a grid, so that they do not clump.
        drop = canvas.at((place % 6 + dx) / 6, (place // 6 + dy) / 6)
        if snow:
            drop.ellipse(0, 0, 0.009, 0.009, "ffffffe6")
        else:
            drop.polygon(((0, 0), (0.012, 0), (-0.008, 0.09), (-0.02, 0.09)), "e2ecf466")
