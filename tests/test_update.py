"""The closed form against the explicit loss: `update` computes Eq. 6, and nothing else."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from conftest import bare_weights, random_lora, random_pipeline
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Ddim
from torch.distributions import Normal, kl_divergence
from torch.nn import Parameter

from pxpo.credit import smooth
from pxpo.errors import DivergedError, PxpoError, RewardError, SettingError
from pxpo.lora import adapter, new_lora, weights_of
from pxpo.models import StableDiffusion
from pxpo.models.base import without_lora
from pxpo.models.memory import Folding
from pxpo.progress import finish
from pxpo.rollout import Noise, Trajectory, rollout
from pxpo.settings import Learning, Sampling
from pxpo.steps import pixel_log_prob
from pxpo.strength import NEAR
from pxpo.update import MEASURED, TRIES, _measured_pairs, accumulate_gradient, update

PAPER = Learning(step_noise="drawn", unconditional="exact", timesteps=1.0, hold=0.0, strength=0.0)
EXPECTED = replace(PAPER, step_noise="expected")
IMAGES, STEPS, C, H, W, TOKENS, WIDTH = 3, 4, 2, 3, 5, 4, 6


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def ddim(steps: int = STEPS, kind: str = "epsilon", **changes) -> Ddim:
    options = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1} | changes
    return Ddim.of(DDIMScheduler(**options), steps, kind=kind)


class StandIn(Folding):
    """What `update` needs of a model, in float64, with a switch for the LoRA."""

    dtype = torch.float64

    def __init__(self, parameters: dict[str, torch.Tensor], ddim: Ddim) -> None:
        super().__init__("cpu")
        self.ddim = ddim
        self.parameters = {name: Parameter(value) for name, value in parameters.items()}
        self.network, self.lora, self.bare = self, 1.0, False
        self._largest |= {"learn": 5, "sample": 5}

    def enable_adapters(self) -> None:
        self.lora = 1.0

    def disable_adapters(self) -> None:
        self.lora = 0.0


class SmallModel(StandIn):
    """A network in which each pixel sees its channels, the whole image, the text and the time."""

    def __init__(self, ddim: Ddim) -> None:
        shapes = {"pixel": (C, C), "image": (C, C), "text": (WIDTH, C), "time": (1, C)}
        super().__init__({name: double(*shapes[name], seed=1) for name in shapes}, ddim)
        self.base = {name: double(*shapes[name], seed=2) for name in shapes}

    def ask(self, x_t, t, text):
        w = {name: self.base[name] + self.lora * self.parameters[name] for name in self.base}
        pixel = torch.einsum("bchw,cd->bdhw", x_t, w["pixel"])
        image = x_t.mean((2, 3)) @ w["image"] + text.mean(1) @ w["text"]
        image = image + (t[:, None] / 1000) @ w["time"]
        return torch.tanh(pixel + image[:, :, None, None])

    def predict(self, x_t, t, cond, uncond=None, guidance_scale=1.0):
        out = self.ask(x_t, t.double(), cond["text"])
        if guidance_scale != 1:
            without = self.ask(x_t, t.double(), uncond["text"].expand_as(cond["text"]))
            out = without + guidance_scale * (out - without)
        return out


class Table(StandIn):
    """A model whose prediction for each step and image is a parameter of its own.

    The gradient of that parameter is the cotangent of the prediction. `cond` numbers the images.
    """

    def __init__(self, ddim: Ddim, images: int = IMAGES) -> None:
        super().__init__({"out": double(len(ddim), images, C, H, W, seed=3)}, ddim)

    def predict(self, x_t, t, cond, uncond=None, guidance_scale=1.0):
        step = (t[:, None] == self.ddim.t).nonzero()[:, 1]
        return self.lora * self.parameters["out"][step, cond["text"][:, 0, 0].long()]


@torch.no_grad()
def sampled(model, text: torch.Tensor, guidance_scale: float) -> Trajectory:
    steps, images = model.ddim.steps, len(text)
    cond, uncond = {"text": text}, {"text": double(1, TOKENS, WIDTH, seed=4)}
    z = double(len(steps), images, C, H, W, seed=5)
    latents, outputs = [double(images, C, H, W, seed=6)], []
    for index in range(len(steps)):
        at, x_t = model.ddim[index], latents[-1]
        outputs.append(model.predict(x_t, at.t.expand(images), cond, uncond, guidance_scale))
        latents.append(at.mean(x_t, outputs[-1]) + at.sigma * z[index])
    return Trajectory(
        torch.stack(latents), torch.stack(outputs), z, steps, cond, uncond, guidance_scale,
        torch.zeros(images, 3, H, W),
    )  # fmt: skip


def small(prediction_type: str = "epsilon", guidance_scale: float = 3.0, **changes):
    model = SmallModel(ddim(kind=prediction_type, **changes))
    return model, sampled(model, double(IMAGES, TOKENS, WIDTH, seed=7), guidance_scale)


def table(**changes):
    model = Table(ddim(**changes))
    text = torch.arange(IMAGES).double().view(-1, 1, 1).expand(IMAGES, TOKENS, WIDTH)
    return model, sampled(model, text, 1.0)


def credits(*shape: int, seed: int = 8) -> torch.Tensor:
    return double(*(shape or (IMAGES, H, W)), seed=seed)


def shares(*shape: int, seed: int = 9) -> torch.Tensor:
    return credits(*shape, seed=seed).sigmoid()


def closed_form(model, trajectory, credit, learning, **options) -> dict[str, torch.Tensor]:
    parameters = options.pop("parameters", None) or model.parameters
    finish(accumulate_gradient(model, parameters, trajectory, credit, learning, **options))
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


def by_autograd(loss: torch.Tensor, parameters) -> dict[str, torch.Tensor]:
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def predicted(model, trajectory, index: int, learning: Learning = PAPER) -> torch.Tensor:
    x_t, scale = trajectory.latents[index], trajectory.guidance_scale
    t = trajectory.steps.t[index].expand(len(x_t))
    cond, uncond = trajectory.cond, trajectory.uncond
    if learning.unconditional == "exact":
        return model.predict(x_t, t, cond, uncond, scale)
    empty = {"text": uncond["text"].expand_as(cond["text"])}
    without = model.predict(x_t, t, empty).detach()
    return without + scale * (model.predict(x_t, t, cond) - without)


def explicit_loss(model, trajectory, credit, learning, hold_map=None, chosen=None) -> torch.Tensor:
    """-mean of A log p + hold * mean of hold_map * KL, in the words of the paper.

    By the expected noise: A times the mean's way towards the one that the finished picture wants,
    of size 1 over each image and as loud at each step, in v.
    """
    hold_map = torch.ones_like(credit) if hold_map is None else hold_map
    chosen = range(len(trajectory.steps)) if chosen is None else chosen
    drawn, losses = learning.step_noise == "drawn", []
    for index in chosen:
        at, x_t = model.ddim[index], trajectory.latents[index]
        loud = 1 if drawn else 1 / at.loudness_in_velocity
        mean = at.mean(x_t, predicted(model, trajectory, index, learning))
        if drawn:
            gain = pixel_log_prob(trajectory.latents[index + 1], mean, at.sigma)
        else:
            gain = (wanted_way(model, trajectory, index) * mean / at.sigma).sum(1)
        losses.append((-loud * credit * gain).mean())
        if learning.hold:
            with torch.no_grad(), without_lora(model):
                base = at.mean(x_t, predicted(model, trajectory, index))
            kl = kl_divergence(Normal(mean, at.sigma), Normal(base, at.sigma)).sum(1)
            losses.append((learning.hold * loud**2 * hold_map * kl).mean())
    return sum(losses) / len(chosen)


@torch.no_grad()
def wanted_way(model, trajectory, index: int) -> torch.Tensor:
    """From the step's mean without guidance to that of the posterior given the finished picture
    (Ho et al., arXiv 2006.11239, Eq. 7), of root mean square 1 over each image."""
    at, x_t, x_0 = model.ddim[index], trajectory.latents[index], trajectory.latents[-1]
    kept = at.alpha / at.alpha_prev
    wanted = (at.alpha_prev**0.5 * (1 - kept) * x_0 + kept**0.5 * (1 - at.alpha_prev) * x_t) / (
        1 - at.alpha
    )
    out = model.predict(x_t, at.t.expand(IMAGES), trajectory.cond)
    way = wanted - at.mean(x_t, out)
    return way / way.square().mean((1, 2, 3), keepdim=True).sqrt()


def assert_same(one: dict, other: dict, rtol: float = 1e-6) -> None:
    """Equal up to `rtol` of each tensor's largest entry, which must not be zero."""
    assert one.keys() == other.keys()
    for name in one:
        largest = other[name].abs().max().item()
        assert largest > 0
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("hold", [0.0, 0.7])
@pytest.mark.parametrize("step_noise", ["drawn", "expected"])
def test_the_closed_form_is_the_gradient_of_the_explicit_loss(
    prediction_type, guidance_scale, hold, step_noise
):
    model, trajectory = small(prediction_type, guidance_scale)
    learning = replace(PAPER, step_noise=step_noise, hold=hold)
    arguments = model, trajectory, credits(), learning, shares()
    loss = explicit_loss(*arguments)
    assert_same(
        closed_form(*arguments[:4], hold_map=arguments[4]), by_autograd(loss, model.parameters)
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("hold", [0.0, 0.7])
@pytest.mark.parametrize("step_noise", ["drawn", "expected"])
def test_detached_is_the_explicit_loss_with_a_constant_unconditional_half(
    prediction_type, guidance_scale, hold, step_noise
):
    model, trajectory = small(prediction_type, guidance_scale)
    learning = replace(PAPER, unconditional="detached", hold=hold, step_noise=step_noise)
    loss = explicit_loss(model, trajectory, credits(), learning)
    detached = closed_form(model, trajectory, credits(), learning)
    assert_same(detached, by_autograd(loss, model.parameters))
    exact = closed_form(model, trajectory, credits(), replace(learning, unconditional="exact"))
    alike = torch.allclose(detached["text"], exact["text"], rtol=1e-3)
    assert alike == (guidance_scale == 1)


@pytest.mark.parametrize(("share", "count"), [(1.0, 8), (0.75, 6), (0.5, 4), (0.3, 2), (0.01, 1)])
@pytest.mark.parametrize("hold", [0.0, 0.7])
def test_a_share_of_the_steps_is_the_explicit_loss_over_those_steps(share, count, hold):
    learning = replace(PAPER, timesteps=share, hold=hold)
    spy, seen = table(steps=8)

    def drawn(seed):
        return torch.Generator().manual_seed(seed)

    touched = closed_form(spy, seen, credits(), learning, generator=drawn(1))["out"]
    chosen = touched.flatten(1).any(1).nonzero().flatten().tolist()
    assert len(chosen) == count
    model, trajectory = small(steps=8)
    loss = explicit_loss(model, trajectory, credits(), learning, chosen=chosen)
    gradient = closed_form(model, trajectory, credits(), learning, generator=drawn(1))
    assert_same(gradient, by_autograd(loss, model.parameters))


def test_the_drawn_steps_depend_on_the_generator():
    model, trajectory = table(steps=8)
    arguments = model, trajectory, credits(), replace(PAPER, timesteps=0.5)

    def chosen(seed):
        gradient = closed_form(*arguments, generator=torch.Generator().manual_seed(seed))
        return tuple(gradient["out"].flatten(1).any(1).tolist())

    assert chosen(0) == chosen(0)
    assert len({chosen(seed) for seed in range(8)}) > 3


def test_drawing_steps_without_a_generator_is_refused():
    model, trajectory = small()
    with pytest.raises(SettingError, match="timesteps is 0.5.*generator"):
        closed_form(model, trajectory, credits(), replace(PAPER, timesteps=0.5))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), largest=st.integers(1, 13))
