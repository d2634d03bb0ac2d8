"""Make Tiny World from nothing: `python -m assets.world`, two hours and a half on two cores.

Draws the scenes, trains the autoencoder, the segmenter and the painter, writes them as standard
diffusers and transformers folders with model cards, and measures what they are worth. Each stage
leaves its result in the --work folder and is not made again while it lies there; the longest one
goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer, SegformerForSemanticSegmentation

from . import scenes
from .autoencoder import latents_of, train_autoencoder
from .cards import write_cards
from .diffusion import Painter, save_painter, train_painter
from .measure import measure, sample_sheet
from .segmenter import save_segmenter, train_segmenter
from .text import save_tokenizer

ASSETS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Size:
    """How much is drawn, and for how many steps each part is trained."""

    scenes: int
    crops: int
    wholes: int
    segmenter: int
    painter: int
    hats: int
    batch: int
    judged: int = 300  # pictures to measure it on


SIZES = {
    "cpu": Size(24_000, crops=3600, wholes=2900, segmenter=3000, painter=5600, hats=1800, batch=48),
    "gpu": Size(
        60_000, crops=20_000, wholes=10_000, segmenter=12_000, painter=40_000, hats=8000, batch=128
    ),
    "toy": Size(  # for the tests
        64, crops=2, wholes=2, segmenter=2, painter=2, hats=2, batch=4, judged=6
    ),
}


def make(
    size: Size, device: torch.device, seed: int, work: Path, out: Path, compiled: bool
) -> None:
    """All stages in order; `out` gets tiny_world/, tiny_world_segmenter/ and tiny_world.png."""
    work.mkdir(parents=True, exist_ok=True)
    started = time.time()

    def report(text: str) -> None:
        print(f"[{(time.time() - started) / 60:6.1f} min] {text}", flush=True)

    pictures, labels, captions = scenes.draw_many(size.scenes, seed=seed + 1)
    images = torch.from_numpy(pictures)
    report(f"{len(images)} scenes drawn")

    if not (work / "vae").exists():
        vae = train_autoencoder(
            images, device, crops=size.crops, wholes=size.wholes, seed=seed, report=report
        )
        vae.save_pretrained(work / "vae")
    vae = AutoencoderKL.from_pretrained(work / "vae").eval().requires_grad_(False).to(device)

    tokenizer = save_tokenizer(scenes.WORDS, work / "tokenizer")
    learnt, finished = work / "painter.safetensors", work / "painter_hats.safetensors"
    if not finished.exists():
        latents = kept(work / "latents.safetensors", lambda: latents_of(vae, images, device))
        report("scenes encoded")
        train_on = functools.partial(
            train_painter, tokenizer=tokenizer, device=device, batch=size.batch, compiled=compiled,
            checkpoint=work / "painter.checkpoint", report=report,
        )  # fmt: skip
        if not learnt.exists():
            painter = train_on(latents, captions, steps=size.painter, seed=seed)
            save_file(painter.state_dict(), learnt)
        # Hats are too rare in the scenes to mean anything: go on with every sixth a straw hat.
        third = size.scenes // 6
        pictures, _, more = scenes.draw_many(third, seed=seed + 2, kind=scenes.HATS)
        hats = latents_of(vae, torch.from_numpy(pictures), device).half()
        painter = train_on(
            torch.cat([latents[: 2 * third], hats]), captions[: 2 * third] + more,
            steps=size.hats, seed=seed + 1, learning_rate=6e-4,
            begun=load_painter(learnt, tokenizer),
        )  # fmt: skip
        save_file(painter.state_dict(), finished)
    painter = load_painter(finished, tokenizer)

    if not (work / "segmenter").exists():
        some = min(len(images), 6000)
        segmenter = train_segmenter(
            images[:some], torch.from_numpy(labels[:some]), vae, device,
            steps=size.segmenter, seed=seed, report=report,
        )  # fmt: skip
        save_segmenter(segmenter, work / "segmenter")
    segmenter = SegformerForSemanticSegmentation.from_pretrained(work / "segmenter").to(device)

    world, eye = out / "tiny_world", out / "tiny_world_segmenter"
    save_painter(painter, tokenizer, vae, world)
    save_segmenter(segmenter, eye)
    sample_sheet(world, out / "tiny_world.png")
    figures = measure(world, eye, size.judged, report)
    write_cards(world, eye, figures)
    report("done: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))


def load_painter(file: Path, tokenizer: CLIPTokenizer) -> Painter:
    painter = Painter(tokenizer)
    painter.load_state_dict(load_file(file))
    return painter


def kept(file: Path, make_it: Callable[[], Tensor]) -> Tensor:
    """The tensor in `file`, made and written there, in half precision, if need be."""
    if not file.exists():
        save_file({"value": make_it().half().contiguous()}, file)
    return load_file(file)["value"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--size", choices=SIZES, help="how much to train (cpu, or gpu on one)")
    parser.add_argument("--device", default=best)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-world"))
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler; faster")
    options = parser.parse_args()
    size = SIZES[options.size or ("gpu" if options.device.startswith("cuda") else "cpu")]
    device = torch.device(options.device)
    make(size, device, options.seed, options.work, options.out, options.compile)


if __name__ == "__main__":
    main()
