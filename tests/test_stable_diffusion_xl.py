"""SDXL beside its stock pipeline, and all that can be done with a model of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_lora, random_xl_pipeline
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from pxpo import RewardSpec, Tools, begin, finish, generate, judge_of, paint, settings_for, teach
from pxpo.card import write_folder
from pxpo.errors import ModelError
from pxpo.lora import adapter, new_lora
from pxpo.lora_files import load_lora, save_lora
from pxpo.models import StableDiffusionXL, load_model
from pxpo.rewards import Painted, Sight, Wish
from pxpo.rollout import Noise, rollout
from pxpo.settings import Sampling, Settings

SAMPLING = Sampling(steps=3, guidance_scale=2.5)


def wrapped(pipeline=None) -> StableDiffusionXL:
    return StableDiffusionXL(pipeline or random_xl_pipeline(), "cpu", "random")


def stock_picture(pipeline, seed=7, eta=1.0, **options):
    """What `pipeline` paints of "a b" as DDIM: (1, 3, H, W)."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        ["a b"], num_inference_steps=3, eta=eta, output_type="pt",
        generator=torch.Generator().manual_seed(seed), **{"guidance_scale": 2.5} | options,
    ).images  # fmt: skip


def our_picture(model, seed=7, **sampling):
    return finish(rollout(model, ["a b"], [Noise(seed)], Sampling(steps=3, **sampling))).images


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("force_zeros", [True, False])
def test_rollout_equals_the_stock_pipeline(guidance_scale, force_zeros):
    model = wrapped(random_xl_pipeline(force_zeros=force_zeros))
    stock = stock_picture(
        random_xl_pipeline(force_zeros=force_zeros), guidance_scale=guidance_scale
    )
    assert torch.equal(our_picture(model, guidance_scale=guidance_scale), stock)


def test_zero_terminal_snr_is_sampled_and_learnt_from():
    """At eta = 1 the stock pipeline's pictures are NaN there."""
    model, sampling = wrapped(random_xl_pipeline("v_prediction")), {"guidance_scale": 2.5}
    stock = stock_picture(random_xl_pipeline("v_prediction"), eta=0.5)
    torch.testing.assert_close(our_picture(model, eta=0.5, **sampling), stock)
    steps = model.steps(Sampling(steps=3))
    assert steps.p[0] == 0 and (steps.sigma[:2] > 0).all()
    assert (steps.c / steps.sigma)[:2].isfinite().all()
    assert our_picture(model, **sampling).isfinite().all()


def test_a_vae_s_own_mean_and_deviation_are_honoured():
    numbers = {"latents_mean": [0.5, -1.0, 0.2, 0.1], "latents_std": [2.0, 0.5, 1.5, 1.0]}
    model = wrapped(random_xl_pipeline(**numbers))
    picture = our_picture(model, guidance_scale=2.5)
    assert torch.equal(picture, stock_picture(random_xl_pipeline(**numbers)))
    assert not torch.allclose(picture, our_picture(wrapped(), guidance_scale=2.5), atol=1e-3)
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
    mode = model.vae.encode(pixels).latent_dist.mode()
    mean, std = (torch.tensor(numbers[f"latents_{n}"]).view(1, 4, 1, 1) for n in ("mean", "std"))
    normal = model._encode_some(pixels)
    torch.testing.assert_close(normal, (mode - mean) / std * model.vae.config.scaling_factor)
    with torch.no_grad():
        decoded = model.vae.decode(latents * std / model.vae.config.scaling_factor + mean).sample
    torch.testing.assert_close(model.decode(latents), (decoded / 2 + 0.5).clamp(0, 1))


@torch.no_grad()
@pytest.mark.parametrize("force_zeros", [True, False])
def test_prompts_are_encoded_as_the_stock_pipeline_does(force_zeros):
    pipeline = random_xl_pipeline(force_zeros=force_zeros)
    model = wrapped(pipeline)
    cond, uncond = model.encode(["a b", "z"]), model.unconditional()
    text, no_text, pooled, no_pooled = pipeline.encode_prompt(["a b", "z"], device="cpu")
    torch.testing.assert_close(cond["text"], text)
    torch.testing.assert_close(cond["pooled"], pooled)
    for name, stock in (("text", no_text), ("pooled", no_pooled)):
        torch.testing.assert_close(uncond[name], stock[:1])
        assert bool(uncond[name].any()) != force_zeros
    assert torch.equal(cond["time_ids"], torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2))
    assert torch.equal(uncond["time_ids"], cond["time_ids"][:1])


def test_a_stock_pipeline_paints_the_same_picture_under_our_lora(tmp_path):
    model = wrapped()
    lora = random_lora(model)
    save_lora(lora, tmp_path)
    with adapter(model, lora):
        ours = our_picture(model, guidance_scale=2.5)
    pipeline = random_xl_pipeline()
    pipeline.load_lora_weights(tmp_path)
    assert torch.equal(ours, stock_picture(pipeline))
    assert not torch.allclose(ours, our_picture(model, guidance_scale=2.5), atol=1e-3)
    again = load_lora(tmp_path)
    assert again.rank == lora.rank and again.alpha == lora.alpha
    assert all(torch.equal(again.weights[name], value) for name, value in lora.weights.items())
    assert again.weights.keys() == lora.weights.keys()