def test_the_cotangent_is_minus_credit_times_noise_times_slope_over_sigma(seed, largest):
    model, trajectory = table()
    model._largest["learn"] = largest
    credit = credits(seed=seed)
    ratio = -model.ddim.loudness.view(-1, 1, 1, 1, 1)  # more noise in the image, less in x_prev
    count = STEPS * IMAGES * H * W
    expected = -ratio * credit[None, :, None] * trajectory.noise / count
    cotangent = closed_form(model, trajectory, credit, PAPER)
    assert_same(cotangent, {"out": expected})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_as_drawn_late_steps_are_loudest_and_by_the_expected_noise_all_are_alike_in_v(kind):
    model, trajectory = table(steps=50, kind=kind)
    ones = torch.ones(IMAGES, H, W, dtype=torch.float64)
    drawn, expected = (
        closed_form(model, trajectory, ones, learning)["out"].square().mean((2, 3, 4)).sqrt()
        for learning in (PAPER, EXPECTED)
    )  # (T, B)
    assert (drawn.argmax(0) == 48).all()
    # dJ / d out = dJ / d v * d v / d out, and v = (noise - sqrt(1 - alpha) x_t) / sqrt(alpha).
    in_v = expected * model.ddim.alpha[:, None] ** 0.5 if kind == "epsilon" else expected
    torch.testing.assert_close(in_v, in_v[:1, :1].expand(50, IMAGES))
    assert in_v[0, 0].item() == pytest.approx(1 / (50 * IMAGES * H * W))


