"""The page on a studio, the only part of the package that knows Gradio.

    launch(Page(Studio(model, segmenter, Path("runs/studio"))))

`page.py` lays it out and connects it, `events.py` does what its buttons promise, `canvas.py` is
what a person paints on, `masks.py` what paints beside the brush, `rewards.py` all that depends on
the kind of reward, `api.py` the same verbs for programs, `parts.py` what these share; `zerogpu.py`
lends the studio's work a GPU.
"""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "0")  # read as Gradio is imported

from .zerogpu import LENT

if LENT:
    import spaces  # noqa: F401  # before anything touches the GPU that is not there yet

from .page import Page, launch
from .parts import STABLE_DIFFUSION

__all__ = ["STABLE_DIFFUSION", "Page", "launch"]
