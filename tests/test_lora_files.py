"""LoRA files of every kind paint what a stock pipeline paints with them, or are refused by name."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import prediction, random_lora, random_pipeline, same_weights, with_lora
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pxpo.errors import LoraError
from pxpo.lora import TARGETS, adapter, completed
from pxpo.lora_files import COMFYUI_FILE, FILE_NAME, PEFT_CONFIG, PEFT_FILE, load_lora, save_lora
from pxpo.models.stable_diffusion import StableDiffusion
from pxpo.progress import finish
from pxpo.rollout import Noise, rollout
from pxpo.run import begin
from pxpo.settings import Sampling, settings_for

SAMPLING = Sampling(steps=2, guidance_scale=2.0)


# Files: a state by PEFT's bare names, as "mid_block....to_q.lora_A.weight", in each format.


def state_of(lora):
    return {name.replace(".default", ""): w for name, w in lora.weights.items()}


def in_unet(state):
    return {f"unet.{name}": w for name, w in state.items()}


def diffusers(state):
    return in_unet(convert_state_dict_to_diffusers(state))


def bare_old(state):
    """Those of diffusers' attention processors, before it had PEFT."""
    new = {}
    for name, w in state.items():
        name = re.sub(r"(attn\d)", r"\1.processor", name).replace("to_out.0", "to_out")
        new[name.replace(".lora_A", "_lora.down").replace(".lora_B", "_lora.up")] = w
    return new


def old(state):
    return in_unet(bare_old(state))


def peft(state):
    return {f"base_model.model.{name}": w for name, w in state.items()}


def kohya(state, alphas=()):
    """alphas: by a part of a layer's name; a layer without one has its rank."""
    new = {}
    for name, w in state.items():
        layer, side = name.split(".lora_")
        layer = f"lora_unet_{layer.replace('.', '_')}"
        new[layer + (".lora_down.weight" if side[0] == "A" else ".lora_up.weight")] = w
        for part, alpha in dict(alphas).items():
            if part in name:
                new[f"{layer}.alpha"] = torch.tensor(alpha, dtype=w.dtype)
    return new


# Reading


def plain(model):
    return state_of(random_lora(model))


def half(model):
    return {name: w.half() for name, w in plain(model).items()}


def bfloat16(model):
    return {name: w.bfloat16() for name, w in plain(model).items()}


def some_layers(model):
    return {n: w for n, w in plain(model).items() if ".to_q." in n or ".to_v." in n}


def several_ranks(model):
    ranks = {"attn2.to_k": 5, "attn1.to_v": 1, "": 2}
    states = {part: state_of(random_lora(model, rank)) for part, rank in ranks.items()}
    return {n: states[next(part for part in ranks if part in n)][n] for n in states[""]}


RANKS = {"rank_pattern": {"attn2.to_k": 5, "attn1.to_v": 1}}
ALPHAS = {"alpha_pattern": {"attn2.to_k": 7.0, "transformer_blocks.0.attn1.to_q": 0.5}}


def one_alpha(state):
    return kohya(state, {"": 3.0})


def written(folder, state, config=None):
    """A folder with a file of this state, and with a LoraConfig where its kind keeps it."""
    config = config and {**LoraConfig(r=2, target_modules=TARGETS).to_dict(), **config}
    name, metadata = FILE_NAME, None
    if any(key.startswith("base_model") for key in state):
        name = PEFT_FILE
        (folder / PEFT_CONFIG).write_text(json.dumps(config, default=list))
    elif config:
        prefix = "unet." if any(key.startswith("unet.") for key in state) else ""
        config = {prefix + key: value for key, value in config.items()}
        metadata = {"lora_adapter_metadata": json.dumps(config, default=list)}
    save_file({key: w.clone() for key, w in state.items()}, folder / name, metadata)
    return folder


