"""All on the page and in its API that depends on the kind of reward: the tabs, and the wish that is
made of what they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import gradio as gr

from ..studio import Wish

Kind = Literal["paint", "color", "segment"]
Want = Literal["less", "more"]
LESS, MORE = get_args(Want)


def wish_of(kind: Kind, color: str, labels: str, want: Want) -> Wish:
    """The API's wish; labels are separated by commas."""
    return Wish(kind, color, labels.split(","), want == MORE)


def from_paint(wish: Wish) -> bool:
    """Whether the wish is painted, and so needs paint and judges one picture."""
    return wish.kind == "paint"


class RewardTabs:
    """One tab for each kind of reward, with what can be chosen there."""

    def __init__(self, labels: Sequence[str]) -> None:
        """labels: what the segmenter can find."""
        self.kind = gr.State("paint")
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
                    list(labels), value=["Hair"], multiselect=True, label="Find",
                    elem_id="labels", info="what a segmenter sees",
                )  # fmt: skip
                self.labels_want = gr.Radio([LESS, MORE], value=LESS, label="Want")
        self.tabs = {"paint": paint_tab, "color": color_tab, "segment": segment_tab}
        self.fields = [self.color, self.color_want, self.labels, self.labels_want]
        self.inputs = [self.kind, *self.fields]

    @staticmethod
    def wish(kind: str, color: str, color_want: str, labels: list[str], labels_want: str) -> Wish:
        """The wish that the values of `inputs` stand for."""
        want = color_want if kind == "color" else labels_want
        return Wish(kind, color, labels, want == MORE)

    def on_change(self, react: Callable[[Any], Any], **quiet: Any) -> None:
        """Call `react` with each listener that hears of another wish."""
        for kind, tab in self.tabs.items():
            react(tab.select(lambda kind=kind: kind, None, self.kind, **quiet).then)
        for field in self.fields:
            react(field.change)
