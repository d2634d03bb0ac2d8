"""What a run on disk may be: the one place that tells a run from what merely looks like one.

run.json is checked by the types of Record, each file of tensors by the names, types and shapes that
follow from it. A fault is a ValueError, or a PxpoError, that says where it is and what is wanted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Annotated, Any

import pydantic
from pydantic import AfterValidator, ConfigDict, FailFast, Field, FiniteFloat, StringConstraints
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from torch import Tensor, isfinite

from .checks import fault
from .lora import Lora
from .rewards import Painted, RewardSpec
from .rewards.painting import FULL, MOST_PIXELS
from .rewards.wish import MOST_PAINTED
from .run import Score, Update, shown_noise
from .settings import Settings

FORMAT = 5
"""Version of the files of a run."""

MOST_RECORD = 2**24
"""Bytes of a run.json: that of some 10,000 updates."""


def _this_version(number: int) -> int:
    if number != FORMAT:
        raise ValueError(
            f"it has format {number}, of another version; this one reads {FORMAT}. Go on with it "
            "in that version, or begin a new run from the LoRA in its folder lora/"
        )
    return number


def _finite(score: Score) -> Score:
    if not all(math.isfinite(value) for value in vars(score).values() if value is not None):
        raise ValueError(f"{score} is not finite")
    return score


def _filled(settings: Settings) -> Settings:
    if left := [name for name, value in settings.as_dict().items() if value is None]:
        raise ValueError(f"{left[0]} is left open")
    return settings


STRICT = ConfigDict(strict=True, extra="forbid")
File = Annotated[
    str,
    StringConstraints(pattern=r"^updates/([0-9]+|paint)-[0-9a-z]+\.safetensors$", max_length=100),
]
"""None of these is a device of Windows (CON), and none is another's but for its capitals."""

Filled = Annotated[Settings, AfterValidator(_filled)]


@dataclass(config=STRICT)
class LoraRecord:
    rank: int
    alpha: FiniteFloat


@dataclass(config=STRICT)
class UpdateRecord:
    """An update in run.json. Settings and RewardSpec check their values themselves."""

    file: File
    lora: LoraRecord
    reward: RewardSpec | None
    settings: Filled
    metrics: dict[str, FiniteFloat]
    scores: dict[str, Annotated[Score, AfterValidator(_finite)]]


@dataclass(config=STRICT)
class Record:
    """All of run.json."""

    format: Annotated[int, AfterValidator(_this_version)]
    model: str | None
    settings: Filled
    reward: RewardSpec | None
    paint: File | None
    updates: Annotated[list[UpdateRecord], Field(min_length=1), FailFast()]
    later: Annotated[int, Field(ge=0)]

    def __post_init__(self) -> None:
        if self.later >= len(self.updates):
            raise ValueError(
                f"later is {self.later}; the most it can be is {len(self.updates) - 1}"
            )

    @property
    def files(self) -> list[str]:
        """All that it names."""
        return [one.file for one in self.updates] + ([self.paint] if self.paint else [])


RECORD = pydantic.TypeAdapter(Record)


def read_record(file: IO[bytes]) -> Record:
    """What run.json says."""
    content = file.read(MOST_RECORD + 1)
    if len(content) > MOST_RECORD:
        raise ValueError(f"run.json is larger than {MOST_RECORD / 1e6:.0f} MB, the most it can be")
    try:
        record = RECORD.validate_json(content)
    except pydantic.ValidationError as error:
        raise ValueError(f"in run.json, {fault(error)}") from error
    name, times = Counter(record.files).most_common(1)[0]
    if times > 1:
        raise ValueError(f"in run.json, {name} is named twice")
    return record


Kind = tuple[str, tuple[int, ...]]
"""A tensor's type, by safetensors' name, and its shape."""


