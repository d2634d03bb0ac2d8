"""A reward from a model: how sure a segmenter is of what a pixel shows. The paper's: less hair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from ..embedded import TINY_SEGMENTER
from ..errors import ModelError, RewardError
from .base import MORE, Option, RewardKind, Tools, more_or_less, resolved

CLOTHES = "mattmdjaga/segformer_b2_clothes"
"""The paper's segmenter, for photographs of people."""

SPECK = 0.001  # share of a picture; what is smaller is no thing to be named


class Segmenter:
    """Any semantic segmentation model of transformers, from a folder or the Hub.

    labels: the names of its classes, in order.
    """

    def __init__(self, name: str | Path | None = None, device: str = "cpu") -> None:
        self.name = resolved(str(name or TINY_SEGMENTER))
        try:
            self.processor = AutoImageProcessor.from_pretrained(self.name)
            model = AutoModelForSemanticSegmentation.from_pretrained(self.name)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"The segmenter {self.name!r} cannot be loaded ({reason}); check the name and the "
                "network, or leave it out for the embedded one."
            ) from error
        self.model = model.float().eval().requires_grad_(False).to(device)
        names = self.model.config.id2label
        self.labels: tuple[str, ...] = tuple(names[index] for index in range(len(names)))

    def index(self, label: str) -> int:
        """The class called `label`, whatever its capitals."""
        for index, name in enumerate(self.labels):
            if name.lower() == label.strip().lower():
                return index
        raise RewardError(
            f"the segmenter {self.name!r} has no label {label!r}; it knows "
            f"{', '.join(self.labels)}."
        )

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (B, classes, H, W) on the CPU of images (B, 3, H, W) in [0, 1]."""
        parts = []
        for part in images.split(8):
            pixels = (part.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
            inputs = self.processor(images=list(pixels), return_tensors="pt")
            logits = self.model(inputs["pixel_values"].to(self.model.device)).logits
            logits = F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
            parts.append(logits.softmax(1).cpu())
        return torch.cat(parts)

    def classes(self, images: Tensor) -> Tensor:
        """The likeliest class of each pixel, (B, H, W) long."""
        return self.probabilities(images).argmax(1)

    def found(self, classes: Tensor) -> list[str]:
        """The labels of what there is in `classes` (H, W) long, the largest first."""
        shares = classes.flatten().bincount(minlength=len(self.labels)) / classes.numel()
        largest_first = shares.argsort(descending=True, stable=True).tolist()
        return [self.labels[index] for index in largest_first if shares[index] >= SPECK]


def connected(mask: Tensor) -> Tensor:
    """(H, W) long: pixels of `mask` (H, W) bool that touch, corners too, have one number above 0;
    other parts of it have others, and all else is 0."""
    every = torch.arange(mask.numel() + 1)
    own = every[1:].view(mask.shape) * mask
    while True:
        # Each part takes the largest number that it touches, and at once the one which that takes.
        touched = F.max_pool2d(own[None].double(), 3, 1, 1)[0].long() * mask
        larger = every.scatter_reduce(0, own.flatten(), touched.flatten(), "amax")
        while not torch.equal(larger, larger[larger]):
            larger = larger[larger]
        if torch.equal(larger[own], own):
            return own
        own = larger[own]


def things(classes: Tensor) -> Tensor:
    """(H, W) long: a number for each connected thing of one class in `classes` (H, W) long."""
    return sum((connected(classes == one) for one in classes.unique()), torch.zeros_like(classes))


@dataclass(frozen=True)
class SegmentReward:
    """The probability of any of `labels` at each pixel, times `sign` (-1: less of it, +1: more)."""

    segmenter: Segmenter
    labels: Sequence[str] = ("Hair",)
    sign: int = -1

    def __post_init__(self) -> None:
        if self.sign not in (-1, 1):
            raise RewardError(f"sign is {self.sign}; it must be -1 (less) or +1 (more).")
        if not self.labels:
            raise RewardError("no label is named; name at least one, e.g. Hair.")
        for label in self.labels:
            self.segmenter.index(label)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, H, W) in [-1, 0] or [0, 1]."""
        chosen = sorted({self.segmenter.index(label) for label in self.labels})
        return self.sign * self.segmenter.probabilities(images)[:, chosen].sum(1)


def labels_of(tools: Tools) -> tuple[str, ...]:
    """What the usual segmenter can find."""
    return tools.segmenter().labels


SEGMENTER = Option("segmenter", "", "folder or Hub id of a segmenter (the embedded one)", path=True)

KIND = RewardKind(
    name="segment",
    title="SegFormer",
    help="less (or more) of what a segmenter finds",
    options=(Option("labels", ("Hair",), "what to find", choices=labels_of), MORE, SEGMENTER),
    words=lambda labels, more, segmenter: more_or_less(more, ", ".join(labels)),
    make=lambda tools, labels, more, segmenter: SegmentReward(
        tools.segmenter(segmenter), labels, 1 if more else -1
    ),
    experiment="segment",
)
