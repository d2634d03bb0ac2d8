"""How the page reaches itself, and under which names it answers, where it is for one machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def past_proxies(*hosts: str) -> None:
    """From now on no proxy is asked for these hosts: as Gradio starts, it asks its own page whether
    it is there."""
    listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    bare = [host.strip("[]") for host in hosts]
    for name in ("no_proxy", "NO_PROXY"):  # the small one wins where there are both
        os.environ[name] = ",".join(filter(None, (listed, *bare)))


def known_hosts(*hosts: str) -> dict[str, Any]:
    """What makes Gradio's launch answer to these names alone: its `app_kwargs`."""
    return {"middleware": [Middleware(KnownHosts, hosts)]}


class KnownHosts:
    """ASGI middleware: only requests for one of `hosts` come through.

    Without it, any page that a person opens could give its own name the address 127.0.0.1 (DNS
    rebinding); their browser would then let it read and use the page here.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        names = [host.strip().lower() for host in hosts]
        self.app, self.hosts = app, sorted({host_name(one) or one.strip("[]") for one in names})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # the server's start and end
            return await self.app(scope, receive, send)
        asked = Headers(scope=scope).get("host", "")
        if host_name(asked) in self.hosts:
            return await self.app(scope, receive, send)
        refusal = PlainTextResponse(
            f"This page is not for the host {asked[:100]!r}, but for {', '.join(self.hosts)}. "
            "Behind a proxy, start app.py with --domain and the name that people open.\n",
            status_code=403,
        )
        return await refusal(scope, receive, send)


def host_name(header: str) -> str:
    """The name in a Host header, in small letters and without the port; empty for none."""
    found = re.fullmatch(r"(\[.*\]|[^:]*)(:\d*)?", header)
    return found[1].strip("[]").lower() if found else ""