def stock(folder):
    """A stock pipeline with the LoRA in this folder, loaded by the library that made its kind."""
    pipeline = random_pipeline()
    if (folder / PEFT_FILE).exists():
        PeftModel.from_pretrained(pipeline.unet, folder)
    elif any(name.startswith(("unet.", "lora_unet_")) for name in load_file(folder / FILE_NAME)):
        pipeline.load_lora_weights(folder)
    else:
        pipeline.unet.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    return pipeline


def image(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a b",
        num_inference_steps=SAMPLING.steps,
        guidance_scale=SAMPLING.guidance_scale,
        eta=SAMPLING.eta,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def assert_same(model, lora, pipeline):
    """Each layer's change of W, and the prediction, are the pipeline's."""
    lora = completed(model, lora, 0)
    expected = {
        name: module.get_delta_weight(module.active_adapters[0])
        for name, module in pipeline.unet.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    for name, a in lora.weights.items():
        if ".lora_A." in name:
            delta = lora.alpha / lora.rank * lora.weights[name.replace("lora_A", "lora_B")] @ a
            layer = name.split(".lora_")[0]
            torch.testing.assert_close(delta, expected.pop(layer, torch.zeros_like(delta)))
    assert not expected
    theirs, ours = prediction(StableDiffusion(pipeline, "cpu", "stock")), with_lora(model, lora)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, prediction(model), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "state", "config"),
    [
        *((kind, state, None) for kind in (diffusers, in_unet, old, bare_old, kohya, one_alpha)
          for state in (plain, half, bfloat16, some_layers, several_ranks)),
        *((kind, state, {"lora_alpha": 5}) for kind in (diffusers, in_unet, bare_old, peft)
          for state in (plain, half, some_layers)),
        *((kind, several_ranks, {"lora_alpha": 3, **RANKS, **more}) for kind in (in_unet, peft)
          for more in ({}, ALPHAS, {"use_rslora": True}, {**ALPHAS, "use_rslora": True})),
        *((kind, plain, {"lora_alpha": 3, "use_rslora": True}) for kind in (diffusers, peft)),
        (peft, plain, {"lora_alpha": 8}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or ",".join(value or ()),
)  # fmt: skip
def test_a_file_paints_what_a_stock_pipeline_paints(model, tmp_path, kind, state, config):
    folder = written(tmp_path, kind(state(model)), config)
    assert_same(model, load_lora(folder), stock(folder))
    file = next(folder.glob("*.safetensors"))
    assert same_weights(load_lora(file), load_lora(folder))


def test_a_run_begins_with_the_picture_of_its_file(model, tmp_path):
    folder = written(tmp_path, one_alpha(some_layers(model)))
    sampling = {name: getattr(SAMPLING, name) for name in ("steps", "guidance_scale", "eta")}
    settings = settings_for("paint", prompt="a b", seed=0, shown=1, **sampling)
    run = finish(begin(model, settings, load_lora(folder)))
    ours = run.updates[0].shown.permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(ours, image(stock(folder)), atol=0.6 / 255, rtol=0)
    assert not torch.allclose(ours, image(random_pipeline()), atol=2 / 255)


def test_each_layer_has_the_alpha_beside_it(model, tmp_path):
    """Of kohya's files diffusers 0.42 does not take them; its other kinds do not have them."""
    state, alphas = several_ranks(model), {"to_q": 1.0, "attn2.to_k": 6.0}
    folded = {}
    for name, w in state.items():
        alpha = next((alpha for part, alpha in alphas.items() if part in name), None)
        scaled = alpha is not None and "lora_B" in name
        folded[name] = w * alpha / w.shape[1] if scaled else w
    pipeline = stock(written(tmp_path, diffusers(folded)))
    save_file(kohya(state, alphas), tmp_path / "kohya.safetensors")
    assert_same(model, load_lora(tmp_path / "kohya.safetensors"), pipeline)
    beside = {
        name.replace("lora_A.weight", "alpha"): torch.tensor(alpha)
        for name in in_unet(state)
        for part, alpha in alphas.items()
        if part in name and "lora_A" in name
    }
    save_file({**in_unet(state), **beside}, tmp_path / "beside.safetensors")
    assert_same(model, load_lora(tmp_path / "beside.safetensors"), pipeline)


def test_one_rank_and_one_alpha_stay_what_they_are(model, tmp_path):
    folder = written(tmp_path, kohya(plain(model), {"": 0.1}))
    lora = load_lora(folder)
    assert (lora.rank, lora.alpha) == (2, pytest.approx(0.1))
    assert same_weights(lora, random_lora(model))


@pytest.mark.parametrize(
    ("kohya_s", "ours"),
    [
        ("input_blocks_4_1", "down_blocks.1.attentions.0"),
        ("input_blocks_5_1", "down_blocks.1.attentions.1"),
        ("input_blocks_7_1", "down_blocks.2.attentions.0"),
        ("input_blocks_8_1", "down_blocks.2.attentions.1"),
        ("middle_block_1", "mid_block.attentions.0"),
        ("output_blocks_0_1", "up_blocks.0.attentions.0"),
        ("output_blocks_2_1", "up_blocks.0.attentions.2"),
        ("output_blocks_3_1", "up_blocks.1.attentions.0"),
        ("output_blocks_5_1", "up_blocks.1.attentions.2"),
        ("down_blocks_2_attentions_1", "down_blocks.2.attentions.1"),
    ],
)
@pytest.mark.parametrize("end", ["9.attn1.to_q", "0.attn2.to_out.0"])
def test_sdxl_s_layers_by_kohya_s_names(tmp_path, kohya_s, ours, end):
    layer = f"lora_unet_{kohya_s}_transformer_blocks_{end.replace('.', '_')}"
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    state = {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b,
             f"{layer}.alpha": torch.tensor(3.0)}  # fmt: skip
    lora = load_lora(written(tmp_path, state))
    name = f"{ours}.transformer_blocks.{end}"
    assert (lora.rank, lora.alpha) == (2, 3.0) and len(lora.weights) == 2
    assert torch.equal(lora.weights[f"{name}.lora_A.default.weight"], a)
    assert torch.equal(lora.weights[f"{name}.lora_B.default.weight"], b)


# What is refused

UNET = "unet.mid_block.attentions.0.transformer_blocks.0."
KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (UNET + "attn1.to_q.lora_magnitude_vector", "DoRA"),
        (KOHYA + "attn1_to_q.dora_scale", "DoRA"),
        (KOHYA + "attn1_to_q.hada_w1_a", "LoHa"),
        (KOHYA + "attn1_to_q.lokr_w1", "LoKr"),
        (KOHYA + "attn1_to_q.lora_mid.weight", "LoCon"),
        (KOHYA + "attn1_to_q.on_input", "IA3"),
        ("base_model.model.attn1.to_q.ia3_l", "IA3"),
        (KOHYA + "attn1_to_q.oft_blocks", "OFT"),
        ("base_model.model.attn1.to_q.oft_R.weight", "OFT"),
        (UNET + "attn1.to_q.lora_B.bias", "a bias"),
        (KOHYA + "ff_net_0_proj.lora_down.weight", "feed-forward"),
        (UNET + "ff.net.2.lora_A.weight", "feed-forward"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "projection into or out"),
        ("unet.mid_block.attentions.0.proj_out.lora_A.weight", "projection into or out"),
        ("unet.mid_block.resnets.0.conv1.lora_A.weight", "a convolution"),
        ("lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight", "a convolution"),
        ("lora_unet_time_embed_0.lora_down.weight", "not of the attention"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoder"),
        ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha", "text encoder"),
        ("text_encoder.layers.0.self_attn.to_q_lora.down.weight", "text encoder"),
        ("text_encoder_2.layers.0.self_attn.q_proj.lora_A.weight", "text encoder"),
    ],
)
def test_what_is_more_than_such_a_lora_is_refused_by_its_name(model, tmp_path, name, what):
    like = kohya if name.startswith("lora_") else peft if name.startswith("base") else diffusers
    folder = written(tmp_path, {**like(plain(model)), name: torch.ones(2, 2)}, {"lora_alpha": 2})
    refused(folder, what, name, str(folder))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
        ({"alpha_pattern": {"(a+)+": 1}}, "not the name of a layer"),
        ({"alpha_pattern": [1]}, "damaged"),
        ({"lora_alpha": "much"}, "damaged"),
        ({"lora_alpha": 10**400}, "damaged"),
        ({"lora_alpha": -1}, "positive number"),
    ],
)
@pytest.mark.parametrize("kind", [peft, in_unet])
def test_a_config_of_another_kind_is_refused(model, tmp_path, kind, config, words):
    refused(written(tmp_path, kind(plain(model)), config), words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, b: {"lora_A": a[0], "lora_B": b}, r"shape (6,); it must be a matrix"),
        (lambda a, b: {"lora_A": a[None], "lora_B": b}, r"shape (1, 2, 6); it must be a matrix"),
        (lambda a, b: {"lora_A": a * torch.nan, "lora_B": b}, "not finite"),
        (lambda a, b: {"lora_A": a, "lora_B": b / 0}, "not finite"),
        (lambda a, b: {"lora_A": a}, "without 'unet.to_q.lora_B.weight'"),
        (lambda a, b: {"lora_B": b}, "without 'unet.to_q.lora_A.weight'"),
        (lambda a, b: {"lora_A": a, "lora_B": b[:, :1]}, "A (2, 6) and B (4, 1)"),
        (lambda a, b: {"lora_A": a[:0], "lora_B": b[:, :0]}, "A (0, 6) and B (4, 0)"),
        (
            lambda a, b: {"lora_A": torch.ones(513, 6), "lora_B": torch.ones(4, 513)},
            "513; the most it can be is 512",
        ),
    ],
)
def test_a_matrix_that_cannot_be_is_named(tmp_path, change, words):
    pair = change(torch.ones(2, 6), torch.ones(4, 2)).items()
    refused(written(tmp_path, {f"unet.to_q.{side}.weight": w for side, w in pair}), words)


