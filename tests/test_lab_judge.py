"""What goes between a judge and a learner's session, without an engine."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

import pytest

from servebook.checkout import ROOT
from servebook.environment import JUDGE_APART
from servebook.errors import LaunchError
from servebook.lab.checks.c13_more_than_text import check_13_3
from servebook.lab.dry_run import load
from servebook.lab.feedback import NotYet, StillOpen, judge
from servebook.lab.handout import landlock, provided
from servebook.lab.judge import __main__ as judging
from servebook.lab.judge import learner, process
from servebook.lab.judge.__main__ import Judge, Names
from servebook.lab.judge.learner import Session
from servebook.lab.judge.process import judged_apart
from servebook.lab.judge.wire import Broken
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


def test_what_cannot_be_said_is_an_error_and_not_an_endless_wait(asking: Asking) -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    submission = asking({"nest": deep, "nests": lambda: deep})
    with pytest.raises(RecursionError):
        submission.function("nest")
    with pytest.raises(NotYet) as told:
        submission.call(submission.function("nests"))
    assert "RecursionError" in told.value.got


class Mute(Exception):
    def __str__(self) -> str:
        return 404  # type: ignore[return-value]


def test_an_error_that_says_nothing_is_told(asking: Asking) -> None:
    def fail() -> None:
        raise Mute(Mute())

    submission = asking({"fail": fail})
    with pytest.raises(NotYet) as told:
        submission.call(submission.function("fail"))
    assert told.value.got.startswith("Mute: ")


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


def test_what_a_check_hands_over_is_called_by_keyword_from_afar(asking: Asking) -> None:
    """Here `run(**call["function"])`, as a right answer of 13.3 has it."""

    def answer(ask: Any, run: Any, messages: list[Any], rounds: int) -> Any:
        for _ in range(rounds):
            message = ask(messages=messages)
            if not message.get("tool_calls"):
                return message["content"]
            calls = message["tool_calls"]
            results = [{"role": "tool", "tool_call_id": c["id"], "content": run(**c["function"])} for c in calls]
            messages = [*messages, message, *results]
        return None

    check_13_3(asking({"answer": answer}))


def test_errors_come_as_their_kind(asking: Asking) -> None:
    def wrong(what: str) -> None:
        raise {"key": KeyError("no"), "open": NotImplementedError("01.1")}[what]

    submission = asking({"wrong": wrong})
    with pytest.raises(NotYet, match="look at it"):
        submission.call(submission.function("wrong"), "key", causes={KeyError: "look at it"})
    with pytest.raises(StillOpen):
        submission.call(submission.function("wrong"), "open")


def test_an_error_in_a_task_group_is_told_as_it_is(asking: Asking) -> None:
    """In a room as in a notebook of one's own; a blank in it is open."""

    async def grouped(error: str) -> None:
        async def fail() -> None:
            raise {"key": KeyError("no"), "open": NotImplementedError("01.1")}[error]

        async with asyncio.TaskGroup() as outer, asyncio.TaskGroup() as inner:
            inner.create_task(fail())
            outer.create_task(asyncio.sleep(0))

    names = {"grouped": grouped}
    for submission in (asking(names), Submission(find_exercise("01.1")[1], names)):
        function = submission.function("grouped", awaited=True)
        with pytest.raises(NotYet, match="look at it") as told:
            submission.call(function, "key", causes={TypeError: "misleading", KeyError: "look at it"})
        assert told.value.got.startswith("KeyError: 'no'")
        with pytest.raises(StillOpen):
            submission.call(function, "open")


def test_every_known_error_can_be_told() -> None:
    for kind in judging.KNOWN:
        told = judging.error_of({"kinds": [kind], "text": "its words", "args": ["its words"], "where": ""})
        assert str(told) == "its words", kind


def test_a_coroutine_where_a_plain_function_is_called_is_told(asking: Asking) -> None:
    async def text() -> str:
        return "text"

    async def pieces() -> AsyncIterator[str]:
        yield "text"

    for names in ({"text": text}, {"text": pieces}):
        for submission in (asking(names), Submission(find_exercise("01.1")[1], names)):
            with pytest.raises(NotYet, match="write a plain def"):
                submission.call(submission.function("text"), causes={Exception: "misleading"})


