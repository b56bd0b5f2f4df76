"""Where a server's files lie in the state folder."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from servebook.errors import LaunchError
from servebook.trust import not_only_mine

TAIL_LINES = 15
TAIL_BYTES = 64 * 1024
"""What is read first of a log's end: a server's grows for as long as it runs, to some 100 MB."""
LINE_END = re.compile(r"\r\n?|\n")
NAME = re.compile(r"\w[\w.-]{,63}", re.ASCII)


@dataclass(frozen=True)
class Files:
    """The files of one instance in the state folder.

    Raises:
        LaunchError: the instance's name could lead out of that folder.
    """

    state_dir: Path
    instance: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.instance):
            raise LaunchError(
                f"{self.instance!r} cannot name a server.", "Use at most 64 letters, digits, '-', '_' and '.'."
            )

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
    """The last lines of a log file as they may be shown, "" where there is none."""
    end, size = b"", TAIL_BYTES
    with suppress(OSError), log.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        while True:
            file.seek(max(0, length - size))
            end = file.read()
            if size >= length or end.count(b"\n") > lines:  # more, as the first may be cut off
                break
            size *= 4
    # Not `splitlines`: it takes more for a line's end than a log's writers do, and what callers sent may hold that.
    *whole, rest = LINE_END.split(end.decode(errors="replace"))
    return visible("\n".join([*whole, *([rest] if rest else [])][-lines:]))


def read_log(log: Path) -> str:
    """A log file's text, "" where there is none."""
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def visible(text: str) -> str:
    """`text` with its control characters written out: a log may hold what callers sent, and a terminal would obey."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode() for each in text
    )
