"""What Tiny World is worth, measured on scenes and seeds that no training saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import SegformerForSemanticSegmentation

from . import scenes
from .autoencoder import latents_of, pictures_of, psnr
from .segmenter import classes_of, mean_iou

UNSEEN = 999  # the seed of the scenes to measure on
STEPS, GUIDANCE = 20, 3.0

# What a picture must hold for its prompt's sake: each label covers at least this share of it.
NAMED = {
    "nature landscape": {"Sky": 0.05, "Meadow": 0.05},
    "nature landscape with a large lake": {"Sky": 0.05, "Lake": 0.1},
    "nature landscape with many trees": {"Sky": 0.05, "Tree": 0.08},
    "red taxi in traffic": {"Taxi": 0.03, "Road": 0.1, "Building": 0.05},
    "portrait of a man on the beach": {"Face": 0.04, "Upper-clothes": 0.04},
    "portrait of a man with a hat on the beach": {"Face": 0.04, "Hat": 0.01},
}


def sample(folder: Path, prompts: list[str], seeds: list[int], batch: int = 12) -> Tensor:
    """Images (N, H, W, 3) uint8 of a stock pipeline, one per prompt and seed."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(prompts), batch):
        images = pipeline(
            prompts[start : start + batch],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            eta=1.0,
            generator=[torch.Generator().manual_seed(s) for s in seeds[start : start + batch]],
            output_type="pt",
        ).images
        parts.append((images * 255).round().byte().permute(0, 2, 3, 1))
    return torch.cat(parts)


def sample_sheet(folder: Path, file: Path, rows: int = 6, columns: int = 8) -> None:
    """One picture of the seeds 0 to 47, unpicked, the three base prompts in turn."""
    count = rows * columns
    prompts = [scenes.KINDS[index % 3] for index in range(count)]
    images = sample(folder, prompts, list(range(count)))
    grid = images.unflatten(0, (rows, columns)).permute(0, 2, 1, 3, 4)
    side = images.shape[1]
    Image.fromarray(grid.reshape(rows * side, columns * side, 3).numpy()).save(file)


def measure(
    world: Path, eye: Path, count: int, report: Callable[[str], None] = print
) -> dict[str, float]:
    """The figures of TINY WORLD's model cards, by name."""
    device = torch.device("cpu")
    segmenter = SegformerForSemanticSegmentation.from_pretrained(eye).eval()
    pipeline = StableDiffusionPipeline.from_pretrained(world)
    vae = pipeline.vae
    pictures, labels, _ = scenes.draw_many(min(192, count), seed=UNSEEN)
    images, truth = torch.from_numpy(pictures), torch.from_numpy(labels)
    again = pictures_of(vae, latents_of(vae, images, device), device)
    parts = {"vae": vae, "unet": pipeline.unet, "text": pipeline.text_encoder}
    figures = {name: part.num_parameters() / 1e6 for name, part in parts.items()}
    figures["psnr"] = psnr(vae, images, device)
    for name, seen in (("scenes", images), ("reconstructions", again)):
        table = mean_iou(classes_of(segmenter, seen), truth)
        report(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in table.items()))
        figures[f"miou_{name}"] = table["mean"]
    prompts = [list(NAMED)[index % len(NAMED)] for index in range(count)]
    made = sample(world, prompts, [5_000_000 + index for index in range(count)])
    figures["named"] = named(segmenter, made, prompts, report)
    return figures


def named(
    segmenter: SegformerForSemanticSegmentation,
    images: Tensor,
    prompts: list[str],
    report: Callable[[str], None] = print,
) -> float:
    """The share of `images` in which the segmenter finds all that their prompt names."""
    classes = classes_of(segmenter, images)
    right = []
    for prompt, picture in zip(prompts, classes, strict=True):
        right.append(
            all(
                (picture == scenes.LABELS.index(label)).float().mean() >= least
                for label, least in NAMED[prompt].items()
            )
        )
    for prompt in NAMED:
        found = [ok for ok, one in zip(right, prompts, strict=True) if one == prompt]
        report(f"{prompt}: {sum(found)} of {len(found)} hold what it names")
    return sum(right) / len(right)
