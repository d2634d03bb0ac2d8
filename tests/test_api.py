"""The app's endpoints through a real gradio_client, and its tools through a real MCP client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import answers, free_port
from PIL import Image
from safetensors.torch import load_file

from pxpo import Run, Wish, load_model
from pxpo.errors import DivergedError, PxpoError
from pxpo.rewards import painted_map
from pxpo.run import teach
from pxpo.store import open_run
from pxpo.studio import Studio
from pxpo.turns import ModelThread

gradio_client = pytest.importorskip("gradio_client")

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 180  # seconds


@pytest.fixture(scope="module")
def address(model_folder, segmenter, tmp_path_factory):
    """The app on a random model: quick, and the same code path."""
    from pxpo.ui import Page, launch

    studio = Studio(
        load_model(model_folder, device="cpu"), segmenter, tmp_path_factory.mktemp("runs")
    )
    blocks = launch(Page(studio), prevent_thread_lock=True, quiet=True)
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def client(address):
    return gradio_client.Client(address, verbose=False)


@pytest.fixture
def run(client) -> str:
    return client.predict("a lake", seed=0, steps=3, rank=2, api_name="/generate")[0]


@pytest.fixture(scope="module")
def untouched(client) -> str:
    """A run that nothing is done to."""
    return client.predict("a lake", seed=0, steps=3, rank=2, api_name="/generate")[0]


@pytest.fixture
def paint(tmp_path):
    layer = np.zeros((16, 16, 4), np.uint8)
    layer[:8] = (0, 255, 0, 255)
    layer[8:] = (255, 0, 0, 255)
    Image.fromarray(layer).save(tmp_path / "paint.png")
    return gradio_client.handle_file(tmp_path / "paint.png")


def test_the_verbs_are_named_typed_and_documented(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/generate", "/step", "/run", "/back", "/forget", "/export"}
    parameters = {p["parameter_name"]: p for p in endpoints["/step"]["parameters"]}
    assert list(parameters) == [
        "run_id", "reward", "paint", "color", "labels", "want", "options", "strength", "images",
    ]  # fmt: skip
    assert parameters["reward"]["parameter_default"] == "paint"
    assert parameters["strength"]["parameter_default"] == 0.03
    begin = {p["parameter_name"]: p for p in endpoints["/generate"]["parameters"]}
    # The model's own.
    assert begin["steps"]["parameter_default"] == 50
    assert begin["guidance_scale"]["parameter_default"] == 7.5
    assert all(endpoint["description"] for endpoint in endpoints.values())


def test_a_run_from_its_first_picture_to_its_lora(client, run, paint):
    same_run, report, picture = client.predict(run, paint=paint, api_name="/step")
    assert same_run == run and report["step"] == 1 and len(report["scores"]) == 2
    assert Image.open(picture).size == (512, 512)
    report = client.predict(run, count=2, reward="color", images=2, api_name="/run")[1]
    assert report["step"] == 3 and report["reward"] == "less blue"
    report = client.predict(
        run, reward="segment", labels="Hair, Upper-clothes", want="more", images=2, api_name="/step"
    )[1]
    assert report["reward"] == "more Hair, Upper-clothes"
    report = client.predict(run, reward="brightness", want="more", images=2, api_name="/step")[1]
    assert report["reward"] == "more light"
    orange = {"color": "orange", "more": True}
    report = client.predict(run, reward="color", options=orange, images=2, api_name="/step")[1]
    assert report["reward"] == "more orange"
    assert client.predict(run, step=1, api_name="/back")[1]["step"] == 1
    lora, archive = client.predict(run, api_name="/export")
    taught = open_run(Path(archive))[0].updates[1].settings
    assert taught.images == 4  # the model's own, as none were named
    assert all(weight.any() for weight in load_file(lora).values())  # half were zero at step 0
    assert "run.json" in zipfile.ZipFile(archive).namelist()


def exported(client, run: str) -> Run:
    return open_run(Path(client.predict(run, api_name="/export")[1]))[0]


def test_paint_is_a_wish_that_adds_up_goes_on_and_is_forgotten(client, run, paint):
    report = client.predict(run, paint=paint, api_name="/step")[1]
    assert report["reward"] == "painted" and report["met"] is False
    report = client.predict(run, api_name="/step")[1]  # goes on without more paint
    assert report["step"] == 2 and len(exported(client, run).painted) == 1
    client.predict(run, count=2, paint=paint, api_name="/run")  # the first of them hears it
    wished = exported(client, run)
    assert wished.count == 4 and len(wished.painted) == 2
    assert torch.equal(wished.painted[1].picture, wished.updates[2].shown[0])
    same_run, report, picture = client.predict(run, api_name="/forget")
    assert same_run == run and report["step"] == 4 and Image.open(picture).size == (512, 512)
    assert exported(client, run).painted == ()
    with pytest.raises(Exception, match="nothing is painted"):
        client.predict(run, api_name="/step")


def test_a_run_ends_early_where_the_wish_is_met(client, run, paint, monkeypatch):
    answers = iter([False, False, True])  # of the beginning, and after each step
    monkeypatch.setattr(Wish, "met", lambda wish, maps: next(answers))
    report = client.predict(run, count=9, paint=paint, api_name="/run")[1]
    assert report["step"] == 2 and report["met"] is True
    for verb in ("/step", "/run"):
        with pytest.raises(Exception, match="the wish is met"):
            client.predict(run, api_name=verb)
    assert exported(client, run).count == 2


def test_strength_reaches_the_settings(client, run):
    client.predict(run, reward="color", images=2, strength=0.08, api_name="/step")
    client.predict(run, reward="color", images=2, strength=0.02, count=1, api_name="/run")
    client.predict(run, reward="color", images=2, api_name="/step")
    strengths = [update.settings.strength for update in exported(client, run).updates[1:]]
    assert strengths == [0.08, 0.02, 0.03]


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("generate", {"prompt": "a", "steps": 0}, "steps"),
        ("generate", {"prompt": "a", "guidance_scale": 0.5}, "guidance_scale"),
        ("step", {}, "nothing is painted"),
        ("step", {"reward": "color", "color": "no such colour"}, "no such colour"),
        ("step", {"reward": "segment", "labels": "Unicorn"}, "Unicorn"),
        ("step", {"reward": "poetry"}, "poetry"),
        ("step", {"reward": "color", "strength": -1}, "strength"),
        ("step", {"reward": "color", "strength": 2}, "most it can be is 1"),
        ("step", {"options": {"exact": True}}, "exact is for the command line"),
        ("run", {}, "nothing is painted"),
        ("step", {"paint": {"path": __file__}}, "must be an uploaded picture"),
        ("step", {"paint": gradio_client.handle_file(__file__)}, "the picture cannot be read"),
        ("step", {"reward": "color", "want": "none"}, "want is 'none'"),
        ("step", {"reward": "color", "color": 3}, "color is 3"),
        ("step", {"reward": "brightness", "options": {"color": "red"}}, "no option 'color'"),
        ("run", {"count": 0, "reward": "color"}, "count is 0"),
        ("run", {"count": 101, "reward": "color"}, "count is 101"),
        ("back", {"step": 7}, "no update 7"),
    ],
)
def test_bad_input_is_answered_with_its_reason(client, untouched, verb, arguments, words):
    arguments = arguments if verb == "generate" else {"run_id": untouched, **arguments}
    with pytest.raises(Exception, match=words) as refusal:
        client.predict(**arguments, api_name=f"/{verb}")
    assert "/tmp" not in str(refusal.value)
    assert client.predict(untouched, step=0, api_name="/back")[1]["step"] == 0  # nothing is lost


@pytest.mark.parametrize(
    "error",
    [DivergedError("The gradient's norm is nan; try less"), PxpoError("Out of memory on cpu")],
)
def test_a_step_that_fails_is_said_and_the_run_is_as_before(client, run, monkeypatch, error):
    before = load_file(client.predict(run, api_name="/export")[0])

    def fail(*_, **__):
        raise error
        yield

    with monkeypatch.context() as broken:
        broken.setattr("pxpo.run.update", fail)
        with pytest.raises(Exception, match=str(error)):
            client.predict(run, reward="color", images=2, api_name="/step")
    after = load_file(client.predict(run, api_name="/export")[0])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert client.predict(run, reward="color", images=2, api_name="/step")[1]["step"] == 1


@pytest.mark.slow
def test_paint_means_the_same_as_on_the_command_line(client, tmp_path):
    """Greys, 16 bits and a phone's orientation too: Gradio hands the picture over as it is."""
    mask = np.zeros((16, 32), np.uint8)
    mask[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    reports = []
    for name, picture in (
        ("grey", Image.fromarray(mask)),
        ("sixteen", Image.fromarray(mask.astype(np.uint16) * 257)),
        ("colours", Image.fromarray(mask).convert("RGBA")),
        ("turned", Image.fromarray(mask[::-1].copy())),
    ):
        file = tmp_path / f"{name}.png"
        picture.save(file, **({"exif": exif} if name == "turned" else {}))
        run = client.predict("a lake", seed=0, steps=3, rank=2, api_name="/generate")[0]
        paint = gradio_client.handle_file(file)
        reports.append(client.predict(run, paint=paint, api_name="/step")[1])
        with Image.open(file) as opened:
            assert painted_map(opened).mean() == 1
    assert all(report == reports[0] for report in reports)


@pytest.mark.parametrize("verb", ["step", "back", "export"])
def test_nobody_guesses_a_run(client, verb):
    with pytest.raises(Exception, match="no longer kept|not the name of a run"):
        client.predict("AAAAAAAAAAAAAAAA", api_name=f"/{verb}")


def test_a_cancelled_step_leaves_the_run_as_it_was_and_the_model_free(client, run):
    job = client.submit(run, count=100, reward="color", images=2, api_name="/run")
    while not job.outputs():
        pass
    job.cancel()
    report = client.predict(run, reward="color", images=2, api_name="/step")[1]
    assert report["step"] < 100


def learn_for_a_while(address: str, seed: int, steps: int) -> dict:
    """A person's run over the wire; its LoRA in the end, and the last report."""
    client = gradio_client.Client(address, verbose=False)
    run = client.predict("a lake", seed=seed, steps=3, rank=2, api_name="/generate")[0]
    for step in range(steps):
        reward = ("color", "segment")[step % 2]
        report = client.predict(run, reward=reward, images=2, api_name="/step")[1]
    return {**load_file(client.predict(run, api_name="/export")[0]), "report": report}


def test_a_picture_that_somebody_may_be_reading_is_not_written_again(address):
    client = gradio_client.Client(address, verbose=False, download_files=False)
    begin = {"prompt": "a pond", "seed": 0, "steps": 3, "rank": 2, "api_name": "/generate"}
    file = Path(client.predict(**begin)[2]["path"])
    file.write_bytes(b"being read")
    assert client.predict(**begin)[2]["path"] == str(file)
    assert file.read_bytes() == b"being read"
    file.unlink()


@pytest.mark.slow
def test_four_people_at_once_learn_as_if_alone(address):
    alone = [learn_for_a_while(address, seed, 2) for seed in range(2)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(learn_for_a_while, [address] * 4, [0, 1, 0, 1], [2] * 4))
    for one, other in zip(alone * 2, together, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one if name != "report")
        assert one["report"] == other["report"]


@pytest.mark.slow
def test_four_people_for_two_minutes_take_no_more_memory(model_folder, segmenter, tmp_path):
    port, sizes = free_port(), []
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "app.py", "--port", str(port), "--runs", str(tmp_path)]
    command += ["--model", str(model_folder), "--segmenter", segmenter.name]
    server = subprocess.Popen(command, cwd=ROOT)
    answers(address, server)
    end = time.monotonic() + 120

    def person(seed: int) -> list[dict]:
        runs = []
        while time.monotonic() < end:
            runs.append(learn_for_a_while(address, seed, 4))
            sizes.append((time.monotonic(), pages_of(server)))
        return runs

    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(person, range(4)))
        for seed, runs in enumerate(together):
            alone = learn_for_a_while(address, seed, 4)
            for run in runs:
                assert run["report"] == alone["report"]
                assert all(torch.equal(run[k], alone[k]) for k in run if k != "report")
    finally:
        server.terminate()
        server.wait(20)
    halfway = [size for at, size in sizes if at < end - 60]
    assert sizes[-1][1] < max(halfway) * 1.05


