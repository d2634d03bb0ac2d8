"""The command line: `python -m tests.experiments wishes --seeds 20 --first 200 --lines FILE`."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from pxpo.__main__ import quiet
from pxpo.embedded import ASSETS
from pxpo.models import leave_a_core
from pxpo.settings import Settings, kind_of

from . import carry, eye, paper, wishes
from .common import Lab

STUDY = ASSETS / "study"
"""Where the figures of each run lie, from which the study's tables are made; more seeds add to
them."""

EXPERIMENTS: dict[str, tuple[Any, list[str]]] = {
    "carry": (carry, []),
    "eye": (eye, list(eye.THINGS)),
    "wishes": (wishes, list(wishes.CASES)),
    "paper": (paper, list(paper.EXPERIMENTS)),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.experiments", description=__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--only", action="append", default=[], help="one part of it; repeatable")
    parser.add_argument("--runs", type=Path, default=paper.RUNS, help="of `pxpo reproduce`")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--lines", type=Path, help="file of the figures (assets/study/….jsonl)")
    parser.add_argument("--out", type=Path, help="folder for strips of pictures")
    parser.add_argument("--model")
    parser.add_argument("--segmenter")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--report", action="store_true", help="the table alone")
    options = parser.parse_args()
    quiet()
    leave_a_core()
    module, parts = EXPERIMENTS[options.experiment]
    changes = changes_of(options.set)
    paper.RUNS = options.runs
    lines = options.lines or STUDY / f"{options.experiment}.jsonl"
    lab = Lab.of(options.model, options.segmenter, lines, options.out)
    if not options.report:
        seeds = range(options.first, options.first + options.seeds)
        module.run(lab, options.only or parts, seeds, changes)
    print(module.report(lab, changes))


def changes_of(given: list[str]) -> dict[str, Any]:
    """Settings by name, as their types."""
    kinds = {entry.name: kind_of(entry) for entry in fields(Settings)}
    pairs = [one.split("=", 1) for one in given]
    return {name: kinds.get(name, str)(value) for name, value in pairs}


main()
