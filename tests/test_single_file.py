"""Checkpoints in one file, written here in the original names: diffusers only reads them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from conftest import letters_tokenizer, random_pipeline, random_xl_pipeline
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pxpo import RewardSpec, begin, finish, generate, settings_for, teach
from pxpo.card import write_folder
from pxpo.embedded import SINGLE_FILE
from pxpo.errors import ModelError
from pxpo.models import StableDiffusion, StableDiffusionXL, load_model
from pxpo.models.single_file import clip_tokenizer
from pxpo.rollout import Noise, rollout
from pxpo.settings import Sampling


def renamed(state, pairs):
    """`state` with the names that each (pattern, replacement) in turn makes of its names."""
    names = {}
    for name, value in state.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        names[name] = value
    return names


RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
]  # fmt: skip


def original_unet(unet):
    """The names of the UNet's tensors before diffusers: blocks are counted through."""
    each = unet.config.layers_per_block + 1

    def block(match):
        side, number, kind, index, rest = match.groups()
        number, index, up = int(number), int(index), side == "up"
        if kind == "downsamplers":
            return f"input_blocks.{(number + 1) * each}.0.op{rest.removeprefix('.conv')}"
        if kind == "upsamplers":
            attention = hasattr(unet.up_blocks[number], "attentions")
            return f"output_blocks.{number * each + each - 1}.{1 + attention}{rest}"
        place = number * each + index + (not up)
        return f"{'output' if up else 'input'}_blocks.{place}.{int(kind == 'attentions')}{rest}"

    state = unet.state_dict()
    resnets = {n: v for n, v in state.items() if ".resnets." in n}
    named = renamed(resnets, RESNET) | {n: v for n, v in state.items() if n not in resnets}
    return renamed(named, [
        (r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(.*)", block),
        (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
        (r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
        (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"),
    ])  # fmt: skip


def original_vae(vae):
    last = len(vae.config.block_out_channels) - 1
    state = {
        name: value[..., None, None] if ".attentions." in name and value.ndim == 2 else value
        for name, value in vae.state_dict().items()
    }
    return renamed(state, [
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"), ("group_norm", "norm"),
        (r"to_out\.0", "proj_out"), (r"to_([qkv])", r"\1"), ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ])  # fmt: skip


def original_clip(encoder):
    return {f"text_model.{name}": value for name, value in encoder.state_dict().items()}


def original_open_clip(encoder):
    state = {n.removeprefix("text_model."): v for n, v in encoder.state_dict().items()}
    joined = {}
    for name in [name for name in state if ".q_proj." in name]:
        whole = torch.cat([state.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"])
        joined[name.replace(".q_proj.", ".in_proj_")] = whole
    projection = state.pop("text_projection.weight").T
    return {"text_projection": projection} | renamed(state | joined, [
        (r"encoder\.layers\.", "transformer.resblocks."), ("layer_norm", "ln_"),
        (r"\.fc1\.", ".c_fc."), (r"\.fc2\.", ".c_proj."), (r"\.self_attn", ".attn"),
        ("final_ln_", "ln_final"), (r"embeddings\.token_embedding", "token_embedding"),
        (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    ])  # fmt: skip


def checkpoint(pipeline):
    """All parts of a pipeline under their original names."""
    parts = {
        "model.diffusion_model.": original_unet(pipeline.unet),
        "first_stage_model.": original_vae(pipeline.vae),
    }
    if isinstance(pipeline, StableDiffusionXLPipeline):
        parts["conditioner.embedders.0.transformer."] = original_clip(pipeline.text_encoder)
        parts["conditioner.embedders.1.model."] = original_open_clip(pipeline.text_encoder_2)
    else:
        parts["cond_stage_model.transformer."] = original_clip(pipeline.text_encoder)
    return {prefix + name: v.contiguous() for prefix, p in parts.items() for name, v in p.items()}


@pytest.fixture(params=["v1", "xl_base"])
def shared(request, tmp_path, monkeypatch):
    """A random pipeline, and it as a file; its configs stand for the shipped ones."""
    pipeline = random_pipeline() if request.param == "v1" else random_xl_pipeline(layers=10)
    pipeline.save_pretrained(tmp_path / "configs" / request.param)
    for weights in (tmp_path / "configs").rglob("*.safetensors"):
        weights.unlink()
    scheduler = tmp_path / "configs" / request.param / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("EulerDiscreteScheduler", "DDIMScheduler"))
    monkeypatch.setattr("pxpo.models.single_file.SINGLE_FILE", tmp_path / "configs")
    monkeypatch.setattr("pxpo.models.single_file.clip_tokenizer", lambda _: letters_tokenizer(12))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("the network was asked"))
    save_file(checkpoint(pipeline), tmp_path / "shared.safetensors")
    return pipeline, tmp_path / "shared.safetensors"


def picture(model):
    sampling = Sampling(steps=3, guidance_scale=2.5)
    return finish(rollout(model, ["a b"], [Noise(7)], sampling)).images


def test_a_file_is_the_same_model_as_its_folder(shared):
    pipeline, file = shared
    xl = isinstance(pipeline, StableDiffusionXLPipeline)
    family = StableDiffusionXL if xl else StableDiffusion
    model = load_model(file, device="cpu")
    assert type(model) is family and model.name == str(file)
    assert torch.equal(picture(model), picture(family(pipeline, "cpu", "folder")))
    half = load_model(file, device="cpu", dtype=torch.bfloat16, size=(24, None))
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    assert half.image_size == (24, 16)


def test_a_half_sized_file_with_what_nobody_reads_is_whole_on_the_cpu(shared):
    pipeline, file = shared
    tensors = {name: value.half() for name, value in checkpoint(pipeline).items()}
    place = ".transformer.text_model.embeddings."
    clip = next(name for name in tensors if place in name)
    ids = clip.split(place)[0] + place + "position_ids"
    save_file(tensors | {ids: torch.arange(12)[None], "model_ema.decay": torch.ones(1)}, file)
    model = load_model(file, device="cpu")
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    assert picture(model).isfinite().all()


def test_a_file_s_own_marks_tell_that_it_predicts_v(shared):
    pipeline, file = shared
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(checkpoint(pipeline) | marks, file)
    config = load_model(file, device="cpu").scheduler.config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr
    assert config.timestep_spacing == "trailing"


def test_the_card_s_code_reads_the_file(shared, tmp_path, monkeypatch):
    """diffusers fetches the configs for that: here they lie in a folder."""
    _, file = shared
    model = load_model(file, device="cpu")
    settings = settings_for("color", prompt="a b", steps=3, rank=2, images=2, shown=1)
    reward, run = RewardSpec("color"), finish(begin(model, settings))
    run, judge = finish(generate(model, run)), reward.make()
    run = finish(teach(model, run, reward, judge(run.trajectory.images), judge))
    lora, names = write_folder(run, tmp_path / "lora"), {}
    monkeypatch.setattr(
        "diffusers.loaders.single_file.fetch_diffusers_config",
        lambda _: {"pretrained_model_name_or_path": str(next((tmp_path / "configs").iterdir()))},
    )
    exec((lora / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    assert np.array_equal(np.asarray(names["picture"]), Image.open(lora / "after.png"))


def refused(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=f"other.safetensors'.*{words}"):
        load_model(tmp_path / "other.safetensors", device="cpu")


UNET = "model.diffusion_model."
REFINER = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
CROSS_ATTENTION = f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (REFINER, (1,), "'xl_refiner'.*whole checkpoint"),
        (f"{UNET}input_blocks.0.0.weight", (8, 9, 3, 3), "'inpainting'"),
        ("control_model.time_embed.0.weight", (1,), "'controlnet'"),
        (f"{UNET}double_blocks.0.img_attn.norm.key_norm.scale", (1,), "'flux-schnell'"),
        (CROSS_ATTENTION, (2, 1024), "2.x.*noise or v.*diffusers folder"),
        ("lora_unet_down_blocks_0.lora_down.weight", (1,), "is a LoRA and no model.*--lora"),
        ("down_blocks.0.resnets.0.conv1.weight", (1,), "has no UNet"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, name, shape, words):
    refused(tmp_path, {name: torch.zeros(shape)}, words)


def test_an_editing_file_is_refused_by_its_channels(shared, tmp_path):
    pipeline, _ = shared
    tensors = checkpoint(pipeline)
    tensors[f"{UNET}input_blocks.0.0.weight"] = torch.zeros(16, 8, 3, 3)
    xl = isinstance(pipeline, StableDiffusionXLPipeline)
    refused(tmp_path, tensors, "takes 8 channels.*editing" if xl else "'instruct-pix2pix'")


@pytest.mark.parametrize(
    ("prefix", "part"),
    [("first_stage_model.", "VAE"), ("cond_stage_model.", "text encoder"), (UNET, "UNet")],
)
def test_a_file_without_one_of_its_parts_is_refused(tmp_path, prefix, part):
    tensors = {n: v for n, v in checkpoint(random_pipeline()).items() if not n.startswith(prefix)}
    refused(tmp_path, tensors, f"has no {part}")


@pytest.mark.parametrize("name", ["model.ckpt", "pytorch_model.bin", "model.pt"])
def test_a_pickled_file_is_refused_for_that_reason(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=f"{name}' is not a .safetensors.*run any code"):
        load_model(tmp_path / name, device="cpu")


def test_a_broken_file_is_named_with_the_way_out(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(ModelError, match="broken.safetensors' cannot be loaded.*whole checkpoint"):
        load_model(tmp_path / "broken.safetensors", device="cpu")


def test_the_vocabulary_is_clip_s():
    tokens = clip_tokenizer("!")("a photo of a cat's café", padding="max_length").input_ids
    assert tokens[:10] == [49406, 320, 1125, 539, 320, 2368, 568, 15304, 49407, 0]
    assert len(tokens) == 77 and clip_tokenizer("<|endoftext|>").pad_token_id == 49407


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("v1", (859_520_964, 83_653_863, 123_060_480, 0)),
     ("xl_base", (2_567_463_684, 83_653_863, 123_060_480, 694_659_840))],
)  # fmt: skip
def test_the_shipped_configs_are_of_the_models_known_sizes(kind, sizes):
    def config(part):
        return json.loads((SINGLE_FILE / kind / part / "config.json").read_text())

    with torch.device("meta"):
        parts = [
            UNet2DConditionModel.from_config(config("unet")),
            AutoencoderKL.from_config(config("vae")),
            CLIPTextModel(CLIPTextConfig(**config("text_encoder"))),
        ]
        if kind == "xl_base":
            second = CLIPTextConfig(**config("text_encoder_2"))
            parts.append(CLIPTextModelWithProjection(second))
    counted = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counted == [size for size in sizes if size]
