"""A run on disk: whole or nothing, bit for bit, and nothing but a run is read."""

from __future__ import annotations

import json
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_run import assert_same, settings, updated

from pxpo import (
    ColorReward,
    RewardSpec,
    Run,
    Tools,
    begin,
    finish,
    generate,
    go_to,
    judge_of,
    learn,
    load_model,
    load_run,
    paint,
    save_run,
    teach,
)
from pxpo.embedded import TINY_WORLD
from pxpo.errors import RunError
from pxpo.rewards import Painted
from pxpo.rewards.wish import MOST_PAINTED
from pxpo.store import FORMAT, claim, new_folder, open_run, pack, unpack, write_whole

BLUE, PAINT = RewardSpec("color"), RewardSpec("paint")


def painted(model, run: Run) -> Run:
    """The run after one update more by its wish."""
    run = finish(generate(model, run))
    judge = judge_of(run, model, Tools())
    return finish(teach(model, run, PAINT, judge(run.trajectory.images), judge))


@pytest.fixture(scope="module")
def run(model_folder) -> Run:
    model = load_model(model_folder, device="cpu")
    return updated(model, finish(begin(model, settings())), 2)


@pytest.fixture(scope="module")
def rich(model_folder) -> Run:
    """A run of all there is to keep: an update by a reward, one by a wish, and more paint on the
    picture after it, in another size."""
    model = load_model(model_folder, device="cpu")
    run = finish(begin(model, settings(), reward=BLUE))
    run = finish(generate(model, run))
    blue = ColorReward("blue")
    run = finish(teach(model, run, BLUE, blue(run.trajectory.images), blue))
    run = replace(run, settings=replace(run.settings, learning_rate=0.004), reward=PAINT)
    run = painted(model, paint(run, torch.linspace(-2, 2, 16 * 16).view(16, 16)))
    return paint(run, torch.linspace(2, -1, 6 * 5).view(6, 5))


def test_all_of_a_run_is_kept(rich, tmp_path):
    save_run(rich, tmp_path)
    again = load_run(tmp_path)
    assert_same(again, rich)
    assert again.reward == rich.reward == PAINT
    assert [one.reward for one in again.updates] == [None, BLUE, PAINT]
    assert [one.settings for one in again.updates] == [one.settings for one in rich.updates]
    assert [one.scores for one in again.updates] == [one.scores for one in rich.updates]
    assert again.latest == rich.latest and len(again.latest) == 3
    assert again.model_name == rich.model_name
    assert [tuple(one.paint.shape) for one in again.painted] == [(16, 16), (6, 5)]
    for one, update, kept in zip(again.painted, rich.updates[1:], rich.painted, strict=True):
        assert torch.equal(one.picture, update.shown[0]) and one.picture.dtype == torch.uint8
        assert torch.equal(one.paint, kept.paint) and one.paint.dtype == torch.float32
    assert "met" in again.updates[2].metrics and again.met == rich.met
    assert json.loads((tmp_path / "run.json").read_text())["format"] == FORMAT == 5


def test_as_many_pictures_as_there_can_be_are_kept_in_their_order(run, tmp_path):
    """Of more than ten, too, the tenth does not come before the second."""
    many = tuple(
        Painted(torch.full((16, 16, 3), n).byte(), torch.full((4, 4), n / 16))
        for n in range(MOST_PAINTED)
    )
    save_run(replace(run, painted=many), tmp_path)
    again = load_run(tmp_path).painted
    assert [one.picture[0, 0, 0].item() for one in again] == list(range(MOST_PAINTED))
    assert [one.paint[0, 0].item() * 16 for one in again] == list(range(MOST_PAINTED))


def test_a_wish_that_was_read_again_teaches_the_same_bit_for_bit(
    model, model_folder, rich, tmp_path
):
    save_run(rich, tmp_path)
    fresh = load_model(model_folder, device="cpu")
    assert_same(painted(fresh, load_run(tmp_path)), painted(model, rich))


def test_a_wish_that_was_forgotten_is_gone_from_the_folder(rich, tmp_path):
    save_run(rich, tmp_path)
    assert len(list(tmp_path.glob("updates/paint-*"))) == 1
    save_run(replace(rich, painted=()), tmp_path)
    assert not list(tmp_path.glob("updates/paint-*"))
    assert load_run(tmp_path).painted == ()


