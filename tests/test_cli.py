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

from pxpo import (
    REWARDS,
    RewardSpec,
    begin,
    finish,
    load_lora,
    load_run,
    save_run,
    settings_for,
)
from pxpo import __main__ as cli

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
    kept = load_run(out)
    assert kept.count == 2
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [0, 1, 2]
    assert {"reward", "reward_std", "grad_norm", "seconds"} <= lines[2].keys()
    assert [line["reward_name"] for line in lines] == [None, "less blue", "less blue"]
    assert all(line["scores"]["less blue"]["held_out"] <= 0 for line in lines)
    assert -1 <= lines[2]["reward"] <= 0
    loaded = load_lora(out / "lora")
    assert all(torch.equal(loaded.weights[n], w) for n, w in kept.lora.weights.items())
    for name in ("heat.png", "lora/strip.png", "lora/reward.png"):
        assert Image.open(out / name).width > 100
    assert {path.name for path in out.iterdir()} == {
        "run.json", "updates", "lora", "metrics.jsonl", "heat.png"
    }  # fmt: skip
    assert kept.updates[2].settings.prompt == "a lake"
    assert kept.updates[2].reward == RewardSpec("color")


@pytest.mark.parametrize("credit", ["pixel", "image"])
def test_painting_from_a_picture(run, tmp_path, credit):
    small = [*SMALL[:2], *SMALL[4:], "--credit", credit]
    status, out = run("paint", "--map", str(painted(tmp_path / "p.png")), "--epochs", "1", *small)
    assert status == 0
    kept = load_run(out)
    assert kept.updates[-1].metrics["reward"] == pytest.approx(0.5, abs=1e-6)
    assert kept.settings.noise == "whole"  # the picture that was painted stays


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
    own = load_run(out).updates[0].shown[0]
    shutil.rmtree(out)
    whole = Image.fromarray(own.numpy()).resize(layer.size, Image.Resampling.LANCZOS)
    whole = whole.convert("RGBA")
    whole.save(tmp_path / "bare.png")
    Image.alpha_composite(whole, layer).save(tmp_path / "whole.png")
    whole.rotate(90).save(tmp_path / "other.png")
    status, _ = run("paint", "--map", str(tmp_path / "whole.png"), *small)
    assert status == 0  # green paint cannot be seen on some greens of a random model's picture
    assert load_run(out).updates[-1].metrics["reward"] == pytest.approx(0.5, abs=0.1)
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
    one, other = load_run(out), load_run(straight)
    assert one.count == other.count == 3
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
        (["segment", "--label", "Unicorn"], ["Unicorn", "it knows", "Hair"]),
        (["paint", "--more", "Unicorn"], ["Unicorn", "it knows", "Lake"]),
        (["paint", "--more", "Lake", "--map", "/nowhere.png"], ["--map", "--more"]),
        (["dance"], ["dance"]),
        ([], ["command"]),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2(arguments, words, capsys, tmp_path, model_folder):
    if arguments and arguments[0] in REWARDS:
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
        while process.poll() is None and len(list(out.glob("updates/*.safetensors"))) < 3:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    step = load_run(out).count
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
    learnt = load_run(out).lora
    where = ["--lora", str(out / "lora"), "--model", load_run(out).model_name]
    assert cli.main(["color", "--epochs", "1", *SMALL, *where, "--out", str(tmp_path / "b")]) == 0
    again = load_run(tmp_path / "b").updates[0].lora
    assert all(torch.equal(again.weights[n], w) for n, w in learnt.weights.items())
    other = [*SMALL, *where, "--out", str(tmp_path / "c"), "--rank", "5"]
    assert cli.main(["color", *other]) == 2
    assert "rank is 5" in capsys.readouterr().err
    assert cli.main(["color", *SMALL, "--lora", str(tmp_path / "c.safetensors")]) == 2


def test_every_reward_has_a_command_with_its_options(capsys):
    for kind in REWARDS.values():
        with pytest.raises(SystemExit):
            cli.main([kind.name, "--help"])
        told = capsys.readouterr().out
        assert all(f"--{option.name}" in told for option in kind.options)
        assert ("--map" in told) == kind.by_hand


def test_a_bad_reward_is_said_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(cli, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert cli.main(["color", "--color", "blurple"]) == 2
    assert cli.main(["segment", "--labels", "Unicorn"]) == 2


def test_a_run_is_resumed_and_its_paint_found_from_another_folder(
    model_folder, segmenter, tmp_path, monkeypatch
):
    """Relative paths of the model, the segmenter and the painted pictures are no trap."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    for name, folder in (("model", model_folder), ("segmenter", Path(segmenter.name))):
        (here / name).symlink_to(folder)
    monkeypatch.chdir(here)
    small = [*SMALL[:2], *SMALL[4:], "--model", "model", "--epochs", "1"]
    painted(here / "first.png")
    Image.new("RGBA", (40, 40), (0, 255, 0, 153)).save(here / "second.png")
    maps = ["--map", "first.png", "--map", "second.png"]
    assert cli.main(["paint", *maps, *small, "--out", "painted"]) == 0
    label = ["--label", "Hair", "--segmenter", "segmenter", "--images", "2"]
    assert cli.main(["segment", *label, *small, "--out", "segmented"]) == 0
    (here / "first.png").unlink()
    (here / "second.png").unlink()
    monkeypatch.chdir(there)
    for name in ("painted", "segmented"):
        assert cli.main(["resume", f"../here/{name}", "--epochs", "2"]) == 0
    run = load_run(here / "painted")
    rewards = [update.metrics["reward"] for update in run.updates[1:]]
    assert rewards == pytest.approx([0.5, 2.0], abs=1e-6)


def test_a_run_of_an_earlier_version_is_said_so(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"format": 2, "steps": []}')
    assert cli.main(["resume", str(tmp_path)]) == 2
    assert "format 2, of another version" in capsys.readouterr().err


def test_a_run_without_a_reward_is_not_resumed(model, tmp_path, capsys):
    save_run(finish(begin(model, settings_for("paint", steps=2, rank=2, shown=1))), tmp_path)
    assert cli.main(["resume", str(tmp_path)]) == 2
    assert "names no reward" in capsys.readouterr().err


def test_a_run_whose_model_was_moved_goes_on(run, model_folder, tmp_path, capsys):
    shutil.copytree(model_folder, tmp_path / "before")
    where = ["--model", str(tmp_path / "before"), "--out", str(tmp_path / "run")]
    assert run("color", "--epochs", "1", *SMALL, *where, model=False)[0] == 0
    (tmp_path / "before").rename(tmp_path / "after")
    more = ["resume", str(tmp_path / "run"), "--epochs", "2"]
    assert run(*more, model=False)[0] == 2
    assert "before" in capsys.readouterr().err
    assert run(*more, "--model", str(tmp_path / "after"), model=False)[0] == 0
    assert load_run(tmp_path / "run").model_name == str(tmp_path / "after")
