"""Carrying over: how far each of ten updates moves what a model says, and its pictures, on models
of many sizes."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from pxpo import (
    ColorReward,
    DiffusionModel,
    begin,
    finish,
    generate,
    learn,
    load_model,
    settings_for,
)
from pxpo.embedded import SINGLE_FILE
from pxpo.measures import outputs, velocities
from pxpo.models import StableDiffusion
from pxpo.settings import Settings
from pxpo.strength import relative_change
from tests.conftest import random_pipeline, text_config

from .common import Lab, table

UPDATES = 10
WAYS: dict[str, dict[str, Any]] = {
    "strength 0.03": {},
    "learning rate 2e-3": {"strength": 0.0, "learning_rate": 2e-3},
}
"""The one recipe, and the rate that the first version had for rewards that are computed."""

SMALL = {"steps": 5, "images": 2, "shown": 1, "timesteps": 1.0}
"""For models that a CPU can hardly bear."""

SHAPES = {"Stable Diffusion 1.4's shape": "v1", "SDXL's shape": "xl_base"}
"""Of UNets, by the folders of their configs."""


def random_model(shape: str, name: str) -> DiffusionModel:
    """A pipeline around a UNet of this shape, told nothing but a prompt; all weights are random."""
    pipeline = random_pipeline()
    config = UNet2DConditionModel.load_config(SINGLE_FILE / shape / "unet")
    unet = UNet2DConditionModel.from_config(
        {**config, "sample_size": 16, "addition_embed_type": None}
    )
    text_encoder = CLIPTextModel(text_config(layers=1, width=config["cross_attention_dim"]))
    pipeline.register_modules(unet=unet, text_encoder=text_encoder)
    return StableDiffusion(pipeline, "cpu", name)


def moved(model: DiffusionModel, settings: Settings) -> dict[str, list[float]]:
    """By each update: the relative change of what the network says, as velocity, over all images
    and steps, and the mean change of colour of the pictures that are shown, 0 to 1."""
    run, changes = finish(begin(model, settings)), []
    for _ in range(UPDATES):
        run = finish(generate(model, run))
        trajectory = run.trajectory
        assert trajectory is not None
        run = finish(learn(model, run, ColorReward("blue")(trajectory.images)))
        now, before = (
            velocities(trajectory, said)
            for said in (outputs(model, run.lora, trajectory), trajectory.outputs)
        )
        changes.append(relative_change(now, before))
    shown = torch.stack([one.shown / 255 for one in run.updates])
    pictures = (shown[1:] - shown[:-1]).abs().flatten(1).mean(1)
    return {"moved": changes, "pictures": pictures.tolist()}


def measured(lab: Lab, name: str, way: str, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    small = SMALL if name in SHAPES else {}
    settings = {"images": 4, "seed": seed, **small, **WAYS[way], **changes}
    model = lab.model if name == "Tiny World" else opened(name)
    return moved(model, model.filled(settings_for("color", **settings)))


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
    columns = [str(number + 1) for number in range(UPDATES)]
    parts = []
    for name, title in (("moved", "of what is said"), ("pictures", "of the pictures' colours")):
        rows = [
            [one["model"], one["way"], *(f"{100 * change:.1f}" for change in one[name])]
            for one in lines
        ]
        parts.append(table([f"change {title} in %, by update", "", *columns], rows))
    return "\n\n".join(parts)
