"""What the page's buttons do: generators that yield what to show, by the name of its place."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_space
from PIL import Image

from ..errors import PxpoError
from ..lora import Lora
from ..lora_files import load_lora
from ..plots import to_picture
from ..progress import Progress
from ..rewards import RewardSpec
from ..rewards.wish import MET
from ..run import ALIKE, SHOWING, Run
from ..studio import Studio
from .parts import errors_as_messages, large, on_canvas, refusal, served, throttled

EXAMPLES = [
    ("nature landscape", 12),
    ("nature landscape with a lake and trees at sunset", 3),
    ("red taxi in traffic", 1),
    ("portrait of a man on the beach", 7),
]
"""Prompts and their seeds; the page opens on the first."""

Shown = dict[str, Any]
"""What to show: "run" (its name), "slider", "history", "curve" and "status", or some of them."""


class Events:
    """What a page on this studio does.

    has_example: whether the page shows an example while there is no run yet.
    own_token: whether whoever opens the page may push with this machine's token.
    """

    def __init__(self, studio: Studio, has_example: bool, own_token: bool) -> None:
        self.studio, self.has_example, self.own_token = studio, has_example, own_token

    # A run: begun, taught, taken back, found again.

    def open(self, run_id: str) -> Iterator[Shown]:
        """The run that this browser was at; else the example, or a new picture."""
        try:
            run = self.studio.run(run_id) if run_id else None
        except PxpoError:
            run = None
        if run:
            yield self.view(run, f"Here is your run again, at step {run.count}.")
        elif self.has_example:
            yield {"run": "", "status": "An example: press Step, or paint something else."}
        else:
            yield from self.start(*EXAMPLES[0])

    def start(
        self, prompt: str, seed: int, steps: float | None = None,
        guidance_scale: float | None = None, rank: float | None = None, *,
        lora: Lora | None = None,
    ) -> Iterator[Shown]:  # fmt: skip
        """A new run; what is None has its default."""
        sampling = {"steps": steps, "guidance_scale": guidance_scale, "rank": rank}
        settings = {name: value for name, value in sampling.items() if value is not None}
        if lora:
            settings["rank"] = lora.rank
        work = self.studio.start(prompt=prompt, seed=seed, lora=lora, **settings)
        run = yield from self.progress(work, "New picture")
        yield self.view(run, self.invitation(prompt))

    def learn(
        self, count: int, run_id: str, reward: RewardSpec, paint: Image.Image | None,
        strength: float, images: int,
    ) -> Iterator[Shown]:  # fmt: skip
        """`count` updates, or fewer where the wish is met; a run is begun first where the page
        still shows the example. images: 0 is the model's own number."""
        if not run_id:
            for shown in self.start(*EXAMPLES[0]):
                run_id = shown.get("run", "")
                yield {name: shown[name] for name in ("status", "run") if name in shown}
        before = served(large(self.studio.run(run_id).updates[0].shown[0]))
        for number in range(count):
            began = time.monotonic()
            head = f"Step {self.studio.run(run_id).count + 1}"
            strokes = paint if reward.by_hand and number == 0 else None  # then they are the wish
            work = self.studio.step(
                run_id, reward, strokes, count=count, strength=strength, images=images or None
            )
            run = yield from self.progress(work, head, before)
            yield self.view(run, self.summary(run, time.monotonic() - began))
            if run.met:
                return

    def wishes(self, run_id: str) -> bool:
        """Whether anything was painted on this run before."""
        with contextlib.suppress(PxpoError):
            return bool(run_id) and bool(self.studio.run(run_id).painted)
        return False

    def forget_wish(self, run_id: str) -> Iterator[Shown]:
        """The run without what was painted."""
        if not run_id:
            raise refusal("This is the example; press Step first.")
        yield self.view(self.studio.forget_wish(run_id), "Forgotten: paint what you want now.")

    def back(self, run_id: str, update: int | None = None) -> Iterator[Shown]:
        """The run as it was after that many updates; None is one before the last."""
        run = self.studio.run(run_id) if run_id else None
        if run is None or (update is None and not run.count):
            raise refusal("This is the beginning; there is no step before it.")
        update = run.count - 1 if update is None else update
        run = yield from self.progress(self.studio.back(run_id, update), f"Back to step {update}")
        yield self.view(run, f"Back at step {run.count}, weights and all.")

    def admit(self, file: str, *new_run: Any) -> Iterator[Shown]:
        """Go on with a downloaded run, or begin one from a LoRA; new_run: as `start` takes it."""
        if Path(file).suffix == ".zip":
            run = self.studio.admit(Path(file))
            yield self.view(run, f"Your run, at step {run.count}.")
        else:
            yield from self.start(*new_run, lora=load_lora(Path(file)))

    def stopped(self, run_id: str) -> Shown:
        """Where the run stands after work that Stop cut off."""
        if not run_id:
            return {"status": "Stopped."}
        run = self.studio.run(run_id)
        return self.view(run, f"Stopped at step {run.count}; what was learnt is kept.")

    # What the page shows of it.

    def view(self, run: Run, status: str) -> Shown:
        captions = ["before"]
        for number in range(1, run.count + 1):
            score = f" · {run.latest[number].here:+.2f}" if number < len(run.latest) else ""
            captions.append(f"{number}{score}")
        shown = [update.shown[0] for update in run.updates]
        return {
            "run": run.id,
            "slider": (served(large(shown[0])), served(large(shown[-1]))),
            "history": [(served(to_picture(s)), c) for s, c in zip(shown, captions, strict=True)],
            "curve": self.studio.curve(run),
            "status": status,
        }

    def heat_map(self, run_id: str, reward: RewardSpec) -> str | None:
        """The file of the reward on the run's picture; None where there is none."""
        with contextlib.suppress(PxpoError):  # Step says what is missing
            picture = self.studio.heat(self.studio.run(run_id), reward)
            return served(picture.resize(on_canvas(*picture.size)))
        return None

    def progress(
        self, work: Generator[Progress, None, Run], head: str, before: str = ""
    ) -> Generator[Shown, None, Run]:
        """Show where `work` stands, and the picture as it is denoised beside the one `before`."""

        def show(progress: Progress) -> Shown:
            shown: Shown = {"status": f"{head}: {progress}"}
            if before and progress.phase == SHOWING and progress.latents is not None:
                preview = self.studio.model.decode(progress.latents[:1])[0]
                shown["slider"] = (before, served(large(preview)))
            return shown

        return (yield from throttled(work, show))

    def invitation(self, prompt: str) -> str:
        unknown = self.studio.model.unknown_words(prompt)
        note = f" The model never learnt the word {', '.join(unknown)}." if unknown else ""
        return "Paint what you want more of (green) or less of (red), then press Step." + note

    @staticmethod
    def summary(run: Run, seconds: float) -> str:
        """An update in one line."""
        last, now = run.latest[-2:]
        metrics = run.updates[-1].metrics
        parts = [
            f"Step {run.count}",
            f"reward {last.here:+.3f} → {now.here:+.3f}",
            f"moved {metrics['moved']:.1%}, {metrics['from_base']:.0%} in all",
            f"{seconds:.1f} s",
        ]
        if not run.updates[-1].learnt:
            parts.append(ALIKE)
        if run.met:
            parts.append(MET)
        return " · ".join(parts)

    # What leaves the page.

    def save(self, make: Callable[[str], Path], run_id: str) -> str:
        """The file that `make` makes of the run."""
        if not run_id:
            raise refusal("This is the example; press Step first.")
        with errors_as_messages():
            return str(make(run_id))

    def push(
        self, run_id: str, repo: str, private: bool, with_base: bool, typed: str,
        login: gr.OAuthToken | None,
    ) -> Iterator[str]:  # fmt: skip
        """Push with a visitor's token, or with this machine's own if they may; says how far it is.

        typed: a token, or what is left of an empty field.
        """
        repo, token = repo.strip(), login.token if login else (typed or "").strip() or None
        if token is None and not self.own_token:
            raise refusal(
                ("Sign in" if get_space() else "Type a token of yours") + " first; Download works "
                "without. The server's own token is not for visitors."
            )
        if not run_id:
            raise refusal("This is the example; press Step first.")
        with errors_as_messages():
            work = self.studio.push(run_id, repo, token=token, private=private, with_base=with_base)
            link = yield from throttled(work, str)
            yield f"Pushed: [{repo}]({link})"
