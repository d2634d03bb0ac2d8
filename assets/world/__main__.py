"""Make Tiny World from nothing: `python -m assets.world`.

Draws the scenes, trains the autoencoders, the painter and the segmenter, writes them as standard
diffusers and transformers folders with model cards, and measures what they are worth. Each stage
leaves its result in the --work folder and is not made again while it lies there; the long ones go
on where they were interrupted.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SegformerForSemanticSegmentation

from . import scenes
from .autoencoder import halved, latents_of, train_autoencoder
from .cards import write_cards
from .diffusion import Painter, save_painter, train_painter
from .measure import measure, sample_sheet
from .segmenter import save_segmenter, train_segmenter
from .sharp import train_sharp
from .text import save_tokenizer

ASSETS = Path(__file__).resolve().parents[1]
STAGES = ("plain", "beginner", "painter", "sharp", "segmenter")  # of the Workshop, in order


@dataclass(frozen=True)
class Size:
    """How much is drawn, and for how many steps each part is trained."""

    scenes: int
    crops: int
    wholes: int
    painter: int
    portraits: int
    matched: int
    refined: int
    segmenter: int
    batch: int
    judged: int = 300  # pictures to measure it on


SIZES = {
    "cpu": Size(
        24_000, crops=3600, wholes=2900, painter=7400, portraits=1800, matched=400, refined=2400,
        segmenter=3000, batch=48,
    ),
    "gpu": Size(
        60_000, crops=20_000, wholes=10_000, painter=40_000, portraits=20_000, matched=4000,
        refined=40_000, segmenter=12_000, batch=128,
    ),
    "toy": Size(  # for the tests
        64, crops=2, wholes=2, painter=2, portraits=2, matched=2, refined=2, segmenter=2, batch=4,
        judged=8,
    ),
}  # fmt: skip


class Workshop:
    """The stages in order. Each leaves its result in the folder `work`, and is made once."""

    def __init__(
        self, size: Size, device: torch.device, seed: int, work: Path, compiled: bool
    ) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.size, self.device, self.seed, self.work = size, device, seed, work
        self.compiled, self.started = compiled, time.time()
        self.tokenizer = save_tokenizer(scenes.WORDS, work / "tokenizer")

    def report(self, text: str) -> None:
        print(f"[{(time.time() - self.started) / 60:6.1f} min] {text}", flush=True)

    def small(self, count: int, seed: int, kind: str | None = None) -> tuple[Tensor, list[str]]:
        """Scenes at half size, (N, 128, 128, 3) uint8, and their captions; drawn in parts, as all
        of them at full size would not fit into memory."""
        pictures, captions = [], []
        for first in range(0, count, 2048):
            part = min(2048, count - first)
            images, _, words = scenes.draw_many(part, self.seed + seed, kind, first=first)
            pictures.append(halved(torch.from_numpy(images)))
            captions += words
        return torch.cat(pictures), captions

    @functools.cached_property
    def plain(self) -> AutoencoderKL:
        """The first autoencoder, for 128x128, whose latents all else is about."""
        folder = self.work / "vae"
        if not folder.exists():
            images, _ = self.small(self.size.scenes, 1)
            vae = train_autoencoder(
                images, self.device, crops=self.size.crops, wholes=self.size.wholes,
                seed=self.seed, report=self.report,
            )  # fmt: skip
            vae.save_pretrained(folder)
        vae = AutoencoderKL.from_pretrained(folder)
        return vae.eval().requires_grad_(False).to(self.device)

    def latents(self, *kinds: tuple[int, int, str | None]) -> tuple[Tensor, list[str]]:
        """Latents (N, C, h, w) float16 of scenes of each (count, seed, kind), and captions."""
        parts, captions = [], []
        for count, seed, kind in kinds:
            images, words = self.small(count, seed, kind)
            parts.append(latents_of(self.plain, images, self.device).half())
            captions += words
        self.report(f"{len(captions)} scenes encoded")
        return torch.cat(parts), captions

    def painted(
        self,
        file: Path,
        begun: Painter,
        kinds: tuple[tuple[int, int, str | None], ...],
        **how: Any,
    ) -> Painter:
        """The painter in `file`: `begun`, trained on scenes of these kinds if need be."""
        if not file.exists():
            latents, captions = self.latents(*kinds)
            painter = train_painter(
                begun, latents, captions, self.tokenizer, self.device, batch=self.size.batch,
                compiled=self.compiled, checkpoint=file.with_suffix(".checkpoint"),
                report=self.report, **how,
            )  # fmt: skip
            save_file(painter.state_dict(), file)
        painter = copy.deepcopy(begun)
        painter.load_state_dict(load_file(file))
        return painter

    @functools.cached_property
    def beginner(self) -> Painter:
        return self.painted(
            self.work / "beginner.safetensors",
            Painter(self.tokenizer, self.seed),
            ((self.size.scenes, 1, None),),
            steps=self.size.painter,
            seed=self.seed,
        )

    @functools.cached_property
    def painter(self) -> Painter:
        """Goes on with more portraits, the hardest, half of them with every other a straw hat: hats
        are too rare in the scenes to mean anything."""
        count = self.size.scenes
        kinds = (
            (count // 4, 2, None),
            (count // 8, 3, scenes.KINDS[2]),
            (count // 8, 4, scenes.HATS),
        )
        return self.painted(
            self.work / "painter.safetensors", self.beginner, kinds,
            steps=self.size.portraits, seed=self.seed + 1, learning_rate=4e-4,
        )  # fmt: skip

    @functools.cached_property
    def sharp(self) -> AutoencoderKL:
        """The autoencoder for 256x256; it learns from the beginner, whose errors are larger."""
        folder = self.work / "sharp"
        if not folder.exists():
            pictures, _, captions = scenes.draw_many(min(self.size.scenes, 9000), self.seed + 5)
            images = torch.from_numpy(pictures)
            sharp = train_sharp(
                self.plain, self.beginner, images,
                latents_of(self.plain, halved(images), self.device).half(), captions,
                self.tokenizer, self.device, matched=self.size.matched, refined=self.size.refined,
                seed=self.seed, checkpoint=self.work / "sharp.checkpoint", report=self.report,
            )  # fmt: skip
            sharp.save_pretrained(folder)
        sharp = AutoencoderKL.from_pretrained(folder)
        return sharp.eval().requires_grad_(False).to(self.device)

    @functools.cached_property
    def segmenter(self) -> SegformerForSemanticSegmentation:
        folder = self.work / "segmenter"
        if not folder.exists():
            pictures, labels, _ = scenes.draw_many(min(self.size.scenes, 6000), self.seed + 6)
            segmenter = train_segmenter(
                torch.from_numpy(pictures), torch.from_numpy(labels), self.sharp, self.device,
                steps=self.size.segmenter, seed=self.seed,
                checkpoint=self.work / "segmenter.checkpoint", report=self.report,
            )  # fmt: skip
            save_segmenter(segmenter, folder)
        return SegformerForSemanticSegmentation.from_pretrained(folder).to(self.device)


def make(
    size: Size, device: torch.device, seed: int, work: Path, out: Path, compiled: bool
) -> None:
    """All stages; `out` gets tiny_world/, tiny_world_segmenter/ and tiny_world.png."""
    shop = Workshop(size, device, seed, work, compiled)
    world, eye = out / "tiny_world", out / "tiny_world_segmenter"
    save_segmenter(shop.segmenter, eye)  # before the parts it needs go in half precision
    save_painter(shop.painter, shop.tokenizer, shop.sharp, world)
    sample_sheet(world, out / "tiny_world.png", rows=min(6, size.judged // 8))
    figures = measure(world, eye, size.judged, shop.report)
    write_cards(world, eye, figures)
    shop.report("done: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--size", choices=SIZES, help="how much to train (cpu, or gpu on one)")
    parser.add_argument("--device", default=best)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-world"))
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument(
        "--stage", choices=STAGES, help="make this and what it needs only, beside other processes"
    )
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler; faster")
    options = parser.parse_args()
    size = SIZES[options.size or ("gpu" if options.device.startswith("cuda") else "cpu")]
    device = torch.device(options.device)
    if options.stage:
        shop = Workshop(size, device, options.seed, options.work, options.compile)
        getattr(shop, options.stage)
    else:
        make(size, device, options.seed, options.work, options.out, options.compile)


if __name__ == "__main__":
    main()
