"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet that predicts noise or v, a VAE."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline

from .base import Cond, Size
from .unet import UNetModel, check_tokenizer

DEFAULTS = {"steps": 50, "guidance_scale": 7.5, "images": 4}
"""Stable Diffusion's documented sampling, and DDPO's number of steps."""

TINY_WORLD_S = {**DEFAULTS, "steps": 20, "guidance_scale": 3.0}
"""Those of models with a closed vocabulary, which are painters of Tiny World."""


class StableDiffusion(UNetModel):
    """A StableDiffusionPipeline."""

    pipeline_class = StableDiffusionPipeline
    unused = {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }

    def __init__(
        self, pipeline: StableDiffusionPipeline, device: str, name: str, size: Size = (None, None)
    ) -> None:
        check_tokenizer(name, pipeline.tokenizer)
        super().__init__(pipeline, device, name, size)
        self.tokenizer = pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder.requires_grad_(False).eval()
        self.tokenizers = [self.tokenizer]
        self.words = tuple(self.tokenizer.init_kwargs.get("closed_vocabulary", ()))
        self.defaults = TINY_WORLD_S if self.words else DEFAULTS

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Cond:
        """{"text": (1, L, D)}."""
        tokens = self.tokenizer(
            prompt, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return {"text": self.text_encoder(tokens).last_hidden_state.float()}
