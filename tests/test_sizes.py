"""Images of another size than the model's own, from `load_model` to the resumed run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_pipeline, random_xl_pipeline
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from pxpo import RewardSpec, begin, finish, generate, load_model, load_run, settings_for, teach
from pxpo import __main__ as cli
from pxpo.card import write_folder
from pxpo.credit import downsample
from pxpo.errors import RunError, SettingError
from pxpo.models import StableDiffusion
from pxpo.rollout import Noise, rollout
from pxpo.settings import Sampling
from pxpo.studio import Studio

SMALL = ["--steps", "2", "--images", "2", "--shown", "2", "--rank", "2", "--prompt", "a lake"]


@pytest.fixture(params=[random_pipeline, random_xl_pipeline], ids=["1.x", "xl"])
def folder(request, tmp_path):
    request.param().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("size", "image_size"),
    [
        ((24, 32), (24, 32)),
        ((24, None), (24, 16)),
        ((None, 32), (16, 32)),
        ((None, None), (16, 16)),
        ((16, 1024), (16, 1024)),
    ],
)
def test_a_size_is_height_then_width_and_the_rest_the_model_s_own(folder, size, image_size):
    model = load_model(folder, device="cpu", size=size)
    height, width = image_size
    assert model.image_size == image_size
    assert model.latent_shape == (4, height // 2, width // 2)


def test_another_size_than_that_of_a_model_that_is_not_square():
    pipeline = random_pipeline()
    pipeline.unet.register_to_config(sample_size=(8, 10))
    assert StableDiffusion(pipeline, "cpu", "wide", (24, None)).image_size == (24, 20)


def test_a_model_s_own_size_is_one_that_it_paints_whatever_it_is(tmp_path):
    pipeline = random_pipeline()
    pipeline.unet.register_to_config(sample_size=(6, 10))
    pipeline.save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu", size=(12, 20)).image_size == (12, 20)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((20, None), "height is 20.*multiples of 8 from 16 to 1024.*16 high and 16 wide"),
        ((None, 8), "width is 8"),
        ((1032, None), "height is 1032"),
        ((-16, 16), "height is -16"),
        ((0, None), "height is 0"),
    ],
)
def test_a_size_that_cannot_be_is_refused_before_the_weights_are_read(folder, size, words):
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(SettingError, match=words):
        load_model(folder, device="cpu", size=size)


def test_the_stock_pipeline_paints_the_same_picture_of_that_size(folder):
    """SDXL is told the size, too."""
    model = load_model(folder, device="cpu", size=(24, 32))
    sampling = Sampling(steps=3, guidance_scale=2.5)
    ours = finish(rollout(model, ["a b"], [Noise(7)], sampling)).images
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    stock = pipeline(
        ["a b"], num_inference_steps=3, guidance_scale=2.5, eta=1.0, height=24, width=32,
        generator=torch.Generator().manual_seed(7), output_type="pt",
    ).images  # fmt: skip
    assert ours.shape == (1, 3, 24, 32) and torch.equal(ours, stock)
    assert model.features(ours).shape[2:] == (12, 16)


def test_a_run_of_another_size_is_taught_and_its_card_s_code_paints_it(folder, tmp_path):
    model = load_model(folder, device="cpu", size=(24, 32))
    settings = settings_for("color", prompt="a b", steps=3, rank=2, images=2, shown=1)
    reward, run = RewardSpec("color"), finish(begin(model, settings))
    run, judge = finish(generate(model, run)), reward.make()
    run = finish(teach(model, run, reward, judge(run.trajectory.images), judge))
    assert run.size == (24, 32) and run.updates[1].metrics["moved"] > 0
    lora, names = write_folder(run, tmp_path / "lora"), {}
    exec((lora / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    assert np.array_equal(np.asarray(names["picture"]), Image.open(lora / "after.png"))


def test_a_run_is_resumed_in_its_size(folder, tmp_path):
    out = tmp_path / "run"
    begun = ["color", "--model", str(folder), "--out", str(out), "--updates", "1", *SMALL]
    assert cli.main([*begun, "--height", "24", "--width", "32"]) == 0
    assert load_run(out).size == (24, 32)
    assert cli.main(["resume", str(out), "--updates", "2"]) == 0
    run = load_run(out)
    assert [update.shown.shape[1:3] for update in run.updates] == [(24, 32)] * 3


@pytest.mark.parametrize(
    ("value", "words"), [("17", "height is 17; this model paints multiples of 8"), ("x", "'x'")]
)
def test_a_size_is_refused_on_the_command_line_in_one_line(model_folder, capsys, value, words):
    try:
        status = cli.main(["color", "--model", str(model_folder), "--height", value, *SMALL])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr().err
    assert status == 2 and words in said and said.count("\n") == 1


def test_the_app_says_a_size_that_cannot_be_and_stops(model_folder, tmp_path, monkeypatch):
    import app

    arguments = ["--model", str(model_folder), "--width", "17", "--runs", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["app.py", *arguments])
    with pytest.raises(SystemExit, match="width is 17"):
        app.main()


def test_a_run_of_another_size_is_not_opened_in_the_studio(model_folder, segmenter, tmp_path):
    wide = load_model(model_folder, device="cpu", size=(None, 24))
    run = finish(Studio(wide, segmenter, tmp_path).start(prompt="a", steps=2, rank=2))
    square = Studio(load_model(model_folder, device="cpu"), segmenter, tmp_path)
    with pytest.raises(RunError, match="24 × 16 pixels.*16 × 16.*--width 24 --height 16"):
        square.run(run.id)
    assert Studio(wide, segmenter, tmp_path).run(run.id).size == (16, 24)


def test_the_page_shows_it_unsquashed_and_paint_is_meant_where_it_was_put(
    model_folder, segmenter, tmp_path
):
    from pxpo.ui import Page
    from pxpo.ui.parts import large

    model = load_model(model_folder, device="cpu", size=(24, 32))
    studio = Studio(model, segmenter, tmp_path)
    page = Page(studio)
    page.build()
    assert page.canvas.editor.canvas_size == (512, 384)
    run = finish(studio.start(prompt="a", steps=2, rank=2))
    assert large(run.picture).size == large(run.picture.transpose(1, 2)).size[::-1] == (512, 384)
    paint = Image.new("RGBA", (512, 384))
    paint.paste((0, 255, 0, 255), (256, 0, 512, 96))
    run = finish(studio.step(run.id, RewardSpec("paint"), paint, images=2))
    wanted = torch.zeros(1, 24, 32)
    wanted[:, :6, 16:] = 2
    assert torch.equal(downsample(run.painted[0].paint[None], model.image_size), wanted)
