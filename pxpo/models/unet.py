"""What families share whose network is a UNet in a VAE's latent space, walked by stochastic DDIM.

Such a family is a subclass of UNetModel: it names its stock pipeline, and encodes prompts.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTokenizer

from ..errors import ModelError, SettingError
from ..settings import Sampling
from ..steps import Steps, epsilon_steps, velocity_steps
from .base import Cond, DiffusionModel, Size, without_lora
from .memory import LARGE

CONSTRUCTORS = {"epsilon": epsilon_steps, "v_prediction": velocity_steps}

LITTLE_NOISE = 0.1
"""Share of the training steps at which `features` looks: what is there is seen, and its kind."""

MORE_INPUT = {
    "addition_embed_type": "pooled embeddings, as SDXL's",
    "class_embed_type": "class embeddings",
    "num_class_embeds": "class embeddings",
    "encoder_hid_dim_type": "projected or image embeddings",
    "time_cond_proj_dim": "the guidance scale, as distilled (LCM) models",
}
"""What some UNets want besides x_t, t and a prompt, by the key of their config."""

MORE_CHANNELS = {5: "depth", 7: "upscaling", 8: "editing, as InstructPix2Pix", 9: "inpainting"}
"""What some UNets are for, by the number of channels they take."""

SMALLEST, LARGEST = 8, 512
"""The least and the most latent pixels along a side."""

SMALLEST_TILE = 16
"""Latent pixels along a tile's side; what is smaller knows too little of the picture around it."""


