"""The report: what was measured, beside what the paper says, as Markdown, JSON and a page.

The paper's figures are those of arXiv 2404.04356; where it gives none there is a dash.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from ..card import base_of
from ..measures import HELD_OUT, queries_to, signed, spread
from ..pages import Figure, Heading, Points, Table, Text, Words, as_markdown, as_page
from ..plots import heat_map, reward_curve, strip, to_picture
from ..settings import PAPER
from ..store import load_run, write_whole
from .experiments import (
    EXPERIMENTS,
    FIRST_SEED,
    METHODS,
    SHOWN,
    Bench,
    after_queries,
    marks_of,
    run_folder,
    settings_of,
)

SIDE = 160  # pixels, of a picture in a figure
OURS = ("PXPO", "one recipe")
RIVAL = "DDPO"
VARIED = 0.9  # of the spread over seeds; what leaves less is said to fall short
ONE_SEED = "one seed tells no more"


@dataclass(frozen=True)
class Published:
    """What the paper reports of an experiment. left: the share of what is not wanted that its means
    leave."""

    queries: str
    before: str = "–"
    after: str = "–"
    left: float | None = None


PUBLISHED = {
    "color": Published("64", "−0.39 ± 0.08", "−0.35 ± 0.08", 0.35 / 0.39),
    "hair": Published("10 images × 16 epochs", "−0.06 ± 0.04", "−0.02 ± 0.02", 0.02 / 0.06),
    "lake": Published("15, painted by a person"),
    "trees": Published("15, painted by a person"),
}

Summary = dict[str, Any]
"""An experiment by one method: lists of a figure for each seed, by name."""


def write_report(bench: Bench, names: Sequence[str], results: Mapping[str, Any]) -> Path:
    """Write report.json, report.md, index.html and their figures; returns the page's path."""
    folder = bench.folder
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    summaries = {name: summarised(results["runs"][name]) for name in names}
    record = {
        "base": base_of(bench.model.name).name,
        "quick": bench.scale.quick,
        "seeds": bench.scale.seeds,
        "judged": bench.scale.judged,
        "summary": summaries,
        **results,
    }
    title = "Pixel-wise RL on diffusion models, reproduced"
    blocks = content(bench, names, results, summaries)
    write_whole(folder / "report.json", (json.dumps(record, indent=1) + "\n").encode())
    write_whole(folder / "report.md", as_markdown(title, blocks).encode())
    write_whole(folder / "index.html", as_page(title, blocks).encode())
    return folder / "index.html"


def summarised(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Summary]:
    """The figures of each method, and the queries to half of the best method's mean gain, if any
    method gains."""
    found: dict[str, Summary] = {}
    for method, seeds in runs.items():
        rewards = [one["rewards"] for one in seeds]
        found[method] = {
            "before": [values[0] for values in rewards],
            "after": [values[-1] for values in rewards],
            "gain": [values[-1] - values[0] for values in rewards],
            **{
                name: [one[name] for one in seeds]
                for name in ("drift_inside", "drift_outside", "diversity", "from_base", "updates")
            },
        }
    best = max(found.values(), key=lambda one: fmean(one["gain"]))
    target = (fmean(best["before"]) + fmean(best["after"])) / 2
    for method, seeds in runs.items():
        found[method]["target"] = target
        found[method]["queries_to_target"] = [
            queries_to(target, one["queries"], one["rewards"]) if fmean(best["gain"]) > 0 else None
            for one in seeds
        ]
    return found


