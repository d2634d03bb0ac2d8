"""The command line: a run is begun (one command for each reward), resumed, packed or pushed."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from .card import base_of, write_folder
from .config import read_config, write_config
from .embedded import TINY_WORLD
from .errors import DivergedError, ProcessError, PxpoError, RewardError, RunError, SettingError
from .evaluate import evaluate, write_evaluation
from .hub import pull, push
from .models import DiffusionModel, best_device, leave_a_core, load_model
from .processes import end_undisturbed, end_with_the_others, first, from_first, gathered, many
from .progress import Progress
from .reproduce import EXPERIMENTS as PAPER_EXPERIMENTS
from .reproduce import FULL, QUICK, Bench, reproduce
from .rewards import (
    REWARDS,
    Option,
    Painted,
    Reward,
    RewardKind,
    RewardSpec,
    Tools,
    open_picture,
    painted_map,
)
from .rewards.mix import read_spec
from .rewards.segmentation import CLOTHES
from .rewards.wish import MET
from .run import ALIKE, Run, annotate, begin, generate, judge_of, paint, resolved, scored, teach
from .settings import EXPERIMENTS, Settings, checked, kind_of, settings_for
from .store import (
    LOCK,
    check_free,
    check_writable,
    claim,
    keep_others_out,
    new_folder,
    open_run,
    pack,
    save_run,
)
from .terminal import print_anything
from .tracking import HEATED, check_trackers, heat_strip, tracked, write_metrics

Result = TypeVar("Result")


class Parser(argparse.ArgumentParser):
    """One clear line and exit status 2, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2 for bad input, 130 after Ctrl-C)."""
    options = make_parser().parse_args(arguments)
    print_anything()
    quiet()
    leave_a_core()
    try:
        return options.command(options)
    except (PxpoError, OSError, SafetensorError) as error:  # the last two where the disk refuses
        print(f"pxpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="pxpo", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for kind in REWARDS.values():
        add_reward(commands.add_parser(kind.name, help=kind.help), kind)

    again = commands.add_parser("resume", help="go on with a run that was stopped")
    again.set_defaults(command=go_on)
    add_run(again)
    again.add_argument("--model", help="where the run's model lies now, if it was moved")
    add_trackers(again)
    again.add_argument("--updates", type=int, help="updates in all, to train longer than planned")
    for kind in REWARDS.values():
        for option in kind.options if kind.recorded else ():  # which may have moved or changed
            add_option(again, option)

    judged = commands.add_parser("evaluate", help="a run's LoRA beside its base, on unseen seeds")
    judged.set_defaults(command=evaluate_run)
    add_run(judged)
    judged.add_argument("--seeds", type=int, default=16, help="pictures of each prompt (16)")
    judged.add_argument(
        "--prompt", action="append", default=[], help="in place of the run's own; repeatable"
    )
    judged.add_argument(
        "--judge", action="append", default=[], metavar="'REWARD [OPTIONS]'",
        help="a second judge, as 'segment --labels Taxi --more' (what looks alike); repeatable",
    )  # fmt: skip
    judged.add_argument("--model", help="where the run's model lies now, if it was moved")
    judged.add_argument("--out", type=Path, help="folder of the page (RUN/evaluation)")

    paper = commands.add_parser("reproduce", help="the paper's experiments, and a report of them")
    paper.set_defaults(command=reproduce_paper)
    paper.add_argument("--quick", action="store_true", help="a small part of it, in minutes")
    paper.add_argument("--seeds", type=int, help="runs of each experiment and method (5; quick: 2)")
    paper.add_argument(
        "--only", action="append", choices=PAPER_EXPERIMENTS, help="one experiment; repeatable"
    )
    paper.add_argument("--model", help="folder, .safetensors file or Hub id (Tiny World)")
    paper.add_argument(
        "--segmenter", action="append",
        help="folder or Hub id of one that knows Hair, or Lake and Tree; repeatable (Tiny World's "
        f"own; for other models {CLOTHES})",
    )  # fmt: skip
    paper.add_argument(
        "--out", type=Path, help="the report's folder, where it also goes on (runs/reproduce)"
    )

    zipped = commands.add_parser("pack", help="pack a run into a zip that the page takes")
    zipped.set_defaults(command=pack_run)
    add_run(zipped)

    upload = commands.add_parser("push", help="push a run's LoRA to the Hugging Face Hub")
    upload.set_defaults(command=push_run)
    add_run(upload)
    upload.add_argument("repo", metavar="OWNER/NAME", help="repository, made if need be")
    upload.add_argument("--private", action="store_true", help="only you can see it")
    upload.add_argument(
        "--with-base", action="store_true", help="put a local base model (Tiny World) beside it"
    )
    return parser


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the run's folder, or its zip from the page")


def add_trackers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-with", action="append", metavar="NAME",
        help="a tracker that accelerate knows: tensorboard, wandb, trackio, ...; repeatable",
    )  # fmt: skip


def add_reward(parser: argparse.ArgumentParser, kind: RewardKind) -> None:
    parser.set_defaults(command=start, kind=kind, map=None, parser=parser)
    parser.add_argument("--config", type=Path, help="a run.yaml; other options win over it")
    for option in kind.options:
        add_option(parser, option)
    if kind.by_hand:
        parser.add_argument(
            "--map",
            action="append",
            type=Path,
            help="the run's picture painted green (+2) and red (-2); several add up to one wish. "
            "With --exact or --paper one for each update, the last stays",
        )
    parser.add_argument(
        "--paper", action=argparse.BooleanOptionalAction, help="the paper's exact recipe"
    )
    parser.add_argument("--prompts", type=Path, help="a text file of more prompts, one a line")
    parser.add_argument("--model", help="folder, .safetensors file or Hub id (Tiny World)")
    for side in ("height", "width"):
        parser.add_argument(
            f"--{side}", type=int, help="of the images, in pixels (the model's own)"
        )
    parser.add_argument("--lora", help="go on from this file, folder or Hub id of a LoRA")
    add_trackers(parser)
    parser.add_argument("--out", type=Path, help="run folder (runs/<command>-<number>)")
    preset = {**EXPERIMENTS[kind.experiment], **prompt_of(kind)}
    for entry in fields(Settings):
        add_setting(parser, entry, preset.get(entry.name, entry.default))


def prompt_of(kind: RewardKind) -> dict[str, str]:
    return {"prompt": kind.prompt} if kind.prompt else {}


def add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    """One option of a reward; left out means its default."""
    flag, name, default = "--" + option.name, "option_" + option.name, option.default
    if isinstance(default, bool):
        both = argparse.BooleanOptionalAction
        parser.add_argument(flag, dest=name, action=both, help=option.help)
        return
    several = isinstance(default, tuple)
    usual = ", ".join(default) if several else default
    parser.add_argument(
        flag, dest=name, action="append" if several else "store", metavar=option.name.upper(),
        help=option.help + ("; repeatable" if several else "") + (f" ({usual})" if usual else ""),
    )  # fmt: skip


def add_setting(parser: argparse.ArgumentParser, entry: Field, default: Any) -> None:
    """One option per setting; left out means the experiment's default, shown in the help."""

    def parse(text: str) -> Any:
        try:
            return checked(entry, kind_of(entry)(text))
        except SettingError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None

    choices, several = entry.metadata["choices"], entry.metadata["several"]
    usual = "the model's own" if default is None else default if default != "" else "empty"
    parser.add_argument(
        "--" + entry.name.replace("_", "-"),
        dest="setting_" + entry.name,
        type=parse,
        action="append" if several else "store",
        metavar="|".join(choices) if choices else entry.metadata["kind"].__name__.upper(),
        help=f"{entry.metadata['help']}{'; repeatable' * several} ({usual})".replace("%", "%%"),
    )


