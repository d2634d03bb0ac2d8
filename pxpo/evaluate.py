"""A run's LoRA against its base model, on seeds that no update ever saw.

evaluation.json   every figure, of every picture
index.html        a page of them, with the pictures
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor

from .card import base_of
from .errors import RewardError, RunError, SettingError
from .measures import (
    colours,
    diversity,
    drift,
    held_out,
    likeness,
    sampled,
    seeds_seen,
    signed,
    spread,
)
from .models import DiffusionModel
from .pages import Block, Heading, Numbers, Pairs, Table, Text, as_page
from .plots import to_picture
from .progress import Progress
from .rewards import Reward, RewardSpec, Tools
from .run import Run, judge_of
from .store import write_whole

REFERENCES = 8
"""Pictures of the base model, for each prompt, that the second judge learns the reward from."""

SECOND = "what looks alike"
"""The second judge, where none is named: `measures.likeness`."""


@dataclass(frozen=True)
class Judged:
    """The pictures of one prompt and what is said of them.

    before, after: (B, 3, H, W). judges: by name, the mean of each picture before and after; the
    run's own reward is the first. drift, diversity: as in `measures`, the latter by the base
    model's features.
    """

    prompt: str
    learnt: bool
    before: Tensor
    after: Tensor
    judges: Mapping[str, tuple[list[float], list[float]]]
    drift: tuple[float, float]
    diversity: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "learnt": self.learnt,
            "judges": {
                name: {"before": before, "after": after}
                for name, (before, after) in self.judges.items()
            },
            "drift": dict(zip(("inside", "outside"), self.drift, strict=True)),
            "diversity": self.diversity,
        }


def evaluate(
    model: DiffusionModel,
    run: Run,
    tools: Tools,
    *,
    prompts: Sequence[str] = (),
    seeds: int = 16,
    judges: Sequence[RewardSpec] = (),
) -> Generator[Progress, None, tuple[list[int], list[Judged]]]:
    """Sample each prompt with and without the LoRA, on the same held-out seeds, and judge.

    prompts: the run's own and its held-out ones, if none are given. judges: rewards besides the
    run's own; the likeness to what this said of other pictures, if none are given. Returns the
    seeds too. Raises RunError for a run that names no reward.
    """
    if seeds < 2:
        raise SettingError(f"seeds is {seeds}; a spread needs at least 2.")
    reward, settings, parts = judge_of(run, model, tools), run.settings, []
    assert run.reward is not None
    others = dict[str, Reward]()
    for spec in judges:
        others[told_apart(spec, (run.reward.name, *others))] = spec.make(tools)
    # A wish looks with the model's features already, so that its second judge goes by colours.
    h, w = model.latent_shape[1:]
    look = colours((h, w)) if run.reward.by_hand else model.features
    unseen = held_out(seeds + REFERENCES, seeds_seen(run))
    for prompt in prompts or (*settings.prompts, *settings.held_out_prompts):
        base = (yield from sampled(model, None, prompt, unseen, settings)).images
        before, references = base[:seeds], base[seeds:]
        after = (yield from sampled(model, run.lora, prompt, unseen[:seeds], settings)).images
        maps = reward(before)
        second = {} if others else {SECOND: likeness(references, reward(references), look)}
        scores = {run.reward.name: (means(maps), means(reward(after)))}
        for name, judge in {**others, **second}.items():
            scores[name] = means(judge(before)), means(judge(after))
        varied = diversity(model.features(before), model.features(after))
        parts.append(
            Judged(
                prompt, prompt in settings.prompts, before, after, scores,
                drift(before, after, maps), varied,
            )
        )  # fmt: skip
    return unseen[:seeds], parts


def told_apart(spec: RewardSpec, taken: Sequence[str]) -> str:
    """The judge's name, with its model where another judge has the same name already.

    Raises RewardError where that does not tell them apart.
    """
    if spec.name not in taken:
        return spec.name
    models = [
        Path(value).name for option in spec.declared.options
        if option.path and (value := str(spec.options[option.name]))
    ]  # fmt: skip
    name = f"{spec.name}, by {', '.join(models) or spec.kind}"
    if name in taken:
        raise RewardError(f"{name}, is a judge already; name each judge once.")
    return name


def means(maps: Tensor) -> list[float]:
    """The mean of each map (B, H, W)."""
    return maps.mean((1, 2)).tolist()


def write_evaluation(run: Run, seeds: Sequence[int], parts: Sequence[Judged], folder: Path) -> Path:
    """Write both files into `folder`, made if need be; returns the page's path.

    Raises RunError where the disk refuses.
    """
    record = {
        "base": base_of(run.model_name).name,
        "updates": run.count,
        "seeds": list(seeds),
        "summary": {name: summary(parts, name) for name in parts[0].judges},
        "prompts": [one.as_dict() for one in parts],
    }
    name = run.reward.name if run.reward else ""
    page = as_page(f"{name[:1].upper()}{name[1:]}, before and after", blocks(run, seeds, parts))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "evaluation.json", (json.dumps(record, indent=2) + "\n").encode())
        write_whole(folder / "index.html", page.encode())
    except OSError as error:
        raise RunError(
            f"the page cannot be written into {str(folder)!r} ({error.strerror or error}); choose "
            "another --out."
        ) from error
    return folder / "index.html"


def summary(parts: Sequence[Judged], judge: str) -> dict[str, Any]:
    """What a judge says of all pictures: mean and standard deviation, and how many it raises."""
    before, after = (
        [value for one in parts for value in one.judges[judge][side]] for side in (0, 1)
    )
    change = [new - old for old, new in zip(before, after, strict=True)]
    return {
        **{
            name: {"mean": fmean(values), "std": pstdev(values)}
            for name, values in (("before", before), ("after", after), ("change", change))
        },
        "higher": sum(value > 0 for value in change),
        "of": len(change),
    }


def blocks(run: Run, seeds: Sequence[int], parts: Sequence[Judged]) -> list[Block]:
    """The page."""
    reward, *others = parts[0].judges
    own = summary(parts, reward)
    inside, outside = (fmean(one.drift[side] for one in parts) for side in (0, 1))
    page: list[Block] = [
        Text(
            f"A LoRA of {base_of(run.model_name).name}, after {run.count} updates, beside its base "
            f"model, on {len(seeds)} seeds that no update ever saw. After ± stands the standard "
            "deviation over pictures."
        ),
        Numbers(
            (
                (
                    f"{signed(own['before']['mean'], 3)} → {signed(own['after']['mean'], 3)}",
                    f"the reward, {reward}: mean per pixel",
                ),
                (f"{own['higher']} of {own['of']}", "pictures have a higher reward than before"),
                (
                    f"{inside:.3f}, {outside:.3f}",
                    "change of colour (0 to 1) where the reward says something, and elsewhere",
                ),
                (
                    f"{fmean(one.diversity for one in parts):.0%}",
                    "of the spread over seeds is left, by the base model's features",
                ),
            )
        ),
        Heading("What the judges say"),
        Table(
            ("judge", "prompt", "before", "after", "higher after"),
            [
                (
                    name,
                    one.prompt + " (never learnt on)" * (not one.learnt),
                    spread(before, 3, 1),
                    spread(after, 3, 1),
                    f"{sum(b > a for a, b in zip(before, after, strict=True))} of {len(before)}",
                )
                for name in (reward, *others)
                for one in parts
                for before, after in [one.judges[name]]
            ],
        ),
    ]
    if SECOND in others:
        by_hand = run.reward is not None and run.reward.by_hand
        eye = "colour and height" if by_hand else "the base model's own features"
        page.append(
            Text(
                f"The judge called “{SECOND}” never asks the reward: to it a pixel is worth what "
                "the reward gave to those pixels that look most like it, in "
                f"{REFERENCES} other pictures of the base model. It compares them by {eye}. A gain "
                "that it does not see may be one that only fools the reward."
            )
        )
    for one in parts:
        pictures = [
            (
                to_picture(one.before[index]),
                to_picture(one.after[index]),
                f"seed {seed}: {signed(before, 3)} → {signed(after, 3)}",
            )
            for index, (seed, before, after) in enumerate(
                zip(seeds, *one.judges[reward], strict=True)
            )
        ]
        page += [Heading(f"“{one.prompt}”, before and after"), Pairs(pictures)]
    return page