def content(
    bench: Bench,
    names: Sequence[str],
    results: Mapping[str, Any],
    summaries: Mapping[str, Mapping[str, Summary]],
) -> list[Words]:
    scale, base = bench.scale, base_of(bench.model.name).name
    seeds = f"{scale.seeds} seeds" if scale.seeds > 1 else "one seed"
    computed, by_hand = (PAPER[kind]["learning_rate"] for kind in ("color", "paint"))
    blocks: list[Words] = []
    if scale.quick:
        changes = scale.changes
        blocks.append(
            Text(
                f"A quick look, to see that everything works: {seeds}, {changes['updates']} "
                f"updates of {changes['images']} pictures, {changes['steps']} denoising steps, "
                f"{scale.judged} pictures to judge by. Its figures say next to nothing of the "
                "methods; run it without `--quick` for those.",
                note=True,
            )
        )
    blocks += [
        Text(
            "The three experiments of “Pixel-wise RL on Diffusion Models” (arXiv 2404.04356), by "
            "PXPO exactly as the paper has it, by one recipe for all rewards, which is this "
            "program's default, and by DDPO, which is that recipe with one number for each image. "
            f"All methods ask for as many rewards, and each runs on {seeds}. The paper's base "
            f"model was Stable Diffusion v1.4; ours here is {base}."
        ),
        Text(
            "The one recipe and DDPO differ in nothing else, so these two alone tell what it is "
            "worth to know of pixels. PXPO by the paper's recipe differs from both in much more: "
            f"in the size of its steps (by a learning rate, which is ours: {computed:g}, and "
            f"{by_hand:g} for painting), in the noise that is praised or blamed, in the baseline, "
            "in the hold, and in the denoising steps that are learnt from."
        ),
        Heading("Beside the paper"),
        Table(
            ("experiment", "by", "reward queries", "before", "after", "gain"),
            [row for name in names for row in beside(name, base, results["runs"][name])],
        ),
        Text(
            "Mean reward per pixel. After ± stands the standard deviation: before and after, over "
            f"pictures (ours: {scale.judged}, on seeds that no update saw, the same for all); for "
            "the gain, over the seeds of the runs. A dash: the paper gives no figure."
        ),
        Heading("Queries, drift, diversity"),
        Table(
            ("experiment", "by", "queries to half of the best gain", "reached by",
             "change inside", "change outside", "diversity left"),
            [row for name in names for row in costs(name, summaries[name])],
        ),
        Text(
            "Half of the best gain is halfway from the base model's reward to what the best method "
            "has at the end; queries are of the seeds that got there. Change: of colour, from 0 to "
            "1, between pictures of the same seed before and after, inside (where the reward says "
            "something, each pixel by how much) and outside (by the rest). Diversity: the spread "
            "over seeds by the base model's features; at 100 % as before."
        ),
        Heading("Where ours falls short"),
        Text(
            "One method has clearly more than another where the difference between them on the "
            "same seed is, in the mean over seeds, larger than its standard deviation."
        ),
        Points(shortfalls(bench, names, results, summaries)),
    ]  # fmt: skip
    for name in names:
        blocks += [Heading(EXPERIMENTS[name].title), *pictured(bench, name, results["runs"][name])]
    return [*blocks, *cross_talk_blocks(bench, results["cross_talk"]), *made(bench, names)]


def beside(name: str, base: str, runs: Mapping[str, Sequence[Any]]) -> list[tuple[str, ...]]:
    """The paper's row and ours."""
    title, paper = EXPERIMENTS[name].title, PUBLISHED[name]
    by = "the paper: PXPO, Stable Diffusion v1.4"
    rows: list[tuple[str, ...]] = [(title, by, paper.queries, paper.before, paper.after, "–")]
    for method, seeds in runs.items():
        before, after = (
            f"{signed(fmean(one['rewards'][at] for one in seeds), 3)} ± "
            f"{fmean(one['over_images'][at] for one in seeds):.3f}"
            for at in (0, -1)
        )
        gain = spread([one["rewards"][-1] - one["rewards"][0] for one in seeds], 3, 1)
        asked = sorted({queries_of(one) for one in seeds})
        queries = " to ".join(map(str, asked[:: max(1, len(asked) - 1)]))
        rows.append(("", f"ours: {method}, {base}", queries, before, after, gain))
    return rows


def queries_of(one: Mapping[str, Any]) -> int:
    """The rewards that a run has asked for; fewer than it might where it ended early."""
    done, wanted = one["updates"]
    return one["queries"][-1] * done // wanted


