import math
from dataclasses import FrozenInstanceError, fields

import pytest

from pxpo.errors import PxpoError, SettingError
from pxpo.settings import EXPERIMENTS, PAINTED, Credit, Learning, Sampling, Settings, settings_for

BELOW = [
    ("steps", 0, "1"),
    ("guidance_scale", 0.99, "1"),
    ("eta", 0.0, "0"),
    ("blur", -0.1, "0"),
    ("learning_rate", 0.0, "0"),
    ("weight_decay", -1e-9, "0"),
    ("max_grad_norm", -1.0, "0"),
    ("hold", -0.5, "0"),
    ("hold_painted", -0.5, "0"),
    ("hold_growth", -0.5, "0"),
    ("warmup", -1, "0"),
    ("decay", -0.5, "0"),
    ("momentum", -0.1, "0"),
    ("timesteps", 0.0, "0"),
    ("seed", -1, "0"),
    ("images", 0, "1"),
    ("epochs", 0, "1"),
    ("shown", 0, "1"),
    ("rank", 0, "1"),
]
ABOVE = [
    ("steps", 1001, "1000"),
    ("guidance_scale", 30.1, "30"),
    ("eta", 1.01, "1"),
    ("learning_rate", 1.5, "1"),
    ("weight_decay", 1.1, "1"),
    ("timesteps", 1.001, "1"),
    ("hold_painted", 1.001, "1"),
    ("hold_growth", 1000.1, "1000"),
    ("decay", 1.001, "1"),
    ("momentum", 1.0, "0.999"),
    ("seed", 2**63, "9.22337e+18"),
    ("images", 1025, "1024"),
    ("epochs", 100_001, "100000"),
    ("shown", 257, "256"),
    ("rank", 513, "512"),
]
CHOICES = {
    "credit": ("pixel", "image"),
    "baseline": ("none", "area", "global", "location", "past"),
    "step_weights": ("paper", "flat", "early"),
    "step_noise": ("drawn", "expected"),
    "unconditional": ("exact", "detached"),
    "noise": ("fresh", "start", "turns", "whole"),
}
NUMBERS = [entry.name for entry in fields(Settings) if isinstance(entry.default, int | float)]
WHOLE = ["steps", "seed", "images", "epochs", "shown", "rank", "warmup"]


@pytest.mark.parametrize(("name", "value", "limit"), BELOW + ABOVE)
def test_a_value_beyond_its_limit_is_refused_by_name_value_and_limit(name, value, limit):
    with pytest.raises(SettingError) as refused:
        Settings(**{name: value})
    message = str(refused.value)
    assert message.startswith(f"{name} is {value};")
    assert message.endswith(f" {limit}.")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 1), ("steps", 1000), ("guidance_scale", 1.0), ("guidance_scale", 30.0),
        ("eta", 1e-6), ("eta", 1.0), ("blur", 0.0), ("blur", math.inf), ("learning_rate", 1.0),
        ("weight_decay", 0.0), ("weight_decay", 1.0), ("max_grad_norm", 0.0), ("hold", 0.0),
        ("hold_painted", 0.0), ("hold_painted", 1.0), ("hold_growth", 0.0),
        ("hold_growth", 1000.0), ("warmup", 0), ("decay", 0.0), ("decay", 1.0),
        ("momentum", 0.0), ("momentum", 0.999),
        ("timesteps", 1.0), ("seed", 0), ("seed", 2**63 - 1), ("images", 1), ("images", 1024),
        ("epochs", 1), ("epochs", 100_000), ("shown", 1), ("shown", 256),
        ("rank", 1), ("rank", 512),
    ],
)  # fmt: skip
def test_the_limit_itself_is_allowed(name, value):
    assert getattr(Settings(baseline="none", **{name: value}), name) == value


def test_one_image_has_nothing_to_be_compared_with():
    with pytest.raises(SettingError, match=r"at least 2; images is 1.*'area'"):
        Settings(images=1)


