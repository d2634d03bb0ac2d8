"""How long an update takes here: told before it is made, from how long others took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from .errors import PxpoError
from .models import DiffusionModel
from .models.base import some
from .settings import Settings
from .update import MEASURED

MEASURINGS = 3  # of an update's size: what the model says now, once scaled, and without the LoRA
LEARNING = 3  # passes of learning from a pair: there, and twice as much back


def passes(settings: Settings) -> float:
    """What an update costs, in passes of one picture, without guidance, through the network."""
    guided = 2 if settings.guidance_scale > 1 else 1
    fresh = settings.images - (settings.noise == "own")
    held_out = len(settings.held_out_prompts) * max(settings.shown - 1, 1)
    sampled = (fresh + settings.shown + held_out) * settings.steps * guided
    pairs = settings.images * max(1, round(settings.timesteps * settings.steps))
    exact = settings.unconditional == "exact"
    learnt = pairs * LEARNING * (guided if exact else 1)
    if exact and settings.step_noise == "expected":
        learnt += pairs * (guided - 1)  # what it says unguided is asked for once more
    held = pairs * guided if settings.hold else 0
    return sampled + learnt + held + MEASURED * MEASURINGS * guided


class Pace:
    """A model's seconds per pass, as it was measured last."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model, self.per_pass = model, 0.0

    def seconds(self, settings: Settings) -> float:
        """What an update will take; 0 before anything was measured."""
        return passes(settings) * self.per_pass

    @torch.no_grad()
    def try_out(self) -> None:
        """Measure one pass of four pictures, before any update was timed; nothing where not even
        one of them fits into memory."""
        x_t, t = torch.zeros(4, *self.model.latent_shape), torch.zeros(4, dtype=torch.long)
        cond = self.model.encode([""] * len(x_t))

        def ask(part: slice) -> None:
            self.model.predict(x_t[part], t[part], some(cond, part))

        with suppress(PxpoError):
            for _ in range(2):  # the first is slower
                began = time.monotonic()
                for _ in self.model.fold("sample", len(x_t), ask):
                    pass
            self.per_pass = (time.monotonic() - began) / len(x_t)

    @contextmanager
    def timed(self, settings: Settings) -> Iterator[None]:
        """Measure an update that is made within; not one that is given up."""
        began = time.monotonic()
        yield
        self.per_pass = (time.monotonic() - began) / passes(settings)
