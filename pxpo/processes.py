"""The images of an update shared among processes, as `accelerate launch` starts them.

All processes hold the same run and do the same things in the same order. Each makes, judges and
learns from its share of the images; what is said of all images is put together here. An image has
the number, and so the noise, that it has with one process. One process has all, at no cost.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import (
    broadcast_object_list,
    gather,
    pad_across_processes,
    parse_flag_from_env,
    reduce,
)
from torch import Tensor

from .errors import ProcessError, PxpoError

Result = TypeVar("Result")


def state() -> PartialState:
    """What accelerate knows of the processes; it asks to be told that they compute on the CPU."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=cpu)


def many() -> bool:
    return state().num_processes > 1


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return state().is_main_process


def own_device() -> str:
    """Where this one of many processes computes; empty for one alone, which is free to choose."""
    return str(state().device) if many() else ""


def share(count: int) -> slice:
    """Which of `count` images are this process's: those after the ones of the process before it.

    All get the same number, but the last who get any; with fewer images than processes some get
    none.
    """
    each, index = -(-count // state().num_processes), state().process_index
    return slice(min(index * each, count), min((index + 1) * each, count))


def tasks(count: int) -> slice:
    """Which of `count` images this process makes and judges: its share; where that is none the last
    image again, which does not count, as models and rewards take no empty batch."""
    mine = share(count)
    return mine if mine.start < mine.stop else slice(max(count - 1, 0), count)


def gathered(part: Tensor, count: int) -> Tensor:
    """What all processes have of `count` images, in order, of what each has of its `tasks`."""
    if not many():
        return part
    return _exchanged(lambda mine: gather(pad_across_processes(mine)), part)[:count]


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's sum over all processes."""
    if not many():
        return list(tensors)
    return [_exchanged(lambda mine: reduce(mine, "sum"), tensor) for tensor in tensors]


def from_first(work: Callable[[], Result]) -> Result:
    """What `work`, done by the first process alone, returns to all of them, or raises in all."""
    if not many():
        return work()
    outcome: list[Any] = [None, None]
    if first():
        try:
            outcome[0] = work()
        except PxpoError as error:
            outcome[1] = error
    outcome = _reached(lambda: broadcast_object_list(outcome))
    if outcome[1]:
        raise outcome[1]
    return outcome[0]


def end_with_the_others() -> None:
    """From now on raise ProcessError where the launcher tells this process to end, as it does when
    another one has."""

    def end(*_: Any) -> None:
        raise ProcessError("The launcher ends this process, as it does when another one has ended.")

    if many():
        signal.signal(signal.SIGTERM, end)


def end_undisturbed() -> None:
    """From now on let nothing keep this process from saving: the launcher asks it to end again."""
    if many():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _exchanged(exchange: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Tensors travel between the devices that the processes compute on."""
    here = tensor.to(state().device)
    return _reached(lambda: exchange(here)).to(tensor.device)


def _reached(exchange: Callable[[], Result]) -> Result:
    """What an exchange with the other processes gives; ProcessError where one is gone."""
    try:
        return exchange()
    except RuntimeError as error:  # all that gloo raises
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise ProcessError(f"Another process has ended or cannot be reached ({reason}).") from error
