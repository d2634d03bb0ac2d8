"""Red taxi in traffic: one taxi in front of other vehicles and a row of buildings."""

from __future__ import annotations

import numpy as np

from .canvas import INK, LAMP, WHITE, Canvas, Colour, Outline, darker, lighter, mix, smooth
from .captions import BARE, TRAFFIC, hour_phrase, sentence, some_of
from .chance import Rng, table
from .light import Light, choose_light, paint_sky, paint_weather

# Fewer blue skies than in the other scenes.
HOURS = "day 42, dawn 6, dusk 10, sunset 18, night 10, grey 14"
VEHICLES = "car 36, hatchback 28, van 18, bus 18"

SANDY_FACADES = "ecc896, e2aa76, d68868, f4deb8, c69874"
FACADES = SANDY_FACADES + ", 96b8b0, 7c9ab8, bac4ce, e8b2a8, aabe94, 9284a4, b2765c"
AWNINGS = "f4b450, 5c9682, f0ece2, 786ea0"
TAXI_REDS = "de282c, ce2028, e63430, d6243a"
PAINTS = table(
    "blue 3a74be, white f2f2ee, yellow f6c846, green 529c66, teal 2c969a, grey 88929c, "
    "black 3a3e4a, purple 7c5c9e, cream eedcb0"
)

CURB, ROADSIDE, FAR_LANE, LANE_MARKS = 0.6, 0.655, 0.765, 0.8

# Vehicles that face right, one unit long, the ground at 0; and their side windows.
LENGTHS = {"car": 0.27, "hatchback": 0.27, "van": 0.31, "bus": 0.46}
BODIES = {
    "car": "0,-8 0,-25 4,-28 20,-29 32,-44 40,-46 60,-46 68,-43 79,-30 95,-26 100,-21 100,-8",
    "hatchback": "0,-8 0,-30 6,-42 14,-46 52,-47 62,-44 76,-30 94,-26 100,-20 100,-8",
    "van": "0,-8 0,-50 3,-54 68,-54 76,-50 87,-32 97,-28 100,-20 100,-8",
    "bus": "0,-6 0,-42 2,-44 96,-44 99,-41 100,-30 100,-6",
}
WINDOWS: dict[str, tuple[Outline, ...]] = {
    "car": ("25,-29 36,-41.5 47.5,-41.5 47.5,-29", "51.5,-29 51.5,-41.5 63,-41.5 73.5,-29"),
    "hatchback": ("8,-30 15,-42 33,-42 33,-30", "38,-30 38,-42 55,-42 68,-30"),
    "van": ("56,-33 56,-48 70,-48 80,-33",),
    "bus": tuple(
        ((x + 0.04, -0.22), (x + 0.04, -0.38), (x + 0.16, -0.38), (x + 0.16, -0.22))
        for x in 0.155 * np.arange(6)
    ),
}


def paint_building(
    house: Canvas, rng: Rng, width: float, height: float, wall: Colour, glass: Colour, lamp: bool
) -> None:
    """A house front standing on the pavement, with regular windows and a shop."""
    house.box(0, -height, width, 0, wall)
    roof = rng.integers(3)
    if roof == 0:
        gable = ((-0.005, -height), (width / 2, -height - 0.07), (width + 0.005, -height))
        house.polygon(gable, darker(wall, 0.35))
    elif roof == 1:
        house.box(-0.006, -height - 0.008, width + 0.006, -height + 0.02, lighter(wall, 0.35))
    else:
        house.box(width * 0.3, -height - 0.035, width * 0.7, -height, darker(wall, 0.15))
    columns, rows = max(2, int(width / 0.07)), int((height - 0.13) / 0.085)
    for (row, column), ticket in np.ndenumerate(rng.random((rows, columns))):
        left, top = (column + 0.5) * (width / columns) - 0.019, -height + 0.045 + row * 0.085
        pane = LAMP if lamp and ticket < 0.55 else glass
        house.box(left, top, left + 0.038, top + 0.05, pane)
    house.box(width * 0.12, -0.078, width * 0.88, 0, LAMP if lamp else darker(glass, 0.25))
    awning = rng.one_of(AWNINGS)
    stripes = max(3, round(width * 0.84 / 0.036) | 1)
    for stripe in range(stripes):
        left = width * (0.08 + 0.84 * stripe / stripes)
        colour = awning if stripe % 2 else lighter(awning, 0.65)
        house.box(left, -0.1, left + width * 0.84 / stripes, -0.058, colour)


