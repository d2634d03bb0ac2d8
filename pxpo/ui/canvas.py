"""The canvas: Gradio's image editor, its two brushes, and all that it needs to paint reliably.

What the editor of Gradio 6.31 does, and what is done about it here:

- As an input of an event, or where that shows its progress, it uploads its picture and layers at
  every sign of progress. So an event reads it once, in the browser, into `drawn`, an editor that is
  never shown; that one is the event's input.
- Given a new picture while it is mounted, it paints no stroke of a finger and loses a mouse's first
  one. So it is emptied first.
- It takes seconds to show what it was given. So that paint is kept in `waiting` meanwhile.
- Its own clear button clears the picture away as well. So the picture is brought back.
- Its swatches have no names for a screen reader. So a radio chooses the brush.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..rewards import as_paint, painted_map
from ..rewards.wish import shrunk
from ..run import Run
from ..studio import Studio
from .parts import errors_as_messages, large, on_canvas, refusal, served

PLUS, MINUS = "+ more (green)", "− less (red)"
GREEN, RED = ("#00FF00", 0.6), ("#FF0000", 0.6)
WIDTH = 28  # of a stroke, in pixels of the canvas: a tree's crown is wider
SETTLING = 10.0  # seconds that the editor may take to show what it was given

Waiting = tuple[Image.Image | None, float] | None
"""Paint that the editor was given, and until when it may not show it yet."""


def paint_of(value: dict[str, Any] | None) -> Image.Image | None:
    """The painted layers of the editor as one RGBA picture; None when nothing is painted."""
    layers = [layer.convert("RGBA") for layer in (value or {}).get("layers") or ()]
    if not any(layer.getextrema()[3][1] for layer in layers):
        return None
    return functools.reduce(Image.alpha_composite, layers)


def sketch(value: dict[str, Any] | None, waiting: Waiting) -> Image.Image | None:
    """The paint on the editor, or that which it was just given and may not show yet."""
    paint, until = waiting or (None, 0.0)
    return paint_of(value) or (paint if time.monotonic() < until else None)


def name(run: Run | None) -> str:
    """What tells the picture of a run from all others: its updates, and whose it is."""
    return f"{run.count} {run.id}" if run else "0 "


def named(picture: str) -> tuple[str, int]:
    """The run and the number of updates in such a name; of none those of an opening picture."""
    count, _, run_id = (picture or "0 ").partition(" ")
    return run_id, int(count)


def brush(choice: str) -> gr.Brush:
    return gr.Brush(
        colors=[GREEN, RED], default_color=GREEN if choice == PLUS else RED, color_mode="fixed",
        default_size=WIDTH // 2,  # a radius, as the eraser's
    )  # fmt: skip


def to_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1]."""
    pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def fitted(strokes: Tensor, picture: Tensor) -> Tensor:
    """The map `strokes` (H', W') in the size of the picture (..., H, W)."""
    return F.interpolate(strokes[None, None], picture.shape[-2:])[0, 0]


def without(paint: Image.Image, wished: Tensor) -> Image.Image | None:
    """The strokes that say anything else than the map `wished` (H, W) does there; None if none."""
    strokes = shrunk(painted_map(paint), wished.shape)
    if strokes.shape != wished.shape:
        return paint
    left = (strokes != 0) & (strokes != wished)
    if not left.any():
        return None
    mask = Image.fromarray(left.numpy()).resize(paint.size, Image.Resampling.NEAREST)
    return Image.composite(paint, Image.new("RGBA", paint.size), mask)


