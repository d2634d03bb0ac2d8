"""A run is plain data: it learns, is scored, goes back, and goes on bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import pxpo.run
from pxpo import (
    ColorReward,
    RewardSpec,
    Run,
    annotate,
    back,
    begin,
    finish,
    generate,
    learn,
    load_model,
    load_run,
    save_run,
    scored,
    settings_for,
    teach,
)
from pxpo.errors import RewardError, RunError
from pxpo.lora import new_lora
from pxpo.models import DiffusionModel
from pxpo.run import learning_rate, shown_noise, training_noise
from pxpo.update import update


def settings(**changes):
    return settings_for(
        "paint", **{"prompt": "a lake", "steps": 3, "rank": 2, "shown": 2, "images": 2, **changes}
    )


def updated(model: DiffusionModel, run: Run, count: int) -> Run:
    for _ in range(count):
        run = finish(generate(model, run))
        run = finish(learn(model, run, run.trajectory.images[:, 2] - 0.5))
    return run


def assert_same(one: Run, other: Run) -> None:
    assert one.settings == other.settings and one.count == other.count
    for a, b in zip(one.updates, other.updates, strict=True):
        assert torch.equal(a.shown, b.shown) and a.metrics == b.metrics
        assert torch.equal(a.latent_reward, b.latent_reward)
        for left, right in ((a.lora.weights, b.lora.weights), (a.optimizer, b.optimizer)):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def run(model: DiffusionModel) -> Run:
    return updated(model, finish(begin(model, settings())), 2)


def test_learning_changes_the_lora_and_the_shown_images(run):
    first, last = run.updates[0], run.updates[-1]
    assert any(
        not torch.equal(first.lora.weights[n], last.lora.weights[n]) for n in last.lora.weights
    )
    assert not torch.equal(first.shown, last.shown)
    assert last.metrics["grad_norm"] > 0


def test_a_run_is_never_changed_in_place(model, run):
    weights = {n: w.clone() for n, w in run.lora.weights.items()}
    moments = {n: m.clone() for n, m in run.updates[-1].optimizer.items()}
    updated(model, run, 1)
    assert run.count == 2
    assert all(torch.equal(weights[n], w) for n, w in run.lora.weights.items())
    assert all(torch.equal(moments[n], m) for n, m in run.updates[-1].optimizer.items())


def test_going_back_and_on_again_gives_the_same_run(model, run):
    assert_same(updated(model, back(run, 1), 1), run)
    assert back(run, 0).count == 0


@pytest.mark.parametrize("count", [-1, 3])
def test_going_back_to_no_update_is_refused(run, count):
    with pytest.raises(RunError, match=f"no update {count}.*0 to 2"):
        back(run, count)


def test_maps_that_do_not_fit_are_refused(model, run):
    with pytest.raises(RunError, match="generate"):
        finish(learn(model, run, torch.ones(2, 16, 16)))
    run = finish(generate(model, run))
    with pytest.raises(RewardError, match="3 reward maps for 2 images"):
        finish(learn(model, run, torch.ones(3, 16, 16)))


def test_a_cancelled_update_leaves_model_and_run_as_they_were(model, run):
    run = finish(generate(model, run))
    before = finish(begin(model, settings()))
    work = learn(model, run, torch.ones(2, 16, 16))
    next(work)
    work.close()
    after = finish(begin(model, settings()))
    assert torch.equal(before.updates[0].shown, after.updates[0].shown)
    assert run.count == 2


def test_noise_is_fresh_or_kept_as_the_setting_says():
    fresh, start, whole = (settings(noise=name) for name in ("fresh", "start", "whole"))
    assert (
        training_noise(whole, 5, 1)
        == training_noise(whole, 0, 1)
        == shown_noise(whole)[0].__class__(1)
    )
    assert training_noise(start, 0, 0) == shown_noise(start)[0]
    one, two = training_noise(start, 1, 0), training_noise(start, 2, 0)
    assert one.start == two.start == 0 and one.steps != two.steps
    turns = settings(noise="turns")
    noises = [training_noise(turns, step, 1) for step in range(6)]
    assert [noise.start == 1 for noise in noises] == [False, True] * 3
    assert len({noise.start for noise in noises}) == 4
    assert len({noise.steps for noise in noises} | {None}) == 7
    seeds = [training_noise(fresh, step, image) for step in range(3) for image in range(2)]
    assert len({noise.start for noise in seeds} | {noise.steps for noise in seeds}) == 12


def test_held_out_noise_is_never_trained_on():
    some = settings(noise="fresh", images=16, shown=16)
    trained = {training_noise(some, step, i).start for step in range(50) for i in range(16)}
    assert not trained & {noise.start for noise in shown_noise(some)}


def test_a_run_can_start_from_a_lora(model):
    lora = new_lora(model, 3, seed=5)
    lora = type(lora)(3, 3.0, {n: w + 0.05 for n, w in lora.weights.items()})
    run = finish(begin(model, settings(), lora))
    expected = finish(begin(model, settings()))
    assert run.lora is lora
    assert not torch.equal(run.updates[0].shown, expected.updates[0].shown)


def test_the_picture_that_is_shown_and_judged_is_made_once(model):
    run = finish(begin(model, settings(images=1, noise="whole", baseline="area")))
    for _ in range(2):
        assert finish(generate(model, run)) is run
        anew = finish(generate(model, replace(run, trajectory=None))).trajectory
        assert all(torch.equal(vars(anew)[name], value)
                   for name, value in vars(run.trajectory).items()
                   if isinstance(value, torch.Tensor))  # fmt: skip
        run = finish(learn(model, run, anew.images[:, 2]))
    fresh = finish(begin(model, settings(images=1, noise="fresh", baseline="area")))
    assert fresh.trajectory is None


def test_annotate_adds_numbers_to_the_newest_update(run):
    noted = annotate(run, shown_reward=1.5)
    assert noted.updates[-1].metrics == {**run.updates[-1].metrics, "shown_reward": 1.5}
    assert "shown_reward" not in run.updates[-1].metrics


def test_maps_that_earn_nothing_bring_other_images_and_no_change(model):
    run = finish(generate(model, finish(begin(model, settings(noise="start")))))
    empty = torch.zeros(2, *run.trajectory.images.shape[2:])
    skipped = finish(learn(model, run, empty))
    other = finish(generate(model, skipped)).trajectory
    assert skipped.count == 1 and skipped.lora is run.lora
    assert skipped.updates[1].metrics["grad_norm"] == 0
    assert torch.equal(run.trajectory.latents[0], other.latents[0])
    assert not torch.equal(run.trajectory.noise, other.noise)


@pytest.mark.parametrize(("baseline", "learns"), [("past", True), ("area", False)])
def test_an_empty_map_says_something_against_the_past_alone(model, baseline, learns):
    run = updated(model, finish(begin(model, settings(baseline=baseline))), 1)
    run = finish(generate(model, run))
    empty = torch.zeros(2, *run.trajectory.images.shape[2:])
    assert (finish(learn(model, run, empty)).lora is not run.lora) == learns


@pytest.fixture
def hold_maps(monkeypatch):
    """The hold_map that each update is given from here on."""
    heard = []

    def listening(*arguments, hold_map, **options):
        heard.append(hold_map)
        return update(*arguments, hold_map=hold_map, **options)

    monkeypatch.setattr(pxpo.run, "update", listening)
    return heard


@pytest.mark.parametrize("left", [0.0, 0.5])
@pytest.mark.parametrize(("baseline", "forgets"), [("past", False), ("area", True)])
def test_hold_eases_where_it_was_painted_before(model, hold_maps, baseline, forgets, left):
    alike = settings(baseline=baseline, hold_painted=left, hold_growth=0.0)
    run = finish(begin(model, alike))
    maps = torch.zeros(2, 8, 8)
    for half in (slice(0, 4), slice(4, 8)):
        run = finish(generate(model, run))
        painted = maps.clone()
        painted[:, half] = 2.0
        run = finish(learn(model, run, painted))
    rows = hold_maps[0].shape[1]
    upper, lower = (hold_maps[1][:, part] for part in (slice(0, rows // 2), slice(rows // 2, None)))
    assert (hold_maps[0][:, : rows // 2] == left).all() and (
        hold_maps[0][:, rows // 2 :] == 1
    ).all()
    assert (lower == left).all()
    assert (upper == (1 if forgets else left)).all()


def test_hold_grows_as_praise_fills_each_picture(model, hold_maps):
    run = finish(begin(model, settings(hold_painted=0.0, hold_growth=4.0)))
    for share in (0.25, 0.75):  # of the first picture is praised, and as much of the second blamed
        run = finish(generate(model, run))
        painted = torch.zeros(2, 8, 8)
        painted[0, : round(8 * share)] = 2.0
        painted[1, : round(8 * share)] = -2.0
        run = finish(learn(model, run, painted))
    for hold_map, filled in zip(hold_maps, (0.25, 0.5), strict=True):  # the mean of the maps so far
        praised, blamed = hold_map[:, -1]  # nothing was painted there
        assert (praised == 1 + 4 * filled).all() and (blamed == 1).all()
        assert not hold_map[:, 0].any()


def test_the_rate_rises_then_falls_evenly_over_the_epochs_and_stays_where_it_ended(
    model, monkeypatch
):
    rates, betas = [], set()

    def listening(model, parameters, optimizer, *arguments, **options):
        rates.append(optimizer.param_groups[0]["lr"])
        betas.add(optimizer.param_groups[0]["betas"])
        return update(model, parameters, optimizer, *arguments, **options)

    monkeypatch.setattr(pxpo.run, "update", listening)
    falling = settings(learning_rate=1e-2, warmup=1, decay=1.0, momentum=0.5, epochs=3)
    updated(model, finish(begin(model, falling)), 4)
    assert rates == pytest.approx([1e-2 / 2, 2e-2 / 3, 1e-2 / 3, 1e-2 / 3])
    assert [learning_rate(falling, step) for step in range(4)] == rates
    assert betas == {(0.5, 0.999)}
    rising = settings(learning_rate=1e-2, warmup=3, decay=0.0, epochs=2)
    assert [learning_rate(rising, step) for step in range(5)] == pytest.approx(
        [2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2]
    )


BLUE, RED = RewardSpec("color"), RewardSpec("color", {"color": "red", "more": True})


def taught(model: DiffusionModel, run: Run, reward: RewardSpec, **changes) -> Run:
    run = replace(run, settings=replace(run.settings, **changes), trajectory=None)
    run = finish(generate(model, run))
    judge = reward.make()
    return finish(teach(model, run, reward, judge(run.trajectory.images), judge))


def painted(model: DiffusionModel, run: Run, level: float) -> Run:
    run = finish(generate(model, run))
    return finish(teach(model, run, RewardSpec("paint"), torch.full((2, 32, 32), level)))


def test_each_update_keeps_its_own_settings_and_reward(model):
    run = taught(model, finish(begin(model, settings())), BLUE, learning_rate=0.005)
    run = taught(model, run, RED, images=3)
    run = painted(model, replace(run, settings=settings(), trajectory=None), 2.0)
    assert [one.settings.learning_rate for one in run.updates[1:3]] == [0.005, 0.005]
    assert [one.settings.images for one in run.updates] == [2, 2, 3, 2]
    assert [one.reward for one in run.updates] == [None, BLUE, RED, RewardSpec("paint")]
    assert run.reward == RewardSpec("paint")
    assert [one.latent_reward.shape[0] for one in run.updates] == [0, 2, 3, 2]


def test_an_update_is_scored_by_each_reward_that_taught_the_run(model):
    run = finish(begin(model, settings(shown=3), reward=BLUE))
    assert run.latest == ()
    run = taught(model, run, BLUE)
    assert len(run.latest) == 2
    run = taught(model, run, RED)
    assert len(run.latest) == 3
    assert [set(one.scores) for one in run.updates] == [{"less blue", "more red"}] * 2 + [
        {"more red"}
    ]
    for one, score in zip(run.updates, run.latest, strict=True):
        red = one.shown[..., 0].float().mean((1, 2)) / 255
        assert score.here == pytest.approx(red[0].item())
        assert score.held_out == pytest.approx(red[1:].mean().item())
        assert score.held_out_std == pytest.approx(red[1:].std(correction=0).item(), abs=1e-6)
    run = taught(model, back(run, 1), BLUE)
    assert len(run.latest) == 3


def test_without_held_out_images_a_score_is_of_this_seed_alone(model):
    run = scored(finish(begin(model, settings(shown=1))), BLUE, ColorReward("blue"))
    assert run.latest[0].held_out is None and run.latest[0].here < 0


def test_paint_is_judged_by_all_that_was_painted_so_far(model):
    run = painted(model, finish(begin(model, settings())), 2.0)
    first = run.latest
    assert 0 < first[0].here <= 2
    run = painted(model, run, -2.0)
    assert len(run.latest) == 3 and run.latest[0].here < first[0].here
    assert run.opinion.counts.sum() == 2 * 2 * 32 * 32


def test_the_past_of_a_reward_is_its_own(model):
    """Maps of another reward, of other images, say nothing about this one's."""
    anew = settings(baseline="past")
    run = taught(model, finish(begin(model, anew)), BLUE, images=3)
    run = painted(model, replace(run, settings=anew, trajectory=None), 2.0)
    assert run.count == 2


def test_a_model_s_folder_is_kept_by_its_whole_path(model_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(model_folder.parent)
    run = finish(begin(load_model(model_folder.name, device="cpu"), settings()))
    save_run(run, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_model(load_run(tmp_path).model_name, device="cpu").latent_shape
