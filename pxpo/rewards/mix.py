"""Several rewards at once: the sum of their maps, each with a weight.

python -m pxpo mix --part "1 color --color blue" --part "0.5 own --reward mine.py:Sharpness"
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import RewardError
from .base import Option, Reward, RewardKind, RewardSpec, Tools


def parts_of(part: Sequence[str]) -> list[tuple[float, RewardSpec]]:
    """The weights and rewards in texts such as "0.5 color --color blue --more"."""
    return [_part(text) for text in part]


def _part(text: str) -> tuple[float, RewardSpec]:
    try:
        weight, kind, *words = shlex.split(text)
        number = float(weight)
        if not math.isfinite(number):
            raise ValueError
    except ValueError:
        raise RewardError(
            f"part is {text!r}; it must be a weight and a reward with its options, e.g. "
            "'0.5 color --color blue'."
        ) from None
    if kind == KIND.name:
        raise RewardError(f"part is {text!r}; a mix is of other rewards, so list its parts here.")
    return number, _spec(kind, words)


def read_spec(text: str) -> RewardSpec:
    """The reward in a text such as "segment --labels Hair"."""
    try:
        kind, *words = shlex.split(text)
    except ValueError:
        raise RewardError(
            f"the reward is {text!r}; it must be one with its options, e.g. "
            "'segment --labels Hair'."
        ) from None
    return _spec(kind, words)


def _spec(kind: str, words: Sequence[str]) -> RewardSpec:
    return RewardSpec(kind, _read(words, RewardSpec(kind).declared))


def _read(words: Sequence[str], kind: RewardKind) -> dict[str, Any]:
    """The options in words as the kind's own command takes them."""
    known, options = {f"--{option.name}": option for option in kind.options}, dict[str, Any]()
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag not in known or (equals and isinstance(known[flag].default, bool)):
            raise RewardError(
                f"the reward {kind.name!r} has no option {word!r}; it has {', '.join(known)}."
            )
        name, default = known[flag].name, known[flag].default
        if isinstance(default, bool):
            options[name] = True
            continue
        if not equals and (value := next(rest, "")) == "":
            raise RewardError(f"{flag} of the reward {kind.name!r} needs a value.")
        options[name] = (*options.get(name, ()), value) if isinstance(default, tuple) else value
    return options


def _text(weight: float, spec: RewardSpec) -> str:
    words = []
    for name, value in spec.options.items():
        if isinstance(value, bool):
            words += [f"--{name}"] * value
        else:
            values = value if isinstance(value, tuple) else (value,) if value else ()
            words += [f"--{name}={one}" for one in values]
    return shlex.join([str(weight), spec.kind, *words])


def _recorded(part: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {"part": tuple(_text(weight, spec.recorded()) for weight, spec in parts_of(part))}


def _words(part: Sequence[str]) -> str:
    return " + ".join(f"{weight:g} × {spec.name}" for weight, spec in parts_of(part)) or "a mix"


def _make(tools: Tools, part: Sequence[str]) -> Reward:
    parts = parts_of(part)
    if not parts:
        raise RewardError("nothing is mixed; name at least one --part 'WEIGHT REWARD [OPTIONS]'.")
    if hand := [spec.kind for _, spec in parts if spec.by_hand]:
        raise RewardError(f"what a person paints cannot be mixed; give {hand[0]!r} its labels.")
    judges = [(weight, spec.make(tools)) for weight, spec in parts]

    def judge(images: Tensor) -> Tensor:
        return sum((weight * one(images) for weight, one in judges), images.new_zeros(()))

    return judge


KIND = RewardKind(
    name="mix",
    title="Mix",
    help="several rewards with weights",
    options=(
        Option("part", (), "WEIGHT REWARD [OPTIONS] as that command has it, '0.5 color --more'"),
    ),
    words=_words,
    make=_make,
    public=False,
    recorded=_recorded,
)
