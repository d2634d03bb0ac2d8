"""The update of Eq. 6 as one vector-Jacobian product per chunk of (image, step) pairs.

For a step x_prev = a x_t + c out + sigma z, on policy,

    d log p / d out = z c / sigma,  so  d J / d theta = sum A^ij z^ij (c / sigma) d out^ij / d theta

with A the latent credit: no stored log-probabilities, no division by sigma squared, and an
importance ratio of 1 by construction. x_t and z are data, so no graph runs through time and the
steps are independent: they are folded into the batch.

Departures from the paper, all but the first of them settings:

- Eq. 6 sums over time and pixels, Fig. 2's caption averages; we average. A latent pixel's
  log-probability is the sum over its channels (the paper does not say).
- `baseline="location"` replaces the paper's standardisation (`"global"`).
- `step_noise="expected"` puts E[z | x_t, x_0] for z. As the reward is a function of x_0, the mean
  gradient would be the same and what is left out is noise (Rao-Blackwell), were the model's own
  mean right. That is the mean without guidance: an early step is guided well past where its picture
  ends, the same way in all pictures. Each step is as loud as another in what the network says, as
  velocity, while |c / sigma| weighs the last, detail-making steps most.
- `strength` sets the size of the step by what it changes (strength.py).
- `hold` adds a per-pixel KL divergence to the base model where the map says nothing.
- `unconditional="detached"` and `timesteps` < 1 trade exactness for speed.

The preset "paper" of settings.py has none of the last five.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from .errors import DivergedError, RewardError, SettingError
from .models.base import DiffusionModel, some, without_lora
from .processes import share, summed, tasks
from .progress import Progress, finish
from .rollout import Trajectory
from .settings import Learning
from .steps import Steps
from .strength import relative_change, scale_step

NOISE = 1.0
"""The distance from the base model at which a LoRA has turned pictures to noise: it then says as
much as the whole model does."""

TRIES = 5
"""How often a gradient is accumulated that leaves the range of half precision."""

SMALLER = 1 / 16
"""What is sent back then, relative to the try before: a power of two, which rounds nothing."""

MEASURED = 8
"""The (image, step) pairs by which an update's size is measured."""


@dataclass(frozen=True)
class Gradient:
    """norm: of all parameters' together. kl: the mean KL divergence to the base model of a held
    latent pixel and step; 0 when hold is 0."""

    norm: float
    kl: float


@dataclass(frozen=True)
class Report:
    """What an update did: the gradient's norm and `kl` as in Gradient, and how far what the network
    says has moved, relative to its size: by this update, and from the base model in all."""

    grad_norm: float
    kl: float
    moved: float
    from_base: float


