"""What the page's files share: its looks, pictures, fields, progress and messages."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import time
from collections.abc import Callable, Generator, Hashable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.context import LocalContext
from gradio.utils import get_upload_folder
from PIL import Image
from torch import Tensor

from ..embedded import TINY_WORLD
from ..errors import PxpoError
from ..models import DiffusionModel
from ..plots import to_picture
from ..progress import Progress
from ..settings import Settings
from ..store import whole, write_whole

CANVAS = 512  # pixels, along the longer side
BETWEEN_SIGNS = 0.3  # seconds
MOST_UNREAD = 20  # messages; whoever listens is never this far behind
STABLE_DIFFUSION = "CompVis/stable-diffusion-v1-4"

TITLE = (
    "# Paint what you want more of. Watch the model learn it.\n"
    "Paint green on what you want more of and red on what you want less of, press Step, and "
    "compare. A small add-on to the model, a LoRA, learns from every pixel: "
    "[PXPO](https://arxiv.org/abs/2404.04356)."
)

HELP = """
**What learns.** Not the model, which stays as it is, but a LoRA: a small add-on to it, some
megabytes that are yours to download and that any diffusers pipeline loads. It learns on pictures
of your prompt, and what it has learnt shows on pictures that nobody painted: the other seeds.

**What a step does.** The model makes some pictures. Each of their pixels earns a reward: by your
paint, by its colour, or by what a segmenter takes it for. What led to the pixels that earn more
than the same place in the other pictures is made likelier, what led to those that earn less is
made rarer. That is PXPO, *pixel-wise policy optimisation*: its forerunner DDPO knows one number
for a whole picture.

**What paint means.** What was under it when you drew it. So a stroke holds wherever such a thing
is, on every picture of this run, until you forget the wish. The heat-map shows how you were
understood.

**What the numbers mean.** *Wish*, or *reward*: the mean over all pixels, of paint from −2 to +2; it
is the same judge at every step. *Changed outside the paint*: how far the colours there are from
those at the beginning. *Moved*: how far this step changed what the model says, and how far all
steps have led from the model as it was; near 100 % pictures turn to noise.
"""

CSS = """
#title h1 {margin-bottom: 0}
#title p {margin: 0.3rem 0 0}
#examples {align-items: stretch}
.example {flex-direction: column; justify-content: start; padding: 0.5rem; font-size: 0.85rem}
button.example .button-icon {width: 100%; max-width: 112px; height: auto; margin: 0}
#words {font-size: 0.85rem}
#brush label {font-weight: 600}
#brush label:nth-of-type(1).selected {background: #15803d; border-color: #15803d}
#brush label:nth-of-type(2).selected {background: #b91c1c; border-color: #b91c1c}
#brush input {border-color: currentColor !important}
#ed {height: auto !important; max-height: 530px; aspect-ratio: 1 / 1.08}
#history .thumbnail-item {aspect-ratio: 1}
#history .grid-wrap {padding-top: 2.6rem}
#history .caption-label {font-size: 0.7rem; padding: 0 0.3rem}
#fresh {align-self: end}
#named {border: 1px solid var(--border-color-primary); border-radius: var(--button-large-radius)}
#slider {max-width: 400px; margin: 0 auto}
:is(#slider, #others, #heat) [data-testid="block-label"] {position: static; margin: 0.4rem}
:is(#strength, #hold) :is(.min_value, .max_value) {color: var(--block-info-text-color)}
#heat :is(.image-container, .image-frame, button) {height: auto}
#heat img {width: 100%; height: 300px; object-fit: contain}
.icon-button-wrapper:not(:has(*)) {display: none}
#tabs button {padding-inline: 0.5rem}
body:has(#status [data-testid="status-tracker"]:not(.hide)) #stop {
    background: #b91c1c; color: white
}
:root {--color-accent: var(--primary-600)}
.dark {--color-accent: var(--primary-400)}
@media (min-width: 1025px) {
    #title p {max-width: 75%}
    #brush {display: flex; align-items: center; gap: 1rem}
    #chip {margin-top: -2.4rem; text-align: right}
    #count::after {
        content: "steps"; position: absolute; left: 2.6rem; top: 50%; translate: 0 -50%
    }
}
@media (max-width: 1024px) {
    #strength, #hold {min-width: 100% !important}
    #ed .toolbar-wrap {width: auto; inset: 0 auto auto 0}
    #ed :is(.toolbar-wrap, .half-container) {flex-direction: row}
    #ed .half-container {padding: 0.2rem 0}
    #ed .half-container:last-child {border: none}
    #history, #history .grid-wrap {height: auto !important; max-height: 420px}
    #history .grid-container {
        grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important
    }
}
@media (max-width: 640px) {
    #title h1 {font-size: 1.25rem}
    #loop, #loop > * {flex-wrap: nowrap; min-width: 0 !important}
}
footer {display: none !important}
"""


def theme() -> gr.themes.Soft:
    """Gradio's soft theme with a contrast of 4.5 and more wherever there is text (WCAG AA)."""
    return gr.themes.Soft().set(
        background_fill_primary="*neutral_50",  # the theme's own, which set() forgets
        block_title_text_color="*primary_700",
        block_label_text_color="*primary_700",
        link_text_color_dark="*secondary_300",
        link_text_color_visited_dark="*secondary_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
        checkbox_label_background_fill_selected="*primary_600",
    )


