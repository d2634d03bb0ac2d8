"""A run as plain data on the CPU: a chain of updates; and its verbs, functions from Run to Run.

    run = finish(begin(model, settings))
    run = finish(generate(model, run))                       # the images to judge
    run = finish(learn(model, run, maps))                    # one update from their reward maps

Nothing here is changed in place, so a run can be kept, handed on and gone back to at will.
`begin`, `generate`, `learn` and `teach` are generators: they yield Progress, and closing one leaves
the run and the model as they were.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .credit import downsample, latent_credit, smooth
from .errors import RunError
from .lora import Lora, adapter, completed, new_lora, weights_of
from .models import DiffusionModel
from .processes import from_first, gathered, tasks
from .progress import Progress
from .rewards import (
    Painted,
    Reward,
    RewardSpec,
    Tools,
    Wish,
    add_paint,
    checked_maps,
    resolved,
)
from .rollout import Noise, Trajectory, derived_seed, joined, rollout
from .settings import Sampling, Settings
from .update import Report, distance_from_base, update

WEIGHT_DECAY = 1e-4
"""AdamW's, as in DDPO's public trainers."""

ALIKE = "all pictures earn the same, so there is nothing to learn from"

SHOWING = "showing"
"""The phase in which the shown image of the run's own seed is made."""


@dataclass(frozen=True)
class Score:
    """A reward's mean over the shown image of this seed, and over those of held-out seeds, and of
    held-out prompts, if any are shown."""

    here: float
    held_out: float | None = None
    held_out_std: float | None = None
    held_out_prompts: float | None = None


@dataclass(frozen=True)
class Update:
    """One update: what it was taught with, and the run after it. The first stands before any.

    settings, reward: its own; the reward is None where nobody named it. optimizer: AdamW's state
    by parameter name and moment. shown: (K, H, W, 3) uint8, images on noise that is the same after
    every update, this seed's first, held-out prompts' last. latent_reward: (B, h, w); of no images
    at the beginning. metrics: numbers about the update. scores: of what is shown, by the name of a
    reward.
    """

    settings: Settings
    reward: RewardSpec | None
    lora: Lora
    optimizer: Mapping[str, Tensor]
    shown: Tensor
    latent_reward: Tensor
    metrics: dict[str, float]
    scores: dict[str, Score] = field(default_factory=dict)

    @property
    def learnt(self) -> bool:
        """Whether anything was learnt: not where all pictures earn the same."""
        return bool(self.metrics.get("moved"))

    def as_dict(self) -> dict[str, Any]:
        """All of it that is words and numbers."""
        return {
            "reward": self.reward and self.reward.as_dict(),
            "settings": self.settings.as_dict(),
            "metrics": self.metrics,
            "scores": {name: asdict(score) for name, score in self.scores.items()},
        }


