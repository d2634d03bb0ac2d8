"""The images of an update shared among processes, which talk by gloo on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState, debug_launcher
from conftest import free_port
from PIL import Image

from pxpo import __main__ as cli
from pxpo import load_run, processes
from pxpo.errors import DivergedError, ProcessError
from pxpo.models import best_device
from pxpo.tracking import flat

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--steps", "3", "--timesteps", "0.5", "--rank", "2", "--shown", "3", "--updates", "2"]
PROMPTS = ["--prompt", "a lake", "--prompt", "a hill", "--held-out-prompt", "a tree"]
EIGHT = ["--images", "8", *SMALL, *PROMPTS]

DEADLY = """
import os
import signal

import torch.distributed

judged = 0


def less_blue(images):
    global judged
    judged += 1
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == {victim}:
        if judged == 4:  # what is shown, update 1, what is shown, update 2
            os.kill(os.getpid(), signal.SIGKILL)
    return -images[:, 2]
"""


def job(count: int, *commands: Sequence[object], statuses: Sequence[int] = ()) -> None:
    """These commands, one after the other, in `count` processes; their statuses are 0 if unsaid."""
    wanted = [*statuses] or [0] * len(commands)
    words = [[str(word) for word in command] for command in commands]

    def each() -> None:
        PartialState._reset_state()  # it is of one process, where pytest has used it
        assert [cli.main(command) for command in words] == wanted

    each() if count == 1 else debug_launcher(each, (), count)


def assert_alike(folder: Path, other: Path) -> None:
    """They learnt the same, and say the same of it, up to float rounding.

    That is more than a digit or two: AdamW divides each gradient by its size, however small.
    """
    one, two = load_run(folder), load_run(other)
    assert one.settings == two.settings and one.count == two.count > 0
    for before, update, same in zip(one.updates, one.updates[1:], two.updates[1:], strict=False):
        start, here, there = (
            torch.cat([weight.flatten() for weight in item.lora.weights.values()])
            for item in (before, update, same)
        )
        assert (there - here).norm() < 1e-3 * (here - start).norm()
        assert (same.latent_reward - update.latent_reward).abs().max() < 1e-3
        assert (same.shown.int() - update.shown.int()).abs().max() <= 1
    lines, others = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, other)
    )
    for line, same in zip(lines, others, strict=True):
        for values in (line, same):
            values.pop("seconds", None)
            values["scores"] = list(values.pop("scores").values())
        assert flat(same) == pytest.approx(flat(line), rel=1e-3, abs=1e-6)
    for heat in sorted((folder / "heat").iterdir()):
        first, second = (np.asarray(Image.open(p / "heat" / heat.name)) for p in (folder, other))
        assert first.shape == second.shape
        assert np.abs(first.astype(int) - second.astype(int)).mean() < 1


@pytest.fixture(scope="module")
def alone(model_folder, tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    job(1, ["color", *EIGHT, "--model", model_folder, "--out", folder])
    return folder


@pytest.mark.parametrize("count", range(12))
@pytest.mark.parametrize("number", [1, 2, 3, 5, 8])
def test_each_image_is_one_process_s_and_no_process_is_without(monkeypatch, number, count):
    shares, tasks = [], []
    for index in range(number):
        here = SimpleNamespace(num_processes=number, process_index=index)
        monkeypatch.setattr(processes, "state", lambda here=here: here)
        shares.append(range(count)[processes.share(count)])
        tasks.append(range(count)[processes.tasks(count)])
    assert [image for share in shares for image in share] == [*range(count)]
    assert max(map(len, shares)) == -(-count // number)
    assert all(len(task) > 0 for task in tasks) == (count > 0)
    for task, share in zip(tasks, shares, strict=True):
        assert task == (share or range(count)[-1:])


def aloud(work):
    def work_aloud(*arguments):
        print(work.__name__)
        return work(*arguments)

    return work_aloud


def test_one_of_many_has_a_device_of_its_own_and_ends_when_it_is_told_to(monkeypatch):
    here = SimpleNamespace(num_processes=2, process_index=1, device=torch.device("cuda", 1))
    monkeypatch.setattr(processes, "state", lambda: here)
    assert best_device() == "cuda:1"
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        processes.end_with_the_others()
        with pytest.raises(ProcessError, match="another one has ended"):
            signal.raise_signal(signal.SIGTERM)
        processes.end_undisturbed()
        for number in before:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("command", [["evaluate", "run"], ["reproduce", "--quick"]])
def test_what_would_be_done_by_all_alike_is_refused(monkeypatch, capsys, command):
    monkeypatch.setattr(processes, "state", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(cli, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert cli.main(command) == 2
    assert capsys.readouterr().err == (
        f"pxpo: {command[0]} runs in one process; start it without accelerate launch.\n"
    )


@pytest.mark.slow
def test_what_diverges_does_so_in_all_processes_and_one_of_them_writes(
    model_folder, tmp_path, capfd, monkeypatch
):
    def diverges(model, run, *rest):
        if run.count == 1:
            raise DivergedError("noise")
        return teach(model, run, *rest)

    teach = cli.teach
    monkeypatch.setattr(cli, "teach", diverges)
    for name in ("write_metrics", "write_folder"):
        monkeypatch.setattr(cli, name, aloud(getattr(cli, name)))
    out = tmp_path / "run"
    job(2, ["color", *EIGHT, "--model", model_folder, "--out", out], statuses=[2])
    printed = capfd.readouterr()
    assert printed.out.count("write_metrics") == printed.out.count("write_folder") == 1
    assert printed.err.count("pxpo: noise Stopped after update 1; all of it is kept.") == 2
    assert load_run(out).count == 1 and (out / "lora" / "README.md").exists()


@pytest.mark.slow
def test_the_same_is_learnt_by_four_processes_and_one_of_them_writes_and_prints(
    alone, model_folder, tmp_path, capfd, monkeypatch
):
    for name in ("save_run", "write_metrics", "write_folder", "write_config"):
        monkeypatch.setattr(cli, name, aloud(getattr(cli, name)))
    job(4, ["color", *EIGHT, "--model", model_folder, "--out", tmp_path / "run"])
    printed = capfd.readouterr()
    written = {"save_run": 3, "write_metrics": 1, "write_folder": 1, "write_config": 1, "Done": 1}
    assert {name: printed.out.count(name) for name in written} == written
    assert printed.err.count("| 0/2 [") == 1  # the bar of the updates, before the first
    assert_alike(alone, tmp_path / "run")
    names = [
        {path.relative_to(folder) for path in folder.rglob("*") if path.parent.name != "updates"}
        for folder in (alone, tmp_path / "run")
    ]
    assert names[0] == names[1]


@pytest.mark.slow
def test_uneven_shares_and_more_processes_than_images(model_folder, tmp_path):
    """Of 7 images one process has 1; of 2, and of 2 that are shown, one has none."""
    paint = Image.new("RGBA", (16, 16))
    paint.paste((0, 255, 0, 255), (0, 0, 16, 6))
    paint.save(tmp_path / "paint.png")
    seven = ["color", "--images", "7", *SMALL, "--updates", "1", "--paper"]
    two = [
        "paint",
        "--map",
        tmp_path / "paint.png",
        "--images",
        "2",
        *SMALL,
        "--shown",
        "2",
        "--updates",
        "1",
    ]
    for count in (1, 3):
        job(count, *(
            [*command, "--model", model_folder, "--out", tmp_path / f"{count}-{command[0]}"]
            for command in (seven, two)
        ))  # fmt: skip
    for name in ("color", "paint"):
        assert_alike(tmp_path / f"1-{name}", tmp_path / f"3-{name}")


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(alone, model_folder, tmp_path, capfd):
    out = tmp_path / "run"
    job(2, ["color", *EIGHT, "--updates", "1", "--model", model_folder, "--out", out])
    job(1, ["pack", out])
    on = ["resume", tmp_path / "run.zip", "--updates", "2"]
    job(3, ["resume", tmp_path / "nowhere"], on, statuses=[2, 0])
    assert capfd.readouterr().err.count("no run can be read") == 3
    job(1, ["resume", out, "--updates", "2"])
    assert_alike(tmp_path / "run-1", out)
    assert not (tmp_path / "run-2").exists()
    assert_alike(alone, out)


@pytest.mark.slow
def test_several_machines_need_the_run_on_the_first_alone(alone, model_folder, tmp_path):
    def each() -> None:
        PartialState._reset_state()
        here = tmp_path / str(processes.state().process_index)
        here.mkdir()
        os.chdir(here)  # a machine of its own, as far as files go
        where = ["--model", str(model_folder), "--out", "run"]
        assert cli.main(["color", *EIGHT, "--updates", "1", *where]) == 0
        assert cli.main(["resume", "run", "--updates", "2"]) == 0

    debug_launcher(each, (), 2)
    assert_alike(alone, tmp_path / "0" / "run")
    assert not (tmp_path / "1" / "run").exists()


def deadly(tmp_path: Path, model_folder: Path, victim: int) -> list[str]:
    (tmp_path / "mine.py").write_text(DEADLY.format(victim=victim))
    where = ["--reward", f"{tmp_path / 'mine.py'}:less_blue", "--model", str(model_folder)]
    return ["own", *where, "--out", str(tmp_path / "run"), *EIGHT]


def assert_kept(run: Path, alone: Path, said: str, victim: int) -> None:
    """Its first update, with the way on said once; gone on with, it is the one that had no end.

    The first process, which writes, leaves the LoRA's folder too, where another was killed.
    """
    way_on = f"Stopped after update 1; all of it is kept. Go on with: python -m pxpo resume {run}\n"
    assert said.count(way_on) == 1, said
    assert load_run(run).count == 1 and (run / "lora" / "README.md").exists() == (victim > 0)
    job(1, ["resume", run])
    assert_alike(alone, run)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_job_and_the_run_goes_on(
    alone, model_folder, tmp_path, capfd, victim
):
    with pytest.raises(Exception, match=f"process {victim} terminated with signal SIGKILL"):
        job(2, deadly(tmp_path, model_folder, victim))
    assert_kept(tmp_path / "run", alone, capfd.readouterr().err, victim)


@pytest.mark.slow
def test_so_it_does_under_accelerate_s_launcher(alone, model_folder, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--main_process_port", str(free_port()), "-m", "pxpo"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launch, *deadly(tmp_path, model_folder, 1)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0, done.stderr
    assert_kept(tmp_path / "run", alone, done.stderr, 1)
