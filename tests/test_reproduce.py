"""The paper's experiments in one command: what is run, what is measured, and its report."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pxpo import Settings, Tools, finish, load_model, load_run, reproduce
from pxpo import __main__ as cli
from pxpo.errors import DivergedError, RewardError, RunError
from pxpo.measures import diversity, drift, held_out, sampled
from pxpo.reproduce import EXPERIMENTS, FULL, METHODS, QUICK, Bench, Scale, experiments, report
from pxpo.run import teach
from pxpo.store import keep_others_out

TINY = Scale(
    seeds=1,
    judged=2,
    grid=(1, 2),
    region={"images": 2, "updates": 1, "steps": 2, "rank": 2},
    changes={"images": 2, "updates": 2, "steps": 2, "rank": 2},
    quick=True,
)
NAMES = ["color", "lake"]


@pytest.fixture(scope="module", autouse=True)
def labels():
    """The random segmenter knows neither lakes nor trees."""
    patch = pytest.MonkeyPatch()
    painted = experiments.painted("Hair", "Upper-clothes")
    patch.setitem(EXPERIMENTS, "lake", replace(EXPERIMENTS["lake"], reward=painted))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def bench(model_folder, segmenter, tmp_path_factory) -> Bench:
    model = load_model(model_folder, device="cpu")
    folder = tmp_path_factory.mktemp("reproduce")
    return Bench(model, folder, TINY, tools=Tools(segmenter=segmenter))


@pytest.fixture(scope="module")
def done(bench) -> Path:
    """The folder of a finished reproduction."""
    return finish(reproduce.reproduce(bench, NAMES)).parent


def made(folder: Path) -> dict[str, bytes]:
    """The report's files."""
    files = [folder / name for name in ("report.md", "report.json", "index.html")]
    files += sorted((folder / "figures").iterdir())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


# What is run.


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("scale", [FULL, QUICK, TINY], ids=["full", "quick", "tiny"])
def test_all_methods_ask_for_as_many_rewards_and_are_measured_after_as_many(bench, name, scale):
    bench = replace(bench, scale=scale)
    marks = experiments.marks_of(bench, name)
    for method in METHODS:
        settings = experiments.settings_of(bench.model, name, method, **scale.changes)
        assert settings.images * settings.updates == marks[-1]
        assert not any(mark % settings.images for mark in marks)
    assert len(marks) >= 3 and len({b - a for a, b in zip(marks, marks[1:], strict=False)}) == 1


def test_the_methods_are_the_paper_s_the_defaults_and_ddpo(bench):
    exact, recipe, ddpo = (
        experiments.settings_of(bench.model, "lake", method) for method in METHODS
    )
    assert (exact.strength, exact.hold, exact.baseline, exact.images) == (0, 0, "none", 1)
    assert (exact.step_noise, exact.unconditional, exact.timesteps) == ("drawn", "exact", 1)
    default = {e.name: e.default for e in dataclasses.fields(Settings)}
    for name in ("strength", "hold", "blur", "baseline", "timesteps", "step_noise"):
        assert getattr(recipe, name) == default[name]
    assert (ddpo.blur, ddpo.baseline) == (math.inf, "global")
    assert replace(ddpo, blur=recipe.blur, baseline=recipe.baseline) == recipe
    assert experiments.settings_of(bench.model, "color", "PXPO").baseline == "global"


def test_every_experiment_is_the_paper_s():
    rewards = {name: one.reward.name for name, one in EXPERIMENTS.items()}
    assert rewards["color"] == "less blue" and rewards["hair"] == "less Hair"
    assert rewards["trees"] == "painted by a segmenter, more Tree and less Lake"
    assert report.PUBLISHED.keys() == EXPERIMENTS.keys()


def test_each_label_is_looked_up_in_the_segmenters_in_turn(bench, segmenter):
    spec = replace(bench, segmenters=["", segmenter.name]).reward("hair")
    assert spec.options["segmenter"] == ""
    several = replace(bench, segmenters=["", segmenter.name], tools=Tools())
    assert several.reward("hair").options["segmenter"] == ""  # Tiny World's knows hair
    assert several.reward("trees").options["segmenter"] == ""
    assert several.reward("lake").options["segmenter"] == ""
    only = replace(several, segmenters=[segmenter.name])
    assert only.reward("hair").options["segmenter"] == segmenter.name
    assert only.reward("color") == EXPERIMENTS["color"].reward
    with pytest.raises(RewardError, match="trees needs a segmenter that knows Tree and Lake"):
        only.reward("trees")
    ade = SimpleNamespace(segmenter=lambda name: SimpleNamespace(labels=("lake", "tree")))
    assert replace(only, tools=ade).reward("trees").options["segmenter"] == segmenter.name


