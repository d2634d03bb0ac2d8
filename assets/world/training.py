"""What the trainings share: a seeded loop that can be interrupted, and averaged weights."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

BETWEEN_CHECKPOINTS = 240  # seconds


def cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Share of the peak learning rate at `step`: a linear rise, then half a cosine to `floor`."""
    rise = min(1.0, (step + 1) / warmup)
    fall = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return rise * fall


def half_precision(device: torch.device) -> torch.autocast:
    """bfloat16 for matrix work where the hardware has it; a CPU without takes ten times as long."""
    bare = device.type == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.autocast(device.type, torch.bfloat16, enabled=not bare)


def average_(average: nn.Module, model: nn.Module, step: int, decay: float = 0.999) -> None:
    """Move the running average of the weights (EMA) towards `model`, faster while it is young."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)
        for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)  # batch norm keeps a running average of its own


def train(
    name: str,
    model: Model,
    loss_of: Callable[[Model, int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    checkpoint: Path | None = None,
    report: Callable[[str], None] = print,
) -> Model:
    """`steps` steps of AdamW on `loss_of(model, step)`; returns the model of averaged weights.

    loss_of: must depend on nothing but its arguments, so that a training that was interrupted goes
    on alike from `checkpoint`, which is written every few minutes and deleted in the end.
    A step whose loss is not finite is an error at once: a long training must not end in noise.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=learning_rate,
        weight_decay=weight_decay,
        betas=(0.9, 0.99),
        fused=True,
    )
    average = copy.deepcopy(model).requires_grad_(False)
    first = _load(checkpoint, model, average, optimizer) if checkpoint else 0
    started, shown, recent = time.time(), time.time(), []
    kept = started
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * cosine(step, steps)
        loss = loss_of(model, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average_(average, model, step)
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise FloatingPointError(f"{name}: the loss is {recent[-1]} at step {step}")
        if time.time() - shown > 20 or step == steps - 1:
            minutes = (time.time() - started) / 60
            left = minutes / (step + 1 - first) * (steps - step - 1)
            report(
                f"{name}: step {step + 1}/{steps}, loss {sum(recent) / len(recent):.4f}, "
                f"{minutes:.1f} min, {left:.1f} min to go"
            )
            shown, recent = time.time(), []
        if checkpoint and time.time() - kept > BETWEEN_CHECKPOINTS:
            _save(checkpoint, model, average, optimizer, step + 1)
            kept = time.time()
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return average.eval()


def _save(
    file: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    part = file.with_suffix(".part")
    save_file(tensors, part, {"step": str(step)})
    part.replace(file)


def _load(
    file: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Put everything back as `_save` found it; returns the number of steps done."""
    if not file.exists():
        return 0
    with safe_open(file, "pt") as opened:
        step = int(opened.metadata()["step"])
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
    for name, value in load_file(file).items():
        part, rest = name.split(".", 1)
        parts[part][rest] = value
    model.load_state_dict(parts["model"])
    average.load_state_dict(parts["average"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["optimizer"].items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step


def generator_at(*numbers: int) -> torch.Generator:
    """A generator for each tuple of numbers, such as (seed, step)."""
    return torch.Generator().manual_seed(
        np.random.SeedSequence(numbers).generate_state(1)[0].item()
    )


def batch_at(count: int, size: int, seed: int, step: int) -> Tensor:
    """The indices (size,) of one step's batch; each item comes once in every pass over `count`."""
    passed, place = divmod(step, count // size)
    return _order(count, seed, passed)[place * size : (place + 1) * size]


@functools.lru_cache(maxsize=1)
def _order(count: int, seed: int, passed: int) -> Tensor:
    return torch.randperm(count, generator=generator_at(seed, passed))
