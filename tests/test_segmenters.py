"""Segmenters as files are: of every architecture, with tables of labels as people write them."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from test_rewards import quarters, random_images
from torch.nn import functional as F

from pxpo import Segmenter, SegmentReward
from pxpo.errors import ModelError
from pxpo.rewards import segmentation

LABELS = ("Background", "Hair", "Sky")
STAGES = [f"stage{number}" for number in range(1, 5)]
VIT = {"image_size": 32, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
       "intermediate_size": 16}  # fmt: skip
BEIT = {**VIT, "patch_size": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2],
        "use_auxiliary_head": False}  # fmt: skip
SMALL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "segformer": ("Segformer", "Segformer", {
        "depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4,
        "decoder_hidden_size": 8}),
    "upernet": ("UperNet", "Segformer", {
        "backbone_config": {"model_type": "convnext", "depths": [1] * 4, "hidden_sizes": [8] * 4,
                            "out_features": STAGES},
        "hidden_size": 8, "pool_scales": [1, 2], "auxiliary_channels": 8,
        "auxiliary_in_channels": 8}),
    "beit": ("Beit", "Beit", BEIT),
    "data2vec": ("Data2VecVision", "Beit", BEIT),
    "dpt": ("DPT", "DPT", {
        **VIT, "patch_size": 8, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4,
        "fusion_hidden_size": 8, "use_auxiliary_head": False}),
    "mobilevit": ("MobileViT", "MobileViT", {
        "image_size": 32, "hidden_sizes": [8] * 3, "neck_hidden_sizes": [8] * 7,
        "num_attention_heads": 1, "aspp_out_channels": 8, "atrous_rates": [1, 2, 3]}),
    "mobilevitv2": ("MobileViTV2", "MobileViT", {
        "image_size": 32, "width_multiplier": 0.125, "aspp_out_channels": 8,
        "atrous_rates": [1, 2, 3]}),
    "mobilenet": ("MobileNetV2", "MobileNetV2", {"image_size": 32, "depth_multiplier": 0.1}),
}  # fmt: skip
"""The names of a small architecture's classes and of its processor's, and its config."""

CROPPING = ("mobilenet", "mobilevit", "mobilevitv2")


def written(folder: Path, kind: str, count: int = len(LABELS)) -> Path:
    """Write such a segmenter, of random weights that tell its classes apart."""
    name, processor, options = SMALL[kind]
    config = getattr(transformers, f"{name}Config")(num_labels=count, **options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForSemanticSegmentation")(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    sized: dict[str, Any] = {"size": {"height": 32, "width": 32}}
    if kind in CROPPING:
        cut = {"height": 64, "width": 64}
        sized = {"size": {"shortest_edge": 80}, "crop_size": cut, "do_center_crop": True}
    preprocessor = {"image_processor_type": f"{processor}ImageProcessor", **sized}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def relabelled(folder: Path, table: Any, **more: Any) -> Path:
    """The same with another table of labels in its config.json; None is no table."""
    config = json.loads((folder / "config.json").read_bytes())
    for name in ("id2label", "label2id"):
        config.pop(name, None)
    config |= more | ({} if table is None else {"id2label": table})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", list(SMALL))
def test_every_architecture_says_what_the_stock_model_does(tmp_path, kind):
    folder = relabelled(written(tmp_path, kind), dict(enumerate(LABELS)))
    segmenter, images = Segmenter(folder), random_images(64, 64)
    stock = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    pixels = [(image * 255).round().byte().permute(1, 2, 0).numpy() for image in images]
    cut = {"do_resize": False, "do_center_crop": False} if kind in CROPPING else {}
    inputs = segmenter.processor(images=pixels, return_tensors="pt", **cut)
    with torch.no_grad():
        logits = stock(inputs["pixel_values"]).logits
    logits = F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)
    found = segmenter.probabilities(images)
    assert segmenter.labels == LABELS and found.std() > 0.01
    torch.testing.assert_close(found, logits.softmax(1))


@pytest.mark.parametrize("kind", list(SMALL))
@pytest.mark.parametrize("size", [(16, 64), (64, 16)])
def test_the_whole_picture_is_judged_and_each_thing_where_it_is(tmp_path, kind, size):
    """Also where the processor would cut the middle out of it."""
    segmenter = copy(Segmenter(written(tmp_path, kind)))
    processor, flips = segmenter.processor, kind.startswith("mobilevit")
    normal = getattr(processor, "do_normalize", False)
    mean, std = (
        torch.tensor(getattr(processor, name) if normal else default).view(-1, 1, 1)
        for name, default in (("image_mean", [0.0] * 3), ("image_std", [1.0] * 3))
    )

    def see(pixel_values):
        pixels = pixel_values.flip(1) if flips else pixel_values  # these want blue first
        return SimpleNamespace(logits=20 * (pixels * std + mean))

    see.device = torch.device("cpu")
    segmenter.model = see
    height, width = size
    found = segmenter.classes(quarters(height, width))[0]
    for row, column, label in (
        (1, 1, 0), (1, width // 8, 0), (1, width - 2, 1), (height // 4, width // 2, 1),
        (height - 2, 1, 2), (height - 2, width - 2, 2),
    ):  # fmt: skip
        assert found[row, column] == label, (row, column)


@pytest.mark.parametrize(
    ("count", "table", "more", "labels"),
    [
        (3, {"1": "a", "2": "b", "3": "c"}, {}, ("a", "b", "c")),
        (4, {"1": "a", "2": "b", "3": "c"}, {}, ("LABEL_0", "a", "b", "c")),
        (4, {"1": "a", "2": "b", "3": "c"}, {"num_labels": 4}, ("LABEL_0", "a", "b", "c")),
        (3, {"0": "a", "1": "b", "3": "c"}, {}, ("a", "b", "c")),
        (4, {"0": "a", "1": "b", "3": "c"}, {}, ("a", "b", "LABEL_2", "c")),
        (4, {"0": "a", "3": "c", "1": "b"}, {"num_labels": 4}, ("a", "b", "LABEL_2", "c")),
        (3, {"0": "a", "1": "b", "2": "c", "3": "d"}, {}, ("a", "b", "c")),
        (3, {"0": "a", "1": "b", "2": "c", "255": "ignored"}, {}, ("a", "b", "c")),
        (3, {"-1": "ignored", "0": "a", "1": "b", "2": "c"}, {}, ("a", "b", "c")),
        (3, {"0": "a ", "1": "\tb", "2": "  "}, {}, ("a", "b", "LABEL_2")),
        (3, {"0": "a", "1": 7, "2": None}, {}, ("a", "7", "LABEL_2")),
        (3, {"2": "c", "1": "b", "0": "a"}, {}, ("a", "b", "c")),
        (3, {}, {}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        (3, None, {}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        (3, None, {"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
    ],
)
def test_a_table_of_labels_need_not_be_as_long_as_there_are_classes(
    tmp_path, count, table, more, labels
):
    stock = Segmenter(written(tmp_path, "segformer", count)).probabilities(random_images(16, 16))
    segmenter = Segmenter(relabelled(tmp_path, table, **more))
    assert segmenter.labels == labels
    assert torch.equal(segmenter.probabilities(random_images(16, 16)), stock)
    assert [segmenter.index(f" {label.upper()} ") for label in labels] == list(range(count))


KINDS = ("Mask2Former", "MaskFormer", "OneFormer", "Sam", "Sam2", "Eomt", "Detr", "CLIPSeg", "ViT")


@pytest.mark.parametrize("kind", KINDS)
def test_what_gives_no_class_for_each_pixel_is_named(tmp_path, kind):
    """By its config alone: nothing large is fetched to be refused."""
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(ModelError) as refused:
        Segmenter(tmp_path)
    message = str(refused.value)
    assert f"it is a {kind.lower()}" in message and "gives no class for each pixel" in message
    assert "segformer" in message and "upernet" in message and "\n" not in message


def test_weights_that_are_not_a_segmenter_s_are_refused_for_that_reason(tmp_path):
    written(tmp_path, "segformer")
    config = transformers.SegformerConfig.from_pretrained(tmp_path)
    transformers.SegformerModel(config).save_pretrained(tmp_path)  # its head is missing
    with pytest.raises(ModelError, match=r"not all of a segmenter's: they have no decode_head"):
        Segmenter(tmp_path)
    written(tmp_path, "segformer")
    relabelled(tmp_path, None, hidden_sizes=[8, 8, 8, 16])
    with pytest.raises(ModelError, match=r"its weights have a .* of \(.*config.json one of \("):
        Segmenter(tmp_path)


@pytest.mark.parametrize(
    ("images", "classes", "side", "most"),
    [(20, 3, 16, 8), (20, 30, 256, 8), (3, 150, 1024, 1), (6, 19, 1024, 6), (3, 150, 2048, 1)],
)
def test_no_more_images_are_judged_at_a_time_than_all_their_classes_leave_room_for(
    segmenter, images, classes, side, most
):
    """Of these sizes nothing is computed: a pixel stands for all of them."""
    seeing, sizes = copy(segmenter), []
    seeing.labels = tuple(map(str, range(classes)))
    seeing.processor = lambda images, **_: {"pixel_values": torch.zeros(len(images), 3, 1, 1)}
    seeing.model = lambda pixels: SimpleNamespace(logits=torch.zeros(len(pixels), 2, 1, 1))
    seeing.model.device = torch.device("cpu")
    seeing.reduced(
        torch.zeros(1, 1, 1, 1).expand(images, 3, side, side),
        lambda found: sizes.append(len(found)) or found[:, 0, :1, :1],
    )
    assert max(sizes) == most and sum(sizes) == images


def test_what_is_kept_of_some_images_is_what_was_asked_for(segmenter, monkeypatch):
    """And not the probabilities of all classes, of all images."""
    images, kept = random_images(32, 32).repeat(3, 1, 1, 1), []
    everything = segmenter.probabilities(images)
    monkeypatch.setattr(segmentation, "MOST_VALUES", 2 * 3 * 32 * 32)
    seeing = copy(segmenter)
    seeing.reduced = lambda images, reduce: segmenter.reduced(
        images, lambda found: kept.append(reduce(found)) or kept[-1]
    )
    reward = SegmentReward(seeing, ["Hair", "Upper-clothes"], 1)(images)
    classes = seeing.classes(images)
    assert [tuple(part.shape) for part in kept] == [(2, 32, 32)] * 6
    torch.testing.assert_close(reward, everything[:, 1] + everything[:, 2])
    assert torch.equal(classes, everything.argmax(1))
