"""Many people on one model: they take turns, one update each, and nobody holds it for long."""

from __future__ import annotations

import json
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from test_studio import BLUE, PAINT, SMALL, paint, same

from pxpo import Progress, RewardSpec, Run, finish
from pxpo.errors import BusyError, PxpoError, RunError, SettingError
from pxpo.settings import settings_for
from pxpo.store import pack
from pxpo.studio import MOST_UPDATES, SHARED, SHOWN, Bounds, Studio
from pxpo.turns import ModelThread


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    """Here one thread asks for everybody, so nobody else could end a pause."""
    monkeypatch.setattr("pxpo.turns.SIGN", 0)


@pytest.fixture
def studio(model, segmenter, tmp_path) -> Studio:
    return Studio(model, segmenter, tmp_path / "runs")


def person(thread: ModelThread, name: str, updates: int, log: list[str]) -> Iterator[Progress]:
    """Somebody's updates, of two steps each, as events of the page make them."""

    def update(number: int):
        log.append(f"{name}{number} begins")
        yield Progress("learning", 1, 2)
        yield Progress("learning", 2, 2)
        log.append(f"{name}{number} ends")

    for number in range(1, updates + 1):
        yield from thread.in_turn(update(number))
        yield Progress("learnt", number, updates)


def together(*works: Iterator[Any]) -> None:
    """Each goes on by a step, again and again, until all are done."""
    going = [*works]
    while going:
        going = [work for work in going if next(work, None) is not None]


def updates(log: list[str]) -> list[str]:
    """Which came after which, of updates of which no two were under way at once."""
    begun, ended = log[::2], log[1::2]
    assert [one.split()[0] for one in begun] == [one.split()[0] for one in ended]
    assert all("begins" in one for one in begun) and all("ends" in one for one in ended)
    return [one.split()[0] for one in begun]


def test_turns_are_taken_between_updates_and_first_come_is_first_served():
    thread, log = ModelThread(), list[str]()
    works = [thread.iterate(person(thread, name, 3, log)) for name in "abc"]
    together(*works)
    assert updates(log) == ["a1", "b1", "c1", "a2", "b2", "c2", "a3", "b3", "c3"]


def test_who_comes_in_the_middle_of_a_long_run_waits_for_one_update_of_it():
    thread, log = ModelThread(), list[str]()
    long = thread.iterate(person(thread, "a", 50, log))
    next(long)
    together(thread.iterate(person(thread, "b", 1, log)), long)
    assert updates(log)[:3] == ["a1", "b1", "a2"] and len(log) == 2 * 51


def test_whoever_waits_is_told_how_many_come_first():
    thread, log = ModelThread(), list[str]()
    a, b, c = (thread.iterate(person(thread, name, 1, log)) for name in "abc")
    assert [str(next(one)) for one in (a, b, c)] == [
        "learning 1/2", "waiting for 1 other", "waiting for 2 others",
    ]  # fmt: skip
    a.close()
    signs = [str(next(c)), str(next(b)), str(next(c))]
    assert signs == ["waiting for 1 other", "learning 1/2", "waiting for 1 other"]


def test_one_person_s_pieces_of_work_go_on_one_after_the_other():
    """Of one page, say: a new picture that is asked for during a run is shown after it."""
    thread, log, who = ModelThread(), list[str](), ["me"]
    thread.who = lambda: who[0]
    mine = [thread.iterate(person(thread, name, 2, log)) for name in "ab"]
    for one in mine:
        next(one)
    who[0] = "another"
    together(*mine, thread.iterate(person(thread, "c", 2, log)))
    assert updates(log) == ["a1", "c1", "a2", "c2", "b1", "b2"]


def test_what_is_at_hand_waits_for_one_s_own_work_and_for_nobody_else_s():
    """The picture of an example, which was made for others before."""
    thread, log, who = ModelThread(), list[str](), ["me"]
    thread.who = lambda: who[0]

    def at_hand(name: str):
        yield from thread.after_own()
        log.append(name)

    mine = [thread.iterate(person(thread, "a", 2, log)), thread.iterate(at_hand("mine"))]
    for one in mine:
        next(one)
    who[0] = "another"
    assert list(thread.iterate(at_hand("theirs"))) == [] and log[-1] == "theirs"
    together(*mine)
    assert log[-2:] == ["a2 ends", "mine"]


