"""A run on disk: one folder, or a zip of it, for the page, the API and the command line alike.

run.json                          all that is words and numbers, of the run and of each update
updates/0003-….safetensors        an update's tensors, written once
updates/paint-….safetensors       what was painted, and on which pictures
lora/                             the finished LoRA, for people; not read again
"""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors
from torch import Tensor

from .embedded import TINY_WORLD
from .errors import PxpoError, RunError
from .lora import digest
from .record import FORMAT, part, read_painted, read_record, read_update
from .rewards import Painted
from .run import Run, Update

LOCK = ".in-use"
"""The file that a process locks in a folder that it works in."""


def new_folder(parent: Path, name: str) -> Path:
    """A new folder `parent`/`name`-1, -2, ...; of two who ask at once each gets its own."""
    for number in itertools.count(1):
        folder = Path(parent) / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise cannot_save(folder, error) from error
        return folder
    raise AssertionError("unreachable")


def check_free(folder: Path) -> None:
    """RunError where there is a run in `folder` already."""
    if (folder / "run.json").exists() or (folder / "updates").exists():
        raise RunError(
            f"{folder} holds a run already; go on with `python -m pxpo resume {folder}`."
        )


def check_writable(folder: Path) -> None:
    """RunError where nothing can be written into `folder`, or made in what it is to lie in."""
    there = next(one for one in (folder, *folder.resolve().parents) if one.exists())
    try:
        trial = there / f".{secrets.token_hex(4)}"
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise cannot_save(folder, error) from error


def claim(folder: Path) -> Path:
    """Make `folder`, which may be there already, a new run's own; RunError where one has it."""
    check_free(folder)
    try:
        (folder / "updates").mkdir(parents=True)
    except FileExistsError:  # by another one who asked at the same time
        check_free(folder)
        raise
    except OSError as error:
        raise cannot_save(folder, error) from error
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
            for number, one in enumerate(run.updates + run.later)
        ]
        record = {
            "format": FORMAT,
            "model": None if Path(run.model_name) == TINY_WORLD else run.model_name,
            "settings": run.settings.as_dict(),
            "reward": run.reward and run.reward.as_dict(),
            "paint": _written(folder, *_paint_file(run)) if run.painted else None,
            "updates": updates,
            "later": len(run.later),
        }
        write_whole(folder / "run.json", json.dumps(record, indent=2).encode())
        kept = {
            folder / name for name in [*(one["file"] for one in updates), record["paint"] or ""]
        }
    except OSError as error:
        raise cannot_save(folder, error) from error
    with suppress(OSError):  # the run is saved; what cannot be cleared away now will be next time
        for stale in {*(folder / "updates").iterdir()} - kept:
            stale.unlink()


def at_rest(run: Run, folder: Path) -> Run:
    """The run, which was saved in `folder` but for its newest update, with the one before as it
    lies there.

    What was read from a file takes no memory: the system reads it again when it is looked at. So a
    run that rests after each update takes as much as its newest one.
    """
    if not run.count:
        return run
    *earlier, one, newest = run.updates
    name, _ = _update_file(len(earlier), one)
    try:
        resting = _resting(one, Path(folder) / name)
    except (OSError, SafetensorError):
        return run
    return replace(run, updates=(*earlier, resting, newest))


def _resting(one: Update, file: Path) -> Update:
    """The update as it lies in its file."""
    tensors = safe_open(file, "pt")
    return replace(
        one, lora=replace(one.lora, weights=OnDisk(tensors, "lora.")),
        optimizer=OnDisk(tensors, "optimizer."), shown=tensors.get_tensor("shown"),
        latent_reward=tensors.get_tensor("latent_reward"),
    )  # fmt: skip


