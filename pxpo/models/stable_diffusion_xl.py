"""Stable Diffusion XL: two text encoders, and a UNet that is also told sizes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from ..errors import ModelError
from .base import Cond, Size
from .unet import UNetModel, check_tokenizer

DEFAULTS = {"steps": 50, "guidance_scale": 5.0, "images": 4}
"""The stock pipeline's own."""


class StableDiffusionXL(UNetModel):
    """A StableDiffusionXLPipeline of both text encoders."""

    pipeline_class = StableDiffusionXLPipeline
    unused = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}
    more_input = {"addition_embed_type": "text_time"}
    defaults = DEFAULTS

    def __init__(
        self, pipeline: StableDiffusionXLPipeline, device: str, name: str, size: Size = (None, None)
    ) -> None:
        self.tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
        text_encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
        if None in self.tokenizers + text_encoders:
            raise ModelError(
                f"The model {name!r} lacks one of SDXL's two text encoders, as its refiner does; "
                "choose a base model."
            )
        for tokenizer in self.tokenizers:
            check_tokenizer(name, tokenizer)
        super().__init__(pipeline, device, name, size)
        self.text_encoders = [one.requires_grad_(False).eval() for one in text_encoders]
        self.zero_without_prompt = pipeline.config.force_zeros_for_empty_prompt

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Cond:
        """{"text": (1, L, D), "pooled": (1, P), "time_ids": (1, 6)}.

        text: both encoders' last hidden states but one. pooled: the second's embedding. time_ids:
        the picture's original size, what was cropped above and to the left, and the size wanted.
        """
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(
                prompt, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            out = encoder(tokens, output_hidden_states=True)
            hidden.append(out.hidden_states[-2].float())
        return {
            "text": torch.cat(hidden, dim=-1),
            "pooled": out.text_embeds.float(),
            "time_ids": torch.tensor([[*self.image_size, 0.0, 0.0, *self.image_size]]),
        }

    def unconditional(self) -> Cond:
        cond = super().unconditional()
        if self.zero_without_prompt:
            cond |= {name: torch.zeros_like(cond[name]) for name in ("text", "pooled")}
        return cond

    def _more(self, cond: Cond) -> dict[str, Any]:
        return {"added_cond_kwargs": {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}}
