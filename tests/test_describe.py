"""The reward from words, on a small random CLIPSeg."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr
import pytest
import torch
from conftest import letters_tokenizer
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
)

import pxpo.__main__ as cli
import pxpo.rewards.describe as describe
from pxpo import RewardSpec, Tools, finish, load_run
from pxpo.errors import ModelError, RewardError
from pxpo.rewards.describe import CLIPSEG, ClipSeg, DescribeReward
from pxpo.studio import Studio
from pxpo.ui.rewards import RewardTabs, spec_of

TEXT = {"vocab_size": 54, "max_position_embeddings": 16, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3,
          "num_attention_heads": 2, "image_size": 224, "patch_size": 32}  # fmt: skip
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": 352,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
BYTE = 1 / 255 / 0.224  # of the pixels that the model reads


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The usual one's shape and preprocessing, but narrow."""
    folder = tmp_path_factory.mktemp("clipseg")
    torch.manual_seed(0)
    config = CLIPSegConfig(
        text_config=TEXT, vision_config=VISION, projection_dim=8, reduce_dim=8,
        extract_layers=[0, 1, 2], decoder_intermediate_size=16,
        use_complex_transposed_convolution=True,
    )  # fmt: skip
    model = CLIPSegForImageSegmentation(config)
    for weight in model.parameters():  # so that pictures and texts make a difference
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    letters_tokenizer(16).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="module")
def clipseg(folder) -> ClipSeg:
    return ClipSeg(str(folder))


def halves(height: int, width: int) -> torch.Tensor:
    """(1, 3, H, W), whole bytes: colours in eight fields on the left, dark red on the right."""
    images = torch.tensor([90.0, 10, 10]).view(1, 3, 1, 1).repeat(1, 1, height, width)
    fields = torch.randint(256, (1, 3, 4, 2), generator=torch.Generator().manual_seed(0)).float()
    images[..., : width // 2] = torch.nn.functional.interpolate(fields, (height, width // 2))
    return images / 255


def pictures(images: torch.Tensor) -> list[Image.Image]:
    """As the processor wants them."""
    return [
        Image.fromarray(one) for one in (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    ]


@pytest.mark.parametrize("size", [(352, 352), (64, 64), (40, 72), (512, 400)])
def test_a_picture_is_prepared_as_by_the_processor(clipseg, folder, size):
    images = halves(*size)
    processor = CLIPSegProcessor.from_pretrained(folder)
    wanted = processor(images=pictures(images), return_tensors="pt")["pixel_values"]
    prepared = clipseg.pixels(images)
    assert prepared.shape == wanted.shape == (1, 3, 352, 352)
    torch.testing.assert_close(prepared, wanted, atol=1.01 * BYTE, rtol=0)
    assert (prepared - wanted).abs().mean() < BYTE / 2


@pytest.mark.parametrize("size", [(352, 352), (64, 96), (400, 512)])
def test_the_probability_is_the_stock_model_s_and_in_its_place(clipseg, folder, size):
    images = halves(*size)
    processor = CLIPSegProcessor.from_pretrained(folder)
    model = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(
            **processor(text=["tree"], images=pictures(images), return_tensors="pt")
        ).logits
    wanted = torch.nn.functional.interpolate(
        logits[:, None], size, mode="bilinear", antialias=True
    )[:, 0].sigmoid()
    found = clipseg.probability(images, "tree")
    assert found.shape == (1, *size)
    torch.testing.assert_close(found, wanted, atol=0.003, rtol=0)
    for axis in (1, 2):  # mirrored, on its way in or out, it would be another
        mirrored = clipseg.probability(images.flip(axis + 1), "tree")
        assert (mirrored - wanted).abs().max() > 0.03
        assert (found.flip(axis) - wanted).abs().max() > 0.03


def test_a_batch_larger_than_one_pass_is_judged_as_each_alone(clipseg):
    images = torch.rand((10, 3, 24, 32), generator=torch.Generator().manual_seed(1))
    together = clipseg.probability(images, "tree")
    for index in (0, 7, 8, 9):
        alone = clipseg.probability(images[index : index + 1], "tree")[0]
        torch.testing.assert_close(together[index], alone)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_more_is_minus_less_and_the_text_matters(folder):
    tools, images = Tools(usual={"clipseg": str(folder)}), halves(300, 352)
    less = RewardSpec("describe", {"text": "tree"}).make(tools)(images)
    more = RewardSpec("describe", {"text": "tree", "more": True}).make(tools)(images)
    assert less.shape == (1, 300, 352) and less.max() <= 0 and less.min() >= -1
    assert torch.equal(more, -less)
    other = RewardSpec("describe", {"text": "sky"}).make(tools)(images)
    assert (other - less).abs().max() > 0.03


def test_it_is_loaded_once_and_only_when_it_is_needed(folder, monkeypatch):
    loaded = []
    real = ClipSeg(str(folder))
    monkeypatch.setattr(describe, "ClipSeg", lambda name, device: loaded.append(name) or real)
    tools = Tools()
    assert not loaded
    for _ in range(2):
        RewardSpec("describe").make(tools)
        RewardSpec("describe", {"clipseg": "a/b"}).make(tools)
    assert loaded == [CLIPSEG, "a/b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the text is ''; say what to find"),
        ("\n ", "say what to find"),
        ("a b c d e f g h i j k l m n o", "'a b c.*has 17 tokens.*at most 16: say it in fewer"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_in_one_line(clipseg, text, words):
    with pytest.raises(RewardError, match=words) as refused:
        DescribeReward(clipseg, text)
    assert "\n" not in str(refused.value)
    DescribeReward(clipseg, "a b c d e f g h i j k l m n")  # and the marks: 16


def test_it_is_for_more_or_for_less(clipseg):
    with pytest.raises(RewardError, match="sign is 0"):
        DescribeReward(clipseg, "tree", 0)


def test_one_that_cannot_be_loaded_is_refused_in_one_line(folder, tmp_path, monkeypatch):
    plain = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))
    plain.save_pretrained(tmp_path / "plain")
    letters_tokenizer(16).save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))

    def no_network(name: str) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(describe, "model_info", no_network)
    for name in ("nobody/nothing", str(tmp_path / "nowhere"), str(tmp_path / "plain")):
        with pytest.raises(ModelError, match=f"CLIPSeg '{name}' cannot.*hf download") as refused:
            ClipSeg(name)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("named", "downloaded", "available"),
    [("", False, False), ("a/b", False, True), ("", True, True)],
)
def test_it_has_a_tab_where_it_is_available(segmenter, monkeypatch, named, downloaded, available):
    monkeypatch.setattr(describe, "cached", lambda name: downloaded and name == CLIPSEG)
    with gr.Blocks():
        tabs = RewardTabs(Tools("cpu", segmenter, {"clipseg": named} if named else {}))
    assert list(tabs.tabs)[:4] == ["paint", "color", "segment", "brightness"]
    assert ("describe" in tabs.tabs) == available
    if available:
        values = ["blue", "less", ["Hair"], "less", "less", "a tree", "more"]
        assert tabs.spec("describe", *values).name == "more “a tree”"


