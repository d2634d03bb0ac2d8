"""What paints beside the brush: whole things, things by name, masks; and what undoes it."""

# ruff: noqa: F811  # a test takes a fixture by its name

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

gradio = pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")

from test_app import (  # noqa: E402
    PATIENCE,
    address,
    clear,
    download,
    new_picture,
    plain,
    press,
    red_on,
    run_of,
    says,
    settle,
    stroke,
    studio,
    take_red,
    touch,
    visit,
    wish,
)  # fmt: skip

from pxpo import finish, painted_map  # noqa: E402
from pxpo.embedded import TINY_WORLD  # noqa: E402
from pxpo.errors import RewardError  # noqa: E402
from pxpo.rewards import as_paint  # noqa: E402
from pxpo.rewards.segmentation import things  # noqa: E402
from pxpo.ui.canvas import MINUS, PLUS, WIDTH, fitted, to_tensor  # noqa: E402
from pxpo.ui.parts import large  # noqa: E402

__all__ = ["address", "plain", "studio", "visit"]  # fixtures

pytestmark = pytest.mark.skipif(
    not (TINY_WORLD / "model_index.json").exists(), reason="Tiny World has not been made"
)


# Without a browser.


@pytest.fixture
def ways(plain):
    return plain.ways


BLANK = torch.zeros(16, 16)
PICTURE = torch.rand((3, 16, 16), generator=torch.Generator().manual_seed(0))


def marked(**where: slice) -> torch.Tensor:
    strokes = BLANK.clone()
    for colour, rows in where.items():
        strokes[rows] = {"green": 2.0, "red": -2.0}[colour]
    return strokes


def saved(picture: Image.Image, folder: Path) -> str:
    picture.save(folder / "mask.png")
    return str(folder / "mask.png")


def test_the_brush_is_as_wide_as_the_eraser_and_thinner_than_a_crown(ways):
    editor = ways.canvas.editor
    assert editor.brush.default_size == editor.eraser.default_size == WIDTH / 2 == 14


def test_invert_paints_what_is_bare_in_the_brush_s_colour(ways):
    strokes = marked(green=slice(0, 4), red=slice(4, 6))
    assert torch.equal(ways.inverted(strokes, PICTURE, MINUS), marked(red=slice(6, 16)))
    assert torch.equal(ways.inverted(BLANK, PICTURE, PLUS), marked(green=slice(0, 16)))


def test_nothing_to_grow_or_to_undo_is_said(ways):
    with pytest.raises(gradio.Error, match="Dab on something first"):
        ways.grown(BLANK, PICTURE)
    with pytest.raises(gradio.Error, match="nothing to undo"):
        ways.undone(BLANK, PICTURE, None)
    assert torch.equal(ways.undone(BLANK, PICTURE, marked(red=slice(3))), marked(red=slice(3)))


def test_a_thing_by_its_name_is_painted_over_what_was_there(ways, monkeypatch):
    classes = torch.zeros(16, 16, dtype=torch.long)
    classes[8:] = ways.studio.segmenter.index("Hair")
    monkeypatch.setattr(ways.studio, "classes", lambda picture: classes)
    strokes = marked(green=slice(6, 10))
    painted = ways.with_named(strokes, PICTURE, MINUS, "Hair")
    assert torch.equal(painted, marked(green=slice(6, 8), red=slice(8, 16)))
    with pytest.raises(gradio.Error, match="no Upper-clothes in this picture"):
        ways.with_named(strokes, PICTURE, PLUS, "Upper-clothes")
    for unknown in ("", None, "Zeppelin"):
        with pytest.raises(RewardError, match="no label.*it knows Background, Hair"):
            ways.with_named(strokes, PICTURE, PLUS, unknown)


@pytest.mark.parametrize(("brush", "colour"), [(PLUS, "green"), (MINUS, "red")])
def test_a_mask_of_any_size_is_painted_in_the_brush_s_colour(ways, tmp_path, brush, colour):
    mask = np.zeros((32, 8), np.uint8)
    mask[:8] = 255
    file = saved(Image.fromarray(mask), tmp_path)
    strokes = marked(green=slice(10, 12))
    painted = ways.with_mask(strokes, PICTURE, brush, file)
    assert torch.equal(painted[:4], marked(**{colour: slice(0, 4)})[:4])
    assert torch.equal(painted[4:], strokes[4:])  # nothing that was painted is lost


@pytest.mark.parametrize("brush", [PLUS, MINUS])
def test_a_painted_picture_keeps_its_colours(ways, tmp_path, brush):
    strokes = marked(green=slice(0, 4), red=slice(12, 16))
    painted = ways.with_mask(BLANK, PICTURE, brush, saved(as_paint(strokes), tmp_path))
    assert torch.equal(painted, strokes)


