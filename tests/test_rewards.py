import json
from copy import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, SegformerForSemanticSegmentation

from pxpo.embedded import TINY_WORLD
from pxpo.errors import ModelError, RewardError
from pxpo.rewards import (
    REWARDS,
    ColorReward,
    RewardSpec,
    Segmenter,
    SegmentReward,
    Tools,
    paint_by_label,
    painted_map,
)

PALETTE = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "black": (0.0, 0.0, 0.0),
    "white": (1.0, 1.0, 1.0),
}


def random_images(*size: int) -> torch.Tensor:
    return torch.rand((2, 3, *size), generator=torch.Generator().manual_seed(0))


def flat(color: str) -> torch.Tensor:
    return torch.tensor(PALETTE[color])[None, :, None, None].expand(1, 3, 2, 3)


@pytest.mark.parametrize("channel", ["red", "green", "blue"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_channel_is_rewarded_where_it_is(channel, sign):
    reward = ColorReward(channel, sign)
    for color, rgb in PALETTE.items():
        expected = sign * rgb[("red", "green", "blue").index(channel)]
        assert torch.equal(reward(flat(color)), torch.full((1, 2, 3), expected))


def test_the_default_is_less_blue_as_in_the_paper():
    images = random_images(3, 5)
    assert torch.equal(ColorReward()(images), -images[:, 2])


@pytest.mark.parametrize(
    ("color", "image", "closeness"),
    [
        ("white", "white", 1.0),
        ("white", "black", 0.0),
        ("#ff0000", "red", 1.0),
        ("#ff0000", "black", 1 - 3**-0.5),
        ("#0000ff", "red", 1 - (2 / 3) ** 0.5),
        ("orange", "red", 1 - 165 / 255 / 3**0.5),
    ],
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_target_colour_is_rewarded_by_closeness(color, image, closeness, sign):
    reward = ColorReward(color, sign)(flat(image))
    torch.testing.assert_close(reward, torch.full((1, 2, 3), sign * closeness))


def test_color_keeps_each_pixel_in_its_place():
    images = flat("black").clone()
    images[0, :, 1, 2] = torch.tensor(PALETTE["white"])
    assert ColorReward("white", 1)(images)[0].tolist() == [[0, 0, 0], [0, 0, 1]]


def test_an_unknown_colour_is_refused_when_named():
    with pytest.raises(RewardError, match="'blueish' is unknown.*orange"):
        ColorReward("blueish")


@pytest.mark.parametrize("sign", [0, 2, -0.5])
def test_a_reward_is_for_more_or_for_less(sign, segmenter):
    with pytest.raises(RewardError, match=f"sign is {sign}"):
        ColorReward("blue", sign)
    with pytest.raises(RewardError, match=f"sign is {sign}"):
        SegmentReward(segmenter, ["Hair"], sign)


def picture(mode: str, pixels: list) -> Image.Image:
    """A picture two pixels high, so that rows and columns cannot be swapped unseen."""
    image = Image.new(mode, (len(pixels) // 2, 2))
    image.putdata(pixels)
    return image


@pytest.mark.parametrize("opacity", [1, 153, 255])
def test_green_paint_is_plus_two_and_red_is_minus_two_whatever_the_opacity(opacity):
    paint = picture(
        "RGBA",
        [
            (0, 255, 0, opacity), (255, 0, 0, opacity), (0, 0, 0, 0),
            (0, 255, 0, 0), (0, 0, 0, 255), (60, 200, 90, opacity),
        ],
    )  # fmt: skip
    assert painted_map(paint).tolist() == [[2, -2, 0], [0, 0, 2]]
    assert painted_map(np.asarray(paint)).tolist() == [[2, -2, 0], [0, 0, 2]]


def test_paint_without_transparency():
    pixels = [(0, 255, 0), (255, 0, 0), (0, 0, 0), (255, 255, 255), (200, 60, 90), (0, 0, 255)]
    paint = picture("RGB", pixels + [(0, 0, 0)] * 6)
    values = [[2, -2, 0, 0, -2, 0], [0, 0, 0, 0, 0, 0]]
    assert painted_map(paint).tolist() == values
    assert painted_map(torch.from_numpy(np.array(paint))).tolist() == values


@pytest.mark.parametrize("channels", [3, 4])
def test_paint_as_fractions_counts_like_paint_as_bytes(channels):
    paint = np.zeros((1, 3, channels), np.float32)
    paint[0, 0, 1] = paint[0, 1, 0] = 0.6
    if channels == 4:
        paint[0, :2, 3] = 0.6
    assert painted_map(paint).tolist() == [[2, -2, 0]]


def test_paint_of_a_palette():
    paint = picture("RGB", [(0, 255, 0), (255, 0, 0), (0, 0, 0), (0, 0, 0)]).convert("P")
    assert painted_map(paint).tolist() == [[2, -2], [0, 0]]


GREYS = [0, 255, 255, 0, 102, 5]
MASK = [[0, 2, 2], [0, 0.8, 0]]


def grey(mode: str) -> Image.Image:
    """The same six greys in any of Pillow's modes."""
    if mode == "I;16":
        values = np.array(GREYS, np.uint16).reshape(2, 3) * 257
        return Image.fromarray(values)
    return picture("L", GREYS).convert(mode)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "P", "RGB", "RGBA", "CMYK"])
def test_a_mask_in_greys_is_white_on_black_in_every_mode(mode):
    torch.testing.assert_close(painted_map(grey(mode)), torch.tensor(MASK))


def test_a_mask_survives_being_saved_with_sixteen_bits(tmp_path):
    grey("I;16").save(tmp_path / "mask.png")
    torch.testing.assert_close(painted_map(Image.open(tmp_path / "mask.png")), torch.tensor(MASK))


def test_transparent_grey_paint_is_nothing():
    paint = picture("LA", [(0, 0), (255, 0), (0, 255), (255, 255)])
    assert painted_map(paint).tolist() == [[0, 0], [0, 2]]


def test_bilevel_paint_is_plus_two_or_nothing():
    assert painted_map(picture("1", [1, 0, 0, 0, 0, 1])).tolist() == [[2, 0, 0], [0, 0, 2]]


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA"])
@pytest.mark.parametrize("level", [0, 255])
def test_an_empty_page_is_not_painted(mode, level):
    assert not painted_map(Image.new("L", (8, 8), level).convert(mode)).any()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_photograph_in_greys_is_no_mask(mode):
    photograph = Image.linear_gradient("L").convert(mode)
    with pytest.raises(RewardError, match="greys, .*% of it neither black nor white"):
        painted_map(photograph)


def scene(side: int = 64, seed: int = 0) -> torch.Tensor:
    """(3, H, W) in [0, 1]: soft colours, green and red among them, and a red car."""
    generator = torch.Generator().manual_seed(seed)
    soft = torch.rand(1, 3, 4, 4, generator=generator)
    image = torch.nn.functional.interpolate(soft, (side, side), mode="bilinear")[0]
    image[:, side // 2 : side // 2 + 8, 8:24] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    return image


def as_picture(image: torch.Tensor, side: int) -> Image.Image:
    whole = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    return whole.resize((side, side), Image.Resampling.LANCZOS)


def brushed(image: torch.Tensor, side: int, opacity: int) -> tuple[Image.Image, torch.Tensor]:
    """The picture with a green and a red stroke on it, and the map that these mean."""
    layer, wanted = np.zeros((side, side, 4), np.uint8), torch.zeros(side, side)
    wide = side // 8
    layer[wide : 2 * wide, wide:-wide] = (0, 255, 0, opacity)
    layer[-2 * wide : -wide, wide:-wide] = (255, 0, 0, opacity)
    wanted[wide : 2 * wide, wide:-wide], wanted[-2 * wide : -wide, wide:-wide] = 2, -2
    base = as_picture(image, side).convert("RGBA")
    return Image.alpha_composite(base, Image.fromarray(layer)), wanted


def dilated(values: torch.Tensor, side: int) -> torch.Tensor:
    return torch.nn.functional.max_pool2d(values[None], side, 1, side // 2)[0]


@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize("opacity", [153, 255])
@pytest.mark.parametrize("saved", [".png", ".jpg"])
def test_strokes_on_the_whole_picture_are_told_from_the_picture(tmp_path, side, opacity, saved):
    painted, wanted = brushed(scene(), side, opacity)
    painted.convert("RGB").save(tmp_path / f"painted{saved}")
    found = painted_map(Image.open(tmp_path / f"painted{saved}"), scene())
    if saved == ".jpg":  # which blurs colours by two pixels
        blurred = torch.stack([-dilated(-wanted, 5), dilated(wanted, 5)])
        wanted = torch.where(blurred[0] == blurred[1], wanted, found)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("side", [64, 200])
def test_the_picture_itself_has_no_paint_on_it(side):
    assert not painted_map(as_picture(scene(), side), scene()).any()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_whole_picture_is_no_paint(mode):
    whole = as_picture(scene(), 64).convert(mode)
    with pytest.raises(RewardError, match="whole picture.*transparent layer"):
        painted_map(whole)
    with pytest.raises(RewardError, match="differs from the run's own"):
        painted_map(whole, scene(seed=1))


def test_tinted_greys_are_no_paint():
    tinted = Image.merge("RGB", [Image.new("L", (8, 8), level) for level in (120, 130, 118)])
    with pytest.raises(RewardError, match="whole picture"):
        painted_map(tinted)


@pytest.mark.parametrize("ground", ["black", "white"])
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_strokes_saved_as_jpeg_leave_no_ringing(tmp_path, ground, quality):
    paint = Image.new("RGB", (64, 64), ground)
    paint.paste((0, 255, 0), (8, 8, 40, 24))
    paint.paste((255, 0, 0), (24, 40, 56, 56))
    paint.save(tmp_path / "paint.jpg", quality=quality)
    found, wanted = painted_map(Image.open(tmp_path / "paint.jpg")), painted_map(paint)
    assert wanted.unique().tolist() == [-2, 0, 2]
    assert not found[dilated(wanted.abs(), 9) == 0].any()
    assert (found == wanted).float().mean() > 0.95


def test_colours_that_cannot_be_read_are_said():
    with pytest.raises(RewardError, match="LAB.*PNG in RGB"):
        painted_map(Image.new("LAB", (4, 4), (100, 20, 20)))


def test_paint_from_a_phone_is_held_upright(tmp_path):
    paint = Image.new("RGB", (16, 8))
    paint.paste((0, 255, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    paint.save(tmp_path / "phone.png", exif=exif)
    found = painted_map(Image.open(tmp_path / "phone.png"))
    assert found.shape == (16, 8) and found[:8].eq(2).all() and not found[8:].any()


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (512, 4)])
def test_an_array_is_taken_as_it_is(make, shape):
    values = np.random.default_rng(0).uniform(-2, 2, shape)
    painted = painted_map(make(values))
    assert painted.dtype == torch.float32
    assert torch.equal(painted, torch.tensor(values).float())


@pytest.mark.parametrize("value", [2.01, -3, 255])
def test_values_beyond_the_limit_are_refused(value):
    with pytest.raises(RewardError, match=f"reaches {abs(value)}; the most it can be is 2"):
        painted_map(np.array([[0, value]]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(RewardError, match="not finite"):
        painted_map(np.array([[0, value]]))


@pytest.mark.parametrize("shape", [(4,), (4, 4, 2), (3, 8, 8), (4, 4, 5), (1, 4, 4, 3)])
def test_paint_of_another_shape_is_refused(shape):
    with pytest.raises(RewardError) as refused:
        painted_map(np.zeros(shape))
    assert str(shape) in str(refused.value)


@pytest.fixture
def color_segmenter(segmenter):
    """A segmenter whose classes are red, green and blue, so that one can tell who is where."""

    mean = torch.tensor(segmenter.processor.image_mean)[:, None, None]
    std = torch.tensor(segmenter.processor.image_std)[:, None, None]

    def see(pixel_values):
        return SimpleNamespace(logits=20 * (pixel_values * std + mean))

    see.device = torch.device("cpu")
    seeing = copy(segmenter)
    seeing.model, seeing.labels = see, ("Red", "Green", "Blue")
    return seeing


@pytest.mark.parametrize("size", [(32, 32), (20, 48)])
def test_probabilities_sum_to_one_at_the_size_of_the_images(segmenter, size):
    probabilities = segmenter.probabilities(random_images(*size))
    assert probabilities.shape == (2, 3, *size)
    assert probabilities.min() >= 0
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, *size))
    assert torch.equal(segmenter.classes(random_images(*size)), probabilities.argmax(1))


def test_probabilities_are_those_of_the_stock_model(segmenter):
    image = random_images(32, 32)[:1]
    processor = AutoImageProcessor.from_pretrained(segmenter.name)
    model = SegformerForSemanticSegmentation.from_pretrained(segmenter.name).eval()
    as_picture = Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())
    with torch.no_grad():
        logits = model(**processor(as_picture, return_tensors="pt")).logits
    logits = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear")
    torch.testing.assert_close(segmenter.probabilities(image), logits.softmax(1))
    assert segmenter.probabilities(image).std() > 0.01


def test_an_image_is_judged_alike_in_a_batch_larger_than_one_pass(segmenter):
    images = torch.rand((11, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    together = segmenter.probabilities(images)
    for index in (0, 7, 8, 10):
        alone = segmenter.probabilities(images[index : index + 1])[0]
        torch.testing.assert_close(together[index], alone)


def quarters(height: int, width: int) -> torch.Tensor:
    """Red top left, green top right, blue below."""
    image = torch.zeros(1, 3, height, width)
    image[0, 0, : height // 2, : width // 4] = 1
    image[0, 1, : height // 2, width // 4 :] = 1
    image[0, 2, height // 2 :] = 1
    return image


def test_each_class_is_where_it_is_seen(color_segmenter):
    probabilities = color_segmenter.probabilities(quarters(16, 64))[0]
    for (row, column), label in {(2, 5): 0, (2, 40): 1, (13, 5): 2, (13, 60): 2}.items():
        assert probabilities[label, row, column] > 0.99


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_reward_is_the_probability_with_its_sign(color_segmenter, sign):
    reward = SegmentReward(color_segmenter, ["red"], sign)(quarters(16, 64))[0]
    assert reward.shape == (16, 64)
    assert reward[2, 5].item() == pytest.approx(sign, abs=0.01)
    assert reward[13, 5].item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("name", ["Hair", "hair", " HAIR "])
def test_labels_are_found_by_name_whatever_their_capitals(segmenter, name):
    images = random_images(32, 32)
    reward = SegmentReward(segmenter, [name])(images)
    assert torch.equal(reward, -segmenter.probabilities(images)[:, 1])


def test_several_labels_add_up_and_each_counts_once(segmenter):
    images = random_images(32, 32)
    probabilities = segmenter.probabilities(images)
    reward = SegmentReward(segmenter, ["upper-clothes", "hair", "Hair"], 1)(images)
    torch.testing.assert_close(reward, probabilities[:, 1] + probabilities[:, 2])


def test_an_unknown_label_lists_the_known_ones(segmenter):
    with pytest.raises(RewardError, match="'moustache'; it knows Background, Hair, Upper-clothes"):
        SegmentReward(segmenter, ["Hair", "moustache"])


def test_no_label_at_all_is_refused(segmenter):
    with pytest.raises(RewardError, match="no label"):
        SegmentReward(segmenter, [])


def test_a_segmenter_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ModelError, match="segmenter.*cannot be loaded") as refused:
        Segmenter(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(refused.value)


def test_paint_by_label_stands_in_for_a_person(color_segmenter):
    painted = paint_by_label(color_segmenter, quarters(16, 64), more=["green"], less=["Blue"])
    assert painted.shape == (1, 16, 64)
    assert (painted[0, 2, 5], painted[0, 2, 40], painted[0, 13, 5]) == (0, 2, -2)


def test_paint_by_label_with_nothing_to_paint_is_refused(color_segmenter):
    with pytest.raises(RewardError, match="nothing to paint"):
        paint_by_label(color_segmenter, quarters(16, 64))


@pytest.fixture
def tools(segmenter) -> Tools:
    return Tools(segmenter=segmenter)


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("color", {}, "less blue"),
        ("color", {"color": "orange", "more": True}, "more orange"),
        ("segment", {}, "less Hair"),
        ("segment", {"labels": ["Lake", " Tree "], "more": True}, "more Lake, Tree"),
        ("paint", {}, "painted"),
        (
            "paint",
            {"more": ["Lake"], "less": ["Tree", "Sun"]},
            "painted by a segmenter, more Lake and less Tree, Sun",
        ),
    ],
)
def test_a_spec_has_a_name_and_survives_json(kind, options, name):
    spec = RewardSpec(kind, options)
    again = RewardSpec(**json.loads(json.dumps(spec.as_dict())))
    assert spec.name == again.name == name
    assert spec == again and hash(spec) == hash(again)
    assert spec.by_hand == (name == "painted")


def test_a_spec_s_defaults_are_part_of_it_and_it_cannot_be_changed():
    assert RewardSpec("color") == RewardSpec("color", {"color": "blue", "more": False})
    assert RewardSpec("color") != RewardSpec("color", {"more": True})
    assert RewardSpec("color").changed(more=True) == RewardSpec("color", {"more": True})
    with pytest.raises(AttributeError):
        RewardSpec("color").kind = "paint"
    options = {"color": "red"}
    spec = RewardSpec("color", options)
    options["color"] = "green"
    assert spec.name == "less red"


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("poetry", {}, "'poetry'; there are paint, color, segment"),
        ("color", {"colour": "red"}, "'color' has no option 'colour'; it has color, more"),
        ("color", {"color": 3}, "color is 3; it must be text"),
        ("color", {"more": "yes"}, "more is 'yes'; it must be true or false"),
        ("segment", {"labels": "Hair"}, "labels is 'Hair'; it must be a list of texts"),
    ],
)
def test_a_spec_of_what_there_is_not_names_what_there_is(kind, options, words):
    with pytest.raises(RewardError, match=words):
        RewardSpec(kind, options)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("color", {"color": "blurple"}, "'blurple' is unknown.*orange"),
        ("segment", {"labels": ["Unicorn"]}, "no label 'Unicorn'; it knows Background, Hair"),
        ("segment", {"labels": []}, "no label is named"),
        ("paint", {"less": ["Unicorn"]}, "no label 'Unicorn'; it knows Background, Hair"),
        ("paint", {}, "nothing is painted"),
        ("segment", {"segmenter": "another"}, "'another', and here is only"),
    ],
)
def test_a_wrong_value_is_said_when_the_reward_is_made(tools, kind, options, words):
    with pytest.raises(RewardError, match=words):
        RewardSpec(kind, options).make(tools)


def test_a_spec_makes_the_reward_that_it_names(tools, segmenter):
    images = random_images(32, 32)
    blue = RewardSpec("color", {"more": True}).make()
    assert torch.equal(blue(images), images[:, 2])
    hair = RewardSpec("segment", {"labels": ["hair"]}).make(tools)
    assert torch.equal(hair(images), SegmentReward(segmenter, ["Hair"])(images))
    by_label = RewardSpec("paint", {"more": ["Hair"], "less": ["Background"]}).make(tools)
    wanted = paint_by_label(segmenter, images, ["Hair"], ["Background"])
    assert torch.equal(by_label(images), wanted)


def test_a_segmenter_is_loaded_once_and_only_when_it_is_needed(segmenter, monkeypatch):
    loaded = []

    def load(name, device):
        loaded.append((name, device))
        return segmenter

    monkeypatch.setattr("pxpo.rewards.segmentation.Segmenter", load)
    tools = Tools("somewhere")
    RewardSpec("color").make(tools)
    assert not loaded
    for _ in range(2):
        RewardSpec("segment", {"segmenter": "a/b"}).make(tools)
    assert loaded == [("a/b", "somewhere")]


@pytest.mark.parametrize(
    ("options", "by_hand", "exact"),
    [
        ({}, True, False),
        ({"exact": True}, True, True),
        ({"more": ["Hair"]}, False, False),
        ({"less": ["Hair"], "exact": True}, False, False),
        ({"segmenter": "a/b"}, True, False),  # which looks on, beside the model
        ({"segmenter": "a/b", "more": ["Hair"]}, False, False),
    ],
)
def test_paint_is_by_hand_where_nobody_is_named_to_paint(options, by_hand, exact):
    spec = RewardSpec("paint", options)
    assert (spec.by_hand, spec.exact) == (by_hand, exact)
    assert not RewardSpec("color").by_hand and not RewardSpec("color").exact


def test_the_eye_beside_a_model_is_the_one_that_knows_its_pictures(segmenter, monkeypatch):
    """The one that is named, or the only one, or Tiny World's own for Tiny World; else none."""
    loaded = []

    def load(name, device):
        loaded.append(name)
        return segmenter

    monkeypatch.setattr("pxpo.rewards.segmentation.Segmenter", load)
    assert Tools().beside("some/model") is None and not loaded
    assert Tools().beside("some/model", "a/b") is segmenter
    assert Tools().beside(str(TINY_WORLD)) is segmenter
    assert loaded == ["a/b", ""]
    only = Tools(segmenter=segmenter)
    assert only.beside("some/model") is segmenter and len(loaded) == 2
    with pytest.raises(RewardError, match="'a/b', and here is only"):
        only.beside("some/model", "a/b")


def test_one_sight_for_each_model_and_segmenter(model, segmenter):
    """So that what it remembers is there for the next wish too."""
    alone, only = Tools(), Tools(segmenter=segmenter)
    first = only.sight(model.features, "some/model")
    assert first.segmenter is segmenter and only.sight(model.features, "some/model") is first
    assert alone.sight(model.features, "some/model") is not first
    assert alone.sight(model.features, "some/model").segmenter is None
    assert only.sight(lambda images: images, "some/model") is not first


@pytest.mark.parametrize("kind", REWARDS.values(), ids=REWARDS)
def test_every_kind_declares_what_the_command_line_and_the_page_show(kind, tools):
    assert kind.title and kind.help and all(option.help for option in kind.options)
    assert RewardSpec(kind.name).name
    for option in kind.options:
        for value in option.offered(tools):
            option.checked((value,) if isinstance(option.default, tuple) else value)


def test_the_labels_on_offer_are_the_segmenter_s(tools, segmenter):
    labels, *_ = REWARDS["segment"].options
    assert labels.offered(tools) == segmenter.labels


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize(
    ("color", "light"),
    [("red", 0.2126), ("green", 0.7152), ("blue", 0.0722), ("black", 0), ("white", 1)],
)
def test_brightness_is_the_light_of_each_pixel(color, light, more):
    spec = RewardSpec("brightness", {"more": more})
    sign = 1 if more else -1
    torch.testing.assert_close(spec.make()(flat(color)), torch.full((1, 2, 3), sign * float(light)))
    images = random_images(3, 5)
    weights = torch.tensor([0.2126, 0.7152, 0.0722])
    torch.testing.assert_close(
        spec.make()(images), sign * torch.einsum("bchw,c->bhw", images, weights)
    )
    assert spec.name == f"{'more' if more else 'less'} light"
