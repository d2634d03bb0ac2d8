"""Tiny World: a picture book drawn by a program.

Every scene is drawn from a seed on a 512x512 canvas and reduced to 128x128. It comes with a
caption made from what was drawn and with the exact class of every pixel, because each shape is
painted on the picture and on the label map by the same call.

    scene = draw(7, "nature landscape")
    images, labels, captions = draw_many(1000, seed=0)

Coordinates are fractions of the picture: (0, 0) is the top left corner, (1, 1) the bottom right.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128
OVERSAMPLING = 4  # the canvas is this much larger than the picture, for soft edges
CANVAS = SIZE * OVERSAMPLING

# The first 18 are those of mattmdjaga/segformer_b2_clothes, in its order; the rest is the world.
LABELS: tuple[str, ...] = (
    "Background", "Hat", "Hair", "Sunglasses", "Upper-clothes", "Skirt", "Pants", "Dress", "Belt",
    "Left-shoe", "Right-shoe", "Face", "Left-leg", "Right-leg", "Left-arm", "Right-arm", "Bag",
    "Scarf",
    "Sky", "Mountain", "Meadow", "Tree", "Lake", "Building", "Road", "Car", "Taxi", "Sea", "Sand",
    "Palm",
)  # fmt: skip
BACKGROUND, HAT, HAIR, SUNGLASSES, CLOTHES = 0, 1, 2, 3, 4
FACE = 11
SKY, MOUNTAIN, MEADOW, TREE, LAKE, BUILDING, ROAD, CAR, TAXI, SEA, SAND, PALM = range(18, 30)

LANDSCAPE, TRAFFIC, PORTRAIT = KINDS = (
    "nature landscape",
    "red taxi in traffic",
    "portrait of a man on the beach",
)

VOCABULARY = """
    a an and at in of on next the to under with without wearing facing left right front
    nature landscape lake trees fir forest mountains cabin wooden house
    small large big wide huge little few some many lot dense snowy
    red taxi traffic heavy road city street buildings tall houses car bus van rain
    portrait man beach bald hair hat cap beanie straw bucket sunglasses shirt striped
    long short curly afro palm tree parasol sailboat boat
    dawn dusk sunset night day sunny morning evening sky cloudy clear
    spring summer autumn winter
    black brown blond white grey blue yellow green teal orange purple pink cream
"""
WORDS: tuple[str, ...] = tuple(sorted(set(VOCABULARY.split())))

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]] | np.ndarray
Rng = np.random.Generator
T = TypeVar("T")


@dataclass(frozen=True)
class Scene:
    """One picture of the world.

    image: (128, 128, 3) uint8. labels: (128, 128) uint8, indices into LABELS.
    """

    image: np.ndarray
    labels: np.ndarray
    caption: str


# --- Palettes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Light:
    """A time of day: the sky from zenith to horizon, and what it does to the colours below."""

    name: str
    sky: tuple[Colour, Colour, Colour]
    tint: Colour
    strength: float  # how far colours move towards the tint, 0..1
    disc: Colour | None  # the sun, or the moon; None behind an overcast sky
    clouds: Colour
    low: bool = False  # whether the disc stands near the horizon


WHITE: Colour = (255, 255, 255)
INK: Colour = (38, 40, 52)
LAMP: Colour = (255, 214, 122)
SUN: Colour = (255, 222, 112)
PALE_SUN: Colour = (255, 244, 206)
MOON: Colour = (246, 240, 214)

LIGHTS: dict[str, tuple[Light, ...]] = {
    "dawn": (
        Light("dawn", ((122, 150, 206), (240, 186, 190), (255, 228, 194)), (255, 186, 170), 0.14,
              PALE_SUN, (255, 222, 214), True),
        Light("dawn", ((158, 186, 214), (250, 212, 192), (255, 240, 208)), (255, 206, 160), 0.14,
              PALE_SUN, (255, 236, 222), True),
    ),
    "day": (
        Light("day", ((64, 150, 218), (134, 200, 240), (216, 240, 250)), WHITE, 0.0, SUN,
              (252, 253, 255)),
        Light("day", ((86, 182, 218), (156, 216, 228), (230, 245, 236)), (255, 250, 220), 0.05,
              SUN, (250, 254, 252)),
        Light("day", ((92, 160, 226), (170, 210, 242), (250, 242, 222)), (255, 244, 214), 0.08,
              SUN, (255, 252, 244)),
    ),
    "dusk": (
        Light("dusk", ((72, 62, 124), (208, 108, 120), (255, 190, 124)), (120, 50, 90), 0.26,
              (255, 226, 160), (232, 132, 128), True),
        Light("dusk", ((104, 82, 138), (232, 142, 118), (255, 210, 146)), (170, 80, 80), 0.22,
              (255, 234, 176), (244, 168, 140), True),
    ),
    "sunset": (
        Light("sunset", ((228, 112, 70), (249, 164, 84), (255, 214, 134)), (228, 104, 40), 0.24,
              (255, 240, 180), (255, 196, 130), True),
        Light("sunset", ((240, 148, 92), (252, 192, 112), (255, 230, 164)), (240, 140, 60), 0.22,
              (255, 246, 206), (255, 220, 164), True),
    ),
    "night": (
        Light("night", ((14, 20, 54), (30, 44, 96), (68, 88, 146)), (18, 28, 84), 0.5, MOON,
              (58, 72, 124)),
        Light("night", ((26, 26, 66), (54, 50, 114), (108, 94, 154)), (34, 26, 86), 0.46, MOON,
              (84, 78, 136)),
    ),
    "grey": (
        Light("grey", ((164, 172, 180), (192, 198, 202), (220, 222, 220)), (150, 156, 164), 0.16,
              None, (210, 214, 216)),
        Light("grey", ((198, 186, 164), (216, 206, 184), (232, 224, 204)), (190, 172, 140), 0.16,
              None, (232, 224, 208)),
    ),
}  # fmt: skip

# How often each kind of scene sees each time of day; traffic has the fewest blue skies.
HOURS: dict[str, dict[str, float]] = {
    LANDSCAPE: {"day": 0.5, "dawn": 0.13, "dusk": 0.1, "sunset": 0.09, "night": 0.1, "grey": 0.08},
    TRAFFIC: {"day": 0.42, "dawn": 0.06, "dusk": 0.1, "sunset": 0.18, "night": 0.1, "grey": 0.14},
    PORTRAIT: {"day": 0.5, "dawn": 0.1, "dusk": 0.1, "sunset": 0.13, "night": 0.08, "grey": 0.09},
}

# Meadow from its far to its near edge, and the firs standing on it.
SEASONS: dict[str, tuple[tuple[Colour, Colour], tuple[Colour, ...]]] = {
    "spring": (((196, 222, 122), (126, 190, 92)), ((44, 128, 88), (66, 144, 84), (36, 112, 92))),
    "summer": (((158, 202, 96), (92, 160, 78)), ((30, 98, 80), (42, 116, 82), (26, 84, 78))),
    "autumn": (((232, 196, 104), (198, 146, 70)), ((58, 104, 74), (206, 112, 48), (178, 84, 48))),
    "winter": (((246, 249, 252), (214, 228, 240)), ((48, 102, 102), (60, 116, 108), (40, 88, 98))),
}
SEASON_ODDS = {"spring": 0.25, "summer": 0.39, "autumn": 0.18, "winter": 0.18}

MOUNTAINS: tuple[Colour, ...] = (
    (92, 112, 158), (122, 116, 154), (88, 126, 146), (140, 122, 124), (104, 116, 128),
)  # fmt: skip
LAKES: tuple[Colour, ...] = ((52, 138, 204), (40, 124, 190), (70, 158, 214), (48, 148, 196))
WALLS: tuple[Colour, ...] = ((164, 104, 66), (186, 130, 82), (134, 84, 62), (206, 168, 120))
ROOFS: tuple[Colour, ...] = ((150, 62, 56), (94, 66, 74), (74, 84, 110), (178, 88, 58))

FACADES: tuple[Colour, ...] = (
    (236, 200, 150), (226, 170, 118), (214, 136, 104), (244, 222, 184), (198, 152, 116),
    (150, 184, 176), (124, 154, 184), (186, 196, 206), (232, 178, 168), (170, 190, 148),
    (146, 132, 164), (178, 118, 92),
)  # fmt: skip
WARM_FACADES = 5  # the first so many are those of a sandy city
TAXI_REDS: tuple[Colour, ...] = ((222, 40, 44), (206, 32, 40), (230, 52, 48), (214, 36, 58))
PAINTS: dict[str, Colour] = {
    "blue": (58, 116, 190), "white": (242, 242, 238), "yellow": (246, 200, 70),
    "green": (82, 156, 102), "teal": (44, 150, 154), "grey": (136, 146, 156),
    "black": (58, 62, 74), "purple": (124, 92, 158), "cream": (238, 220, 176),
}  # fmt: skip

SKINS: tuple[Colour, ...] = (
    (255, 224, 196), (248, 208, 176), (240, 192, 154), (226, 172, 130), (206, 148, 106),
    (178, 120, 82), (150, 98, 66), (118, 76, 54), (92, 60, 46),
)  # fmt: skip
HAIRS: dict[str, Colour] = {
    "black": (40, 36, 42), "brown": (106, 68, 46), "blond": (236, 196, 104),
    "red": (196, 84, 40), "grey": (150, 152, 158), "white": (240, 238, 232),
    "blue": (62, 110, 200), "green": (66, 150, 96), "purple": (132, 84, 172),
    "pink": (240, 130, 170),
}  # fmt: skip
HAIR_ODDS = (0.2, 0.22, 0.17, 0.11, 0.08, 0.06, 0.04, 0.04, 0.04, 0.04)
CLOTHS: dict[str, Colour] = {
    "red": (214, 62, 60), "orange": (240, 142, 64), "yellow": (246, 206, 84),
    "green": (76, 160, 96), "teal": (42, 156, 158), "blue": (60, 112, 200),
    "purple": (132, 94, 176), "pink": (240, 146, 172), "white": (246, 246, 242),
    "grey": (142, 150, 160), "black": (52, 54, 66), "brown": (142, 98, 70),
}  # fmt: skip
STRAW: Colour = (232, 200, 130)
SEAS: tuple[tuple[Colour, Colour], ...] = (
    ((38, 130, 190), (112, 206, 216)), ((30, 146, 178), (132, 218, 208)),
    ((54, 116, 184), (120, 188, 220)),
)  # fmt: skip
SANDS: tuple[Colour, ...] = ((246, 222, 168), (238, 208, 150), (250, 232, 192), (232, 204, 160))


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """The colour `share` (0..1) of the way from a to b."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def darker(colour: Colour, share: float = 0.18) -> Colour:
    """A shade: not grey but towards a deep blue, as shadows are in picture books."""
    return mix(colour, (30, 28, 70), share)