def test_a_full_line_is_said_to_newcomers_alone():
    thread, log = ModelThread(waiting=1), list[str]()
    a, b, c = (thread.iterate(person(thread, name, 2, log)) for name in "abc")
    assert [next(a).ahead, next(b).ahead] == [0, 1]
    with pytest.raises(BusyError, match="queue is full: 1 others.*Try again"):
        next(c)
    together(a, b)
    assert updates(log) == ["a1", "b1", "a2", "b2"]
    together(thread.iterate(person(thread, "d", 1, log)))  # there is room again
    assert updates(log)[-1] == "d1"


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("at", [1, 2, 3])  # within an update, and after it
def test_work_that_is_given_up_gives_its_turn_to_the_next(closed, at):
    """Also where nobody closes it, who should have."""
    thread, log = ModelThread(patience=60 if closed else 0), list[str]()
    a, b = (thread.iterate(person(thread, name, 2, log)) for name in "ab")
    for _ in range(at):
        next(a)
    if closed:
        a.close()
    together(b)
    assert [one for one in log if one[0] == "b"] == [
        "b1 begins", "b1 ends", "b2 begins", "b2 ends",
    ]  # fmt: skip
    assert "a2 begins" not in log
    assert list(a) == []  # it does not come back to life


def test_work_that_is_given_up_while_it_waits_leaves_the_line():
    thread, log = ModelThread(), list[str]()
    a, b, c = (thread.iterate(person(thread, name, 1, log)) for name in "abc")
    for one in (a, b, c):
        next(one)
    b.close()
    together(a, c)
    assert updates(log) == ["a1", "c1"]


def test_work_that_fails_gives_its_turn_to_the_next(studio):
    thread, log = studio.thread, list[str]()
    run = thread.call(finish, studio.start(**SMALL))
    with pytest.raises(PxpoError, match="nothing is painted"):
        list(thread.iterate(studio.step(run.id, PAINT)))
    together(thread.iterate(person(thread, "a", 1, log)))
    assert updates(log) == ["a1"]


def many(studio: Studio, run_id: str, count: int) -> Iterator[Progress]:
    for _ in range(count):
        yield from studio.step(run_id, BLUE, images=2, count=count)


@pytest.mark.slow
def test_people_who_take_turns_learn_bit_for_bit_what_they_learn_alone(studio):
    runs = [finish(studio.start(seed=seed, **SMALL)) for seed in (1, 2, 3)]
    alone = [finish(many_alone(studio, run, 3)) for run in runs]
    for run in runs:
        finish(studio.go_to(run.id, 0))
    together(*(studio.thread.iterate(many(studio, run.id, 3)) for run in runs))
    assert all(same(studio.run(run.id), one) for run, one in zip(runs, alone, strict=True))
    assert not studio.model.busy


def many_alone(studio: Studio, run: Run, count: int):
    yield from many(studio, run.id, count)
    return studio.run(run.id)


def test_a_run_that_is_taught_in_two_places_loses_no_update(studio):
    run = finish(studio.start(**SMALL))
    together(*(studio.thread.iterate(many(studio, run.id, 2)) for _ in range(2)))
    assert studio.run(run.id).count == 4


def test_a_step_that_waited_while_its_run_changed_is_refused_and_nothing_is_lost(studio):
    run, other = (finish(studio.start(seed=seed, **SMALL)) for seed in (1, 2))
    iterate, blue = studio.thread.iterate, {"reward": BLUE, "images": 2}
    for _ in range(2):
        finish(studio.step(run.id, **blue))
    busy = iterate(studio.step(other.id, **blue))
    next(busy)
    waiting = iterate(studio.step(run.id, **blue))
    assert next(waiting).ahead == 1
    finish(studio.go_to(run.id, 1))
    with pytest.raises(RunError, match="changed while this step waited.* is at step 1 now"):
        together(busy, waiting)
    assert studio.run(run.id).count == 1 and len(studio.run(run.id).later) == 1
    first, second = (iterate(studio.step(run.id, PAINT, paint(), images=2)) for _ in range(2))
    next(first), next(second)
    with pytest.raises(RunError, match="changed while this step waited.* is at step 2 now"):
        together(first, second)  # it was painted on the picture before
    assert len(studio.run(run.id).painted) == 1


