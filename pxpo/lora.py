"""LoRA as plain data, attached to the shared base model only while it is needed (by PEFT)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Linear, Parameter

from .errors import LoraError
from .models.base import DiffusionModel

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention projections, as in DDPO's public trainers."""

MOST_RANK = 512

FILE_NAME = "pytorch_lora_weights.safetensors"
_ADAPTER = "default"


@dataclass(frozen=True)
class Lora:
    """A low-rank change of a UNet's attention: W + (alpha / rank) * B @ A.

    rank: 1 to 512. alpha: finite and positive. weights: float32 and finite, on the CPU, by the
    UNet's parameter names. Raises LoraError for anything else.
    """

    rank: int
    alpha: float
    weights: dict[str, Tensor]

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 1 <= self.rank <= MOST_RANK:
            raise LoraError(
                f"The LoRA's rank is {self.rank!r}; it must be a whole number from 1 to "
                f"{MOST_RANK}."
            )
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < math.inf:
            raise LoraError(f"The LoRA's alpha is {self.alpha!r}; it must be a positive number.")
        for name, weight in self.weights.items():
            if weight.dtype != torch.float32 or weight.ndim != 2:
                raise LoraError(
                    f"The LoRA's {name} is {weight.dtype} of the shape {tuple(weight.shape)}; it "
                    "must be a float32 matrix."
                )
            if not torch.isfinite(weight).all():
                raise LoraError(f"The LoRA's {name} holds values that are not finite.")


def new_lora(model: DiffusionModel, rank: int, seed: int) -> Lora:
    """A LoRA that changes nothing yet: A random (as PEFT's, but from `seed`), B zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in _shapes(model, rank).items():
        weights[name] = torch.zeros(shape)
        if ".lora_A." in name:
            bound = 1 / math.sqrt(shape[1])
            weights[name].uniform_(-bound, bound, generator=generator)
    return Lora(rank, float(rank), weights)


def _shapes(model: DiffusionModel, rank: int) -> dict[str, tuple[int, int]]:
    """The matrices of a LoRA for this model, in the order of its layers."""
    shapes = {}
    for name, module in model.network.named_modules():
        name = name.removesuffix(".base_layer")  # its name while another LoRA is attached
        if isinstance(module, Linear) and name.endswith(TARGETS):
            shapes[f"{name}.lora_A.{_ADAPTER}.weight"] = (rank, module.in_features)
            shapes[f"{name}.lora_B.{_ADAPTER}.weight"] = (module.out_features, rank)
    return shapes


@contextmanager
def adapter(model: DiffusionModel, lora: Lora) -> Iterator[dict[str, Parameter]]:
    """`model` with `lora` for a while; yields its parameters by name, ready to learn.

    The bare model is back afterwards, also after an exception or when the surrounding generator is
    closed. What was learnt is lost unless it is taken out with `weights_of`. One LoRA at a time:
    a second one, while the first is still in (a generator that was not finished, say), is refused
    with a LoraError, because the two would spoil each other's images.
    """
    if model.busy:
        raise LoraError(
            f"{model.name!r} is at work with another LoRA; finish or close that work first."
        )
    model.busy = True
    try:
        yield _activate(model, lora)
    finally:
        if hasattr(model.network, "peft_config"):
            model.network.disable_adapters()
        model.busy = False


def weights_of(parameters: dict[str, Parameter]) -> dict[str, Tensor]:
    """A copy of the parameters as plain data."""
    return {name: value.detach().float().cpu().clone() for name, value in parameters.items()}


def check_fits(model: DiffusionModel, lora: Lora) -> None:
    """LoraError where the matrices of `lora` are not those that `model` wants."""
    shapes = _shapes(model, lora.rank)
    if odd := sorted(shapes.keys() ^ lora.weights.keys()):
        raise LoraError(
            f"The LoRA does not fit {model.name!r}: {len(odd)} of its matrices have no partner, "
            f"the first is {odd[0]!r}. It was made for another base model."
        )
    for name, shape in shapes.items():
        if lora.weights[name].shape != shape:
            raise LoraError(
                f"The LoRA does not fit {model.name!r}: {name} is "
                f"{tuple(lora.weights[name].shape)}, the model wants {shape}."
            )


def _activate(model: DiffusionModel, lora: Lora) -> dict[str, Parameter]:
    check_fits(model, lora)
    parameters = _attach(model, lora.rank, lora.alpha)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(lora.weights[name])
            parameter.grad = None
    model.network.enable_adapters()
    return parameters


def _attach(model: DiffusionModel, rank: int, alpha: float) -> dict[str, Parameter]:
    """LoRA layers of this rank in the UNet, in float32, and their parameters by name.

    The bare model is left where that fails (for want of memory, say), and not half a LoRA.
    """
    present = getattr(model.network, "peft_config", {}).get(_ADAPTER)
    if present is None or (present.r, present.lora_alpha) != (rank, alpha):
        try:
            if present is not None:
                model.network.delete_adapters(_ADAPTER)
            model.network.add_adapter(_config(rank, alpha), _ADAPTER)
        except BaseException:
            model.network.unload_lora()
            raise
        model.network.disable_adapters()
    parameters = _parameters(model)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters


def _config(rank: int, alpha: float) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS))


def _parameters(model: DiffusionModel) -> dict[str, Parameter]:
    return {name: p for name, p in model.network.named_parameters() if ".lora_" in name}


def save_lora(lora: Lora, folder: Path) -> Path:
    """Write `folder`/pytorch_lora_weights.safetensors in diffusers' format, for stock pipelines."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name.replace(f".{_ADAPTER}.", "."): w for name, w in lora.weights.items()}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(state),
        unet_lora_adapter_metadata=_config(lora.rank, lora.alpha).to_dict(),
    )
    return folder / FILE_NAME


def load_lora(path: Path) -> Lora:
    """Read a LoRA of the UNet's attention from a .safetensors file or a folder that holds one."""
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    try:
        state = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise LoraError(
            f"No LoRA can be read from {str(path)!r} ({error}); it must be a folder with "
            f"{FILE_NAME} in it, or a .safetensors file."
        ) from error
    others = sorted(name for name in state if not name.startswith("unet."))
    if others:
        raise LoraError(
            f"The LoRA in {str(file)!r} changes more than the UNet ({others[0]!r}); only LoRAs of "
            "the UNet's attention can be continued."
        )
    state = {name.removeprefix("unet."): value for name, value in state.items()}
    state = convert_unet_state_dict_to_peft(state)
    weights = {
        name.replace(".weight", f".{_ADAPTER}.weight"): value.float()
        for name, value in state.items()
        if not name.endswith(".alpha")
    }
    ranks = {value.shape[0] for name, value in weights.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise LoraError(
            f"The LoRA in {str(file)!r} has the ranks {sorted(ranks)}; it must have one."
        )
    rank = ranks.pop()
    alphas = {value.item() for name, value in state.items() if name.endswith(".alpha")}
    if "lora_adapter_metadata" in metadata:
        alphas.add(json.loads(metadata["lora_adapter_metadata"]).get("unet.lora_alpha", rank))
    if len(alphas) > 1:
        raise LoraError(
            f"The LoRA in {str(file)!r} has the alphas {sorted(alphas)}; it must have one."
        )
    return Lora(rank, float(alphas.pop() if alphas else rank), weights)
