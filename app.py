"""PXPO Studio's page: paint on a generated picture, press Step, and the model learns.

Layout and wiring only; what happens is in the `pxpo` package, and whose run is whose in
`pxpo.studio`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import inspect
import io
import ipaddress
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "0")
gc.disable()  # nothing of what is imported is garbage; looking for it takes a fifth of the start

import gradio as gr
import torch
from gradio.utils import get_space, get_upload_folder
from PIL import Image
from torch import Tensor

from pxpo import (
    DiffusionModel,
    Lora,
    PxpoError,
    RewardSpec,
    Segmenter,
    Settings,
    load_lora,
    load_model,
    painted_map,
)
from pxpo.card import base_of
from pxpo.errors import ModelError
from pxpo.models import TINY_WORLD
from pxpo.plots import to_picture
from pxpo.rewards.segmentation import CLOTHES
from pxpo.run import SHOWING, Run
from pxpo.store import write_whole
from pxpo.studio import MOST_UPDATES, Studio

gc.freeze()  # nor is it looked for later
gc.enable()

PLUS, MINUS = "+ more (green)", "− less (red)"
LESS, MORE = "less", "more"
GREEN, RED = ("#00FF00", 0.6), ("#FF0000", 0.6)
CANVAS = 512
BETWEEN_SIGNS = 0.3  # seconds
SETTLING = 10.0  # seconds that an editor may take to show what it was given
EXAMPLES = [
    ("nature landscape", 12),
    ("nature landscape with a lake and trees at sunset", 3),
    ("red taxi in traffic", 1),
    ("portrait of a man on the beach", 7),
]
STABLE_DIFFUSION = "CompVis/stable-diffusion-v1-4"
OPENING = Path(__file__).resolve().parent / "assets" / "opening"
"""A run made earlier, to open the page with: its settings, paint, picture before and after."""

CSS = """
#title h1 {margin-bottom: 0}
#hand label {font-weight: 600}
#history .thumbnail-item {aspect-ratio: 1}
#history .grid-wrap {padding-top: 2.6rem}
#history .caption-label {font-size: 0.7rem; padding: 0 0.3rem}
#fresh {align-self: end}
#slider {max-width: 400px; margin: 0 auto}
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


def chip(model: DiffusionModel) -> str:
    """What is running, in short."""
    name = "Tiny World" if Path(model.name) == TINY_WORLD else Path(model.name).name
    cuda = model.device.type == "cuda"
    return f"{name} · {torch.cuda.get_device_name() if cuda else model.device.type.upper()}"


def large(image: Tensor) -> Image.Image:
    """A picture of the canvas's size from (3, H, W) in [0, 1] or (H, W, 3) uint8."""
    return to_picture(image).resize((CANVAS, CANVAS), Image.Resampling.LANCZOS)


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


def paint_of(value: dict[str, Any] | None) -> Image.Image | None:
    """The painted layers of the editor as one RGBA picture; None when nothing is painted."""
    layers = [layer.convert("RGBA") for layer in (value or {}).get("layers") or ()]
    if not any(layer.getextrema()[3][1] for layer in layers):
        return None
    return functools.reduce(Image.alpha_composite, layers)


def sketch(
    value: dict[str, Any] | None, waiting: tuple[Image.Image | None, float] | None
) -> Image.Image | None:
    """The paint on the editor, or that which it was just given and may not show yet."""
    paint, until = waiting or (None, 0.0)
    return paint_of(value) or (paint if time.monotonic() < until else None)


def brush(hand: str) -> gr.Brush:
    return gr.Brush(
        colors=[GREEN, RED], default_color=GREEN if hand == PLUS else RED, color_mode="fixed",
        default_size=40,
    )  # fmt: skip


def setting(name: str, label: str, value: Any = None, note: str = "") -> gr.Number:
    """A number field with config.py's help; its limits are checked, and told best, there."""
    entry = next(entry for entry in fields(Settings) if entry.name == name)
    whole = isinstance(entry.default, int)
    return gr.Number(
        value, label=label, info=entry.metadata["help"] + note, precision=0 if whole else None
    )