def everywhere(steps, images) -> tuple[torch.Tensor, ...]:
    """All pairs, each as much as any other."""
    step, image = torch.cartesian_prod(torch.arange(len(steps)), torch.arange(images)).unbind(1)
    return step, image, torch.ones(len(step), 1, 1, 1, dtype=steps.w.dtype)


class SaidAsNoise(SmallModel):
    """A network that predicts v, which says it as noise."""

    def predict(self, x_t, t, *rest):
        alpha = self.ddim.alpha[(t[:, None] == self.ddim.t).nonzero()[:, 1]].view(-1, 1, 1, 1)
        return alpha**0.5 * super().predict(x_t, t, *rest) + (1 - alpha) ** 0.5 * x_t


@pytest.mark.parametrize("strength", [0.0, 0.05])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("recipe", [PAPER, EXPECTED], ids=["drawn", "expected"])
@pytest.mark.parametrize("unconditional", ["exact", "detached"])
def test_it_is_all_one_whether_a_network_says_v_or_the_noise(
    unconditional, recipe, guidance_scale, strength, monkeypatch
):
    """Measured at the same pairs; which ones is the one thing that depends on what it says."""
    monkeypatch.setattr(sys.modules["pxpo.update"], "_measured_pairs", everywhere)
    learning = replace(recipe, strength=strength, unconditional=unconditional, hold=0.1)
    found = []
    for kind, network in (("v_prediction", SmallModel), ("epsilon", SaidAsNoise)):
        model = network(ddim(kind=kind))
        for parameter in model.parameters.values():
            parameter.data *= 0.1  # not too far from the base
        trajectory = sampled(model, double(IMAGES, TOKENS, WIDTH, seed=7), guidance_scale)
        optimizer = sgd(model)
        report = finish(update(model, model.parameters, optimizer, trajectory, credits(), learning))
        found.append((report, model.parameters, trajectory.latents))
    (one, learnt, walked), (other, learnt_too, walked_too) = found
    torch.testing.assert_close(walked, walked_too)
    assert vars(one) == pytest.approx(vars(other), rel=1e-6)
    assert_same(learnt, learnt_too)


