"""Many people's runs on one model: each kept on disk under a name that nobody can guess.

    studio = Studio(model, segmenter, Path("runs/studio"))
    run = finish(studio.start(prompt="nature landscape", seed=3))
    run = finish(studio.step(run.id, Wish("paint"), paint=picture))

A run is on disk after every step, so Stop, a closed tab or a crash loses at most the step under
way; the runs last used are in memory as well. There is one model, so one piece of work runs at a
time: where many people call, all that computes goes through `studio.thread`.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import secrets
import shutil
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors
from torch import Tensor
from torch.nn.functional import interpolate

from .card import base_of, write_folder
from .config import PAINTED, Settings, settings_for
from .errors import RunError
from .hub import push
from .lora import FILE_NAME, Lora, check_fits
from .models import DiffusionModel
from .plots import heat_map, reward_curve
from .rewards import (
    ColorReward,
    Opinion,
    Reward,
    Segmenter,
    SegmentReward,
    paint_layer,
    painted_map,
)
from .rollout import Progress
from .session import Session, back, generate, learn, new_session, resume, save, write_whole

MOST_BEGUN = 16  # beginnings in memory
SHOWN = 3  # images on fixed noise after each step: this seed's, and two held-out ones
MOST_STEPS = 100  # steps of one run
IN_MEMORY = 8  # runs
PAGE = "page.safetensors"
FILES = re.compile(rf"run\.json|{re.escape(PAGE)}|steps/[\w.-]+\.safetensors")


@dataclass(frozen=True)
class Wish:
    """Where a step's reward comes from: kind "paint", "color" or "segment"; more of it, or less."""

    kind: str = "paint"
    color: str = "blue"
    labels: Sequence[str] = ("Hair",)
    more: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(label.strip() for label in self.labels))

    @property
    def name(self) -> str:
        if self.kind == "paint":
            return "painted"
        what = self.color if self.kind == "color" else ", ".join(self.labels)
        return f"{'more' if self.more else 'less'} {what}"


@dataclass(frozen=True)
class Score:
    """A reward's mean over the shown image of this seed, and over those of held-out seeds."""

    here: float
    held_out: float
    held_out_std: float


@dataclass(frozen=True)
class Run:
    """A person's run: the session, and what their page shows besides.

    session.trajectory holds the picture to paint on. paint: (H, W, 4) uint8, last learnt from.
    scores: by Wish.name, one for each step from 0 on.
    """

    id: str
    session: Session
    opinion: Opinion
    scores: dict[str, tuple[Score, ...]]
    wish: Wish | None = None
    paint: Tensor | None = None

    @property
    def step(self) -> int:
        return self.session.step

    @property
    def latest(self) -> tuple[Score, ...]:
        """The scores of the last wish, one for each step; none before the first step."""
        return self.scores[self.wish.name] if self.wish else ()

    @property
    def picture(self) -> Tensor:
        """(3, H, W) in [0, 1]: the picture to judge next."""
        assert self.session.trajectory is not None
        return self.session.trajectory.images[0]


class ModelThread:
    """The one thread that all computing runs on.

    OpenMP keeps helpers for every thread that ever computes, and with more of them than cores it
    lets them sleep between any two operations: on two cores all takes half as long again.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "model")
        self._open: Generator | None = None  # the work that has begun last

    def call(self, work: Callable[..., Any], *values: Any) -> Any:
        return self._pool.submit(work, *values).result()

    def iterate(self, work: Generator) -> Iterator[Any]:
        """What `work` yields. It may be given up at any time; it is closed on this thread too."""
        end = object()
        try:
            while (value := self.call(self._advance, work, end)) is not end:
                yield value
        finally:
            self._pool.submit(work.close)  # not waited for: this may be that very thread

    def wrap(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, a function or a generator function, as one that runs here."""

        @functools.wraps(work)
        def call(*values: Any) -> Any:
            return self.call(work, *values)

        @functools.wraps(work)
        def iterate(*values: Any) -> Iterator[Any]:
            yield from self.iterate(work(*values))

        return iterate if inspect.isgeneratorfunction(work) else call

    def _advance(self, work: Generator, end: object) -> Any:
        """The next value. Work that was given up (Stop, a closed tab), and whose end has not
        reached this thread yet, is closed before other work begins: both want the model."""
        if inspect.getgeneratorstate(work) == inspect.GEN_CLOSED:
            return end
        if self._open is not work:
            if self._open is not None:
                self._open.close()
            self._open = work
        return next(work, end)


