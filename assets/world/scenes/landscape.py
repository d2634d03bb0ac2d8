"""Nature landscape: mountains, a meadow, perhaps a lake, trees and a cabin."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .canvas import LABELS, LAMP, WHITE, Canvas, Colour, darker, lighter, mix
from .captions import BARE, LANDSCAPE, hour_phrase, sentence, some_of
from .chance import Rng
from .light import Light, choose_light, paint_sky, paint_weather

HOURS = "day 50, dawn 13, dusk 10, sunset 9, night 10, grey 8"
SEASONS = "spring 25, summer 39, autumn 18, winter 18"
# The bare caption promises little: a modest lake, few trees. The others have what they say.
PLANS = "modest 58, lake 11, lake only 6, forest 11, forest only 6, lake and forest 8"

# The far and the near edge of the meadow, and the firs that stand on it.
GREENS = {
    "spring": ("c4de7a", "7ebe5c", "2c8058, 429054, 24705c"),
    "summer": ("9eca60", "5ca04e", "1e6250, 2a7452, 1a544e"),
    "autumn": ("e8c468", "c69246", "3a684a, ce7030, b25430"),
    "winter": ("f6f9fc", "d6e4f0", "306666, 3c746c, 285862"),
}
MOUNTAINS = "5c709e, 7a749a, 587e92, 8c7a7c, 687480"
WATERS = "348acc, 287cbe, 469ed6, 3094c4"
WALLS = "a46842, ba8252, 86543e, cea878"
ROOFS = "963e38, 5e424a, 4a546e, b2583a"

# What captions say of a lake, or of trees, that cover at least so much of the picture.
TELLING = 0.19  # from here on they are rarely quiet about it
LAKE_FACTS = {
    0.3: "with a large lake, with a big lake, with a wide lake, with a huge lake",
    TELLING: "with a large lake, with a big lake, with a wide lake",
    0.1: "with a lake",
    1e-9: "with a small lake, with a little lake, with a lake",
    0: "without a lake",
}
MANY_TREES = "with many trees, with a lot of trees, with many fir trees, with a forest"
TREE_FACTS = {
    0.28: MANY_TREES + ", with a dense forest, with a large forest",
    TELLING: MANY_TREES,
    0.04: "with some trees, with a few trees, with trees",
    1e-9: "with a few trees, with few trees",
    0: "without trees",
}

Things = list[tuple[float, float, float]]  # where their feet stand, x and y, and their heights


class Lake(NamedTuple):
    """A lake's ellipse, and the waves of its shore."""

    x: float
    y: float
    rx: float
    ry: float
    phases: tuple[float, float]

    def shore(self, grow: float = 1) -> np.ndarray:
        """The outline, (40, 2)."""
        turn = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        waves = np.sin(2 * turn + self.phases[0]) * 0.07 + np.sin(3 * turn + self.phases[1]) * 0.05
        reach = grow * (1 + waves)
        x, y = self.x + self.rx * reach * np.cos(turn), self.y + self.ry * reach * np.sin(turn)
        return np.stack([x, y], axis=1)

    def holds(self, x: float, y: float) -> bool:
        return ((x - self.x) / self.rx) ** 2 + ((y - self.y) / self.ry) ** 2 < 1.1


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


def place_trees(rng: Rng, horizon: float, lake: Lake | None, area: float, forest: bool) -> Things:
    """Firs whose silhouettes cover about `area` of the picture."""
    trees: Things = []
    size = rng.uniform(0.3, 0.4) if forest else rng.uniform(0.19, 0.3)
    shy = 3.2 if forest and lake else 1.6  # a forest stands back from its lake
    for _ in range(60):
        if area <= 0 or len(trees) >= (26 if forest else 14):
            break
        x, depth = rng.uniform(0.02, 0.98), rng.random() ** shy
        y = horizon + 0.03 + depth * (0.96 - horizon)
        if lake and (lake.holds(x, y) or y > lake.y and abs(x - lake.x) < 0.6 * lake.rx):
            continue  # it would stand in the lake, or hide it
        if any(abs(x - other) + abs(y - foot) < 0.05 for other, foot, _ in trees):
            continue
        height = size * (0.75 + 0.85 * depth) * rng.uniform(0.85, 1.15)  # the nearer, the taller
        trees.append((x, y, height))
        area -= 0.26 * height**2 * (0.72 if forest else 0.92)  # less what others will hide
    return trees


