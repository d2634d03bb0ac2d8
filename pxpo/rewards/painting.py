"""A reward from a person: green paint is +2, red paint is -2, and everywhere else is 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import RewardError
from .segmentation import Segmenter

STRENGTH = 2.0
SHADES, BANDS = 12, 4  # how finely `Opinion` tells colours and heights apart


def painted_map(paint: Image.Image | np.ndarray | Tensor) -> Tensor:
    """A reward map (H, W) in [-2, 2] from paint of any size.

    A colour picture (RGBA, RGB): where there is paint at all, +2 if it is more green than red and
    -2 if more red than green, whatever the brush's opacity; black and transparent are 0.
    A grey picture (L): black is -2, mid grey (128) is 0, white is +2. A bilevel one (1): white is
    +2, black is 0.
    An array or tensor of two dimensions: taken as it is; it must be finite and within [-2, 2].
    """
    if isinstance(paint, Image.Image):
        if paint.mode == "1":
            return torch.from_numpy(np.asarray(paint).astype(np.float32)) * STRENGTH
        if paint.mode in ("L", "LA"):
            grey, alpha = np.asarray(paint.convert("LA"), dtype=np.float32).transpose(2, 0, 1)
            level = ((grey - 128) / 127 * STRENGTH).clip(-STRENGTH, STRENGTH)
            return torch.from_numpy(level * (alpha > 0))
        if paint.mode not in ("F", "I"):
            paint = paint.convert("RGBA")
    values = torch.tensor(np.array(paint))
    if values.ndim == 3 and values.shape[2] in (3, 4):
        red, green = values[..., 0].float(), values[..., 1].float()
        there = values[..., 3] > 0 if values.shape[2] == 4 else torch.tensor(True)
        return STRENGTH * (torch.sign(green - red) * there).float()
    if values.ndim != 2:
        raise RewardError(
            f"the paint has the shape {tuple(values.shape)}; it must be a picture, or (H, W)."
        )
    values = values.float()
    if not torch.isfinite(values).all():
        raise RewardError("the painted map has values that are not finite (NaN or infinite).")
    if values.abs().max() > STRENGTH:
        raise RewardError(
            f"the painted map reaches {values.abs().max():g}; the most it can be is {STRENGTH:g}."
        )
    return values


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
    return STRENGTH * (torch.isin(classes, wanted).float() - torch.isin(classes, unwanted).float())


@dataclass(frozen=True)
class Opinion:
    """A reward learnt from paint: what a person has said so far of pixels that look alike.

    A painted map speaks of one picture alone; to judge others (the same seed later, held-out
    seeds), a pixel gets the mean of what was painted, or left unpainted, on pixels of its colour
    and its quarter of the height. It draws curves; no update is ever made from it.

    totals, counts: (bins,) float64, the sum of the maps and the number of pixels in each bin.
    """

    totals: Tensor
    counts: Tensor

    @staticmethod
    def none() -> Opinion:
        size = BANDS * SHADES**3
        return Opinion(torch.zeros(size).double(), torch.zeros(size).double())

    def hear(self, images: Tensor, maps: Tensor) -> Opinion:
        """The opinion after `maps` (B, H, W) were painted on `images` (B, 3, H, W) in [0, 1]."""
        bins, size = _bins(images).flatten(), len(self.totals)
        totals = torch.bincount(bins, maps.flatten().double(), size)
        return Opinion(self.totals + totals, self.counts + torch.bincount(bins, minlength=size))

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, H, W) in [-2, 2]; 0 for what was never seen."""
        return (self.totals / self.counts.clamp(min=1)).float()[_bins(images)]


def _bins(images: Tensor) -> Tensor:
    """The bin (B, H, W) of each pixel."""
    red, green, blue = (images * SHADES).long().clamp(0, SHADES - 1).unbind(1)
    height = images.shape[2]
    band = (torch.arange(height) * BANDS // height).view(1, -1, 1)
    return ((band * SHADES + red) * SHADES + green) * SHADES + blue