def update(
    model: DiffusionModel,
    parameters: dict[str, Parameter],
    optimizer: torch.optim.Optimizer,
    trajectory: Trajectory,
    credit: Tensor,
    learning: Learning,
    *,
    hold_map: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Generator[Progress, None, Report]:
    """One optimizer step on `parameters`, the LoRA attached to `model`; yields after each chunk.

    trajectory: this process's share of the images (processes.py). credit: (B, h, w), the weight A
    of each latent pixel of all of them. hold_map: (B, h, w), 0 or more, how much of `hold` pulls
    there; 1 everywhere when None. generator: draws the steps when `timesteps` < 1. All processes
    take the same step.
    The result does not depend on the size of the chunks beyond float rounding.
    Raises DivergedError, with the parameters as they were, when the gradient is not finite, when no
    step along it gives a finite change, or when it leads to noise.
    """
    gradient = yield from accumulate_gradient(
        model, parameters, trajectory, credit, learning, hold_map=hold_map, generator=generator
    )
    if not math.isfinite(gradient.norm):
        optimizer.zero_grad()
        raise DivergedError(
            f"The gradient's norm is {gradient.norm}; the step was not taken and the LoRA is as "
            "before. Go back some updates, take a lower strength, or another LoRA."
        )
    measured = partial(_of_measured, trajectory, len(credit))
    old, new = measured(lambda *pairs: trajectory.outputs[pairs]), Tensor()

    def measure() -> float:
        nonlocal new
        new = measured(lambda *pairs: finish(_outputs(model, trajectory, *pairs)))
        return relative_change(new, old)

    before = [parameter.detach().clone() for parameter in parameters.values()]
    optimizer.step()
    moved = yield from scale_step(list(parameters.values()), before, measure, learning.strength)
    with without_lora(model):
        base = measured(lambda *pairs: finish(_outputs(model, trajectory, *pairs)))
    try:
        from_base = _short_of_noise(relative_change(new, base))
    except DivergedError:
        with torch.no_grad():
            for parameter, value in zip(parameters.values(), before, strict=True):
                parameter.copy_(value)
        raise
    return Report(gradient.norm, gradient.kl, moved, from_base)


def distance_from_base(model: DiffusionModel, trajectory: Trajectory) -> float:
    """How far what the network said is from what the base model says, relative to the size of that.

    Raises DivergedError where that is so far that pictures are noise.
    """
    step, image, weight = _measured_pairs(trajectory.steps, trajectory.outputs.shape[1])
    with without_lora(model):
        base = finish(_outputs(model, trajectory, step, image))
    now, base = (
        weight * velocity(trajectory, step, image, out)
        for out in (trajectory.outputs[step, image], base)
    )
    return _short_of_noise(relative_change(now, base))


def _short_of_noise(distance: float) -> float:
    """A distance from the base model; DivergedError where it is too far."""
    if not distance < NOISE:
        raise DivergedError(
            f"This LoRA would say {distance:.1f} times as much as the model itself; from {NOISE:g} "
            "on pictures turn to noise. It was not taken: go back some updates, take a lower "
            "strength, or another LoRA."
        )
    return distance


def accumulate_gradient(
    model: DiffusionModel,
    parameters: dict[str, Parameter],
    trajectory: Trajectory,
    credit: Tensor,
    learning: Learning,
    *,
    hold_map: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Generator[Progress, None, Gradient]:
    """Set each parameter's .grad to the gradient of

        - mean over (step, image, pixel) of A log p  +  hold * mean of hold_map * KL(p || base)

    as described above; arguments as in `update`. A pixel's KL divergence is half the sum
    over channels of (c / sigma)^2 (out - out_base)^2, with step_weights() for c / sigma.

    What leaves the range of half precision on its way back is sent again, smaller.
    """
    hold_map = torch.ones_like(credit) if hold_map is None else hold_map
    _check("credit", credit, trajectory)
    _check("hold_map", hold_map, trajectory)
    mine, (h, w) = share(len(credit)), trajectory.size
    chosen = _chosen_steps(trajectory.steps.sigma, learning.timesteps, generator)
    own = torch.arange(mine.stop - mine.start)
    pairs = torch.cartesian_prod(chosen, own)  # (P, 2): step, image
    pairs_of_all = len(chosen) * len(credit)
    weights = step_weights(trajectory.steps, learning.step_noise)
    # With the unconditional half detached, guidance is a mere factor on the conditional one.
    detached = learning.unconditional == "detached"
    guidance = 1.0 if detached else trajectory.guidance_scale
    # Half precision underflows on a mean over millions of terms: divide at the end, in float32.
    scale = 1.0 / (credit.abs().max().item() or 1.0)
    own_credit, own_hold = credit[mine], hold_map[mine]
    factor = trajectory.guidance_scale if detached else 1.0
    if learning.hold:
        with without_lora(model):
            base = yield from _outputs(model, trajectory, *pairs.unbind(1))

    def work(part: slice) -> tuple[Sequence[Tensor], float]:
        step, image = pairs[part].unbind(1)
        weight = weights[step].view(-1, 1, 1, 1)
        out = _predict(model, trajectory, step, image, guidance)
        if learning.step_noise == "drawn":
            z = trajectory.noise[step, image]
        else:
            z = _expected_noise(model, trajectory, step, image, out.detach(), guidance)
        sent_back = -weight * own_credit[image, None] * z  # (P, C, h, w)
        kl = 0.0
        if learning.hold:
            drift = trajectory.outputs[step, image] - base[part]
            pull = weight**2 * own_hold[image, None] * drift
            kl = 0.5 * (pull * drift).sum().item()
            sent_back = sent_back + learning.hold * pull
        sent_back = (scale * factor * sent_back).to(out.device)
        return torch.autograd.grad(out, list(parameters.values()), sent_back), kl

    count = pairs_of_all * h * w
    for _ in range(TRIES):
        *totals, kl_sum = yield from _summed_up(model, parameters, len(pairs), work)
        for parameter, total in zip(parameters.values(), totals, strict=True):
            parameter.grad = total / (scale * count)
        norm = torch.linalg.vector_norm(
            torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None])
        )
        # Only float16 is that narrow: bfloat16 reaches as far as float32.
        if norm.isfinite() or model.network.dtype != torch.float16:
            break
        scale *= SMALLER
    held = max(hold_map.sum().item() / len(credit), 1e-12)
    return Gradient(norm.item(), kl_sum.item() / (pairs_of_all * held))


def _summed_up(
    model: DiffusionModel,
    parameters: dict[str, Parameter],
    pairs: int,
    work: Callable[[slice], tuple[Sequence[Tensor], float]],
) -> Generator[Progress, None, list[Tensor]]:
    """The sums over all pairs of all processes: each parameter's gradient, and the divergence."""
    totals, divergence = [torch.zeros_like(p) for p in parameters.values()], 0.0
    for part, (gradients, kl) in model.fold("learn", pairs, work):
        divergence += kl
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient
        yield Progress("learning", part.stop, pairs)
    return summed([*totals, torch.tensor(divergence, dtype=torch.float64)])


def step_weights(steps: Steps, step_noise: str) -> Tensor:
    """(T,): what z is multiplied by in d log p / d out: c / sigma for the noise as drawn, infinite
    where sigma is 0, but such steps are never learnt from; for the expected noise its sign, times
    w = d v / d out, so that each step is as loud as another in v."""
    ratio = steps.c / steps.sigma
    return ratio if step_noise == "drawn" else ratio.sign() * steps.w


