"""A step's size is what it changes: measured, scaled until it is met, and never left broken."""

import math

import pytest
import torch

from pxpo.errors import DivergedError
from pxpo.progress import finish
from pxpo.strength import NEAR, TRIES, relative_change, scale_step


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def linear(weights: list[torch.Tensor]) -> torch.Tensor:
    """A network of no bend at all."""
    return double(7, 5, seed=1) @ weights[0] + double(7, 3, seed=2) @ weights[1]


def bent(weights: list[torch.Tensor]) -> torch.Tensor:
    """One that answers a step eight times as large with a change that is nowhere near that."""
    return torch.tanh(2 * linear(weights)) + 0.3 * linear(weights) ** 3


class Toy:
    """A network's parameters before and after a step, and what it says now."""

    def __init__(self, network=linear, length: float = 1.0) -> None:
        self.network = network
        self.before = [double(5, 2, seed=3), double(3, 2, seed=4)]
        self.steps = [length * double(5, 2, seed=5), length * double(3, 2, seed=6)]
        self.parameters = [b + s for b, s in zip(self.before, self.steps, strict=True)]
        self.said = network(self.before)
        self.measured = []

    def measure(self) -> float:
        self.measured.append(relative_change(self.network(self.parameters), self.said))
        return self.measured[-1]

    def scale(self, strength: float, measure=None) -> float:
        return finish(scale_step(self.parameters, self.before, measure or self.measure, strength))

    def taken(self) -> torch.Tensor:
        """What share of the step was taken, by each number of each parameter."""
        pairs = zip(self.parameters, self.before, self.steps, strict=True)
        return torch.cat([((now - old) / step).flatten() for now, old, step in pairs])


def test_the_relative_change_is_the_root_mean_square_of_what_changed_over_that_of_what_was():
    before = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    assert relative_change(before, before) == 0
    assert relative_change(1.1 * before, before) == pytest.approx(0.1)
    assert relative_change(-before, before) == pytest.approx(2)
    assert relative_change(before + torch.tensor([0.0, 1.0]), before) == pytest.approx(
        math.sqrt((2 / 4) / (25 / 4))
    )
    now, before = double(2, 3, 4), double(2, 3, 4, seed=1)
    expected = ((now - before) ** 2).mean().sqrt() / (before**2).mean().sqrt()
    assert relative_change(now, before) == pytest.approx(expected.item())
    assert relative_change(now, before) != pytest.approx(relative_change(before, now))


