import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import adaptive_avg_pool2d, conv2d

from pxpo.credit import (
    against_past,
    by_area,
    downsample,
    filled,
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


@pytest.mark.parametrize("sign", [1, -1])
def test_what_a_blur_rounds_is_not_taken_for_paint_of_the_other_colour(sign):
    painted = torch.zeros(1, 32, 32)
    painted[:, :2, :3] = 2.0 * sign
    assert (smooth(painted, 1.0) * sign).min() < 0
    credit = latent_credit(painted, Credit(baseline="area", blur=1.0))
    assert (credit * sign).min() == 0 and (credit * sign).max() > 1


def test_the_rounding_of_equal_maps_is_not_taken_for_a_difference():
    latent_reward = random_map(0, 1, 16, 16).float().repeat(10, 1, 1)
    credit = per_location(latent_reward)
    torch.testing.assert_close(credit, torch.zeros_like(credit), rtol=0, atol=1e-5)


def test_by_area_makes_a_small_stroke_as_loud_as_a_large_one():
    small, large = torch.zeros(1, 8, 8), torch.full((1, 8, 8), -2.0)
    small[0, 2, 3] = 2.0
    credit = by_area(torch.cat([small, large]))
    torch.testing.assert_close(credit[1], large[0])
    assert credit[0, 2, 3] == 2.0 * 64
    assert credit.abs().sum((1, 2)).tolist() == [128.0, 128.0]


def test_by_area_lets_neither_colour_drown_the_other():
    painted = torch.zeros(1, 8, 8)
    painted[0, 2, 3], painted[0, 5:7, :6] = 2.0, -2.0
    credit = by_area(painted)
    assert torch.equal(credit.sign(), painted.sign())
    assert credit.clamp(min=0).sum().item() == pytest.approx(128)
    assert credit.clamp(max=0).sum().item() == pytest.approx(-128)


def test_by_area_leaves_an_empty_map_empty():
    assert torch.equal(by_area(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4))


def corner(value: float, row: int, column: int) -> torch.Tensor:
    reward = torch.zeros(1, 8, 8)
    reward[0, row : row + 2, column : column + 2] = value
    return reward


def test_against_the_past_what_came_instead_of_the_blamed_is_praised():
    before, now = corner(-2.0, 0, 0), corner(-2.0, 0, 1)
    credit = against_past(now, [before])[0]
    gone, stays, came = credit[0, 0], credit[0, 1], credit[0, 2]
    assert came < stays < 0 < gone
    assert (stays / came).item() == pytest.approx(0.5)
    assert (gone / came).item() == pytest.approx(-0.5)


def test_against_the_past_a_picture_without_what_others_had_is_blamed():
    lake = corner(2.0, 0, 1)
    credit = against_past(torch.zeros(1, 8, 8), [lake])
    assert torch.equal(credit < 0, lake > 0) and not credit.clamp(min=0).any()
    new = against_past(corner(2.0, 4, 4), [lake])
    assert torch.equal(new > 0, corner(2.0, 4, 4) > 0) and torch.equal(new < 0, lake > 0)


def test_against_the_past_the_last_four_maps_count_each_colour_in_its_own_measure():
    now, *past = (random_map(seed, 1, 4, 4) for seed in range(7))
    maps = torch.stack([*past[-4:], now])
    praise, blame = maps.clamp(min=0), maps.clamp(max=0)
    left = 1 - praise.mean() / praise.max()
    change = (
        (praise[-1] - 1.5 * praise[:-1].mean(0)) / praise.square().mean().sqrt() * left**2,
        (blame[-1] - 0.5 * blame[:-1].mean(0)) / blame.square().mean().sqrt(),
    )
    torch.testing.assert_close(against_past(now, past), sum(change))


def test_against_the_past_the_first_map_is_taken_against_its_own_mean():
    for sign in (1, -1):
        credit = against_past(corner(2.0 * sign, 0, 0), [])
        torch.testing.assert_close(credit.sum(), torch.tensor(0.0))
        assert credit[0, 0, 0] * sign > 0
        assert not against_past(torch.full((1, 8, 8), 2.0 * sign), []).any()


def test_against_the_past_what_is_long_gone_is_forgotten():
    blamed, empty = corner(-2.0, 0, 0), torch.zeros(1, 8, 8)
    loudness = [against_past(empty, [blamed, *[empty] * gone])[0, 0, 0] for gone in range(5)]
    assert loudness == sorted(loudness, reverse=True) and loudness[3] > 0 == loudness[4]


def test_against_the_past_neither_colour_drowns_the_other():
    praise, blame, past = corner(2.0, 1, 1), corner(-2.0, 5, 1), corner(-2.0, 5, 3)
    credit = against_past(praise + blame, [past])
    torch.testing.assert_close(against_past(praise + 9 * blame, [9 * past]), credit)
    torch.testing.assert_close(against_past(9 * praise + blame, [past]), credit)


def test_against_the_past_praise_fades_as_it_fills_the_picture():
    loudness = []
    for rows in (1, 4, 7):
        now = torch.zeros(1, 8, 8)
        now[:, :rows] = 2.0
        size = now.square().mean().sqrt()
        loudness.append((against_past(now, [torch.zeros(1, 8, 8)]).max() * size).item())
    assert loudness == pytest.approx([2 * 2**0.5 * (1 - rows / 16) ** 2 for rows in (1, 4, 7)])


def test_filled_is_the_share_that_praise_covers_of_the_last_five_maps():
    half = torch.zeros(1, 4, 4)
    half[:, :2] = 2.0
    assert filled(half).item() == 0.5
    assert filled(half / 2, [half]).item() == 0.375  # praised half as much
    assert filled(torch.zeros(1, 4, 4), [half]).item() == 0.25
    assert filled(torch.zeros(1, 4, 4), [half] * 5).item() == pytest.approx(0.4)
    assert filled(-half).item() == filled(torch.zeros(1, 4, 4)).item() == 0.0
    two = filled(torch.cat([half, half.mT / 2]), [torch.cat([half, torch.ones(1, 4, 4)])])
    assert two.tolist() == [0.5, 0.75]


def test_against_the_past_each_image_has_a_past_of_its_own():
    now, before = random_map(0, 2, 4, 4), random_map(1, 2, 4, 4)
    alone = [against_past(now[i : i + 1], [before[i : i + 1]]) for i in range(2)]
    torch.testing.assert_close(against_past(now, [before]), torch.cat(alone))


def test_against_the_past_nothing_ever_said_earns_nothing():
    empty = torch.zeros(2, 4, 4)
    assert torch.equal(against_past(empty, []), empty)
    assert torch.equal(against_past(empty, [empty, empty]), empty)


def test_what_smoothing_rounds_is_not_taken_for_paint():
    green = torch.zeros(1, 16, 16)
    green[0, 3:5, 3:9] = 2.0
    settings = Credit(baseline="area", blur=1.5)
    assert latent_credit(green, settings).min() >= 0
    assert latent_credit(-green, settings).max() <= 0


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("none", lambda latent_reward: latent_reward),
        ("area", by_area),
        ("global", standardise),
        ("location", per_location),
    ],
)
@pytest.mark.parametrize(
    ("credit", "blur", "radius"),
    [("pixel", 0.0, 0.0), ("pixel", 1.5, 1.5), ("image", 0.0, math.inf), ("image", 2.0, math.inf)],
)
def test_latent_credit_smooths_then_takes_the_baseline(baseline, expected, credit, blur, radius):
    latent_reward = random_map(5, 3, 6, 4)
    settings = Credit(credit=credit, blur=blur, baseline=baseline)
    credited = latent_credit(latent_reward, settings)
    torch.testing.assert_close(credited, expected(smooth(latent_reward, radius)))


@pytest.mark.parametrize(("credit", "radius"), [("pixel", 1.5), ("image", math.inf)])
def test_latent_credit_smooths_each_colour_and_its_past(credit, radius):
    now, before = random_map(5, 3, 6, 4), random_map(6, 3, 6, 4)
    settings = Credit(credit=credit, blur=1.5, baseline="past")
    expected = 0
    for low, high, share in ((0, None, 1.5), (None, 0, 0.5)):
        part, past = now.clamp(low, high), before.clamp(low, high)
        left = 1 - (part + past).mean((1, 2)) / 2 / torch.maximum(part, past).amax((1, 2))
        smoothed = smooth(part, radius), smooth(past, radius)
        size = torch.stack(smoothed).square().mean((0, 2, 3)).sqrt()
        loudness = (left**2 if high is None else 1.0) / size
        expected += (smoothed[0] - share * smoothed[1]) * loudness[:, None, None]
    torch.testing.assert_close(latent_credit(now, settings, [before]), expected)
