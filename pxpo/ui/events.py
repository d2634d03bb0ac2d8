"""What the page's buttons do: generators that yield what to show, by the name of its place."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.utils import get_space
from PIL import Image

from ..card import base_of
from ..errors import PxpoError
from ..lora import Lora
from ..lora_files import load_lora
from ..measures import changed_outside
from ..plots import strip, to_picture
from ..progress import Progress, finish
from ..rewards import RewardSpec
from ..rewards.wish import MET
from ..run import ALIKE, SHOWING, Run
from ..studio import Studio
from .parts import (
    chip,
    discarded,
    errors_as_messages,
    is_tiny_world,
    large,
    on_canvas,
    refusal,
    served,
    throttled,
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Example:
    """A picture to begin with, and the kind of reward that suits it."""

    reward: str
    prompt: str
    seed: int


EXAMPLES = [
    Example("paint", "nature landscape", 12),
    Example("paint", "nature landscape with a lake and trees at sunset", 3),
    Example("color", "red taxi in traffic", 1),
    Example("segment", "portrait of a man on the beach", 7),
]
"""A page without a run of its own begins with the first."""

SLIDERS = {"strength": (0.005, 0.1), "hold": (0.0, 10.0)}
"""The least and the most that they can be set to."""

Shown = dict[str, Any]
"""What to show: "run" (its name), "at" (`place`), "sure", "slider", "others", "history", "curve",
"chip", "status", "fields" (`fields`) and whether there is a step to go to ("back_button",
"forward_button", "reset_button"), or some of them."""

Place = tuple[str, int, int, int, str]
"""Where a page stands: the name of its run, the numbers of updates, of later ones and of painted
pictures, and what tells the last update from another with the same number."""


def place(run: Run) -> Place:
    return run.id, run.count, len(run.later), len(run.painted), run.lora.digest


class Events:
    """What a page on this studio does.

    own_token: whether whoever opens the page may push with this machine's token.
    """

    def __init__(self, studio: Studio, own_token: bool) -> None:
        self.studio, self.own_token = studio, own_token
        # A model of the operator's own is not every visitor's to push.
        self.gives_base = not base_of(studio.model.name).hub and (
            own_token or is_tiny_world(studio.model)
        )

    # A run: begun, taught, taken back, found again.

    def open(self, run_id: str) -> Iterator[Shown]:
        """The run that this browser was at; else the opening one, or a new picture."""
        run, gone = None, ""
        try:
            run = self.studio.run(run_id) if run_id else None
        except PxpoError as error:
            gone = f"Of your last visit: {error.for_visitors()} "
        if run:
            yield self.found_again(run, "Here is your run again")
        elif opening := self.studio.opening:
            yield {
                **self.view(opening, f"{gone}Painted once, then {opening.count} steps. Press Step "
                "to go on, or paint what you want."), "fields": fields(opening),
            }  # fmt: skip
        else:
            yield from self.start(EXAMPLES[0].prompt, EXAMPLES[0].seed)

    def start(
        self, prompt: str, seed: int, steps: float | None = None,
        guidance_scale: float | None = None, rank: float | None = None, before: str = "", *,
        lora: Lora | None = None,
    ) -> Iterator[Shown]:  # fmt: skip
        """A new run; what is None has its default. before: the run that Back leads to."""
        sampling = {"steps": steps, "guidance_scale": guidance_scale, "rank": rank}
        settings = {name: value for name, value in sampling.items() if value is not None}
        work = self.studio.start(prompt=prompt, seed=seed, lora=lora, **settings)
        run, _ = yield from self.progress(work, "New picture")
        self.studio.follow(before, run.id)
        yield self.view(run, self.invitation(prompt))

    def learn(
        self, count: int, run_id: str, sure: Place | None, reward: RewardSpec,
        paint: Image.Image | None, **settings: float | None,
    ) -> Iterator[Shown]:  # fmt: skip
        """`count` updates, or fewer where the wish is met.

        sure: where it was asked whether later updates may go, and Step was pressed again.
        """
        run = self.studio.run(run_id)
        if run.later and sure != place(run):
            first, last = run.count + 1, run.count + len(run.later)
            which = f"Step {last} lies" if first == last else f"Steps {first} to {last} lie"
            yield {
                "sure": place(run),
                "status": f"{which} ahead (press Forward). To go on from here without, press Step "
                "once more.",
            }
            return
        before = served(large(run.updates[0].shown[0]))
        for number in range(count):
            if gone_on := self.overtaken(place(run), run.id):
                yield gone_on
                return
            strokes = paint if reward.by_hand and number == 0 else None  # then they are the wish
            work = self.studio.step(run.id, reward, strokes, count=count, **settings)
            run, seconds = yield from self.progress(work, f"Step {run.count + 1}", before)
            yield self.view(run, self.summary(run, seconds))
            if run.met:
                return

    def wishes(self, run_id: str) -> bool:
        """Whether anything was painted on this run before."""
        with contextlib.suppress(PxpoError):
            return bool(self.studio.run(run_id).painted)
        return False

    def forget_wish(self, run_id: str) -> Iterator[Shown]:
        """The run without what was painted."""
        yield self.view(self.studio.forget_wish(run_id), "Forgotten: paint what you want now.")

    def go_to(self, run_id: str, update: int) -> Iterator[Shown]:
        """The run as it was after that many updates; none is lost."""
        run = finish(self.studio.go_to(run_id, update))
        yield self.view(run, f"At step {run.count}, weights and all.")

    def back(self, run_id: str) -> Iterator[Shown]:
        """A step back; from a run's beginning to the run before it."""
        run = self.studio.run(run_id)
        if run.count:
            yield from self.go_to(run_id, run.count - 1)
        elif before := self.studio.neighbour(run_id, "before"):
            yield self.found_again(self.studio.run(before), "Your run before this one")
        else:
            raise refusal("This is the beginning; there is no step before it.")

    def forward(self, run_id: str) -> Iterator[Shown]:
        """A step forward; from a run's newest one to the run that was begun after it."""
        run = self.studio.run(run_id)
        if run.later:
            yield from self.go_to(run_id, run.count + 1)
        elif after := self.studio.neighbour(run_id, "after"):
            yield self.found_again(self.studio.run(after), "The run that you began after it")
        else:
            raise refusal("This is the newest step; press Step to go on.")

    def found_again(self, run: Run, which: str) -> Shown:
        """Another run of the same person's, where they left it."""
        status = " · ".join([f"{which}, at step {run.count}", *self.result(run)])
        return {**self.view(run, status), "fields": fields(run)}

    def reset(self, run_id: str) -> Iterator[Shown]:
        yield from self.go_to(run_id, 0)

    def admit(self, file: str, *new_run: Any) -> Iterator[Shown]:
        """Go on with a downloaded run, or begin one from a LoRA; new_run: as `start` takes it. The
        file goes: it may have gigabytes, which nobody counts where uploads lie."""
        with discarded(Path(file)) as upload:
            if upload.suffix == ".zip":
                yield from self.progress(self.studio.thread.after_own(), "Your run")
                run = self.studio.admit(upload)
                self.studio.follow(new_run[-1], run.id)
                yield {**self.view(run, f"Your run, at step {run.count}."), "fields": fields(run)}
            else:
                yield from self.start(*new_run, lora=load_lora(upload))

    def stopped(self, run_id: str) -> Shown:
        """Where the run stands after work that Stop cut off."""
        with contextlib.suppress(PxpoError):
            run = self.studio.run(run_id)
            return self.view(run, f"Stopped at step {run.count}; what was learnt is kept.")
        return {"status": "Stopped."}

    def overtaken(self, at: Place | None, run_id: str) -> Shown | None:
        """The run as it is, where it has changed since this page has shown it; else None."""
        run = self.studio.run(run_id)
        if at is None or place(run) == tuple(at):
            return None
        return self.view(
            run, f"This run has gone on in another tab: here it is, at step {run.count}."
        )

    # What the page shows of it.

    def view(self, run: Run, status: str) -> Shown:
        updates = run.updates + run.later
        shown = [update.shown[0] for update in updates]
        captions = [self.caption(run, number) for number in range(len(updates))]
        neighbour = self.studio.neighbour
        return {
            "run": run.id,
            "at": place(run),
            "sure": None,
            "slider": (served(large(shown[0])), served(large(shown[run.count]))),
            "others": self.others(run),
            "history": [(served(to_picture(s)), c) for s, c in zip(shown, captions, strict=True)],
            "curve": self.studio.curve(run),
            "chip": chip(self.studio.model, self.studio.pace.seconds(run.settings)),
            "status": status,
            "back_button": gr.update(interactive=bool(run.count or neighbour(run.id, "before"))),
            "forward_button": gr.update(interactive=bool(run.later or neighbour(run.id, "after"))),
            "reset_button": gr.update(interactive=run.count > 0),
        }

    @staticmethod
    def caption(run: Run, number: int) -> str:
        """Of a step's thumbnail: its number, where the run stands, and the score."""
        name = str(number) if number else "before"
        scores = (run.updates + run.later)[number].scores
        found = scores.get(run.reward.name) if number and run.reward else None
        score = f" · {round(found.here, 2) + 0.0:+.2f}" if found else ""  # no -0.00
        return ("▸ " if number == run.count else "") + name + score

    @staticmethod
    def others(run: Run) -> str | None:
        """The file of the held-out pictures, each before any update and now; None without any."""
        before, now = (run.updates[i].shown[1 : run.settings.shown] for i in (0, -1))
        if not len(now):
            return None
        row = [to_picture(image) for pair in zip(before, now, strict=True) for image in pair]
        return served(strip([row], ["before", "now"] * len(now), side=192, clear=True))

    def heat_map(self, run_id: str, reward: RewardSpec) -> str | None:
        """The file of the reward on the run's picture; None where there is none."""
        with contextlib.suppress(PxpoError):  # Step says what is missing
            picture = self.studio.heat(self.studio.run(run_id), reward)
            return served(picture.resize(on_canvas(*picture.size)))
        return None

    def progress(
        self, work: Generator[Progress, None, Result], head: str, before: str = ""
    ) -> Generator[Shown, None, tuple[Result, float]]:
        """Show where `work` stands, and the picture as it is denoised beside the one `before`.

        Returns the work's result, and the seconds that it took from its turn on.
        """
        began = time.monotonic()

        def show(progress: Progress) -> Shown:
            nonlocal began
            if progress.ahead:
                began = time.monotonic()
            shown: Shown = {"status": f"{head}: {progress}"}
            if before and progress.phase == SHOWING and progress.latents is not None:
                preview = self.studio.model.decode(progress.latents[:1])[0]
                shown["slider"] = (before, served(large(preview)))
            return shown

        result = yield from throttled(work, show)
        return result, time.monotonic() - began

    def invitation(self, prompt: str) -> str:
        parts = ["Paint what you want more of (green) or less of (red), then press Step."]
        if unknown := self.studio.model.unknown_words(prompt):
            parts.append(f"The model never learnt the word {', '.join(unknown)}.")
        if unread := self.studio.model.unread(prompt):
            start = unread if len(unread) <= 40 else f"{unread[:40].rstrip()}…"
            parts.append(f"The prompt is too long; this is not read: {start}")
        return " ".join(parts)

    def summary(self, run: Run, seconds: float) -> str:
        """An update in one line."""
        return " · ".join([f"Step {run.count}", *self.result(run), f"{seconds:.1f} s"])

    @staticmethod
    def result(run: Run) -> list[str]:
        """What the last update did, in some words; none where there is none, or no score of it."""
        if len(run.latest) < 2:
            return []
        last, now = run.latest[-2:]
        metrics = run.updates[-1].metrics
        by_hand = run.reward is not None and run.reward.by_hand
        parts = [
            f"{'wish' if by_hand else 'reward'} {last.here:+.3f} → {now.here:+.3f}, "
            + ("better" if now.here > last.here else "not better"),
        ]
        if last.held_out is not None and now.held_out is not None:
            parts.append(f"other seeds {last.held_out:+.3f} → {now.held_out:+.3f}")
        if by_hand:
            parts.append(f"{changed_outside(run):.0%} changed outside the paint since the start")
        if "moved" in metrics:
            parts.append(f"moved {metrics['moved']:.1%}, {metrics['from_base']:.0%} in all")
        if not run.updates[-1].learnt:
            parts.append(ALIKE)
        if run.met:
            parts.append(MET)
        return parts

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
        with errors_as_messages():
            with_base = with_base and self.gives_base
            work = self.studio.push(run_id, repo, token=token, private=private, with_base=with_base)
            link = yield from throttled(work, str)
            yield f"Pushed: [{repo}]({link})"


def fields(run: Run) -> dict[str, Any]:
    """What the page's fields hold for a run, by name; "reward" is its spec, if it has one. A run of
    the command line may lie beyond the sliders' ends, where Gradio would refuse it at each step."""
    names = ("prompt", "seed", "steps", "guidance_scale", "rank", "images")
    within = {
        name: min(max(getattr(run.settings, name), least), most)
        for name, (least, most) in SLIDERS.items()
    }
    return {
        **{name: getattr(run.settings, name) for name in names}, **within, "reward": run.reward
    }  # fmt: skip