def lighter(colour: Colour, share: float = 0.22) -> Colour:
    return mix(colour, WHITE, share)


# --- Chance -----------------------------------------------------------------------------------


def pick(rng: Rng, things: Sequence[T]) -> T:
    """One of the things, all equally likely."""
    return things[int(rng.integers(len(things)))]


def draw_lots(rng: Rng, odds: dict[str, float]) -> str:
    """One of the keys, each with its odds (which sum to 1)."""
    ticket = rng.random()
    for name, share in odds.items():
        ticket -= share
        if ticket < 0:
            return name
    return name  # the odds summed to a hair less than 1


def chance(rng: Rng, probability: float) -> bool:
    return bool(rng.random() < probability)


def vary(rng: Rng, colour: Colour, amount: float = 7) -> Colour:
    """A close relative of the colour, so that no two scenes are painted quite alike."""
    shift = rng.normal(0, amount, 3)
    red, green, blue = (int(min(255, max(0, c + s))) for c, s in zip(colour, shift, strict=True))
    return red, green, blue


# --- The canvas -------------------------------------------------------------------------------


class Canvas:
    """A picture and its label map, painted together.

    `at` gives a view of the same canvas with its own origin and scale, so that a thing can be
    drawn in its own coordinates, and with its own label and light.
    """

    def __init__(self) -> None:
        self.picture = Image.new("RGB", (CANVAS, CANVAS))
        self.labels = Image.new("L", (CANVAS, CANVAS), SKY)
        self._opaque = ImageDraw.Draw(self.picture)
        self._glaze = ImageDraw.Draw(self.picture, "RGBA")  # blends colours that carry an alpha
        self._classes = ImageDraw.Draw(self.labels)
        self._origin = (0.0, 0.0)
        self._scale = (float(CANVAS), float(CANVAS))
        self._label: int | None = None
        self._light: tuple[Colour, float] = (WHITE, 0.0)

    def at(
        self, x: float = 0.0, y: float = 0.0, width: float = 1.0, height: float | None = None,
        label: int | None = None, mirror: bool = False,
    ) -> Canvas:  # fmt: skip
        """A view whose origin lies at (x, y) and whose units are width and height (default width).

        What is drawn through it gets the label; None leaves the labels below as they are.
        """
        view = object.__new__(Canvas)
        view.__dict__.update(self.__dict__)
        (ox, oy), (sx, sy) = self._origin, self._scale
        view._origin = (ox + x * sx, oy + y * sy)
        view._scale = ((-sx if mirror else sx) * width, sy * (width if height is None else height))
        view._label = self._label if label is None else label
        return view

    def lit(self, light: Light, share: float = 1.0) -> Canvas:
        """A view on which every colour is tinted by the light."""
        view = self.at()
        view._light = (light.tint, light.strength * share)
        return view

    def _map(self, points: Points) -> list[int]:
        # Whole pixels: the last bit of a sine must not decide what is drawn on another machine.
        mapped = np.asarray(points, dtype=float) * self._scale + self._origin
        return np.rint(mapped).astype(int).ravel().tolist()

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> list[int]:
        left, top, right, bottom = self._map(((x0, y0), (x1, y1)))
        return [min(left, right), min(top, bottom), max(left, right), max(top, bottom)]

    def _paint(self, shape: str, where: list[int], colour: Colour, alpha: float, glows: bool,
               **options: float) -> None:  # fmt: skip
        fill = colour if glows else mix(colour, *self._light)
        if alpha < 1:
            getattr(self._glaze, shape)(where, fill=(*fill, round(255 * alpha)), **options)
            return  # a glaze never changes what a thing is
        getattr(self._opaque, shape)(where, fill=fill, **options)
        if self._label is not None:
            getattr(self._classes, shape)(where, fill=self._label, **options)

    def polygon(self, points: Points, colour: Colour, alpha: float = 1,
                glows: bool = False) -> None:  # fmt: skip
        """A filled polygon. `glows`: the colour is its own light, so no tint."""
        self._paint("polygon", self._map(points), colour, alpha, glows)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour, alpha: float = 1,
                glows: bool = False) -> None:  # fmt: skip
        self._paint("ellipse", self._box(x - rx, y - ry, x + rx, y + ry), colour, alpha, glows)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, alpha: float = 1,
            glows: bool = False, round_by: float = 0) -> None:  # fmt: skip
        """A rectangle, its corners rounded by `round_by` of the view's width unit."""
        where = self._box(x0, y0, x1, y1)
        if round_by:
            radius = round_by * abs(self._scale[0])
            self._paint("rounded_rectangle", where, colour, alpha, glows, radius=radius)
        else:
            self._paint("rectangle", where, colour, alpha, glows)

    def arc(self, x: float, y: float, rx: float, ry: float, start: float, end: float,
            colour: Colour) -> None:  # fmt: skip
        """A filled chord of an ellipse, between two angles in degrees, clockwise from the right."""
        where = self._box(x - rx, y - ry, x + rx, y + ry)
        self._paint("chord", where, colour, 1, False, start=start, end=end)

    def band(self, y0: float, y1: float, colours: Sequence[Colour]) -> None:
        """A soft vertical gradient over the full width, from y0 down to y1."""
        top, bottom = round(y0 * CANVAS), round(y1 * CANVAS)
        stops = np.linspace(0, 1, len(colours))
        tinted = np.array([mix(colour, *self._light) for colour in colours], dtype=float)
        rows = np.linspace(0, 1, bottom - top)
        column = np.stack([np.interp(rows, stops, tinted[:, c]) for c in range(3)], axis=1)
        strip = Image.fromarray(np.rint(column).astype(np.uint8)[:, None])
        self.picture.paste(strip.resize((CANVAS, bottom - top), Image.Resampling.NEAREST), (0, top))
        if self._label is not None:
            self._classes.rectangle((0, top, CANVAS, bottom), fill=self._label)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture (128, 128, 3) and its labels (128, 128), both uint8."""
        middle = OVERSAMPLING // 2
        labels = np.asarray(self.labels)[middle::OVERSAMPLING, middle::OVERSAMPLING]
        return np.asarray(self.picture.reduce(OVERSAMPLING)).copy(), labels.copy()


def smooth(points: Points, rounds: int = 2) -> np.ndarray:
    """The closed polygon with its corners cut again and again (Chaikin), until it looks round."""
    curve = np.asarray(points, dtype=float)
    for _ in range(rounds):
        following = np.roll(curve, -1, axis=0)
        cut = (0.75 * curve + 0.25 * following, 0.25 * curve + 0.75 * following)
        curve = np.stack(cut, axis=1).reshape(-1, 2)
    return curve


def mirrored(points: Points) -> np.ndarray:
    """A left-right symmetric outline from its right half (x >= 0), given from top to bottom."""
    half = np.asarray(points, dtype=float)
    return np.concatenate([half, half[::-1] * (-1, 1)])


# --- The sky ----------------------------------------------------------------------------------


def choose_light(rng: Rng, kind: str) -> Light:
    return pick(rng, LIGHTS[draw_lots(rng, HOURS[kind])])


def paint_sky(canvas: Canvas, rng: Rng, light: Light, horizon: float, clouds: int) -> None:
    """Sky down to the horizon, with stars, the sun or moon, and clouds."""
    sky = canvas.at(label=SKY)
    sky.band(0, horizon + 0.02, light.sky)
    if light.name == "night":
        for _ in range(int(rng.integers(7, 13))):
            x, y = rng.uniform(0.02, 0.98), rng.uniform(0.02, horizon * 0.75)
            sky.ellipse(x, y, 0.007, 0.007, (255, 248, 214), glows=True)
    if light.disc:
        height = rng.uniform(0.5, 0.8) if light.low else rng.uniform(0.2, 0.5)
        paint_disc(
            sky,
            light,
            light.disc,
            rng.uniform(0.12, 0.88),
            horizon * height,
            rng.uniform(0.05, 0.075),
        )
    for place in rng.permutation(5)[:clouds]:
        x = 0.1 + 0.2 * place + rng.uniform(-0.06, 0.06)
        y = horizon * rng.uniform(0.12, 0.6)
        paint_cloud(sky, rng, light, x, y, rng.uniform(0.16, 0.28))


def paint_disc(sky: Canvas, light: Light, disc: Colour, x: float, y: float, radius: float) -> None:
    """The sun in a soft glow, or the moon."""
    for spread, alpha in ((2.6, 0.13), (1.7, 0.2)):
        sky.ellipse(x, y, radius * spread, radius * spread, disc, alpha)
    sky.ellipse(x, y, radius, radius, disc)
    if light.name == "night":  # two craters
        for dx, dy, size in ((-0.3, -0.2, 0.28), (0.32, 0.3, 0.22)):
            sky.ellipse(x + dx * radius, y + dy * radius, size * radius, size * radius,
                        darker(disc, 0.12))  # fmt: skip


def paint_cloud(sky: Canvas, rng: Rng, light: Light, x: float, y: float, width: float) -> None:
    """A flat-bottomed heap of three puffs, a little darker below."""
    cloud = sky.at(x, y, width)
    left, right = rng.uniform(0.13, 0.19, 2)
    for colour, drop in ((mix(light.clouds, light.sky[1], 0.35), 0.05), (light.clouds, 0.0)):
        cloud.box(-0.5, -0.12 + drop, 0.5, 0.1 + drop, colour, round_by=0.11)
        cloud.ellipse(-0.2, -0.08 + drop, left, left, colour)
        cloud.ellipse(0.08, -0.14 + drop, 0.22, 0.22, colour)
        cloud.ellipse(0.3, -0.04 + drop, right * 0.85, right * 0.85, colour)


def paint_weather(canvas: Canvas, rng: Rng, snow: bool) -> None:
    """Falling snow or rain over the finished scene."""
    for place, (dx, dy) in enumerate(rng.uniform(0, 1, (36, 2))):
        x, y = (place % 6 + dx) / 6, (place // 6 + dy) / 6  # one in each field of a grid: no clumps
        if snow:
            canvas.ellipse(x, y, 0.009, 0.009, WHITE, 0.9)
        else:
            canvas.polygon(((x, y), (x + 0.012, y), (x - 0.008, y + 0.09), (x - 0.02, y + 0.09)),
                           (226, 236, 244), 0.4)  # fmt: skip


# --- Nature landscape -------------------------------------------------------------------------


@dataclass(frozen=True)
class Lake:
    """A lake's ellipse, and the waves of its shore."""

    x: float
    y: float
    rx: float
    ry: float
    phases: tuple[float, float]

    def shore(self, grow: float = 1.0) -> np.ndarray:
        """The outline, (40, 2)."""
        turn = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        waves = np.sin(2 * turn + self.phases[0]) * 0.07 + np.sin(3 * turn + self.phases[1]) * 0.05
        reach = grow * (1 + waves)
        return np.stack([self.x + self.rx * reach * np.cos(turn),
                         self.y + self.ry * reach * np.sin(turn)], axis=1)  # fmt: skip

    def hidden_by(self, x: float, y: float) -> bool:
        """Whether something tall at (x, y) stands between the lake's middle and the viewer."""
        return y > self.y and abs(x - self.x) < 0.6 * self.rx

    def holds(self, x: float, y: float) -> bool:
        return ((x - self.x) / self.rx) ** 2 + ((y - self.y) / self.ry) ** 2 < 1.1


