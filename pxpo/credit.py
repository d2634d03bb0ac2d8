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

WINDOW = 4
"""How many earlier maps are looked back on: the pictures change as the run goes on."""


def latent_credit(latent_reward: Tensor, settings: Credit, past: Sequence[Tensor] = ()) -> Tensor:
    """The weight A of each latent pixel's log-probability in Eq. 6: (B, h, w) to (B, h, w).

    `credit="pixel"` is PXPO, "image" is DDPO's one number per image (Eq. 2), spread evenly;
    `blur` leads from the one (0) to the other (infinity).
    past: the rewards (B, h, w) of the run's earlier updates, for the baseline of that name.
    """
    radius = math.inf if settings.credit == "image" else settings.blur
    if settings.baseline == "past":
        return against_past(latent_reward, past, radius)
    return BASELINES[settings.baseline](smooth(latent_reward, radius))


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
            "Use more images a step, or another baseline."
        )
    return _scaled(latent_reward - latent_reward.mean(dim=0), latent_reward)


def by_area(latent_reward: Tensor) -> Tensor:
    """Each image's praise and its blame, each divided by the share of the image it covers.

    So a small stroke counts as much as a large one, and neither colour drowns the other. The share
    is the sum of that sign's |r| over the image's largest |r|, in pixels; an empty map stays empty.
    """
    peak = latent_reward.abs().amax((1, 2), keepdim=True).clamp(min=1e-12)
    credit = torch.zeros_like(latent_reward)
    for part in _praise_and_blame(latent_reward):
        share = (part.abs() / peak).mean((1, 2), keepdim=True)
        credit += part / share.clamp(min=1e-12)
    return credit


def against_past(latent_reward: Tensor, past: Sequence[Tensor], radius: float = 0.0) -> Tensor:
    """Each image's praise and its blame against what its last WINDOW maps earned at each place.

    For pictures that are painted anew at each step. Praise loses one and a half times the mean of
    the earlier praise, so a picture without the lake that others had is blamed for what it has
    instead. Blame loses half of its mean, so what came instead of blamed trees is praised and stays
    away. Each is in units of its root mean square over these maps: its gradient is then equally
    noisy however little of it there is. Praise fades by the square of the share of these pictures
    that it has yet to fill, or it would go on past all measure and drown the blame.
    past: the rewards (B, h, w) of earlier updates. radius: each colour is smoothed by it.
    """
    left = 1 - filled(latent_reward, past)[:, None, None]
    maps = [_praise_and_blame(reward) for reward in (*past[-WINDOW:], latent_reward)]
    praise, blame = (torch.stack(part) for part in zip(*maps, strict=True))  # (N, B, h, w)
    praise, blame = (smooth(part.flatten(0, 1), radius).view_as(part) for part in (praise, blame))
    return left**2 * _against_mean(praise, 1.5) + _against_mean(blame, 0.5)


def filled(latent_reward: Tensor, past: Sequence[Tensor] = ()) -> Tensor:
    """The share (B,) of each image's map, and of its last WINDOW, that praise fills: 1 where all of
    it is praised as much as any of it.
    """
    praise = torch.stack([*past[-WINDOW:], latent_reward]).clamp(min=0)
    return praise.mean((0, 2, 3)) / praise.amax((0, 2, 3)).clamp(min=1e-12)


def _against_mean(maps: Tensor, share: float) -> Tensor:
    """The last of the maps (N, B, h, w) less `share` of the mean of those before it at each place,
    in units of the root mean square of them all. The first is taken against its own mean."""
    *earlier, now = maps
    expected = share * sum(earlier) / len(earlier) if earlier else now.mean((1, 2), keepdim=True)
    return (now - expected) / _mean(maps.square()).sqrt().clamp(min=1e-12)


def _mean(maps: Tensor) -> Tensor:
    """The mean (B, 1, 1) of each image over all of its maps (N, B, h, w)."""
    return maps.mean((0, 2, 3))[:, None, None]


def _praise_and_blame(latent_reward: Tensor) -> tuple[Tensor, Tensor]:
    """The positive and the negative part; what smoothing's rounding leaves is neither."""
    rounding = 1e-6 * latent_reward.abs().amax((1, 2), keepdim=True)
    clean = torch.where(latent_reward.abs() > rounding, latent_reward, 0.0)
    return clean.clamp(min=0), clean.clamp(max=0)


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
    "area": by_area,
    "global": standardise,
    "location": per_location,
}
