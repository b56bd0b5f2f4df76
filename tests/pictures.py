"""Takes README's pictures, in docs/images/: `make pictures`. A notebook as JupyterLab opens it, and the chat page."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from desk import eventually
from PIL import Image, PngImagePlugin
from playwright.sync_api import Page, expect, sync_playwright

from servebook import launch
from servebook.checkout import ROOT
from servebook.launch.probes import http_ok
from servebook.launch.processes import free_port
from servebook.workbook.doctor import find_browser

PICTURES = ROOT / "docs" / "images"
NOTEBOOK = "02_sse_streaming"
QUESTION = "What is the capital of Japan?"


def save(page: Page, name: str) -> None:
    """Write what the window shows, small, with the day on which it was taken."""
    note = PngImagePlugin.PngInfo()
    note.add_text("Creation Time", datetime.now(UTC).date().isoformat())
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(64)
    picture.save(PICTURES / f"{name}.png", optimize=True, pnginfo=note)
    print(PICTURES / f"{name}.png")


def notebook(page: Page) -> None:
    """The notebook as it is stored, at its first picture of a stream; no kernel has to run for it."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("jupyter-lab")), "--no-browser", "--allow-root", f"--port={port}"]
    options = [f"--ServerApp.root_dir={ROOT}", "--ServerApp.port_retries=0", "--IdentityProvider.token=pictures"]
    env = os.environ | {"JUPYTER_CONFIG_PATH": str(ROOT / "jupyter")}
    with subprocess.Popen([*command, *options], env=env, stderr=subprocess.DEVNULL) as lab:
        try:
            eventually(lambda: http_ok(f"127.0.0.1:{port}", "/api"), "JupyterLab", seconds=120)
            page.goto(f"http://127.0.0.1:{port}/lab/tree/notebooks/{NOTEBOOK}.ipynb?reset&token=pictures")
            expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()
            page.keyboard.press("Control+b")  # the file browser takes room
            picture = page.locator(".jp-OutputArea-output img").first
            page.locator(".jp-WindowedPanel-outer").evaluate("panel => panel.scrollTo(0, 0)")
            for _ in range(100):
                if picture.is_visible():
                    break
                page.mouse.move(600, 500)
                page.mouse.wheel(0, 400)
                page.evaluate("() => new Promise(requestAnimationFrame)")
            picture.scroll_into_view_if_needed()
            save(page, "notebook")
        finally:
            lab.terminate()


def chat(page: Page) -> None:
    """The chat page of chapter 05 after an answer of a real engine."""
    page.goto(launch.serve("gateway").url)
    page.get_by_label("Message", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Answer complete.")
    save(page, "chat")


def main() -> None:
    """Take all of them; the servers that it starts end with it."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=120_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"])
        for take, size in ((notebook, (1100, 720)), (chat, (800, 560))):
            take(browser.new_page(viewport={"width": size[0], "height": size[1]}))
        browser.close()


if __name__ == "__main__":
    main()
