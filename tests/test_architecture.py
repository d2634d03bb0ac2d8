"""Imports go one way: a module may only import from the layers below its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pxpo"

LAYERS = [
    {"errors", "checks", "embedded", "progress", "terminal"},
    {"settings", "processes", "turns"},
    {"steps", "credit", "strength"},
    {"models"},
    {"lora", "rollout"},
    {"lora_files", "update"},
    {"rewards"},
    {"run", "pace"},
    {"record", "plots", "hub", "measures", "pages"},
    {"store"},
    {"card", "config", "tracking"},
    {"studio", "evaluate", "reproduce"},
    {"__main__", "ui"},
]
LAYER = {module: height for height, layer in enumerate(LAYERS) for module in layer}


def imported(file: Path) -> set[str]:
    """Absolute names of all that a file imports, wherever in it: "torch", "pxpo.steps"."""
    package = ["pxpo", *file.relative_to(PACKAGE).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def own(file: Path) -> set[str]:
    """The modules of this package that a file imports, by their first name: "steps", "rewards"."""
    return {name.split(".")[1] for name in imported(file) if name.startswith("pxpo.")}


def test_the_reader_of_imports_sees_them():
    assert own(PACKAGE / "run.py") >= {"lora", "rollout", "update"}
    assert own(PACKAGE / "strength.py") == {"errors", "progress"}
    assert own(PACKAGE / "rewards" / "color.py") == {"errors", "rewards"}
    assert "torch.Tensor" in imported(PACKAGE / "credit.py")


def files(module: str) -> list[Path]:
    """The files of a module or of a package."""
    file = PACKAGE / f"{module}.py"
    return [file] if file.exists() else sorted((PACKAGE / module).rglob("*.py"))


def test_every_module_has_its_layer():
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names - {"__init__", "__pycache__"} == set(LAYER)


@pytest.mark.parametrize("module", sorted(LAYER))
def test_a_module_imports_only_from_below(module):
    allowed = {other for other, height in LAYER.items() if height < LAYER[module]} | {module}
    for file in files(module):
        assert own(file) <= allowed


@pytest.mark.parametrize("file", sorted((PACKAGE / "rewards").glob("*.py")), ids=lambda f: f.name)
def test_a_reward_needs_nothing_of_the_core_but_its_floor(file):
    """And one function, which makes a map smaller."""
    assert own(file) - {"credit"} <= {"rewards", *LAYERS[0]}
    used = {name for name in imported(file) if name.startswith("pxpo.credit")}
    assert used == ({"pxpo.credit.downsample"} if file.name == "wish.py" else set())


def outside_the_page() -> list[Path]:
    return sorted(file for file in PACKAGE.rglob("*.py") if PACKAGE / "ui" not in file.parents)


@pytest.mark.parametrize("file", outside_the_page(), ids=lambda f: f.name)
def test_only_the_page_knows_gradio_and_nothing_knows_the_page(file):
    tops = {name.split(".")[0] for name in imported(file)}
    assert not tops & {"gradio", "gradio_client", "spaces", "app"}
    assert "ui" not in own(file)


def test_the_page_does_not_know_the_app_and_its_parts_make_no_circle():
    order = [
        "zerogpu", "hosts", "parts", "rewards", "canvas", "masks", "events", "api", "page",
        "__init__",
    ]  # fmt: skip
    assert {file.stem for file in (PACKAGE / "ui").glob("*.py")} == set(order)
    for height, module in enumerate(order):
        names = imported(PACKAGE / "ui" / f"{module}.py")
        assert "app" not in {name.split(".")[0] for name in names}
        used = {name.split(".")[2] for name in names if name.startswith("pxpo.ui.")}
        assert used <= set(order[:height])