@pytest.mark.parametrize("alpha", [0.0, -1.0, torch.nan, torch.inf, (1.0, 2.0)])
def test_an_alpha_that_cannot_be_is_named(model, tmp_path, alpha):
    name = KOHYA + "attn1_to_q.alpha"
    folder = written(tmp_path, kohya(plain(model)) | {name: torch.tensor(alpha)})
    refused(folder, name, "positive number")


@pytest.mark.parametrize(
    ("layer", "sides", "words"),
    [
        ("lora_unet_attn1_to_q", ["alpha"], "not kohya's"),
        ("lora_unet_input_blocks_4_7_attn1_to_q", ["lora_up", "lora_down"], "not kohya's"),
        ("lora_unet_middle_block_x_attn1_to_q", ["lora_up", "lora_down"], "not kohya's"),
        ("unet.attn1.to_q", ["lora_up", "lora_down"], "not named as by"),
        ("unet.attn1.to_q", ["alpha"], "no LoRA in it"),
    ],
)
def test_names_of_no_kind_are_refused(tmp_path, layer, sides, words):
    names = [f"{layer}.{side}" + ".weight" * (side != "alpha") for side in sides]
    shapes = {name: (1,) if name.endswith("alpha") else (2, 2) for name in names}
    refused(written(tmp_path, {n: torch.ones(shape) for n, shape in shapes.items()}), words)


