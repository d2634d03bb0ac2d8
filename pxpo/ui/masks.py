"""More ways to paint than with the brush: whole things, by name too, masks, and a way back.

A whole thing is told by strokes, not by a click: the editor says nothing of clicks, but what is
painted on it comes through by mouse, finger and pen alike. A name needs no pointer at all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from ..rewards import open_picture, painted_map, whole_things
from ..rewards.painting import FULL
from .canvas import PLUS, Canvas, fitted, to_tensor
from .parts import refusal, served


def colour_of(brush: str) -> float:
    """What the brush's paint says of what is under it."""
    return FULL if brush == PLUS else -FULL


class MoreWays:
    """Folded away under the canvas."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas, self.studio = canvas, canvas.studio
        small: dict[str, Any] = {"size": "md", "min_width": 120}
        self.is_open = gr.State(False)
        with gr.Accordion("More ways to paint", open=False, elem_id="ways") as self.panel:
            gr.Markdown("Dab on a thing and let the dabs grow over all of it, or choose its name.")
            with gr.Row():
                self.grow = gr.Button(
                    "Grow into whole things", size="md", min_width=240, elem_id="grow"
                )
                self.invert = gr.Button("Invert", elem_id="invert", **small)
                self.undo = gr.Button("Undo", elem_id="undo", **small)
            with gr.Row(equal_height=True):
                self.name = gr.Dropdown(
                    label="Found in the picture", container=False, min_width=120, elem_id="named"
                )
                self.paint_name = gr.Button("Paint it", elem_id="paint-named", **small)
            with gr.Row():
                self.upload = gr.UploadButton(
                    "Upload a mask", file_types=["image"], elem_id="upload-mask", **small
                )
                self.download = gr.Button("Download paint", elem_id="save-paint", **small)
        self.file = gr.DownloadButton(visible="hidden", elem_id="paint-file")

    def wire(self, run: gr.BrowserState, **quiet: Any) -> None:
        canvas, brush = self.canvas, self.canvas.brush
        for listen, work, inputs in (
            (self.grow.click, self.grown, []),
            (self.invert.click, self.inverted, [brush]),
            (self.undo.click, self.undone, [canvas.before]),
            (self.paint_name.click, self.with_named, [brush, self.name]),
            (self.upload.upload, self.with_mask, [brush, self.upload]),
        ):
            canvas.change(listen, run, work, inputs, **quiet)
        canvas.read(self.download.click, **quiet).then(
            canvas.wrap(self.saved), [run, *canvas.inputs], self.file, **quiet
        ).success(
            None, None, None, js="() => document.querySelector('#paint-file').click()", **quiet
        )
        self.panel.collapse(lambda: False, None, self.is_open, **quiet)
        self.renew(self.panel.expand(lambda: True, None, self.is_open, **quiet).then, run, **quiet)

    def renew(self, listen: Callable[..., Any], run: gr.BrowserState, **quiet: Any) -> None:
        """An event that lists what is found in the run's picture, once anybody looks."""
        listen(self.canvas.wrap(self.listed), [run, self.is_open, self.name], self.name, **quiet)

    def listed(self, run: str, is_open: bool, name: str | None) -> Any:
        picture = self.canvas.picture(run) if is_open else None
        if picture is None:
            return gr.skip()
        found = self.studio.segmenter.found(self.studio.classes(to_tensor(picture)))
        return gr.Dropdown(found, value=name if name in found else found[0])

    # What is made of the strokes (H, W) on a picture (3, H, W) in [0, 1].

    def grown(self, strokes: Tensor, picture: Tensor) -> Tensor:
        if not strokes.any():
            raise refusal("Dab on something first, in green or red.")
        return whole_things(strokes, self.studio.classes(picture))

    def inverted(self, strokes: Tensor, picture: Tensor, brush: str) -> Tensor:
        return colour_of(brush) * (strokes == 0)

    def undone(self, strokes: Tensor, picture: Tensor, before: Tensor | None) -> Tensor:
        if before is None:
            raise refusal("There is nothing to undo; the arrow over the picture undoes a stroke.")
        return before

    def with_named(self, strokes: Tensor, picture: Tensor, brush: str, name: str) -> Tensor:
        there = self.studio.classes(picture) == self.studio.segmenter.index(name or "")
        if not there.any():
            raise refusal(f"There is no {name} in this picture.")
        return torch.where(there, colour_of(brush), strokes)

    def with_mask(self, strokes: Tensor, picture: Tensor, brush: str, file: str) -> Tensor:
        mask = painted_map(open_picture(Path(file)), picture, white=colour_of(brush))
        mask = fitted(mask, strokes)
        if not mask.any():
            raise refusal(
                "Nothing is painted in this picture; paint green or red, or white on black."
            )
        return torch.where(mask != 0, mask, strokes)

    def saved(self, run: str, *values: Any) -> str:
        paint = self.canvas.paint(run, *values)
        if paint is None:
            raise refusal("Nothing is painted yet; paint + or − first.")
        return served(paint, "paint")
