"""Stochastic DDIM in the words of its paper (Song et al., arXiv 2010.02502, Eq. 12), in float64:
what the affine steps are tested against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pxpo.steps import Steps, epsilon_steps, velocity_steps


@dataclass(frozen=True)
class Ddim:
    """alpha, alpha_prev, sigma: (T,), the products of the noise schedule where each step starts and
    ends, and the noise it adds."""

    t: Tensor
    alpha: Tensor
    alpha_prev: Tensor
    sigma: Tensor
    prediction_type: str = "epsilon"

    @classmethod
    def of(
        cls, scheduler: DDIMScheduler, steps: int, eta: float = 1.0, kind: str = "epsilon"
    ) -> Ddim:
        """What `scheduler` walks in so many steps."""
        scheduler.set_timesteps(steps)
        t, alphas = scheduler.timesteps.long(), scheduler.alphas_cumprod.double()
        t_prev = t - scheduler.config.num_train_timesteps // steps
        final = torch.as_tensor(scheduler.final_alpha_cumprod).double()
        alpha = alphas[t]
        alpha_prev = torch.stack([alphas[at] if at >= 0 else final for at in t_prev])
        variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
        return cls(t, alpha, alpha_prev, eta * variance.sqrt(), kind)

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: int) -> Ddim:
        numbers = (self.t, self.alpha, self.alpha_prev, self.sigma)
        return Ddim(*(number[index] for number in numbers), self.prediction_type)

    @property
    def steps(self) -> Steps:
        make = velocity_steps if self.prediction_type == "v_prediction" else epsilon_steps
        return make(self.t, self.alpha, self.alpha_prev, self.sigma)

    def noise_and_image(self, x_t: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """eps and x_0 (Salimans & Ho, arXiv 2202.00512, for v)."""
        signal, noise = self.alpha**0.5, (1 - self.alpha) ** 0.5
        if self.prediction_type == "v_prediction":
            return signal * out + noise * x_t, signal * x_t - noise * out
        return out, (x_t - noise * out) / signal

    def mean(self, x_t: Tensor, out: Tensor) -> Tensor:
        eps, x_0 = self.noise_and_image(x_t, out)
        return self.alpha_prev**0.5 * x_0 + (1 - self.alpha_prev - self.sigma**2) ** 0.5 * eps

    def velocity(self, x_t: Tensor, out: Tensor) -> Tensor:
        eps, x_0 = self.noise_and_image(x_t, out)
        return self.alpha**0.5 * eps - (1 - self.alpha) ** 0.5 * x_0

    @property
    def loudness(self) -> Tensor:
        """|d mean / d out| / sigma."""
        return (self._slope(self.mean) / self.sigma).abs()

    @property
    def loudness_in_velocity(self) -> Tensor:
        """|d mean / d v| / sigma."""
        return self.loudness / self._slope(self.velocity)

    def _slope(self, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """d of / d out, by differentiation."""
        out = torch.zeros_like(self.alpha).requires_grad_()
        return torch.autograd.grad(of(torch.zeros_like(out), out).sum(), out)[0]
