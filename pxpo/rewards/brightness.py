"""A reward from a rule: more or less light."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import MORE, RewardKind, more_or_less

REC_709 = torch.tensor([0.2126, 0.7152, 0.0722])
"""How much red, green and blue add to the light that an eye sees."""


@dataclass(frozen=True)
class BrightnessReward:
    """How light each pixel is, in [0, 1], times `sign` (-1: darker, +1: lighter).

    That is Rec. 709's luma: its weights on the values as they are stored, with their gamma, as
    these are spaced nearly as an eye tells them apart; linear light would hardly know dark tones.
    """

    sign: int = -1

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, H, W) in [-1, 0] or [0, 1]."""
        return self.sign * (images * REC_709.view(3, 1, 1)).sum(1)


KIND = RewardKind(
    name="brightness",
    title="Light",
    help="less (or more) light",
    options=(MORE,),
    words=lambda more: more_or_less(more, "light"),
    make=lambda tools, more: BrightnessReward(1 if more else -1),
)
