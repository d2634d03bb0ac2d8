"""What hours and sudden ends do to it: `python -m tests.endurance kills`, or `soak --minutes 60`.

kills: the command line, and the page's server during a step, are killed at random moments, and what
is left on disk is opened again. soak: clients of a page that others reach step, stop, vanish,
upload and paint, while memory, disk and waits are measured; with `--clients 1`, one person's page.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import httpx
import numpy as np
from gradio_client import Client, handle_file
from PIL import Image

from pxpo.pages import Table
from pxpo.store import load_run

from .conftest import free_port

ROOT = Path(__file__).resolve().parents[1]
FEW = 3  # DDIM steps
REFUSALS = "queue is full", "wish is met", "no longer kept", "under way", "so little is painted"


class Server:
    """app.py on Tiny World."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.log, self.port = folder / "server.log", free_port()
        command = [sys.executable, "app.py", "--port", str(self.port), "--runs", folder / "runs"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *options], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        self.address = f"http://127.0.0.1:{self.port}"

    def client(self) -> Client:
        """One more person; waits for the server."""
        for _ in range(240):
            try:
                return Client(self.address, verbose=False)
            except Exception:
                time.sleep(0.5)
        raise TimeoutError(f"no server after two minutes; see {self.log}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        """However it goes, and at whatever moment it comes: killed."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def memory(self) -> float:
        """MiB of its own; what it has read of files is the system's to take back."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024

    def raw_errors(self) -> list[str]:
        """The last lines of tracebacks in its log."""
        blocks = self.log.read_text().split("Traceback (most recent call last)")[1:]
        return [next(one for one in block.splitlines()[1:] if one[:1].strip()) for block in blocks]


def painting(folder: Path, random_: random.Random) -> Path:
    """A picture of one stroke of each colour."""
    layer = np.zeros((128, 128, 4), np.uint8)
    for colour in ((0, 255, 0, 153), (255, 0, 0, 153)):
        x, y = random_.randrange(100), random_.randrange(100)
        layer[y : y + 24, x : x + 24] = colour
    path = folder / f"paint-{random_.random()}.png"
    Image.fromarray(layer).save(path)
    return path


# Kills.


def kill_command_line(folder: Path, number: int, random_: random.Random) -> tuple[int, int]:
    """Updates that were announced before the end, and those that are there after it."""
    out = folder / "cli"
    start = ["color", "--steps", str(FEW), "--images", "2", "--updates", "1000", "--out", out]
    command = ["resume", out] if (out / "run.json").exists() else start
    before = load_run(out).count if (out / "run.json").exists() else 0
    process = subprocess.Popen(
        [sys.executable, "-m", "pxpo", *command], cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for _ in range(600):  # until it is at work
        if announced_by(out / "metrics.jsonl") > before:
            break
        time.sleep(0.2)
    time.sleep(random_.uniform(0, 8))
    announced = announced_by(out / "metrics.jsonl")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = load_run(out).count if (out / "run.json").exists() else 0
    return max(announced, before), there


def announced_by(lines: Path) -> int:
    text = lines.read_text() if lines.exists() else ""
    return text.count("\n") - 1 if text else 0


def kill_page(folder: Path, number: int, random_: random.Random) -> tuple[int, int]:
    """Updates that were answered before the end, and those that are there after it."""
    name, done = folder / "page-run", [0]
    with Server(folder) as server:
        client = server.client()
        if not name.exists():
            name.write_text(client.predict("a lake", steps=FEW, api_name="/generate")[0])
        run = name.read_text()

        def steps() -> None:
            with contextlib.suppress(Exception):  # the server will be killed
                while True:
                    report = client.predict(run, reward="color", images=2, api_name="/step")[1]
                    done.append(report["step"])

        done.append(load_run(folder / "runs" / run).count)
        before = len(done)
        threading.Thread(target=steps, daemon=True).start()
        for _ in range(600):  # until it is at work
            if len(done) > before:
                break
            time.sleep(0.2)
        time.sleep(random_.uniform(0, 8))
        answered = done[-1]
    return answered, load_run(folder / "runs" / run).count


def kills(folder: Path, count: int) -> None:
    rows = []
    for what, kill in (("the command line", kill_command_line), ("the page", kill_page)):
        random_, lost, left = random.Random(0), 0, 0
        for number in range(count):
            known, there = kill(folder, number, random_)
            lost += there < known
            left = there
            print(f"{what}, kill {number + 1}: {known} known, {there} there", flush=True)
        halves = [one for one in folder.rglob(".*") if re.fullmatch(r"\..+\.[0-9a-f]{8}", one.name)]
        rows.append((what, str(count), str(lost), str(left), str(len(halves))))
    columns = ("killed", "times", "lost what was done", "updates at the end", "halves of files")
    print(Table(columns, rows).markdown())


# Soak.


class Person:
    """Somebody who does this and that on the page, one thing after the other."""

    def __init__(self, server: Server, folder: Path, seed: int) -> None:
        self.server, self.folder, self.random = server, folder, random.Random(seed)
        self.client, self.run = server.client(), ""
        self.waits = defaultdict[str, list[float]](list)  # seconds, by what was done or refused

    def act(self) -> None:
        acts = [self.step, self.step, self.several, self.stop, self.vanish, self.export]
        act = self.random.choice(acts) if self.run else self.begin
        began = time.monotonic()
        try:
            act()
            what = act.__name__
        except Exception as error:
            known = [words for words in REFUSALS if words in str(error)]
            what = f"refused: {known[0]}" if known else f"RAW: {str(error)[:200]}"
            if "no longer kept" in known:
                self.run = ""
        self.waits[what].append(time.monotonic() - began)

    def begin(self) -> None:
        seed = self.random.randrange(1000)
        self.run = self.client.predict("nature landscape", seed, FEW, api_name="/generate")[0]

    def reward(self) -> dict:
        if self.random.random() < 0.5:
            return {"reward": "color", "images": 2}
        paint = handle_file(painting(self.folder, self.random))
        return {"reward": "paint", "images": 2, "paint": paint}

    def step(self) -> None:
        self.client.predict(self.run, api_name="/step", **self.reward())

    def several(self) -> None:
        self.client.predict(self.run, count=3, api_name="/run", **self.reward())

    def stop(self) -> None:
        job = self.client.submit(self.run, count=20, api_name="/run", **self.reward())
        while not job.done() and job.communicator.event_id is None:
            time.sleep(0.05)  # Gradio's client cannot stop what it has not handed in yet
        time.sleep(self.random.uniform(0, 5))
        job.cancel()

    def vanish(self) -> None:
        """As a browser whose window is closed in the middle of something."""
        call, end = f"{self.server.address}/gradio_api/call/run", self.random.uniform(0, 5)
        data = [self.run, 20, "color", None, "blue", "Hair", "less", None, 0.03, 2]
        event = httpx.post(call, json={"data": data}, timeout=60).json()["event_id"]
        began = time.monotonic()
        with httpx.stream("GET", f"{call}/{event}", timeout=60) as answer:
            for _ in answer.iter_lines():
                if time.monotonic() - began > end:
                    break
        self.run = ""

    def export(self) -> None:
        self.client.predict(self.run, api_name="/export")


def soak(folder: Path, minutes: float, clients: int) -> None:
    with Server(folder, *(["--host", "0.0.0.0"] if clients > 1 else [])) as server:
        soaked(server, folder, minutes, clients)


def soaked(server: Server, folder: Path, minutes: float, clients: int) -> None:
    people = [Person(server, folder, seed) for seed in range(clients)]
    end = time.monotonic() + 60 * minutes

    def live(person: Person) -> None:
        while time.monotonic() < end:
            person.act()

    threads = [threading.Thread(target=live, args=(one,), daemon=True) for one in people]
    for thread in threads:
        thread.start()
    rows, began = [], time.monotonic()
    while time.monotonic() < end:
        size = sum(path.stat().st_size for path in (folder / "runs").rglob("*") if path.is_file())
        sample = (time.monotonic() - began) / 60, server.memory(), size / 2**20
        rows.append(tuple(f"{value:.0f}" for value in sample))
        print(json.dumps(sample), flush=True)
        time.sleep(min(60, max(0.1, end - time.monotonic())))
    for thread in threads:
        thread.join(120)
    few = rows[:: max(1, len(rows) // 12)]
    print(Table(("minute", "MiB of memory", "MiB on disk"), few).markdown())
    waits = defaultdict[str, list[float]](list)
    for what, times in itertools.chain.from_iterable(one.waits.items() for one in people):
        waits[what] += times
    answers = [
        (what, str(len(times)), f"{median(times):.0f}", f"{max(times):.0f}")
        for what, times in sorted(waits.items())
    ]
    print(Table(("what", "times", "seconds, median", "longest"), answers).markdown())
    errors = Counter(server.raw_errors())
    print(f"raw errors in the server's log: {sum(errors.values())}", dict(errors))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.endurance", description=__doc__)
    parser.add_argument("what", choices=("kills", "soak"))
    parser.add_argument("--count", type=int, default=20, help="kills of each kind")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pxpo-endurance-"))
    try:
        if options.what == "kills":
            kills(folder, options.count)
        else:
            soak(folder, options.minutes, options.clients)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


main()
