"""A learner's code under its time limit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict, UserString, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from desk import eventually
from nbformat.v4 import new_code_cell, new_notebook
from smg_grpc_proto import vllm_engine_pb2 as pb

from servebook.errors import ServebookError
from servebook.lab import check, hint, submission
from servebook.lab.checking import evaluate
from servebook.lab.feedback import NotYet, shorten
from servebook.lab.learner_server.judge import written
from servebook.lab.manifest import find_exercise
from servebook.lab.shell import LabShell
from servebook.lab.submission import Foreign, Submission, plain, waited_for_a_core


@pytest.fixture
def learner() -> Submission:
    return Submission(find_exercise("01.1")[1], {})


def test_code_that_waits_for_ever_is_told_so(learner: Submission) -> None:
    with pytest.raises(NotYet) as told:
        learner.run(threading.Event().wait)
    assert told.value.expected == "an end"


class Mute(Exception):
    def __str__(self) -> str:
        return 404  # type: ignore[return-value]


def raising(error: BaseException) -> Callable[..., object]:
    def function(*_: object) -> object:
        raise error

    return function


@pytest.mark.parametrize(
    ("remembered", "got", "cause"),
    [
        pytest.param(lambda *_: input("How many?"), "nobody types", "take its arguments", id="input"),
        pytest.param(raising(SystemExit(1)), "SystemExit: 1", "the whole program", id="exit"),
        pytest.param(raising(Mute()), "Mute: ", "your code raised this error", id="an error without words"),
        pytest.param(lambda *_: 10**5000, "a number of 16610 bits", "the same beginning", id="a number too long"),
        pytest.param(lambda *_: "x" * 10**6, "…", "the same beginning", id="a text beyond any screen"),
        pytest.param(lambda *_: "half \ud83d", r"half \ud83d", "the same beginning", id="half of a surrogate pair"),
        pytest.param(
            raising(ValueError("\ud83d")), r"ValueError: \ud83d", "this error", id="an error with such a half"
        ),
    ],
)
def test_whatever_an_answer_does_is_told(remembered: Callable[..., object], got: str, cause: str) -> None:
    result = evaluate("11.3", {"remembered": remembered})
    assert result.state == "wrong", result.render()
    assert got in result.got
    assert cause in result.cause
    assert len(result.render().encode()) < 5000  # UTF-8, as a notebook has it


@pytest.mark.parametrize("ask", [check, hint])
def test_an_exercise_without_its_quotes_is_told(ask: Callable[[Any], None]) -> None:
    with pytest.raises(ServebookError, match="Put quotes around it"):
        ask(11.3)


def test_an_answer_that_leaves_ends_no_kernel(tmp_path: Path) -> None:
    """An exit() in a notebook is IPython's own: it ends the kernel once the cell is done, with all that is in it."""
    path = tmp_path / "lab.ipynb"
    nbformat.write(new_notebook(cells=[]), path)
    shell = LabShell(path).shell
    ended: list[bool] = []
    shell.ask_exit = lambda: ended.append(True)  # as a kernel's has it
    cell = (
        "from servebook.lab.checking import evaluate\nstate = evaluate('11.3', {'remembered': lambda *_: exit()}).cause"
    )
    shell.run_cell(cell).raise_error()
    assert "the whole program" in shell.user_ns["state"]
    assert not ended


@pytest.mark.parametrize(
    ("value", "right"),
    [
        (np.array([[0.5, 1.5]]), [[0.5, 1.5]]),
        (np.matrix([[0.5, 1.5]]), [[0.5, 1.5]]),
        ({"a": [1], "b": [2]}.values(), [[1], [2]]),
        (pb.TokenizedInput(input_ids=[3, 4]).input_ids, [3, 4]),
        (deque([1]), [1]),
        ({1: 2}.keys(), {1}),
        (OrderedDict(a=np.float64(0.5)), {"a": 0.5}),
    ],
)
def test_whatever_holds_values_comes_by_them(value: object, right: object) -> None:
    assert plain(value) == right
    assert type(plain(value)) is type(right)


@pytest.mark.parametrize(
    "value", [range(10**12), UserString("16"), {"a": [1]}.items(), np.float32, np.longdouble(1)], ids=repr
)
def test_what_no_check_asks_for_is_shown(value: object) -> None:
    found = plain(value)
    assert isinstance(found, Foreign)
    assert repr(found) == shorten(value)


