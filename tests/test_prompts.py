"""Runs of several prompts: drawn for each update, compared each with its own, some held out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pxpo import (
    RewardSpec,
    begin,
    finish,
    generate,
    learn,
    load_run,
    save_run,
    scored,
    settings_for,
)
from pxpo import __main__ as cli
from pxpo.card import write_folder
from pxpo.credit import latent_credit, per_location, standardise
from pxpo.errors import SettingError
from pxpo.lora import adapter
from pxpo.rollout import Noise, rollout
from pxpo.run import shown_noise, shown_prompts, training_noise, training_prompts
from pxpo.settings import Credit, Settings
from pxpo.store import pack
from pxpo.studio import Studio

SMALL = ["--steps", "2", "--images", "4", "--shown", "2", "--rank", "2"]


def settings(*prompts: str, **changes) -> Settings:
    small = {"steps": 2, "guidance_scale": 2.0, "images": 4, "shown": 3, "rank": 2}
    return settings_for("paint", prompt="\n".join(prompts), **{**small, **changes})


def test_prompts_are_lines_without_empty_ones_and_repetitions():
    assert settings("a lake ").prompts == ("a lake ",)  # one is left as it is
    assert settings("a", " b ", "", "a").prompts == ("a", "b")
    assert settings("").prompts == ("",) and settings("a").held_out_prompts == ()
    with pytest.raises(SettingError, match="held_out_prompt is 'b', which is a prompt to learn on"):
        settings("a", "b", held_out_prompt="c\nb")


@pytest.mark.parametrize("images", [2, 3, 4, 5, 7, 16])
def test_every_drawn_prompt_has_two_images_at_least_and_an_even_share(images):
    some, total = settings("a", "b", "c", images=images), Counter()
    for count in range(600):
        prompts = training_prompts(some, count)
        assert len(prompts) == images and prompts == sorted(prompts)
        shares = Counter(prompts)
        assert len(shares) == min(3, images // 2) and min(shares.values()) >= 2
        assert max(shares.values()) - min(shares.values()) <= 1
        assert prompts == training_prompts(replace(some, updates=99), count)
        total += shares
    for prompt in "abc":  # each as often as the others: 4 standard deviations and more
        assert total[prompt] == pytest.approx(200 * images, rel=0.16)
    other = replace(some, seed=1)
    draws = ([training_prompts(one, count) for count in range(20)] for one in (some, other))
    assert images == 16 or images == 6 or len({str(one) for one in draws}) == 2


def test_one_image_and_one_prompt_need_no_second():
    assert training_prompts(settings("a", "b", images=1, baseline="none"), 0) in (["a"], ["b"])
    assert training_prompts(settings("a"), 5) == ["a"] * 4


def test_the_own_noise_is_for_the_first_prompt_alone():
    some, owned = settings("a", "b", "c", images=2), 0
    for count in range(50):
        own = training_noise(some, count, 0) == Noise(some.seed)
        assert own == (training_prompts(some, count)[0] == "a")
        owned += own
    assert 5 < owned < 30


@pytest.mark.parametrize(
    ("baseline", "alone"),
    [("global", standardise), ("location", per_location), ("none", lambda one: one)],
)
def test_credit_compares_images_of_one_prompt(baseline, alone):
    latent_reward = torch.rand((4, 3, 5), generator=torch.Generator().manual_seed(0))
    latent_reward[[1, 3]] += 10  # a prompt that always earns more
    credit = latent_credit(latent_reward, Credit(baseline=baseline), ["a", "b", "a", "b"])
    for rows in ([0, 2], [1, 3]):
        assert torch.equal(credit[rows], alone(latent_reward[rows]))
    together = latent_credit(latent_reward, Credit(baseline=baseline), ["a"] * 4)
    assert torch.equal(together, alone(latent_reward))


def test_each_image_is_of_its_prompt_and_is_learnt_from_with_it(model, monkeypatch):
    run, credits = finish(begin(model, settings("a", "b", "c"))), []
    monkeypatch.setattr(
        "pxpo.run.latent_credit",
        lambda *values: credits.append(values[2]) or latent_credit(*values),
    )
    for count in range(3):
        run = finish(generate(model, run))
        prompts = training_prompts(run.settings, count)
        noise = [training_noise(run.settings, count, index) for index in range(4)]
        assert len(set(prompts)) == 2
        with adapter(model, run.lora):
            alone = [
                finish(rollout(model, [p], [n], run.settings)).images
                for p, n in zip(prompts, noise, strict=True)
            ]
        torch.testing.assert_close(run.trajectory.images, torch.cat(alone), rtol=0, atol=1e-4)
        run = finish(learn(model, run, run.trajectory.images[:, 2]))
        assert credits[-1] == prompts


def test_held_out_prompts_are_shown_on_held_out_seeds_and_scored_apart(model):
    some = settings("a", "b", held_out_prompt="c\nd")
    assert shown_prompts(some) == ["a", "b", "a", "c", "c", "d", "d"]
    own, *seeds = shown_noise(some)
    assert own == Noise(some.seed) and seeds == seeds[:2] * 3 and len(set(seeds)) == 2
    assert shown_noise(settings("a")) == [own, *seeds[:2]]
    lone = replace(some, shown=1)
    assert shown_prompts(lone) == ["a", "c", "d"] and shown_noise(lone) == [own, *seeds[:1] * 2]
    run = finish(begin(model, some))
    shown = run.updates[0].shown
    assert len(shown) == 7
    for index, (prompt, noise) in enumerate(zip(shown_prompts(some), [own, *seeds], strict=True)):
        alone = finish(rollout(model, [prompt], [noise], run.settings)).images[0]
        assert (shown[index].permute(2, 0, 1) / 255 - alone).abs().max() < 0.01
    assert not torch.equal(shown[1], shown[3])  # the same seed, another prompt
    run = scored(run, RewardSpec("color"), lambda images: -images[:, 2])
    (score,), blue = run.latest, -(shown.float() / 255)[..., 2].mean((1, 2))
    assert score.here == pytest.approx(blue[0].item())
    assert score.held_out == pytest.approx(blue[1:3].mean().item())
    assert score.held_out_prompts == pytest.approx(blue[3:].mean().item())


def test_a_resumed_run_of_several_prompts_equals_one_that_never_stopped(
    model_folder, tmp_path, monkeypatch
):
    (tmp_path / "prompts.txt").write_text("a tree\n\n  a road\n", encoding="utf-8")
    arguments = [
        "color", *SMALL, "--prompt", "a lake", "--prompt", "a hill", "--prompts",
        str(tmp_path / "prompts.txt"), "--held-out-prompt", "snow", "--held-out-prompt", "rain",
        "--model", str(model_folder),
    ]  # fmt: skip
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert cli.main([*arguments, "--updates", "2", "--out", str(straight)]) == 0
    assert cli.main([*arguments, "--updates", "1", "--out", str(stopped)]) == 0
    assert cli.main(["resume", str(stopped), "--updates", "2"]) == 0
    one, other = load_run(straight), load_run(stopped)
    assert one.settings == other.settings and one.latest == other.latest
    assert all(torch.equal(one.lora.weights[n], w) for n, w in other.lora.weights.items())
    assert one.settings.prompts == ("a lake", "a hill", "a tree", "a road")
    assert one.settings.held_out_prompts == ("snow", "rain")
    card = (straight / "lora" / "README.md").read_text(encoding="utf-8")
    assert "| prompt | `a lake / a hill / a tree / a road` |" in card
    assert "pipeline('a lake'," in card and (straight / "lora" / "reward.png").exists()


def test_the_page_goes_on_with_a_run_of_several_prompts(model, segmenter, tmp_path):
    studio = Studio(model, segmenter, tmp_path / "studio")
    run = finish(begin(model, settings("a", "b", held_out_prompt="c")))
    save_run(run, tmp_path / "run")
    kept = studio.admit(pack(tmp_path / "run", tmp_path / "run.zip"))
    kept = finish(studio.step(kept.id, RewardSpec("color"), images=4))
    assert kept.settings.prompts == ("a", "b") and kept.settings.held_out_prompts == ("c",)
    assert len(kept.updates[1].shown) == 5 and kept.latest[1].held_out_prompts is not None


def test_what_cannot_be_is_refused_by_name(tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert cli.main([*arguments]) == 2
        return capsys.readouterr().err

    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert f"no prompt in {str(empty)!r}" in refused("color", "--prompts", str(empty))
    assert "cannot be read" in refused("color", "--prompts", str(tmp_path / "nowhere.txt"))
    several = ["--prompt", "a", "--prompt", "b"]
    assert "'b', which is a prompt" in refused("color", *several, "--held-out-prompt", "b")
    assert "one prompt; there are 2" in refused("paint", "--exact", "--map", "x.png", *several)
    assert "at least 2; images is 1" in refused("color", *several, "--images", "1")


def test_a_card_of_one_prompt_says_nothing_of_others(model, tmp_path: Path):
    run = finish(begin(model, settings("a lake")))
    card = (write_folder(run, tmp_path / "lora") / "README.md").read_text(encoding="utf-8")
    assert "| prompt | `a lake` |" in card and "held_out_prompt" not in card
