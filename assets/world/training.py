"""What the trainings share: a seeded loop, a learning-rate curve, an average of the weights."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Share of the peak learning rate at `step`: a linear rise, then half a cosine to `floor`."""
    rise = min(1.0, (step + 1) / warmup)
    fall = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return rise * fall


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
    report: Callable[[str], None] = print,
) -> Model:
    """`steps` steps of AdamW on `loss_of(model, step)`; returns the model of averaged weights.

    A step whose loss is not finite is an error at once: a long training must not end in noise.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99)
    )
    average = copy.deepcopy(model).requires_grad_(False)
    started, shown, recent = time.time(), time.time(), []
    for step in range(steps):
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
            left = minutes / (step + 1) * (steps - step - 1)
            report(
                f"{name}: step {step + 1}/{steps}, loss {sum(recent) / len(recent):.4f}, "
                f"{minutes:.1f} min, {left:.1f} min to go"
            )
            shown, recent = time.time(), []
    return average.eval()


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches (size,) drawn without end, each item once per pass."""
    while True:
        yield from torch.randperm(count, generator=generator)[: count - count % size].split(size)