def place_cabin(rng: Rng, horizon: float, lake: Lake | None) -> Things:
    """One cabin on dry land, or none if there is no room."""
    spots = [(x, horizon + d) for x, d in rng.uniform((0.12, 0.04), (0.88, 0.22), (20, 2))]
    dry = [spot for spot in spots if not lake or not lake.holds(*spot)]
    return [(x, y, 0.09 + 0.35 * (y - horizon)) for x, y in dry[:1]]


def paint_mountains(canvas: Canvas, rng: Rng, light: Light, horizon: float, snow: bool) -> None:
    """One to three ranges; the farther, the more they fade into the sky."""
    rock = rng.vary(rng.one_of(MOUNTAINS))
    white = mix(WHITE, light.horizon, 0.12)
    layers = int(rng.integers(1, 4))
    for layer in range(layers):
        near = (layer + 1) / layers
        colour = mix(rock, light.horizon, 0.62 - 0.5 * near)
        tallest = horizon * (0.72 - 0.34 * near) * rng.uniform(0.8, 1.1)
        count = int(rng.integers(3, 5))
        offset = rng.uniform(-0.15, 0.15)
        for place in rng.permutation(count):
            x = (place + 0.5) / count + offset + rng.uniform(-0.08, 0.08)
            height = tallest * rng.uniform(0.6, 1.0)
            half = height * rng.uniform(0.85, 1.2)
            peak = canvas.of("Mountain").at(x, horizon + 0.03, half, height + 0.03)
            peak.polygon("-100,0 0,-100 100,0", colour)
            peak.polygon("0,-100 100,0 22,0 -6,-38 10,-62", darker(colour, 0.14))
            if snow:
                peak.polygon("0,-100 -32,-68 -15,-73 -4,-58 10,-70 18,-62 32,-68", white)
                peak.polygon("0,-100 32,-68 18,-62 10,-70 4,-76", mix(white, colour, 0.3))


def paint_meadow(canvas: Canvas, rng: Rng, horizon: float, far: Colour, near: Colour) -> None:
    """Three rolling hills from the horizon down."""
    x = np.linspace(0, 1, 17)
    for nearness, drop, height in ((0, 0, 0.016), (0.45, 0.22, 0.03), (1, 0.58, 0.044)):
        hills = np.sin(x * rng.uniform(3, 6) + rng.uniform(0, 6)) * height
        ground = horizon + (1 - horizon) * drop + hills
        canvas.of("Meadow").below(ground, mix(far, near, nearness))


def paint_lake(canvas: Canvas, rng: Rng, light: Light, lake: Lake, bank: Colour) -> None:
    """Water with a bank, a lighter heart, and a few glints."""
    canvas.polygon(lake.shore(1.07), bank)
    blue = mix(rng.vary(rng.one_of(WATERS)), light.horizon, 0.1)
    canvas.of("Lake").polygon(lake.shore(), blue)
    heart = canvas.at(lake.x, lake.y + 0.08 * lake.ry)
    heart.polygon(lake.shore(0.74) - (lake.x, lake.y), lighter(blue, 0.12))
    for _ in range(round(2 + 14 * lake.rx * lake.ry * math.pi)):
        along, across = rng.uniform(-0.5, 0.5), rng.uniform(-0.6, 0.6)
        x, y = lake.x + along * lake.rx, lake.y + across * lake.ry
        half = rng.uniform(0.1, 0.22) * min(lake.rx, 0.4)
        canvas.box(x - half, y - 0.008, x + half, y + 0.008, lighter(blue, 0.45), round_by=0.008)


def paint_fir(fir: Canvas, colour: Colour, snow: bool) -> None:
    """A fir of three tiers, one unit high, its right side in the shade."""
    fir.box(-0.045, -0.2, 0.045, 0, "704c38")
    for foot, half, top in ((-0.12, 0.27, -0.56), (-0.36, 0.215, -0.78), (-0.6, 0.155, -1.0)):
        fir.polygon(((-half, foot), (0, top), (half, foot)), colour)
        fir.polygon(((0, top), (half, foot), (0.03, foot)), darker(colour, 0.22))
        if snow:
            edge, reach = top + 0.4 * (foot - top), 0.4 * half
            fir.polygon(((0, top), (-reach, edge), (0, edge - 0.02), (reach, edge)), "f4f8fc")


