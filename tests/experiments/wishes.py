"""Painting as a person does: paint one picture, then press Step without touching the brush."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pxpo import RewardSpec, Tools, finish, generate, judge_of, paint, settings_for, teach
from pxpo.measures import held_out, spread
from pxpo.rewards import Sight, Wish

from .common import LANDSCAPE, PORTRAIT, TRAFFIC, Lab, begun, table

UPDATES = (4, 8)
LEAST = 0.005  # of the picture; what covers less is not there
GONE = 0.2  # of what it covered; more than that has not gone, or has come back
JUDGED = 8


@dataclass(frozen=True)
class Case:
    """more, less: what is painted green and red. count: on how many seeds."""

    prompt: str
    more: str = ""
    less: str = ""
    count: int = 10


CASES = {
    "more lake, fewer trees": Case(LANDSCAPE, "Lake", "Tree", 20),
    "more trees, less lake": Case(LANDSCAPE, "Tree", "Lake", 20),
    "no sun": Case(LANDSCAPE, less="Sun"),
    "no hair": Case(PORTRAIT, less="Hair"),
    "no taxi": Case(TRAFFIC, less="Taxi"),
    "green on meadow": Case(LANDSCAPE, more="Meadow"),
}
OTHERS = ("Sky", "Mountain", "Tree", "Lake")  # what green on the meadow must leave


def painted(lab: Lab, case: Case, picture: Tensor) -> Tensor:
    """The map (H, W) that a person would paint on this picture (3, H, W)."""
    masks = [
        lab.mask(picture[None], label)[0].float() if label else torch.zeros(picture.shape[1:])
        for label in (case.more, case.less)
    ]
    if case.more == "Meadow":  # a patch of it
        height = picture.shape[1]
        masks[0][: 3 * height // 4] = 0
    return 2 * (masks[0] - masks[1])


def measured(lab: Lab, name: str, case: Case, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """changes: of the settings; and "eye", which is "own" for the model's features alone."""
    eye = changes.pop("eye", "both")
    changes = {"prompt": case.prompt, "shown": 1, **changes}
    settings = lab.model.filled(settings_for("paint", **changes))
    run = begun(lab.model, settings, seed)
    first = run.picture
    map_ = painted(lab, case, first)
    there = [lab.areas(first[None], label).item() for label in (case.more, case.less) if label]
    if min(there) < LEAST or not map_.any():
        return {"there": False}
    run = paint(replace(run, reward=RewardSpec("paint")), map_)
    judge: Any = judge_of(run, lab.model, Tools(segmenter=lab.segmenter))
    if eye == "own":
        judge = Wish(run.painted, Sight(lab.model.features))
    figures: dict[str, Any] = {"there": True}
    before = lab.sample(run.lora, settings, held_out(JUDGED))
    note(lab, case, figures, 0, first, before)
    after, met = before, 0
    for update in range(1, max(UPDATES) + 1):
        if not run.met:
            run = finish(generate(lab.model, run))
            assert run.trajectory is not None and run.reward is not None
            maps = judge(run.trajectory.images)
            run = finish(teach(lab.model, run, run.reward, maps, judge))
            met = update if run.met else 0
        if update in UPDATES:
            after = lab.sample(run.lora, settings, held_out(JUDGED))
            note(lab, case, figures, update, run.picture, after)
            change = (run.picture - first).abs().mean(0)
            figures[f"change in paint, {update}"] = change[map_ != 0].mean().item()
            figures[f"change outside, {update}"] = change[map_ == 0].mean().item()
    figures["met"] = met
    figures["from base"] = run.updates[-1].metrics["from_base"]
    lab.strip(f"{name}-{seed}".replace(" ", "-").replace(",", ""), run, before, after)
    return figures


def note(
    lab: Lab, case: Case, figures: dict[str, Any], update: int, own: Tensor, others: Tensor
) -> None:
    labels = {"more": case.more, "less": case.less}
    if case.more == "Meadow":
        labels |= {label: label for label in OTHERS}
    for word, label in labels.items():
        if label:
            figures[f"{word} own, {update}"] = lab.areas(own[None], label).item()
            figures[f"{word} held out, {update}"] = lab.areas(others, label).mean().item()


def run(lab: Lab, names: list[str], seeds: range, changes: dict[str, Any]) -> None:
    for name in names:
        case = CASES[name]
        for seed in seeds[: case.count]:
            key = {"case": name, "seed": seed, "changes": changes}
            lab.once(key, functools.partial(measured, lab, name, case, seed, dict(changes)))


def gone(line: dict[str, Any], update: int) -> bool:
    return line[f"less own, {update}"] <= GONE * line["less own, 0"]


def report(lab: Lab, changes: dict[str, Any]) -> str:
    rows = []
    for name, case in CASES.items():
        lines = [one for one in lab.read(changes) if one.get("case") == name and one["there"]]
        if not lines:
            continue
        for where in ("own", "held out"):
            cells = [
                " → ".join(
                    spread([one[f"{word} {where}, {update}"] for one in lines])
                    for update in (0, *UPDATES)
                )
                if label
                else ""
                for word, label in (("more", case.more), ("less", case.less))
            ]
            rows.append([f"{name}, {where}", *cells, *(changed(case, lines, where))])
    columns = ["share of the picture in %, updates 0 → 4 → 8", "wanted", "unwanted",
               "gone at update 8", "change of colour in the paint", "outside"]  # fmt: skip
    return table(columns, rows)


def changed(case: Case, lines: list[dict[str, Any]], where: str) -> list[str]:
    """How often the unwanted has gone, and the change of colour; of the own picture alone."""
    if where != "own":
        return ["", "", ""]
    done = f"{sum(gone(one, 8) for one in lines)} of {len(lines)}" if case.less else ""
    places = ("in paint", "outside")
    return [done, *(spread([one[f"change {place}, 8"] for one in lines], 3, 1) for place in places)]
