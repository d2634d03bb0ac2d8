"""Checkpoints in one .safetensors file, in the original names, as they are shared on Civitai.

Such a file holds weights alone. The configs and CLIP's vocabulary come from assets/single_file, so
that nothing is fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import safe_open
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..embedded import SINGLE_FILE
from ..errors import ModelError
from .unet import check_channels

PIPELINES = {"v1": StableDiffusionPipeline, "xl_base": StableDiffusionXLPipeline}
"""By the names of diffusers for what a file is."""

PARTS = {
    "UNet": ("model.diffusion_model.",),
    "VAE": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner."),
}
"""Of what a whole checkpoint consists, by how the names of its tensors begin."""

PADDING = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
"""What short prompts are filled up with."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file is. configs: a folder of them. schedule: what of the scheduler's is otherwise."""

    pipeline_class: type[DiffusionPipeline]
    configs: Path
    schedule: dict[str, Any]


def inspected(file: str) -> Checkpoint:
    """By the names and shapes of its tensors; ModelError for what cannot be read or learn here."""
    if Path(file).suffix != ".safetensors":
        raise ModelError(
            f"The file {file!r} is not a .safetensors; others (.ckpt, .pt, .bin) can run any code "
            "when they are read, so they are not read here. Look for the model's .safetensors."
        )
    with safe_open(file, "pt") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    if any("lora" in name for name in shapes):
        raise ModelError(
            f"The file {file!r} is a LoRA and no model; name its base model, and this as the LoRA "
            "to go on from (--lora)."
        )
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    kind = infer_diffusers_model_type(tensors)  # "v1" is also what it says of the unknown
    if kind == "v2":
        raise ModelError(
            f"The file {file!r} is of Stable Diffusion 2.x and does not say whether it predicts "
            "noise or v; take the model's diffusers folder."
        )
    if kind not in PIPELINES:
        raise ModelError(
            f"The file {file!r} is of the kind {kind!r}; a file that can learn here is a whole "
            "checkpoint of Stable Diffusion 1.x or XL."
        )
    for part, beginnings in PARTS.items():
        if not any(name.startswith(beginnings) for name in shapes):
            raise ModelError(
                f"The file {file!r} has no {part} of Stable Diffusion 1.x or XL in it; take a "
                "whole checkpoint, or a diffusers folder."
            )
    check_channels(file, shapes["model.diffusion_model.input_blocks.0.0.weight"][1], 4)
    schedule: dict[str, Any] = {}
    if "v_pred" in shapes:  # empty tensors, by whose names such models tell what they are
        schedule["prediction_type"] = "v_prediction"
    if "ztsnr" in shapes:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return Checkpoint(PIPELINES[kind], SINGLE_FILE / kind, schedule)


def read_checkpoint(file: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a file, its UNet of this dtype and the rest in float32."""
    found = inspected(file)
    configs = str(found.configs)
    scheduler = DDIMScheduler.from_pretrained(configs, subfolder="scheduler", **found.schedule)
    wanted = found.pipeline_class.load_config(configs)
    tokenizers = {name: clip_tokenizer(pad) for name, pad in PADDING.items() if name in wanted}
    unet = UNet2DConditionModel.from_single_file(
        file, config=configs, subfolder="unet", dtype=dtype
    )
    return found.pipeline_class.from_single_file(
        file, config=configs, dtype=torch.float32, unet=unet, scheduler=scheduler, **tokenizers
    )


def clip_tokenizer(padding: str) -> CLIPTokenizer:
    """CLIP's, of which both text encoders have the same, but for the padding."""
    lines = (SINGLE_FILE / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=77)
