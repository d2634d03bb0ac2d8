"""The page's verbs for gradio_client, and as MCP tools.

Gradio reads their docstrings and types, so types are no strings here (no `annotations` from
`__future__`). `FileData` is what it calls a file that was uploaded, or is to be downloaded.
"""

import functools
import inspect
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import gradio as gr
import pydantic
from gradio import FileData
from PIL import Image

from ..checks import fault
from ..errors import RewardError, SettingError
from ..progress import Progress
from ..rewards import REWARDS, RewardSpec, open_picture
from ..run import Run
from ..settings import Settings
from ..studio import MOST_UPDATES, Studio
from .events import EXAMPLES
from .parts import errors_as_messages, large, offered, served, throttled
from .rewards import spec_of

Answer = tuple[str, dict, FileData]
Work = Generator[Progress, None, Run]


def uploaded(file: dict | None) -> Image.Image | None:
    """An uploaded picture, in its own mode; what was not uploaded is refused."""
    if file is None:
        return None
    try:
        path = FileData.model_validate(file, context={"validate_meta": True}).path
    except (ValueError, OSError) as error:
        raise RewardError("paint must be an uploaded picture.") from error
    return open_picture(Path(path))


if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[tuple(name for name, kind in REWARDS.items() if kind.public)]
Want = Literal["less", "more"]
Picture = Annotated[FileData, pydantic.PlainValidator(uploaded)]
Count = Annotated[int, pydantic.Field(ge=1, le=MOST_UPDATES)]


def asked(
    kind: str, color: str, labels: str, want: str, options: dict[str, Any] | None
) -> RewardSpec:
    """The reward of this kind; of the first three it takes those that it has as options."""
    common = {"color": color, "labels": labels.split(","), "more": want}
    has = () if REWARDS[kind].by_hand else [option.name for option in REWARDS[kind].options]
    return spec_of(kind, {**{k: v for k, v in common.items() if k in has}, **(options or {})})


def add(studio: Studio) -> None:
    """Add the verbs to the Blocks that are being built."""

    def generate(
        prompt: str = EXAMPLES[0].prompt, seed: int = Settings.seed,
        steps: int = studio.model.defaults["steps"],
        guidance_scale: float = studio.model.defaults["guidance_scale"],
        rank: int = Settings.rank,
    ) -> Work:  # fmt: skip
        """Begin a run, and sample its picture, the one to paint on.

        Args:
            prompt: what to paint
            seed: the run's random seed
            steps: DDIM steps per picture
            guidance_scale: classifier-free guidance, 1 is none
            rank: the LoRA's rank

        Returns:
            the run's name for the other tools, a report, and the picture to paint on
        """
        return studio.start(
            prompt=prompt, seed=seed, steps=steps, guidance_scale=guidance_scale, rank=rank
        )

    def step(
        run_id: str, reward: Kind = "paint", paint: Picture = None, color: str = "blue",
        labels: str = "Hair", want: Want = "less", options: dict | None = None,
        strength: float = Settings.strength, images: int | None = None,
    ) -> Work:  # fmt: skip
        """Judge pictures, update the LoRA once, and sample the next picture.

        Args:
            run_id: the run's name, from generate
            reward: "paint", "color", "segment", or another that the page has a tab for
            paint: for "paint": a picture, green where more is wanted and red where less; it adds
                to what was painted on this run before, and may be left out then
            color: for "color": red, green, blue, or any CSS colour
            labels: for "segment": what to find, separated by commas
            want: for all but "paint": "less" of it, or "more"
            options: others of the reward's options, by name
            strength: how far a step moves the model, relative to what it says
            images: pictures judged per step; the model's default when left out

        Returns:
            the run's name, a report with the scores of all steps, and the next picture to paint on
        """
        spec = asked(reward, color, labels, want, options)
        return studio.step(run_id, spec, paint, strength=strength, images=images)

    def run(
        run_id: str, count: Count = 5, reward: Kind = "paint", paint: Picture = None,
        color: str = "blue", labels: str = "Hair", want: Want = "less",
        options: dict | None = None, strength: float = Settings.strength,
        images: int | None = None,
    ) -> Work:  # fmt: skip
        """Several steps with the same reward, as `step` does one; fewer where a wish is met.

        Args:
            run_id: the run's name, from generate
            count: how many steps
            reward: "paint", "color", "segment", or another that the page has a tab for
            paint: for "paint": a picture, green where more is wanted and red where less; it adds
                to what was painted on this run before, and may be left out then
            color: for "color": red, green, blue, or any CSS colour
            labels: for "segment": what to find, separated by commas
            want: for all but "paint": "less" of it, or "more"
            options: others of the reward's options, by name
            strength: how far a step moves the model, relative to what it says
            images: pictures judged per step; the model's default when left out

        Returns:
            the run's name, a report with the scores of all steps, and the next picture to paint on
        """
        spec = asked(reward, color, labels, want, options)
        for _ in range(count):
            done = yield from studio.step(
                run_id, spec, paint, count=count, strength=strength, images=images
            )
            if done.met:
                break
            run_id, paint = done.id, None  # the wish has it from the first step on
        return done

    def back(run_id: str, step: int = 0) -> Work:
        """Go back to an earlier step: weights, pictures and randomness.

        Args:
            run_id: the run's name, from generate
            step: how many steps the run shall have behind it

        Returns:
            the run's name, a report with the scores of the steps left, and the picture to paint on
        """
        return studio.go_to(run_id, step)

    def forget(run_id: str) -> Work:
        """Forget all that was painted on this run; what it learnt stays.

        Args:
            run_id: the run's name, from generate

        Returns:
            the run's name, a report with the scores of all steps, and the picture to paint on
        """
        yield from ()
        return studio.forget_wish(run_id)

    def export(run_id: str) -> tuple[FileData, FileData]:
        """The LoRA, and the whole run.

        Args:
            run_id: the run's name, from generate

        Returns:
            pytorch_lora_weights.safetensors for any diffusers pipeline, and a .zip of the run
        """
        lora, archive = offered(studio.lora_file(run_id)), offered(studio.archive(run_id))
        return FileData(path=lora), FileData(path=archive)

    for verb in (
        answered(generate),
        answered(step),
        answered(run),
        answered(back),
        answered(forget),
        checked(export),
    ):
        gr.api(studio.thread.wrap(verb), concurrency_limit=None)  # the studio gives turns


def answered(verb: Callable[..., Work]) -> Callable[..., Iterator[Any]]:
    """The verb as an endpoint that answers with its run."""
    work = checked(verb)

    @functools.wraps(verb)
    def answer(*values: Any) -> Iterator[Any]:
        with errors_as_messages():
            # Empty answers now and then: between two of them a client can cancel the work.
            run = yield from throttled(work(*values), lambda _: (None, None, None))
        report = {"step": run.count, "reward": run.reward and run.reward.name,
                  "scores": [vars(score) for score in run.latest], "met": run.met,
                  "learnt": run.updates[-1].learnt}  # fmt: skip
        yield run.id, report, FileData(path=served(large(run.picture)))

    answer.__signature__ = inspect.signature(verb).replace(  # type: ignore[attr-defined]
        return_annotation=Answer
    )
    return answer


def checked(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb with arguments that are what its types say; others are refused by name."""
    names, valid = inspect.signature(verb).parameters, pydantic.validate_call(verb)

    @functools.wraps(verb)
    def call(*values: Any) -> Any:
        with errors_as_messages():
            try:
                return valid(**dict(zip(names, values, strict=True)))
            except pydantic.ValidationError as error:
                raise SettingError(f"{fault(error).rstrip('.')}.") from error

    return call
