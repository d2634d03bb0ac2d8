import gc
import json
import shutil
import threading
import time
import weakref
from itertools import pairwise

import diffusers
import pytest
import torch
from conftest import random_lora, random_pipeline, random_vae
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.pipelines.pipeline_loading_utils import _get_ignore_patterns
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from pxpo.errors import ModelError, PxpoError, SettingError
from pxpo.lora import adapter
from pxpo.models import (
    DiffusionModel,
    StableDiffusion,
    best_dtype,
    leave_a_core,
    load_model,
    memory,
    unet,
)
from pxpo.models.memory import is_out_of_memory
from pxpo.progress import finish
from pxpo.rollout import Noise, rollout
from pxpo.settings import Sampling, Settings
from pxpo.update import accumulate_gradient


def wrapped(prediction_type: str = "epsilon") -> DiffusionModel:
    return StableDiffusion(random_pipeline(prediction_type), "cpu", "random")


def unet_output(model, x_t, t, cond):
    """What the UNet says about each image on its own."""
    each = zip(x_t.split(1), t, cond["text"].split(1), strict=True)
    return torch.cat([model.network(*one).sample for one in each])


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    return torch.randn((3, 4, 8, 8), generator=generator), torch.tensor([1, 500, 981])


def test_a_loaded_model_is_frozen_and_knows_its_sizes(model, model_folder):
    assert model.name == str(model_folder)
    assert model.latent_shape == (4, 8, 8)
    assert model.image_size == (16, 16)
    for part in (model.network, model.vae, model.text_encoder):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_non_square_sizes_are_height_then_width():
    pipeline = random_pipeline()
    pipeline.unet.register_to_config(sample_size=(6, 10))
    model = StableDiffusion(pipeline, "cpu", "wide")
    assert model.latent_shape == (4, 6, 10)
    assert model.image_size == (12, 20)


def test_each_prompt_is_encoded_once_where_the_text_encoder_stays(model, monkeypatch):
    encoded, real = [], model.text_encoder.forward
    monkeypatch.setattr(
        model.text_encoder,
        "forward",
        lambda ids, **how: encoded.append(len(ids)) or real(ids, **how),
    )
    both = model.encode(["a b", "c", "a b"])["text"]
    assert torch.equal(both[0], both[2]) and not torch.equal(both[0], both[1])
    assert torch.equal(model.encode(["c"])["text"][0], both[1])
    assert encoded == [1, 1] and both.device.type == "cpu"


def test_prompts_are_encoded_as_the_stock_pipeline_does():
    pipeline = random_pipeline()
    model = StableDiffusion(pipeline, "cpu", "random")
    cond = model.encode(["a b", ""])["text"]
    expected, unconditional = pipeline.encode_prompt(["a b"], "cpu", 1, True)
    assert cond.shape == (2, 12, 32)
    torch.testing.assert_close(cond, torch.cat([expected, unconditional]))
    assert not torch.allclose(cond[0], cond[1])


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 1.5, 7.5])
def test_guidance_leads_from_the_unconditional_prediction_past_the_conditional(
    prediction_type, guidance_scale, inputs
):
    model = wrapped(prediction_type)
    x_t, t = inputs
    cond, uncond = model.encode(["a", "b c", "z"]), model.encode([""])
    without = unet_output(model, x_t, t, model.encode([""] * 3))
    expected = without + guidance_scale * (unet_output(model, x_t, t, cond) - without)
    out = model.predict(x_t, t, cond, uncond, guidance_scale)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_guidance_without_an_unconditional_prompt_is_refused(model, inputs):
    x_t, t = inputs
    with pytest.raises(SettingError, match="guidance_scale is 2.0.*uncond"):
        model.predict(x_t, t, model.encode(["a"] * 3), guidance_scale=2.0)