def test_a_cell_that_asks_a_person_is_told_that_nobody_types(tmp_path: Path) -> None:
    """A check shows nothing while it runs, so nobody would see what it asks."""
    path = tmp_path / "lab.ipynb"
    notebook = new_notebook(cells=[new_code_cell("n = input('How many?')", id="11-3-answer")])
    nbformat.write(notebook, path)
    result = LabShell(path).check("11.3")
    assert result.state == "wrong"
    assert "nobody types" in result.got


def test_a_cell_that_raises_any_text_is_told_in_what_a_screen_and_a_notebook_hold(tmp_path: Path) -> None:
    path = tmp_path / "lab.ipynb"
    cell = new_code_cell(r"raise ValueError('\ud83d' + 'x' * 10**6)", id="11-3-answer")
    nbformat.write(new_notebook(cells=[cell]), path)
    result = LabShell(path).check("11.3")
    assert result.state == "wrong"
    assert len(result.render().encode()) < 5000


def test_a_server_at_work_is_waited_for(learner: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as long as the code may be idle."""
    monkeypatch.setattr(submission, "IDLE_SECONDS", 1)
    until = time.monotonic() + 2
    finished = threading.Event()

    def busy() -> bool:
        if time.monotonic() > until:
            finished.set()
        return not finished.is_set()

    assert learner.run(finished.wait, busy=busy) is True


def test_a_wait_for_a_core_that_is_told_when_it_is_over_does_not_count(
    learner: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux does: code that waits half a second for its core, time and again, twice as long as it may be idle."""
    began = time.monotonic()
    monkeypatch.setattr(learner, "waited", lambda _: (time.monotonic() - began) // 0.5 * 0.5)
    monkeypatch.setattr(submission, "IDLE_SECONDS", 1)
    assert learner.run(lambda: threading.Event().wait(2)) is False


@pytest.mark.parametrize("waits", [[0.0, 1000.0], range(1000)], ids=["for a while", "all the time"])
def test_waits_of_several_threads_at_once_hold_off_no_end(
    learner: Submission, monkeypatch: pytest.MonkeyPatch, waits: Iterable[float]
) -> None:
    """More seconds than went by: no credit for later, and none beyond the limit."""
    seconds = chain(waits, repeat(1000.0))
    monkeypatch.setattr(learner, "waited", lambda _: next(seconds))
    monkeypatch.setattr(submission, "IDLE_SECONDS", 1)
    monkeypatch.setattr(submission, "LIMIT_SECONDS", 3)
    with pytest.raises(NotYet) as told:
        learner.run(lambda: threading.Event().wait(10))
    assert told.value.expected == "an end"


def test_a_file_that_is_no_utf_8_is_told_so(
    learner: Submission, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("service.py").write_bytes('name = "Zoë"\n'.encode("latin-1"))
    with pytest.raises(NotYet, match="run the cell that writes it once more") as told:
        written(learner, "service.py")
    assert told.value.expected == "service.py in UTF-8"


@pytest.fixture
def crowded_core() -> Iterator[int]:
    """A core that another process keeps busy."""
    core = min(os.sched_getaffinity(0))
    burn = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", burn])
    yield core
    process.kill()
    process.wait()


def test_waiting_for_a_busy_core_is_seen(crowded_core: int) -> None:
    done = threading.Event()

    def spin() -> None:
        os.sched_setaffinity(0, {crowded_core})  # of this thread only
        while not done.is_set():
            pass

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    eventually(lambda: waited_for_a_core(thread) > 0.2, "the thread's waits in the kernel's account")
    done.set()
    thread.join()
    eventually(lambda: waited_for_a_core(thread) == 0, "no account of a thread that has ended")


def test_what_the_check_lends_fails_at_the_checks_cost(learner: Submission) -> None:
    """Whatever the learner's code makes of the error."""

    @learner.lent
    def work() -> None:
        raise ConnectionError("the engine has gone")

    def swallows() -> str:
        with suppress(Exception):
            work()
        return "done"

    for code in (work, swallows):
        with pytest.raises(ConnectionError, match="the engine has gone"):
            learner.run(code)
