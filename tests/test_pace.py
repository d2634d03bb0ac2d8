"""How long an update will take, told before it is made."""

from __future__ import annotations

import pytest
import torch

from pxpo import RewardSpec, begin, finish, generate, settings_for, teach
from pxpo.pace import LEARNING, MEASURED, Pace, passes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_scale": 1.0},
        {"unconditional": "exact"},
        {"hold": 0.0},
        {"timesteps": 1.0, "noise": "fresh"},
        {"held_out_prompt": "b\nc", "shown": 3},
    ],
    ids=str,
)
def test_what_an_update_is_said_to_cost_is_what_the_network_is_asked(model, monkeypatch, changes):
    spec, cost, call = RewardSpec("color"), [0], model.call_network

    def counted(x_t, t, cond):
        cost[0] += len(x_t) * (LEARNING if torch.is_grad_enabled() else 1)
        return call(x_t, t, cond)

    settings = {"prompt": "a", "steps": 6, "images": 3, "rank": 2, "shown": 2, **changes}
    run = finish(begin(model, settings_for("color", **settings), reward=spec))
    run = finish(
        teach(model, finish(generate(model, run)), spec, torch.rand(3, 16, 16), spec.make())
    )
    monkeypatch.setattr(model, "call_network", counted)
    run = finish(generate(model, run))
    finish(teach(model, run, spec, torch.rand(3, 16, 16), spec.make()))
    once = MEASURED * (2 if run.settings.guidance_scale > 1 else 1)  # it may be measured once more
    assert abs(cost[0] - passes(run.settings)) <= once


def test_a_pass_is_tried_out_before_an_update_was_timed(model):
    pace, settings = Pace(model), settings_for("color", steps=2, images=2, guidance_scale=1.0)
    assert pace.seconds(settings) == 0
    pace.try_out()
    assert pace.per_pass > 0
    assert pace.seconds(settings) == pytest.approx(pace.per_pass * passes(settings))
    with pace.timed(settings):
        pass
    assert 0 < pace.seconds(settings) < 0.1  # from now on as long as the last one took


def test_a_model_that_does_not_fit_is_not_timed(model, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "call_network", full)
    pace = Pace(model)
    pace.try_out()
    assert pace.per_pass == 0
