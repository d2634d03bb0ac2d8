"""The embedded model: how its scenes are drawn, what lies in assets/, and that it can be remade."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from assets.world import __main__ as world
from assets.world import autoencoder, measure, relatives, scenes, sharp, text, training
from assets.world.segmenter import dice_loss
from pxpo import ColorReward, Noise, Segmenter, finish, load_model, rollout, settings_for
from pxpo.embedded import TINY_SEGMENTER, TINY_WORLD

made = pytest.mark.skipif(
    not (TINY_WORLD / "model_index.json").exists(), reason="Tiny World has not been made"
)


@pytest.mark.parametrize("kind", [*scenes.KINDS, scenes.HATS])
def test_a_scene_is_its_seeds_alone(kind):
    one, again, other = scenes.draw(3, kind), scenes.draw(3, kind), scenes.draw(4, kind)
    assert np.array_equal(one.image, again.image) and np.array_equal(one.labels, again.labels)
    assert one.caption == again.caption
    assert not np.array_equal(one.image, other.image)
    assert one.image.shape == (256, 256, 3) and one.labels.shape == (256, 256)
    assert one.labels.max() < len(scenes.LABELS)


def test_many_scenes_do_not_depend_on_the_number_of_workers():
    alone, together = scenes.draw_many(12, 5, workers=1), scenes.draw_many(12, 5, workers=2)
    assert np.array_equal(alone[0], together[0]) and np.array_equal(alone[1], together[1])
    assert alone[2] == together[2]
    assert set(" ".join(alone[2]).split()) <= set(scenes.WORDS)


def test_a_part_of_many_scenes_is_the_same_scenes():
    whole, part = scenes.draw_many(6, 5, workers=1), scenes.draw_many(2, 5, workers=1, first=3)
    assert np.array_equal(whole[0][3:5], part[0]) and whole[2][3:5] == part[2]


def test_the_sharp_autoencoder_begins_with_the_first_one_s_pictures():
    """Its decoder says the same as that one's, up to where the new layers are."""
    torch.manual_seed(0)
    plain = autoencoder.new_autoencoder()
    grown = sharp.grown(plain)
    z = torch.randn(1, 16, 16, 16)
    features = []
    for vae in (plain, grown):
        last = vae.decoder.up_blocks[3].resnets[1]
        hook = last.register_forward_hook(lambda _, __, out: features.append(out))
        picture = vae.decode(z).sample
        hook.remove()
    assert picture.shape == (1, 3, 256, 256)
    torch.testing.assert_close(features[0], features[1])


def test_labels_say_what_is_where():
    taxi = scenes.draw(8, "red taxi in traffic")
    red = taxi.image[taxi.labels == scenes.LABELS.index("Taxi")].mean(0)
    assert red[0] > red[1] and red[0] > red[2]
    assert (taxi.labels[-8:] == scenes.LABELS.index("Road")).mean() > 0.5
    assert (taxi.labels[:8] == scenes.LABELS.index("Road")).mean() == 0


def test_every_word_is_one_token_and_strange_words_are_not(tmp_path):
    tokenizer = text.save_tokenizer(scenes.WORDS, tmp_path)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in scenes.WORDS)
    assert len(tokenizer.tokenize("zebra")) > 1


@made
def test_the_tokenizer_is_made_alike_each_time(tmp_path):
    text.save_tokenizer(scenes.WORDS, tmp_path)
    anew, kept = (
        json.loads((folder / "tokenizer.json").read_text())["model"]
        for folder in (tmp_path, TINY_WORLD / "tokenizer")
    )
    assert anew == kept


@pytest.mark.slow
def test_one_command_makes_it_all_from_nothing(tmp_path):
    out = tmp_path / "out"
    world.make(world.SIZES["toy"], torch.device("cpu"), 0, tmp_path / "work", out, compiled=False)
    images = StableDiffusionPipeline.from_pretrained(out / "tiny_world")(
        "nature landscape", num_inference_steps=2, output_type="np"
    ).images
    assert images.shape == (1, 256, 256, 3)
    assert Segmenter(out / "tiny_world_segmenter").labels == scenes.LABELS
    assert "PSNR" in (out / "tiny_world" / "README.md").read_text()


@made
@pytest.mark.slow
def test_a_relative_of_another_width_shares_its_latents(tmp_path):
    for width, predicts in ((32, "epsilon"), (96, "v_prediction")):
        out = tmp_path / predicts
        relatives.make(width, predicts, steps=2, out=out, count=8, batch=4)
        relative = load_model(str(out))
        assert relative.network.config.block_out_channels[0] == width
        assert relative.scheduler.config.prediction_type == predicts
        assert relative.latent_shape == load_model(TINY_WORLD).latent_shape
    assert [file.name for file in tmp_path.glob("latents*")] == ["latents-8.safetensors"]


