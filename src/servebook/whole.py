"""Files that are there whole or not at all; with the standard library only."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: bytes | str, mode: int = 0o666) -> None:
    """Write a file in one step: on a full disk, or when this process is killed, it stays as it was before.

    Text is written as UTF-8. `mode` is reduced by the umask; an older file's mode is not kept. Where `path` is a link,
    the file that it names is written.

    Raises:
        OSError: it cannot be written, and nothing has changed.
    """
    path = path.resolve()
    draft = path.with_name(f".{secrets.token_hex(8)}")
    try:
        # Its own name: two at once would write into one draft. And on the disk before the name is: after a crash of the
        # machine the name could stand on an empty file.
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
