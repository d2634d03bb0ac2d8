"""The paper's experiments again, in one command: a report that the same seeds make again."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

from ..progress import Progress
from .experiments import EXPERIMENTS, FULL, METHODS, QUICK, Bench, Scale, run_all
from .report import write_report

__all__ = ["EXPERIMENTS", "FULL", "METHODS", "QUICK", "Bench", "Scale", "reproduce"]


def reproduce(bench: Bench, names: Sequence[str]) -> Generator[Progress, None, Path]:
    """Run what is not done yet of these experiments, and write the report; returns its page."""
    results = yield from run_all(bench, names)
    return write_report(bench, names, results)