@made
def test_no_file_is_too_large_for_a_space_and_none_is_a_pickle():
    files = [path for folder in (TINY_WORLD, TINY_SEGMENTER) for path in folder.rglob("*.*")]
    assert all(path.stat().st_size < 10_000_000 for path in files)
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert sum(path.stat().st_size for path in files) < 45_000_000
    assert not [p for p in files if p.suffix == ".json" and '_path": "/' in p.read_text()]
    assert (TINY_WORLD / "README.md").exists() and (TINY_SEGMENTER / "README.md").exists()


@made
def test_a_stock_pipeline_paints_what_we_paint():
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_WORLD)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    model = load_model(device="cpu")
    settings = model.filled(settings_for("paint"))
    stock = pipeline(
        settings.prompt, num_inference_steps=settings.steps, eta=settings.eta,
        guidance_scale=settings.guidance_scale, generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images  # fmt: skip
    ours = finish(rollout(model, [settings.prompt], [Noise(1)], settings)).images
    assert torch.equal(stock, ours)


@pytest.mark.slow
@made
def test_pictures_hold_what_their_prompt_names():
    model, segmenter = load_model(device="cpu"), Segmenter()
    prompts = [kind for kind in scenes.KINDS for _ in range(4)]
    noise = [Noise(100 + index) for index in range(len(prompts))]
    images = finish(rollout(model, prompts, noise, model.filled(settings_for("paint")))).images
    seen = (images.permute(0, 2, 3, 1) * 255).round().byte()
    assert measure.named(segmenter.model, seen, prompts, report=lambda _: None) >= 0.75
    blue = ColorReward("blue")(images).mean((1, 2))
    assert -0.9 < blue.mean() < -0.2 and blue.std() > 0.01


@made
def test_the_segmenter_is_a_stock_one_with_the_papers_labels():
    model = AutoModelForSemanticSegmentation.from_pretrained(TINY_SEGMENTER)
    AutoImageProcessor.from_pretrained(TINY_SEGMENTER)
    assert [model.config.id2label[index] for index in (1, 2, 11)] == ["Hat", "Hair", "Face"]
    pictures, labels, _ = scenes.draw_many(24, seed=77)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    right = Segmenter().classes(images) == torch.from_numpy(labels)
    assert right.float().mean() > 0.95


@made
def test_words_it_never_learnt_are_said():
    model = load_model(device="cpu")
    assert model.unknown_words("Nature landscape, with zebras!") == ["zebras"]


def test_dice_loss_counts_every_class_there_alike():
    truth = torch.tensor([[[0, 0, 0, 0, 0, 0, 0, 2]]])
    right = 50 * torch.nn.functional.one_hot(truth, 4).permute(0, 3, 1, 2).float()
    assert dice_loss(right, truth).item() == pytest.approx(0, abs=1e-6)
    missed = 50 * torch.nn.functional.one_hot(truth * 0, 4).permute(0, 3, 1, 2).float()
    assert dice_loss(missed, truth).item() == pytest.approx(1 - 0.5 * 14 / 15)


@pytest.mark.parametrize("stop_at", [None, 1, 5])
def test_a_training_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(training, "BETWEEN_CHECKPOINTS", -1)
    data = torch.randn(7, 3, generator=training.generator_at(1))

    def run(stop: int | None) -> torch.nn.Module:
        torch.manual_seed(0)

        def loss_of(model, step):
            if step == stop:
                raise KeyboardInterrupt
            return model(data[training.batch_at(7, 2, 3, step)]).square().mean()

        return training.train(
            "toy", torch.nn.Linear(3, 3), loss_of, steps=8, learning_rate=0.1,
            checkpoint=tmp_path / "toy.safetensors", report=lambda _: None,
        )  # fmt: skip

    straight = run(None)
    if stop_at is not None:
        with pytest.raises(KeyboardInterrupt):
            run(stop_at)
    again = run(None)
    assert all(
        torch.equal(a, b) for a, b in zip(straight.parameters(), again.parameters(), strict=True)
    )
    assert not list(tmp_path.iterdir())


def test_every_pass_takes_each_scene_once():
    seen = torch.cat([training.batch_at(12, 4, 0, step) for step in range(6)])
    assert torch.equal(seen[:12].sort().values, torch.arange(12))
    assert torch.equal(seen[12:].sort().values, torch.arange(12))
    assert not torch.equal(seen[:12], seen[12:])
