"""The disk: whose place it is, what a run takes of it and of memory, and what happens when it
refuses: nothing is lost, and memory and disk agree."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_studio import BLUE, PAINT, SMALL, paint, same

from pxpo import Run, finish, load_run
from pxpo.errors import RunError
from pxpo.store import keep_others_out, pack, save_run, size_of
from pxpo.studio import IN_USE, Studio

FULL = OSError(28, "No space left on device")
READ_ONLY = OSError(30, "Read-only file system")


@pytest.fixture
def studio(model, segmenter, tmp_path) -> Studio:
    return Studio(model, segmenter, tmp_path / "runs")


@pytest.fixture
def run(studio) -> Run:
    return finish(studio.start(**SMALL))


def agrees(studio: Studio, run: Run) -> bool:
    """Whether memory and disk hold this run, with its paint."""
    kept = [studio.run(run.id), load_run(studio.folder / run.id)]
    return all(same(one, run) and len(one.painted) == len(run.painted) for one in kept)


# Memory


def file_of(tensor: torch.Tensor) -> str:
    """Where the system reads this memory from; empty for memory that is only memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, *_, name = (line + " ").split(" ", 5)
        low, high = (int(bound, 16) for bound in bounds.split("-"))
        if low <= tensor.data_ptr() < high:
            return name.strip()
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory is seen on Linux alone")
def test_a_run_takes_as_much_memory_as_its_newest_update(studio, run):
    for reward in (BLUE, PAINT, BLUE):
        now = finish(studio.step(run.id, reward, paint(), images=2))
    for number, one in enumerate(now.updates[:-1]):
        tensors = [*one.lora.weights.values(), *one.optimizer.values(), one.shown]
        files = {file_of(tensor) for tensor in tensors}
        (file,) = files
        assert Path(file).parent == studio.folder / run.id / "updates"
        assert Path(file).name.startswith(f"{number:04d}-")
    assert not file_of(now.updates[-1].shown).startswith(str(studio.folder))
    assert agrees(studio, now)


def test_a_run_at_rest_keeps_no_tensor_of_a_lora_open(studio, run):
    """There are hundreds in an update, and what each takes beside its values adds up."""
    for _ in range(3):
        now = finish(studio.step(run.id, BLUE, images=2))
    again = load_run(studio.folder / run.id)
    for one in (*now.updates[:-1], *again.updates):
        for held in (one.lora.weights, one.optimizer):
            assert not any(isinstance(value, torch.Tensor) for value in vars(held).values())
            first, second = (next(iter(held.values())) if held else None for _ in range(2))
            assert first is None or (first is not second and torch.equal(first, second))
    assert same(pickle.loads(pickle.dumps(again)), again)  # for another process, with its values
    with pytest.raises(KeyError, match="unknown"):
        again.lora.weights["unknown"]


def test_a_run_at_rest_goes_back_and_on_bit_for_bit(studio, run):
    runs = [run] + [finish(studio.step(run.id, BLUE, images=2)) for _ in range(3)]
    for count in (2, 1, 0):
        assert same(finish(studio.go_to(run.id, count)), runs[count])
        assert agrees(studio, runs[count])
        assert same(finish(studio.step(run.id, BLUE, images=2)), runs[count + 1])


def test_an_update_is_written_once_also_after_it_was_read_again(studio, run, model, segmenter):
    finish(studio.step(run.id, BLUE, images=2))
    files = {path: path.stat().st_mtime_ns for path in studio.folder.glob("*/updates/*")}
    for place in (studio, Studio(model, segmenter, studio.folder)):
        finish(place.step(run.id, BLUE, images=2))
        now = {path: path.stat().st_mtime_ns for path in studio.folder.glob("*/updates/*")}
        assert files.items() < now.items() and len(now) == len(files) + 1
        files = now


def test_each_lora_is_read_through_once_for_its_file_s_name(studio, run, monkeypatch):
    read = []
    monkeypatch.setattr("pxpo.lora.digest", lambda tensors: read.append(len([*tensors])) or "x")
    for _ in range(5):
        finish(studio.step(run.id, BLUE, images=2))
    assert len(read) <= 2 * 6  # when it is new, and when it is at rest


# Whose place it is


def aged(studio: Studio, *runs: Run) -> None:
    """Left alone for a little longer than what is in use, the first for longest."""
    for number, one in enumerate(reversed(runs)):
        then = time.time() - IN_USE - 60 * (number + 1)
        os.utime(studio.folder / one.id, (then, then))


