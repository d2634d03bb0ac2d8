"""Tiny World's segmenter: a small SegFormer that names every pixel of a scene."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
)

from . import scenes
from .autoencoder import latents_of, pictures_of
from .training import batch_at, half_precision, train

MEAN, STD = 0.5, 0.5


def new_segmenter() -> SegformerForSemanticSegmentation:
    """SegFormer's own shape, narrow."""
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            depths=[1, 1, 1, 1],
            hidden_sizes=[24, 48, 96, 128],
            num_attention_heads=[1, 2, 3, 4],
            mlp_ratios=[2, 2, 3, 4],
            decoder_hidden_size=96,
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
            id2label=dict(enumerate(scenes.LABELS)),
            label2id={name: index for index, name in enumerate(scenes.LABELS)},
        )
    )


def logits_of(
    model: SegformerForSemanticSegmentation, images: Tensor, size: torch.Size | None = None
) -> Tensor:
    """(B, H, W, 3) uint8 to class logits (B, classes, *size), of the images' size if not named."""
    x = images.to(model.device).permute(0, 3, 1, 2).float() / 255
    logits = model((x - MEAN) / STD).logits.float()
    size = images.shape[1:3] if size is None else size
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def worn(vae: AutoencoderKL, images: Tensor, device: torch.device, seed: int) -> Tensor:
    """What the autoencoder makes of `images` (N, H, W, 3) uint8 whose latents are a little off.

    Generated pictures err in just this way; a segmenter that saw drawings alone is fooled by it.
    """
    generator = torch.Generator().manual_seed(seed)
    z = latents_of(vae, images, device)
    spread = 0.3 * torch.rand(len(z), 1, 1, 1, generator=generator) ** 2
    return pictures_of(vae, z + spread * torch.randn(z.shape, generator=generator), device)


def train_segmenter(
    images: Tensor,
    labels: Tensor,
    vae: AutoencoderKL,
    device: torch.device,
    *,
    steps: int,
    seed: int,
    batch: int = 12,
    checkpoint: Path | None = None,
    report: Callable[[str], None] = print,
) -> SegformerForSemanticSegmentation:
    """Learn on `images` (N, 256, 256, 3) uint8 with `labels` (N, 256, 256), half of them worn."""
    torch.manual_seed(seed)
    half = len(images) // 2
    images = torch.cat([images[:half], worn(vae, images[half:], device, seed)])
    model = new_segmenter().to(device).train()

    def loss_of(model: SegformerForSemanticSegmentation, step: int) -> Tensor:
        chosen = batch_at(len(images), batch, seed, step)
        x, y = images[chosen], labels[chosen].long().to(device)
        if step % 2:
            x, y = x.flip(2), y.flip(2)
        # One pixel of each four, in turn: all of them would take three quarters of a step's time.
        y = y[:, step // 2 % 2 :: 2, step // 4 % 2 :: 2]
        with half_precision(device):
            logits = logits_of(model, x, y.shape[1:])
        return F.cross_entropy(logits, y) + dice_loss(logits, y)

    return train(
        "segmenter", model, loss_of,
        steps=steps, learning_rate=1.5e-3, weight_decay=1e-2, checkpoint=checkpoint, report=report,
    )  # fmt: skip


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """1 minus the soft Dice overlap, averaged over the classes in `truth` (B, H, W).

    Every class counts alike, however small: cross-entropy alone never learns hats.
    """
    wanted = F.one_hot(truth, logits.shape[1]).permute(0, 3, 1, 2)
    guess = logits.softmax(1)
    both, either = (guess * wanted).sum((0, 2, 3)), (guess + wanted).sum((0, 2, 3))
    there = wanted.sum((0, 2, 3)) > 0
    return 1 - (2 * both[there] / either[there]).mean()


@torch.no_grad()
def classes_of(model: SegformerForSemanticSegmentation, images: Tensor) -> Tensor:
    """The likeliest class of each pixel, (N, H, W) long, of `images` (N, H, W, 3) uint8."""
    return torch.cat([logits_of(model, part).argmax(1).cpu() for part in images.split(16)])


def mean_iou(guess: Tensor, truth: Tensor, classes: int = len(scenes.LABELS)) -> dict[str, float]:
    """Intersection over union of each class that occurs in `truth`, and their mean under "mean"."""
    counts = torch.bincount(
        truth.flatten().long() * classes + guess.flatten(), minlength=classes**2
    )
    table = counts.view(classes, classes).double()
    both, union = table.diag(), table.sum(0) + table.sum(1) - table.diag()
    found = {
        scenes.LABELS[i]: (both[i] / union[i]).item() for i in range(classes) if table[i].sum()
    }
    return {**found, "mean": sum(found.values()) / len(found)}


def save_segmenter(model: SegformerForSemanticSegmentation, folder: Path) -> None:
    model.save_pretrained(folder)
    SegformerImageProcessorPil(
        do_resize=True,
        size={"height": scenes.SIZE, "width": scenes.SIZE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
        do_reduce_labels=False,
    ).save_pretrained(folder)