def test_a_list_that_was_changed_there_is_changed_here(asking: Asking) -> None:
    given = [1]
    submission = asking({"longer": lambda items: items.append(2)})
    submission.call(submission.function("longer"), given)
    assert given == [1, 2]


def test_what_is_missing_is_told(asking: Asking) -> None:
    with pytest.raises(NotYet, match="its cell has not run"):
        asking({}).function("complete")


@pytest.mark.parametrize("says", [b"nonsense\n", b"3\n", b'{"reply": []}\n', b"[" * 100_000 + b"\n", None])
def test_who_asks_a_session_that_says_nonsense_or_leaves_is_told(says: bytes | None) -> None:
    """What a learner wrote can reach the socket; a check would wait for ever."""
    here, there = socket.socketpair()
    wire, told = Judge(here), SimpleQueue[Broken]()

    def ask() -> None:
        try:
            wire.ask(look="x")
        except Broken as error:
            told.put(error)

    with here, there:
        threading.Thread(target=ask, daemon=True).start()
        there.recv(1, socket.MSG_PEEK)  # its question
        if says:
            there.sendall(says)
        else:
            there.close()  # with the question unread, which resets the connection
        threading.Thread(target=wire.listen, daemon=True).start()
        told.get(timeout=10)
        threading.Thread(target=ask, daemon=True).start()  # and who asks from then on
        told.get(timeout=10)