@pytest.mark.parametrize("learning", [PAPER, EXPECTED], ids=["drawn", "expected"])
def test_a_pixel_without_reward_has_no_gradient_and_speaks_for_no_other(learning):
    model, trajectory = table()
    credit = torch.zeros(IMAGES, H, W, dtype=torch.float64)
    credit[1, 2, 3] = 5.0
    cotangent = closed_form(model, trajectory, credit, learning)["out"]
    assert (cotangent[:, 1, :, 2, 3] != 0).all()
    assert cotangent.count_nonzero() == STEPS * C


def test_the_explicit_loss_has_no_cross_talk_between_pixels_either():
    at, credit = ddim()[1], credits()
    credit[:, 0, 4] = credit[2] = 0
    mean = double(IMAGES, C, H, W, seed=1).requires_grad_()
    x_prev = double(IMAGES, C, H, W, seed=2)
    loss = -(credit * pixel_log_prob(x_prev, mean, at.sigma)).mean()
    (gradient,) = torch.autograd.grad(loss, mean)
    assert torch.equal(gradient != 0, (credit != 0)[:, None].expand_as(gradient))


def test_a_uniform_map_gives_the_gradient_of_ddpo():
    model, trajectory = small()
    reward = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    losses = []
    for index in range(STEPS):
        at = model.ddim[index]
        mean = at.mean(trajectory.latents[index], predicted(model, trajectory, index))
        log_prob = Normal(mean, at.sigma).log_prob(trajectory.latents[index + 1]).sum((1, 2, 3))
        losses.append(-(reward * log_prob).mean())
    ddpo = by_autograd(sum(losses) / STEPS / (H * W), model.parameters)
    uniform = reward.view(-1, 1, 1).expand(IMAGES, H, W)
    assert_same(closed_form(model, trajectory, uniform, PAPER), ddpo)
    image_credit = smooth(uniform + credits() - credits().mean((1, 2), keepdim=True), float("inf"))
    assert_same(closed_form(model, trajectory, image_credit, PAPER), ddpo)


@pytest.mark.parametrize("scale", [-3.0, 1e-9, 1e6])
def test_the_gradient_is_proportional_to_the_reward(scale):
    model, trajectory = small()
    once = closed_form(model, trajectory, credits(), EXPECTED)
    scaled = closed_form(model, trajectory, scale * credits(), EXPECTED)
    assert_same(scaled, {name: scale * gradient for name, gradient in once.items()})


def test_the_gradients_of_two_rewards_add_up():
    model, trajectory = small()
    one, other = credits(seed=1), credits(seed=2)
    first, second, both = (
        closed_form(model, trajectory, credit, PAPER) for credit in (one, other, one + other)
    )
    assert_same(both, {name: first[name] + second[name] for name in both})


@pytest.mark.parametrize("hold", [0.0, 0.7])
def test_no_reward_leaves_only_the_hold(hold):
    model, trajectory = small()
    nothing, learning = torch.zeros(IMAGES, H, W, dtype=torch.float64), replace(PAPER, hold=hold)
    gradient = closed_form(model, trajectory, nothing, learning)
    if hold:
        loss = explicit_loss(model, trajectory, nothing, learning)
        assert_same(gradient, by_autograd(loss, model.parameters))
    else:
        assert not any(value.any() for value in gradient.values())


def test_hold_pulls_only_where_the_map_is_silent():
    model, trajectory = table()
    hold_map = torch.zeros(IMAGES, H, W, dtype=torch.float64)
    hold_map[2, 1, 4] = 0.5
    learning, nothing = replace(PAPER, hold=1.0), torch.zeros_like(hold_map)
    pull = closed_form(model, trajectory, nothing, learning, hold_map=hold_map)["out"]
    assert (pull[:, 2, :, 1, 4] * model.parameters["out"][:, 2, :, 1, 4] > 0).all()
    assert pull.count_nonzero() == STEPS * C


def test_the_report_holds_the_norm_and_the_mean_divergence_where_the_map_is_silent():
    model, trajectory = small()
    hold_map, learning = shares(), replace(PAPER, hold=0.3)
    report = finish(
        accumulate_gradient(
            model, model.parameters, trajectory, credits(), learning, hold_map=hold_map
        )
    )
    gradient = torch.cat([p.grad.flatten() for p in model.parameters.values()])
    assert report.norm == pytest.approx(gradient.norm().item())
    divergences = explicit_loss(model, trajectory, 0 * hold_map, replace(PAPER, hold=1.0), hold_map)
    assert report.kl == pytest.approx((divergences / hold_map.mean()).item())


def test_the_divergence_is_not_computed_without_a_hold():
    model, trajectory = small()
    model.disable_adapters = lambda: pytest.fail("the base model was asked")
    arguments = model, model.parameters, trajectory, credits(), PAPER
    assert finish(accumulate_gradient(*arguments)).kl == 0