def test_decode_equals_the_stock_decoder_and_stays_within_bounds():
    pipeline = random_pipeline()
    model = StableDiffusion(pipeline, "cpu", "random")
    latents = 5 * torch.randn((3, 4, 8, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    images = model.decode(latents)
    assert images.shape == (3, 3, 16, 12)
    assert (images.min(), images.max()) == (0, 1)
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    model._largest["decode"] = 2
    torch.testing.assert_close(model.decode(latents), images)


@pytest.fixture
def closed_model(tmp_path):
    pipeline = random_pipeline()
    vocabulary = pipeline.tokenizer.get_vocab() | {"ta": 900, "xi</w>": 901, "taxi</w>": 902}
    pipeline.tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=[("t", "a"), ("x", "i</w>"), ("ta", "xi</w>")],
        model_max_length=12,
        closed_vocabulary=["a", "lake", "taxi"],
    )
    pipeline.save_pretrained(tmp_path)
    return load_model(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("", []),
        ("taxi", []),
        ("a Taxi, TAXI! 42", ["42"]),
        ("lake 🏔, (taxi)", ["🏔"]),
        ("a tax on taxi", ["tax", "on"]),
        ("lake taxi Lake dog", ["dog"]),
        ("grün", ["grün"]),
        ("ß", ["ß"]),
    ],
)
def test_a_closed_vocabulary_names_the_words_it_never_learnt(closed_model, prompt, unknown):
    assert closed_model.unknown_words(prompt) == unknown


def test_an_open_vocabulary_knows_every_word(model):
    assert model.unknown_words("zebra crossing") == []


@pytest.mark.parametrize(
    ("largest", "count", "slices"),
    [
        (2, 5, [(0, 2), (2, 4), (4, 5)]),
        (9, 3, [(0, 3)]),
        (1, 2, [(0, 1), (1, 2)]),
        (3, 0, []),
    ],
)
def test_fold_covers_everything_once_in_order(model, largest, count, slices):
    model._largest["learn"] = largest
    seen = []
    done = list(model.fold("learn", count, seen.append))
    assert seen == [slice(*one) for one in slices]
    assert done == [(one, None) for one in seen]


@pytest.mark.parametrize(
    ("workers", "largest", "count", "edges"),
    [
        (2, 8, 4, [0, 2, 4]),
        (2, 4, 10, [0, 2, 4, 6, 8, 9, 10]),  # no more than the largest at a time, in all
        (4, 8, 3, [0, 1, 2, 3]),
        (3, 7, 7, [0, 2, 4, 7]),
        (2, 8, 1, [0, 1]),
    ],
)
def test_fold_divides_a_chunk_among_the_workers_and_keeps_the_order(
    model, workers, largest, count, edges
):
    model.workers, model._largest["sample"] = workers, largest
    at_once = threading.Barrier(min(workers, largest, count), timeout=20)

    def work(part):
        if part.start < min(largest, count):
            at_once.wait()  # all of the first chunk are under way together
        return part.stop * 10, threading.get_ident()

    found = list(model.fold("sample", count, work))
    assert [part for part, _ in found] == [slice(*both) for both in pairwise(edges)]
    assert [value for _, (value, _) in found] == [edge * 10 for edge in edges[1:]]
    assert len({ident for _, (_, ident) in found}) <= workers


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("there", [1, 5])
def test_workers_have_a_thread_each_and_the_callers_gradient_mode(model, learning, there):
    def seen() -> tuple[bool, int]:
        return torch.is_grad_enabled(), torch.get_num_threads()

    model.workers, before = 2, torch.get_num_threads()
    torch.set_num_threads(there)
    try:
        with torch.set_grad_enabled(learning):
            found = list(
                model.fold(
                    "sample", 2, lambda _: (torch.is_grad_enabled(), torch.get_num_threads())
                )
            )
        assert [value for _, value in found] == [(learning, 1)] * 2
        assert torch.get_num_threads() == there
    finally:
        torch.set_num_threads(before)