# What is running.


def is_tiny_world(model: DiffusionModel) -> bool:
    return Path(model.name) == TINY_WORLD


def chip(model: DiffusionModel, seconds: float = 0.0) -> str:
    """What is running, in short. seconds: what a step takes, where that is known."""
    name = "Tiny World" if is_tiny_world(model) else Path(model.name).name
    cuda = model.device.type == "cuda"
    parts = [name, torch.cuda.get_device_name() if cuda else model.device.type.upper()]
    if seconds:
        parts.append(f"about {max(seconds, 1):.0f} s a step")
    return f"`{' · '.join(parts)}`"


def words(model: DiffusionModel) -> str:
    """All that a model with a closed vocabulary knows, folded away."""
    return (
        f"<details><summary>The {len(model.words)} words it knows</summary>"
        f"{', '.join(model.words)}</details>"
    )


def offer(model: DiffusionModel) -> str:
    """What else could run, and what it costs; empty on a GPU, and for a model that was chosen."""
    if model.device.type != "cpu" or not is_tiny_world(model):
        return ""
    return (
        f"This machine has no GPU. `python app.py --model {STABLE_DIFFUSION}` runs Stable "
        "Diffusion here all the same, after a download of 5 GB, at minutes a picture; a Space "
        "of your own on an A10G takes seconds, and is billed by the hour."
    )


# Pictures and fields.


def on_canvas(width: int, height: int) -> tuple[int, int]:
    """The width and height of such a picture on the canvas."""
    longer = max(width, height)
    return round(CANVAS * width / longer), round(CANVAS * height / longer)


def large(image: Tensor) -> Image.Image:
    """A picture of the canvas's size from (3, H, W) in [0, 1] or (H, W, 3) uint8."""
    picture = to_picture(image)
    return picture.resize(on_canvas(*picture.size), Image.Resampling.LANCZOS)


def served(picture: Image.Image, name: str = "") -> str:
    """A file in Gradio's cache, written once; Gradio would do so again while a browser reads it.

    name: what a browser that downloads it calls it.
    """
    unique = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    folder = Path(get_upload_folder()) / "pxpo"
    file = folder / unique / f"{name}.png" if name else folder / f"{unique}.png"
    if file.exists():
        file.touch()  # so that `delete_cache` takes it for new
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        encoded = io.BytesIO()
        picture.save(encoded, "png", compress_level=1)
        write_whole(file, encoded.getvalue())
    return str(file)


def offered(file: Path) -> str:
    """A copy of it in Gradio's cache, to be downloaded: Gradio hands out nothing that lies in
    another folder, where --runs may be. The next copy takes its place."""
    place = hashlib.sha256(str(file).encode()).hexdigest()  # as secret as the name of the run
    copy = Path(get_upload_folder()) / "pxpo" / place / file.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "rb") as source, whole(copy) as target:
        shutil.copyfileobj(source, target)
    return str(copy)


@contextlib.contextmanager
def discarded(file: Path) -> Iterator[Path]:
    """An uploaded file, for a while; then Gradio's folder is rid of it."""
    try:
        yield file
    finally:
        if file.resolve().is_relative_to(Path(get_upload_folder()).resolve()):
            file.unlink(missing_ok=True)


def setting(name: str, label: str, value: Any = None, note: str = "") -> gr.Number:
    """A number field with settings.py's help; its limits are checked, and explained, there.

    Nothing is rounded: 1.5 where a whole number is wanted is refused.
    """
    entry = next(entry for entry in fields(Settings) if entry.name == name)
    return gr.Number(value, label=label, info=entry.metadata["help"] + note)


# Progress and messages.


def throttled(
    work: Generator[Progress, None, Any], show: Callable[[Progress], Any]
) -> Generator[Any, None, Any]:
    """`show` of where `work` stands, now and then, as each takes some of the server's time from
    the work itself; returns the work's result.

    Work that waits for its turn shows each of its signs, as there is nothing to do between them.
    Work that nobody listens to is given up.
    """
    due = 0.0
    # However this ends the work ends with it, and its turn: an error would keep it for a while.
    with contextlib.closing(work):
        while True:
            try:
                progress = next(work)
            except StopIteration as end:
                return end.value
            if progress.ahead or time.monotonic() >= due:
                if unread() > MOST_UNREAD:
                    raise refusal("Nobody has fetched what this said, so it was stopped.")
                yield show(progress)
                due = time.monotonic() + BETWEEN_SIGNS


def unread() -> int:
    """How many messages to whoever has asked for this are not fetched yet."""
    blocks, request = LocalContext.blocks.get(None), LocalContext.request.get(None)
    if blocks is None or request is None:
        return 0
    messages = blocks._queue.pending_messages_per_session.get(request.session_hash)
    return messages.qsize() if messages else 0


def visitor() -> Hashable:
    """Who has called, as `ModelThread` asks: a tab, or a program's client; all MCP clients, which
    Gradio gives one session, are told apart by call."""
    request = LocalContext.request.get(None)
    if request is None or request.headers.get("x-gradio-user") == "mcp":
        return object()
    return request.session_hash


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
