from itertools import combinations

import pytest
import torch
from conftest import random_lora, random_pipeline
from diffusers import DDIMScheduler

from pxpo.errors import SettingError
from pxpo.lora import adapter
from pxpo.models import StableDiffusion
from pxpo.progress import finish
from pxpo.rollout import Noise, Trajectory, derived_seed, joined, rollout
from pxpo.settings import Sampling

SAMPLING = Sampling(steps=3, guidance_scale=2.5)


def drawn(seed: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((1, 4, 8, 8), generator=generator)[0] for _ in range(count)]


def test_noise_is_the_start_then_the_steps_of_one_generator():
    assert torch.equal(Noise(5).draw((4, 8, 8), 3), torch.stack(drawn(5, 4)))


def test_noise_with_seeded_steps_shares_only_the_start():
    plain, seeded, other = Noise(5), Noise(5, 6), Noise(5, 7)
    first, *rest = (noise.draw((4, 8, 8), 2) for noise in (plain, seeded, other))
    assert torch.equal(rest[0], torch.stack([drawn(5, 1)[0], *drawn(6, 2)]))
    for one, two in combinations([first, *rest], 2):
        assert torch.equal(one[0], two[0])
        assert not (one[1:] == two[1:]).any()


def test_noise_with_the_same_steps_shares_only_the_steps():
    one, two = Noise(0, 9).draw((4, 8, 8), 2), Noise(1, 9).draw((4, 8, 8), 2)
    assert not (one[0] == two[0]).any()
    assert torch.equal(one[1:], two[1:])


