"""What is run and measured: each of the paper's experiments, by each method, on each seed.

    runs/color-PXPO-200/              a whole run, as any other command takes it
    runs/color-PXPO-200/figures.json  what was measured on it
    cross-talk/PXPO-200.json          how far a region's reward moves the other regions

What is there already is not done again, and a run that was interrupted goes on where it stood.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..embedded import TINY_WORLD
from ..errors import DivergedError, RewardError, RunError
from ..measures import (
    by_region,
    diversity,
    drift,
    held_out,
    movement,
    own_and_others,
    regions,
    sampled,
)
from ..models import DiffusionModel
from ..progress import Progress, Result
from ..rewards import ColorReward, Reward, RewardSpec, Tools, resolved
from ..run import Run, Update, begin, generate, learn, teach
from ..settings import EXPERIMENTS as PRESETS
from ..settings import Settings, settings_for
from ..store import keep_others_out, load_run, save_run, write_whole

METHODS: Mapping[str, Mapping[str, Any]] = {
    "PXPO": {"paper": True},
    "one recipe": {},
    "DDPO": {"blur": math.inf, "baseline": "global"},
}
"""PXPO is the paper's exact recipe; DDPO is the one recipe with one number for each image."""

FIRST_SEED = 200
"""The recipe was chosen on seeds below."""

SHOWN = 6
"""Held-out pictures that the report shows."""

POINTS = 5
"""How often, at most, a run is measured after its beginning."""


@dataclass(frozen=True)
class Experiment:
    """kind: whose settings it has, of settings.EXPERIMENTS. budget: of its own, on top of them."""

    title: str
    kind: str
    reward: RewardSpec
    budget: Mapping[str, int] = field(default_factory=dict)


PAINTED = {"images": 4, "updates": 15}


def painted(more: str, less: str) -> RewardSpec:
    """A segmenter paints in a person's stead, each new picture anew."""
    return RewardSpec("paint", {"more": (more,), "less": (less,)})


EXPERIMENTS: Mapping[str, Experiment] = {
    "color": Experiment("Less blue", "color", RewardSpec("color")),
    "hair": Experiment("Less hair", "segment", RewardSpec("segment")),
    "lake": Experiment("More lake, fewer trees", "paint", painted("Lake", "Tree"), PAINTED),
    "trees": Experiment("More trees, less lake", "paint", painted("Tree", "Lake"), PAINTED),
}


@dataclass(frozen=True)
class Scale:
    """How much is done. seeds: of each experiment and method. judged: held-out pictures. grid: rows
    and columns of regions for the cross-talk. region: the settings of its runs. changes: of the
    settings of all other runs."""

    seeds: int = 5
    judged: int = 32
    grid: tuple[int, int] = (2, 2)
    region: Mapping[str, Any] = field(default_factory=lambda: {"images": 8, "updates": 4})
    changes: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False

    @property
    def run_seeds(self) -> range:
        """Those of the runs."""
        return range(FIRST_SEED, FIRST_SEED + self.seeds)


FULL = Scale()
QUICK = Scale(
    seeds=2,
    judged=4,
    grid=(1, 2),
    region={"images": 2, "updates": 1, "steps": 5},
    changes={"images": 3, "updates": 2, "steps": 5},
    quick=True,
)


@dataclass(frozen=True)
class Bench:
    """What everything is run with. segmenters: names; each label is looked up in them in turn."""

    model: DiffusionModel
    folder: Path
    scale: Scale
    segmenters: Sequence[str] = ("",)
    tools: Tools = field(default_factory=Tools)

    def reward(self, name: str) -> RewardSpec:
        """The reward of an experiment, with the first segmenter that knows its labels."""
        spec = EXPERIMENTS[name].reward
        options = spec.options.values()
        wanted = [label for value in options if isinstance(value, tuple) for label in value]
        if not wanted:
            return spec
        for segmenter in self.segmenters:
            known = {label.lower() for label in self.tools.segmenter(segmenter).labels}
            if known.issuperset(label.lower() for label in wanted):
                return spec.changed(segmenter=segmenter).recorded()
        raise RewardError(
            f"{name} needs a segmenter that knows {' and '.join(wanted)}; name one with "
            "--segmenter, or choose other experiments with --only."
        )

    @property
    def model_name(self) -> str | None:
        """As it is known in the files; None is Tiny World, wherever it lies."""
        name = self.model.name
        return None if Path(name) == TINY_WORLD else resolved(name)


@dataclass(frozen=True)
class Untaught:
    """The base model's held-out pictures for an experiment. images: (B, 3, H, W), with the
    reward's maps (B, H, W). features: (B, F, h, w)."""

    images: Tensor
    maps: Tensor
    features: Tensor


