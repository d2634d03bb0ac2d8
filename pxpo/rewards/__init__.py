"""Rewards: functions from images (B, 3, H, W) in [0, 1] to reward maps (B, H, W).

A new one is a file of its own and a line here; the core never imports this package, because to it
a map that was painted and a map that was computed look the same.
"""

from collections.abc import Callable

from torch import Tensor

from .color import ColorReward
from .painting import Opinion, paint_by_label, paint_layer, painted_map
from .segmentation import Segmenter, SegmentReward

Reward = Callable[[Tensor], Tensor]

REWARDS = {"color": ColorReward, "segment": SegmentReward, "paint": painted_map}

__all__ = [
    "REWARDS",
    "ColorReward",
    "Opinion",
    "Reward",
    "SegmentReward",
    "Segmenter",
    "paint_by_label",
    "paint_layer",
    "painted_map",
]
