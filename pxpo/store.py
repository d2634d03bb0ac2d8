"""A run on disk: one folder, or a zip of it, for the page, the API and the command line alike.

run.json                          all that is words and numbers, of the run and of each update
updates/0003-….safetensors        an update's tensors, written once
updates/paint-….safetensors       what was painted, and on which pictures
lora/                             the finished LoRA, for people; not read again
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors
from torch import Tensor

from .embedded import TINY_WORLD
from .errors import RunError
from .lora import Lora
from .rewards import Painted, RewardSpec
from .run import Run, Score, Update
from .settings import Settings

FORMAT = 4
"""Version of the files that `save_run` writes."""

FILES = re.compile(r"run\.json|updates/[\w-][\w.-]*\.safetensors")
"""The files of a run, by their names in its folder; a run that names another one is refused."""


def new_folder(parent: Path, name: str) -> Path:
    """A new folder `parent`/`name`-1, -2, ...; of two who ask at once each gets its own."""
    for number in itertools.count(1):
        folder = Path(parent) / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise _cannot_save(folder, error) from error
        return folder
    raise AssertionError("unreachable")


def check_free(folder: Path) -> None:
    """RunError where there is a run in `folder` already."""
    if (folder / "run.json").exists() or (folder / "updates").exists():
        raise RunError(
            f"{folder} holds a run already; go on with `python -m pxpo resume {folder}`."
        )


def claim(folder: Path) -> Path:
    """Make `folder`, which may be there already, a new run's own; RunError where one has it."""
    check_free(folder)
    try:
        (folder / "updates").mkdir(parents=True)
    except FileExistsError:  # by another one who asked at the same time
        check_free(folder)
        raise
    except OSError as error:
        raise _cannot_save(folder, error) from error
    return folder


def save_run(run: Run, folder: Path) -> None:
    """Write the run into `folder`, so that `load_run` goes on bit for bit, even after a crash.

    Each update's tensors are a file of their own, written once; `run.json` names those that count
    and is replaced last, in one piece. Raises RunError when the disk refuses.
    """
    folder = Path(folder)
    try:
        (folder / "updates").mkdir(parents=True, exist_ok=True)
        updates = [
            {
                "file": _written(folder, *_update_file(number, one)),
                "lora": {"rank": one.lora.rank, "alpha": one.lora.alpha},
                **one.as_dict(),
            }
            for number, one in enumerate(run.updates)
        ]
        record = {
            "format": FORMAT,
            "model": None if Path(run.model_name) == TINY_WORLD else run.model_name,
            "settings": run.settings.as_dict(),
            "reward": run.reward and run.reward.as_dict(),
            "paint": _written(folder, *_paint_file(run)) if run.painted else None,
            "updates": updates,
        }
        write_whole(folder / "run.json", json.dumps(record, indent=2).encode())
        for stale in {*(folder / "updates").iterdir()} - {folder / name for name in _named(record)}:
            stale.unlink()
    except OSError as error:
        raise _cannot_save(folder, error) from error


def load_run(folder: Path) -> Run:
    """The run that `save_run` wrote into `folder`; RunError when there is none to be read.

    Raises LoraError for a LoRA that cannot be.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise RunError(
                f"the run in {str(folder)!r} has format {record['format']}, of another version; "
                f"this one reads {FORMAT}. Go on with it in that version, or begin a new run from "
                "the LoRA in its folder lora/."
            )
        if outside := [name for name in _named(record) if not FILES.fullmatch(name)]:
            raise RunError(f"the run in {str(folder)!r} names {outside[0]!r}, outside of it.")
        updates = tuple(_update(one, load_file(folder / one["file"])) for one in record["updates"])
        if not updates:
            raise ValueError("no updates")
        paint = load_file(folder / record["paint"]) if record["paint"] else {}
        return Run(
            Settings(**record["settings"]),
            record["model"] or str(TINY_WORLD),
            updates,
            _spec(record["reward"]),
            tuple(
                Painted(paint[f"picture.{number:06d}"], paint[f"map.{number:06d}"])
                for number in range(len(paint) // 2)
            ),
        )
    except (OSError, AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise RunError(
            f"no run can be read from {str(folder)!r} ({type(error).__name__}: {error}); it must "
            "be a folder with a run.json and the updates it names, or a zip of one."
        ) from error


def open_run(place: Path) -> tuple[Run, Path]:
    """The run in a folder or in a zip, and its folder: for a zip a new one beside it."""
    place = Path(place)
    if not place.is_file():
        return load_run(place), place
    folder = new_folder(place.parent, place.stem)
    try:
        unpack(place, folder)
        return load_run(folder), folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def pack(folder: Path, archive: Path) -> Path:
    """Write the run in `folder`, and its finished LoRA, into a zip that `unpack` takes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder).as_posix()
            if file.is_file() and (FILES.fullmatch(name) or file.parent == folder / "lora"):
                packed.write(file, name)
    return archive


