"""Tiny World's first autoencoder, a small `AutoencoderKL`: 128x128 pictures to 16x16 latents and
back. It makes the latents that the painter learns; `sharp.py` decodes them to twice the size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from .training import batch_at, generator_at, half_precision, train

LATENT_CHANNELS = 16
NOISE = 0.06  # standard deviation of the noise the decoder is taught to ignore, in latent units


def new_autoencoder() -> AutoencoderKL:
    """8 times smaller each way, 16 channels: as many numbers as 32x32x4, for a quarter of the
    UNet's work. One group in the norms: with more, a picture's contrast is lost on the way."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=128,
    )


def to_tensor(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1], as diffusers' autoencoders want it."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbours, down and across."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def picture_loss(y: Tensor, x: Tensor) -> Tensor:
    """Squared and absolute error of `y` against `x` (B, 3, H, W), and the error of the edges."""
    (dy, dx), (ty, tx) = edges(y), edges(x)
    return (
        8 * F.mse_loss(y, x)
        + 0.5 * F.l1_loss(y, x)
        + 0.5 * F.l1_loss(dy, ty)
        + 0.5 * F.l1_loss(dx, tx)
    )


def halved(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 at half the size, each pixel the mean of four."""
    parts = []
    for part in images.split(256):  # a float copy of all would take four times the memory
        small = F.avg_pool2d(part.permute(0, 3, 1, 2).float(), 2)
        parts.append(small.round().byte().permute(0, 2, 3, 1))
    return torch.cat(parts)


def encode(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """The mean of the posterior, unscaled: (B, 3, H, W) in [-1, 1] to (B, C, h, w)."""
    return vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)[0]


def train_autoencoder(
    images: Tensor,
    device: torch.device,
    *,
    crops: int,
    wholes: int,
    seed: int,
    report: Callable[[str], None] = print,
) -> AutoencoderKL:
    """Learn on `images` (N, 128, 128, 3) uint8: `crops` steps on quarters, then `wholes` on wholes.

    Quarters are cheap and teach the shapes; but the network normalises over what it sees (group
    norm), so colours come out right only after whole pictures.
    """
    torch.manual_seed(seed)
    vae = new_autoencoder().to(device, memory_format=torch.channels_last)  # a third faster
    for phase, (steps, batch, size, rate) in enumerate(
        ((crops, 16, images.shape[1] // 2, 2e-3), (wholes, 6, images.shape[1], 1.5e-3))
    ):
        loss_of = _loss_on_squares(vae, images, device, seed + phase, batch, size)
        vae = train(
            f"autoencoder on {size}x{size}", vae.requires_grad_(True).train(), loss_of,
            steps=steps, learning_rate=rate, report=report,
        )  # fmt: skip
    vae.to(memory_format=torch.contiguous_format)
    normalise_(vae, images[:1024], device)
    return vae


def _loss_on_squares(
    vae: AutoencoderKL, images: Tensor, device: torch.device, seed: int, batch: int, size: int
) -> Callable[[object, int], Tensor]:
    """The loss of one step on random squares of `size` pixels.

    It is that of the picture, and a pull of the latents towards zero, which with the noise plays
    the part of the KL term: each latent is as loud as it is worth.
    """
    core = _WithLoss(vae)

    def loss_of(_: object, step: int) -> Tensor:
        generator = generator_at(seed, step, 1)
        chosen = batch_at(len(images), batch, seed, step)
        top, left = torch.randint(0, images.shape[1] - size + 1, (2,), generator=generator).tolist()
        x = to_tensor(images[chosen][:, top : top + size, left : left + size])
        if step % 2:
            x = x.flip(-1)
        noise = torch.randn(batch, LATENT_CHANNELS, size // 8, size // 8, generator=generator)
        return core(x.to(device, memory_format=torch.channels_last), noise.to(device))

    return loss_of


class _WithLoss(torch.nn.Module):
    """The autoencoder and its loss as one module."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        with half_precision(x.device):
            z = encode(self.vae, x)
            y = self.vae.decoder(self.vae.post_quant_conv(z + NOISE * noise))
        return picture_loss(y.float(), x) + 1e-3 * z.float().square().mean()


@torch.no_grad()
def normalise_(vae: AutoencoderKL, images: Tensor, device: torch.device) -> None:
    """Fold the latents' means into the 1x1 convolutions and their scale into the configuration.

    Afterwards `encode(x).mode() * scaling_factor` has mean 0 in each channel and overall variance
    1, as a latent diffusion model expects, and the posterior's spread is the noise trained with.
    """
    z = torch.cat([encode(vae, to_tensor(part).to(device)) for part in images.split(32)])
    mean = z.mean((0, 2, 3))
    scale = (z - mean[:, None, None]).square().mean().rsqrt().item()
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.bias[:LATENT_CHANNELS] -= mean
    post.bias += post.weight[:, :, 0, 0] @ mean
    quant.weight[LATENT_CHANNELS:] = 0
    quant.bias[LATENT_CHANNELS:] = 2 * math.log(NOISE)
    vae.register_to_config(scaling_factor=scale)


@torch.no_grad()
def latents_of(vae: AutoencoderKL, images: Tensor, device: torch.device) -> Tensor:
    """Scaled latents (N, C, h, w) float32 on the CPU of `images` (N, H, W, 3) uint8."""
    parts = [encode(vae, to_tensor(part).to(device)).cpu() for part in images.split(32)]
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def pictures_of(vae: AutoencoderKL, latents: Tensor, device: torch.device) -> Tensor:
    """(N, C, h, w) scaled latents to (N, H, W, 3) uint8 pictures."""
    parts = [
        vae.decode(part.to(device) / vae.config.scaling_factor).sample.cpu()
        for part in latents.split(32)
    ]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def psnr(vae: AutoencoderKL, images: Tensor, device: torch.device) -> float:
    """Peak signal-to-noise ratio in dB of reconstructions, from the mean squared error over all."""
    again = pictures_of(vae, latents_of(vae, images, device), device)
    error = (again.float() - images.float()).square().mean().item()
    return 10 * math.log10(255**2 / error)
