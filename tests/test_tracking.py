"""What a run tells as it learns: metrics.jsonl, heat-maps, and the trackers of accelerate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import tracking as accelerate_tracking
from PIL import Image

from pxpo import __main__ as cli
from pxpo import load_run
from pxpo.run import training_prompts

pytestmark = pytest.mark.usefixtures("in_memory")

SMALL = ["--steps", "2", "--images", "4", "--shown", "2", "--rank", "2", "--updates", "2"]


class Recorder:
    """A tracker that keeps what it is told."""

    name, requires_logging_directory, told = "recorder", False, []

    def __init__(self, run_name: str) -> None:
        self.told.append(("new", run_name))

    def __getattr__(self, verb: str):
        return lambda *values, **options: self.told.append((verb, *values, options))


@pytest.fixture
def told(monkeypatch) -> list:
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "told", [])
    return Recorder.told


def run(model_folder: Path, out: Path, *arguments: str) -> int:
    where = ["--model", str(model_folder), "--out", str(out)]
    return cli.main(["color", "--prompt", "a lake", *SMALL, *where, *arguments])


def test_a_tracker_hears_the_numbers_of_the_file_and_sees_the_pictures(
    model_folder, tmp_path, told
):
    out = tmp_path / "run"
    more = ["--prompt", "a hill", "--prompt", "a tree"]
    assert run(model_folder, out, *more, "--log-with", "recorder") == 0
    verbs = [verb for verb, *_ in told]
    assert verbs == ["new", "start", "store_init_configuration", *["log", "log_images"] * 3,
                     "finish"]  # fmt: skip
    assert told[0] == ("new", "pxpo")
    about = told[2][1]
    assert about["strength"] == 0.03 and about["reward"] == "less blue"
    assert about["model"] == str(model_folder) and about["prompt"] == "a lake\na hill\na tree"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = load_run(out)
    for number, (line, log, seen) in enumerate(zip(lines, told[3::2], told[4::2], strict=False)):
        _, values, options = log
        assert options == seen[2] == {"step": number}
        shown = kept.updates[number].shown
        assert (seen[1]["shown"] == shown.numpy()).all() and ("heat" in seen[1]) == bool(number)
        score = line["scores"]["less blue"]
        assert values["scores/less blue/here"] == score["here"]
        assert values["scores/less blue/held_out"] == score["held_out"]
        plain = {"update", "reward", "reward_std", "grad_norm", "kl", "moved", "from_base"}
        for name in plain | {"seconds"} if number else ():
            assert values[name] == line[name]
        assert [values[f"image_rewards/{i}"] for i in range(4 * bool(number))] == (
            line["image_rewards"]
        )
        assert all(isinstance(value, float) for value in values.values())
    for number, line in enumerate(lines[1:]):
        assert sum(line["image_rewards"]) / 4 == pytest.approx(line["reward"], abs=1e-6)
        assert line["prompts"] == training_prompts(kept.settings, number)
    assert [path.name for path in sorted((out / "heat").iterdir())] == ["0001.jpg", "0002.jpg"]
    assert Image.open(out / "heat" / "0001.jpg").width > 4 * 128


def test_a_resumed_run_is_tracked_from_where_it_was_and_keeps_its_heat_maps(
    model_folder, tmp_path, told
):
    out = tmp_path / "run"
    assert run(model_folder, out) == 0 and told == []
    more = ["resume", str(out), "--updates", "3", "--log-with", "recorder"]
    assert cli.main(more) == 0
    assert [call[2]["step"] for call in told if call[0] == "log"] == [3]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [0, 1, 2, 3] and "prompts" not in lines[1]
    assert len(list((out / "heat").iterdir())) == 3


def test_a_tracker_is_finished_and_the_numbers_kept_when_the_work_is_cut_off(
    model_folder, tmp_path, told, monkeypatch
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "teach", stop)
    assert run(model_folder, tmp_path / "run", "--log-with", "recorder") == 130
    assert told[-1][0] == "finish"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_missing_an_unknown_and_a_failing_tracker_are_one_line(
    model_folder, tmp_path, told, monkeypatch, capsys
):
    monkeypatch.setattr("pxpo.tracking.get_available_trackers", list)
    out = tmp_path / "run"
    for name, words in (
        ("tensorboard", "pip install tensorboard\n"),
        ("comet_ml", "pip install comet-ml\n"),
        ("abacus", "one of aim, comet_ml"),
    ):
        assert run(model_folder, out, "--log-with", name) == 2 and not out.exists()
        assert words in capsys.readouterr().err

    def refuse(self):
        raise OSError("no\nkey")

    monkeypatch.setattr(Recorder, "start", refuse, raising=False)
    assert run(model_folder, out, "--log-with", "recorder") == 2
    assert "recorder does not start: OSError: no key" in capsys.readouterr().err


def test_tensorboard_reads_what_was_written(model_folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert run(model_folder, out, "--log-with", "tensorboard") == 0
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    kept = load_run(out)
    moved = [event.value for event in events.Scalars("moved")]
    assert moved == pytest.approx([u.metrics["moved"] for u in kept.updates[1:]], rel=1e-6)
    assert {tag.split("/")[0] for tag in events.Tags()["images"]} == {"shown", "heat"}
