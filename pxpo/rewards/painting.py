"""Paint, a person's or a segmenter's, as a map: green is +2, red is -2, all else is 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ..errors import RewardError
from .base import Option, Reward, RewardKind, Tools
from .segmentation import SEGMENTER, Segmenter, connected, labels_of, things

FULL = 2.0  # what a stroke says, for or against
SATURATED = 0.35  # a stroke's colour exceeds the other two by this much; a tinted grey's does not
NEARLY = 0.13  # how far from black or white JPEG and blurred edges lead
GREY = 0.01  # how far apart the channels of a grey may be
STRANGE = 0.1  # share of a picture that may be neither paint nor blank
MOST_PIXELS = 2**23  # of a painted picture: one in 4K, of which a quarter of a GB is made here
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # others run programs, as EPS does
GREEN, RED = (0, 255, 0, 153), (255, 0, 0, 153)  # RGBA of the page's brush
READABLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # Pillow's modes


def open_picture(source: Path | BinaryIO) -> Image.Image:
    """The picture in a file, in its own colours; RewardError for what is none, or is too large.

    How large it is its head says, before any of it is unpacked.
    """
    try:
        with Image.open(source, formats=FORMATS) as picture:
            if (pixels := math.prod(picture.size)) > MOST_PIXELS:
                raise Image.DecompressionBombError(f"{pixels} pixels")
            picture.load()
            return picture
    except Image.DecompressionBombError as error:  # Pillow's too, for what is larger by far
        raise RewardError(
            f"the picture is too large ({error}); the most is {MOST_PIXELS / 1e6:.1f} million "
            "pixels, as in 4K. Save it smaller."
        ) from error
    except Exception as error:  # Pillow's readers raise nearly any
        raise RewardError(f"the picture cannot be read ({error}); save it as a PNG.") from error


def painted_map(
    paint: Image.Image | np.ndarray | Tensor, picture: Tensor | None = None, white: float = FULL
) -> Tensor:
    """A reward map (H, W) in [-2, 2] from paint of any size.

    A colour picture, or an array (H, W, 3 or 4): strokes of a saturated green are +2, of a
    saturated red -2, whatever the brush's opacity; what is transparent, black, white or of another
    colour is 0. A picture in greys alone is a mask: white is `white`, black is 0, as in any editor.
    An array or tensor of two dimensions, or a picture of floats: taken as it is; it must be finite
    and within [-2, 2].

    picture: (3, H, W) in [0, 1], of any size: what the strokes were painted on. It is needed where
    `paint` is a whole picture with strokes on it, as it tells these apart from a red car.
    Raises RewardError for what is no paint, with the way out.
    """
    if isinstance(paint, Image.Image) and paint.mode != "F":
        return _strokes(_rgba(paint), picture, white)
    values = torch.tensor(np.array(paint))
    if values.ndim == 3 and values.shape[2] in (3, 4):
        colours = values if values.is_floating_point() else values / 255
        if values.shape[2] == 3:
            colours = torch.cat([colours, torch.ones_like(colours[..., :1])], dim=2)
        return _strokes(colours.float(), picture, white)
    if values.ndim != 2:
        raise RewardError(
            f"the paint has the shape {tuple(values.shape)}; it must be a picture, or (H, W)."
        )
    values = values.float()
    if not torch.isfinite(values).all():
        raise RewardError("the painted map has values that are not finite (NaN or infinite).")
    if values.abs().max() > FULL:
        raise RewardError(
            f"the painted map reaches {values.abs().max():g}; the most it can be is {FULL:g}."
        )
    return values


def _rgba(paint: Image.Image) -> Tensor:
    """(H, W, 4) in [0, 1], upright, as a camera or a phone meant it."""
    paint = ImageOps.exif_transpose(paint)
    if paint.mode.startswith("I"):  # 16 bits of grey, in whichever order; Pillow would cut them off
        grey = torch.from_numpy(np.asarray(paint).astype(np.float32) / 65535).clamp(0, 1)
        return torch.stack([grey, grey, grey, torch.ones_like(grey)], dim=2)
    if paint.mode not in READABLE:
        raise RewardError(
            f"the painted picture is in the colours {paint.mode}, which cannot be read; save it as "
            "a PNG in RGB."
        )
    return torch.from_numpy(np.asarray(paint.convert("RGBA"), dtype=np.float32) / 255)


def _strokes(colours: Tensor, picture: Tensor | None, white: float) -> Tensor:
    """The map (H, W) of the strokes in `colours` (H, W, 4) in [0, 1]."""
    red, green, blue, alpha = colours.unbind(2)
    there = alpha > 0
    paint = there * (
        (green - torch.maximum(red, blue) > SATURATED).float()
        - (red - torch.maximum(green, blue) > SATURATED).float()
    )
    brightest, darkest = colours[..., :3].amax(2), colours[..., :3].amin(2)
    blank = (brightest <= NEARLY) | (darkest >= 1 - NEARLY) | ~there
    if (brightest - darkest)[there].le(GREY).all():
        if blank.float().mean() < 0.5:
            raise RewardError(
                f"this picture is in greys, {1 - blank.float().mean():.0%} of it neither black nor "
                "white; in greys, paint is a mask, white on black. Or paint green and red."
            )
        mask = white * brightest * (brightest > NEARLY) * there
        return mask if (mask == 0).any() else torch.zeros_like(mask)  # all white is an empty page
    if ((paint == 0) & ~blank).float().mean() > STRANGE:
        if picture is None:
            raise RewardError(
                "this is a whole picture, and its own green and red would be taken for paint; "
                "paint on a transparent layer, on black or on white, and give that alone."
            )
        paint = _difference(colours[..., :3], picture)
    return FULL * paint


def _difference(colours: Tensor, picture: Tensor) -> Tensor:
    """Where `colours` (H, W, 3) is `picture` (3, h, w) painted green (+1) or red (-1)."""
    height, width = colours.shape[:2]
    original = (picture.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    enlarged = Image.fromarray(original).resize((width, height), Image.Resampling.LANCZOS)
    change = colours - torch.from_numpy(np.asarray(enlarged, dtype=np.float32) / 255)
    red, green, blue = change.unbind(2)
    # An edge that was resampled otherwise changes too, but in thin lines, and not to a pure colour.
    dyed = (green - torch.maximum(red, blue) > SATURATED / 2).float()
    dyed = dyed - (red - torch.maximum(green, blue) > SATURATED / 2).float()
    paint = dyed * (_opened(dyed > 0) | _opened(dyed < 0))
    other = (change.abs().amax(2) > SATURATED / 2) & (paint == 0)
    if other.float().mean() > STRANGE:
        raise RewardError(
            f"{other.float().mean():.0%} of this picture differs from the run's own and is neither "
            "green nor red paint on it; paint on the picture that the run shows, or on a "
            "transparent layer."
        )
    return paint


def _opened(mask: Tensor) -> Tensor:
    """`mask` (H, W) without what is thinner than three pixels."""
    solid = -F.max_pool2d(-mask[None].float(), 3, 1, 1)
    return F.max_pool2d(solid, 3, 1, 1)[0] > 0


def as_paint(strokes: Tensor) -> Image.Image:
    """A map (H, W) in [-2, 2] as a picture (RGBA) that `painted_map` reads: what says at least half
    of a stroke is one, green or red on a transparent ground."""
    colours = torch.zeros(*strokes.shape, 4, dtype=torch.uint8)
    colours[strokes >= FULL / 2] = torch.tensor(GREEN, dtype=torch.uint8)
    colours[strokes <= -FULL / 2] = torch.tensor(RED, dtype=torch.uint8)
    return Image.fromarray(colours.numpy())


def whole_things(strokes: Tensor, classes: Tensor) -> Tensor:
    """The map (H, W) with each of the `strokes` (H, W) grown, or cut, to whole things: the one that
    most of it lies on, and those that it mostly covers.

    classes: (H, W) long, a segmenter's of the picture under them.
    """
    numbers, grown = things(classes), torch.zeros_like(strokes)
    sizes = numbers.flatten().bincount()
    for colour in (FULL, -FULL):
        marked = connected(strokes * colour > 0)
        under = torch.stack([marked, numbers])[:, marked > 0]  # (2, pixels)
        pairs, common = under.unique(dim=1, return_counts=True)
        covered = pairs[1][2 * common > sizes[pairs[1]]]
        main = dict(pairs[:, common.argsort()].T.tolist())  # the largest comes last, and stays
        grown[torch.isin(numbers, torch.tensor([*main.values(), *covered]))] = colour
    return grown


def paint_by_label(
    segmenter: Segmenter, images: Tensor, more: Sequence[str] = (), less: Sequence[str] = ()
) -> Tensor:
    """Painted maps (B, H, W) by a stand-in for the person: +2 on all that the segmenter takes for
    one of `more`, -2 on all that it takes for one of `less`; images are (B, 3, H, W) in [0, 1]."""
    if not (more or less):
        raise RewardError("nothing to paint: name at least one label to have more or less of.")
    classes = segmenter.classes(images)
    wanted = torch.tensor([segmenter.index(label) for label in more])
    unwanted = torch.tensor([segmenter.index(label) for label in less])
    return FULL * (torch.isin(classes, wanted).float() - torch.isin(classes, unwanted).float())


def _by_label(
    tools: Tools, more: tuple[str, ...], less: tuple[str, ...], exact: bool, segmenter: str
) -> Reward:
    if not (more or less):
        raise RewardError("nothing is painted; paint it, or name labels to be painted.")
    eye = tools.segmenter(segmenter)
    for label in (*more, *less):
        eye.index(label)
    return lambda images: paint_by_label(eye, images, more, less)


def _words(more: tuple[str, ...], less: tuple[str, ...], exact: bool, segmenter: str) -> str:
    wishes = {"more": more, "less": less}
    parts = [f"{word} {', '.join(labels)}" for word, labels in wishes.items() if labels]
    return f"painted by a segmenter, {' and '.join(parts)}" if parts else "painted"


KIND = RewardKind(
    name="paint",
    title="Paint",
    help="what is painted on a picture: green for more, red for less",
    options=(
        Option("more", (), "a label for a segmenter to paint green by itself", choices=labels_of),
        Option("less", (), "a label for a segmenter to paint red by itself", choices=labels_of),
        Option("exact", False, "the painted map itself, on the picture that it was painted on"),
        SEGMENTER,
    ),
    words=_words,
    make=_by_label,
    experiment="paint",
    by_hand=True,
)