def paint_mountains(canvas: Canvas, rng: Rng, light: Light, horizon: float, snow: bool) -> None:
    """One to three ranges; the farther, the more they fade into the sky."""
    land = canvas.at(label=MOUNTAIN)
    rock = vary(rng, pick(rng, MOUNTAINS))
    layers = int(rng.integers(1, 4))
    for layer in range(layers):
        near = (layer + 1) / layers
        colour = mix(rock, light.sky[2], 0.62 - 0.5 * near)
        tallest = horizon * (0.72 - 0.34 * near) * rng.uniform(0.8, 1.1)
        count = int(rng.integers(3, 5))
        offset = rng.uniform(-0.15, 0.15)
        for place in rng.permutation(count):
            x = (place + 0.5) / count + offset + rng.uniform(-0.08, 0.08)
            height = tallest * rng.uniform(0.6, 1.0)
            paint_peak(land.at(x, horizon + 0.03, height * rng.uniform(0.85, 1.2), height + 0.03),
                       colour, light, snow)  # fmt: skip


def paint_peak(peak: Canvas, colour: Colour, light: Light, snow: bool) -> None:
    """One mountain, one unit high and two wide, its right side in the shade."""
    peak.polygon(((-1, 0), (0, -1), (1, 0)), colour)
    peak.polygon(((0, -1), (1, 0), (0.22, 0), (-0.06, -0.38), (0.1, -0.62)), darker(colour, 0.14))
    if snow:
        cap = mix(WHITE, light.sky[2], 0.12)
        peak.polygon(((0, -1), (-0.32, -0.68), (-0.15, -0.73), (-0.04, -0.58), (0.1, -0.7),
                      (0.18, -0.62), (0.32, -0.68)), cap)  # fmt: skip
        peak.polygon(((0, -1), (0.32, -0.68), (0.18, -0.62), (0.1, -0.7), (0.04, -0.76)),
                     mix(cap, colour, 0.3))  # fmt: skip


def paint_meadow(canvas: Canvas, rng: Rng, horizon: float, far: Colour, near: Colour) -> None:
    """Three rolling hills from the horizon down."""
    ground = canvas.at(label=MEADOW)
    x = np.linspace(0, 1, 17)
    for step, share in enumerate((0.0, 0.45, 1.0)):
        y = horizon + (1 - horizon) * (0.0, 0.22, 0.58)[step]
        hills = np.sin(x * rng.uniform(3, 6) + rng.uniform(0, 6)) * (0.016 + 0.014 * step)
        top = np.stack([x, y + hills], axis=1)
        ground.polygon(np.concatenate([top, ((1.0, 1.0), (0.0, 1.0))]), mix(far, near, share))


def paint_lake(canvas: Canvas, rng: Rng, light: Light, lake: Lake, bank: Colour) -> None:
    """Water with a bank, a lighter heart, and a few glints."""
    canvas.polygon(lake.shore(1.07), bank)
    water = canvas.at(label=LAKE)
    blue = mix(vary(rng, pick(rng, LAKES)), light.sky[2], 0.1)
    water.polygon(lake.shore(), blue)
    canvas.at(lake.x, lake.y + 0.08 * lake.ry).polygon(
        (lake.shore(0.74) - (lake.x, lake.y)), lighter(blue, 0.12))  # fmt: skip
    for _ in range(round(2 + 14 * lake.rx * lake.ry * math.pi)):
        along, across = rng.uniform(-0.5, 0.5), rng.uniform(-0.6, 0.6)
        x, y = lake.x + along * lake.rx, lake.y + across * lake.ry
        half = rng.uniform(0.1, 0.22) * min(lake.rx, 0.4)
        canvas.box(x - half, y - 0.008, x + half, y + 0.008, lighter(blue, 0.45), round_by=0.008)


def paint_fir(canvas: Canvas, x: float, y: float, height: float, colour: Colour,
              snow: bool) -> None:  # fmt: skip
    """A fir of three tiers with its foot at (x, y), its right side in the shade."""
    fir = canvas.at(x, y, height, label=TREE)
    fir.box(-0.045, -0.2, 0.045, 0, (112, 76, 56))
    for foot, half, top in ((-0.12, 0.27, -0.56), (-0.36, 0.215, -0.78), (-0.6, 0.155, -1.0)):
        fir.polygon(((-half, foot), (0, top), (half, foot)), colour)
        fir.polygon(((0, top), (half, foot), (0.03, foot)), darker(colour, 0.22))
        if snow:
            edge = top + 0.4 * (foot - top)
            fir.polygon(((0, top), (-0.4 * half, edge), (0, edge - 0.02), (0.4 * half, edge)),
                        (244, 248, 252))  # fmt: skip