@pytest.mark.parametrize("network", [linear, bent])
@pytest.mark.parametrize("length", [1e-4, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("strength", [0.001, 0.03, 0.5])
def test_the_change_is_what_was_asked_for_whatever_the_step_was(network, length, strength):
    toy = Toy(network, length)
    moved = toy.scale(strength)
    assert strength / NEAR <= moved <= strength * NEAR
    now = relative_change(toy.network(toy.parameters), toy.said)
    assert now == moved
    taken = toy.taken()  # the direction is the optimizer's
    torch.testing.assert_close(taken, taken[:1].expand_as(taken), rtol=1e-6, atol=0)
    assert taken[0] > 0


def test_a_linear_answer_is_met_at_the_second_measurement():
    toy = Toy(linear, 0.7)
    toy.scale(0.03)
    assert len(toy.measured) == 2
    assert toy.measured[1] == pytest.approx(0.03, rel=1e-6)
    assert toy.taken()[0].item() == pytest.approx(0.03 / toy.measured[0])


def test_a_step_that_is_near_already_is_left_as_it_is():
    for factor, near in ((1.14, True), (0.88, True), (1.16, False), (0.86, False)):
        toy = Toy(linear, 0.1)
        kept = [parameter.clone() for parameter in toy.parameters]
        change = relative_change(linear(toy.parameters), toy.said)
        moved = toy.scale(change / factor)
        alike = all(torch.equal(a, b) for a, b in zip(toy.parameters, kept, strict=True))
        assert alike == near == (moved == change) == (len(toy.measured) == 1)


@pytest.mark.parametrize("length", [1e-4, 1.0, 1e4])
def test_without_a_strength_the_optimizer_s_step_stays_bit_for_bit(length):
    toy = Toy(bent, length)
    kept = [parameter.clone() for parameter in toy.parameters]
    moved = toy.scale(0.0)
    assert moved == toy.measured[0] and len(toy.measured) == 1
    assert all(torch.equal(a, b) for a, b in zip(toy.parameters, kept, strict=True))


@pytest.mark.parametrize("strength", [0.0, 0.03])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_change_that_is_not_finite_halves_the_step(strength, broken):
    toy, answers = Toy(linear), [broken, broken, broken]

    def measure() -> float:
        shares.append(toy.taken()[0].item())
        return answers.pop() if answers else toy.measure()

    shares = []
    moved = toy.scale(strength, measure)
    assert shares[:4] == pytest.approx([1.0, 0.5, 0.25, 0.125])
    assert math.isfinite(moved) and moved == toy.measured[-1]
    if strength:
        assert moved == pytest.approx(strength, rel=1e-6) and len(shares) == 5
    else:
        assert toy.taken()[0].item() == pytest.approx(0.125) and len(shares) == 4


@pytest.mark.parametrize("strength", [0.0, 0.03])
def test_a_step_that_overflows_is_made_small_enough_to_be_measured(strength):
    """As half precision does: what is too large for it is infinite."""
    toy = Toy(lambda weights: (3e3 * linear(weights)).half().double(), length=40.0)
    moved = toy.scale(strength)
    assert not math.isfinite(toy.measured[0])
    assert math.isfinite(moved) and moved == toy.measured[-1]
    assert not strength or strength / NEAR <= moved <= strength * NEAR


@pytest.mark.parametrize("strength", [0.0, 0.03])
@pytest.mark.parametrize("answer", [math.nan, math.inf])
def test_when_no_size_helps_the_parameters_are_exactly_as_before(strength, answer):
    toy, asked = Toy(), []

    def measure() -> float:
        asked.append(1)
        return answer

    wanted = f"a change of {strength:g}" if strength else "a change that is finite"
    with pytest.raises(DivergedError, match=f"No size of this update.*gives {wanted}.*LoRA is as"):
        toy.scale(strength, measure)
    assert len(asked) == TRIES
    assert all(torch.equal(a, b) for a, b in zip(toy.parameters, toy.before, strict=True))


@pytest.mark.parametrize(("answer", "size"), [(0.0, 0.5), (0.3, 0.1), (0.01, 3.0)])
def test_an_answer_that_stays_away_from_the_strength_is_given_up_with_the_last_one_named(
    answer, size
):
    """A step that changes nothing is halved, as one of no measure is: it is not divided by."""
    toy, shares = Toy(), []

    def measure() -> float:
        shares.append(toy.taken()[0].item())
        return answer

    with pytest.raises(DivergedError, match=f"the last of {TRIES} gave {answer:g}"):
        toy.scale(0.03, measure)
    assert shares == pytest.approx([size**tried for tried in range(TRIES)])
    assert all(torch.equal(a, b) for a, b in zip(toy.parameters, toy.before, strict=True))


def test_progress_is_one_event_a_measurement():
    toy = Toy(linear, 0.7)
    events = list(scale_step(toy.parameters, toy.before, toy.measure, 0.03))
    assert [(one.phase, one.done, one.total) for one in events] == [
        ("measuring", 1, TRIES),
        ("measuring", 2, TRIES),
    ]


def test_parameters_that_want_gradients_are_scaled_in_place():
    before = [double(3, 2)]
    parameter = torch.nn.Parameter(before[0] + double(3, 2, seed=1))
    held = [parameter]
    measure = lambda: relative_change(parameter.detach(), before[0])  # noqa: E731
    moved = finish(scale_step(held, before, measure, 0.1))
    assert moved == pytest.approx(0.1)
    assert held[0] is parameter and parameter.requires_grad and parameter.is_leaf
    assert relative_change(parameter.detach(), before[0]) == pytest.approx(0.1)