class Studio:
    """One model and one segmenter, and the runs of all who use them.

    most_bytes: what the runs may take on disk together; those left alone longest go first.
    thread: the one that the model was opened on, where that matters; else one of its own.
    """

    def __init__(
        self, model: DiffusionModel, segmenter: Segmenter, folder: Path, most_bytes: float = 5e9,
        thread: ModelThread | None = None,
    ) -> None:  # fmt: skip
        self.model, self.segmenter, self.folder = model, segmenter, Path(folder)
        self.most_bytes, self.thread = most_bytes, thread or ModelThread()
        self._recent: OrderedDict[str, Run] = OrderedDict()
        self._begun: dict[Settings, Session] = {}
        self._lock = threading.Lock()

    def start(self, *, lora: Lora | None = None, **settings: Any) -> Generator[Progress, None, Run]:
        """A new run, with any of the settings of a painted one."""
        session = yield from self._begin(lora, **settings)
        return self._keep(Run(secrets.token_urlsafe(12), session, Opinion.none(), {}))

    def _begin(
        self, lora: Lora | None = None, **settings: Any
    ) -> Generator[Progress, None, Session]:
        """A run's beginning; that of an example, which many begin with, is made once."""
        chosen = settings_for("paint", **{**PAINTED, "shown": SHOWN, **settings})
        if lora is None and chosen in self._begun:
            return self._begun[chosen]
        session = yield from new_session(self.model, chosen, lora)
        session = yield from generate(self.model, session)
        if lora is None:
            self._begun[chosen] = session
            if len(self._begun) > MOST_BEGUN:
                self._begun.pop(next(iter(self._begun)))
        return session

    def step(
        self, run_id: str, wish: Wish, paint: Image.Image | None = None, **settings: Any
    ) -> Generator[Progress, None, Run]:
        """One update from painting on the run's picture, or from a reward on images of its own.

        settings: learning_rate, images or any other that may change between two steps. Closing
        the generator, or an error, leaves the run as it was.
        """
        run = self.run(run_id)
        if run.step >= MOST_STEPS:
            raise RunError(
                f"this run has {run.step} steps, the most there can be; download it, or start anew."
            )
        painting = run.session.settings
        session = replace(run.session, settings=self._settings(painting, wish.kind, settings))
        if wish.kind == "paint":
            if paint is None or not (maps := painted_map(paint, run.picture)[None]).any():
                raise RunError("nothing is painted; paint + (green) or − (red) first.")
            judge: Reward = run.opinion.hear(interpolate(run.picture[None], maps.shape[1:]), maps)
        else:
            judge = self.reward(wish)
            session = yield from generate(self.model, replace(session, trajectory=None))
            maps = judge(session.trajectory.images)  # type: ignore[union-attr]
        session = yield from learn(self.model, session, maps)
        session = yield from generate(self.model, replace(session, settings=painting))
        known = () if wish.kind == "paint" else run.scores.get(wish.name, ())
        new = [_score(judge, snapshot.shown) for snapshot in session.history[len(known) :]]
        run = replace(
            run, session=session, wish=wish, scores={**run.scores, wish.name: (*known, *new)}
        )
        if isinstance(judge, Opinion):
            run = replace(run, opinion=judge, paint=paint_layer(maps[0]))
        return self._keep(run)

    def back(self, run_id: str, step: int) -> Generator[Progress, None, Run]:
        """The run as it was after `step` steps: weights, optimizer, pictures, randomness."""
        run = self.run(run_id)
        session = yield from generate(self.model, back(run.session, step))
        scores = {name: known[: step + 1] for name, known in run.scores.items()}
        return self._keep(replace(run, session=session, scores=scores))

    def reward(self, wish: Wish) -> Reward:
        """The reward of an automatic wish; RewardError for an unknown colour or label."""
        sign = 1 if wish.more else -1
        if wish.kind == "color":
            return ColorReward(wish.color, sign)
        return SegmentReward(self.segmenter, wish.labels, sign)

    def heat(self, run: Run, wish: Wish) -> Image.Image:
        """What an automatic wish says of the run's picture, laid over it."""
        return heat_map(run.picture, self.reward(wish)(run.picture[None])[0])

    def curve(self, run: Run) -> Any:
        """The figure of the last wish's reward by step, None before the first one."""
        if len(run.latest) < 2:
            return None
        lines = {
            "this seed": ([s.here for s in run.latest], [0.0] * len(run.latest)),
            "held-out seeds": (
                [s.held_out for s in run.latest],
                [s.held_out_std for s in run.latest],
            ),
        }
        return reward_curve(lines, f"Reward: {run.wish.name if run.wish else ''}")

    def run(self, run_id: str) -> Run:
        """The run of this name; RunError when there is none (any more)."""
        with self._lock:
            if run_id in self._recent:
                self._recent.move_to_end(run_id)
                return self._recent[run_id]
        folder = self._folder(run_id)
        if not (folder / "run.json").exists():
            raise RunError("this run is no longer kept here; start a new one, or upload it.")
        return self._remember(self._read(run_id, folder))

    def forget(self, run_id: str) -> None:
        """Free the memory of a run; it stays on disk."""
        with self._lock:
            self._recent.pop(run_id, None)

    def lora_folder(self, run_id: str, **card: Any) -> Path:
        """The run's LoRA in a folder that stands by itself; `card` as `write_folder` takes it."""
        run, folder = self.run(run_id), self._folder(run_id) / "lora"
        reward = run.wish.name if run.wish else ""
        return write_folder(run.session, folder, reward=reward, curve=self.curve(run), **card)

    def lora_file(self, run_id: str) -> Path:
        """The run's LoRA as a file that any diffusers pipeline loads."""
        return self.lora_folder(run_id) / FILE_NAME

    def push(
        self, run_id: str, repo: str, *, token: str | None, private: bool, with_base: bool
    ) -> Generator[Progress, None, str]:
        """Push that folder to the Hub, and return its address there.

        with_base: and this studio's own model beside it, where that is a folder; no other ever.
        """
        folder = self.lora_folder(run_id, repo=repo, with_base=with_base)
        base = self.model.name if with_base and not base_of(self.model.name).hub else None
        return (yield from push(folder, repo, token=token, private=private, base=base))

    def archive(self, run_id: str) -> Path:
        """The whole run as a .zip that `admit` takes in again."""
        self.lora_folder(run_id)
        folder = self._folder(run_id)
        archive = folder / "pxpo-run.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in sorted(folder.rglob("*")):
                name = file.relative_to(folder).as_posix()
                if file.is_file() and (FILES.fullmatch(name) or file.parent == folder / "lora"):
                    packed.write(file, name)
        return archive

    def admit(self, archive: Path) -> Run:
        """Take in a run that `archive` wrote, under a new name. RunError for anything else."""
        run_id = secrets.token_urlsafe(12)
        folder = self._folder(run_id)
        try:
            with zipfile.ZipFile(archive) as packed:
                wanted = [i for i in packed.infolist() if FILES.fullmatch(i.filename)]
                size = sum(info.file_size for info in wanted)
                if size > self.most_bytes / 2:
                    raise RunError(
                        f"the run is {size / 1e9:.1f} GB; the most that is taken in here is "
                        f"{self.most_bytes / 2e9:.1f} GB."
                    )
                for info in wanted:
                    packed.extract(info, folder)
            record = json.loads((folder / "run.json").read_text())
            named = [*record["steps"], *filter(None, [record["trajectory"]])]
            if not all(FILES.fullmatch(name) for name in named):
                raise RunError("its run.json names files outside of the run.")
            run = self._read(run_id, folder)
            for snapshot in run.session.history:
                check_fits(self.model, snapshot.lora)
            return self._remember(run)
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise RunError(
                f"{Path(archive).name!r} is not a run that was downloaded here ({error})."
            ) from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _settings(self, session: Settings, kind: str, changes: dict[str, Any]) -> Settings:
        """Those of `kind`'s experiment, for this run's prompt, seed and way of sampling."""
        fixed = ("prompt", "seed", "steps", "guidance_scale", "eta", "rank", "shown")
        preset = {name: getattr(session, name) for name in fixed}
        preset |= PAINTED if kind == "paint" else {}
        return settings_for(kind, **{**preset, **changes})

    def _folder(self, run_id: str) -> Path:
        if not re.fullmatch(r"[\w-]{16}", run_id):
            raise RunError(f"{run_id!r} is not the name of a run.")
        return self.folder / run_id

    def _keep(self, run: Run) -> Run:
        folder = self._folder(run.id)
        save(run.session, folder)
        tensors = {"totals": run.opinion.totals, "counts": run.opinion.counts}
        tensors |= {} if run.paint is None else {"paint": run.paint}
        scores = {name: [asdict(score) for score in known] for name, known in run.scores.items()}
        page = {"scores": scores, "wish": run.wish and asdict(run.wish)}
        write_whole(folder / PAGE, safetensors(tensors, {"page": json.dumps(page)}))
        self._make_room(run.id)
        return self._remember(run)

    def _remember(self, run: Run) -> Run:
        with self._lock:
            self._recent[run.id] = run
            self._recent.move_to_end(run.id)
            while len(self._recent) > IN_MEMORY:
                self._recent.popitem(last=False)
        return run

    def _make_room(self, run_id: str) -> None:
        """Delete the runs left alone longest until all fit, but never this one."""
        sizes = {
            folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            for folder in self.folder.iterdir()
        }
        total = sum(sizes.values())
        for folder in sorted(sizes, key=lambda folder: folder.stat().st_mtime):
            if total <= self.most_bytes:
                return
            if folder.name != run_id:
                self.forget(folder.name)
                shutil.rmtree(folder, ignore_errors=True)
                total -= sizes[folder]

    def _read(self, run_id: str, folder: Path) -> Run:
        session = resume(folder)
        named, here = _placeless(session.model_name), _placeless(self.model.name)
        if named != here:
            raise RunError(
                f"this run is of the model {named!r}, and here is {here!r}; open it where its "
                "model runs."
            )
        session = replace(session, model_name=self.model.name)  # never a folder that it names
        with safe_open(folder / PAGE, "pt") as file:
            page = json.loads(file.metadata()["page"])
        tensors = load_file(folder / PAGE)
        scores = {
            name: tuple(Score(**score) for score in known[: session.step + 1])
            for name, known in page["scores"].items()
        }
        opinion = Opinion(tensors["totals"], tensors["counts"])
        wish = page["wish"] and Wish(**page["wish"])
        return Run(run_id, session, opinion, scores, wish, tensors.get("paint"))


def _placeless(model_name: str) -> str:
    """A model's name; of a folder's path the last part, as the rest differs between machines."""
    path = PureWindowsPath(model_name)  # which knows both kinds of slashes
    return path.name if path.root else model_name


def _score(reward: Reward, shown: Tensor) -> Score:
    """shown: (K, H, W, 3) uint8, this seed's image first."""
    here, *others = reward(shown.permute(0, 3, 1, 2) / 255).mean((1, 2))
    held_out = torch.stack(others)
    return Score(here.item(), held_out.mean().item(), held_out.std(correction=0).item())