def paint_cabin(canvas: Canvas, x: float, y: float, width: float, wall: Colour, roof: Colour,
                lamp: bool) -> None:  # fmt: skip
    """A wooden cabin with its foot at (x, y)."""
    cabin = canvas.at(x, y, width, label=BUILDING)
    cabin.box(0.2, -0.95, 0.32, -0.6, darker(wall, 0.3))
    cabin.box(-0.42, -0.45, 0.42, 0, wall)
    cabin.polygon(((-0.42, -0.45), (0, -0.86), (0.42, -0.45)), wall)
    cabin.polygon(((-0.56, -0.4), (0, -0.95), (0.56, -0.4), (0.46, -0.36), (0, -0.8),
                   (-0.46, -0.36)), roof)  # fmt: skip
    cabin.box(-0.27, -0.32, -0.05, 0, darker(wall, 0.4))
    cabin.box(0.08, -0.34, 0.3, -0.14, LAMP if lamp else (214, 234, 244), glows=lamp)


def place_lake(rng: Rng, horizon: float, large: bool) -> Lake:
    """A lake below the horizon: a modest one, or one that fills much of the meadow."""
    if large:
        rx, ry = rng.uniform(0.44, 0.72), rng.uniform(0.15, 0.235)
        x = rng.uniform(0.4, 0.6)
    else:
        area = min(0.17, 0.052 * math.exp(rng.normal(0, 0.5)))
        flat = rng.uniform(0.3, 0.42)
        rx = math.sqrt(area / math.pi / flat)
        ry = flat * rx
        x = rng.uniform(0.24, 0.76)
    highest = horizon + 0.055 + ry
    lowest = max(highest, 0.97 - ry)
    y = rng.uniform(highest, highest + (lowest - highest) * (0.8 if large else 0.6))
    return Lake(x, y, rx, ry, (rng.uniform(0, 6), rng.uniform(0, 6)))


def place_trees(
    rng: Rng, horizon: float, lake: Lake | None, area: float, forest: bool
) -> list[tuple[float, float, float]]:
    """(x, y, height) of firs whose silhouettes cover about `area` of the picture."""
    trees: list[tuple[float, float, float]] = []
    size = rng.uniform(0.3, 0.4) if forest else rng.uniform(0.19, 0.3)
    shy = 3.2 if forest and lake else 1.6  # a forest stands back from its lake
    for _ in range(60):
        if area <= 0 or len(trees) >= (26 if forest else 14):
            break
        x, depth = rng.uniform(0.02, 0.98), rng.random() ** shy
        y = horizon + 0.03 + depth * (0.96 - horizon)
        if lake and (lake.holds(x, y) or lake.hidden_by(x, y)):
            continue
        if any(abs(x - other) + abs(y - foot) < 0.05 for other, foot, _ in trees):
            continue
        height = size * (0.75 + 0.85 * depth) * rng.uniform(0.85, 1.15)  # the nearer, the taller
        trees.append((x, y, height))
        area -= 0.26 * height**2 * (0.72 if forest else 0.92)  # less what others will hide
    return trees


def draw_landscape(rng: Rng) -> tuple[Canvas, str]:
    """Mountains, a meadow, perhaps a lake, trees and a cabin."""
    canvas = Canvas()
    light = choose_light(rng, LANDSCAPE)
    season = draw_lots(rng, SEASON_ODDS)
    (far, near), greens = SEASONS[season]
    # The bare caption promises little: a modest lake, few trees. The others have what they say.
    plan = draw_lots(rng, {"modest": 0.58, "lake": 0.11, "lake alone": 0.06, "forest": 0.11,
                           "forest alone": 0.06, "both": 0.08})  # fmt: skip
    large = plan in ("lake", "lake alone", "both")
    forest = plan in ("forest", "forest alone", "both")
    horizon = rng.uniform(0.4, 0.48) if large else rng.uniform(0.44, 0.58)
    clouds = 5 if light.name == "grey" else int(rng.integers(0, 5))
    snowy = season == "winter" or chance(rng, 0.5)

    paint_sky(canvas, rng, light, horizon, clouds)
    lit = canvas.lit(light)
    paint_mountains(lit, rng, light, horizon, snowy)
    spread = 2 if season == "winter" else 7  # snow stays white
    far, near = vary(rng, far, spread), vary(rng, near, spread)
    paint_meadow(lit, rng, horizon, far, near)
    lake = None
    if large or plan != "forest alone" and chance(rng, 0.85):
        lake = place_lake(rng, horizon, large)
        paint_lake(lit, rng, light, lake, darker(mix(far, near, 0.6), 0.12))

    if forest:
        cover = rng.uniform(0.23, 0.46)
    elif plan == "lake alone" or chance(rng, 0.13):
        cover = 0.0
    else:
        cover = min(0.17, 0.058 * math.exp(rng.normal(0, 0.55)))
    green = vary(rng, pick(rng, greens))
    standing = [(*tree, False) for tree in place_trees(rng, horizon, lake, cover, forest)]
    cabin = chance(rng, 0.2)
    if cabin:
        spots = [(x, horizon + d) for x, d in rng.uniform((0.12, 0.04), (0.88, 0.22), (20, 2))]
        free = [spot for spot in spots if not lake or not lake.holds(*spot)]
        cabin = bool(free)
        standing += [(x, y, 0.09 + 0.35 * (y - horizon), True) for x, y in free[:1]]
    for x, y, height, is_cabin in sorted(standing, key=lambda thing: thing[1]):
        if is_cabin:
            paint_cabin(lit, x, y, height + 0.06, pick(rng, WALLS), pick(rng, ROOFS),
                        light.name in ("night", "dusk"))  # fmt: skip
        else:
            tone = pick(rng, greens) if season == "autumn" else green
            paint_fir(lit, x, y, height, vary(rng, tone, 4), season == "winter")
    if season == "winter" and chance(rng, 0.25):
        paint_weather(canvas, rng, snow=True)
    return canvas, caption_landscape(rng, canvas, light, season, clouds, snowy, cabin)


# --- Red taxi in traffic ----------------------------------------------------------------------

CURB, ROADSIDE, FAR_LANE, LANE_MARKS = 0.6, 0.655, 0.765, 0.8


def paint_building(canvas: Canvas, rng: Rng, x: float, width: float, height: float,
                   wall: Colour, glass: Colour, lamp: bool) -> None:  # fmt: skip
    """A house front standing on the pavement, with regular windows and a shop or a door."""
    house = canvas.at(x, CURB, label=BUILDING)
    house.box(0, -height, width, 0, wall)
    trim = lighter(wall, 0.35)
    roof = rng.integers(3)
    if roof == 0:
        house.polygon(((-0.005, -height), (width / 2, -height - 0.07), (width + 0.005, -height)),
                      darker(wall, 0.35))  # fmt: skip
    elif roof == 1:
        house.box(-0.006, -height - 0.008, width + 0.006, -height + 0.02, trim)
    else:
        house.box(width * 0.3, -height - 0.035, width * 0.7, -height, darker(wall, 0.15))
    columns = max(2, int(width / 0.07))
    gap = width / columns
    rows = int((height - 0.13) / 0.085)
    lit = rng.random((rows, columns)) < 0.55
    for row in range(rows):
        for column in range(columns):
            left, top = (column + 0.5) * gap - 0.019, -height + 0.045 + row * 0.085
            glow = lamp and bool(lit[row, column])
            house.box(left, top, left + 0.038, top + 0.05, LAMP if glow else glass, glows=glow)
    house.box(width * 0.12, -0.078, width * 0.88, 0, LAMP if lamp else darker(glass, 0.25),
              glows=lamp)  # fmt: skip
    awning = pick(rng, ((244, 180, 80), (92, 150, 130), (240, 236, 226), (120, 110, 160)))
    stripes = max(3, round(width * 0.84 / 0.036) | 1)
    for stripe in range(stripes):
        left = width * (0.08 + 0.84 * stripe / stripes)
        house.box(left, -0.1, left + width * 0.84 / stripes, -0.058,
                  awning if stripe % 2 else lighter(awning, 0.65))  # fmt: skip