@dataclass(frozen=True)
class Run:
    """A chain of updates, and what the next one is to be learnt with.

    settings, reward: those of the next update, as of the last one if nothing else is said; the
    reward is None before anybody named one. later: updates that it went back from; the next update
    that is learnt takes their place. painted: all that a person painted, which adds up to a
    wish. own: how this seed's newest picture was made, unless it must be made again. trajectory:
    the images now judged, or None where `generate` has them still to make. id: its name in the
    studio that keeps it. Of many processes (processes.py) each has the trajectories that it made.
    """

    settings: Settings
    model_name: str
    updates: tuple[Update, ...]
    reward: RewardSpec | None = None
    later: tuple[Update, ...] = ()
    painted: tuple[Painted, ...] = ()
    own: Trajectory | None = None
    trajectory: Trajectory | None = None
    id: str = ""

    @property
    def count(self) -> int:
        """The number of updates so far."""
        return len(self.updates) - 1

    @property
    def lora(self) -> Lora:
        return self.updates[-1].lora

    @property
    def picture(self) -> Tensor:
        """(3, H, W) in [0, 1]: this seed's picture as it is now, the one to paint on."""
        return self.updates[-1].shown[0].permute(2, 0, 1) / 255

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of its images."""
        height, width = self.updates[0].shown.shape[1:3]
        return height, width

    @property
    def met(self) -> bool:
        """Whether what was painted has come true on all pictures that are shown."""
        by_hand = self.reward is not None and self.reward.by_hand
        return by_hand and bool(self.painted) and bool(self.updates[-1].metrics.get("met"))

    @property
    def latest(self) -> tuple[Score, ...]:
        """The scores by the last reward, one for each update from 0 on; none before any."""
        name = self.reward.name if self.reward else ""
        return tuple(one.scores[name] for one in self.updates if name in one.scores)


def begin(
    model: DiffusionModel,
    settings: Settings,
    lora: Lora | None = None,
    *,
    reward: RewardSpec | None = None,
) -> Generator[Progress, None, Run]:
    """A run that has learnt nothing yet, or goes on from `lora`.

    What the settings leave open becomes the model's own. Raises DivergedError for a LoRA that turns
    pictures to noise.
    """
    settings, given = model.filled(settings), lora is not None
    if lora:
        lora = completed(model, lora, settings.seed)
        settings = replace(settings, rank=lora.rank)
    else:
        lora = new_lora(model, settings.rank, settings.seed)
    metrics = {}
    with adapter(model, lora):
        shown, own = yield from _show(model, settings)
        if given:
            metrics["from_base"] = from_first(
                lambda: distance_from_base(model, own)  # type: ignore[arg-type]  # the first has it
            )
    nothing = torch.zeros(0, *model.latent_shape[1:])
    first = Update(settings, None, lora, {}, shown, nothing, metrics)
    return Run(settings, resolved(model.name), (first,), reward, own=own)


def paint(run: Run, reward_map: Tensor) -> Run:
    """The run whose wish has this as well: a map (H, W) in [-2, 2], painted on its picture."""
    return replace(run, painted=add_paint(run.painted, run.updates[-1].shown[0], reward_map))


def judge_of(run: Run, model: DiffusionModel, tools: Tools) -> Reward:
    """The run's reward as a function of images; of what a person painted, their wish."""
    if run.reward is None:
        raise RunError("this run names no reward yet.")
    if not run.reward.by_hand:
        return run.reward.make(tools)
    if not run.painted:
        raise RunError("nothing is painted; paint + (green) or − (red) first.")
    named = run.reward.options["segmenter"]
    return Wish(run.painted, tools.sight(model.features, model.name, named))


def generate(model: DiffusionModel, run: Run) -> Generator[Progress, None, Run]:
    """Sample the images that the next update will judge, unless they are there already; of many
    processes each makes its own.

    One on the run's own noise comes first and is made alone, as a stock pipeline makes it: it is
    the picture that was shown last, where that is at hand.
    """
    if run.trajectory is not None:
        return run
    settings, parts, mine = run.settings, [], tasks(run.settings.images)
    prompts = training_prompts(settings, run.count)[mine]
    noise = [training_noise(settings, run.count, i) for i in range(settings.images)][mine]
    with adapter(model, run.lora):
        if noise[0] == Noise(settings.seed):
            own = run.own if _paint_alike(settings, run.updates[-1].settings) else None
            parts.append(own or (yield from rollout(model, prompts[:1], noise[:1], settings)))
            prompts, noise = prompts[1:], noise[1:]
        if noise:
            parts.append((yield from rollout(model, prompts, noise, settings)))
    return replace(run, trajectory=joined(parts))


def teach(
    model: DiffusionModel, run: Run, reward: RewardSpec, reward_maps: Tensor, judge: Reward
) -> Generator[Progress, None, Run]:
    """`learn`, and the score by this reward of what the run has shown since the last one.

    judge: the reward's own function.
    """
    return scored((yield from learn(model, run, reward_maps, reward)), reward, judge)


