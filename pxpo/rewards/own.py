"""A reward from a Python file of one's own: python -m pxpo own --reward mine.py:Sharpness

NAME is a function of images (B, 3, H, W) in [0, 1] to maps (B, H, W), a class whose objects are
that, made without arguments, or a RewardKind, taken with its options' defaults. It is code, so only
Tools with `code` run it, those of the command line, and only as it was when it was recorded. A run
names the file, and never holds it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PxpoError, RewardError
from .base import Option, Reward, RewardKind, Tools, checked_maps


def place_of(reward: str) -> tuple[Path, str, str]:
    """The file, the name and the digest, if there is one yet, in "FILE.py:NAME#DIGEST"."""
    file, _, name = reward.rpartition(":")
    name, _, digest = name.partition("#")
    if not file.endswith(".py") or not name.isidentifier():
        raise RewardError(f"reward is {reward!r}; it must be FILE.py:NAME, e.g. mine.py:Sharpness.")
    return Path(file), name, digest


def recorded(reward: str) -> dict[str, str]:
    """With the whole path, and the file's digest as it is now unless it has one already."""
    file, name, digest = place_of(reward)
    return {"reward": f"{file.resolve()}:{name}#{digest or _digest(_content(file))}"}


def _words(reward: str) -> str:
    if not reward:
        return "a reward of one's own"
    file, name, _ = place_of(reward)
    return f"{name} of {file.name}"


def _make(tools: Tools, reward: str) -> Reward:
    if not tools.code:
        raise RewardError(
            f"{_words(reward)} is code from a file, which only the command line runs; take another "
            "reward here."
        )
    return tools.load(_load, reward)


def _load(reward: str, device: str) -> Reward:
    """The reward, checked each time that it judges."""
    path, name, digest = place_of(reward)
    content = _content(path)
    if digest != _digest(content):
        raise RewardError(
            f"{path} is not as it was recorded, so it has changed since; put it back, or name it "
            f"anew: resume RUN --reward {path}:{name}"
        )
    with _blaming(path):
        what = getattr(_module(path), name, None)
        if isinstance(what, RewardKind):
            defaults = {option.name: option.default for option in what.options}
            what = what.make(Tools(device), **defaults)
        elif isinstance(what, type):
            what = what()
    if not callable(what):
        raise RewardError(f"{path} has no function, class or RewardKind called {name}.")
    return _checked(what, path)


def _checked(what: Any, path: Path) -> Reward:
    """`what` as a reward whose errors name the file, the line and what is wrong."""

    def judge(images: Tensor) -> Tensor:
        with _blaming(path), torch.no_grad():
            maps = what(images.clone())
        try:
            maps = checked_maps(maps, len(images))
        except RewardError as error:
            raise RewardError(f"{path}, line {_line(what)}: {error}") from error
        if maps.shape[1:] != images.shape[2:]:
            raise RewardError(
                f"{path}, line {_line(what)}: the maps have the shape {tuple(maps.shape)}; for "
                f"images of {tuple(images.shape)} they must be as high and wide."
            )
        return maps

    return judge


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Any error as one line that says where in the file it came from."""
    try:
        yield
    except PxpoError:
        raise
    except Exception as error:
        calls = traceback.extract_tb(error.__traceback__)
        lines = [call.lineno for call in calls if call.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None) or 1
        words = " ".join(str(error).split())
        raise RewardError(f"{path}, line {line}: {type(error).__name__}: {words}") from error


def _line(what: Any) -> int:
    """Where a function, or what an object does when it is called, begins."""
    for one in (what, getattr(what, "forward", None), type(what).__call__):
        code = getattr(inspect.unwrap(one) if callable(one) else one, "__code__", None)
        if code is not None:
            return code.co_firstlineno
    return 1


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RewardError(
            f"the reward's file {str(path)!r} cannot be read ({error.strerror}); if it was moved, "
            "say where it is: resume RUN --reward FILE.py:NAME"
        ) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _module(path: Path) -> Any:
    """The file as a module, which finds others in its folder, as if Python were started with it."""
    spec = importlib.util.spec_from_file_location(f"own_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


KIND = RewardKind(
    name="own",
    title="Own",
    help="a reward of your own, from a Python file",
    options=(
        Option("reward", "", "FILE.py:NAME, of images (B, 3, H, W) in [0, 1] to maps (B, H, W)"),
    ),
    words=_words,
    make=_make,
    public=False,
    recorded=recorded,
)