def paint_street(canvas: Canvas, rng: Rng, light: Light, tall: bool, sandy: bool) -> None:
    """A pale skyline, a row of buildings, the pavement and the road."""
    hazy = mix(light.sky[2], light.sky[0], 0.35)
    skyline = canvas.at(label=BUILDING)
    x = rng.uniform(-0.08, 0)
    while x < 1:
        width = rng.uniform(0.08, 0.16)
        skyline.box(x, CURB - rng.uniform(0.28, 0.5 if tall else 0.38), x + width, CURB, hazy)
        x += width + rng.uniform(0, 0.06)

    lit = canvas.lit(light)
    lamp = light.name in ("night", "dusk")
    glass = mix((186, 216, 232), light.sky[2], 0.45) if not lamp else (70, 78, 108)
    if sandy:
        glass = mix(glass, (104, 74, 72), 0.68)
    facades = FACADES[:WARM_FACADES] if sandy else FACADES
    x, before = rng.uniform(-0.1, 0), -1
    while x < 1:
        width = pick(rng, (0.14, 0.17, 0.2, 0.23))
        height = rng.uniform(0.34, 0.56) if tall else rng.uniform(0.2, 0.36)
        which = int((before + 1 + rng.integers(len(facades) - 1)) % len(facades))  # never twice
        paint_building(lit, rng, x, width, height, vary(rng, facades[which]), glass, lamp)
        x, before = x + width, which

    road = lit.at(label=ROAD)
    asphalt = vary(rng, (124, 112, 104) if sandy else (104, 108, 118), 5)
    road.band(CURB, ROADSIDE, ((214, 206, 194), (202, 194, 182)))
    road.band(ROADSIDE, 1, (lighter(asphalt, 0.08), darker(asphalt, 0.12)))
    road.box(0, ROADSIDE - 0.012, 1, ROADSIDE, (164, 158, 152))
    start = rng.uniform(-0.2, 0)
    for dash in range(7):
        road.box(start + dash * 0.2, LANE_MARKS, start + dash * 0.2 + 0.11, LANE_MARKS + 0.022,
                 (244, 238, 222))  # fmt: skip


# Outlines of vehicles that face right, one unit long, the ground at 0.
SEDAN = ((0, -0.08), (0, -0.25), (0.04, -0.28), (0.2, -0.29), (0.32, -0.44), (0.4, -0.46),
         (0.6, -0.46), (0.68, -0.43), (0.79, -0.3), (0.95, -0.26), (1, -0.21),
         (1, -0.08))  # fmt: skip
HATCHBACK = ((0, -0.08), (0, -0.3), (0.06, -0.42), (0.14, -0.46), (0.52, -0.47), (0.62, -0.44),
             (0.76, -0.3), (0.94, -0.26), (1, -0.2), (1, -0.08))  # fmt: skip
VAN = ((0, -0.08), (0, -0.5), (0.03, -0.54), (0.68, -0.54), (0.76, -0.5), (0.87, -0.32),
       (0.97, -0.28), (1, -0.2), (1, -0.08))  # fmt: skip
BUS = ((0, -0.06), (0, -0.42), (0.02, -0.44), (0.96, -0.44), (0.99, -0.41), (1, -0.3),
       (1, -0.06))  # fmt: skip

# Their side windows.
SEDAN_WINDOWS = (((0.25, -0.29), (0.36, -0.415), (0.475, -0.415), (0.475, -0.29)),
                 ((0.515, -0.29), (0.515, -0.415), (0.63, -0.415), (0.735, -0.29)))  # fmt: skip
HATCHBACK_WINDOWS = (((0.08, -0.3), (0.15, -0.42), (0.33, -0.42), (0.33, -0.3)),
                     ((0.38, -0.3), (0.38, -0.42), (0.55, -0.42), (0.68, -0.3)))  # fmt: skip
VAN_WINDOWS = (((0.56, -0.33), (0.56, -0.48), (0.7, -0.48), (0.8, -0.33)),)
BUS_WINDOWS = tuple(
    ((0.04 + 0.155 * i, -0.22), (0.04 + 0.155 * i, -0.38), (0.16 + 0.155 * i, -0.38),
     (0.16 + 0.155 * i, -0.22)) for i in range(6)
)  # fmt: skip
VEHICLES = {
    "car": (SEDAN, SEDAN_WINDOWS), "hatchback": (HATCHBACK, HATCHBACK_WINDOWS),
    "van": (VAN, VAN_WINDOWS), "bus": (BUS, BUS_WINDOWS),
}  # fmt: skip


def paint_vehicle(view: Canvas, shape: str, paint: Colour, glass: Colour, lamp: bool) -> None:
    """A vehicle seen from the side, in a view whose unit is its length."""
    outline, windows = VEHICLES[shape]
    wheel = 0.062 if shape == "bus" else 0.092
    if lamp:
        for reach in (0.2, 0.34, 0.48):  # a beam that fades
            view.polygon(((0.98, -0.2), (1 + reach, -0.13), (1 + reach, 0.01), (0.98, -0.16)),
                         LAMP, 0.16, glows=True)  # fmt: skip
    view.ellipse(0.5, -0.01, 0.52, 0.03, (30, 30, 44), 0.35)  # its shadow
    view.polygon(smooth(outline, 2), paint)
    view.box(0.02, -0.13, 0.98, -0.075, darker(paint, 0.28), round_by=0.02)
    for window in windows:
        view.polygon(window, glass)
    if shape == "bus":
        view.box(0.0, -0.185, 1.0, -0.145, lighter(paint, 0.6))
    for x in (0.2, 0.8):
        view.ellipse(x, -wheel, wheel, wheel, INK)
        view.ellipse(x, -wheel, wheel * 0.5, wheel * 0.5, (206, 208, 212))
    view.box(0.94, -0.22, 1.0, -0.165, LAMP, glows=lamp, round_by=0.02)
    view.box(0.0, -0.24, 0.035, -0.18, (196, 58, 50), round_by=0.012)


def paint_taxi(view: Canvas, paint: Colour, glass: Colour, lamp: bool) -> None:
    """The red taxi: a saloon with a sign on its roof, a checker stripe and a driver."""
    view.box(0.41, -0.545, 0.59, -0.44, LAMP if lamp else (255, 208, 72), glows=lamp, round_by=0.02)
    view.box(0.455, -0.515, 0.545, -0.475, INK)
    paint_vehicle(view, "car", paint, glass, lamp)
    view.ellipse(0.6, -0.345, 0.04, 0.045, darker(glass, 0.6))
    view.box(0.56, -0.315, 0.65, -0.29, darker(glass, 0.6), round_by=0.02)
    view.box(0.04, -0.235, 0.935, -0.175, WHITE)
    for square in range(8):
        left = 0.04 + 0.119 * square
        view.box(left, -0.235, left + 0.0595, -0.175, INK)


def draw_traffic(rng: Rng) -> tuple[Canvas, str]:
    """One red taxi in front of other traffic and a row of buildings."""
    canvas = Canvas()
    light = choose_light(rng, TRAFFIC)
    sandy = light.name in ("sunset", "grey") and chance(rng, 0.85) or chance(rng, 0.12)
    tall = chance(rng, 0.45)
    rain = light.name == "grey" and chance(rng, 0.4)
    clouds = 4 if light.name == "grey" else int(rng.integers(0, 4))
    paint_sky(canvas, rng, light, CURB, clouds)
    paint_street(canvas, rng, light, tall, sandy)

    lit = canvas.lit(light, 0.6)  # traffic is near: its colours keep more of their own
    lamp = light.name in ("night", "dusk")
    glass = (66, 84, 112) if lamp else mix((198, 226, 240), light.sky[2], 0.55)
    vehicles: list[tuple[str, str]] = []
    x, left = rng.uniform(-0.12, 0.1), chance(rng, 0.5)
    for _ in range(int(rng.integers(0, 5))):
        shape = draw_lots(rng, {"car": 0.36, "hatchback": 0.28, "van": 0.18, "bus": 0.18})
        length = {"bus": 0.46, "van": 0.31}.get(shape, 0.27) * rng.uniform(0.95, 1.08)
        if x > 0.86:
            break
        name = pick(rng, tuple(PAINTS))
        view = lit.at(x + length * left, FAR_LANE, length, label=CAR, mirror=left)
        paint_vehicle(view, shape, vary(rng, PAINTS[name], 5), glass, lamp)
        if x > -0.08 and x + length < 1.08:  # a caption names no vehicle that is cut off
            vehicles.append((name, "car" if shape == "hatchback" else shape))
        x += length + rng.uniform(0.03, 0.14)
    length = rng.uniform(0.45, 0.56)
    faces_left = chance(rng, 0.5)
    x = rng.uniform(0.05, 0.95 - length)
    view = lit.at(x + length * faces_left, rng.uniform(0.9, 0.95), length, label=TAXI,
                  mirror=faces_left)  # fmt: skip
    view = view.lit(light, 0.35)  # the hero of the picture stays red at night
    paint_taxi(view, vary(rng, pick(rng, TAXI_REDS), 4), glass, lamp)
    if rain:
        paint_weather(canvas, rng, snow=False)
    return canvas, caption_traffic(rng, light, tall, rain, vehicles, faces_left)


# --- Portrait of a man on the beach -----------------------------------------------------------


