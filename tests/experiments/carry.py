"""Carrying over: how far each of ten updates moves what a model says, on models of many sizes."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from pxpo import (
    ColorReward,
    DiffusionModel,
    Run,
    Trajectory,
    adapter,
    begin,
    finish,
    generate,
    learn,
    load_model,
    settings_for,
)
from pxpo.models import StableDiffusion
from pxpo.models.base import some
from pxpo.settings import Settings
from pxpo.strength import relative_change
from tests.conftest import letters_tokenizer

from .common import Lab, table

UPDATES = 10
WAYS: dict[str, dict[str, Any]] = {
    "strength 0.03": {},
    "learning rate 2e-3": {"strength": 0.0, "learning_rate": 2e-3},
}
"""The one recipe, and the rate that the first version had for rewards that are computed."""

SMALL = {"steps": 5, "images": 2, "timesteps": 1.0}  # for models that a CPU can hardly bear


def random_model(unet: dict[str, Any], name: str) -> DiffusionModel:
    """A pipeline around a UNet of this shape; all of its weights are random."""
    torch.manual_seed(0)
    tokenizer = letters_tokenizer(77)
    width = unet["cross_attention_dim"]
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width,
            num_hidden_layers=1, num_attention_heads=8, projection_dim=width,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae, text, tokenizer, UNet2DConditionModel(sample_size=16, **unet), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    return StableDiffusion(pipeline, "cpu", name)


SHAPES: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.4's shape": {"cross_attention_dim": 768},
    "SDXL's shape": {
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
    },
}
"""UNets by what their config says; the rest of it is diffusers' default, which is SD 1's."""


def moved(model: DiffusionModel, settings: Settings) -> list[float]:
    """The relative change of the output by each update, over all of the pairs it learnt from."""
    run, changes = finish(begin(model, settings)), []
    for _ in range(UPDATES):
        run = finish(generate(model, run))
        trajectory = run.trajectory
        assert trajectory is not None
        run = finish(learn(model, run, ColorReward("blue")(trajectory.images)))
        changes.append(relative_change(says(model, run, trajectory), trajectory.outputs))
    return changes


@torch.no_grad()
def says(model: DiffusionModel, run: Run, trajectory: Trajectory) -> torch.Tensor:
    """What the network says now (T, B, C, h, w) of all that the trajectory asked it."""
    with adapter(model, run.lora):
        return torch.stack(
            [
                model.predict(
                    x_t, t.expand(len(x_t)), some(trajectory.cond, slice(None)),
                    trajectory.uncond, trajectory.guidance_scale,
                ).cpu()
                for x_t, t in zip(trajectory.latents, trajectory.steps.t, strict=False)
            ]
        )  # fmt: skip


def measured(lab: Lab, name: str, way: str, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    small = SMALL if name in SHAPES else {}
    settings = {"images": 4, "shown": 1, "seed": seed, **small, **WAYS[way], **changes}
    model = lab.model if name == "Tiny World" else opened(name)
    return {"moved": moved(model, model.filled(settings_for("color", **settings)))}


@functools.lru_cache(maxsize=1)
def opened(name: str) -> DiffusionModel:
    return random_model(SHAPES[name], name) if name in SHAPES else load_model(name)


def run(lab: Lab, names: list[str], seeds: range, changes: dict[str, Any]) -> None:
    """names: keys of SHAPES, or folders of painters."""
    for name, way in itertools.product(names or ["Tiny World", *SHAPES], WAYS):
        key = {"model": Path(name).name, "way": way, "seed": seeds[0], "changes": changes}
        lab.once(key, functools.partial(measured, lab, name, way, seeds[0], changes))


def report(lab: Lab, changes: dict[str, Any]) -> str:
    lines = [one for one in lab.read(changes) if "way" in one]
    rows = [
        [one["model"], one["way"], *(f"{100 * change:.1f}" for change in one["moved"])]
        for one in lines
    ]
    columns = ["change of the output in %, by update", ""]
    return table([*columns, *(str(number + 1) for number in range(UPDATES))], rows)
