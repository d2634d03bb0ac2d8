"""The page: where things are, and which event does what. What events do is in `events.py`."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio.utils import get_space
from PIL import Image

from ..embedded import EXAMPLES as PICTURES
from ..errors import SettingError, without_folders
from ..rewards.painting import MOST_PIXELS
from ..settings import Settings
from ..studio import MOST_UPDATES, Studio
from . import api
from .canvas import Canvas, sketch
from .events import EXAMPLES, SLIDERS, Events, Example, Place, Shown
from .masks import MoreWays
from .parts import (
    CSS,
    HELP,
    TITLE,
    chip,
    errors_as_messages,
    is_tiny_world,
    offer,
    offered,
    setting,
    theme,
    visitor,
    words,
)
from .rewards import RewardTabs

MOMENTARY = 64  # events that need no turn, and so are over in a moment, at the same time

MOST_TABS = 1000  # remembered; of each Gradio keeps a quarter of a MiB, and what was painted there


def launch(page: Page, waiting: int = 32, **options: Any) -> gr.Blocks:
    """Serve the page; `options` are those of Gradio's launch.

    waiting: how many may stand in line; whoever comes then is asked to try again
    """
    if "GRADIO_TEMP_DIR" not in os.environ:
        # Of its own: at its end Gradio deletes its pictures, which another server may show as well.
        os.environ["GRADIO_TEMP_DIR"] = folder = tempfile.mkdtemp(prefix="pxpo-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    page.studio.thread.waiting = waiting
    # Gradio opens what is painted; of more than twice this Pillow opens nothing.
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2
    blocks = page.build()
    blocks.queue(max_size=waiting + MOMENTARY).launch(
        theme=theme(),
        css=CSS,
        run_history=False,
        mcp_server=True,
        ssr_mode=False,
        max_threads=waiting + MOMENTARY,
        state_session_capacity=MOST_TABS,
        max_file_size=int(page.studio.most_bytes / 2),
        **options,
    )
    return blocks


class Page:
    """The page on one studio."""

    def __init__(self, studio: Studio, note: str = "", own_token: bool = False) -> None:
        """note: what its visitors should know; own_token: as `Events` takes it."""
        self.studio, self.note = studio, without_folders(note)
        self.events = Events(studio, own_token)
        studio.thread.who = visitor

    def build(self) -> gr.Blocks:
        with gr.Blocks(
            title="PXPO Studio", analytics_enabled=False, delete_cache=(3600, 86400)
        ) as page:
            api.add(self.studio)  # first: an event of the page may have a verb's name as well
            self.layout()
            self.wire(page)
        return page

    # How it is laid out.

    def layout(self) -> None:
        self.run = gr.BrowserState("", storage_key="pxpo-run", secret="pxpo-studio")
        # Where this page stands, and where it was asked whether later steps may go.
        self.at, self.sure = gr.State(), gr.State()
        # Whether the work under way, or cut off, wants more; None for work that failed.
        self.unfinished = gr.State(False)
        self.ended = gr.State()  # when the last event has ended; whether paint on the canvas stays
        gr.Markdown(TITLE, elem_id="title")
        self.chip = gr.Markdown(chip(self.studio.model), elem_id="chip")
        if self.note:
            gr.Markdown(self.note)
        with gr.Row():
            with gr.Column(scale=11, min_width=320):
                self.canvas = Canvas(self.studio)
                self.layout_loop()
                self.ways = MoreWays(self.canvas)
            with gr.Column(scale=9, min_width=320):
                self.layout_choices()
        self.layout_results()
        self.layout_examples()
        self.layout_settings()
        self.layout_files()
        self.layout_push()
        with gr.Accordion("What learns, and what the numbers mean", open=False):
            gr.Markdown(HELP)

    def layout_loop(self) -> None:
        """All that is pressed again and again."""
        with gr.Row(elem_id="loop"):
            self.step_button = gr.Button("Step", variant="primary", min_width=90, elem_id="step")
            self.run_button = gr.Button("Run", min_width=60, elem_id="run-many")
            self.count = gr.Number(
                5, label="Steps of Run", precision=0, minimum=1, maximum=MOST_UPDATES,
                container=False, show_label=False, min_width=50, elem_id="count",
            )  # fmt: skip
            self.stop_button = gr.Button("Stop", min_width=60, elem_id="stop")
        self.status = gr.Textbox(
            label="Status", interactive=False, elem_id="status", lines=1, max_lines=6
        )
        with gr.Row():
            self.back_button, self.forward_button, self.reset_button = (
                gr.Button(name, size="md", min_width=70, elem_id=name.lower(), interactive=False)
                for name in ("Back", "Forward", "Reset")
            )
            self.forget_button = gr.Button(
                "Forget the wish", size="md", min_width=140, elem_id="forget"
            )

    def layout_choices(self) -> None:
        """Where the reward comes from, before and now, and the two sliders that a person needs."""
        self.tabs = RewardTabs(self.studio.tools)
        self.slider = gr.ImageSlider(
            label="Before any step (left) and now (right)", interactive=False, elem_id="slider",
            format="png", buttons=[],
        )  # fmt: skip
        self.others = gr.Image(
            label="Other seeds, which no step has learnt from", interactive=False, format="png",
            elem_id="others", buttons=[], visible=False,
            alt_text="pictures of other seeds, each before any step and now",
        )  # fmt: skip
        with gr.Row():
            self.strength = gr.Slider(
                *SLIDERS["strength"], Settings.strength, step=0.005, label="Strength",
                elem_id="strength", info="how far a step moves the model", min_width=150,
            )  # fmt: skip
            self.hold = gr.Slider(
                *SLIDERS["hold"], Settings.hold, step=0.1, label="Keep the rest", elem_id="hold",
                info="how firmly what is not painted stays", min_width=150,
            )  # fmt: skip

    def layout_results(self) -> None:
        self.history = gr.Gallery(
            label="Steps: click one to go to it", columns=9,
            fit_columns=False, height=210, interactive=False, allow_preview=False,
            object_fit="contain", elem_id="history", format="png", buttons=[], visible=False,
        )  # fmt: skip
        with gr.Row():
            self.heat = gr.Image(
                label="How you were understood: green gains, red loses", interactive=False,
                format="png", elem_id="heat", buttons=[], visible=False,
                alt_text="the run's picture, green where the reward gains and red where it loses",
            )  # fmt: skip
            self.curve = gr.Plot(show_label=False, elem_id="curve", visible=False)

    def layout_examples(self) -> None:
        """Pictures to begin with, as buttons, which a keyboard reaches as well."""
        gr.Markdown("**Begin with another picture**")
        self.examples = {}
        with gr.Row(elem_id="examples"):
            for example in EXAMPLES:
                if example.reward in self.tabs.tabs:
                    picture = PICTURES / f"{example.seed}.jpg"
                    known = is_tiny_world(self.studio.model) and picture.exists()
                    self.examples[example] = gr.Button(
                        example.prompt, icon=picture if known else None, min_width=130,
                        elem_classes="example",
                    )  # fmt: skip

    def layout_settings(self) -> None:
        first, usual = EXAMPLES[0], self.studio.model.defaults
        with gr.Accordion("Prompt and settings", open=False, elem_id="settings"):
            with gr.Row():
                self.prompt = gr.Textbox(
                    first.prompt, label="Prompt", scale=3, lines=1, max_lines=4, elem_id="prompt",
                )  # fmt: skip
                self.seed = setting("seed", "Seed", first.seed)
                self.new_button = gr.Button("New picture", elem_id="fresh")
            if self.studio.model.words:
                gr.Markdown(words(self.studio.model), elem_id="words")
            with gr.Row():
                self.sampling = [
                    setting("steps", "DDIM steps", usual["steps"]),
                    setting("guidance_scale", "Guidance", usual["guidance_scale"]),
                    setting("rank", "LoRA rank", Settings.rank),
                ]
                self.images = setting("images", "Pictures per step", usual["images"])
            gr.Markdown(
                "Steps, guidance and rank count from the next new picture on.\n\n"
                + offer(self.studio.model)
            )
        self.new_run = [self.prompt, self.seed, *self.sampling, self.run]
        self.fields = {
            "prompt": self.prompt, "seed": self.seed, "images": self.images, "hold": self.hold,
            "strength": self.strength,
            **dict(zip(("steps", "guidance_scale", "rank"), self.sampling, strict=True)),
        }  # fmt: skip

    def layout_files(self) -> None:
        with gr.Row():
            self.save_lora = gr.Button("Download LoRA", elem_id="save-lora")
            self.save_run = gr.Button("Download the run", elem_id="save-run")
            self.upload = gr.UploadButton(
                "Go on from a file", file_types=[".zip", ".safetensors"], elem_id="upload"
            )
            self.file = gr.DownloadButton(visible="hidden", elem_id="file")

    def layout_push(self) -> None:
        own_token = self.events.own_token
        with gr.Accordion("Push to the Hugging Face Hub", open=False), gr.Row():
            self.repo = gr.Textbox(
                label="Repository", placeholder="OWNER/NAME", info="made if need be", elem_id="repo"
            )
            with gr.Column(min_width=160):
                self.private = gr.Checkbox(label="Private")
                self.with_base = gr.Checkbox(
                    label="With the base model beside it",
                    visible=self.events.gives_base,
                )
            if get_space():
                gr.LoginButton(elem_id="login")
            self.token = gr.Textbox(
                label="Token", type="password",
                placeholder="HF_TOKEN, if that is set" if own_token else "hf_…",
                info="with the right to write; used once, kept nowhere", elem_id="token",
                visible=not get_space(),
            )  # fmt: skip
            self.push_button = gr.Button("Push", elem_id="push")
            self.pushed = gr.Markdown(elem_id="pushed")

    # What its events do.

    def wire(self, page: gr.Blocks) -> None:
        # On the status, as whatever shows progress is read, and sent, for that as well.
        self.quiet: dict[str, Any] = {
            "show_progress": "hidden", "show_progress_on": self.status, "api_visibility": "private",
        }  # fmt: skip
        self.places = {
            name: getattr(self, name) for name in (
                "run", "at", "sure", "slider", "others", "history", "curve", "chip", "status",
                "back_button", "forward_button", "reset_button",
            )
        }  # fmt: skip
        self.learning = [self.step_button, self.run_button]
        self.shown = [
            *self.places.values(), *self.fields.values(), *self.tabs.chosen, *self.tabs.fields,
        ]  # fmt: skip
        self.wire_work(page)
        self.wire_refresh()
        self.canvas.wire(self.run, **self.quiet)
        self.ways.wire(self.run, **self.quiet)
        self.wire_files()

    def wire_work(self, page: gr.Blocks) -> None:
        """All that the model works for."""
        events, on_page, going_on = self.events, self.on_page, self.going_on
        working: dict[str, Any] = {
            "outputs": [*self.shown, *self.learning, self.unfinished],
            "show_progress_on": self.status,
            "concurrency_limit": None, "api_visibility": "private",  # the studio gives turns
        }  # fmt: skip
        at_run = [self.at, self.run]
        checked = {**working, "validator": self.refuse_settings}

        def go_to(run: str, thumbnail: gr.SelectData) -> Iterator[Shown]:
            return events.go_to(run, thumbnail.index)

        # Step would be of the run before, until there is another.
        begins = functools.partial(on_page, begins=True)
        learning = self.wire_learning(working)
        # First what is in the wish leaves the canvas: forgotten, it would be new again.
        unpainted = self.canvas.empty(
            self.forget_button.click, self.run, gr.State((0, True)), **self.quiet
        )
        keeping_paint = (  # but for what is in the wish
            *learning,
            unpainted.then(going_on(events.forget_wish), at_run, **working),
            self.back_button.click(going_on(events.back), at_run, **working),
            self.forward_button.click(going_on(events.forward), at_run, **working),
            self.reset_button.click(going_on(events.reset), at_run, **working),
            self.history.select(on_page(go_to), self.run, **working),
        )
        changing_paint = (
            gr.on([page.load], begins(events.open), self.run, **working),
            gr.on(
                [self.new_button.click, self.prompt.submit], begins(events.start), self.new_run,
                **checked,
            ),
            *(
                self.chosen(button, example).then(begins(events.start), self.new_run, **working)
                for example, button in self.examples.items()
            ),
            self.upload.upload(begins(events.admit), [self.upload, *self.new_run], **working),
        )  # fmt: skip
        self.end(keeping_paint, paint_stays=True)
        self.end(changing_paint, paint_stays=False)
        self.stop_button.click(
            None, cancels=[*keeping_paint, *changing_paint], api_visibility="private"
        )

    def chosen(self, button: gr.Button, example: Example) -> Any:
        """The event of an example's button: its fields and its tab."""
        to = {"prompt": example.prompt, "seed": example.seed}
        return button.click(
            lambda: [*to.values(), *self.tabs.choice(example.reward)],
            None, [self.prompt, self.seed, *self.tabs.chosen], **self.quiet,
        )  # fmt: skip

    def refuse_settings(self, *values: Any) -> list[dict[str, Any]]:
        """What is wrong with the fields of a new picture, each said where it is typed."""
        names = ("prompt", "seed", "steps", "guidance_scale", "rank")
        *fields, _ = values  # and the run before
        faults = [self.fault(n, v) for n, v in zip(names, fields, strict=True)]
        return [gr.validate(not fault, fault) for fault in (*faults, "")]

    def fault(self, name: str, value: Any) -> str:
        """What is wrong with this value of a setting; mostly nothing."""
        try:
            settings = self.studio.model.filled(Settings(**{name: value}))
            if name == "steps":
                self.studio.model.steps(settings)  # which may have fewer
        except SettingError as error:
            return error.for_visitors()
        return ""

    def wire_learning(self, working: dict[str, Any]) -> tuple[Any, Any]:
        """The events of Step and Run, which are refused without paint."""
        refused_at = [self.canvas.brush, self.status]  # one over the canvas, one beside Step
        inputs = [self.at, self.run, self.count, self.sure, *self.tabs.inputs, *self.canvas.inputs,
                  self.strength, self.hold, self.images, *refused_at]  # fmt: skip

        def many(
            run: str, count: float | None, sure: Place | None, *values: Any
        ) -> Iterator[Shown]:
            *chosen, drawn, waiting, drawn_on, strength, hold, images, _, _ = values
            return self.events.learn(
                int(count or 1), run, sure, self.tabs.spec(*chosen),
                self.canvas.paint(run, drawn, waiting, drawn_on),
                strength=strength, hold=hold, images=images,
            )  # fmt: skip

        def once(run: str, _: float | None, *values: Any) -> Iterator[Shown]:
            return many(run, 1, *values)

        @errors_as_messages()
        def refuse_without_paint(*values: Any) -> list[dict[str, Any]]:
            given = dict(zip(inputs, values, strict=True))
            reward = self.tabs.spec(*(given[part] for part in self.tabs.inputs))
            paint = sketch(given[self.canvas.drawn], given[self.canvas.waiting])
            missing = reward.by_hand and paint is None and not self.events.wishes(given[self.run])
            return [
                gr.validate(not (missing and part in refused_at), "Paint + or − first.")
                for part in inputs
            ]

        def read_then(button: gr.Button, work: Callable[..., Iterator[Shown]]) -> Any:
            return self.canvas.read(button.click, **self.quiet).then(
                self.going_on(work), inputs, validator=refuse_without_paint, **working
            )

        return read_then(self.step_button, once), read_then(self.run_button, many)

    def going_on(self, work: Callable[..., Iterator[Shown]]) -> Callable[..., Iterator[Any]]:
        """As an event of `at` and `run`: of a run that another tab has changed it shows how it is
        instead."""

        def event(at: Place | None, run: str, *values: Any) -> Iterator[Shown]:
            if overtaken := self.events.overtaken(at, run):
                yield overtaken
            else:
                yield from work(run, *values)

        return self.on_page(event)

    def on_page(
        self, work: Callable[..., Iterator[Shown]], begins: bool = False
    ) -> Callable[..., Iterator[Any]]:
        """As an event, on the model's thread. begins: nothing can be learnt meanwhile."""

        @functools.wraps(work)
        def event(*values: Any) -> Iterator[dict[Any, Any]]:
            try:
                if begins:
                    off = {button: gr.update(interactive=False) for button in self.learning}
                    yield {**off, self.unfinished: True}
                with errors_as_messages():
                    for shown in work(*values):
                        yield {**self.by_part(shown), self.unfinished: True}
                yield {self.unfinished: False}
            except gr.Error as error:  # raised here it would cover the status
                if error.print_exception:
                    traceback.print_exception(error)
                gr.Warning(error.message, duration=6)
                yield {self.status: error.message, self.unfinished: None}

        return self.studio.thread.wrap(event)

    def by_part(self, shown: Shown) -> dict[Any, Any]:
        hidden_while_empty = ("others", "history", "curve")
        parts: dict[Any, Any] = {}
        for name, value in shown.items():
            if name == "fields":
                parts |= {self.fields[n]: v for n, v in value.items() if n in self.fields}
                parts |= self.tabs.showing(value["reward"])
            elif name in hidden_while_empty:
                parts[self.places[name]] = gr.update(value=value, visible=bool(value))
            else:
                parts[self.places[name]] = value
        return parts

    def end(self, events: tuple[Any, ...], paint_stays: bool) -> None:
        """After each event, and also once Stop has cut it off: say so, and refresh the page."""

        def ended(run: str, unfinished: bool | None) -> dict[Any, Any]:
            shown = self.events.stopped(run) if unfinished else {}
            now = time.monotonic_ns()  # so that `ended` changes
            return {
                **self.by_part(shown),
                **{button: gr.update(interactive=True) for button in self.learning},
                self.unfinished: False,
                self.ended: (now, paint_stays or unfinished is not False),
            }

        outputs = [*self.places.values(), *self.learning, self.unfinished, self.ended]
        for event in events:
            event.then(self.canvas.wrap(ended), [self.run, self.unfinished], outputs, **self.quiet)

    def wire_refresh(self) -> None:
        """What follows each event, and another choice of reward."""

        def heat(run: str, *values: Any) -> dict[str, Any]:
            picture = self.events.heat_map(run, self.tabs.spec(*values))
            return gr.update(value=picture, visible=picture is not None)

        def show_heat(listen: Callable[..., Any]) -> None:
            listen(self.canvas.wrap(heat), [self.run, *self.tabs.inputs], self.heat, **self.quiet)

        renewed = self.canvas.renew(self.ended.change, self.run, self.ended, **self.quiet)
        self.ways.renew(renewed.then, self.run, **self.quiet)
        show_heat(renewed.then)
        self.tabs.on_change(show_heat, **self.quiet)

    def wire_files(self) -> None:
        for button, make in (
            (self.save_lora, self.studio.lora_file), (self.save_run, self.studio.archive)
        ):  # fmt: skip
            button.click(
                self.canvas.wrap(lambda run, make=make: offered(make(run))),
                self.run,
                self.file,
                **self.quiet,
            ).success(
                None, None, None, js="() => document.querySelector('#file').click()", **self.quiet
            )
        self.push_button.click(
            self.events.push, [self.run, self.repo, self.private, self.with_base, self.token],
            self.pushed, concurrency_limit=4, api_visibility="private",
        )  # fmt: skip
