from dataclasses import replace
from itertools import product

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from pxpo.ddim import (
    Schedule,
    expected_image,
    expected_step_noise,
    make_schedule,
    noise_from_velocity,
    pixel_log_prob,
    predicted_noise,
    step,
    step_mean,
)
from pxpo.errors import ModelError, SettingError

SHAPE = (2, 4, 3, 5)

VARIANTS = [
    {"timestep_spacing": spacing, "set_alpha_to_one": to_one, "steps_offset": offset}
    for spacing, to_one, offset in product(
        ("leading", "trailing", "linspace"), (True, False), (0, 1)
    )
]


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


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_double(schedule: Schedule) -> Schedule:
    return replace(
        schedule,
        alpha=schedule.alpha.double(),
        alpha_prev=schedule.alpha_prev.double(),
        sigma=schedule.sigma.double(),
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_step_rounds_exactly_as_diffusers(variant, steps, eta):
    scheduler = stable_diffusion_scheduler(**variant)
    schedule = make_schedule(scheduler, steps, eta)
    assert len(schedule) == steps
    assert schedule.t.tolist() == scheduler.timesteps.tolist()
    x, eps, z = noise(1), noise(2), noise(3)
    for index in range(steps):
        at = schedule[index]
        expected = scheduler.step(eps, at.t, x, eta=eta, variance_noise=z)
        assert torch.equal(step(x, eps, z, at), expected.prev_sample)
        assert torch.equal(expected_image(x, eps, at), expected.pred_original_sample)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_step_from_a_velocity_equals_diffusers(variant, eta):
    scheduler = stable_diffusion_scheduler(**variant, prediction_type="v_prediction")
    schedule = make_schedule(scheduler, 10, eta)
    x, v, z = noise(1), noise(2), noise(3)
    for index in range(10):
        at = schedule[index]
        eps = noise_from_velocity(v, x, at.alpha)
        expected = scheduler.step(v, at.t, x, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(step(x, eps, z, at), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_c_is_the_slope_of_the_mean_in_the_noise(variant, eta):
    schedule = in_double(make_schedule(stable_diffusion_scheduler(**variant), 12, eta))
    for index in range(12):
        eps = torch.zeros((), dtype=torch.float64, requires_grad=True)
        mean = step_mean(noise(1, ()).double(), eps, schedule[index])
        (slope,) = torch.autograd.grad(mean, eps)
        torch.testing.assert_close(schedule.c[index], slope, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("eta", [0.1, 1.0])
@pytest.mark.parametrize("steps", [7, 50])
def test_where_a_step_led_tells_the_noise_that_was_predicted(steps, eta):
    schedule = make_schedule(stable_diffusion_scheduler(), steps, eta)
    x, eps, z = noise(1), noise(2), noise(3)
    for at in (schedule[index] for index in range(steps)):
        told = predicted_noise(x, step(x, eps, z, at), z, at)
        torch.testing.assert_close(told, eps, rtol=1e-4, atol=1e-4)


def test_the_expected_noise_leads_to_the_mean_of_ddpms_posterior():
    schedule = in_double(make_schedule(stable_diffusion_scheduler(), 12, 1.0))
    x_t, x_0, eps = (noise(seed).double() for seed in range(3))
    for at in (schedule[index] for index in range(12)):
        kept = at.alpha / at.alpha_prev  # Ho et al., Eq. 7, with beta = 1 - kept
        posterior_mean = (
            at.alpha_prev.sqrt() * (1 - kept) * x_0 + kept.sqrt() * (1 - at.alpha_prev) * x_t
        ) / (1 - at.alpha)
        expected = step_mean(x_t, eps, at) + at.sigma * expected_step_noise(x_t, x_0, eps, at)
        torch.testing.assert_close(expected, posterior_mean, rtol=1e-4, atol=1e-4)


def test_the_expected_noise_has_the_mean_gradient_of_the_drawn_and_less_noise():
    """A model that knows its data, x_0 ~ N(0.3, 0.5^2), and a reward that is a function of x_0."""
    schedule = in_double(make_schedule(stable_diffusion_scheduler(), 500, 1.0))
    count, generator = 20_000, torch.Generator().manual_seed(0)
    drawn = torch.randn(501, count, generator=generator, dtype=torch.float64)
    latents = [drawn[0]]
    predicted = []
    for index in range(500):
        at, x_t = schedule[index], latents[-1]
        variance = at.alpha * 0.25 + 1 - at.alpha
        score = (at.alpha.sqrt() * 0.3 - x_t) / variance
        predicted.append(-(1 - at.alpha).sqrt() * score)
        latents.append(step(x_t, predicted[-1], drawn[index + 1], at))
    reward = (latents[-1] > 0.5).double() - (latents[-1] > 0.5).double().mean()
    for index in (400, 475):
        at, x_t, z = schedule[index], latents[index], drawn[index + 1]
        expected = expected_step_noise(x_t, latents[-1], predicted[index], at)
        path, posterior = reward * z, reward * expected
        error = path.std() / count**0.5
        assert path.mean() > 5 * error
        assert (posterior.mean() - path.mean()).abs() < 4 * error
        assert posterior.var() < path.var() / 10


def test_last_sigma_of_stable_diffusion_is_small_but_not_zero():
    schedule = make_schedule(stable_diffusion_scheduler(), 50, 1.0)
    assert schedule.t[-1] == 1
    assert schedule.sigma[-1].item() == pytest.approx(0.0206, abs=5e-5)
    ratio = (schedule.c / schedule.sigma).abs()
    assert ratio[[0, 25, 48, 49]].tolist() == pytest.approx([0.51, 0.38, 3.28, 1.00], abs=6e-3)


@pytest.mark.parametrize(
    "changes", [{"set_alpha_to_one": True}, {"steps_offset": 0}], ids=["alpha_to_one", "offset_0"]
)
def test_last_step_without_noise_has_sigma_zero(changes):
    sigma = make_schedule(stable_diffusion_scheduler(**changes), 20, 1.0).sigma
    assert sigma[-1] == 0
    assert (sigma[:-1] > 0).all()


def test_expected_image_undoes_the_forward_noising():
    at = make_schedule(stable_diffusion_scheduler(), 10, 1.0)[4]
    x_0, eps = noise(1), noise(2)
    x_t = at.alpha.sqrt() * x_0 + (1 - at.alpha).sqrt() * eps
    torch.testing.assert_close(expected_image(x_t, eps, at), x_0, rtol=1e-4, atol=1e-5)


def test_noise_from_velocity_recovers_the_noise():
    x_0, eps, alpha = noise(1), noise(2), torch.tensor(0.3)
    x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * eps
    v = alpha.sqrt() * eps - (1 - alpha).sqrt() * x_0
    torch.testing.assert_close(noise_from_velocity(v, x_t, alpha), eps)


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


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(SettingError, match=rf"steps is {steps}\b.*\b1000\b"):
        make_schedule(stable_diffusion_scheduler(), steps, 1.0)


@pytest.mark.parametrize("offset", [0, 1])
def test_the_greatest_number_of_steps_is_sampled_or_refused_with_a_reason(offset):
    scheduler = stable_diffusion_scheduler(steps_offset=offset)
    try:
        assert len(make_schedule(scheduler, 1000, 1.0)) == 1000
    except SettingError as error:
        assert "1000" in str(error)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clip_sample": True}, "clip_sample"),
        ({"thresholding": True}, "thresholding"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_schedulers_without_a_closed_form_are_refused(changes, said):
    with pytest.raises(ModelError, match=said):
        make_schedule(stable_diffusion_scheduler(**changes), 10, 1.0)