def test_what_changes_a_run_waits_for_the_end_of_its_update(studio):
    run, other = (finish(studio.start(seed=seed, **SMALL)) for seed in (1, 2))
    work = studio.step(run.id, PAINT, paint())
    next(work)
    for change in (lambda i: finish(studio.go_to(i, 0)), studio.forget_wish):
        with pytest.raises(RunError, match="an update of this run is under way.*Stop"):
            change(run.id)
        assert change(other.id).count == 0
    assert finish(work).count == 1 and finish(studio.go_to(run.id, 0)).count == 0


# What one request may ask for

LIMITS = Bounds(update=40, request=100, rank=4, prompt=20)  # of 4 pictures and 3 shown, 3 steps

ASKED: dict[str, tuple[str, dict[str, Any], str]] = {
    "many steps": ("start", {"steps": 6}, "7 pictures an update × 6 denoising steps is 42; & 40"),
    "a high rank": ("start", {"rank": 5}, "rank is 5; & is 4"),
    "a long prompt": ("start", {"prompt": "a" * 21}, "prompt's length is 21; & is 20"),
    "many prompts": ("start", {"held_out_prompt": "b\n" * 11}, "length is 22; & is 20"),
    "many shown": ("start", {"shown": 30}, "34 pictures an update × 3 denoising steps is 102"),
    "many pictures": ("step", {"images": 11}, "14 pictures an update × 3 denoising steps is 42"),
    "many updates": ("step", {"images": 4, "count": 5}, "× 5 updates is 105; & is 100"),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKED.values(), ids=ASKED)
def test_what_one_request_may_ask_for_is_bounded_on_a_machine_that_many_share(studio, case):
    verb, asked, words = case
    run = finish(studio.start(**SMALL))

    def ask() -> Run:
        if verb == "start":
            return finish(studio.start(**{**SMALL, **asked}))
        return finish(studio.step(run.id, BLUE, **asked))

    studio.bounds = LIMITS
    with pytest.raises(SettingError) as refusal:
        ask()
    for part in [*words.split(" & "), "the most it can be here", "Please ", "machine of your own"]:
        assert part in str(refusal.value)
    assert studio.run(run.id) is run
    assert finish(studio.step(run.id, BLUE, images=4, count=4)).count == 1  # within all bounds
    studio.bounds = Bounds()
    assert ask()


def test_an_upload_is_bounded_as_well(studio):
    run = finish(studio.start(**{**SMALL, "rank": 5}))
    archive = studio.archive(run.id)
    studio.bounds = LIMITS
    with pytest.raises(SettingError, match="rank is 5"):
        studio.admit(archive)
    studio.bounds = Bounds()
    shows = finish(studio.start(**{**SMALL, "shown": 30}))
    folder = studio.folder / shows.id
    record = json.loads((folder / "run.json").read_text())
    record["settings"]["shown"] = 3  # of the next one
    (folder / "run.json").write_text(json.dumps(record))
    archive, studio.bounds = pack(folder, folder / "run.zip"), LIMITS
    with pytest.raises(SettingError, match="34 pictures an update"):
        studio.admit(archive)
    shutil.rmtree(folder)
    assert [folder.name for folder in studio.folder.iterdir()] == [run.id]