def paint_street(canvas: Canvas, rng: Rng, light: Light, tall: bool, sandy: bool) -> None:
    """A pale skyline, a row of buildings, the pavement and the road."""
    hazy = mix(light.horizon, light.zenith, 0.35)
    x = rng.uniform(-0.08, 0)
    while x < 1:
        width = rng.uniform(0.08, 0.16)
        top = CURB - rng.uniform(0.28, 0.5 if tall else 0.38)
        canvas.of("Building").box(x, top, x + width, CURB, hazy)
        x += width + rng.uniform(0, 0.06)

    lit = canvas.lit(light.tint, light.strength)
    glass = "464e6c" if light.lamps else mix("bad8e8", light.horizon, 0.45)
    if sandy:
        glass = mix(glass, "684a48", 0.68)
    facades = (SANDY_FACADES if sandy else FACADES).split(", ")
    x, facade = rng.uniform(-0.1, 0), -1
    while x < 1:
        width = rng.pick((0.14, 0.17, 0.2, 0.23))
        height = rng.uniform(0.34, 0.56) if tall else rng.uniform(0.2, 0.36)
        # Never the same twice in a row.
        facade = int((facade + 1 + rng.integers(len(facades) - 1)) % len(facades))
        house, wall = lit.of("Building").at(x, CURB), rng.vary(facades[facade])
        paint_building(house, rng, width, height, wall, glass, light.lamps)
        x += width

    road = lit.of("Road")
    asphalt = rng.vary("7c7068" if sandy else "686c76", 5)
    road.band(CURB, ROADSIDE, ("d6cec2", "cac2b6"))
    road.band(ROADSIDE, 1, (lighter(asphalt, 0.08), darker(asphalt, 0.12)))
    road.box(0, ROADSIDE - 0.012, 1, ROADSIDE, "a49e98")
    start = rng.uniform(-0.2, 0)
    for dash in range(7):
        left = start + dash * 0.2
        road.box(left, LANE_MARKS, left + 0.11, LANE_MARKS + 0.022, "f4eede")


def paint_vehicle(view: Canvas, shape: str, paint: Colour, glass: Colour, lamp: bool) -> None:
    """A vehicle seen from the side, in a view whose unit is its length."""
    if lamp:
        for end in (1.2, 1.34, 1.48):  # a beam that fades
            beam = ((0.98, -0.2), (end, -0.13), (end, 0.01), (0.98, -0.16))
            view.polygon(beam, "ffd67a29!")
    view.ellipse(0.5, -0.01, 0.52, 0.03, "1e1e2c59")  # its shadow
    view.polygon(smooth(BODIES[shape]), paint)
    view.box(0.02, -0.13, 0.98, -0.075, darker(paint, 0.28), round_by=0.02)
    for window in WINDOWS[shape]:
        view.polygon(window, glass)
    if shape == "bus":
        view.box(0, -0.185, 1, -0.145, lighter(paint, 0.6))
    wheel = 0.062 if shape == "bus" else 0.092
    for x in (0.2, 0.8):
        view.ellipse(x, -wheel, wheel, wheel, INK)
        view.ellipse(x, -wheel, wheel * 0.5, wheel * 0.5, "ced0d4")
    view.box(0.94, -0.22, 1, -0.165, LAMP if lamp else "ffd67a", round_by=0.02)
    view.box(0, -0.24, 0.035, -0.18, "c43a32", round_by=0.012)


