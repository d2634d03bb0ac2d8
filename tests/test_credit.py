import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import adaptive_avg_pool2d, conv2d

from pxpo.credit import (
    BASELINES,
    downsample,
    latent_credit,
    per_location,
    smooth,
    standardise,
)
from pxpo.errors import RewardError
from pxpo.settings import Credit

sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))
seeds = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)


def random_map(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def spot(height: int, width: int, row: int, column: int) -> torch.Tensor:
    reward = torch.zeros(1, height, width)
    reward[0, row, column] = 1.0
    return reward


@few
@given(source=sizes, target=sizes, value=st.floats(-5, 5))
def test_downsample_keeps_a_uniform_map_uniform(source, target, value):
    small = downsample(torch.full((2, *source), value, dtype=torch.float64), target)
    torch.testing.assert_close(small, torch.full((2, *target), value, dtype=torch.float64))


@few
@given(source=sizes, target=sizes, seed=seeds)
def test_downsample_keeps_the_mean_of_each_image(source, target, seed):
    reward = random_map(seed, 3, *source)
    torch.testing.assert_close(downsample(reward, target).mean((1, 2)), reward.mean((1, 2)))


@few
@given(source=sizes, target=sizes, seed=seeds)
def test_downsample_stays_within_the_range_of_the_map(source, target, seed):
    reward = random_map(seed, 1, *source)
    small = downsample(reward, target)
    assert small.min() >= reward.min() - 1e-9
    assert small.max() <= reward.max() + 1e-9


@few
@given(size=sizes, factors=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=seeds)
def test_downsample_is_average_pooling_for_divisible_sizes(size, factors, seed):
    reward = random_map(seed, 2, size[0] * factors[0], size[1] * factors[1])
    torch.testing.assert_close(downsample(reward, size), adaptive_avg_pool2d(reward, size))


def test_downsample_splits_a_pixel_that_two_cells_share():
    reward = torch.tensor([[[3.0, 6.0, 9.0]]])
    torch.testing.assert_close(downsample(reward, (1, 2)), torch.tensor([[[4.0, 8.0]]]))


def test_downsample_to_a_larger_size_repeats_pixels():
    reward = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    expected = reward.repeat_interleave(3, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(downsample(reward, (6, 4)), expected)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 39), (23, 0), (23, 39), (11, 17)])
def test_a_one_pixel_stroke_is_not_lost_and_stays_where_it_is(row, column):
    small = downsample(spot(24, 40, row, column), (6, 5))
    assert small[0, row * 6 // 24, column * 5 // 40] == pytest.approx(6 * 5 / (24 * 40))
    assert (small > 0).sum() == 1


def test_downsample_refuses_a_single_map_without_its_batch():
    with pytest.raises(RewardError, match=r"\(8, 8\).*\(B, H, W\)"):
        downsample(torch.zeros(8, 8), (4, 4))


@few
@given(size=sizes, seed=seeds)
def test_smooth_with_radius_zero_changes_nothing(size, seed):
    reward = random_map(seed, 2, *size)
    assert torch.equal(smooth(reward, 0.0), reward)


@few
@given(size=sizes, seed=seeds)
def test_smooth_with_infinite_radius_is_the_mean_of_each_image(size, seed):
    reward = random_map(seed, 2, *size)
    mean = reward.mean((1, 2), keepdim=True).expand_as(reward)
    torch.testing.assert_close(smooth(reward, math.inf), mean)


@few
@given(size=sizes, radius=st.floats(0, 50), seed=seeds)
def test_smooth_keeps_the_mean_of_each_image(size, radius, seed):
    reward = random_map(seed, 2, *size)
    torch.testing.assert_close(smooth(reward, radius).mean((1, 2)), reward.mean((1, 2)))


@few
@given(size=sizes, radius=st.floats(0, 50), seed=seeds)
def test_smooth_commutes_with_flips_and_transposition(size, radius, seed):
    reward = random_map(seed, 2, *size)
    smoothed = smooth(reward, radius)
    torch.testing.assert_close(smooth(reward.flip(1), radius), smoothed.flip(1))
    torch.testing.assert_close(smooth(reward.flip(2), radius), smoothed.flip(2))
    torch.testing.assert_close(smooth(reward.mT, radius), smoothed.mT)


@few
@given(size=sizes, radius=st.floats(0, 50), seed=seeds)
def test_smooth_lends_and_borrows_alike(size, radius, seed):
    one, other = random_map(seed, 1, *size), random_map(seed + 1, 1, *size)
    lent = (smooth(one, radius) * other).sum()
    torch.testing.assert_close(lent, (one * smooth(other, radius)).sum())


@few
@given(size=sizes, radius=st.floats(0, 5), seed=seeds)
def test_smooth_turns_no_sign(size, radius, seed):
    assert smooth(random_map(seed, 1, *size).abs(), radius).min() > -1e-5


@pytest.mark.parametrize("radius", [2.0, 3.0])
def test_smooth_is_a_gaussian_blur_away_from_the_edges(radius):
    reward = spot(41, 37, 20, 16).double()
    distance = torch.arange(-14, 15, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (distance / radius) ** 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    expected = conv2d(reward[None], kernel[None, None], padding=14)[0]
    torch.testing.assert_close(smooth(reward, radius), expected, rtol=0, atol=0.06 / radius**4)


def test_smooth_reflects_at_the_edge_and_stays_at_the_spot():
    smoothed = smooth(spot(9, 17, 0, 16).double(), 4.0)[0]
    assert smoothed.argmax() == 16
    assert (smoothed[:, 1:] > smoothed[:, :-1]).all()
    assert (smoothed[:-1] > smoothed[1:]).all()


@few
@given(shape=st.tuples(*[st.integers(2, 9)] * 3), scale=st.floats(0.01, 100), seed=seeds)
def test_standardise_has_mean_zero_and_spread_one_over_all_pixels_of_all_images(shape, scale, seed):
    reward = random_map(seed, *shape)
    standard = standardise(reward)
    assert standard.mean().item() == pytest.approx(0, abs=1e-9)
    assert standard.std(correction=0).item() == pytest.approx(1)
    torch.testing.assert_close(standardise(scale * reward + 3), standard)


def test_standardise_keeps_the_difference_between_images():
    standard = standardise(torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]))
    torch.testing.assert_close(standard, torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 4, 4))