def there(studio: Studio) -> set[str]:
    return {folder.name for folder in studio.folder.iterdir()}


def test_uploads_and_new_runs_never_cost_a_run_in_use_its_place(studio, run, tmp_path):
    mine = finish(studio.step(run.id, BLUE, images=2))
    left = finish(studio.start(seed=9, **SMALL))
    archive = shutil.copy(studio.archive(mine.id), tmp_path / "upload.zip")
    shutil.rmtree(studio.folder / mine.id / "lora")
    (studio.folder / mine.id / "pxpo-run.zip").unlink()
    aged(studio, left)
    studio.most_bytes = 5 * size_of(studio.folder / mine.id)
    admitted = []
    with pytest.raises(RunError, match="the disk space for runs here.*in use.*try again"):
        for _ in range(10):
            admitted.append(studio.admit(archive))
    assert there(studio) == {mine.id, *(one.id for one in admitted)} and len(admitted) > 1
    with pytest.raises(RunError, match="in use"):
        for seed in range(100):
            finish(studio.start(seed=seed, **SMALL))
    assert agrees(studio, mine)
    on = finish(studio.step(mine.id, BLUE, images=2))  # by the place that new runs leave it
    assert agrees(studio, on)
    assert size_of(studio.folder) < 1.1 * studio.most_bytes  # the names of tensors are not counted


def test_what_was_only_begun_makes_room_after_some_minutes_and_before_what_was_taught(studio, run):
    taught = finish(studio.step(run.id, BLUE, images=2))
    begun = [finish(studio.start(seed=seed, **SMALL)) for seed in (1, 2)]
    for one, minutes in ((taught, 70), (begun[0], 11), (begun[1], 9)):
        then = time.time() - 60 * minutes
        os.utime(studio.folder / one.id, (then, then))
    studio.most_bytes = 1.2 * size_of(studio.folder)
    new = finish(studio.start(seed=3, **SMALL))
    assert there(studio) == {taught.id, begun[1].id, new.id}


def test_the_opening_is_copied_once_for_all_who_download_it(studio, run):
    studio.opening = replace(finish(studio.step(run.id, BLUE, images=2)), id="")
    before = there(studio)
    first = studio.lora_file("")
    assert studio.lora_file("") == first and studio.archive("").parent == first.parent.parent
    assert len(there(studio) - before) == 1


def test_a_run_that_is_read_never_takes_the_place_of_a_newer_one(studio, run, monkeypatch):
    read = studio._read

    def slowly(run_id):
        old = read(run_id)
        studio._remember(newer)  # an update ends meanwhile
        return old

    newer = finish(studio.step(run.id, BLUE, images=2))
    studio.forget(run.id)
    monkeypatch.setattr(studio, "_read", slowly)
    assert studio.run(run.id) is newer and studio.run(run.id) is newer


def test_what_is_looked_at_is_in_use(studio):
    runs = [finish(studio.start(seed=seed, **SMALL)) for seed in (1, 2, 3)]
    aged(studio, *runs)
    studio.run(runs[0].id)
    studio.most_bytes = 2.5 * size_of(studio.folder / runs[0].id)
    new = finish(studio.start(seed=4, **SMALL))
    assert there(studio) == {runs[0].id, new.id}


def test_a_run_that_finds_no_room_to_grow_is_as_before(studio, run):
    others = [finish(studio.start(seed=seed, **SMALL)) for seed in (7, 8, 9)]
    studio.most_bytes = size_of(studio.folder) + 100
    with pytest.raises(RunError, match="in use"):
        finish(studio.step(run.id, BLUE, images=2))
    assert all(agrees(studio, one) for one in (run, *others))
    aged(studio, *others)
    assert finish(studio.step(run.id, BLUE, images=2)).count == 1
    assert run.id in there(studio) and others[0].id not in there(studio)


def test_one_upload_takes_half_of_the_space_at_most(studio, run, tmp_path):
    archive = shutil.copy(studio.archive(run.id), tmp_path / "upload.zip")
    studio.most_bytes = 1.9 * size_of(studio.folder / run.id / "updates")
    with pytest.raises(RunError, match="the most that is taken in here"):
        studio.admit(archive)
    assert there(studio) == {run.id}


