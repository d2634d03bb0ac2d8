"""One model and one thread for many people: all that computes runs there, and they take turns.

    thread = ModelThread()
    for progress in thread.iterate(work()):    # from any thread; `work` runs on the model's
        ...

Long work is a generator, and what others ask for fits between two of its steps. What needs the
model for itself, as an update does, goes through `in_turn` within such work: first come, first
served, and whoever had a turn waits behind all who wait already.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import BusyError
from .progress import Progress

Result = TypeVar("Result")

SIGN = 0.5  # seconds between two signs of work that waits


@dataclass(eq=False)
class Caller:
    """Somebody's work, which goes on whenever they ask for more of it.

    who: the person; of several pieces of their work one goes on after the other. left: when they
    last got something; infinite while they ask for more. served: whether it has had a turn.
    """

    work: Generator
    who: Hashable
    left: float = math.inf
    served: bool = False


CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)
"""Whose work runs at this moment, within the model's thread."""


class ModelThread:
    """The one thread that all computing starts from.

    OpenMP keeps helpers for every thread that ever computes, and with more of them than cores it
    lets them sleep between any two operations: on two cores all takes half as long again. Work sees
    its caller's context variables: by Gradio's, ZeroGPU knows for whom it lends a GPU.

    waiting: how many may stand in line; whoever comes then is asked to come again. patience:
    seconds after which work that nobody asks for more of is taken for given up. who: tells one
    person who calls from another; as it is, each call is a person of its own.
    """

    def __init__(self, waiting: int = 32, patience: float = 60) -> None:
        self.waiting, self.patience = waiting, patience
        self.who: Callable[[], Hashable] = object
        self._pool = ThreadPoolExecutor(1, "model")
        self._callers: list[Caller] = []  # all whose work has begun and not ended
        self._line: list[Caller] = []  # those of them who want a turn, or have it
        self._having: Caller | None = None  # the one who has it
        self._moved = threading.Condition()  # these lists change on the model's thread alone

    def call(self, work: Callable[..., Any], *values: Any) -> Any:
        return self._pool.submit(copy_context().run, work, *values).result()

    def iterate(self, work: Generator) -> Iterator[Any]:
        """What `work` yields. It may be given up at any time; it is closed on this thread too."""
        caller, end = Caller(work, self.who()), object()
        try:
            while (value := self.call(self._advance, caller, end)) is not end:
                caller.left = time.monotonic()
                yield value
                self._pause(caller)
                caller.left = math.inf
        finally:
            self._pool.submit(self._end, caller)  # not waited for: this may be that very thread

    def wrap(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, a function or a generator function, as one that runs here."""

        @functools.wraps(work)
        def call(*values: Any) -> Any:
            return self.call(work, *values)

        @functools.wraps(work)
        def iterate(*values: Any) -> Iterator[Any]:
            yield from self.iterate(work(*values))

        return iterate if inspect.isgeneratorfunction(work) else call

    def in_turn(self, work: Generator[Progress, None, Result]) -> Generator[Progress, None, Result]:
        """`work`, when it is its turn; until then signs of how many come first.

        Without waiting where no `iterate` is at work: whoever calls directly is alone. Raises
        BusyError for a newcomer who finds the line full.
        """
        caller = CALLER.get()
        if caller is None:
            return (yield from work)
        if len(self._line) > self.waiting and not caller.served:
            raise BusyError(
                f"the queue is full: {self.waiting} others are waiting already. Try again in a "
                "minute; nothing is lost."
            )
        with self._moved:
            self._line.append(caller)
        try:
            while self._next() is not caller:
                yield Progress("waiting", 0, 0, ahead=max(1, self._line.index(caller)))
            self._having, caller.served = caller, True
            return (yield from work)
        finally:
            with self._moved:
                self._line.remove(caller)
                if self._having is caller:
                    self._having = None
                self._moved.notify_all()

    def after_own(self) -> Generator[Progress, None, None]:
        """Wait for what the same person has asked for before, and for nobody else."""
        caller = CALLER.get()
        own = [one for one in self._callers if caller and one.who == caller.who]
        if own and own[0] is not caller:
            yield from self.in_turn(_nothing())

    def _next(self) -> Caller | None:
        """Who has the turn, or else is to have it."""
        if self._having:
            return self._having
        first = {caller.who: caller for caller in reversed(self._callers)}  # of each person's
        return next((caller for caller in self._line if first[caller.who] is caller), None)

    def _advance(self, caller: Caller, end: object) -> Any:
        """The next value of its work; what was given up is closed before."""
        if inspect.getgeneratorstate(caller.work) == inspect.GEN_CLOSED:
            return end
        if caller not in self._callers:
            with self._moved:
                self._callers.append(caller)
        now = time.monotonic()
        for other in [other for other in self._callers if now - other.left > self.patience]:
            self._end(other)
        CALLER.set(caller)
        return next(caller.work, end)

    def _end(self, caller: Caller) -> None:
        """Close its work, which gives its turn to the next."""
        try:
            caller.work.close()
        finally:
            with self._moved:
                if caller in self._callers:
                    self._callers.remove(caller)
                self._moved.notify_all()

    def _pause(self, caller: Caller) -> None:
        """Until its turn has come, or it is time for another sign; not at all where it has it."""
        with self._moved:
            self._moved.wait_for(
                lambda: caller not in self._line or self._next() is caller, timeout=SIGN
            )


def _nothing() -> Generator[Progress, None, None]:
    yield from ()
