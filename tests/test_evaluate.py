"""Measures of what learning changed, and a run's LoRA judged beside its base."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import random_lora

from pxpo import (
    ColorReward,
    Noise,
    RewardSpec,
    Tools,
    begin,
    evaluate,
    finish,
    generate,
    learn,
    paint,
    rollout,
    save_run,
    settings_for,
)
from pxpo import __main__ as cli
from pxpo.errors import RewardError, RunError, SettingError
from pxpo.evaluate import SECOND, summary
from pxpo.measures import (
    HELD_OUT,
    by_region,
    colours,
    diversity,
    drift,
    held_out,
    likeness,
    movement,
    own_and_others,
    queries_to,
    regions,
    sampled,
    seeds_seen,
    signed,
    spread,
)
from pxpo.pages import Figure, Heading, Numbers, Points, Table, Text, as_markdown, as_page

SMALL = {"steps": 2, "images": 2, "shown": 1, "rank": 2, "prompt": "a lake"}


@pytest.fixture
def run(model):
    """A run with a LoRA that changes its pictures much, as after one update."""
    begun = finish(begin(model, settings_for("color", **SMALL), reward=RewardSpec("color")))
    begun = finish(generate(model, begun))
    taught = finish(learn(model, begun, ColorReward("blue")(begun.trajectory.images)))
    last = replace(taught.updates[-1], lora=random_lora(model))
    return replace(taught, updates=(taught.updates[0], last))


# Measures.


def test_drift_inside_and_outside_are_told_apart_by_the_reward():
    before, after, maps = torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4), torch.zeros(1, 1, 4)
    after[..., 0], after[..., 3] = 0.6, 0.2
    maps[..., 0], maps[..., 1] = -2, 1  # wholly inside, half inside
    inside, outside = drift(before, after, maps)
    assert inside == pytest.approx(0.6 / 1.5)
    assert outside == pytest.approx(0.2 / 2.5)
    assert drift(before, after, torch.zeros(1, 1, 4)) == pytest.approx((0, 0.2))
    assert drift(before, after, torch.ones(1, 1, 4)) == pytest.approx((0.2, 0))


def test_diversity_is_the_share_of_the_spread_over_seeds_that_is_left():
    before = torch.rand((4, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    assert diversity(before, before) == pytest.approx(1)
    assert diversity(before, before[0:1].expand(4, -1, -1, -1)) == 0
    assert diversity(before, 0.25 * before + 0.7) == pytest.approx(0.25)
    loud = torch.cat([before[:, :1] * 100, before[:, 1:]], dim=1)
    still = torch.cat([before[:, :1] * 100, before[:, 1:] * 0], dim=1)
    assert diversity(loud, still) == pytest.approx(1 / 3)  # channels count alike


def test_the_second_judge_finds_again_what_the_reward_spoke_of():
    """By looks: red is worth 1, all else nothing; a later picture has no louder word."""
    red, green = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    pictures = torch.zeros(3, 3, 8, 8)
    pictures[0] = red.view(3, 1, 1)
    pictures[1] = green.view(3, 1, 1)
    pictures[2, :, :, :4], pictures[2, :, :, 4:] = red.view(3, 1, 1), green.view(3, 1, 1)
    judge = likeness(pictures, pictures[:, 0], colours((8, 8)))
    other = pictures[2:].flip(3)  # green on the left
    torch.testing.assert_close(judge(other)[0], other[0, 0], atol=0.02, rtol=0)
    assert (judge.loudness == 0).all() and judge.values.shape == (3, 64)


def test_colours_are_the_mean_colour_and_the_height():
    images = torch.rand((2, 3, 4, 6), generator=torch.Generator().manual_seed(0))
    seen = colours((2, 3))(images)
    assert seen.shape == (2, 4, 2, 3)
    torch.testing.assert_close(seen[1, 2, 1, 2], images[1, 2, 2:, 4:].mean())
    assert seen[0, 3].tolist() == [[-1] * 3, [1] * 3]


def test_regions_part_a_map_and_tell_what_was_done_to_oneself_from_what_to_others():
    masks = regions((4, 6), (2, 3))
    assert masks.shape == (6, 4, 6) and (masks.sum(0) == 1).all()
    assert masks[1, :2, 2:4].all() and masks[1].sum() == 4
    halves = regions((2, 4), (1, 2))
    maps = torch.tensor([[[3.0, 3, 1, 1]] * 2, [[0, 0, 5, 7]] * 2])
    matrix = by_region(maps, halves)
    assert matrix.tolist() == [[3, 1], [0, 6]]
    assert own_and_others(matrix) == (4.5, 0.5)


def test_movement_is_what_the_lora_makes_the_network_say_otherwise(model):
    lora = random_lora(model)
    base = finish(sampled(model, None, "a lake", [1, 2], settings_for("color", steps=2)))
    assert movement(model, replace(lora, weights={n: 0 * w for n, w in lora.weights.items()}),
                    base).max() < 1e-5  # fmt: skip
    moved = movement(model, lora, base)
    assert moved.shape == (8, 8) and moved.min() > 1e-3
    first = finish(sampled(model, lora, "a lake", [1, 2], settings_for("color", steps=2)))
    at = base.steps[0]
    now, before = (at.velocity(one.latents[0], one.outputs[0]) for one in (first, base))
    change = (now - before).square().mean((0, 1))
    one_step = replace(base, outputs=base.outputs[:1], latents=base.latents[:1],
                       steps=base.steps[0:1])  # fmt: skip
    torch.testing.assert_close(movement(model, lora, one_step), change.sqrt())


@pytest.mark.parametrize(
    "target, queries", [(0.5, 15), (1, 20), (3, 40), (-1, 0), (0, 0), (3.1, None)]
)
def test_queries_to_a_reward_are_read_between_two_measurements(target, queries):
    assert queries_to(target, [0, 10, 20, 40], [0, 0, 1, 3]) == queries


def test_numbers_have_a_minus_of_their_own_and_zero_has_none():
    assert (signed(-0.0004, 3), signed(-0.25, 1), signed(0.5, 0)) == ("0.000", "−0.2", "0")
    assert spread([0.1, 0.3]) == "20.0 ± 10.0"
    assert (spread([-0.5], 2, 1), spread([])) == ("−0.50", "–")


# Seeds that no update saw.


def test_the_seeds_seen_are_those_of_the_images_learnt_from(model, run):
    seen = seeds_seen(run)
    assert 0 in seen and len(seen) == 2
    (other,) = seen - {0}
    again = finish(generate(model, replace(run, updates=run.updates[:1], trajectory=None)))
    drawn = finish(rollout(model, ["a lake"], [Noise(other)], run.settings)).latents[0]
    assert torch.equal(again.trajectory.latents[0, 1], drawn[0])


def test_a_seed_that_was_learnt_from_is_not_held_out(model, run):
    assert held_out(3) == [HELD_OUT, HELD_OUT + 1, HELD_OUT + 2]
    assert held_out(2, {HELD_OUT, HELD_OUT + 2}) == [HELD_OUT + 1, HELD_OUT + 3]
    settings = replace(run.settings, seed=HELD_OUT)
    updates = tuple(replace(one, settings=settings) for one in run.updates)
    run = replace(run, settings=settings, updates=updates)
    seeds, _ = finish(evaluate.evaluate(model, run, Tools(), seeds=2))
    assert seeds == [HELD_OUT + 1, HELD_OUT + 2]


# Evaluation.


def test_the_lora_is_judged_beside_its_base_on_the_same_seeds(model, run):
    seeds, (one,) = finish(evaluate.evaluate(model, run, Tools(), seeds=3))
    noise = [Noise(seed) for seed in seeds]
    base = finish(rollout(model, ["a lake"] * 3, noise, run.settings)).images
    torch.testing.assert_close(one.before, base)
    learnt = finish(sampled(model, run.lora, "a lake", seeds, run.settings)).images
    torch.testing.assert_close(one.after, learnt)
    assert (learnt - base).abs().max() > 0.01
    before, after = one.judges["less blue"]
    assert before == pytest.approx((-base[:, 2]).mean((1, 2)).tolist())
    assert after == pytest.approx((-one.after[:, 2]).mean((1, 2)).tolist())
    assert one.drift == pytest.approx(drift(base, one.after, -base[:, 2]))
    expected = diversity(*map(model.features, (base, one.after)))
    assert one.diversity == pytest.approx(expected, rel=1e-5)  # sampled in other batches
    assert list(one.judges) == ["less blue", SECOND] and one.learnt
    figures = summary([one], "less blue")
    assert figures["of"] == 3 and figures["higher"] == sum(
        b > a for a, b in zip(before, after, strict=True)
    )
    assert figures["change"]["mean"] == pytest.approx((sum(after) - sum(before)) / 3)


def test_a_judge_that_is_named_takes_the_place_of_the_other(model, run):
    judges = [RewardSpec("color", {"color": "red", "more": True})]
    _, (one,) = finish(evaluate.evaluate(model, run, Tools(), seeds=2, judges=judges))
    assert list(one.judges) == ["less blue", "more red"]
    assert one.judges["more red"][1] == pytest.approx(one.after[:, 0].mean((1, 2)).tolist())


def test_judges_of_the_same_name_are_told_apart(model, run):
    """None takes the place of the run's own."""
    named = RewardSpec("color", {"color": "blue"})
    with pytest.raises(RewardError, match="less blue, by color, is a judge already"):
        finish(evaluate.evaluate(model, run, Tools(), seeds=2, judges=[named, named]))
    _, (one,) = finish(evaluate.evaluate(model, run, Tools(), seeds=2, judges=[named]))
    assert list(one.judges) == ["less blue", "less blue, by color"]
    assert one.judges["less blue"] == one.judges["less blue, by color"]
    other = RewardSpec("segment", {"labels": ("Hair",), "segmenter": "some/where"})
    assert evaluate.told_apart(other, ["less Hair"]) == "less Hair, by where"