def paint_taxi(view: Canvas, paint: Colour, glass: Colour, lamp: bool) -> None:
    """The red taxi: a saloon with a sign on its roof, a checker stripe and a driver."""
    view.box(0.41, -0.545, 0.59, -0.44, LAMP if lamp else "ffd048", round_by=0.02)
    view.box(0.455, -0.515, 0.545, -0.475, INK)
    paint_vehicle(view, "car", paint, glass, lamp)
    view.ellipse(0.6, -0.345, 0.04, 0.045, darker(glass, 0.6))
    view.box(0.56, -0.315, 0.65, -0.29, darker(glass, 0.6), round_by=0.02)
    view.box(0.04, -0.235, 0.935, -0.175, WHITE)
    for square in range(8):
        left = 0.04 + 0.119 * square
        view.box(left, -0.235, left + 0.0595, -0.175, INK)


def draw_traffic(rng: Rng) -> tuple[Canvas, str]:
    """The picture and its caption."""
    canvas = Canvas()
    light = choose_light(rng, HOURS)
    sandy = light.hour in ("sunset", "grey") and rng.chance(0.85) or rng.chance(0.12)
    tall = rng.chance(0.45)
    rain = light.hour == "grey" and rng.chance(0.4)
    clouds = 4 if light.hour == "grey" else int(rng.integers(0, 4))
    paint_sky(canvas, rng, light, CURB, clouds)
    paint_street(canvas, rng, light, tall, sandy)

    lit = canvas.lit(light.tint, light.strength * 0.6)  # near colours keep more of their own
    glass = "425470" if light.lamps else mix("c6e2f0", light.horizon, 0.55)
    vehicles = []
    x, left = rng.uniform(-0.12, 0.1), rng.chance(0.5)
    for _ in range(int(rng.integers(0, 5))):
        shape = rng.lots(VEHICLES)
        length = LENGTHS[shape] * rng.uniform(0.95, 1.08)
        if x > 0.86:
            break
        paint = rng.pick(list(PAINTS))
        view = lit.of("Car").at(x + length * left, FAR_LANE, length, mirror=left)
        paint_vehicle(view, shape, rng.vary(PAINTS[paint], 5), glass, light.lamps)
        if x > -0.08 and x + length < 1.08:  # a caption names no vehicle that is cut off
            vehicles.append(f"{paint} {'car' if shape == 'hatchback' else shape}")
        x += length + rng.uniform(0.03, 0.14)

    length, left = rng.uniform(0.45, 0.56), rng.chance(0.5)
    x, y = rng.uniform(0.05, 0.95 - length), rng.uniform(0.9, 0.95)
    lit = canvas.lit(light.tint, light.strength * 0.35)  # the hero stays red at night
    taxi = lit.of("Taxi").at(x + length * left, y, length, mirror=left)
    paint_taxi(taxi, rng.vary(rng.one_of(TAXI_REDS), 4), glass, light.lamps)
    if rain:
        paint_weather(canvas, rng, snow=False)
    return canvas, caption(rng, light.hour, tall, rain, vehicles, "left" if left else "right")


def caption(rng: Rng, hour: str, tall: bool, rain: bool, vehicles: list[str], facing: str) -> str:
    """Where the taxi is, and one or two facts."""
    if rng.chance(BARE):
        return TRAFFIC
    place = "in traffic"
    if rng.chance(0.4):
        places = ["in the city", f"in front of {'tall buildings' if tall else 'houses'}"]
        if len(vehicles) >= 3:
            places.append("in heavy traffic")
        if not vehicles:
            places += ["on the street", "on the road"]
        place = rng.pick(places)
    when = "in the rain" if rain and rng.chance(0.6) else hour_phrase(rng, hour, 1)
    facts = [when, when, f"facing {facing}"]
    if tall:
        facts.append(when if "buildings" in place else "with tall buildings")
    if vehicles:
        other = rng.pick(vehicles)
        facts += [f"{rng.one_of('with, next to, in front of')} a {other}"] * 2
    chosen = list(dict.fromkeys(some_of(rng, facts, 2)))
    if place != "in traffic":
        chosen = chosen[: int(rng.integers(0, 3))]
    if place.startswith("in front"):
        chosen = [fact for fact in chosen if not fact.startswith("in front")]
    turned = [fact for fact in chosen if fact.startswith("facing")]
    rest = [fact for fact in chosen if fact not in turned]
    return sentence(rng, " ".join(("red taxi", *turned, place)), rest)
