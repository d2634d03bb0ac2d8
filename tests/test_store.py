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
    back,
    begin,
    finish,
    generate,
    learn,
    load_model,
    load_run,
    save_run,
    teach,
)
from pxpo.embedded import TINY_WORLD
from pxpo.errors import RunError
from pxpo.store import claim, new_folder, open_run, pack, unpack, write_whole

BLUE = RewardSpec("color")


@pytest.fixture
def run(model) -> Run:
    return updated(model, finish(begin(model, settings())), 2)


@pytest.fixture
def rich(model) -> Run:
    """A run of all there is to keep: an update by a reward, and one by paint."""
    run = finish(begin(model, settings(), reward=BLUE))
    run = finish(generate(model, run))
    blue = ColorReward("blue")
    run = finish(teach(model, run, BLUE, blue(run.trajectory.images), blue))
    maps = torch.linspace(-2, 2, 2 * 16 * 16).view(2, 16, 16)
    run = replace(run, settings=replace(run.settings, learning_rate=0.004), painted=tuple(maps))
    run = finish(generate(model, run))
    return finish(teach(model, run, RewardSpec("paint"), maps))


def test_all_of_a_run_is_kept(rich, tmp_path):
    save_run(rich, tmp_path)
    again = load_run(tmp_path)
    assert_same(again, rich)
    assert again.reward == rich.reward == RewardSpec("paint")
    assert [one.reward for one in again.updates] == [None, BLUE, RewardSpec("paint")]
    assert [one.settings for one in again.updates] == [one.settings for one in rich.updates]
    assert [one.scores for one in again.updates] == [one.scores for one in rich.updates]
    assert again.latest == rich.latest and len(again.latest) == 3
    assert again.model_name == rich.model_name
    assert all(torch.equal(a, b) for a, b in zip(again.painted, rich.painted, strict=True))
    assert torch.equal(again.opinion.totals, rich.opinion.totals)
    assert torch.equal(again.opinion.counts, rich.opinion.counts)
    assert torch.equal(again.paint, rich.paint)


@pytest.mark.parametrize("pause_after", ["learn", "generate"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    model, model_folder, run, tmp_path: Path, pause_after
):
    paused = back(run, 1)
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


def test_saving_again_writes_new_updates_only_and_drops_those_gone_back_from(model, run, tmp_path):
    save_run(run, tmp_path)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "updates").iterdir()}
    other = finish(generate(model, back(run, 1)))
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
    other = replace(rich, painted=(torch.zeros(4, 4),))

    def full(path, content):
        if path.name == "run.json":
            raise OSError(28, "disk full")
        write_whole(path, content)

    monkeypatch.setattr("pxpo.store.write_whole", full)
    with pytest.raises(RunError, match="disk full"):
        save_run(other, tmp_path)
    monkeypatch.undo()
    assert torch.equal(load_run(tmp_path).painted[-1], rich.painted[-1])
    save_run(other, tmp_path)
    assert load_run(tmp_path).painted[0].shape == (4, 4)
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
    for content in ("[]", "null", "{}", '{"format": 3}', "\ufffd"):
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
        with pytest.raises(RunError, match="no run can be read"):
            load_run(tmp_path)


@pytest.mark.parametrize("format", [1, 2, 99])
def test_a_run_of_another_version_is_said_so_with_the_way_out(run, tmp_path, format):
    save_run(run, tmp_path)
    rewritten(tmp_path, format=format)
    with pytest.raises(RunError, match=f"format {format}, of another version; this one reads 3.*"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": {"kind": "poetry"}}, "no reward called 'poetry'"),
        ({"settings": {"steps": 0}}, "steps is 0"),
        ({"updates": []}, "no updates"),
        ({"paint": "../elsewhere.safetensors"}, "'../elsewhere.safetensors', outside of it"),
        ({"paint": "updates/../../elsewhere.safetensors"}, "outside of it"),
        ({"paint": "/etc/passwd"}, "outside of it"),
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