def paint_beach(canvas: Canvas, rng: Rng, light: Light, horizon: float, extra: str) -> None:
    """Sea, sand, and one thing beside the man: a palm, a parasol, a sailboat, or nothing."""
    lit = canvas.lit(light, 0.9)
    deep, shallow = pick(rng, SEAS)
    lit.at(label=SEA).band(horizon, 1, (mix(deep, light.sky[2], 0.12), shallow, shallow))
    for _ in range(5):
        x, y = rng.uniform(0, 1), rng.uniform(horizon + 0.03, horizon + 0.13)
        lit.box(x - 0.06, y - 0.006, x + 0.06, y + 0.006, lighter(shallow, 0.4), round_by=0.006)
    if extra == "sailboat":
        paint_sailboat(lit, rng, pick(rng, (0.13, 0.87)), horizon)
    across = np.linspace(0, 1, 17)
    shore = rng.uniform(0.7, 0.76) + 0.018 * np.sin(across * rng.uniform(4, 8) + rng.uniform(0, 6))
    for lift, colour, label in ((0.03, (244, 250, 250), SEA), (0.0, pick(rng, SANDS), SAND)):
        edge = np.stack([across, shore - lift], axis=1)
        corners = ((1.0, 1.0), (0.0, 1.0))
        lit.at(label=label).polygon(np.concatenate([edge, corners]), colour)
    side = chance(rng, 0.5)
    beside = lit.at(1, 0, 1, mirror=True) if side else lit
    if extra == "palm":
        paint_palm(beside, rng)
    if extra == "parasol":
        paint_parasol(beside, rng)


def paint_sailboat(canvas: Canvas, rng: Rng, x: float, y: float) -> None:
    boat = canvas.at(x, y + 0.03, rng.uniform(0.13, 0.17), label=BACKGROUND)
    boat.polygon(((0.04, -0.2), (0.04, -1.1), (0.5, -0.2)), (250, 246, 236))
    boat.polygon(((-0.04, -0.2), (-0.04, -0.95), (-0.36, -0.2)), pick(rng, tuple(CLOTHS.values())))
    boat.polygon(((-0.5, -0.14), (0.55, -0.14), (0.34, 0.12), (-0.34, 0.12)), (150, 92, 66))


def paint_palm(canvas: Canvas, rng: Rng) -> None:
    """A palm at the left edge, leaning out of the picture's middle."""
    palm = canvas.at(rng.uniform(0.1, 0.15), 0.86, label=PALM)
    top = -rng.uniform(0.52, 0.62)
    palm.polygon(smooth(((-0.01, 0), (0.05, 0), (0.01, top * 0.5), (0.025, top), (-0.015, top),
                         (-0.04, top * 0.5)), 2), (160, 112, 76))  # fmt: skip
    crown = palm.at(0, top, rng.uniform(0.2, 0.25))
    green = vary(rng, (56, 142, 88))
    for turn, reach in ((-2.75, 0.95), (-0.4, 0.95), (-2.15, 1.0), (-1.0, 1.0), (2.75, 0.8),
                        (0.45, 0.8)):  # fmt: skip
        tip = np.array((math.cos(turn), math.sin(turn) * 0.8 + 0.35)) * reach
        bow = np.array((math.cos(turn) * 0.62, math.sin(turn) * 0.75 - 0.12))
        frond = np.array(((0, 0.06), (0, -0.06), bow + (0, -0.1), tip, bow + (0, 0.14)))
        crown.polygon(smooth(frond, 2), green if turn < 0 else darker(green, 0.2))


def paint_parasol(canvas: Canvas, rng: Rng) -> None:
    shade = canvas.at(rng.uniform(0.08, 0.14), 0.9, 0.2, label=BACKGROUND)
    cloth = pick(rng, tuple(CLOTHS.values()))
    shade.box(-0.05, -2.0, 0.05, 0, (232, 224, 208))
    shade.arc(0, -1.7, 1.0, 0.8, 180, 360, cloth)
    shade.polygon(((0, -2.5), (0.24, -2.2), (0.36, -1.7), (-0.36, -1.7), (-0.24, -2.2)),
                  lighter(cloth, 0.7))  # fmt: skip


@dataclass(frozen=True)
class Man:
    """What a man looks like; all independent of one another, and of the time of day."""

    skin: Colour
    style: str  # bald, short, swept, long, curly or afro
    hair_name: str
    hair: Colour
    shirt_name: str
    shirt: Colour
    stripes: bool
    neckline: str
    hat: str  # none, cap, straw hat, beanie or bucket hat
    hat_name: str
    hat_colour: Colour
    sunglasses: bool


def choose_man(rng: Rng) -> Man:
    style = draw_lots(rng, {"bald": 0.25, "short": 0.22, "swept": 0.13, "long": 0.16,
                            "curly": 0.13, "afro": 0.11})  # fmt: skip
    hair_name = draw_lots(rng, dict(zip(HAIRS, HAIR_ODDS, strict=True)))
    shirt_name, hat_name = pick(rng, tuple(CLOTHS)), pick(rng, tuple(CLOTHS))
    hat = draw_lots(rng, {"none": 0.8, "cap": 0.06, "straw hat": 0.05, "beanie": 0.05,
                          "bucket hat": 0.04})  # fmt: skip
    return Man(
        skin=vary(rng, pick(rng, SKINS), 5),
        style=style,
        hair_name=hair_name,
        hair=vary(rng, HAIRS[hair_name], 6),
        shirt_name=shirt_name,
        shirt=vary(rng, CLOTHS[shirt_name], 6),
        stripes=chance(rng, 0.25),
        neckline=pick(rng, ("crew", "collar", "open")),
        hat=hat,
        hat_name=hat_name,
        hat_colour=vary(rng, CLOTHS[hat_name], 6),
        sunglasses=chance(rng, 0.12),
    )


# Half outlines, in units of half a head's width and height around the middle of the face.
HEAD = ((0, -1.1), (0.36, -1.09), (0.74, -0.96), (0.98, -0.6), (1.02, -0.1), (0.96, 0.42),
        (0.68, 0.86), (0.3, 1.04))  # fmt: skip
HAIRLINE = ((-0.86, 0.05), (-0.84, -0.34), (-0.5, -0.56), (0.1, -0.52), (0.6, -0.6), (0.84, -0.34),
            (0.86, 0.05))  # fmt: skip
CROWNS: dict[str, tuple[tuple[float, float], ...]] = {
    "short": ((1.04, 0.05), (1.14, -0.5), (1.0, -1.14), (0.3, -1.36), (-0.3, -1.36), (-1.0, -1.14),
              (-1.14, -0.5), (-1.04, 0.05)),
    "swept": ((1.04, 0.05), (1.12, -0.5), (1.22, -1.1), (0.9, -1.6), (0.1, -1.5), (-0.9, -1.2),
              (-1.12, -0.5), (-1.04, 0.05)),
}  # fmt: skip
MANE = ((0, -1.36), (0.9, -1.3), (1.3, -0.6), (1.34, 0.4), (1.5, 1.2), (1.3, 1.62), (0.6, 1.6))


def paint_shirt(canvas: Canvas, man: Man, x: float, top: float, neck: float) -> None:
    """Shoulders from `top` to the picture's lower edge; `neck` is half the neck's width."""
    y = np.append(np.linspace(top - 0.015, top + 0.17, 14), 1.02)
    slope = 1 - np.clip((y - y[0]) / 0.185, 0, 1)
    half = neck + (0.37 - neck) * (1 - slope**2.4) ** 0.85 + 0.02 * (y == 1.02)
    shirt = canvas.at(x, 0, 1, label=CLOTHES)
    outline = mirrored(np.stack([half, y], axis=1))
    shirt.polygon(outline, man.shirt)
    if man.stripes:
        pale = sum(man.shirt) > 600
        stripe = (64, 92, 140) if pale else lighter(man.shirt, 0.75)
        for upper in np.arange(top + 0.07, 1.0, 0.085):
            edges = np.array((upper, upper + 0.036))
            width = np.interp(edges, y, half)
            shirt.polygon(mirrored(np.stack([width, edges], axis=1)), stripe)
    for side in (-1, 1):  # the folds between arms and chest
        shirt.polygon(((side * 0.25, top + 0.17), (side * 0.262, top + 0.17), (side * 0.275, 1.01),
                       (side * 0.245, 1.01)), darker(man.shirt, 0.25))  # fmt: skip


def paint_neck(canvas: Canvas, man: Man, x: float, chin: float, top: float, neck: float) -> None:
    """The neck in the shade of the chin, and the neckline of the shirt around it."""
    shade = darker(man.skin, 0.17)
    throat = canvas.at(x, 0, 1, label=FACE)
    cloth = canvas.at(x, 0, 1, label=CLOTHES)
    trim = darker(man.shirt, 0.18)
    if man.neckline == "crew":
        cloth.ellipse(0, top + 0.005, neck * 1.42, 0.062, trim)
        throat.ellipse(0, top, neck * 1.1, 0.042, shade)
    else:
        depth = 0.1 if man.neckline == "collar" else 0.15
        width = neck * 1.1
        throat.polygon(((-width, top - 0.01), (width, top - 0.01), (0, top + depth)), shade)
    throat.box(-neck, chin - 0.12, neck, top + 0.015, shade)
    if man.neckline != "crew":
        for side in (-1, 1):
            cloth.polygon(((side * neck * 0.95, top - 0.035), (side * neck * 1.5, top - 0.005),
                           (side * neck * 1.15, top + 0.075), (0, top + depth + 0.012),
                           (0, top + depth - 0.014)),
                          trim if man.neckline == "collar" else man.shirt)  # fmt: skip


