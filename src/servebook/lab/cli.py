"""`servebook labs …` and `servebook release`."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn, TextIO

import typer
from rich.console import Console
from rich.table import Table

from servebook.errors import ServebookError
from servebook.lab.capstone.contract import ID as CAPSTONE
from servebook.lab.manifest import find_exercise, load_labs
from servebook.lab.record import Store
from servebook.processes import end_without_reader

app = typer.Typer(no_args_is_help=True, help="The labs: what there is, checks, hints, a copy to work in.")
out = Console(highlight=False)

ID = Annotated[str, typer.Argument(metavar="ID", help="An exercise, such as 04.2.")]
STATES = {"new": "", "tried": "✗", "passed": "✓"}


@app.command("list")
def list_labs() -> None:
    """List every exercise with your progress; a + beside its level marks one that goes beyond the core."""
    table = Table("", "exercise", "", "level", "points", "minutes", "hints", "servers")
    earned = 0
    with Store() as progress:
        for lab in load_labs():
            table.add_section()
            table.add_row(
                "", lab.stem, f"[bold]{lab.title}", "", str(lab.points), str(lab.minutes), "", " ".join(lab.servers)
            )
            for exercise in lab.exercises:
                record = progress.of(exercise.id)
                earned += exercise.points if record.state == "passed" else 0
                table.add_row(
                    STATES[record.state],
                    exercise.id,
                    exercise.title,
                    exercise.difficulty + (" +" if exercise.importance == "extra" else ""),
                    str(exercise.points),
                    str(exercise.minutes),
                    f"{record.hints}/{len(exercise.hints)}",
                )
    out.print(table)
    out.print(f"{earned} of {sum(lab.points for lab in load_labs())} points")


@app.command()
def check(exercise_id: ID) -> None:
    """Check an exercise in the notebook as it is saved, or 14, the service in ./capstone; exit code 1 if it fails."""
    if exercise_id == CAPSTONE:
        from servebook.lab.capstone.judge import judge_service

        verdict = judge_service()
        print(verdict.render())
        raise typer.Exit(0 if verdict.passed else 1)
    from servebook.lab.checking import remember
    from servebook.lab.handout.copy import lab_notebook
    from servebook.lab.shell import LabShell

    lab, _ = find_exercise(exercise_id)
    notebook = lab_notebook(lab)
    try:
        with contextlib.chdir(notebook.parent):  # some answers are files
            session = LabShell(notebook)
            session.prepare(exercise_id)
            result = session.check(exercise_id)
        text = result.render(remember(result))
    except ServebookError as error:
        leave(1, f"servebook: {error}", sys.stderr)
    except KeyboardInterrupt:
        leave(130, "servebook: stopped", sys.stderr)
    leave(0 if result.passed else 1, text, sys.stdout)


def leave(code: int, text: str, stream: TextIO) -> NoReturn:
    """Print it and end this process at once: Python would wait for what an answer has left at work, such as threads.

    A pool's processes would outlive this one.
    """
    for process in multiprocessing.active_children():
        process.kill()
    try:
        print(text, file=stream)
        for each in (sys.stdout, sys.stderr):
            print(end="", file=each, flush=True)  # None where it was closed
    except BrokenPipeError:
        end_without_reader()
    except OSError as error:  # a full disk, where the verdict should go
        code = 1
        with contextlib.suppress(OSError):  # as it may be where this goes, too
            print(f"servebook: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(code)


@app.command()
def hint(exercise_id: ID) -> None:
    """Show one more hint."""
    from servebook.lab.checking import next_hint

    print(next_hint(exercise_id))


@app.command()
def reset(exercise_id: ID) -> None:
    """Open the blank of an exercise again; what was written there is lost."""
    from servebook.lab.handout import copy

    print(f"{exercise_id}: open again in {copy.reset(exercise_id)}; in JupyterLab, reload it from disk")


@app.command()
def init(target: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Copy the labs to DIR and work there from now on; notebooks that are there already stay."""
    from servebook.lab.handout.copy import make_copy

    copied, kept = make_copy(target)
    print(f"{len(copied)} labs copied to {target}" + (f", {len(kept)} left as they were" if kept else ""))


def release(
    target: Annotated[Path, typer.Argument(metavar="DIR")],
    solutions: Annotated[bool, typer.Option("--solutions", help="With the labs' solutions: after the course.")] = False,
) -> None:
    """Write the student bundle to DIR: the workbook without solutions and without instructor's notes."""
    from servebook.lab.handout.bundle import write_bundle

    write_bundle(target, solutions=solutions)
    print(f"the student bundle is in {target}")
