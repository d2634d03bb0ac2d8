"""run.yaml: a run's own file makes it again, other options win, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from pxpo import __main__ as cli
from pxpo import load_run
from pxpo.run import Run

pytestmark = pytest.mark.usefixtures("in_memory")

SMALL = ["--steps", "2", "--images", "2", "--shown", "2", "--rank", "2", "--updates", "1"]


@pytest.fixture
def again(model_folder, tmp_path):
    """The run of a command, and the one of its run.yaml."""

    def again(*arguments: str) -> tuple[Run, Run]:
        out = tmp_path / "run"
        where = ["--model", str(model_folder), "--out", str(out)]
        assert cli.main([*arguments, *where]) == 0
        from_file = [arguments[0], "--config", str(out / "run.yaml"), "--out", f"{out}-again"]
        assert cli.main(from_file) == 0
        return load_run(out), load_run(Path(f"{out}-again"))

    return again


def assert_alike(one: Run, other: Run) -> None:
    assert (one.settings, one.reward, one.model_name) == (
        other.settings, other.reward, other.model_name
    )  # fmt: skip
    assert one.count == other.count > 0 and one.latest == other.latest
    assert all(torch.equal(one.lora.weights[n], w) for n, w in other.lora.weights.items())


def test_the_file_makes_the_run_again(again, tmp_path):
    prompts = ["--prompt", "a: lake", "--prompt", "- a hill", "--held-out-prompt", "snow ☃"]
    some = ["--more", "--color", "#ff8800", "--blur", "inf", "--hold", "1e-5", "--seed", str(2**52)]
    one, other = again("color", *prompts, *some, *SMALL)
    assert_alike(one, other)
    assert one.settings.prompts == ("a: lake", "- a hill") and one.reward.options["more"]
    written = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    assert written["prompt"] == ["a: lake", "- a hill"] and written["held_out_prompt"] == ["snow ☃"]
    assert written["command"] == "color" and written["guidance_scale"] == 7.5  # the model's own


def test_an_empty_prompt_is_no_prompt_left_out(again):
    one, other = again("color", "--prompt", "", *SMALL)
    assert_alike(one, other)
    assert other.settings.prompt == ""


def test_the_paper_s_maps_are_found_again(again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGBA", (8, 8), (0, 255, 0, 153)).save("green.png")
    small = [*SMALL[:2], *SMALL[4:]]
    one, other = again("paint", "--paper", "--map", "green.png", "--prompt", "a lake", *small)
    assert_alike(one, other)
    assert other.reward.exact and other.settings.step_noise == "drawn"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Run a command up to its model, with this in its file; its options."""

    class Reached(Exception):
        pass

    def config(text: str, *arguments: str, command: str = "color"):
        def reached(*values, **options):
            raise Reached

        settings = []
        monkeypatch.setattr(cli, "load_model", reached)
        monkeypatch.setattr(
            cli, "settings_for", lambda *v, **o: settings.append(real(*v, **o)) or settings[-1]
        )
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(Reached):
            cli.main([command, "--config", str(tmp_path / "run.yaml"), *arguments])
        return settings[-1]

    real = cli.settings_for
    return config


def test_other_options_win_over_the_file(config, tmp_path):
    text = "steps: 7\nprompt: [a, b]\nlearning_rate: 1e-3\nimages: 4\n"
    some = config(text, "--images", "6")
    assert (some.steps, some.images, some.learning_rate) == (7, 6, 0.001)
    assert some.prompts == ("a", "b")
    assert config(text, "--prompt", "c").prompts == ("c",)
    (tmp_path / "more.txt").write_text("d\ne")
    assert config(text, "--prompts", str(tmp_path / "more.txt")).prompts == ("d", "e")
    assert config("paper: true").step_noise == "drawn"
    assert config("paper: false").step_noise == "expected"
    assert config("paper: true", "--no-paper").step_noise == "expected"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepps: 3", "has 'stepps', which color has not: 'steps'?"),
        ("labels: Hair", "has 'labels', which color has not"),
        ("parser: 3", "has 'parser', which color has not"),
        ("3: 3", "has 3, which color has not"),
        ("steps: 0", "argument --steps: steps is 0; the least it can be is 1"),
        ("steps: {a: 1}", "no plain value for 'steps'"),
        ("command: paint", "of another command than 'color'"),
        ("just words", "must hold names and values"),
        ("a: [", "cannot be read"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(text, words, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    try:
        status = cli.main(["color", "--config", str(tmp_path / "run.yaml")])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.count("\n") == 1


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert cli.main(["color", "--config", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml' cannot be read" in capsys.readouterr().err
