"""The command line on a small random model, in-process and as a program of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from PIL import Image

from pxpo import __main__ as cli
from pxpo import load_lora, resume

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--steps", "2", "--images", "2", "--shown", "2", "--rank", "2", "--prompt", "a lake"]


@pytest.fixture
def run(model_folder, tmp_path):
    """Run a command on the random model; returns its exit status and run folder."""
    out = tmp_path / "run"

    def run(*arguments: str, model: bool = True) -> tuple[int, Path]:
        where = ["--model", str(model_folder), "--out", str(out)] if model else []
        return cli.main([*arguments, *where]), out

    return run


def painted(path: Path) -> Path:
    picture = Image.new("RGBA", (40, 40))
    picture.paste((0, 255, 0, 153), (0, 0, 40, 20))
    picture.paste((255, 0, 0, 153), (0, 30, 40, 40))
    picture.save(path)
    return path


def test_a_run_leaves_all_that_the_paper_shows_of_one(run):
    status, out = run("color", "--epochs", "2", *SMALL)
    assert status == 0
    session = resume(out)
    assert session.step == 2
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {"reward", "reward_std", "shown_reward", "shown_std", "grad_norm"} <= lines[2].keys()
    assert -1 <= lines[2]["reward"] <= 0
    loaded = load_lora(out / "lora")
    assert all(torch.equal(loaded.weights[n], w) for n, w in session.lora.weights.items())
    for name in ("heat.png", "lora/strip.png", "lora/reward.png"):
        assert Image.open(out / name).width > 100
    assert json.loads((out / "config.json").read_text())["settings"]["prompt"] == "a lake"


@pytest.mark.parametrize("credit", ["pixel", "image"])
def test_painting_from_a_picture(run, tmp_path, credit):
    small = [*SMALL[:2], *SMALL[4:], "--credit", credit]
    status, out = run("paint", "--map", str(painted(tmp_path / "p.png")), "--epochs", "1", *small)
    assert status == 0
    session = resume(out)
    assert session.history[-1].metrics["reward"] == pytest.approx(0.5, abs=1e-6)
    assert session.settings.noise == "whole"  # the picture that was painted stays


def test_a_picture_without_paint_is_refused_before_anything_is_written(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    out = tmp_path / "run"
    status = cli.main(["paint", "--map", str(tmp_path / "black.png"), "--out", str(out)])
    error = capsys.readouterr().err
    assert status == 2 and "nothing is painted" in error and "black.png" in error
    assert not out.exists()


def test_a_whole_picture_is_compared_with_the_run_s_own(run, tmp_path, capsys, monkeypatch):
    """Its own green and red are no paint; and another picture is refused before anything is
    written."""
    small = ["--epochs", "1", *SMALL[:2], *SMALL[4:], "--seed", "7"]
    layer = Image.open(painted(tmp_path / "layer.png"))
    status, out = run("paint", "--map", str(tmp_path / "layer.png"), *small)
    assert status == 0
    own = resume(out).history[0].shown[0]
    shutil.rmtree(out)
    whole = Image.fromarray(own.numpy()).resize(layer.size, Image.Resampling.LANCZOS)
    whole = whole.convert("RGBA")
    whole.save(tmp_path / "bare.png")
    Image.alpha_composite(whole, layer).save(tmp_path / "whole.png")
    whole.rotate(90).save(tmp_path / "other.png")
    status, _ = run("paint", "--map", str(tmp_path / "whole.png"), *small)
    assert status == 0  # green paint cannot be seen on some greens of a random model's picture
    assert resume(out).history[-1].metrics["reward"] == pytest.approx(0.5, abs=0.1)
    shutil.rmtree(out)
    for name, words in (("other", "differs from the run's own"), ("bare", "nothing is painted")):
        capsys.readouterr()
        status, _ = run("paint", "--map", str(tmp_path / f"{name}.png"), *small)
        error = capsys.readouterr().err
        assert status == 2 and words in error and f"{name}.png" in error
        assert not out.exists()


def test_a_resumed_run_equals_one_that_never_stopped(run, model_folder, tmp_path):
    run("color", "--epochs", "1", *SMALL)
    status, out = run("resume", str(tmp_path / "run"), "--epochs", "3", model=False)
    assert status == 0
    straight = tmp_path / "straight"
    where = ["--model", str(model_folder), "--out", str(straight)]
    cli.main(["color", "--epochs", "3", *SMALL, *where])
    one, other = resume(out), resume(straight)
    assert one.step == other.step == 3
    assert all(torch.equal(one.lora.weights[n], other.lora.weights[n]) for n in one.lora.weights)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["color", "--eta", "0"], ["eta", "0.0", "greater than 0"]),
        (["color", "--images", "none"], ["images", "'none'", "number"]),
        (["color", "--images", "5000"], ["5000", "1024"]),
        (["color", "--credit", "both"], ["both", "pixel, image"]),
        (["color", "--color", "blurple"], ["blurple", "orange"]),
        (["color", "--model", "/nowhere"], ["/nowhere", "cannot be loaded"]),
        (["color", "--images", "1"], ["baseline", "at least 2"]),
        (["paint"], ["--map", "--more"]),
        (["paint", "--map", "/nowhere.png"], ["/nowhere.png", "cannot be read"]),
        (["resume", "/nowhere"], ["/nowhere", "run.json"]),
        (["segment", "--segmenter", "/nowhere"], ["/nowhere", "cannot be loaded"]),
        (["dance"], ["dance"]),
        ([], ["command"]),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2(arguments, words, capsys, tmp_path, model_folder):
    if arguments and arguments[0] in ("color", "paint", "segment"):
        arguments = [*arguments, "--out", str(tmp_path / "out")]
        if "--model" not in arguments:
            arguments += ["--model", str(model_folder)]
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert len(error) == 1, error
    assert all(word in error[0] for word in words), error[0]


def test_a_run_folder_is_never_overwritten(run, capsys):
    run("color", "--epochs", "1", *SMALL)
    status, out = run("color", "--epochs", "1", *SMALL)
    assert status == 2
    assert f"resume {out}" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(model_folder, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "pxpo", "color", "--epochs", "100000", *SMALL,
         "--model", str(model_folder), "--out", str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background jobs ignore it, and so do their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        while process.poll() is None and len(list(out.glob("steps/*.safetensors"))) < 3:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    step = resume(out).step
    assert step >= 2
    assert f"after update {step}" in said
    assert f"python -m pxpo resume {out}" in said
    assert load_lora(out / "lora").rank == 2


def test_a_run_is_pushed_from_its_folder(run, capsys, monkeypatch):
    hub = Hub()
    hub.tokens["hf_secret"] = {"name": "ada", "orgs": [], "rights": ["write"]}
    monkeypatch.setattr("pxpo.hub.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    _, out = run("color", "--epochs", "1", *SMALL)
    assert run("push", str(out), "ada/less-blue", "--private", model=False)[0] == 0
    assert f"{hub.url}/ada/less-blue" in capsys.readouterr().out
    card = hub.repos["ada/less-blue"]["README.md"].decode()
    assert "less blue" in card and "ada/less-blue" in card and hub.private["ada/less-blue"]
    assert run("push", str(out), "eve/less-blue", model=False)[0] == 2
    said = capsys.readouterr().err
    assert "belongs to 'eve'" in said and "hf_secret" not in said
    assert not any(b"hf_secret" in file.read_bytes() for file in out.rglob("*") if file.is_file())
    hub.shutdown()
    hub.server_close()


def test_a_run_goes_on_from_a_lora(run, tmp_path, capsys):
    _, out = run("color", "--epochs", "1", *SMALL)
    learnt = resume(out).lora
    where = ["--lora", str(out / "lora"), "--model", resume(out).model_name]
    assert cli.main(["color", "--epochs", "1", *SMALL, *where, "--out", str(tmp_path / "b")]) == 0
    again = resume(tmp_path / "b").history[0].lora
    assert all(torch.equal(again.weights[n], w) for n, w in learnt.weights.items())
    other = [*SMALL, *where, "--out", str(tmp_path / "c"), "--rank", "5"]
    assert cli.main(["color", *other]) == 2
    assert "rank is 5" in capsys.readouterr().err
    assert cli.main(["color", *SMALL, "--lora", str(tmp_path / "c.safetensors")]) == 2