def costs(name: str, summary: Mapping[str, Summary]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for method, one in summary.items():
        reached = [queries for queries in one["queries_to_target"] if queries is not None]
        rows.append(
            (
                "" if rows else EXPERIMENTS[name].title,
                method,
                spread(reached, 0, 1),
                f"{len(reached)} of {len(one['after'])}",
                spread(one["drift_inside"], 3, 1),
                spread(one["drift_outside"], 3, 1),
                f"{spread(one['diversity'], 0)} %",
            )
        )
    return rows


def shortfalls(
    bench: Bench,
    names: Sequence[str],
    results: Mapping[str, Any],
    summaries: Mapping[str, Mapping[str, Summary]],
) -> list[str]:
    """Every comparison that goes against us, or that is too close to call."""
    lines = []
    for name, method in itertools.product(names, OURS):
        words = against(summaries[name][method], summaries[name][RIVAL], PUBLISHED[name])
        if words:
            lines.append(f"{EXPERIMENTS[name].title}, {method}: {'; '.join(words)}.")
    for method, talks in results["cross_talk"].items():
        if early := ended_early([counts for one in talks for counts in one["updates"]]):
            lines.append(f"Cross-talk, {method}: {early}.")
    for method in OURS:
        ours, theirs = (ratios(results["cross_talk"][who]) for who in (method, RIVAL))
        if not clearly_more(theirs, ours):
            alone = f"; {ONE_SEED}" * (len(ours) < 2)
            lines.append(
                f"Cross-talk, {method}: {spread(ours, 2, 1)}, not clearly less than {RIVAL}'s "
                f"{spread(theirs, 2, 1)}{alone}."
            )
    if base_of(bench.model.name).name == "Tiny World":
        lines.append(
            "The base model is small and draws three kinds of scenes; nothing here shows that the "
            "same holds for photographs."
        )
    if any(EXPERIMENTS[name].kind == "paint" for name in names):
        lines.append("A segmenter paints in a person's stead; no person was asked.")
    return lines


def against(one: Summary, rival: Summary, paper: Published) -> list[str]:
    """What goes against a method of ours in an experiment."""
    words = []
    ours, theirs = one["gain"], rival["gain"]
    gains = f"ours is {spread(ours, 3, 1)}, {RIVAL}'s is {spread(theirs, 3, 1)}"
    if fmean(ours) < fmean(theirs):
        words.append(f"{RIVAL} gains more{unclear(theirs, ours)}: {gains}")
    elif not clearly_more(ours, theirs):
        words.append(f"the gain is not clearly more than {RIVAL}'s: {gains}")
    changed, by_rival = one["drift_outside"], rival["drift_outside"]
    if fmean(changed) > fmean(by_rival):
        words.append(
            f"more changes outside{unclear(changed, by_rival)}, {spread(changed, 3, 1)} against "
            f"{spread(by_rival, 3, 1)} by {RIVAL}"
        )
    if words and len(ours) < 2:
        words.append(ONE_SEED)
    if fmean(ours) <= 0:
        words.append("the reward did not rise")
    if early := ended_early(one["updates"]):
        words.append(early)
    if fmean(one["diversity"]) < VARIED:
        words.append(f"{spread(one['diversity'], 0)} % of the spread over seeds is left")
    if paper.left and (left := fmean(one["after"]) / fmean(one["before"])) > paper.left:
        words.append(
            f"{100 * left:.0f} % of what is not wanted is left, {100 * paper.left:.0f} % by the "
            "paper's means, on its own base model"
        )
    return words


def clearly_more(more: Sequence[float], less: Sequence[float]) -> bool:
    """Whether one method has more than another: by more, on the same seeds, than the standard
    deviation of what lies between them. One seed never tells."""
    between = [a - b for a, b in zip(more, less, strict=True)]
    return len(between) > 1 and fmean(between) > stdev(between)


def unclear(more: Sequence[float], less: Sequence[float]) -> str:
    return "" if clearly_more(more, less) else ", though not clearly"


def ended_early(runs: Sequence[Sequence[int]]) -> str:
    """Which runs did not come to their end, in words; runs: updates done, and wanted, of each."""
    early = sorted(done for done, wanted in runs if done < wanted)
    if not early:
        return ""
    *others, last = map(str, early)
    counts = f"{', '.join(others)} and {last}" if others else last
    return (
        f"{len(early)} of {len(runs)} runs ended early, after {counts} updates: another would have "
        "turned pictures to noise"
    )


def ratios(talks: Sequence[Mapping[str, Any]]) -> list[float]:
    """The cross-talk of each seed: how far the other regions move, beside the rewarded one; 1, as
    where all move alike, where nothing moves."""
    return [others / own if own else 1.0 for own, others in (one["moved"] for one in talks)]


def pictured(bench: Bench, name: str, runs: Mapping[str, Sequence[Any]]) -> list[Words]:
    """An experiment's figures: by update, before and after, and the curves."""
    marks = marks_of(bench, name)
    if not all(path_of(bench, f"{name}-{kind}").exists() for kind in ("updates", "grid")):
        draw_first(bench, name, marks)
    lines = {}
    for method, figures in runs.items():
        points = list(zip(*(one["rewards"] for one in figures), strict=True))
        lines[method] = [fmean(values) for values in points], [pstdev(v) for v in points]
    curve = reward_curve(lines, of="reward queries", at=marks, over="seeds", clear=True)
    curve.savefig(path_of(bench, f"{name}-curve"))
    prompt = settings_of(bench.model, name, RIVAL, **bench.scale.changes).prompt
    return [
        Text(f"“{prompt}”; the reward: {bench.reward(name).name}."),
        figure(bench, f"{name}-updates",
               f"The picture of seed {FIRST_SEED} as it is learnt: a row for each method, from "
               "left to right."),
        figure(bench, f"{name}-grid",
               "Held-out seeds: the base model's pictures, what the reward says of them (green for "
               "more, red for less), and after learning, by each method, in the run of seed "
               f"{FIRST_SEED}."),
        figure(bench, f"{name}-curve",
               "The reward of held-out pictures against the rewards asked for: mean and standard "
               "deviation over the seeds of the runs."),
    ]  # fmt: skip


def draw_first(bench: Bench, name: str, marks: Sequence[int]) -> None:
    """The pictures of the first seed's runs. They are drawn once: the figures of a report are
    enough to write it again, with more seeds too, where the runs themselves are gone."""
    evolved, after, kept = [], [], {}
    for method in METHODS:
        folder = run_folder(bench, name, method, FIRST_SEED)
        run, kept = load_run(folder), load_file(folder / "pictures.safetensors")
        evolved.append([to_picture(after_queries(run, mark).shown[0]) for mark in marks])
        after.append([to_picture(image) for image in kept["after"]])
    limit = kept["maps"].abs().max().item()
    rows = [
        [to_picture(image) for image in kept["before"]],
        [heat_map(*pair, limit) for pair in zip(kept["before"], kept["maps"], strict=True)],
        *after,
    ]
    columns = [f"{mark} queries" for mark in marks]
    by_update = strip(evolved, columns, list(METHODS), side=SIDE, clear=True)
    seeds = [str(HELD_OUT + number) for number in range(len(after[0]))]
    grid = strip(rows, seeds, ["before", "the reward", *METHODS], side=SIDE, clear=True)
    by_update.save(path_of(bench, f"{name}-updates"))
    grid.save(path_of(bench, f"{name}-grid"))


def path_of(bench: Bench, name: str) -> Path:
    return bench.folder / "figures" / f"{name}.png"


def figure(bench: Bench, name: str, caption: str) -> Figure:
    """One that is drawn, in the report."""
    with Image.open(path_of(bench, name)) as picture:
        return Figure(f"figures/{name}.png", caption, *picture.size)


def cross_talk_blocks(bench: Bench, talks: Mapping[str, Sequence[Any]]) -> list[Words]:
    rows, columns = bench.scale.grid
    places = [
        (row / rows, column / columns, (row + 1) / rows, (column + 1) / columns)
        for row in range(rows)
        for column in range(columns)
    ]
    pictures: list[list[Image.Image]] = [[] for _ in places]
    for seeds in talks.values():
        moved = torch.tensor([one["movements"] for one in seeds]).mean(0)  # (R, h, w)
        for picture, one, place in zip(pictures, moved / (moved.max() or 1), places, strict=True):
            picture.append(movement_picture(one, place))
    names = [f"region {number + 1}" for number in range(len(places))]
    sheet = strip(pictures, list(talks), names, side=SIDE, clear=True)
    sheet.save(path_of(bench, "cross-talk"))
    rows_of_table = [
        (method, spread(ratios(seeds), 2, 1),
         *(spread([one["gain"][side] for one in seeds], 3, 1) for side in (0, 1)))
        for method, seeds in talks.items()
    ]  # fmt: skip
    return [
        Heading("Cross-talk"),
        Text(
            "The paper says that between one pixel's reward and another's log-probability there is "
            "no cross-talk. Here a LoRA is taught less blue in one region alone, for each region, "
            "and what it moves is measured: the output of the network, for held-out pictures of "
            "the base model. Cross-talk is how far the other regions move, beside the rewarded "
            "one: 0 is none, and at 1 all move alike. The gain is that of those pictures' reward, "
            "less blue, in the rewarded region, and in the others, where nobody asked for it."
        ),
        Table(("by", "cross-talk", "gain in the region", "gain in the others"), rows_of_table),
        figure(bench, "cross-talk",
               "Where the network's output moves (brighter is further) when the framed region "
               "alone has a reward. Mean over seeds; the brightest of each method is alike."),
        Text(
            "What the paper says is of the credit: in Eq. 6 a pixel's is its own. The weights that "
            "learn from it are shared by all pixels, and carry it further. And the standardisation "
            "over all pixels, which PXPO has here, gives pixels without any reward a credit too."
        ),
    ]  # fmt: skip


def movement_picture(moved: torch.Tensor, place: tuple[float, ...]) -> Image.Image:
    """moved: (h, w) in [0, 1]. place: top, left, bottom and right of the frame, in [0, 1]."""
    dark, bright = (torch.tensor(rgb).view(3, 1, 1) / 255 for rgb in ((28, 32, 38), (95, 225, 150)))
    picture = to_picture(dark + (bright - dark) * moved)
    picture = picture.resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)
    top, left, bottom, right = (round(edge * (2 * SIDE - 1)) for edge in place)
    ImageDraw.Draw(picture).rectangle((left, top, right, bottom), outline=(240, 150, 40), width=6)
    return picture


def made(bench: Bench, names: Sequence[str]) -> list[Words]:
    """How to make it again."""
    scale = bench.scale
    command = "python -m pxpo reproduce" + " --quick" * scale.quick + f" --seeds {scale.seeds}"
    command += "".join(f" --only {name}" for name in names) * (len(names) < len(EXPERIMENTS))
    command += f" --model {base_of(bench.model.name).name}" * bool(bench.model_name)
    command += "".join(f" --segmenter {base_of(name).name}" for name in bench.segmenters if name)
    return [
        Heading("To make it again"),
        Text(
            f"`{command}`, with diffusers {version('diffusers')} and torch {version('torch')}. "
            f"Runs have the seeds {scale.run_seeds[0]} to {scale.run_seeds[-1]}, on which no "
            f"setting was chosen; held-out pictures have those from {HELD_OUT} on, of which the "
            f"first {min(SHOWN, scale.judged)} are shown. Where it was made every run lies whole "
            "in `runs/`, with all its settings in `run.json`; the figures of this page are in "
            "`report.json`. Given this folder with no more of its runs than each one's "
            "`figures.json`, the command writes the same report again, and with more `--seeds` it "
            "goes on."
        ),
    ]
