"""The wish's eye: how well paint on one picture, or on three, finds the same on other pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from pxpo import Noise, Settings, finish, rollout
from pxpo.credit import downsample
from pxpo.measures import colours
from pxpo.models import StableDiffusion
from pxpo.rewards import Painted, Segmenter, Sight, Wish

from .common import LANDSCAPE, PORTRAIT, TRAFFIC, Lab, table

THINGS = {"Lake": LANDSCAPE, "Tree": LANDSCAPE, "Sky": LANDSCAPE, "Hair": PORTRAIT, "Taxi": TRAFFIC}
JUDGED = 20
PAINTED = 6  # pictures, one by one or three by three
LEAST = 0.02  # of the picture is the thing, where it is painted


def latents(lab: Lab) -> Callable[[Tensor], Tensor]:
    assert isinstance(lab.model, StableDiffusion)
    vae = lab.model.vae
    return lambda images: vae.encode(images * 2 - 1).latent_dist.mode()


def probabilities(lab: Lab) -> Callable[[Tensor], Tensor]:
    def look(images: Tensor) -> Tensor:
        h, w = lab.model.latent_shape[1:]
        found = lab.segmenter.probabilities(images)
        return downsample(found.flatten(0, 1), (h, w)).view(len(images), -1, h, w)

    return look


EYES: dict[str, Callable[[Lab], tuple[Callable[[Tensor], Tensor], Segmenter | None]]] = {
    "colour and height": lambda lab: (colours(lab.model.latent_shape[1:]), None),
    "VAE latents": lambda lab: (latents(lab), None),
    "the model's own features": lambda lab: (lab.model.features, None),
    "the segmenter's probabilities": lambda lab: (probabilities(lab), None),
    "features and probabilities": lambda lab: (lab.model.features, lab.segmenter),
}


def area_under_curve(scores: Tensor, truth: Tensor) -> float:
    """The chance that a pixel which is the thing scores higher than one which is not."""
    order = scores.flatten().argsort()
    ranks = torch.empty(len(order), dtype=torch.float64)
    ranks[order] = torch.arange(1, len(order) + 1, dtype=torch.float64)
    inside = truth.flatten()
    n, m = inside.sum().item(), (~inside).sum().item()
    return ((ranks[inside].sum().item() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


@functools.lru_cache(maxsize=1)
def pictures(lab: Lab, prompt: str, first: int) -> Tensor:
    noise = [Noise(seed) for seed in range(first, first + JUDGED + PAINTED + 14)]
    return finish(rollout(lab.model, [prompt] * len(noise), noise, Settings())).images


@torch.no_grad()
def measured(lab: Lab, thing: str, first: int, share: float) -> dict[str, Any]:
    """share: of the thing's pixels that are painted, in one block from the left."""
    images = pictures(lab, THINGS[thing], first)
    truth = lab.mask(images, thing)
    some = [i for i in range(len(images)) if truth[i].float().mean() >= LEAST][:PAINTED]
    others = [i for i in range(len(images)) if i not in some][:JUDGED]
    size = lab.model.latent_shape[1:]
    wanted = downsample(truth[others].float(), (size[0], size[1])) > 0.5
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1)
    paint = [2 * part(truth[i], share) for i in some]
    figures: dict[str, Any] = {}
    for name, eye in EYES.items():
        sight = Sight(*eye(lab))
        for count in (1, 3):
            areas = []
            for start in range(0, len(some) - count + 1, count):
                chosen = range(start, start + count)
                wish = Wish([Painted(pixels[some[i]], paint[i]) for i in chosen], sight)
                maps = downsample(wish(images[others]), (size[0], size[1]))
                areas.append(area_under_curve(maps, wanted))
            figures[f"{name}, {count}"] = fmean(areas)
    return figures


def part(mask: Tensor, share: float) -> Tensor:
    """The left part of a mask (H, W), of this share of its pixels."""
    columns = mask.sum(0).cumsum(0)
    return mask.float() * (columns <= share * columns[-1])


def run(lab: Lab, names: list[str], seeds: range, changes: dict[str, Any]) -> None:
    for thing in names:
        for share in (1.0, 0.3):
            key = {"thing": thing, "first": seeds[0], "share": share, "changes": changes}
            lab.once(key, functools.partial(measured, lab, thing, seeds[0], share))


def report(lab: Lab, changes: dict[str, Any]) -> str:
    parts = []
    for share in (1.0, 0.3):
        lines = [one for one in lab.read(changes) if one.get("share") == share]
        rows = [
            [name, *(f"{one[f'{name}, 1']:.3f}, {one[f'{name}, 3']:.3f}" for one in lines)]
            for name in EYES
        ]
        title = f"{share:.0%} of it painted, on one picture, on three"
        parts.append(table([title, *(one["thing"] for one in lines)], rows))
    return "\n\n".join(parts)