def paint_cabin(cabin: Canvas, wall: Colour, roof: Colour, lamp: bool) -> None:
    """A wooden cabin, about one unit wide."""
    cabin.box(0.2, -0.95, 0.32, -0.6, darker(wall, 0.3))
    cabin.box(-0.42, -0.45, 0.42, 0, wall)
    cabin.polygon("-42,-45 0,-86 42,-45", wall)
    cabin.polygon("-56,-40 0,-95 56,-40 46,-36 0,-80 -46,-36", roof)
    cabin.box(-0.27, -0.32, -0.05, 0, darker(wall, 0.4))
    cabin.box(0.08, -0.34, 0.3, -0.14, LAMP if lamp else "d6eaf4")


def draw_landscape(rng: Rng) -> tuple[Canvas, str]:
    """The picture and its caption."""
    canvas = Canvas()
    light = choose_light(rng, HOURS)
    season = rng.lots(SEASONS)
    winter = season == "winter"
    plan = rng.lots(PLANS)
    large, forest = "lake" in plan, "forest" in plan
    horizon = rng.uniform(0.4, 0.48) if large else rng.uniform(0.44, 0.58)
    clouds = 5 if light.hour == "grey" else int(rng.integers(0, 5))
    snowy = winter or rng.chance(0.5)

    paint_sky(canvas, rng, light, horizon, clouds)
    lit = canvas.lit(light.tint, light.strength)
    paint_mountains(lit, rng, light, horizon, snowy)
    *edges, firs = GREENS[season]
    far, near = (rng.vary(edge, 2 if winter else 7) for edge in edges)  # snow stays white
    paint_meadow(lit, rng, horizon, far, near)
    lake = None
    if large or plan != "forest only" and rng.chance(0.85):
        lake = place_lake(rng, horizon, large)
        paint_lake(lit, rng, light, lake, darker(mix(far, near, 0.6), 0.12))

    if forest:
        cover = rng.uniform(0.23, 0.46)
    elif plan == "lake only" or rng.chance(0.13):
        cover = 0.0
    else:
        cover = min(0.17, 0.058 * math.exp(rng.normal(0, 0.55)))
    green = rng.vary(rng.one_of(firs))
    trees = place_trees(rng, horizon, lake, cover, forest)
    cabins = place_cabin(rng, horizon, lake) if rng.chance(0.2) else []
    for thing in sorted(trees + cabins, key=lambda thing: thing[1]):  # the farthest first
        x, y, height = thing
        if thing in cabins:
            cabin = lit.of("Building").at(x, y, height + 0.06)
            paint_cabin(cabin, rng.one_of(WALLS), rng.one_of(ROOFS), light.lamps)
        else:
            tone = rng.one_of(firs) if season == "autumn" else green
            paint_fir(lit.of("Tree").at(x, y, height), rng.vary(tone, 4), winter)
    if winter and rng.chance(0.25):
        paint_weather(canvas, rng, snow=True)

    facts = [f"in {season}", hour_phrase(rng, light.hour, clouds)]
    telling: list[str] = []
    _, labels = canvas.finish()
    for label, words in (("Lake", LAKE_FACTS), ("Tree", TREE_FACTS)):
        share = (labels == LABELS.index(label)).mean()
        fact = rng.one_of(next(words[least] for least in words if share >= least))
        (telling if share >= TELLING else facts).append(fact)
    if snowy and not winter:
        facts.append("with snowy mountains")
    if cabins:
        facts.append(rng.one_of("with a cabin, with a wooden cabin, with a little house"))
    return canvas, caption(rng, telling, facts)


def caption(rng: Rng, telling: list[str], facts: list[str]) -> str:
    """Says nearly always what is telling, and some of the other facts."""
    if not telling:
        # Large lakes and forests are never bare, so the others are bare more often.
        bare = rng.chance(BARE / 0.56)
        return LANDSCAPE if bare else sentence(rng, LANDSCAPE, some_of(rng, facts))
    said = [fact for fact in telling if rng.chance(0.985)]
    if not said or rng.chance(0.5):
        said += some_of(rng, facts, 3 - len(said))
    return sentence(rng, LANDSCAPE, rng.shuffled(said))
