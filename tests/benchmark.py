"""How long things take, and how much memory: `python tests/benchmark.py`, a minute or two.

Starts the app as a visitor would find it, on the embedded model, opens it in Chromium, and steps
through its API. Prints one line a figure: the median, and the least and the most. Not a test:
machines differ.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pxpo import (  # noqa: E402
    DiffusionModel,
    Noise,
    RewardSpec,
    Settings,
    Tools,
    begin,
    finish,
    generate,
    judge_of,
    load_model,
    paint,
    painted_map,
    rollout,
    settings_for,
    teach,
)

PORT = 7899


def strokes() -> Image.Image:
    """More of what is below on the left, less of what is on the right."""
    paint = Image.new("RGBA", (256, 256))
    draw = ImageDraw.Draw(paint)
    draw.rectangle((20, 170, 110, 220), fill=(0, 200, 0, 255))
    draw.rectangle((170, 90, 230, 160), fill=(220, 0, 0, 255))
    return paint


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def line(name: str, values: list[float], unit: str = "s") -> None:
    middle, least, most = statistics.median(values), min(values), max(values)
    print(f"{name:<54} {middle:8.2f} {unit}   ({least:.2f} to {most:.2f})", flush=True)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser that is open already when the app starts, as a visitor's is; None without one."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        print("no Chromium: the page's own time is left out")
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        yield play.chromium.launch(executable_path=path, args=["--no-sandbox"])


def opened(address: str, browser: Any) -> Any:
    """Wait for the server, then for the page, until its first picture is there: the page."""
    while True:
        try:
            urllib.request.urlopen(address, timeout=1).read()
            break
        except OSError:
            time.sleep(0.05)
    if browser:
        page = browser.new_page()
        page.goto(address)
        page.locator("#slider img").first.wait_for()
        return page
    return None


def steps_on(page: Any, count: int) -> list[float]:
    """Seconds from pressing Step, on the opening's wish, to the status that says: done."""
    page.wait_for_timeout(5000)  # the editor takes the picture in
    return [seconds(lambda: step_on(page)) for _ in range(count)]


def step_on(page: Any) -> None:
    before = page.locator("#status textarea").input_value()
    page.locator("#step").click()
    page.wait_for_function(
        """(before) => {
            const now = document.querySelector('#status textarea').value;
            return /^Step \\d+ ·/.test(now) && now !== before;
        }""",
        arg=before, timeout=300_000,
    )  # fmt: skip


def pictures(
    model: DiffusionModel, settings: Settings, count: int, turns: int
) -> tuple[list[float], list[float]]:
    """Seconds that `count` images take diffusers' pipeline and our rollout, in turns; the first
    turn is left out."""
    plain = DiffusionPipeline.from_pretrained(model.name)
    plain.set_progress_bar_config(disable=True)
    prompts, noise = [settings.prompt] * count, [Noise(seed) for seed in range(count)]
    how = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance_scale,
           "eta": settings.eta, "output_type": "pt"}  # fmt: skip
    found = [
        (seconds(lambda: plain(prompts, **how)),
         seconds(lambda: finish(rollout(model, prompts, noise, settings))))
        for _ in range(turns)
    ]  # fmt: skip
    theirs, ours = zip(*found[1:], strict=True)
    return list(theirs), list(ours)


def updates(model: DiffusionModel, count: int) -> list[float]:
    """Seconds of each update from a wish: its images, the learning and the next picture."""
    wish = RewardSpec("paint")
    run = finish(begin(model, settings_for("paint", shown=1), reward=wish))
    run = paint(run, painted_map(strokes()))
    judge, times = judge_of(run, model, Tools(str(model.device))), []
    for _ in range(count):
        started = time.perf_counter()
        run = finish(generate(model, run))
        run = finish(teach(model, run, wish, judge(run.trajectory.images), judge))
        times.append(time.perf_counter() - started)
    return times


def peak_memory(process: subprocess.Popen) -> float:
    """GiB of the process at its largest (Linux)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    from gradio_client import Client, handle_file

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    model = load_model()
    settings = model.filled(settings_for("paint"))
    for count in (1, 4):
        plain, ours = pictures(model, settings, count, 2 * repeats + 1)
        line(f"{count} images, {settings.steps} steps, by a plain pipeline", plain)
        line("the same by the rollout, in turns", ours)
    line("an update, its images and the next one", updates(model, repeats + 1)[1:])
    with tempfile.TemporaryDirectory() as runs, chromium() as browser:
        address = f"http://127.0.0.1:{PORT}"
        command = [sys.executable, "app.py", "--port", str(PORT), "--runs", runs]
        starts = []
        for _ in range(2):  # the second time its files are in the operating system's cache
            started = time.perf_counter()
            app = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            try:
                page = opened(address, browser)
                starts.append(time.perf_counter() - started)
                if len(starts) == 1:
                    continue
                if browser:
                    on_page = steps_on(page, repeats + 1)
                    page.close()
                strokes().save(painting := Path(runs) / "strokes.png")
                client = Client(address, verbose=False)
                run = client.predict(settings.prompt, seed=12, api_name="/generate")[0]
                client.predict(run, paint=handle_file(painting), api_name="/step")
                steps = [
                    seconds(lambda: client.predict(run, api_name="/step"))  # noqa: B023
                    for _ in range(repeats)
                ]
                peak = peak_memory(app)
            finally:
                app.terminate()
                app.wait()
    line("from `python app.py` to the first picture", starts)
    line("a painted step by the API: that, and held-out seeds", steps)
    if browser:
        line("the visitor's first step, the run's start included", on_page[:1])
        line("a painted step, page open on the same cores", on_page[1:])
    line("the app's memory at its peak", [peak], "GiB")


if __name__ == "__main__":
    main()
