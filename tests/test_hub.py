"""A LoRA leaves the house: its folder, its card, and every way that pushing can end."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_lora
from hub_server import Hub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save as safetensors

from pxpo import RewardSpec, begin, finish, generate, load_model, settings_for, teach
from pxpo.card import base_of, write_folder
from pxpo.embedded import TINY_WORLD
from pxpo.errors import HubError, LoraError
from pxpo.hub import pull, push
from pxpo.lora_files import COMFYUI_FILE, FILE_NAME, PEFT_CONFIG, PEFT_FILE
from pxpo.studio import Studio

TOKEN, READER = "hf_writer", "hf_reader"


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    hub.tokens[TOKEN] = {"name": "ada", "orgs": [{"name": "lab"}], "rights": ["write"]}
    hub.tokens[READER] = {"name": "bob", "orgs": [], "rights": []}
    monkeypatch.setattr("pxpo.hub.ENDPOINT", hub.url)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its own retries
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module")
def run(model_folder):
    model = load_model(model_folder, device="cpu")
    settings = settings_for("paint", prompt="a lake", steps=3, rank=2, shown=2, images=2, seed=7)
    lora = random_lora(model)
    milder = {name: weight / 2 for name, weight in lora.weights.items()}  # so that it is no noise
    return taught(model, finish(begin(model, settings, replace(lora, weights=milder))))


def taught(model, run):
    """The run after an update towards more blue."""
    reward = RewardSpec("color", {"more": True})
    run, judge = finish(generate(model, run)), reward.make()
    return finish(teach(model, run, reward, judge(run.trajectory.images), judge))


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    return write_folder(run, tmp_path_factory.mktemp("written") / "lora")


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "lora")


def code_of(folder) -> str:
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


def assert_its_code_gives_the_picture_on_its_card(folder):
    names = {}
    exec(code_of(folder), names)
    made = np.asarray(names["picture"])
    assert np.array_equal(made, np.asarray(Image.open(folder / "after.png")))
    assert not np.array_equal(made, np.asarray(Image.open(folder / "before.png")))


def test_the_folder_s_own_code_gives_the_picture_on_its_card(folder):
    assert_its_code_gives_the_picture_on_its_card(folder)


@pytest.mark.skipif(not TINY_WORLD.exists(), reason="Tiny World is not made")
def test_so_it_does_for_the_embedded_model(tmp_path):
    model = load_model(device="cpu")
    settings = settings_for("paint", steps=3, images=2, shown=1, seed=12)
    run = taught(model, finish(begin(model, settings)))
    assert_its_code_gives_the_picture_on_its_card(write_folder(run, tmp_path / "lora"))


def test_the_card_says_what_a_card_must(folder, run, model_folder):
    assert f"put `{COMFYUI_FILE}` into `models/loras`" in (folder / "README.md").read_text()
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert data["library_name"] == "diffusers" and data["instance_prompt"] == "a lake"
    assert {"lora", "pxpo", "template:sd-lora", "text-to-image"} <= set(data["tags"])
    assert data["widget"] == [{"text": "a lake", "output": {"url": "after.png"}}]
    record = json.loads((folder / "run.json").read_text())
    assert [one["settings"]["seed"] for one in record["updates"]] == [7, 7]
    assert "reward" in record["updates"][1]["metrics"]
    assert all((folder / name).exists() for name in ("strip.png", "reward.png"))
    assert run.model_name in (folder / "README.md").read_text()  # it lies here
    write_folder(run, folder, repo="ada/less-blue")
    assert str(model_folder.parent) not in (folder / "README.md").read_text()
    hub_model = replace(run, model_name="CompVis/stable-diffusion-v1-4")
    write_folder(hub_model, folder, repo="ada/less-blue")
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert data["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert data["base_model_relation"] == "adapter" and data["license"] == "creativeml-openrail-m"
    code = code_of(folder)
    assert '"ada/less-blue"' in code.replace("'", '"')
    compile(code, "card", "exec")


def test_a_base_inherits_the_licence_that_is_known_of_it(tmp_path):
    assert base_of(str(TINY_WORLD)).license == "apache-2.0"
    assert base_of("somebody/else").license == "other" and base_of("somebody/else").hub
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert base_of(str(tmp_path)).license == "mit" and not base_of(str(tmp_path)).hub


@pytest.mark.parametrize("repo", ["ada/less-blue", "lab/less-blue"])
@pytest.mark.parametrize("private", [True, False])
def test_what_arrives_is_what_lies_in_the_folder(hub, folder, repo, private):
    work, phases = push(folder, repo, token=TOKEN, private=private), []
    while True:
        try:
            phases.append(next(work))
        except StopIteration as end:
            address = end.value
            break
    assert address == f"{hub.url}/{repo}" and bool(hub.private[repo]) == private
    arrived = {name: c for name, c in hub.repos[repo].items() if name != ".gitattributes"}
    here = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    assert arrived == here
    assert [p.done for p in phases] == sorted(p.done for p in phases)
    assert phases[-1].done == phases[-1].total
    finish(push(folder, repo, token=TOKEN))
    assert hub.commits[repo] == 2
    if not private:
        refused(push(folder, repo, token=TOKEN, private=True), "exists and is public")
        assert hub.commits[repo] == 2 and not hub.private[repo]


def test_the_base_goes_beside_the_lora_and_the_card_needs_nothing_else(
    hub, run, tmp_path, monkeypatch
):
    folder = write_folder(run, tmp_path / "lora", repo="ada/all", with_base=True)
    finish(push(folder, "ada/all", token=TOKEN, base=run.model_name))
    assert "base/unet/config.json" in hub.repos["ada/all"]
    fetched = tmp_path / "fetched"
    for name, content in hub.repos["ada/all"].items():
        (fetched / name).parent.mkdir(parents=True, exist_ok=True)
        (fetched / name).write_bytes(content)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo: str(fetched))
    names = {}
    exec(code_of(fetched), names)
    assert np.array_equal(
        np.asarray(names["picture"]), np.asarray(Image.open(folder / "after.png"))
    )


def test_only_the_pipeline_s_own_files_go_beside_and_only_when_asked(hub, folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(load_model(device="cpu").name, base)
    for name in ("key.pem", ".env", "unet/notes.pkl", "private/run.json"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("secret")
    finish(push(folder, "ada/x", token=TOKEN, base=base))
    arrived = hub.repos["ada/x"]
    assert {"base/model_index.json", "base/unet/config.json"} <= set(arrived)
    assert b"secret" not in arrived.values() and not (folder / "base").exists()
    # Left behind by an earlier version of this program.
    shutil.copytree(base, folder / "base")
    finish(push(folder, "ada/y", token=TOKEN))
    assert not [name for name in hub.repos["ada/y"] if name.startswith("base")]
    refused(push(folder, "ada/z", token=TOKEN, base=tmp_path / "lora"), "no diffusers folder")
    assert "ada/z" not in hub.repos


@pytest.mark.parametrize("with_base", [True, False])
def test_a_studio_pushes_its_own_base_and_leaves_nothing_behind(
    hub, model, segmenter, tmp_path, with_base
):
    studio = Studio(model, segmenter, tmp_path / "runs")
    run = finish(studio.start(prompt="a", steps=3, rank=2))
    finish(studio.push(run.id, "ada/x", token=TOKEN, private=False, with_base=with_base))
    assert ("base/unet/config.json" in hub.repos["ada/x"]) == with_base
    refused(studio.push(run.id, "eve/x", token=TOKEN, private=False, with_base=True), "belongs to")
    with zipfile.ZipFile(studio.archive(run.id)) as archive:
        names = archive.namelist()
    assert {f"lora/{FILE_NAME}", f"lora/{COMFYUI_FILE}"} <= set(names)
    assert not [name for name in names if "base" in name]
    assert studio.admit(studio.archive(run.id)).count == run.count


def refused(work, words: str) -> None:
    with pytest.raises(HubError, match=words) as refusal:
        finish(work)
    assert TOKEN not in str(refusal.value)


def test_what_belongs_to_others_is_not_touched(hub, folder):
    hub.repos["eve/model"] = {"README.md": b"hers"}
    hub.repos["ada/other"] = {"model.bin": b"another of ada's"}
    before = json.dumps({k: {n: c.decode() for n, c in v.items()} for k, v in hub.repos.items()})
    refused(push(folder, "eve/model", token=TOKEN), "belongs to 'eve'.*ada/model")
    refused(push(folder, "ada/other", token=TOKEN), "holds another model")
    after = json.dumps({k: {n: c.decode() for n, c in v.items()} for k, v in hub.repos.items()})
    assert before == after
    assert all(method == "GET" for method, _ in hub.requests)


@pytest.mark.parametrize(
    "repo", ["", "no-owner", "ada/", "ada/a b", "ada/--x", "a/b/c", "ada/x.git"]
)
def test_a_bad_name_is_refused_before_anything_is_asked(hub, folder, repo):
    refused(push(folder, repo, token=TOKEN), "not the name of a repository")
    assert not hub.requests


def test_without_rights(hub, folder, monkeypatch):
    refused(push(folder, "bob/x", token=READER), "may not write")
    refused(push(folder, "ada/x", token="hf_expired"), "not valid or has expired")
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    refused(push(folder, "ada/x"), "there is no token")
    assert "bob/x" not in hub.repos and "ada/x" not in hub.repos


@pytest.mark.parametrize("where", ["whoami", "create", "preupload", "commit"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (429, "slow down"),
        (500, "answered 500"),
        (403, "may not write"),
        ("drop", "cannot be reached"),
    ],
)
def test_after_any_fault_the_lora_is_still_there_and_pushing_again_works(
    hub, folder, where, fault, words
):
    hub.faults[where] = fault
    refused(push(folder, "ada/x", token=TOKEN), words)
    hub.faults.clear()
    finish(push(folder, "ada/x", token=TOKEN))
    assert hub.repos["ada/x"]["pytorch_lora_weights.safetensors"]


def test_a_hub_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr("pxpo.hub.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    refused(push(folder, "ada/x", token=TOKEN), "cannot be reached")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty one of the Hub's client."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def test_what_is_pushed_can_be_pulled_and_gone_on_with(hub, folder, run, cache):
    finish(push(folder, "ada/x", token=TOKEN))
    assert {FILE_NAME, COMFYUI_FILE} <= set(hub.repos["ada/x"])
    lora = pull("ada/x", token=TOKEN)
    assert lora.rank == 2
    assert all(torch.equal(lora.weights[name], w) for name, w in run.lora.weights.items())


def test_a_repository_of_peft_s_is_pulled_with_its_config(hub, model, cache):
    state = {
        f"base_model.model.{name.replace('.default', '')}": w
        for name, w in random_lora(model).weights.items()
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    files = {PEFT_FILE: safetensors(state), PEFT_CONFIG: json.dumps(config).encode()}
    hub.repos["ada/peft"] = files
    assert pull("ada/peft", token=TOKEN).alpha == 6


def test_what_lies_on_the_hub_may_be_no_lora(hub, cache):
    hub.repos["ada/x"] = {FILE_NAME: b"not a LoRA"}
    with pytest.raises(LoraError, match="No LoRA can be read"):
        pull("ada/x", token=TOKEN)


@pytest.mark.parametrize(
    ("source", "fault", "words"),
    [
        ("runs/nothing/lora", None, "no file or folder.*give the path"),
        ("runs/lora.safetensors", None, "no file or folder.*give the path"),
        ("nothing", None, "no file or folder.*OWNER/NAME"),
        ("https://huggingface.co/ada/x", None, "no file or folder.*OWNER/NAME"),
        ("ada/a b", None, "not the name of a repository.*OWNER/NAME"),
        ("ada/nothing", None, "neither a file or folder 'ada/nothing' here nor.*correct the name"),
        ("ada/x", "401 RepoNotFound", "neither a file or folder.*HF_TOKEN"),
        ("ada/x", 401, "token is not valid.*make a new one"),
        ("ada/x", 403, "gated or private; ask for access"),
        ("ada/x", "403 GatedRepo", "gated or private; ask for access"),
        ("ada/x", 429, "slow down; wait a few minutes"),
        ("ada/x", 500, "answered 500"),
        ("ada/x", "drop", "cannot be reached"),
        ("ada/empty", None, f"neither {FILE_NAME} nor {PEFT_FILE}.*give its path"),
    ],
)
def test_why_nothing_was_pulled(hub, cache, source, fault, words):
    hub.repos |= {"ada/x": {FILE_NAME: b""}, "ada/empty": {"README.md": b""}}
    if fault:
        hub.faults["resolve"] = fault
    not_pulled(source, words)


def test_nothing_is_pulled_while_offline(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    not_pulled("ada/x", "HF_HUB_OFFLINE is set, and 'ada/x' is not in the cache; unset it")


def test_nothing_is_pulled_from_a_hub_that_is_not_there(cache, monkeypatch):
    monkeypatch.setattr("pxpo.hub.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    not_pulled("ada/x", "cannot be reached")


def not_pulled(source: str, words: str) -> None:
    with pytest.raises(HubError, match=words) as refusal:
        pull(source, token=TOKEN)
    message = str(refusal.value)
    assert TOKEN not in message and "push" not in message and "\n" not in message
