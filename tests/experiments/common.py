"""What the experiments share: models, pictures, areas, and the file that keeps their figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pxpo import (
    DiffusionModel,
    Lora,
    Run,
    Segmenter,
    Settings,
    begin,
    finish,
    load_model,
)
from pxpo.measures import sampled
from pxpo.pages import Table
from pxpo.plots import strip, to_picture

LANDSCAPE, PORTRAIT, TRAFFIC = (
    "nature landscape", "portrait of a man on the beach", "red taxi in traffic"
)  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """What an experiment works with. out: where strips go, if anywhere."""

    model: DiffusionModel
    segmenter: Segmenter
    lines: Path
    out: Path | None

    @staticmethod
    def of(model: str | None, segmenter: str | None, lines: Path, out: Path | None) -> Lab:
        return Lab(load_model(model), Segmenter(segmenter), lines, out)

    def once(self, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """Add the line of this key, and of what `work` measures, unless the file has it."""
        if any(line.items() >= key.items() for line in self.read(key["changes"])):
            return
        line = {**key, **work()}
        self.lines.parent.mkdir(parents=True, exist_ok=True)
        with self.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def read(self, changes: dict[str, Any]) -> list[dict[str, Any]]:
        """The lines of runs with these changes of the settings."""
        text = self.lines.read_text() if self.lines.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        return [line for line in lines if line["changes"] == changes]

    def sample(self, lora: Lora | None, settings: Settings, seeds: Iterable[int]) -> Tensor:
        """Images (B, 3, H, W) of these seeds, with the LoRA if there is one."""
        return finish(sampled(self.model, lora, settings.prompt, list(seeds), settings)).images

    def areas(self, images: Tensor, label: str) -> Tensor:
        """Share (B,) of each image that is `label`, by the segmenter; or a sun, by its colour."""
        return self.mask(images, label).float().mean((1, 2))

    def mask(self, images: Tensor, label: str) -> Tensor:
        """(B, H, W): whether each pixel is `label`."""
        classes = self.segmenter.classes(images)
        if label == "Sun":
            return sun(images, classes == self.segmenter.index("Sky"))
        return classes == self.segmenter.index(label)

    def strip(self, name: str, run: Run, before: Tensor, after: Tensor) -> None:
        """This seed by update, and held-out ones before and after."""
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        counts = sorted({round(i * run.count / 8) for i in range(9)})
        rows = [
            [to_picture(run.updates[count].shown[0]) for count in counts],
            [to_picture(image) for image in before[:9]],
            [to_picture(image) for image in after[:9]],
        ]
        titles = [f"update {count}" for count in counts]
        names = ["this seed", "others before", "others after"]
        strip(rows, titles, names).save(self.out / f"{name}.png")


def sun(images: Tensor, sky: Tensor) -> Tensor:
    """Where in the sky (B, H, W) it is warmer and lighter than the rest of its row."""
    warmth, light = images[:, 0] - images[:, 2], images.mean(1)
    nowhere = torch.full_like(warmth, torch.nan)
    warm, bright = (
        values > torch.where(sky, values, nowhere).nanmedian(2, keepdim=True).values + more
        for values, more in ((warmth, 0.12), (light, 0.02))
    )
    return sky & warm & bright


def begun(model: DiffusionModel, settings: Settings, seed: int) -> Run:
    return finish(begin(model, replace(settings, seed=seed)))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return Table(columns, list(rows)).markdown()
