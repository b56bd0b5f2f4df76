"""What one learner has done so far, kept in the state folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from servebook.errors import ServebookError
from servebook.settings import own_settings
from servebook.whole import write_whole

LOCK_SECONDS = 10.0
"""How long others may have the progress file, which they need for milliseconds."""


class Record(BaseModel):
    """One exercise: its best state so far, how often it was checked, how many hints were shown."""

    state: Literal["new", "tried", "passed"] = "new"
    attempts: int = 0
    hints: int = 0


class Progress(BaseModel):
    """All records of a learner; `folder` is the copy of the labs that they work in."""

    model_config = ConfigDict(extra="forbid")  # what this version does not know would be lost with the next check

    folder: Path | None = None
    records: dict[str, Record] = {}

    def of(self, exercise_id: str) -> Record:
        """The record of one exercise, a fresh one where there is none."""
        return self.records.setdefault(exercise_id, Record())


class Store:
    """A locked view of the progress file: `with Store() as progress:` reads it, and writes it at the end."""

    def __init__(self) -> None:
        self.path = own_settings().state_dir / "labs.json"
        self.lock = FileLock(self.path.with_suffix(".lock"))

    def __enter__(self) -> Progress:
        """Lock the file and read it.

        Raises:
            ServebookError: it cannot be read, or others have had it for too long.
        """
        with self._state_folder():
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.lock.acquire(timeout=LOCK_SECONDS)
            try:
                self.progress = self._read()
            except BaseException:  # __exit__ is not called then, and the next check would wait for ever
                self.lock.release()
                raise
        return self.progress

    def _read(self) -> Progress:
        try:
            return Progress.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return Progress()
        except ValidationError:  # cut off, or edited by hand: it is kept for whoever can read it
            self.path.replace(self.path.with_suffix(".unreadable"))
            return Progress()

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
        except Timeout:
            raise ServebookError(
                f"Another check has held {self.lock.lock_file} for {LOCK_SECONDS:.0f} s.",
                "End the notebook or command that hangs, then check again.",
            ) from None
        except OSError as error:
            raise ServebookError(
                f"Progress cannot be kept in {self.path.parent}: {error.strerror}.",
                "Set SERVEBOOK_STATE_DIR to a folder that you can write to.",
            ) from None
