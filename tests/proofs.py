"""Runs the labs' proofs in processes of their own, several at once where a room's learners would be."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from servebook.lab.dry_run import load as dry_run
from servebook.lab.feedback import Result
from servebook.lab.manifest import exercises
from servebook.lab.shell import LabShell
from servebook.processes import die_with_parent

ROOT = Path(__file__).parents[1]
AT_ONCE = 3
ALONE = {"03_triton_grpc", "08_measure", "10_scale_out"}
"""Labs whose checks count all requests in an engine, or take times: one proof at a time."""


class Proof(NamedTuple):
    """An answer to check: the text of an answer cell, with all other exercises solved where `among_solved`."""

    stem: str
    exercise_id: str
    answer: str
    among_solved: bool = False


def sit_down(room: Path) -> None:
    """Work in a folder of this process's own, as each learner does: answers write files. End with the test run."""
    die_with_parent()
    os.chdir(tempfile.mkdtemp(dir=room))


@cache
def solution(stem: str) -> LabShell:
    """The lab's session in this process, its shared cells run."""
    shell = LabShell(ROOT / "solutions" / stem / f"{stem}.ipynb")
    shell.prepare()
    return shell


def prove(proof: Proof) -> Result:
    """Check one answer in this process."""
    shell = solution(proof.stem)
    shell.forget()
    if proof.among_solved:
        for lab, other in exercises():
            if lab.stem == proof.stem and other.id != proof.exercise_id:
                error = shell.run(shell.source(other.id))
                assert error is None, f"the solution of {other.id}: {error}"
    return shell.check(proof.exercise_id, proof.answer)


class Prover:
    """All proofs that a run wants; those of a lab begin together, when the first of them is asked for."""

    def __init__(self, proofs: Iterable[Proof], one: ProcessPoolExecutor, several: ProcessPoolExecutor) -> None:
        self.wanted = list(dict.fromkeys(proofs))
        self.one, self.several = one, several
        self.results: dict[Proof, Future[Result]] = {}

    def result(self, proof: Proof) -> Result:
        """What the check said; the lab's servers are up."""
        if proof not in self.results:
            pool = self.one if proof.stem in ALONE else self.several
            for each in [each for each in self.wanted if each.stem == proof.stem]:
                self.results[each] = pool.submit(prove, each)
        return self.results[proof].result()


@contextmanager
def prover(proofs: Iterable[Proof], scratch: Path) -> Iterator[Prover]:
    """A Prover whose processes end with the block; their folders are in `scratch`."""
    context = get_context("spawn")
    with (
        ProcessPoolExecutor(1, context, sit_down, (scratch,)) as one,
        ProcessPoolExecutor(AT_ONCE, context, sit_down, (scratch,)) as several,
    ):
        made = Prover(proofs, one, several)
        try:
            yield made
        finally:
            for begun in made.results.values():
                begun.cancel()
            one.submit(dry_run.end).result()  # lab 03 keeps vLLM imported from check to check