@pytest.fixture
def folder(tmp_path):
    random_xl_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_folder_is_loaded_frozen_and_in_the_precision_asked_for(folder):
    model = load_model(folder, device="cpu", dtype=torch.bfloat16)
    assert isinstance(model, StableDiffusionXL)
    assert model.image_size == (16, 16) and model.latent_shape == (4, 8, 8)
    for part in (model.vae, *model.text_encoders):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not part.training and not any(p.requires_grad for p in part.parameters())
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    assert our_picture(model, guidance_scale=2.5).isfinite().all()
    stock = stock_picture(StableDiffusionXLPipeline.from_pretrained(folder))
    assert torch.equal(our_picture(load_model(folder, device="cpu"), guidance_scale=2.5), stock)


def test_half_precision_takes_the_half_sized_files(tmp_path):
    random_xl_pipeline().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    model = load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    for part in (model.vae, *model.text_encoders):
        assert {p.dtype for p in part.parameters()} == {torch.float32}


def test_what_settings_leave_open_is_sdxl_s_own():
    filled = wrapped().filled(Settings(prompt="a lake"))
    assert (filled.steps, filled.guidance_scale, filled.images) == (50, 5.0, 4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_wish_is_learnt_and_the_card_s_code_paints_it(prediction_type, tmp_path):
    """Painting, the wish, hold, one update of known strength, the LoRA's folder."""
    random_xl_pipeline(prediction_type).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", device="cpu")
    settings = settings_for("paint", prompt="a b", steps=3, shown=2, rank=2, images=2)
    reward, strokes = RewardSpec("paint"), torch.zeros(16, 16)
    strokes[:6, :6] = 2.0
    run = paint(finish(begin(model, settings, reward=reward)), strokes)
    judge, run = judge_of(run, model, Tools("cpu")), finish(generate(model, run))
    maps = judge(run.trajectory.images)
    assert maps.shape == (2, 16, 16) and maps.std() > 0
    learnt = finish(teach(model, run, reward, maps, judge))
    metrics = learnt.updates[1].metrics
    assert metrics["grad_norm"] > 0
    assert metrics["moved"] == pytest.approx(settings.strength, rel=0.16)
    outputs = [weight for name, weight in learnt.lora.weights.items() if ".lora_B." in name]
    assert outputs and all(weight.any() for weight in outputs)
    lora, names = write_folder(learnt, tmp_path / "lora"), {}
    exec((lora / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    made, shown = (
        np.asarray(names["picture"]).astype(int),
        np.asarray(Image.open(lora / "after.png")),
    )
    # Of a schedule that starts without signal the card's eta is not quite the run's.
    assert ("eta=0.99999" in (lora / "README.md").read_text()) == (prediction_type != "epsilon")
    assert shown.std() > 1 and np.abs(made - shown).max() <= (prediction_type == "v_prediction")


def test_features_are_of_each_latent_pixel_and_know_no_lora():
    model = wrapped()
    images = torch.rand((3, 3, 16, 16), generator=torch.Generator().manual_seed(5))
    features = model.features(images)
    assert features.shape == (3, 16, 8, 8) and features.isfinite().all()
    torch.testing.assert_close(model.features(images[1:2])[0], features[1], rtol=1e-4, atol=1e-5)
    with adapter(model, random_lora(model)):
        assert torch.equal(model.features(images), features)
    painted = Painted((images[0] * 255).byte().permute(1, 2, 0), images[0, 0])
    wish = Wish([painted], Sight(model.features))
    assert wish(images).shape == (3, 16, 16)


def test_a_refiner_is_refused_by_name():
    pipeline = random_xl_pipeline()
    pipeline.text_encoder = pipeline.tokenizer = None
    with pytest.raises(ModelError, match="'random' lacks one of SDXL's two.*refiner"):
        wrapped(pipeline)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 9}, "takes 9 channels"),
        ({"addition_embed_type": None}, "does not take pooled embeddings.*addition_embed_type"),
        ({"time_cond_proj_dim": 256}, "wants the guidance scale.*LCM.*time_cond_proj_dim"),
    ],
)
def test_a_unet_of_another_kind_is_refused_by_name(changes, words):
    pipeline = random_xl_pipeline()
    pipeline.unet.register_to_config(**changes)
    with pytest.raises(ModelError, match=f"'random'.*{words}"):
        wrapped(pipeline)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_a_lora_fits_the_exact_unet_of_sdxl(tmp_path):
    """2.6 billion parameters, of which none is made."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    lora = new_lora(SimpleNamespace(network=unet, name="SDXL"), 4, 0)
    assert len(lora.weights) == 70 * 2 * 4 * 2  # blocks, attentions, projections, matrices
    save_lora(lora, tmp_path)
    state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
        tmp_path, unet_config=unet.config, return_lora_metadata=True
    )
    assert len(state) == len(lora.weights) and all(name.startswith("unet.") for name in state)
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, metadata=metadata)
    attached = {n: tuple(p.shape) for n, p in unet.named_parameters() if ".lora_" in n}
    named = {name.replace("default_0", "default"): shape for name, shape in attached.items()}
    assert named == {name: tuple(value.shape) for name, value in lora.weights.items()}
