"""Wherever it runs: behind a proxy, offline, in a folder of any name, on a terminal of any kind."""

from __future__ import annotations

import ast
import http.client
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
import torch
import yaml
from conftest import answers, free_port
from huggingface_hub import ModelCard
from PIL import Image

import app
from pxpo import RewardSpec, Segmenter, begin, finish, generate, load_model, load_run, save_run
from pxpo import __main__ as cli
from pxpo.card import write_folder
from pxpo.checks import network_fault
from pxpo.config import read_config, write_config
from pxpo.errors import HubError, ModelError, RunError, SettingError
from pxpo.evaluate import evaluate, write_evaluation
from pxpo.hub import pull
from pxpo.pages import code, plain
from pxpo.plots import reward_curve
from pxpo.rewards import Tools
from pxpo.run import go_to, teach
from pxpo.settings import settings_for
from pxpo.store import check_writable, open_run, pack
from pxpo.terminal import print_anything
from pxpo.ui.hosts import LOOPBACK, KnownHosts, host_name, known_hosts, past_proxies

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = "127.0.0.1:9"  # a port where nothing answers
BLUE = RewardSpec("color", {"color": "blue"})


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No proxy and no page's variable of this machine."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("GRADIO_SERVER_NAME", "SSL_CERT_FILE", "PXPO_HOST", "PXPO_DOMAIN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def run(model_folder):
    """A run of one update."""
    model = load_model(model_folder, device="cpu")
    settings = settings_for("color", prompt="a lake", steps=2, rank=2, shown=2, images=2)
    return taught(model, finish(begin(model, settings)))


def taught(model, run):
    run, judge = finish(generate(model, replace(run, reward=BLUE))), BLUE.make()
    return finish(teach(model, run, BLUE, judge(run.trajectory.images), judge))


# Behind a proxy, offline


UNUSABLE = {
    "ALL_PROXY": ["socks://ada:geheim@h:1", "socks5://ada:geheim@h:1", "socks5h://h:1", "ftp://h"],
    "HTTP_PROXY": ["socks4://ada:geheim@h:1", "http://h:port"],
    "https_proxy": ["socks://h:1"],
    "SSL_CERT_FILE": ["/no/where.pem"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in UNUSABLE.items() for value in values]
)
def test_a_proxy_that_cannot_be_used_is_said_in_one_line_wherever_it_matters(
    monkeypatch, name, value
):
    if value.startswith("socks5"):
        monkeypatch.setitem(sys.modules, "socksio", None)  # which not everybody has
    assert network_fault() == network_fault(httpx.Client) == ""
    monkeypatch.setenv(name, value)
    for error, work in (
        (HubError, lambda: pull("ada/lora")),
        (ModelError, lambda: load_model("ada/model")),
        (ModelError, lambda: Segmenter("ada/segmenter")),
    ):
        with pytest.raises(error) as refused:
            work()
        message = str(refused.value)
        assert name.upper() in message and "socks5://HOST:PORT" in message
        assert "geheim" not in message and "\n" not in message
    assert network_fault(httpx.Client)


def test_models_on_this_machine_need_no_network(monkeypatch, model_folder, segmenter):
    monkeypatch.setenv("ALL_PROXY", "socks://h:1")
    assert load_model(model_folder, device="cpu").name == str(model_folder)
    assert Segmenter(segmenter.name).labels == segmenter.labels


@pytest.mark.parametrize(
    "listed",
    [{}, {"NO_PROXY": "corp.example"}, {"no_proxy": "corp.example", "NO_PROXY": "other"},
     {"no_proxy": "", "NO_PROXY": "corp.example"}, {"NO_PROXY": "*"}],
)  # fmt: skip
@pytest.mark.parametrize("proxy", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_the_page_finds_itself_behind_any_proxy(monkeypatch, listed, proxy):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    for name, value in {proxy: f"http://{NOWHERE}", "no_proxy": "", "NO_PROXY": ""}.items():
        monkeypatch.setenv(name, value)  # so that it is put back
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, listed[name]) if name in listed else monkeypatch.delenv(name)
    past_proxies(*LOOPBACK)
    assert listed.get("NO_PROXY", "") != "corp.example" or "corp.example" in os.environ["NO_PROXY"]
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for host in ("localhost", "127.0.0.1"):
        assert httpx.get(f"http://{host}:{server.server_port}").status_code == 204
    server.shutdown()
    server.server_close()
    if listed.get("NO_PROXY") != "*":
        with pytest.raises(httpx.ConnectError):  # anybody else is asked for through the proxy
            httpx.get("http://192.0.2.1")