def unpack(archive: Path, folder: Path, most_bytes: float = math.inf) -> None:
    """Write the files of the run in a zip, and nothing else, into `folder`, of this many bytes.

    Raises RunError for what is no run, or is too large.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            wanted = [i for i in packed.infolist() if FILES.fullmatch(i.filename)]
            size = sum(info.file_size for info in wanted)
            if size > most_bytes:
                raise RunError(
                    f"the run is {size / 1e9:.1f} GB; the most that is taken in here is "
                    f"{most_bytes / 1e9:.1f} GB."
                )
            if "run.json" not in packed.namelist():
                raise ValueError("it has no run.json")
            for info in wanted:
                packed.extract(info, folder)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(
            f"{Path(archive).name!r} is not a run of this program, packed in a zip ({error})."
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """All of `content` or nothing: into a temporary neighbour first, then renamed.

    The neighbour is closed by then, as Windows renames no open file, and made by `open`, so that it
    has ordinary permissions.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _cannot_save(folder: Path, error: OSError) -> RunError:
    return RunError(
        f"the run cannot be saved in {str(folder)!r} ({error.strerror or error}); "
        "free some space or choose another folder. Nothing that was saved before is lost."
    )


def _written(folder: Path, name: str, tensors: dict[str, Tensor]) -> str:
    """Write a file of the run unless it is there already; its name, which tells its content."""
    if not (folder / name).exists():
        write_whole(folder / name, safetensors(tensors))
    return name


def _named(record: dict[str, Any]) -> list[str]:
    """All files that a run.json names."""
    return [one["file"] for one in record["updates"]] + [record["paint"]] * bool(record["paint"])


def _update_file(number: int, one: Update) -> tuple[str, dict[str, Tensor]]:
    """Its name tells it from another update of the same number, made after going back."""
    tensors = {"shown": one.shown, "latent_reward": one.latent_reward}
    tensors |= {f"lora.{name}": value for name, value in one.lora.weights.items()}
    tensors |= {f"optimizer.{name}": value for name, value in one.optimizer.items()}
    digest = _digest([one.latent_reward, *one.lora.weights.values()])
    return f"updates/{number:04d}-{digest}.safetensors", tensors


def _paint_file(run: Run) -> tuple[str, dict[str, Tensor]]:
    tensors = {f"map.{number:06d}": one.paint for number, one in enumerate(run.painted)}
    for number, one in enumerate(run.painted):  # a file's tensors share no memory
        tensors[f"picture.{number:06d}"] = one.picture.clone()
    return f"updates/paint-{_digest(tensors.values())}.safetensors", tensors


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _update(record: dict[str, Any], tensors: dict[str, Tensor]) -> Update:
    def part(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    return Update(
        Settings(**record["settings"]),
        _spec(record["reward"]),
        Lora(**record["lora"], weights=part("lora.")),
        part("optimizer."),
        tensors["shown"],
        tensors["latent_reward"],
        record["metrics"],
        {name: Score(**score) for name, score in record["scores"].items()},
    )


def _spec(record: dict[str, Any] | None) -> RewardSpec | None:
    return RewardSpec(**record) if record else None