class Canvas:
    """The picture to paint on, and the paint.

    `inputs` are what an event needs for `paint`, once `read` has come before it.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        height, width = studio.model.image_size
        self.brush = gr.Radio([PLUS, MINUS], value=PLUS, label="Brush", elem_id="brush")
        self.editor = gr.ImageEditor(
            type="pil", sources=(), transforms=(), layers=False, format="png",
            canvas_size=on_canvas(width, height), fixed_canvas=True, brush=brush(PLUS),
            eraser=gr.Eraser(WIDTH // 2), label="The picture to paint on", show_label=False,
            elem_id="ed", height=560,
        )  # fmt: skip
        self.drawn = gr.ImageEditor(type="pil", visible=False)
        self.waiting = gr.State()
        self.before = gr.State()  # the strokes before the last change of them, or None
        # What `name` calls the picture that is on the editor, and that was in `drawn`.
        self.shown, self.drawn_on = (gr.Textbox(visible=False) for _ in range(2))
        self.inputs = [self.drawn, self.waiting, self.drawn_on]

    def paint(
        self, run_id: str, drawn: dict[str, Any] | None, waiting: Waiting, drawn_on: str
    ) -> Image.Image | None:
        """The strokes that are not part of the run's wish yet; none that lie on another run's
        picture. Those on the opening are of the run that somebody begins there."""
        paint = sketch(drawn, waiting)
        run, (owner, count) = self._run(run_id), named(drawn_on)
        if paint is None or run is None:
            return paint
        if owner not in ("", run.id):
            return None
        for one in run.painted if count <= run.count else ():
            if torch.equal(one.picture, run.updates[count].shown[0]):
                return without(paint, one.paint)
        return paint

    def read(self, listen: Callable[..., Any], **quiet: Any) -> Any:
        """An event of `listen` that puts into `drawn` what is on the editor now."""
        return listen(
            None, [self.editor, self.shown], [self.drawn, self.drawn_on],
            js="(drawn, on) => [drawn, on]", **quiet,
        )  # fmt: skip

    def empty(self, listen: Callable[..., Any], run: gr.BrowserState, ended: gr.State,
              **quiet: Any) -> Any:  # fmt: skip
        """Events that take the run's picture off the editor, to be renewed; as `renew` else."""
        return self.read(listen, **quiet).then(
            self.wrap(self._empty), [run, ended, *self.inputs], [self.waiting, self.editor],
            **quiet,
        )  # fmt: skip

    def renew(self, listen: Callable[..., Any], run: gr.BrowserState, ended: gr.State,
              **quiet: Any) -> Any:  # fmt: skip
        """Events that bring the run's picture, under the paint on the editor or none; ended:
        (anything, whether that paint stays). What is in the wish already never does."""
        return self.empty(listen, run, ended, **quiet).then(
            self.wrap(self._fill), [run, self.waiting],
            [self.waiting, self.shown, self.before, self.editor], **quiet,
        )  # fmt: skip

    def change(self, listen: Callable[..., Any], run: gr.BrowserState,
               work: Callable[..., Tensor], inputs: list[Any], **quiet: Any) -> None:  # fmt: skip
        """Events that put in place of the strokes what `work` makes of them, from their map
        (H, W), the picture (3, H, W) in [0, 1] under them and the values of `inputs`."""

        def changed(run: str, *values: Any) -> tuple[Waiting, None, Tensor]:
            if (shown := self.picture(run)) is None:
                raise refusal("There is no picture to paint on yet.")
            picture, paint = to_tensor(shown), self.paint(run, *values[:3])
            strokes = fitted(painted_map(paint), picture) if paint else torch.zeros_like(picture[0])
            after = work(strokes, picture, *values[3:])
            return (as_paint(after) if after.any() else None, math.inf), None, strokes

        self.read(listen, **quiet).then(
            self.wrap(changed), [run, *self.inputs, *inputs],
            [self.waiting, self.editor, self.before], **quiet,
        ).success(
            self.wrap(self._show), [run, self.waiting], [self.waiting, self.shown, self.editor],
            **quiet,
        )  # fmt: skip

    def wire(self, run: gr.BrowserState, **quiet: Any) -> None:
        """Connect the brush and the clear button."""
        self.editor.clear(
            self.wrap(self._bring_back), run, [self.waiting, self.shown, self.editor], **quiet
        )
        self.brush.change(
            lambda choice: gr.ImageEditor(brush=brush(choice)), self.brush, self.editor, **quiet
        )

    def wrap(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work` as an event, on the model's thread."""
        return self.studio.thread.wrap(errors_as_messages()(work))

    def _empty(self, run: str, ended: tuple[Any, bool], *values: Any) -> tuple[Waiting, Any]:
        _, stays = ended
        paint = self.paint(run, *values) if stays else None
        return (paint, math.inf), None if self._run(run) else gr.skip()

    def _fill(self, run: str, waiting: tuple[Image.Image | None, float]) -> tuple[Any, ...]:
        until, shown, value = self._show(run, waiting)
        return until, shown, None, value

    def _show(
        self, run: str, waiting: tuple[Image.Image | None, float]
    ) -> tuple[Waiting, str, Any]:
        paint, _ = waiting
        found = self._run(run)
        value: Any = self._value(found, paint) if found else gr.skip()
        return (paint, time.monotonic() + SETTLING), name(found), value

    def _bring_back(self, run: str) -> tuple[Waiting, str, Any]:
        found = self._run(run)
        return None, name(found), self._value(found, None)

    def _run(self, run_id: str) -> Run | None:
        """The run of this name; of none the opening one, if there is one."""
        return self.studio.run(run_id) if run_id else self.studio.opening

    def picture(self, run_id: str) -> Image.Image | None:
        """The run's picture in the canvas's size; None where there is none."""
        run = self._run(run_id)
        return large(run.picture) if run else None

    def _value(self, run: Run | None, paint: Image.Image | None) -> dict[str, Any]:
        """The editor's: the run's picture under the paint. It would show a `composite` alone."""
        picture = large(run.picture) if run else None
        layers = [served(paint)] if paint else []
        return {"background": served(picture) if picture else None, "layers": layers,
                "composite": None}  # fmt: skip
