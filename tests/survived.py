"""The table in docs/security.md of the faults that the servers survive, and a pytest plugin that stores what was seen.

A test that proves such a thing is marked `survives(fault, server, lost=…)`. Most run with all others; what takes too
long for that is in faults_by_hand.py, and `make survived` stores what it saw.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import pytest

from servebook.bench.results import this_machine

ROOT = Path(__file__).parents[1]
STORED = ROOT / "docs/survived.json"
PAGE = ROOT / "docs/security.md"
BEGIN, END = "<!-- made by `make survived` -->", "<!-- end -->"
BY_HAND = Path(__file__).with_name("faults_by_hand.py")


class Row(NamedTuple):
    """One fault at one server: the test that proves it, what is lost, what was seen, and the day and the machine."""

    fault: str
    server: str
    test: str
    lost: str
    seen: str = ""
    on: str = ""
    machine: str = ""


def load() -> list[Row]:
    """What was seen by hand."""
    return [Row(**row) for row in json.loads(STORED.read_text(encoding="utf-8"))]


def in_every_run() -> list[Row]:
    """What the tests prove that run with all others."""
    return [row for path in sorted(BY_HAND.parent.glob("test_*.py")) for row in marked(path)]


def marked(path: Path) -> Iterator[Row]:
    """The rows that a file of tests stands for, by its marks; at each of `SERVERS` where a mark names none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    servers = next((ast.literal_eval(node.value) for node in tree.body if _sets(node, "SERVERS")), ())  # type: ignore[attr-defined]
    for function in ast.walk(tree):
        for mark in getattr(function, "decorator_list", ()):
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.survives":
                fault, *at = map(ast.literal_eval, mark.args)
                (lost,) = (ast.literal_eval(word.value) for word in mark.keywords)
                for server in at or servers:
                    yield Row(fault, server, function.name, lost)  # type: ignore[attr-defined]


def _sets(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name


def table(stored: list[Row]) -> str:
    """In Markdown: what is proved in every run, and what was seen by hand; servers that fared alike share a row."""
    servers: dict[tuple[str, ...], list[str]] = {}
    for row in sorted([*in_every_run(), *stored]):
        seen = f"{row.seen} ({row.on})" if row.on else "passes in every run"
        servers.setdefault((row.fault, row.lost, seen, row.test), []).append(row.server)
    seen_by_hand = {row[:3] for row in stored}
    missing: dict[str, list[str]] = {}
    for row in marked(BY_HAND):
        if row[:3] not in seen_by_hand:
            missing.setdefault(row.fault, []).append(row.server)
    return "\n".join(
        [
            "| what happens, and the test | to | what is lost | what was seen |",
            "|---|---|---|---|",
            *(
                f"| {fault}<br>`{test}` | {', '.join(at)} | {lost} | {seen} |"
                for (fault, lost, seen, test), at in servers.items()
            ),
            "",
            f"With a date: by hand, on {'; '.join(sorted({row.machine for row in stored}))}, beside other work.",
            "",
            "No result stored yet:" if missing else "",
            *(f"- {fault}: {', '.join(at)}" for fault, at in missing.items()),
        ]
    )


def written(page: str, rows: list[Row]) -> str:
    """The page with the table of these rows."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


class Recorder:
    """Notes what each test by hand saw, and which failed."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, ...], Row] = {row[:3]: row for row in load()}
        machine = this_machine("cpu")
        self.machine = f"{machine.cpu}, {machine.cores} cores"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Function) -> Iterator[None]:
        report: pytest.TestReport = yield  # type: ignore[assignment]
        mark = item.get_closest_marker("survives")
        if mark and item.path == BY_HAND:
            at = mark.args[1] if len(mark.args) > 1 else item.callspec.params["server"]
            key = (str(mark.args[0]), str(at), item.originalname)
            if not report.passed:
                self.rows.pop(key, None)
            elif report.when == "call":
                seen = str(dict(report.user_properties)["seen"])
                self.rows[key] = Row(*key, mark.kwargs["lost"], seen, str(date.today()), self.machine)
            self.pytest_sessionfinish()  # a run that is ended has stored what it saw
        return report  # type: ignore[return-value]

    def pytest_sessionfinish(self) -> None:
        """Write both, with what was seen earlier."""
        known = {row[:4] for row in marked(BY_HAND)}
        rows = sorted(row for row in self.rows.values() if row[:4] in known)
        STORED.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Storing is asked for: an ordinary run writes nothing."""
    parser.addoption("--store-survived", action="store_true", help="store what faults were survived in docs/")


def pytest_configure(config: pytest.Config) -> None:
    """Record, if asked to."""
    if config.getoption("--store-survived"):
        config.pluginmanager.register(Recorder())
