"""A run is plain data: it learns, is scored, goes back, and goes on bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import random_lora

import pxpo.run
from pxpo import (
    ColorReward,
    RewardSpec,
    Run,
    Tools,
    Wish,
    annotate,
    begin,
    finish,
    generate,
    go_to,
    judge_of,
    learn,
    load_model,
    load_run,
    paint,
    rollout,
    save_run,
    scored,
    settings_for,
    teach,
)
from pxpo.credit import downsample
from pxpo.errors import DivergedError, RewardError, RunError
from pxpo.lora import adapter, new_lora
from pxpo.models import DiffusionModel
from pxpo.rewards import Sight
from pxpo.rollout import Noise
from pxpo.run import WEIGHT_DECAY, shown_noise, training_noise
from pxpo.strength import NEAR
from pxpo.update import update


def settings(**changes):
    small = {"steps": 3, "guidance_scale": 2.0, "images": 2, "shown": 2, "rank": 2}
    return settings_for("paint", **{"prompt": "a lake", **small, **changes})


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
    for a, b in zip(one.painted, other.painted, strict=True):
        assert torch.equal(a.picture, b.picture) and torch.equal(a.paint, b.paint)


@pytest.fixture(scope="module")
def run(model_folder) -> Run:
    """Of two updates. It is plain data, so that all tests may have the same one."""
    model = load_model(model_folder, device="cpu")
    return updated(model, finish(begin(model, settings())), 2)


def test_learning_changes_the_lora_and_the_shown_images(run):
    first, last = run.updates[0], run.updates[-1]
    assert any(
        not torch.equal(first.lora.weights[n], last.lora.weights[n]) for n in last.lora.weights
    )
    assert not torch.equal(first.shown, last.shown)
    assert last.metrics["grad_norm"] > 0 and last.metrics["kl"] > 0


def test_each_update_says_how_far_it_moved_and_how_far_it_is_from_the_base(model, run):
    strength = run.settings.strength
    assert strength == 0.03
    for one in run.updates[1:]:
        assert strength / NEAR <= one.metrics["moved"] <= strength * NEAR
    first, second = (one.metrics["from_base"] for one in run.updates[1:])
    assert first == pytest.approx(run.updates[1].metrics["moved"], rel=1e-3)
    assert 0 < second < 2.2 * strength * NEAR and second != first
    assert run.updates[0].metrics == {}
    from_a_lora = updated(model, finish(begin(model, settings(), random_lora(model))), 1)
    metrics = from_a_lora.updates[1].metrics
    assert metrics["from_base"] > 2 * metrics["moved"]
    assert strength / NEAR <= metrics["moved"] <= strength * NEAR


def test_the_optimizer_is_adamw_at_the_run_s_rate(model, monkeypatch):
    seen = []

    def listening(model, parameters, optimizer, *arguments, **options):
        group = optimizer.param_groups[0]
        steps = [float(state["step"]) for state in optimizer.state.values()]
        seen.append((type(optimizer), group["lr"], group["weight_decay"], group["betas"], steps))
        return update(model, parameters, optimizer, *arguments, **options)

    monkeypatch.setattr(pxpo.run, "update", listening)
    run = updated(model, finish(begin(model, settings(learning_rate=0.007))), 2)
    adam = torch.optim.AdamW, 0.007, WEIGHT_DECAY, (0.9, 0.999)
    assert seen == [(*adam, []), (*adam, [1.0] * len(run.lora.weights))]
    assert WEIGHT_DECAY == 1e-4


def test_the_metrics_hold_the_mean_reward_and_its_spread_over_the_images(model):
    run = finish(generate(model, finish(begin(model, settings()))))
    maps = torch.stack([torch.linspace(-1, 1, 256).view(16, 16), torch.full((16, 16), 0.5)])
    metrics = finish(learn(model, run, maps)).updates[1].metrics
    assert metrics["reward"] == pytest.approx(0.25)
    assert metrics["reward_std"] == pytest.approx(0.25)
    assert set(metrics) == {"reward", "reward_std", "grad_norm", "kl", "moved", "from_base"}


def test_a_run_is_never_changed_in_place(model, run):
    weights = {n: w.clone() for n, w in run.lora.weights.items()}
    moments = {n: m.clone() for n, m in run.updates[-1].optimizer.items()}
    updated(model, run, 1)
    assert run.count == 2
    assert all(torch.equal(weights[n], w) for n, w in run.lora.weights.items())
    assert all(torch.equal(moments[n], m) for n, m in run.updates[-1].optimizer.items())


def test_going_back_and_on_again_gives_the_same_run(model, run):
    assert_same(updated(model, go_to(run, 1), 1), run)
    assert go_to(run, 0).count == 0
    gone = go_to(replace(finish(generate(model, run)), id="mine"), 1)
    assert gone.own is None and gone.trajectory is None  # they were of another update
    assert gone.id == "mine" and gone.updates == run.updates[:2]


def test_what_was_gone_back_from_lies_ahead_until_another_update_takes_its_place(model, run):
    back = go_to(run, 0)
    assert back.updates + back.later == run.updates and back.lora == run.updates[0].lora
    assert go_to(back, 2).updates == run.updates and go_to(back, 1).later == run.updates[2:]
    painted = paint(back, torch.ones(16, 16))
    assert painted.later == back.later  # nothing is lost by what is no update
    assert updated(model, back, 1).later == ()


@pytest.mark.parametrize("count", [-1, 3])
def test_going_back_to_no_update_is_refused(run, count):
    with pytest.raises(RunError, match=f"no update {count}.*0 to 2"):
        go_to(run, count)


def test_maps_that_do_not_fit_are_refused(model, run):
    with pytest.raises(RunError, match="generate"):
        finish(learn(model, run, torch.ones(2, 16, 16)))
    run = finish(generate(model, run))
    with pytest.raises(RewardError, match="3 reward maps for 2 images"):
        finish(learn(model, run, torch.ones(3, 16, 16)))


def test_who_looks_between_two_parts_of_an_update_changes_nothing(model, monkeypatch):
    """A heat-map asks for features of a picture, by the base model, whenever it is wanted."""
    monkeypatch.setitem(model._largest, "sample", 2)
    begun = finish(begin(model, settings(hold=1.0, timesteps=1.0), random_lora(model)))
    run = finish(generate(model, begun))
    maps, phases = run.trajectory.images[:, 2] - 0.5, set()
    alone = finish(learn(model, run, maps))
    looks = model.features(run.trajectory.images)
    work = learn(model, run, maps)
    while True:
        try:
            phases.add(next(work).phase)
        except StopIteration as end:
            assert_same(end.value, alone)
            break
        assert torch.equal(model.features(run.trajectory.images), looks)
    assert {"comparing", "learning", "measuring", "showing"} <= phases


@pytest.mark.parametrize("phase", ["learning", "measuring", "showing", "held-out seeds"])
def test_a_cancelled_update_leaves_model_and_run_as_they_were(model, run, phase):
    run = finish(generate(model, run))
    maps = run.trajectory.images[:, 2] - 0.5
    before, weights = finish(begin(model, settings())), {**run.lora.weights}
    kept = {name: weight.clone() for name, weight in weights.items()}
    work = learn(model, run, maps)
    while next(work).phase != phase:
        pass
    assert model.busy
    work.close()
    assert not model.busy and run.count == 2
    assert_same(finish(begin(model, settings())), before)
    assert all(torch.equal(weights[name], weight) for name, weight in kept.items())


def failing(model: DiffusionModel, monkeypatch) -> None:
    """From the first learning on, whatever the model says without gradients is not finite."""
    call, learnt = model.call_network, []

    def broken(*arguments):
        out = call(*arguments)
        if torch.is_grad_enabled():
            learnt.append(1)
            return out
        return out * float("nan") if learnt else out

    monkeypatch.setattr(model, "call_network", broken)


@pytest.mark.parametrize("strength", [0.0, 0.03])
def test_an_update_that_diverges_leaves_run_and_model_as_they_were(
    model, model_folder, monkeypatch, strength
):
    run = updated(model, finish(begin(model, settings(strength=strength, hold=0.0))), 1)
    run = finish(generate(model, run))
    weights = {n: w.clone() for n, w in run.lora.weights.items()}
    moments = {n: m.clone() for n, m in run.updates[-1].optimizer.items()}
    maps = run.trajectory.images[:, 2] - 0.5
    with monkeypatch.context() as broken:
        failing(model, broken)
        with pytest.raises(DivergedError, match="No size of this update"):
            finish(learn(model, run, maps))
    assert run.count == 1 and not model.busy
    assert all(torch.equal(weights[n], w) for n, w in run.lora.weights.items())
    assert all(torch.equal(moments[n], m) for n, m in run.updates[-1].optimizer.items())
    fresh = load_model(model_folder, device="cpu")  # and both learn it as if nothing had been
    assert_same(finish(learn(model, run, maps)), finish(learn(fresh, run, maps)))


def test_noise_is_the_run_s_own_first_and_new_for_the_others():
    own, fresh = settings(noise="own", seed=7), settings(noise="fresh", seed=7)
    places = [(count, index) for count in range(4) for index in range(3)]
    for count, index in places:
        one = training_noise(own, count, index)
        assert (one == Noise(7)) == (index == 0) == (one == shown_noise(own)[0])
        assert one == training_noise(own, count, index)
        assert index == 0 or one == training_noise(fresh, count, index)
    drawn = [training_noise(fresh, *place) for place in places]
    assert len({noise.start for noise in drawn} | {noise.steps for noise in drawn}) == 24
    assert training_noise(fresh, 1, 1) != training_noise(settings(noise="fresh", seed=8), 1, 1)


@pytest.mark.parametrize("noise", ["own", "fresh"])
def test_held_out_noise_is_never_trained_on(noise):
    some = settings(noise=noise, images=16, shown=16)
    own, *held_out = shown_noise(some)
    trained = {training_noise(some, step, i).start for step in range(50) for i in range(16)}
    assert not trained & {noise.start for noise in held_out}
    assert (own.start in trained) == (noise == "own")
    assert len({noise.start for noise in held_out}) == 15
    assert shown_noise(replace(some, images=3, updates=9)) == shown_noise(some)


@pytest.fixture
def made(monkeypatch):
    """The number of images of each rollout from here on."""
    batches = []

    def listening(model, prompts, *arguments):
        batches.append(len(prompts))
        return rollout(model, prompts, *arguments)

    monkeypatch.setattr(pxpo.run, "rollout", listening)
    return batches


def alike(one, other) -> bool:
    """Whether two trajectories are the same, to the last bit."""
    tensors = [n for n, value in vars(one).items() if isinstance(value, torch.Tensor)]
    parts = (
        *((vars(one)[n], vars(other)[n]) for n in tensors),
        *((getattr(one, n)[k], getattr(other, n)[k]) for n in ("cond", "uncond") for k in one.cond),
        *((value, vars(other.steps)[n]) for n, value in vars(one.steps).items()),
    )
    return one.guidance_scale == other.guidance_scale and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in parts
    )


def as_shown(image: torch.Tensor) -> torch.Tensor:
    return (image * 255).round().byte().permute(1, 2, 0)


def test_the_run_s_own_picture_comes_first_and_is_the_one_that_is_shown(model, made):
    run = finish(begin(model, settings(images=3)))
    for count in range(2):
        shown = run.updates[-1].shown[0]
        assert torch.equal(as_shown(run.own.images[0]), shown)
        assert torch.equal((run.picture * 255).round().byte().permute(1, 2, 0), shown)
        made.clear()
        judged = finish(generate(model, run))
        assert made == [2]  # its own picture is there already
        first, *others = judged.trajectory.images
        assert torch.equal(first, run.own.images[0]) and torch.equal(as_shown(first), shown)
        assert len(others) == 2
        noise = [training_noise(run.settings, count, index) for index in range(3)]
        for index, one in enumerate(noise):
            start, *steps = one.draw(model.latent_shape, 3)
            assert torch.equal(judged.trajectory.latents[0, index], start)
            assert torch.equal(judged.trajectory.noise[:, index], torch.stack(steps))
        made.clear()
        anew = finish(generate(model, replace(run, own=None)))
        assert made == [1, 2]  # and alone again, as batches round differently
        assert alike(anew.trajectory, judged.trajectory)
        assert finish(generate(model, judged)) is judged
        run = finish(learn(model, judged, judged.trajectory.images[:, 2]))
        assert run.trajectory is None


def test_the_own_picture_is_that_of_the_newest_lora(model):
    run = updated(model, finish(begin(model, settings())), 1)
    with adapter(model, run.lora):
        fresh = finish(rollout(model, ["a lake"], [Noise(0)], run.settings))
    assert alike(run.own, fresh)
    bare = finish(rollout(model, ["a lake"], [Noise(0)], run.settings))
    assert not alike(run.own, bare)


def test_a_single_image_is_the_picture_that_is_shown(model, made):
    run = finish(begin(model, settings(images=1, baseline="none")))
    made.clear()
    judged = finish(generate(model, run))
    assert made == [] and judged.trajectory is run.own
    fresh = finish(generate(model, replace(run, settings=replace(run.settings, noise="fresh"))))
    assert made == [1] and not torch.equal(fresh.trajectory.latents[0], run.own.latents[0])


@pytest.mark.parametrize(
    ("changes", "reused"),
    [
        ({"steps": 2}, False),
        ({"guidance_scale": 3.0}, False),
        ({"eta": 0.5}, False),
        ({"prompt": "a tree"}, False),
        ({"seed": 5}, False),
        ({"images": 3}, True),
        ({"strength": 0.2, "hold": 0.0, "timesteps": 1.0, "blur": 2.0}, True),
        ({"shown": 1, "updates": 3, "unconditional": "exact"}, True),
    ],
    ids=str,
)
def test_the_own_picture_is_made_anew_where_it_would_be_another(model, made, changes, reused):
    run = updated(model, finish(begin(model, settings())), 1)
    wanted = replace(run, settings=replace(run.settings, **changes))
    made.clear()
    judged = finish(generate(model, wanted)).trajectory
    others = wanted.settings.images - 1
    assert made == ([others] if reused else [1, others])
    assert torch.equal(judged.images[0], run.own.images[0]) == reused
    chosen = wanted.settings
    with adapter(model, run.lora):
        expected = finish(rollout(model, [chosen.prompt], [Noise(chosen.seed)], chosen))
    assert torch.equal(judged.images[0], expected.images[0])
    assert torch.equal(judged.latents[:, 0], expected.latents[:, 0])
    assert (len(judged.steps), judged.guidance_scale) == (chosen.steps, chosen.guidance_scale)


def test_fresh_images_are_one_batch_without_the_own_picture(model, made):
    run = finish(begin(model, settings(noise="fresh", images=3)))
    made.clear()
    judged = finish(generate(model, run)).trajectory
    assert made == [3]
    starts = [training_noise(run.settings, 0, i).draw(model.latent_shape, 0)[0] for i in range(3)]
    assert torch.equal(judged.latents[0], torch.stack(starts))
    assert not any(torch.equal(start, run.own.latents[0, 0]) for start in starts)


def test_what_the_settings_leave_open_is_the_model_s_from_the_beginning(model):
    model.defaults = {"steps": 2, "guidance_scale": 1.5, "images": 3}
    left_open = settings(steps=None, guidance_scale=None, images=None)
    run = finish(begin(model, left_open))
    assert run.settings == settings(**model.defaults) == run.updates[0].settings
    judged = finish(generate(model, run)).trajectory
    assert (len(judged.steps), judged.guidance_scale, len(judged.images)) == (2, 1.5, 3)
    said = finish(begin(model, settings(steps=4)))
    assert (said.settings.steps, said.settings.guidance_scale, said.settings.images) == (4, 2.0, 2)


def test_a_run_can_start_from_a_lora(model):
    lora = new_lora(model, 3, seed=5)
    lora = type(lora)(3, 3.0, {n: w + 0.05 for n, w in lora.weights.items()})
    run = finish(begin(model, settings(), lora))
    expected = finish(begin(model, settings()))
    assert all(torch.equal(run.lora.weights[name], w) for name, w in lora.weights.items())
    assert not torch.equal(run.updates[0].shown, expected.updates[0].shown)


def test_annotate_adds_numbers_to_the_newest_update(run):
    noted = annotate(run, shown_reward=1.5)
    assert noted.updates[-1].metrics == {**run.updates[-1].metrics, "shown_reward": 1.5}
    assert "shown_reward" not in run.updates[-1].metrics


def test_maps_that_earn_nothing_bring_other_images_and_no_change(model):
    first = updated(model, finish(begin(model, settings())), 1)
    run = finish(generate(model, first))
    empty = torch.zeros(2, *run.trajectory.images.shape[2:])
    skipped = finish(learn(model, run, empty, RewardSpec("color")))
    assert skipped.count == 2 and skipped.lora is run.lora
    before, newest = run.updates[-1], skipped.updates[-1]
    assert newest.shown is before.shown and newest.optimizer is before.optimizer
    assert newest.metrics == {
        "reward": 0, "reward_std": 0, "grad_norm": 0, "kl": 0, "moved": 0,
        "from_base": before.metrics["from_base"],
    }  # fmt: skip
    assert newest.reward == RewardSpec("color") and newest.latent_reward.shape == (2, 8, 8)
    other = finish(generate(model, skipped)).trajectory
    assert torch.equal(run.trajectory.images[0], other.images[0])  # the picture is the same still
    assert torch.equal(run.trajectory.latents[:, 0], other.latents[:, 0])
    assert not (run.trajectory.noise[:, 1] == other.noise[:, 1]).any()
    assert not torch.equal(run.trajectory.images[1], other.images[1])


def test_a_first_map_that_earns_nothing_is_at_the_base_still(model):
    run = finish(generate(model, finish(begin(model, settings()))))
    empty = torch.full((2, 16, 16), 0.7)  # the same everywhere: nothing is better than the rest
    skipped = finish(learn(model, run, empty))
    assert skipped.updates[1].metrics["from_base"] == 0 and skipped.lora is run.lora


def test_a_skipped_update_s_picture_is_not_taken_for_that_of_its_settings(model):
    """What is shown is still the old prompt's, and what is judged next is the new one's."""
    run = finish(begin(model, settings()))
    run = replace(run, settings=replace(run.settings, prompt="a tree"))
    run = finish(generate(model, run))
    made = run.trajectory.images[0]
    skipped = finish(learn(model, run, torch.zeros(2, 16, 16)))
    judged = finish(generate(model, skipped)).trajectory
    assert torch.equal(judged.images[0], made)
    assert not torch.equal(as_shown(made), skipped.updates[-1].shown[0])


@pytest.fixture
def hold_maps(monkeypatch):
    """The hold_map that each update is given from here on."""
    heard = []

    def listening(*arguments, hold_map, **options):
        heard.append(hold_map)
        return update(*arguments, hold_map=hold_map, **options)

    monkeypatch.setattr(pxpo.run, "update", listening)
    return heard


def test_hold_pulls_where_the_map_is_silent_and_less_the_more_it_says(model, hold_maps):
    """At each latent pixel one minus what it says, in units of the loudest of all images."""
    run = finish(generate(model, finish(begin(model, settings()))))
    maps = torch.zeros(2, 8, 8)
    maps[0, :4], maps[0, 4:6], maps[1, :, 0] = 2.0, -0.5, -1.0
    finish(learn(model, run, maps))
    expected = torch.ones(2, 8, 8)
    expected[0, :4], expected[0, 4:6], expected[1, :, 0] = 0.0, 0.75, 0.5
    torch.testing.assert_close(hold_maps[0], expected)


def test_ddpo_holds_a_picture_as_a_whole(model, hold_maps):
    """Its one number for each image does not say where, so nor does what holds."""
    run = finish(generate(model, finish(begin(model, settings(blur=math.inf)))))
    maps = torch.zeros(2, 8, 8)
    maps[0, :4], maps[1, :, 0] = 2.0, -2.0  # means: 1 and -1/4
    finish(learn(model, run, maps))
    expected = torch.tensor([0.0, 0.75]).view(2, 1, 1).expand(2, 8, 8)
    torch.testing.assert_close(hold_maps[0], expected)


def test_an_update_learns_the_credit_of_its_smaller_map(model, monkeypatch):
    """Of the latent's size, and with steps drawn anew for each update."""
    heard = []

    def listening(model, parameters, optimizer, trajectory, credit, learning, **options):
        heard.append((credit, learning, options["generator"].initial_seed()))
        return update(model, parameters, optimizer, trajectory, credit, learning, **options)

    monkeypatch.setattr(pxpo.run, "update", listening)
    run = finish(begin(model, settings(baseline="none", blur=0.0)))
    for _ in range(2):
        run = finish(generate(model, run))
        maps = run.trajectory.images[:, 2] - 0.5
        run = finish(learn(model, run, maps))
        credit, learning, _ = heard[-1]
        assert torch.equal(credit, downsample(maps, (8, 8)))
        assert torch.equal(run.updates[-1].latent_reward, downsample(maps, (8, 8)))
        assert learning == run.settings
    assert heard[0][2] != heard[1][2]