def test_offline_without_a_cache_that_is_the_reason(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for work in (load_model, Segmenter, pull):
        with pytest.raises((HubError, ModelError), match="HF_HUB_OFFLINE is set"):
            work("ada/nowhere")


# In any folder, on any terminal: as processes of their own


@pytest.fixture
def odd_place(tmp_path, model_folder, segmenter):
    """A folder of blanks and other scripts, with a model and a segmenter in it, and a cache."""
    place = tmp_path / "a b" / "ж 日本 'o"
    shutil.copytree(model_folder, place / "das Modell")
    shutil.copytree(segmenter.name, place / "segmenter")
    hub = place / "cache" / "hub" / "models--ada--tiny"
    shutil.copytree(model_folder, hub / "snapshots" / "0123abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0123abc")
    return place


HOSTILE = {
    "HTTP_PROXY": f"http://{NOWHERE}", "HTTPS_PROXY": f"http://{NOWHERE}",
    "ALL_PROXY": f"http://{NOWHERE}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    "HOME": "/nowhere", "PYTHONPATH": str(ROOT),
}  # fmt: skip


def asked_of(port: int, host: str, path: str = "/") -> int:
    """The status of the answer to such a Host header."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", host)
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.slow
def test_the_app_runs_in_the_oddest_place(odd_place):
    """Behind a proxy, offline with a cache, from another folder, in cp1252; for known hosts."""
    port = free_port()
    environment = {
        **os.environ, **HOSTILE, "PYTHONIOENCODING": "cp1252", "HF_HOME": str(odd_place / "cache"),
        "PXPO_PORT": str(port), "PXPO_DOMAIN": "studio.example,Other.example",
    }  # fmt: skip
    arguments = ["--model", "ada/tiny", "--segmenter", "segmenter"]
    with (odd_place / "log").open("w+b") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), *arguments], cwd=odd_place, env=environment,
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            answers(f"http://127.0.0.1:{port}", process, 300)
            for host in ("127.0.0.1", f"localhost:{port}", f"[::1]:{port}", "STUDIO.example",
                         "other.example:443"):  # fmt: skip
                assert asked_of(port, host) == 200, host
            for path in ("/", "/config", "/gradio_api/mcp/", "/gradio_api/info"):
                assert asked_of(port, f"evil.example:{port}", path) == 403, path
            page = httpx.get(f"http://127.0.0.1:{port}/config", trust_env=False).text
            assert "Tiny World instead" not in page and str(odd_place.parent) not in page
            assert process.poll() is None
        finally:
            process.terminate()
            process.wait(30)
        log.seek(0)
        assert b"Traceback" not in log.read()


@pytest.mark.slow
def test_a_command_runs_in_the_oddest_place(odd_place):
    """With a relative model, in an ASCII terminal."""
    environment = {**os.environ, **HOSTILE, "PYTHONIOENCODING": "ascii"}
    command = ["color", "--model", "das Modell", "--prompt", "$x $$ a lake", "--updates", "1",
               "--steps", "2", "--images", "2", "--shown", "1", "--rank", "2",
               "--out", "runs/ж 1"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pxpo", *command], cwd=odd_place, env=environment,
        capture_output=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0 and b"Done: 1 updates" in done.stdout, done.stderr
    folder = odd_place / "runs" / "ж 1"
    run = load_run(folder)
    assert run.count == 1 and run.settings.prompt == "$x $$ a lake"
    assert Path(run.model_name).name == "das Modell" and Path(run.model_name).is_absolute()
    assert (folder / "lora" / "README.md").exists()


def test_a_path_that_is_no_text_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    """As is any other one than ASCII's where LC_ALL=C and PYTHONUTF8=0."""
    folder = tmp_path / os.fsdecode(b"\xe6\xff")
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("model").mkdir()
    monkeypatch.setattr("pxpo.__main__.load_model", lambda *_, **__: 1 / 0)
    assert cli.main(["color", "--model", "model"]) == 2
    assert cli.main(["segment", "--segmenter", "model"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("set PYTHONUTF8=1" in line for line in lines)
    with pytest.raises(SettingError, match="PYTHONUTF8"):
        app.open_models("model", None)


@pytest.mark.slow
def test_a_proxy_that_cannot_be_used_stops_the_app_before_the_model(tmp_path):
    environment = {**os.environ, "ALL_PROXY": "socks://ada:geheim@h:1"}
    done = subprocess.run(
        [sys.executable, "app.py", "--runs", str(tmp_path / "runs")], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1 and "geheim" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("app.py: "))
    assert done.stderr.endswith(line + "\n") and "ALL_PROXY" in line


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_what_a_terminal_has_no_sign_for_is_printed_as_an_escape(monkeypatch, encoding):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2)]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    print_anything()
    for stream in streams:
        print("🔨 日本 ü", file=stream)
        written = stream.buffer.getvalue().decode(encoding)
        assert written == ("🔨 日本 ü\n" if encoding == "utf-8" else written)
        assert encoding == "utf-8" or "\\u65e5\\u672c" in written
    monkeypatch.setattr("sys.stdout", None)  # as under pythonw
    print_anything()


# A folder that refuses


def test_what_cannot_be_written_is_said_before_the_model_is_loaded(
    run, tmp_path, monkeypatch, capsys
):
    def load(*_, **__):
        raise AssertionError("the model was loaded")

    (tmp_path / "a file").write_text("")
    monkeypatch.setattr("app.open_models", load)
    monkeypatch.setattr("pxpo.__main__.load_model", load)
    monkeypatch.setattr("sys.argv", ["app.py", "--runs", str(tmp_path / "a file" / "runs")])
    with pytest.raises(SystemExit, match="app.py: the run cannot be saved in .*another folder"):
        app.main()
    assert cli.main(["color", "--out", str(tmp_path / "a file" / "run")]) == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")
    save_run(run, tmp_path / "run")
    for command in (["color"], ["reproduce", "--out", "a file/x"],
                    ["evaluate", "run", "--out", "a file/x"]):  # fmt: skip
        assert cli.main(command) == 2
    monkeypatch.setattr("pxpo.__main__.check_writable", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it was asked
        cli.main(["resume", "run"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all("cannot be saved in" in line for line in lines)


def test_whether_a_folder_can_be_written_is_found_out_without_a_trace(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "newer")
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())

    def refuse(*_, **__):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunError, match="Read-only file system"):
        check_writable(tmp_path / "new")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_have_the_rights_that_the_system_gives(run, tmp_path, mask):
    before = os.umask(mask)
    try:
        folder = tmp_path / "run"
        save_run(run, folder)
        write_folder(run, folder / "lora")
        pack(folder, tmp_path / "run.zip")
    finally:
        os.umask(before)
    for path in [folder, *folder.rglob("*"), tmp_path / "run.zip"]:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~mask, path


# Windows, by its rules


@pytest.fixture
def windows(monkeypatch):
    """No file is replaced or deleted while it is open or mapped; what only Unix has is gone."""
    for name in ("fchmod", "umask", "fork", "getuid", "geteuid", "chown", "link"):
        monkeypatch.delattr(os, name, raising=False)

    def held(path) -> bool:
        real = os.path.realpath(path)
        descriptors = Path("/proc/self/fd")
        opened = {os.readlink(one) for one in descriptors.iterdir() if one.is_symlink()}
        return real in opened or f" {real}\n" in Path("/proc/self/maps").read_text()

    def guarded(work):
        def call(*paths, **options):
            if any(held(path) for path in paths):
                raise PermissionError(32, "The process cannot access the file")
            return work(*paths, **options)

        return call

    if not Path("/proc/self/maps").exists():
        pytest.skip("nothing here says which files are open")
    for name in ("replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))


def test_a_run_goes_on_where_no_open_file_can_be_replaced(model_folder, run, tmp_path, windows):
    model = load_model(model_folder, device="cpu")
    save_run(taught(model, run), tmp_path / "run")
    loaded = load_run(tmp_path / "run")  # whose files may stay mapped
    assert loaded.count == 2
    other = taught(model, go_to(loaded, 1))
    save_run(other, tmp_path / "run")
    assert load_run(tmp_path / "run").count == 2
    write_folder(other, tmp_path / "run" / "lora")
    pack(tmp_path / "run", tmp_path / "run.zip")
    again, folder = open_run(tmp_path / "run.zip")
    assert again.count == 2 and folder != tmp_path / "run"


def test_an_old_file_that_cannot_be_deleted_is_left_for_the_next_time(run, tmp_path, monkeypatch):
    save_run(run, tmp_path)
    stale = tmp_path / "updates" / "0009-0.safetensors"
    stale.write_bytes(b"")
    real = Path.unlink

    def refuse(path, *values, **options):
        if path == stale:
            raise PermissionError(32, "The process cannot access the file")
        real(path, *values, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        save_run(run, tmp_path)
    assert stale.exists() and load_run(tmp_path).count == 1
    save_run(run, tmp_path)
    assert not stale.exists()


@pytest.mark.parametrize(
    "name",
    ["con", "CON", "nul", "aux", "com1", "LPT1", "con.x", "0001-ab:stream", "0001-AB", "paint-AB",
     "0001-ab.", "0001-ab ", "paint", "Paint-ab", "０００１-ab", "../0001-ab"],
)  # fmt: skip
def test_no_run_names_a_file_that_windows_takes_for_another(run, tmp_path, name):
    """A device, or one that differs from another by its capitals alone."""
    save_run(run, tmp_path)
    record = json.loads((tmp_path / "run.json").read_bytes())
    record["updates"][1]["file"] = f"updates/{name}.safetensors"
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="updates.1.file"):
        load_run(tmp_path)


def test_no_text_is_read_or_written_in_the_system_s_encoding():
    for file in [ROOT / "app.py", *(ROOT / "pxpo").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "attr", "")
            if isinstance(node, ast.Call) and name in ("read_text", "write_text"):
                assert "encoding" in {one.arg for one in node.keywords}, (file, node.lineno)


# What people word


WORDED = [
    "a $x$ and $$ b",
    "$\\frac{",
    "red | green || blue\\|",
    "*a* _b_ **c** `d` ``e ``` f` ~~g~~",
    "<script>alert(1)</script> <!-- & &amp;",
    "[x](http://y.example) ![z](q.png)",
    "# a: 'b' \"c\" - {0} {prompt} %s \\n",
    "--- a\tb ---",
    "日本語の湖 ж 🌲👩‍👩‍👧 ‮abc",
    "null",
    "word " * 5000,
    "x" * 20000,
    "a\x00b\x07c\x7f",
]


@pytest.fixture(params=range(len(WORDED)), ids=[repr(text[:12]) for text in WORDED])
def worded(request, run):
    """A run with such words for its prompt and its reward."""
    text = WORDED[request.param]
    settings = replace(run.settings, prompt=text)
    first, second = run.updates
    updates = (
        replace(first, settings=settings),
        replace(second, settings=replace(settings, seed=9), reward=named(text)),
        replace(second, settings=settings, reward=named("a\nb")),
    )
    return text, replace(run, settings=settings, reward=named(text), updates=updates)


def named(text: str) -> RewardSpec:
    return RewardSpec("segment", {"labels": (text,)})


def test_a_card_shows_words_as_they_are(worded, tmp_path):
    markdown_it = pytest.importorskip("markdown_it")
    text, run = worded
    folder = write_folder(run, tmp_path / "lora")
    card = (folder / "README.md").read_text(encoding="utf-8")
    about = ModelCard.load(folder / "README.md").data.to_dict()
    assert about["instance_prompt"] == about["widget"][0]["text"] == text
    assert yaml.safe_load(card.split("\n---\n")[0])["instance_prompt"] == text
    markdown = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(
        card.split("\n---\n", 1)[1]
    )
    (fence,) = (token.content for token in markdown if token.type == "fence")
    constants = [one.value for one in ast.walk(ast.parse(fence)) if isinstance(one, ast.Constant)]
    assert text in constants
    lines = [shown_text(token) for token in markdown if token.type == "inline"]
    words = re.sub("[\x00-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", " ".join(text.split()))
    assert any(words in line and "on the prompt" in line for line in lines)
    assert lines[lines.index("prompt") + 1] == words  # its row in the table of settings
    rows = sum(token.type == "tr_open" for token in markdown)
    assert rows == sum(line.startswith("|") for line in card.splitlines()) - 3
    assert not any(token.type.startswith("html") for token in markdown)


def shown_text(token) -> str:
    """What a reader sees of a line of Markdown."""
    shown = ("text", "code_inline", "text_special")
    return "".join(
        " " if child.type == "softbreak" else child.content if child.type in shown else ""
        for child in token.children
    )


def test_a_run_keeps_words_as_they_are(worded, tmp_path):
    text, run = worded
    save_run(run, tmp_path / "run")
    pack(tmp_path / "run", tmp_path / "run.zip")
    again, _ = open_run(tmp_path / "run.zip")
    assert again.settings == run.settings and again.reward == run.reward
    write_config(tmp_path, "segment", {"prompt": (text, "b"), "labels": (text,)})
    flags = read_config(tmp_path / "run.yaml", "segment", ["prompt", "labels"])
    assert flags == [f"--prompt={text}", "--prompt=b", f"--labels={text}"]


def test_a_curve_keeps_its_room_beside_words(worded, tmp_path, recwarn):
    text, _ = worded
    figure = reward_curve({"this seed": ([0.0, 1.0], [0.0, 0.1])}, f"Reward: {text}")
    figure.savefig(tmp_path / "curve.png")
    assert not [one for one in recwarn if "collapsed" in str(one.message)]
    (axes,) = figure.axes
    assert axes.get_position().width > 0.7 and "\n" not in axes.get_title("left")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (840, 432)


def test_a_page_shows_words_as_they_are(run, model_folder, tmp_path):
    from html.parser import HTMLParser

    class Reader(HTMLParser):
        tags, text = set(), ""

        def handle_starttag(self, tag, _):
            self.tags.add(tag)

        def handle_data(self, data):
            self.text += data

    texts = [text for text in WORDED if len(text) < 1000 and "`" not in text and "\x00" not in text]
    model = load_model(model_folder, device="cpu")
    seeds, parts = finish(evaluate(model, run, Tools(), prompts=texts[:1], seeds=2))
    parts = [replace(parts[0], prompt=text) for text in texts]
    page = write_evaluation(run, seeds, parts, tmp_path)
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert all(reader.text.count(text) == 3 for text in texts)  # two tables' rows, and a heading
    assert not reader.tags & {"script", "a"}


@pytest.mark.parametrize("text", ["a", "a`b", "``", "`a", "a``` `b", "a|b", "\\", "\\|", "$a$"])
def test_code_and_plain_words_survive_a_table(text):
    markdown_it = pytest.importorskip("markdown_it")
    table = f"| a | b |\n|---|---|\n| {plain(text)} | {code(text)} |\n"
    tokens = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(table)
    cells = [shown_text(token) for token in tokens if token.type == "inline"]
    assert cells == ["a", "b", text, text]


# For whom the page answers


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"), ("LocalHost:7860", "localhost"), ("127.0.0.1:1", "127.0.0.1"),
        ("[::1]", "::1"), ("[::1]:7860", "::1"), ("evil.example:80", "evil.example"), ("", ""),
        ("localhost.evil.example", "localhost.evil.example"), ("localhost:x", ""),
        ("evil.example:80@localhost", ""), ("localhost/..", "localhost/.."),
    ],
)  # fmt: skip
def test_the_name_in_a_host_header(header, name):
    assert host_name(header) == name


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_page_for_known_hosts_answers_no_others(kind):
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route, WebSocketRoute
    from starlette.testclient import TestClient, WebSocketDenialResponse

    async def talk(socket):
        await socket.accept()
        await socket.send_text("here")
        await socket.close()

    routes = [Route("/", lambda _: PlainTextResponse("here")), WebSocketRoute("/talk", talk)]
    client = TestClient(
        Starlette(routes=routes, **known_hosts(*LOOPBACK, "[fd00::1]", " Mine.example:8443"))
    )

    def answer(host: str) -> tuple[int, str]:
        if kind == "http":
            response = client.get("/", headers={"host": host})
            return response.status_code, response.text
        try:
            with client.websocket_connect("/talk", headers={"host": host}) as socket:
                return 200, socket.receive_text()
        except WebSocketDenialResponse as denied:
            return denied.status_code, denied.text

    for host in ("localhost:7860", "[::1]:1", "127.0.0.1", "[fd00::1]", "MINE.example:443"):
        assert answer(host) == (200, "here")
    for host in ("evil.example", "localhost.evil.example:7860", "127.0.0.2", "0.0.0.0:7860"):
        status, text = answer(host)
        assert status == 403 and repr(host) in text and "--domain" in text and "\n" not in text[:-1]


@pytest.mark.parametrize(
    ("arguments", "hosts", "own_token"),
    [
        ([], {*LOOPBACK}, True),
        (["--host", "localhost"], {*LOOPBACK}, True),
        (["--host", "::1"], {*LOOPBACK}, True),
        (["--host", "[::1]"], {*LOOPBACK}, True),
        (["--host", "127.0.0.7"], {*LOOPBACK, "127.0.0.7"}, True),
        (["--domain", "a.example, B.example"], {*LOOPBACK, "a.example", "b.example"}, False),
        (["--domain", "a.example", "--own-token"], {*LOOPBACK, "a.example"}, True),
        (["--share"], None, False),
        (["--host", "0.0.0.0"], None, False),
        (["--host", "studio.example"], None, False),
    ],
)
def test_a_page_for_this_machine_alone_answers_to_its_names_alone(
    tmp_path, monkeypatch, arguments, hosts, own_token
):
    launched = []
    monkeypatch.setenv("no_proxy", "")  # so that it is put back
    monkeypatch.setenv("NO_PROXY", "")
    model = SimpleNamespace(workers=64)
    monkeypatch.setattr("app.open_models", lambda *_: (model, None, ""))
    studio = SimpleNamespace(pace=SimpleNamespace(try_out=lambda: None))
    monkeypatch.setattr("app.Studio", lambda *_, **__: studio)
    monkeypatch.setattr("app.Page", lambda studio, note, own_token: own_token)
    monkeypatch.setattr("app.launch", lambda *page, **options: launched.append((*page, options)))
    monkeypatch.setattr("sys.argv", ["app.py", "--runs", str(tmp_path), *arguments])
    app.main()
    assert model.workers == torch.get_num_threads()  # of which a core is left to others
    ((allowed, options),) = launched
    middleware = options["app_kwargs"].get("middleware", [])
    assert allowed == own_token and len(middleware) == (hosts is not None)
    server = options["server_name"]
    assert server.strip("[]") in os.environ["NO_PROXY"].split(",") and network_fault() == ""
    assert httpx.URL(f"http://{server}:7860").port == 7860
    for one in middleware:
        assert one.cls is KnownHosts and set(KnownHosts(None, *one.args).hosts) == hosts
    monkeypatch.setattr("app.get_space", lambda: "ada/studio")
    app.main()
    assert launched[1][1]["app_kwargs"] == {}


def test_a_server_keeps_what_it_shows_in_a_folder_of_its_own(monkeypatch):
    """Else one that ends deletes pictures that another still shows."""
    import gradio as gr
    from gradio.utils import get_upload_folder

    from pxpo.ui import launch

    shared = Path(get_upload_folder())
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # so that it is put back
    monkeypatch.delenv("GRADIO_TEMP_DIR")
    with gr.Blocks() as blocks:
        gr.Markdown("here")
    studio = SimpleNamespace(thread=SimpleNamespace(), most_bytes=1e9)
    page = SimpleNamespace(studio=studio, build=lambda: blocks)
    launch(page, prevent_thread_lock=True, quiet=True).close()
    own = Path(get_upload_folder())
    assert own.is_dir() and own not in (shared, Path(tempfile.gettempdir()) / "gradio")


# What visitors are told


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device", "/srv/secret/run.json"), "No space left on device"),
        (FileNotFoundError(2, "No such file or directory", "/srv/secret"), "No such file"),
        (ValueError("/srv/secret is wrong"), "ValueError"),
        (RuntimeError("at C:\\secret\\x"), "RuntimeError"),
        (RunError('no run in "/srv/o\'se cret/x".'), "no run in"),
    ],
)
def test_no_error_shows_a_visitor_where_the_server_lies(
    model_folder, segmenter, tmp_path, monkeypatch, error, kind
):
    import gradio as gr
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    from pxpo.studio import Studio
    from pxpo.ui import Page, launch

    studio = Studio(load_model(model_folder, device="cpu"), segmenter, tmp_path / "runs")

    def fail(*_, **__):
        raise error

    for name in ("start", "run", "step", "go_to", "forget_wish", "lora_file", "archive", "admit",
                 "push", "heat"):  # fmt: skip
        monkeypatch.setattr(studio, name, fail)
    page = Page(studio)
    blocks = launch(page, prevent_thread_lock=True, quiet=True)
    said = []
    try:
        client = Client(blocks.local_url, verbose=False)
        for verb, values in (
            ("generate", ("a lake",)), ("step", ("x" * 16,)), ("run", ("x" * 16,)),
            ("back", ("x" * 16,)), ("forget", ("x" * 16,)), ("export", ("x" * 16,)),
        ):  # fmt: skip
            with pytest.raises(AppError) as refused:
                client.predict(*values, api_name=f"/{verb}")
            said.append(str(refused.value))
    finally:
        blocks.close()
    events = page.events
    for work, values in (
        (events.start, ("a lake", 1)), (events.back, ("x" * 16,)), (events.go_to, ("x" * 16, 0)),
        (events.forget_wish, ("x" * 16,)), (events.admit, ("x.zip",)),
        (events.learn, (1, "x" * 16, None, BLUE, None)),
    ):  # fmt: skip
        shown = [part[page.status] for part in page.on_page(work)(*values) if page.status in part]
        said += shown[-1:]
    for leave in (
        lambda: page.canvas.wrap(studio.archive)("x" * 16),
        lambda: list(events.push("x" * 16, "ada/x", False, False, "hf_mine", None)),
    ):
        with pytest.raises(gr.Error) as refused:
            leave()
        said.append(refused.value.message)
    assert len(said) == 14
    for message in said:
        assert "secret" not in message and "se cret" not in message and "srv" not in message
    assert all(kind in message for message in said)
    assert not blocks.show_error


@pytest.mark.parametrize(
    "folder", ["a b", "ж 日本", "o'brien", 'say "x"', "a, b (c)", "a: b", "~x"]
)
@pytest.mark.parametrize("root", ["/srv", "/", "C:\\Users", "\\\\server\\share", "file:///srv"])
def test_no_folder_of_any_name_is_shown(folder, root):
    slash = "\\" if "\\" in root else "/"
    path = f"{root}{slash}{folder}{slash}run.json"
    for text in (f"no file {path!r}.", f"[Errno 2] No such file: {path!r} -> {path!r}"):
        shown = RunError(text).for_visitors()
        assert "run.json" in shown and folder not in shown and "srv" not in shown
        assert "Users" not in shown and "share" not in shown and folder.split()[0] not in shown
