"""Tiny World's shipped autoencoder: the first one's 16x16 latents, decoded to 256x256 pictures.

Its encoder learns to give the latents that the first autoencoder has for the scene at half size,
so the painter, and the time of a step, stay what they are. Its decoder is a refiner: it learns the
drawn scene from what the painter predicts of slightly noised latents, and so puts right what the
painter smears.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from .autoencoder import LATENT_CHANNELS, NOISE, encode, picture_loss, to_tensor
from .diffusion import Painter, new_scheduler, tokens_of
from .training import batch_at, generator_at, half_precision, train

LATEST = 300  # of 1000: beyond this much noise the painter paints another picture than the scene
GUIDANCE = 3.0
WIDTHS = (8, 16, 32, 64, 128)


def new_sharp() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        block_out_channels=WIDTHS,
        layers_per_block=2,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=256,
    )


@torch.no_grad()
def grown(plain: AutoencoderKL) -> AutoencoderKL:
    """A sharp autoencoder that begins where `plain` ended: its layers, and new ones between and
    beyond them that add nothing yet."""
    sharp = new_sharp()
    known = plain.state_dict()

    def older(name: str) -> str:
        """The name of this parameter in `plain`; its encoder's blocks stand one place earlier."""
        head, _, rest = name.partition("encoder.down_blocks.")
        if head or not rest:
            return name
        block, _, rest = rest.partition(".")
        return f"encoder.down_blocks.{int(block) - 1}.{rest}"

    for name, weight in sharp.state_dict().items():
        value = known.get(older(name))
        if value is not None and value.shape == weight.shape:
            weight.copy_(value)
        elif "conv2" in name or "to_out" in name:
            weight.zero_()
    enlarge = sharp.decoder.up_blocks[-2].upsamplers[0].conv
    nn.init.dirac_(enlarge.weight)
    enlarge.bias.zero_()
    sharp.register_to_config(scaling_factor=plain.config.scaling_factor)
    return sharp


def train_sharp(
    plain: AutoencoderKL,
    painter: Painter,
    images: Tensor,
    latents: Tensor,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    device: torch.device,
    *,
    matched: int,
    refined: int,
    seed: int,
    batch: int = 6,
    checkpoint: Path,
    report: Callable[[str], None] = print,
) -> AutoencoderKL:
    """Learn on `images` (N, 256, 256, 3) uint8 whose scaled latents at half size are `latents`:
    `matched` steps for the encoder, then `refined` for the decoder."""
    torch.manual_seed(seed)
    sharp = grown(plain).to(device, memory_format=torch.channels_last)
    scale = sharp.config.scaling_factor
    painter = painter.to(device).requires_grad_(False).eval()
    ids = tokens_of(tokenizer, captions)
    nothing = tokens_of(tokenizer, [""])
    alphas = new_scheduler().alphas_cumprod

    def pictures(chosen: Tensor) -> Tensor:
        return to_tensor(images[chosen]).to(device, memory_format=torch.channels_last)

    def mismatch(_: nn.Module, step: int) -> Tensor:
        chosen = batch_at(len(images), 2 * batch, seed, step)
        with half_precision(device):
            z = encode(sharp, pictures(chosen))
        return F.mse_loss(z.float() * scale, latents[chosen].float().to(device))

    @torch.no_grad()
    def predicted(z: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        """What the painter, guided as it is when it paints, predicts of z with noise on it."""
        t = torch.randint(1, LATEST, (len(z),), generator=generator)
        alpha = alphas[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * torch.randn(z.shape, generator=generator)
        without, v = painter(
            torch.cat([noisy, noisy]).to(device),
            torch.cat([t, t]).to(device),
            torch.cat([nothing.expand_as(ids), ids]).to(device),
        ).chunk(2)
        v = (without + GUIDANCE * (v - without)).cpu()
        return alpha.sqrt() * noisy - (1 - alpha).sqrt() * v

    def unlike(_: nn.Module, step: int) -> Tensor:
        generator = generator_at(seed, step, 2)
        chosen = batch_at(len(images), batch, seed + 1, step)
        z, third = latents[chosen].float(), batch // 3
        noise = scale * NOISE * torch.randn(z[:third].shape, generator=generator)
        seen = predicted(z[third:], ids[chosen[third:]], generator)
        z = torch.cat([z[:third] + noise, seen]).to(device) / scale
        with half_precision(device):
            y = sharp.decoder(sharp.post_quant_conv(z))
        return picture_loss(y.float(), pictures(chosen))

    def learn(
        name: str,
        parts: tuple[nn.Module, ...],
        loss: Callable[[nn.Module, int], Tensor],
        **how: Any,
    ) -> nn.ModuleList:
        module = nn.ModuleList(parts).requires_grad_(True).train()
        finished = checkpoint.with_suffix(f".{name}.safetensors")
        if finished.exists():  # before an interruption of what came after it
            module.load_state_dict(load_file(finished))
            return module
        module = train(
            name, module, loss, checkpoint=checkpoint.with_suffix(f".{name}"), report=report, **how
        )
        save_file({key: value.contiguous() for key, value in module.state_dict().items()}, finished)
        return module

    sharp.encoder, sharp.quant_conv = learn(
        "encoder", (sharp.encoder, sharp.quant_conv), mismatch, steps=matched, learning_rate=1e-3
    )
    sharp.decoder, sharp.post_quant_conv = learn(
        "decoder", (sharp.decoder, sharp.post_quant_conv), unlike, steps=refined, learning_rate=1e-3
    )
    return sharp.to(memory_format=torch.contiguous_format).requires_grad_(False).eval()
