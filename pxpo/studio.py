"""Many people's runs on one model: each kept on disk under a name that nobody can guess.

    studio = Studio(model, segmenter, Path("runs/studio"))
    run = finish(studio.start(prompt="nature landscape", seed=3))
    run = finish(studio.step(run.id, RewardSpec("paint"), picture))

A run is on disk after every update, so Stop, a closed tab or a crash loses at most the update under
way; the runs last used are in memory as well. There is one model: where many people call, all that
computes goes through `studio.thread`, on which they take turns, one update each.
"""

from __future__ import annotations

import functools
import math
import os
import re
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any, Literal

from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from .card import base_of, score_curve, write_folder
from .embedded import OPENING, TINY_SEGMENTER
from .errors import LoraError, RewardError, RunError, SettingError
from .hub import push
from .lora import Lora, check_fits
from .lora_files import FILE_NAME
from .models import DiffusionModel
from .pace import Pace
from .plots import heat_map
from .progress import Progress, finish
from .rewards import Reward, RewardSpec, Segmenter, Tools, painted_map
from .rewards.painting import FULL
from .rewards.wish import MET, MOST_PAINTED
from .run import (
    Run,
    Update,
    begin,
    generate,
    go_to,
    judge_of,
    paint,
    resolved,
    scored,
    shown_noise,
    teach,
)
from .settings import Settings, settings_for
from .store import (
    at_rest,
    cannot_save,
    load_run,
    pack,
    save_run,
    size_of,
    unpack,
    write_whole,
)
from .turns import ModelThread

MOST_BEGUN = 16  # beginnings in memory
SHOWN = 3  # images on fixed noise after each update: this seed's, and two held-out ones
MOST_UPDATES = 100  # of one run
IN_MEMORY = 8  # runs
IN_USE = 3600  # seconds since it was used, for which no run makes room for another
NEW = 600  # the same for one that was only begun
KEPT_FREE = 0.1  # share of the disk space that new runs leave to those that are there

NOTHING_LEFT = f"{MET}. Paint something else, or forget the wish."
TOO_LITTLE = (
    "so little is painted red that it is not told from what is around it; paint more of the thing, "
    "all of it is best."
)

ARCHIVE = "pxpo-run.zip"

RUN_ID = re.compile(r"[\w-]{16}")

Neighbour = Literal["before", "after"]

Work = Callable[..., Generator[Progress, None, Any]]
"""What the model works for, step by step."""


@dataclass(frozen=True)
class Bounds:
    """The most that a person may ask for on a machine that many share; without limit as it is.

    update: denoising steps of an update, all its pictures' together. request: those of all updates
    that are asked for at once. rank: the LoRA's. prompt: characters.
    """

    update: float = math.inf
    request: float = math.inf
    rank: float = math.inf
    prompt: float = math.inf

    def check(self, settings: Settings, updates: int = 1) -> None:
        """SettingError where so many updates with these settings are more than that."""
        pictures = settings.images + len(shown_noise(settings))
        each = pictures * settings.steps
        asked = f"{pictures} pictures an update × {settings.steps} denoising steps"
        prompts = max(len(settings.prompt), len(settings.held_out_prompt))
        for name, value, most, way_out in (
            ("the prompt's length", prompts, self.prompt, "shorten it"),
            ("rank", settings.rank, self.rank, "take a lower one"),
            (asked, each, self.update, "take fewer pictures or fewer steps"),
            (f"{asked} × {updates} updates", each * updates, self.request, "take fewer updates"),
        ):
            if value > most:
                raise SettingError(
                    f"{name} is {value}; the most it can be here, where many share a machine, is "
                    f"{most:g}. Please {way_out}; on a machine of your own there is no such limit."
                )


SHARED = Bounds(update=2_000, request=40_000, rank=64, prompt=1_000)
"""On a page that more than this machine can reach: a hundred usual updates, one at a time."""


