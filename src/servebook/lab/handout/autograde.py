"""Grading leaves nothing running: what a submission has started ends with it."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, suppress
from typing import Any
from uuid import uuid4

import psutil
from nbconvert.preprocessors import ClearMetadataPreprocessor
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    Execute,
    IgnorePattern,
    LimitOutput,
    SaveAutoGrades,
)

from servebook.launch import supervisor

MARK = "NBGRADER_SUBMISSION"
"""In the environment of a submission's kernel, and so of whatever descends from it: a word of this run alone."""
GRACE_SECONDS = 25.0
"""More than a supervisor takes to end its server in order."""


class ExecuteAndEnd(Execute):  # type: ignore[misc]
    """Runs a submission as nbgrader does, then ends its processes: the kernel's end spares those of another session."""

    def preprocess(self, nb: Any, resources: Any = None, km: Any = None) -> tuple[Any, Any]:
        self.mark = uuid4().hex
        try:
            executed: tuple[Any, Any] = super().preprocess(nb, resources, km)
            return executed
        finally:
            for command in end_marked(self.mark):
                self.log.info("Ended what the submission had started: %s", command)

    def setup_kernel(self, **kwargs: Any) -> AbstractContextManager[None]:
        # SPT_NOENV: vLLM's processes rename themselves, and that would write over their environment with the mark.
        environment = os.environ | {MARK: self.mark, "SPT_NOENV": "1"}
        kernel: AbstractContextManager[None] = super().setup_kernel(env=environment, **kwargs)
        return kernel


STEPS = [
    ExecuteAndEnd,
    IgnorePattern,
    ClearMetadataPreprocessor,
    LimitOutput,
    SaveAutoGrades,
    AssignLatePenalties,
    CheckCellMetadata,
]
"""For `Autograde.autograde_preprocessors`: nbgrader's own, but for the first."""


def end_marked(mark: str) -> set[str]:
    """End every process that carries the mark: SIGTERM, and after a grace time SIGKILL. Return their commands."""
    deadline = time.monotonic() + GRACE_SECONDS
    asked: set[psutil.Process] = set()
    commands: set[str] = set()
    while left := marked(mark):
        late = time.monotonic() > deadline
        for process, environment in left.items():
            with suppress(psutil.Error):
                commands.add(" ".join(process.cmdline()))
                if late:
                    process.kill()
                # A server is its supervisor's to end, in order; that one carries our mark too, but not its own.
                elif process not in asked and supervisor.MARK not in environment:
                    process.terminate()
            asked.add(process)
        if late and time.monotonic() > deadline + supervisor.KILL_SECONDS:
            break
        time.sleep(0.05)
    return commands


def marked(mark: str) -> dict[psutil.Process, dict[str, str]]:
    """The live processes that carry the mark, with their environments."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ()
            if environment.get(MARK) == mark:
                found[process] = environment
    return found
