"""The app as a Space runs it: signing in with a browser, pushing with what the login gave, and the
front matter that the Space is built from."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from conftest import answers, free_port, new_context
from hub_server import Hub
from packaging.requirements import Requirement

from pxpo.embedded import TINY_WORLD

ROOT = Path(__file__).resolve().parents[1]
SECRET = "hf_oauth_secret"


def front_matter() -> dict:
    return yaml.safe_load((ROOT / "README.md").read_text(encoding="utf-8").split("---")[1])


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_the_front_matter_keeps_the_rules():
    matter = front_matter()
    assert set(matter) <= {
        "title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version",
        "app_file", "suggested_hardware", "startup_duration_timeout", "license",
        "short_description", "models", "preload_from_hub", "hf_oauth", "hf_oauth_scopes", "tags",
        "thumbnail",
    }  # fmt: skip
    assert matter["sdk"] == "gradio" and (ROOT / matter["app_file"]).exists()
    assert matter["suggested_hardware"] == "a10g-small"
    assert len(matter["short_description"]) <= 60
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {matter["colorFrom"], matter["colorTo"]} <= colors
    assert re.fullmatch(r"\d+[smh]?", matter["startup_duration_timeout"])
    assert matter["hf_oauth"] is True and matter["hf_oauth_scopes"] == ["contribute-repos"]
    for line in matter["preload_from_hub"]:
        repo, files = line.split(" ")
        assert repo in matter["models"]
        assert not any(file.endswith((".bin", ".ckpt")) for file in files.split(","))


def test_the_sdk_is_the_gradio_that_is_tested():
    import gradio

    pinned = re.search(r"^gradio\[.*\]==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert front_matter()["sdk_version"] == pinned[1] == gradio.__version__
    assert f"{sys.version_info.major}." == front_matter()["python_version"][:2]


def test_what_is_required_is_there_and_agrees():
    """requirements.txt and all that it brings, each as new as the others ask for."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    waiting = [Requirement(line) for line in lines if not line.startswith("#")]
    seen = set()
    while waiting:
        wanted = waiting.pop()
        found = metadata.distribution(wanted.name)
        assert wanted.specifier.contains(found.version, prereleases=True), (wanted, found.version)
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        for line in found.requires or ():
            needed = Requirement(line)
            extras = [{"extra": extra} for extra in wanted.extras or {""}]
            if needed.marker is None or any(needed.marker.evaluate(extra) for extra in extras):
                waiting.append(needed)
    assert len(seen) > 40


def test_a_space_takes_every_file_without_lfs():
    sizes = {path: path.stat().st_size for path in tracked() if path.exists()}
    assert max(sizes.values()) < 10_000_000, max(sizes, key=sizes.get)
    assert sum(sizes.values()) < 60_000_000


def commands() -> list[str]:
    """The manual's lines that push the Space."""
    manual = (ROOT / "assets" / "MANUAL.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^hf .*OWNER/pxpo-studio.*$", manual, re.M)


