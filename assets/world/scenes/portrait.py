"""Portrait of a man on the beach: head and shoulders, the sea behind him."""

from __future__ import annotations

import math

import numpy as np

from .canvas import INK, Canvas, Colour, Outline, darker, lighter, mirrored, mix, points, smooth
from .captions import BARE, LONGEST, PORTRAIT, a, hour_phrase, some_of
from .chance import Rng, table
from .light import Light, choose_light, paint_sky

HOURS = "day 50, dawn 10, dusk 10, sunset 13, night 8, grey 9"
EXTRAS = "none 48, palm 22, parasol 12, sailboat 18"
STYLES = "bald 25, short 22, swept 13, long 16, curly 13, afro 11"
HAIRS = "black 20, brown 22, blond 17, red 11, grey 8, white 6, blue 4, green 4, purple 4, pink 4"
HATS = "none 80, cap 6, straw hat 5, beanie 5, bucket hat 4"
STRAW_HATS = "none 50, straw hat 50"

SEAS = (("2682be", "70ced8"), ("1e92b2", "84dad0"), ("3674b8", "78bcdc"))
SANDS = "f6dea8, eed096, fae8c0, e8cca0"
SKINS = "ffe0c4, f8d0b0, f0c09a, e2ac82, ce946a, b27852, 966242, 764c36, 5c3c2e"
HAIR_COLOURS = table(
    "black 28242a, brown 6a442e, blond ecc468, red c45428, grey 96989e, white f0eee8, "
    "blue 3e6ec8, green 429660, purple 8454ac, pink f082aa"
)
CLOTHS = table(
    "red d63e3c, orange f08e40, yellow f6ce54, green 4ca060, teal 2a9c9e, blue 3c70c8, "
    "purple 845eb0, pink f092ac, white f6f6f2, grey 8e96a0, black 343642, brown 8e6246"
)
STRAW = "e8c882"

# Outlines around the middle of the face, in percent of half a head's width and height.
HEAD = "0,-110 36,-109 74,-96 98,-60 102,-10 96,42 68,86 30,104"  # right half
HAIRLINE = " -86,5 -84,-34 -50,-56 10,-52 60,-60 84,-34 86,5"
SHORT = "104,5 114,-50 100,-114 30,-136 -30,-136 -100,-114 -114,-50 -104,5" + HAIRLINE
SWEPT = "104,5 112,-50 122,-110 90,-160 10,-150 -90,-120 -112,-50 -104,5" + HAIRLINE
MANE = "0,-136 90,-130 130,-60 134,40 150,120 130,162 60,160"  # right half
CURTAIN = "0,-132 80,-128 120,-70 120,30 124,110 98,90 90,-10 60,-60 0,-86"


class Man:
    """What a man looks like; all independent of one another, and of the time of day."""

    def __init__(self, rng: Rng, hats: str) -> None:
        self.style = rng.lots(STYLES)
        self.hair_name = rng.lots(HAIRS)
        self.shirt_name, self.hat_name = rng.pick(list(CLOTHS)), rng.pick(list(CLOTHS))
        self.hat = rng.lots(hats)
        self.skin = rng.vary(rng.one_of(SKINS), 5)
        self.hair = rng.vary(HAIR_COLOURS[self.hair_name], 6)
        self.shirt = rng.vary(CLOTHS[self.shirt_name], 6)
        self.stripes = rng.chance(0.25)
        self.neckline = rng.one_of("crew, collar, open")
        self.hat_colour = rng.vary(CLOTHS[self.hat_name], 6)
        self.sunglasses = rng.chance(0.12)


