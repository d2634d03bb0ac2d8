"""A reward from a model: how sure a segmenter is of what a pixel shows. The paper's: less hair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES as KINDS,
)

from ..checks import reason_of
from ..embedded import TINY_SEGMENTER
from ..errors import ModelError, RewardError
from .base import MORE, Option, RewardKind, Tools, more_or_less, resolved

CLOTHES = "mattmdjaga/segformer_b2_clothes"
"""The paper's segmenter, for photographs of people."""

SPECK = 0.001  # share of a picture; what is smaller is no thing to be named

MOST_IMAGES, MOST_VALUES = 8, 2**27
"""Images at a time, and the probabilities of all classes in them: half a GiB, and as much again
for what they are made from."""


class Segmenter:
    """Any semantic segmentation model of transformers, from a folder or the Hub.

    labels: the names of its classes, in order. Raises ModelError for what is none.
    """

    def __init__(self, name: str | Path | None = None, device: str = "cpu") -> None:
        self.name = resolved(str(name or TINY_SEGMENTER))
        try:
            config = AutoConfig.from_pretrained(self.name)
            if config.model_type not in KINDS:
                raise ValueError(
                    f"it is a {config.model_type}, which gives no class for each pixel; here it "
                    f"can be {', '.join(KINDS)}"
                )
            self.processor = AutoImageProcessor.from_pretrained(self.name)
            model, self.labels = _loaded(self.name, config)
        except Exception as error:
            reason = reason_of(error, self.name)
            raise ModelError(
                f"The segmenter {self.name!r} cannot be loaded ({reason}); check the name and the "
                "network, or leave it out for the embedded one."
            ) from error
        self.model = model.float().eval().requires_grad_(False).to(device)
        self.whole = _whole(self.processor)

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
    def reduced(self, images: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """What `reduce` makes of the class probabilities (B, classes, H, W) of images (B, 3, H, W)
        in [0, 1], some images at a time; on the CPU."""
        parts, each = [], len(self.labels) * images.shape[2] * images.shape[3]
        for part in images.split(min(MOST_IMAGES, max(MOST_VALUES // each, 1))):
            pixels = (part.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
            inputs = self.processor(images=list(pixels), return_tensors="pt", **self.whole)
            logits = self.model(inputs["pixel_values"].to(self.model.device)).logits
            logits = F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
            parts.append(reduce(logits.softmax(1)).cpu())
        return torch.cat(parts)

    def probabilities(self, images: Tensor) -> Tensor:
        """All class probabilities (B, classes, H, W) of images (B, 3, H, W) in [0, 1]."""
        return self.reduced(images, lambda found: found)

    def classes(self, images: Tensor) -> Tensor:
        """The likeliest class of each pixel, (B, H, W) long."""
        return self.reduced(images, lambda found: found.argmax(1))

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


def _loaded(name: str, config: PreTrainedConfig) -> tuple[Any, tuple[str, ...]]:
    """The model, and the names of its classes.

    transformers takes the table of labels to be as long as there are classes. Where it is not, the
    weights decide.
    """
    for _ in range(2):
        model, loading = AutoModelForSemanticSegmentation.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
        if not loading["mismatched_keys"]:
            break
        part, found, wanted = sorted(loading["mismatched_keys"])[0]
        config.num_labels = found[0]
    else:
        raise ValueError(
            f"its weights have a {part} of {tuple(found)}, and its config.json one of "
            f"{tuple(wanted)}"
        )
    if lacking := sorted({*loading["missing_keys"]} & {*dict(model.named_parameters())}):
        raise ValueError(f"its weights are not all of a segmenter's: they have no {lacking[0]}")
    table = PreTrainedConfig.get_config_dict(name)[0].get("id2label") or {}
    names = {int(number): str(label or "").strip() for number, label in table.items()}
    return model, _labels(names, config.num_labels)


def _labels(names: Mapping[int, str], count: int) -> tuple[str, ...]:
    """The names of `count` classes: by their numbers, or, where these go beyond, in their order."""
    if len(names) == count:
        names = dict(enumerate(names[number] for number in sorted(names)))
    return tuple(names.get(number) or f"LABEL_{number}" for number in range(count))


def _whole(processor: Any) -> dict[str, Any]:
    """What makes a processor show its model whole pictures: in place of what it would cut out of
    their middle, all of them in that size."""
    if not getattr(processor, "do_center_crop", False):
        return {}
    return {"do_center_crop": False, "size": dict(processor.crop_size)}


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
        return self.sign * self.segmenter.reduced(images, lambda found: found[:, chosen].sum(1))


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
