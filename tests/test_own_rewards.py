"""Rewards from a person's own Python file, and mixes of rewards: command line only."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from pxpo import REWARDS, RewardSpec, Tools, finish, load_run
from pxpo import __main__ as cli
from pxpo.errors import PxpoError, RewardError, RunError
from pxpo.rewards.mix import parts_of
from pxpo.store import pack
from pxpo.studio import Studio

pytestmark = pytest.mark.usefixtures("in_memory")

ROOT = Path(__file__).resolve().parents[1]
MANUAL = ROOT / "assets" / "MANUAL.md"
SMALL = ["--steps", "2", "--images", "2", "--shown", "2", "--rank", "2", "--updates", "1"]
IMAGES = torch.rand((2, 3, 4, 6), generator=torch.Generator().manual_seed(0))
CODE = Tools(code=True)
RED = "def red(images):\n    return images[:, 0]\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own(reward: str) -> RewardSpec:
    return RewardSpec("own", {"reward": reward})


def small(model_folder: Path, out: Path, *arguments: str) -> int:
    return cli.main([*arguments, "--model", str(model_folder), "--out", str(out), *SMALL])


def test_the_manual_s_example_works_and_is_resumed(here, model_folder):
    section = MANUAL.read_text(encoding="utf-8").split("### A reward of your own")[1]
    code, commands = re.findall(r"```(?:python|sh)\n(.*?)```", section, re.DOTALL)[:2]
    (here / "mine.py").write_text(code)
    names = ["sharpness of mine.py", "10 × sharpness of mine.py + 0.5 × less blue"]
    for number, command in enumerate(commands.splitlines()):
        program, *arguments = shlex.split(command.removeprefix("python -m "))
        out = here / f"run-{number}"
        assert program == "pxpo" and small(model_folder, out, *arguments) == 0
        assert cli.main(["resume", str(out), "--updates", "2"]) == 0
        run = load_run(out)
        assert run.count == 2 and len(run.latest) == 3 and run.reward.name == names[number]
        assert run.updates[2].metrics["moved"] > 0


def test_a_reward_that_fails_on_the_first_pictures_leaves_the_folder_free(here, model_folder):
    for index, status in ((9, 2), (0, 0)):  # of the three colours
        (here / "mine.py").write_text(RED.replace("0", str(index)))
        assert small(model_folder, here / "out", "own", "--reward", "mine.py:red") == status
        assert (here / "out").exists() == (status == 0)


@pytest.mark.parametrize(
    "code",
    [
        RED,
        "class red:\n    def __call__(self, images):\n        return images[:, 0]\n",
        "import torch\nclass red(torch.nn.Module):\n    def forward(self, images):\n"
        "        return images[:, 0]\n",
        "from pxpo.rewards.color import KIND\nfrom dataclasses import replace\n"
        "from pxpo.rewards import ColorReward\n"
        "red = replace(KIND, make=lambda tools, color, more: ColorReward('red', 1))\n",
        "from beside import red\n",
    ],
    ids=["function", "class", "module", "kind", "another file"],
)
def test_a_function_a_class_or_a_kind_is_a_reward(here, code):
    (here / "mine.py").write_text(code)
    (here / "beside.py").write_text(RED)
    assert torch.equal(own("mine.py:red").recorded().make(CODE)(IMAGES), IMAGES[:, 0])


def test_it_cannot_change_the_images_that_are_learnt_from(here):
    (here / "mine.py").write_text("def zero(images):\n    return images.zero_()[:, 0]\n")
    images = IMAGES.clone()
    own("mine.py:zero").recorded().make(CODE)(images)
    assert torch.equal(images, IMAGES)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("\ndef f(images):\n    return images", r"mine.py, line 2: .*\(2, 3, 4, 6\).*\(B, H, W\)"),
        ("def f(images):\n    return images[:, 0, 1:]", r"mine.py, line 1: .*\(2, 3, 6\).*high"),
        ("def f(images):\n    return images[:, 0].log() * 0 / 0", "mine.py, line 1: .*not finite"),
        ("def f(images):\n\n    raise KeyError('a\\nb')", "mine.py, line 3: KeyError: 'a"),
        (
            "def g(x):\n    return x.no\ndef f(images):\n    return g(images)",
            "mine.py, line 2: A",
        ),
        ("def f(images):\n    return 'no map'", "mine.py, line 1: .*type str"),
        ("def f(images:\n    pass", "mine.py, line 1: SyntaxError"),
        ("\nimport nowhere_at_all", "mine.py, line 2: ModuleNotFoundError"),
        ("class f:\n    def __init__(self, size):\n        pass", "mine.py, line 1: TypeError"),
        ("f = 3", "no function, class or RewardKind called f"),
        ("", "no function, class or RewardKind called f"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(here, code, words):
    (here / "mine.py").write_text(code)
    with pytest.raises(RewardError, match=words) as error:
        own("mine.py:f").recorded().make(CODE)(IMAGES)
    assert "\n" not in str(error.value)


def test_a_class_and_a_module_are_blamed_where_they_begin(here):
    (here / "mine.py").write_text(
        "import torch\nclass f:\n\n    def __call__(self, images):\n        return images\n"
        "class g(torch.nn.Module):\n    def forward(self, images):\n        return images\n"
    )
    for name, line in (("f", 4), ("g", 7)):
        with pytest.raises(RewardError, match=f"line {line}: the reward maps are"):
            own(f"mine.py:{name}").recorded().make(CODE)(IMAGES)


def test_a_run_finds_its_file_again_and_refuses_a_changed_or_a_missing_one(
    here, model_folder, capsys, monkeypatch
):
    mine, out = here / "mine.py", here / "run"
    mine.write_text(RED)
    assert small(model_folder, out, "own", "--reward", "mine.py:red") == 0
    kept = load_run(out)
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    more = ["resume", str(out), "--updates", "2"]
    mine.write_text(RED.replace("return ", "return 1 + "))
    assert cli.main(more) == 2
    assert "has changed" in (said := capsys.readouterr().err) and f"--reward {mine}:red" in said
    with pytest.raises(RewardError, match="not as it was recorded"):  # a run made by someone else
        own(f"{mine}:red").make(CODE)
    mine.rename(here / "moved.py")
    assert cli.main(more) == 2
    assert f"{str(mine)!r} cannot be read" in capsys.readouterr().err
    assert cli.main([*more, "--reward", str(here / "moved.py") + ":red"]) == 0
    run = load_run(out)
    assert run.count == 2 and run.reward.name == "red of moved.py"
    mine.write_text((here / "moved.py").read_text())
    assert cli.main([*more, "--reward", f"{mine}:red"]) == 0  # under its old name: scored anew
    before, now = kept.updates[0].scores, load_run(out).updates[0].scores
    assert now["red of mine.py"].here == pytest.approx(before["red of mine.py"].here + 1)


@pytest.mark.parametrize("kind", ["own", "mix"])
def test_the_page_and_the_api_never_run_a_file_but_go_on_with_its_run(
    here, kind, model, model_folder, segmenter
):
    """The run opens and learns by another reward."""
    (here / "mine.py").write_text(RED)
    text = {"own": "mine.py:red", "mix": "2 own --reward mine.py:red"}[kind]
    spec = RewardSpec(kind, {"reward": text} if kind == "own" else {"part": (text,)}).recorded()
    flag, value = ("--reward", text) if kind == "own" else ("--part", text)
    assert small(model_folder, here / "run", kind, flag, value) == 0
    (here / "mine.py").write_text("from pathlib import Path\nPath('ran').touch()\n" + RED)
    studio = Studio(model, segmenter, here / "studio")
    run = studio.admit(pack(here / "run", here / "run.zip"))
    assert run.count == 1 and run.reward == spec and len(run.latest) == 2
    for reward in (spec, own("mine.py:red")):  # also without a digest
        with pytest.raises(RewardError, match="command line alone"):
            finish(studio.step(run.id, reward))
        with pytest.raises(RewardError, match="only the command line runs"):
            reward.make(studio.tools)
        with pytest.raises(RewardError):
            studio.heat(run, reward)
    run = finish(studio.step(run.id, RewardSpec("color"), images=2))
    assert run.count == 2 and studio.lora_file(run.id).exists()
    assert not (here / "ran").exists()


def test_the_page_and_the_api_do_not_offer_them(segmenter):
    gradio, api = pytest.importorskip("gradio"), pytest.importorskip("pxpo.ui.api")
    rewards = pytest.importorskip("pxpo.ui.rewards")
    with gradio.Blocks():
        tabs = rewards.RewardTabs(Tools(segmenter=segmenter)).tabs
    assert [name for name, kind in REWARDS.items() if not kind.public] == ["mix", "own"]
    for offered in (set(api.Kind.__args__), set(tabs)):
        assert "color" in offered and not {"own", "mix"} & offered


def mix(*part: str) -> RewardSpec:
    return RewardSpec("mix", {"part": part})


def test_a_mix_is_the_weighted_sum_of_its_maps_and_is_recorded_whole(here):
    (here / "my own.py").write_text(RED)
    spec = mix("2 color --more --color green", '-0.5 own --reward "my own.py:red"').recorded()
    assert torch.allclose(spec.make(CODE)(IMAGES), 2 * IMAGES[:, 1] - 0.5 * IMAGES[:, 0])
    assert spec.name == "2 × more green + -0.5 × red of my own.py"
    assert RewardSpec(**spec.as_dict()).recorded() == spec
    (_, green), (weight, red) = parts_of(spec.options["part"])
    assert weight == -0.5 and green == RewardSpec("color", {"color": "green", "more": True})
    assert red.options["reward"].startswith(f"{here / 'my own.py'}:red#")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("color", "weight and a reward"),
        ("inf color", "weight and a reward"),
        ("1 'color", "weight and a reward"),
        ("1 dance", "no reward called 'dance'"),
        ("1 color --label Hair", "no option '--label'; it has --color, --more"),
        ("1 color --more=false", "no option '--more=false'"),
        ("1 color --color", "--color of the reward 'color' needs a value"),
        ("1 color --color blurple", "blurple"),
        ("1 paint", "give 'paint' its labels"),
        ("1 mix --part '1 color'", "of other rewards"),
        ("1 own --reward mine", "FILE.py:NAME"),
    ],
)
def test_a_part_that_cannot_be_is_refused_by_name(part, words):
    with pytest.raises(PxpoError, match=words):
        mix(part).make(CODE)


def test_an_empty_choice_says_what_to_give(capsys):
    assert cli.main(["mix"]) == 2 and "--part" in capsys.readouterr().err
    assert cli.main(["own"]) == 2 and "FILE.py:NAME" in capsys.readouterr().err


def test_a_run_that_names_a_broken_mix_is_refused_as_it_is_read(here, model_folder):
    assert small(model_folder, here / "run", "mix", "--part", "1 color") == 0
    record = here / "run" / "run.json"
    record.write_text(record.read_text().replace("1.0 color", "1.0 dance"))
    with pytest.raises(RunError, match="dance"):
        load_run(here / "run")