def read_update(file: Path, record: UpdateRecord, first: Update | None) -> Update:
    """An update, whose tensors are those of the run's first one but for their values; first is None
    where this is it."""
    settings = record.settings

    def kinds(found: Mapping[str, Kind]) -> dict[str, Kind]:
        lora = part(found, "lora.")
        size, latent = _shape(found, "shown")[1:3], _shape(found, "latent_reward")[1:]
        if first is not None:
            lora = {name: ("F32", tuple(w.shape)) for name, w in first.lora.weights.items()}
            size, latent = first.shown.shape[1:3], first.latent_reward.shape[1:]
        wanted: dict[str, Kind] = {
            "shown": ("U8", (len(shown_noise(settings)), *size, 3)),
            "latent_reward": ("F32", (settings.images if first else 0, *latent)),
        }
        wanted |= {f"lora.{name}": kind for name, kind in lora.items()}
        if any(name.startswith("optimizer.") for name in found):
            wanted["optimizer.step"] = ("F32", ())
            for moment in ("exp_avg", "exp_avg_sq"):
                wanted |= {f"optimizer.{moment}.{name}": kind for name, kind in lora.items()}
        return wanted

    tensors = _read(file, kinds)
    weights, optimizer = (part(tensors, prefix) for prefix in ("lora.", "optimizer."))
    if record.lora.rank != settings.rank:
        raise ValueError(f"the LoRA's rank is {record.lora.rank}, the settings' {settings.rank}")
    lora = Lora(record.lora.rank, record.lora.alpha, weights)
    for name, value in optimizer.items():
        if name == "step" and value < 1 or name.startswith("exp_avg_sq.") and (value < 0).any():
            raise ValueError(f"optimizer.{name} is below what AdamW can come to")
    return Update(
        settings, record.reward, lora, optimizer, tensors["shown"], tensors["latent_reward"],
        record.metrics, record.scores,
    )  # fmt: skip


def read_painted(file: Path, record: Record, first: Update) -> tuple[Painted, ...]:
    """What was painted; of a wish, on MOST_PAINTED pictures at most."""
    exact, size = record.reward is not None and record.reward.exact, first.shown.shape[1:3]

    def kinds(found: Mapping[str, Kind]) -> dict[str, Kind]:
        count = max(1, len(found) // 2)
        if count > MOST_PAINTED and not exact:
            raise ValueError(f"{count} pictures are painted; the most is {MOST_PAINTED}")
        wanted: dict[str, Kind] = {}
        for number in range(count):
            name = f"map.{number:06d}"
            shape = _shape(found, name)
            if len(shape) == 2 and not 0 < math.prod(shape) <= MOST_PIXELS:
                raise ValueError(f"{name} has the shape {shape}; the most is {MOST_PIXELS} pixels")
            wanted[name] = ("F32", shape if len(shape) == 2 else size)
            wanted[f"picture.{number:06d}"] = ("U8", (*size, 3))
        return wanted

    tensors = _read(file, kinds)
    maps, pictures = part(tensors, "map."), part(tensors, "picture.")
    for number, paint in maps.items():
        if paint.abs().max() > FULL:
            raise ValueError(f"map.{number} reaches {paint.abs().max():g}; the most is {FULL:g}")
    return tuple(Painted(pictures[number], maps[number]) for number in sorted(maps))


def _read(
    file: Path, kinds: Callable[[Mapping[str, Kind]], Mapping[str, Kind]]
) -> dict[str, Tensor]:
    """The tensors in a file, read once their kinds are as wanted; all of them must be finite.

    kinds: those that are found in the file to those that are wanted, by the tensors' names.
    """
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {n: (one.get_dtype(), tuple(one.get_shape())) for n, one in slices.items()}
            wanted = kinds(found)
            for name in sorted({*found, *wanted}):
                is_, must = (_words(of.get(name)) for of in (found, wanted))
                if is_ != must:
                    raise ValueError(f"{name!r} is {is_}; it must be {must}")
            tensors = {name: opened.get_tensor(name) for name in found}
    except SafetensorError as error:
        raise ValueError(f"it is no file of tensors ({error})") from error
    for name, tensor in tensors.items():
        if not isfinite(tensor).all():
            raise ValueError(f"{name!r} holds values that are not finite")
    return tensors


def _shape(found: Mapping[str, Kind], name: str) -> tuple[int, ...]:
    return found[name][1] if name in found else ()


def _words(kind: Kind | None) -> str:
    return f"{kind[0]} of the shape {kind[1]}" if kind else "left out"


def part(of: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What has a name that begins so, by the rest of its name."""
    return {n.removeprefix(prefix): value for n, value in of.items() if n.startswith(prefix)}