# What is measured.


def test_a_run_is_measured_on_held_out_seeds_as_it_was_after_each_mark(bench, done):
    record = json.loads((done / "runs" / "color-one-recipe-200" / "figures.json").read_text())
    figures, run = record["figures"], load_run(done / "runs" / "color-one-recipe-200")
    assert run.count == 2 and run.settings.seed == 200 and figures["queries"] == [0, 2, 4]
    images = [
        finish(
            sampled(bench.model, lora, run.settings.prompt, held_out(2), run.settings)
        ).images
        for lora in (None, *(one.lora for one in run.updates[1:]))
    ]  # fmt: skip
    blue = [-one[:, 2].mean().item() for one in images]
    assert figures["rewards"] == pytest.approx(blue) and len({*blue}) == 3
    changed = drift(images[0], images[2], -images[0][:, 2])
    assert (figures["drift_inside"], figures["drift_outside"]) == pytest.approx(changed)
    features = [bench.model.features(images[at]) for at in (0, 2)]
    assert figures["diversity"] == pytest.approx(diversity(*features))
    over = [images[at][:, 2].mean((1, 2)).std(correction=0).item() for at in (0, 2)]
    assert figures["over_images"] == pytest.approx(over, abs=1e-6)


def test_cross_talk_is_of_a_reward_in_one_region_alone(bench, monkeypatch):
    maps = []
    learn = experiments.learn
    monkeypatch.setattr(
        experiments, "learn", lambda model, run, rewards: maps.append(rewards) or
        learn(model, run, rewards),
    )  # fmt: skip
    settings = experiments.region_settings(bench, "one recipe", 0)
    found = finish(experiments.cross_talk(bench, settings))
    assert len(maps) == 2  # one update for each of two regions
    for rewards, mine, other in zip(maps, (slice(8), slice(8, 16)), (slice(8, 16), slice(8)),
                                    strict=True):  # fmt: skip
        assert (rewards[..., mine] < 0).any() and (rewards[..., other] == 0).all()
    moved = torch.tensor(found["movements"])
    assert moved.shape == (2, 8, 8) and not torch.equal(moved[0], moved[1])
    squares = moved.square().unflatten(2, (2, 4)).mean((1, 3)).sqrt()  # (rewarded, region)
    own, others = squares.diagonal().mean(), (squares[0, 1] + squares[1, 0]) / 2
    assert found["moved"] == pytest.approx((own.item(), others.item()))
    assert all(0 < abs(gain) < 0.5 for gain in found["gain"])


def test_cross_talk_ends_where_another_update_would_give_noise(bench, monkeypatch):
    settings, learn = experiments.region_settings(bench, "one recipe", 0), experiments.learn
    expected = finish(experiments.cross_talk(bench, settings))

    def diverges(model, run, rewards):
        if run.count == 1:
            raise DivergedError("noise")
        return (yield from learn(model, run, rewards))

    monkeypatch.setattr(experiments, "learn", diverges)
    found = finish(experiments.cross_talk(bench, replace(settings, updates=3)))
    assert expected.pop("updates") == [[1, 1]] * 2 and found.pop("updates") == [[1, 3]] * 2
    assert found == expected


def test_what_diverges_at_its_first_update_has_figures_too(bench, monkeypatch, tmp_path):
    bench = Bench(bench.model, tmp_path, TINY, tools=bench.tools)

    def diverges(*_):
        raise DivergedError("noise")
        yield

    monkeypatch.setattr(experiments, "learn", diverges)
    monkeypatch.setattr(experiments, "teach", diverges)
    results = finish(experiments.run_all(bench, ["color"]))
    for figures in results["runs"]["color"]["PXPO"]:
        assert figures["updates"][0] == figures["from_base"] == 0
        assert figures["rewards"][0] == figures["rewards"][-1]
    for figures in results["cross_talk"]["PXPO"]:
        assert figures["moved"] == [0, 0] and report.ratios([figures]) == [1.0]
    lines = report.shortfalls(bench, [], results, {})
    assert any("2 of 2 runs ended early, after 0 and 0 updates" in line for line in lines)
    page = report.write_report(bench, ["color"], results)
    assert "ended early" in page.read_text(encoding="utf-8")