class UNetModel(DiffusionModel):
    """A UNet, walked by DDIM. Only the UNet's matrix work is ever in half precision.

    pipeline_class: the stock pipeline that paints the same pictures. unused: its arguments that
    leave out the parts that are not wanted here. more_input: what of MORE_INPUT the family gives.
    tokenizers: one for each text encoder.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    tokenizers: list[CLIPTokenizer]
    unused: ClassVar[Mapping[str, Any]]
    more_input: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def load(cls, name: str, device: str, dtype: torch.dtype, size: Size) -> UNetModel:
        """From a diffusers folder or the Hub; ModelError for what cannot learn here."""
        # The small files first: nobody wants to download gigabytes to be refused.
        unet = UNet2DConditionModel.load_config(name, subfolder="unet")
        cls.check_unet(name, unet)
        latent_size(unet, AutoencoderKL.load_config(name, subfolder="vae"), size)
        options = {
            "dtype": {"unet": dtype, "default": torch.float32},
            "use_safetensors": True,
            **cls.unused,
        }
        failures = {}
        # For half precision the half-sized files do; and where there are no others, for float32.
        for variant in (None, "fp16") if dtype == torch.float32 else ("fp16", None):
            try:
                pipeline = cls.pipeline_class.from_pretrained(name, variant=variant, **options)
            except (OSError, ValueError) as error:
                failures[variant] = error
            else:
                return cls(pipeline, device, name, size)
        raise failures[None]

    def __init__(
        self, pipeline: DiffusionPipeline, device: str, name: str, size: Size = (None, None)
    ) -> None:
        config, vae = pipeline.unet.config, pipeline.vae.config
        # Only schedulers that can clip say whether they do; DDIM would take silence for a yes.
        self.scheduler = DDIMScheduler.from_config(
            {"clip_sample": False, **pipeline.scheduler.config}
        )
        self.check_unet(name, config)
        check_scheduler(name, pipeline.scheduler, self.scheduler)
        super().__init__(device)
        self.name = name
        self.network = pipeline.unet.requires_grad_(False).eval().to(device)
        self.vae = pipeline.vae.requires_grad_(False).eval().to(device)
        if self.network.num_parameters() >= LARGE:
            self.workers = 1
        h, w = latent_size(config, vae, size)
        self.latent_shape = (config.in_channels, h, w)
        self.image_size = (h * pixels_per_latent(vae), w * pixels_per_latent(vae))
        # By channel, of the VAE's latents; few VAEs give them.
        mean, std = vae.get("latents_mean"), vae.get("latents_std")
        if mean is None or std is None:
            mean, std = [0.0], [1.0]
        self.latents_mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.latents_std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def relieve(self, kind: str) -> bool:
        """Learning: activations are computed again for the backward pass, a third more time. What
        needs the VAE: in tiles, whose seams are blended."""
        if kind == "learn" and not self.network.is_gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
            return True
        return kind in ("decode", "features") and self._halve_tiles()

    def _halve_tiles(self) -> bool:
        """Tiles of half the side from now on, of the whole picture at first: the VAE's own are as
        large as that, and it cuts no picture that is not larger. False where they would be too
        small."""
        vae = self.vae
        side = vae.tile_latent_min_size if vae.use_tiling else max(self.latent_shape[1:])
        side = 4 * math.ceil(side / 8)  # a quarter of a tile overlaps, in whole latent pixels
        if side < SMALLEST_TILE:
            return False
        vae.enable_tiling()
        vae.tile_latent_min_size = side
        vae.tile_sample_min_size = side * pixels_per_latent(vae.config)
        return True

    def _more(self, cond: Cond) -> dict[str, Any]:
        """What the UNet is told besides the text, of what `encode` gave."""
        return {}

    def unread(self, prompt: str) -> str:
        read = [
            tokenizer(prompt, truncation=True, return_offsets_mapping=True).offset_mapping
            for tokenizer in self.tokenizers
        ]
        return prompt[min(max(end for _, end in places) for places in read) :].strip()

    def call_network(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = self.network.conv_in.weight.dtype  # `unet.dtype` walks through the whole network
        more = self._more(cond)
        return self.network(x_t.to(dtype), t, cond["text"].to(dtype), **more).sample.float()

    def steps(self, sampling: Sampling) -> Steps:
        """Those that the stock scheduler walks."""
        count, scheduler = sampling.steps, self.scheduler
        train_steps = scheduler.config.num_train_timesteps
        if count > train_steps:
            raise SettingError(f"steps is {count}; this model allows 1 to {train_steps}.")
        scheduler.set_timesteps(count)
        t = scheduler.timesteps.long().cpu()
        if t.max() >= train_steps:
            raise SettingError(
                f"steps is {count}, and the model's steps_offset leads beyond its {train_steps} "
                f"training steps; use at most {train_steps // 2}."
            )
        alphas = scheduler.alphas_cumprod.float().cpu()
        t_prev = t - train_steps // count
        final = torch.as_tensor(scheduler.final_alpha_cumprod, dtype=alphas.dtype)
        alpha = alphas[t]
        alpha_prev = torch.where(t_prev >= 0, alphas[t_prev.clamp(min=0)], final)
        variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
        make = CONSTRUCTORS[scheduler.config.prediction_type]
        return make(t, alpha, alpha_prev, sampling.eta * variance**0.5)

    def take_step(
        self, at: Steps, x_t: Tensor, out: Tensor, z: Tensor, sampling: Sampling
    ) -> tuple[Tensor, Tensor]:
        """The stock scheduler's own, so that a stock pipeline paints the same picture bit for bit;
        learning's affine step is the same but for the last digit."""
        if at.p == 0:  # zero terminal SNR, where the stock one takes the root of -1e-8: NaN
            return super().take_step(at, x_t, out, z, sampling)
        self.scheduler.num_inference_steps = sampling.steps  # its only state: another run's, else
        return self.scheduler.step(
            out, at.t, x_t, eta=sampling.eta, variance_noise=z, return_dict=False
        )

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The hidden map of the last up-block at LITTLE_NOISE, with no prompt. That such maps tell
        things apart is known from DIFT (Tang et al., arXiv 2306.03881).

        The noise is the same for all pictures, so that what differs is the pictures.
        """
        t = round(LITTLE_NOISE * self.scheduler.config.num_train_timesteps)
        alpha = self.scheduler.alphas_cumprod[t]
        noise = torch.randn(1, *self.latent_shape, generator=torch.Generator().manual_seed(0))
        hidden = threading.local()  # as several of them may look at the same time
        uncond = {n: value.to(self.device) for n, value in self.unconditional().items()}

        def work(part: slice) -> Tensor:
            x_0 = self._encode_some((images[part] * 2 - 1).to(self.device))
            x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise.to(self.device)
            each = {n: value.expand(len(x_t), *value.shape[1:]) for n, value in uncond.items()}
            self.call_network(x_t, torch.full((len(x_t),), t, device=self.device), each)
            return hidden.out.float().cpu()

        hook = self.network.up_blocks[-1].register_forward_hook(
            lambda _, __, out: setattr(hidden, "out", out)
        )
        try:
            with without_lora(self) if self.busy else nullcontext():
                return torch.cat([out for _, out in self.fold("features", len(images), work)])
        finally:
            hook.remove()

    def _encode_some(self, pixels: Tensor) -> Tensor:
        """Latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1]."""
        z = self.vae.encode(pixels).latent_dist.mode()
        return (z - self.latents_mean) * self.vae.config.scaling_factor / self.latents_std

    def decode_some(self, latents: Tensor) -> Tensor:
        z = latents * self.latents_std / self.vae.config.scaling_factor + self.latents_mean
        return (self.vae.decode(z).sample.float() / 2 + 0.5).clamp(0, 1)

    @classmethod
    def check_unet(cls, name: str, config: Mapping[str, Any]) -> None:
        """ModelError for a UNet that wants another input than the family gives."""
        check_channels(name, config.get("in_channels", 4), config.get("out_channels", 4))
        for key, what in MORE_INPUT.items():
            if (config.get(key) or None) != cls.more_input.get(key):
                raise ModelError(
                    f"The UNet of {name!r} {'wants' if config.get(key) else 'does not take'} "
                    f"{what} ({key}), unlike a plain {cls.pipeline_class.__name__}'s; choose one "
                    "of those."
                )
        if not config.get("sample_size"):
            raise ModelError(
                f"The UNet of {name!r} does not say its sample_size; set it in unet/config.json, "
                "to 64 for 512 pixels."
            )


def check_channels(name: str, taken: int, given: int) -> None:
    """ModelError for a UNet that takes more channels than it gives."""
    if taken != given:
        raise ModelError(
            f"The UNet of {name!r} takes {taken} channels and gives {given} "
            f"({MORE_CHANNELS.get(taken, 'an image besides the noise')}); choose a plain "
            "text-to-image model."
        )


def pixels_per_latent(vae: Mapping[str, Any]) -> int:
    """How many of an image's pixels a latent pixel is, along a side."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def latent_size(unet: Mapping[str, Any], vae: Mapping[str, Any], size: Size) -> tuple[int, int]:
    """(h, w) of images of this size, by the configs; SettingError for a size that cannot be."""
    own, factor = unet["sample_size"], pixels_per_latent(vae)
    h, w = (own, own) if isinstance(own, int) else own
    multiple = max(8, factor)  # the stock pipelines take no others than of 8
    least, most = SMALLEST * factor, LARGEST * factor
    for name, wanted, usual in zip(("height", "width"), size, (h, w), strict=True):
        if wanted in (None, usual * factor):
            continue
        if wanted % multiple or not least <= wanted <= most:
            raise SettingError(
                f"{name} is {wanted}; this model paints multiples of {multiple} from {least} to "
                f"{most} pixels, and its own are {h * factor} high and {w * factor} wide."
            )
    height, width = size
    return h if height is None else height // factor, w if width is None else width // factor


