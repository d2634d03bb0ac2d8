"""PXPO Studio's page: paint on a generated picture, press Step, and the model learns.

Layout and wiring only; what happens is in the `pxpo` package.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "0")

import gradio as gr  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from pxpo import (  # noqa: E402
    ColorReward,
    DiffusionModel,
    Progress,
    PxpoError,
    Segmenter,
    SegmentReward,
    Session,
    back,
    generate,
    learn,
    load_model,
    new_session,
    painted_map,
    save_lora,
    settings_for,
)
from pxpo.plots import heat_map, reward_curve, strip, to_picture  # noqa: E402

MORE, LESS = "＋ more (+2)", "− less (−2)"
GREEN, RED = ("#00FF00", 0.6), ("#FF0000", 0.6)
CANVAS = 512
PROMPTS = [
    "nature landscape",
    "nature landscape with a lake and trees at sunset",
    "red taxi in traffic",
    "portrait of a man on the beach",
]
LANE = threading.Lock()  # one piece of work at a time on the one model


def brush(choice: str) -> gr.Brush:
    """The chosen colour first: it is the one in the hand."""
    colors = [GREEN, RED] if choice == MORE else [RED, GREEN]
    return gr.Brush(colors=colors, color_mode="fixed", default_size=40)


def paint_of(value: dict[str, Any] | None) -> Image.Image:
    """The painted layers of the editor as one RGBA picture."""
    layers = [layer.convert("RGBA") for layer in (value or {}).get("layers") or ()]
    if not layers or not any(layer.getextrema()[3][1] for layer in layers):
        raise gr.Error("Paint + (green) or − (red) on the picture first.", print_exception=False)
    return functools.reduce(Image.alpha_composite, layers)


def canvas(session: Session) -> dict[str, Any]:
    """The picture to paint on, as the editor's value."""
    assert session.trajectory is not None
    picture = to_picture(session.trajectory.images[0]).resize(
        (CANVAS, CANVAS), Image.Resampling.LANCZOS
    )
    return {"background": picture, "layers": [], "composite": None}


def shown(session: Session, step: int) -> Image.Image:
    picture = to_picture(session.history[step].shown[0])
    return picture.resize((CANVAS, CANVAS), Image.Resampling.LANCZOS)


def view(session: Session, status: str) -> dict[str, Any]:
    """All of a run that the page shows, besides the canvas."""
    rewards = [snapshot.metrics for snapshot in session.history[1:]]
    captions = ["before", *(f"{i} · {m['reward']:+.3f}" for i, m in enumerate(rewards, 1))]
    curve = reward_curve(
        {"judged images": ([m["reward"] for m in rewards], [m["reward_std"] for m in rewards])}
    )
    return {
        "session": session,
        "slider": (shown(session, 0), shown(session, session.step)),
        "gallery": [(shown(session, i), caption) for i, caption in enumerate(captions)],
        "curve": curve if rewards else None,
        "status": status,
    }


