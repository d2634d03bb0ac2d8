"""A run is plain data: it can go back, be saved, and go on bit for bit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pxpo.session
from pxpo import (
    Session,
    annotate,
    back,
    finish,
    generate,
    learn,
    load_model,
    new_session,
    resume,
    save,
    settings_for,
)
from pxpo.errors import RewardError, RunError
from pxpo.lora import new_lora
from pxpo.models import DiffusionModel
from pxpo.session import learning_rate, shown_noise, training_noise, write_whole
from pxpo.update import update


def settings(**changes):
    return settings_for(
        "paint", **{"prompt": "a lake", "steps": 3, "rank": 2, "shown": 2, "images": 2, **changes}
    )


def steps(model: DiffusionModel, session: Session, count: int) -> Session:
    for _ in range(count):
        session = finish(generate(model, session))
        session = finish(learn(model, session, session.trajectory.images[:, 2] - 0.5))
    return session


def assert_same(one: Session, other: Session) -> None:
    assert one.settings == other.settings and one.step == other.step
    for a, b in zip(one.history, other.history, strict=True):
        assert torch.equal(a.shown, b.shown) and a.metrics == b.metrics
        assert torch.equal(a.latent_reward, b.latent_reward)
        for left, right in ((a.lora.weights, b.lora.weights), (a.optimizer, b.optimizer)):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def session(model: DiffusionModel) -> Session:
    return steps(model, finish(new_session(model, settings())), 2)


def test_learning_changes_the_lora_and_the_shown_images(session):
    first, last = session.history[0], session.history[-1]
    assert any(
        not torch.equal(first.lora.weights[n], last.lora.weights[n]) for n in last.lora.weights
    )
    assert not torch.equal(first.shown, last.shown)
    assert last.metrics["grad_norm"] > 0


def test_a_session_is_never_changed_in_place(model, session):
    weights = {n: w.clone() for n, w in session.lora.weights.items()}
    moments = {n: m.clone() for n, m in session.history[-1].optimizer.items()}
    steps(model, session, 1)
    assert session.step == 2
    assert all(torch.equal(weights[n], w) for n, w in session.lora.weights.items())
    assert all(torch.equal(moments[n], m) for n, m in session.history[-1].optimizer.items())


def test_going_back_and_on_again_gives_the_same_run(model, session):
    assert_same(steps(model, back(session, 1), 1), session)
    assert back(session, 0).step == 0


@pytest.mark.parametrize("step", [-1, 3])
def test_going_back_to_no_step_is_refused(session, step):
    with pytest.raises(RunError, match=f"no step {step}.*0 to 2"):
        back(session, step)


@pytest.mark.parametrize("pause_after", ["learn", "generate"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    model, model_folder, session, tmp_path: Path, pause_after
):
    paused = back(session, 1)
    if pause_after == "generate":
        paused = finish(generate(model, paused))
    save(paused, tmp_path)
    fresh = load_model(model_folder, device="cpu")
    again = resume(tmp_path)
    assert_same(again, paused)
    if pause_after == "generate":
        assert torch.equal(again.trajectory.latents, paused.trajectory.latents)
        again = finish(learn(fresh, again, again.trajectory.images[:, 2] - 0.5))
    else:
        again = steps(fresh, again, 1)
    assert_same(again, session)


def test_saving_again_writes_new_steps_only_and_drops_those_gone_back_from(
    model, session, tmp_path
):
    save(session, tmp_path)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "steps").iterdir()}
    other = finish(generate(model, back(session, 1)))
    other = finish(learn(model, other, -other.trajectory.images[:, 0]))
    save(other, tmp_path)
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "steps").iterdir()}
    assert len(now) == 3 and len(written.keys() & now.keys()) == 2
    assert all(now[name] == written[name] for name in written.keys() & now.keys())
    assert_same(resume(tmp_path), other)


def test_a_crash_while_saving_leaves_the_last_good_run(model, session, tmp_path, monkeypatch):
    save(session, tmp_path)
    longer = steps(model, session, 1)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(RunError, match="disk full"):
        save(longer, tmp_path)
    monkeypatch.undo()
    assert_same(resume(tmp_path), session)
    assert not list(tmp_path.rglob("tmp*"))


def test_what_cannot_be_resumed_is_said(session, tmp_path):
    with pytest.raises(RunError, match="no run can be read"):
        resume(tmp_path / "nothing")
    save(session, tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / record["steps"][1]).write_bytes(b"not a tensor")
    with pytest.raises(RunError, match="no run can be read"):
        resume(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(RunError, match="format 99"):
        resume(tmp_path)


def test_maps_that_do_not_fit_are_refused(model, session):
    with pytest.raises(RunError, match="generate"):
        finish(learn(model, session, torch.ones(2, 16, 16)))
    session = finish(generate(model, session))
    with pytest.raises(RewardError, match="3 reward maps for 2 images"):
        finish(learn(model, session, torch.ones(3, 16, 16)))


def test_a_cancelled_update_leaves_model_and_session_as_they_were(model, session):
    session = finish(generate(model, session))
    before = finish(new_session(model, settings()))
    work = learn(model, session, torch.ones(2, 16, 16))
    next(work)
    work.close()
    after = finish(new_session(model, settings()))
    assert torch.equal(before.history[0].shown, after.history[0].shown)
    assert session.step == 2


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
    session = finish(new_session(model, settings(), lora))
    expected = finish(new_session(model, settings()))
    assert session.lora is lora
    assert not torch.equal(session.history[0].shown, expected.history[0].shown)


def test_the_picture_that_is_shown_and_judged_is_made_once(model):
    session = finish(new_session(model, settings(images=1, noise="whole", baseline="area")))
    for _ in range(2):
        assert finish(generate(model, session)) is session
        anew = finish(generate(model, replace(session, trajectory=None))).trajectory
        assert all(torch.equal(vars(anew)[name], value)
                   for name, value in vars(session.trajectory).items()
                   if isinstance(value, torch.Tensor))  # fmt: skip
        session = finish(learn(model, session, anew.images[:, 2]))
    fresh = finish(new_session(model, settings(images=1, noise="fresh", baseline="area")))
    assert fresh.trajectory is None


def test_annotate_adds_numbers_to_the_newest_step(session):
    noted = annotate(session, shown_reward=1.5)
    assert noted.history[-1].metrics == {**session.history[-1].metrics, "shown_reward": 1.5}
    assert "shown_reward" not in session.history[-1].metrics


def test_maps_that_earn_nothing_bring_other_images_and_no_change(model):
    session = finish(generate(model, finish(new_session(model, settings(noise="start")))))
    empty = torch.zeros(2, *session.trajectory.images.shape[2:])
    skipped = finish(learn(model, session, empty))
    other = finish(generate(model, skipped)).trajectory
    assert skipped.step == 1 and skipped.lora is session.lora
    assert skipped.history[1].metrics["grad_norm"] == 0
    assert torch.equal(session.trajectory.latents[0], other.latents[0])
    assert not torch.equal(session.trajectory.noise, other.noise)


@pytest.mark.parametrize(("baseline", "learns"), [("past", True), ("area", False)])
def test_an_empty_map_says_something_against_the_past_alone(model, baseline, learns):
    session = steps(model, finish(new_session(model, settings(baseline=baseline))), 1)
    session = finish(generate(model, session))
    empty = torch.zeros(2, *session.trajectory.images.shape[2:])
    assert (finish(learn(model, session, empty)).lora is not session.lora) == learns


@pytest.fixture
def silences(monkeypatch):
    """The silence that each update is told of from here on."""
    heard = []

    def listening(*arguments, silence, **options):
        heard.append(silence)
        return update(*arguments, silence=silence, **options)

    monkeypatch.setattr(pxpo.session, "update", listening)
    return heard


@pytest.mark.parametrize("left", [0.0, 0.5])
@pytest.mark.parametrize(("baseline", "forgets"), [("past", False), ("area", True)])
def test_hold_eases_where_it_was_painted_before(model, silences, baseline, forgets, left):
    alike = settings(baseline=baseline, hold_painted=left, hold_growth=0.0)
    session = finish(new_session(model, alike))
    maps = torch.zeros(2, 8, 8)
    for half in (slice(0, 4), slice(4, 8)):
        session = finish(generate(model, session))
        painted = maps.clone()
        painted[:, half] = 2.0
        session = finish(learn(model, session, painted))
    rows = silences[0].shape[1]
    upper, lower = (silences[1][:, part] for part in (slice(0, rows // 2), slice(rows // 2, None)))
    assert (silences[0][:, : rows // 2] == left).all() and (silences[0][:, rows // 2 :] == 1).all()
    assert (lower == left).all()
    assert (upper == (1 if forgets else left)).all()


def test_hold_grows_as_praise_fills_each_picture(model, silences):
    session = finish(new_session(model, settings(hold_painted=0.0, hold_growth=4.0)))
    for share in (0.25, 0.75):  # of the first picture is praised, and as much of the second blamed
        session = finish(generate(model, session))
        painted = torch.zeros(2, 8, 8)
        painted[0, : round(8 * share)] = 2.0
        painted[1, : round(8 * share)] = -2.0
        session = finish(learn(model, session, painted))
    for silence, filled in zip(silences, (0.25, 0.5), strict=True):  # the mean of the maps so far
        praised, blamed = silence[:, -1]  # nothing was painted there
        assert (praised == 1 + 4 * filled).all() and (blamed == 1).all()
        assert not silence[:, 0].any()


def test_the_rate_rises_then_falls_evenly_over_the_epochs_and_stays_where_it_ended(
    model, monkeypatch
):
    rates, betas = [], set()

    def listening(model, parameters, optimizer, *arguments, **options):
        rates.append(optimizer.param_groups[0]["lr"])
        betas.add(optimizer.param_groups[0]["betas"])
        return update(model, parameters, optimizer, *arguments, **options)

    monkeypatch.setattr(pxpo.session, "update", listening)
    falling = settings(learning_rate=1e-2, warmup=1, decay=1.0, momentum=0.5, epochs=3)
    steps(model, finish(new_session(model, falling)), 4)
    assert rates == pytest.approx([1e-2 / 2, 2e-2 / 3, 1e-2 / 3, 1e-2 / 3])
    assert [learning_rate(falling, step) for step in range(4)] == rates
    assert betas == {(0.5, 0.999)}
    rising = settings(learning_rate=1e-2, warmup=3, decay=0.0, epochs=2)
    assert [learning_rate(rising, step) for step in range(5)] == pytest.approx(
        [2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2]
    )


def test_a_file_is_closed_before_it_is_renamed_and_has_ordinary_permissions(tmp_path, monkeypatch):
    """Windows renames no open file; and what one person saved others of the machine may read."""
    replace_file = os.replace

    def as_on_windows(source, target):
        open_files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        if os.path.realpath(source) in open_files:
            raise PermissionError(13, "The process cannot access the file", str(source))
        replace_file(source, target)

    monkeypatch.setattr("os.replace", as_on_windows)
    (tmp_path / "usual").touch()
    for content in (b"first", b"second"):
        write_whole(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_whole(tmp_path / "file", b"third")
    assert (tmp_path / "file").read_bytes() == b"second"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "usual"}
