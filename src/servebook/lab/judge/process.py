"""A judge's process, from outside: it is asked about one exercise after the other."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from servebook.environment import short_tmpdir
from servebook.lab.feedback import Result
from servebook.lab.judge.learner import Session
from servebook.lab.manifest import find_exercise
from servebook.lab.submission import unattended
from servebook.launch.bound import bound

IMPORT_SECONDS = 120.0
"""How long a judge may take to listen: what checks need is imported first, perhaps beside much else."""
VERDICT_SECONDS = 20.0
"""How long a verdict may take once the session is done: the check is over then, or never will be."""
LISTENING = "listening\n"
"""What a judge says before the session may come."""
AGAIN = "the check itself could not run; check again, and another judge is started"


class JudgeProcess:
    """A process that judges, in `environment` and started in `folder` (None: this process's own).

    One that ends, or is kept busy for ever, is replaced.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> None:
        self.environment, self.folder = environment, folder
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        environment = os.environ if self.environment is None else self.environment
        return subprocess.Popen(
            bound([sys.executable, "-P", "-m", "servebook.lab.judge"], environment, self.folder),
            env=environment,
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def judged(self, exercise_id: str, folder: Path, address: Path, answer: Callable[[], object]) -> Result:
        """What it finds about an exercise in that folder; "stuck" where it finds nothing.

        It listens at `address`, and `answer` lets the learner's session answer it there.
        """
        exercise = find_exercise(exercise_id)[1]
        try:
            if self.process.poll() is not None:
                self.process = self._start()
            self._say(json.dumps({"exercise": exercise_id, "folder": str(folder), "socket": str(address)}))
            if hear(self.process, IMPORT_SECONDS) != LISTENING:
                self.end()
                return Result(exercise, "stuck", "a judge that listens", "none: it has ended, or takes too long", AGAIN)
            answer()
            self._say("")
            told = hear(self.process, VERDICT_SECONDS)
        except BaseException:  # an Interrupt, too: what it says later would be taken for the next verdict
            self.end()
            raise
        try:
            return Result(exercise, **json.loads(told))
        except (ValueError, TypeError):
            self.end()
            return Result(exercise, "stuck", "a verdict", "none: the judge has ended, or does not end", AGAIN)

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()

    def _say(self, line: str) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it has ended, so nothing will be heard
            print(line, file=self.process.stdin, flush=True)


def hear(process: subprocess.Popen[str], seconds: float) -> str:
    """The next line that it says; nothing where it has ended, or says none in so many seconds."""
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline() if ready else ""


@cache
def judge() -> JudgeProcess:
    """This session's judge; it has imported what checks need, and keeps that for the next one."""
    return JudgeProcess()


def judged_apart(exercise_id: str, namespace: Mapping[str, Any]) -> Result:
    """Let a judge ask this session about an exercise."""
    with tempfile.TemporaryDirectory(dir=short_tmpdir(os.environ) or None) as scratch:
        address = Path(scratch) / "judge"

        def answer() -> None:
            with suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as connection:  # then it has ended
                connection.connect(str(address))
                session = Session(connection, namespace)
                try:
                    with unattended():
                        session.listen()
                except KeyboardInterrupt:
                    session.abort()
                    raise

        return judge().judged(exercise_id, Path.cwd(), address, answer)
