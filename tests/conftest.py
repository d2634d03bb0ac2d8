"""Small random models in Stable Diffusion's shape, made afresh: the core needs no assets."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch asks: tests run in two processes already

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from pxpo.lora import Lora, adapter, new_lora
from pxpo.models import DiffusionModel, load_model
from pxpo.models.base import Size
from pxpo.rewards import Segmenter

LABELS = ("Background", "Hair", "Upper-clothes")

LONGEST_FIRST = (
    "test_app", "test_api", "test_space", "test_processes", "test_cli", "test_studio", "test_run",
    "test_reproduce", "test_hostile", "test_round_trips", "test_lora_files", "test_tiny_world",
    "test_zerogpu", "test_packaging",
)  # fmt: skip
"""Files of tests: a long one that came last would keep one of two processes waiting."""

# Servers share Gradio's folder, and one that ends deletes what another still shows.
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="pxpo-tests-")
atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def letters_tokenizer(length: int) -> CLIPTokenizer:
    """A tokenizer that knows the letters a to z, and no word."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocabulary[letter] = len(vocabulary)
        vocabulary[letter + "</w>"] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def text_config(layers: int, width: int) -> CLIPTextConfig:
    """A text encoder's for prompts of 12 of the tokenizer's letters."""
    return CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=12, projection_dim=width,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def random_vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **options,
    )  # fmt: skip


def random_unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        layers_per_block=1, attention_head_dim=2, norm_num_groups=8,
        **{
            "cross_attention_dim": 32,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        } | options,
    )  # fmt: skip


def random_pipeline(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """A pipeline with 8x8x4 latents and 16x16 images: every part real, every weight random."""
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(text_config(layers=1, width=32))
    unet, vae = random_unet(), random_vae()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae, text_encoder, letters_tokenizer(12), unet, scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def random_xl_pipeline(
    prediction_type: str = "epsilon", *, force_zeros: bool = True, layers: int = 3, **vae: Any
) -> StableDiffusionXLPipeline:
    """The same in SDXL's shape, with the scheduler that its repository ships.

    Of a model that predicts v the noise schedule ends at zero signal. layers: of the second
    text encoder. vae: more of its config.
    """
    torch.manual_seed(0)
    v_prediction = prediction_type == "v_prediction"
    scheduler = EulerDiscreteScheduler.from_config({
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False, "interpolation_type": "linear", "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "use_karras_sigmas": False,
        "prediction_type": prediction_type, "rescale_betas_zero_snr": v_prediction,
        "timestep_spacing": "trailing" if v_prediction else "leading",
    })  # fmt: skip
    return StableDiffusionXLPipeline(
        random_vae(**vae), CLIPTextModel(text_config(layers=2, width=16)),
        CLIPTextModelWithProjection(text_config(layers, width=24)), letters_tokenizer(12),
        letters_tokenizer(12), random_unet(
            cross_attention_dim=40, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 24,
        ), scheduler, force_zeros_for_empty_prompt=force_zeros, add_watermarker=False,
    )  # fmt: skip


def random_lora(model: DiffusionModel, rank: int = 2, seed: int = 0) -> Lora:
    """A LoRA that changes what the model predicts: neither of its matrices is zero."""
    generator = torch.Generator().manual_seed(seed)
    lora = new_lora(model, rank, seed)
    weights = {
        name: torch.randn(weight.shape, generator=generator) * 0.3
        for name, weight in lora.weights.items()
    }
    return replace(lora, weights=weights)


@torch.no_grad()
def prediction(model) -> torch.Tensor:
    x_t = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    return model.predict(x_t, torch.tensor([300]), model.encode(["a"]))


def with_lora(model, lora: Lora) -> torch.Tensor:
    with adapter(model, lora):
        return prediction(model)


def same_weights(one: Lora, other: Lora) -> bool:
    return one.weights.keys() == other.weights.keys() and all(
        torch.equal(one.weights[name], other.weights[name]) for name in one.weights
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(model_folder: Path) -> tuple[DiffusionModel, list[torch.Tensor], dict[str, Any]]:
    """A model, a copy of its weights, and what it is made of."""
    model = load_model(model_folder, device="cpu")
    return model, [weight.clone() for weight in bare_weights(model)], vars(model).copy()


@pytest.fixture
def model(loaded: tuple[DiffusionModel, list[torch.Tensor], dict]) -> Iterator[DiffusionModel]:
    """One for all tests, as loading takes long, with its own parts again, whatever a test put in
    their place. None may change its weights or leave it at work."""
    model, weights, parts = loaded
    vars(model).clear()
    vars(model).update({n: copy(p) if isinstance(p, dict | set) else p for n, p in parts.items()})
    model._encoded.cache_clear()
    model.network.disable_gradient_checkpointing()
    model.vae.disable_tiling()
    yield model
    assert not model.busy
    assert all(map(torch.equal, bare_weights(model), weights))


def bare_weights(model: Any) -> list[torch.Tensor]:
    """All but those of a LoRA that is attached."""
    modules = (model.network, model.vae, model.text_encoder)
    named = [pair for module in modules for pair in module.named_parameters()]
    return [weight for name, weight in named if ".lora_" not in name]


@pytest.fixture
def in_memory(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, too, finds that model loaded already."""

    def load(name: str | Path | None, *, size: Size = (None, None)) -> DiffusionModel:
        here = name == model.name and size in ((None, None), model.image_size)
        return model if here else load_model(name, size=size)

    monkeypatch.setattr("pxpo.__main__.load_model", load)


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    """A random one, of three classes."""
    folder = tmp_path_factory.mktemp("segmenter")
    torch.manual_seed(0)
    config = SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8,
        initializer_range=0.3, id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "SegformerImageProcessor", "size": {"height": 32, "width": 32}}'
    )
    return Segmenter(folder)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, headless; tests that want it are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium to test the page in")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
                  "--ignore-gpu-blocklist", "--disable-background-networking"],
        )  # fmt: skip
        yield browser
        browser.close()


STILL = """
addEventListener("DOMContentLoaded", () => {
  const style = document.createElement("style");
  style.textContent =
    "*, ::before, ::after { animation: none !important; transition: none !important }";
  document.head.append(style);
})
"""


def new_context(browser: Any, **options: Any) -> Any:
    """A visitor's. Nothing on its pages pulses or glides: to draw that would take Chromium, which
    draws on the CPU here, more time than a step takes the model."""
    context = browser.new_context(**options)
    context.add_init_script(STILL)
    return context


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def answers(url: str, process: subprocess.Popen, seconds: float = 90) -> None:
    """Wait until the app serves its page."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the app has stopped"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(url)
