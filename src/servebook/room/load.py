"""A whole room at once: so many learners do labs 01 and 02 through the front, with the solutions and their checks.

Nobody reads, thinks or types in between, and all begin in the same second: a real room asks for far less.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from typing import Any

import nbformat
import requests
from prometheus_client.parser import text_string_to_metric_families

from servebook.checkout import ROOT
from servebook.lab.checking import evaluate
from servebook.lab.feedback import Result
from servebook.lab.manifest import Exercise, find_exercise, load_labs
from servebook.lab.release import require_solutions
from servebook.lab.shell import exercise_of
from servebook.room.admin import Room

LABS = ("01_openai_rest", "02_sse_streaming")
"""The labs that need nothing but the room's engine."""
START_SECONDS = 120
"""How long all processes together may take to be ready."""
REFUSAL = re.compile(r"\b(429|503)\b")


@dataclass
class Checked:
    """One check of one learner's; `seconds` is how long the learner waited for it."""

    result: Result
    seconds: float

    @property
    def outcome(self) -> str:
        """`passed`, `refused` (the check was stuck: the room said that it is full) or `failed`."""
        if self.result.passed:
            return "passed"
        return "refused" if self.result.state == "stuck" and REFUSAL.search(self.result.got) else "failed"


@dataclass
class Outcome:
    """What a room went through; `metrics` is what the front counted meanwhile, as its samples grew."""

    learners: int
    seconds: float
    checks: list[Checked]
    metrics: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count(self, outcome: str) -> int:
        return sum(check.outcome == outcome for check in self.checks)

    def statuses(self) -> dict[str, int]:
        """How many requests were answered with each status."""
        found: Counter[str] = Counter()
        for (name, label), value in self.metrics.items():
            if name == "room_requests_total" and value:
                found[label] += int(value)
        return dict(sorted(found.items()))

    def requests_within(self, histogram: str, share: float) -> float:
        """The seconds within which this share of the requests was done: the bound of the histogram's bucket."""
        buckets = sorted((float(at), n) for (name, at), n in self.metrics.items() if name == f"{histogram}_bucket")
        whole = buckets[-1][1] if buckets else 0
        return next((at for at, n in buckets if n >= share * whole), math.nan)


def cells_of(lab: str) -> list[tuple[Exercise | None, str]]:
    """The code of a lab's solution in order, with the exercise that each check belongs to."""
    notebook = nbformat.read(require_solutions(ROOT) / lab / f"{lab}.ipynb", as_version=4)
    found: list[tuple[Exercise | None, str]] = []
    for cell in notebook.cells:
        part = exercise_of(cell)
        if cell.cell_type == "code" and (part is None or part[1] in ("given", "answer", "check")):
            checked = part and part[1] == "check"
            found.append((find_exercise(part[0])[1] if part and checked else None, str(cell.source)))
    return found


def learn(url: str, key: str) -> list[Checked]:
    """Do the labs silently, as a learner with that key would, one cell after the other."""
    checks: list[Checked] = []
    with contextlib.redirect_stdout(io.StringIO()):
        for lab in load_labs():
            if lab.stem in LABS:
                checks += do_lab(cells_of(lab.stem), url, key)
    return checks


def do_lab(cells: list[tuple[Exercise | None, str]], url: str, key: str) -> Iterator[Checked]:
    """Run the cells of one lab; yield each check, and a check that is stuck for each cell that raised."""
    namespace: dict[str, Any] = {"__name__": "lab"}
    for number, (exercise, source) in enumerate(cells):
        started = time.monotonic()
        if exercise:
            yield Checked(evaluate(exercise.id, namespace), time.monotonic() - started)
            continue
        try:
            exec(compile(source, "<lab>", "exec"), namespace)
        except Exception as error:  # a cell of the notebook that the room refused, or that failed
            following = next(later for later, _ in cells[number:] if later)
            yield Checked(Result(following, "stuck", got=repr(error)), time.monotonic() - started)
        if namespace.get("engine_url") == "":  # this was the parameters cell
            namespace |= {"engine_url": url, "api_key": key}


def run(room: Room, learners: int) -> Outcome:
    """Let so many learners, admitted for this run only, do the labs at once."""
    names = [f"load-{number:03}" for number in range(1, learners + 1)]
    keys = [room.admit(name) for name in names]
    # A process for each, as in the room, out of one that has imported what they need.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "openai.resources.chat", "openai.resources.completions"])
    ready = context.Barrier(learners + 1)
    before = samples(room.url)
    try:
        with ProcessPoolExecutor(learners, context, initializer=get_ready, initargs=(ready,)) as pool:
            working = [pool.submit(learn, room.url, key) for key in keys]
            ready.wait(START_SECONDS)
            began = time.monotonic()
            checks = [check for work in working for check in work.result()]
            seconds = time.monotonic() - began
    finally:
        for name in names:
            room.forget(name)
    grown = samples(room.url)
    grown.subtract(before)
    return Outcome(learners, seconds, checks, grown)


def get_ready(ready: Barrier) -> None:
    """In a learner's process: wait for the others."""
    ready.wait(START_SECONDS)


def samples(url: str) -> Counter[tuple[str, str]]:
    """The front's counters by name and by status or bucket."""
    page = requests.get(f"{url}/room/metrics", timeout=10).text
    found: Counter[tuple[str, str]] = Counter()
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name, sample.labels.get("status") or sample.labels.get("le", "")] += sample.value  # type: ignore[assignment]
    return found