def test_seed_zero_is_a_seed_like_any_other():
    for noise in (Noise(0), Noise(0, 0), Noise(3, 0)):
        torch.manual_seed(1)
        first = noise.draw((4, 8, 8), 2)
        torch.manual_seed(2)
        assert torch.equal(noise.draw((4, 8, 8), 2), first)
    assert torch.equal(Noise(0).draw((4, 8, 8), 0)[0], drawn(0, 1)[0])
    assert torch.equal(Noise(3, 0).draw((4, 8, 8), 1)[1], drawn(0, 1)[0])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_rollout_equals_the_stock_pipeline(steps, guidance_scale, prediction_type):
    pipeline = random_pipeline(prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    model = StableDiffusion(pipeline, "cpu", "random")
    sampling = Sampling(steps=steps, guidance_scale=guidance_scale)
    prompts, seeds = ["a b", "z"], [0, 7]
    trajectory = finish(rollout(model, prompts, [Noise(seed) for seed in seeds], sampling))
    options = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "eta": sampling.eta,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }
    stock = pipeline(prompts, output_type="pt", **options).images
    assert torch.equal(trajectory.images, stock)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_zero_terminal_snr_is_sampled_where_v_is_predicted(eta):
    """At eta = 1 the stock pipeline's pictures are NaN there."""
    pipeline = random_pipeline("v_prediction")
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **changes)
    pipeline.set_progress_bar_config(disable=True)
    model = StableDiffusion(pipeline, "cpu", "random")
    sampling = Sampling(steps=3, guidance_scale=1.0, eta=eta)
    trajectory = finish(rollout(model, ["a b"], [Noise(0)], sampling))
    assert trajectory.steps.p[0] == 0 and trajectory.images.isfinite().all()
    if eta < 1:
        stock = pipeline(
            "a b", num_inference_steps=3, guidance_scale=1.0, eta=eta, output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        torch.testing.assert_close(trajectory.images, stock)


def test_an_image_does_not_depend_on_its_batch(model):
    prompts, noise = ["a", "b c", "z"], [Noise(0), Noise(1, 5), Noise(2)]
    together = finish(rollout(model, prompts, noise, SAMPLING))
    for index in range(3):
        alone = finish(rollout(model, [prompts[index]], [noise[index]], SAMPLING))
        torch.testing.assert_close(alone.latents[:, 0], together.latents[:, index])
        torch.testing.assert_close(alone.images[0], together.images[index])
        assert torch.equal(alone.noise[:, 0], together.noise[:, index])
    model._largest.update(sample=2, decode=1)
    in_parts = finish(rollout(model, prompts, noise, SAMPLING))
    torch.testing.assert_close(in_parts.images, together.images)


def test_prompt_and_noise_both_matter(model):
    prompts, noise = ["a", "a", "b"], [Noise(0), Noise(1), Noise(0)]
    images = finish(rollout(model, prompts, noise, SAMPLING)).images
    for one, other in combinations(images, 2):
        assert not torch.allclose(one, other, atol=1e-3)


def test_a_trajectory_is_what_learning_replays(model):
    noise = [Noise(0), Noise(1, 5)]
    trajectory = finish(rollout(model, ["a", "b c"], noise, SAMPLING))
    assert trajectory.latents.shape == (4, 2, 4, 8, 8)
    assert trajectory.noise.shape == (3, 2, 4, 8, 8)
    assert trajectory.images.shape == (2, 3, 16, 16)
    assert trajectory.outputs.shape == (3, 2, 4, 8, 8)
    assert {name: value.shape for name, value in trajectory.cond.items()} == {"text": (2, 12, 32)}
    assert trajectory.uncond["text"].shape == (1, 12, 32)
    for image, one in enumerate(noise):
        x_T, *z = one.draw((4, 8, 8), 3)
        assert torch.equal(trajectory.latents[0, image], x_T)
        assert torch.equal(trajectory.noise[:, image], torch.stack(z))
    with torch.no_grad():
        for index in range(3):
            at, x_t = trajectory.steps[index], trajectory.latents[index]
            out = model.predict(
                x_t, at.t.expand(2), trajectory.cond, trajectory.uncond, trajectory.guidance_scale
            )
            torch.testing.assert_close(out, trajectory.outputs[index])
            x_prev = at.mean(x_t, out) + at.sigma * trajectory.noise[index]
            torch.testing.assert_close(x_prev, trajectory.latents[index + 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(trajectory.latents[-1]), trajectory.images)


def test_progress_is_one_event_a_step_with_the_expected_image(model):
    events = list(rollout(model, ["a"], [Noise(0)], SAMPLING))
    assert [(event.done, event.total) for event in events] == [(1, 3), (2, 3), (3, 3)]
    assert {event.phase for event in events} == {"denoising"}
    trajectory = finish(rollout(model, ["a"], [Noise(0)], SAMPLING))
    for index, event in enumerate(events):
        at, x_t = trajectory.steps[index], trajectory.latents[index]
        image = at.expected_image(x_t, trajectory.outputs[index])
        torch.testing.assert_close(event.latents, image, rtol=1e-4, atol=1e-4)


def test_closing_midway_inside_an_adapter_restores_the_model(model):
    before = finish(rollout(model, ["a"], [Noise(0)], SAMPLING)).images

    def work():
        with adapter(model, random_lora(model)):
            return (yield from rollout(model, ["a"], [Noise(0)], SAMPLING))

    learnt = finish(work()).images
    generator = work()
    next(generator)
    generator.close()
    assert torch.equal(finish(rollout(model, ["a"], [Noise(0)], SAMPLING)).images, before)
    assert not torch.allclose(learnt, before, atol=1e-3)


def test_gradients_are_off_inside_and_on_between_the_steps(model):
    for event in rollout(model, ["a"], [Noise(0)], SAMPLING):
        assert torch.is_grad_enabled()
        assert not event.latents.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("prompts", "noises"), [(2, 1), (1, 2), (0, 0)])
def test_prompts_and_noises_must_match(model, prompts, noises):
    with pytest.raises(SettingError, match=f"{prompts} prompts and {noises} noises"):
        finish(rollout(model, ["a"] * prompts, [Noise(0)] * noises, SAMPLING))


def test_derived_seeds_are_reproducible_and_legal():
    assert derived_seed(3, 1, 2) == derived_seed(3, 1, 2)
    assert 0 <= derived_seed(2**63 - 1, 10**6, 0, 1023) < 2**63


@pytest.mark.parametrize(
    "numbers",
    [
        [(seed, step, image) for seed in range(4) for step in range(4) for image in range(4)],
        [(1,), (1, 0), (1, 0, 0)],
        [(2**32,), (0, 1)],
    ],
    ids=["neighbours", "trailing zeros", "large"],
)
def test_derived_seeds_differ_for_each_tuple(numbers):
    assert len({derived_seed(*one) for one in numbers}) == len(numbers)


def tensors(trajectory: Trajectory) -> dict[str, torch.Tensor]:
    """All numbers of a trajectory by name."""
    parts = {"cond": trajectory.cond, "uncond": trajectory.uncond, "steps": vars(trajectory.steps)}
    named = {f"{part}.{name}": v for part, values in parts.items() for name, v in values.items()}
    whole = {n: v for n, v in vars(trajectory).items() if isinstance(v, torch.Tensor)}
    return named | whole


def test_batches_joined_are_one_batch(model):
    prompts, noise = ["a", "b c", "z"], [Noise(0), Noise(1, 5), Noise(2)]
    together = finish(rollout(model, prompts, noise, SAMPLING))
    parts = [
        finish(rollout(model, prompts[part], noise[part], SAMPLING))
        for part in (slice(0, 1), slice(1, 3))
    ]
    one = joined(parts)
    assert one.guidance_scale == together.guidance_scale and one.size == together.size
    assert tensors(one).keys() == tensors(together).keys()
    for name, value in tensors(together).items():
        torch.testing.assert_close(tensors(one)[name], value, rtol=1e-4, atol=1e-4)
    for name in ("latents", "outputs", "noise"):  # and each part's, to the last bit
        halves = tensors(one)[name].split([1, 2], dim=1)
        assert all(torch.equal(h, tensors(p)[name]) for h, p in zip(halves, parts, strict=True))
    assert torch.equal(one.images, torch.cat([part.images for part in parts]))
    assert torch.equal(one.cond["text"], torch.cat([part.cond["text"] for part in parts]))


def test_one_batch_joined_is_itself(model):
    alone = finish(rollout(model, ["a"], [Noise(0)], SAMPLING))
    assert joined([alone]) is alone


def test_a_rollout_takes_the_model_s_own_sampling_where_nothing_is_said(model):
    model.defaults = {"steps": 2, "guidance_scale": 2.5, "images": 9}
    left_open = finish(rollout(model, ["a"], [Noise(0)], Sampling()))
    said = finish(rollout(model, ["a"], [Noise(0)], Sampling(steps=2, guidance_scale=2.5)))
    assert all(torch.equal(tensors(said)[n], value) for n, value in tensors(left_open).items())
    assert len(left_open.steps) == 2 and left_open.guidance_scale == 2.5