BLUE, RED = RewardSpec("color"), RewardSpec("color", {"color": "red", "more": True})
PAINT = RewardSpec("paint")


def taught(model: DiffusionModel, run: Run, reward: RewardSpec, **changes) -> Run:
    run = replace(run, settings=replace(run.settings, **changes), trajectory=None)
    run = finish(generate(model, run))
    judge = reward.make()
    return finish(teach(model, run, reward, judge(run.trajectory.images), judge))


def painted(model: DiffusionModel, run: Run, level: float) -> Run:
    """The run taught by what is painted all over its picture."""
    run = replace(paint(run, torch.full((32, 32), level)), reward=PAINT)
    run = finish(generate(model, run))
    judge = judge_of(run, model, Tools())
    return finish(teach(model, run, PAINT, judge(run.trajectory.images), judge))


def test_each_update_keeps_its_own_settings_and_reward(model):
    run = taught(model, finish(begin(model, settings())), BLUE, learning_rate=0.005)
    run = taught(model, run, RED, images=3)
    run = painted(model, replace(run, settings=settings(), trajectory=None), 2.0)
    assert [one.settings.learning_rate for one in run.updates[1:3]] == [0.005, 0.005]
    assert [one.settings.images for one in run.updates] == [2, 2, 3, 2]
    assert [one.reward for one in run.updates] == [None, BLUE, RED, PAINT]
    assert run.reward == PAINT
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
    run = taught(model, go_to(run, 1), BLUE)
    assert len(run.latest) == 3


