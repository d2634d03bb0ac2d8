"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet that predicts noise or v, a VAE."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from ..errors import ModelError, SettingError
from ..settings import Sampling
from ..steps import Steps, epsilon_steps, velocity_steps
from .base import Cond, DiffusionModel, without_lora

CONSTRUCTORS = {"epsilon": epsilon_steps, "v_prediction": velocity_steps}

DEFAULTS = {"steps": 50, "guidance_scale": 7.5, "images": 4}
"""Stable Diffusion's documented sampling, and DDPO's number of steps."""

TINY_WORLD_S = {**DEFAULTS, "steps": 20, "guidance_scale": 3.0}
"""Those of models with a closed vocabulary, which are painters of Tiny World."""

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


class StableDiffusion(DiffusionModel):
    """A StableDiffusionPipeline. Only the UNet's matrix work is ever in half precision."""

    @classmethod
    def load(cls, name: str, device: str, dtype: torch.dtype) -> StableDiffusion:
        """From a diffusers folder or the Hub; ModelError for what cannot learn here."""
        # The small file first: nobody wants to download gigabytes to be refused.
        check_unet(name, UNet2DConditionModel.load_config(name, subfolder="unet"))
        options = {
            "dtype": {"unet": dtype, "default": torch.float32},
            "safety_checker": None,
            "feature_extractor": None,
            "image_encoder": None,
            "requires_safety_checker": False,
            "use_safetensors": True,
        }
        if dtype != torch.float32:  # the half-sized files do, where the model has them
            with suppress(OSError, ValueError):
                pipeline = StableDiffusionPipeline.from_pretrained(name, variant="fp16", **options)
                return cls(pipeline, device, name)
        return cls(StableDiffusionPipeline.from_pretrained(name, **options), device, name)

    def __init__(self, pipeline: StableDiffusionPipeline, device: str, name: str) -> None:
        config = pipeline.unet.config
        # Only schedulers that can clip say whether they do; DDIM would take silence for a yes.
        self.scheduler = DDIMScheduler.from_config(
            {"clip_sample": False, **pipeline.scheduler.config}
        )
        check_unet(name, config)
        check_scheduler(name, self.scheduler)
        check_tokenizer(name, pipeline.tokenizer)
        super().__init__(device)
        self.name = name
        self.tokenizer = pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder.requires_grad_(False).eval().to(device)
        self.network = pipeline.unet.requires_grad_(False).eval().to(device)
        self.vae = pipeline.vae.requires_grad_(False).eval().to(device)
        size = config.sample_size
        h, w = (size, size) if isinstance(size, int) else size
        self.latent_shape = (config.in_channels, h, w)
        self.image_size = (h * pipeline.vae_scale_factor, w * pipeline.vae_scale_factor)
        self.defaults = TINY_WORLD_S if self._knows_few_words else DEFAULTS

    def relieve(self, kind: str) -> bool:
        """Learning: activations are computed again for the backward pass, a third more time.
        Decoding: in tiles, whose seams are blended."""
        if kind == "learn" and not self.network.is_gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
            return True
        if kind == "decode" and not self.vae.use_tiling:
            self.vae.enable_tiling()
            return True
        return False

    @property
    def _knows_few_words(self) -> bool:
        return bool(self.tokenizer.init_kwargs.get("closed_vocabulary"))

    def unknown_words(self, prompt: str) -> list[str]:
        if not self._knows_few_words:
            return []
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", prompt.lower()))
        return [word for word in words if len(self.tokenizer.tokenize(word)) > 1]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Cond:
        """{"text": (B, L, D)}."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return {"text": self.text_encoder(tokens.to(self.device)).last_hidden_state.float()}

    def call_network(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = self.network.conv_in.weight.dtype  # `unet.dtype` walks through the whole network
        return self.network(x_t.to(dtype), t, cond["text"].to(dtype)).sample.float()

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
        """The hidden map of the last up-block at LITTLE_NOISE, for the empty prompt. That such maps
        tell things apart is known from DIFT (Tang et al., arXiv 2306.03881).

        The noise is the same for all pictures, so that what differs is the pictures.
        """
        t = round(LITTLE_NOISE * self.scheduler.config.num_train_timesteps)
        alpha = self.scheduler.alphas_cumprod[t]
        noise = torch.randn(1, *self.latent_shape, generator=torch.Generator().manual_seed(0))
        nothing, hidden, found = self.encode([""])["text"], list[Tensor](), list[Tensor]()

        def work(part: slice) -> None:
            pixels = (images[part] * 2 - 1).to(self.device)
            x_0 = self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor
            x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise.to(self.device)
            text = {"text": nothing.expand(len(x_t), -1, -1)}
            self.call_network(x_t, torch.full((len(x_t),), t, device=self.device), text)
            found.append(hidden[-1])

        hook = self.network.up_blocks[-1].register_forward_hook(
            lambda _, __, out: hidden.append(out.float().cpu())
        )
        try:
            with without_lora(self) if self.busy else nullcontext():
                for _ in self.fold("decode", len(images), work):
                    pass
        finally:
            hook.remove()
        return torch.cat(found)

    def decode_some(self, latents: Tensor) -> Tensor:
        z = latents / self.vae.config.scaling_factor
        return (self.vae.decode(z).sample.float() / 2 + 0.5).clamp(0, 1)


def check_unet(name: str, config: Mapping[str, Any]) -> None:
    """ModelError for a UNet that wants another input than x_t, t and a prompt."""
    if config["in_channels"] != config["out_channels"]:
        raise ModelError(
            f"The UNet of {name!r} takes {config['in_channels']} channels and gives "
            f"{config['out_channels']} (inpainting, depth); choose a plain text-to-image model."
        )
    for key, what in MORE_INPUT.items():
        if config.get(key):
            raise ModelError(
                f"The UNet of {name!r} wants {what} ({key}); choose a plain Stable Diffusion 1.x "
                "or 2.x model."
            )
    if not config.get("sample_size"):
        raise ModelError(
            f"The UNet of {name!r} does not say its sample_size; set it in unet/config.json, "
            "to 64 for 512 pixels."
        )


def check_scheduler(name: str, scheduler: DDIMScheduler) -> None:
    """ModelError for a step that is not affine in the network's output, or not defined."""
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
