import math
from dataclasses import FrozenInstanceError, fields

import pytest

from pxpo.errors import PxpoError, SettingError
from pxpo.settings import (
    EXPERIMENTS,
    PAPER,
    Credit,
    Learning,
    Sampling,
    Settings,
    settings_for,
)

BELOW = [
    ("steps", 0, "1"),
    ("guidance_scale", 0.99, "1"),
    ("eta", 0.0, "0"),
    ("blur", -0.1, "0"),
    ("strength", -0.001, "0"),
    ("learning_rate", 0.0, "0"),
    ("hold", -0.5, "0"),
    ("timesteps", 0.0, "0"),
    ("seed", -1, "0"),
    ("images", 0, "1"),
    ("updates", 0, "1"),
    ("shown", 0, "1"),
    ("rank", 0, "1"),
]
ABOVE = [
    ("steps", 1001, "1000"),
    ("guidance_scale", 30.1, "30"),
    ("eta", 1.01, "1"),
    ("strength", 1.001, "1"),
    ("learning_rate", 1.5, "1"),
    ("hold", 1000.1, "1000"),
    ("timesteps", 1.001, "1"),
    ("seed", 2**53, "9.0072e+15"),
    ("images", 1025, "1024"),
    ("updates", 100_001, "100000"),
    ("shown", 257, "256"),
    ("rank", 513, "512"),
]
CHOICES = {
    "baseline": ("none", "global", "location"),
    "step_noise": ("drawn", "expected"),
    "unconditional": ("exact", "detached"),
    "noise": ("own", "fresh"),
}
OPEN = ("steps", "guidance_scale", "images")
NUMBERS = [entry.name for entry in fields(Settings) if entry.metadata["kind"] in (int, float)]
WHOLE = ["steps", "seed", "images", "updates", "shown", "rank"]


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
        ("eta", 1e-6), ("eta", 1.0), ("blur", 0.0), ("blur", math.inf), ("strength", 0.0),
        ("strength", 1.0), ("learning_rate", 1e-9), ("learning_rate", 1.0), ("hold", 0.0),
        ("hold", 1000.0), ("timesteps", 1e-6), ("timesteps", 1.0), ("seed", 0),
        ("seed", 2**53 - 1), ("images", 1), ("images", 1024), ("updates", 1),
        ("updates", 100_000), ("shown", 1), ("shown", 256), ("rank", 1), ("rank", 512),
    ],
)  # fmt: skip
def test_the_limit_itself_is_allowed(name, value):
    assert getattr(Settings(baseline="none", **{name: value}), name) == value


def test_one_image_has_nothing_to_be_compared_with():
    with pytest.raises(SettingError, match=r"at least 2; images is 1.*'none'"):
        Settings(images=1)
    for alone in ({"images": 1, "baseline": "global"}, {"images": 2}, {"images": None}):
        Settings(**alone)


def test_every_number_has_a_limit_in_the_lists_above():
    assert {name for name, _, _ in BELOW} == set(NUMBERS)
    assert {name for name, _, _ in ABOVE} == set(NUMBERS) - {"blur"}  # at infinity it is DDPO
    assert {*NUMBERS, *CHOICES, "prompt", "held_out_prompt"} == {
        entry.name for entry in fields(Settings)
    }


def test_what_the_model_knows_best_is_left_open_and_nothing_else():
    settings = Settings()
    assert [name for name, value in settings.as_dict().items() if value is None] == list(OPEN)
    assert Settings(**{name: None for name in OPEN}) == settings
    assert (Sampling().steps, Sampling().guidance_scale) == (None, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in NUMBERS
        for value in (math.nan, True, False, "3", None, [1], 1j)
        if value is not None or name not in OPEN
    ],
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
    changes = {"prompt": "a cat", "baseline": "none", "strength": 0.5, "noise": "own", "rank": 3}
    changed = settings_for(experiment, paper=paper, **changes)
    assert changed.as_dict() == settings.as_dict() | changes


@pytest.mark.parametrize(
    ("experiment", "prompt", "budget", "baseline", "learning_rate"),
    [
        ("color", "red taxi in traffic", (16, 10), "global", 2e-3),
        ("segment", "portrait of a man on the beach", (10, 16), "global", 2e-3),
        ("paint", "nature landscape", (1, 15), "none", 4e-3),
    ],
)
def test_the_paper_preset_is_equation_6_unchanged(
    experiment, prompt, budget, baseline, learning_rate
):
    settings = settings_for(experiment, paper=True)
    assert (settings.prompt, settings.baseline) == (prompt, baseline)
    assert (settings.images, settings.updates) == budget
    assert (settings.blur, settings.step_noise, settings.noise) == (0.0, "drawn", "fresh")
    assert (settings.hold, settings.unconditional, settings.timesteps) == (0.0, "exact", 1.0)
    assert (settings.strength, settings.learning_rate) == (0.0, learning_rate)
    assert settings.eta == 1.0
    assert PAPER.keys() == EXPERIMENTS.keys()


def test_one_recipe_is_for_all_three_experiments():
    """They differ in what is painted and in how long it is learnt, and in nothing of how."""
    assert list(EXPERIMENTS) == ["color", "segment", "paint"]
    plain = Settings().as_dict()
    for experiment in EXPERIMENTS:
        settings = settings_for(experiment).as_dict()
        differs = {name for name in plain if settings[name] != plain[name]}
        assert "prompt" in differs and differs <= {"prompt", "images", "updates"}


def test_the_recipe_is_a_step_of_known_size_on_the_run_s_own_picture_and_others():
    settings = settings_for("paint")
    assert (settings.strength, settings.hold, settings.timesteps) == (0.03, 0.1, 0.25)
    assert (settings.baseline, settings.step_noise, settings.noise) == (
        "location",
        "expected",
        "own",
    )
    assert (settings.images, settings.updates) == (None, 8)


def test_an_unknown_experiment_lists_the_known_ones():
    with pytest.raises(SettingError, match="'colour'; it must be one of color, segment, paint"):
        settings_for("colour")


def test_an_unknown_setting_is_named():
    with pytest.raises(SettingError, match="no setting called lora_rank, step"):
        settings_for("color", step=3, lora_rank=4)
