"""How each server is, asked of the servers and not of the disk."""

from __future__ import annotations

from typing import Literal, TypedDict

from servebook.launch.files import NAME, Files
from servebook.launch.link import Link
from servebook.launch.supervisor import Description
from servebook.launch.table import SERVERS, find_server
from servebook.settings import Settings, own_settings, unusable


class Status(TypedDict):
    """One line of `servebook status --json`."""

    name: str
    state: Literal["starting", "ready", "failed", "stopped"]
    pid: int | None
    model: str | None
    endpoints: dict[str, str]
    owner: str | None
    log: str | None


def status(settings: Settings | None = None) -> list[Status]:
    """Every known server's state, as `servebook status --json` prints it.

    Raises:
        ServebookError: the state folder cannot be looked into.
    """
    settings = settings or own_settings()
    files = [Files(settings.state_dir, name) for name in SERVERS]
    folder = files[0].record.parent
    try:
        on_disk = {file.stem for file in folder.glob("*") if file.suffix in (".json", ".sock")}
    except OSError as error:
        raise unusable(settings.state_dir, error) from None
    found = set(filter(NAME.fullmatch, on_disk))
    others = [status_of(Files(settings.state_dir, name), settings) for name in sorted(found - SERVERS.keys())]
    return [*(status_of(each, settings) for each in files), *(each for each in others if each["state"] != "stopped")]


def describe(files: Files) -> Description | None:
    """An instance in its keeper's words; None where there is none, or it has ended without an answer.

    One that is just ending its server answers nobody, and is waited for.
    """
    link = Link.open(files)
    if link is None:
        return None
    there = link.ask("info")
    link.close()
    return there


def status_of(files: Files, settings: Settings) -> Status:
    """Of one instance."""
    there = describe(files)
    if not there:
        record = files.read_record()
        model, owner, log = (value if isinstance(value := record.get(key), str) else None for key in RECORDED)
        state: Literal["failed", "stopped"] = "failed" if record else "stopped"
        return Status(name=files.instance, state=state, pid=None, model=model, endpoints={}, owner=owner, log=log)
    late = there["was_ready"] or there["seconds"] > settings.start_timeout
    return Status(
        name=files.instance,
        state="ready" if find_server(there["server"]).answers(there["endpoints"]) else "failed" if late else "starting",
        pid=there["pid"],
        model=there["model"],
        endpoints=there["endpoints"],
        owner=there["owner"],
        log=there["log"],
    )


RECORDED = ("model", "owner", "log")
