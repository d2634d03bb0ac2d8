"""The same code on Stable Diffusion v1.4's exact shapes, with random weights."""

from __future__ import annotations

import pytest
import torch
from conftest import letters_tokenizer
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from pxpo import RewardSpec, Tools, begin, finish, generate, judge_of, paint, settings_for, teach
from pxpo.models import StableDiffusion, best_dtype


def stable_diffusion(dtype: torch.dtype) -> StableDiffusionPipeline:
    """Every part in the shape of CompVis/stable-diffusion-v1-4, 860 M parameters in the UNet."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, max_position_embeddings=77, projection_dim=768,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        set_alpha_to_one=False, skip_prk_steps=True,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae, text, letters_tokenizer(77), unet.to(dtype), scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def paint_once(device: str, dtype: torch.dtype, steps: int, images: int) -> None:
    model = StableDiffusion(stable_diffusion(dtype), device, "stable diffusion's shapes")
    assert model.latent_shape == (4, 64, 64) and model.image_size == (512, 512)
    settings = settings_for("paint", prompt="a", steps=steps, shown=1, rank=4, images=images)
    reward, strokes = RewardSpec("paint"), torch.zeros(512, 512)
    strokes[:200, :200] = 2.0
    run = paint(finish(begin(model, settings, reward=reward)), strokes)
    judge, run = judge_of(run, model, Tools(device)), finish(generate(model, run))
    maps = judge(run.trajectory.images)
    assert maps.shape == (images, 512, 512) and maps.std() > 0
    learnt = finish(teach(model, run, reward, maps, judge))
    metrics = learnt.updates[1].metrics
    assert metrics["grad_norm"] > 0
    assert metrics["moved"] == pytest.approx(settings.strength, rel=0.16)
    outputs = [weight for name, weight in learnt.lora.weights.items() if ".lora_B." in name]
    assert len(outputs) == 128 and all(weight.any() for weight in outputs)


@pytest.mark.slow
def test_a_painted_step_on_the_cpu():
    paint_once("cpu", torch.float32, steps=2, images=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_painted_step_on_the_gpu():
    paint_once("cuda", best_dtype("cuda"), steps=20, images=4)
