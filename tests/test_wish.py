"""What was painted on one picture is meant of any: by what looks like it, and by the latest word.

The pictures are made by hand of a few flat colours, and the features are the colours themselves.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import avg_pool2d, normalize

from pxpo.errors import RewardError
from pxpo.rewards import Painted, Sight, Wish, add_paint
from pxpo.rewards.wish import LOUDER, MOST_PAINTED, NEIGHBOURS, PROBABILITIES, SHARPNESS

COLOURS = {
    "r": (0.9, 0.1, 0.1),
    "g": (0.1, 0.8, 0.1),
    "b": (0.1, 0.1, 0.9),
    "y": (0.9, 0.9, 0.1),
    "w": (0.9, 0.9, 0.9),
    "k": (0.05, 0.05, 0.05),
}
CELL = 4
"""Pixels along a latent pixel."""


def picture(*rows: str) -> torch.Tensor:
    """(H, W, 3) uint8: a letter for the colour of each 8 x 8 latent pixels, row by row."""
    colours = torch.tensor([[COLOURS[letter] for letter in row] for row in rows])
    side = 8 * CELL
    large = colours.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return (large * 255).round().byte()


def paint(*rows: str) -> torch.Tensor:
    """(H, W): + is green, - is red, anything else is bare; a letter for 8 x 8 latent pixels."""
    values = torch.tensor([[{"+": 2.0, "-": -2.0}.get(letter, 0.0) for letter in r] for r in rows])
    side = 8 * CELL
    return values.repeat_interleave(side, 0).repeat_interleave(side, 1)


def colours_of(images: torch.Tensor) -> torch.Tensor:
    """Features by which like colours are alike: (B, 3, h, w)."""
    return avg_pool2d(images, CELL)


def image(*rows: str) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]: the same as an image to be judged."""
    return picture(*rows).permute(2, 0, 1)[None] / 255


def meant(wish: Wish, *rows: str) -> list[list[float]]:
    """What is meant by each letter of a picture: the mean over its 8 x 8 latent pixels."""
    maps = wish(image(*rows))
    assert maps.shape == (1, len(rows) * 8 * CELL, len(rows[0]) * 8 * CELL)
    return avg_pool2d(maps, 8 * CELL)[0].tolist()


def near(*values: float):
    return pytest.approx(list(values), abs=0.1)


def wish_of(*painted: tuple[torch.Tensor, torch.Tensor], eye=None) -> Wish:
    return Wish([Painted(*one) for one in painted], Sight(colours_of, eye))


def test_paint_is_carried_to_what_looks_like_it_wherever_that_is():
    wish = wish_of((picture("rgb", "wkb"), paint("+-.", "...")))
    assert meant(wish, "rgb", "wkb") == [near(2, -2, 0), near(0, 0, 0)]
    assert meant(wish, "wgk", "brg") == [near(0, -2, 0), near(0, 2, -2)]
    assert meant(wish, "rrr", "rrr") == [near(2, 2, 2), near(2, 2, 2)]
    assert meant(wish, "kkk", "kkk") == [near(0, 0, 0), near(0, 0, 0)]


def test_what_was_never_painted_means_nothing():
    wish = wish_of((picture("rgbwk"), paint("+....")))
    assert meant(wish, "gbwkg") == [near(0, 0, 0, 0, 0)]
    nothing = wish_of((picture("rgbwk"), paint(".....")))
    assert not nothing(image("krbgw")).any()


def test_what_two_pictures_say_adds_up():
    wish = wish_of((picture("rbkkb"), paint("+....")), (picture("gwkwg"), paint(".-.-.")))
    assert meant(wish, "rgbwk") == [near(2, 0, 0, -2, 0)]


def test_what_a_later_picture_leaves_bare_goes_on_meaning_what_it_meant():
    first = picture("rgbwk"), paint("+-...")
    for others in ([picture("rgbrg")], [picture("rgbrg"), picture("grwgr")]):
        later = [(one, paint("..-..")) for one in others]
        wish = wish_of(first, *later)
        last = "b" if len(others) == 1 else "bw"
        wanted = {"r": 2, "g": -2, "b": 0, "w": 0, "k": 0} | {letter: -2 for letter in last}
        assert meant(wish, "rgbwk") == [near(*wanted.values())]


