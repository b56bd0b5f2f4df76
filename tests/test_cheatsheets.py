"""The cheat sheets: every snippet is run against its server, and what comes is what the page says."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import curl_by_requests
import pytest

from servebook.clients import CLIENTS
from servebook.launch import Server
from servebook.workbook.cheatsheets import PAGES, Sheet, Snippet, load_sheets, pages, usual

LOOKS, BETWEEN_SECONDS = 10, 0.5
"""At the engine's page, which must tell by then that a request was cancelled: its answer would take longer. They are
counted, as no clock can tell a cancelled request that is slow to leave from a machine that stood still."""

sheets = pytest.mark.parametrize("sheet", load_sheets(), ids=lambda sheet: sheet.server)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Snippet, Mapping[str, str]], str]:
    """Run a snippet as a reader would, and return what it prints."""
    path = os.environ["PATH"]
    if not shutil.which("curl"):
        stand_in = tmp_path_factory.mktemp("bin") / "curl"
        stand_in.write_text(f'#!/bin/sh\nexec {sys.executable} {curl_by_requests.__file__} "$@"\n')
        stand_in.chmod(0o755)
        path = f"{stand_in.parent}:{path}"

    def run(snippet: Snippet, names: Mapping[str, str]) -> str:
        code = snippet.code(names)
        if snippet.sh:
            command = ["bash", "-c", code]
            done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=60)
            return done.stdout + done.stderr
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, {})
        return printed.getvalue()

    return run


@pytest.mark.engine
@pytest.mark.parametrize(
    "sheet",
    [pytest.param(sheet, id=sheet.server, marks=pytest.mark.needs(sheet.server)) for sheet in load_sheets()],
)
def test_what_a_sheet_says_comes(
    sheet: Sheet, server_of: Callable[[str], Server], run: Callable[[Snippet, Mapping[str, str]], str]
) -> None:
    server = server_of(sheet.server)
    names = dict(server.endpoints) | {"model": server.model}
    for part, snippet in sheet.parts():
        # What was cancelled just before the metrics leaves the engine with its next step.
        printed = last_of(partial(run, snippet, names), snippet.fits, LOOKS if part == "metrics" else 1)
        assert snippet.fits(printed), f"{part}: {snippet.code(names)}\nprinted\n{printed}\nnot\n{snippet.comes}"


def last_of(run: Callable[[], str], fits: Callable[[str], bool], looks: int) -> str:
    """What was printed, the first time that it fits, or the last of so many times."""
    while not fits(printed := run()) and (looks := looks - 1):
        time.sleep(BETWEEN_SECONDS)
    return printed


def test_the_pages_are_fresh() -> None:
    assert {path.stem: path.read_text() for path in PAGES.glob("*.md")} == pages(), "run `make sheets`"


def test_every_server_that_is_asked_has_a_sheet() -> None:
    assert {sheet.server for sheet in load_sheets()} == CLIENTS.keys() - {"router"}, "the router is asked as vllm is"


def test_readme_leads_to_every_page() -> None:
    readme = Path(PAGES.parents[1] / "README.md").read_text()
    assert not [stem for stem in pages() if f"docs/cheatsheets/{stem}.md" not in readme]


@sheets
def test_a_snippet_is_for_one_language_and_names_what_there_is(sheet: Sheet) -> None:
    for part, snippet in sheet.parts():
        assert bool(snippet.sh) != bool(snippet.python), part
        code = snippet.code(usual(sheet.spec))
        assert not [name for name in ("{http}", "{grpc}", "{metrics}", "{model}") if name in code], code


@sheets
def test_the_stand_in_for_curl_knows_its_options(sheet: Sheet) -> None:
    for _, snippet in sheet.parts():
        for command in snippet.code(usual(sheet.spec)).split("curl ")[1:] if snippet.sh else ():
            words = shlex.split(command.replace("\\\n", ""))
            words = words[: words.index("|")] if "|" in words else words
            assert curl_by_requests.parser().parse_args(words).url.startswith("http://"), command


def test_a_sheet_says_which_ports_ask_for_a_key() -> None:
    """The Rust front end asks on REST and not on gRPC; `tests/test_07_rust_front.py` holds the server to it."""
    assert {sheet.server for sheet in load_sheets() if sheet.key} == {"vllm-rs"}
    (rust, python) = pages()["07_vllm_native_grpc"].split("\n## ")[1:]
    assert "its REST asks for `Authorization: Bearer …`; its gRPC knows no key" in rust
    assert "It knows no key" not in rust
    assert "It knows no key" in python


def test_dots_stand_for_anything_and_nothing_else_does() -> None:
    snippet = Snippet(say="", sh="echo", comes='{"a": …}\n200')
    assert snippet.fits('{"a": 1, "b": "…"}\n200\n')
    assert not snippet.fits('{"a": 1}\n404')
    assert not snippet.fits('{"b": 1}\n200')
    assert not snippet.fits('{"a": 1}\n200\n200 more')
