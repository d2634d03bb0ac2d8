"""The denoising step as pure maths: affine in what the network says, whatever that predicts.

    x_prev = a x_t + c out + sigma z,    z ~ N(0, 1)
    x_0    = p x_t + q out
    v      = u x_t + w out

A schedule is these numbers for each step. They are all that learning needs: a pixel's
log-probability (Eq. 5) and its gradient. v, the velocity, is what every network says in one way or
another: sqrt(alpha) noise - sqrt(1 - alpha) x_0. A change of it means as much at each step; one of
the noise does not, of which a hundredth is another picture where nearly all is noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SettingError


@dataclass(frozen=True)
class Steps:
    """The T steps of one sampling run, from noise to image; or one of them, by `steps[i]`.

    t: (T,) long, the training time each step starts from. a, c, sigma, p, q, u, w: (T,) float32,
    as above; sigma >= 0.
    """

    t: Tensor
    a: Tensor
    c: Tensor
    sigma: Tensor
    p: Tensor
    q: Tensor
    u: Tensor
    w: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: int | Tensor) -> Steps:
        return Steps(**{name: values[index] for name, values in vars(self).items()})

    def mean(self, x_t: Tensor, out: Tensor) -> Tensor:
        """The mean (B, C, h, w) of x_prev at one step."""
        return self.a * x_t + self.c * out

    def expected_image(self, x_t: Tensor, out: Tensor) -> Tensor:
        """The x_0 (B, C, h, w) that x_t and the network's output amount to at one step."""
        return self.p * x_t + self.q * out

    def velocity(self, x_t: Tensor, out: Tensor) -> Tensor:
        """The v (B, C, h, w) that x_t and the network's output amount to at one step."""
        return self.u * x_t + self.w * out

    def expected_noise(self, x_t: Tensor, out: Tensor, x_0: Tensor) -> Tensor:
        """E[z | x_t, x_0] (B, C, h, w): the step noise that the finished x_0 speaks for.

        At eta = 1 it leads to the mean of the posterior q(x_prev | x_t, x_0) (Ho et al., arXiv
        2006.11239, Eq. 7): the step's own, with the output that x_0 would have. sigma must be
        positive.
        """
        right = (x_0 - self.p * x_t) / self.q
        return (right - out) * self.c / self.sigma


def epsilon_steps(t: Tensor, alpha: Tensor, alpha_prev: Tensor, sigma: Tensor) -> Steps:
    """Stochastic DDIM (Song et al., arXiv 2010.02502, Eq. 12) of a network that predicts noise.

    alpha, alpha_prev: (T,), the cumulative products of the noise schedule where each step starts
    and where it ends; alpha must be positive.
    """
    signal, noise = alpha.double().sqrt(), (1 - alpha.double()).sqrt()
    one = torch.ones_like(signal)
    return _ddim(t, alpha, alpha_prev, sigma, (1 / signal, -noise / signal), (0 * one, one))


def velocity_steps(t: Tensor, alpha: Tensor, alpha_prev: Tensor, sigma: Tensor) -> Steps:
    """The same of a network that predicts v (Salimans & Ho, arXiv 2202.00512).

    Nothing is divided by the signal, so alpha may be 0 (zero terminal SNR).
    """
    signal, noise = alpha.double().sqrt(), (1 - alpha.double()).sqrt()
    return _ddim(t, alpha, alpha_prev, sigma, (signal, -noise), (noise, signal))


def _ddim(
    t: Tensor,
    alpha: Tensor,
    alpha_prev: Tensor,
    sigma: Tensor,
    image: tuple[Tensor, Tensor],
    noise: tuple[Tensor, Tensor],
) -> Steps:
    """x_prev = sqrt(alpha_prev) x_0 + sqrt(1 - alpha_prev - sigma^2) eps + sigma z.

    image, noise: the factors of x_t and of out in x_0, and in eps.
    """
    signal = alpha_prev.double().sqrt()
    direction = (1 - alpha_prev.double() - sigma.double() ** 2).clamp(min=0).sqrt()
    a, c = (signal * i + direction * n for i, n in zip(image, noise, strict=True))
    of_noise, of_image = alpha.double().sqrt(), (1 - alpha.double()).sqrt()
    u, w = (of_noise * n - of_image * i for i, n in zip(image, noise, strict=True))
    return Steps(t, *(number.to(sigma.dtype) for number in (a, c, sigma, *image, u, w)))


def flow_steps(sigmas: Tensor, train_steps: int = 1000, churn: float = 0.7) -> Steps:
    """The SDE of a rectified flow, x = (1 - sigma) x_0 + sigma noise, whose network predicts
    noise - x_0 (Flow-GRPO, Liu et al., arXiv 2505.05470), which is taken for v as it is.

    sigmas: (T + 1,), from at most 1 to at least 0, where each step starts and the last ends. A step
    from sigma = 1 takes the churn of the next, which would be infinite there. churn: 0 is the ODE.
    """
    now, after = sigmas[:-1].double(), sigmas[1:].double()
    dt = after - now  # negative: time runs from noise to image
    below = torch.where(now < 1, now, after)
    s = churn * (below / (1 - below)).sqrt()
    a = 1 + s**2 * dt / (2 * now)
    c = (1 + s**2 * (1 - now) / (2 * now)) * dt
    one = torch.ones_like(now)
    numbers = (a, c, s * (-dt).sqrt(), one, -now, 0 * one, one)
    return Steps((now * train_steps).long(), *(number.to(sigmas.dtype) for number in numbers))


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
