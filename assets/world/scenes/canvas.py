"""A picture and its label map, painted together.

Coordinates are fractions of the picture: (0, 0) is the top left corner, (1, 1) the bottom right.
Constant outlines are strings of points in percent: "0,100 50,0 100,100".

Constant colours are written as in CSS: "ffd67a", or with an alpha "ffd67a29". One with a "!" is
its own light, which no other light tints: "ffd67a!".
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

SIZE = 256
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

Colour = str | tuple[int, ...]
Outline = str | np.ndarray | Sequence[tuple[float, float]]

WHITE, INK, LAMP = "ffffff", "262834", "ffd67a!"


def rgb(colour: Colour) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.rstrip("!"))) if isinstance(colour, str) else colour


def mix(a: Colour, b: Colour, share: float) -> tuple[int, ...]:
    """The colour `share` (0..1) of the way from a to b."""
    return tuple(round(x + (y - x) * share) for x, y in zip(rgb(a), rgb(b), strict=True))


def darker(colour: Colour, share: float) -> tuple[int, ...]:
    """A shade: not grey but towards a deep blue, as shadows are in picture books."""
    return mix(colour, "1e1c46", share)


def lighter(colour: Colour, share: float) -> tuple[int, ...]:
    return mix(colour, WHITE, share)


@functools.cache
def _parse(outline: str) -> np.ndarray:
    return np.array([point.split(",") for point in outline.split()], dtype=float) / 100


def points(outline: Outline) -> np.ndarray:
    """The outline as an array (N, 2)."""
    return _parse(outline) if isinstance(outline, str) else np.asarray(outline, dtype=float)


def smooth(outline: Outline, rounds: int = 2) -> np.ndarray:
    """The closed polygon with its corners cut again and again (Chaikin), until it looks round."""
    curve = points(outline)
    for _ in range(rounds):
        following = np.roll(curve, -1, axis=0)
        cut = (0.75 * curve + 0.25 * following, 0.25 * curve + 0.75 * following)
        curve = np.stack(cut, axis=1).reshape(-1, 2)
    return curve


def mirrored(outline: Outline) -> np.ndarray:
    """A left-right symmetric outline from its right half (x >= 0), given from top to bottom."""
    half = points(outline)
    return np.concatenate([half, half[::-1] * (-1, 1)])


class Canvas:
    """A picture and its label map; or a view of them with a label, light and scale of its own."""

    def __init__(self) -> None:
        self._picture = Image.new("RGB", (CANVAS, CANVAS))
        self._labels = Image.new("L", (CANVAS, CANVAS), LABELS.index("Sky"))
        self._opaque = ImageDraw.Draw(self._picture)
        self._glaze = ImageDraw.Draw(self._picture, "RGBA")  # blends colours that carry an alpha
        self._classes = ImageDraw.Draw(self._labels)
        self._origin, self._scale = np.zeros(2), np.full(2, float(CANVAS))
        self._label: int | None = None  # leaves labels as they are
        self._light: tuple[Colour, float] = (WHITE, 0.0)

    def of(self, label: str) -> Canvas:
        """A view that gives this label to what is drawn on it."""
        view = copy.copy(self)
        view._label = LABELS.index(label)
        return view

    def lit(self, tint: Colour, strength: float) -> Canvas:
        """A view on which every colour is tinted."""
        view = copy.copy(self)
        view._light = (tint, strength)
        return view

    def at(
        self, x: float, y: float, width: float = 1, height: float = 0, mirror: bool = False
    ) -> Canvas:
        """A view whose origin lies at (x, y) and whose units are width and height (or width)."""
        view = copy.copy(self)
        view._origin = self._origin + self._scale * (x, y)
        view._scale = self._scale * (-width if mirror else width, height or width)
        return view

    def sides(self) -> tuple[Canvas, Canvas]:
        """This view mirrored, and as it is: for what is the same on the left and on the right."""
        return self.at(0, 0, mirror=True), self

    def polygon(self, outline: Outline, colour: Colour) -> None:
        self._paint("polygon", self._map(outline), colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        self._paint("ellipse", self._box(x - rx, y - ry, x + rx, y + ry), colour)

    def dome(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """The upper half of an ellipse; with a negative ry, the lower."""
        where, start = self._box(x - rx, y - ry, x + rx, y + ry), 180 if ry > 0 else 0
        self._paint("chord", where, colour, start=start, end=start + 180)

    def box(
        self, x0: float, y0: float, x1: float, y1: float, colour: Colour, round_by: float = 0
    ) -> None:
        """A rectangle, its corners rounded by `round_by` of the view's width unit."""
        where, radius = self._box(x0, y0, x1, y1), round_by * abs(self._scale[0])
        if radius:
            self._paint("rounded_rectangle", where, colour, radius=radius)
        else:
            self._paint("rectangle", where, colour)

    def below(self, y: np.ndarray, colour: Colour) -> None:
        """All that lies below a line from the left edge to the right, given by its heights."""
        line = np.stack([np.linspace(0, 1, len(y)), y], axis=1)
        self.polygon(np.concatenate([line, ((1, 1), (0, 1))]), colour)

    def band(self, y0: float, y1: float, colours: Sequence[Colour]) -> None:
        """A soft vertical gradient over the full width of the canvas, from y0 down to y1."""
        top, bottom = round(y0 * CANVAS), round(y1 * CANVAS)
        stops, rows = np.linspace(0, 1, len(colours)), np.linspace(0, 1, bottom - top)
        channels = zip(*(mix(colour, *self._light) for colour in colours), strict=True)
        column = np.stack([np.interp(rows, stops, channel) for channel in channels], axis=1)
        strip = Image.fromarray(np.rint(column).astype(np.uint8)[:, None])
        strip = strip.resize((CANVAS, bottom - top), Image.Resampling.NEAREST)
        self._picture.paste(strip, (0, top))
        self._classes.rectangle((0, top, CANVAS, bottom), fill=self._label)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture (256, 256, 3) and its labels (256, 256), both uint8."""
        middle = OVERSAMPLING // 2
        labels = np.asarray(self._labels)[middle::OVERSAMPLING, middle::OVERSAMPLING]
        return np.array(self._picture.reduce(OVERSAMPLING)), labels.copy()

    def _map(self, outline: Outline) -> list[int]:
        # Whole pixels: the last bit of a sine must not decide what is drawn on another machine.
        mapped = points(outline) * self._scale + self._origin
        return np.rint(mapped).astype(int).ravel().tolist()

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> list[int]:
        left, top, right, bottom = self._map(((x0, y0), (x1, y1)))
        return [min(left, right), min(top, bottom), max(left, right), max(top, bottom)]

    def _paint(self, shape: str, where: list[int], colour: Colour, **options: float) -> None:
        solid, alpha = rgb(colour)[:3], rgb(colour)[3:]
        fill = solid if colour[-1] == "!" else mix(solid, *self._light)
        getattr(self._glaze if alpha else self._opaque, shape)(where, fill=fill + alpha, **options)
        if self._label is not None and not alpha:  # a glaze never changes what a thing is
            getattr(self._classes, shape)(where, fill=self._label, **options)
