"""Grading leaves nothing running: what a submission has started ends with it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any
from uuid import uuid4

from nbconvert.preprocessors import ClearMetadataPreprocessor
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    Execute,
    IgnorePattern,
    LimitOutput,
    SaveAutoGrades,
)

from servebook.launch.processes import end

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
            for command in end(f"{MARK}={self.mark}", GRACE_SECONDS):
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
