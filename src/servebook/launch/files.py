"""Where a server's files lie in the state folder."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path

from servebook.trust import not_only_mine

TAIL_LINES = 15


@dataclass(frozen=True)
class Files:
    """The files of one instance in the state folder."""

    state_dir: Path
    instance: str

    @property
    def log(self) -> Path:
        """The server's output; the run before it is kept beside it as `.log.1`."""
        return self.state_dir / "logs" / f"{self.instance}.log"

    @property
    def record(self) -> Path:
        """What the supervisor wrote last; there while the server lives, or if it failed."""
        return self.state_dir / "servers" / f"{self.instance}.json"

    @property
    def socket(self) -> Path:
        return self.state_dir / "servers" / f"{self.instance}.sock"

    def make_folders(self) -> None:
        """Make what is missing of the folders that they lie in, for this user alone.

        Raises:
            OSError: one cannot be made, or others may write to it: they could put a socket of theirs there.
        """
        self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self.state_dir, self.log.parent, self.record.parent):
            folder.mkdir(exist_ok=True, mode=0o700)
            if why := not_only_mine(folder):
                raise PermissionError(errno.EPERM, why, str(folder))

    def read_record(self) -> dict[str, object]:
        """The record; {} where nothing, or nothing readable, is there."""
        try:
            record = json.loads(self.record.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The end of the log."""
        return tail(self.log, lines)


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log file, "" where there is none."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