def test_the_latest_word_wins_where_a_mind_is_changed_on_a_later_picture():
    wish = wish_of((picture("rgbwk"), paint("+-...")), (picture("rgbky"), paint("-+...")))
    assert meant(wish, "rgbwk") == [near(-2, 2, 0, 0, 0)]
    again = wish_of(
        (picture("rgbwk"), paint("+-...")), (picture("rgbky"), paint("-+...")),
        (picture("gryyk"), paint("-+...")),
    )  # fmt: skip
    assert meant(again, "rgbwk") == [near(2, -2, 0, 0, 0)]


def test_what_was_said_of_one_thing_stays_however_often_another_is_painted():
    """Its own pixels are gone from the later pictures, as the person wanted."""
    painted = [(picture("rgbwk"), paint("-...."))]
    for number in range(MOST_PAINTED - 1):
        after = picture("ggbwk" if number % 2 else "bgbwk")
        after[0, 0] = number  # no two are the same picture
        painted.append((after, paint(".+...")))
    assert meant(wish_of(*painted), "rgbwk") == [near(-2, 2, 0, 0, 0)]


def test_the_latest_word_wins_against_any_number_of_earlier_ones():
    painted = [(picture("rgbwk"), paint("+....")) for _ in range(6)]
    for number, (one, _) in enumerate(painted):
        one[0, 0] = number
    ((red, *others),) = meant(wish_of(*painted, (picture("rgbky"), paint("-...."))), "rgbwk")
    assert red < -1 and others == near(0, 0, 0, 0)
    later = [(picture("bgrwk"), paint(".+...")) for _ in range(2)]
    ((red, *_),) = meant(wish_of(*painted, (picture("rgbky"), paint("-....")), *later), "rgbwk")
    assert red < -1


def test_the_order_of_two_words_is_what_tells_them_apart():
    red, green = (picture("rgbk"), paint("-...")), (picture("rbgk"), paint("+..."))
    assert meant(wish_of(red, green), "grbk") == [near(0, 2, 0, 0)]
    assert meant(wish_of(green, red), "grbk") == [near(0, -2, 0, 0)]


def test_paint_is_louder_than_the_bare_pixels_around_it():
    """A tenth of the red pixels is painted: what is meant is red, though nine are bare."""
    strokes = torch.zeros(8 * CELL, 40 * CELL)
    strokes[:4 * CELL, 4 * CELL: 6 * CELL] = 2.0  # fmt: skip
    wish = wish_of((picture("rgbwk"), strokes))
    ((red, *others),) = meant(wish, "rgbwk")
    assert 0.15 < red < 2 and others == near(0, 0, 0, 0)
    once = 8 / 64 * LOUDER / (8 / 64 * LOUDER + 56 / 64) * 2  # of all alike, were all asked
    assert red > once


@dataclass
class Known:
    """A pixel of a painted picture: how it looks, what it means, how much it counts."""

    looks: torch.Tensor
    value: float
    weight: float


