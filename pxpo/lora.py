"""LoRA as plain data, attached to the shared base model only while it is needed (by PEFT)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn import Linear, Parameter

from .errors import LoraError
from .models.base import DiffusionModel
from .settings import MOST_RANK

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention projections, as in DDPO's public trainers."""

ADAPTER = "default"
"""PEFT's name of ours, which is in the names of its parameters."""


@dataclass(frozen=True)
class Lora:
    """A low-rank change of a UNet's attention: W + (alpha / rank) * B @ A.

    rank: 1 to 512. alpha: finite and positive. weights: A (rank, in) and B (out, rank) of one layer
    or more, float32 and finite, on the CPU, by the UNet's parameter names. Raises LoraError for
    anything else.
    """

    rank: int
    alpha: float
    weights: Mapping[str, Tensor]

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
            if weight.shape[".lora_B." in name] != self.rank:
                raise LoraError(
                    f"The LoRA's {name} has the shape {tuple(weight.shape)}, which is not of rank "
                    f"{self.rank}."
                )
        layers = {name.split(".lora_")[0] for name in self.weights}
        sides = [f".lora_{side}.{ADAPTER}.weight" for side in "AB"]
        if not layers or {*self.weights} != {layer + side for layer in layers for side in sides}:
            raise LoraError(
                f"The LoRA's matrices are {', '.join(self.weights) or 'none'}; they must be an A "
                "and a B of each layer."
            )

    @cached_property
    def digest(self) -> str:
        """Tells its weights from others, in whichever order they come."""
        return digest(self.weights[name] for name in sorted(self.weights))


def digest(tensors: Iterable[Tensor]) -> str:
    """A few characters that tell these values from others."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()[:12]


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


def completed(model: DiffusionModel, lora: Lora, seed: int) -> Lora:
    """`lora` for all layers of `model`, all of its ranks able to learn; the picture is the same.

    Layers that it leaves out, and ranks whose row of A and column of B are zero, could not learn:
    they become those of `new_lora`, which change nothing yet. Raises LoraError for a LoRA of
    another base.
    """
    new = new_lora(model, lora.rank, seed).weights
    weights = {**new, **lora.weights}
    check_fits(model, replace(lora, weights=weights))
    for name in new:
        if ".lora_A." in name:
            a, b = weights[name], weights[name.replace(".lora_A.", ".lora_B.")]
            unused = ~(a.any(1) | b.any(0))  # (rank,)
            weights[name] = torch.where(unused[:, None], new[name], a)
    return replace(lora, weights=weights)


def _shapes(model: DiffusionModel, rank: int) -> dict[str, tuple[int, int]]:
    """The matrices of a LoRA for this model, in the order of its layers."""
    shapes = {}
    for name, module in model.network.named_modules():
        name = name.removesuffix(".base_layer")  # its name while another LoRA is attached
        if isinstance(module, Linear) and name.endswith(TARGETS):
            shapes[f"{name}.lora_A.{ADAPTER}.weight"] = (rank, module.in_features)
            shapes[f"{name}.lora_B.{ADAPTER}.weight"] = (module.out_features, rank)
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
    for name, weight in lora.weights.items():
        if name not in shapes or weight.shape != shapes[name]:
            wants = f"wants {shapes[name]}" if name in shapes else "has no such layer"
            raise LoraError(
                f"The LoRA does not fit {model.name!r}: {name} is {tuple(weight.shape)}, the model "
                f"{wants}. It was made for another base model."
            )
    if missing := [name for name in shapes if name not in lora.weights]:
        raise LoraError(
            f"The LoRA does not fit {model.name!r} yet: it leaves out {missing[0]}; `completed` "
            "adds what is missing."
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
    present = getattr(model.network, "peft_config", {}).get(ADAPTER)
    if present is None or (present.r, present.lora_alpha) != (rank, alpha):
        try:
            if present is not None:
                model.network.delete_adapters(ADAPTER)
            model.network.add_adapter(lora_config(rank, alpha), ADAPTER)
        except BaseException:
            model.network.unload_lora()
            raise
        model.network.disable_adapters()
    parameters = _parameters(model)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters


def lora_config(rank: int, alpha: float) -> LoraConfig:
    """PEFT's words for such a LoRA."""
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS))


def _parameters(model: DiffusionModel) -> dict[str, Parameter]:
    return {name: p for name, p in model.network.named_parameters() if ".lora_" in name}
