"""The page in a real browser, on Tiny World: a person paints, steps, and sees the model change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pxpo.models import TINY_WORLD

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to test the page in"),
    pytest.mark.skipif(
        not (TINY_WORLD / "model_index.json").exists(), reason="Tiny World has not been made"
    ),
]

SECONDS = 60_000  # how long a step may take on a slow machine, in milliseconds


@pytest.fixture(scope="module")
def address():
    import app

    page = app.build(app.load_model(device="cpu"), app.Segmenter())
    _, url, _ = page.queue().launch(prevent_thread_lock=True, quiet=True, run_history=False)
    yield url
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
                  "--ignore-gpu-blocklist", "--disable-background-networking"],
        )  # fmt: skip
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, opened; afterwards: nothing left this machine, and no error was logged."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    errors, strangers = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on(
        "request",
        lambda r: (
            strangers.append(r.url)
            if r.url.startswith("http") and "127.0.0.1" not in r.url and "localhost" not in r.url
            else None
        ),
    )
    page.goto(address)
    wait_for_status(page, "Paint what you want")
    yield page
    page.close()
    assert not strangers
    assert not errors


def wait_for_status(page, text: str) -> None:
    page.wait_for_function(
        "text => document.querySelector('#status textarea').value.includes(text)",
        arg=text, timeout=SECONDS,
    )  # fmt: skip


def draw(page, x0: float, y0: float, x1: float, y1: float) -> None:
    """A stroke with the mouse, in shares of the canvas."""
    canvas = page.locator("#ed canvas").first
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(1500)  # the editor takes its new picture in without a sign
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + x0 * box["width"], box["y"] + y0 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + x1 * box["width"], box["y"] + y1 * box["height"], steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)


def now_picture(page) -> str:
    """Where the newest picture of the slider comes from; another picture has another address."""
    return page.locator("#slider img").last.get_attribute("src")


def lora_bytes(page, folder: Path) -> bytes:
    with page.expect_download(timeout=SECONDS) as download:
        page.locator("#export").click()
    path = folder / "lora.safetensors"
    download.value.save_as(path)
    return path.read_bytes()


def test_painting_and_stepping_changes_image_reward_and_lora(page, tmp_path):
    picture, lora = now_picture(page), lora_bytes(page, tmp_path)
    draw(page, 0.2, 0.75, 0.8, 0.75)
    page.locator("#hand input").nth(1).check()
    draw(page, 0.2, 0.2, 0.8, 0.2)
    page.locator("#step").click()
    wait_for_status(page, "Step 1")
    status = page.locator("#status textarea").input_value()
    assert "+ 0%" not in status and "− 0%" not in status, status
    assert now_picture(page) != picture
    assert lora_bytes(page, tmp_path) != lora
    page.locator("#curve img").wait_for(timeout=SECONDS)
    assert page.locator("#history button img, #history img").count() >= 2


def test_stepping_without_paint_is_refused_with_a_reason(page):
    page.locator("#step").click()
    page.get_by_text("Paint + (green) or − (red)").wait_for(timeout=SECONDS)


def test_less_blue_from_its_tab(page):
    page.get_by_role("tab", name="Less of a colour").click()
    page.locator("#step-color").click()
    wait_for_status(page, "Step 1 · reward -0.")
    page.locator("#heat img").first.wait_for(timeout=SECONDS)


def test_back_gives_the_first_picture_again(page):
    page.get_by_role("tab", name="Less of a colour").click()
    page.locator("#step-color").click()
    wait_for_status(page, "Step 1")
    page.locator("#back").click()
    wait_for_status(page, "Back at step 0")
