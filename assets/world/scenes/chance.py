"""What is left to chance."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from .canvas import Colour, rgb

T = TypeVar("T")


@functools.cache
def table(text: str) -> dict[str, str]:
    """The last word of each entry by what stands before it: "straw hat 5, cap 6"."""
    return dict(entry.rsplit(" ", 1) for entry in text.split(", "))


class Rng(np.random.Generator):
    """A generator of random numbers that also chooses among things."""

    def chance(self, probability: float) -> bool:
        return bool(self.random() < probability)

    def pick(self, things: Sequence[T]) -> T:
        """One of the things, all equally likely."""
        return things[int(self.integers(len(things)))]

    def one_of(self, text: str) -> str:
        """One of "a, b, c", all equally likely."""
        return self.pick(text.split(", "))

    def lots(self, odds: str) -> str:
        """One of "a 50, b 30, c 20", each with its percentage (they sum to 100)."""
        ticket = self.random()
        for name, percent in table(odds).items():
            ticket -= int(percent) / 100
            if ticket < 0:
                return name
        return name  # the odds summed to a hair less than 1

    def shuffled(self, things: Sequence[T]) -> list[T]:
        return [things[i] for i in self.permutation(len(things))]

    def vary(self, colour: Colour, amount: float = 7) -> tuple[int, ...]:
        """A close relative of the colour, so that no two scenes are painted quite alike."""
        shifted = np.add(rgb(colour), self.normal(0, amount, 3))
        return tuple(np.clip(shifted, 0, 255).astype(int).tolist())