# That it goes on, and gives the same again.


@pytest.mark.slow
def test_an_interrupted_reproduction_gives_the_same_report_as_one_in_one_go(
    bench, done, tmp_path, monkeypatch
):
    other, taught = replace(bench, folder=tmp_path / "other"), []
    teach = experiments.teach
    monkeypatch.setattr(
        experiments, "teach", lambda *args: taught.append(args[1].count) or teach(*args)
    )
    work = reproduce.reproduce(other, NAMES)
    while len(taught) < 4:  # in the second update of the second run
        assert "/9 color, " in next(work).phase
    work.close()
    assert taught == [0, 1, 0, 1]
    finish(reproduce.reproduce(other, NAMES))
    painted = [*range(4), 0, 1, 0, 1]  # the paper paints one image an update
    assert taught[4:] == [1, 0, 1, *painted]
    assert made(other.folder) == made(done)


def test_what_is_finished_is_not_done_again(bench, done, monkeypatch):
    before = made(done)
    for name in ("begin", "generate", "sampled", "load_run"):
        monkeypatch.setattr(experiments, name, lambda *args: pytest.fail("done again"))
    finish(reproduce.reproduce(bench, NAMES))
    assert made(done) == before


def test_a_run_that_would_turn_to_noise_ends_there_and_is_measured_as_it_is(
    bench, tmp_path, monkeypatch
):
    once_more = iter([True, False])

    def diverges(*values):
        if not next(once_more):
            raise DivergedError("noise")
        return teach(*values)

    monkeypatch.setattr(experiments, "teach", diverges)
    other, spec = replace(bench, folder=tmp_path), bench.reward("color")
    figures = finish(experiments.one_run(other, "color", spec, "PXPO", 201, {}))
    assert (
        figures["updates"] == [1, 2] and load_run(tmp_path / "runs" / "color-PXPO-201").count == 1
    )
    assert len(figures["rewards"]) == 3 and figures["rewards"][1] == figures["rewards"][2]


def test_the_report_is_written_again_from_its_figures_alone(bench, done, tmp_path):
    shutil.copytree(done / "figures", tmp_path / "figures")
    for file in (*done.glob("runs/*/figures.json"), *done.glob("cross-talk/*.json")):
        (tmp_path / file.relative_to(done)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / file.relative_to(done))
    finish(reproduce.reproduce(replace(bench, folder=tmp_path), NAMES))
    assert made(tmp_path) == made(done)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "changes", [{"changes": {**TINY.changes, "rank": 3}}, {"judged": 3}, {"grid": (2, 1)}]
)
def test_a_folder_with_other_settings_is_refused(bench, done, changes):
    other = replace(bench, scale=replace(TINY, **changes))
    with pytest.raises(RunError, match="other settings; choose another --out"):
        finish(reproduce.reproduce(other, NAMES))


def test_an_unfinished_run_with_other_settings_is_refused(bench, done, tmp_path):
    folder = tmp_path / "runs" / "color-PXPO-200"
    folder.parent.mkdir()
    folder.symlink_to(done / "runs" / "color-PXPO-200")
    spec = EXPERIMENTS["color"].reward
    settings = load_run(folder).settings
    with pytest.raises(RunError, match="choose another"):
        finish(experiments.trained(bench, spec, replace(settings, seed=1), folder))
    assert finish(experiments.trained(bench, spec, settings, folder)).count == 2


def test_a_run_that_another_process_is_at_is_left_to_it(bench, done):
    folder = done / "runs" / "color-PXPO-200"
    settings = load_run(folder).settings
    with keep_others_out(folder), pytest.raises(RunError, match="another process works in"):
        finish(experiments.trained(bench, EXPERIMENTS["color"].reward, settings, folder))


# The report.