def test_a_large_network_shares_each_operation_among_the_cores_instead(monkeypatch):
    monkeypatch.setattr(memory, "CORES", 4)
    size = random_pipeline().unet.num_parameters()
    for large, workers in ((size, 1), (size + 1, 4)):
        monkeypatch.setattr(unet, "LARGE", large)
        assert wrapped().workers == workers


def test_nothing_is_under_way_any_more_when_a_part_fails(model):
    model.workers, ended = 2, []

    def work(part):
        if part.start == 0:
            raise RuntimeError("shapes cannot be multiplied")
        time.sleep(0.2)
        ended.append(part)

    with pytest.raises(RuntimeError, match="multiplied"):
        list(model.fold("sample", 2, work))
    assert ended == [slice(1, 2)]


def test_nor_when_ctrl_c_is_pressed_meanwhile(model, monkeypatch):
    model.workers, ended = 2, []

    def work(part):
        time.sleep(0.2)
        ended.append(part)

    def pressed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(memory.Future, "result", pressed)
    with pytest.raises(KeyboardInterrupt):
        list(model.fold("sample", 2, work))
    assert len(ended) == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_what_did_not_fit_is_let_go_of_before_the_next_try(workers):
    class Held:
        """In a tensor's place."""

    folding, held, alive = memory.Folding("cpu"), weakref.WeakSet(), []
    folding.workers, folding._largest["sample"] = workers, 4
    together = {size: threading.Barrier(min(size, workers), timeout=20) for size in (4, 2, 1)}

    def work(_):
        alive.append(len(held))
        together[folding._largest["sample"]].wait()
        here = Held()
        held.add(here)
        raise torch.OutOfMemoryError("CUDA out of memory")

    gc.disable()  # it would come at some time
    try:
        with pytest.raises(PxpoError, match="Out of memory"):
            list(folding.fold("sample", 4, work))
    finally:
        gc.enable()
    assert alive == [0] * sum(min(size, workers) for size in together)


def test_a_chunk_that_does_not_fit_is_halved_among_the_workers_too(model):
    model.workers, model._largest["sample"] = 2, 8

    def work(part):
        if part.stop - part.start > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert stops(model.fold("sample", 5, work)) == [1, 2, 3, 4, 5]
    assert model._largest["sample"] == 2


def test_many_workers_find_what_one_does(model):
    lora, pictures = random_lora(model), torch.rand(3, 3, *model.image_size)
    settings = Settings(steps=3, guidance_scale=2.0, images=3, hold=0.5, timesteps=1.0)
    found = []
    for model.workers in (1, 2, 3):
        with adapter(model, lora) as parameters:
            trajectory = finish(rollout(model, ["a"] * 3, [Noise(n) for n in range(3)], settings))
            credit = trajectory.images.mean((1, 2, 3)).view(-1, 1, 1).expand(3, *trajectory.size)
            norm = finish(
                accumulate_gradient(model, parameters, trajectory, credit - 0.5, settings)
            )
            gradients = [parameter.grad.clone() for parameter in parameters.values()]
            features = model.features(pictures)
        found.append([trajectory.latents, trajectory.images, features, *gradients,
                      torch.tensor([norm.norm, norm.kl])])  # fmt: skip
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def stops(found) -> list[int]:
    """The ends of what fold yields."""
    return [part.stop for part, _ in found]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_fold_halves_what_does_not_fit_and_remembers(model, error):
    model._largest = {"sample": 64, "learn": 8, "decode": 16}
    done = []

    def work(part):
        if part.stop - part.start > 3:
            raise error
        done.extend(range(part.start, part.stop))

    assert stops(model.fold("learn", 11, work)) == [2, 4, 6, 8, 10, 11]
    assert done == list(range(11))
    assert model._largest == {"sample": 64, "learn": 2, "decode": 16}


