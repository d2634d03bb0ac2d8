"""The report that is shipped, and what the README says of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from statistics import fmean

from pxpo import Tools, finish, load_model, reproduce
from pxpo.embedded import ASSETS
from pxpo.measures import signed, spread
from pxpo.reproduce import EXPERIMENTS, FULL, METHODS, Bench, report

SHIPPED = ASSETS / "report"


def test_the_shipped_report_is_of_the_settings_as_they_are(tmp_path):
    """Runs of others would have to be made again, and are refused."""
    shutil.copytree(SHIPPED, tmp_path / "report")
    kept = (SHIPPED / "report.json").read_bytes()
    scale = replace(FULL, seeds=json.loads(kept)["seeds"])
    bench = Bench(load_model(), tmp_path / "report", scale, tools=Tools("cpu"))
    finish(reproduce.reproduce(bench, list(EXPERIMENTS)))
    assert (tmp_path / "report" / "report.json").read_bytes() == kept


def test_the_readme_says_what_the_report_has():
    record = json.loads((SHIPPED / "report.json").read_text())
    lines = (ASSETS.parent / "README.md").read_text().splitlines()
    for name, title in (
        ("color", "less blue"), ("hair", "less hair"), ("lake", "more lake, fewer trees"),
        ("trees", "more trees, less lake"),
    ):  # fmt: skip
        (line,) = (one for one in lines if one.startswith(f"| {title} |") and one.count("|") == 7)
        cells = [cell.strip(" *").split(",")[0] for cell in line.split("|")[3:7]]
        one = record["summary"][name]
        afters = [spread(one[method]["after"], 3, 1) for method in METHODS]
        assert cells == [signed(fmean(one["DDPO"]["before"]), 3), *afters]
    (line,) = (one for one in lines if one.startswith("| how far a region"))
    talks = [spread(report.ratios(record["cross_talk"][method]), 2, 1) for method in METHODS]
    assert [cell.strip(" *") for cell in line.split("|")[4:7]] == talks