class OnDisk(Mapping[str, Tensor]):
    """The tensors of an open file whose names begin with `prefix`, made when they are asked for: an
    update has hundreds, and kept they would take half a MiB but for their values."""

    def __init__(self, file: Any, prefix: str) -> None:
        self.file, self.prefix = file, prefix

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.file.get_tensor(self.prefix + name)
        except SafetensorError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(part(dict.fromkeys(self.file.keys()), self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __reduce__(self) -> tuple[Any, ...]:  # for another process: its values
        return dict, (dict(self),)


def load_run(folder: Path) -> Run:
    """The run that `save_run` wrote into `folder`; RunError where there is none, or any part of it
    cannot be so."""
    folder, updates, painted = Path(folder), list[Update](), tuple[Painted, ...]()
    try:
        with open(folder / "run.json", "rb") as file:
            record = read_record(file)
        for one in record.updates:
            with _named(one.file):
                first = updates[0] if updates else None
                read = read_update(folder / one.file, one, first)
                updates.append(_resting(read, folder / one.file))
        if record.paint:
            with _named(record.paint):
                painted = read_painted(folder / record.paint, record, updates[0])
    except (OSError, ValueError, PxpoError) as error:
        raise _no_run(error) from error
    model_name, now = record.model or str(TINY_WORLD), len(updates) - record.later
    gone_to, later = tuple(updates[:now]), tuple(updates[now:])
    return Run(record.settings, model_name, gone_to, record.reward, later, painted)


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
    """Write the run in `folder`, and its finished LoRA, into a zip that `unpack` takes. Nothing is
    compressed: it would take a hundred times as long, and save a tenth.

    Raises RunError where there is none (any more).
    """
    try:
        with open(folder / "run.json", "rb") as file:
            named = [folder / name for name in ("run.json", *read_record(file).files)]
    except (OSError, ValueError) as error:
        raise _no_run(error) from error
    try:
        with whole(archive) as target, zipfile.ZipFile(target, "w") as packed:
            for path in [*named, *sorted((folder / "lora").glob("*"))]:
                if path.is_file():
                    packed.write(path, path.relative_to(folder).as_posix())
    except OSError as error:
        raise cannot_save(archive.parent, error) from error
    return archive


def unpack(
    archive: Path, folder: Path, most_bytes: float = math.inf, most_updates: float = math.inf,
    make_room: Callable[[int], object] = lambda size: None,
) -> None:  # fmt: skip
    """Write the files that the run in a zip names, and nothing else, into `folder`.

    make_room: is told before how many bytes they take. Raises RunError for what is no run, or is
    larger than may be, and whatever `make_room` does.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            there = {info.filename: info for info in packed.infolist()}
            if "run.json" not in there:
                raise ValueError("run.json is not in the zip")
            with packed.open("run.json") as file:
                record = read_record(file)
            if (count := len(record.updates) - 1) > most_updates:
                raise ValueError(
                    f"it has {count} updates; the most that a run may have here is {most_updates}, "
                    "and on the command line there is no such limit"
                )
            names = ["run.json", *record.files]
            if missing := [name for name in names if name not in there]:
                raise ValueError(f"{missing[0]} is not in the zip")
            size = sum(there[name].file_size for name in names)
            if size > most_bytes:
                raise ValueError(
                    f"it is {size / 1e9:.1f} GB; the most that is taken in here is "
                    f"{most_bytes / 1e9:.1f} GB"
                )
            make_room(size)
            for name in names:
                packed.extract(there[name], folder)
    except RunError:
        raise
    except Exception as error:  # zipfile and its decompressors raise nearly any
        raise _no_run(error) from error


def write_whole(path: Path, content: bytes) -> None:
    """All of `content` or nothing."""
    with whole(path) as file:
        file.write(content)


def size_of(folder: Path) -> int:
    """Bytes of all files in it."""
    size = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # it may be gone by now
                size += os.lstat(os.path.join(place, name)).st_size
    return size


def keep_others_out(folder: Path) -> IO:
    """Make `folder`, and keep it for this process until the file that is returned is closed.

    Raises RunError where another process keeps it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "ab")  # noqa: SIM115  # it stays open
    except OSError as error:
        raise cannot_save(folder, error) from error
    try:
        _lock(file)
    except BlockingIOError as error:
        file.close()
        raise RunError(
            f"another process works in {str(folder)!r}; wait for its end or stop it, or choose "
            "another folder (--runs, --out)."
        ) from error
    return file


def _lock(file: IO) -> None:
    """BlockingIOError where another process has it; its end, however it comes, sets it free."""
    try:
        try:
            import fcntl
        except ModuleNotFoundError:  # on Windows
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise BlockingIOError from error
    except OSError:  # a disk that knows no locks
        pass


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that is there once all is written, or else not at all: a temporary neighbour first,
    then renamed.

    The neighbour is closed by then, as Windows renames no open file, and made by `open`, so that it
    has ordinary permissions.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def _named(file: str) -> Iterator[None]:
    """What is wrong with a file of the run, with its name."""
    try:
        yield
    except (ValueError, PxpoError) as error:
        raise ValueError(f"{file}: {error}") from error


def _no_run(error: Exception) -> RunError:
    reason = (str(error) or repr(error)).rstrip(".")
    return RunError(
        f"no run can be read: {reason}. It must be a folder with a run.json and the updates that "
        "it names, or a zip of one."
    )


def cannot_save(folder: Path, error: OSError | SafetensorError) -> RunError:
    """What is said where the disk refuses."""
    return RunError(
        f"the run cannot be saved in {str(folder)!r} ({getattr(error, 'strerror', '') or error}); "
        "free some space or choose another folder. Nothing that was saved before is lost."
    )


def _written(folder: Path, name: str, tensors: Callable[[], dict[str, Tensor]]) -> str:
    """Write a file of the run unless it is there already; its name, which tells its content."""
    if not (folder / name).exists():
        write_whole(folder / name, safetensors(tensors()))
    return name


def _update_file(number: int, one: Update) -> tuple[str, Callable[[], dict[str, Tensor]]]:
    """Its name, which tells it from another update of the same number, made after going back; and
    what is in it."""

    def tensors() -> dict[str, Tensor]:
        lora = {f"lora.{name}": value for name, value in one.lora.weights.items()}
        optimizer = {f"optimizer.{name}": value for name, value in one.optimizer.items()}
        return {"shown": one.shown, "latent_reward": one.latent_reward, **lora, **optimizer}

    told_by = digest([one.latent_reward]) + one.lora.digest
    return f"updates/{number:04d}-{told_by}.safetensors", tensors


def _paint_file(run: Run) -> tuple[str, Callable[[], dict[str, Tensor]]]:
    tensors = {f"map.{number:06d}": one.paint for number, one in enumerate(run.painted)}
    for number, one in enumerate(run.painted):  # a file's tensors share no memory
        tensors[f"picture.{number:06d}"] = one.picture.clone()
    return f"updates/paint-{digest(tensors.values())}.safetensors", lambda: tensors