@pytest.mark.parametrize(
    "copy",
    [
        lambda studio: studio.lora_folder(""),
        lambda studio: studio.archive(""),
        lambda studio: studio.forget_wish(""),
        lambda studio: finish(studio.go_to("", 0)),
    ],
    ids=["lora", "archive", "forget", "go to"],
)
def test_a_copy_of_the_opening_finds_room_or_is_refused(studio, run, copy):
    before, size = there(studio), size_of(studio.folder / run.id)
    studio.opening = replace(run, id="")
    studio.most_bytes = size_of(studio.folder) + 100
    with pytest.raises(RunError, match="in use"):
        copy(studio)
    assert there(studio) == before
    studio.most_bytes += 4 * size
    copy(studio)
    assert len(there(studio)) == len(before) + 1


def test_a_download_s_zip_takes_no_room_once_the_run_goes_on(studio, run):
    archive = studio.archive(run.id)
    assert archive.exists() and agrees(studio, finish(studio.step(run.id, BLUE, images=2)))
    assert not archive.exists()


def test_nothing_but_runs_is_ever_deleted(studio, run):
    for name in ("my-photos", "experiments-2024", ".in-use"):
        (studio.folder / name).mkdir()
        (studio.folder / name / "file").write_text("x")
        os.utime(studio.folder / name, (0, 0))
    (studio.folder / "abcdefghijklmnop").write_text("a file of 16 letters")
    aged(studio, run)
    studio.most_bytes = 1000
    with pytest.raises(RunError, match="in use"):
        finish(studio.start(seed=9, **SMALL))
    assert there(studio) == {"my-photos", "experiments-2024", ".in-use", "abcdefghijklmnop"}


def test_a_clock_that_was_ahead_keeps_no_run_for_ever(studio, run):
    """Nor does it cost a run its place: it counts as used now."""
    ahead = time.time() + 10**8
    os.utime(studio.folder / run.id, (ahead, ahead))
    studio.most_bytes = 1000
    with pytest.raises(RunError, match="in use"):
        finish(studio.start(seed=9, **SMALL))
    assert agrees(studio, run)
    assert (studio.folder / run.id).stat().st_mtime < ahead - 10**7


# What happens when the disk refuses


class Refusing:
    """os.replace, which refuses after a number of files."""

    def __init__(self, error: OSError, after: int) -> None:
        self.error, self.left, self.replace = error, after, os.replace

    def __call__(self, *names, **options) -> None:
        if self.left == 0:
            raise self.error
        self.left -= 1
        self.replace(*names, **options)


@pytest.mark.parametrize("error", [FULL, READ_ONLY], ids=["full", "read-only"])
@pytest.mark.parametrize("after", [0, 1, 2])  # of an update, its paint, and run.json
def test_an_update_that_cannot_be_saved_is_nowhere(studio, run, monkeypatch, error, after):
    before = finish(studio.step(run.id, PAINT, paint()))
    more = paint(slice(0, 4), slice(0, 0))
    with monkeypatch.context() as refusing:
        refusing.setattr("os.replace", Refusing(error, after))
        with pytest.raises(RunError, match=f"cannot be saved.*{error.strerror}.*is lost"):
            finish(studio.step(run.id, PAINT, more))
        assert agrees(studio, before)
        with pytest.raises(RunError, match="cannot be saved"):
            studio.forget_wish(run.id)
        assert agrees(studio, before)
    after_it = finish(studio.step(run.id, PAINT, more))
    assert after_it.count == 2 and agrees(studio, after_it)
    assert len(list((studio.folder / run.id / "updates").iterdir())) == 4  # with one of paint
    assert not [path for path in (studio.folder / run.id).rglob(".*")]


@pytest.mark.parametrize("error", [FULL, READ_ONLY], ids=["full", "read-only"])
def test_a_beginning_or_an_upload_that_cannot_be_saved_leaves_nothing(
    studio, run, tmp_path, monkeypatch, error
):
    archive = shutil.copy(studio.archive(run.id), tmp_path / "upload.zip")

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("os.replace", refuse)
    monkeypatch.setattr("zipfile.ZipFile.extract", refuse)
    for work in (lambda: finish(studio.start(seed=9, **SMALL)), lambda: studio.admit(archive)):
        with pytest.raises(RunError, match=error.strerror):
            work()
    monkeypatch.undo()
    assert there(studio) == {run.id} and agrees(studio, run)


