"""What learning changed, measured on held-out pictures: of the same seeds, before and after.

Images are (B, 3, H, W) in [0, 1], reward maps (B, H, W).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Generator, Sequence
from statistics import fmean, pstdev

import torch
from torch import Tensor

from .credit import downsample
from .lora import Lora, adapter
from .models import DiffusionModel
from .models.base import some
from .progress import Progress
from .rewards import Painted, Reward, Sight, Wish
from .rollout import Noise, Trajectory, rollout
from .run import Run, training_noise
from .settings import Sampling

HELD_OUT = 10_000_000
"""Seeds from here on are for measuring."""


def held_out(count: int, seen: Container[int] = ()) -> list[int]:
    """The first seeds from HELD_OUT on that are not among `seen`."""
    unseen = (seed for seed in itertools.count(HELD_OUT) if seed not in seen)
    return list(itertools.islice(unseen, count))


def seeds_seen(run: Run) -> set[int]:
    """The seeds of all images that a run learnt from, and its own."""
    return {run.settings.seed} | {
        training_noise(one.settings, number, index).start
        for number, one in enumerate(run.updates[1:])
        for index in range(len(one.latent_reward))
    }


def sampled(
    model: DiffusionModel, lora: Lora | None, prompt: str, seeds: Sequence[int], sampling: Sampling
) -> Generator[Progress, None, Trajectory]:
    """One image of the prompt for each seed, with the LoRA, or of the base model without one."""
    work = rollout(model, [prompt] * len(seeds), [Noise(seed) for seed in seeds], sampling)
    if lora is None:
        return (yield from work)
    with adapter(model, lora):
        return (yield from work)


def drift(before: Tensor, after: Tensor, maps: Tensor) -> tuple[float, float]:
    """Mean change of colour, 0 to 1, where the reward says something and where it says nothing.

    maps: the reward of `before`. A pixel belongs inside by its share of the largest reward there
    is, and outside by the rest: as an update holds what nobody spoke of. A side without any pixel
    has 0.
    """
    change = (after - before).abs().mean(1)  # (B, H, W)
    inside = maps.abs() / maps.abs().max().clamp(min=1e-12)
    return _weighted(change, inside), _weighted(change, 1 - inside)


def _weighted(values: Tensor, weights: Tensor) -> float:
    return ((values * weights).sum() / weights.sum().clamp(min=1e-12)).item()


def changed_outside(run: Run) -> float:
    """Mean change of colour, 0 to 1, of a run's picture since its beginning, where nothing was ever
    painted."""
    before, now = (one.shown[0] / 255 for one in (run.updates[0], run.updates[-1]))
    bare = torch.ones(1, *run.size)
    for one in run.painted:
        bare *= 1 - downsample((one.paint != 0).float()[None], run.size)
    return _weighted((now - before).abs().mean(-1)[None], bare)


def diversity(before: Tensor, after: Tensor) -> float:
    """How much of the spread over seeds is left: 1 is as varied as before.

    before, after: (B, F, h, w), pictures or their features, of one prompt. The spread is a
    channel's standard deviation over B at a place; channels count alike.
    """
    spreads = [values.std(0, correction=0).mean((1, 2)) for values in (before, after)]  # (F,)
    return (spreads[1] / spreads[0].clamp(min=1e-12)).mean().item()


def likeness(pictures: Tensor, maps: Tensor, look: Callable[[Tensor], Tensor]) -> Reward:
    """A judge that finds again, by what looks alike, what a reward said of some pictures.

    pictures: (B, 3, H, W), with the reward's maps. look: images to (B, F, h, w), as a model's
    features. The judge speaks in the reward's own units, and never asks it again: what only fools
    the reward does not move it.
    """
    pixels = (pictures * 255).round().byte().permute(0, 2, 3, 1)
    wish = Wish([Painted(one, torch.zeros(one.shape[:2])) for one in pixels], Sight(look))
    # Unlike paint, a reward has a word on every pixel, 0 too, and no picture's is later.
    wish.values = downsample(maps, wish.size).flatten(1)
    wish.loudness = torch.zeros_like(wish.values)
    return wish


def colours(size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """A look at the mean colour and the height of each latent pixel: (B, 4, h, w)."""

    def look(images: Tensor) -> Tensor:
        small = downsample(images.flatten(0, 1), size).unflatten(0, (len(images), 3))
        height = torch.linspace(-1, 1, size[0]).view(1, 1, -1, 1).expand(len(images), 1, *size)
        return torch.cat([small, height], dim=1)

    return look


@torch.no_grad()
def outputs(model: DiffusionModel, lora: Lora, trajectory: Trajectory) -> Tensor:
    """What the network says with the LoRA of all that the trajectory asked it: (T, B, C, h, w)."""
    now = torch.empty_like(trajectory.outputs)
    with adapter(model, lora):
        for t, x_t, out in zip(trajectory.steps.t, trajectory.latents, now, strict=False):

            def predict(part: slice, t: Tensor = t, x_t: Tensor = x_t) -> Tensor:
                return model.predict(
                    x_t[part], t.expand(len(x_t[part])), some(trajectory.cond, part),
                    trajectory.uncond, trajectory.guidance_scale,
                )  # fmt: skip

            for part, predicted in model.fold("sample", len(x_t), predict):
                out[part] = predicted
    return now


def movement(model: DiffusionModel, lora: Lora, trajectory: Trajectory) -> Tensor:
    """How far the LoRA moves what the network says, as velocity, at each latent pixel, (h, w): the
    root mean square over the images and steps of a trajectory of the base model."""
    now, before = (
        velocities(trajectory, said)
        for said in (outputs(model, lora, trajectory), trajectory.outputs)
    )
    return (now - before).square().mean((0, 1, 2)).sqrt()


def velocities(trajectory: Trajectory, outputs: Tensor) -> Tensor:
    """What the network's outputs (T, B, C, h, w) along a trajectory amount to, as velocity."""
    steps = trajectory.steps[torch.arange(len(outputs)).view(-1, 1, 1, 1, 1)]
    return steps.velocity(trajectory.latents[: len(outputs)], outputs)