def test_without_held_out_images_a_score_is_of_this_seed_alone(model):
    run = scored(finish(begin(model, settings(shown=1))), BLUE, ColorReward("blue"))
    assert run.latest[0].held_out is None and run.latest[0].here < 0


def test_paint_is_kept_with_the_picture_it_was_put_on(model):
    run = updated(model, finish(begin(model, settings())), 1)
    left, right = torch.zeros(2, 8, 8)
    left[:, :4], right[:, 4:] = 2.0, -2.0
    once = paint(run, left)
    assert run.painted == () and len(once.painted) == 1
    assert torch.equal(once.painted[0].picture, run.updates[-1].shown[0])
    assert torch.equal(once.painted[0].paint, left)
    (both,) = paint(once, right).painted  # on the same picture: it adds up
    assert torch.equal(both.paint, left + right)
    later = paint(updated(model, once, 1), right)
    assert len(later.painted) == 2 and torch.equal(later.painted[0].paint, left)
    assert torch.equal(later.painted[1].picture, later.updates[-1].shown[0])
    assert len(go_to(later, 0).painted) == 2  # a wish outlives the updates


def test_the_judge_is_the_reward_s_own_or_the_wish(model, segmenter):
    run, tools = finish(begin(model, settings())), Tools(segmenter=segmenter)
    images = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(RunError, match="no reward yet"):
        judge_of(run, model, tools)
    red = judge_of(replace(run, reward=RED), model, tools)
    assert torch.equal(red(images), images[:, 0])
    hair = RewardSpec("paint", {"more": ["Hair"]})
    by_label = judge_of(replace(run, reward=hair), model, tools)
    assert torch.equal(by_label(images), hair.make(tools)(images))
    with pytest.raises(RunError, match="nothing is painted"):
        judge_of(replace(run, reward=PAINT), model, tools)
    strokes = torch.zeros(16, 16)
    strokes[:8], strokes[8:, 8:] = 2.0, -2.0
    run = replace(paint(run, strokes), reward=PAINT)
    for place, eye in ((tools, segmenter), (Tools(), None)):
        wish = judge_of(run, model, place)
        assert isinstance(wish, Wish) and wish.sight.segmenter is eye
        assert torch.equal(wish(images), Wish(run.painted, Sight(model.features, eye))(images))