def build(model: DiffusionModel, segmenter: Segmenter) -> gr.Blocks:
    """The page, on one model and one segmenter shared by all visitors."""

    def working(work: Callable[[], Iterator[Progress]]) -> Iterator[dict[str, Any]]:
        """Run the generator, showing where it stands; its return value ends this one."""
        with LANE:
            try:
                running = work()
                while True:
                    progress = next(running)
                    yield {"status": f"{progress.phase} {progress.done}/{progress.total} …"}
            except StopIteration as end:
                return end.value
            except PxpoError as error:
                raise gr.Error(str(error), print_exception=False) from error

    def named(updates: dict[str, Any]) -> dict[Any, Any]:
        return {parts[name]: value for name, value in updates.items()}

    def opened(prompt: str, seed: int) -> Iterator[dict[Any, Any]]:
        def work():
            settings = settings_for("paint", prompt=prompt, seed=int(seed), shown=1)
            session = yield from new_session(model, settings)
            return (yield from generate(model, session))

        session = yield from map_yields(working(work))
        unknown = model.unknown_words(prompt)
        note = f" The model never learnt the word {', '.join(unknown)}." if unknown else ""
        yield named(view(session, "Paint what you want more (green) or less (red) of." + note))

    def painted(session: Session, value: dict[str, Any]) -> Iterator[dict[Any, Any]]:
        reward_map = painted_map(paint_of(value))[None]

        def work():
            settings = replace(
                settings_for("paint", prompt=session.settings.prompt, seed=session.settings.seed),
                shown=1,
            )
            learnt = yield from learn(model, replace(session, settings=settings), reward_map)
            return (yield from generate(model, learnt))

        learnt = yield from map_yields(working(work))
        share = (reward_map > 0).float().mean(), (reward_map < 0).float().mean()
        yield named(
            view(learnt, f"Step {learnt.step} · painted + {share[0]:.0%}, − {share[1]:.0%}")
        )

    def automatic(
        session: Session, kind: str, reward: Callable[[Tensor], Tensor]
    ) -> Iterator[dict[Any, Any]]:
        heat: list[Image.Image] = []

        def work():
            settings = settings_for(
                kind, prompt=session.settings.prompt, seed=session.settings.seed, shown=1
            )
            judged = yield from generate(model, replace(session, settings=settings))
            images = judged.trajectory.images  # type: ignore[union-attr]
            maps = reward(images)
            heat.extend(heat_map(i, m) for i, m in zip(images, maps, strict=True))
            learnt = yield from learn(model, judged, maps)
            painting = settings_for("paint", prompt=settings.prompt, seed=settings.seed, shown=1)
            return (yield from generate(model, replace(learnt, settings=painting)))

        learnt = yield from map_yields(working(work))
        reward_mean = learnt.history[-1].metrics["reward"]
        update = view(learnt, f"Step {learnt.step} · reward {reward_mean:+.4f}")
        yield named({**update, "heat": strip([heat[:8]], [""] * len(heat[:8]))})

    def map_yields(work: Iterator[dict[str, Any]]):
        """Pass progress on as updates of the page; hand back the result."""
        while True:
            try:
                updates = next(work)
            except StopIteration as end:
                return end.value
            yield named(updates)

    def by_color(session: Session, color: str) -> Iterator[dict[Any, Any]]:
        yield from automatic(session, "color", ColorReward(color))

    def by_segment(session: Session, labels: list[str], sign: str) -> Iterator[dict[Any, Any]]:
        try:
            reward = SegmentReward(segmenter, labels, 1 if sign == MORE else -1)
        except PxpoError as error:
            raise gr.Error(str(error), print_exception=False) from error
        yield from automatic(session, "segment", reward)

    def stepped_back(session: Session) -> Iterator[dict[Any, Any]]:
        if not session.step:
            raise gr.Error("This is the beginning; there is no step to go back to.",
                           print_exception=False)  # fmt: skip
        earlier = yield from map_yields(
            working(lambda: generate(model, back(session, session.step - 1)))
        )
        yield named(view(earlier, f"Back at step {earlier.step}."))

    def exported(session: Session) -> str:
        with LANE:
            return str(save_lora(session.lora, Path(tempfile.mkdtemp(prefix="pxpo-"))))

    name = "Tiny World" if "tiny_world" in model.name else model.name
    with gr.Blocks(title="PXPO Studio", analytics_enabled=False) as page:
        session = gr.State()
        gr.Markdown(
            "# Paint what you want more of. Watch the model learn it.\n"
            f"`{name} · {model.device.type.upper()}`"
        )
        with gr.Row():
            with gr.Column(scale=11):
                hand = gr.Radio([MORE, LESS], value=MORE, label="Brush", elem_id="hand")
                editor = gr.ImageEditor(
                    type="pil", sources=(), transforms=(), layers=False, format="png",
                    canvas_size=(CANVAS, CANVAS), fixed_canvas=True, brush=brush(MORE),
                    eraser=gr.Eraser(24), label="The picture to judge", elem_id="ed",
                )  # fmt: skip
            with gr.Column(scale=9):
                slider = gr.ImageSlider(
                    label="Step 0 against now", interactive=False, elem_id="slider", format="png",
                    height=CANVAS,
                )  # fmt: skip
                status = gr.Textbox(label="Status", interactive=False, elem_id="status")
                with gr.Tabs():
                    with gr.Tab("Paint"):
                        step_paint = gr.Button("Step", variant="primary", elem_id="step")
                    with gr.Tab("Less of a colour"):
                        color = gr.Dropdown(
                            ["blue", "red", "green"], value="blue", allow_custom_value=True,
                            label="Colour (a channel, or any CSS colour)",
                        )  # fmt: skip
                        step_color = gr.Button("Step", variant="primary", elem_id="step-color")
                    with gr.Tab("SegFormer"):
                        labels = gr.Dropdown(
                            list(segmenter.labels), value=["Hair"], multiselect=True, label="Find"
                        )
                        sign = gr.Radio([MORE, LESS], value=LESS, label="And want")
                        step_segment = gr.Button("Step", variant="primary", elem_id="step-segment")
                with gr.Row():
                    step_back = gr.Button("Back", elem_id="back")
                    reset = gr.Button("Reset", elem_id="reset")
                    export = gr.DownloadButton("Download LoRA", elem_id="export")
        gallery = gr.Gallery(
            label="History", columns=8, height=200, interactive=False, elem_id="history",
            format="png",
        )  # fmt: skip
        with gr.Row():
            curve = gr.Plot(label="Reward", elem_id="curve")
            heat = gr.Image(label="Reward of the judged images", interactive=False, format="png",
                            elem_id="heat")  # fmt: skip
        with gr.Accordion("Prompt and seed", open=False):
            prompt = gr.Dropdown(PROMPTS, value=PROMPTS[0], allow_custom_value=True, label="Prompt")
            seed = gr.Number(3, label="Seed", precision=0, minimum=0)

        parts = {"session": session, "slider": slider, "gallery": gallery, "curve": curve,
                 "status": status, "heat": heat}  # fmt: skip
        run = {"outputs": list(parts.values()), "show_progress_on": status,
               "concurrency_id": "gpu", "concurrency_limit": 1}  # fmt: skip

        def then_show(event: Any) -> None:
            # A mounted editor paints reliably only if it is emptied before it gets a new picture.
            event.success(lambda: None, None, editor, show_progress="hidden").then(
                lambda s: canvas(s) if s else None, session, editor, show_progress="hidden"
            )

        hand.change(lambda choice: gr.ImageEditor(brush=brush(choice)), hand, editor,
                    show_progress="hidden")  # fmt: skip
        start = gr.on(
            [page.load, reset.click, prompt.change, seed.submit], opened, [prompt, seed], **run
        )
        for event in (
            start,
            step_paint.click(painted, [session, editor], **run),
            step_color.click(by_color, [session, color], **run),
            step_segment.click(by_segment, [session, labels, sign], **run),
            step_back.click(stepped_back, session, **run),
        ):
            then_show(event)
        export.click(exported, session, export)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="diffusers folder or Hub id (Tiny World)")
    parser.add_argument("--segmenter", help="folder or Hub id (the embedded one)")
    parser.add_argument("--port", type=int, help="port to serve on (7860)")
    parser.add_argument("--share", action="store_true", help="a public link for 72 hours")
    options = parser.parse_args()
    model = load_model(options.model or os.environ.get("PXPO_MODEL"))
    page = build(model, Segmenter(options.segmenter, str(model.device)))
    page.queue().launch(
        server_port=options.port, share=options.share, theme=gr.themes.Soft(), run_history=False
    )


if __name__ == "__main__":
    main()