def test_fold_gives_up_when_a_single_one_does_not_fit(model):
    def work(part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(PxpoError, match="memory on cpu.*single image"):
        list(model.fold("learn", 8, work))


def test_fold_measures_one_on_a_gpu_and_goes_on_with_as_many_as_fit(model, monkeypatch):
    model._unmeasured = {"learn"}
    monkeypatch.setattr(memory, "start_measuring", lambda device: 7)
    monkeypatch.setattr(memory, "fitting", lambda device, used: {7: 4}[used])
    assert stops(model.fold("learn", 10, lambda part: None)) == [1, 5, 9, 10]
    assert stops(model.fold("learn", 10, lambda part: None)) == [4, 8, 10]  # it stays measured
    assert stops(model.fold("decode", 10, lambda part: None)) == [10]


@pytest.mark.parametrize(
    "gigabytes, fit",
    [
        ({"used": 4, "peak": 6, "reserved": 5, "idle": 15}, 6),  # (15 + 1 - 1) * 0.85 / 2
        ({"used": 4, "peak": 6, "reserved": 4, "idle": 0.5}, 1),  # one fitted, so one does
    ],
)
def test_what_fits_leaves_room_for_others(monkeypatch, gigabytes, fit):
    numbers = {name: int(value * 2**30) for name, value in gigabytes.items()}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: numbers["peak"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: numbers["used"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: numbers["reserved"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (numbers["idle"], 24 * 2**30))
    assert memory.fitting(torch.device("cuda"), numbers["used"]) == fit


def test_where_a_single_one_does_not_fit_the_model_is_asked_for_a_way_that_needs_less(model):
    done = []

    def work(part):
        if not model.network.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append(part)

    model._largest["learn"] = 2
    assert stops(model.fold("learn", 3, work)) == [3]  # the smaller sizes were of the other way
    assert done == [slice(0, 3)]
    assert not model.relieve("learn") and not model.relieve("sample")  # there is no other way
    assert not model.relieve("decode")  # the picture is smaller than a tile may be


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 128), (112, 176), (128, 40)])
@pytest.mark.parametrize("kind", ["decode", "features"])
def test_pictures_of_the_vae_s_own_size_are_made_and_read_in_ever_smaller_tiles(kind, size):
    pipeline, sides = random_pipeline(), []
    pipeline.vae = random_vae(sample_size=max(size))
    model = StableDiffusion(pipeline, "cpu", "random", size)
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    for part, pixels in ((model.vae.decoder, 1), (model.vae.encoder, 2)):
        part.register_forward_pre_hook(
            lambda _, inputs, pixels=pixels: sides.append(max(inputs[0].shape[2:]) // pixels)
        )

    def made() -> torch.Tensor:
        return model.decode(latents) if kind == "decode" else model.features(pictures(2, *size))

    whole, largest = made(), max(model.latent_shape)
    assert sides == [largest]
    while model.relieve(kind):
        sides.clear()
        change = made() - whole
        assert len(sides) > 1 and unet.SMALLEST_TILE <= max(sides) <= 0.6 * largest
        assert 0 < change.square().mean().sqrt() < 0.2 * whole.std()
        largest = max(sides)
    assert largest < 2 * unet.SMALLEST_TILE  # half of it would have been too small


def test_learning_with_less_memory_gives_the_same_gradient(model):
    x_t, t, cond = torch.randn(2, *model.latent_shape), torch.tensor([500, 20]), model.encode(["a"])
    cond = {name: value.expand(2, -1, -1) for name, value in cond.items()}
    gradients, kept = [], []

    def count(tensor):
        kept.append(tensor.numel())
        return tensor

    with adapter(model, random_lora(model)) as parameters:
        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                out = model.predict(x_t, t, cond)
            kept.append(-1)
            gradients.append(torch.autograd.grad(out.square().sum(), list(parameters.values())))
            model.relieve("learn")
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
    one, other = kept.index(-1), len(kept) - 1 - kept[::-1].index(-1)
    assert sum(kept[one + 1 : other]) < sum(kept[:one])


def test_fold_lets_other_errors_through(model):
    def work(part):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        list(model.fold("learn", 8, work))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_a_missing_folder_is_named_with_the_way_out(tmp_path):
    with pytest.raises(ModelError) as refused:
        load_model(tmp_path / "nowhere", device="cpu")
    assert str(tmp_path / "nowhere") in str(refused.value)
    assert "check the name" in str(refused.value)


def test_a_folder_that_is_no_pipeline_is_named_with_the_way_out(tmp_path):
    (tmp_path / "notes.txt").write_text("no model here")
    with pytest.raises(ModelError) as refused:
        load_model(tmp_path, device="cpu")
    assert repr(str(tmp_path)) in str(refused.value)
    assert "must be a diffusers folder" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 9}, "takes 9 channels and gives 4.*inpainting"),
        ({"in_channels": 8}, "takes 8 channels and gives 4.*InstructPix2Pix"),
        ({"addition_embed_type": "text_time"}, "wants pooled.*SDXL.*addition_embed_type"),
        ({"class_embed_type": "projection"}, "class embeddings.*class_embed_type"),
        ({"num_class_embeds": 10}, "class embeddings.*num_class_embeds"),
        ({"time_cond_proj_dim": 256}, "LCM.*time_cond_proj_dim"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "image embeddings.*encoder_hid_dim_type"),
        ({"sample_size": None}, "sample_size.*unet/config.json"),
    ],
)
def test_a_unet_of_another_kind_is_refused_by_name(changes, words):
    pipeline = random_pipeline()
    pipeline.unet.register_to_config(**changes)
    with pytest.raises(ModelError, match=f"'other'.*{words}"):
        StableDiffusion(pipeline, "cpu", "other")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prediction_type": "sample"}, "predicts 'sample'; only epsilon and v_prediction"),
        ({"clip_sample": True}, "clip_sample.*scheduler_config.json"),
        ({"thresholding": True}, "thresholding.*scheduler_config.json"),
        ({"rescale_betas_zero_snr": True}, "zero signal.*rescale_betas_zero_snr"),
    ],
)
def test_a_scheduler_whose_step_is_not_affine_is_refused_by_name(changes, words):
    pipeline = random_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **changes)
    with pytest.raises(ModelError, match=f"'other'.*{words}"):
        StableDiffusion(pipeline, "cpu", "other")


