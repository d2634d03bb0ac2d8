"""Every setting of a run: its default, its bounds, what it does. Validated when made.

The command line and the page read names, help, defaults and bounds from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from .errors import SettingError


def _setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its help and its limits: `low` and `high` inclusive, `above` not."""
    limits = {"help": help, "low": low, "high": high, "above": above, "choices": choices}
    return field(default=default, metadata=limits)


class _Validated:
    """Checks each field against the limits it was declared with."""

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, entry.name, checked(entry, getattr(self, entry.name)))


def kind_of(entry: Field) -> Callable[[Any], Any]:
    """The type of a setting: str, int or float."""
    return type(entry.default)


def checked(entry: Field, value: Any) -> Any:
    """`value` as the field's type, or a SettingError that names the value and the limit."""
    name, limits, kind = entry.name, entry.metadata, kind_of(entry)
    if limits["choices"]:
        if value not in limits["choices"]:
            raise SettingError(
                f"{name} is {value!r}; it must be one of {', '.join(limits['choices'])}."
            )
        return value
    if kind is str:
        if not isinstance(value, str):
            raise SettingError(f"{name} is {value!r}; it must be text.")
        return value
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or number != value or math.isnan(number):
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


@dataclass(frozen=True, kw_only=True)
class Sampling(_Validated):
    """How an image is sampled."""

    steps: int = _setting(20, "DDIM steps per image", low=1, high=1000)
    guidance_scale: float = _setting(3.0, "classifier-free guidance; 1 is none", low=1.0, high=30.0)
    eta: float = _setting(
        1.0, "noise added back at each step; 1 as DDPM, as in DDPO", above=0.0, high=1.0
    )


@dataclass(frozen=True, kw_only=True)
class Credit(_Validated):
    """How a reward map becomes the credit of each latent pixel."""

    credit: str = _setting(
        "pixel",
        "who earns a pixel's reward: that pixel (PXPO) or the image (DDPO)",
        choices=("pixel", "image"),
    )
    blur: float = _setting(
        0.0, "radius over which credit is shared, in latent pixels: 0 is PXPO, inf is DDPO", low=0.0
    )
    baseline: str = _setting(
        "location",
        "what a reward is measured against: nothing, the area painted in its colour, all pixels "
        "of all images (the paper), the same place in the other images, or in the earlier ones",
        choices=("none", "area", "global", "location", "past"),
    )


@dataclass(frozen=True, kw_only=True)
class Learning(_Validated):
    """How the LoRA learns from credited steps."""

    learning_rate: float = _setting(2e-3, "AdamW's learning rate", above=0.0, high=1.0)
    warmup: int = _setting(0, "updates of a learning rate that is still rising", low=0)
    decay: float = _setting(
        0.0, "share of the learning rate that is lost, evenly, over the epochs", low=0.0, high=1.0
    )
    momentum: float = _setting(
        0.9, "share of its running mean of the gradient that AdamW keeps", low=0.0, high=0.999
    )
    weight_decay: float = _setting(1e-4, "AdamW's weight decay", low=0.0, high=1.0)
    max_grad_norm: float = _setting(
        0.0, "the gradient is clipped to this norm; 0 never clips", low=0.0
    )
    step_weights: str = _setting(
        "flat",
        "how much each step weighs: as in Eq. 6, all alike, or in proportion to its noise",
        choices=("paper", "flat", "early"),
    )
    step_noise: str = _setting(
        "drawn",
        "whose noise a step answers for: the one drawn (Eq. 6), or its mean given the finished "
        "picture, which is less noisy and meant for eta = 1",
        choices=("drawn", "expected"),
    )
    hold: float = _setting(
        0.0,
        "pull towards the base model where the map says nothing (per-pixel KL)",
        low=0.0,
        high=1000.0,
    )
    hold_painted: float = _setting(
        0.0, "how much of that pull is left where the map says most", low=0.0, high=1.0
    )
    hold_growth: float = _setting(
        0.0,
        "that pull is multiplied by 1 + this times the share of the picture that praise fills",
        low=0.0,
        high=1000.0,
    )
    unconditional: str = _setting(
        "exact",
        "guidance's unconditional half: with its gradient, or detached (a third faster)",
        choices=("exact", "detached"),
    )
    timesteps: float = _setting(
        1.0, "share of the steps that are learnt from, drawn at random", above=0.0, high=1.0
    )


