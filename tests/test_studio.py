"""Many people's runs on one model: kept, found again, apart from each other."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pxpo.studio
from pxpo import RewardSpec, Run, Score, finish, generate, judge_of, load_run
from pxpo.errors import LoraError, PxpoError, RewardError, RunError, SettingError
from pxpo.rewards import Wish
from pxpo.studio import Studio

SMALL = {"prompt": "a", "steps": 3, "rank": 2}
BLUE, PAINT = RewardSpec("color"), RewardSpec("paint")


@pytest.fixture
def studio(model, segmenter, tmp_path) -> Studio:
    return Studio(model, segmenter, tmp_path / "runs")


@pytest.fixture
def run(studio) -> Run:
    return finish(studio.start(**SMALL))


def paint(green: slice = slice(0, 8), red: slice = slice(8, 16), side: int = 32) -> Image.Image:
    """Paint of twice the picture's size: green on some rows, red on others."""
    layer = np.zeros((side, side, 4), np.uint8)
    layer[green] = (0, 255, 0, 153)
    layer[red] = (255, 0, 0, 153)
    return Image.fromarray(layer)


def scores(run: Run, name: str) -> list[Score]:
    """By the reward of this name, of each update that has one."""
    return [update.scores[name] for update in run.updates if name in update.scores]


def same(one: Run, other: Run) -> bool:
    return len(one.updates) == len(other.updates) and all(
        torch.equal(a.shown, b.shown)
        and all(torch.equal(a.lora.weights[k], b.lora.weights[k]) for k in a.lora.weights)
        for a, b in zip(one.updates, other.updates, strict=True)
    )


def test_a_painted_step_learns_and_brings_the_next_picture(studio, run):
    after = finish(studio.step(run.id, PAINT, paint()))
    assert after.count == 1 and after.id == run.id
    assert not torch.equal(after.picture, run.picture)
    assert len(scores(after, "painted")) == 2
    (painted,) = after.painted
    assert torch.equal(painted.picture, run.updates[0].shown[0])
    assert painted.paint.shape == (16, 16)  # the picture's
    assert (painted.paint[:4] == 2).all() and (painted.paint[4:8] == -2).all()
    assert not painted.paint[8:].any()
    # Its pictures are as many as the model's own, and each is judged by the wish.
    assert after.updates[1].settings.images == studio.model.defaults["images"]
    judged = finish(generate(studio.model, replace(run, settings=after.settings))).trajectory
    maps = judge_of(after, studio.model, studio.tools)(judged.images)
    assert len(maps) == 4 and maps.std() > 0
    assert after.updates[1].metrics["reward"] == pytest.approx(maps.mean().item(), abs=1e-6)


def test_a_step_without_paint_goes_on_with_the_wish(studio, run):
    first = finish(studio.step(run.id, PAINT, paint()))
    second = finish(studio.step(run.id, PAINT))
    assert second.count == 2 and second.painted is first.painted
    assert not torch.equal(second.picture, first.picture)
    third = finish(studio.step(run.id, BLUE, images=2))
    assert finish(studio.step(run.id, PAINT)).painted is third.painted is first.painted


def test_paint_on_two_pictures_adds_up_and_is_kept(studio, run, tmp_path):
    finish(studio.step(run.id, PAINT, paint()))
    after = finish(studio.step(run.id, PAINT, paint(slice(20, 24), slice(0, 0))))
    one, other = after.painted
    for number, painted in enumerate((one, other)):
        assert torch.equal(painted.picture, after.updates[number].shown[0])
    assert (one.paint < 0).any() and not (other.paint < 0).any()
    studio.forget(run.id)
    for kept in (
        studio.run(run.id), load_run(studio.folder / run.id), studio.admit(studio.archive(run.id)),
    ):  # fmt: skip
        assert len(kept.painted) == 2
        for a, b in zip(kept.painted, after.painted, strict=True):
            assert torch.equal(a.picture, b.picture) and torch.equal(a.paint, b.paint)


def test_more_paint_gives_the_scores_of_all_updates_anew(studio, run):
    finish(studio.step(run.id, PAINT, paint()))
    before = finish(studio.step(run.id, PAINT))
    after = finish(studio.step(run.id, PAINT, paint(slice(0, 0), slice(0, 32))))
    assert len(after.latest) == 4
    assert all(new != old for new, old in zip(after.latest, before.latest, strict=False))
    judge = judge_of(after, studio.model, studio.tools)
    for update, score in zip(after.updates, after.latest, strict=True):
        maps = judge(update.shown.permute(0, 3, 1, 2) / 255)
        assert score.here == pytest.approx(maps[0].mean().item(), abs=1e-6)
        assert score.held_out == pytest.approx(maps[1:].mean().item(), abs=1e-6)
    went_on = finish(studio.step(run.id, PAINT))
    assert went_on.latest[:4] == after.latest