def test_a_visitor_names_no_folder():
    assert spec_of("describe", {"text": "tree", "more": "more"}).name == "more “tree”"
    with pytest.raises(RewardError, match="clipseg is chosen where the app is started"):
        spec_of("describe", {"clipseg": "/etc"})


def test_a_studio_learns_from_words_with_the_one_it_was_given(model, segmenter, folder, tmp_path):
    studio = Studio(model, segmenter, tmp_path, usual={"clipseg": str(folder)})
    run = finish(studio.start(prompt="a", steps=2, rank=2))
    reward = RewardSpec("describe", {"text": r"a $\tree$"})
    run = finish(studio.step(run.id, reward, images=2))
    assert run.count == 1 and run.reward == reward.changed(clipseg=str(folder.resolve()))
    studio.curve(run).canvas.draw()


def test_a_studio_without_one_downloads_none(model, segmenter, tmp_path, monkeypatch):
    monkeypatch.setattr(describe, "cached", lambda name: False)
    monkeypatch.setattr(describe, "ClipSeg", lambda *_: pytest.fail("it was loaded"))
    studio = Studio(model, segmenter, tmp_path)
    run = finish(studio.start(prompt="a", steps=2, rank=2))
    with pytest.raises(RewardError, match="'describe' is not offered here"):
        finish(studio.step(run.id, RewardSpec("describe")))


def test_it_is_a_command(folder, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    out = tmp_path / "run"
    words = ["describe", "--text", "lake", "--more", "--clipseg"]
    small = ["--model", str(model_folder), "--updates", "1", "--images", "2", "--steps", "2",
             "--rank", "2", "--out", str(out)]  # fmt: skip
    assert cli.main([*words, folder.name, *small]) == 0
    run = load_run(out)
    assert run.reward.name == "more “lake”" and run.reward.options["clipseg"] == str(folder)
    assert run.settings.prompt == "nature landscape" and 0 < run.latest[-1].here < 1
    capsys.readouterr()
    assert cli.main([*words, "/nowhere"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
