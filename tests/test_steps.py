"""The affine step against diffusers' scheduler, DDIM's paper, DDPM's posterior, Flow-GRPO's SDE."""

from itertools import product

import pytest
import torch
from conftest import random_pipeline
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Ddim
from torch.distributions import Normal

from pxpo.errors import SettingError
from pxpo.models import StableDiffusion
from pxpo.settings import Sampling
from pxpo.steps import Steps, flow_steps, pixel_log_prob, velocity_steps

SHAPE = (2, 4, 3, 5)

VARIANTS = [
    {"timestep_spacing": spacing, "set_alpha_to_one": to_one, "steps_offset": offset}
    for spacing, to_one, offset in product(
        ("leading", "trailing", "linspace"), (True, False), (0, 1)
    )
]
KINDS = ("epsilon", "v_prediction")


def stable_diffusion_scheduler(**changes) -> DDIMScheduler:
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**config | changes)


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return StableDiffusion(random_pipeline(), "cpu", "random")


def walked(model: StableDiffusion, scheduler: DDIMScheduler, steps: int, eta: float) -> Steps:
    """The steps of a model with this scheduler; eta may be 0, which no setting allows."""
    model.scheduler = scheduler
    sampling = Sampling(steps=steps)
    object.__setattr__(sampling, "eta", eta)
    return model.steps(sampling)


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_is_diffusers_own(model, variant, kind, steps, eta):
    scheduler = stable_diffusion_scheduler(**variant, prediction_type=kind)
    walk = walked(model, scheduler, steps, eta)
    assert len(walk) == steps and walk.t.tolist() == scheduler.timesteps.tolist()
    x, out, z = noise(1), noise(2), noise(3)
    for index in range(steps):
        at = walk[index]
        expected = scheduler.step(out, at.t, x, eta=eta, variance_noise=z)
        far = expected.prev_sample.abs().max().item()  # where x_t is nearly all noise, x_0 is large
        torch.testing.assert_close(
            at.mean(x, out) + at.sigma * z, expected.prev_sample, rtol=1e-5, atol=4e-6 * far
        )
        torch.testing.assert_close(
            at.expected_image(x, out), expected.pred_original_sample, rtol=1e-5,
            atol=4e-6 * expected.pred_original_sample.abs().max().item(),
        )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_sampling_step_rounds_exactly_as_diffusers(model, kind, eta):
    scheduler = stable_diffusion_scheduler(prediction_type=kind)
    walk, sampling = walked(model, scheduler, 7, eta), Sampling(steps=7, eta=eta)
    model.steps(Sampling(steps=3))  # another run's steps do not disturb it
    x, out, z = noise(1), noise(2), noise(3)
    taken = [model.take_step(walk[index], x, out, z, sampling) for index in range(7)]
    scheduler.set_timesteps(7)
    for index, (x_prev, x_0) in enumerate(taken):
        expected = scheduler.step(out, walk.t[index], x, eta=eta, variance_noise=z)
        assert torch.equal(x_prev, expected.prev_sample)
        assert torch.equal(x_0, expected.pred_original_sample)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_numbers_are_those_of_the_paper(variant, kind, eta):
    ddim = Ddim.of(stable_diffusion_scheduler(**variant), 12, eta, kind)
    x, out = noise(1).double(), noise(2).double()
    for index in range(12):
        at, steps = ddim[index], ddim.steps[index]
        torch.testing.assert_close(steps.mean(x, out), at.mean(x, out), rtol=1e-9, atol=1e-9)
        _, x_0 = at.noise_and_image(x, out)
        torch.testing.assert_close(steps.expected_image(x, out), x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_that_of_ddpms_posterior(kind):
    """At eta = 1, given the x_0 that x_t and the output amount to (Ho et al., Eq. 7)."""
    ddim = Ddim.of(stable_diffusion_scheduler(), 12, 1.0, kind)
    x_t, out = noise(0).double(), noise(2).double()
    for index in range(12):
        at, steps = ddim[index], ddim.steps[index]
        x_0 = steps.expected_image(x_t, out)
        kept = at.alpha / at.alpha_prev  # Ho et al.'s 1 - beta
        posterior_mean = (
            at.alpha_prev.sqrt() * (1 - kept) * x_0 + kept.sqrt() * (1 - at.alpha_prev) * x_t
        ) / (1 - at.alpha)
        torch.testing.assert_close(steps.mean(x_t, out), posterior_mean, rtol=1e-7, atol=1e-7)
        variance = (1 - at.alpha_prev) / (1 - at.alpha) * (1 - kept)
        torch.testing.assert_close(steps.sigma**2, variance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_noise_leads_to_the_mean_of_ddpms_posterior(kind):
    ddim = Ddim.of(stable_diffusion_scheduler(), 12, 1.0, kind)
    x_t, x_0, out = (noise(seed).double() for seed in range(3))
    for index in range(12):
        at, steps = ddim[index], ddim.steps[index]
        kept = at.alpha / at.alpha_prev  # Ho et al., Eq. 7, with beta = 1 - kept
        posterior_mean = (
            at.alpha_prev.sqrt() * (1 - kept) * x_0 + kept.sqrt() * (1 - at.alpha_prev) * x_t
        ) / (1 - at.alpha)
        expected = steps.mean(x_t, out) + steps.sigma * steps.expected_noise(x_t, out, x_0)
        torch.testing.assert_close(expected, posterior_mean, rtol=1e-7, atol=1e-7)


def test_the_expected_noise_has_the_mean_gradient_of_the_drawn_and_less_noise():
    """A model that knows its data, x_0 ~ N(0.3, 0.5^2), and a reward that is a function of x_0."""
    ddim = Ddim.of(stable_diffusion_scheduler(), 500)
    steps, count = ddim.steps, 20_000
    drawn = noise(0, (501, count)).double()
    latents, outputs = [drawn[0]], []
    for index in range(500):
        at, x_t = ddim[index], latents[-1]
        variance = at.alpha * 0.25 + 1 - at.alpha
        score = (at.alpha.sqrt() * 0.3 - x_t) / variance
        outputs.append(-(1 - at.alpha).sqrt() * score)
        latents.append(at.mean(x_t, outputs[-1]) + at.sigma * drawn[index + 1])
    reward = (latents[-1] > 0.5).double() - (latents[-1] > 0.5).double().mean()
    for index in (400, 475):
        z = drawn[index + 1]
        expected = steps[index].expected_noise(latents[index], outputs[index], latents[-1])
        path, posterior = reward * z, reward * expected
        error = path.std() / count**0.5
        assert path.mean() > 5 * error
        assert (posterior.mean() - path.mean()).abs() < 4 * error
        assert posterior.var() < path.var() / 10


def test_the_last_sigma_of_stable_diffusion_is_small_but_not_zero(model):
    steps = walked(model, stable_diffusion_scheduler(), 50, 1.0)
    assert steps.t[-1] == 1
    assert steps.sigma[-1].item() == pytest.approx(0.0206, abs=5e-5)
    ratio = (steps.c / steps.sigma).abs()
    assert ratio[[0, 25, 48, 49]].tolist() == pytest.approx([0.51, 0.38, 3.28, 1.00], abs=6e-3)


@pytest.mark.parametrize(
    "changes", [{"set_alpha_to_one": True}, {"steps_offset": 0}], ids=["alpha_to_one", "offset_0"]
)
def test_a_last_step_without_noise_has_sigma_zero(model, changes):
    sigma = walked(model, stable_diffusion_scheduler(**changes), 20, 1.0).sigma
    assert sigma[-1] == 0
    assert (sigma[:-1] > 0).all()


def test_v_needs_no_signal_at_the_first_step():
    """Zero terminal SNR: at alpha = 0 all is noise, and v is the image turned round."""
    zero, part = torch.tensor([0.0]), torch.tensor([0.1])
    steps = velocity_steps(torch.tensor([999]), zero, part, (1 - part).sqrt() * 0.5)
    assert all(torch.isfinite(number).all() for number in vars(steps).values())
    x, v = noise(1), noise(2)
    assert torch.equal(steps[0].expected_image(x, v), -v)


@pytest.mark.parametrize("churn", [0.0, 0.7])
def test_the_flow_is_flow_grpos_sde(churn):
    sigmas = torch.tensor([0.9, 0.6, 0.25, 0.0], dtype=torch.float64)
    steps = flow_steps(sigmas, churn=churn)
    x, v = noise(1).double(), noise(2).double()
    for index in range(3):
        now, dt = sigmas[index], sigmas[index + 1] - sigmas[index]
        s = churn * (now / (1 - now)) ** 0.5
        drift = v + s**2 / (2 * now) * (x + (1 - now) * v)
        torch.testing.assert_close(steps[index].mean(x, v), x + drift * dt)
        torch.testing.assert_close(steps[index].sigma, s * (-dt) ** 0.5)
        torch.testing.assert_close(steps[index].expected_image(x, v), x - now * v)
    assert steps.t.tolist() == [900, 600, 250]


def test_a_flow_that_knows_its_data_arrives_there():
    """x_0 ~ N(0.3, 0.5^2): the SDE ends in that distribution, from pure noise on."""
    sigmas, count = torch.linspace(1, 0, 301, dtype=torch.float64), 20_000
    steps, drawn = flow_steps(sigmas), noise(0, (301, count)).double()
    x = drawn[0]
    for index in range(300):
        sigma = sigmas[index]
        variance = (1 - sigma) ** 2 * 0.25 + sigma**2
        gain = ((1 - sigma) * 0.25) / variance
        image = 0.3 + gain * (x - (1 - sigma) * 0.3)
        v = (x - image) / sigma
        x = steps[index].mean(x, v) + steps[index].sigma * drawn[index + 1]
    assert x.mean().item() == pytest.approx(0.3, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 4),
    sigma=st.floats(1e-2, 10.0),
    seed=st.integers(0, 2**31),
)
def test_pixel_log_prob_is_the_normal_density_summed_over_channels(shape, sigma, seed):
    x_prev, mean = noise(seed, shape).double(), noise(seed + 1, shape).double()
    sigma = torch.tensor(sigma, dtype=torch.float64)
    expected = Normal(mean, sigma).log_prob(x_prev).sum(1)
    torch.testing.assert_close(pixel_log_prob(x_prev, mean, sigma), expected)


@pytest.mark.parametrize("sigma", [0.0, -0.1])
def test_pixel_log_prob_refuses_a_step_without_noise(sigma):
    with pytest.raises(SettingError, match="sigma"):
        pixel_log_prob(noise(1), noise(2), torch.tensor(sigma))


@pytest.mark.parametrize("steps", [51, 1000])
def test_more_steps_than_the_model_has_are_refused(model, steps):
    scheduler = stable_diffusion_scheduler(num_train_timesteps=50)
    with pytest.raises(SettingError, match=rf"steps is {steps}\b.*\b50\b"):
        walked(model, scheduler, steps, 1.0)


@pytest.mark.parametrize("offset", [0, 1])
def test_the_greatest_number_of_steps_is_sampled_or_refused_with_a_reason(model, offset):
    scheduler = stable_diffusion_scheduler(steps_offset=offset)
    try:
        assert len(walked(model, scheduler, 1000, 1.0)) == 1000
    except SettingError as error:
        assert "1000" in str(error)