def paint_beach(canvas: Canvas, rng: Rng, light: Light, horizon: float, extra: str) -> None:
    """Sea, sand, and one thing beside the man: a palm, a parasol, a sailboat, or nothing."""
    lit = canvas.lit(light.tint, light.strength * 0.9)
    deep, shallow = rng.pick(SEAS)
    lit.of("Sea").band(horizon, 1, (mix(deep, light.horizon, 0.12), shallow, shallow))
    for _ in range(5):
        x, y = rng.uniform(0, 1), rng.uniform(horizon + 0.03, horizon + 0.13)
        lit.box(x - 0.06, y - 0.006, x + 0.06, y + 0.006, lighter(shallow, 0.4), round_by=0.006)
    if extra == "sailboat":
        x = rng.pick((0.13, 0.87))
        boat = lit.of("Background").at(x, horizon + 0.03, rng.uniform(0.13, 0.17))
        boat.polygon("4,-20 4,-110 50,-20", "faf6ec")
        boat.polygon("-4,-20 -4,-95 -36,-20", rng.pick(list(CLOTHS.values())))
        boat.polygon("-50,-14 55,-14 34,12 -34,12", "965c42")
    across = np.linspace(0, 1, 17)
    shore = rng.uniform(0.7, 0.76) + 0.018 * np.sin(across * rng.uniform(4, 8) + rng.uniform(0, 6))
    lit.of("Sea").below(shore - 0.03, "f4fafa")  # the foam of a wave
    lit.of("Sand").below(shore, rng.one_of(SANDS))
    beside = lit.at(1, 0, mirror=True) if rng.chance(0.5) else lit
    if extra == "palm":
        paint_palm(beside.of("Palm").at(rng.uniform(0.1, 0.15), 0.86), rng)
    if extra == "parasol":
        parasol = beside.of("Background").at(rng.uniform(0.08, 0.14), 0.9, 0.2)
        cloth = rng.pick(list(CLOTHS.values()))
        parasol.box(-0.05, -2, 0.05, 0, "e8e0d0")
        parasol.dome(0, -1.7, 1, 0.8, cloth)
        parasol.polygon("0,-250 24,-220 36,-170 -36,-170 -24,-220", lighter(cloth, 0.7))


def paint_palm(palm: Canvas, rng: Rng) -> None:
    """A bent trunk, and six fronds, two of which hang in the shade."""
    top = -rng.uniform(0.52, 0.62)
    bend = top * 0.5
    trunk = ((-0.01, 0), (0.05, 0), (0.01, bend), (0.025, top), (-0.015, top), (-0.04, bend))
    palm.polygon(smooth(trunk), "a0704c")
    crown = palm.at(0, top, rng.uniform(0.2, 0.25))
    green = rng.vary("388e58")
    turns = ((-2.75, 0.95), (-0.4, 0.95), (-2.15, 1), (-1, 1), (2.75, 0.8), (0.45, 0.8))
    for turn, reach in turns:
        tip = np.array((math.cos(turn), math.sin(turn) * 0.8 + 0.35)) * reach
        bow = np.array((math.cos(turn) * 0.62, math.sin(turn) * 0.75 - 0.12))
        frond = np.array(((0, 0.06), (0, -0.06), bow + (0, -0.1), tip, bow + (0, 0.14)))
        crown.polygon(smooth(frond), green if turn < 0 else darker(green, 0.2))


def paint_shirt(body: Canvas, man: Man, top: float, neck: float) -> None:
    """Shoulders from `top` to the picture's lower edge; `neck` is half the neck's width."""
    y = np.append(np.linspace(top - 0.015, top + 0.17, 14), 1.02)
    slope = 1 - np.clip((y - y[0]) / 0.185, 0, 1)
    half = neck + (0.37 - neck) * (1 - slope**2.4) ** 0.85 + 0.02 * (y == 1.02)
    shirt = body.of("Upper-clothes")
    shirt.polygon(mirrored(np.stack([half, y], axis=1)), man.shirt)
    if man.stripes:
        pale = sum(man.shirt) > 600
        for upper in np.arange(top + 0.07, 1, 0.085):
            edges = np.array((upper, upper + 0.036))
            stripe = mirrored(np.stack([np.interp(edges, y, half), edges], axis=1))
            shirt.polygon(stripe, "405c8c" if pale else lighter(man.shirt, 0.75))
    fold = ((0.25, top + 0.17), (0.262, top + 0.17), (0.275, 1.01), (0.245, 1.01))
    for side in shirt.sides():  # between arm and chest
        side.polygon(fold, darker(man.shirt, 0.25))


def paint_neck(body: Canvas, man: Man, chin: float, top: float, neck: float) -> None:
    """The neck in the shade of the chin, and the neckline of the shirt around it."""
    throat, cloth = body.of("Face"), body.of("Upper-clothes")
    shade, trim = darker(man.skin, 0.17), darker(man.shirt, 0.18)
    if man.neckline == "crew":
        cloth.ellipse(0, top + 0.005, neck * 1.42, 0.062, trim)
        throat.ellipse(0, top, neck * 1.1, 0.042, shade)
    throat.box(-neck, chin - 0.12, neck, top + 0.015, shade)
    if man.neckline != "crew":
        depth, colour = (0.1, trim) if man.neckline == "collar" else (0.15, man.shirt)
        width, tip = neck * 1.1, top + depth
        throat.polygon(((-width, top - 0.01), (width, top - 0.01), (0, tip)), shade)
        outer = ((neck * 0.95, top - 0.035), (neck * 1.5, top - 0.005), (neck * 1.15, top + 0.075))
        for side in cloth.sides():
            side.polygon((*outer, (0, tip + 0.012), (0, tip - 0.014)), colour)


