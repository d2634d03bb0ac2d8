"""A reward from a rule: more or less of a colour. Blue, less of it, is the paper's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import ImageColor
from torch import Tensor

from ..errors import RewardError
from .base import MORE, Option, RewardKind, more_or_less

CHANNELS = ("red", "green", "blue")


@dataclass(frozen=True)
class ColorReward:
    """How much of a colour each pixel has, in [0, 1], times `sign` (-1: less of it, +1: more).

    color: "red", "green" or "blue" for that channel's value; any other CSS name or "#rrggbb" for
    closeness to that colour, 1 minus the distance in RGB over the cube's diagonal.
    """

    color: str = "blue"
    sign: int = -1

    def __post_init__(self) -> None:
        if self.sign not in (-1, 1):
            raise RewardError(f"sign is {self.sign}; it must be -1 (less) or +1 (more).")
        object.__setattr__(self, "color", self.color.strip().lower())
        if self.color not in CHANNELS:
            self._target()

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, H, W) in [-1, 0] or [0, 1]."""
        if self.color in CHANNELS:
            return self.sign * images[:, CHANNELS.index(self.color)]
        distance = (images - self._target()[:, None, None]).norm(dim=1) / 3**0.5
        return self.sign * (1 - distance)

    def _target(self) -> Tensor:
        try:
            return torch.tensor(ImageColor.getrgb(self.color)[:3]) / 255
        except ValueError:
            raise RewardError(
                f"the colour {self.color!r} is unknown; name red, green or blue for a channel, "
                "or any CSS colour such as orange or #ff8800."
            ) from None


KIND = RewardKind(
    name="color",
    title="Colour",
    help="less (or more) of a colour",
    options=(
        Option(
            "color", "blue", "a channel (red, green, blue) or any CSS colour",
            choices=("blue", "red", "green", "orange", "purple"),
        ),
        MORE,
    ),
    words=lambda color, more: more_or_less(more, color),
    make=lambda tools, color, more: ColorReward(color, 1 if more else -1),
)  # fmt: skip
