"""Every setting of a run: its default, its bounds, what it does. Validated when made.

The command line and the page read names, help, defaults and bounds from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from .checks import TEXT, is_text
from .errors import SettingError


def _setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    kind: type | None = None,
    several: bool = False,
) -> Any:
    """A dataclass field with its help and its limits: `low` and `high` inclusive, `above` not.

    kind: its type, where the default is None: left open, it takes the model's own. several: it may
    be several texts, one a line.
    """
    limits = {"help": help, "low": low, "high": high, "above": above, "choices": choices,
              "kind": kind or type(default), "several": several}  # fmt: skip
    return field(default=default, metadata=limits)


class _Validated:
    """Checks each field against the limits it was declared with."""

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, entry.name, checked(entry, getattr(self, entry.name)))


def kind_of(entry: Field) -> Callable[[Any], Any]:
    """The type of a setting: str, int or float."""
    return entry.metadata["kind"]


def checked(entry: Field, value: Any) -> Any:
    """`value` as the field's type, or a SettingError that names the value and the limit."""
    name, limits, kind = entry.name, entry.metadata, kind_of(entry)
    if value is None and entry.default is None:
        return None
    if limits["choices"]:
        if value not in limits["choices"]:
            raise SettingError(
                f"{name} is {value!r}; it must be one of {', '.join(limits['choices'])}."
            )
        return value
    if kind is str:
        if not is_text(value):
            raise SettingError(f"{name} is {value!r}; it must be {TEXT}.")
        return value
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or number != value:  # as NaN is not itself
        wanted = "a whole number" if kind is int else "a number"
        raise SettingError(f"{name} is {value!r}; it must be {wanted}.")
    low, high, above = limits["low"], limits["high"], limits["above"]
    if above is not None and not number > above:
        raise SettingError(f"{name} is {value}; it must be greater than {above:g}.")
    if low is not None and number < low:
        raise SettingError(f"{name} is {value}; the least it can be is {low:g}.")
    if high is not None and number > high:
        raise SettingError(f"{name} is {value}; the most it can be is {high:g}.")
    return number


MOST_RANK = 512

LARGEST_SEED = 2**53 - 1
"""The largest whole number up to which a browser counts, and JSON carries, without rounding."""


@dataclass(frozen=True, kw_only=True)
class Sampling(_Validated):
    """How an image is sampled. What is None is left open; `DiffusionModel.filled` fills it."""

    steps: int = _setting(None, "DDIM steps per image", low=1, high=1000, kind=int)
    guidance_scale: float = _setting(
        None, "classifier-free guidance; 1 is none", low=1.0, high=30.0, kind=float
    )
    eta: float = _setting(
        1.0, "noise added back at each step; 1 as DDPM, as in DDPO", above=0.0, high=1.0
    )


@dataclass(frozen=True, kw_only=True)
class Credit(_Validated):
    """How a reward map becomes the credit of each latent pixel."""

    blur: float = _setting(
        0.0, "radius over which credit is shared, in latent pixels: 0 is PXPO, inf is DDPO", low=0.0
    )
    baseline: str = _setting(
        "location",
        "what a reward is measured against: nothing, all pixels of all images (the paper), or the "
        "same place in the other images",
        choices=("none", "global", "location"),
    )


@dataclass(frozen=True, kw_only=True)
class Learning(_Validated):
    """How the LoRA learns from credited steps."""

    strength: float = _setting(
        0.03,
        "how far an update moves what the model says, relative to what it said; 0 leaves the size "
        "of its step to learning_rate",
        low=0.0,
        high=1.0,
    )
    learning_rate: float = _setting(
        1e-3, "AdamW's learning rate, where strength is 0", above=0.0, high=1.0
    )
    hold: float = _setting(
        0.1,
        "pull towards the base model where the reward says nothing (per-pixel KL)",
        low=0.0,
        high=1000.0,
    )
    step_noise: str = _setting(
        "expected",
        "the noise that a step is praised or blamed for: as drawn (Eq. 6), or its mean given the "
        "finished picture, which is far less random and as large at each step",
        choices=("drawn", "expected"),
    )
    unconditional: str = _setting(
        "detached",
        "guidance's unconditional half: with its gradient, or detached (a third faster)",
        choices=("exact", "detached"),
    )
    timesteps: float = _setting(
        0.25, "share of the steps that are learnt from, drawn at random", above=0.0, high=1.0
    )