def test_a_wish_that_is_forgotten_is_gone_and_what_was_learnt_stays(studio, run):
    learnt = finish(studio.step(run.id, PAINT, paint()))
    forgotten = studio.forget_wish(run.id)
    assert forgotten.painted == () and same(forgotten, learnt)
    studio.forget(run.id)
    assert studio.run(run.id).painted == ()  # on disk as well
    with pytest.raises(RunError, match="nothing is painted"):
        finish(studio.step(run.id, PAINT))
    with pytest.raises(RunError, match="nothing is painted"):
        studio.heat(forgotten, PAINT)
    assert finish(studio.step(run.id, BLUE, images=2)).count == 2
    (painted,) = finish(studio.step(run.id, PAINT, paint())).painted
    assert torch.equal(painted.picture, studio.run(run.id).updates[2].shown[0])


def test_a_wish_that_is_met_is_refused_and_more_paint_goes_on(studio, run, monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(Wish, "met", lambda wish, maps: next(answers))
    met = finish(studio.step(run.id, PAINT, paint()))
    assert met.met
    with pytest.raises(RunError, match="the wish is met.*Paint something else, or forget"):
        finish(studio.step(run.id, PAINT))
    assert studio.run(run.id) is met
    assert finish(studio.step(run.id, BLUE, images=2)).count == 2  # it is no matter of colours
    monkeypatch.setattr(Wish, "met", lambda wish, maps: False)
    more = finish(studio.step(run.id, PAINT, paint(slice(0, 4), slice(0, 0))))
    assert more.count == 3 and len(more.painted) == 2 and not more.met


def test_a_wish_that_is_met_as_soon_as_it_is_painted_is_not_kept(studio, run):
    with pytest.raises(RunError, match="the wish is met"):
        finish(studio.step(run.id, PAINT, paint(slice(0, 32), slice(0, 0))))  # more of all
    assert studio.run(run.id) is run


def test_red_paint_that_is_too_little_to_be_heard_is_said_to_be_so(studio, run, monkeypatch):
    """And not that it is met, as what was just painted red is there."""
    monkeypatch.setattr(Wish, "met", lambda wish, maps: True)
    with pytest.raises(RunError, match="so little is painted red"):
        finish(studio.step(run.id, PAINT, paint(slice(0, 0), slice(0, 1))))
    assert studio.run(run.id) is run


def test_a_wish_that_other_rewards_have_met_is_refused(studio, run, monkeypatch):
    finish(studio.step(run.id, PAINT, paint()))
    after = finish(studio.step(run.id, BLUE, images=2))
    monkeypatch.setattr(Wish, "met", lambda wish, maps: True)
    with pytest.raises(RunError, match="the wish is met"):
        finish(studio.step(run.id, PAINT))
    assert studio.run(run.id) is after


def test_the_map_itself_is_no_reward_here(studio, run):
    with pytest.raises(RewardError, match="exact is for the command line"):
        finish(studio.step(run.id, PAINT.changed(exact=True), paint()))
    assert studio.run(run.id) is run


def test_strength_is_how_far_a_step_moves_the_model(studio, run):
    for strength in (0.01, 0.1):
        after = finish(studio.step(run.id, BLUE, images=2, strength=strength))
        assert after.updates[-1].settings.strength == strength
        assert after.updates[-1].metrics["moved"] == pytest.approx(strength, rel=0.16)
    assert finish(studio.step(run.id, BLUE, images=2)).settings.strength == 0.03


def test_an_automatic_step_judges_images_of_its_own(studio, run):
    after = finish(studio.step(run.id, BLUE, images=3))
    assert after.updates[1].settings.images == 3
    judged = scores(after, "less blue")
    shown = after.updates[1].shown / 255
    assert judged[1].here == pytest.approx(-shown[0, ..., 2].mean().item(), abs=1e-6)
    assert judged[1].held_out == pytest.approx(-shown[1:, ..., 2].mean().item(), abs=1e-6)
    spread = shown[1:, ..., 2].mean((1, 2)).std(correction=0).item()
    assert judged[1].held_out_std == pytest.approx(spread, abs=1e-6)
    found = finish(studio.step(run.id, RewardSpec("segment", {"more": True}), images=2))
    assert [len(scores(found, name)) for name in ("less blue", "more Hair")] == [2, 3]
    assert scores(found, "more Hair")[2].here > 0
    painted = finish(studio.step(run.id, PAINT, paint()))
    assert painted.updates[3].settings == run.settings  # those of painting again


def test_the_curve_and_the_heat_map_follow_the_wish(studio, run):
    assert studio.curve(run) is None
    after = finish(studio.step(run.id, PAINT, paint()))
    lines = studio.curve(after).axes[0].get_lines()
    assert [len(line.get_xdata()) for line in lines] == [2, 2]
    assert [line.get_label() for line in lines] == ["this seed", "other seeds"]  # the page's words
    blue, painted = (studio.heat(after, reward) for reward in (BLUE, PAINT))
    assert blue.size == painted.size == (16, 16)
    assert painted.tobytes() != blue.tobytes()
    again = finish(studio.step(run.id, PAINT, paint(slice(0, 0), slice(0, 32))))
    assert studio.heat(replace(again, updates=after.updates), PAINT).tobytes() != painted.tobytes()


def test_the_heat_map_is_there_while_another_run_learns_and_does_not_disturb_it(studio):
    one, other = (finish(studio.start(seed=seed, **SMALL)) for seed in (1, 2))
    one = finish(studio.step(one.id, PAINT, paint()))
    alone = finish(studio.step(other.id, PAINT, paint()))
    finish(studio.go_to(other.id, 0))
    studio.forget_wish(other.id)
    heat, work, busy = studio.heat(one, PAINT).tobytes(), studio.step(other.id, PAINT, paint()), 0
    while True:
        try:
            next(work)
        except StopIteration as end:
            assert same(end.value, alone)
            break
        busy += studio.model.busy
        assert studio.heat(one, PAINT).tobytes() == heat
    assert busy > 3 and not studio.model.busy


def test_a_run_is_found_again_by_another_studio_and_goes_on_alike(studio, run):
    finish(studio.step(run.id, PAINT, paint()))
    again = Studio(studio.model, studio.segmenter, studio.folder)
    found = again.run(run.id)
    assert same(found, studio.run(run.id))
    assert torch.equal(found.painted[0].paint, studio.run(run.id).painted[0].paint)
    assert found.latest == studio.run(run.id).latest
    assert found.reward == PAINT.changed(segmenter=studio.segmenter.name)
    here = finish(studio.step(run.id, PAINT, paint()))
    assert same(finish(again.step(run.id, PAINT, paint())), here)


def test_back_gives_the_weights_and_the_picture_of_that_step(studio, run):
    first = finish(studio.step(run.id, PAINT, paint()))
    finish(studio.step(run.id, BLUE, images=2))
    back = finish(studio.go_to(run.id, 1))
    assert same(back, first) and torch.equal(back.picture, first.picture)
    assert len(scores(back, "painted")) == 2 and len(scores(back, "less blue")) == 2
    assert torch.equal(finish(studio.go_to(run.id, 0)).picture, run.picture)


def test_stopping_in_the_middle_leaves_the_run_as_it_was(studio, run):
    before = finish(studio.step(run.id, PAINT, paint()))
    for phase in ("judging what was shown", "denoising", "learning", "measuring", "showing"):
        work = studio.step(run.id, PAINT, paint(slice(0, 4), slice(0, 0)))
        while next(work).phase != phase:
            pass
        work.close()
        assert not studio.model.busy
        assert studio.run(run.id) is before and len(before.painted) == 1
        assert len(load_run(studio.folder / run.id).painted) == 1  # nor has it heard the new paint
    assert len(finish(studio.step(run.id, PAINT, paint())).painted) == 2


def test_what_cannot_be_learnt_from_is_refused_and_nothing_is_lost(studio, run):
    for reward, layer, error in (
        (PAINT, None, RunError),
        (PAINT, Image.new("RGBA", (8, 8)), RunError),
        (RewardSpec("color", {"color": "no such colour"}), None, RewardError),
        (RewardSpec("segment", {"labels": ["Unicorn"]}), None, RewardError),
        (RewardSpec("segment", {"labels": []}), None, RewardError),
    ):
        with pytest.raises(error):
            finish(studio.step(run.id, reward, layer))
    with pytest.raises(SettingError, match="strength is -1"):
        finish(studio.step(run.id, PAINT, paint(), strength=-1))
    assert studio.run(run.id) is run


def test_a_run_has_an_end(studio, run, monkeypatch):
    monkeypatch.setattr(pxpo.studio, "MOST_UPDATES", 1)
    finish(studio.step(run.id, PAINT, paint()))
    with pytest.raises(RunError, match="1 updates"):
        finish(studio.step(run.id, PAINT, paint()))


@pytest.mark.parametrize("name", ["", "unknown-run-name", "../../etc/passwd", "a" * 16])
def test_an_unknown_run_is_said_so(studio, run, name):
    with pytest.raises(RunError):
        studio.run(name)


def test_runs_do_not_touch_each_other(studio):
    one, other = (finish(studio.start(seed=seed, **SMALL)) for seed in (1, 2))
    alone = finish(studio.step(one.id, PAINT, paint()))
    finish(studio.go_to(one.id, 0))
    work, between = studio.step(one.id, PAINT, paint()), finish(studio.go_to(other.id, 0))
    assert same(finish(work), alone)
    assert same(between, other)


def test_a_beginning_is_made_once_for_all_who_begin_so(studio, run, monkeypatch):
    again = studio.start(**SMALL)
    with pytest.raises(StopIteration) as end:
        next(again)
    other = end.value.value
    assert other.id != run.id and other.updates is run.updates
    finish(studio.step(other.id, PAINT, paint()))
    assert studio.run(run.id).count == 0
    monkeypatch.setattr(pxpo.studio, "MOST_BEGUN", 1)
    for seed in (5, 0, 5):  # another's, and then this one anew
        assert list(studio.start(**SMALL | {"seed": seed}))


def test_memory_is_bounded_and_what_was_forgotten_is_read_again(studio, monkeypatch):
    monkeypatch.setattr(pxpo.studio, "IN_MEMORY", 2)
    runs = [finish(studio.start(seed=seed, **SMALL)) for seed in range(4)]
    assert [studio.run(runs[3].id) is runs[3], studio.run(runs[0].id) is runs[0]] == [True, False]
    studio.forget(runs[3].id)
    assert same(studio.run(runs[3].id), runs[3])


def test_disk_is_bounded_and_the_run_left_alone_longest_goes(studio):
    first, second = (finish(studio.start(seed=seed, **SMALL)) for seed in (1, 2))
    for age, run in ((200, second), (100, first)):
        os.utime(studio.folder / run.id, (1e9 - age, 1e9 - age))
    size = sum(file.stat().st_size for file in studio.folder.rglob("*") if file.is_file())
    studio.most_bytes = 1.2 * size
    third = finish(studio.start(seed=3, **SMALL))
    assert {folder.name for folder in studio.folder.iterdir()} == {first.id, third.id}
    with pytest.raises(RunError, match="no longer kept"):
        studio.run(second.id)
    studio.most_bytes = 0  # the run at hand stays, whatever its size
    assert finish(studio.go_to(third.id, 0)).count == 0


def test_a_downloaded_run_goes_on_after_its_upload(studio, run, tmp_path):
    finish(studio.step(run.id, PAINT, paint()))
    admitted = studio.admit(studio.archive(run.id))
    assert admitted.id != run.id and same(admitted, studio.run(run.id))
    ours, theirs = (finish(studio.step(i, BLUE, images=2)) for i in (run.id, admitted.id))
    assert same(ours, theirs)


def test_only_runs_are_admitted(studio, run, tmp_path):
    archive = studio.archive(run.id)
    (tmp_path / "text.zip").write_text("not a zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as packed:
        packed.writestr("hello.txt", "hello")
    with zipfile.ZipFile(archive) as good, zipfile.ZipFile(tmp_path / "out.zip", "w") as packed:
        record = json.loads(good.read("run.json"))
        record["updates"][0]["file"] = "../" + record["updates"][0]["file"]
        packed.writestr("run.json", json.dumps(record))
        packed.writestr("../../outside", "x")
    for name in ("text", "empty", "out"):
        with pytest.raises(RunError):
            studio.admit(tmp_path / f"{name}.zip")
    assert not (tmp_path / "outside").exists()
    studio.most_bytes = 1000
    with pytest.raises(RunError, match="GB"):
        studio.admit(archive)
    assert [folder.name for folder in studio.folder.iterdir()] == [run.id]


def test_a_run_of_another_base_model_is_refused(studio, run, segmenter, tmp_path):
    from conftest import random_pipeline

    from pxpo import load_model

    pipeline = random_pipeline()
    pipeline.unet = type(pipeline.unet)(**{**pipeline.unet.config, "block_out_channels": (16, 16)})
    pipeline.save_pretrained(tmp_path / "other")
    other = Studio(load_model(tmp_path / "other", device="cpu"), segmenter, tmp_path / "others")
    here = Path(studio.model.name).name
    with pytest.raises(RunError, match=f"model '{here}', and here is 'other'"):
        other.admit(studio.archive(run.id))
    namesake = changed(studio.archive(run.id), tmp_path, model=str(tmp_path / "other"))
    with pytest.raises(LoraError, match="does not fit"):
        other.admit(namesake)
    assert issubclass(LoraError, PxpoError) and not list(Path(other.folder).iterdir())


def changed(archive: Path, folder: Path, **record: object) -> Path:
    """A downloaded run whose run.json says something else."""
    with zipfile.ZipFile(archive) as good, zipfile.ZipFile(folder / "changed.zip", "w") as packed:
        for name in good.namelist():
            content = good.read(name)
            if name == "run.json":
                content = json.dumps({**json.loads(content), **record}).encode()
            packed.writestr(name, content)
    return folder / "changed.zip"


def test_a_run_cannot_name_a_folder_of_the_server(studio, run, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    (private / "key.pem").write_text("secret")
    with pytest.raises(RunError, match="model 'private', and here is"):
        studio.admit(changed(studio.archive(run.id), tmp_path, model=str(private)))
    assert [folder.name for folder in studio.folder.iterdir()] == [run.id]


def test_a_download_tells_neither_the_run_s_name_nor_where_it_lies(studio, run):
    """Whoever knows the name can go on with the run."""
    finish(studio.step(run.id, PAINT, paint()))
    with zipfile.ZipFile(studio.archive(run.id)) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    secrets = run.id.encode(), str(studio.folder).encode()
    assert not [name for name, content in files.items() if any(one in content for one in secrets)]


@pytest.mark.parametrize("elsewhere", ["/home/ada/", "C:\\Users\\ada\\", "/"])
def test_a_run_of_the_same_model_elsewhere_is_welcome(studio, run, tmp_path, elsewhere):
    name = elsewhere + Path(studio.model.name).name
    admitted = studio.admit(changed(studio.archive(run.id), tmp_path, model=name))
    assert admitted.model_name == studio.model.name
    studio.forget(admitted.id)
    assert studio.run(admitted.id).model_name == studio.model.name


def test_a_run_that_lies_here_since_another_model_ran_is_said_so(studio, run):
    studio.forget(run.id)
    studio.model.name = "another/model"
    with pytest.raises(RunError, match="here is 'another/model'"):
        studio.run(run.id)


def test_a_picture_with_paint_on_it_is_told_from_the_paint_alone(studio, run):
    """What the person painted counts, and not the picture's own green and red."""
    layer = paint(slice(0, 8), slice(0, 0))
    picture = Image.fromarray((run.picture * 255).round().byte().permute(1, 2, 0).numpy())
    whole = picture.resize(layer.size, Image.Resampling.LANCZOS).convert("RGBA")
    one = finish(studio.step(run.id, PAINT, Image.alpha_composite(whole, layer)))
    # A random model's picture has greens on which green paint cannot be seen, and no other fault.
    painted = one.painted[0].paint
    assert not painted[4:].any() and painted[:4].mean() > 1.6
    with pytest.raises(RunError, match="nothing is painted"):
        finish(studio.step(finish(studio.start(**SMALL)).id, PAINT, whole))


def test_a_picture_that_is_shown_is_the_one_to_paint_on(studio, run):
    for reward in (PAINT, BLUE):
        run = finish(studio.step(run.id, reward, paint()))
        assert torch.equal(run.picture, run.updates[-1].shown[0].permute(2, 0, 1) / 255)


def test_a_reward_that_paints_by_label_learns_as_in_its_experiment(studio, run):
    by_label = RewardSpec("paint", {"more": ["Hair"], "less": ["Background"]})
    after = finish(studio.step(run.id, by_label))
    assert after.updates[1].settings == run.settings and after.painted == ()
    assert len(after.latest) == 2 and not after.met


def test_the_segmenter_of_an_update_is_named_for_other_places(studio, run):
    after = finish(studio.step(run.id, RewardSpec("segment"), images=2))
    assert after.updates[1].reward.options["segmenter"] == studio.segmenter.name
    assert after.reward.make().segmenter.labels == studio.segmenter.labels
    with pytest.raises(RewardError, match="here is only"):
        other = RewardSpec("segment", {"segmenter": "somebody/else"})
        finish(studio.step(run.id, other, images=2))