def given(options: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """The options of this prefix that were not left out."""
    return {
        name.removeprefix(prefix): value
        for name, value in vars(options).items()
        if name.startswith(prefix) and value is not None
    }


def start(options: argparse.Namespace) -> int:
    options = configured(options)
    kind, changes = options.kind, changes_of(options)
    lora = pull(options.lora) if options.lora else None
    if lora:
        changes = {"rank": lora.rank, **changes}
    spec, tools = spec_of(options), Tools(best_device(), code=True)
    if spec.exact:  # the maps are of the run's own picture
        changes = {"noise": "own", "images": 1, "baseline": "none", **changes}
    changes = {**prompt_of(kind), **changes}
    settings = settings_for(kind.experiment, paper=bool(options.paper), **changes)
    if spec.exact and len(settings.prompts) > 1:
        raise SettingError(
            f"--exact and --paper take --map for the picture of one prompt; there are "
            f"{len(settings.prompts)}."
        )
    if lora and lora.rank != settings.rank:
        raise SettingError(
            f"rank is {settings.rank}, but the LoRA {options.lora!r} has {lora.rank}; leave it out."
        )
    # What can be said is said before the model is loaded.
    check_trackers(options.log_with or ())
    if not spec.by_hand:
        spec.make(tools)
    for path in options.map or ():
        read_paint(path, None)
    if options.out:
        check_free(options.out)
    from_first(lambda: check_writable(options.out or Path("runs")))
    size = (options.height, options.width)
    model = load_model(resolved(options.model or "") or None, size=size)
    for word in model.unknown_words(f"{settings.prompt} {settings.held_out_prompt}"):
        if first():
            print(f"note: {Path(model.name).name} never learnt the word {word!r}", file=sys.stderr)
    run = watched(begin(model, settings, lora, reward=spec), "first images")
    for path in options.map or ():
        run = painted(run, read_paint(path, run.picture))
    end_with_the_others()
    judge = judge_of(run, model, tools)
    run = scored(run, spec, judge)
    folder = from_first(lambda: claimed(options, run))  # last, as what failed leaves none
    with kept(folder):
        return train(model, run, judge, folder, options.log_with or ())


def claimed(options: argparse.Namespace, run: Run) -> Path:
    """The run's new folder, with its run.yaml."""
    folder = claim(options.out or new_folder(Path("runs"), options.kind.name))
    write_config(folder, options.kind.name, asked(options, run))
    return folder


def configured(options: argparse.Namespace) -> argparse.Namespace:
    """The options, and from the file of --config those that were not given."""
    if not options.config:
        return options
    own = {"command", "kind", "parser", "config"}
    names = {re.sub("^(option|setting)_", "", name) for name in vars(options)} - own
    flags = read_config(options.config, options.kind.name, names)
    values = vars(options.parser.parse_args(flags))
    if options.prompts or options.setting_prompt:
        values |= {"prompts": None, "setting_prompt": None}
    winning = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**{**values, **winning})