def test_two_kinds_in_one_file_are_refused(model, tmp_path):
    state = plain(model)
    refused(written(tmp_path, {**kohya(state), **diffusers(state)}), "not named as by")


@pytest.mark.parametrize("metadata", ["{", "[]", '"x"', "null"])
def test_metadata_that_is_damaged_is_refused(model, tmp_path, metadata):
    save_file(in_unet(plain(model)), tmp_path / FILE_NAME, {"lora_adapter_metadata": metadata})
    refused(tmp_path, "lora_adapter_metadata is damaged")


def test_a_file_of_peft_s_without_its_config_is_refused(model, tmp_path):
    written(tmp_path, peft(plain(model)))
    (tmp_path / PEFT_CONFIG).unlink()
    refused(tmp_path / PEFT_FILE, f"{PEFT_CONFIG} must lie beside it")


def test_a_file_without_any_matrix_is_refused(tmp_path):
    refused(written(tmp_path, {}), "there is no LoRA in it")


@pytest.mark.parametrize("kind", ["missing", "empty folder", "empty", "text file", "truncated"])
def test_what_cannot_be_read_is_named_with_the_way_out(model, tmp_path, kind):
    path = tmp_path / "lora.safetensors"
    if kind == "empty folder":
        path.mkdir()
    elif kind in ("empty", "text file"):
        path.write_text("not a LoRA" * (kind == "text file"))
    elif kind == "truncated":
        file = save_lora(random_lora(model), tmp_path)
        path.write_bytes(file.read_bytes()[:-100])
    refused(path, str(path), FILE_NAME)


