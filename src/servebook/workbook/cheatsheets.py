"""Cheat sheets: `python -m servebook.workbook.cheatsheets` writes one page for each way into docs/cheatsheets.

What they hold stands in cheatsheets.toml, how servers are started and where they listen in the launcher's table.
`tests/test_cheatsheets.py` runs every snippet against its server and compares what comes.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Literal

from pydantic import BaseModel, ConfigDict

from servebook.checkout import ROOT
from servebook.launch import ServerSpec, find_server
from servebook.settings import LOOPBACK, Settings
from servebook.whole import write_whole
from servebook.workbook.chapters import find_chapter

PAGES = ROOT / "docs" / "cheatsheets"
PARTS = ("call", "stream", "cancel", "health", "metrics", "errors")
ANYTHING = "…"


class Snippet(BaseModel):
    """A few lines for a shell or for Python, and all that they print; `…` stands for anything.

    `{http}`, `{grpc}` and `{metrics}` are the server's addresses, `{model}` is the model's name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    say: str
    sh: str = ""
    python: str = ""
    comes: str

    def code(self, names: Mapping[str, str]) -> str:
        """What is to be run, with `names` filled in; other braces stay."""
        return re.sub(r"\{(\w+)\}", lambda found: names.get(found[1], found[0]), self.sh or self.python).strip()

    def fits(self, printed: str) -> bool:
        """Whether this is what comes."""
        parts = map(re.escape, self.comes.strip().split(ANYTHING))
        return re.fullmatch(".*?".join(parts), printed.strip(), re.DOTALL) is not None


class Sheet(BaseModel):
    """One server: every part has at least one snippet, also where it can only show that there is no such thing.

    `key` is what there is to say of keys where not all of its ports do the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    server: str
    chapter: str
    key: str = ""
    call: tuple[Snippet, ...]
    stream: tuple[Snippet, ...]
    cancel: tuple[Snippet, ...]
    health: tuple[Snippet, ...]
    metrics: tuple[Snippet, ...]
    errors: tuple[Snippet, ...]

    @property
    def spec(self) -> ServerSpec:
        return find_server(self.server)

    def parts(self) -> Iterator[tuple[str, Snippet]]:
        """All snippets in the order of the page, which is the order to run them in."""
        for part in PARTS:
            for snippet in getattr(self, part):
                yield part, snippet


@cache
def load_sheets() -> tuple[Sheet, ...]:
    """All sheets in the order of the chapters."""
    text = files("servebook.workbook").joinpath("cheatsheets.toml").read_text(encoding="utf-8")
    return tuple(Sheet.model_validate(each) for each in tomllib.loads(text)["sheets"])


def usual(spec: ServerSpec) -> dict[str, str]:
    """The names of a server that was started with the default settings."""
    fields = Settings.model_fields
    ports = {kind: fields[f"{spec.name.replace('-', '_')}_{kind}_port"].default for kind in spec.ports}
    return {kind: f"{LOOPBACK}:{port}" for kind, port in ports.items()} | {
        "model": Settings.model_construct().model_name
    }


def page(stem: str, sheets: list[Sheet]) -> str:
    """The page of a chapter in Markdown."""
    lines = [
        f"# Cheat sheet: {find_chapter(stem).title}",
        "",
        f"Made by `make sheets`; every snippet is run by the tests. `{ANYTHING}` stands for what differs each time. "
        f"The chapter is [{stem}](../../notebooks/{stem}.ipynb).",
    ]
    for sheet in sheets:
        lines += ["", *start(sheet)]
        for part, snippets in groupby(sheet.parts(), key=lambda each: each[0]):
            lines += ["", f"### {part.capitalize()}"]
            for _, snippet in snippets:
                lines += ["", snippet.say.strip(), "", *shown(snippet, usual(sheet.spec))]
    return "\n".join(lines) + "\n"


def start(sheet: Sheet) -> Iterator[str]:
    """The head: how the server is started, where it listens, and what to do about a key."""
    spec = sheet.spec
    at = usual(spec)
    yield f"## `{spec.name}`: {spec.about}"
    yield ""
    yield "```console"
    yield f"$ servebook up {spec.name}"
    yield f"$ servebook down {spec.name}"
    yield "```"
    yield ""
    yield ", ".join(f"{kind} at `{at[kind]}`" for kind in spec.ports) + "; `servebook status` shows other ports."
    yield sheet.key or (
        "With `SERVEBOOK_API_KEY` set it asks for `authorization: Bearer …`, a header or gRPC metadata."
        if spec.checks_key
        else "It knows no key: it stays on this machine."
    )


def shown(snippet: Snippet, names: Mapping[str, str]) -> Iterator[str]:
    """A snippet, and what comes, as two blocks of Markdown."""
    kind: Literal["sh", "python"] = "sh" if snippet.sh else "python"
    yield f"```{kind}"
    yield snippet.code(names)
    yield "```"
    yield ""
    yield "```text"
    yield snippet.comes.strip()
    yield "```"


def pages() -> dict[str, str]:
    """All pages by the stems of their chapters."""
    return {stem: page(stem, list(sheets)) for stem, sheets in groupby(load_sheets(), key=lambda each: each.chapter)}


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    for stem, text in pages().items():
        write_whole(PAGES / f"{stem}.md", text)