def under_hat(outline: Outline, man: Man) -> np.ndarray:
    """The outline, pressed down where a hat will cover it."""
    return points(outline) if man.hat == "none" else np.maximum(points(outline), (-np.inf, -0.75))


def paint_hair_behind(hair: Canvas, man: Man) -> None:
    """The part of the hair that is seen behind the head."""
    if man.style == "long":
        hair.polygon(under_hat(smooth(mirrored(MANE), 3), man), darker(man.hair, 0.2))
    if man.style == "afro":
        y, ry = (-0.42, 1.2) if man.hat == "none" else (-0.1, 1.0)
        hair.ellipse(0, y, 1.55, ry, man.hair)


def paint_hair(hair: Canvas, man: Man) -> None:
    """The hair that frames the face."""
    if man.style in ("short", "swept", "afro", "curly"):
        crown = smooth(SWEPT if man.style == "swept" else SHORT)
        hair.polygon(under_hat(crown, man), man.hair)
    if man.style == "curly":
        for turn in np.linspace(math.pi * 0.98, math.pi * 2.02, 9):
            x, y = 1.08 * math.cos(turn), 1.16 * math.sin(turn) - 0.08
            if man.hat == "none" or y > -0.4:
                hair.ellipse(x, y, 0.3, 0.26, man.hair)
        for x in (-0.62, -0.2, 0.24, 0.64):
            hair.ellipse(x, -0.62, 0.27, 0.2, man.hair)
    if man.style == "long":
        for side in hair.sides():
            side.polygon(under_hat(smooth(CURTAIN), man), man.hair)


def paint_face(face: Canvas, man: Man) -> None:
    """Head, ears, and what makes a face of them."""
    shade = darker(man.skin, 0.16)
    for side in face.sides():
        side.ellipse(1, 0.08, 0.19, 0.23, man.skin)
        side.ellipse(1.02, 0.08, 0.1, 0.13, shade)
    face.polygon(smooth(mirrored(HEAD)), man.skin)
    brow = darker(man.skin, 0.5) if man.style == "bald" else darker(man.hair, 0.25)
    for side in face.sides():
        side.ellipse(0.58, 0.36, 0.2, 0.14, mix(man.skin, "e85c54", 0.26))
        side.ellipse(0.4, -0.02, 0.19, 0.125, "fcfaf6")
        side.ellipse(0.39, -0.01, 0.105, 0.11, "2c2428")
        side.polygon(smooth("16,-24 42,-34 66,-25 42,-23", 1), brow)
    face.polygon(smooth("0,-6 8,10 16,30 0,36 -12,30", 1), shade)
    face.dome(0, 0.52, 0.34, -0.24, mix(man.skin, "961e28", 0.62))
    face.box(-0.24, 0.52, 0.24, 0.585, "fcf8f4")


def paint_sunglasses(glasses: Canvas) -> None:
    glasses.box(-0.98, -0.12, 0.98, -0.03, INK)
    for side in glasses.sides():
        side.polygon(smooth("10,-20 80,-20 74,20 20,20"), INK)
    for x in (-0.42, 0.42):
        glasses.polygon(points("-16,6 4,-12 16,-12 -4,6") + (x, 0), "606880")


