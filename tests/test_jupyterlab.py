"""The workbook as a learner meets it: JupyterLab as `make lab` starts it, in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from desk import eventually
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator, Page, expect

from servebook import launch
from servebook.launch.probes import http_ok
from servebook.processes import free_port

pytestmark = [pytest.mark.browser, pytest.mark.lane("one"), pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
TOKEN = "of-this-test"
CELL_MS = 240_000
SERVE = 'import requests\nfrom servebook import serve\nvllm = serve("vllm")\nprint("pid", vllm.pid)'
STREAM = """\
body = {"model": vllm.model, "prompt": "Once upon a time", "max_tokens": 1500, "stream": True, "ignore_eos": True}
while True:  # an answer of a fast engine is over before anybody has interrupted it
    lines = requests.post(vllm.url + "/v1/completions", json=body, stream=True).iter_lines()
    print("got", next(lines)[:5])  # one line an answer: a page that is busy with output takes no click
    for _ in lines:
        pass"""
ALIVE = 'print("health", requests.get(vllm.url + "/health").status_code, "pid", serve("vllm").pid)'


@dataclass
class Lab:
    url: str
    notebooks: Path

    def open(self, page: Page, name: str) -> None:
        """Open a notebook, alone, and wait until its kernel is there."""
        page.goto(f"{self.url}/lab/tree/notebooks/{name}?reset&token={TOKEN}")
        # The notebook's own indicator says idle before there is a kernel, and Shift+Enter then does nothing.
        expect_idle(page)

    def write(self, name: str, *cells: str) -> None:
        """Make a notebook of these cells."""
        notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.notebooks / name)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, vllm: launch.Server) -> Iterator[Lab]:
    """`make lab` in a clone, whose environment is the one that runs this test, next to an engine that is up."""
    clone = tmp_path_factory.mktemp("clone")
    for folder in ("jupyter", "notebooks", "requirements", "shims"):
        shutil.copytree(ROOT / folder, clone / folder)
    for name in ("Makefile", "pyproject.toml", "scripts/setup"):
        (clone / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, clone / name)
    (clone / ".venv").mkdir()
    (clone / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (clone / ".venv/.servebook-cpu").touch()

    port = free_port()
    arguments = f"--no-browser --port {port} --ServerApp.port_retries=0 --IdentityProvider.token={TOKEN}"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CONDA", "MAKE"))}
    log = clone / "lab.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            ["make", "-C", str(clone), "lab"],
            env=env | {"DEVICE": "cpu", "LAB_ARGS": arguments},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        ) as process,
    ):
        try:

            def answers() -> bool:
                assert process.poll() is None, log.read_text()
                return http_ok(f"127.0.0.1:{port}", "/api")

            eventually(answers, "JupyterLab", seconds=120)
            yield Lab(f"http://127.0.0.1:{port}", clone / "notebooks")
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def expect_idle(page: Page) -> None:
    """Wait until the kernel does nothing."""
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()


def cell(page: Page, index: int) -> Locator:
    return page.locator(f'.jp-NotebookPanel:visible .jp-Cell[data-windowed-list-index="{index}"]')


def run(page: Page, index: int) -> Locator:
    """Run one cell as a person does, wait for its number, and return it."""
    cell(page, index).locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    ran = cell(page, index)
    expect(ran.locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]:"), timeout=CELL_MS)
    return ran


def test_start_here_cell_by_cell(page: Page, lab: Lab) -> None:
    """Every code cell of the first chapter runs without an error; progress, pictures and tables are to be seen."""
    notebook = nbformat.read(lab.notebooks / "00_start_here.ipynb", as_version=4)
    for each in notebook.cells:
        if each.cell_type == "code":
            each.update(outputs=[], execution_count=None)  # so that a number can only come from this run
    nbformat.write(notebook, lab.notebooks / "00_start_here.ipynb")
    lab.open(page, "00_start_here.ipynb")
    expect(page.locator('.jp-NotebookPanel:visible img[alt^="Map"]')).to_be_visible()
    # Nothing would show that a line of code goes on behind the edge.
    expect(page.locator(".jp-NotebookPanel:visible .cm-content:not(.cm-lineWrapping)")).to_have_count(0)
    cell(page, 0).click()
    for index, each in enumerate(notebook.cells):
        page.keyboard.press("Shift+Enter")
        if each.cell_type == "code":
            prompt = cell(page, index).locator(".jp-InputPrompt")
            expect(prompt).to_have_text(re.compile(r"\[\d+\]:"), timeout=CELL_MS)
            assert "Traceback" not in cell(page, index).inner_text()
        if each.id == "s2-serve":
            expect(cell(page, index).get_by_role("status")).to_contain_text(re.compile("attached to|ready"))
        if each.id == "s5-versions":
            expect(cell(page, index).locator("table")).to_contain_text("vLLM")


def test_interrupt_in_mid_stream_leaves_the_server_alive(page: Page, lab: Lab, vllm: launch.Server) -> None:
    lab.write("interrupt.ipynb", SERVE, STREAM, ALIVE)
    lab.open(page, "interrupt.ipynb")
    served = run(page, 0)
    expect(served).to_contain_text(f"pid {vllm.pid}")
    cell(page, 1).locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    expect(cell(page, 1).locator(".jp-OutputArea")).to_contain_text("got")
    page.locator('.jp-NotebookPanel:visible [data-command="notebook:interrupt-kernel"]').click()
    expect(cell(page, 1).locator(".jp-OutputArea")).to_contain_text("KeyboardInterrupt")
    expect(cell(page, 1).locator(".jp-InputPrompt")).to_have_text("[2]:")
    expect_idle(page)  # until then, a kernel drops what it is asked to run after an error
    expect(run(page, 2)).to_contain_text(f"health 200 pid {vllm.pid}")


def test_a_second_kernel_attaches_to_the_same_server(page: Page, lab: Lab, vllm: launch.Server) -> None:
    for name in ("first.ipynb", "second.ipynb"):
        lab.write(name, SERVE)
        lab.open(page, name)
        served = run(page, 0)
        expect(served.get_by_role("status")).to_contain_text(f"attached to: http {vllm.http}")
        expect(served).to_contain_text(f"pid {vllm.pid}")
