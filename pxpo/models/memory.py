"""Work folded into memory: many items in chunks, as large as the device allows.

On a GPU the first item of each kind of work is done alone and measured, and the chunks are as large
as what is free then holds, with room left for others (a segmenter, a display). Where that was too
much all the same, a chunk is halved. Where not even one item fits, the model may have a slower way
that needs less.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch

from ..errors import PxpoError

logger = logging.getLogger(__name__)

MOST_ON_GPU = {"sample": 64, "learn": 64, "decode": 16, "features": 16}
MOST_ON_CPU = {"sample": 64, "learn": 8, "decode": 16, "features": 16}
"""Items at a time, by kind of work: more are no faster."""

SPARED, SHARE = 2**30, 0.85
"""What chunks leave free: a GiB, and a part of the rest, as memory is never free in one piece."""


class Folding:
    """What needs a device's memory: mixed into a model.

    device: where the work is done.
    """

    device: torch.device

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self._most = MOST_ON_GPU if on_gpu else MOST_ON_CPU
        self._largest = dict(self._most)
        self._unmeasured = set(self._most) if on_gpu else set()

    def relieve(self, kind: str) -> bool:
        """Make this kind of work need less memory from now on; False where there is no way left."""
        return False

    def fold(self, kind: str, count: int, work: Callable[[slice], None]) -> Iterator[int]:
        """Call `work` on consecutive slices of range(count), as large as memory allows.

        A slice that runs out of memory is halved and tried again, and the smaller size is
        remembered for this `kind` of work; so `work` must leave nothing behind when it fails.
        Yields the number done after each slice.
        """
        done = 0
        while done < count:
            alone = kind in self._unmeasured
            size = 1 if alone else min(self._largest[kind], count - done)
            used = start_measuring(self.device) if alone else 0
            try:
                work(slice(done, done + size))
                done += size
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
                yield done
                continue
            free_memory()  # only here has the exception let go of the tensors it held


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
    """CUDA says it by type; MPS and the CPU's allocator only in words."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
