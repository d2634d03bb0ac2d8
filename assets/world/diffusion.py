"""Tiny World's painter: a text encoder and a UNet, trained together on latents and captions."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from .autoencoder import LATENT_CHANNELS
from .text import new_text_encoder
from .training import batch_at, generator_at, half_precision, train

DROPPED = 0.1  # share of captions left empty, for classifier-free guidance
SNR_CAP = 5.0  # as in "min-SNR" weighting, Hang et al., arXiv 2303.09556


def new_scheduler(predicts: str = "v_prediction") -> DDIMScheduler:
    """Stable Diffusion v1.4's own configuration, but for what is predicted: Stable Diffusion 2's v.

    Where nearly all is noise, the noise says nothing of the picture unless it is predicted to a
    hundredth, which a small network never learns: its pictures fall apart. v is the picture there.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=predicts,
    )


def new_unet(context: int, width: int = 64) -> UNet2DConditionModel:
    """Cross-attention at every scale: at 16x16 latents it is cheap, and it is where a LoRA acts.

    width: channels at full size, a multiple of 32.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(width, 2 * width, 3 * width),
        layers_per_block=1,
        # Numbers of heads, in spite of the name.
        attention_head_dim=(width // 32, 2 * width // 32, 3 * width // 32),
        cross_attention_dim=context,
        norm_num_groups=16,
    )


class Painter(nn.Module):
    """UNet and text encoder as one module, for one optimizer and one average.

    seed: of its first weights. predicts: what its output is, "v_prediction" or "epsilon".
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        seed: int,
        width: int = 64,
        predicts: str = "v_prediction",
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.predicts = predicts
        self.text = new_text_encoder(tokenizer)
        self.unet = new_unet(self.text.config.hidden_size, width)

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(noisy, t, self.text(ids).last_hidden_state).sample


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_painter(
    begun: Painter,
    latents: Tensor,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    device: torch.device,
    *,
    steps: int,
    seed: int,
    batch: int = 48,
    learning_rate: float = 1.2e-3,
    compiled: bool = False,
    checkpoint: Path | None = None,
    report: Callable[[str], None] = print,
) -> Painter:
    """A copy of `begun` that has learnt to predict v, or noise, in `latents` (N, C, h, w) of
    variance 1, given `captions`."""
    ids, empty = tokens_of(tokenizer, captions), tokens_of(tokenizer, [""])
    alphas = new_scheduler().alphas_cumprod
    painter = copy.deepcopy(begun).to(device).requires_grad_()
    predict = torch.compile(painter) if compiled else painter
    # On a CPU the plain attention is a third faster: the fused one's backward pass is slow.
    on_cpu = device.type == "cpu"
    attention = functools.partial(sdpa_kernel, SDPBackend.MATH) if on_cpu else nullcontext

    def loss_of(_: nn.Module, step: int) -> Tensor:
        generator = generator_at(seed, step, 1)
        chosen = batch_at(len(latents), batch, seed, step)
        clean, words = latents[chosen].float(), ids[chosen]
        words = torch.where(torch.rand(batch, 1, generator=generator) < DROPPED, empty, words)
        # One time in each of `batch` equal slices: the loss of a step varies far less.
        t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * 1000 / batch).long()
        noise = torch.randn(clean.shape, generator=generator)
        alpha = alphas[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        if painter.predicts == "epsilon":
            wanted = noise
            weight = (SNR_CAP * (1 - alphas[t]) / alphas[t]).clamp(max=1)  # min(SNR, cap) / SNR
        else:
            wanted = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            weight = (SNR_CAP * (1 - alphas[t])).clamp(max=1)  # min(SNR + 1, cap) / (SNR + 1)
        with half_precision(device), attention():
            out = predict(noisy.to(device), t.to(device), words.to(device))
        error = (out.float() - wanted.to(device)).square().mean((1, 2, 3))
        return (error * weight.to(device)).mean()

    return train(
        "painter", painter, loss_of,
        steps=steps, learning_rate=learning_rate, checkpoint=checkpoint, report=report,
    )  # fmt: skip


def save_painter(
    painter: Painter, tokenizer: CLIPTokenizer, vae: AutoencoderKL, folder: Path
) -> None:
    """The whole pipeline as a diffusers folder.

    The large parts go in half precision and in shards: a Space refuses files of over 10 MB.
    """
    vae.register_to_config(_name_or_path="")  # where it was kept meanwhile is nobody's business
    pipeline = StableDiffusionPipeline(
        vae.cpu().half(), painter.text, tokenizer, painter.unet.half(),
        new_scheduler(painter.predicts), None, None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, max_shard_size="9MB")