def test_a_scheduler_without_betas_is_refused_by_name():
    pipeline = random_pipeline()
    pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(ModelError, match="'other' is EDMEulerScheduler.*betas"):
        StableDiffusion(pipeline, "cpu", "other")


def test_a_tokenizer_without_an_end_is_refused_by_name():
    pipeline = random_pipeline()
    pipeline.tokenizer.model_max_length = int(1e30)
    with pytest.raises(ModelError, match="'other'.*model_max_length.*77"):
        StableDiffusion(pipeline, "cpu", "other")


@pytest.mark.parametrize(
    "kind",
    [
        "StableDiffusionXLImg2ImgPipeline",  # SDXL's refiner
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
        "StableDiffusionControlNetPipeline",
        "LatentConsistencyModelPipeline",
        "FluxPipeline",
        "DDPMPipeline",
    ],
)
def test_a_pipeline_of_another_family_is_refused_by_name(model_folder, tmp_path, kind):
    shutil.copytree(model_folder, tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": kind}))
    with pytest.raises(ModelError, match=f"other' is a {kind}; .*StableDiffusionPipeline"):
        load_model(tmp_path / "other", device="cpu")


@pytest.mark.parametrize("kind", ["ControlNetModel", "UNet2DConditionModel"])
def test_a_part_of_a_pipeline_is_refused_by_name(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ModelError, match=f"is a {kind}.*a whole one.*model_index.json"):
        load_model(tmp_path, device="cpu")


def test_an_older_folder_is_loaded(model_folder, tmp_path, inputs):
    """As written years ago: parts that are missing or null, and no word of what was added since."""
    shutil.copytree(model_folder, tmp_path / "old")
    index = tmp_path / "old" / "model_index.json"
    parts = json.loads(index.read_text())
    for name in (
        "image_encoder",
        "requires_safety_checker",
        "safety_checker",
        "_diffusers_version",
    ):
        parts.pop(name, None)
    parts |= {"feature_extractor": [None, None], "scheduler": ["diffusers", "PNDMScheduler"]}
    index.write_text(json.dumps(parts))
    (tmp_path / "old" / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({
            "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
            "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        })
    )  # fmt: skip
    config = tmp_path / "old" / "unet" / "config.json"
    known = json.loads(config.read_text())
    for name in ("in_channels", "out_channels", "addition_embed_type", "time_cond_proj_dim"):
        del known[name]
    config.write_text(json.dumps(known))
    old, new = (load_model(folder, device="cpu") for folder in (tmp_path / "old", model_folder))
    x_t, t = inputs
    with torch.no_grad():
        assert torch.equal(*(one.predict(x_t, t, one.encode(["a"] * 3)) for one in (old, new)))
    for name, numbers in vars(new.steps(Sampling(steps=7))).items():
        assert torch.equal(vars(old.steps(Sampling(steps=7)))[name], numbers)


def test_it_is_refused_before_its_weights_are_read(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "other")
    config = tmp_path / "other" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "time_cond_proj_dim": 256}))
    for weights in (tmp_path / "other").rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ModelError, match="time_cond_proj_dim"):
        load_model(tmp_path / "other", device="cpu")