def test_what_is_no_mask_is_said(ways, tmp_path):
    with pytest.raises(gradio.Error, match="Nothing is painted in this picture"):
        ways.with_mask(BLANK, PICTURE, PLUS, saved(Image.new("L", (4, 4)), tmp_path))
    (tmp_path / "mask.png").write_text("no picture")
    with pytest.raises(RewardError, match="cannot be read"):
        ways.with_mask(BLANK, PICTURE, PLUS, str(tmp_path / "mask.png"))
    photograph = Image.linear_gradient("L")
    with pytest.raises(RewardError, match="neither black nor white"):
        ways.with_mask(BLANK, PICTURE, PLUS, saved(photograph, tmp_path))


def test_the_list_waits_until_somebody_looks(ways):
    run = finish(ways.studio.start(prompt="a lake", steps=2, rank=2))
    looked = []
    ways.studio.classes = lambda picture: looked.append(picture) or torch.ones(9, 9).long()
    for run_id, is_open in (("", False), ("", True), (run.id, False)):
        assert ways.listed(run_id, is_open, None) == gradio.skip()
    assert not looked  # there is no picture, or nobody to see what is in it
    listed = ways.listed(run.id, True, "Background")  # which is not there any more
    assert listed.choices == [("Hair", "Hair")] and listed.value == "Hair"
    assert looked[0].shape == (3, 512, 512)
    both = torch.ones(9, 9).long()
    both[0] = 0
    ways.studio.classes = lambda picture: both
    assert ways.listed(run.id, True, None).value == "Hair"  # the largest
    assert ways.listed(run.id, True, "Background").value == "Background"  # as chosen before


def test_only_what_is_painted_can_be_downloaded(ways):
    with pytest.raises(gradio.Error, match="Nothing is painted yet"):
        ways.saved("", None, None, 0)
    paint = as_paint(marked(green=slice(0, 4)))
    file = Path(ways.saved("", {"layers": [paint]}, None, 0))
    assert file.name == "paint.png" and Image.open(file).tobytes() == paint.tobytes()


# In a browser.


def open_ways(page) -> None:
    page.get_by_role("button", name="More ways to paint").click()
    page.wait_for_function(
        "document.querySelector('#named input')?.value", timeout=PATIENCE
    )  # the list has come


def painted(page, folder: Path) -> torch.Tensor:
    """The map of the paint on the canvas, as the page downloads it."""
    return painted_map(Image.open(download(page, "save-paint", folder / "paint.png")))


def classes_of(studio) -> torch.Tensor:
    """What the segmenter sees on the canvas."""
    return studio.classes(to_tensor(large(run_of(studio).picture)))


def within(mask: torch.Tensor, page) -> tuple[float, float]:
    """A place well within a mask (H, W) of the picture, in shares of the canvas around it."""
    left = mask.float()[None]
    while (thinner := -F.max_pool2d(-F.pad(left, (1, 1, 1, 1)), 3, 1)).any():
        left = thinner
    y, x = left[0].nonzero()[0].tolist()
    zoom = page.locator("#ed").get_by_text(re.compile(r"^\d+%$")).inner_text()
    box = page.locator("#ed canvas").first.bounding_box()
    scale = int(zoom.rstrip("%")) / 100  # the picture is in the middle
    return (
        0.5 + scale * (x + 0.5 - mask.shape[1] / 2) / box["width"],
        0.5 + scale * (y + 0.5 - mask.shape[0] / 2) / box["height"],
    )


def largest(studio) -> list[torch.Tensor]:
    """The two largest things of the canvas, as masks (H, W)."""
    numbers = things(classes_of(studio))
    found, sizes = numbers.unique(return_counts=True)
    return [numbers == found[index] for index in sizes.argsort(descending=True)[:2]]