@pytest.mark.slow
@pytest.mark.skipif(
    not (TINY_WORLD / "model_index.json").exists(), reason="Tiny World has not been made"
)
def test_the_manual_s_commands_push_the_space_and_it_starts_from_what_arrived(tmp_path):
    hub = Hub()
    hub.tokens[SECRET] = {"name": "ada", "orgs": [], "rights": ["write"]}
    here, there = tmp_path / "here", tmp_path / "there"
    for path in tracked():
        if path.exists():
            copy = here / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    private = [here / "runs/studio/private", here / "assets/report/runs/color/updates/0001"]
    for file in private:  # somebody's run, and one that the report was made from
        file.parent.mkdir(parents=True)
        file.write_text("a run")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": SECRET,
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    assert len(commands()) == 2
    for command in commands():
        command = command.replace("OWNER", "ada")
        subprocess.run(command, shell=True, cwd=here, env=environment, check=True, timeout=300)
    assert hub.wishes[0]["sdk"] == "gradio" and hub.wishes[0]["type"] == "space"
    assert hub.wishes[0]["hardware"] == "a10g-small"
    arrived = hub.repos["ada/pxpo-studio"]
    del arrived[".gitattributes"]  # the Hub's own
    wanted = {p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()}
    wanted -= {file.relative_to(here).as_posix() for file in private}
    assert set(arrived) == wanted
    for name, content in arrived.items():
        assert content == (here / name).read_bytes(), name
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(content)
    port = free_port()
    environment |= {"PXPO_PORT": str(port), "OMP_NUM_THREADS": "1"}
    python = os.environ.get("SPACE_PYTHON", sys.executable)  # one with requirements.txt alone
    process = subprocess.Popen([python, "app.py"], cwd=there, env=environment)
    try:
        answers(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        process.wait(20)
        hub.shutdown()
        hub.server_close()


@pytest.fixture
def space(model_folder, segmenter, tmp_path):
    """The app in a process of its own with a Space's environment: its address, Hub and provider."""
    pytest.importorskip("joserfc")
    from oauth_server import Provider

    port, hub, provider = free_port(), Hub(), Provider("ada", SECRET, "client")
    hub.tokens[SECRET] = {"name": "ada", "orgs": [], "rights": ["write"]}
    environment = {
        **os.environ, "SYSTEM": "spaces", "SPACE_ID": "ada/studio", "OAUTH_CLIENT_ID": "client",
        "OAUTH_CLIENT_SECRET": "secret", "OAUTH_SCOPES": "openid profile contribute-repos",
        "OPENID_PROVIDER_URL": provider.url, "HF_ENDPOINT": hub.url, "HF_TOKEN": "",
        "PXPO_RUNS": str(tmp_path / "runs"), "PXPO_MODEL": str(model_folder),
        "PXPO_SEGMENTER": segmenter.name, "PXPO_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=environment,
                               stdout=log, stderr=subprocess.STDOUT)  # fmt: skip
    answers(f"http://localhost:{port}", process)
    yield f"http://localhost:{port}", hub, provider
    process.terminate()
    process.wait(20)
    log.seek(0)
    assert SECRET not in log.read()
    assert not any(SECRET.encode() in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
    for server in (hub, provider):
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_signing_in_with_a_browser_and_pushing(space, browser):
    address, hub, provider = space
    page = new_context(browser).new_page()
    page.goto(address)
    page.wait_for_function(
        "document.querySelector('#status textarea')?.value.includes('Paint what')", timeout=180_000
    )
    page.get_by_role("button", name="Push to the Hugging Face Hub").click()
    page.locator("#repo input, #repo textarea").fill("ada/painted")
    assert page.locator("#token").count() == 0  # a Space never asks for a token
    page.locator("#push").click()
    page.get_by_text("Sign in first").wait_for()
    page.locator("#login").click()
    page.wait_for_function(
        "document.querySelector('#status textarea')?.value.includes('your run again')",
        timeout=180_000,
    )
    assert "contribute-repos" in provider.scopes.split()
    page.get_by_role("button", name="Push to the Hugging Face Hub").click()
    page.locator("#repo input, #repo textarea").fill("ada/painted")
    page.locator("#push").click()
    page.locator("#pushed a").wait_for(timeout=180_000)
    assert page.locator("#pushed a").get_attribute("href") == f"{hub.url}/ada/painted"
    assert hub.repos["ada/painted"]["pytorch_lora_weights.safetensors"]
    page.context.close()


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        ([], True),
        (["--host", "localhost"], True),
        (["--host", "::1"], True),
        (["--share"], False),
        (["--host", "0.0.0.0"], False),
        (["--host", "192.168.0.7"], False),
        (["--host", "studio.example"], False),
        (["--host", "0.0.0.0", "--own-token"], True),
    ],
)
def test_the_owner_s_token_is_for_the_owner(
    model, segmenter, tmp_path, monkeypatch, arguments, own
):
    """Whoever opens a page that others can reach pushes with a token of theirs, or not at all."""
    import gradio as gr

    import app

    pages, pushes = [], []

    def push(*values, token, **options):
        pushes.append(token)
        yield from ()
        return "address"

    monkeypatch.setattr("app.open_models", lambda *_: (model, segmenter, ""))
    monkeypatch.setattr("app.launch", lambda page, **_: pages.append(page))
    monkeypatch.setattr("app.Studio.push", push)
    monkeypatch.setattr("sys.argv", ["app.py", "--runs", str(tmp_path), *arguments])
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    app.main()
    blocks = pages[0].build()
    press = next(event.fn for event in blocks.fns.values() if event.name == "push")
    assert len(list(press("run", "ada/x", False, False, " hf_mine ", None))) == 1
    if own:
        assert len(list(press("run", "ada/x", False, False, " ", None))) == 1
    else:
        with pytest.raises(gr.Error, match="token of yours"):
            list(press("run", "ada/x", False, False, " ", None))
    assert pushes == ["hf_mine", None][: 1 + own]


@pytest.mark.parametrize(("name", "own"), [("0.0.0.0", False), ("127.0.0.1", True)])
def test_gradio_s_own_variable_counts_too(monkeypatch, name, own):
    import app

    monkeypatch.setenv("GRADIO_SERVER_NAME", name)
    assert app.is_local(app.address(None)) == own
    monkeypatch.setattr("app.get_space", lambda: "ada/studio")  # behind the Hub's own proxy
    assert not app.is_local("127.0.0.1")