def exactly(pictures: torch.Tensor, paints: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """The same pixel by pixel, in the words of the module: what is meant by `asked` (N, 3), of
    pictures (K, P, 3) whose latent pixels bear paints (K, P) wholly or not at all."""
    everything = pictures.flatten(0, 1)
    mean, std = everything.mean(0), everything.std(0)

    def described(colours: torch.Tensor) -> torch.Tensor:
        return normalize((colours - mean) / std, dim=-1)

    memory: list[list[Known]] = []  # by picture

    def heard(looks: torch.Tensor, among: list[Known]) -> list[tuple[float, Known]]:
        """Those that count, and how much."""
        scores = [math.exp((looks @ one.looks).item() / SHARPNESS) * one.weight for one in among]
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:NEIGHBOURS]
        total = sum(scores[i] for i in best)
        return [(scores[i] / total, among[i]) for i in best]

    def say(colour: torch.Tensor) -> float:
        known = [one for picture in memory for one in picture]
        return sum(share * one.value for share, one in heard(described(colour), known))

    for number, (colours, values) in enumerate(zip(pictures, paints, strict=True)):
        newest = [
            Known(described(colour), value or (say(colour) if number else 0.0),
                  LOUDER if value else 1.0)
            for colour, value in zip(colours, values.tolist(), strict=True)
        ]  # fmt: skip
        louder = [replace(one, weight=LOUDER**2) for one in newest if one.weight > 1]
        for picture in memory:
            painted = [one for one in picture if one.weight > 1]
            for one in painted:
                told = [(s, other) for s, other in heard(one.looks, painted + louder)
                        if other.weight > LOUDER]  # fmt: skip
                one.value *= 1 - sum(share for share, _ in told)
                one.value += sum(share * other.value for share, other in told)
        memory.append(newest)
    return torch.tensor([say(colour) for colour in asked])


@pytest.mark.parametrize("count", [1, 3])
def test_a_wish_is_the_mean_of_its_nearest_neighbours_by_likeness_and_loudness(count):
    """Against the same thing said slowly, on noisy pictures, where no two pixels are alike."""
    generator = torch.Generator().manual_seed(3)
    side = 6
    pictures = torch.randint(0, 256, (count, side, side, 3), generator=generator).byte()
    paints = torch.randint(-1, 2, (count, side, side), generator=generator).float() * 2
    asked = torch.rand((2, 3, side, side), generator=generator)
    wish = Wish([Painted(p, m) for p, m in zip(pictures, paints, strict=True)], Sight(lambda x: x))
    expected = exactly(
        (pictures / 255).flatten(1, 2), paints.flatten(1), asked.permute(0, 2, 3, 1).flatten(0, 2)
    )
    assert side * side > NEIGHBOURS
    torch.testing.assert_close(wish(asked).flatten(), expected, rtol=1e-3, atol=1e-4)
    assert expected.std() > 0.3


def test_in_a_latent_pixel_that_is_half_painted_the_paint_is_louder_than_the_bare_half():
    """As between latent pixels. The bare half means nothing on the first picture, and what was said
    before on a later one; so a stroke thinner than a latent pixel means what a thick one does."""
    half = paint("+...")
    half[:, ::2] = 0
    paints, bares = LOUDER / (LOUDER + 1), 1 / (LOUDER + 1)
    assert meant(wish_of((picture("rgbk"), half)), "rgbk") == [near(2 * paints, 0, 0, 0)]
    assert 2 * paints > 1  # what a wish counts as praised
    later = wish_of((picture("rgbk"), paint("-...")), (picture("rgwk"), half))
    assert meant(later, "rgbk") == [near(2 * paints - 2 * bares, 0, 0, 0)]


@pytest.mark.parametrize(("height", "width"), [(8, 24), (32, 96), (100, 33)])
def test_paint_may_be_of_another_size_than_the_picture(height, width):
    strokes = torch.zeros(height, width)
    strokes[:, : width // 3], strokes[:, -(width // 3) :] = 2.0, -2.0
    assert meant(wish_of((picture("rkb"), strokes)), "krb") == [near(0, 2, -2)]


def test_a_map_is_as_large_as_its_image():
    """And each latent pixel's value fills its own square of it."""
    wish = wish_of((picture("rgb"), paint("+-.")))
    maps = wish(noisy(2))
    assert maps.shape == (2, 8 * CELL, 24 * CELL) and maps.dtype == torch.float32
    cells = maps.unfold(1, CELL, CELL).unfold(2, CELL, CELL)
    assert (cells == cells[..., :1, :1]).all()
    assert cells.unique().tolist() == pytest.approx([-2, 0, 2], abs=0.01)


def test_rows_are_not_taken_for_columns():
    wish = wish_of((picture("rr", "gb", "kw"), paint("++", "-.", "..")))
    assert meant(wish, "rg", "kb", "wr") == [near(2, -2), near(0, 0), near(0, 2)]


def noisy(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, 3, 8 * CELL, 24 * CELL), generator=generator)


