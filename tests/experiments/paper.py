"""What stays in the paper's three experiments, as `python -m pxpo reproduce` runs them: the taxi,
the faces, their spread."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pxpo import Settings, Tools, new_lora
from pxpo.measures import held_out, spread
from pxpo.reproduce.experiments import EXPERIMENTS as PAPERS
from pxpo.reproduce.experiments import METHODS, settings_of
from pxpo.rewards import Reward

from .common import Lab, begun, table, updated

RECIPES = dict(METHODS)

JUDGED = 32
SAMPLED = ("steps", "guidance_scale", "eta")


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
def before(lab: Lab, sampled: Settings) -> Tensor:
    """Held-out pictures of the model as it is."""
    return lab.sample(new_lora(lab.model, 1, 0), sampled, held_out(JUDGED))


def measured(
    lab: Lab, experiment: str, recipe: str, seed: int, changes: dict[str, Any]
) -> dict[str, Any]:
    judge = PAPERS[experiment].reward.make(Tools(segmenter=lab.segmenter))
    settings = settings_of(lab.model, experiment, recipe, **changes)
    run = begun(lab.model, settings, seed)
    for _ in range(settings.updates):
        run = updated(lab.model, run, judge)
    sampled = Settings(**{name: getattr(settings, name) for name in ("prompt", *SAMPLED)})
    pictures = before(lab, sampled), lab.sample(run.lora, sampled, held_out(JUDGED))
    lab.strip(f"{experiment}-{recipe}-{seed}".replace(" ", "-"), run, *pictures)
    figures = EXPERIMENTS[experiment](lab, judge, *pictures)
    return {**figures, "from base": run.updates[-1].metrics["from_base"]}


def run(lab: Lab, names: list[str], seeds: range, changes: dict[str, Any]) -> None:
    for experiment, seed, recipe in itertools.product(names, seeds, RECIPES):
        key = {"experiment": experiment, "recipe": recipe, "seed": seed, "changes": changes}
        lab.once(key, functools.partial(measured, lab, experiment, recipe, seed, changes))


def report(lab: Lab, changes: dict[str, Any]) -> str:
    parts = []
    for experiment in EXPERIMENTS:
        lines = [line for line in lab.read(changes) if line.get("experiment") == experiment]
        if not lines:
            continue
        names = [n for n in lines[0] if n not in ("experiment", "recipe", "seed", "changes")]
        names = [n for n in names if not isinstance(lines[0][n], str)]
        rows = []
        for recipe in RECIPES:
            own = [line for line in lines if line["recipe"] == recipe]
            if own:
                cells = [spread([one[name] for one in own]) for name in names]
                rows.append([f"{recipe}, {len(own)} runs", *cells])
        parts.append(f"{experiment}, in percent\n\n" + table(["", *names], rows))
    return "\n\n".join(parts)