@dataclass(frozen=True, kw_only=True)
class Settings(Sampling, Credit, Learning):
    """Everything a run is made of, besides its model and its reward."""

    prompt: str = _setting("", "what to paint; each update draws from several", several=True)
    held_out_prompt: str = _setting(
        "", "shown and judged after each update, and never learnt on", several=True
    )
    seed: int = _setting(0, "the run's random seed", low=0, high=LARGEST_SEED)
    images: int = _setting(None, "images sampled per update", low=1, high=1024, kind=int)
    updates: int = _setting(10, "updates", low=1, high=100_000)
    noise: str = _setting(
        "own",
        "noise of an update's images: that of the run's own picture for the first and new noise "
        "for the others, or new noise for all",
        choices=("own", "fresh"),
    )
    shown: int = _setting(
        4, "images on fixed noise, shown after each update: this seed's, then held-out ones",
        low=1, high=256,
    )  # fmt: skip
    rank: int = _setting(8, "the LoRA's rank", low=1, high=MOST_RANK)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline == "location" and self.images == 1:
            raise SettingError(
                "baseline is 'location', which compares images, and needs at least 2; images is 1. "
                "Use more images, or baseline 'none'."
            )
        if both := sorted({*self.prompts} & {*self.held_out_prompts}):
            raise SettingError(
                f"held_out_prompt is {both[0]!r}, which is a prompt to learn on; hold out another."
            )

    @property
    def prompts(self) -> tuple[str, ...]:
        """Those of `prompt`, one a line: the first is the shown picture's."""
        return _lines(self.prompt) if "\n" in self.prompt else (self.prompt,)

    @property
    def held_out_prompts(self) -> tuple[str, ...]:
        return _lines(self.held_out_prompt)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _lines(text: str) -> tuple[str, ...]:
    """Its lines, but empty ones and repetitions."""
    return tuple(dict.fromkeys(filter(None, map(str.strip, text.split("\n")))))


EXPERIMENTS: Mapping[str, Mapping[str, Any]] = {
    "color": {"prompt": "red taxi in traffic", "images": 16, "updates": 10},
    "segment": {"prompt": "portrait of a man on the beach", "images": 10, "updates": 16},
    "paint": {"prompt": "nature landscape", "updates": 8},
}
"""The paper's three experiments: prompts and budgets. How they learn is the same for all."""

_EQ_6 = {
    "noise": "fresh",
    "baseline": "global",
    "strength": 0.0,
    "learning_rate": 2e-3,
    "hold": 0.0,
    "step_noise": "drawn",
    "unconditional": "exact",
    "timesteps": 1.0,
}

PAPER: Mapping[str, Mapping[str, Any]] = {
    "color": _EQ_6,
    "segment": _EQ_6,
    "paint": {**_EQ_6, "images": 1, "updates": 15, "baseline": "none", "learning_rate": 4e-3},
}
"""The paper's exact recipe, Eq. 6 unchanged, on top of the experiment."""


def settings_for(experiment: str, *, paper: bool = False, **changes: Any) -> Settings:
    """The settings of one of EXPERIMENTS, or the paper's recipe for it, with `changes` on top."""
    if experiment not in EXPERIMENTS:
        raise SettingError(
            f"experiment is {experiment!r}; it must be one of {', '.join(EXPERIMENTS)}."
        )
    preset = {**EXPERIMENTS[experiment], **(PAPER[experiment] if paper else {}), **changes}
    unknown = sorted(set(preset) - {entry.name for entry in fields(Settings)})
    if unknown:
        raise SettingError(f"there is no setting called {', '.join(unknown)}.")
    return Settings(**preset)
