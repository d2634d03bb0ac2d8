"""Base models by family, and `load_model`, which finds the family of a diffusers pipeline.

A new family is a file of its own and a line here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..checks import reason_of
from ..embedded import TINY_WORLD
from ..errors import ModelError, PxpoError
from ..processes import own_device
from .base import DiffusionModel, Size
from .memory import is_out_of_memory
from .single_file import read_checkpoint
from .stable_diffusion import StableDiffusion
from .stable_diffusion_xl import StableDiffusionXL
from .unet import UNetModel

FAMILIES: dict[str, type[UNetModel]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
}
"""By the class that a pipeline's model_index.json names."""

__all__ = ["FAMILIES", "DiffusionModel", "StableDiffusion", "StableDiffusionXL", "load_model"]


def load_model(
    name: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    size: Size = (None, None),
) -> DiffusionModel:
    """Load a pipeline of one of FAMILIES from a diffusers folder, a .safetensors file or the Hub.

    name: folder, file or Hub id; Tiny World when None. device and dtype choose themselves: CUDA
    with float16, else Apple's MPS or the CPU in float32. size: (height, width) of its images, each
    the model's own when None. Raises ModelError, with the reason and the way out, for what cannot
    be loaded and for what cannot learn here; SettingError for a size that it cannot paint.
    """
    name = str(name or TINY_WORLD)
    device = device or best_device()
    dtype = dtype or best_dtype(device)
    try:
        if Path(name).is_file():
            pipeline = read_checkpoint(name, dtype)
            return FAMILIES[type(pipeline).__name__](pipeline, device, name, size)
        kind = pipeline_kind(name)
        if kind not in FAMILIES:
            raise ModelError(
                f"The model {name!r} is a {kind}; what can learn here is {', '.join(FAMILIES)}."
            )
        return FAMILIES[kind].load(name, device, dtype, size)
    except PxpoError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            way_out = "use a smaller model or a card with more memory"
        elif is_pickled(name, error):
            raise ModelError(
                f"The model {name!r} has weights only as .bin files, which can run any code when "
                "they are read, so they are not read here. If you trust it, write it anew as "
                f".safetensors: DiffusionPipeline.from_pretrained({name!r}).save_pretrained(...)."
            ) from error
        elif Path(name).is_file():
            way_out = "it must be a whole checkpoint of Stable Diffusion 1.x or XL"
        elif Path(name).exists():
            way_out = "it must be a diffusers folder of a Stable Diffusion pipeline"
        else:
            way_out = "check the name, the network, and your access to it if it is gated"
        raise ModelError(
            f"The model {name!r} cannot be loaded ({reason_of(error, name)}); {way_out}."
        ) from error


def pipeline_kind(name: str) -> str:
    """The class that a folder or a Hub repository is of; ModelError for a part of a pipeline."""
    folder = Path(name)
    if (folder / "config.json").exists() and not (folder / "model_index.json").exists():
        kind = json.loads((folder / "config.json").read_bytes()).get("_class_name", "model")
        raise ModelError(
            f"The folder {name!r} is a {kind}, which is a part of a pipeline at most; give the "
            "folder of a whole one, with a model_index.json in it."
        )
    return DiffusionPipeline.load_config(name)["_class_name"]


def is_pickled(name: str, error: Exception) -> bool:
    """Whether a model could not be loaded because it has .bin files in place of .safetensors."""
    parts = [Path(name) / part for part in ("unet", "vae", "text_encoder", "text_encoder_2")]
    return "necessary `safetensors` weights" in str(error) or any(
        list(part.glob("*.bin")) and not list(part.glob("*.safetensors")) for part in parts
    )


def best_device() -> str:
    if own := own_device():
        return own
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def leave_a_core() -> None:
    """Share an operation among all cores but one, unless OMP_NUM_THREADS says among how many.

    Where other work keeps one of torch's threads waiting, all of them wait: on two cores with a
    busy neighbour, two threads take five times as long as one. Chunks of work that are divided (see
    `memory.py`) keep nobody waiting.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


def best_dtype(device: str) -> torch.dtype:
    """float16 on a GPU: bfloat16's rounding, guided, is as large as what one update changes."""
    return torch.float16 if device.startswith("cuda") else torch.float32