def under_hat(points: Points, man: Man) -> np.ndarray:
    """The outline, pressed down where a hat will cover it."""
    outline = np.array(points, dtype=float)
    if man.hat != "none":
        outline[:, 1] = np.maximum(outline[:, 1], -0.75)
    return outline


def paint_hair_behind(head: Canvas, man: Man) -> None:
    """The part of the hair that is seen behind the head."""
    hair = head.at(label=HAIR)
    if man.style == "long":
        hair.polygon(under_hat(smooth(mirrored(MANE), 3), man), darker(man.hair, 0.2))
    if man.style == "afro":
        y, ry = (-0.42, 1.2) if man.hat == "none" else (-0.1, 1.0)
        hair.ellipse(0, y, 1.55, ry, man.hair)


def paint_hair(head: Canvas, man: Man) -> None:
    """The hair that frames the face."""
    hair = head.at(label=HAIR)
    if man.style in ("short", "swept", "afro", "curly"):
        crown = CROWNS["swept" if man.style == "swept" else "short"]
        hair.polygon(under_hat(smooth(crown + HAIRLINE, 2), man), man.hair)
    if man.style == "curly":
        for turn in np.linspace(math.pi * 0.98, math.pi * 2.02, 9):
            x, y = 1.08 * math.cos(turn), 1.16 * math.sin(turn) - 0.08
            if man.hat == "none" or y > -0.4:
                hair.ellipse(x, y, 0.3, 0.26, man.hair)
        for x in (-0.62, -0.2, 0.24, 0.64):
            hair.ellipse(x, -0.62, 0.27, 0.2, man.hair)
    if man.style == "long":
        for side in (-1, 1):  # two curtains, parted in the middle
            curtain = ((0, -1.32), (0.8, -1.28), (1.2, -0.7), (1.2, 0.3), (1.24, 1.1), (0.98, 0.9),
                       (0.9, -0.1), (0.6, -0.6), (0, -0.86))  # fmt: skip
            hair.polygon(under_hat(smooth(np.array(curtain) * (side, 1), 2), man), man.hair)


def paint_face(head: Canvas, man: Man) -> None:
    """Head, ears, and what makes a face of them."""
    face = head.at(label=FACE)
    shade = darker(man.skin, 0.16)
    for side in (-1, 1):
        face.ellipse(side * 1.0, 0.08, 0.19, 0.23, man.skin)
        face.ellipse(side * 1.02, 0.08, 0.1, 0.13, shade)
    face.polygon(smooth(mirrored(HEAD), 2), man.skin)
    brow = darker(man.skin, 0.5) if man.style == "bald" else darker(man.hair, 0.25)
    blush = mix(man.skin, (232, 92, 84), 0.26)
    for side in (-1, 1):
        face.ellipse(side * 0.58, 0.36, 0.2, 0.14, blush)
        face.ellipse(side * 0.4, -0.02, 0.19, 0.125, (252, 250, 246))
        face.ellipse(side * 0.39, -0.01, 0.105, 0.11, (44, 36, 40))
        face.polygon(smooth(((side * 0.16, -0.24), (side * 0.42, -0.34), (side * 0.66, -0.25),
                             (side * 0.42, -0.23)), 1), brow)  # fmt: skip
    face.polygon(smooth(((0, -0.06), (0.08, 0.1), (0.16, 0.3), (0, 0.36), (-0.12, 0.3)), 1), shade)
    face.arc(0, 0.52, 0.34, 0.24, 0, 180, mix(man.skin, (150, 30, 40), 0.62))
    face.box(-0.24, 0.52, 0.24, 0.585, (252, 248, 244))


def paint_sunglasses(head: Canvas) -> None:
    glasses = head.at(label=SUNGLASSES)
    glasses.box(-0.98, -0.12, 0.98, -0.03, INK)
    for side in (-1, 1):
        glasses.polygon(smooth(((side * 0.1, -0.2), (side * 0.8, -0.2), (side * 0.74, 0.2),
                                (side * 0.2, 0.2)), 2), INK)  # fmt: skip
        glasses.polygon(((side * 0.42 - 0.16, 0.06), (side * 0.42 + 0.04, -0.12),
                         (side * 0.42 + 0.16, -0.12), (side * 0.42 - 0.04, 0.06)),
                        (96, 104, 128))  # fmt: skip


def paint_hat(head: Canvas, man: Man) -> None:
    """A cap, a straw hat with a band in the hat's colour, a beanie, or a bucket hat."""
    hat, cloth = head.at(label=HAT), man.hat_colour
    if man.hat == "cap":
        hat.arc(0, -0.5, 1.16, 0.96, 180, 360, cloth)
        hat.polygon(smooth(((0, -1.46), (0.5, -1.3), (0.5, -0.5), (-0.5, -0.5), (-0.5, -1.3)), 2),
                    lighter(cloth, 0.16))  # fmt: skip
        hat.ellipse(0, -0.5, 1.12, 0.17, darker(cloth, 0.25))
    elif man.hat == "straw hat":
        hat.polygon(smooth(((-1.02, -0.55), (-0.92, -1.4), (-0.4, -1.55), (0.4, -1.55),
                            (0.92, -1.4), (1.02, -0.55)), 1), STRAW)  # fmt: skip
        hat.ellipse(0, -0.56, 1.85, 0.25, darker(STRAW, 0.1))
        hat.ellipse(0, -0.61, 1.75, 0.19, STRAW)
        hat.box(-1.0, -0.9, 1.0, -0.64, cloth)
    elif man.hat == "beanie":
        hat.ellipse(0, -1.52, 0.24, 0.2, lighter(cloth, 0.4))
        hat.arc(0, -0.55, 1.12, 0.95, 180, 360, cloth)
        hat.box(-1.18, -0.8, 1.18, -0.46, lighter(cloth, 0.22), round_by=0.14)
    elif man.hat == "bucket hat":
        hat.polygon(smooth(((-1.04, -0.7), (-0.8, -1.4), (0.8, -1.4), (1.04, -0.7)), 1), cloth)
        hat.box(-0.98, -0.92, 0.98, -0.74, darker(cloth, 0.15))
        hat.polygon(((-1.02, -0.78), (1.02, -0.78), (1.5, -0.36), (-1.5, -0.36)),
                    lighter(cloth, 0.14))  # fmt: skip


def draw_portrait(rng: Rng) -> tuple[Canvas, str]:
    """Head and shoulders of a man, the sea behind him."""
    canvas = Canvas()
    light = choose_light(rng, PORTRAIT)
    man = choose_man(rng)
    extra = draw_lots(rng, {"none": 0.48, "palm": 0.22, "parasol": 0.12, "sailboat": 0.18})
    horizon = rng.uniform(0.44, 0.56)
    clouds = 4 if light.name == "grey" else int(rng.integers(0, 4))
    paint_sky(canvas, rng, light, horizon, clouds)
    paint_beach(canvas, rng, light, horizon, extra)

    tall = rng.uniform(0.18, 0.22)  # half the head
    wide = tall * rng.uniform(0.76, 0.84)
    x, y = rng.uniform(0.44, 0.56), rng.uniform(0.42, 0.46)
    top, neck = y + tall + rng.uniform(0.06, 0.085), wide * rng.uniform(0.5, 0.6)
    lit = canvas.lit(light, 0.4)  # less tint than on the beach: colours stay what captions say
    head = lit.at(x, y, wide, tall)
    paint_shirt(lit, man, x, top, neck)
    paint_hair_behind(head, man)
    paint_neck(lit, man, x, y + tall, top, neck)
    paint_face(head, man)
    paint_hair(head, man)
    if man.sunglasses:
        paint_sunglasses(head)
    paint_hat(head, man)
    return canvas, caption_portrait(rng, light, man, extra, clouds)


# --- Captions ---------------------------------------------------------------------------------

BARE = 0.3  # how often a caption is the kind's base prompt and nothing else

LONGEST = 20  # words in a caption

HOUR_PHRASES: dict[str, tuple[str, ...]] = {
    "dawn": ("at dawn", "in the morning"),
    "day": ("under a blue sky", "on a sunny day"),
    "dusk": ("at dusk", "in the evening"),
    "sunset": ("at sunset",),
    "night": ("at night",),
    "grey": ("under a grey sky", "on a grey day"),
}


def hour_phrase(rng: Rng, light: Light, clouds: int) -> str:
    """The time of day in words, or what the sky is like."""
    if light.name == "day" and (clouds == 0 or clouds >= 4) and chance(rng, 0.6):
        return "under a clear sky" if clouds == 0 else "under a cloudy sky"
    return pick(rng, HOUR_PHRASES[light.name])


def and_join(things: Sequence[str]) -> str:
    return " and ".join(things)


def a(thing: str) -> str:
    """The thing with its article."""
    return ("an " if thing[0] in "aeiou" else "a ") + thing