def test_an_inpainting_folder_is_refused_when_loaded(tmp_path):
    pipeline = random_pipeline()
    pipeline.unet = type(pipeline.unet).from_config({**pipeline.unet.config, "in_channels": 9})
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="takes 9 channels"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler])
def test_a_scheduler_that_knows_no_clipping_is_not_taken_for_one_that_clips(kind):
    pipeline = random_pipeline()
    pipeline.scheduler = kind(beta_schedule="scaled_linear")
    assert not StableDiffusion(pipeline, "cpu", "unclipped").scheduler.config.clip_sample
    pipeline.scheduler = DDIMScheduler()  # clips unless told otherwise
    with pytest.raises(ModelError, match="'clipped' clips samples"):
        StableDiffusion(pipeline, "cpu", "clipped")


@pytest.fixture(scope="module")
def any_pipeline():
    return random_pipeline()


@pytest.mark.parametrize(
    "kind",
    ["DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "KDPM2Discrete",
     "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"],
)  # fmt: skip
@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"steps_offset": 1},
        {"beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.001] * 1000},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ],
    ids=["plain", "offset", "Stable Diffusion's", "cosine", "betas", "zero SNR"],
)
def test_the_steps_are_those_that_stock_ddim_takes_from_any_scheduler(
    any_pipeline, tmp_path, kind, spacing, more
):
    """Read from a file, which leaves out what the scheduler has by default."""
    config = {"_class_name": f"{kind}Scheduler", "beta_start": 0.00085, "beta_end": 0.012, **more}
    config |= {"clip_sample": False} if kind == "DDPM" else {}
    config |= {"timestep_spacing": spacing} if spacing else {}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    own = getattr(diffusers, f"{kind}Scheduler").from_pretrained(tmp_path)
    any_pipeline.scheduler = own
    model = StableDiffusion(any_pipeline, "cpu", "random")
    stock = DDIMScheduler.from_config(own.config, clip_sample=False)
    x_t, out, z = torch.randn((3, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    for count in (3, 50):
        sampling = Sampling(steps=count, eta=0.7)
        steps = model.steps(sampling)
        stock.set_timesteps(count)
        assert torch.equal(steps.t, stock.timesteps.long())
        for at in (steps[index] for index in (0, 1, count - 2, count - 1)):
            if at.p == 0:  # where stock DDIM takes the root of a rounding error
                continue
            wanted = stock.step(out, at.t, x_t, eta=0.7, variance_noise=z).prev_sample
            assert torch.equal(model.take_step(at, x_t, out, z, sampling)[0], wanted)
            torch.testing.assert_close(
                at.mean(x_t, out) + at.sigma * z, wanted, atol=1e-4, rtol=1e-4
            )


def test_half_precision_takes_the_half_sized_files(tmp_path):
    random_pipeline().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    model = load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    whole = load_model(tmp_path, device="cpu")  # there are no other files
    assert {p.dtype for p in whole.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_are_pickled_are_refused_for_that_reason(model_folder, tmp_path, part):
    shutil.copytree(model_folder, tmp_path / "other")
    weights = next((tmp_path / "other" / part).glob("*.safetensors"))
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ModelError, match="other'.*only as .bin files.*run any code.*save_pretrain"):
        load_model(tmp_path / "other", device="cpu")


def test_so_they_are_on_the_hub(monkeypatch):
    """By the words in which diffusers says so when it lists a repository's files."""

    def files(name):
        listed = ["unet/diffusion_pytorch_model.bin"]
        _get_ignore_patterns({}, ["unet"], listed, True, False, False, False, False)

    monkeypatch.setattr("pxpo.models.pipeline_kind", files)
    with pytest.raises(ModelError, match="'ada/model'.*only as .bin files"):
        load_model("ada/model", device="cpu")


def test_a_gpu_works_in_the_half_precision_that_rounds_least():
    assert best_dtype("cuda") == best_dtype("cuda:1") == torch.float16
    assert best_dtype("cpu") == best_dtype("mps") == torch.float32


def test_a_loaded_model_takes_the_precision_of_its_device(model_folder):
    assert {p.dtype for p in load_model(model_folder).network.parameters()} == {
        best_dtype("cuda" if torch.cuda.is_available() else "cpu")
    }


def test_what_settings_leave_open_is_the_model_s_own(model, closed_model):
    """Stable Diffusion's sampling; and Tiny World's, of a model that knows few words."""
    assert dict(model.defaults) == {"steps": 50, "guidance_scale": 7.5, "images": 4}
    assert dict(closed_model.defaults) == {"steps": 20, "guidance_scale": 3.0, "images": 4}
    for one, steps, guidance_scale in ((model, 50, 7.5), (closed_model, 20, 3.0)):
        left_open = Settings(prompt="a lake", rank=3)
        filled = one.filled(left_open)
        changes = {"steps": steps, "guidance_scale": guidance_scale, "images": 4}
        assert filled.as_dict() == left_open.as_dict() | changes
        assert one.filled(filled) == filled


def test_what_settings_say_stays_as_they_say(model):
    said = Settings(steps=3, guidance_scale=1.0, images=2)
    assert model.filled(said) == said
    part = model.filled(Settings(steps=3))
    assert (part.steps, part.guidance_scale, part.images) == (3, 7.5, 4)


def test_sampling_alone_is_filled_with_what_is_sampling(model):
    assert model.filled(Sampling(steps=3)) == Sampling(steps=3, guidance_scale=7.5)
    assert model.filled(Sampling()) == Sampling(steps=50, guidance_scale=7.5)


def pictures(count: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand((count, 3, height, width), generator=torch.Generator().manual_seed(5))


def test_features_say_something_of_each_latent_pixel(model):
    features = model.features(pictures())
    assert features.shape == (3, 16, 8, 8)  # as wide as the UNet's last block
    assert features.dtype == torch.float32 and features.device.type == "cpu"
    assert not features.requires_grad and features.isfinite().all()
    assert not torch.allclose(features[0], features[1], atol=1e-3)


@torch.no_grad()
def test_features_are_the_last_up_block_s_of_the_lightly_noised_picture():
    pipeline = random_pipeline()
    model = StableDiffusion(pipeline, "cpu", "random")
    images = pictures(2)
    tokens = pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    text = pipeline.text_encoder(tokens).last_hidden_state.expand(2, -1, -1)
    mean, _ = pipeline.vae.quant_conv(pipeline.vae.encoder(2 * images - 1)).chunk(2, dim=1)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([100, 100])
    x_t = pipeline.scheduler.add_noise(
        mean * pipeline.vae.config.scaling_factor, noise.expand(2, -1, -1, -1), t
    )
    last = pipeline.unet.up_blocks[-1]
    heard = []
    hook = last.register_forward_hook(lambda _, __, out: heard.append(out))
    pipeline.unet(x_t, t, text)
    hook.remove()
    torch.testing.assert_close(model.features(images), heard[0], rtol=1e-4, atol=1e-5)
    assert not last._forward_hooks


def test_features_are_those_of_each_picture_alone(model):
    images = pictures(5)
    together = model.features(images)
    for index in range(5):
        alone = model.features(images[index : index + 1])[0]
        torch.testing.assert_close(alone, together[index], rtol=1e-4, atol=1e-5)
    turned = model.features(images.flip(0))
    torch.testing.assert_close(turned, together.flip(0), rtol=1e-4, atol=1e-5)


def test_features_are_the_same_each_time_whatever_else_is_drawn(model):
    torch.manual_seed(1)
    first = model.features(pictures())
    torch.manual_seed(2)
    assert torch.equal(model.features(pictures()), first)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model.features(pictures())
    assert torch.equal(torch.rand(1), expected)  # nor do they draw from what others draw from


def test_features_leave_a_lora_out_also_while_it_is_at_work(model):
    images, never = pictures(), model.features(pictures())
    x_t, t = torch.zeros(1, *model.latent_shape), torch.tensor([500])
    with adapter(model, random_lora(model)), torch.no_grad():
        with_lora = model.predict(x_t, t, model.encode(["a"]))
        assert torch.equal(model.features(images), never)
        assert torch.equal(model.predict(x_t, t, model.encode(["a"])), with_lora)  # back at work
    assert torch.equal(model.features(images), never)


@pytest.mark.parametrize("fails", ["vae", "network"])
def test_features_that_run_out_of_memory_are_made_in_smaller_parts(model, monkeypatch, fails):
    images = pictures(7)
    expected = model.features(images)
    sizes = []
    part = model.vae if fails == "vae" else model.network
    name = "encode" if fails == "vae" else "forward"
    work = getattr(part, name)

    def work_or_fail(values, *rest, **options):
        if len(values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(values))
        return work(values, *rest, **options)

    monkeypatch.setattr(part, name, work_or_fail)
    found = model.features(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sum(sizes) == 7 and max(sizes) <= 2
    assert not model.network.up_blocks[-1]._forward_hooks


def test_features_that_run_out_of_memory_behind_the_block_count_each_picture_once(
    model, monkeypatch
):
    """The last block has been heard by then, and is heard again at the second try."""
    images = pictures(7)
    expected = model.features(images)
    work = model.network.conv_out.forward

    def work_or_fail(values):
        if len(values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(values)

    monkeypatch.setattr(model.network.conv_out, "forward", work_or_fail)
    found = model.features(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_features_that_fail_leave_no_ear_behind(model, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("something else")

    with monkeypatch.context() as broken:
        broken.setattr(model.vae, "encode", fail)
        with pytest.raises(RuntimeError, match="something else"):
            model.features(pictures())
    assert not model.network.up_blocks[-1]._forward_hooks
    assert model.features(pictures()).shape[0] == 3


def test_features_of_a_wide_picture_are_rows_then_columns():
    pipeline = random_pipeline()
    pipeline.unet.register_to_config(sample_size=(6, 10))
    model = StableDiffusion(pipeline, "cpu", "wide")
    assert model.features(pictures(2, 12, 20)).shape == (2, 16, 6, 10)


@pytest.mark.parametrize(
    "there, asked, taken", [(4, None, 3), (1, None, 1), (4, "4", 4)], ids=["shared", "one", "asked"]
)
def test_a_core_is_left_to_others_unless_told_otherwise(monkeypatch, there, asked, taken):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    torch.set_num_threads(there)
    try:
        leave_a_core()
        assert torch.get_num_threads() == taken
    finally:
        torch.set_num_threads(before)
