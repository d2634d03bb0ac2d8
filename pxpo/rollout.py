"""Sampling, as a generator that hands control back after every step."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import DivergedError, SettingError
from .models.base import Cond, DiffusionModel, some
from .progress import Progress
from .settings import Sampling
from .steps import Steps


@dataclass(frozen=True)
class Noise:
    """The randomness of one image: `start` seeds x_T, `steps` the noise of the steps.

    With `steps` None the steps go on with the start's generator: the picture that a stock pipeline
    makes with `torch.Generator().manual_seed(start)`.
    """

    start: int
    steps: int | None = None

    def draw(self, shape: tuple[int, ...], steps: int) -> Tensor:
        """(steps + 1, *shape) float32: x_T, then each step's z; the same on any machine."""
        generator = torch.Generator().manual_seed(self.start)
        first = torch.randn((1, *shape), generator=generator)
        if self.steps is not None:
            generator = torch.Generator().manual_seed(self.steps)
        rest = [torch.randn((1, *shape), generator=generator) for _ in range(steps)]
        return torch.cat([first, *rest])


def derived_seed(*numbers: int) -> int:
    """A seed of its own for each tuple of numbers, e.g. (run, step, image)."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Trajectory:
    """What one rollout did: the states and actions that learning replays, as data on the CPU.

    latents: (T + 1, B, C, h, w) float32, x_T first and x_0 last. outputs: (T, B, C, h, w), what the
    network said, guided. noise: (T, B, C, h, w), each step's z. cond: (B, ...) by name. uncond:
    (1, ...) by name. images: (B, 3, H, W) in [0, 1].
    """

    latents: Tensor
    outputs: Tensor
    noise: Tensor
    steps: Steps
    cond: Cond
    uncond: Cond
    guidance_scale: float
    images: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the latents."""
        return self.latents.shape[-2], self.latents.shape[-1]


def joined(parts: Sequence[Trajectory]) -> Trajectory:
    """The trajectories of several batches, of the same steps and guidance, as one."""
    first, *others = parts
    if not others:
        return first
    return replace(
        first,
        latents=torch.cat([one.latents for one in parts], dim=1),
        outputs=torch.cat([one.outputs for one in parts], dim=1),
        noise=torch.cat([one.noise for one in parts], dim=1),
        cond={n: torch.cat([one.cond[n] for one in parts]) for n in first.cond},
        images=torch.cat([one.images for one in parts]),
    )


@torch.no_grad()
def rollout(
    model: DiffusionModel,
    prompts: Sequence[str],
    noise: Sequence[Noise],
    sampling: Sampling,
    phase: str = "denoising",
) -> Generator[Progress, None, Trajectory]:
    """Sample one image for each prompt and noise; yields after each step, returns the Trajectory.

    An image depends on its own prompt and noise alone, not on the batch it is in. Raises
    DivergedError where the network's output is not finite.
    """
    if len(prompts) != len(noise) or not prompts:
        raise SettingError(
            f"{len(prompts)} prompts and {len(noise)} noises; give one noise for each prompt."
        )
    sampling = model.filled(sampling)
    steps = model.steps(sampling)
    cond, uncond = model.encode(prompts), model.unconditional()
    drawn = torch.stack([one.draw(model.latent_shape, len(steps)) for one in noise], dim=1)
    latents, z = [drawn[0]], drawn[1:]  # (B, C, h, w), (T, B, C, h, w)
    outputs = torch.empty_like(z)
    for index in range(len(steps)):
        at, x_t, out = steps[index], latents[-1], outputs[index]

        def predict(part: slice, at: Steps = at, x_t: Tensor = x_t) -> Tensor:
            t = at.t.expand(len(x_t[part]))
            return model.predict(x_t[part], t, some(cond, part), uncond, sampling.guidance_scale)

        for part, predicted in model.fold("sample", len(prompts), predict):
            out[part] = predicted
        x_prev, x_0 = model.take_step(at, x_t, out, z[index], sampling)
        if not x_prev.isfinite().all():
            raise DivergedError(
                "What the model says is not finite: its LoRA is too strong. Go back an update, or "
                "take another LoRA."
            )
        latents.append(x_prev)
        yield Progress(phase, index + 1, len(steps), x_0)
    return Trajectory(
        torch.stack(latents), outputs, z, steps, cond, uncond,
        sampling.guidance_scale, model.decode(latents[-1]),
    )  # fmt: skip
