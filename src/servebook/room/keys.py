"""Who may use the room's engine: a key for each learner, kept as a digest, good until it is revoked."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from servebook.errors import ServebookError
from servebook.whole import write_whole

NAME = re.compile(r"[\w.@+-]{1,64}")
KNOWN = TypeAdapter(dict[str, str | None])
"""What the file has: each learner's digest, null while it is revoked."""


def digest(key: str) -> str:
    """What is kept of a key. A key is 256 random bits: a plain hash of it tells nothing."""
    return hashlib.sha256(key.encode()).hexdigest()


class Roll:
    """The learners of a room, in a file that only its owner can read; written whole or not at all.

    A change waits for the disk, and one is made at a time; meanwhile other threads may ask whose a key is.

    Raises:
        ServebookError: that file cannot be read, or was not written by a room.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.entries = KNOWN.validate_json(path.read_bytes()) if path.exists() else {}
        except (OSError, ValidationError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not what a room has written"
            raise ServebookError(
                f"The learners' keys in {path} cannot be read: {why}.",
                "Put back a copy; or remove it: then each desk has to be opened anew, and who was revoked may come in.",
            ) from None
        self._names = {kept: name for name, kept in self.entries.items() if kept}

    def name_of(self, key: str) -> str | None:
        """Whose key this is, None if it is nobody's."""
        return self._names.get(digest(key))

    def revoked(self, name: str) -> bool:
        """Whether this learner had a key that was taken away."""
        return self.entries.get(name, "") is None

    def issue(self, name: str) -> str:
        """A new key for this learner; an older one counts no more.

        Raises:
            ValueError: the name is not one.
            OSError: it could not be written.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a learner: use letters, digits and . _ @ + -")
        key = secrets.token_urlsafe(32)
        self._keep(self.entries | {name: digest(key)})
        return key

    def revoke(self, name: str) -> bool:
        """Take a learner's key away; False where there is no such learner.

        Raises:
            OSError: it could not be written, and the key still counts.
        """
        if name not in self.entries:
            return False
        self._keep(self.entries | {name: None})
        return True

    def forget(self, name: str) -> bool:
        """Strike a learner off; False where there is no such learner."""
        if name not in self.entries:
            return False
        self._keep({known: kept for known, kept in self.entries.items() if known != name})
        return True

    def _keep(self, entries: dict[str, str | None]) -> None:
        """Written before it counts: what was said to a caller holds after a restart, too.

        Raises:
            OSError: it could not be written, and nothing has changed.
        """
        self._save(entries)
        self.entries = entries
        self._names = {kept: name for name, kept in entries.items() if kept}

    def _save(self, entries: dict[str, str | None]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(self.path, json.dumps(entries, indent=1), 0o600)
