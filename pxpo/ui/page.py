"""The page: where things are, and which event does what. What events do is in `events.py`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio.utils import get_space
from PIL import Image

from ..card import base_of
from ..errors import without_folders
from ..rewards.painting import MOST_PIXELS
from ..settings import Settings
from ..studio import MOST_UPDATES, Studio
from . import api
from .canvas import Canvas, sketch
from .events import EXAMPLES, Events, Shown
from .parts import CSS, chip, errors_as_messages, offer, opening_example, setting, theme, visitor
from .rewards import RewardTabs

MOMENTARY = 64  # events that need no turn, and so are over in a moment, at the same time


def launch(page: Page, waiting: int = 32, **options: Any) -> gr.Blocks:
    """Serve the page; `options` are those of Gradio's launch.

    waiting: how many may stand in line; whoever comes then is asked to try again
    """
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
        **options,
    )
    return blocks


class Page:
    """The page on one studio."""

    def __init__(self, studio: Studio, note: str = "", own_token: bool = False) -> None:
        """note: what its visitors should know; own_token: as `Events` takes it."""
        self.studio, self.note = studio, without_folders(note)
        studio.thread.who = visitor
        self.example = opening_example(studio.model)
        self.events = Events(studio, bool(self.example), own_token)

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
        # Whether the work under way, or cut off, wants more; None for work that failed.
        self.unfinished = gr.State(False)
        self.ended = gr.State()  # when the last event has ended; whether paint on the canvas stays
        gr.Markdown(
            "# Paint what you want more of. Watch the model learn it.\n"
            f"`{chip(self.studio.model)}` {self.note}",
            elem_id="title",
        )
        with gr.Row():
            with gr.Column(scale=11, min_width=320):
                self.canvas = Canvas(self.studio, self.example)
            with gr.Column(scale=9, min_width=320):
                self.layout_loop()
        self.layout_results()
        self.layout_settings()
        self.layout_files()
        self.layout_push()

    def layout_loop(self) -> None:
        """Before and now, and all that is pressed again and again."""
        compared = (self.example["before"], self.example["after"]) if self.example else None
        self.slider = gr.ImageSlider(
            compared, label="Before any step, and now", interactive=False, elem_id="slider",
            format="png", buttons=[],
        )  # fmt: skip
        self.status = gr.Textbox(
            label="Status", interactive=False, elem_id="status", lines=1, max_lines=3
        )
        with gr.Row():
            self.step_button = gr.Button("Step", variant="primary", elem_id="step")
            self.run_button = gr.Button("Run", elem_id="run-many")
            self.count = gr.Number(
                5, label="Steps of Run", precision=0, minimum=1, maximum=MOST_UPDATES,
                container=False, show_label=False, min_width=60, elem_id="count",
            )  # fmt: skip
        with gr.Row():
            self.stop_button = gr.Button("Stop", variant="stop", min_width=80, elem_id="stop")
            self.back_button = gr.Button("Back", min_width=80, elem_id="back")
            self.reset_button = gr.Button("Reset", min_width=80, elem_id="reset")
            self.forget_button = gr.Button(
                "Forget the wish", scale=2, min_width=160, elem_id="forget"
            )
        self.strength = gr.Slider(
            0.005, 0.1, Settings.strength, step=0.005, label="Strength", elem_id="strength",
            info="how far a step moves the model",
        )  # fmt: skip
        self.tabs = RewardTabs(self.studio.tools)

    def layout_results(self) -> None:
        self.history = gr.Gallery(
            label="Steps: click one to go back to it", columns=8,
            fit_columns=False, height=210, interactive=False, allow_preview=False,
            object_fit="contain", elem_id="history", format="png", buttons=[], visible=False,
        )  # fmt: skip
        with gr.Row():
            self.curve = gr.Plot(show_label=False, elem_id="curve", visible=False)
            self.heat = gr.Image(
                label="The reward: green gains, red loses", interactive=False,
                format="png", elem_id="heat", height=330, buttons=[], visible=False,
                alt_text="the run's picture, green where the reward gains and red where it loses",
            )  # fmt: skip

    def layout_settings(self) -> None:
        prompt, seed = EXAMPLES[0]
        with gr.Accordion("Prompt and settings", open=False):
            with gr.Row():
                self.prompt = gr.Dropdown(
                    [prompt for prompt, _ in EXAMPLES], value=prompt,
                    allow_custom_value=True, label="Prompt", scale=3, elem_id="prompt",
                )  # fmt: skip
                self.seed = setting("seed", "Seed", seed)
                self.new_button = gr.Button("New picture", elem_id="fresh")
            with gr.Row():
                usual = self.studio.model.defaults
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
        self.examples = gr.Examples(
            [list(one) for one in EXAMPLES],
            [self.prompt, self.seed],
            label="Examples",
            elem_id="examples",
        )

    def layout_files(self) -> None:
        with gr.Row():
            self.save_lora = gr.Button("Download LoRA", elem_id="save-lora")
            self.save_run = gr.Button("Download the run", elem_id="save-run")
            self.upload = gr.UploadButton(
                "Go on with a run or a LoRA", file_types=[".zip", ".safetensors"], elem_id="upload"
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
                    visible=not base_of(self.studio.model.name).hub,
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
        self.places = {name: getattr(self, name) for name in
                       ("run", "slider", "history", "curve", "status")}  # fmt: skip
        self.wire_work(page)
        self.wire_refresh()
        self.canvas.wire(self.run, **self.quiet)
        self.wire_files()

    def wire_work(self, page: gr.Blocks) -> None:
        """All that the model works for."""
        events, on_page = self.events, self.on_page
        working: dict[str, Any] = {
            "outputs": [*self.places.values(), self.unfinished], "show_progress_on": self.status,
            "concurrency_limit": None, "api_visibility": "private",  # the studio gives turns
        }  # fmt: skip
        new_run = [self.prompt, self.seed, *self.sampling]

        def back_to(run: str, thumbnail: gr.SelectData) -> Iterator[Shown]:
            return events.back(run, thumbnail.index)

        learning = self.wire_learning(working)
        keeping_paint = (  # but for what the wish has heard
            *learning,
            self.forget_button.click(on_page(events.forget_wish), self.run, **working),
            self.back_button.click(on_page(events.back), self.run, **working),
            self.history.select(on_page(back_to), self.run, **working),
        )
        changing_paint = (
            gr.on([page.load], on_page(events.open), self.run, **working),
            gr.on(
                [self.new_button.click, self.reset_button.click], on_page(events.start), new_run,
                **working,
            ),
            self.examples.load_input_event.then(on_page(events.start), new_run, **working),
            self.upload.upload(on_page(events.admit), [self.upload, *new_run], **working),
        )  # fmt: skip
        self.end(keeping_paint, paint_stays=True)
        self.end(changing_paint, paint_stays=False)
        self.stop_button.click(
            None, cancels=[*keeping_paint, *changing_paint], api_visibility="private"
        )

    def wire_learning(self, working: dict[str, Any]) -> tuple[Any, Any]:
        """The events of Step and Run, which are refused without paint."""
        refused_at = [self.canvas.brush, self.status]  # one over the canvas, one beside Step
        inputs = [self.count, self.run, *self.tabs.inputs, *self.canvas.inputs, self.strength,
                  self.images, *refused_at]  # fmt: skip

        def many(count: float | None, run: str, *values: Any) -> Iterator[Shown]:
            *chosen, drawn, waiting, drawn_on, strength, images, _, _ = values
            reward = self.tabs.spec(*chosen)
            paint = self.canvas.paint(run, drawn, waiting, drawn_on)
            return self.events.learn(int(count or 1), run, reward, paint, strength, images)

        def once(_: float | None, *values: Any) -> Iterator[Shown]:
            return many(1, *values)

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
                self.on_page(work), inputs, validator=refuse_without_paint, **working
            )

        return read_then(self.step_button, once), read_then(self.run_button, many)

    def on_page(self, work: Callable[..., Iterator[Shown]]) -> Callable[..., Iterator[Any]]:
        """As an event, on the model's thread."""

        @functools.wraps(work)
        def event(*values: Any) -> Iterator[dict[Any, Any]]:
            try:
                with errors_as_messages():
                    for shown in work(*values):
                        yield {**self.by_part(shown), self.unfinished: True}
                yield {self.unfinished: False}
            except gr.Error as error:
                yield {self.status: error.message, self.unfinished: None}
                raise

        return self.studio.thread.wrap(event)

    def by_part(self, shown: Shown) -> dict[Any, Any]:
        hidden_while_empty = ("history", "curve")
        return {
            self.places[name]: gr.update(value=value, visible=bool(value))
            if name in hidden_while_empty
            else value
            for name, value in shown.items()
        }

    def end(self, events: tuple[Any, ...], paint_stays: bool) -> None:
        """After each event, and also once Stop has cut it off: say so, and refresh the page."""

        @errors_as_messages()
        def ended(run: str, unfinished: bool | None) -> dict[Any, Any]:
            shown = self.events.stopped(run) if unfinished else {}
            now = time.monotonic_ns()  # so that `ended` changes
            return {
                **self.by_part(shown),
                self.unfinished: False,
                self.ended: (now, paint_stays or unfinished is not False),
            }

        outputs = [*self.places.values(), self.unfinished, self.ended]
        for event in events:
            event.then(
                self.studio.thread.wrap(ended), [self.run, self.unfinished], outputs, **self.quiet
            )

    def wire_refresh(self) -> None:
        """What follows each event, and another choice of reward."""

        @errors_as_messages()
        def heat(run: str, *values: Any) -> dict[str, Any]:
            picture = self.events.heat_map(run, self.tabs.spec(*values))
            return gr.update(value=picture, visible=picture is not None)

        def show_heat(listen: Callable[..., Any]) -> None:
            listen(
                self.studio.thread.wrap(heat), [self.run, *self.tabs.inputs], self.heat,
                **self.quiet,
            )  # fmt: skip

        renewed = self.canvas.renew(self.ended.change, self.run, self.ended, **self.quiet)
        show_heat(renewed.then)
        self.tabs.on_change(show_heat, **self.quiet)

    def wire_files(self) -> None:
        for button, make in (
            (self.save_lora, self.studio.lora_file), (self.save_run, self.studio.archive)
        ):  # fmt: skip
            save = self.studio.thread.wrap(functools.partial(self.events.save, make))
            button.click(save, self.run, self.file, **self.quiet).success(
                None, None, None, js="() => document.querySelector('#file').click()", **self.quiet
            )
        self.push_button.click(
            self.events.push, [self.run, self.repo, self.private, self.with_base, self.token],
            self.pushed, concurrency_limit=4, api_visibility="private",
        )  # fmt: skip