def test_a_named_segmenter_looks_on_beside_the_wish(model, segmenter):
    run = paint(finish(begin(model, settings())), torch.full((16, 16), 2.0))
    named = replace(run, reward=RewardSpec("paint", {"segmenter": segmenter.name}))
    assert judge_of(named, model, Tools()).sight.segmenter.name == segmenter.name
    assert named.reward.by_hand and named.reward.name == "painted"


def test_a_wish_is_judged_by_all_that_was_painted_so_far(model):
    run = painted(model, finish(begin(model, settings())), 2.0)
    assert [score.here for score in run.latest] == pytest.approx([2, 2])
    half = torch.zeros(16, 16)
    half[:8] = -2.0
    more = paint(run, half)
    judge = judge_of(more, model, Tools())
    anew = scored(more, PAINT, judge, anew=True)
    assert anew.updates[1].shown.shape[0] == 2
    for one, score in zip(anew.updates, anew.latest, strict=True):
        maps = judge(one.shown.permute(0, 3, 1, 2) / 255).mean((1, 2))
        assert score.here == pytest.approx(maps[0].item())
        assert score.held_out == pytest.approx(maps[1].item())
    assert anew.latest[1].here < 1.5
    assert scored(more, PAINT, judge).latest == run.latest  # those that are there stay


