"""One run, one format: begun on the page, gone on with on the command line, and back; and the card
tells what each update was taught with."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from test_run import assert_same
from test_studio import BLUE, PAINT, SMALL, paint

from pxpo import RewardSpec, Run, Segmenter, Settings, finish, load_model, load_run
from pxpo import __main__ as cli
from pxpo.embedded import TINY_WORLD
from pxpo.store import open_run
from pxpo.studio import Studio

pytestmark = pytest.mark.usefixtures("in_memory")

RED = RewardSpec("color", {"color": "red", "more": True})


@pytest.fixture
def studio(model, segmenter, tmp_path) -> Studio:
    return Studio(model, segmenter, tmp_path / "runs")


@pytest.fixture(scope="module")
def taught(model_folder, segmenter, tmp_path_factory) -> Path:
    """The folder of a run of the page: taught by paint, by colour with settings of its own, and by
    colour."""
    model = load_model(model_folder, device="cpu")
    studio = Studio(model, segmenter, tmp_path_factory.mktemp("taught"))
    run = finish(studio.start(**SMALL))
    finish(studio.step(run.id, PAINT, paint()))
    finish(studio.step(run.id, BLUE, images=2, strength=0.05))
    finish(studio.step(run.id, RED, images=3))
    return studio.folder / run.id


@pytest.fixture
def run(studio, taught) -> Run:
    """That run, found in its folder."""
    shutil.copytree(taught, studio.folder / taught.name)
    return studio.run(taught.name)


def card_of(lora: Path) -> str:
    return (lora / "README.md").read_text(encoding="utf-8")


def row(card: str, reward: str) -> str:
    return next(line for line in card.splitlines() if f"| {reward} |" in line)


def test_from_the_page_to_the_command_line_to_the_page(studio, run, tmp_path, capsys):
    archive = studio.archive(run.id)
    zipped = tmp_path / "downloaded.zip"
    zipped.write_bytes(archive.read_bytes())
    assert cli.main(["resume", str(zipped), "--updates", "4"]) == 0
    folder = tmp_path / "downloaded-1"
    assert f"Unpacked into {folder}" in capsys.readouterr().out
    assert cli.main(["resume", str(folder), "--updates", "5"]) == 0
    on_the_way = load_run(folder)
    assert [one.reward and one.reward.name for one in on_the_way.updates] == [
        None, "painted", "less blue", "more red", "more red", "more red"
    ]  # fmt: skip
    assert [one.settings.images for one in on_the_way.updates[1:]] == [4, 2, 3, 3, 3]
    assert cli.main(["pack", str(folder)]) == 0
    again = studio.admit(tmp_path / "downloaded-1.zip")
    assert_same(again, on_the_way)
    assert len(again.latest) == 6 and again.reward == RED
    (ours,), (theirs,) = run.painted, again.painted
    assert torch.equal(ours.paint, theirs.paint) and torch.equal(ours.picture, theirs.picture)
    went_on = finish(studio.step(run.id, RED, images=3))
    assert torch.equal(went_on.updates[4].shown, again.updates[4].shown)  # as on the page itself
    after = finish(studio.step(again.id, PAINT, paint()))
    assert after.count == 6 and after.updates[6].settings == run.updates[1].settings
    assert len(after.painted) == 2  # what was painted before its travels counts on


def test_from_the_command_line_to_the_page_to_the_command_line(
    studio, model_folder, tmp_path, capsys
):
    out = tmp_path / "mine"
    small = ["--steps", "3", "--rank", "2", "--shown", "2", "--images", "2", "--prompt", "a"]
    begun = ["color", "--color", "red", "--more", *small, "--updates", "1"]
    assert cli.main([*begun, "--model", str(model_folder), "--out", str(out)]) == 0
    assert cli.main(["pack", str(out)]) == 0
    run = studio.admit(tmp_path / "mine.zip")
    assert_same(run, load_run(out))
    assert run.reward == RED and len(run.latest) == 2 and run.painted == ()
    assert studio.curve(run) is not None and studio.heat(run, RED).size == (16, 16)
    run = finish(studio.step(run.id, PAINT, paint()))
    run = finish(studio.go_to(run.id, 1))
    run = finish(studio.step(run.id, RED, images=2))
    straight = tmp_path / "straight"
    begun[-1] = "2"
    assert cli.main([*begun, "--model", str(model_folder), "--out", str(straight)]) == 0
    assert torch.equal(run.updates[2].shown, load_run(straight).updates[2].shown)
    archive = studio.archive(run.id)
    assert cli.main(["resume", str(archive), "--updates", "3"]) == 0
    _, folder = open_run(archive)
    assert load_run(folder).count == 2  # the archive itself is as it was


def test_a_folder_of_the_page_is_resumed_in_its_place(studio, run):
    folder = studio.folder / run.id
    assert cli.main(["resume", str(folder), "--updates", "4"]) == 0
    assert load_run(folder).count == 4
    studio.forget(run.id)
    assert studio.run(run.id).count == 4


def test_paint_of_the_page_goes_on_on_the_command_line(studio):
    run = finish(studio.start(**SMALL))
    finish(studio.step(run.id, PAINT, paint()))
    finish(studio.step(run.id, PAINT, paint(slice(20, 24), slice(0, 0))))
    folder = studio.folder / run.id
    assert cli.main(["resume", str(folder), "--updates", "3"]) == 0
    there = load_run(folder)
    assert len(there.painted) == 2
    here = finish(studio.step(run.id, PAINT))
    assert there.updates[3].metrics["reward"] == here.updates[3].metrics["reward"]
    for name, weight in here.lora.weights.items():
        assert torch.equal(there.lora.weights[name], weight)
    assert torch.equal(there.updates[3].shown, here.updates[3].shown)
    assert there.latest == here.latest


@pytest.mark.slow
@pytest.mark.skipif(
    not (TINY_WORLD / "model_index.json").exists(), reason="Tiny World has not been made"
)
def test_so_it_does_on_the_embedded_model_with_its_segmenter(tmp_path):
    studio = Studio(load_model(device="cpu"), Segmenter(), tmp_path / "runs")
    few = {"prompt": "nature landscape", "steps": 2, "shown": 1}
    run = finish(studio.start(**few, seed=12))
    finish(studio.step(run.id, PAINT, paint(), images=2))
    folder = studio.folder / run.id
    assert cli.main(["resume", str(folder), "--updates", "2"]) == 0
    here = finish(studio.step(run.id, PAINT, images=2))
    assert load_run(folder).latest == here.latest and len(here.latest) == 3


def test_a_wish_of_the_command_line_goes_on_on_the_page(studio, model_folder, tmp_path):
    painting, out = tmp_path / "p.png", tmp_path / "wished"
    paint().save(painting)
    begun = ["paint", "--map", str(painting), "--steps", "3", "--rank", "2", "--shown", "3"]
    begun += ["--prompt", "a", "--model", str(model_folder), "--segmenter", studio.segmenter.name]
    begun += ["--out", str(out), "--updates"]
    assert cli.main([*begun, "1"]) == 0 and cli.main(["pack", str(out)]) == 0
    run = studio.admit(tmp_path / "wished.zip")
    here = finish(studio.step(run.id, PAINT))
    shutil.rmtree(out)
    assert cli.main([*begun, "2"]) == 0
    straight = load_run(out)
    assert here.latest == straight.latest and len(here.latest) == 3
    assert torch.equal(here.updates[2].shown, straight.updates[2].shown)
    (ours,), (theirs,) = here.painted, straight.painted
    assert torch.equal(ours.paint, theirs.paint) and torch.equal(ours.picture, theirs.picture)


def test_a_run_by_the_map_itself_becomes_a_wish_on_the_page(studio, model_folder, tmp_path):
    painting, out = tmp_path / "p.png", tmp_path / "exact"
    paint().save(painting)
    begun = ["paint", "--exact", "--map", str(painting), "--map", str(painting), "--steps", "3"]
    begun += ["--rank", "2", "--shown", "2", "--prompt", "a", "--updates", "1"]
    assert cli.main([*begun, "--model", str(model_folder), "--out", str(out)]) == 0
    assert cli.main(["pack", str(out)]) == 0
    run = studio.admit(tmp_path / "exact.zip")
    assert run.reward.exact and len(run.painted) == 2
    after = finish(studio.step(run.id, PAINT))
    assert after.count == 2 and after.updates[2].settings.images == 4
    assert len(after.updates[2].latent_reward) == 4 and not after.reward.exact


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
    assert row(card, "painted").startswith("| 1 |") and "images `4`" in row(card, "painted")
    assert "strength `0.03`" in row(card, "painted")
    assert row(card, "less blue").startswith("| 2 |") and "images `2`" in row(card, "less blue")
    assert "strength `0.05`" in row(card, "less blue")
    assert row(card, "more red").startswith("| 3 |") and "images `3`" in row(card, "more red")
    assert "| guidance_scale | `7.5` |" in card and "| strength |" not in card
    assert "| steps | `3` |" in card and "| noise | `own` |" in card and "`None`" not in card
    left_out = ("learning_rate", "held_out_prompt")  # strength says how far; there is none
    named = [entry.name for entry in fields(Settings) if entry.name not in left_out]
    assert all(f"| {name} | `" in card or f"{name} `" in card for name in named)
    assert not any(name in card for name in left_out)


def test_the_card_names_a_rate_where_the_rate_counts(studio):
    run = finish(studio.start(**SMALL))
    finish(studio.step(run.id, BLUE, images=2, strength=0.05))
    finish(studio.step(run.id, RED, images=2, strength=0.0, learning_rate=0.005))
    card = card_of(studio.lora_folder(run.id))
    assert "learning_rate `0.005`" in row(card, "more red")
    assert "learning_rate" not in row(card, "less blue")


def test_a_run_by_one_reward_has_the_settings_that_taught_it(studio):
    run = finish(studio.start(**SMALL))
    for _ in range(2):
        finish(studio.step(run.id, BLUE, images=2, strength=0.05))
    card = card_of(studio.lora_folder(run.id))
    assert row(card, "less blue") == "| 1 to 2 | less blue |  |"
    assert "| images | `2` |" in card and "| strength | `0.05` |" in card
    assert "0.03" not in card


def test_a_run_that_learnt_nothing_says_so(studio):
    run = finish(studio.start(**SMALL))
    card = card_of(studio.lora_folder(run.id))
    assert "0 updates" in card and "The reward: none yet." in card
