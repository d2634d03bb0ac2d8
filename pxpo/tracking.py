"""Where a run's numbers and pictures go as it learns: its folder, and trackers such as TensorBoard.

metrics.jsonl      a line of numbers for each update
heat/0003.jpg      the images of an update under their reward
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from .errors import SettingError
from .plots import heat_map, strip
from .run import Run, training_prompts
from .store import write_whole

PACKAGES = {"comet_ml": "comet-ml"}
"""Where pip's name of a tracker is not its own."""

HEATED = 8
"""The most images of an update that its heat-map shows."""

NO_PICTURES = ("aim", "clearml")
"""Trackers that take pictures in a way of their own."""


def check_trackers(names: Sequence[str]) -> None:
    """SettingError for a tracker that accelerate does not know, or whose package is missing."""
    there = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise SettingError(
                f"log_with is {name!r}; it must be one of {', '.join(LOGGER_TYPE_TO_CLASS)}."
            )
        if name in LoggerType.list() and name not in there:
            raise SettingError(
                f"log_with is {name!r}, whose package is missing: "
                f"pip install {PACKAGES.get(name, name)}"
            )


@contextmanager
def tracked(
    folder: Path, names: Sequence[str], run: Run
) -> Iterator[Callable[[Run, Image.Image | None], None]]:
    """A function to be called after each update with the run and its `heat_strip`."""
    trackers = [_started(name, folder) for name in dict.fromkeys(names)]
    settings = {**run.settings.as_dict(), "reward": run.reward and run.reward.name}
    for tracker in trackers:
        tracker.store_init_configuration({**settings, "model": run.model_name})

    def write(run: Run, heat: Image.Image | None = None) -> None:
        write_metrics(run, folder)
        pictures = {"shown": run.updates[-1].shown.numpy()}  # (K, H, W, 3)
        if heat:
            (folder / "heat").mkdir(exist_ok=True)
            heat.save(folder / "heat" / f"{run.count:04d}.jpg")
            pictures["heat"] = np.asarray(heat)[None]
        for tracker in trackers:
            tracker.log(flat(numbers(run, run.count)), step=run.count)
            if hasattr(tracker, "log_images") and tracker.name not in NO_PICTURES:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(pictures, step=run.count, **layout)

    try:
        yield write
    finally:
        for tracker in trackers:
            tracker.finish()


def _started(name: str, folder: Path) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    try:
        tracker = kind(name, folder) if kind.requires_logging_directory else kind("pxpo")
        tracker.start()
    except Exception as error:
        words = " ".join(str(error).split())
        raise SettingError(f"{name} does not start: {type(error).__name__}: {words}") from error
    return tracker


def write_metrics(run: Run, folder: Path) -> None:
    lines = [json.dumps(numbers(run, number)) for number in range(len(run.updates))]
    write_whole(folder / "metrics.jsonl", ("\n".join(lines) + "\n").encode())


def numbers(run: Run, number: int) -> dict[str, Any]:
    """All that is known of an update in numbers; image_rewards: the mean of each image's map."""
    update = run.updates[number]
    reward = update.reward and update.reward.name
    known: dict[str, Any] = {"update": number, "reward_name": reward, **update.metrics}
    known["image_rewards"] = update.latent_reward.mean((1, 2)).tolist()
    if number and len(update.settings.prompts) > 1:
        known["prompts"] = training_prompts(update.settings, number - 1)
    return {**known, "scores": update.as_dict()["scores"]}


def flat(values: Mapping[str, Any], head: str = "") -> dict[str, float]:
    """The numbers in nested values, by their path: "scores/less blue/here", "image_rewards/0"."""
    found = dict[str, float]()
    for name, value in values.items():
        if isinstance(value, list):
            value = {str(index): one for index, one in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{head}{name}/")
        elif isinstance(value, int | float):
            found[f"{head}{name}"] = float(value)
    return found


def heat_strip(images: Tensor, maps: Tensor) -> Image.Image:
    """Images (B, 3, H, W) under their reward maps (B, h, w), the first HEATED of them."""
    images, maps = images[:HEATED], interpolate(maps[:HEATED, None], images.shape[2:])[:, 0]
    pictures = [heat_map(image, one) for image, one in zip(images, maps, strict=True)]
    return strip([pictures], [""] * len(pictures))