def _predict(
    model: DiffusionModel,
    trajectory: Trajectory,
    step: Tensor,
    image: Tensor,
    guidance_scale: float,
) -> Tensor:
    """What the network says (P, C, h, w) at these (P,) steps of these (P,) images."""
    x_t, t = trajectory.latents[step, image], trajectory.steps.t[step]
    return model.predict(x_t, t, some(trajectory.cond, image), trajectory.uncond, guidance_scale)


def velocity(trajectory: Trajectory, step: Tensor, image: Tensor, out: Tensor) -> Tensor:
    """What the network says (P, C, h, w) at these (P,) steps of these images, as velocity."""
    at = trajectory.steps[step.view(-1, 1, 1, 1)]
    return at.velocity(trajectory.latents[step, image], out)


def _outputs(
    model: DiffusionModel, trajectory: Trajectory, step: Tensor, image: Tensor
) -> Generator[Progress, None, Tensor]:
    """What the network says now (P, C, h, w), guided, at these (P,) steps of these images."""
    outputs = torch.empty_like(trajectory.outputs[step, image])

    @torch.no_grad()
    def work(part: slice) -> Tensor:
        return _predict(model, trajectory, step[part], image[part], trajectory.guidance_scale)

    for part, out in model.fold("sample", len(step), work):
        outputs[part] = out
        yield Progress("comparing", part.stop, len(step))
    return outputs


def _of_measured(
    trajectory: Trajectory, images: int, what: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """What the network says, as weighted velocity (P, C, h, w), at the measured pairs of all
    processes' `images`, of which each process knows its own. what: the network's outputs, from the
    pairs' steps and the trajectory's images, (P,) each."""
    step, image, weight = _measured_pairs(trajectory.steps, images)
    mine = share(images)
    own = (mine.start <= image) & (image < mine.stop)
    found = trajectory.outputs.new_zeros(len(step), *trajectory.outputs.shape[2:])
    pairs = step[own], image[own] - mine.start
    found[own] = weight[own] * velocity(trajectory, *pairs, what(*pairs))
    return summed([found])[0]


def _measured_pairs(steps: Steps, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """(P,) steps, (P,) images in turn, and (P, 1, 1, 1) the weights of what is found there: at most
    MEASURED pairs, whose weighted squares speak for those of all steps.

    A change of the output changes v by w. Of a network that says noise most of it is in few early
    steps (60 % in a tenth of Stable Diffusion's), so there more is measured, each counting less:
    importance sampling, half by w^2 and half by equal shares, which the size of v itself needs
    (a defensive mixture: Hesterberg, Technometrics 37, 1995).
    """
    loud = steps.w.double().square()
    density = 0.5 * loud / loud.mean() + 0.5  # of mean 1; 1 everywhere for a network that says v
    pairs = torch.arange(min(MEASURED, len(steps) * images))
    middles = (pairs.double() + 0.5) * len(steps) / len(pairs)
    step = torch.searchsorted(density.cumsum(0), middles, right=True)
    return step, pairs % images, density[step].rsqrt().to(steps.w.dtype).view(-1, 1, 1, 1)


@torch.no_grad()
def _expected_noise(
    model: DiffusionModel,
    trajectory: Trajectory,
    step: Tensor,
    image: Tensor,
    out: Tensor,
    guidance_scale: float,
) -> Tensor:
    """E[z | x_t, x_0] (P, C, h, w) of each pair, brought to root mean square 1; out: what the
    network says with this guidance."""
    unguided = out if guidance_scale == 1 else _predict(model, trajectory, step, image, 1.0)
    x_t, x_0 = trajectory.latents[step, image], trajectory.latents[-1, image]
    at = trajectory.steps[step.view(-1, 1, 1, 1)]
    z = at.expected_noise(x_t, unguided.cpu(), x_0)
    return z / z.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)


def _chosen_steps(sigma: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Indices of the steps to learn from: never one without noise, which has no log-probability."""
    noisy = torch.nonzero(sigma > 0).flatten()
    if not len(noisy):
        raise SettingError("every step has sigma = 0, so there is nothing to learn; use eta > 0.")
    if share >= 1:
        return noisy
    if generator is None:
        raise SettingError(f"timesteps is {share} and needs a generator to draw the steps with.")
    count = max(1, round(share * len(noisy)))
    return noisy[torch.randperm(len(noisy), generator=generator)[:count]].sort().values


def _check(name: str, values: Tensor, trajectory: Trajectory) -> None:
    """RewardError where the values (B, h, w) of all images do not fit this process's."""
    images, size = trajectory.latents.shape[1], trajectory.size
    if values.shape[1:] != size or len(values[tasks(len(values))]) != images:
        raise RewardError(
            f"{name} has the shape {tuple(values.shape)}; these images need {(images, *size)}."
        )
    if not torch.isfinite(values).all():
        raise RewardError(f"{name} has values that are not finite (NaN or infinite).")
