"""`pip install .`: what is in the package, what it asks for, and that it works from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import pxpo
from pxpo.embedded import EXAMPLES, OPENING, SINGLE_FILE, TINY_SEGMENTER, TINY_WORLD

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (TINY_WORLD, TINY_SEGMENTER, OPENING, EXAMPLES, SINGLE_FILE)

made = pytest.mark.skipif(
    not (TINY_WORLD / "model_index.json").exists(), reason="Tiny World has not been made"
)


def required(file: str) -> set[str]:
    lines = (ROOT / file).read_text().splitlines()
    return {str(Requirement(line)) for line in lines if line and not line.startswith("#")}


def files_in(folder: Path, pattern: str = "*") -> set[str]:
    """Every file in `folder` by its name in it, but Python's own leavings."""
    files = {path.relative_to(folder) for path in folder.rglob(pattern) if path.is_file()}
    return {file.as_posix() for file in files if "__pycache__" not in file.parts}


@made
def test_what_is_embedded_lies_in_the_checkout_s_assets():
    assert {folder.parent for folder in SHIPPED} == {ROOT / "assets"}
    assert all(folder.is_dir() for folder in SHIPPED)


def test_every_package_is_named_and_the_requirements_are_read_from_their_files():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tool, dynamic = project["tool"]["setuptools"], project["project"]["dynamic"]
    folders = {file.parent for file in (ROOT / "pxpo").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(tool["packages"]) == packages | {"pxpo.assets"}
    assert {"version", "dependencies", "optional-dependencies"} == set(dynamic)
    assert tool["dynamic"]["dependencies"]["file"] == "requirements.txt"
    assert tool["dynamic"]["optional-dependencies"]["test"]["file"] == "tests/requirements.txt"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing in it but the package, as `pip install .` leaves it."""
    tools = {found.name: found.version for found in distributions()}
    if "pip" not in tools or int(tools.get("setuptools", "0").split(".")[0]) < 77:
        pytest.skip("this environment has no pip, or no setuptools from 77 on, to build with")
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pxpo", "assets", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # The network is not asked: the build uses this environment's setuptools.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile"]
    subprocess.run([*pip, *offline, "--target", site, source], check=True)
    return site


@pytest.fixture
def distribution(site: Path) -> Distribution:
    (found,) = distributions(path=[str(site)])
    return found


@made
def test_the_package_holds_its_code_and_what_is_embedded_and_nothing_else(site):
    assert {path.name for path in site.iterdir()} == {
        "bin", "pxpo", f"pxpo-{pxpo.__version__}.dist-info"
    }  # fmt: skip
    assets = {f"assets/{folder.name}/{name}" for folder in SHIPPED for name in files_in(folder)}
    assert files_in(site / "pxpo") == files_in(ROOT / "pxpo", "*.py") | assets


def test_it_asks_for_what_a_space_installs(distribution):
    lines = distribution.requires or []
    run = {str(Requirement(line)) for line in lines if "extra ==" not in line}
    test = {line.removesuffix('; extra == "test"') for line in lines if "extra ==" in line}
    assert run == required("requirements.txt")
    assert {str(Requirement(line)) for line in test} == required("tests/requirements.txt")
    assert distribution.version == pxpo.__version__


@pytest.mark.slow
@made
def test_the_command_works_from_any_folder(site, tmp_path):
    """An update with the embedded model and segmenter, where there is no checkout."""
    command = [site / "bin" / "pxpo", "segment", "--updates", "1", "--images", "2", "--steps", "2",
               "--shown", "1", "--out", "run"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").exists()