def test_a_hundred_usual_updates_are_within_the_bounds(studio):
    usual = studio.model.filled(settings_for("paint", shown=SHOWN))
    assert (usual.steps, usual.images) == (50, 4)  # Stable Diffusion's
    SHARED.check(usual, MOST_UPDATES)
    with pytest.raises(SettingError, match="1027 pictures an update × 50 .* is 51350; the most"):
        SHARED.check(replace(usual, images=1024), 100)


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        ([], Bounds()),
        (["--host", "127.0.0.1"], Bounds()),
        (["--host", "0.0.0.0"], SHARED),
        (["--share"], SHARED),
    ],
)
def test_the_app_has_bounds_where_others_reach_it(
    model, segmenter, tmp_path, monkeypatch, options, bounds
):
    pytest.importorskip("gradio")
    import app

    launched = []
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    monkeypatch.setattr(app, "open_models", lambda *_: (model, segmenter, ""))
    monkeypatch.setattr(app, "launch", lambda page, **_: launched.append(page.studio.bounds))
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(tmp_path), *options])
    app.main()
    assert launched == [bounds]


# On the page


def test_waiting_is_shown_sign_by_sign_and_other_progress_now_and_then():
    pytest.importorskip("gradio")
    from pxpo.ui.parts import throttled

    def work():
        for ahead in (2, 2, 1):
            yield Progress("waiting", 0, 0, ahead=ahead)
        for done in range(1, 4):
            yield Progress("denoising", done, 3)

    waiting = ["waiting for 2 others", "waiting for 2 others", "waiting for 1 other"]
    assert list(throttled(work(), str))[:3] == waiting


@pytest.mark.parametrize("has_the_turn", [True, False])
@pytest.mark.parametrize("fault", ["unread", "shown"])
def test_work_that_ends_by_an_error_gives_its_turn_back_though_the_error_is_kept(
    monkeypatch, fault, has_the_turn
):
    """An error keeps the frames that it came through, and with them the work of a generator."""
    pytest.importorskip("gradio")
    from pxpo.ui import parts

    thread, log = ModelThread(), list[str]()
    monkeypatch.setattr(parts, "unread", lambda: (fault == "unread") * 99)

    def show(progress: Progress) -> str:
        raise ValueError("it cannot be shown")

    other = thread.iterate(person(thread, "a", 1, log))
    if not has_the_turn:
        next(other)
    failing = thread.iterate(parts.throttled(person(thread, "b", 1, log), show))
    with pytest.raises(Exception, match="fetched|shown") as kept:
        next(failing)
    thread.call(lambda: None)  # what was ended there is over
    assert kept.value and len(thread._line) == (not has_the_turn)  # the other's place
    together(other)
    assert log[-1] == "a1 ends"


@pytest.mark.slow
def test_work_that_nobody_listens_to_is_dropped_and_others_are_served(model, segmenter, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    from pxpo.ui import Page, launch

    studio = Studio(model, segmenter, tmp_path)
    blocks = launch(Page(studio), prevent_thread_lock=True, quiet=True)
    try:
        client = gradio_client.Client(blocks.local_url, verbose=False)
        begin = {"seed": 0, "steps": 3, "rank": 2, "api_name": "/generate"}
        theirs, mine = (client.predict("a lake", **begin)[0] for _ in range(2))
        for _ in range(33):  # and nobody ever fetches an answer
            body = {"data": [theirs, 100, "color", None, "blue", "", "less", None, 0.03, 2]}
            request = urllib.request.Request(
                f"{blocks.local_url}gradio_api/call/run", json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )  # fmt: skip
            urllib.request.urlopen(request).close()
        while True:
            try:
                step = client.predict(mine, reward="color", images=2, api_name="/step")[1]["step"]
                break
            except Exception as error:
                assert "full" in str(error)
                time.sleep(1)
        assert step == 1
        while studio.thread._line:
            time.sleep(0.2)
        assert studio.run(theirs).count < 100  # which is the least that each of them asked for
        assert client.predict(mine, reward="color", images=2, api_name="/step")[1]["step"] == 2
    finally:
        blocks.close()


def test_a_reward_by_name_is_refused_before_the_wait(studio):
    run = finish(studio.start(**SMALL))
    thread, log = studio.thread, list[str]()
    busy = thread.iterate(person(thread, "a", 1, log))
    next(busy)
    refused = thread.iterate(studio.step(run.id, RewardSpec("paint", {"exact": True}), paint()))
    with pytest.raises(PxpoError, match="exact is for the command line"):
        next(refused)
    together(busy)