def paint_hat(hat: Canvas, kind: str, cloth: Colour) -> None:
    """A cap, a straw hat with a band of cloth, a beanie, or a bucket hat."""
    if kind == "cap":
        hat.dome(0, -0.5, 1.16, 0.96, cloth)
        hat.polygon(smooth("0,-146 50,-130 50,-50 -50,-50 -50,-130"), lighter(cloth, 0.16))
        hat.ellipse(0, -0.5, 1.12, 0.17, darker(cloth, 0.25))
    elif kind == "straw hat":
        hat.polygon(smooth("-102,-55 -92,-140 -40,-155 40,-155 92,-140 102,-55", 1), STRAW)
        hat.ellipse(0, -0.56, 1.85, 0.25, darker(STRAW, 0.1))
        hat.ellipse(0, -0.61, 1.75, 0.19, STRAW)
        hat.box(-1, -0.9, 1, -0.64, cloth)
    elif kind == "beanie":
        hat.ellipse(0, -1.52, 0.24, 0.2, lighter(cloth, 0.4))
        hat.dome(0, -0.55, 1.12, 0.95, cloth)
        hat.box(-1.18, -0.8, 1.18, -0.46, lighter(cloth, 0.22), round_by=0.14)
    elif kind == "bucket hat":
        hat.polygon(smooth("-104,-70 -80,-140 80,-140 104,-70", 1), cloth)
        hat.box(-0.98, -0.92, 0.98, -0.74, darker(cloth, 0.15))
        hat.polygon("-102,-78 102,-78 150,-36 -150,-36", lighter(cloth, 0.14))


def draw_portrait(rng: Rng, hats: str = HATS) -> tuple[Canvas, str]:
    """The picture and its caption; `hats` are the kinds and how common each is."""
    canvas = Canvas()
    light = choose_light(rng, HOURS)
    man = Man(rng, hats)
    extra = rng.lots(EXTRAS)
    horizon = rng.uniform(0.44, 0.56)
    clouds = 4 if light.hour == "grey" else int(rng.integers(0, 4))
    paint_sky(canvas, rng, light, horizon, clouds)
    paint_beach(canvas, rng, light, horizon, extra)

    tall = rng.uniform(0.18, 0.22)  # half the head
    wide = tall * rng.uniform(0.76, 0.84)
    x, y = rng.uniform(0.44, 0.56), rng.uniform(0.42, 0.46)
    top, neck = y + tall + rng.uniform(0.06, 0.085), wide * rng.uniform(0.5, 0.6)
    # Less tint than on the beach: colours stay what captions say.
    lit = canvas.lit(light.tint, light.strength * 0.4)
    body, head = lit.at(x, 0), lit.at(x, y, wide, tall)
    paint_shirt(body, man, top, neck)
    paint_hair_behind(head.of("Hair"), man)
    paint_neck(body, man, y + tall, top, neck)
    paint_face(head.of("Face"), man)
    paint_hair(head.of("Hair"), man)
    if man.sunglasses:
        paint_sunglasses(head.of("Sunglasses"))
    paint_hat(head.of("Hat"), man.hat, man.hat_colour)
    return canvas, caption(rng, light.hour, man, extra, clouds)


def caption(rng: Rng, hour: str, man: Man, extra: str, clouds: int) -> str:
    """What he looks like or wears, what stands beside him, and when; nearly always his hat.

    Hats are few and of many kinds: a word that is said of only some of them is not learnt.
    """
    hat = man.hat != "none"
    if rng.chance(BARE / 3 if hat else BARE):
        return PORTRAIT
    topics = ["hair", "shirt", "hour"]
    topics += ["glasses"] * 2 * man.sunglasses + ["extra"] * (extra != "none")
    chosen = ["hat"] * hat + some_of(rng, topics, most=2 if hat else 3)
    if hat and rng.chance(0.3):
        chosen = ["hat"]
    bald = "hair" in chosen and man.style == "bald"
    wearing = []
    if "hair" in chosen and not bald:
        special = {"swept": f"{man.hair_name} hair", "afro": f"a {man.hair_name} afro"}
        wearing.append(special.get(man.style, f"{man.style} {man.hair_name} hair"))
    if "shirt" in chosen:
        wearing.append(a(f"{'striped ' * man.stripes}{man.shirt_name} shirt"))
    if "hat" in chosen:
        kind = a(man.hat if man.hat == "straw hat" else f"{man.hat_name} {man.hat}")
        wearing.append(rng.pick((kind, "a hat")))
    if "glasses" in chosen:
        wearing.append("sunglasses")
    verb = "wearing" if "hair" not in chosen and rng.chance(0.35) else "with"
    words = "portrait of a bald man" if bald else "portrait of a man"
    if wearing:
        words += f" {verb} " + " and ".join(rng.shuffled(wearing))
    words += " on the beach"
    if "extra" in chosen:
        boat = rng.one_of("sailboat, boat")
        words += " with a " + {"palm": "palm tree", "sailboat": boat}.get(extra, extra)
    if "hour" in chosen and len(words.split()) <= LONGEST - 4:
        words += " " + hour_phrase(rng, hour, clouds)
    return words
