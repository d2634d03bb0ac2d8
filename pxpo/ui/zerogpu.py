"""Hugging Face's ZeroGPU: a GPU that is lent to one call at a time, in a forked process.

What goes there and back is copied, and whatever else the call changes is lost with its process. So
work there is of plain data, a run in and a run out, and is written as anywhere else.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from ..errors import PxpoError
from ..progress import Progress

Result = TypeVar("Result")

LENT = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")
"""Whether this process runs on ZeroGPU."""

SECONDS = 120
"""What a call asks for. One that takes longer is cut off."""


def lent(
    work: Callable[..., Generator[Progress, None, Result]],
) -> Callable[..., Generator[Progress, None, Result]]:
    """`work` with a lent GPU on ZeroGPU, unchanged anywhere else.

    What it takes and returns is pickled. Its progress comes without latents: they are on that GPU.
    It must be made before the page is launched, as ZeroGPU counts what will ask for a GPU then.
    """
    if not LENT:
        return work
    import spaces  # there on ZeroGPU, and of no use elsewhere

    @functools.wraps(work)
    def call(*values: Any) -> Generator[Progress, None, Result]:
        for sent in remote(pickle.dumps(values)):
            got = pickle.loads(sent)
            if isinstance(got, PxpoError):
                raise got
            if not isinstance(got, Progress):
                return got[0]
            yield got
        raise PxpoError("the GPU was taken back before the work was done; try again.")

    remote = spaces.GPU(duration=SECONDS)(functools.partial(_sending, work))
    return call


def _sending(work: Callable[..., Generator[Progress, None, Any]], values: bytes) -> Iterator[bytes]:
    """What `work` yields, then a tuple of its result; or its error, of which the name alone would
    come through. In bytes, as tensors would be sent through shared memory, and be too many."""
    steps = work(*pickle.loads(values))
    try:
        while True:
            yield pickle.dumps(replace(next(steps), latents=None))
    except StopIteration as end:
        yield pickle.dumps((end.value,))
    except PxpoError as error:
        yield pickle.dumps(error)
    finally:
        steps.close()
