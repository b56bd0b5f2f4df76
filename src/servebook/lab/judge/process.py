"""A judge's process, from outside: it is asked about one exercise after the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from servebook.lab.feedback import Result
from servebook.lab.judge.learner import Session
from servebook.lab.manifest import find_exercise
from servebook.launch.processes import die_with_parent

APART = "SERVEBOOK_JUDGE_APART"
"""Set in the environment of a room's learners: `check` then asks a judge instead of judging itself."""


class JudgeProcess:
    """A process that judges; `environment` is added to its own."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "servebook.lab.judge"],
            env=os.environ | (environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def ask(self, exercise_id: str, folder: Path, address: Path) -> None:
        """Let it judge an exercise in that folder; it listens at `address` then, for the learner's session."""
        question = {"exercise": exercise_id, "folder": str(folder), "socket": str(address)}
        self._say(json.dumps(question))
        self._hear()

    def verdict(self, exercise_id: str) -> Result:
        """What it found, once the session has answered, or never will."""
        self._say("")
        return Result(find_exercise(exercise_id)[1], **json.loads(self._hear()))

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()

    def _say(self, line: str) -> None:
        assert self.process.stdin
        print(line, file=self.process.stdin, flush=True)

    def _hear(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()


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
