"""Takes the pictures of README and docs/room.md, in docs/images/: `make pictures`, six minutes.

A notebook as JupyterLab opens it, the chat page, and a room's live view; or those named, `tests/pictures.py live_view`.
Each says what it was taken of (`shown`), and `tests/test_readme.py` whether that is still so.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests
from desk import eventually
from PIL import Image, PngImagePlugin
from playwright.sync_api import Locator, Page, expect, sync_playwright

from servebook import launch
from servebook.checkout import ROOT
from servebook.launch.probes import http_ok
from servebook.processes import free_port
from servebook.room.admin import RoomAdmin
from servebook.room.board import watch_key
from servebook.settings import load_settings
from servebook.workbook.doctor import find_browser

PICTURES = ROOT / "docs" / "images"
NOTEBOOK = "02_sse_streaming"
QUESTION = "What is the capital of Japan?"
CHAT_PAGE = ROOT / "src/servebook/ways/fastapi_gateway/server/page"
LIVE_VIEW = ROOT / "src/servebook/room/watch.html"


def cells_shown() -> list[Any]:
    """Of the notebook's cells those from the heading above its first picture of a stream down to that picture."""
    cells = json.loads((ROOT / f"notebooks/{NOTEBOOK}.ipynb").read_text())["cells"]
    last = next(n for n, cell in enumerate(cells) if "<img" in json.dumps(cell.get("outputs")))
    first = max(n for n, cell in enumerate(cells[:last]) if "".join(cell["source"]).startswith("## "))
    return [[cell.get(part) for part in ("source", "execution_count", "outputs")] for cell in cells[first : last + 1]]


def shown(name: str) -> str:
    """A digest of what the picture of this name shows, as it is now."""
    if name == "notebook":
        return hashlib.sha256(json.dumps(cells_shown()).encode()).hexdigest()
    files = sorted(CHAT_PAGE.iterdir()) if name == "chat" else [LIVE_VIEW]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def save(page: Page, name: str) -> None:
    """Write what the window shows, small, with the day on which it was taken and of what."""
    note = PngImagePlugin.PngInfo()
    note.add_text("Creation Time", datetime.now(UTC).date().isoformat())
    note.add_text("Source", shown(name))
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(64)
    picture.save(PICTURES / f"{name}.png", optimize=True, pnginfo=note)
    print(PICTURES / f"{name}.png")


def notebook(page: Page) -> None:
    """The notebook as it is stored, down to its first picture of a stream; no kernel has to run for it."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("jupyter-lab")), "--no-browser", "--allow-root", f"--port={port}"]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy2(ROOT / "notebooks" / f"{NOTEBOOK}.ipynb", folder)  # which JupyterLab saves, as it thinks fit
        options = [f"--ServerApp.root_dir={folder}", "--ServerApp.port_retries=0", "--IdentityProvider.token=pictures"]
        env = os.environ | {"JUPYTER_CONFIG_PATH": str(ROOT / "jupyter")}
        with subprocess.Popen([*command, *options], env=env, stderr=subprocess.DEVNULL) as lab:
            try:
                eventually(lambda: http_ok(f"127.0.0.1:{port}", "/api"), "JupyterLab", seconds=120)
                page.goto(f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK}.ipynb?reset&token=pictures")
                expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()
                page.keyboard.press("Control+b")  # the file browser takes room
                scroll_to_end_of(page.locator(".jp-OutputArea-output img").first)
                save(page, "notebook")
            finally:
                lab.terminate()


def scroll_to_end_of(picture: Locator) -> None:
    """Until it is the last thing to be seen; cells are laid out as they come near, and move what is below."""
    page = picture.page
    panel = page.locator(".jp-WindowedPanel-outer")
    panel.evaluate("panel => panel.scrollTo(0, 0)")
    page.mouse.move(600, 500)
    for _ in range(100):
        there, frame = picture.bounding_box() if picture.is_visible() else None, panel.bounding_box()
        assert frame
        below = there["y"] + there["height"] - frame["y"] - frame["height"] + 10 if there else 400
        if abs(below) < 5:
            return
        page.mouse.wheel(0, min(below, 400))
        page.evaluate("() => new Promise(requestAnimationFrame)")
    raise AssertionError("the notebook's picture cannot be scrolled to")


def chat(page: Page) -> None:
    """The chat page of chapter 05 after an answer of a real engine."""
    page.goto(launch.serve("gateway").url)
    page.get_by_label("Message", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Answer complete.")
    save(page, "chat")


def live_view(page: Page) -> None:
    """A room's live view, with names and without, once somebody is at an exercise for longer than it takes."""
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(
            state_dir=Path(folder),
            api_key="the-pictures-instructor",
            engine_url=launch.serve("vllm").url,
            front_http_port=free_port(),
        )
        launch.serve("front", settings=settings)
        try:
            room = RoomAdmin(settings)
            keys = {name: room.admit(name) for name in ("ada", "alan", "emmy", "grace", "joan", "ken")}

            def check(name: str, exercise: str, state: str, cause: str = "") -> None:
                """As a desk tells it; the causes are those of the checks."""
                told = {"exercise": exercise, "state": state, "cause": cause}
                headers = {"Authorization": f"Bearer {keys[name]}"}
                requests.post(f"{room.url}/room/checks", json=told, headers=headers, timeout=10).raise_for_status()

            for name in keys:
                check(name, "01.1", "passed")
            for _ in range(3):
                check(
                    "joan", "01.2", "wrong", "total_tokens counts the prompt too; the answer alone is completion_tokens"
                )
            page.goto(f"{room.url}/services/watch/#{watch_key(room.key)}")
            rows = page.locator("#learners tr")
            expect(rows.first).to_contain_text("2 min", timeout=200_000)
            for name in ("ada", "alan", "grace"):
                check(name, "01.2", "passed")
            check("alan", "01.3", "wrong", "return the longer history, not the reply alone")
            check("grace", "01.4", "open")
            expect(rows.first).to_have_class("help", timeout=200_000)
            check("emmy", "01.2", "passed")
            check("ada", "01.3", "passed")
            expect(rows.filter(has_text="01.3✓ passed")).to_have_count(1)
            expect(page.get_by_role("status")).to_contain_text("engine ready")
            save(page, "live_view")
            page.get_by_label("hide names").check()
            save(page, "live_view_projector")
        finally:
            launch.down("front", settings)


def main() -> None:
    """Take all of them, or those named; the servers that it starts end with it."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=120_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"])
        for take, size in ((notebook, (1100, 840)), (chat, (800, 560)), (live_view, (1400, 460))):
            if take.__name__ in sys.argv[1:] or not sys.argv[1:]:
                take(browser.new_page(viewport={"width": size[0], "height": size[1]}))
        browser.close()


if __name__ == "__main__":
    main()