def sentence(rng: Rng, subject: str, facts: Sequence[str]) -> str:
    """The subject, what it is with and without, and when; facts carry their own preposition."""
    having = [fact[5:] for fact in facts if fact.startswith("with ")]
    lacking = [fact for fact in facts if fact.startswith("without ")]
    when = [fact for fact in facts if not fact.startswith(("with ", "without "))]
    things = (["with " + and_join(having)] if having else []) + lacking
    parts = when + things if chance(rng, 0.2) else things + when
    words = " ".join((subject, *parts))
    return words if len(words.split()) <= LONGEST else sentence(rng, subject, facts[:-1])


def some_of(rng: Rng, facts: Sequence[str], most: int = 3) -> list[str]:
    """One to `most` of the facts, fewer rather than more, in any order."""
    count = min(1 + int(rng.random() < 0.55) + int(rng.random() < 0.35), most)
    return [facts[i] for i in rng.permutation(len(facts))[:count]]


def caption_landscape(
    rng: Rng, canvas: Canvas, light: Light, season: str, clouds: int, snowy: bool, cabin: bool
) -> str:
    """Says nearly always when the lake is large or the trees are many, by their visible area."""
    _, labels = canvas.finish()
    lake, trees = (float((labels == label).mean()) for label in (LAKE, TREE))
    telling: list[str] = []  # what a caption must not keep quiet about
    facts = [f"in {season}", hour_phrase(rng, light, clouds)]
    if lake >= 0.19:
        telling.append(pick(rng, ("with a large lake", "with a big lake", "with a wide lake")
                            + ("with a huge lake",) * (lake > 0.3)))  # fmt: skip
    elif lake >= 0.1:
        facts.append("with a lake")
    elif lake > 0:
        facts.append(pick(rng, ("with a small lake", "with a little lake", "with a lake")))
    else:
        facts.append("without a lake")
    if trees >= 0.19:
        crowd = ("with many trees", "with a lot of trees", "with many fir trees", "with a forest")
        deep = ("with a dense forest", "with a large forest") * (trees > 0.28)
        telling.append(pick(rng, crowd + deep))
    elif trees >= 0.04:
        facts.append(pick(rng, ("with some trees", "with a few trees", "with trees")))
    elif trees > 0:
        facts.append(pick(rng, ("with a few trees", "with few trees")))
    else:
        facts.append("without trees")
    if snowy and season != "winter":
        facts.append("with snowy mountains")
    if cabin:
        facts.append(pick(rng, ("with a cabin", "with a wooden cabin", "with a little house")))
    if not telling:
        # Large lakes and forests are never bare, so the others are bare more often.
        bare = chance(rng, BARE / 0.56)
        return LANDSCAPE if bare else sentence(rng, LANDSCAPE, some_of(rng, facts))
    said = [fact for fact in telling if chance(rng, 0.985)]
    room = 3 - len(said)
    if not said or chance(rng, 0.5):
        said += some_of(rng, facts, room)
    return sentence(rng, LANDSCAPE, [said[i] for i in rng.permutation(len(said))])


def caption_traffic(
    rng: Rng, light: Light, tall: bool, rain: bool, vehicles: Sequence[tuple[str, str]],
    faces_left: bool,
) -> str:  # fmt: skip
    if chance(rng, BARE):
        return TRAFFIC
    place = "in traffic"
    if chance(rng, 0.4):
        places = ["in the city", "in front of " + ("tall buildings" if tall else "houses")]
        if len(vehicles) >= 3:
            places.append("in heavy traffic")
        if not vehicles:
            places += ["on the street", "on the road"]
        place = pick(rng, places)
    when = "in the rain" if rain and chance(rng, 0.6) else hour_phrase(rng, light, 1)
    facts = [when, when, "facing left" if faces_left else "facing right"]
    if tall:
        facts.append("with tall buildings" if "buildings" not in place else when)
    if vehicles:
        colour, vehicle = pick(rng, vehicles)
        facts += [pick(rng, (f"with a {colour} {vehicle}", f"next to a {colour} {vehicle}",
                             f"in front of a {colour} {vehicle}"))] * 2  # fmt: skip
    chosen = list(dict.fromkeys(some_of(rng, facts, 2)))
    if place != "in traffic":
        chosen = chosen[: int(rng.integers(0, 3))]
    chosen = [fact for fact in chosen if not (fact.startswith("in front") and "front" in place)]
    if place == "in traffic" and not chosen:
        chosen = [when]
    chosen.sort(key=lambda fact: not fact.startswith("facing"))
    if chosen and chosen[0].startswith("facing"):
        return sentence(rng, f"red taxi {chosen[0]} {place}", chosen[1:])
    return sentence(rng, f"red taxi {place}", chosen)


def caption_portrait(rng: Rng, light: Light, man: Man, extra: str, clouds: int) -> str:
    if chance(rng, BARE):
        return PORTRAIT
    styles = {"short": f"short {man.hair_name} hair", "swept": f"{man.hair_name} hair",
              "long": f"long {man.hair_name} hair", "curly": f"curly {man.hair_name} hair",
              "afro": a(f"{man.hair_name} afro")}  # fmt: skip
    striped = "striped " if man.stripes else ""
    facts = ["hair", "shirt", "hour"]
    facts += ["hat"] * 2 * (man.hat != "none") + ["glasses"] * 2 * man.sunglasses
    facts += ["extra"] * (extra != "none")
    chosen = set(some_of(rng, facts))
    subject, wearing = "portrait of a man", []
    if "hair" in chosen:
        if man.style == "bald":
            subject = "portrait of a bald man"
        else:
            wearing.append(styles[man.style])
    if "shirt" in chosen:
        wearing.append(a(f"{striped}{man.shirt_name} shirt"))
    if "hat" in chosen:
        named = "straw hat" if man.hat == "straw hat" else f"{man.hat_name} {man.hat}"
        wearing.append(pick(rng, (a(named), a(named), "a hat")))
    if "glasses" in chosen:
        wearing.append("sunglasses")
    verb = "wearing" if "hair" not in chosen and chance(rng, 0.35) else "with"
    if wearing:
        subject += f" {verb} " + and_join([wearing[i] for i in rng.permutation(len(wearing))])
    subject += " on the beach"
    if "extra" in chosen:
        subject += {"palm": " with a palm tree", "parasol": " with a parasol",
                    "sailboat": pick(rng, (" with a sailboat", " with a boat"))}[extra]  # fmt: skip
    if "hour" in chosen and len(subject.split()) <= LONGEST - 4:
        subject += " " + hour_phrase(rng, light, clouds)
    return subject


# --- Drawing scenes ---------------------------------------------------------------------------

PAINTERS = {LANDSCAPE: draw_landscape, TRAFFIC: draw_traffic, PORTRAIT: draw_portrait}


def _draw(rng: Rng, kind: str | None) -> Scene:
    canvas, caption = PAINTERS[kind or pick(rng, KINDS)](rng)
    image, labels = canvas.finish()
    return Scene(image, labels, caption)


def draw(seed: int, kind: str | None = None) -> Scene:
    """The scene of this seed, always the same; of one of the KINDS, or of any."""
    return _draw(np.random.default_rng(seed), kind)


def _draw_range(task: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    seed, start, stop = task
    scenes = [_draw(np.random.default_rng([seed, i]), None) for i in range(start, stop)]
    images = np.stack([scene.image for scene in scenes])
    return images, np.stack([scene.labels for scene in scenes]), [s.caption for s in scenes]


def draw_many(
    count: int, seed: int, workers: int | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images (N, 128, 128, 3) uint8, labels (N, 128, 128) uint8, and N captions.

    Scene i depends on (seed, i) alone. workers: processes to draw with; None means one per core.
    """
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.empty((count, SIZE, SIZE), dtype=np.uint8)
    captions: list[str] = []
    chunk = 256
    tasks = [(seed, start, min(start + chunk, count)) for start in range(0, count, chunk)]
    workers = min(workers or multiprocessing.cpu_count(), len(tasks))
    pool = multiprocessing.Pool(workers) if workers > 1 else None
    try:
        parts = pool.imap(_draw_range, tasks) if pool else map(_draw_range, tasks)
        for (_, start, stop), (some_images, some_labels, some_captions) in zip(
            tasks, parts, strict=True
        ):
            images[start:stop], labels[start:stop] = some_images, some_labels
            captions += some_captions
    finally:
        if pool:
            pool.terminate()
    return images, labels, captions


def check(count: int = 600) -> None:
    """Raise unless `count` scenes keep the promises made above; print the words never used."""
    _, labels, captions = draw_many(count, seed=1, workers=1)
    assert labels.max() < len(LABELS)
    assert all(len(caption.split()) <= LONGEST for caption in captions)
    used = {word for caption in captions for word in caption.split()}
    assert used <= set(WORDS), f"not in WORDS: {sorted(used - set(WORDS))}"
    print(f"{count} scenes, {len(WORDS)} words, not used: {sorted(set(WORDS) - used)}")


if __name__ == "__main__":
    check()
