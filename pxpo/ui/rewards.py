"""The tabs of the rewards, made from the registry; and the reward that their values stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from ..errors import RewardError
from ..rewards import REWARDS, Option, RewardKind, RewardSpec, Tools

LESS, MORE = "less", "more"


def offered(kind: RewardKind) -> list[Option]:
    """The options that a visitor chooses: none where they paint, and no folder of the server."""
    return [] if kind.by_hand else [option for option in kind.options if not option.path]


def spec_of(kind: str, values: dict[str, Any]) -> RewardSpec:
    """The reward of this kind with these of its options; "more" may be said in words."""
    values = dict(values)
    if isinstance(want := values.get("more"), str):
        if want not in (LESS, MORE):
            raise RewardError(f"want is {want!r}; it must be {LESS} or {MORE}.")
        values["more"] = want == MORE
    for option in REWARDS[kind].options:
        if option.path and values.get(option.name):
            raise RewardError(f"{option.name} is chosen where the app is started; leave it out.")
    return RewardSpec(kind, values)


def shown_as(value: Any) -> Any:
    """An option's value as its field shows it."""
    if isinstance(value, bool):
        return MORE if value else LESS
    return list(value) if isinstance(value, tuple) else value


class RewardTabs:
    """One tab for each kind of reward that is available, with what can be chosen there.

    `inputs` are what an event needs for `spec`.
    """

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self.kind = gr.State(next(iter(REWARDS)))
        self.tabs: dict[str, gr.Tab] = {}
        self.names: list[tuple[str, str]] = []  # of each field: its kind's and its own
        self.fields: list[Any] = []
        with gr.Tabs(elem_id="tabs") as self.all:
            for kind in REWARDS.values():
                if kind.public and kind.available(tools):
                    with gr.Tab(kind.title, id=kind.name) as self.tabs[kind.name], gr.Row():
                        self._fill(kind)
        self.inputs = [self.kind, *self.fields]
        self.chosen = [self.all, self.kind]

    def _fill(self, kind: RewardKind) -> None:
        if kind.by_hand:
            gr.Markdown(
                "Green: more of what is under it. Red: less of it. It holds on any picture of this "
                "run, and all that you paint adds up, until you forget it."
            )
        for option in offered(kind):
            self.names.append((kind.name, option.name))
            self.fields.append(self._field(kind, option))

    def _field(self, kind: RewardKind, option: Option) -> Any:
        if isinstance(option.default, bool):
            return gr.Radio([LESS, MORE], value=shown_as(option.default), label="Want")
        several = isinstance(option.default, tuple)
        return gr.Dropdown(
            list(option.offered(self.tools)), value=shown_as(option.default),
            multiselect=several, allow_custom_value=not several, label=option.name.capitalize(),
            info=option.help, elem_id=f"{kind.name}-{option.name}",
        )  # fmt: skip

    def choice(self, kind: str) -> tuple[Any, str]:
        """The values of `chosen` that open this kind's tab."""
        return gr.Tabs(selected=kind), kind

    def showing(self, spec: RewardSpec | None) -> dict[Any, Any]:
        """What makes the tabs show a reward: values by their parts; of one without a tab none."""
        if spec is None or spec.kind not in self.tabs:
            return {}
        shown = dict(zip(self.chosen, self.choice(spec.kind), strict=True))
        for (kind, name), field in zip(self.names, self.fields, strict=True):
            if kind == spec.kind and name in spec.options:
                shown[field] = self._offered(field, shown_as(spec.options[name]))
        return shown

    @staticmethod
    def _offered(field: Any, value: Any) -> Any:
        """The value as the field offers it: Gradio refuses every event of the page while a list has
        what is not among its choices, and a run's labels may have other capitals, or be of another
        segmenter."""
        if not isinstance(value, list):
            return value
        choices = {str(choice).lower(): choice for _, choice in field.choices}
        return [choices[one.lower()] for one in value if one.lower() in choices]

    def spec(self, kind: str, *values: Any) -> RewardSpec:
        """The reward that the values of `inputs` stand for; an empty field is an empty choice."""
        chosen = {}
        for (owner, name), value in zip(self.names, values, strict=True):
            if owner == kind:
                empty = () if name in self._several(kind) else ""
                chosen[name] = empty if value is None else value
        return spec_of(kind, chosen)

    def _several(self, kind: str) -> set[str]:
        return {one.name for one in REWARDS[kind].options if isinstance(one.default, tuple)}

    def on_change(self, react: Callable[[Any], Any], **quiet: Any) -> None:
        """Call `react` with each listener that hears of another reward."""
        for kind, tab in self.tabs.items():
            react(tab.select(lambda kind=kind: kind, None, self.kind, **quiet).then)
        for field in self.fields:
            react(field.change)
