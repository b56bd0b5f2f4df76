"""What one learner has done so far, kept in the state folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock
from pydantic import BaseModel, ValidationError

from servebook.errors import ServebookError
from servebook.settings import load_settings
from servebook.whole import write_whole


class Record(BaseModel):
    """One exercise: its best state so far, how often it was checked, how many hints were shown."""

    state: Literal["new", "tried", "passed"] = "new"
    attempts: int = 0
    hints: int = 0


class Progress(BaseModel):
    """All records of a learner; `folder` is the copy of the labs that they work in."""

    folder: Path | None = None
    records: dict[str, Record] = {}

    def of(self, exercise_id: str) -> Record:
        """The record of one exercise, a fresh one where there is none."""
        return self.records.setdefault(exercise_id, Record())


class Store:
    """A locked view of the progress file: `with Store() as progress:` reads it, and writes it at the end."""

    def __init__(self) -> None:
        self.path = load_settings().state_dir / "labs.json"
        self.lock = FileLock(self.path.with_suffix(".lock"))

    def __enter__(self) -> Progress:
        with self._state_folder():
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.lock.acquire()
            try:
                self.progress = Progress.model_validate_json(self.path.read_bytes())
            except FileNotFoundError:
                self.progress = Progress()
            except ValidationError:  # cut off, or edited by hand: it is kept for whoever can read it
                self.path.replace(self.path.with_suffix(".unreadable"))
                self.progress = Progress()
        return self.progress

    def __exit__(self, *_: object) -> None:
        try:
            with self._state_folder():
                write_whole(self.path, self.progress.model_dump_json(indent=1))
        finally:
            self.lock.release()

    @contextmanager
    def _state_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ServebookError(
                f"Progress cannot be kept in {self.path.parent}: {error.strerror}.",
                "Set SERVEBOOK_STATE_DIR to a folder that you can write to.",
            ) from None
