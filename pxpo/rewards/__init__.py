"""Rewards: functions from images (B, 3, H, W) in [0, 1] to reward maps (B, H, W).

A new one is a file of its own, which declares its KIND, and a line here. Sampling and learning
never import this package: to them a map that was painted and one that was computed look the same.
"""

from importlib import import_module

from .base import (
    REWARDS,
    Option,
    Reward,
    RewardKind,
    RewardSpec,
    Tools,
    checked_maps,
    resolved,
)
from .color import ColorReward
from .painting import as_paint, open_picture, paint_by_label, painted_map, whole_things
from .segmentation import Segmenter, SegmentReward
from .wish import Painted, Sight, Wish, add_paint

for _file in (
    "painting",
    "color",
    "segmentation",
    "brightness",
    "describe",
    "mix",
    "own",
):
    _kind: RewardKind = import_module(f"{__name__}.{_file}").KIND
    REWARDS[_kind.name] = _kind

__all__ = [
    "REWARDS",
    "ColorReward",
    "Option",
    "Painted",
    "Reward",
    "RewardKind",
    "RewardSpec",
    "SegmentReward",
    "Segmenter",
    "Sight",
    "Tools",
    "Wish",
    "add_paint",
    "as_paint",
    "checked_maps",
    "open_picture",
    "paint_by_label",
    "painted_map",
    "resolved",
    "whole_things",
]