class ModelThread:
    """The one thread that all computing runs on.

    OpenMP keeps helpers for every thread that ever computes, and with more of them than cores it
    lets them sleep between any two operations: on two cores all takes half as long again.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "model")
        self._open: Generator | None = None  # the work that has begun last

    def call(self, work: Callable[..., Any], *values: Any) -> Any:
        return self._pool.submit(work, *values).result()

    def iterate(self, generator: Generator) -> Iterator[Any]:
        end = object()
        try:
            while (value := self.call(self._advance, generator, end)) is not end:
                yield value
        finally:
            self._pool.submit(generator.close)  # not waited for: this may be that very thread

    def _advance(self, generator: Generator, end: object) -> Any:
        """The next value. Work that was given up (Stop, a closed tab), and whose end has not
        reached this thread yet, is closed before other work begins: both want the model."""
        if inspect.getgeneratorstate(generator) == inspect.GEN_CLOSED:
            return end
        if self._open is not generator:
            if self._open is not None:
                self._open.close()
            self._open = generator
        return next(generator, end)


MODEL_THREAD = ModelThread()


def on_model_thread(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, a function or a generator function, run on MODEL_THREAD."""

    @functools.wraps(work)
    def call(*values: Any) -> Any:
        return MODEL_THREAD.call(work, *values)

    @functools.wraps(work)
    def iterate(*values: Any) -> Iterator[Any]:
        yield from MODEL_THREAD.iterate(work(*values))

    return iterate if inspect.isgeneratorfunction(work) else call


@contextlib.contextmanager
def spoken() -> Iterator[None]:
    """The package's own errors as messages on the page."""
    try:
        yield
    except PxpoError as error:
        raise gr.Error(str(error), print_exception=False) from error