def test_each_image_is_judged_on_its_own():
    wish = wish_of((picture("rgb"), paint("+-.")), (picture("bwk"), paint("-..")))
    images = noisy(4)
    together = wish(images)
    for index in range(4):
        alone = wish(images[index : index + 1])[0]
        torch.testing.assert_close(alone, together[index], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wish(images.flip(0)), together.flip(0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_a_wish_is_the_same_each_time():
    painted = (picture("rgb"), paint("+-.")), (picture("bwk"), paint("-.."))
    images = noisy(2)
    first = wish_of(*painted)(images)
    torch.manual_seed(9)
    assert torch.equal(wish_of(*painted)(images), first)
    wish = wish_of(*painted)
    assert torch.equal(wish(images), wish(images))


def test_maps_stay_within_what_was_painted():
    wish = wish_of((picture("rgb"), paint("+-.")), (picture("bwk"), paint("-+.")))
    maps = wish(noisy(3))
    assert maps.min() >= -2 - 1e-6 and maps.max() <= 2 + 1e-6
    assert maps.min() < -1 and maps.max() > 1


def test_the_size_of_a_feature_s_numbers_does_not_count():
    """Each is measured against its own spread: one is not heard more for being written larger."""
    painted = [Painted(picture("rgb"), paint("+-.")), Painted(picture("wyk"), paint("-.."))]
    scale, shift = torch.tensor([1e3, 1.0, 1e-2]), torch.tensor([50.0, -7.0, 0.1])
    plain = Wish(painted, Sight(colours_of))
    scaled = Wish(
        painted,
        Sight(lambda x: colours_of(x) * scale.view(1, 3, 1, 1) + shift.view(1, 3, 1, 1)),
    )
    torch.testing.assert_close(scaled(noisy(2)), plain(noisy(2)), rtol=1e-2, atol=1e-2)


def test_a_feature_that_is_the_same_everywhere_says_nothing():
    painted = [Painted(picture("rgb"), paint("+-."))]
    constant = Wish(
        painted, Sight(lambda x: torch.cat([colours_of(x), colours_of(x)[:, :1] * 0 + 3], dim=1))
    )
    torch.testing.assert_close(constant(noisy(2)), Wish(painted, Sight(colours_of))(noisy(2)))


def test_a_large_picture_is_looked_at_in_parts_and_that_changes_nothing():
    painted = [Painted(picture("rgbk"), paint("+-.."))]
    wish = Wish(painted, Sight(colours_of))
    images = torch.rand((1, 3, 68 * CELL, 68 * CELL), generator=torch.Generator().manual_seed(1))
    wish.size = (68, 68)  # 4624 pixels: more than one part
    whole = wish(images)[0, ::CELL, ::CELL]
    wish.size = (4, 68)
    for row in (0, 32, 64):
        part = wish(images[..., row * CELL : (row + 4) * CELL, :])[0, ::CELL, ::CELL]
        torch.testing.assert_close(part, whole[row : row + 4], rtol=1e-4, atol=1e-4)


class Eye:
    """A segmenter of two classes, by one channel of the colour; or one that says always the same.

    Its probabilities have the size of the images.
    """

    def __init__(self, channel: int | None) -> None:
        self.channel = channel

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        if self.channel is None:
            one = torch.full_like(images[:, 0], 0.3)
        else:
            one = (images[:, self.channel] > 0.5).float()
        return torch.stack([one, 1 - one], dim=1)


def grey(images: torch.Tensor) -> torch.Tensor:
    """Features to which red and green look alike: how dark it is, and where in a pixel."""
    light = avg_pool2d(images, CELL).mean(1, keepdim=True)
    return torch.cat([light, light.square()], dim=1)


def test_a_segmenter_that_calls_everything_the_same_has_no_say():
    painted = [Painted(picture("rgb"), paint("+-.")), Painted(picture("ykw"), paint("-.."))]
    images = noisy(2)
    without = Wish(painted, Sight(colours_of))(images)
    torch.testing.assert_close(Wish(painted, Sight(colours_of, Eye(None)))(images), without)
    assert not torch.allclose(Wish(painted, Sight(colours_of, Eye(0)))(images), without, atol=0.1)


def test_a_segmenter_tells_apart_what_looks_alike():
    """Red and green are equally dark, and blue with them: paint on one is paint on all, but for a
    segmenter that knows red."""
    COLOURS["R"], COLOURS["G"] = (0.8, 0.1, 0.1), (0.1, 0.8, 0.1)
    painted = [Painted(picture("RGkw"), paint("+..."))]
    blind = meant(Wish(painted, Sight(grey)), "RGkw")[0]
    assert blind[0] == pytest.approx(blind[1], abs=0.05) and blind[0] > 1
    seeing = meant(Wish(painted, Sight(grey, Eye(0))), "RGkw")[0]
    assert seeing == near(2, 0, 0, 0)


def test_a_segmenter_is_heard_beside_the_features_by_its_weight():
    """The cosine of two pixels is that of features of length 1 and of probabilities against their
    mean, weighed; the one pixel that is painted counts as LOUDER bare ones."""
    pictures = torch.tensor([[[250, 10, 10], [10, 250, 10], [10, 10, 250], [200, 200, 30]]]).byte()
    strokes = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    asked = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.9, 0.3]]]).permute(2, 0, 1)[None]
    wish = Wish([Painted(pictures, strokes)], Sight(lambda x: x, Eye(0)))
    wish.size = (1, 2)
    known, seen = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]]), pictures[0] / 255
    mean, std = seen.mean(0), seen.std(0)

    def described(colour: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        look = normalize((colour - mean) / std, dim=-1)
        return normalize(torch.cat([look, PROBABILITIES * (classes - known.mean(0))], -1), dim=-1)

    weights = torch.tensor([LOUDER, 1.0, 1.0, 1.0])
    memory = described(seen, known)
    looked = described(asked[0].permute(1, 2, 0)[0], torch.tensor([[1.0, 0], [0, 1]]))
    scores = torch.exp(looked @ memory.T / SHARPNESS) * weights
    expected = 2 * scores[:, 0] / scores.sum(1)
    torch.testing.assert_close(wish(asked)[0, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("strokes", "shown", "met"),
    [
        ("-...", "bkbk", True),  # red alone: nothing of it is left
        ("-...", "bkrk", False),
        ("-...", "rrrr", False),
        ("+...", "rrrr", True),  # green alone: nine tenths are that
        ("+...", "rrrb", False),
        ("+...", "bkbk", False),
        ("+-..", "rrrr", True),  # both
        ("+-..", "rrrg", False),
        ("+-..", "gggg", False),
        ("+-..", "bkbk", False),
    ],
)
def test_a_wish_is_met_where_nothing_is_blamed_and_nine_tenths_are_praised(strokes, shown, met):
    wish = wish_of((picture("rgbk"), paint(strokes)))
    assert wish.met(wish(image(shown))) == met
    also = torch.cat([image(shown), image("rrrr" if "+" in strokes else "bbbb")])
    assert wish.met(wish(also)) == met


@pytest.mark.parametrize(
    ("strokes", "values", "met"),
    [
        ("-", [-0.99] * 10, True),
        ("-", [-1.0] + [2.0] * 9, False),
        ("-", [-1.0] + [0.0] * 9, False),
        ("-", [0.0] * 10, True),
        ("+", [1.0] * 9 + [0.99], True),
        ("+", [1.0] * 9 + [-0.99], True),
        ("+", [1.0] * 9 + [-1.0], False),
        ("+", [1.0] * 8 + [0.99] * 2, False),
        ("+", [0.99] * 10, False),
        ("+-", [2.0] * 9 + [0.0], True),
        ("+-", [0.0] * 10, False),
        ("+-", [2.0] * 9 + [-2.0], False),
    ],
)
def test_met_is_of_all_pixels_of_all_pictures(strokes, values, met):
    both = [(picture("rgk"), paint(f"{s}..")) for s in strokes]
    wish = wish_of(*both)
    assert wish.met(torch.tensor(values).view(5, 1, 2)) == met
    assert wish.met(torch.tensor(values).view(1, 2, 5)) == met


@pytest.mark.parametrize(("side", "blamed", "met"), [(16, 1, False), (64, 4, True), (64, 5, False)])
def test_what_is_left_blamed_counts_by_its_share_of_the_picture(side, blamed, met):
    """A single pixel of a large latent is no reason to go on."""
    maps = torch.zeros(1, side, side)
    maps.view(-1)[:blamed] = -2.0
    assert wish_of((picture("rgk"), paint("-.."))).met(maps) == met


def test_more_is_wanted_as_soon_as_one_picture_says_so():
    reds = [(picture("rgk"), paint("-.."))]
    green = (picture("gbk"), paint("+.."))
    assert not wish_of(*reds).wants_more
    assert wish_of(*reds, green).wants_more and wish_of(green, *reds).wants_more


def painted_on(number: int, value: float = 2.0) -> Painted:
    """A picture of its own for each number, wholly painted."""
    return Painted(torch.full((4, 4, 3), number).byte(), torch.full((4, 4), value))


def test_paint_on_another_picture_is_one_more_at_the_end():
    one, two = painted_on(1), painted_on(2)
    first = add_paint((), one.picture, one.paint)
    both = add_paint(first, two.picture, two.paint)
    assert len(first) == 1 and len(both) == 2
    for had, wanted in zip(both, (one, two), strict=True):
        assert torch.equal(had.picture, wanted.picture) and torch.equal(had.paint, wanted.paint)


def test_paint_on_the_same_picture_is_merged_and_its_later_word_counts():
    picture_ = painted_on(1).picture
    before = torch.tensor([[2.0, 2.0, 0.0, 0.0]]).repeat(4, 1)
    after = torch.tensor([[-2.0, 0.0, -2.0, 0.0]]).repeat(4, 1)
    (merged,) = add_paint(add_paint((), picture_, before), picture_, after)
    assert merged.paint.tolist() == [[-2, 2, -2, 0]] * 4
    assert torch.equal(merged.picture, picture_)
    assert before.tolist() == [[2, 2, 0, 0]] * 4 and after.tolist() == [[-2, 0, -2, 0]] * 4


def test_paint_on_the_same_picture_in_another_size_is_merged_where_it_lies():
    picture_ = painted_on(1).picture
    before = torch.tensor([[2.0, 0.0], [0.0, -2.0]])
    after = torch.zeros(4, 3)
    after[3, 2] = 2.0
    (merged,) = add_paint([Painted(picture_, before)], picture_, after)
    expected = torch.zeros(4, 3)
    expected[:2, :2], expected[2:, 2:], expected[3, 2] = 2.0, -2.0, 2.0
    assert torch.equal(merged.paint, expected)


def test_paint_larger_than_its_picture_is_made_as_small_and_keeps_its_mean():
    paint = torch.zeros(40, 8)
    paint[:10], paint[10:15] = 2.0, -2.0
    (one,) = add_paint((), painted_on(1).picture, paint)
    wanted = torch.tensor([[2.0] * 4, [-1.0] * 4, [0.0] * 4, [0.0] * 4])
    assert torch.allclose(one.paint, wanted) and one.paint.max() <= 2


def test_a_picture_that_is_painted_again_has_the_latest_word():
    """It moves to the end, so that what it says now is newer than what others say."""
    one, two = picture("rgbk"), picture("rbgk")
    painted = add_paint(add_paint((), one, paint("+...")), two, paint("-..."))
    assert meant(Wish(painted, Sight(colours_of)), "rgbk") == [near(-2, 0, 0, 0)]
    painted = add_paint(painted, one, paint("+..."))
    assert [torch.equal(had.picture, two) for had in painted] == [True, False]
    assert meant(Wish(painted, Sight(colours_of)), "rgbk") == [near(2, 0, 0, 0)]


def test_a_mind_is_changed_on_the_same_picture():
    one = picture("rgbk")
    painted = add_paint(add_paint((), one, paint("+-..")), one, paint("-..+"))
    assert meant(Wish(painted, Sight(colours_of)), "rgbk") == [near(-2, -2, 0, 2)]


def test_more_pictures_than_a_wish_can_have_are_refused_and_none_is_forgotten():
    painted: tuple[Painted, ...] = ()
    for number in range(MOST_PAINTED):
        one = painted_on(number)
        painted = add_paint(painted, one.picture, one.paint)
    assert [one.picture[0, 0, 0].item() for one in painted] == list(range(MOST_PAINTED))
    with pytest.raises(RewardError, match=f"^{MOST_PAINTED} pictures are painted on, and a wish"):
        add_paint(painted, painted_on(99).picture, painted_on(99).paint)
    again = add_paint(painted, painted_on(3).picture, painted_on(3, -2.0).paint)
    assert [one.picture[0, 0, 0].item() for one in again] == [
        *(number for number in range(MOST_PAINTED) if number != 3), 3
    ]  # fmt: skip


def test_painted_pictures_stay_as_they_were():
    painted = [Painted(picture("rgb"), paint("+-.")), Painted(picture("wyk"), paint("-.."))]
    kept = [copy(one) for one in painted]
    pixels = [(one.picture.clone(), one.paint.clone()) for one in painted]
    wish = Wish(painted, Sight(colours_of))
    wish(noisy(1))
    for one, same, (shown, strokes) in zip(painted, kept, pixels, strict=True):
        assert one.picture is same.picture and torch.equal(one.picture, shown)
        assert torch.equal(one.paint, strokes)


class Counted:
    """Features and a segmenter that count the pictures they are shown, and see no more than one at
    a time."""

    def __init__(self) -> None:
        self.seen = 0

    def features(self, images: torch.Tensor) -> torch.Tensor:
        assert len(images) == 1
        self.seen += 1
        return colours_of(images)

    probabilities = Eye(0).probabilities


def test_a_sight_sees_each_picture_once_and_tells_them_apart():
    eye = Counted()
    sight, images = Sight(eye.features, eye), noisy(3)
    first = sight(images)
    assert first[0].shape[:2] == (3, 3) and first[1].shape[:2] == (3, 2) and eye.seen == 3
    again = sight(images.flip(0))
    assert eye.seen == 3
    for part, turned in zip(first, again, strict=True):
        assert torch.equal(part.flip(0), turned)
    sight(images.transpose(2, 3).contiguous().transpose(2, 3))  # the same, laid out otherwise
    assert eye.seen == 3
    sight(images + 1e-6)
    assert eye.seen == 6
    for black in (torch.zeros(1, 3, CELL, 2 * CELL), torch.zeros(1, 3, 2 * CELL, CELL)):
        assert sight(black)[0].shape[2:] == (black.shape[2] // CELL, black.shape[3] // CELL)


def test_a_sight_remembers_the_latest_pictures_that_fit(monkeypatch):
    eye = Counted()
    sight, images = Sight(eye.features, eye), noisy(4)
    each = sum(part.nbytes for part in sight(images[:1]))
    monkeypatch.setattr("pxpo.rewards.wish.REMEMBERED", 2 * each + 1)
    sight(images[1:2])
    sight(images[:1])  # now the latest
    sight(images[2:3])
    assert eye.seen == 3
    sight(images[:1])
    assert eye.seen == 3
    sight(images[1:2])
    assert eye.seen == 4
    monkeypatch.setattr("pxpo.rewards.wish.REMEMBERED", 1)  # one all the same
    sight(images[3:])
    sight(images[3:])
    assert eye.seen == 5