def test_what_cannot_be_cleared_away_does_not_make_a_saved_run_fail(studio, run, monkeypatch):
    """As on Windows, where a file that is looked at cannot be deleted."""
    for _ in range(2):
        finish(studio.step(run.id, BLUE, images=2))
    finish(studio.go_to(run.id, 0))

    def refuse(*_, **__):
        raise PermissionError(13, "in use")

    with monkeypatch.context() as refusing:
        refusing.setattr("pathlib.Path.unlink", refuse)
        now = finish(studio.step(run.id, BLUE, images=3))
    assert agrees(studio, now)
    now = finish(studio.step(run.id, BLUE, images=3))
    assert agrees(studio, now)
    assert len(list((studio.folder / run.id / "updates").iterdir())) == 3


@pytest.mark.parametrize("gone", ["run", "updates", "update", "all"])
def test_a_folder_that_is_deleted_under_a_run_in_use_comes_back(studio, run, gone):
    before = finish(studio.step(run.id, PAINT, paint()))
    folder = studio.folder / run.id
    if gone == "update":
        next((folder / "updates").glob("0000-*")).unlink()
    else:
        places = {"run": folder, "updates": folder / "updates", "all": studio.folder}
        shutil.rmtree(places[gone])
    assert same(studio.run(run.id), before)
    now = finish(studio.step(run.id, BLUE, images=2))
    assert now.count == 2 and agrees(studio, now)
    assert same(finish(studio.go_to(run.id, 1)), before)


def test_what_is_downloaded_is_there_though_its_folder_was_deleted(studio, run):
    now = finish(studio.step(run.id, BLUE, images=2))
    shutil.rmtree(studio.folder / run.id)
    assert studio.lora_file(run.id).exists()
    shutil.rmtree(studio.folder / run.id)
    assert same(studio.admit(studio.archive(run.id)), now)


def test_a_download_that_the_disk_refuses_is_said_and_leaves_no_half(studio, run, monkeypatch):
    monkeypatch.setattr("os.replace", Refusing(FULL, 0))
    with pytest.raises(RunError, match="No space left"):
        pack(studio.folder / run.id, studio.folder / run.id / "run.zip")
    with pytest.raises(RunError, match="No space left"):
        studio.archive(run.id)
    monkeypatch.undo()
    assert not [path for path in (studio.folder / run.id).rglob("*zip*")]
    monkeypatch.setattr("pathlib.Path.write_text", Refusing(FULL, 0))
    with pytest.raises(RunError, match="No space left"):
        studio.lora_folder(run.id)


def test_a_picture_that_cannot_be_served_is_one_clear_line(monkeypatch):
    gradio = pytest.importorskip("gradio")
    from pxpo.ui.parts import errors_as_messages

    with pytest.raises(gradio.Error, match="No space left on device.*saved is lost"):
        with errors_as_messages():
            raise FULL


# Two servers


def test_a_folder_is_one_server_s_until_it_ends(tmp_path):
    folder = tmp_path / "some" / "runs"
    with keep_others_out(folder):
        with pytest.raises(RunError, match="another process works.*--runs"):
            keep_others_out(folder)
    keep_others_out(folder).close()


def test_where_a_disk_knows_no_locks_the_server_runs_all_the_same(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    keep_others_out(tmp_path).close()


@pytest.mark.parametrize("fault", ["taken", "a file", "read-only"])
def test_the_app_says_what_is_wrong_with_its_folder_before_it_loads_a_model(
    tmp_path, monkeypatch, fault
):
    pytest.importorskip("gradio")
    import app

    folder = tmp_path / "runs"
    words = {"taken": "another process", "a file": "cannot be saved", "read-only": "Read-only"}
    if fault == "taken":
        kept = keep_others_out(folder)
    elif fault == "a file":
        folder.write_text("x")
    else:
        monkeypatch.setattr("pathlib.Path.mkdir", lambda *_, **__: Refusing(READ_ONLY, 0)())
    monkeypatch.setattr(app, "open_models", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(folder)])
    with pytest.raises(SystemExit, match=f"app.py: .*{words[fault]}"):
        app.main()
    if fault == "taken":
        kept.close()


def test_a_run_is_saved_whole_where_it_was_never_before(studio, run, tmp_path):
    """At rest or not: what is saved is what the run is."""
    for _ in range(3):
        now = finish(studio.step(run.id, BLUE, images=2))
    save_run(now, tmp_path / "elsewhere")
    shutil.rmtree(studio.folder)
    assert same(load_run(tmp_path / "elsewhere"), now)