def await_red(page) -> None:
    """Wait until there is paint: nothing to download is refused."""
    for _ in range(PATIENCE // 1000):
        if red_on(page) > 1:
            return
        page.wait_for_timeout(1000)
    pytest.fail("the canvas shows no red")


def becomes(page, folder: Path, wanted: torch.Tensor) -> None:
    """Wait until this is painted, but for a few pixels, which the editor may smooth."""
    for _ in range(PATIENCE // 4000):
        if (painted(page, folder) == wanted).float().mean() > 0.995:
            return settle(page)
        page.wait_for_timeout(1000)
    pytest.fail("the canvas shows other paint")


@pytest.mark.slow
def test_dabs_grow_into_whole_things_which_count_and_can_be_undone(visit, studio, tmp_path):
    page = visit()
    new_picture(page)
    open_ways(page)
    page.locator("#grow").click()
    page.get_by_text("Dab on something first").wait_for(timeout=PATIENCE)
    good, bad = largest(studio)
    stroke(page, *within(good, page), *within(good, page))
    take_red(page)
    stroke(page, *within(bad, page), *within(bad, page))
    dabs = painted(page, tmp_path)
    for sign in (1, -1):  # as round as the brush
        rows, columns = (sign * dabs > 0).nonzero().T
        for side in (rows, columns):
            assert abs(side.max() - side.min() + 1 - WIDTH) <= 2
    page.locator("#grow").click()
    becomes(page, tmp_path, 2.0 * good - 2.0 * bad)
    page.locator("#undo").click()
    becomes(page, tmp_path, dabs)
    page.locator("#undo").click()  # and that as well
    becomes(page, tmp_path, 2.0 * good - 2.0 * bad)
    press(page, "step", "Step 1 ·")
    ((green, red),) = wish(studio)
    assert green == pytest.approx(100 * good.float().mean().item(), abs=2)
    assert red == pytest.approx(100 * bad.float().mean().item(), abs=2)
    settle(page)
    page.locator("#save-paint").click()  # what the wish has heard is off the canvas
    page.get_by_text("Nothing is painted yet").wait_for(timeout=PATIENCE)


@pytest.mark.slow
def test_a_finger_s_dab_grows_and_a_stroke_after_it_counts_too(visit, studio, tmp_path):
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    new_picture(page)
    open_ways(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    thing, other = largest(studio)
    touch(page, *within(thing, page), *within(thing, page))
    page.locator("#grow").tap()
    becomes(page, tmp_path, 2.0 * thing)
    take_red(page)
    touch(
        page, *within(other, page), *within(other, page)
    )  # a finger still paints on the renewed canvas
    both = painted(page, tmp_path)
    assert (both > 0).sum() > 0.9 * thing.sum() and (both < 0).sum() > WIDTH**2 / 2
    clear(page)
    settle(page)
    page.locator("#save-paint").tap()  # cleared as any paint
    page.get_by_text("Nothing is painted yet").wait_for(timeout=PATIENCE)


@pytest.mark.slow
def test_a_thing_is_painted_without_a_pointer(visit, studio, tmp_path):
    page = visit()
    new_picture(page)
    page.locator("#brush input").first.focus()
    page.keyboard.press("Tab")  # Gradio's radios are each on their own: no arrow leads to another
    page.keyboard.press("Space")
    page.get_by_role("button", name="More ways to paint").focus()
    page.keyboard.press("Enter")
    names = page.get_by_label("Found in the picture")
    page.wait_for_function("document.querySelector('#named input')?.value", timeout=PATIENCE)
    found = studio.segmenter.found(classes_of(studio))
    assert names.input_value() == found[0] and len(found) > 1
    names.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "(name) => document.querySelector('#named input').value === name", arg=found[1]
    )
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "paint-named"
    page.keyboard.press("Enter")
    thing = -2.0 * (classes_of(studio) == studio.segmenter.index(found[1]))
    await_red(page)
    becomes(page, tmp_path, thing)
    page.locator("#step").focus()
    page.keyboard.press("Enter")
    says(page, "Step 1 ·")
    ((green, red),) = wish(studio)
    assert green == 0 and red > 0
    assert red == pytest.approx(100 * (thing < 0).float().mean().item(), abs=2)


@pytest.mark.slow
def test_masks_are_taken_in_inverted_and_come_back_as_they_left(visit, studio, tmp_path):
    page = visit()
    new_picture(page)
    take_red(page)
    open_ways(page)
    mask = np.zeros((64, 64), np.uint8)
    mask[:16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "broken.png").write_text("no picture")

    def upload(file: Path) -> None:
        with page.expect_file_chooser() as chooser:
            page.locator("#upload-mask").click()
        chooser.value.set_files(file)

    upload(tmp_path / "broken.png")
    page.get_by_text("cannot be read").wait_for(timeout=PATIENCE)
    upload(tmp_path / "mask.png")
    await_red(page)
    wanted = fitted(-2.0 * torch.from_numpy(mask > 0), torch.zeros(512, 512))
    becomes(page, tmp_path, wanted)
    (tmp_path / "paint.png").rename(tmp_path / "mine.png")
    page.locator("#brush input").first.check()
    page.locator("#invert").click()
    becomes(page, tmp_path, 2.0 * (wanted == 0))
    clear(page)
    settle(page)
    upload(tmp_path / "mine.png")
    await_red(page)
    becomes(page, tmp_path, wanted)  # red, though the brush is green now


@pytest.mark.slow
def test_what_was_heard_is_not_heard_again_after_it_was_forgotten(visit, studio):
    page = visit()
    new_picture(page)
    stroke(page, 0.3, 0.5, 0.7, 0.5)
    press(page, "step", "Step 1 ·")
    press(page, "step", "Step 2 ·")
    press(page, "forget", "Forgotten")  # while the strokes are on their way off the canvas
    settle(page)
    page.locator("#step").click()
    page.locator("#status").get_by_text("Paint + or −").wait_for(timeout=PATIENCE)
    assert wish(studio) == []
