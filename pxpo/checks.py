"""What is asked of values that come from outside, wherever they come in."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

MOST_TEXT = 100_000
TEXT = f"text of at most {MOST_TEXT} characters"


def is_text(value: Any) -> bool:
    """Whether it is TEXT, without unpaired surrogates, which no file and no tokenizer takes."""
    if not isinstance(value, str) or len(value) > MOST_TEXT:
        return False
    return value == value.encode(errors="ignore").decode()


def fault(error: ValidationError) -> str:
    """The first thing that is wrong: where, what is there, and what it must be."""
    if error.error_count() > 1000:  # to list all of them would take minutes
        return f"{error.error_count()} entries are not what they must be"
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if not where:
        return str(first["msg"])
    if "error" in first.get("ctx", {}):  # of ours, which says what is there
        return f"{where}: {first['ctx']['error']}"
    if first["type"] == "missing":
        return f"{where} is missing"
    return f"{where} is {first['input']!r}: {first['msg']}"
