"""The command line on a small random model, in-process and as a program of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from PIL import Image

from pxpo import (
    REWARDS,
    RewardSpec,
    Wish,
    begin,
    finish,
    load_lora,
    load_run,
    save_run,
    settings_for,
)
from pxpo import __main__ as cli
from pxpo.errors import DivergedError, RunError
from pxpo.store import keep_others_out

pytestmark = pytest.mark.usefixtures("in_memory")

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
    picture = Image.new("RGBA", (32, 32))
    picture.paste((0, 255, 0, 153), (0, 0, 32, 16))
    picture.paste((255, 0, 0, 153), (0, 24, 32, 32))
    picture.save(path)
    return path


def test_a_run_leaves_all_that_the_paper_shows_of_one(run):
    status, out = run("color", "--updates", "2", *SMALL)
    assert status == 0
    kept = load_run(out)
    assert kept.count == kept.settings.updates == 2
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [0, 1, 2]
    assert {"reward", "reward_std", "grad_norm", "seconds"} <= lines[2].keys()
    assert [line["reward_name"] for line in lines] == [None, "less blue", "less blue"]
    assert all(line["scores"]["less blue"]["held_out"] <= 0 for line in lines)
    assert -1 <= lines[2]["reward"] <= 0
    loaded = load_lora(out / "lora")
    assert all(torch.equal(loaded.weights[n], w) for n, w in kept.lora.weights.items())
    for name in ("heat/0002.jpg", "lora/strip.png", "lora/reward.png"):
        assert Image.open(out / name).width > 100
    assert {path.name for path in out.iterdir()} == {
        "run.json", "updates", "lora", "metrics.jsonl", "heat", "run.yaml", ".in-use"
    }  # fmt: skip
    assert kept.updates[2].settings.prompt == "a lake"
    assert kept.updates[2].reward == RewardSpec("color")


@pytest.mark.parametrize("blur", ["0", "inf"])
def test_a_painted_picture_is_a_wish_on_any_picture(run, tmp_path, blur, capsys):
    painting = str(painted(tmp_path / "p.png"))
    status, out = run("paint", "--map", painting, "--updates", "2", "--blur", blur, *SMALL)
    assert status == 0 and "wish is met" not in capsys.readouterr().out
    kept = load_run(out)
    assert kept.count == 2 and kept.reward == RewardSpec("paint")
    (wish,) = kept.painted
    assert torch.equal(wish.picture, kept.updates[0].shown[0])
    assert (wish.paint[:8] == 2).all() and (wish.paint[12:] == -2).all()
    assert not wish.paint[8:12].any() and wish.paint.shape == (16, 16)  # the picture's
    assert [update.settings.images for update in kept.updates] == [2, 2, 2]
    assert [len(update.latent_reward) for update in kept.updates] == [0, 2, 2]
    one, other = kept.updates[1].latent_reward  # each judged for itself
    assert not torch.equal(one, other)
    assert len(kept.latest) == 3


def test_several_maps_add_up_and_the_later_word_on_a_pixel_counts(run, tmp_path):
    red = Image.new("RGBA", (32, 32))
    red.paste((255, 0, 0, 255), (0, 0, 32, 8))
    red.save(tmp_path / "red.png")
    maps = ["--map", str(painted(tmp_path / "p.png")), "--map", str(tmp_path / "red.png")]
    status, out = run("paint", *maps, "--updates", "1", *SMALL)
    assert status == 0
    (wish,) = load_run(out).painted
    assert (wish.paint[:4] == -2).all() and (wish.paint[4:8] == 2).all()
    assert (wish.paint[12:] == -2).all() and not wish.paint[8:12].any()


def test_a_wish_sees_with_the_segmenter_that_is_named(run, segmenter, tmp_path):
    painting = ["paint", "--map", str(painted(tmp_path / "p.png")), "--updates", "1", *SMALL]
    _, out = run(*painting)
    alone = load_run(out)
    shutil.rmtree(out)
    status, _ = run(*painting, "--segmenter", segmenter.name)
    assert status == 0 and load_run(out).latest != alone.latest
    assert load_run(out).reward.options["segmenter"] == segmenter.name
    assert run("resume", str(out), "--updates", "2", model=False)[0] == 0


def test_a_run_that_another_process_is_at_is_left_to_it(run, tmp_path, capsys):
    status, out = run("color", "--updates", "1", *SMALL)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with keep_others_out(out):
        assert run("resume", str(out), "--updates", "2", model=False)[0] == 2
        assert "another process works in" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in before} == before
    assert run("resume", str(out), "--updates", "2", model=False)[0] == 0
    assert load_run(out).count == 2
    nothing = tmp_path / "not a run"
    nothing.mkdir()
    assert run("resume", str(nothing), model=False)[0] == 2
    assert not list(nothing.iterdir())  # what is no run is left as it is


def test_a_run_of_a_page_is_left_to_the_page(run, tmp_path, capsys):
    _, out = run("color", "--updates", "1", *SMALL)
    with keep_others_out(out.parent):
        assert run("resume", str(out), "--updates", "2", model=False)[0] == 2
    assert f"another process works in {str(out.parent)!r}" in capsys.readouterr().err
    assert load_run(out).count == 1
    assert run("resume", str(out), "--updates", "2", model=False)[0] == 0


def test_a_run_is_its_command_s_alone_while_it_learns(run, monkeypatch):
    found = []

    def train(model, run, judge, folder, log_with):
        with pytest.raises(RunError, match="another process works in"):
            keep_others_out(folder)
        found.append(folder)
        return 0

    monkeypatch.setattr("pxpo.__main__.train", train)
    assert run("color", "--updates", "1", *SMALL)[0] == 0 and found


def test_a_wish_that_is_met_ends_the_run_early(run, tmp_path, capsys, monkeypatch):
    answers = iter([False, False, True])  # at the beginning, and after each update
    monkeypatch.setattr(Wish, "met", lambda wish, maps: next(answers))
    painting = str(painted(tmp_path / "p.png"))
    status, out = run("paint", "--map", painting, "--updates", "9", *SMALL)
    assert status == 0 and load_run(out).count == 2
    assert "the wish is met" in capsys.readouterr().out
    assert load_lora(out / "lora").rank == 2
    status, _ = run("resume", str(out), model=False)
    assert status == 0 and load_run(out).count == 2  # there is nothing more to learn
    assert "the wish is met" in capsys.readouterr().out


def exact(run, tmp_path: Path, *arguments: str, updates: str = "3") -> tuple[int, Path]:
    """A run by two maps, one for each update, the last stays."""
    Image.new("RGBA", (40, 40), (0, 255, 0, 153)).save(tmp_path / "green.png")
    maps = ["--map", str(painted(tmp_path / "p.png")), "--map", str(tmp_path / "green.png")]
    return run("paint", *maps, "--updates", updates, *arguments, *SMALL[:2], *SMALL[4:])


@pytest.mark.parametrize("how", ["--exact", "--paper"])
def test_the_map_itself_is_the_reward_of_the_run_s_own_picture(run, tmp_path, how, capsys):
    status, out = exact(run, tmp_path, how)
    said = capsys.readouterr().out
    assert status == 0 and "wish" not in said and "Done: 3 updates" in said
    kept = load_run(out)
    rewards = [update.metrics["reward"] for update in kept.updates[1:]]
    assert rewards == pytest.approx([0.5, 2.0, 2.0], abs=1e-6)
    assert [len(update.latent_reward) for update in kept.updates] == [0, 1, 1, 1]
    settings = kept.settings
    assert (settings.noise, settings.images, settings.baseline) == ("own", 1, "none")
    assert (settings.step_noise == "drawn") == (how == "--paper")
    assert kept.reward.exact and len(kept.latest) == 4


def test_the_paper_s_recipe_is_that_of_its_equation(run, tmp_path):
    _, out = exact(run, tmp_path, "--paper", updates="1")
    settings = load_run(out).settings
    assert (settings.strength, settings.hold, settings.timesteps) == (0, 0, 1)
    assert (settings.step_noise, settings.unconditional) == ("drawn", "exact")


def test_a_run_by_the_map_itself_goes_on_by_it_and_stops_for_no_wish(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Wish, "met", lambda wish, maps: True)
    _, out = exact(run, tmp_path, "--exact", updates="1")
    assert run("resume", str(out), "--updates", "3", model=False)[0] == 0
    kept = load_run(out)
    assert [u.metrics["reward"] for u in kept.updates[1:]] == pytest.approx([0.5, 2, 2], abs=1e-6)
    shutil.rmtree(out)
    exact(run, tmp_path, "--exact")
    straight = load_run(out)
    assert all(torch.equal(straight.lora.weights[n], w) for n, w in kept.lora.weights.items())


@pytest.mark.parametrize("how", [["--paper"], []])
def test_labels_are_painted_by_a_segmenter_and_the_run_is_resumed(run, segmenter, how):
    labels = ["--more", "Hair", "--less", "Background", "--segmenter", segmenter.name]
    small = SMALL[:2] + SMALL[4:] if how else SMALL
    status, out = run("paint", *labels, "--updates", "1", *how, *small)
    assert status == 0
    assert run("resume", str(out), "--updates", "2", model=False)[0] == 0
    kept = load_run(out)
    assert kept.count == 2 and kept.painted == () and len(kept.latest) == 3
    assert kept.reward.name == "painted by a segmenter, more Hair and less Background"
    assert (kept.settings.strength == 0) == bool(how)
    assert kept.settings.noise == ("fresh" if how else "own")


def test_a_wish_that_was_resumed_equals_one_that_never_stopped(run, tmp_path):
    painting = ["paint", "--map", str(painted(tmp_path / "p.png")), *SMALL]
    _, out = run(*painting, "--updates", "1")
    assert run("resume", str(out), "--updates", "2", model=False)[0] == 0
    kept = load_run(out)
    shutil.rmtree(out)
    run(*painting, "--updates", "2")
    straight = load_run(out)
    assert straight.latest == kept.latest and straight.count == kept.count == 2
    assert all(torch.equal(straight.lora.weights[n], w) for n, w in kept.lora.weights.items())


def test_a_forgotten_wish_is_not_resumed(run, tmp_path, capsys):
    _, out = run("paint", "--map", str(painted(tmp_path / "p.png")), "--updates", "1", *SMALL)
    save_run(replace(load_run(out), painted=()), out)
    assert run("resume", str(out), "--updates", "2", model=False)[0] == 2
    assert "no wish any more" in capsys.readouterr().err


def test_strength_and_the_model_s_own_settings(run, model, capsys):
    model.defaults = {"steps": 5, "guidance_scale": 2.5, "images": 4}
    status, out = run("color", "--updates", "1", "--strength", "0.08", *SMALL[2:])
    assert status == 0
    kept = load_run(out)
    assert kept.settings.strength == 0.08
    assert kept.updates[1].metrics["moved"] == pytest.approx(0.08, rel=0.16)
    assert (kept.settings.steps, kept.settings.guidance_scale) == (5, 2.5)
    assert f"| steps | `{kept.settings.steps}` |" in (out / "lora" / "README.md").read_text()
    with pytest.raises(SystemExit):
        cli.main(["paint", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    helped = told.split("options: ")[1]
    for flag in ("--steps INT", "--guidance-scale FLOAT", "--images INT"):
        assert "(the model's own)" in helped.split(flag)[1].split(" --")[0]
    assert "(0.03)" in helped.split("--strength FLOAT")[1].split(" --")[0]


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
    small = ["--updates", "1", *SMALL, "--seed", "7"]
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
    assert load_run(out).painted[0].paint.mean() == pytest.approx(0.5, abs=0.1)
    shutil.rmtree(out)
    for name, words in (("other", "differs from the run's own"), ("bare", "nothing is painted")):
        capsys.readouterr()
        status, _ = run("paint", "--map", str(tmp_path / f"{name}.png"), *small)
        error = capsys.readouterr().err
        assert status == 2 and words in error and f"{name}.png" in error
        assert not out.exists()


def test_a_resumed_run_equals_one_that_never_stopped(run, model_folder, tmp_path):
    run("color", "--updates", "1", *SMALL)
    status, out = run("resume", str(tmp_path / "run"), "--updates", "3", model=False)
    assert status == 0
    straight = tmp_path / "straight"
    where = ["--model", str(model_folder), "--out", str(straight)]
    cli.main(["color", "--updates", "3", *SMALL, *where])
    one, other = load_run(out), load_run(straight)
    assert one.count == other.count == 3
    assert all(torch.equal(one.lora.weights[n], other.lora.weights[n]) for n in one.lora.weights)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["color", "--eta", "0"], ["eta", "0.0", "greater than 0"]),
        (["color", "--images", "none"], ["images", "'none'", "number"]),
        (["color", "--images", "5000"], ["5000", "1024"]),
        (["color", "--baseline", "both"], ["both", "none, global, location"]),
        (["color", "--strength", "2"], ["strength", "2.0", "most it can be is 1"]),
        (["color", "--epochs", "1"], ["--epochs"]),
        (["color", "--color", "blurple"], ["blurple", "orange"]),
        (["color", "--model", "/nowhere"], ["/nowhere", "cannot be loaded"]),
        (["color", "--images", "1"], ["baseline", "at least 2"]),
        (["paint"], ["--map", "--more"]),
        (["paint", "--map", "/nowhere.png"], ["/nowhere.png", "cannot be read"]),
        (["paint", "--exact"], ["--map", "--more"]),
        (["paint", "--more", "Lake", "--exact"], ["--exact is for --map"]),
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
    run("color", "--updates", "1", *SMALL)
    status, out = run("color", "--updates", "1", *SMALL)
    assert status == 2
    assert f"resume {out}" in capsys.readouterr().err


@pytest.mark.parametrize("during", ["load_model", "begin", "judge_of"])
def test_ctrl_c_before_the_first_update_leaves_no_folder(tmp_path, monkeypatch, capsys, during):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"pxpo.__main__.{during}", interrupted)
    assert cli.main(["color", *SMALL, "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Stopped."
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(model_folder, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "pxpo", "color", "--updates", "100000", *SMALL,
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


@pytest.fixture
def diverges(monkeypatch):
    """Let the update after `count` others turn pictures to noise."""

    def diverges(count: int) -> None:
        def taught(model, run, *rest):
            if run.count == count:
                raise DivergedError("It would turn pictures to noise.")
            return teach(model, run, *rest)

        teach = cli.teach
        monkeypatch.setattr(cli, "teach", taught)

    return diverges


@pytest.mark.parametrize(
    ("how", "smaller"), [([], "--strength"), (["--paper"], "--learning-rate")], ids=["", "paper"]
)
def test_a_run_that_diverges_keeps_what_was_done_and_says_the_way_on(
    run, diverges, capsys, how, smaller
):
    diverges(2)
    status, out = run("color", "--updates", "4", *how, *SMALL)
    assert status == 2 and capsys.readouterr().err.splitlines()[-1] == (
        "pxpo: It would turn pictures to noise. Stopped after update 2; all of it is kept. To "
        f"resume it would end the same way: begin another run with a smaller {smaller}."
    )
    kept = load_run(out)
    assert kept.count == 2 and len((out / "metrics.jsonl").read_text().splitlines()) == 3
    loaded = load_lora(out / "lora")
    assert all(torch.equal(loaded.weights[n], w) for n, w in kept.lora.weights.items())
    assert Image.open(out / "lora" / "strip.png").width > 100


def test_a_run_that_diverges_at_once_claims_nothing(run, diverges, capsys):
    diverges(0)
    status, out = run("color", "--updates", "4", *SMALL)
    assert status == 2 and capsys.readouterr().err.splitlines()[-1] == (
        "pxpo: It would turn pictures to noise. No update was taken. To resume it would end the "
        "same way: begin another run with a smaller --strength."
    )
    assert load_run(out).count == 0 and not (out / "lora").exists()


def test_a_run_is_pushed_from_its_folder(run, capsys, monkeypatch):
    hub = Hub()
    hub.tokens["hf_secret"] = {"name": "ada", "orgs": [], "rights": ["write"]}
    monkeypatch.setattr("pxpo.hub.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    _, out = run("color", "--updates", "1", *SMALL)
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
    _, out = run("color", "--updates", "1", *SMALL)
    learnt = load_run(out).lora
    where = ["--lora", str(out / "lora"), "--model", load_run(out).model_name]
    assert cli.main(["color", "--updates", "1", *SMALL, *where, "--out", str(tmp_path / "b")]) == 0
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
    small = [*SMALL[:2], *SMALL[4:], "--model", "model", "--updates", "1"]
    exact = ["paint", "--exact", "--map", "first.png", "--map", "second.png"]
    painted(here / "first.png")
    Image.new("RGBA", (40, 40), (0, 255, 0, 153)).save(here / "second.png")
    assert cli.main([*exact, *small, "--out", "painted"]) == 0
    label = ["--label", "Hair", "--segmenter", "segmenter", "--images", "2"]
    assert cli.main(["segment", *label, *small, "--out", "segmented"]) == 0
    (here / "first.png").unlink()
    (here / "second.png").unlink()
    monkeypatch.chdir(there)
    for name in ("painted", "segmented"):
        assert cli.main(["resume", f"../here/{name}", "--updates", "2"]) == 0
    run = load_run(here / "painted")
    rewards = [update.metrics["reward"] for update in run.updates[1:]]
    assert rewards == pytest.approx([0.5, 2.0], abs=1e-6)


def test_a_run_of_an_earlier_version_is_said_so(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"format": 3, "updates": []}')
    assert cli.main(["resume", str(tmp_path)]) == 2
    assert "format 3, of another version" in capsys.readouterr().err


def test_a_run_without_a_reward_is_not_resumed(model, tmp_path, capsys):
    save_run(finish(begin(model, settings_for("paint", steps=2, rank=2, shown=1))), tmp_path)
    assert cli.main(["resume", str(tmp_path)]) == 2
    assert "names no reward" in capsys.readouterr().err


def test_a_run_whose_model_was_moved_goes_on(run, model_folder, tmp_path, capsys):
    shutil.copytree(model_folder, tmp_path / "before")
    where = ["--model", str(tmp_path / "before"), "--out", str(tmp_path / "run")]
    assert run("color", "--updates", "1", *SMALL, *where, model=False)[0] == 0
    (tmp_path / "before").rename(tmp_path / "after")
    more = ["resume", str(tmp_path / "run"), "--updates", "2"]
    assert run(*more, model=False)[0] == 2
    assert "before" in capsys.readouterr().err
    assert run(*more, "--model", str(tmp_path / "after"), model=False)[0] == 0
    assert load_run(tmp_path / "run").model_name == str(tmp_path / "after")
