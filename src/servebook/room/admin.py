"""The instructor's way to a running room: its key, its learners."""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from filelock import FileLock
from pydantic import SecretStr

from servebook import launch
from servebook.bearer import bearer
from servebook.errors import ServebookError
from servebook.launch.files import Files
from servebook.launch.probes import only_ours
from servebook.launch.states import describe
from servebook.processes import KEPT, environment_of
from servebook.room.board import watch_key
from servebook.settings import LOOPBACK, Settings, load_settings, own_settings, variables
from servebook.whole import write_whole

CODE_LETTERS = "ABCDEFGHJKMNPQRSTUVWXYZ23456789"
"""Those that nobody mistakes for another: eight of them are 40 bits."""
HUB_SECONDS = 60.0
"""How long the hub may take to end a desk, after ten of which it says that it is at it."""
NOT_UP = "The room is not up.", "Start it with `servebook room start`."


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
    if given := environment_of(there["pid"] or 0):  # not where it has just ended
        for name in variables() - given.keys():  # set in this terminal only
            os.environ.pop(name, None)
    os.environ |= {name: value for name, value in given.items() if name.startswith("SERVEBOOK_") and name != KEPT}
    os.environ["SERVEBOOK_STATE_DIR"] = str(state_dir)  # given from another folder, perhaps
    return instructors_settings(there["host"])


def with_rooms_key(settings: Settings) -> Settings:
    """The same settings, with the key of the front that is up, in whichever terminal it was started."""
    there = describe(Files(settings.state_dir, "front"))
    key = environment_of(there["pid"] or 0).get("SERVEBOOK_API_KEY") if there else None
    return settings.model_copy(update={"api_key": SecretStr(key)}) if key else settings


def instructors_key(settings: Settings) -> str:
    """SERVEBOOK_API_KEY, or else a key that is made once and kept in the state folder.

    Raises:
        ServebookError: it cannot be kept there.
    """
    if settings.key:
        return settings.key
    return _kept(settings.state_folder("room") / "instructor.key", secrets.token_urlsafe)


def join_code(settings: Settings, new: bool = False) -> str:
    """What learners need to sign up; it stays for the next day, until a new one is asked for."""

    def drawn() -> str:
        code = "".join(secrets.choice(CODE_LETTERS) for _ in range(8))
        return f"{code[:4]}-{code[4:]}"

    return _kept(settings.state_folder("room") / "join.code", drawn, new)


def _kept(path: Path, make: Callable[[], str], new: bool = False) -> str:
    """What this file has; made where there is none, or an empty one. Of two commands at once, one makes it.

    Raises:
        ServebookError: it cannot be written, or not be read.
    """

    def there() -> str:
        return path.read_text() if not new and path.exists() else ""

    try:
        if not there():
            with FileLock(path.with_suffix(".lock")):
                if not there():  # nor has another command made it meanwhile
                    write_whole(path, make(), 0o600)
        return path.read_text()
    except OSError as error:
        raise ServebookError(
            f"{path} cannot be kept: {error.strerror}.",
            "Free some disk space, or set SERVEBOOK_STATE_DIR to a folder that you can write to.",
        ) from None


def forget_password(settings: Settings, name: str) -> bool:
    """Whether this learner had a password; the name is free for a new sign-up then, and its desk is kept.

    Raises:
        ServebookError: what the hub keeps the passwords in cannot be read or written.
    """
    return _ask_passwords(settings, "delete from password where name = ?", name)[0] == 1


def signed_up(settings: Settings) -> list[str]:
    """The names that have a password.

    Raises:
        ServebookError: as `forget_password`.
    """
    return _ask_passwords(settings, "select name from password order by name")[1]


def _ask_passwords(settings: Settings, query: str, *values: str) -> tuple[int, list[str]]:
    """How many rows a query has changed, and the first column of those that it finds."""
    path = settings.state_dir / "room" / "passwords.sqlite"
    if not path.exists():
        return 0, []
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as passwords:
            found = passwords.execute(query, values)
            return found.rowcount, [row[0] for row in found]
    except sqlite3.Error as error:
        raise ServebookError(
            f"The passwords in {path} cannot be changed: {error}.",
            "Free some disk space. Or end the room and remove that file: then all learners choose a password anew.",
        ) from None


