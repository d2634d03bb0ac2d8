"""Painters of other widths on Tiny World's latents, to see what holds beside it; not shipped.

    python -m assets.world.relatives --width 32 --predicts epsilon --steps 3600 --out FOLDER

Beside FOLDER lie the latents, which the next one shares, and what was trained so far.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import scenes
from .__main__ import ASSETS
from .autoencoder import latents_of
from .diffusion import Painter, save_painter, train_painter

SCENES_SEED = 8  # no other part of Tiny World learnt from these scenes


def make(
    width: int, predicts: str, steps: int, out: Path, count: int, seed: int = 0, batch: int = 48
) -> None:
    """Train a painter and write it as a pipeline. count: of the scenes that it learns from."""
    out.parent.mkdir(parents=True, exist_ok=True)
    world = StableDiffusionPipeline.from_pretrained(ASSETS / "tiny_world")
    vae = world.vae.eval().requires_grad_(False)
    latents, captions = encoded(vae, count, out.parent / f"latents-{count}.safetensors")
    painter = train_painter(
        Painter(world.tokenizer, seed, width, predicts), latents, captions, world.tokenizer,
        torch.device("cpu"), steps=steps, seed=seed, batch=batch,
        checkpoint=out.with_suffix(".checkpoint"),
    )  # fmt: skip
    save_painter(painter, world.tokenizer, vae, out)


def encoded(vae: torch.nn.Module, count: int, file: Path) -> tuple[Tensor, list[str]]:
    """Latents (N, C, h, w) of scenes, as kept in `file`, and their captions."""
    pictures, _, captions = scenes.draw_many(count, SCENES_SEED)
    if not file.exists():
        latents = latents_of(vae, torch.from_numpy(pictures), torch.device("cpu"))
        save_file({"latents": latents.contiguous()}, file)
    return load_file(file)["latents"], captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, required=True, help="Tiny World's is 64")
    parser.add_argument("--predicts", choices=("epsilon", "v_prediction"), default="v_prediction")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--scenes", type=int, default=8000, help="to learn from")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    make(options.width, options.predicts, options.steps, options.out, options.scenes)


if __name__ == "__main__":
    main()
