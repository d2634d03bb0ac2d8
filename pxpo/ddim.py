"""Stochastic DDIM as pure maths: the schedule, the step, and a pixel's log-probability (Eq. 5).

A step is a normal distribution (Song et al., arXiv 2010.02502, Eq. 12), with alpha the cumulative
products of the noise schedule, written so that it rounds as diffusers' DDIMScheduler does:

    x_0    = (x_t - sqrt(1 - alpha) eps) / sqrt(alpha)
    mean   = sqrt(alpha_prev) x_0 + sqrt(1 - alpha_prev - sigma^2) eps
    x_prev = mean + sigma z,    z ~ N(0, 1)

The mean is linear in the predicted noise, with the slope `Schedule.c`: all that learning needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import ModelError, SettingError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler


@dataclass(frozen=True)
class Schedule:
    """The T steps of one sampling run, from noise to image; or one of them, by `schedule[i]`.

    t: (T,) long, the training time each step starts from. alpha, alpha_prev: (T,) float32, the
    cumulative product there and where the step ends. sigma: (T,) float32, >= 0.
    """

    t: Tensor
    alpha: Tensor
    alpha_prev: Tensor
    sigma: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: int | Tensor) -> Schedule:
        return Schedule(self.t[index], self.alpha[index], self.alpha_prev[index], self.sigma[index])

    @property
    def c(self) -> Tensor:
        """d mean / d eps of each step, (T,); negative but for a last step without noise."""
        alpha, alpha_prev = self.alpha.double(), self.alpha_prev.double()
        direction = (1 - alpha_prev - self.sigma.double() ** 2).clamp(min=0).sqrt()
        return (direction - (alpha_prev / alpha * (1 - alpha)).sqrt()).to(self.alpha)


def make_schedule(scheduler: DDIMScheduler, steps: int, eta: float) -> Schedule:
    """The schedule that `scheduler` would walk in `steps` steps with the given `eta` in [0, 1].

    Raises ModelError for schedulers whose step is not linear in the noise (clipping, thresholding,
    zero terminal SNR), SettingError for more steps than the model was trained with.
    """
    config = scheduler.config
    if config.clip_sample or config.get("thresholding"):
        raise ModelError(
            "The model's scheduler clips samples (clip_sample or thresholding), which has no "
            "closed-form log-probability; set both to false in scheduler_config.json."
        )
    train_steps = config.num_train_timesteps
    if not 1 <= steps <= train_steps:
        raise SettingError(f"steps is {steps}; this model allows 1 to {train_steps}.")
    alphas = scheduler.alphas_cumprod.float().cpu()
    if alphas.min() <= 0:
        raise ModelError(
            "The model's noise schedule ends at zero signal (rescale_betas_zero_snr), where the "
            "step's mean is undefined; choose a base model with an ordinary schedule."
        )
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps.long().cpu()
    if t.max() >= train_steps:
        raise SettingError(
            f"steps is {steps}, and the model's steps_offset leads beyond its {train_steps} "
            f"training steps; use at most {train_steps // 2}."
        )
    t_prev = t - train_steps // steps
    final = torch.as_tensor(scheduler.final_alpha_cumprod, dtype=alphas.dtype)
    alpha = alphas[t]
    alpha_prev = torch.where(t_prev >= 0, alphas[t_prev.clamp(min=0)], final)
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    return Schedule(t, alpha, alpha_prev, eta * variance**0.5)


def noise_from_velocity(v: Tensor, x_t: Tensor, alpha: Tensor) -> Tensor:
    """eps from a v-prediction (Salimans & Ho, arXiv 2202.00512); `alpha` is alphas_cumprod at t."""
    return alpha.sqrt() * v + (1 - alpha).sqrt() * x_t


def expected_image(x_t: Tensor, eps: Tensor, at: Schedule) -> Tensor:
    """The x_0 (B, C, h, w) that x_t and the predicted noise amount to at one step."""
    return (x_t - (1 - at.alpha) ** 0.5 * eps) / at.alpha**0.5


def noise_and_image(
    output: Tensor, x_t: Tensor, at: Schedule, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """eps and x_0, each (B, C, h, w), that a network's output amounts to at one step."""
    if prediction_type == "v_prediction":
        # Directly: by way of eps, x_0 would lose digits where alpha is small.
        x_0 = at.alpha**0.5 * x_t - (1 - at.alpha) ** 0.5 * output
        return noise_from_velocity(output, x_t, at.alpha), x_0
    return output, expected_image(x_t, output, at)


def step_mean(x_t: Tensor, eps: Tensor, at: Schedule, x_0: Tensor | None = None) -> Tensor:
    """The mean (B, C, h, w) of x_prev given x_t at one step; x_0 is that of eps if not given."""
    x_0 = expected_image(x_t, eps, at) if x_0 is None else x_0
    direction = (1 - at.alpha_prev - at.sigma**2) ** 0.5 * eps
    return at.alpha_prev**0.5 * x_0 + direction


def step(x_t: Tensor, eps: Tensor, z: Tensor, at: Schedule, x_0: Tensor | None = None) -> Tensor:
    """One denoising step: x_prev (B, C, h, w), drawn with the noise `z`."""
    return step_mean(x_t, eps, at, x_0) + at.sigma * z


def predicted_noise(x_t: Tensor, x_prev: Tensor, z: Tensor, at: Schedule) -> Tensor:
    """The eps (B, C, h, w) that led from x_t to x_prev: `step` the other way round."""
    kept = (at.alpha_prev / at.alpha) ** 0.5
    return (x_prev - at.sigma * z - kept * x_t) / at.c


def expected_step_noise(x_t: Tensor, x_0: Tensor, eps: Tensor, at: Schedule) -> Tensor:
    """E[z | x_t, x_0] (B, C, h, w): the step noise that the finished x_0 speaks for, at eta = 1.

    That of the posterior q(x_prev | x_t, x_0) (Ho et al., arXiv 2006.11239, Eq. 7), whose mean is
    the step's own with the noise that truly lies between x_0 and x_t. sigma must be positive.
    """
    between = (x_t - at.alpha**0.5 * x_0) / (1 - at.alpha) ** 0.5
    return (between - eps) * at.c / at.sigma


def pixel_log_prob(x_prev: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """log p(x_prev^ij | x_t, c) of each latent pixel (Eq. 5): (B, C, h, w) to (B, h, w).

    The paper leaves the latent's channels open; a pixel's log-probability is their sum.
    sigma must be positive: a step without noise has no density.
    """
    if torch.any(torch.as_tensor(sigma) <= 0):
        raise SettingError("log-probability of a step with sigma = 0; use eta > 0 or leave it out.")
    log_prob = (
        -0.5 * ((x_prev - mean) / sigma) ** 2
        - torch.log(torch.as_tensor(sigma))
        - 0.5 * math.log(2 * math.pi)
    )
    return log_prob.sum(dim=1)
