"""LoRA files as the world has them: diffusers', its old ones, PEFT's and kohya's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from .errors import LoraError
from .lora import ADAPTER, Lora, lora_config
from .settings import MOST_RANK

FILE_NAME = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "lora_comfyui_a1111.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."

OURS = re.compile(
    r"(?!lora_te|text_encoder)(.+[._])?to_(q|k|v|out([._]0)?)"
    r"([._]lora[._](down|up|A|B)\.weight|\.alpha)"
)
"""The names of what can be continued, in all of the formats."""

OTHERS = {
    "dora_scale|lora_magnitude_vector": "part of a DoRA",
    "hada_": "part of a LoHa (LyCORIS)",
    "lokr_": "part of a LoKr (LyCORIS)",
    "lora_mid": "part of a LoCon (LyCORIS)",
    "ia3_|on_input": "part of an IA3",
    "oft_": "part of an OFT",
    "lora_te|text_encoder": "of a text encoder",
    "bias|diff_b": "a bias",
    "ff[._]net": "of a feed-forward layer",
    "proj_(in|out)": "of the projection into or out of a transformer",
    "conv|resnets|samplers|in_layers|out_layers|skip_connection|_op": "of a convolution",
    "": "not of the attention",
}
"""What else a tensor is, by a pattern in its name; the first that is found counts."""

HARMLESS = (None, True, False, "gaussian", "orthogonal", "eva")
"""PEFT's ways to begin a LoRA that leave the base model as it is."""

FLOATS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # fmt: skip

Pairs = dict[str, tuple[Tensor, Tensor]]
"""A (rank, in) and B (out, rank), float32, by layer."""

SDXL = SimpleNamespace(layers_per_block=2)
"""What diffusers must know of SDXL's UNet to translate kohya's names for it."""


def save_lora(lora: Lora, folder: Path) -> Path:
    """Write `folder`/pytorch_lora_weights.safetensors in diffusers' format, for stock pipelines.

    COMFYUI_FILE beside it holds the same by kohya's names. Returns the first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name.replace(f".{ADAPTER}.", "."): w for name, w in lora.weights.items()}
    config = lora_config(lora.rank, lora.alpha).to_dict()
    config["target_modules"] = sorted(config["target_modules"])  # PEFT has a set, in any order
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(state),
        unet_lora_adapter_metadata=config,
    )
    kohya = convert_state_dict_to_kohya({f"unet.{name}": w for name, w in state.items()})
    for name in kohya:
        if name.endswith(".alpha"):  # where diffusers writes the rank
            kohya[name] = torch.tensor(float(lora.alpha))
    save_file(kohya, folder / COMFYUI_FILE, {"format": "pt"})
    for name in (FILE_NAME, COMFYUI_FILE):
        _written_anew(folder / name)
    return folder / FILE_NAME


def _written_anew(file: Path) -> None:
    """Give a file the rights that the system gives: safetensors makes it for its owner alone."""
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)


def load_lora(path: Path) -> Lora:
    """Read a LoRA of the UNet's attention: a .safetensors file, or a folder with one.

    W + (alpha / rank) * B @ A is as the file means it, to float rounding: the rank is the largest
    of the file's, with zeros where others end, and alphas that differ, as rsLoRA's do, go into B.
    Layers may be left out; `completed` adds them. In kohya's files each layer has its own alpha, as
    kohya's trainer has it; diffusers 0.42 gives all of them the commonest.

    Raises LoraError for what cannot be read, or is more than such a LoRA.
    """
    path = file = Path(path)
    if path.is_dir():
        there = [name for name in (FILE_NAME, PEFT_FILE) if (path / name).exists()]
        file = path / (there or [FILE_NAME])[0]
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LoraError(
            f"No LoRA can be read from {str(path)!r} ({error}); it must be a .safetensors file, or "
            f"a folder with {FILE_NAME} or {PEFT_FILE} in it."
        ) from error
    try:
        _check(state)
        config = _config(file, state, metadata)
        return _as_one(*_by_layer(state), config)
    except LoraError as error:
        raise LoraError(f"{str(file)!r} cannot be continued: {error}") from error


def _check(state: dict[str, Tensor]) -> None:
    """LoraError unless there are pairs of matrices of the attention, and alphas, and no more."""
    for name, value in state.items():
        if not OURS.fullmatch(name):
            what = next(what for pattern, what in OTHERS.items() if re.search(pattern, name))
            raise LoraError(
                f"{name!r} is {what}; it may only change the attention's to_q, to_k, to_v and "
                "to_out, by a LoRA."
            )
        if name.endswith(".alpha"):
            if value.numel() != 1 or value.is_complex() or not 0 < value < math.inf:
                raise LoraError(f"{name!r} is {value.tolist()}; it must be a positive number.")
        elif value.dtype not in FLOATS:
            raise LoraError(f"{name!r} is {value.dtype}; it must be of floating-point numbers.")
        elif value.ndim != 2:
            raise LoraError(f"{name!r} has the shape {tuple(value.shape)}; it must be a matrix.")
        elif (partner := _partner(name)) not in state:
            raise LoraError(f"{name!r} is there without {partner!r}.")


def _partner(name: str) -> str:
    """The name of a layer's B for that of its A, and the other way round."""
    other = {"down": "up", "up": "down", "A": "B", "B": "A"}
    return re.sub(r"(down|up|A|B)(?=\.weight$)", lambda match: other[match[0]], name)


