"""A reward from a person: green paint is +2, red paint is -2, and everywhere else is 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import RewardError
from .segmentation import Segmenter

STRENGTH = 2.0


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
