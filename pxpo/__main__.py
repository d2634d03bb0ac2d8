"""The command line: `python -m pxpo color | segment | paint | resume | push`, a folder per run."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from .card import base_of, write_folder
from .config import EXPERIMENTS, PAINTED, Settings, checked, kind_of, settings_for
from .errors import PxpoError, RewardError, RunError, SettingError
from .hub import pull, push
from .models import DiffusionModel, load_model
from .plots import heat_map, reward_curve, strip
from .rewards import (
    ColorReward,
    Opinion,
    Reward,
    Segmenter,
    SegmentReward,
    paint_by_label,
    painted_map,
)
from .rollout import Progress
from .session import Session, annotate, generate, learn, new_session, resume, save

Result = TypeVar("Result")
RewardOfStep = Callable[[Tensor, int], Tensor]


class Parser(argparse.ArgumentParser):
    """One clear line and exit status 2, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2 for bad input, 130 after Ctrl-C)."""
    options = make_parser().parse_args(arguments)
    quiet()
    try:
        return options.command(options)
    except PxpoError as error:
        print(f"pxpo: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="pxpo", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    color = commands.add_parser("color", help="less (or more) of a colour")
    color.add_argument("--color", default="blue", help="red, green, blue, or any CSS colour")
    color.add_argument("--more", action="store_true", help="more of it instead of less")

    segment = commands.add_parser("segment", help="less (or more) of what a segmenter finds")
    segment.add_argument("--label", action="append", help="what to find; repeatable (Hair)")
    segment.add_argument("--more", action="store_true", help="more of it instead of less")
    segment.add_argument("--segmenter", help="folder or Hub id (the embedded one)")

    paint = commands.add_parser("paint", help="painted feedback on one image a step")
    paint.add_argument(
        "--map", action="append", type=Path,
        help="picture painted green (+2) and red (-2); repeat it for one per step, the last stays. "
        f"Sets {', '.join(f'{name} {value}' for name, value in PAINTED.items())}",
    )  # fmt: skip
    paint.add_argument(
        "--more", action="append", default=[], help="a label to paint green by itself"
    )
    paint.add_argument("--less", action="append", default=[], help="a label to paint red by itself")
    paint.add_argument("--segmenter", help="folder or Hub id of what finds the labels")

    for name, command in (("color", color), ("segment", segment), ("paint", paint)):
        command.set_defaults(command=start, experiment=name)
        command.add_argument("--paper", action="store_true", help="the paper's exact recipe")
        command.add_argument("--model", help="diffusers folder or Hub id (Tiny World)")
        command.add_argument("--lora", help="go on from this file, folder or Hub id of a LoRA")
        command.add_argument("--out", type=Path, help="run folder (runs/<experiment>-<number>)")
        for entry in fields(Settings):
            add_setting(command, entry, EXPERIMENTS[name].get(entry.name, entry.default))

    again = commands.add_parser("resume", help="go on with a run that was stopped")
    again.set_defaults(command=go_on)
    again.add_argument("run", type=Path, help="the run's folder")
    again.add_argument("--epochs", type=int, help="updates in all, to train longer than planned")

    upload = commands.add_parser("push", help="push a run's LoRA to the Hugging Face Hub")
    upload.set_defaults(command=push_run)
    upload.add_argument("run", type=Path, help="the run's folder")
    upload.add_argument("repo", metavar="OWNER/NAME", help="repository, made if need be")
    upload.add_argument("--private", action="store_true", help="only you can see it")
    upload.add_argument(
        "--with-base", action="store_true", help="put a local base model (Tiny World) beside it"
    )
    return parser


def add_setting(parser: argparse.ArgumentParser, entry: Field, default: Any) -> None:
    """One option per setting; left out means the experiment's default, shown in the help."""

    def parse(text: str) -> Any:
        try:
            return checked(entry, kind_of(entry)(text))
        except SettingError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None

    choices = entry.metadata["choices"]
    parser.add_argument(
        "--" + entry.name.replace("_", "-"),
        dest="setting_" + entry.name,
        type=parse,
        metavar="|".join(choices) if choices else type(entry.default).__name__.upper(),
        help=f"{entry.metadata['help']} ({default if default != '' else 'empty'})".replace(
            "%", "%%"
        ),
    )