def _config(file: Path, names: Iterable[str], metadata: dict[str, str]) -> LoraConfig | None:
    """What the file states of its strength, or PEFT's config beside it does; None if none does."""
    where, text = "lora_adapter_metadata", metadata.get("lora_adapter_metadata") or "{}"
    try:
        if any(name.startswith(PEFT_PREFIX) for name in names):
            where, text = PEFT_CONFIG, file.with_name(PEFT_CONFIG).read_text(encoding="utf-8")
        config = {name.removeprefix("unet."): value for name, value in json.loads(text).items()}
        alpha = float(config.get("lora_alpha", LoraConfig.lora_alpha))
        pattern = {layer: float(own) for layer, own in (config.get("alpha_pattern") or {}).items()}
    except OSError as error:
        raise LoraError(f"PEFT's {PEFT_CONFIG} must lie beside it ({error}).") from error
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise LoraError(f"its {where} is damaged ({error}).") from error
    if not config:
        return None
    variants = [field.name for field in fields(LoraConfig) if field.metadata.get("is_lora_variant")]
    plain = {"peft_type": (None, "LORA"), "init_lora_weights": HARMLESS}
    plain |= {name: (None, False) for name in variants}
    for name, usual in plain.items():
        if config.get(name) not in usual:
            raise LoraError(f"its {name} is {config[name]!r}; it must be a plain LoRA.")
    # They are regular expressions, some of which would take for ever.
    if odd := [layer for layer in pattern if not re.fullmatch(r"\^?[\w.]+", layer)]:
        raise LoraError(f"{odd[0]!r} in its alpha_pattern is not the name of a layer.")
    rslora = bool(config.get("use_rslora"))
    return LoraConfig(lora_alpha=alpha, alpha_pattern=pattern, use_rslora=rslora)


def _alpha(config: LoraConfig | None, layer: str, rank: int) -> float:
    """A layer's, as PEFT takes it; rsLoRA's scale is alpha / sqrt(rank), ours alpha / rank."""
    if config is None:
        return float(rank)
    key = get_pattern_key(list(config.alpha_pattern), layer)
    alpha = config.alpha_pattern.get(key, config.lora_alpha)
    return alpha * math.sqrt(rank) if config.use_rslora else alpha


def _by_layer(state: dict[str, Tensor]) -> tuple[Pairs, dict[str, float]]:
    """The matrices, and the alphas that stand beside them, by PEFT's names of the layers."""
    try:
        state, beside = StableDiffusionXLPipeline.lora_state_dict(dict(state), unet_config=SDXL)
    except (ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise LoraError(f"its names are not kohya's ({reason}).") from error
    state = convert_unet_state_dict_to_peft({**state, **(beside or {})})
    state = {n.removeprefix(PEFT_PREFIX).removeprefix("unet."): v for n, v in state.items()}
    pairs, alphas = {}, {}
    for name, value in state.items():
        layer = name.split(".lora_")[0].removesuffix(".alpha")
        if name.endswith(".alpha"):
            alphas[layer] = float(value)
        elif name.endswith(".lora_A.weight"):
            pairs[layer] = value.float(), state[_partner(name)].float()
        elif not name.endswith(".lora_B.weight"):
            raise LoraError(f"{name!r} is not named as by diffusers, PEFT or kohya.")
    if not pairs:
        raise LoraError("there is no LoRA in it.")
    return pairs, alphas


def _as_one(pairs: Pairs, alphas: dict[str, float], config: LoraConfig | None) -> Lora:
    """The layers brought to one rank and one alpha."""
    rank, scaled, weights = max(len(a) for a, _ in pairs.values()), {}, {}
    if rank > MOST_RANK:  # before all layers are made as large
        raise LoraError(f"its rank is {rank}; the most it can be is {MOST_RANK}.")
    for layer, (a, b) in pairs.items():
        if not len(a) == b.shape[1] > 0:
            raise LoraError(f"{layer!r} has A {tuple(a.shape)} and B {tuple(b.shape)}.")
        alpha = alphas[layer] if layer in alphas else _alpha(config, layer, len(a))
        if not 0 < alpha < math.inf:
            raise LoraError(f"its alpha for {layer!r} is {alpha}; it must be a positive number.")
        scaled[layer] = alpha * (rank / len(a))
    alpha = scaled[layer] if len(set(scaled.values())) == 1 else float(rank)
    for layer, (a, b) in pairs.items():
        more = rank - len(a)
        weights[f"{layer}.lora_A.{ADAPTER}.weight"] = pad(a, (0, 0, 0, more))
        weights[f"{layer}.lora_B.{ADAPTER}.weight"] = pad(b, (0, more)) * (scaled[layer] / alpha)
    return Lora(rank, alpha, weights)
