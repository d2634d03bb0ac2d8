"""What is shipped beside the code: a small model and its segmenter, configs, an opening run.

All of it lies in assets/, which an installed package has inside itself.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "assets"

ASSETS = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "assets"

TINY_WORLD = ASSETS / "tiny_world"
"""The embedded default: a small pipeline of our own in diffusers' format."""

TINY_SEGMENTER = ASSETS / "tiny_world_segmenter"
"""The embedded segmenter, which knows Tiny World's things."""

SINGLE_FILE = ASSETS / "single_file"
"""What a checkpoint in one file does not say: configs, and CLIP's vocabulary."""

OPENING = ASSETS / "opening"
"""A run made earlier, to open the page with."""

EXAMPLES = ASSETS / "examples"
"""The pictures of the page's examples, before anything is learnt, by the seed."""
