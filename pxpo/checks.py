"""What is asked of what comes from outside: of values wherever they come in, of the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import is_offline_mode
from pydantic import ValidationError

MOST_TEXT = 100_000
TEXT = f"text in UTF-8 of at most {MOST_TEXT} characters"


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


def network_fault(client: Callable[[], Any] = httpx2.Client) -> str:
    """What is wrong with the proxies or certificates that the environment names, and the way out;
    empty where nothing is. client: of the library that will ask; the Hub's when left out."""
    try:
        client().close()
    except Exception as error:  # of many kinds
        return (
            "no request can be made with HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY and "
            f"SSL_CERT_FILE as they are ({error}); write a proxy as http://HOST:PORT, or, after "
            "`pip install socksio`, as socks5://HOST:PORT; or unset them."
        )
    return ""


def reason_of(error: Exception, model: str) -> str:
    """Why a library could not load `model`, a path or a Hub id, in one line."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(model).exists():
        return reason
    if is_offline_mode():
        return f"HF_HUB_OFFLINE is set, so that nothing is fetched: {reason}"
    return network_fault().rstrip(".") or reason