def test_the_report_has_the_paper_s_table_and_figures(done):
    words, page = (done / "report.md").read_text(), (done / "index.html").read_text()
    assert ("| Less blue | the paper: PXPO, Stable Diffusion v1.4 | 64 | −0.39 ± 0.08 | "
            "−0.35 ± 0.08 | – |") in words  # fmt: skip
    assert re.search(r"\|  \| ours: DDPO, model\d* \| 4 \| −0\.\d{3} ± 0\.\d{3} \|", words)
    assert "A quick look" in words and "one seed, 2 updates of 2 pictures, 2 denoising" in words
    for figure in ("color-updates", "color-grid", "color-curve", "lake-curve", "cross-talk"):
        assert f"](figures/{figure}.png)" in words and f'src="figures/{figure}.png"' in page
        assert (done / "figures" / f"{figure}.png").exists()
    assert set(re.findall(r"figures/[\w-]+\.png", words)) == {
        f"figures/{file.name}" for file in (done / "figures").iterdir()
    }
    command = "`python -m pxpo reproduce --quick --seeds 1 --only color --only lake --model model"
    assert command in words  # its own name, not where it lies
    assert not re.search(r"(src|href)=\"?(http|/)|url\(|@import|<script", page)


def test_the_report_s_json_holds_every_figure(bench, done):
    record = json.loads((done / "report.json").read_text())
    runs = record["runs"]["lake"]["DDPO"]
    kept = json.loads((done / "runs" / "lake-DDPO-200" / "figures.json").read_text())
    assert runs == [kept["figures"]]
    assert record["summary"]["lake"]["DDPO"]["after"] == [one["rewards"][-1] for one in runs]
    assert len(record["cross_talk"]["PXPO"]) == 1
    assert (record["quick"], record["seeds"], record["judged"]) == (True, 1, 2)
    assert str(bench.folder) not in (done / "report.json").read_text()


def figures(*rewards: float, outside: float = 0.1, varied: float = 1.0, updates: int = 8) -> dict:
    return {"queries": [0, 10, 20], "rewards": list(rewards), "over_images": [0.1, 0.1],
            "drift_inside": 0.2, "drift_outside": outside, "diversity": varied,
            "from_base": 0.1, "updates": [updates, 8]}  # fmt: skip


def test_the_target_is_half_of_the_best_mean_gain():
    found = report.summarised({
        "PXPO": [figures(-1, -0.8, -0.6), figures(-1, -1, -1)],
        "DDPO": [figures(-1, -0.9, -0.8), figures(-1, -0.8, -0.8)],
    })  # fmt: skip
    assert found["PXPO"]["gain"] == pytest.approx([0.4, 0])
    for one in found.values():
        assert one["target"] == pytest.approx(-0.9)
    assert found["PXPO"]["queries_to_target"] == [pytest.approx(5), None]
    assert found["DDPO"]["queries_to_target"] == [pytest.approx(10), pytest.approx(5)]
    nothing = report.summarised({"PXPO": [figures(-1, -1, -1.2)], "DDPO": [figures(-1, -1, -1)]})
    assert nothing["PXPO"]["queries_to_target"] == nothing["DDPO"]["queries_to_target"] == [None]


def test_what_goes_against_us_is_said():
    paper = report.Published("64", left=0.9)

    def words(ours, rival) -> str:
        found = report.summarised({"PXPO": [ours] * 2, "DDPO": [rival] * 2})
        return "; ".join(report.against(found["PXPO"], found["DDPO"], paper))

    assert words(figures(-1, -0.8, -0.6), figures(-1, -0.9, -0.8)) == ""
    worse = words(figures(-1, -1, -1.1, outside=0.2, varied=0.8), figures(-1, -0.9, -0.8))
    assert worse == (
        "DDPO gains more: ours is −0.100 ± 0.000, DDPO's is 0.200 ± 0.000; "
        "more changes outside, 0.200 ± 0.000 against 0.100 ± 0.000 by DDPO; "
        "the reward did not rise; 80 ± 0 % of the spread over seeds is left; "
        "110 % of what is not wanted is left, 90 % by the paper's means, on its own base model"
    )
    assert words(figures(-1, -0.8, -0.6, updates=5), figures(-1, -0.9, -0.8)) == (
        "2 of 2 runs ended early, after 5 and 5 updates: another would have turned pictures to "
        "noise"
    )


