"""One run, one format: begun on the page, gone on with on the command line, and back; and the card
tells what each update was taught with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub_server import Hub
from test_run import assert_same
from test_studio import BLUE, PAINT, SMALL, paint

from pxpo import RewardSpec, Run, finish, load_run
from pxpo import __main__ as cli
from pxpo.store import open_run
from pxpo.studio import Studio

RED = RewardSpec("color", {"color": "red", "more": True})


@pytest.fixture
def studio(model, segmenter, tmp_path) -> Studio:
    return Studio(model, segmenter, tmp_path / "runs")


@pytest.fixture
def run(studio) -> Run:
    """A run of the page: taught by paint, by colour with settings of its own, and by colour."""
    run = finish(studio.start(**SMALL))
    finish(studio.step(run.id, PAINT, paint()))
    finish(studio.step(run.id, BLUE, images=2, learning_rate=0.005))
    return finish(studio.step(run.id, RED, images=3))


def card_of(lora: Path) -> str:
    return (lora / "README.md").read_text(encoding="utf-8")


def row(card: str, reward: str) -> str:
    return next(line for line in card.splitlines() if f"| {reward} |" in line)


def test_from_the_page_to_the_command_line_to_the_page(studio, run, tmp_path, capsys):
    archive = studio.archive(run.id)
    zipped = tmp_path / "downloaded.zip"
    zipped.write_bytes(archive.read_bytes())
    assert cli.main(["resume", str(zipped), "--epochs", "4"]) == 0
    folder = tmp_path / "downloaded-1"
    assert f"Unpacked into {folder}" in capsys.readouterr().out
    assert cli.main(["resume", str(folder), "--epochs", "5"]) == 0
    on_the_way = load_run(folder)
    assert [one.reward and one.reward.name for one in on_the_way.updates] == [
        None, "painted", "less blue", "more red", "more red", "more red"
    ]  # fmt: skip
    assert [one.settings.images for one in on_the_way.updates[1:]] == [1, 2, 3, 3, 3]
    assert cli.main(["pack", str(folder)]) == 0
    again = studio.admit(tmp_path / "downloaded-1.zip")
    assert_same(again, on_the_way)
    assert len(again.latest) == 6 and again.reward == RED
    assert torch.equal(again.paint, run.paint)
    went_on = finish(studio.step(run.id, RED, images=3))
    assert torch.equal(went_on.updates[4].shown, again.updates[4].shown)  # as on the page itself
    after = finish(studio.step(again.id, PAINT, paint()))
    assert after.count == 6 and after.updates[6].settings == run.updates[1].settings


def test_from_the_command_line_to_the_page_to_the_command_line(
    studio, model_folder, tmp_path, capsys
):
    out = tmp_path / "mine"
    small = ["--steps", "3", "--rank", "2", "--shown", "2", "--images", "2", "--prompt", "a"]
    begun = ["color", "--color", "red", "--more", *small, "--epochs", "1"]
    assert cli.main([*begun, "--model", str(model_folder), "--out", str(out)]) == 0
    assert cli.main(["pack", str(out)]) == 0
    run = studio.admit(tmp_path / "mine.zip")
    assert_same(run, load_run(out))
    assert run.reward == RED and len(run.latest) == 2 and run.paint is None
    assert studio.curve(run) is not None and studio.heat(run, RED).size == (16, 16)
    run = finish(studio.step(run.id, PAINT, paint()))
    run = finish(studio.back(run.id, 1))
    run = finish(studio.step(run.id, RED, images=2))
    straight = tmp_path / "straight"
    begun[-1] = "2"
    assert cli.main([*begun, "--model", str(model_folder), "--out", str(straight)]) == 0
    assert torch.equal(run.updates[2].shown, load_run(straight).updates[2].shown)
    archive = studio.archive(run.id)
    assert cli.main(["resume", str(archive), "--epochs", "3"]) == 0
    _, folder = open_run(archive)
    assert load_run(folder).count == 2  # the archive itself is as it was


def test_a_folder_of_the_page_is_resumed_in_its_place(studio, run):
    folder = studio.folder / run.id
    assert cli.main(["resume", str(folder), "--epochs", "4"]) == 0
    assert load_run(folder).count == 4
    studio.forget(run.id)
    assert studio.run(run.id).count == 4


def test_paint_of_the_page_goes_on_on_the_command_line(studio, tmp_path):
    run = finish(studio.start(**SMALL))
    finish(studio.step(run.id, PAINT, paint()))
    folder = studio.folder / run.id
    assert cli.main(["resume", str(folder), "--epochs", "2"]) == 0
    there = load_run(folder)
    here = finish(studio.step(run.id, PAINT, paint()))
    assert there.updates[2].metrics["reward"] == here.updates[2].metrics["reward"]
    for name, weight in here.lora.weights.items():
        assert torch.equal(there.lora.weights[name], weight)
    assert torch.equal(there.updates[2].shown, here.updates[2].shown)
    assert there.latest == here.latest


def test_a_run_of_the_page_is_pushed_from_the_command_line(studio, run, monkeypatch):
    hub = Hub()
    hub.tokens["hf_secret"] = {"name": "ada", "orgs": [], "rights": ["write"]}
    monkeypatch.setattr("pxpo.hub.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert cli.main(["push", str(studio.archive(run.id)), "ada/red"]) == 0
    card = hub.repos["ada/red"]["README.md"].decode()
    assert "ada/red" in card and "painted; less blue; more red" in card
    hub.shutdown()
    hub.server_close()


def test_the_card_tells_each_update_s_truth(studio, run):
    card = card_of(studio.lora_folder(run.id))
    assert "3 updates" in card and "The reward: painted; less blue; more red." in card
    assert row(card, "painted").startswith("| 1 |") and "images `1`" in row(card, "painted")
    assert "learning_rate `0.003`" in row(card, "painted")
    assert row(card, "less blue").startswith("| 2 |") and "images `2`" in row(card, "less blue")
    assert "learning_rate `0.005`" in row(card, "less blue")
    assert row(card, "more red").startswith("| 3 |") and "images `3`" in row(card, "more red")
    assert "| guidance_scale | `3.0` |" in card and "| learning_rate |" not in card


def test_a_run_by_one_reward_has_the_settings_that_taught_it(studio):
    run = finish(studio.start(**SMALL))
    for _ in range(2):
        finish(studio.step(run.id, BLUE, images=2, learning_rate=0.005))
    card = card_of(studio.lora_folder(run.id))
    assert row(card, "less blue") == "| 1 to 2 | less blue |  |"
    assert "| images | `2` |" in card and "| learning_rate | `0.005` |" in card
    assert "`1`" not in row(card.replace("eta | `1", ""), "less blue") and "0.003" not in card


def test_a_run_that_learnt_nothing_says_so(studio):
    run = finish(studio.start(**SMALL))
    card = card_of(studio.lora_folder(run.id))
    assert "0 updates" in card and "The reward: none yet." in card