def learn(
    model: DiffusionModel, run: Run, reward_maps: Tensor, reward: RewardSpec | None = None
) -> Generator[Progress, None, Run]:
    """One update from the reward maps (B, H, W) of the images that `generate` made, in all
    processes.

    reward: what they come from, for the record. Where they earn nothing, nothing is learnt, and the
    next images come from the next noise. Raises RewardError for maps that do not fit, DivergedError
    for what would turn pictures to noise; the run is then as it was.
    """
    settings, trajectory = run.settings, _judged(run)
    reward_maps = checked_maps(reward_maps, settings.images)
    latent_reward = downsample(reward_maps, trajectory.size)
    credit = latent_credit(latent_reward, settings, training_prompts(settings, run.count))
    rewarded = smooth(latent_reward, settings.blur).abs()  # blurred as the credit is
    hold_map = 1 - rewarded / rewarded.max().clamp(min=1e-12)
    before = run.updates[-1]
    metrics = {
        "reward": reward_maps.mean().item(),
        "reward_std": reward_maps.mean((1, 2)).std(correction=0).item(),
    }
    if not credit.any():
        metrics |= asdict(Report(0.0, 0.0, 0.0, before.metrics.get("from_base", 0.0)))
        skipped = Update(
            settings, reward, before.lora, before.optimizer, before.shown, latent_reward, metrics
        )
        return _with(run, skipped, None)
    with adapter(model, before.lora) as parameters:
        optimizer = _optimizer(parameters, settings, before.optimizer)
        report = yield from update(
            model, parameters, optimizer, trajectory, credit, settings, hold_map=hold_map,
            generator=torch.Generator().manual_seed(derived_seed(settings.seed, run.count, 2)),
        )  # fmt: skip
        lora = replace(before.lora, weights=weights_of(parameters))
        state = _optimizer_state(parameters, optimizer)
        shown, own = yield from _show(model, settings)
    metrics |= asdict(report)
    return _with(run, Update(settings, reward, lora, state, shown, latent_reward, metrics), own)


def scored(run: Run, reward: RewardSpec, judge: Reward, *, anew: bool = False) -> Run:
    """The run with the scores by this reward of all that it has shown.

    anew: of updates that have them already too, as after more was painted.
    """

    def with_score(one: Update) -> Update:
        if reward.name in one.scores and not anew:
            return one
        mine, count = tasks(len(one.shown)), len(one.shown)
        maps = gathered(judge(one.shown[mine].permute(0, 3, 1, 2) / 255), count)
        maps = checked_maps(maps, count)
        metrics = one.metrics
        if isinstance(judge, Wish):
            metrics = {**metrics, "met": float(judge.met(maps))}
        return replace(
            one, metrics=metrics, scores={**one.scores, reward.name: _score(maps, one.settings)}
        )

    return replace(run, reward=reward, updates=tuple(with_score(one) for one in run.updates))


def go_to(run: Run, count: int) -> Run:
    """The run as it was after `count` updates, back or forward: weights, optimizer, images and
    randomness.

    Going on from there with the same maps gives the same run again, bit for bit.
    """
    chain = run.updates + run.later
    if type(count) is not int or not 0 <= count < len(chain):
        raise RunError(
            f"there is no update {count!r} to go to; this run has 0 to {len(chain) - 1}."
        )
    updates, later = chain[: count + 1], chain[count + 1 :]
    return replace(run, updates=updates, later=later, own=None, trajectory=None)


def annotate(run: Run, **numbers: float) -> Run:
    """The run with more numbers in its newest update's metrics."""
    newest = run.updates[-1]
    newest = replace(newest, metrics={**newest.metrics, **numbers})
    return replace(run, updates=(*run.updates[:-1], newest))