def asked(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    """All that makes this run, by the names of the flags."""
    assert run.reward is not None
    settings = run.settings
    return {
        **run.reward.options,
        "map": tuple(resolved(str(path)) for path in options.map or ()),
        "model": None if Path(run.model_name) == TINY_WORLD else run.model_name,
        "height": options.height,
        "width": options.width,
        "lora": resolved(options.lora or "") or None,
        **settings.as_dict(),
        "prompt": settings.prompts,
        "held_out_prompt": settings.held_out_prompts,
    }


def changes_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were asked for; of several texts, one a line."""
    changes = given(options, "setting_")
    if options.prompts:
        try:
            more = options.prompts.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(
                f"the prompts in {str(options.prompts)!r} cannot be read ({error})."
            ) from error
        if not more:
            raise SettingError(f"there is no prompt in {str(options.prompts)!r}.")
        changes["prompt"] = [*changes.get("prompt", ()), more]
    return {name: "\n".join(v) if isinstance(v, list) else v for name, v in changes.items()}


def painted(run: Run, reward_map: Tensor) -> Run:
    """The run with one more map; the paper's, one for each update, are kept apart."""
    if run.reward and run.reward.exact:
        return replace(run, painted=(*run.painted, Painted(run.updates[0].shown[0], reward_map)))
    return paint(run, reward_map)


def spec_of(options: argparse.Namespace) -> RewardSpec:
    """The reward that was asked for, as a run keeps it."""
    chosen = given(options, "option_")
    if options.kind.by_hand and options.map and options.paper:
        chosen["exact"] = True
    spec = RewardSpec(options.kind.name, chosen).recorded()
    if options.kind.by_hand and spec.by_hand != bool(options.map):
        raise SettingError(
            f"{spec.kind} needs either --map with a painted picture, or labels to paint by itself, "
            "e.g. --more Lake --less Tree."
        )
    if chosen.get("exact") and not options.map:
        raise SettingError("--exact is for --map: labels are painted on every picture anyway.")
    return spec


def read_paint(path: Path, picture: Tensor | None) -> Tensor:
    """The map (H, W) in the painted picture; an error says which picture it is about.

    picture: (3, H, W), what it was painted on. Without, a whole picture cannot be told from paint
    yet, and is let pass.
    """
    opened = None
    try:
        opened = open_picture(path)
        painted = painted_map(opened, picture)
    except RewardError as error:
        if opened and picture is None:
            return Tensor()
        raise RewardError(f"{str(path)!r}: {error}") from error
    if not painted.any():
        raise SettingError(f"nothing is painted on {str(path)!r}; green is more, red is less.")
    return painted


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Meanwhile no other command goes on with the run in `folder`, nor a page with its neighbours;
    RunError where one does."""
    with ExitStack() as held:

        def keep() -> None:
            if (folder / "updates").is_dir():
                held.enter_context(keep_others_out(folder))
                if (folder.parent / LOCK).exists():  # a page's folder
                    held.enter_context(keep_others_out(folder.parent))

        from_first(keep)
        yield


def go_on(options: argparse.Namespace) -> int:
    with kept(options.run):
        return resume(options)


def resume(options: argparse.Namespace) -> int:
    run, folder = from_first(lambda: opened(options.run))
    spec = run.reward
    if spec is None:
        raise RunError(f"{folder} was taught nothing yet, and names no reward; begin with one.")
    if spec.by_hand and not run.painted:
        raise RunError(f"{folder} has no wish any more: it was forgotten; paint on the page.")
    if options.updates is not None:
        settings = replace(run.settings, updates=options.updates)
        if settings.updates < run.count:
            raise SettingError(
                f"updates is {settings.updates}, but this run has {run.count} behind it already."
            )
        run = replace(run, settings=settings)
    if run.later and first():
        print(
            f"note: the run stands at update {run.count}; its {len(run.later)} later ones go with "
            "the next", file=sys.stderr,
        )  # fmt: skip
    if anew := given(options, "option_"):
        spec = spec.changed(**anew).recorded()
        run = replace(run, reward=spec)
    check_trackers(options.log_with or ())
    from_first(lambda: check_writable(folder))
    tools = Tools(best_device(), code=True)
    if not spec.by_hand:
        spec.make(tools)
    model = load_model(options.model or run.model_name, size=run.size)
    run = replace(run, model_name=resolved(model.name))
    end_with_the_others()
    judge = judge_of(run, model, tools)
    run = scored(run, spec, judge, anew=bool(anew))
    return train(model, run, judge, folder, options.log_with or ())


def opened(place: Path) -> tuple[Run, Path]:
    """The run in a folder or a zip; where a zip was unpacked is said."""
    run, folder = open_run(place)
    if folder != place:
        print(f"Unpacked into {folder}")
    return run, folder


def train(
    model: DiffusionModel, run: Run, judge: Reward, folder: Path, log_with: Sequence[str] = ()
) -> int:
    """Update until the run has its updates or its wish is met, saving after each; Ctrl-C, the end
    of another process and an update that diverges keep what was done. judge: the run's reward.
    log_with: trackers."""
    spec = run.reward
    assert spec is not None
    try:
        if first():
            save_run(run, folder)
        total = run.settings.updates
        with (
            tracked(folder, log_with if first() else (), run) as track,
            progress_bar(total=total, initial=run.count, unit="update", desc="learning") as bar,
        ):
            if first() and not run.count:
                track(run, None)
            while run.count < total and (spec.exact or not run.met):
                started = time.perf_counter()
                run = watched(generate(model, run), "denoising")
                images = run.trajectory.images  # type: ignore[union-attr]
                count = run.settings.images
                maps = painted_now(run, count) if spec.exact else gathered(judge(images), count)
                taught = watched(teach(model, run, spec, maps, judge), "updating")
                run = annotate(taught, seconds=time.perf_counter() - started)
                heated = gathered(images[:HEATED], min(count, HEATED))
                if first():
                    save_run(run, folder)
                    track(run, heat_strip(heated, maps))
                bar.update()
                if first() and not run.updates[-1].learnt:
                    bar.write(f"Update {run.count}: {ALIKE}", file=sys.stderr)
                bar.set_postfix_str(f"reward {run.latest[-1].here:+.4f}")
    except DivergedError as reason:
        end_undisturbed()  # the launcher ends all when the quickest has ended
        if first() and run.count:
            write_metrics(run, folder)
            write_folder(run, folder / "lora")
        raise DivergedError(f"{reason} {after_diverging(run)}") from reason
    except (KeyboardInterrupt, ProcessError) as reason:
        end_undisturbed()
        if first():
            save_run(run, folder)  # it may have come in the middle of this
            write_metrics(run, folder)
            write_folder(run, folder / "lora")
        way_on = f"all of it is kept. Go on with: python -m pxpo resume {folder}"
        if isinstance(reason, ProcessError):
            raise ProcessError(f"{reason} Stopped after update {run.count}; {way_on}") from reason
        if first():
            print(f"\nStopped after update {run.count}; {way_on}")
        return 130
    if first():
        write_metrics(run, folder)
        write_folder(run, folder / "lora")
        if run.met and not spec.exact:
            print(f"Stopping here: {MET}.")
        print(f"Done: {run.count} updates, LoRA and pictures in {folder / 'lora'}")
    return 0


def after_diverging(run: Run) -> str:
    """What is left of a run whose next update diverges, and the way on: no `resume`, as that draws
    the same again."""
    count = run.count
    kept = f"Stopped after update {count}; all of it is kept" if count else "No update was taken"
    smaller = "--strength" if run.settings.strength else "--learning-rate"
    return (
        f"{kept}. To resume it would end the same way: begin another run with a smaller {smaller}."
    )


def painted_now(run: Run, images: int) -> Tensor:
    """The paper's map (B, H, W) of the next update, the same for all of its images."""
    return run.painted[min(run.count, len(run.painted) - 1)].paint.expand(images, -1, -1)


def evaluate_run(options: argparse.Namespace) -> int:
    check_alone("evaluate")
    run, folder = opened(options.run)
    judges, tools = [read_spec(text) for text in options.judge], Tools(best_device(), code=True)
    for spec in judges:  # what can be said is said before the model is loaded
        spec.make(tools)
    check_writable(options.out or folder)
    model = load_model(options.model or run.model_name, size=run.size)
    run = replace(run, model_name=resolved(model.name))
    wanted = {"prompts": options.prompt, "seeds": options.seeds, "judges": judges}
    seeds, parts = watched(evaluate(model, run, tools, **wanted), "evaluating")
    page = write_evaluation(run, seeds, parts, options.out or folder / "evaluation")
    print(f"Written: {page}")
    return 0


def reproduce_paper(options: argparse.Namespace) -> int:
    """All of it, or what is left of it."""
    check_alone("reproduce")
    scale = QUICK if options.quick else FULL
    scale = replace(scale, seeds=scale.seeds if options.seeds is None else options.seeds)
    if scale.seeds < 1:
        raise SettingError(f"seeds is {scale.seeds}; the least it can be is 1.")
    folder = options.out or Path("runs", "reproduce-quick" if options.quick else "reproduce")
    check_writable(folder)
    model = load_model(resolved(options.model or "") or None)
    usual = "" if Path(model.name) == TINY_WORLD else CLOTHES
    bench = Bench(model, folder, scale, options.segmenter or [usual], Tools(best_device()))
    names = [name for name in PAPER_EXPERIMENTS if not options.only or name in options.only]
    try:
        page = watched(reproduce(bench, names), "reproducing")
    except KeyboardInterrupt:
        print("\nStopped; what was done is kept. The same command goes on.")
        return 130
    print(f"Written: {page}")
    return 0


def check_alone(command: str) -> None:
    """SettingError where many processes were started, which would all do and write the same."""
    if many():
        raise SettingError(f"{command} runs in one process; start it without accelerate launch.")


def pack_run(options: argparse.Namespace) -> int:
    run, folder = opened(options.run)
    write_folder(run, folder / "lora")
    whole = folder.resolve()
    archive = pack(whole, whole.with_name(f"{whole.name}.zip"))
    print(f"Packed into {archive}")
    return 0


def push_run(options: argparse.Namespace) -> int:
    """Write the run's LoRA folder for its repository, and push it."""
    run, folder = opened(options.run)
    lora = write_folder(run, folder / "lora", repo=options.repo, with_base=options.with_base)
    base = run.model_name if options.with_base and not base_of(run.model_name).hub else None
    work = push(lora, options.repo, private=options.private, base=base)
    address = watched(work, "pushing")
    print(f"Pushed to {address}")
    return 0


def watched(work: Generator[Progress, None, Result], name: str) -> Result:
    """Run a generator to its end under a progress bar that vanishes with it."""
    with progress_bar(leave=False, desc=name) as bar:
        while True:
            try:
                progress = next(work)
            except StopIteration as end:
                return end.value
            bar.total, bar.n = progress.total, progress.done
            bar.set_description(progress.phase, refresh=True)


def progress_bar(**options: Any) -> tqdm:
    return tqdm(**options, disable=not first())


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