@dataclass(frozen=True, kw_only=True)
class Settings(Sampling, Credit, Learning):
    """Everything a run is made of, besides its model and its reward."""

    prompt: str = _setting("", "what to paint")
    seed: int = _setting(0, "the run's random seed", low=0, high=2**63 - 1)
    images: int = _setting(16, "images sampled per update", low=1, high=1024)
    epochs: int = _setting(10, "updates", low=1, high=100_000)
    noise: str = _setting(
        "fresh",
        "noise of the next images: all new, the same start with new steps, these two in turn, or "
        "all the same",
        choices=("fresh", "start", "turns", "whole"),
    )
    shown: int = _setting(
        4, "images on fixed noise, shown after each update: this seed's, then held-out ones",
        low=1, high=256,
    )  # fmt: skip
    rank: int = _setting(8, "the LoRA's rank", low=1, high=512)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline == "location" and self.images < 2:
            raise SettingError(
                f"baseline is 'location', which compares images, and needs at least 2; images is "
                f"{self.images}. Use more images, or baseline 'area' or 'none'."
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


EXPERIMENTS: Mapping[str, Mapping[str, Any]] = {
    "color": {"prompt": "red taxi in traffic", "images": 16, "epochs": 10, "hold": 0.3},
    "segment": {
        "prompt": "portrait of a man on the beach",
        "images": 10,
        "epochs": 16,
        "hold": 0.1,
    },
    "paint": {
        "prompt": "nature landscape",
        "images": 1,
        "epochs": 15,
        "noise": "turns",
        "baseline": "past",
        "step_weights": "early",
        "step_noise": "expected",
        "unconditional": "detached",
        "learning_rate": 1e-2,
        "warmup": 3,
        "decay": 0.9,
        "momentum": 0.95,
        "hold": 0.3,
        "hold_painted": 0.5,
        "hold_growth": 4.0,
    },
}
"""What each of the paper's three experiments changes of the defaults above. In "paint" each picture
is painted anew, by a segmenter in a person's stead."""

_CONSTANT = {"warmup": 0, "decay": 0.0, "momentum": 0.9}

PAINTED: Mapping[str, Any] = {
    "noise": "whole",
    "baseline": "area",
    "learning_rate": 3e-3,
    **_CONSTANT,
    "hold": 1.0,
    "hold_painted": 0.0,
    "hold_growth": 0.0,
}
"""What paint that stays for several steps changes of "paint": the picture must stay as well, and
more of it is held, lest its noise be over-fitted."""

_EQ_6 = {"step_weights": "paper", "step_noise": "drawn", "unconditional": "exact", "hold": 0.0}

PAPER: Mapping[str, Mapping[str, Any]] = {
    "color": {"baseline": "global", **_EQ_6},
    "segment": {"baseline": "global", **_EQ_6},
    "paint": {
        "noise": "fresh",
        "baseline": "none",
        "learning_rate": 4e-3,
        **_CONSTANT,
        **_EQ_6,
    },
}
"""The paper's exact recipe, Eq. 6 unchanged, on top of the experiment."""


def settings_for(experiment: str, *, paper: bool = False, **changes: Any) -> Settings:
    """The defaults of one of EXPERIMENTS, or the paper's recipe for it, with `changes` on top."""
    if experiment not in EXPERIMENTS:
        raise SettingError(
            f"experiment is {experiment!r}; it must be one of {', '.join(EXPERIMENTS)}."
        )
    preset = {**EXPERIMENTS[experiment], **(PAPER[experiment] if paper else {}), **changes}
    unknown = sorted(set(preset) - {entry.name for entry in fields(Settings)})
    if unknown:
        raise SettingError(f"there is no setting called {', '.join(unknown)}.")
    return Settings(**preset)
