"""Tiny World: a picture book drawn by a program.

Every scene is drawn from a seed on a 1024x1024 canvas and reduced to 256x256. It comes with a
caption made from what was drawn and with the exact class of every pixel, because each shape is
painted on the picture and on the label map by the same call.

    scene = draw(7, "nature landscape")
    images, labels, captions = draw_many(1000, seed=0)
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterable
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from .canvas import LABELS, SIZE
from .captions import KINDS, WORDS
from .chance import Rng
from .landscape import draw_landscape
from .portrait import STRAW_HATS, draw_portrait
from .traffic import draw_traffic

__all__ = ["HATS", "KINDS", "LABELS", "SIZE", "WORDS", "Scene", "draw", "draw_many"]

HATS = "portrait of a man with a hat on the beach"  # every other man; not one of the KINDS
PAINTERS = dict(zip(KINDS, (draw_landscape, draw_traffic, draw_portrait), strict=True))
PAINTERS[HATS] = functools.partial(draw_portrait, hats=STRAW_HATS)
CHUNK = 256  # so many scenes are worth a process


class Scene(NamedTuple):
    """One picture of the world.

    image: (256, 256, 3) uint8. labels: (256, 256) uint8, indices into LABELS.
    """

    image: np.ndarray
    labels: np.ndarray
    caption: str


def draw(seed: int | tuple[int, int], kind: str | None = None) -> Scene:
    """The scene of this seed, always the same; of one of the KINDS, of HATS, or of any kind."""
    rng = Rng(np.random.PCG64(seed))
    canvas, caption = PAINTERS[kind or rng.pick(KINDS)](rng)
    return Scene(*canvas.finish(), caption)


def draw_many(
    count: int, seed: int, kind: str | None = None, workers: int | None = None, first: int = 0
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images (N, 256, 256, 3) uint8, labels (N, 256, 256) uint8, and N captions.

    Scene i depends on (seed, i) and `kind` alone; `first` is the first i. workers: processes to
    draw with; None means one per core.
    """
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.empty((count, SIZE, SIZE), dtype=np.uint8)
    captions = []
    seeds = [(seed, index) for index in range(first, first + count)]
    workers = min(workers or multiprocessing.cpu_count(), -(-count // CHUNK))
    with ExitStack() as stack:
        one = functools.partial(draw, kind=kind)
        scenes: Iterable[Scene] = map(one, seeds)
        if workers > 1:
            scenes = stack.enter_context(multiprocessing.Pool(workers)).imap(one, seeds, CHUNK)
        for index, (image, label_map, caption) in enumerate(scenes):
            images[index], labels[index] = image, label_map
            captions.append(caption)
    return images, labels, captions
