"""What the page's files share: its looks, pictures, fields, progress and messages."""

from __future__ import annotations

import contextlib
import hashlib
import io
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder
from PIL import Image
from torch import Tensor

from ..embedded import OPENING, TINY_WORLD
from ..errors import PxpoError
from ..models import DiffusionModel
from ..plots import to_picture
from ..settings import Settings
from ..store import write_whole

CANVAS = 512  # pixels, along the longer side
BETWEEN_SIGNS = 0.3  # seconds
STABLE_DIFFUSION = "CompVis/stable-diffusion-v1-4"

CSS = """
#title h1 {margin-bottom: 0}
#hand label {font-weight: 600}
#history .thumbnail-item {aspect-ratio: 1}
#history .grid-wrap {padding-top: 2.6rem}
#history .caption-label {font-size: 0.7rem; padding: 0 0.3rem}
#fresh {align-self: end}
#slider {max-width: 400px; margin: 0 auto}
#strength :is(.min_value, .max_value) {color: var(--block-info-text-color)}
#tabs button {padding-inline: 0.5rem}
:root {--color-accent: var(--primary-600)}
.dark {--color-accent: var(--primary-400)}
@media (max-width: 1024px) {
    #ed {height: 420px !important}
    #history, #history .grid-wrap {height: 280px !important; max-height: none}
    #history .grid-container {
        grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important
    }
}
footer {display: none !important}
"""


def theme() -> gr.themes.Soft:
    """Gradio's soft theme with a contrast of 4.5 and more wherever there is text (WCAG AA)."""
    return gr.themes.Soft().set(
        background_fill_primary="*neutral_50",  # the theme's own, which set() forgets
        block_title_text_color="*primary_700",
        block_label_text_color="*primary_700",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
        checkbox_label_background_fill_selected="*primary_600",
    )


# What is running.


def chip(model: DiffusionModel) -> str:
    """What is running, in short."""
    name = "Tiny World" if Path(model.name) == TINY_WORLD else Path(model.name).name
    cuda = model.device.type == "cuda"
    return f"{name} · {torch.cuda.get_device_name() if cuda else model.device.type.upper()}"


def offer(model: DiffusionModel) -> str:
    """What else could run, and what it costs; empty on a GPU."""
    if model.device.type == "cuda":
        return ""
    return (
        f"This machine has no GPU. `python app.py --model {STABLE_DIFFUSION}` runs Stable "
        "Diffusion here all the same, after a download of 5 GB, at minutes a picture; a copy "
        "of this Space on an A10G takes seconds, and is billed by the hour."
    )


def opening_example(model: DiffusionModel) -> dict[str, str]:
    """A run made earlier, to open the page with: its pictures "before" and "after", its "paint".

    Empty for a model that did not make it.
    """
    if Path(model.name) != TINY_WORLD:
        return {}
    return {file.stem: str(file) for file in OPENING.glob("*.png")}


# Pictures and fields.


def on_canvas(width: int, height: int) -> tuple[int, int]:
    """The width and height of such a picture on the canvas."""
    longer = max(width, height)
    return round(CANVAS * width / longer), round(CANVAS * height / longer)


def large(image: Tensor) -> Image.Image:
    """A picture of the canvas's size from (3, H, W) in [0, 1] or (H, W, 3) uint8."""
    picture = to_picture(image)
    return picture.resize(on_canvas(*picture.size), Image.Resampling.LANCZOS)


def served(picture: Image.Image) -> str:
    """A file in Gradio's cache, written once; Gradio would do so again while a browser reads it."""
    name = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    file = Path(get_upload_folder()) / "pxpo" / f"{name}.png"
    if file.exists():
        file.touch()  # so that `delete_cache` takes it for new
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        encoded = io.BytesIO()
        picture.save(encoded, "png", compress_level=1)
        write_whole(file, encoded.getvalue())
    return str(file)


def setting(name: str, label: str, value: Any = None, note: str = "") -> gr.Number:
    """A number field with settings.py's help; its limits are checked, and explained, there."""
    entry = next(entry for entry in fields(Settings) if entry.name == name)
    precision = 0 if isinstance(entry.default, int) else None
    return gr.Number(value, label=label, info=entry.metadata["help"] + note, precision=precision)


# Progress and messages.


def throttled(work: Iterator[Any], show: Callable[[Any], Any]) -> Generator[Any, None, Any]:
    """`show` of where `work` stands, now and then, as each takes some of the server's time from
    the work itself; returns the work's result."""
    due = 0.0
    while True:
        try:
            progress = next(work)
        except StopIteration as end:
            return end.value
        if time.monotonic() >= due:
            yield show(progress)
            due = time.monotonic() + BETWEEN_SIGNS


def refusal(message: str) -> gr.Error:
    """An error that is a message to a person, and no fault to be logged."""
    return gr.Error(message, print_exception=False)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Errors as messages to a visitor; a decorator of functions as well.

    Of an error that is none of the package's the words are for the server's log alone.
    """
    try:
        yield
    except gr.Error:
        raise
    except PxpoError as error:
        raise refusal(error.for_visitors()) from error
    except Exception as error:
        kind = getattr(error, "strerror", None) or type(error).__name__
        raise gr.Error(
            f"This went wrong on the server, and not by what you did: {kind}. Nothing that was "
            "saved is lost. Try again, and if it stays, tell whoever runs this page."
        ) from error
