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
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event

from prometheus_client.parser import text_string_to_metric_families

from servebook.checkout import ROOT
from servebook.errors import ServebookError
from servebook.lab.feedback import Result
from servebook.lab.handout.blanks import require_solutions
from servebook.lab.manifest import Lab, load_labs
from servebook.lab.shell import CellError, LabShell
from servebook.launch.display import progress
from servebook.processes import die_with_asker
from servebook.room.admin import RoomAdmin

LABS = ("01_openai_rest", "02_sse_streaming")
"""The labs that need nothing but the room's engine."""
START_SECONDS = 120
"""How long all processes together may take to be ready."""
REFUSAL = re.compile(r"\b(429|503)\b")
made: Synchronized[int]
"""In a learner's process: how many checks all of them have made."""


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
        """The seconds within which this share of the requests was done, by its bucket's bound; NaN of none."""
        buckets = sorted((float(at), n) for (name, at), n in self.metrics.items() if name == f"{histogram}_bucket")
        whole = buckets[-1][1] if buckets else 0
        return next((at for at, n in buckets if whole and n >= share * whole), math.nan)


def labs() -> list[Lab]:
    """The labs that are done."""
    return [lab for lab in load_labs() if lab.stem in LABS]


def learn(url: str, key: str) -> list[Checked]:
    """Do the labs silently, as a learner with that key would, one cell after the other."""
    checks = []
    with contextlib.redirect_stdout(io.StringIO()):
        for check in (check for lab in labs() for check in do_lab(lab, url, key)):
            checks.append(check)
            with made.get_lock():
                made.value += 1
    return checks


def do_lab(lab: Lab, url: str, key: str) -> Iterator[Checked]:
    """Run a lab's solution; yield each check. All of them are stuck where a cell that they build on raised."""
    started = time.monotonic()
    shell = LabShell(require_solutions(ROOT) / lab.path, engine_url=url, api_key=key)
    try:
        shell.prepare()
    except CellError as error:  # the room refused it, or it failed
        for exercise in lab.exercises:
            yield Checked(Result(exercise, "stuck", got=str(error)), time.monotonic() - started)
        return
    for exercise in lab.exercises:
        started = time.monotonic()
        yield Checked(shell.check(exercise.id), time.monotonic() - started)


def run(room: RoomAdmin, learners: int) -> Outcome:
    """Let so many learners, admitted for this run only, do the labs at once.

    Raises:
        ServebookError: not all of their processes were ready in time, or one was ended; or the room does not answer.
    """
    # A process for each, as in the room, out of one that has imported what they need.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "openai.resources.chat", "openai.resources.completions"])
    ready, begin, count = context.Value("i", 0), context.Event(), context.Value("i", 0)
    whole = learners * sum(len(lab.exercises) for lab in labs())
    before = samples(room)
    keys = []
    # It forgets all of them, also where one cannot be admitted.
    with progress("load") as display, contextlib.ExitStack() as admitted:
        for number in range(1, learners + 1):
            name = f"load@{number:03}"  # as no learner can be called: the door lets no @ in
            keys.append(room.admit(name))
            admitted.callback(room.forget, name)
        try:
            with ProcessPoolExecutor(learners, context, initializer=get_ready, initargs=(ready, begin, count)) as pool:
                working = [pool.submit(learn, room.url, key) for key in keys]
                display.phase("getting ready")
                asked = time.monotonic()
                while ready.value < learners:  # no barrier: at one, who is killed is waited for
                    if wait(working, 0.1, FIRST_COMPLETED).done or time.monotonic() > asked + START_SECONDS:
                        for each in active_children():
                            each.kill()
                        raise BrokenProcessPool
                begin.set()
                began = time.monotonic()
                while wait(working, timeout=1).not_done:  # in tenths: where it is no terminal, each is a line
                    display.phase(f"{10 * count.value // whole * 10} % of {whole} checks made")
                checks = [check for work in working for check in work.result()]
                seconds = time.monotonic() - began
                display.done(f"{len(checks)} checks made")
        except BrokenProcessPool:
            raise ServebookError(
                f"The processes of {learners} learners were not all ready within {START_SECONDS} s, or one was ended.",
                "Let fewer learn at once (--learners), or use a machine with more memory.",
            ) from None
    grown = samples(room)
    grown.subtract(before)
    return Outcome(learners, seconds, checks, grown)


def get_ready(ready: Synchronized[int], begin: Event, count: Synchronized[int]) -> None:
    """In a learner's process: end with the command, note where its checks are counted, and wait for the others.

    Raises:
        TimeoutError: they are not ready in time, and this process ends.
    """
    global made
    die_with_asker()
    made = count
    with ready.get_lock():
        ready.value += 1
    if not begin.wait(START_SECONDS):
        raise TimeoutError


def samples(room: RoomAdmin) -> Counter[tuple[str, str]]:
    """The front's counters by name and by status or bucket."""
    page = room.metrics()
    found: Counter[tuple[str, str]] = Counter()
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name, sample.labels.get("status") or sample.labels.get("le", "")] += sample.value  # type: ignore[assignment]
    return found