def test_a_model_json_that_holds_up_its_reader_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next check has a reader of its own."""
    load.end()
    monkeypatch.setattr(load, "as_told", lambda _: [sys.executable, "-c", "input(); __import__('time').sleep(600)"])
    monkeypatch.setattr(load, "FACTS_SECONDS", 0.1)
    try:
        with pytest.raises(LaunchError, match=r"takes longer than 0 s\.\n→ .* check again"):
            load.engine_facts(Path("endless"))
        assert not load.vllm_process.cache_info().currsize
    finally:
        load.end()


@pytest.mark.lifetime
@pytest.mark.parametrize("folder", ["", "long" * 20])
def test_a_process_judges(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """08.3 needs no server. A folder for temporary files may be longer than a socket's path."""
    (tmp_path / folder).mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(tmp_path / folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv(JUDGE_APART, raising=False)
    try:
        result = judged_apart("08.3", {"reading": lambda a, b, control: Equal("A is faster")})
        assert (result.state, result.got) == ("wrong", "A is faster")
        assert judged_apart("08.3", {}).cause.startswith("its cell has not run")
    finally:
        process.judge().end()
        process.judge.cache_clear()


@pytest.fixture
def judges() -> Iterator[process.JudgeProcess]:
    judges = process.JudgeProcess()
    yield judges
    judges.end()


def nobody_comes(judges: process.JudgeProcess, folder: Path) -> str:
    """What a judge says of a session that does not answer it."""
    return judges.judged("08.3", folder, folder / uuid4().hex[:8], lambda: None).cause


@pytest.mark.lifetime
def test_who_keeps_the_judge_busy_for_ever_holds_up_nobody(
    judges: process.JudgeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session is done, and what it handed over is called, and never returns."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as connection:

        def answer() -> None:
            connection.connect(f"{folder}/judge")
            assert connection.recv(65536), "a question, which nobody answers"

        with monkeypatch.context() as short:
            short.setattr(process, "VERDICT_SECONDS", 0.5)
            result = judges.judged("08.3", Path(folder), Path(folder) / "judge", answer)
        assert (result.state, result.got.partition(":")[0]) == ("stuck", "none")
        assert nobody_comes(judges, Path(folder)) == "the kernel does not answer the judge"


@pytest.mark.lifetime
def test_an_interrupt_leaves_no_verdict_for_the_next_check(judges: process.JudgeProcess) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(KeyboardInterrupt):
            judges.judged("08.3", Path(folder), Path(folder) / "judge", interrupted)
        result = judges.judged("08.4", Path(folder), Path(folder) / "another", lambda: None)
        assert (result.exercise.id, result.cause) == ("08.4", "the kernel does not answer the judge")


@pytest.mark.lifetime
def test_an_interrupt_ends_what_the_learner_wrote() -> None:
    """A loop for ever does not go on beside the cells that follow."""
    started, ended = threading.Event(), threading.Event()

    def reading(*_: object) -> str:
        try:
            started.set()
            while True:
                time.sleep(0.01)
        finally:
            ended.set()

    def press_stop() -> None:
        started.wait(60)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=press_stop, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            judged_apart("08.3", {"reading": reading})
        assert ended.wait(60)
        assert judged_apart("08.3", {}).cause.startswith("its cell has not run")
    finally:
        process.judge().end()
        process.judge.cache_clear()


def test_nobody_types_where_a_submission_is_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nbgrader's kernel would be ended by an exit(), and all of the lab be ungraded."""
    monkeypatch.setattr(Session, "listen", lambda self: input())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "judge"))
        listener.listen()
        with pytest.raises(EOFError, match="nobody types"):
            learner.serve(str(tmp_path / "judge"))


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("", "a judge that listens"),
        ("echo nonsense", "a judge that listens"),
        ("exec sleep 60", "a judge that listens"),
        ("echo listening", "a verdict"),
        ("echo listening; read line; echo nonsense", "a verdict"),
        ("echo listening; read line; echo 3", "a verdict"),
    ],
)
def test_a_judge_that_is_none_is_told_in_a_sentence(
    says: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no memory left, or is killed: no traceback, and the session that finds nobody is none the worse."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    if "sleep" in says:
        monkeypatch.setattr(process, "IMPORT_SECONDS", 1.0)
    try:
        result = judged_apart("08.3", {})
        assert (result.state, result.expected, result.cause) == ("stuck", expected, process.AGAIN)
    finally:
        process.judge().end()
        process.judge.cache_clear()


def test_the_waits_of_a_thread_that_has_ended_still_count(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the time that a learner's code was idle would jump; nor is another thread by its number taken for it."""
    names = asking({}).namespace
    accounts = {"1": 2.0, "2": 3.0}
    monkeypatch.setattr(Path, "glob", lambda *_: (Path(f"/proc/9/task/{number}/schedstat") for number in accounts))
    monkeypatch.setattr(judging, "waited", lambda account: accounts[account.parent.name])
    assert names.waited() == 5  # type: ignore[attr-defined]
    del accounts["1"]
    assert names.waited() == 5  # type: ignore[attr-defined]
    accounts |= {"1": 0.5, "2": 4.0}
    assert names.waited() == 6.5  # type: ignore[attr-defined]


def test_a_learners_settings_choose_no_server_for_the_judge(
    asking: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge works in the submission's folder, which may hold a servebook.toml; it was started elsewhere."""
    seen: list[Path] = []
    monkeypatch.setattr(judging, "serve", lambda name: seen.append(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    judge = asking({}).namespace.judge  # type: ignore[attr-defined]
    Names(judge, ROOT)["vllm"]
    assert (seen, Path.cwd()) == ([ROOT], tmp_path)


def test_a_server_that_is_gone_is_named_and_the_judge_starts_none(
    asking: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has but a link to the server of who grades; a state folder that it cannot write to is nobody's affair."""
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path / "state"))
    (scratch := tmp_path / "submission" / "its").mkdir(parents=True)
    provided.make_folders(scratch)
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(provided.judges_state(scratch)))
    monkeypatch.setattr(judging, "serve", lambda name: name)
    names = Names(asking({}).namespace.judge)  # type: ignore[attr-defined]
    with pytest.raises(LaunchError, match=r"The server grpc is gone.*\n→ Start it with `servebook up grpc`"):
        names["grpc"]
    monkeypatch.setenv("SERVEBOOK_ENGINE_URL", "http://127.0.0.1:1")
    assert names["vllm"] == "vllm", "it is asked by its URL"


@pytest.mark.skipif(not landlock.possible(), reason="needs Landlock (Linux 6.2 or newer)")
def test_who_is_graded_cannot_look_into_the_judges_memory() -> None:
    looked = subprocess.run(
        [sys.executable, "-c", f"open('/proc/{os.getpid()}/mem', 'rb')"],
        preexec_fn=lambda: landlock.confine({"read": ["/"], "write": []}),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert "PermissionError" in looked.stderr


def test_a_rooms_desks_ask_a_judge() -> None:
    for path in ("jupyterhub/jupyterhub_config.py", "kubernetes/jupyterhub/values.yaml"):
        assert re.search(rf"{JUDGE_APART}\"?: \"1\"", (ROOT / path).read_text(encoding="utf-8")), path