def test_a_last_step_without_noise_is_left_out():
    model, trajectory = small(set_alpha_to_one=True)
    assert trajectory.steps.sigma[-1] == 0
    learning = replace(PAPER, hold=0.7)
    gradient = closed_form(model, trajectory, credits(), learning)
    assert all(torch.isfinite(value).all() for value in gradient.values())
    loss = explicit_loss(model, trajectory, credits(), learning, chosen=range(STEPS - 1))
    assert_same(gradient, by_autograd(loss, model.parameters))


def test_a_schedule_without_any_noise_is_refused():
    model, trajectory = small(steps=1, set_alpha_to_one=True)
    with pytest.raises(SettingError, match="sigma = 0.*eta > 0"):
        closed_form(model, trajectory, credits(), PAPER)


@pytest.mark.parametrize("shape", [(IMAGES, W, H), (IMAGES + 1, H, W), (H, W)])
def test_maps_of_another_shape_are_refused(shape):
    model, trajectory = small()
    wanted = rf"these images need \({IMAGES}, {H}, {W}\)"
    with pytest.raises(RewardError, match=f"credit.*{wanted}"):
        closed_form(model, trajectory, credits(*shape), PAPER)
    with pytest.raises(RewardError, match=f"hold_map.*{wanted}"):
        closed_form(model, trajectory, credits(), PAPER, hold_map=shares(*shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_are_refused(value):
    model, trajectory = small()
    credit = credits()
    credit[0, 0, 0] = value
    with pytest.raises(RewardError, match="credit.*not finite"):
        closed_form(model, trajectory, credit, PAPER)


def test_progress_counts_the_pairs_of_step_and_image():
    model, trajectory = small()
    events = list(accumulate_gradient(model, model.parameters, trajectory, credits(), PAPER))
    assert [event.done for event in events] == [5, 10, 12]
    assert {(event.phase, event.total) for event in events} == {("learning", 12)}


@pytest.mark.parametrize("largest", [1, 3, 100])
@pytest.mark.parametrize("learning", [PAPER, replace(EXPECTED, hold=0.5)], ids=["paper", "hold"])
def test_the_gradient_does_not_depend_on_the_chunks(largest, learning):
    model, trajectory = small()
    arguments = model, trajectory, credits(), learning
    expected = closed_form(*arguments, hold_map=shares())
    model._largest["learn"] = largest
    assert_same(closed_form(*arguments, hold_map=shares()), expected, rtol=1e-12)


@pytest.mark.parametrize("fails", ["with the LoRA", "with the base model"])
def test_running_out_of_memory_halves_the_chunk_and_changes_nothing_else(fails):
    model, trajectory = small()
    arguments = model, trajectory, credits(), replace(EXPECTED, hold=0.5)
    expected = closed_form(*arguments)
    predict, sizes = model.predict, []

    def predict_or_fail(x_t, *rest):
        if len(x_t) > 2 and model.lora == (fails == "with the LoRA"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(x_t))
        return predict(x_t, *rest)

    model.predict = predict_or_fail
    assert_same(closed_form(*arguments), expected, rtol=1e-12)
    assert model._largest[{"with the LoRA": "learn", "with the base model": "sample"}[fails]] == 2
    assert model.lora == 1.0
    assert sizes[-6:] == [2] * 6 if fails == "with the LoRA" else 2 in sizes


def test_running_out_of_memory_with_a_single_image_is_an_error_to_show():
    model, trajectory = small()

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.predict = fail
    with pytest.raises(PxpoError, match="memory.*single image"):
        closed_form(model, trajectory, credits(), PAPER)


def sgd(model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters.values(), lr=0.1)


def copies(parameters) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@pytest.mark.parametrize("learning", [PAPER, replace(EXPECTED, hold=0.7)], ids=["paper", "hold"])
def test_without_a_strength_an_update_is_one_step_of_the_optimizer_bit_for_bit(learning):
    model, trajectory = small()
    before = copies(model.parameters)
    gradient = closed_form(model, trajectory, credits(), learning)
    sgd(model).step()  # along the gradient that the closed form left
    stepped = copies(model.parameters)
    with torch.no_grad():
        for name, parameter in model.parameters.items():
            parameter.copy_(before[name])
    report = finish(update(model, model.parameters, sgd(model), trajectory, credits(), learning))
    norm = torch.cat([value.flatten() for value in gradient.values()]).norm().item()
    assert report.grad_norm == pytest.approx(norm)
    assert (report.kl > 0) == (learning.hold > 0)
    for name, parameter in model.parameters.items():
        assert torch.equal(parameter, stepped[name])
        expected = before[name] - 0.1 * gradient[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("strength", [0.003, 0.03, 0.2])
def test_an_update_changes_what_the_model_says_by_its_strength_whatever_the_rate(rate, strength):
    model, trajectory = small()
    before, learning = copies(model.parameters), replace(EXPECTED, strength=strength)
    direction = closed_form(model, trajectory, credits(), learning)
    optimizer = torch.optim.SGD(model.parameters.values(), lr=rate)
    report = finish(update(model, model.parameters, optimizer, trajectory, credits(), learning))
    assert strength / NEAR <= report.moved <= strength * NEAR
    shares = {
        name: (parameter.detach() - before[name]) / direction[name]
        for name, parameter in model.parameters.items()
    }
    size = shares["pixel"].mean()
    assert size < 0  # and along the gradient, as the optimizer wanted it
    for share in shares.values():
        torch.testing.assert_close(share, size.expand_as(share), rtol=1e-5, atol=0)


STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def measured(model, trajectory, now, before, pairs=None) -> float:
    """The root mean square of what changed in v, over that of what was: at these pairs, each as
    much as any other, or at the eight of which half go by w^2, each counting the less for it."""
    density = torch.ones(STEPS)
    if pairs is None:
        loud = model.ddim.steps.w.square()
        density = (1 + loud / loud.mean()) / 2
        middles = [(number + 0.5) / 8 * STEPS for number in range(8)]
        steps = [int((density.cumsum(0) < middle).sum()) for middle in middles]
        pairs = [(step, number % IMAGES) for number, step in enumerate(steps)]
    now, before = (
        torch.stack([model.ddim[i].velocity(trajectory.latents[i], out[i]) for i in range(STEPS)])
        for out in (now, before)
    )
    change = sum(
        (now[step, image] - before[step, image]).square().sum() / density[step]
        for step, image in pairs
    )
    was = sum(before[step, image].square().sum() / density[step] for step, image in pairs)
    return (change / was).sqrt().item()


@torch.no_grad()
def said_now(model, trajectory) -> torch.Tensor:
    """What the model says now, guided, at every step of every image: (T, B, C, h, w)."""
    exact = replace(PAPER, unconditional="exact")
    return torch.stack([predicted(model, trajectory, i, exact) for i in range(STEPS)])


@pytest.mark.parametrize("unconditional", ["exact", "detached"])
def test_what_an_update_moved_is_measured_with_guidance_at_eight_pairs(unconditional):
    """Of all steps and of all images."""
    model, trajectory = small()
    assert STEPS * IMAGES > MEASURED == 8
    learning = replace(EXPECTED, strength=0.05, unconditional=unconditional)
    report = finish(update(model, model.parameters, sgd(model), trajectory, credits(), learning))
    now = said_now(model, trajectory)
    model.disable_adapters()
    base = said_now(model, trajectory)
    model.enable_adapters()
    said = trajectory.outputs
    assert report.moved == pytest.approx(measured(model, trajectory, now, said))
    assert report.from_base == pytest.approx(measured(model, trajectory, now, base))
    all_pairs = [(step, image) for step in range(STEPS) for image in range(IMAGES)]
    assert report.moved != pytest.approx(measured(model, trajectory, now, said, all_pairs))
    assert report.from_base > 2 * report.moved  # it was far from there before


@pytest.mark.parametrize(
    ("steps", "images", "pairs"),
    [
        (4, 3, [(0, 0), (0, 1), (1, 2), (1, 0), (2, 1), (2, 2), (3, 0), (3, 1)]),
        (1, 1, [(0, 0)]),
        (2, 3, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]),
        (20, 1, [(1, 0), (3, 0), (6, 0), (8, 0), (11, 0), (13, 0), (16, 0), (18, 0)]),
        (50, 4, [(3, 0), (9, 1), (15, 2), (21, 3), (28, 0), (34, 1), (40, 2), (46, 3)]),
    ],
)
def test_of_a_network_that_says_v_the_middles_of_equal_shares_of_the_steps_are_measured(
    steps, images, pairs
):
    step, image, weight = _measured_pairs(ddim(steps, "v_prediction").steps, images)
    assert list(zip(step.tolist(), image.tolist(), strict=True)) == pairs
    torch.testing.assert_close(weight, torch.ones_like(weight))


@pytest.mark.parametrize("steps", [20, 50, 100])
def test_of_a_network_that_says_noise_the_loud_steps_are_measured_more_and_count_less(steps):
    """Eight pairs speak for all: for a change of the output, w times as large in v, and for v."""
    of_all = ddim(steps, **STABLE_DIFFUSION).steps
    step, image, weight = _measured_pairs(of_all, 4)
    assert len(step) == MEASURED and image.tolist() == [0, 1, 2, 3] * 2
    weight, w = weight.flatten(), of_all.w
    change = (weight * w[step]).square().mean() / weight.square().mean()
    assert change.sqrt().item() == pytest.approx(w.square().mean().sqrt().item(), rel=0.01)
    parts = (weight * w[step]).square()
    assert parts.max() < parts.sum() / 4  # none decides alone


def test_measuring_is_folded_into_memory_and_changes_nothing():
    reports = []
    for largest in (64, 3, 1):
        model, trajectory = small()
        model._largest["sample"] = largest
        learning = replace(EXPECTED, strength=0.05)
        reports.append(
            finish(update(model, model.parameters, sgd(model), trajectory, credits(), learning))
        )
    for report in reports[1:]:
        assert vars(report) == pytest.approx(vars(reports[0]))


def test_an_update_tells_of_learning_and_then_of_measuring():
    model, trajectory = small()
    learning = replace(EXPECTED, strength=0.05)
    work = update(model, model.parameters, sgd(model), trajectory, credits(), learning)
    phases = [event.phase for event in work]
    assert phases[:3] == ["learning"] * 3 and set(phases[3:]) == {"measuring"}


@pytest.mark.parametrize("strength", [0.0, 0.03])
def test_a_step_that_nothing_finite_comes_of_is_not_taken(strength):
    model, trajectory = small()
    before, predict = copies(model.parameters), model.predict

    def broken(*arguments):
        """What it learns from is finite, and what it says after the step is not."""
        out = predict(*arguments)
        return out if torch.is_grad_enabled() else out * float("nan")

    model.predict = broken
    learning = replace(PAPER, strength=strength)
    with pytest.raises(DivergedError, match="No size of this update"):
        finish(update(model, model.parameters, sgd(model), trajectory, credits(), learning))
    assert all(torch.equal(p, before[name]) for name, p in model.parameters.items())


def test_an_update_makes_the_rewarded_more_likely():
    model, trajectory = small()
    before = explicit_loss(model, trajectory, credits(), PAPER)
    optimizer = torch.optim.SGD(model.parameters.values(), lr=1e-4)
    finish(update(model, model.parameters, optimizer, trajectory, credits(), PAPER))
    assert explicit_loss(model, trajectory, credits(), PAPER) < before


def test_a_gradient_that_is_not_finite_changes_nothing():
    model, trajectory = small()
    noise = trajectory.noise.clone()
    noise[1, 1, 0, 0, 0] = float("nan")
    before = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
    optimizer = torch.optim.AdamW(model.parameters.values(), lr=0.1)
    broken = replace(trajectory, noise=noise)
    with pytest.raises(DivergedError, match="norm is nan.*not taken.*lower strength"):
        finish(update(model, model.parameters, optimizer, broken, credits(), PAPER))
    for name, parameter in model.parameters.items():
        assert torch.equal(parameter, before[name])
    assert not optimizer.state


def overflowing(model, dtype: torch.dtype, largest: float = math.inf) -> list[float]:
    """Let what is sent back to the model be infinite beyond `largest`, as in half precision; the
    largest that is sent back in each chunk."""
    predict, sent = model.predict, []

    def hear(gradient):
        sent.append(gradient.abs().max().item())
        return torch.where(gradient.abs() > largest, math.inf, gradient)

    def predict_and_hear(*arguments):
        out = predict(*arguments)
        if out.requires_grad:
            out.register_hook(hear)
        return out

    model.predict, model.dtype = predict_and_hear, dtype
    return sent


HALF_OF_STEPS = replace(PAPER, timesteps=0.5, hold=0.5)


def learnt_from(model, trajectory) -> tuple[dict[str, torch.Tensor], float]:
    """The gradient of half of the steps, which are drawn, and its divergence."""
    drawn = torch.Generator().manual_seed(1)
    arguments = model, model.parameters, trajectory, credits(), HALF_OF_STEPS
    found = finish(accumulate_gradient(*arguments, generator=drawn))
    return {name: p.grad.clone() for name, p in model.parameters.items()}, found.kl


def test_what_leaves_the_range_of_half_precision_is_sent_back_smaller():
    model, trajectory = small()
    sent = overflowing(model, torch.float16)
    expected, kl = learnt_from(model, trajectory)
    assert len(sent) == 2  # chunks of 5 and of 1
    narrow, _ = small()
    again = overflowing(narrow, torch.float16, largest=max(sent) / 100)
    found, same_kl = learnt_from(narrow, trajectory)
    assert again == [value / 16**tried for tried in range(3) for value in sent]
    assert same_kl == kl
    assert all(torch.equal(found[name], expected[name]) for name in expected)  # of the same steps


@pytest.mark.parametrize(
    ("dtype", "tries"), [(torch.float16, TRIES), (torch.bfloat16, 1), (torch.float32, 1)]
)
def test_what_never_comes_into_range_is_not_taken(dtype, tries):
    model, trajectory = small()
    before = copies(model.parameters)
    sent = overflowing(model, dtype, largest=0.0)
    with pytest.raises(DivergedError, match="norm is (nan|inf).*not taken"):
        finish(update(model, model.parameters, sgd(model), trajectory, credits(), PAPER))
    assert len(sent) == 3 * tries  # chunks of 5, 5 and 2
    assert all(torch.equal(p, before[name]) for name, p in model.parameters.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_network_says_in_which_precision_it_computes(dtype):
    """Also with a LoRA, which is always in single precision."""
    model = StableDiffusion(random_pipeline().to(dtype), "cpu", "random")
    with adapter(model, new_lora(model, 2, 0)) as parameters:
        assert model.network.dtype == dtype
        assert {p.dtype for p in parameters.values()} == {torch.float32}


@pytest.fixture(params=["epsilon", "v_prediction"])
def real_model(request):
    model = StableDiffusion(random_pipeline(request.param), "cpu", "random")
    model.ddim = Ddim.of(model.scheduler, STEPS, kind=request.param)
    return model


def real_trajectory(model, guidance_scale: float) -> Trajectory:
    noise = [Noise(0), Noise(1), Noise(2, 3)]
    sampling = Sampling(steps=STEPS, guidance_scale=guidance_scale)
    return finish(rollout(model, ["a", "b c", "z"], noise, sampling))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "learning",
    [PAPER, replace(EXPECTED, hold=0.5), replace(PAPER, unconditional="detached")],
    ids=["paper", "hold", "detached"],
)
def test_the_closed_form_is_the_gradient_of_the_explicit_loss_for_a_unet(
    real_model, guidance_scale, learning
):
    credit, hold_map = credits(3, 8, 8).float(), shares(3, 8, 8).float()
    with adapter(real_model, random_lora(real_model)) as parameters:
        trajectory = real_trajectory(real_model, guidance_scale)
        loss = explicit_loss(real_model, trajectory, credit, learning, hold_map)
        expected = by_autograd(loss, parameters)
        options = {"parameters": parameters, "hold_map": hold_map}
        actual = closed_form(real_model, trajectory, credit, learning, **options)
        real_model._largest["learn"] = 5
        in_chunks = closed_form(real_model, trajectory, credit, learning, **options)
    assert_same(actual, expected, rtol=2e-3)
    assert_same(in_chunks, actual, rtol=1e-3)


def test_running_out_of_memory_leaves_the_lora_of_a_unet_attached(real_model, monkeypatch):
    credit, learning = credits(3, 8, 8).float(), replace(EXPECTED, hold=0.5)
    with adapter(real_model, random_lora(real_model)) as parameters:
        arguments = real_model, real_trajectory(real_model, 2.0), credit, learning
        expected = closed_form(*arguments, parameters=parameters)
        predict = real_model.predict

        def predict_or_fail(x_t, *rest):
            if len(x_t) > 7 and not torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return predict(x_t, *rest)

        monkeypatch.setattr(real_model, "predict", predict_or_fail)
        assert_same(closed_form(*arguments, parameters=parameters), expected, rtol=1e-3)
    assert real_model._largest["learn"] == 4


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("rate", [1e-4, 1e-1])
def test_what_an_update_of_a_unet_moved_is_what_one_sees_from_outside(
    real_model, guidance_scale, rate
):
    learning = replace(EXPECTED, strength=0.03, hold=0.1, unconditional="detached")
    lora = random_lora(real_model)
    with adapter(real_model, lora) as parameters:
        trajectory = real_trajectory(real_model, guidance_scale)
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate)
        work = update(
            real_model, parameters, optimizer, trajectory, credits(3, 8, 8).float(), learning
        )
        report = finish(work)
        learnt = replace(lora, weights=weights_of(parameters))
    base = said_now(real_model, trajectory)
    with adapter(real_model, learnt):
        now = said_now(real_model, trajectory)
    with adapter(real_model, lora):
        before = said_now(real_model, trajectory)
    assert 0.03 / NEAR <= report.moved <= 0.03 * NEAR
    assert report.moved == pytest.approx(measured(real_model, trajectory, now, before), rel=1e-3)
    assert report.from_base == pytest.approx(measured(real_model, trajectory, now, base), rel=1e-3)
    assert report.from_base > 2 * report.moved


def test_a_first_update_has_moved_as_far_from_the_base_as_it_moved(model):
    with adapter(model, new_lora(model, 2, 0)) as parameters:
        trajectory = real_trajectory(model, 2.0)
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
        credit, learning = credits(3, 8, 8).float(), replace(EXPECTED, strength=0.03)
        report = finish(update(model, parameters, optimizer, trajectory, credit, learning))
    assert report.from_base == pytest.approx(report.moved, rel=1e-3)


@pytest.mark.parametrize("strength", [0.0, 0.03])
def test_an_update_of_a_unet_changes_the_lora_alone(model, strength):
    base = [value.clone() for value in bare_weights(model)]
    lora = random_lora(model)
    learning = replace(EXPECTED, strength=strength, hold=0.1)
    with adapter(model, lora) as parameters:
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
        trajectory = real_trajectory(model, 2.0)
        credit = credits(3, 8, 8).float()
        finish(update(model, parameters, optimizer, trajectory, credit, learning))
        learnt = weights_of(parameters)
    assert all(not torch.equal(learnt[name], lora.weights[name]) for name in learnt)
    assert all(map(torch.equal, bare_weights(model), base))


def test_the_noise_of_a_trajectory_is_that_of_its_log_probability(real_model):
    trajectory = real_trajectory(real_model, 2.0)
    for index in range(STEPS):
        at, x_t = trajectory.steps[index], trajectory.latents[index]
        with torch.no_grad():
            out = predicted(real_model, trajectory, index)
        torch.testing.assert_close(out, trajectory.outputs[index], rtol=1e-4, atol=1e-5)
        z = (trajectory.latents[index + 1] - at.mean(x_t, out)) / at.sigma
        torch.testing.assert_close(z, trajectory.noise[index], rtol=1e-3, atol=1e-3)


def test_a_step_that_leads_to_noise_is_not_taken(monkeypatch):
    model, trajectory = small()
    before, learning = copies(model.parameters), replace(EXPECTED, strength=0.05)
    work = update(model, model.parameters, sgd(model), trajectory, credits(), learning)
    monkeypatch.setattr(sys.modules["pxpo.update"], "NOISE", 0.01)
    with pytest.raises(DivergedError, match="pictures turn to noise"):
        finish(work)
    assert all(torch.equal(p, before[name]) for name, p in model.parameters.items())
