"""What goes between a judge and a learner's session, without an engine."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from servebook.checkout import ROOT
from servebook.lab.feedback import NotYet, StillOpen, judge
from servebook.lab.handout import confine
from servebook.lab.judge import process
from servebook.lab.judge.__main__ import Judge, Names
from servebook.lab.judge.learner import Session
from servebook.lab.judge.process import APART, judged_apart
from servebook.lab.manifest import find_exercise
from servebook.lab.submission import Submission


class Equal(str):
    """Says that it is whatever it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@pytest.fixture
def asking() -> Iterator[Callable[[dict[str, Any]], Submission]]:
    """A submission whose names are in a session at the other end of a wire."""
    ends: list[socket.socket] = []

    def start(names: dict[str, Any]) -> Submission:
        here, there = socket.socketpair()
        ends.extend((here, there))
        judge = Judge(here)
        for end in (judge, Session(there, names)):
            threading.Thread(target=end.listen, daemon=True).start()
        return Submission(find_exercise("01.1")[1], Names(judge))

    yield start
    for end in ends:
        end.shutdown(socket.SHUT_RDWR)
        end.close()


Asking = Callable[[dict[str, Any]], Submission]


def test_values_come_as_they_are(asking: Asking) -> None:
    values = [None, True, 3, 0.5, "é", b"\0\xff", [1, (2, {"a": [3]})], {1, 2}]
    submission = asking({"same": lambda value: value})
    same = submission.function("same")
    assert [submission.call(same, value) for value in values] == values


def test_nothing_that_equals_everything_reaches_a_check(asking: Asking) -> None:
    submission = asking({"text": lambda: Equal("x"), "thing": object})
    assert submission.call(submission.function("text")) != "y"
    with pytest.raises(NotYet) as told:
        judge("right", submission.call(submission.function("thing")), otherwise="it is no text")
    assert told.value.got.startswith("<object object")


def test_functions_and_generators_are_called_from_afar(asking: Asking) -> None:
    """Lazily, and in turns."""
    heard: list[int] = []

    def doubled(items: Iterator[int], hear: Callable[[int], bool]) -> Iterator[int]:
        for item in items:
            if hear(item):
                return
            yield 2 * item

    def hear(item: int) -> bool:
        heard.append(item)
        return item == 3

    submission = asking({"doubled": doubled})
    pieces = submission.call(submission.function("doubled"), (n for n in (1, 2, 3, 4)), hear)
    assert next(pieces) == 2
    assert heard == [1]
    assert list(pieces) == [4]
    assert heard == [1, 2, 3]


def test_errors_come_as_their_kind(asking: Asking) -> None:
    def wrong(what: str) -> None:
        raise {"key": KeyError("no"), "open": NotImplementedError("01.1")}[what]

    submission = asking({"wrong": wrong})
    with pytest.raises(NotYet, match="look at it"):
        submission.call(submission.function("wrong"), "key", causes={KeyError: "look at it"})
    with pytest.raises(StillOpen):
        submission.call(submission.function("wrong"), "open")


def test_a_list_that_was_changed_there_is_changed_here(asking: Asking) -> None:
    given = [1]
    submission = asking({"longer": lambda items: items.append(2)})
    submission.call(submission.function("longer"), given)
    assert given == [1, 2]


def test_what_is_missing_is_told(asking: Asking) -> None:
    with pytest.raises(NotYet, match="its cell has not run"):
        asking({}).function("complete")


@pytest.mark.lifetime
def test_a_process_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """08.3 needs no server."""
    monkeypatch.delenv(APART, raising=False)
    try:
        result = judged_apart("08.3", {"reading": lambda a, b, control: Equal("A is faster")})
        assert (result.state, result.got) == ("wrong", "A is faster")
        assert judged_apart("08.3", {}).cause.startswith("its cell has not run")
    finally:
        process.judge().end()
        process.judge.cache_clear()


@pytest.mark.lifetime
def test_who_keeps_the_judge_busy_for_ever_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session is done, and what it handed over is called, and never returns."""
    monkeypatch.delenv(APART, raising=False)
    monkeypatch.setattr(process, "VERDICT_SECONDS", 0.5)
    judges = process.JudgeProcess()
    try:
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as connection:
            judges.ask("08.3", Path(folder), Path(folder) / "judge")
            connection.connect(f"{folder}/judge")
            assert connection.recv(65536), "a question, which nobody answers"
            result = judges.verdict("08.3")
            assert (result.state, result.got.partition(":")[0]) == ("stuck", "none")
            judges.ask("08.3", Path(folder), Path(folder) / "another")
            assert judges.verdict("08.3").cause == "the kernel does not answer the judge"
    finally:
        judges.end()


@pytest.mark.skipif(not confine.possible(), reason="needs Landlock (Linux 6.2 or newer)")
def test_who_is_graded_cannot_look_into_the_judges_memory() -> None:
    looked = subprocess.run(
        [sys.executable, "-c", f"open('/proc/{os.getpid()}/mem', 'rb')"],
        preexec_fn=lambda: confine.confine({"read": ["/"], "write": []}),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert "PermissionError" in looked.stderr


def test_a_rooms_desks_ask_a_judge() -> None:
    for path in ("jupyterhub/jupyterhub_config.py", "kubernetes/jupyterhub/values.yaml"):
        assert re.search(rf"{APART}\"?: \"1\"", (ROOT / path).read_text(encoding="utf-8")), path