def start(options: argparse.Namespace) -> int:
    given = {
        name.removeprefix("setting_"): value
        for name, value in vars(options).items()
        if name.startswith("setting_") and value is not None
    }
    lora = pull(options.lora) if options.lora else None
    if lora:
        given = {"rank": lora.rank, **given}
    if options.experiment == "paint" and options.map and not options.paper:
        given = {**PAINTED, **given}
    settings = settings_for(options.experiment, paper=options.paper, **given)
    if lora and lora.rank != settings.rank:
        raise SettingError(
            f"rank is {settings.rank}, but the LoRA {options.lora!r} has {lora.rank}; leave it out."
        )
    reward = describe_reward(options)
    make_reward(reward)  # a bad reward is said before the model is loaded
    folder = options.out or free_folder(options.experiment)
    if (folder / "run.json").exists():
        raise RunError(
            f"{folder} holds a run already; go on with `python -m pxpo resume {folder}`."
        )
    model = load_model(options.model)
    for word in model.unknown_words(settings.prompt):
        print(f"note: {Path(model.name).name} never learnt the word {word!r}", file=sys.stderr)
    session = watched(new_session(model, settings, lora), "first images")
    make_reward(reward, session)  # nor is anything written for paint that does not fit its picture
    folder.mkdir(parents=True, exist_ok=True)
    config = {"experiment": options.experiment, "reward": reward, "paper": options.paper,
              "model": options.model, "settings": settings.as_dict()}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return train(model, session, reward, folder)


def go_on(options: argparse.Namespace) -> int:
    session = resume(options.run)
    config = read_config(options.run)
    if options.epochs is not None:
        settings = replace(session.settings, epochs=options.epochs)
        if settings.epochs < session.step:
            raise SettingError(
                f"epochs is {settings.epochs}, but this run has {session.step} behind it already."
            )
        session = replace(session, settings=settings)
    return train(load_model(config["model"]), session, config["reward"], options.run)