class Page:
    """The page on one studio: what its events do, and how it is laid out."""

    def __init__(self, studio: Studio, note: str = "", own_token: bool = False) -> None:
        """own_token: whether whoever opens the page may push with this machine's token."""
        self.studio, self.note, self.own_token = studio, note, own_token
        self.base_on_hub = base_of(studio.model.name).hub
        self.has_example = Path(studio.model.name) == TINY_WORLD and OPENING.exists()

    # What the page shows of a run.

    def view(self, run: Run, status: str) -> dict[str, Any]:
        captions = ["before"]
        for number in range(1, run.count + 1):
            score = f" · {run.latest[number].here:+.2f}" if number < len(run.latest) else ""
            captions.append(f"{number}{score}")
        shown = [update.shown[0] for update in run.updates]
        return {
            "run": run.id,
            "slider": (served(large(shown[0])), served(large(shown[-1]))),
            "history": [(served(to_picture(s)), c) for s, c in zip(shown, captions, strict=True)],
            "curve": self.studio.curve(run),
            "status": status,
        }

    def last_paint(self, run_id: str) -> Image.Image | None:
        """What the run last learnt from."""
        paint = self.studio.run(run_id).paint if run_id else None
        return None if paint is None else Image.fromarray(paint.numpy())

    def canvas(self, run_id: str, paint: Image.Image | None) -> dict[str, Any]:
        """The picture to paint on, under the paint, as the editor's value."""
        background = str(OPENING / "before.png") if self.has_example else None
        if run_id:
            background = served(large(self.studio.run(run_id).picture))
        layers = [served(paint)] if paint else []
        return {"background": background, "layers": layers, "composite": None}

    def heat_map(self, run_id: str, reward: RewardSpec) -> dict[str, Any]:
        """An automatic reward on the picture to judge; hidden where there is none."""
        heat = None
        if not reward.by_hand:
            with contextlib.suppress(PxpoError):  # Step says what is missing
                picture = self.studio.heat(self.studio.run(run_id), reward)
                heat = served(picture.resize((CANVAS, CANVAS)))
        return gr.update(value=heat, visible=heat is not None)

    # What its events do.

    def progress(self, work: Iterator[Any], head: str, before: str = ""):  # noqa: ANN201
        """Show where `work` stands, and the picture as it is denoised; hand on its result."""

        def tell(at: Any) -> dict[str, Any]:
            update: dict[str, Any] = {"status": f"{head}: {at.phase} {at.done}/{at.total}"}
            if before and at.phase == SHOWING:
                preview = self.studio.model.decode(at.latents[:1])[0]
                update["slider"] = (before, served(large(preview)))
            return update

        return (yield from signs(work, tell))

    def start(
        self, prompt: str, seed: int, *sampling: Any, lora: Lora | None = None
    ) -> Iterator[dict[str, Any]]:
        names = ("steps", "guidance_scale", "rank")
        settings = {k: v for k, v in zip(names, sampling, strict=True) if v is not None}
        if lora:
            settings["rank"] = lora.rank
        work = self.studio.start(prompt=prompt, seed=seed, lora=lora, **settings)
        run = yield from self.progress(work, "New picture")
        yield self.view(run, self.invitation(prompt))

    def invitation(self, prompt: str) -> str:
        unknown = self.studio.model.unknown_words(prompt)
        note = f" The model never learnt the word {', '.join(unknown)}." if unknown else ""
        return "Paint what you want more of (green) or less of (red), then press Step." + note

    def learn(
        self, count: int, run_id: str, reward: RewardSpec, paint: Image.Image | None,
        learning_rate: float, images: int,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """`count` steps; a run is begun first where the page still shows the opening example."""
        if not run_id:
            for update in self.start(*EXAMPLES[0], None, None, None):
                run_id = update.get("run", "")
                yield {k: v for k, v in update.items() if k in ("status", "run")}
        changes: dict[str, Any] = {"learning_rate": learning_rate} if learning_rate else {}
        if images and not reward.by_hand:
            changes["images"] = images
        paint = paint if reward.by_hand else None
        before = served(large(self.studio.run(run_id).updates[0].shown[0]))
        for _ in range(count):
            began = time.monotonic()
            head = f"Step {self.studio.run(run_id).count + 1}"
            work = self.studio.step(run_id, reward, paint, **changes)
            run = yield from self.progress(work, head, before)
            yield self.view(run, self.told(run, paint, time.monotonic() - began))

    def told(self, run: Run, paint: Image.Image | None, seconds: float) -> str:
        """A step in one line."""
        last, now = run.latest[-2:]
        parts = [f"Step {run.count}", f"reward {last.here:+.3f} → {now.here:+.3f}"]
        if paint:
            painted = painted_map(paint)
            more, less = ((painted * sign > 0).float().mean() for sign in (1, -1))
            parts.append(f"painted + {more:.0%}, − {less:.0%}")
        return " · ".join([*parts, f"{seconds:.1f} s"])

    def back(self, run_id: str, step: int | None = None) -> Iterator[dict[str, Any]]:
        run = self.studio.run(run_id) if run_id else None
        if run is None or (step is None and not run.count):
            raise gr.Error("This is the beginning; there is no step before it.",
                           print_exception=False)  # fmt: skip
        step = run.count - 1 if step is None else step
        run = yield from self.progress(self.studio.back(run_id, step), f"Back to step {step}")
        yield self.view(run, f"Back at step {run.count}, weights and all.")

    def stopped(self, run_id: str) -> dict[str, Any]:
        if not run_id:
            return {"status": "Stopped."}
        run = self.studio.run(run_id)
        return self.view(run, f"Stopped at step {run.count}; what was learnt is kept.")

    def admitted(self, file: str, *fresh: Any) -> Iterator[dict[str, Any]]:
        """Go on with a downloaded run, or begin one from a LoRA."""
        if Path(file).suffix == ".zip":
            run = self.studio.admit(Path(file))
            yield self.view(run, f"Your run, at step {run.count}.")
        else:
            yield from self.start(*fresh, lora=load_lora(Path(file)))

    def opening(self, run_id: str) -> Iterator[dict[str, Any]]:
        """The run that this browser was at; else the example, or a new picture."""
        try:
            run = self.studio.run(run_id) if run_id else None
        except PxpoError:
            run = None
        if run:
            yield self.view(run, f"Here is your run again, at step {run.count}.")
        elif self.has_example:
            yield {"run": "", "status": "An example: press Step, or paint something else."}
        else:
            yield from self.start(*EXAMPLES[0], None, None, None)

    def offer(self) -> str:
        """What else could run, and what it costs, said where only Tiny World runs."""
        if self.studio.model.device.type == "cuda":
            return ""
        return (
            f"\n\nThis machine has no GPU. `python app.py --model {STABLE_DIFFUSION}` runs Stable "
            "Diffusion here all the same, after a download of 5 GB, at minutes a picture; a copy "
            "of this Space on an A10G takes seconds, and is billed by the hour."
        )

    # How it is laid out.

    def build(self) -> gr.Blocks:
        with gr.Blocks(
            title="PXPO Studio", analytics_enabled=False, delete_cache=(3600, 86400)
        ) as page:
            self.layout()
            self.wire(page)
            api(self.studio)
        return page

    def layout(self) -> None:
        prompt, seed = EXAMPLES[0]
        self.example, compared = None, None
        if self.has_example:
            before, paint, after = (
                str(OPENING / f"{name}.png") for name in ("before", "paint", "after")
            )
            self.example = {"background": before, "layers": [paint], "composite": None}
            compared = before, after
        self.run = gr.BrowserState("", storage_key="pxpo-run", secret="pxpo-studio")
        self.source, self.paint = gr.State("paint"), gr.State()
        self.unfinished = gr.State(False)  # whether the work under way, or cut off, wants more
        gr.Markdown(
            "# Paint what you want more of. Watch the model learn it.\n"
            f"`{chip(self.studio.model)}` {self.note}",
            elem_id="title",
        )
        with gr.Row():
            with gr.Column(scale=11, min_width=320):
                self.hand = gr.Radio([PLUS, MINUS], value=PLUS, label="Brush", elem_id="hand")
                self.editor = gr.ImageEditor(
                    type="pil", sources=(), transforms=(), layers=False, format="png",
                    canvas_size=(CANVAS, CANVAS), fixed_canvas=True, brush=brush(PLUS),
                    eraser=gr.Eraser(24), label="The picture to judge", show_label=False,
                    elem_id="ed", height=600,
                )  # fmt: skip
                # An editor that is an event's own input is read, and its layers sent, again for
                # each sign of progress; this one, never shown, holds what it held when pressed.
                self.drawn = gr.ImageEditor(type="pil", visible=False)
            with gr.Column(scale=9, min_width=320):
                self.slider = gr.ImageSlider(
                    compared,
                    label="Before any step, and now", interactive=False, elem_id="slider",
                    format="png", buttons=[],
                )  # fmt: skip
                self.status = gr.Textbox(
                    label="Status", interactive=False, elem_id="status", lines=1, max_lines=3
                )
                with gr.Row():
                    self.step_once = gr.Button("Step", variant="primary", elem_id="step")
                    self.step_many = gr.Button("Run", elem_id="run-many")
                    self.count = gr.Number(
                        5, label="Steps of Run", precision=0, minimum=1, maximum=MOST_UPDATES,
                        container=False, show_label=False, min_width=60, elem_id="count",
                    )  # fmt: skip
                with gr.Row():
                    self.stop = gr.Button("Stop", variant="stop", min_width=80, elem_id="stop")
                    self.step_back = gr.Button("Back", min_width=80, elem_id="back")
                    self.reset = gr.Button("Reset", min_width=80, elem_id="reset")
                with gr.Tabs(elem_id="tabs"):
                    with gr.Tab("Paint") as paint_tab:
                        gr.Markdown("The reward is what you paint on the picture.")
                    with gr.Tab("Less of a colour") as color_tab, gr.Row():
                        self.color = gr.Dropdown(
                            ["blue", "red", "green", "orange", "purple"], value="blue",
                            allow_custom_value=True, label="Colour", elem_id="color",
                            info="a channel (red, green, blue) or any CSS colour",
                        )  # fmt: skip
                        self.color_want = gr.Radio([LESS, MORE], value=LESS, label="Want")
                    with gr.Tab("SegFormer") as segment_tab, gr.Row():
                        self.labels = gr.Dropdown(
                            list(self.studio.segmenter.labels), value=["Hair"], multiselect=True,
                            label="Find", elem_id="labels", info="what a segmenter sees",
                        )  # fmt: skip
                        self.labels_want = gr.Radio([LESS, MORE], value=LESS, label="Want")
                self.tabs = {"paint": paint_tab, "color": color_tab, "segment": segment_tab}
        self.history = gr.Gallery(
            label="Steps: click one to go back to it", columns=8,
            fit_columns=False, height=210, interactive=False, allow_preview=False,
            object_fit="contain", elem_id="history", format="png", buttons=[], visible=False,
        )  # fmt: skip
        with gr.Row():
            self.curve = gr.Plot(show_label=False, elem_id="curve", visible=False)
            self.heat = gr.Image(
                label="The reward on this picture: green gains, red loses", interactive=False,
                format="png", elem_id="heat", height=330, buttons=[], visible=False,
            )  # fmt: skip
        with gr.Accordion("Prompt and settings", open=False):
            with gr.Row():
                self.prompt = gr.Dropdown(
                    [prompt for prompt, _ in EXAMPLES], value=prompt,
                    allow_custom_value=True, label="Prompt", scale=3, elem_id="prompt",
                )  # fmt: skip
                self.seed = setting("seed", "Seed", seed)
                self.fresh = gr.Button("New picture", elem_id="fresh")
            with gr.Row():
                self.sampling = [
                    setting(name, label, Settings.__dataclass_fields__[name].default)
                    for name, label in (
                        ("steps", "DDIM steps"),
                        ("guidance_scale", "Guidance"),
                        ("rank", "LoRA rank"),
                    )
                ]  # fmt: skip
                self.learning = [
                    # An empty number field turns into 0 once it is shown.
                    setting("learning_rate", "Learning rate", 0, "; 0: what suits the tab"),
                    setting("images", "Samples per step", 0, "; 0: what suits the tab"),
                ]
            gr.Markdown(
                f"Steps, guidance and rank count from the next new picture on.{self.offer()}"
            )
        self.examples = gr.Examples(
            [list(one) for one in EXAMPLES],
            [self.prompt, self.seed],
            label="Examples",
            elem_id="examples",
        )
        with gr.Row():
            self.save_lora = gr.Button("Download LoRA", elem_id="save-lora")
            self.save_run = gr.Button("Download the run", elem_id="save-run")
            self.upload = gr.UploadButton(
                "Go on with a run or a LoRA", file_types=[".zip", ".safetensors"], elem_id="upload"
            )
            self.file = gr.DownloadButton(visible="hidden", elem_id="file")
        with gr.Accordion("Push to the Hugging Face Hub", open=False), gr.Row():
            self.repo = gr.Textbox(
                label="Repository", placeholder="OWNER/NAME", info="made if need be", elem_id="repo"
            )
            with gr.Column(min_width=160):
                self.private = gr.Checkbox(label="Private")
                self.with_base = gr.Checkbox(
                    label="With the base model beside it", visible=not self.base_on_hub
                )
            if get_space():
                gr.LoginButton(elem_id="login")
            self.token = gr.Textbox(
                label="Token", type="password",
                placeholder="HF_TOKEN, if that is set" if self.own_token else "hf_…",
                info="with the right to write; used once, kept nowhere", elem_id="token",
                visible=not get_space(),
            )  # fmt: skip
            self.push = gr.Button("Push", elem_id="push")
            self.pushed = gr.Markdown(elem_id="pushed")

    def wire(self, page: gr.Blocks) -> None:
        parts = {name: getattr(self, name) for name in
                 ("run", "slider", "history", "curve", "status")}  # fmt: skip
        lane: dict[str, Any] = {
            "outputs": [*parts.values(), self.unfinished], "show_progress_on": self.status,
            "concurrency_id": "gpu", "concurrency_limit": 1, "api_visibility": "private",
        }  # fmt: skip
        quick: dict[str, Any] = {  # on the status, as whatever shows progress is read for it too
            "show_progress": "hidden", "show_progress_on": self.status, "api_visibility": "private",
        }  # fmt: skip
        read: dict[str, Any] = {
            "fn": None, "js": "drawn => drawn", "inputs": self.editor, "outputs": self.drawn,
            **quick,
        }  # fmt: skip

        def on_parts(update: dict[str, Any]) -> dict[Any, Any]:
            late = ("history", "curve")  # not shown before there is something in them
            return {
                parts[name]: gr.update(value=value, visible=bool(value)) if name in late else value
                for name, value in update.items()
            }

        def on_page(work: Callable[..., Iterator[dict[str, Any]]]) -> Callable[..., Iterator[Any]]:
            """As an event: updates by component; the canvas follows once the work has ended."""

            @on_model_thread
            def event(*values: Any) -> Iterator[dict[Any, Any]]:
                try:
                    with spoken():
                        for update in work(*values):
                            yield {**on_parts(update), self.unfinished: True}
                    yield {self.unfinished: False}
                except gr.Error as error:
                    yield {self.status: error.message, self.unfinished: False}
                    raise

            return event

        wish = [self.source, self.color, self.color_want, self.labels, self.labels_want]

        @on_model_thread
        def heat(run: str, *values: Any) -> dict[str, Any]:
            return self.heat_map(run, wished(*values))

        @on_model_thread
        def report(run: str, unfinished: bool) -> Any:
            """Work that Stop cut off comes here as well, once it has ended, and says so."""
            return on_parts(self.stopped(run)) if unfinished else gr.skip()

        def then_canvas(event: Any, keep: bool) -> None:
            """Then bring the next picture, under the paint on the canvas or that of the last step.

            A mounted editor paints reliably only if it is emptied before it gets a new picture.
            """

            @on_model_thread
            def empty(
                run: str, unfinished: bool, value: dict[str, Any], waiting: Any
            ) -> tuple[Any, ...]:
                kept = keep or unfinished
                paint = sketch(value, waiting) if kept else self.last_paint(run)
                return False, (paint, math.inf), None if run else gr.skip()

            @on_model_thread
            def fill(run: str, waiting: tuple[Image.Image | None, float]) -> Any:
                paint, _ = waiting
                if run:
                    picture: Any = self.canvas(run, paint)
                else:  # what is painted on the example stays
                    picture = gr.skip() if paint else self.example
                return picture, (paint, time.monotonic() + SETTLING)

            event.then(report, [self.run, self.unfinished], list(parts.values()), **quick).then(
                **read
            ).then(
                empty,
                [self.run, self.unfinished, self.drawn, self.paint],
                [self.unfinished, self.paint, self.editor],
                **quick,
            ).then(fill, [self.run, self.paint], [self.editor, self.paint], **quick).then(
                heat, [self.run, *wish], self.heat, **quick
            )

        fresh = [self.prompt, self.seed, *self.sampling]
        seen = [self.hand, self.status]  # one is over the canvas, one beside Step
        inputs = [self.count, self.run, *wish, self.drawn, self.paint, *self.learning, *seen]

        def steps(count: float | None, run: str, *values: Any) -> Iterator[dict[str, Any]]:
            judge, paint, learning = wished(*values[:5]), sketch(*values[5:7]), values[7:9]
            yield from self.learn(int(count or 1), run, judge, paint, *learning)

        def step(_: float | None, *values: Any) -> Iterator[dict[str, Any]]:
            yield from steps(1, *values)

        def painted(*values: Any) -> list[dict[str, Any]]:
            """Step without paint is refused where it is missing and where it was pressed."""
            given = dict(zip(inputs, values, strict=True))
            paint = sketch(given[self.drawn], given[self.paint])
            missing = given[self.source] == "paint" and paint is None
            return [
                gr.validate(not (missing and part in seen), "Paint + or − first.")
                for part in inputs
            ]

        opened = gr.on([page.load], on_page(self.opening), self.run, **lane)
        begun = gr.on([self.fresh.click, self.reset.click], on_page(self.start), fresh, **lane)
        shown = self.examples.load_input_event.then(on_page(self.start), fresh, **lane)
        once = self.step_once.click(**read).then(on_page(step), inputs, validator=painted, **lane)
        many = self.step_many.click(**read).then(on_page(steps), inputs, validator=painted, **lane)
        undone = self.step_back.click(on_page(self.back), self.run, **lane)

        def chosen(run: str, thumbnail: gr.SelectData) -> Iterator[Any]:
            yield from on_page(self.back)(run, thumbnail.index)

        @on_model_thread
        def cleared(run: str) -> tuple[Any, None]:
            """The editor's own button clears the picture away as well; it comes back."""
            return self.canvas(run, None), None

        rewound = self.history.select(chosen, self.run, **lane)
        taken = self.upload.upload(on_page(self.admitted), [self.upload, *fresh], **lane)
        keeping, changing = (once, many, undone, rewound), (opened, begun, shown, taken)
        for event in keeping:
            then_canvas(event, keep=True)
        for event in changing:
            then_canvas(event, keep=False)
        self.stop.click(None, cancels=[*keeping, *changing], api_visibility="private")
        self.editor.clear(cleared, self.run, [self.editor, self.paint], **quick)
        self.hand.change(
            lambda hand: gr.ImageEditor(brush=brush(hand)), self.hand, self.editor, **quick
        )

        for name, tab in self.tabs.items():
            tab.select(lambda name=name: name, None, self.source, **quick).then(
                heat, [self.run, *wish], self.heat, **quick
            )
        for part in (self.color, self.color_want, self.labels, self.labels_want):
            part.change(heat, [self.run, *wish], self.heat, **quick)

        for button, make in (
            (self.save_lora, self.studio.lora_file), (self.save_run, self.studio.archive)
        ):  # fmt: skip
            save = on_model_thread(functools.partial(saved, make))
            button.click(save, self.run, self.file, **quick).success(
                None, None, None, js="() => document.querySelector('#file').click()", **quick
            )

        def push(
            run: str, repo: str, private: bool, with_base: bool, typed: str,
            login: gr.OAuthToken | None,
        ) -> Iterator[str]:  # fmt: skip
            token = login.token if login else (typed or "").strip() or None
            if token is None and not self.own_token:
                raise gr.Error(
                    ("Sign in" if get_space() else "Type a token of yours") + " first; Download "
                    "works without. The server's own token is not for visitors.",
                    print_exception=False,
                )
            yield from pushed(self.studio, run, repo, private, with_base, token)

        self.push.click(
            push, [self.run, self.repo, self.private, self.with_base, self.token], self.pushed,
            concurrency_limit=4, api_visibility="private",
        )  # fmt: skip


def signs(work: Iterator[Any], tell: Callable[[Any], Any]):  # noqa: ANN201
    """`tell` of where `work` stands, now and then, as each costs the server some of the time that
    the work is meant to have; hand on its result."""
    due = 0.0
    while True:
        try:
            at = next(work)
        except StopIteration as end:
            return end.value
        if time.monotonic() >= due:
            yield tell(at)
            due = time.monotonic() + BETWEEN_SIGNS


def pushed(
    studio: Studio, run_id: str, repo: str, private: bool, with_base: bool, token: str | None
) -> Iterator[str]:
    """Push with this token, or with this machine's own where it is None; says where it stands."""
    if not run_id:
        raise gr.Error("This is the example; press Step first.", print_exception=False)
    with spoken():
        work = studio.push(run_id, repo.strip(), token=token, private=private, with_base=with_base)
        link = yield from signs(work, lambda at: f"{at.phase} {at.done}/{at.total}")
        yield f"Pushed: [{repo.strip()}]({link})"


def saved(make: Callable[[str], Path], run_id: str) -> str:
    if not run_id:
        raise gr.Error("This is the example; press Step first.", print_exception=False)
    with spoken():
        return str(make(run_id))


def wished(
    source: str, color: str | None, color_want: str, labels: list[str] | None, labels_want: str
) -> RewardSpec:
    options: dict[str, dict[str, Any]] = {
        "color": {"color": color or "", "more": color_want == MORE},
        "segment": {"labels": labels or (), "more": labels_want == MORE},
    }
    return RewardSpec(source, options.get(source, {}))


def api(studio: Studio) -> None:
    """The page's verbs for gradio_client and as MCP tools, besides the page's own events.

    Fields that are never shown give each parameter its type, its limits and its default.
    """
    with gr.Row(visible=False):
        run_id = gr.Textbox(label="run_id")
        prompt = gr.Textbox(EXAMPLES[0][0], label="prompt")
        numbers = {name: setting(name, name, Settings.__dataclass_fields__[name].default)
                   for name in ("seed", "steps", "guidance_scale", "rank")}  # fmt: skip
        reward = gr.Radio(["paint", "color", "segment"], value="paint", label="reward")
        paint = gr.Image(type="pil", image_mode=None, label="paint")
        color = gr.Textbox("blue", label="color")
        labels = gr.Textbox("Hair", label="labels")
        want = gr.Radio([LESS, MORE], value=LESS, label="want")
        rate, images = setting("learning_rate", "learning_rate"), setting("images", "images")
        count = gr.Number(5, precision=0, minimum=1, maximum=MOST_UPDATES, label="count")
        to_step = gr.Number(0, precision=0, minimum=0, label="step")
        report, picture = gr.JSON(label="report"), gr.Image(label="picture", format="png")
        files = gr.File(label="lora"), gr.File(label="archive")
        button = gr.Button()
    run_out = gr.Textbox(visible=False, label="run")
    answers = [run_out, report, picture]

    def waiting(work: Iterator[Any]):  # noqa: ANN202
        """Hand control back now and then, so that a client can cancel the work."""
        return (yield from signs(work, lambda at: (gr.skip(),) * len(answers)))

    def answer(run: Run) -> tuple[str, dict[str, Any], str]:
        report = {"step": run.count, "reward": run.reward and run.reward.name,
                  "scores": [vars(score) for score in run.latest]}  # fmt: skip
        return run.id, report, served(large(run.picture))

    def generate(
        prompt: str, seed: int, steps: int, guidance_scale: float, rank: int
    ) -> Iterator[Any]:
        """Begin a run and sample the picture that its first step judges.

        Args:
            prompt: what to paint
            seed: the run's random seed
            steps: DDIM steps per picture
            guidance_scale: classifier-free guidance, 1 is none
            rank: the LoRA's rank

        Returns:
            the run's name for the other tools, a report, and the picture to judge
        """
        with spoken():
            run = yield from waiting(studio.start(
                prompt=prompt, seed=seed, steps=steps, guidance_scale=guidance_scale, rank=rank
            ))  # fmt: skip
            yield answer(run)

    def learn(
        run_id: str, count: int, reward: RewardSpec, paint: Image.Image | None, rate: float | None,
        images: int | None,
    ) -> Iterator[Any]:  # fmt: skip
        changes = {"learning_rate": rate, "images": images}
        changes = {name: value for name, value in changes.items() if value is not None}
        with spoken():
            for _ in range(count):
                done = yield from waiting(studio.step(run_id, reward, paint, **changes))
            yield answer(done)

    def step(
        run_id: str, reward: str = "paint", paint: Image.Image | None = None, color: str = "blue",
        labels: str = "Hair", want: str = LESS, learning_rate: float | None = None,
        images: int | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """Judge pictures, update the LoRA once, and sample the next picture.

        Args:
            run_id: the run's name, from generate
            reward: "paint", "color" or "segment"
            paint: for "paint": a picture, green where more is wanted and red where less
            color: for "color": red, green, blue, or any CSS colour
            labels: for "segment": what to find, separated by commas
            want: for "color" and "segment": "less" of it, or "more"
            learning_rate: AdamW's; the reward's default when left out
            images: pictures judged per step; the reward's default when left out

        Returns:
            the run's name, a report with the scores of all steps, and the next picture to judge
        """
        spec = wished(reward, color, want, labels.split(","), want)
        yield from learn(run_id, 1, spec, paint, learning_rate, images)

    def run(
        run_id: str, count: int = 5, reward: str = "paint", paint: Image.Image | None = None,
        color: str = "blue", labels: str = "Hair", want: str = LESS,
        learning_rate: float | None = None, images: int | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """Several steps with the same reward, as `step` does one.

        Args:
            run_id: the run's name, from generate
            count: how many steps
            reward: "paint", "color" or "segment"
            paint: for "paint": a picture, green where more is wanted and red where less
            color: for "color": red, green, blue, or any CSS colour
            labels: for "segment": what to find, separated by commas
            want: for "color" and "segment": "less" of it, or "more"
            learning_rate: AdamW's; the reward's default when left out
            images: pictures judged per step; the reward's default when left out

        Returns:
            the run's name, a report with the scores of all steps, and the next picture to judge
        """
        spec = wished(reward, color, want, labels.split(","), want)
        yield from learn(run_id, count, spec, paint, learning_rate, images)

    def back(run_id: str, step: int) -> Iterator[Any]:
        """Go back to an earlier step: weights, pictures and randomness.

        Args:
            run_id: the run's name, from generate
            step: how many steps the run shall have behind it

        Returns:
            the run's name, a report with the scores of the steps left, and the picture to judge
        """
        with spoken():
            yield answer((yield from waiting(studio.back(run_id, step))))

    def export(run_id: str) -> tuple[str, str]:
        """The LoRA, and the whole run.

        Args:
            run_id: the run's name, from generate

        Returns:
            pytorch_lora_weights.safetensors for any diffusers pipeline, and a .zip of the run
        """
        with spoken():
            return str(studio.lora_file(run_id)), str(studio.archive(run_id))

    wish = [reward, paint, color, labels, want, rate, images]
    for work, inputs, outputs in (
        (generate, [prompt, *numbers.values()], answers),
        (step, [run_id, *wish], answers),
        (run, [run_id, count, *wish], answers),
        (back, [run_id, to_step], answers),
        (export, [run_id], list(files)),
    ):
        button.click(
            on_model_thread(work), inputs, outputs,
            api_name=work.__name__, concurrency_id="gpu", concurrency_limit=1,
        )  # fmt: skip


def open_models(model: str | None, segmenter: str | None) -> tuple[DiffusionModel, Segmenter, str]:
    """What was asked for, or else what fits the machine; and a line on what it is not, and why.

    On a GPU that is the paper's own pair of models. What cannot be loaded is replaced by the
    embedded one.
    """
    notes = []
    try:
        loaded = load_model(model or (STABLE_DIFFUSION if torch.cuda.is_available() else None))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind, default, text in (
        ("model", str, None, "diffusers folder or Hub id (on a GPU Stable Diffusion v1.4)"),
        ("segmenter", str, None, "folder or Hub id (the one that fits the model)"),
        ("runs", Path, "runs/studio", "folder where people's runs are kept (runs/studio)"),
        ("host", str, None, "address to serve on (127.0.0.1)"),
        ("port", int, None, "port to serve on (7860)"),
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
    options = parser.parse_args()
    # A core is left to the server and to a browser on the same machine: where another keeps one
    # of torch's threads waiting, all of them wait, and a step takes twice as long.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    model, segmenter, note = on_model_thread(open_models)(options.model, options.segmenter)
    studio = Studio(model, segmenter, options.runs)
    own_token = options.own_token or (is_local(options.host) and not options.share)
    launch(
        Page(studio, note, own_token),
        server_name=options.host, server_port=options.port, share=options.share,
    )  # fmt: skip


def is_local(host: str | None) -> bool:
    """Whether a page served there is for this machine alone; None is what Gradio takes then."""
    host = host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    with contextlib.suppress(ValueError):
        return not get_space() and ipaddress.ip_address(host.strip("[]")).is_loopback
    return not get_space() and host == "localhost"


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


def launch(page: Page, waiting: int = 32, **options: Any) -> gr.Blocks:
    """Serve the page; `options` are those of Gradio's launch.

    waiting: how many may stand in the queue; whoever comes then is told to try again
    """
    blocks = page.build()
    blocks.queue(max_size=waiting).launch(
        theme=theme(),
        css=CSS,
        run_history=False,
        mcp_server=True,
        ssr_mode=False,
        **options,
    )
    return blocks


if __name__ == "__main__":
    main()
