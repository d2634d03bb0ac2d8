"""Long pieces of work are generators: they yield where they stand, and return their result."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """Where a long piece of work stands, handed to the caller between two of its steps.

    latents: (B, C, h, w), the images as the model now expects them to become, while sampling.
    ahead: how many come first, where it waits for its turn.
    """

    phase: str
    done: int
    total: int
    latents: Tensor | None = None
    ahead: int = 0

    def __str__(self) -> str:
        if self.ahead:
            return f"waiting for {self.ahead} other{'s' * (self.ahead > 1)}"
        return f"{self.phase} {self.done}/{self.total}"


def finish(work: Generator[Progress, None, Result]) -> Result:
    """Run a generator to its end and return its result, for callers who need no progress."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
