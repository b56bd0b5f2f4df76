"""The instructor's way to a running room: its key, its learners."""

from __future__ import annotations

import os
import secrets
import sqlite3
from contextlib import closing
from typing import Any
from urllib.parse import quote

import requests

from servebook import launch
from servebook.errors import ServebookError
from servebook.launch.files import Files
from servebook.launch.processes import KEPT, environment_of
from servebook.launch.states import describe
from servebook.settings import Settings, load_settings, own_settings

CODE_LETTERS = "ABCDEFGHJKMNPQRSTUVWXYZ23456789"
"""Those that nobody mistakes for another: eight of them are 40 bits."""


def instructors_settings(host: str = "") -> Settings:
    """Those of this terminal, with the instructor's key: a room may be opened to the network without one being set."""
    return load_settings(host=host, api_key=instructors_key(own_settings()))


def rooms_settings() -> Settings:
    """Those with which the room that is up was started, in whichever terminal; the process goes on with them.

    Where none is up, `instructors_settings`.
    """
    state_dir = own_settings().state_dir
    keepers = (describe(Files(state_dir, name)) for name in ("hub", "front"))  # a front may be up alone
    there = next((each for each in keepers if each), None)
    if there is None:
        return instructors_settings()
    given = environment_of(there["pid"] or 0).items()
    os.environ |= {name: value for name, value in given if name.startswith("SERVEBOOK_") and name != KEPT}
    os.environ["SERVEBOOK_STATE_DIR"] = str(state_dir)  # given from another folder, perhaps
    return instructors_settings(there["host"])


def instructors_key(settings: Settings) -> str:
    """SERVEBOOK_API_KEY, or else a key that is made once and kept in the state folder."""
    if settings.key:
        return settings.key
    path = settings.state_folder("room") / "instructor.key"
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32))
    return path.read_text()


def join_code(settings: Settings, new: bool = False) -> str:
    """What learners need to sign up; it stays for the next day, until a new one is asked for."""
    path = settings.state_folder("room") / "join.code"
    if new or not path.exists():
        code = "".join(secrets.choice(CODE_LETTERS) for _ in range(8))
        draft = path.with_suffix(".draft")
        draft.touch(mode=0o600)
        draft.write_text(f"{code[:4]}-{code[4:]}")
        draft.replace(path)
    return path.read_text()


def forget_password(settings: Settings, name: str) -> bool:
    """Whether this learner had a password; the name is free for a new sign-up then, and its desk is kept."""
    path = settings.state_dir / "room" / "passwords.sqlite"
    if not path.exists():
        return False
    with closing(sqlite3.connect(path, isolation_level=None)) as passwords:
        return passwords.execute("delete from password where name = ?", [name]).rowcount == 1


class RoomAdmin:
    """The front of the room that is up.

    Raises:
        ServebookError: there is none, or it does not take the key.
    """

    def __init__(self, settings: Settings) -> None:
        self.key = instructors_key(settings)
        entry = next(entry for entry in launch.status(settings) if entry["name"] == "front")
        if entry["state"] != "ready":
            raise ServebookError(f"The room is {entry['state']}.", "Start it with `servebook room start`.")
        self.url = f"http://{entry['endpoints']['http']}"

    def learners(self) -> list[dict[str, Any]]:
        """Name, whether revoked, and what is under way, served and refused, of each learner."""
        rows: list[dict[str, Any]] = self._ask("GET", "room/learners").json()
        return rows

    def board(self) -> dict[str, Any]:
        """The engine's load, and every learner's standing, who needs help first."""
        board: dict[str, Any] = self._ask("GET", "services/watch/board").json()
        return board

    def admit(self, name: str) -> str:
        """A new key for this learner, also for one whose key was revoked."""
        return str(self._ask("PUT", f"room/learners/{quote(name, safe='')}?again=true").json()["key"])

    def revoke(self, name: str) -> None:
        """Take this learner's key away, at once."""
        self._ask("DELETE", f"room/learners/{quote(name, safe='')}")

    def forget(self, name: str) -> None:
        """Strike this learner off."""
        self._ask("DELETE", f"room/learners/{quote(name, safe='')}?forget=true")

    def metrics(self) -> str:
        """The front's metrics, as Prometheus reads them."""
        return self._ask("GET", "room/metrics").text

    def _ask(self, method: str, path: str) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        try:
            answer = requests.request(method, f"{self.url}/{path}", headers=headers, timeout=10)
        except requests.RequestException:
            raise ServebookError("The room does not answer.", "`servebook status` shows whether it is up.") from None
        if not answer.ok:
            raise ServebookError(answer.json()["error"]["message"], "See `servebook room learners`.")
        return answer
