"""PXPO Studio: paint on a generated picture, press Step, and the model learns."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import ipaddress
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

gc.disable()  # nothing of what is imported is garbage; looking for it takes a fifth of the start

from pxpo.errors import ModelError, RunError, SettingError

try:
    from pxpo.ui import STABLE_DIFFUSION, Page, launch  # first: sets what Gradio and torch read
except SettingError as error:
    sys.exit(f"app.py: {error}")

# isort: split
import torch
from gradio.utils import get_space

from pxpo import DiffusionModel, Segmenter, load_model
from pxpo.embedded import TINY_WORLD
from pxpo.models import leave_a_core
from pxpo.rewards import resolved
from pxpo.rewards.segmentation import CLOTHES
from pxpo.store import keep_others_out
from pxpo.studio import SHARED, Bounds, Studio
from pxpo.terminal import print_anything
from pxpo.turns import ModelThread
from pxpo.ui.hosts import LOOPBACK, known_hosts, past_proxies
from pxpo.ui.zerogpu import LENT, lent

gc.freeze()  # nor is it looked for later
gc.enable()


def open_models(
    model: str | None, segmenter: str | None, size: tuple[int | None, int | None] = (None, None)
) -> tuple[DiffusionModel, Segmenter, str]:
    """What was asked for, or else what fits the machine; and a line on what it is not, and why.

    On a GPU that is the paper's own pair of models. What cannot be loaded is replaced by the
    embedded one.
    """
    notes = []
    try:
        usual = STABLE_DIFFUSION if torch.cuda.is_available() else None
        loaded = load_model(resolved(model) if model else usual, size=size)
    except ModelError as error:
        notes.append(f"{error} Here is Tiny World instead.")
        loaded = load_model()
    paired = None if Path(loaded.name) == TINY_WORLD else CLOTHES
    try:
        eye = Segmenter(segmenter or paired, str(loaded.device))
    except ModelError as error:
        notes.append(f"{error} Here is Tiny World's instead.")
        eye = Segmenter(None, str(loaded.device))
    return loaded, eye, " ".join(notes)


def address(host: str | None) -> str:
    """Where to serve: there, or where Gradio would; as a part of a URL."""
    host = host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    return f"[{host.strip('[]')}]" if ":" in host else host


def is_local(host: str) -> bool:
    """Whether a page served there is for this machine alone."""
    with contextlib.suppress(ValueError):
        return not get_space() and ipaddress.ip_address(host.strip("[]")).is_loopback
    return not get_space() and host == "localhost"


def give_memory_back() -> None:
    """Give freed memory back to the system, now and then. The C library keeps it where anything
    lies above it, and a page that serves many people would grow by that."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library than glibc
        trim = ctypes.CDLL(None).malloc_trim

        def forever() -> None:
            while True:
                time.sleep(30)
                trim(0)

        threading.Thread(target=forever, daemon=True).start()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind, default, text in (
        ("model", str, None, "folder, file or Hub id (on a GPU Stable Diffusion v1.4)"),
        ("segmenter", str, None, "folder or Hub id (the one that fits the model)"),
        ("clipseg", str, None, "folder or Hub id of a CLIPSeg (the usual one, if downloaded)"),
        ("height", int, None, "of the pictures, in pixels (the model's own)"),
        ("width", int, None, "of the pictures, in pixels (the model's own)"),
        ("runs", Path, "runs/studio", "folder where people's runs are kept (runs/studio)"),
        ("host", str, None, "address to serve on (127.0.0.1)"),
        ("port", int, None, "port to serve on (7860)"),
        ("domain", str, "", "host under which a proxy serves a page on 127.0.0.1; or several, a,b"),
    ):
        variable = f"PXPO_{name.upper()}"
        parser.add_argument(
            f"--{name}", type=kind, default=os.environ.get(variable, default),
            help=f"{text}; or set {variable}",
        )  # fmt: skip
    parser.add_argument("--share", action="store_true", help="a public link for 72 hours")
    parser.add_argument(
        "--own-token", action="store_true",
        help="let whoever opens the page push with this machine's token (HF_TOKEN, or that of `hf "
        "auth login`); without this option, only a page that no other machine can reach does",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    print_anything()
    options = arguments()
    host = address(options.host)
    local = is_local(host) and not options.share
    past_proxies(host)
    give_memory_back()
    leave_a_core()
    thread = ModelThread()
    size = (options.height, options.width)
    # ZeroGPU stands in for the GPU, until one is lent, on the main thread alone.
    opened = open_models if LENT else partial(thread.call, open_models)
    try:
        kept = keep_others_out(options.runs)  # first, as models take a while
        model, segmenter, note = opened(options.model, options.segmenter, size)
    except (RunError, SettingError) as error:
        sys.exit(f"app.py: {error}")
    # As many as leave a core to the server, and to a browser on the same machine.
    model.workers = min(model.workers, torch.get_num_threads())
    usual = {"clipseg": options.clipseg} if options.clipseg else {}
    domains = options.domain.split(",") if options.domain else []
    alone = local and not domains
    studio = Studio(
        model, segmenter, options.runs, thread=thread, usual=usual, lend=lent,
        bounds=Bounds() if alone else SHARED,
    )  # fmt: skip
    if not LENT:
        thread.call(studio.pace.try_out)
    with kept:
        launch(
            Page(studio, note, own_token=options.own_token or alone),
            server_name=host, server_port=options.port, share=options.share,
            app_kwargs=known_hosts(*LOOPBACK, host, *domains) if local else {},
        )  # fmt: skip


if __name__ == "__main__":
    main()
