"""What stays in the paper's three experiments, in the runs that `python -m pxpo reproduce` made:
the taxi, the faces, their spread."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from pxpo import Settings, Tools, load_run
from pxpo.measures import held_out, spread
from pxpo.reproduce import EXPERIMENTS as PAPERS
from pxpo.reproduce import FULL, METHODS, Bench
from pxpo.reproduce.experiments import run_folder
from pxpo.rewards import Reward

from .common import Lab, table

RUNS = Path("runs", "reproduce")
"""Where that command left them."""

JUDGED = 32


def color(lab: Lab, judge: Reward, before: Tensor, after: Tensor) -> dict[str, float]:
    had, has = (lab.areas(images, "Taxi") > 0.02 for images in (before, after))
    rewards = [judge(images).mean().item() for images in (before, after)]
    return {"before": rewards[0], "after": rewards[1], "better": 1 - rewards[1] / rewards[0],
            "taxi kept": kept(had, has)}  # fmt: skip


def hair(lab: Lab, judge: Reward, before: Tensor, after: Tensor) -> dict[str, float]:
    rewards = [judge(images).mean().item() for images in (before, after)]
    had, has = (lab.areas(images, "Face") > 0.03 for images in (before, after))
    varied = {
        label: colour_spread(lab, after, label) / colour_spread(lab, before, label)
        for label in ("Face", "Upper-clothes")
    }
    return {"before": rewards[0], "after": rewards[1], "left": rewards[1] / rewards[0],
            "face kept": kept(had, has), "faces' spread": varied["Face"],
            "shirts' spread": varied["Upper-clothes"]}  # fmt: skip


def painting(more: str, less: str) -> Callable[..., dict[str, float]]:
    def figures(lab: Lab, judge: Reward, before: Tensor, after: Tensor) -> dict[str, float]:
        return {
            f"{name} {when}": lab.areas(images, label).mean().item()
            for name, label in (("more", more), ("less", less))
            for when, images in (("before", before), ("after", after))
        }

    return figures


EXPERIMENTS: dict[str, Callable[..., dict[str, float]]] = {
    "color": color,
    "hair": hair,
    "lake": painting("Lake", "Tree"),
    "trees": painting("Tree", "Lake"),
}


def kept(had: Tensor, has: Tensor) -> float:
    return (had & has).sum().item() / max(had.sum().item(), 1)


def colour_spread(lab: Lab, images: Tensor, label: str) -> float:
    """Standard deviation over images of the mean colour of `label`, averaged over the channels."""
    mask = lab.mask(images, label)[:, None].float()
    size = mask.sum((1, 2, 3))
    means = (images * mask).sum((2, 3))[size > 50] / size[size > 50, None]
    return means.std(0).mean().item() if len(means) > 1 else 0.0


@functools.lru_cache
def before(lab: Lab, prompt: str) -> Tensor:
    """Held-out pictures of the model as it is."""
    settings = lab.model.filled(Settings(prompt=prompt))
    return lab.sample(None, settings, held_out(JUDGED))


def measured(lab: Lab, experiment: str, folder: Path) -> dict[str, Any]:
    run = load_run(folder)
    judge = PAPERS[experiment].reward.make(Tools(segmenter=lab.segmenter))
    after = lab.sample(run.lora, run.settings, held_out(JUDGED))
    pictures = before(lab, run.settings.prompt), after
    figures = EXPERIMENTS[experiment](lab, judge, *pictures)
    return {**figures, "from base": run.updates[-1].metrics["from_base"]}


def run(lab: Lab, names: list[str], seeds: range, changes: dict[str, Any]) -> None:
    """Of the runs in RUNS that are finished, and whole: where they were made. Their seeds and
    settings are that command's own."""
    bench = Bench(lab.model, RUNS, FULL)
    for experiment, seed, method in itertools.product(names, FULL.run_seeds, METHODS):
        folder = run_folder(bench, experiment, method, seed)
        if (folder / "figures.json").exists() and (folder / "run.json").exists():
            key = {"experiment": experiment, "recipe": method, "seed": seed, "changes": changes}
            lab.once(key, functools.partial(measured, lab, experiment, folder))


def report(lab: Lab, changes: dict[str, Any]) -> str:
    parts = []
    for experiment in EXPERIMENTS:
        lines = [line for line in lab.read(changes) if line.get("experiment") == experiment]
        if not lines:
            continue
        names = [n for n in lines[0] if n not in ("experiment", "recipe", "seed", "changes")]
        rows = []
        for recipe in METHODS:
            own = [line for line in lines if line["recipe"] == recipe]
            if own:
                cells = [spread([one[name] for one in own]) for name in names]
                rows.append([f"{recipe}, {len(own)} runs", *cells])
        parts.append(f"{experiment}, in percent\n\n" + table(["", *names], rows))
    return "\n\n".join(parts)
