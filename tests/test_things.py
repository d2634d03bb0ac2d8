"""Connected things in a segmenter's classes, and paint that is grown to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pxpo.rewards import as_paint, painted_map, whole_things
from pxpo.rewards.segmentation import connected, things


def drawn(*rows: str) -> torch.Tensor:
    """A map (H, W) of digits; a dot is 0."""
    return torch.tensor([[0 if one == "." else int(one) for one in row] for row in rows])


def same_parts(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two maps of numbers divide the plane alike, and agree on what is 0."""
    pairs = torch.stack([one, other]).flatten(1).unique(dim=1)
    alike = pairs.shape[1] == len(one.unique()) == len(other.unique())
    return alike and torch.equal(one == 0, other == 0)


def by_walking(mask: torch.Tensor) -> torch.Tensor:
    """`connected`, pixel by pixel."""
    numbers = torch.zeros(mask.shape, dtype=torch.long)
    for number, start in enumerate(mask.nonzero().tolist(), start=1):
        walk = [] if numbers[tuple(start)] else [start]
        while walk:
            y, x = walk.pop()
            inside = 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]
            if inside and mask[y, x] and not numbers[y, x]:
                numbers[y, x] = number
                walk += [[y + down, x + right] for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return numbers


def spiral(side: int) -> torch.Tensor:
    """One line, two pixels from itself: the longest way through a picture."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    y, x, down, right = 0, 0, 0, 1
    mask[0, 0] = True
    for length in [side - 1, *(n for n in range(side - 1, 0, -2) for _ in range(2))]:
        for _ in range(length):
            y, x = y + down, x + right
            mask[y, x] = True
        down, right = right, -down
    return mask


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (12, 17)])
def test_connected_parts_are_those_that_one_can_walk(share, size):
    for seed in range(5):
        mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share
        assert same_parts(connected(mask), by_walking(mask))


def test_a_long_way_is_one_part_and_soon_found():
    mask = spiral(257)
    assert mask.float().mean() > 0.45 and len(connected(mask).unique()) == 2
    dots = torch.zeros(256, 256, dtype=torch.bool)
    dots[::2, ::2] = True  # a thing for every second pixel is no more work
    assert len(connected(dots).unique()) == 128 * 128 + 1
    assert whole_things(2.0 * dots, dots.long()).eq(2 * dots).all()


def test_things_are_the_connected_parts_of_each_class():
    classes = drawn("2200", "2203", "0033", "2033")
    wanted = drawn("1122", "1123", "4433", "5433")
    wanted[2, :2] = wanted[3, 1] = 2  # corners touch: (1, 2) and (2, 1)
    assert same_parts(things(classes), wanted)
    assert len(things(torch.zeros(3, 4, dtype=torch.long)).unique()) == 1


SCENE = drawn(
    "00000000",
    "01100110",
    "01100110",
    "00000000",
    "22222222",
    "22333322",
)  # two trees of class 1 in a sky, and a lake of class 3 in a meadow


def strokes(**dabs: list[tuple[int, int]]) -> torch.Tensor:
    marks = torch.zeros(SCENE.shape)
    for colour, sign in (("green", 2.0), ("red", -2.0)):
        for y, x in dabs.get(colour, ()):
            marks[y, x] = sign
    return marks


def test_a_dab_grows_to_the_one_thing_under_it():
    grown = whole_things(strokes(green=[(1, 1)], red=[(5, 3)]), SCENE)
    tree = (SCENE == 1) & (torch.arange(8) < 4)
    assert torch.equal(grown, 2.0 * tree - 2.0 * (SCENE == 3))  # the other tree stays bare


def test_what_a_dab_touches_beside_that_thing_is_let_go():
    beyond = strokes(green=[(2, 1), (2, 2), (3, 2)])  # two pixels of a tree, one of the sky
    assert torch.equal(whole_things(beyond, SCENE), whole_things(strokes(green=[(2, 1)]), SCENE))
    mostly_sky = strokes(green=[(2, 2), (3, 2), (3, 3)])
    assert torch.equal(whole_things(mostly_sky, SCENE), 2.0 * (SCENE == 0))


def test_a_stroke_over_several_things_keeps_those_that_it_covers():
    trees = [(y, x) for y in (1, 2) for x in (1, 2, 5, 6)]
    line = strokes(red=[*trees, (1, 3), (1, 4)])  # over both, by way of the sky
    assert torch.equal(whole_things(line, SCENE), -2.0 * (SCENE == 1))
    half = strokes(red=[(2, x) for x in range(2, 7)])  # of the left tree only a corner
    assert torch.equal(whole_things(half, SCENE)[:, :4], -2.0 * (SCENE == 0)[:, :4])


def test_each_dab_grows_by_itself_and_each_colour():
    both = whole_things(strokes(green=[(1, 1), (2, 5)], red=[(4, 0), (5, 4)]), SCENE)
    wanted = 2.0 * (SCENE == 1) - 2.0 * (SCENE == 2) - 2.0 * (SCENE == 3)
    assert torch.equal(both, wanted)
    assert torch.equal(whole_things(both, SCENE), both)  # also where neighbours are one stroke now
    assert not whole_things(strokes(), SCENE).any()


def test_a_map_is_the_same_after_it_was_paint():
    values = torch.tensor([[2.0, -2.0, 0.0], [0.0, 2.0, 0.0]])
    paint = as_paint(values)
    assert (paint.mode, paint.size) == ("RGBA", (3, 2))
    assert torch.equal(painted_map(paint), values)
    assert paint.getpixel((0, 0)) == (0, 255, 0, 153)  # as the page's brush has it
    faint = torch.tensor([[1.0, 0.9, -1.0, -0.9]])
    assert painted_map(as_paint(faint)).tolist() == [[2, 0, -2, 0]]


def test_white_on_black_may_mean_less():
    mask = Image.fromarray(np.array([[0, 255, 102]], np.uint8))
    torch.testing.assert_close(painted_map(mask, white=-2), torch.tensor([[0, -2, -0.8]]))
    paint = as_paint(torch.tensor([[2.0, -2.0, 0.0]]))
    assert painted_map(paint, white=-2).tolist() == [[2, -2, 0]]  # colours speak for themselves


def test_what_a_segmenter_found_is_named_by_size_without_specks(segmenter):
    classes = torch.zeros(50, 40, dtype=torch.long)
    classes[:30] = 2
    assert segmenter.found(classes) == ["Upper-clothes", "Background"]
    classes[0, 0] = 1  # one pixel of two thousand
    assert segmenter.found(classes) == ["Upper-clothes", "Background"]
    classes[0, :5] = 1
    assert segmenter.found(classes) == ["Upper-clothes", "Background", "Hair"]
