"""Which labs and exercises there are, read from `manifest.toml`: the one place that orders and weighs them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from servebook.errors import ServebookError


class Exercise(BaseModel):
    """One blank: what it is called, what it is worth (points), how long it takes (minutes), and its hints.

    `core` exercises are what everybody should have done; an `extra` one goes deeper, or is needed by fewer people.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=r"^\d\d\.\d$")]
    title: str
    kind: Literal["read", "write", "build"]
    points: Annotated[int, Field(ge=1)]
    minutes: Annotated[int, Field(ge=1)]
    difficulty: Literal["easy", "medium", "hard"]
    importance: Literal["core", "extra"]
    hints: Annotated[tuple[str, ...], Field(min_length=2)]

    @property
    def worth(self) -> str:
        """The points in words."""
        return "1 point" if self.points == 1 else f"{self.points} points"

    @property
    def cell(self) -> str:
        """The stem of its cells' ids: exercise 04.2 is in the cells `04-2-brief`, `04-2-answer`, `04-2-check`."""
        return self.id.replace(".", "-")


class Lab(BaseModel):
    """One chapter's lab; `stem` names its notebook, `servers` what has to be up."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stem: Annotated[str, Field(pattern=r"^\d\d_\w+$")]
    title: str
    servers: tuple[str, ...]
    exercises: tuple[Exercise, ...]

    @property
    def path(self) -> str:
        """Its notebook, below `labs/` or `solutions/`."""
        return f"{self.stem}/{self.stem}.ipynb"

    @property
    def points(self) -> int:
        return sum(exercise.points for exercise in self.exercises)

    @property
    def minutes(self) -> int:
        return sum(exercise.minutes for exercise in self.exercises)


class Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    labs: tuple[Lab, ...]


@cache
def load_labs() -> tuple[Lab, ...]:
    """All labs in the order of the chapters."""
    text = files("servebook.lab").joinpath("manifest.toml").read_text(encoding="utf-8")
    return Manifest.model_validate(tomllib.loads(text)).labs


def exercises() -> Iterator[tuple[Lab, Exercise]]:
    """Every exercise with the lab that it belongs to."""
    for lab in load_labs():
        for exercise in lab.exercises:
            yield lab, exercise


def find_exercise(exercise_id: str) -> tuple[Lab, Exercise]:
    """The exercise of that id, such as "04.2", and its lab.

    Raises:
        ServebookError: there is none (the message lists those of the same chapter), or the id is no text, as in
            check(4.2).
    """
    if not isinstance(exercise_id, str):
        raise ServebookError(
            f"An exercise is named by a text, and {exercise_id!r} is none.", 'Put quotes around it: check("04.2").'
        )
    for lab, exercise in exercises():
        if exercise.id == exercise_id:
            return lab, exercise
    near = [e.id for _, e in exercises() if e.id[:2] == exercise_id[:2]] or [e.id for _, e in exercises()]
    raise ServebookError(f"There is no exercise {exercise_id!r}.", f"Choose from {', '.join(near)}.")