@few
@given(shape=st.tuples(*[st.integers(2, 9)] * 3), seed=seeds)
def test_per_location_has_mean_zero_at_each_place_and_one_scale(shape, seed):
    reward = random_map(seed, *shape)
    credit = per_location(reward + random_map(seed + 1, *shape[1:]))
    torch.testing.assert_close(credit.mean(0), torch.zeros(shape[1:], dtype=torch.float64))
    assert credit.std(correction=0).item() == pytest.approx(1)
    torch.testing.assert_close(credit, per_location(reward))


def test_per_location_refuses_a_single_image():
    with pytest.raises(RewardError, match="at least 2"):
        per_location(torch.zeros(1, 4, 4))


@pytest.mark.parametrize("baseline", [standardise, per_location])
@pytest.mark.parametrize("value", [0.0, 0.7, -0.3, 1e-30])
def test_a_map_without_differences_earns_nothing(baseline, value):
    credit = baseline(torch.full((3, 7, 9), value))
    torch.testing.assert_close(credit, torch.zeros(3, 7, 9), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0.7, -0.3, 0.1])
def test_the_rounding_of_a_uniform_map_is_not_taken_for_a_difference(value):
    latent_reward = downsample(torch.full((1, 100, 100), value), (7, 9))
    torch.testing.assert_close(standardise(latent_reward), torch.zeros(1, 7, 9), rtol=0, atol=1e-5)


def test_the_rounding_of_equal_maps_is_not_taken_for_a_difference():
    latent_reward = random_map(0, 1, 16, 16).float().repeat(10, 1, 1)
    credit = per_location(latent_reward)
    torch.testing.assert_close(credit, torch.zeros_like(credit), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("none", lambda latent_reward: latent_reward),
        ("global", standardise),
        ("location", per_location),
    ],
)
@pytest.mark.parametrize("blur", [0.0, 1.5, math.inf])
def test_latent_credit_smooths_then_takes_the_baseline(baseline, expected, blur):
    latent_reward = random_map(5, 3, 6, 4)
    credited = latent_credit(latent_reward, Credit(blur=blur, baseline=baseline))
    torch.testing.assert_close(credited, expected(smooth(latent_reward, blur)))
    unsmoothed = torch.allclose(credited, expected(latent_reward))
    assert unsmoothed == (blur == 0)


def test_an_infinite_blur_is_one_number_for_each_image():
    """DDPO's credit: the standardised mean reward of an image, the same all over it."""
    latent_reward = random_map(5, 3, 6, 4)
    means = latent_reward.mean((1, 2))
    expected = ((means - means.mean()) / means.std(correction=0)).view(3, 1, 1).expand(3, 6, 4)
    for baseline in ("global", "location"):
        credited = latent_credit(latent_reward, Credit(blur=math.inf, baseline=baseline))
        torch.testing.assert_close(credited, expected)


def test_a_blur_rounds_no_credit_of_the_other_sign_that_counts():
    """Where the mask of one colour ends, what is left of the other sign is the rounding alone."""
    painted = torch.zeros(1, 32, 32)
    painted[:, :2, :3] = 2.0
    for sign in (1, -1):
        credit = latent_credit(sign * painted, Credit(baseline="none", blur=1.0)) * sign
        assert credit.max() > 0.5 and credit.min() > -1e-6


def test_every_baseline_that_can_be_set_is_there():
    (baseline,) = (f for f in fields(Credit) if f.name == "baseline")
    assert set(BASELINES) == set(baseline.metadata["choices"])