GAINS = {
    # Seeds differ by far more than methods do, and alike for both.
    "clearly more": ((0.8, 0.2), (0.7, 0.12), ""),
    "more": (
        (0.8, 0.2), (0.4, 0.5),
        "the gain is not clearly more than DDPO's: ours is 0.500 ± 0.300, DDPO's is 0.450 ± 0.050",
    ),
    "less": (
        (0.4, 0.5), (0.8, 0.2),
        "DDPO gains more, though not clearly: ours is 0.450 ± 0.050, DDPO's is 0.500 ± 0.300",
    ),
    "clearly less": (
        (0.12, 0.7), (0.2, 0.8),
        "DDPO gains more: ours is 0.410 ± 0.290, DDPO's is 0.500 ± 0.300",
    ),
    "more on one seed": (
        (0.8,), (0.2,),
        "the gain is not clearly more than DDPO's: ours is 0.800, DDPO's is 0.200; one seed tells "
        "no more",
    ),
    "less on one seed": (
        (0.2,), (0.8,),
        "DDPO gains more, though not clearly: ours is 0.200, DDPO's is 0.800; one seed tells no "
        "more",
    ),
}  # fmt: skip

CHANGES = {
    "clearly more": (
        (0.8, 0.2), (0.7, 0.12),
        "more changes outside, 0.500 ± 0.300 against 0.410 ± 0.290 by DDPO",
    ),
    "more": (
        (0.8, 0.2), (0.4, 0.5),
        "more changes outside, though not clearly, 0.500 ± 0.300 against 0.450 ± 0.050 by DDPO",
    ),
    "less": ((0.4, 0.5), (0.8, 0.2), ""),
}  # fmt: skip


def against(ours: list[dict], theirs: list[dict]) -> str:
    found = report.summarised({"PXPO": ours, "DDPO": theirs})
    return "; ".join(report.against(found["PXPO"], found["DDPO"], report.Published("64")))


@pytest.mark.parametrize(("ours", "theirs", "words"), GAINS.values(), ids=GAINS)
def test_gains_are_compared_on_the_same_seeds(ours, theirs, words):
    both = ([figures(-1, -1, gain - 1) for gain in gains] for gains in (ours, theirs))
    assert against(*both) == words


@pytest.mark.parametrize(("ours", "theirs", "words"), CHANGES.values(), ids=CHANGES)
def test_what_changes_outside_is_compared_on_the_same_seeds(ours, theirs, words):
    mine = [figures(-1, -1, -0.5, outside=change) for change in ours]
    rival = [figures(-1, -1, -0.6, outside=change) for change in theirs]
    assert against(mine, rival) == words


def test_cross_talk_that_is_no_less_is_said(bench):
    def talk(*ratios: float) -> list[dict]:
        return [{"moved": [2.0, 2 * ratio], "updates": [[4, 4]]} for ratio in ratios]

    talks = {"PXPO": talk(0.9, 0.94), "one recipe": talk(0.97, 0.95), "DDPO": talk(0.95, 0.99)}
    lines = report.shortfalls(bench, [], {"cross_talk": talks}, {})
    assert lines == ["Cross-talk, one recipe: 0.96 ± 0.01, not clearly less than DDPO's "
                     "0.97 ± 0.02."]  # fmt: skip
    talks = {method: talk(0.5) for method in METHODS} | {"DDPO": talk(0.9)}
    lines = report.shortfalls(bench, [], {"cross_talk": talks}, {})
    assert lines[1] == (
        "Cross-talk, one recipe: 0.50, not clearly less than DDPO's 0.90; one seed tells no more."
    )


# The command.


def test_the_command(model_folder, segmenter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "QUICK", TINY)
    where = ["--model", str(model_folder), "--out", str(tmp_path)]
    command = ["reproduce", "--quick", "--seeds", "2", "--only", "color", *where]
    assert cli.main([*command, "--segmenter", segmenter.name]) == 0
    assert f"Written: {tmp_path / 'index.html'}" in capsys.readouterr().out
    assert {one.name for one in (tmp_path / "runs").iterdir()} == {
        f"color-{method}-{seed}" for method in ("PXPO", "one-recipe", "DDPO") for seed in (200, 201)
    }  # fmt: skip
    assert cli.main([*command, "--seeds", "0"]) == 2
    assert "the least it can be is 1" in capsys.readouterr().err

    def stopped(bench, names):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(cli, "reproduce", stopped)
    assert cli.main(command) == 130
    assert "The same command goes on" in capsys.readouterr().out