def test_scoring_anew_is_of_this_reward_alone(model):
    run = taught(model, finish(begin(model, settings())), BLUE)
    double = scored(run, RED, lambda images: 2 * images[:, 0])
    anew = scored(double, RED, ColorReward("red", 1), anew=True)
    for one, before, old in zip(anew.updates, double.updates, run.updates, strict=True):
        assert one.scores["less blue"] == before.scores["less blue"] == old.scores["less blue"]
        assert one.scores["more red"].here == pytest.approx(before.scores["more red"].here / 2)
        assert one.metrics == before.metrics == old.metrics
    assert anew.reward == RED and run.reward == BLUE


def test_a_wish_is_met_once_all_that_is_shown_is_what_was_wanted(model):
    begun = finish(begin(model, settings()))
    assert not begun.met
    green, red = painted(model, begun, 2.0), painted(model, begun, -2.0)
    assert green.met and not red.met
    assert [one.metrics["met"] for one in green.updates] == [1.0, 1.0]
    assert [one.metrics["met"] for one in red.updates] == [0.0, 0.0]
    assert not replace(green, reward=BLUE).met  # another reward has no end
    assert not replace(green, reward=None).met
    assert not replace(green, reward=RewardSpec("paint", {"more": ["Hair"]})).met
    changed = scored(green, PAINT, judge_of(red, model, Tools()), anew=True)
    assert not changed.met and "met" not in taught(model, begun, BLUE).updates[1].metrics


def test_whether_a_wish_is_met_is_asked_of_held_out_pictures_too(model):
    """The last word is the newest update's, on all that it shows."""
    run = painted(model, finish(begin(model, settings(shown=2))), 2.0)
    judge = judge_of(run, model, Tools())
    heard = []

    def of_all(maps):
        heard.append(maps.shape)
        return len(heard) == 2

    judge.met = of_all
    anew = scored(run, PAINT, judge, anew=True)
    assert heard == [(2, 16, 16)] * 2
    assert [one.metrics["met"] for one in anew.updates] == [0.0, 1.0] and anew.met


def test_a_model_s_folder_is_kept_by_its_whole_path(model_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(model_folder.parent)
    run = finish(begin(load_model(model_folder.name, device="cpu"), settings()))
    save_run(run, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_model(load_run(tmp_path).model_name, device="cpu").latent_shape
