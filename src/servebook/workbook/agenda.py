"""Agendas of workshops: `python -m servebook.workbook.agenda` writes their tables into docs/instructor.md.

Minutes come from the manifests of chapters and labs. Of a chapter without some of its sections, as many parts as
sections are left; everything is rounded up to five minutes.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from datetime import datetime, timedelta
from importlib.resources import files
from typing import Annotated

import nbformat
from pydantic import BaseModel, ConfigDict, Field

from servebook.checkout import ROOT
from servebook.lab.manifest import find_exercise
from servebook.whole import write_whole
from servebook.workbook.chapters import find_chapter

GUIDE = ROOT / "docs" / "instructor.md"
BEGIN, END = "<!-- agendas: `make agendas` -->\n", "<!-- end of agendas -->\n"
STEP_MINUTES = 5
FIRST_LAB = 1.25
"""What a first lab takes of its minutes: finding one's way."""


class Step(BaseModel):
    """One line: a chapter, exercises of a lab, or something else that takes `minutes`; `show` is for the projector."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chapter: str = ""
    skip: tuple[int, ...] = ()
    lab: str = ""
    exercises: tuple[str, ...] = ()
    say: str = ""
    minutes: int = 0
    show: str = ""


class Agenda(BaseModel):
    """A workshop, or one day of it, from `start` on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    start: Annotated[str, Field(pattern=r"^\d\d:\d\d$")]
    steps: tuple[Step, ...]


def load_agendas() -> list[Agenda]:
    """All agendas."""
    text = files("servebook.workbook").joinpath("agendas.toml").read_text(encoding="utf-8")
    return [Agenda.model_validate(each) for each in tomllib.loads(text)["agendas"]]


def sections(stem: str) -> dict[int, str]:
    """The numbered sections of a chapter's notebook."""
    found: dict[int, str] = {}
    for cell in nbformat.read(ROOT / f"notebooks/{stem}.ipynb", as_version=4).cells:
        number, _, title = cell.source.partition("\n")[0].removeprefix("## ").partition(" ")
        if cell.source.startswith("## ") and number.rstrip(".").isdigit():
            found[int(number.rstrip("."))] = title.removeprefix("· ")
    return found


def rounded(minutes: float) -> int:
    return STEP_MINUTES * math.ceil(minutes / STEP_MINUTES)


def line(step: Step, first_lab: bool) -> tuple[int, str, str]:
    """Minutes, what it is, and what is left out."""
    if step.chapter:
        chapter = find_chapter(step.chapter)
        there = sections(chapter.stem)
        left = f"section{'s' * (len(step.skip) > 1)} {', '.join(map(str, step.skip))}" if step.skip else ""
        share = (len(there) - len(step.skip)) / len(there)
        return rounded(chapter.minutes * share), f"{chapter.number} {chapter.title}", left
    if step.lab:
        minutes = sum(find_exercise(each)[1].minutes for each in step.exercises) * (FIRST_LAB if first_lab else 1)
        lab = find_exercise(step.exercises[0])[0]
        left = ", ".join(each.id for each in lab.exercises if each.id not in step.exercises)
        return rounded(minutes), f"Lab {step.lab}: {', '.join(step.exercises)}", left
    return step.minutes, step.say, ""


def table(agenda: Agenda) -> Iterator[str]:
    """An agenda in Markdown."""
    at = datetime.strptime(agenda.start, "%H:%M")
    rows, first_lab = [], True
    for step in agenda.steps:
        minutes, what, left = line(step, first_lab)
        first_lab = first_lab and not step.lab
        rows.append(f"| {at:%H:%M} | {minutes} | {what} | {left} | {step.show} |")
        at += timedelta(minutes=minutes)
    yield f"### {agenda.title}, {agenda.start} to {at:%H:%M}\n"
    yield "| from | minutes | what | skip | show |"
    yield "|---|---|---|---|---|"
    yield from rows
    yield ""


def written(guide: str) -> str:
    """The guide with the agendas of today's manifests."""
    before, rest = guide.split(BEGIN)
    _, after = rest.split(END)
    lines = [line for agenda in load_agendas() for line in table(agenda)]
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"{END}{after}"


if __name__ == "__main__":
    write_whole(GUIDE, written(GUIDE.read_text(encoding="utf-8")))
