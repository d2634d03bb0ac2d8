"""A reward from words: how sure CLIPSeg is that a pixel shows what a text describes.

CLIPSeg is by Lüddecke and Ecker, arXiv 2112.10003. It needs no labels of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import model_info, try_to_load_from_cache
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from ..checks import reason_of
from ..errors import ModelError, RewardError
from .base import MORE, Option, Reward, RewardKind, Tools, more_or_less

CLIPSEG = "CIDAS/clipseg-rd64-refined"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def cached(name: str) -> bool:
    """Whether the weights of this Hub id are on this machine."""
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in WEIGHTS)


class ClipSeg:
    """Any CLIPSeg of transformers, from a folder or the Hub; ModelError for what is none."""

    def __init__(self, name: str = CLIPSEG, device: str = "cpu") -> None:
        self.name = name
        try:
            local = Path(name).is_dir() or cached(name)
            if not local:
                model_info(name)  # fails at once, where loading would try for minutes
            processor = CLIPSegProcessor.from_pretrained(name, local_files_only=local)
            model, loading = CLIPSegForImageSegmentation.from_pretrained(
                name, local_files_only=local, output_loading_info=True
            )
            if any(key.startswith("decoder.") for key in loading["missing_keys"]):
                raise ValueError("it has no decoder, as a plain CLIP")
        except Exception as error:
            raise ModelError(
                f"The CLIPSeg {name!r} cannot be loaded ({reason_of(error, name)}); check the name "
                f"and the network, or download it first, e.g. hf download {CLIPSEG}."
            ) from error
        self.model = model.float().eval().requires_grad_(False).to(device)
        self.tokenizer, images = processor.tokenizer, processor.image_processor
        self.size = (images.size["height"], images.size["width"])
        self.mean = torch.tensor(images.image_mean).view(3, 1, 1)
        self.std = torch.tensor(images.image_std).view(3, 1, 1)

    def tokens(self, text: str) -> Tensor:
        """(1, L) long, with CLIP's two marks; RewardError for no text, or one that is too long."""
        if not text.strip():
            raise RewardError(f"the text is {text!r}; say what to find, e.g. trees.")
        tokens = self.tokenizer(text, return_tensors="pt").input_ids
        most = self.model.config.text_config.max_position_embeddings
        if tokens.shape[1] > most:
            raise RewardError(
                f"the text {text[:40] + '…'!r} has {tokens.shape[1]} tokens; CLIPSeg reads at most "
                f"{most}: say it in fewer words."
            )
        return tokens

    def pixels(self, images: Tensor) -> Tensor:
        """What the processor makes of images, but for its rounding to bytes: (B, 3, *size)."""
        resized = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return (resized - self.mean.to(images)) / self.std.to(images)

    @torch.no_grad()
    def probability(self, images: Tensor, text: str) -> Tensor:
        """(B, H, W) on the CPU: that of the text at each pixel of images (B, 3, H, W) in [0, 1]."""
        model, parts = self.model, []
        tokens = self.tokens(text).to(model.device)
        embedding = model.get_conditional_embeddings(1, tokens)  # (1, D)
        for part in images.split(8):
            pixels = self.pixels(part.to(model.device))
            logits = model(
                pixel_values=pixels, conditional_embeddings=embedding.expand(len(part), -1)
            ).logits[:, None]
            logits = F.interpolate(logits, images.shape[2:], mode="bilinear", antialias=True)
            parts.append(logits[:, 0].sigmoid().cpu())
        return torch.cat(parts)


@dataclass(frozen=True)
class DescribeReward:
    """The probability of `text` at each pixel, times `sign` (-1: less of it, +1: more)."""

    clipseg: ClipSeg
    text: str = "trees"
    sign: int = -1

    def __post_init__(self) -> None:
        if self.sign not in (-1, 1):
            raise RewardError(f"sign is {self.sign}; it must be -1 (less) or +1 (more).")
        self.clipseg.tokens(self.text)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, H, W) in [-1, 0] or [0, 1]."""
        return self.sign * self.clipseg.probability(images, self.text)


def _make(tools: Tools, text: str, more: bool, clipseg: str) -> Reward:
    name = clipseg or tools.usual.get("clipseg", CLIPSEG)
    return DescribeReward(tools.load(ClipSeg, name), text, 1 if more else -1)


def _here(tools: Tools) -> bool:
    """Whether one was named, or the usual one was downloaded before."""
    return "clipseg" in tools.usual or cached(CLIPSEG)


KIND = RewardKind(
    name="describe",
    title="Describe",
    help="less (or more) of what a text describes, found by CLIPSeg",
    options=(
        Option(
            "text", "trees", "what to find, in a few words",
            choices=("trees", "lake", "sky", "hair"),
        ),
        MORE,
        Option("clipseg", "", f"folder or Hub id of a CLIPSeg ({CLIPSEG})", path=True),
    ),
    words=lambda text, more, clipseg: more_or_less(more, f"“{text}”"),  # colours have no quotes
    make=_make,
    experiment="segment",
    prompt="nature landscape",
    available=_here,
)  # fmt: skip