class RoomAdmin:
    """The front of the room that is up.

    Raises:
        ServebookError: there is none, or it does not take the key.
    """

    def __init__(self, settings: Settings) -> None:
        self.key = instructors_key(settings)
        there = {entry["name"]: entry["endpoints"] for entry in launch.status(settings)}  # none of what is not up
        if not there["front"]:  # one whose engine is away is asked: who killed that has to be revoked
            if there.get("hub"):
                raise ServebookError("The room's front is away.", "See what the terminal of `make room` says of it.")
            raise ServebookError(*NOT_UP)
        self.url = f"http://{there['front']['http']}"

    def learners(self) -> list[dict[str, Any]]:
        """Name, whether revoked, and what is under way, served and refused, of each learner."""
        rows: list[dict[str, Any]] = self._ask("GET", "room/learners").json()
        return rows

    def board(self) -> dict[str, Any]:
        """The engine's load, and every learner's standing, who needs help first."""
        board: dict[str, Any] = self._ask("GET", "services/watch/board", watch_key(self.key)).json()
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

    def _ask(self, method: str, path: str, key: str = "") -> requests.Response:
        """The front's answer. Nothing is said to anybody else who listens in its place."""
        try:
            if not only_ours(self.url):
                raise requests.ConnectionError
            answer = requests.request(method, f"{self.url}/{path}", auth=bearer(key or self.key), timeout=60)
        except requests.RequestException:
            raise ServebookError("The room does not answer.", "`servebook status` shows whether it is up.") from None
        if not answer.ok:
            said = f"The room answers {answer.status_code} {answer.reason}."
            with suppress(ValueError, LookupError, TypeError):  # the front's own words; another server has others
                said = str(answer.json()["error"]["message"])
            raise ServebookError(said, "See `servebook room learners`.")
        return answer


class HubAdmin:
    """The hub of the room that is up, which keeps the desks. Names are as learners have them at the door.

    Raises:
        ServebookError: there is none.
    """

    def __init__(self, settings: Settings) -> None:
        self.key = instructors_key(settings)
        at = next(entry["endpoints"] for entry in launch.status(settings) if entry["name"] == "hub")
        if not at:
            raise ServebookError(*NOT_UP)
        self.port = int(at["api"].rpartition(":")[2])

    def close(self, name: str) -> str:
        """End this learner's desk; what has become of it, in words, "" where nobody of that name has come in."""
        user = self._ask("GET", name)
        if user is None:
            return ""
        if not user.json()["servers"]:
            return "was not open"
        ended = self._ask("DELETE", name, "/server")
        return "is closing" if ended is not None and ended.status_code == 202 else "is closed"

    def sign_out(self, name: str) -> bool:
        """End this learner's desk and what browsers are signed in by; False where nobody of that name has come in.

        Raises:
            ServebookError: the desk takes its time to end.
        """
        return bool(self.close(name)) and self._ask("DELETE", name) is not None

    def _ask(self, method: str, name: str, of_them: str = "") -> requests.Response | None:
        """The hub's answer about a learner, None for 404. Nothing is said to anybody else who listens in its place."""
        url = f"http://{LOOPBACK}:{self.port}/hub/api/users/{quote(name, safe='')}{of_them}"
        try:
            if not only_ours(url):
                raise requests.ConnectionError
            answer = requests.request(method, url, auth=bearer(self.key, "token"), timeout=HUB_SECONDS)
        except requests.RequestException:
            raise ServebookError("The hub does not answer.", "`servebook logs hub` says why.") from None
        if answer.status_code == 404:
            return None
        if not answer.ok:
            said = f"The hub answers {answer.status_code} {answer.reason}."
            with suppress(ValueError, LookupError, TypeError):
                said = str(answer.json()["message"])
            raise ServebookError(said, "`servebook logs hub` has more.")
        return answer
