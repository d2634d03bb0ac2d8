from dataclasses import replace

import pytest
import torch
from conftest import prediction, random_lora, same_weights, with_lora

from pxpo.errors import LoraError
from pxpo.lora import TARGETS, Lora, adapter, completed, new_lora, weights_of
from pxpo.models.base import without_lora
from pxpo.rollout import Noise, rollout
from pxpo.settings import Sampling

SAMPLING = Sampling(steps=2, guidance_scale=2.0)


@pytest.fixture
def base(model) -> torch.Tensor:
    """What the model predicts before it has ever seen a LoRA."""
    return prediction(model)


def test_a_new_lora_changes_nothing_yet(model, base):
    assert torch.equal(with_lora(model, new_lora(model, 4, 0)), base)


def test_a_new_lora_covers_the_attention_projections_in_float32(model):
    lora = new_lora(model, 3, 0)
    attentions = [name for name, _ in model.network.named_modules() if name.endswith(TARGETS)]
    assert len(lora.weights) == 2 * len(attentions) > 0
    assert (lora.rank, lora.alpha) == (3, 3.0)
    for name, weight in lora.weights.items():
        assert weight.dtype == torch.float32
        module = model.network.get_submodule(name.split(".lora_")[0])
        wanted = (3, module.in_features) if "lora_A" in name else (module.out_features, 3)
        assert tuple(weight.shape) == wanted
        assert bool(weight.any()) == ("lora_A" in name)
        if "lora_A" in name:  # PEFT's own: uniform within 1 / sqrt of what comes in
            assert 0.8 < weight.abs().max() * module.in_features**0.5 <= 1


def test_a_new_lora_comes_from_its_seed_alone(model):
    first = new_lora(model, 4, 0)
    torch.manual_seed(99)
    assert same_weights(new_lora(model, 4, 0), first)
    assert not same_weights(new_lora(model, 4, 1), first)


def test_a_new_lora_is_the_same_while_another_is_attached(model):
    alone = new_lora(model, 4, 0)
    with adapter(model, random_lora(model, rank=3)):
        assert same_weights(new_lora(model, 4, 0), alone)


def test_a_random_lora_changes_the_prediction_and_another_changes_it_otherwise(model, base):
    one, other = with_lora(model, random_lora(model)), with_lora(model, random_lora(model, seed=1))
    assert not torch.allclose(one, base, atol=1e-3)
    assert not torch.allclose(one, other, atol=1e-3)


def test_alpha_over_rank_is_the_strength(model):
    lora = random_lora(model)
    twice = {name: w * (2 if "lora_B" in name else 1) for name, w in lora.weights.items()}
    torch.testing.assert_close(
        with_lora(model, replace(lora, alpha=2 * lora.alpha)),
        with_lora(model, replace(lora, weights=twice)),
    )


def test_the_base_is_bit_identical_after_the_adapter(model, base):
    with_lora(model, random_lora(model))
    assert torch.equal(prediction(model), base)


def test_the_base_is_bit_identical_without_the_lora_for_a_while(model, base):
    with adapter(model, random_lora(model)):
        learnt = prediction(model)
        with without_lora(model):
            assert torch.equal(prediction(model), base)
        assert torch.equal(prediction(model), learnt)
        assert not torch.equal(learnt, base)


def test_the_base_is_bit_identical_after_an_exception(model, base):
    with pytest.raises(KeyError), adapter(model, random_lora(model)):
        raise KeyError
    assert torch.equal(prediction(model), base)


@pytest.mark.parametrize("rank", [2, 5])
def test_a_second_adapter_is_refused_and_the_first_goes_on(model, base, rank):
    with adapter(model, random_lora(model, seed=1)):
        before = prediction(model)
        with pytest.raises(LoraError, match="at work with another LoRA"):
            with_lora(model, random_lora(model, rank, seed=2))
        assert torch.equal(prediction(model), before)
    assert torch.equal(prediction(model), base)


def test_loras_of_different_ranks_take_turns(model, base):
    small, large = random_lora(model, 2, seed=1), random_lora(model, 5, seed=2)
    first = with_lora(model, small), with_lora(model, large)
    again = with_lora(model, small), with_lora(model, large)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(prediction(model), base)


@pytest.mark.parametrize("steps_taken", [1, 2])
def test_the_base_is_bit_identical_after_closing_a_generator(model, base, steps_taken):
    def work():
        with adapter(model, random_lora(model)):
            yield from rollout(model, ["a"], [Noise(0)], SAMPLING)

    generator = work()
    for _ in range(steps_taken):
        next(generator)
    assert not torch.equal(prediction(model), base)
    generator.close()
    assert torch.equal(prediction(model), base)


def test_the_parameters_are_the_ones_that_count_and_start_without_gradients(model):
    lora = random_lora(model)
    x_t, cond = torch.ones(1, 4, 8, 8), model.encode(["a"])
    with adapter(model, lora) as parameters:
        model.predict(x_t, torch.tensor([5]), cond).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in parameters.values())
        assert all(p.dtype == torch.float32 for p in parameters.values())
    with adapter(model, lora) as parameters:
        assert all(p.grad is None and p.requires_grad for p in parameters.values())