@pytest.mark.parametrize("changed", ["picture", "paint"])
def test_paint_is_written_anew_where_picture_or_paint_changed(rich, tmp_path, changed):
    save_run(rich, tmp_path)
    (before,) = tmp_path.glob("updates/paint-*")
    *others, last = rich.painted
    other = replace(last, **{changed: vars(last)[changed].flip(0)})
    save_run(replace(rich, painted=(*others, other)), tmp_path)
    (after,) = tmp_path.glob("updates/paint-*")
    assert before != after
    assert torch.equal(vars(load_run(tmp_path).painted[-1])[changed], vars(other)[changed])


@pytest.mark.parametrize("pause_after", ["learn", "generate"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    model, model_folder, run, tmp_path: Path, pause_after
):
    paused = go_to(run, 1)
    if pause_after == "generate":
        paused = finish(generate(model, paused))
    save_run(paused, tmp_path)
    fresh = load_model(model_folder, device="cpu")
    again = load_run(tmp_path)
    assert_same(again, paused)
    if pause_after == "generate":
        judged = finish(generate(fresh, again)).trajectory
        assert torch.equal(judged.latents, paused.trajectory.latents)
    assert_same(updated(fresh, again, 1), run)


def test_what_lies_ahead_is_kept_too(run, tmp_path):
    back = go_to(run, 0)
    save_run(back, tmp_path)
    again = load_run(tmp_path)
    assert again.count == 0 and len(again.later) == 2
    assert_same(go_to(again, 2), run)


def test_saving_again_writes_new_updates_only_and_drops_those_gone_back_from(model, run, tmp_path):
    save_run(run, tmp_path)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "updates").iterdir()}
    other = finish(generate(model, go_to(run, 1)))
    other = finish(learn(model, other, -other.trajectory.images[:, 0]))
    save_run(other, tmp_path)
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "updates").iterdir()}
    assert len(now) == 3 and len(written.keys() & now.keys()) == 2
    assert all(now[name] == written[name] for name in written.keys() & now.keys())
    assert_same(load_run(tmp_path), other)


def test_a_crash_while_saving_leaves_the_last_good_run(model, run, tmp_path, monkeypatch):
    save_run(run, tmp_path)
    longer = updated(model, run, 1)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(RunError, match="disk full"):
        save_run(longer, tmp_path)
    monkeypatch.undo()
    assert_same(load_run(tmp_path), run)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == files


def test_paint_that_was_replaced_goes_with_the_run_that_names_it(rich, tmp_path, monkeypatch):
    """A crash between the new paint and run.json leaves the old paint in its place."""
    save_run(rich, tmp_path)
    other = replace(rich, painted=(Painted(rich.painted[0].picture, torch.zeros(4, 4)),))

    def full(path, content):
        if path.name == "run.json":
            raise OSError(28, "disk full")
        write_whole(path, content)

    monkeypatch.setattr("pxpo.store.write_whole", full)
    with pytest.raises(RunError, match="disk full"):
        save_run(other, tmp_path)
    monkeypatch.undo()
    assert_same(load_run(tmp_path), rich)
    save_run(other, tmp_path)
    assert_same(load_run(tmp_path), other)
    assert len(list(tmp_path.glob("updates/paint-*"))) == 1


def rewritten(folder: Path, **changes: object) -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, **changes}))


def test_what_cannot_be_resumed_is_said(run, tmp_path):
    with pytest.raises(RunError, match="no run can be read"):
        load_run(tmp_path / "nothing")
    save_run(run, tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / record["updates"][1]["file"]).write_bytes(b"not a tensor")
    with pytest.raises(RunError, match="no run can be read"):
        load_run(tmp_path)
    for content in ("[]", "null", "{}", '{"format": 5}', "\ufffd"):
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
        with pytest.raises(RunError, match="no run can be read"):
            load_run(tmp_path)