def settings_of(model: DiffusionModel, name: str, method: str, **changes: Any) -> Settings:
    """Those of an experiment by a method, with changes. All methods ask for as many rewards; the
    paper paints one image an update."""
    experiment, recipe = EXPERIMENTS[name], METHODS[method]
    budget = {**PRESETS[experiment.kind], **experiment.budget, **changes}
    images, updates = budget["images"], budget["updates"]
    if recipe.get("paper") and experiment.kind == "paint":
        images, updates = 1, images * updates
    chosen = {"shown": 1, **changes, **recipe, "images": images, "updates": updates}
    return model.filled(settings_for(experiment.kind, **chosen))


def marks_of(bench: Bench, name: str) -> list[int]:
    """The numbers of queries after which each method is measured: as many as POINTS, evenly."""
    settings = settings_of(bench.model, name, "one recipe", **bench.scale.changes)
    points = next(n for n in range(POINTS, 0, -1) if settings.updates % n == 0)
    return [settings.images * settings.updates * n // points for n in range(points + 1)]


def untaught(bench: Bench, name: str, judge: Reward) -> Generator[Progress, None, Untaught]:
    settings = settings_of(bench.model, name, "one recipe", **bench.scale.changes)
    work = sampled(bench.model, None, settings.prompt, held_out(bench.scale.judged), settings)
    images = (yield from work).images
    return Untaught(images, judge(images), bench.model.features(images))


def trained(
    bench: Bench, spec: RewardSpec, settings: Settings, folder: Path
) -> Generator[Progress, None, Run]:
    """The run in `folder`, begun or gone on with, and saved after each update. It ends early where
    another update would turn pictures to noise.

    Raises RunError where the folder has another run, or another process is at it.
    """
    with keep_others_out(folder):
        return (yield from _gone_on(bench, spec, settings, folder))


def _gone_on(
    bench: Bench, spec: RewardSpec, settings: Settings, folder: Path
) -> Generator[Progress, None, Run]:
    judge = spec.make(bench.tools)
    if (folder / "run.json").exists():
        run = load_run(folder)
        ours = (settings, spec, resolved(bench.model.name))
        if (run.settings, run.reward, run.model_name) != ours:
            raise others(folder)
    else:
        run = yield from begin(bench.model, settings, reward=spec)
        save_run(run, folder)
    with contextlib.suppress(DivergedError):
        while run.count < settings.updates:
            run = yield from generate(bench.model, run)
            assert run.trajectory is not None
            maps = judge(run.trajectory.images)
            run = yield from teach(bench.model, run, spec, maps, judge)
            save_run(run, folder)
    return run


def measured(
    bench: Bench, run: Run, judge: Reward, marks: Sequence[int], base: Untaught
) -> Generator[Progress, None, tuple[dict[str, Any], Tensor]]:
    """The figures of a finished run, on held-out seeds, and its pictures at the end."""
    images, maps, rewards = base.images, base.maps, [base.maps.mean().item()]
    for mark in marks[1:]:
        lora = after_queries(run, mark).lora
        seeds = held_out(bench.scale.judged)
        work = sampled(bench.model, lora, run.settings.prompt, seeds, run.settings)
        images = (yield from work).images
        maps = judge(images)
        rewards.append(maps.mean().item())
    inside, outside = drift(base.images, images, base.maps)
    figures = {
        "queries": list(marks),
        "rewards": rewards,
        "over_images": [
            each.mean((1, 2)).std(correction=0).item() for each in (base.maps, maps)
        ],
        "drift_inside": inside,
        "drift_outside": outside,
        "diversity": diversity(base.features, bench.model.features(images)),
        "from_base": run.updates[-1].metrics.get("from_base", 0.0),
        "updates": [run.count, run.settings.updates],
    }  # fmt: skip
    return figures, images


def after_queries(run: Run, queries: int) -> Update:
    """What a run was after so many reward queries, or at its end where that came before."""
    return run.updates[min(queries // run.settings.images, run.count)]


def region_settings(bench: Bench, method: str, seed: int) -> Settings:
    chosen = {**METHODS[method], **bench.scale.region}
    return bench.model.filled(settings_for("color", shown=1, seed=seed, **chosen))


def cross_talk(bench: Bench, settings: Settings) -> Generator[Progress, None, dict[str, Any]]:
    """How far one region's reward moves the others: a LoRA is taught less blue in one region alone,
    for each region, until another update would turn pictures to noise.

    movements: (R, h, w), how far the output of the network moves, for held-out pictures of the base
    model. moved, gain: the means in the rewarded region and in the others, of that and of what the
    pictures gain. updates: how many each region was taught, and was to be.
    """
    model, grid = bench.model, bench.scale.grid
    h, w = model.latent_shape[1:]
    there, latent = regions(model.image_size, grid), regions((h, w), grid)
    judge, seeds = ColorReward("blue"), held_out(settings.images)
    before = yield from sampled(model, None, settings.prompt, seeds, settings)
    movements, gains, taught = [], [], []
    for region in there:
        run = yield from begin(model, settings)
        with contextlib.suppress(DivergedError):
            for _ in range(settings.updates):
                run = yield from generate(model, run)
                assert run.trajectory is not None
                run = yield from learn(model, run, judge(run.trajectory.images) * region)
        taught.append([run.count, settings.updates])
        movements.append(movement(model, run.lora, before))
        after = yield from sampled(model, run.lora, settings.prompt, seeds, settings)
        gains.append((judge(after.images) - judge(before.images)).mean(0))
    moved = torch.stack(movements)
    return {
        "moved": own_and_others(by_region(moved.square(), latent).sqrt()),
        "gain": own_and_others(by_region(torch.stack(gains), there)),
        "movements": moved.tolist(),
        "updates": taught,
    }


def once(
    path: Path, key: Mapping[str, Any], work: Generator[Progress, None, dict[str, Any]]
) -> Generator[Progress, None, dict[str, Any]]:
    """What the file holds; or what `work` finds out, which is then written into it.

    key: what it depends on. Raises RunError where the file depends on something else.
    """
    if not path.exists():
        figures = yield from work
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps({"of": key, "figures": figures}) + "\n").encode())
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["of"] != json.loads(json.dumps(key)):
        raise others(path.parent)
    return record["figures"]


def others(folder: Path) -> RunError:
    return RunError(
        f"{folder} holds something made with another model or other settings; choose another --out."
    )


def run_all(bench: Bench, names: Sequence[str]) -> Generator[Progress, None, dict[str, Any]]:
    """Everything: {"runs": {experiment: {method: [figures of each seed]}}, "cross_talk": {method:
    [figures of each seed]}}."""
    seeds = bench.scale.run_seeds
    rewards = {name: bench.reward(name) for name in names}
    total, number = len(METHODS) * len(seeds) * (len(names) + 1), 0
    runs: dict[str, Any] = {name: {method: [] for method in METHODS} for name in names}
    talks: dict[str, Any] = {method: [] for method in METHODS}
    for name in names:
        base = dict[str, Untaught]()
        for seed, method in itertools.product(seeds, METHODS):
            number += 1
            work = one_run(bench, name, rewards[name], method, seed, base)
            words = f"{number}/{total} {name}, {method}, seed {seed}"
            runs[name][method].append((yield from labelled(work, words)))
    for seed, method in itertools.product(seeds, METHODS):
        number += 1
        path = bench.folder / "cross-talk" / f"{slug(method)}-{seed}.json"
        settings = region_settings(bench, method, seed)
        key = {"model": bench.model_name, "settings": settings.as_dict(),
               "grid": bench.scale.grid}  # fmt: skip
        work = once(path, key, cross_talk(bench, settings))
        words = f"{number}/{total} cross-talk, {method}, seed {seed}"
        talks[method].append((yield from labelled(work, words)))
    return {"runs": runs, "cross_talk": talks}


def run_folder(bench: Bench, name: str, method: str, seed: int) -> Path:
    return bench.folder / "runs" / f"{name}-{slug(method)}-{seed}"


def slug(method: str) -> str:
    return method.replace(" ", "-")


def one_run(
    bench: Bench, name: str, spec: RewardSpec, method: str, seed: int, base: dict[str, Untaught]
) -> Generator[Progress, None, dict[str, Any]]:
    """A run's figures; on the first seed its pictures are kept too. base: of this experiment, put
    in when it is first needed."""
    folder = run_folder(bench, name, method, seed)
    settings = settings_of(bench.model, name, method, seed=seed, **bench.scale.changes)

    def work() -> Generator[Progress, None, dict[str, Any]]:
        judge = spec.make(bench.tools)
        run = yield from trained(bench, spec, settings, folder)
        if name not in base:
            base[name] = yield from untaught(bench, name, judge)
        figures, after = yield from measured(bench, run, judge, marks_of(bench, name), base[name])
        if seed == FIRST_SEED:
            pictures = {"before": base[name].images, "maps": base[name].maps, "after": after}
            few = {key: values[:SHOWN].contiguous() for key, values in pictures.items()}
            write_whole(folder / "pictures.safetensors", save(few))
        return figures

    key = {"model": bench.model_name, "reward": spec.as_dict(),
           "settings": settings.as_dict(), "judged": bench.scale.judged}  # fmt: skip
    return (yield from once(folder / "figures.json", key, work()))


def labelled(
    work: Generator[Progress, None, Result], words: str
) -> Generator[Progress, None, Result]:
    """The same work, which says what it is part of."""
    while True:
        try:
            progress = next(work)
        except StopIteration as end:
            return end.value
        yield replace(progress, phase=f"{words}: {progress.phase}")