def test_the_lora_itself_is_never_changed(model):
    lora = random_lora(model)
    kept = {name: weight.clone() for name, weight in lora.weights.items()}
    with adapter(model, lora) as parameters, torch.no_grad():
        copy = weights_of(parameters)
        for parameter in parameters.values():
            parameter.zero_()
    for name, weight in kept.items():
        assert torch.equal(lora.weights[name], weight)
        assert torch.equal(copy[name], weight)


def test_a_lora_whose_matrices_have_other_shapes_is_refused(model, base):
    lora = random_lora(model)
    name = next(iter(lora.weights))
    wrong = replace(lora, weights={**lora.weights, name: torch.zeros(2, 7)})
    with pytest.raises(LoraError, match=r"\(2, 7\), the model wants \(2, \d+\).*another base"):
        with_lora(model, wrong)
    with pytest.raises(LoraError, match=r"\(2, 7\), the model wants \(2, \d+\).*another base"):
        completed(model, wrong, 0)
    assert torch.equal(prediction(model), base)


def test_what_a_lora_leaves_out_is_added_and_can_learn(model):
    """All layers but one, and of that one the last rank."""
    whole = random_lora(model, 3)
    a, b = list(whole.weights)[:2]
    part = {a: whole.weights[a].clone(), b: whole.weights[b].clone()}
    part[a][2], part[b][:, 2] = 0, 0
    with pytest.raises(LoraError, match="leaves out .*`completed` adds"):
        with_lora(model, replace(whole, weights=part))
    lora = completed(model, replace(whole, weights=part), seed=0)
    assert torch.equal(lora.weights[a][:2], part[a][:2]) and lora.weights[a].all()
    zeros = {name: torch.zeros_like(w) for name, w in whole.weights.items()}
    torch.testing.assert_close(
        with_lora(model, lora), with_lora(model, replace(whole, weights=zeros | part))
    )
    x_t, cond = torch.ones(1, 4, 8, 8), model.encode(["a"])
    with adapter(model, lora) as parameters:
        model.predict(x_t, torch.tensor([5]), cond).square().sum().backward()
        assert all(p.grad.any(0).all() for name, p in parameters.items() if "lora_B" in name)
    assert same_weights(completed(model, replace(whole, weights=part), seed=0), lora)
    assert not same_weights(completed(model, replace(whole, weights=part), seed=1), lora)


def test_a_whole_lora_is_complete_as_it_is(model):
    """Also where one of the two is zero: the other counts, or can learn."""
    lora = random_lora(model)
    for name, weight in lora.weights.items():
        weight[(0,) if ".lora_A." in name else (slice(None), 1)] = 0
    assert same_weights(completed(model, lora, 0), lora)


def test_a_lora_whose_rank_is_misstated_is_refused(model, base):
    with pytest.raises(LoraError, match="not of rank 3"):
        with_lora(model, replace(random_lora(model, rank=2), rank=3))
    assert torch.equal(prediction(model), base)


def test_a_lora_for_another_base_is_refused_and_the_model_is_free_again(model, base):
    lora = random_lora(model)
    other = {name.replace("up_blocks.1", "up_blocks.7"): w for name, w in lora.weights.items()}
    with pytest.raises(LoraError, match=r"does not fit.*another base model"):
        with_lora(model, replace(lora, weights=other))
    assert torch.equal(prediction(model), base)
    assert not torch.equal(with_lora(model, lora), base)


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("layers", [0, 2])
def test_attaching_that_fails_leaves_the_model_as_it_was(model, base, monkeypatch, others, layers):
    """For want of memory, say, after some layers; whether or not another LoRA was there before."""
    kept = with_lora(model, random_lora(model, 2)) if others else None
    make = torch.nn.init.kaiming_uniform_
    made = []

    def fail(*values, **options):
        made.append(1)
        if len(made) > layers:
            raise MemoryError
        return make(*values, **options)

    with monkeypatch.context() as broken:
        broken.setattr("torch.nn.init.kaiming_uniform_", fail)
        with pytest.raises(MemoryError):
            with_lora(model, random_lora(model, 3))
    assert made and torch.equal(prediction(model), base)
    assert not [name for name, _ in model.network.named_parameters() if "lora" in name]
    again = with_lora(model, random_lora(model, 2))
    assert kept is None or torch.equal(again, kept)
    assert torch.equal(prediction(model), base)


@pytest.mark.parametrize("rank", [0, -1, 513, 10**7, "8", 2.0, True, None])
def test_a_rank_that_cannot_be_is_refused(rank):
    with pytest.raises(LoraError, match="rank is .*whole number from 1 to 512"):
        Lora(rank, 2.0, {})


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), "2", None])
def test_an_alpha_that_cannot_be_is_refused(alpha):
    with pytest.raises(LoraError, match="alpha is .*positive number"):
        Lora(2, alpha, {})


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (torch.full((2, 2), torch.nan), "not finite"),
        (torch.full((2, 2), torch.inf), "not finite"),
        (torch.zeros(2, 2).half(), "float16"),
        (torch.zeros(2, 2).long(), "int64"),
        (torch.zeros(()), r"shape \(\)"),
        (torch.zeros(2, 2, 1, 1), r"shape \(2, 2, 1, 1\)"),
        (torch.zeros(3, 2), "not of rank 2"),
        (torch.zeros(2, 3), "an A and a B of each layer"),
    ],
)
def test_a_matrix_that_cannot_be_is_refused(matrix, words):
    with pytest.raises(LoraError, match=words):
        Lora(2, 2.0, {"some.weight": matrix})