def check_scheduler(name: str, own: SchedulerMixin, scheduler: DDIMScheduler) -> None:
    """ModelError for a step that is not affine in the network's output, or not defined.

    own: the scheduler that the model came with, which `scheduler` is to stand for.
    """
    if "beta_start" not in own.config:
        raise ModelError(
            f"The scheduler of {name!r} is {type(own).__name__}, whose noise schedule is not a "
            "diffusion's of betas, the only kind known here; choose another model."
        )
    config = scheduler.config
    if config.prediction_type not in CONSTRUCTORS:
        raise ModelError(
            f"The model {name!r} predicts {config.prediction_type!r}; only "
            f"{' and '.join(CONSTRUCTORS)} are known."
        )
    if config.clip_sample or config.get("thresholding"):
        raise ModelError(
            f"The scheduler of {name!r} clips samples (clip_sample or thresholding), which has no "
            "closed-form log-probability; set both to false in scheduler_config.json."
        )
    if config.prediction_type == "epsilon" and scheduler.alphas_cumprod.min() <= 0:
        raise ModelError(
            f"The noise schedule of {name!r} ends at zero signal (rescale_betas_zero_snr), where "
            "predicted noise says nothing of the image; choose a model that predicts v there, or "
            "an ordinary schedule."
        )


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """ModelError where prompts cannot be brought to one length."""
    if tokenizer.model_max_length > 1_000_000:  # transformers' number for "not known"
        raise ModelError(
            f"The tokenizer of {name!r} has no maximum length; set model_max_length in "
            "tokenizer_config.json, to 77 for CLIP's."
        )