def training_prompts(settings: Settings, count: int) -> list[str]:
    """The prompt of each image for the update after `count` others, in the run's order.

    Where there are several, as many are drawn as get two images or more, each as likely as another,
    and share the images evenly.
    """
    prompts = settings.prompts
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, count, 1, 0))
    order = torch.randperm(len(prompts), generator=generator).tolist()
    drawn = order[: max(1, settings.images // 2)]
    return [prompts[index] for index in sorted((drawn * settings.images)[: settings.images])]


def training_noise(settings: Settings, count: int, index: int) -> Noise:
    """The noise of image `index` for the update after `count` others, as `settings.noise` says.

    The run's own is that of the picture which a stock pipeline gives for `settings.seed`, and for
    the first of several prompts.
    """
    first = index == 0 and training_prompts(settings, count)[0] == settings.prompts[0]
    if settings.noise == "own" and first:
        return Noise(settings.seed)
    drawn = derived_seed(settings.seed, count, 0, index)
    return Noise(derived_seed(drawn), drawn)


def shown_noise(settings: Settings) -> list[Noise]:
    """The noise of the shown images: this seed first, then seeds that no update ever sees.

    Each held-out prompt then has those seeds again; one, where only this seed is shown.
    """
    others = [Noise(derived_seed(settings.seed, 1, i)) for i in range(1, max(settings.shown, 2))]
    held_out = others * len(settings.held_out_prompts)
    return [Noise(settings.seed), *others[: settings.shown - 1], *held_out]


def shown_prompts(settings: Settings) -> list[str]:
    """The prompts of the shown images: those to learn on in turn, then the held-out ones."""
    learnt = (settings.prompts * settings.shown)[: settings.shown]
    seeds = max(settings.shown - 1, 1)
    return [*learnt, *(prompt for prompt in settings.held_out_prompts for _ in range(seeds))]


def _judged(run: Run) -> Trajectory:
    if run.trajectory is None:
        raise RunError("there are no images to learn from yet; generate them first.")
    return run.trajectory


def _with(run: Run, one: Update, own: Trajectory | None) -> Run:
    return replace(run, updates=(*run.updates, one), later=(), own=own, trajectory=None)


def _score(maps: Tensor, settings: Settings) -> Score:
    """maps: (K, H, W), of what is shown, this seed's image first."""
    means = maps.mean((1, 2))
    held_out, prompts = means[1 : settings.shown], means[settings.shown :]
    return Score(
        means[0].item(),
        held_out.mean().item() if len(held_out) else None,
        held_out.std(correction=0).item() if len(held_out) else None,
        prompts.mean().item() if len(prompts) else None,
    )


def _show(
    model: DiffusionModel, settings: Settings
) -> Generator[Progress, None, tuple[Tensor, Trajectory | None]]:
    """The shown images, and the trajectory of this seed's in the process that made it.

    This seed's image is made alone, as a stock pipeline makes it: batches round differently.
    """
    noise, prompts = shown_noise(settings), shown_prompts(settings)
    count, mine, own, parts = len(noise), tasks(len(noise)), None, []
    noise, prompts = noise[mine], prompts[mine]
    if mine.start == 0:
        own = yield from rollout(model, prompts[:1], noise[:1], settings, SHOWING)
        parts, noise, prompts = [own.images], noise[1:], prompts[1:]
    if noise:
        rest = yield from rollout(model, prompts, noise, settings, "held-out seeds")
        parts.append(rest.images)
    shown = (torch.cat(parts) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
    return gathered(shown, count), own


def _paint_alike(one: Settings, other: Settings) -> bool:
    """Whether the run's own picture is the same by both."""
    names = ("prompt", "seed", *(entry.name for entry in fields(Sampling)))
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _optimizer(
    parameters: Mapping[str, torch.nn.Parameter], settings: Settings, state: Mapping[str, Tensor]
) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY
    )
    for name, parameter in parameters.items() if state else ():
        optimizer.state[parameter] = {
            "step": state["step"].clone(),
            "exp_avg": state[f"exp_avg.{name}"].to(parameter.device, copy=True),
            "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(parameter.device, copy=True),
        }
    return optimizer


def _optimizer_state(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.AdamW
) -> dict[str, Tensor]:
    state = {}
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter]
        state["step"] = moments["step"].cpu().clone()
        state[f"exp_avg.{name}"] = moments["exp_avg"].cpu().clone()
        state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"].cpu().clone()
    return state