def regions(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The cells of a grid of (rows, columns) over a map, as masks of 0 and 1: (R, *size)."""
    row, column = (
        torch.arange(pixels) * cells // pixels
        for pixels, cells in zip(size, grid, strict=True)
    )  # fmt: skip
    cell = row[:, None] * grid[1] + column
    return (cell == torch.arange(grid[0] * grid[1])[:, None, None]).float()


def by_region(maps: Tensor, masks: Tensor) -> Tensor:
    """The mean of each map (B, h, w) in each region, by masks (R, h, w) of 0 and 1: (B, R)."""
    return torch.einsum("bhw,rhw->br", maps, masks) / masks.sum((1, 2))


def own_and_others(matrix: Tensor) -> tuple[float, float]:
    """The means of a matrix (R, R) on its diagonal and off it: of what a region did to itself, and
    to the others."""
    own, whole, count = matrix.trace(), matrix.sum(), len(matrix)
    return (own / count).item(), ((whole - own) / (count * (count - 1))).item()


def queries_to(target: float, queries: Sequence[int], rewards: Sequence[float]) -> float | None:
    """How many reward queries it took to reach the target, between two measurements by a straight
    line; None where it was never reached."""
    if rewards[0] >= target:
        return float(queries[0])
    points = itertools.pairwise(zip(queries, rewards, strict=True))
    for (query, reward), (next_query, next_reward) in points:
        if next_reward >= target:
            return query + (next_query - query) * (target - reward) / (next_reward - reward)
    return None


def spread(values: Sequence[float], digits: int = 1, factor: float = 100) -> str:
    """Mean ± standard deviation, if there are several; in percent, if nothing else is said."""
    values = [factor * value for value in values]
    if len(values) < 2:
        return signed(values[0], digits) if values else "–"
    return f"{signed(fmean(values), digits)} ± {pstdev(values):.{digits}f}"


def signed(value: float, digits: int) -> str:
    """The number with a minus that is as wide as a plus, and no minus before zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")
