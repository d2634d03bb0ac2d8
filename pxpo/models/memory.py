"""Work folded into memory: many items in chunks, as large as the device allows.

On CPUs a small network's chunk is divided among the cores. Each part is computed from end to end by
a thread of its own, which waits for no other: where torch's threads share each operation instead,
its operations are too short to gain by it, and other work that keeps one thread waiting keeps all
of them. A large network's are long enough, and a few pictures would leave cores idle.

On a GPU the first item of each kind of work is done alone and measured, and the chunks are as large
as what is free then holds, with room left for others (a segmenter, a display). Where that was too
much all the same, a chunk is halved. Where not even one item fits, the model may have a slower way
that needs less.
"""

from __future__ import annotations

import functools
import gc
import itertools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from ..errors import PxpoError

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

CORES = torch.get_num_threads()
"""Those of this machine, or as many as OMP_NUM_THREADS says."""

LARGE = 100_000_000
"""The parameters from which on a network is large: between Tiny World's 11 and Stable Diffusion's
860 millions."""

MOST_ON_GPU = {"sample": 64, "learn": 64, "decode": 16, "features": 16}
MOST_ON_CPU = {"sample": 16, "learn": 8, "decode": 16, "features": 16}
"""Items at a time, by kind of work: more are no faster."""

SPARED, SHARE = 2**30, 0.85
"""What chunks leave free: a GiB, and a part of the rest, as memory is never free in one piece."""


class Folding:
    """What needs a device's memory: mixed into a model.

    device: where the work is done. workers: how many threads do it at the same time.
    """

    device: torch.device

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.workers = CORES if self.device.type == "cpu" else 1
        on_gpu = self.device.type == "cuda"
        self._most = MOST_ON_GPU if on_gpu else MOST_ON_CPU
        self._largest = dict(self._most)
        self._unmeasured = set(self._most) if on_gpu else set()

    def relieve(self, kind: str) -> bool:
        """Make this kind of work need less memory from now on; False where there is no way left."""
        return False

    def fold(
        self, kind: str, count: int, work: Callable[[slice], Found]
    ) -> Iterator[tuple[slice, Found]]:
        """Each part of range(count), in order, with what `work` makes of it.

        The chunks are as large as memory allows: one that runs out of it is halved and tried again,
        and the smaller size is remembered for this `kind` of work. Nothing is under way between two
        of what this yields.
        """
        done = 0
        while done < count:
            alone = kind in self._unmeasured
            size = 1 if alone else min(self._largest[kind], count - done)
            used = start_measuring(self.device) if alone else 0
            try:
                found = self._divided(work, done, size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if size > 1:
                    self._largest[kind] = size // 2
                    logger.warning("out of memory: going on with %d at a time", size // 2)
                elif self.relieve(kind):
                    self._largest[kind] = self._most[kind]  # what was learnt of it holds no more
                    if self.device.type == "cuda":
                        self._unmeasured.add(kind)
                    logger.warning("out of memory: going on with less, and more slowly")
                else:
                    raise PxpoError(
                        f"Out of memory on {self.device} with a single image; close what else uses "
                        "it, or choose a smaller model."
                    ) from error
            else:
                if alone:
                    self._unmeasured.discard(kind)
                    self._largest[kind] = min(self._largest[kind], fitting(self.device, used))
                done += size
                yield from found
                continue
            free_memory()  # only here is the exception gone, which held tensors

    def _divided(
        self, work: Callable[[slice], Found], start: int, size: int
    ) -> list[tuple[slice, Found]]:
        """What `work` makes of `size` items, in as many parts as there are workers for."""
        workers = min(self.workers, size)
        edges = [start + size * n // workers for n in range(workers + 1)]
        parts = [slice(*both) for both in itertools.pairwise(edges)]
        if workers == 1:
            return [(parts[0], work(parts[0]))]
        threads, learning = torch.get_num_threads(), torch.is_grad_enabled()
        under_way: list[Future[Found]] = []

        def alone(part: slice) -> Found:
            torch.set_num_threads(1)
            with torch.set_grad_enabled(learning):  # each thread has a mode of its own
                return work(part)

        try:
            for part in parts:
                under_way.append(self._pool.submit(alone, part))
            return [(part, one.result()) for part, one in zip(parts, under_way, strict=True)]
        finally:
            wait(under_way)  # also where one of them fails, or Ctrl-C is pressed
            torch.set_num_threads(threads)  # some libraries know one number for all threads

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        """Its threads stay, as what the libraries prepared for a kind of work is known to each
        thread alone."""
        return ThreadPoolExecutor(self.workers, "fold")


def start_measuring(device: torch.device) -> int:
    """The bytes in use on a GPU now; its peak is counted anew."""
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def fitting(device: torch.device, used: int) -> int:
    """How many items fit what is free on a GPU, at least one, when one of them brought the bytes in
    use from `used` to their peak."""
    each = max(torch.cuda.max_memory_allocated(device) - used, 1)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + kept
    return max(1, int(SHARE * (free - SPARED) / each))


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA says it by type; MPS and the CPU's allocators, Windows' too, only in words."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def free_memory() -> None:
    gc.collect()  # the parts of a chunk and the error of one of them hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
