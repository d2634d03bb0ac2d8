"""From a reward map over the image to the credit of each latent pixel: pure functions of tensors.

Images' maps are (B, H, W), latents' maps (B, h, w). The order is: downsample, smooth, baseline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import RewardError
from .settings import Credit


def latent_credit(latent_reward: Tensor, settings: Credit, prompts: Sequence[str] = ()) -> Tensor:
    """The weight A of each latent pixel's log-probability in Eq. 6: (B, h, w) to (B, h, w).

    prompts: B; an image is compared with those of its own prompt only. All have the same if empty.

    `blur` leads from PXPO (0) to DDPO (infinity), whose one number for an image (Eq. 2) is spread
    evenly over it.
    """
    baseline, smoothed = BASELINES[settings.baseline], smooth(latent_reward, settings.blur)
    if len(set(prompts)) < 2:
        return baseline(smoothed)
    credit = torch.empty_like(smoothed)
    for prompt in set(prompts):
        alike = torch.tensor([one == prompt for one in prompts])
        credit[alike] = baseline(smoothed[alike])
    return credit


def downsample(reward_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Area-average (B, H, W) to (B, h, w): Fig. 2's interpolation.

    Each output pixel is the exact mean over the piece of the map it covers, whatever the sizes, so
    the mean is kept, a uniform map stays uniform, and no thin stroke falls between samples.
    """
    if reward_map.ndim != 3:
        raise RewardError(
            f"a reward map has the shape {tuple(reward_map.shape)}; it must be (B, H, W)."
        )
    rows = _overlap(reward_map.shape[1], size[0]).to(reward_map)
    columns = _overlap(reward_map.shape[2], size[1]).to(reward_map)
    return rows @ reward_map @ columns.T


def _overlap(source: int, target: int) -> Tensor:
    """(target, source): the share of each target cell that each source cell covers."""
    ends = torch.arange(1, source + 1, dtype=torch.float64) * target / source
    starts = ends - target / source
    cell = torch.arange(target, dtype=torch.float64)[:, None]
    return (torch.minimum(ends, cell + 1) - torch.maximum(starts, cell)).clamp(min=0)


def standardise(latent_reward: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over all pixels of all images: the paper's, for SegFormer."""
    return _scaled(latent_reward - latent_reward.mean(), latent_reward)


def per_location(latent_reward: Tensor) -> Tensor:
    """Against the mean over the images at the same place, then one scale for all.

    Where every image earns the same (all skies are blue) nothing is learnt from it; the noise that
    the paper's one global mean leaves there is what drowns its gradient in small batches.
    """
    if len(latent_reward) < 2:
        raise RewardError(
            "baseline='location' compares images with one another and needs at least 2; this is 1. "
            "Use more images an update, or another baseline."
        )
    return _scaled(latent_reward - latent_reward.mean(dim=0), latent_reward)


def smooth(latent_reward: Tensor, radius: float) -> Tensor:
    """Spread each image's map with a Gaussian of standard deviation `radius` latent pixels.

    Heat flow on a grid with insulated edges, in its cosine basis: 0 changes nothing, infinity
    gives the image's mean everywhere; at every radius the mean is kept and no sign is turned.
    """
    if radius == 0:
        return latent_reward
    for axis in (1, 2):
        basis, frequency = _cosines(latent_reward.shape[axis])
        decay = torch.where(frequency > 0, torch.exp((frequency.cos() - 1) * radius**2), 1.0)
        flow = (basis.T * decay) @ basis
        latent_reward = torch.movedim(latent_reward, axis, -1) @ flow.to(latent_reward)
        latent_reward = torch.movedim(latent_reward, -1, axis)
    return latent_reward


def _cosines(size: int) -> tuple[Tensor, Tensor]:
    """The orthonormal cosine basis (DCT-II) as rows (size, size), and each row's frequency."""
    frequency = torch.arange(size, dtype=torch.float64) * math.pi / size
    basis = torch.cos(frequency[:, None] * (torch.arange(size, dtype=torch.float64) + 0.5))
    return basis / basis.norm(dim=1, keepdim=True), frequency


def _scaled(centred: Tensor, latent_reward: Tensor) -> Tensor:
    """`centred` with standard deviation 1, or zeros where all that differs is the rounding."""
    spread = centred.std(correction=0)
    rounding = 1e-6 * latent_reward.abs().max()
    return torch.where(spread > rounding, centred / spread, torch.zeros_like(centred))


BASELINES = {
    "none": lambda latent_reward: latent_reward,
    "global": standardise,
    "location": per_location,
}
