"""A step of known size: how far an update moves what the network says, measured and then set.

A learning rate means nothing across models: one that moves what a small network says by three
percent an update rewrites what a large one says. So the optimizer gives the step's direction alone.
Its size is scaled until what the network says, as velocity v (steps.py), changes by `strength`,
relative to itself:

    sqrt(mean (v' - v)^2 / mean v^2)  =  strength

The change is nearly linear in the step, so that the first scaling nearly always meets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from .errors import DivergedError
from .progress import Progress

NEAR = 1.15
"""The factor by which a step's size may miss what was asked for."""

TRIES = 8


def relative_change(now: Tensor, before: Tensor) -> float:
    """How far `now` is from `before`, in units of the latter's root mean square."""
    change = (now - before).square().mean() / before.square().mean()
    return change.sqrt().item()


@torch.no_grad()
def scale_step(
    parameters: Sequence[Tensor],
    before: Sequence[Tensor],
    measure: Callable[[], float],
    strength: float,
) -> Generator[Progress, None, float]:
    """Scale the step that led the parameters away from `before`, and return what it changes.

    measure: the relative change of the network's output, as the parameters are now. strength: what
    it shall be; 0 takes any that is finite. Raises DivergedError, with the parameters as they were
    before, when no size does.
    """
    steps = [parameter - old for parameter, old in zip(parameters, before, strict=True)]
    size = 1.0
    for tried in range(TRIES):
        moved = measure()
        yield Progress("measuring", tried + 1, TRIES)
        if math.isfinite(moved) and (not strength or _near(moved, strength)):
            return moved
        size *= strength / moved if strength and 0 < moved < math.inf else 0.5
        for parameter, old, step in zip(parameters, before, steps, strict=True):
            parameter.copy_(old + size * step)
    for parameter, old in zip(parameters, before, strict=True):
        parameter.copy_(old)
    wanted = f"a change of {strength:g}" if strength else "a change that is finite"
    raise DivergedError(
        f"No size of this update's step gives {wanted} of what the model says; the last of {TRIES} "
        f"gave {moved:g}. The LoRA is as before; try another strength, or other rewards."
    )


def _near(moved: float, strength: float) -> bool:
    return strength / NEAR <= moved <= strength * NEAR
