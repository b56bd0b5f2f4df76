"""A judge's process, from outside: it is asked about one exercise after the other."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from servebook.lab.feedback import Result
from servebook.lab.judge.learner import Session
from servebook.lab.manifest import find_exercise
from servebook.launch.processes import die_with_parent

APART = "SERVEBOOK_JUDGE_APART"
"""Set in the environment of a room's learners: `check` then asks a judge instead of judging itself."""


IMPORT_SECONDS = 120.0
"""How long a judge may take to listen: what checks need is imported first, perhaps beside much else."""
VERDICT_SECONDS = 20.0
"""How long a verdict may take once the session is done: the check is over then, or never will be."""


class JudgeProcess:
    """A process that judges; `environment` is added to its own. One that is kept busy for ever is replaced."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.environment = environment or {}
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "servebook.lab.judge"],
            env=os.environ | self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def ask(self, exercise_id: str, folder: Path, address: Path) -> None:
        """Let it judge an exercise in that folder; it listens at `address` then, for the learner's session."""
        if self.process.poll() is not None:
            self.process = self._start()
        question = {"exercise": exercise_id, "folder": str(folder), "socket": str(address)}
        self._say(json.dumps(question))
        self._hear(IMPORT_SECONDS)

    def verdict(self, exercise_id: str) -> Result:
        """What it found, once the session has answered, or never will; "stuck" where it says nothing."""
        exercise = find_exercise(exercise_id)[1]
        self._say("")
        if told := self._hear(VERDICT_SECONDS):
            return Result(exercise, **json.loads(told))
        self.end()
        return Result(exercise, "stuck", "a verdict", "none: the judge has ended, or does not come to an end")

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()

    def _say(self, line: str) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it has ended, so nothing will be heard
            print(line, file=self.process.stdin, flush=True)

    def _hear(self, seconds: float) -> str:
        """The next line; nothing where it has ended, or says none in so many seconds."""
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else ""


@cache
def judge() -> JudgeProcess:
    """This session's judge; it has imported what checks need, and keeps that for the next one."""
    return JudgeProcess()


def judged_apart(exercise_id: str, namespace: Mapping[str, Any]) -> Result:
    """Let a judge ask this session about an exercise."""
    with tempfile.TemporaryDirectory() as scratch:
        address = Path(scratch) / "judge"
        judge().ask(exercise_id, Path.cwd(), address)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(address))
            Session(connection, namespace).listen()
        return judge().verdict(exercise_id)