@pytest.mark.parametrize("format", [1, 2, 3, 4, 6, 99])
def test_a_run_of_another_version_is_said_so_with_the_way_out(run, tmp_path, format):
    save_run(run, tmp_path)
    rewritten(tmp_path, format=format)
    words = f"format {format}, of another version; this one reads 5.*lora/"
    with pytest.raises(RunError, match=words):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": {"kind": "poetry"}}, "no reward called 'poetry'"),
        ({"settings": {"steps": 0}}, "steps is 0"),
        ({"updates": []}, "updates is .*at least 1 item"),
        ({"paint": "../elsewhere.safetensors"}, "paint is '../elsewhere.safetensors': .* match"),
        ({"paint": "updates/../../elsewhere.safetensors"}, "paint is .* match"),
        ({"paint": "/etc/passwd"}, "paint is .* match"),
    ],
)
def test_a_record_that_cannot_be_is_refused(run, tmp_path, changes, words):
    save_run(run, tmp_path)
    rewritten(tmp_path, **changes)
    with pytest.raises(RunError, match=words):
        load_run(tmp_path)


def test_a_zip_holds_the_run_and_its_lora_and_is_taken_like_a_folder(rich, tmp_path):
    here = tmp_path / "here"
    save_run(rich, here)
    for name in ("lora/README.md", "notes.txt", "lora/deep/file", "pxpo-run.zip", ".env"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("x")
    archive = pack(here, tmp_path / "a run.zip")
    packed = set(zipfile.ZipFile(archive).namelist())
    updates = {f"updates/{path.name}" for path in (here / "updates").iterdir()}
    assert packed == {"run.json", "lora/README.md", *updates}
    for number in (1, 2):  # never into the same folder twice
        run, folder = open_run(archive)
        assert folder == tmp_path / f"a run-{number}"
        assert_same(run, rich)
        assert not (folder / "lora").exists()
    assert open_run(here)[1] == here


def test_what_is_not_a_run_is_not_unpacked(rich, tmp_path):
    save_run(rich, tmp_path / "run")
    archive = pack(tmp_path / "run", tmp_path / "run.zip")
    (tmp_path / "text.zip").write_text("not a zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as packed:
        packed.writestr("hello.txt", "hello")
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as packed:
        packed.writestr("run.json", "{}")
        packed.writestr("../outside", "x")
        packed.writestr("updates/../../outside.safetensors", "x")
        packed.writestr("/outside.safetensors", "x")
    before = {path.name for path in tmp_path.iterdir()}
    for name in ("text", "empty", "out"):
        with pytest.raises(RunError):
            open_run(tmp_path / f"{name}.zip")
    with pytest.raises(RunError, match="GB"):
        unpack(archive, tmp_path / "small", most_bytes=1000)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_runs_begun_at_once_never_share_a_folder(tmp_path):
    begin_at_once = threading.Barrier(8)

    def numbered(_: int) -> Path:
        begin_at_once.wait()
        return claim(new_folder(tmp_path / "runs", "color"))

    def named(_: int) -> Path | None:
        begin_at_once.wait()
        try:
            return claim(tmp_path / "mine")
        except RunError:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(numbered, range(8)))) == 8
        assert sum(folder is not None for folder in pool.map(named, range(8))) == 1


def test_a_folder_that_is_there_is_taken_unless_it_holds_a_run(run, tmp_path):
    (tmp_path / "note.txt").touch()
    save_run(run, claim(tmp_path))
    with pytest.raises(RunError, match="holds a run already.*resume"):
        claim(tmp_path)


def test_the_embedded_model_is_found_wherever_it_lies(run, tmp_path):
    save_run(replace(run, model_name=str(TINY_WORLD)), tmp_path)
    assert str(TINY_WORLD) not in (tmp_path / "run.json").read_text()
    assert load_run(tmp_path).model_name == str(TINY_WORLD)


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


def test_all_of_a_run_has_ordinary_permissions(rich, tmp_path):
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").touch()
    save_run(rich, claim(new_folder(tmp_path, "run")))
    pack(tmp_path / "run-1", tmp_path / "zip.zip")
    _, unpacked = open_run(tmp_path / "zip.zip")
    for folder in (tmp_path / "run-1", unpacked):
        for path in (folder, *folder.rglob("*")):
            usual = tmp_path / "usual" if path.is_dir() else tmp_path / "usual" / "file"
            assert path.stat().st_mode == usual.stat().st_mode