def read_config(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{run} has no config.json that can be read ({error}).") from error


def describe_reward(options: argparse.Namespace) -> dict[str, Any]:
    """The reward as plain data, so that a run can be resumed from its folder alone."""
    sign = 1 if options.experiment != "paint" and options.more else -1
    if options.experiment == "color":
        return {"kind": "color", "color": options.color, "sign": sign}
    if options.experiment == "segment":
        return {"kind": "segment", "labels": options.label or ["Hair"], "sign": sign,
                "segmenter": options.segmenter}  # fmt: skip
    if bool(options.map) == bool(options.more or options.less):
        raise SettingError(
            "paint needs either --map with a painted picture, or labels to paint by itself, "
            "e.g. --more Lake --less Tree."
        )
    maps = [str(path.resolve()) for path in options.map or ()]
    return {"kind": "paint", "maps": maps, "more": options.more, "less": options.less,
            "segmenter": options.segmenter}  # fmt: skip


def make_reward(reward: dict[str, Any], session: Session | None = None) -> RewardOfStep:
    """A function from images (B, 3, H, W) and the step's number to maps (B, H, W).

    session: the run, whose first picture tells paint from a picture with paint on it; without, such
    a map is not looked at yet.
    """
    if reward["kind"] == "color":
        color = ColorReward(reward["color"], reward["sign"])
        return lambda images, step: color(images)
    if reward["kind"] == "paint" and reward["maps"]:
        maps = [read_paint(path, session) for path in reward["maps"]]
        return lambda images, step: maps[min(step, len(maps) - 1)].expand(len(images), -1, -1)
    segmenter = Segmenter(reward["segmenter"])
    if reward["kind"] == "segment":
        segment = SegmentReward(segmenter, reward["labels"], reward["sign"])
        return lambda images, step: segment(images)
    for label in (*reward["more"], *reward["less"]):
        segmenter.index(label)
    return lambda images, step: paint_by_label(segmenter, images, reward["more"], reward["less"])


def read_paint(path: str, session: Session | None) -> Tensor:
    """The map (H, W) in the painted picture; an error says which picture it is about."""
    first = session.history[0].shown[0].permute(2, 0, 1) / 255 if session else None
    try:
        with Image.open(path) as picture:
            picture.load()
        painted = painted_map(picture, first)
    except RewardError as error:
        if session is None:
            return torch.ones(1, 1)  # it may well be paint, once there is a picture to compare with
        raise RewardError(f"{path!r}: {error}") from error
    except OSError as error:
        raise SettingError(f"the painted picture {path!r} cannot be read ({error}).") from error
    if not painted.any():
        raise SettingError(f"nothing is painted on {path!r}; green is more, red is less.")
    return painted


def judge_of(described: dict[str, Any], reward: RewardOfStep, session: Session) -> Reward:
    """What the curve is drawn from: the reward itself; or, as a painted picture speaks of the first
    image alone, what it says of pixels that look like those."""
    if not described.get("maps"):
        return lambda images: reward(images, 0)
    first = session.history[0].shown[:1].permute(0, 3, 1, 2) / 255
    maps = reward(first, 0)
    return Opinion.none().hear(interpolate(first, maps.shape[1:]), maps)


def train(model: DiffusionModel, session: Session, described: dict[str, Any], folder: Path) -> int:
    """Update until the run has its epochs, saving after each; Ctrl-C keeps what was done."""
    reward = make_reward(described, session)
    judge = judge_of(described, reward, session)
    heat: list[Image.Image] = []
    try:
        if not session.step:
            session = annotate(session, **judged(session, judge))
        save(session, folder)
        epochs = session.settings.epochs
        with tqdm(total=epochs, initial=session.step, unit="update", desc="learning") as bar:
            while session.step < epochs:
                started = time.perf_counter()
                session = watched(generate(model, session), "denoising")
                images = session.trajectory.images  # type: ignore[union-attr]
                maps = reward(images, session.step)
                heat = [heat_map(i, m) for i, m in zip(images, _fit(maps, images), strict=True)]
                learnt = watched(learn(model, session, maps), "updating")
                seconds = time.perf_counter() - started
                session = annotate(learnt, **judged(learnt, judge), seconds=seconds)
                save(session, folder)
                bar.update()
                bar.set_postfix_str(f"reward {session.history[-1].metrics['shown_reward']:+.4f}")
    except KeyboardInterrupt:
        save(session, folder)  # it may have come in the middle of this
        write_results(session, described, folder, heat)
        print(
            f"\nStopped after update {session.step}; all of it is kept. "
            f"Go on with: python -m pxpo resume {folder}"
        )
        return 130
    write_results(session, described, folder, heat)
    print(f"Done: {session.step} updates, LoRA and pictures in {folder / 'lora'}")
    return 0


def judged(session: Session, judge: Reward) -> dict[str, float]:
    """Mean and deviation over the shown images of their mean reward."""
    shown = session.history[-1].shown.permute(0, 3, 1, 2) / 255
    rewards = judge(shown).mean((1, 2))
    return {"shown_reward": rewards.mean().item(), "shown_std": rewards.std(correction=0).item()}


def _fit(maps: Tensor, images: Tensor) -> Tensor:
    return interpolate(maps[:, None], images.shape[2:])[:, 0]


def write_results(
    session: Session, described: dict[str, Any], folder: Path, heat: list[Image.Image]
) -> None:
    """The numbers, the newest images under their reward, and the LoRA in a folder of its own."""
    lines = [
        json.dumps({"step": step, **snapshot.metrics})
        for step, snapshot in enumerate(session.history)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if heat:
        strip([heat[:8]], [""] * len(heat[:8])).save(folder / "heat.png")
    write_lora_folder(session, described, folder)


def write_lora_folder(
    session: Session, described: dict[str, Any], folder: Path, **card: Any
) -> Path:
    """`folder`/lora: the LoRA, its model card, and the pictures that the paper shows of a run."""
    metrics = [snapshot.metrics for snapshot in session.history]
    curve = {
        "same noise at every step": (
            [numbers["shown_reward"] for numbers in metrics],
            [numbers["shown_std"] for numbers in metrics],
        ),
    }
    figure = reward_curve(curve, session.settings.prompt, "update")
    reward = in_words(described)
    return write_folder(session, folder / "lora", reward=reward, curve=figure, **card)


def in_words(described: dict[str, Any]) -> str:
    """The reward for people."""
    if described["kind"] == "paint":
        if described["maps"]:
            return "painted by hand"
        wishes = {"more": described["more"], "less": described["less"]}
        return "painted by a segmenter, " + " and ".join(
            f"{word} {', '.join(labels)}" for word, labels in wishes.items() if labels
        )
    what = described["color"] if described["kind"] == "color" else ", ".join(described["labels"])
    return f"{'more' if described['sign'] > 0 else 'less'} {what}"


def push_run(options: argparse.Namespace) -> int:
    """Write the run's LoRA folder for its repository, and push it."""
    session, described = resume(options.run), read_config(options.run)["reward"]
    folder = write_lora_folder(
        session, described, options.run, repo=options.repo, with_base=options.with_base
    )
    base = session.model_name if options.with_base and not base_of(session.model_name).hub else None
    work = push(folder, options.repo, private=options.private, base=base)
    address = watched(work, "pushing")
    print(f"Pushed to {address}")
    return 0


def free_folder(experiment: str) -> Path:
    names = (Path("runs") / f"{experiment}-{number}" for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def watched(work: Generator[Progress, None, Result], name: str) -> Result:
    """Run a generator to its end under a progress bar that vanishes with it."""
    with tqdm(leave=False, desc=name) as bar:
        while True:
            try:
                progress = next(work)
            except StopIteration as end:
                return end.value
            bar.total, bar.n = progress.total, progress.done
            bar.set_description(progress.phase, refresh=True)


def quiet() -> None:
    """Leave the terminal to our own progress bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("pxpo").setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
