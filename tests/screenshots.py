"""Pictures of the page at work: `python tests/screenshots.py [FOLDER]`, two of them in the README.

A visitor presses Step on the opening; then the page at three widths, light and dark.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from playwright.sync_api import sync_playwright  # noqa: E402

from pxpo import Segmenter, load_model  # noqa: E402
from pxpo.studio import Studio  # noqa: E402
from pxpo.ui import Page, launch  # noqa: E402

SIZES = {"desktop": (1440, 900), "tablet": (820, 1180), "phone": (390, 844)}
OPENED = "document.querySelector('#status textarea')?.value.includes('Painted once')"
DONE = "/Step 6 ·|wish is met/.test(document.querySelector('#status textarea').value)"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    studio = Studio(load_model(), Segmenter(), Path(tempfile.mkdtemp()))
    server = launch(Page(studio), prevent_thread_lock=True, quiet=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
                  "--ignore-gpu-blocklist"],
        )  # fmt: skip
        state = None
        for theme in ("light", "dark"):
            for name, (width, height) in SIZES.items():
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=theme,
                    storage_state=state,
                )  # fmt: skip
                page = context.new_page()
                page.goto(server.local_url)
                status = page.locator("#status textarea")
                if state is None:
                    page.wait_for_function(OPENED, timeout=60_000)
                    page.wait_for_timeout(4000)
                    page.screenshot(path=folder / "opening.png")
                    page.locator("#step").click()
                    page.wait_for_function(DONE, timeout=300_000)
                    state = context.storage_state()
                page.wait_for_timeout(5000)
                print(name, theme, status.input_value())
                page.screenshot(path=folder / f"{name}-{theme}.png")
                page.screenshot(path=folder / f"{name}-{theme}-whole.png", full_page=True)
                context.close()
        browser.close()
    server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/screenshots"))
    main(parser.parse_args().folder)