def test_held_out_prompts_are_judged_and_said_to_be(model, run):
    run = replace(run, settings=replace(run.settings, held_out_prompt="a tree"))
    _, parts = finish(evaluate.evaluate(model, run, Tools(), seeds=2))
    assert [(one.prompt, one.learnt) for one in parts] == [("a lake", True), ("a tree", False)]
    _, (one,) = finish(evaluate.evaluate(model, run, Tools(), seeds=2, prompts=["a sun"]))
    assert (one.prompt, one.learnt) == ("a sun", False)


def test_a_wish_is_seconded_by_colours_not_by_the_features_it_goes_by(model, run, monkeypatch):
    looks = []
    monkeypatch.setattr(evaluate, "likeness", lambda pictures, maps, look: looks.append(look) or
                        (lambda images: images[:, 0]))  # fmt: skip
    finish(evaluate.evaluate(model, run, Tools(), seeds=2))
    wish = paint(replace(run, reward=RewardSpec("paint")), 2 * torch.ones(16, 16))
    finish(evaluate.evaluate(model, wish, Tools(), seeds=2))
    assert looks[0] == model.features and looks[1](torch.zeros(1, 3, 16, 16)).shape[1] == 4


def test_the_page_and_its_figures(model_folder, run, tmp_path, capsys):
    settings = replace(run.settings, prompt="<b>a lake</b>", held_out_prompt="a & b")
    save_run(replace(run, settings=settings), tmp_path / "run")
    command = ["evaluate", str(tmp_path / "run"), "--seeds", "2", "--model", str(model_folder)]
    assert cli.main(command) == 0
    out = tmp_path / "run" / "evaluation"
    assert f"Written: {out / 'index.html'}" in capsys.readouterr().out
    figures = json.loads((out / "evaluation.json").read_text())
    page = (out / "index.html").read_text()
    assert figures["seeds"] == [HELD_OUT, HELD_OUT + 1] and figures["updates"] == 1
    assert [one["learnt"] for one in figures["prompts"]] == [True, False]
    assert figures["summary"].keys() == {"less blue", SECOND}
    assert figures["summary"]["less blue"]["of"] == 4
    assert page.count("<img") == 8 == page.count('src="data:image/jpeg;base64,')
    assert "&lt;b&gt;a lake&lt;/b&gt;" in page and "<b>" not in page and "a &amp; b" in page
    assert not re.search(r"(src|href)=\"?(http|/)|url\(|@import|<script", page)
    assert cli.main([*command, "--out", str(out / "index.html")]) == 2
    assert "cannot be saved in" in capsys.readouterr().err
    again = tmp_path / "again"
    assert cli.main([*command, "--out", str(again)]) == 0
    for name in ("evaluation.json", "index.html"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_what_cannot_be_evaluated_is_said(model, run, tmp_path, capsys):
    with pytest.raises(SettingError, match="at least 2"):
        finish(evaluate.evaluate(model, run, Tools(), seeds=1))
    with pytest.raises(RunError, match="names no reward"):
        finish(evaluate.evaluate(model, replace(run, reward=None), Tools()))
    save_run(run, tmp_path / "run")
    for judge, words in (("unicorn", "no reward called"), ("color --size 3", "no option"),
                         ("segment '", "must be one"), ("", "must be one"),
                         ("paint", "nothing is painted")):  # fmt: skip
        assert cli.main(["evaluate", str(tmp_path / "run"), "--judge", judge]) == 2
        assert words in capsys.readouterr().err


def test_a_judge_needs_labels_that_its_segmenter_knows():
    with pytest.raises(RewardError, match="Unicorn"):
        RewardSpec("segment", {"labels": ("Unicorn",)}).make(Tools())


# Pages.


def test_blocks_are_written_as_markdown_and_as_a_page():
    blocks = [
        Text("See `code` & <this>.", note=True),
        Heading("Figures"),
        Table(("a", "b"), [("x", "1"), ("", "2")]),
        Points(["one", "two"]),
        Figure("figures/a b.png", "A curve", 70, 36),
    ]
    assert as_markdown("Title", blocks).split("\n\n") == [
        "# Title",
        "> See `code` & <this>.",
        "## Figures",
        "| a | b |\n| --- | --- |\n| x | 1 |\n|  | 2 |",
        "- one\n- two",
        "![A curve](figures/a b.png)",
        "*A curve*\n",
    ]
    page = as_page("<Title>", [*blocks, Numbers([("1 → 2", "the & reward")])])
    assert "<dd>1 → 2</dd><dt>the &amp; reward</dt>" in page
    assert "<title>&lt;Title&gt;</title>" in page and "<h1>&lt;Title&gt;</h1>" in page
    assert "<p class=note>See <code>code</code> &amp; &lt;this&gt;.</p>" in page
    assert "<th scope=row>x</th><td>1</td>" in page and "<li>two</li>" in page
    assert 'src="figures/a b.png" alt="A curve" width=70 height=36' in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