def pages_of(process: subprocess.Popen) -> int:
    """Pages of memory that it holds."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])


@pytest.mark.slow
def test_whoever_finds_the_queue_full_is_told_so(model_folder, segmenter, tmp_path):
    from pxpo.ui import Page, launch

    studio = Studio(load_model(model_folder, device="cpu"), segmenter, tmp_path)
    blocks = launch(Page(studio), waiting=2, prevent_thread_lock=True, quiet=True)
    try:
        client = gradio_client.Client(blocks.local_url, verbose=False)
        run = client.predict("a lake", seed=0, steps=3, rank=2, api_name="/generate")[0]
        busy = client.submit(run, count=100, reward="color", images=2, api_name="/run")
        while not busy.outputs():
            time.sleep(0.01)  # until it is being worked on, and the queue is empty
        jobs = [client.submit(run, reward="color", images=2, api_name="/step") for _ in range(4)]
        while sum(job.done() for job in jobs) < 2:
            time.sleep(0.01)
        busy.cancel()
        refused = [job for job in jobs if "full" in str(job.exception(LIMIT) or "")]
        assert len(refused) == 2
    finally:
        blocks.close()


def test_an_mcp_client_lists_and_calls_the_tools(address, run):
    mcp = pytest.importorskip("mcp")
    from mcp.client.streamable_http import streamable_http_client

    async def talk():
        url = address.rstrip("/") + "/gradio_api/mcp/"
        async with (
            streamable_http_client(url) as (read, write, _),
            mcp.ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            answer = await session.call_tool(
                next(name for name in tools if name.endswith("step")),
                {"run_id": run, "reward": "color", "images": 2},
            )
            return tools, answer

    with ThreadPoolExecutor(1) as pool:  # where no browser's event loop runs
        tools, answer = pool.submit(asyncio.run, talk()).result()
    step = next(tool for name, tool in tools.items() if name.endswith("step"))
    assert len(tools) == 6 and "update the LoRA once" in step.description
    assert "run_id" in step.inputSchema["properties"]
    assert not answer.isError
    assert '"step": 1' in json.dumps([part.model_dump(mode="json") for part in answer.content]) or (
        "step" in str(answer.content)
    )


def test_all_that_computes_runs_on_one_thread(client, run, paint, monkeypatch):
    threads = set()

    def watched(*values):
        threads.add(threading.current_thread().name)
        return (yield from teach(*values))

    monkeypatch.setattr("pxpo.studio.teach", watched)
    client.predict(run, paint=paint, api_name="/step")
    client.predict(run, count=2, paint=paint, api_name="/run")
    assert len(threads) == 1 and "model" in threads.pop()


@pytest.mark.slow
def test_who_waits_while_another_stops_is_served(address):
    """Stop reaches the model's thread after the next person's work, which must not fail for it."""
    one, other = (gradio_client.Client(address, verbose=False) for _ in range(2))
    begin = {"steps": 3, "rank": 2, "api_name": "/generate"}
    mine, theirs = (c.predict("a lake", seed=0, **begin)[0] for c in (one, other))
    for turn in range(1, 7):
        stopped = one.submit(mine, count=100, reward="color", images=2, api_name="/run")
        while not stopped.outputs():
            time.sleep(0.005)
        waiting = other.submit(theirs, reward="color", images=2, api_name="/step")
        time.sleep(0.05 * (turn % 3))
        stopped.cancel()
        assert waiting.result(LIMIT)[1]["step"] == turn
        one.predict(mine, step=0, api_name="/back")


def test_work_given_up_is_closed_before_other_work_begins():
    thread, happened = ModelThread(patience=0), []

    def work(name: str):
        happened.append(f"{name} begins")
        try:
            yield 1
            yield 2
        finally:
            happened.append(f"{name} ends")

    given_up, next_one = (thread.iterate(work(name)) for name in ("first", "second"))
    assert next(given_up) == 1  # and nobody closes it
    assert list(next_one) == [1, 2]
    assert happened == ["first begins", "first ends", "second begins", "second ends"]
    third = thread.iterate(work("third"))
    assert next(third) == 1
    assert list(given_up) == []  # it does not come back to life, nor disturb the third
    assert list(third) == [2]


def test_work_that_is_given_up_is_closed_on_that_thread():
    thread, closed_on = ModelThread(), []

    def work():
        try:
            yield 1
            yield 2
        finally:
            closed_on.append(threading.current_thread().name)

    given_up = thread.wrap(work)()
    assert next(given_up) == 1
    given_up.close()
    assert list(thread.wrap(work)()) == [1, 2]
    assert closed_on == ["model_0", "model_0"]