def test_every_number_has_a_limit_in_the_lists_above():
    assert {name for name, _, _ in BELOW} == set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", [math.nan, True, False, "3", None, [1], 1j], ids=lambda value: repr(value)
)
def test_what_is_not_a_number_is_refused(name, value):
    wanted = "a whole number" if name in WHOLE else "a number"
    with pytest.raises(SettingError) as refused:
        Settings(**{name: value})
    assert str(refused.value) == f"{name} is {value!r}; it must be {wanted}."


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [1.5, math.inf])
def test_what_is_not_a_whole_number_is_refused(name, value):
    with pytest.raises(SettingError, match=f"{name} is {value!r}; it must be a whole number"):
        Settings(**{name: value})


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_exactly_these(name):
    for choice in CHOICES[name]:
        assert getattr(Settings(**{name: choice}), name) == choice
    for other in ("", CHOICES[name][0].upper(), "sideways", None, 1):
        with pytest.raises(SettingError) as refused:
            Settings(**{name: other})
        listed = ", ".join(CHOICES[name])
        assert str(refused.value) == f"{name} is {other!r}; it must be one of {listed}."


@pytest.mark.parametrize("value", [None, 3, b"taxi", ["taxi"]])
def test_a_prompt_that_is_not_text_is_refused(value):
    with pytest.raises(SettingError, match="prompt is .*; it must be text"):
        Settings(prompt=value)


def test_numbers_become_the_type_of_their_setting():
    settings = Settings(steps=7.0, guidance_scale=3)
    assert (type(settings.steps), settings.steps) == (int, 7)
    assert (type(settings.guidance_scale), settings.guidance_scale) == (float, 3.0)


@pytest.mark.parametrize("part", [Sampling, Credit, Learning])
def test_each_part_validates_and_settings_holds_them_all(part):
    assert {entry.name for entry in fields(part)} <= {entry.name for entry in fields(Settings)}
    for name, value, _ in BELOW:
        if name in {entry.name for entry in fields(part)}:
            with pytest.raises(SettingError):
                part(**{name: value})


def test_every_setting_says_what_it_does():
    assert all(entry.metadata["help"] for entry in fields(Settings))


def test_settings_are_frozen_and_survive_a_dict():
    settings = Settings(prompt="a lake", blur=2, seed=5)
    with pytest.raises(FrozenInstanceError):
        settings.steps = 3
    assert Settings(**settings.as_dict()) == settings


def test_errors_of_settings_are_errors_of_the_program_and_of_values():
    assert issubclass(SettingError, PxpoError)
    assert issubclass(SettingError, ValueError)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("paper", [False, True])
def test_presets_are_valid_and_changes_come_last(experiment, paper):
    settings = settings_for(experiment, paper=paper)
    assert settings.prompt == EXPERIMENTS[experiment]["prompt"]
    changed = settings_for(experiment, paper=paper, prompt="a cat", baseline="area", rank=3)
    assert (changed.prompt, changed.baseline, changed.rank) == ("a cat", "area", 3)
    assert changed.images == settings.images


@pytest.mark.parametrize(
    ("experiment", "prompt", "baseline"),
    [
        ("color", "red taxi in traffic", "global"),
        ("segment", "portrait of a man on the beach", "global"),
        ("paint", "nature landscape", "none"),
    ],
)
def test_the_paper_preset_is_equation_6_unchanged(experiment, prompt, baseline):
    settings = settings_for(experiment, paper=True)
    assert (settings.prompt, settings.baseline) == (prompt, baseline)
    assert (settings.credit, settings.blur, settings.step_weights) == ("pixel", 0.0, "paper")
    assert (settings.hold, settings.unconditional, settings.timesteps) == (0.0, "exact", 1.0)
    assert settings.eta == 1.0


def test_painting_is_one_image_a_step():
    assert settings_for("paint").images == 1
    assert settings_for("paint").epochs == 15


def test_paint_that_stays_wants_a_picture_that_stays():
    assert settings_for("paint", **PAINTED).noise == "whole"


def test_an_unknown_experiment_lists_the_known_ones():
    with pytest.raises(SettingError, match="'colour'; it must be one of color, segment, paint"):
        settings_for("colour")


def test_an_unknown_setting_is_named():
    with pytest.raises(SettingError, match="no setting called lora_rank, step"):
        settings_for("color", step=3, lora_rank=4)
