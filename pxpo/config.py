"""run.yaml: all that a command was asked for, and all that this left open, to do it again."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .errors import SettingError
from .store import write_whole

FILE_NAME = "run.yaml"


def write_config(folder: Path, command: str, values: Mapping[str, Any]) -> None:
    """Write the options of `command`, by the names of its flags; what is None or () is left out."""
    kept: dict[str, Any] = {"command": command}
    for name, value in values.items():
        if value is not None and value != ():
            kept[name] = list(value) if isinstance(value, tuple) else value
    head = f"# To do it again: python -m pxpo {command} --config {FILE_NAME}\n"
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    write_whole(folder / FILE_NAME, (head + text).encode())


def read_config(path: Path, command: str, known: Iterable[str]) -> list[str]:
    """The flags that such a file stands for. known: the names that the command has."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        words = " ".join(str(error).split())
        raise SettingError(f"{str(path)!r} cannot be read ({words}).") from error
    if not isinstance(values, dict):
        raise SettingError(f"{str(path)!r} must hold names and values, such as 'steps: 20'.")
    if values.pop("command", command) != command:
        raise SettingError(f"{str(path)!r} is of another command than {command!r}; it names which.")
    names, flags = sorted(known), list[str]()
    for name, value in values.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0)[0]
            raise SettingError(f"{str(path)!r} has {name!r}, which {command} has not: {near!r}?")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict | list):
                raise SettingError(f"{str(path)!r} has no plain value for {name!r}.")
            flag = f"--{name.replace('_', '-')}"
            if isinstance(one, bool):
                flags += [flag] * one
            elif one is not None:
                flags.append(f"{flag}={one}")
    return flags