class Studio:
    """One model and one segmenter, and the runs of all who use them.

    most_bytes: what the runs may take on disk together. Those left alone longest go first, and none
    that is in use: where all are, nothing more is taken in.
    thread: the one that the model was opened on, where that matters; else one of its own.
    usual: as `Tools` takes it. lend: gives what works on the model, from plain data to plain data,
    another place to do so. bounds: the most that a person may ask for. opening: the folder of a run
    that has no name and is for all to see, if it is of this model; whoever goes on with it gets a
    run of their own.
    """

    def __init__(
        self, model: DiffusionModel, segmenter: Segmenter, folder: Path, most_bytes: float = 5e9,
        thread: ModelThread | None = None, usual: Mapping[str, str] | None = None,
        lend: Callable[[Work], Work] = lambda work: work, bounds: Bounds = Bounds(),
        opening: Path = OPENING,
    ) -> None:  # fmt: skip
        self.model, self.segmenter, self.folder = model, segmenter, Path(folder).resolve()
        self.tools = Tools(str(model.device), segmenter, usual)
        self.most_bytes, self.thread, self.bounds = most_bytes, thread or ModelThread(), bounds
        self._begin = lend(functools.partial(begin, model))
        self._updated, self._judged_shown = lend(self._update), lend(self._judge_shown)
        self._classified = lend(self._classify)
        self._recent: OrderedDict[str, Run] = OrderedDict()
        self._begun: dict[Settings, Run] = {}
        self._learning = set[str]()  # runs of which an update is under way
        self._lock = threading.Lock()
        self.pace = Pace(model)
        self.opening: Run | None = None
        self._opening_id = secrets.token_urlsafe(12)  # of the copy that is downloaded
        with suppress(RunError, LoraError):
            self.opening = self._fitting(load_run(opening), "")

    def start(self, *, lora: Lora | None = None, **settings: Any) -> Generator[Progress, None, Run]:
        """A new run, with any of the settings.

        The beginning of an example, which many begin with, is made once.
        """
        settings = {"shown": SHOWN, **settings, **({"rank": lora.rank} if lora else {})}
        chosen = self.model.filled(settings_for("paint", **settings))
        self.bounds.check(chosen)
        run = self._begun.get(chosen) if lora is None else None
        if run is None:
            run = yield from self.thread.in_turn(self._begin(chosen, lora))
        else:
            yield from self.thread.after_own()
        if lora is None:
            self._begun[chosen] = run
            if len(self._begun) > MOST_BEGUN:
                self._begun.pop(next(iter(self._begun)))
        return self._keep(run)

    def step(
        self, run_id: str, reward: RewardSpec, painting: Image.Image | None = None, *,
        count: int = 1, **settings: Any,
    ) -> Generator[Progress, None, Run]:  # fmt: skip
        """One update from a reward; from painting, by all that was painted on this run so far.

        painting: what is painted on the run's picture now, which adds to its wish. count: how many
        such updates are asked for at once, this one among them. settings: strength, images or any
        other that may change between two updates. Closing the generator, or an error, leaves the
        run as it was. RunError where the run has changed before it was this step's turn, so that
        it would end other updates, or the paint would lie on another picture.
        """
        changed = {n: v for n, v in settings.items() if v is not None}
        asked = self.run(run_id)
        self.bounds.check(self._settings(asked.settings, changed), count)
        self._check(reward)
        run = yield from self.thread.in_turn(self._step(asked, reward, painting, changed))
        return self._keep(at_rest(run, self._folder(run_id)) if run_id else run)

    def forget_wish(self, run_id: str) -> Run:
        """The run without all that was painted; what it learnt stays."""
        return self._keep(replace(self.run(run_id), painted=()))

    def go_to(self, run_id: str, count: int) -> Generator[Progress, None, Run]:
        """The run as it was after `count` updates: weights, optimizer, pictures, randomness."""
        yield from ()
        return self._keep(go_to(self.run(run_id), count))

    def heat(self, run: Run, reward: RewardSpec) -> Image.Image:
        """What a reward says of the run's picture, laid over it; also while another run learns.

        Of a reward that is no person's the part that it is learnt from: where the picture earns
        more, or less, than all that are shown.
        """
        maps = finish(self._judged_shown(replace(run, reward=reward)))
        if reward.by_hand:
            return heat_map(run.picture, maps[0], FULL)
        return heat_map(run.picture, maps[0] - maps.mean(0))

    def classes(self, picture: Tensor) -> Tensor:
        """What the segmenter takes each pixel for, (H, W) long; picture: (3, H, W) in [0, 1]."""
        return finish(self._classified(picture))

    def curve(self, run: Run) -> Any:
        """The figure of the last reward by step, None before the first one."""
        return score_curve(run, page=True)

    def run(self, run_id: str) -> Run:
        """The run of this name; RunError when there is none (any more)."""
        if not run_id:
            return self._opening()
        folder = self._folder(run_id)
        with suppress(OSError):  # of a folder that was deleted, say; it comes back when it is saved
            os.utime(folder)  # in use
        with self._lock:
            if run_id in self._recent:
                self._recent.move_to_end(run_id)
                return self._recent[run_id]
        if not self._is_kept(run_id):
            raise RunError("this run is no longer kept here; start a new one, or upload it.")
        return self._remember(self._read(run_id), anew=False)

    def follow(self, before: str, run_id: str) -> None:
        """Remember that a person began the run `run_id` at the run `before`, if that is kept: so
        that they find the way back, and forward again. It comes after all that they began there."""
        if self._is_kept(before):
            while after := self.neighbour(before, "after"):
                before = after
            with suppress(OSError):
                write_whole(self._folder(run_id) / "before", before.encode())
                write_whole(self._folder(before) / "after", run_id.encode())

    def neighbour(self, run_id: str, which: Neighbour) -> str:
        """The run that comes before or after this one; empty where there is none that is kept."""
        if not run_id:
            return ""
        with suppress(OSError, UnicodeDecodeError):
            found = (self._folder(run_id) / which).read_text(encoding="utf-8")
            return found if self._is_kept(found) else ""
        return ""

    def _is_kept(self, run_id: str) -> bool:
        return bool(RUN_ID.fullmatch(run_id)) and (self.folder / run_id / "run.json").exists()

    def forget(self, run_id: str) -> None:
        """Free the memory of a run; it stays on disk."""
        with self._lock:
            self._recent.pop(run_id, None)

    def lora_folder(self, run_id: str) -> Path:
        """The run's LoRA in a folder that stands by itself. Whoever downloads it is told neither
        where it lies here nor the run's name, by which anybody could go on with it."""
        run = self.run(run_id)
        folder = self._folder(run.id or self._opening_id)
        if not (folder / "run.json").exists():  # of the opening; or it was deleted meanwhile
            self._make_room(_size(run), folder.name)
            save_run(run, folder)
        try:
            return write_folder(run, folder / "lora", repo="lora")
        except (OSError, SafetensorError) as error:
            raise cannot_save(folder, error) from error

    def lora_file(self, run_id: str) -> Path:
        """The run's LoRA as a file that any diffusers pipeline loads."""
        return self.lora_folder(run_id) / FILE_NAME

    def push(
        self, run_id: str, repo: str, *, token: str | None, private: bool, with_base: bool
    ) -> Generator[Progress, None, str]:
        """Push that folder to the Hub, and return its address there.

        with_base: and this studio's own model beside it, where that is a folder; no other ever.
        """
        base = self.model.name if with_base and not base_of(self.model.name).hub else None
        with TemporaryDirectory() as place:  # of its own: downloads write theirs meanwhile

            def write() -> Path:
                return write_folder(
                    self.run(run_id), Path(place, "lora"), repo=repo, with_base=with_base
                )

            folder = self.thread.call(write)
            return (yield from push(folder, repo, token=token, private=private, base=base))

    def archive(self, run_id: str) -> Path:
        """The whole run as a .zip, for `admit` and for the command line."""
        folder = self.lora_folder(run_id).parent
        return pack(folder, folder / ARCHIVE)

    def admit(self, archive: Path) -> Run:
        """Take in a zip of a run, by `archive` or the command line's pack, under a new name.

        Raises RunError for anything else, LoraError for a LoRA that does not fit.
        """
        with self._new() as run_id:
            folder = self._folder(run_id)
            unpack(archive, folder, self.most_bytes / 2, MOST_UPDATES, self._make_room)
            run = self._read(run_id)
            self.bounds.check(replace(run.settings, rank=run.lora.rank))
            for one in run.updates + run.later:  # all that they show is judged with the next one
                self.bounds.check(replace(one.settings, rank=one.lora.rank))
            return self._remember(run)

    @contextmanager
    def _new(self) -> Iterator[str]:
        """A new run's name; of one that cannot be kept nothing is left."""
        run_id = secrets.token_urlsafe(12)
        try:
            yield run_id
        except BaseException:
            shutil.rmtree(self._folder(run_id), ignore_errors=True)
            raise

    def _step(
        self, asked: Run, reward: RewardSpec, painting: Image.Image | None,
        changed: dict[str, Any],
    ) -> Generator[Progress, None, Run]:  # fmt: skip
        """The run after one update more."""
        run_id, run = asked.id, self.run(asked.id)
        gone_back = len(run.later) != len(asked.later)
        gone_on = run.lora.digest != asked.lora.digest
        if gone_back or (gone_on and painting is not None):
            raise RunError(
                f"this run has changed while this step waited for its turn, and is at step "
                f"{run.count} now. Nothing was learnt: look at it, and press Step again."
            )
        if run.count >= MOST_UPDATES:
            raise RunError(
                f"this run has {run.count} updates, the most there can be; download it, or start "
                "anew."
            )
        self._make_room(_bytes(run.updates[-1], 3), run_id)  # its LoRA, and AdamW's two moments
        wanted = replace(run, reward=reward, settings=self._settings(run.settings, changed))
        if reward.by_hand and painting is not None:
            wanted = self._painted(wanted, painting)
        self._learning |= {run.id} - {""}  # the opening is everybody's
        try:
            anew = wanted.painted is not run.painted
            with self.pace.timed(wanted.settings):
                return (yield from self._updated(wanted, self._named(reward), anew))
        finally:
            self._learning.discard(run.id)

    def _check(self, reward: RewardSpec) -> None:
        """RewardError for one that is not for the page."""
        if reward.exact:
            raise RewardError(
                "here paint is a wish, which holds on any picture; exact is for the command line."
            )
        if not reward.declared.public:
            raise RewardError(
                f"the reward {reward.kind!r} is for the command line alone; take another here."
            )
        if not reward.declared.available(self.tools):
            raise RewardError(
                f"the reward {reward.kind!r} is not offered here, as its model is not on this "
                "machine; take another, or the command line, which fetches it."
            )

    def _settings(self, last: Settings, changes: dict[str, Any]) -> Settings:
        """The defaults, for this run's prompt, seed and way of sampling, with `changes` on top."""
        fixed = (
            "prompt", "held_out_prompt", "seed", "steps", "guidance_scale", "eta", "rank", "shown",
        )  # fmt: skip
        same = {name: getattr(last, name) for name in fixed}
        return self.model.filled(settings_for("paint", **{**same, **changes}))

    def _update(self, run: Run, named: RewardSpec, anew: bool) -> Generator[Progress, None, Run]:
        """One update by the run's reward, which is kept as `named`; anew: more was painted."""
        judge = judge_of(run, self.model, self.tools)
        if named.by_hand:
            run = yield from self._judged(run, named, judge, anew)
            if run.met:
                blamed = (run.painted[-1].paint < 0).any()
                raise RunError(TOO_LITTLE if anew and blamed else NOTHING_LEFT)
        run = yield from generate(self.model, run)
        images = run.trajectory.images  # type: ignore[union-attr]
        yield Progress("judging", 0, len(images))  # each is a place to stop at
        maps = judge(images)
        yield Progress("judging", len(images), len(images))
        return (yield from teach(self.model, run, named, maps, judge))

    def _judge_shown(self, run: Run) -> Generator[Progress, None, Tensor]:
        """The maps (K, H, W) of what the run shows by its reward; of a person's, of its picture."""
        yield from ()
        shown = run.updates[-1].shown
        if run.reward and run.reward.by_hand:
            shown = shown[:1]
        return judge_of(run, self.model, self.tools)(shown.permute(0, 3, 1, 2) / 255)

    def _classify(self, picture: Tensor) -> Generator[Progress, None, Tensor]:
        yield from ()
        return self.segmenter.classes(picture[None])[0]

    def _judged(
        self, run: Run, reward: RewardSpec, judge: Reward, anew: bool
    ) -> Generator[Progress, None, Run]:
        """`scored`, one update after the other, as it takes a while after more was painted: the
        numbers shall mean the same at every update."""
        updates = list[Update]()
        for number, one in enumerate(run.updates):
            if anew or reward.name not in one.scores:
                yield Progress("judging what was shown", number, len(run.updates))
            updates += scored(replace(run, updates=(one,)), reward, judge, anew=anew).updates
        return replace(run, reward=reward, updates=tuple(updates))

    def _painted(self, run: Run, painting: Image.Image) -> Run:
        strokes = painted_map(painting, run.picture)
        if not strokes.any():
            raise RunError("nothing is painted; paint + (green) or − (red) first.")
        return paint(run, strokes)

    def _named(self, reward: RewardSpec) -> RewardSpec:
        """The reward with the names of the models here, so that another place takes the same."""
        here = {**self.tools.usual, "segmenter": self.segmenter.name}
        if Path(self.segmenter.name) == TINY_SEGMENTER:
            del here["segmenter"]
        return reward.changed(**{n: resolved(v) for n, v in here.items() if n in reward.options})

    def _folder(self, run_id: str) -> Path:
        if not RUN_ID.fullmatch(run_id):
            raise RunError(f"{run_id!r} is not the name of a run.")
        return self.folder / run_id

    def _opening(self) -> Run:
        if self.opening is None:
            raise RunError("there is no run yet; wait for the first picture, or make a new one.")
        return self.opening

    def _keep(self, run: Run) -> Run:
        if not run.id:
            self._make_room(_size(run))
            with self._new() as run_id:
                return self._keep(replace(run, id=run_id))
        if run.id in self._learning:
            raise RunError(
                "an update of this run is under way, in another tab say; press Stop there, or wait "
                "for its end."
            )
        save_run(run, self._folder(run.id))
        with suppress(OSError):  # the zip of what it was
            (self._folder(run.id) / ARCHIVE).unlink(missing_ok=True)
        return self._remember(run)

    def _remember(self, run: Run, anew: bool = True) -> Run:
        """The run, in memory from now on; anew: in place of what is there, which else is newer."""
        with self._lock:
            run = self._recent[run.id] = run if anew else self._recent.get(run.id, run)
            self._recent.move_to_end(run.id)
            while len(self._recent) > IN_MEMORY:
                self._recent.popitem(last=False)
        return run

    def _make_room(self, size: int, run_id: str = "") -> None:
        """Delete the runs left alone longest until `size` bytes more fit: for the run of this name,
        or for a new one. RunError where all that is left is in use."""
        runs = [folder for folder in self.folder.glob("*") if self._is_run(folder)]
        sizes = {folder: size_of(folder) for folder in runs}
        used = {folder: _last_used(folder) for folder in runs}
        most = self.most_bytes * (1 if run_id else 1 - KEPT_FREE)
        excess, now = sum(sizes.values()) + size - most, time.time()
        taught = {folder: len([*(folder / "updates").glob("*")]) > 1 for folder in runs}
        for folder in sorted(runs, key=lambda folder: (taught[folder], used[folder])):
            if excess <= 0:
                return
            kept = IN_USE if taught[folder] else NEW
            if folder.name != run_id and now - used[folder] > kept:
                self.forget(folder.name)
                shutil.rmtree(folder, ignore_errors=True)
                excess -= sizes[folder]
        if excess > 0:
            raise RunError(
                f"the disk space for runs here, {self.most_bytes / 1e9:.1f} GB, is taken by runs "
                "that are in use. Nothing is lost; try again in an hour, and download your run to "
                "keep it."
            )

    def _is_run(self, folder: Path) -> bool:
        """Whether it is one of ours: nothing else that lies here is ever deleted."""
        return bool(RUN_ID.fullmatch(folder.name)) and (folder / "updates").is_dir()

    def _read(self, run_id: str) -> Run:
        return self._fitting(load_run(self._folder(run_id)), run_id)

    def _fitting(self, run: Run, run_id: str) -> Run:
        """The run under this name, if it is of this studio's model; else RunError, LoraError."""
        model = resolved(self.model.name)
        named, here = _placeless(run.model_name), _placeless(model)
        if named != here:
            raise RunError(
                f"this run is of the model {named!r}, and here is {here!r}; open it where its "
                "model runs."
            )
        if run.size != self.model.image_size:
            (height, width), (here_h, here_w) = run.size, self.model.image_size
            raise RunError(
                f"this run's pictures are {width} × {height} pixels, and here they are {here_w} × "
                f"{here_h}; open it where the app was started with --width {width} --height "
                f"{height}."
            )
        check_fits(self.model, run.lora)
        latents = (0, *self.model.latent_shape[1:])
        if run.updates[0].latent_reward.shape != latents:
            raise RunError(
                f"this run's latents are of the shape {tuple(run.updates[0].latent_reward.shape)}, "
                f"and here of {latents}; it is of another model."
            )
        if len(run.painted) > MOST_PAINTED:  # each the reward of an update, as in the paper
            raise RunError(
                f"this run has {len(run.painted)} painted pictures, and here the most is "
                f"{MOST_PAINTED}; go on with it on the command line."
            )
        return replace(run, id=run_id, model_name=model)  # never a folder that it names


def _size(run: Run) -> int:
    """What a run takes on disk."""
    return sum(_bytes(one, 3 if one.optimizer else 1) for one in run.updates + run.later)


def _bytes(one: Update, times: int) -> int:
    """What its pictures, `times` as much as its LoRA, and a few words take on disk."""
    lora = sum(weight.nbytes for weight in one.lora.weights.values())
    return one.shown.nbytes + times * lora + 4096


def _last_used(folder: Path) -> float:
    """When a run was used last, as `time.time()`. A clock that was ahead may have left a time that
    is still to come, which would keep it for ever: from now on it counts as used now."""
    try:
        last, now = folder.stat().st_mtime, time.time()
        if last > now:
            os.utime(folder)
        return min(last, now)
    except OSError:  # it is gone, or nobody's to change
        return 0.0


def _placeless(model_name: str) -> str:
    """A model's name; of a folder's path the last part, as the rest differs between machines."""
    path = PureWindowsPath(model_name)  # which knows both kinds of slashes
    return path.name if path.root else model_name