def refused(path, *words):
    """In one line, and not as if it were made for another base model."""
    with pytest.raises(LoraError) as refusal:
        load_lora(path)
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and "another base" not in message


def test_a_lora_of_another_base_is_refused_with_its_shapes(model, tmp_path):
    state = {
        "mid_block.attentions.0.transformer_blocks.9.attn1.to_q.lora_A.weight": (2, 1280),
        "mid_block.attentions.0.transformer_blocks.9.attn1.to_q.lora_B.weight": (1280, 2),
    }
    lora = load_lora(written(tmp_path, {n: torch.ones(shape) for n, shape in state.items()}))
    with pytest.raises(LoraError, match=r"\(2, 1280\).*no such layer.*another base model"):
        completed(model, lora, 0)


# Writing


@pytest.mark.parametrize("alpha", [2.0, 5.0])
def test_saving_and_loading_is_exact(model, tmp_path, alpha):
    lora = replace(random_lora(model), alpha=alpha)
    file = save_lora(lora, tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / FILE_NAME
    for path in (file, file.parent, file.with_name(COMFYUI_FILE)):
        loaded = load_lora(path)
        assert (loaded.rank, loaded.alpha) == (lora.rank, lora.alpha)
        assert same_weights(loaded, lora)
        assert all(weight.dtype == torch.float32 for weight in loaded.weights.values())


def test_nothing_in_a_file_is_in_an_order_of_chance(model, tmp_path):
    with safe_open(save_lora(random_lora(model), tmp_path), "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert config["unet.target_modules"] == sorted(TARGETS)  # a set's order is each process's own


@pytest.mark.parametrize("alpha", [2.0, 5.0])
def test_a_stock_pipeline_gives_the_same_image_from_the_saved_lora(model, tmp_path, alpha):
    lora = replace(random_lora(model), alpha=alpha)
    save_lora(lora, tmp_path)
    with adapter(model, lora):
        ours = finish(rollout(model, ["a b"], [Noise(0)], SAMPLING)).images
    assert torch.equal(image(stock(tmp_path)), ours)
    assert not torch.allclose(image(random_pipeline()), ours, atol=1e-3)


def test_kohya_s_file_paints_the_same_and_lies_beside(model, tmp_path):
    lora = replace(random_lora(model), alpha=5.0)
    save_lora(lora, tmp_path / "both")
    file = tmp_path / "both" / COMFYUI_FILE
    pipeline = random_pipeline()
    pipeline.load_lora_weights(file)
    assert_same(model, lora, pipeline)
    state = load_file(file)
    assert state[KOHYA + "attn1_to_out_0.lora_up.weight"].shape == (32, 2)
    assert state[KOHYA + "attn1_to_out_0.alpha"] == 5
    file.write_text("damaged")  # of the two it is diffusers' that is read
    assert same_weights(load_lora(file.parent), lora)
    assert_same(model, lora, stock(file.parent))
