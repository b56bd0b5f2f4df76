"""`servebook room …`: for the instructor of a room."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from servebook import launch
from servebook.errors import LaunchError
from servebook.room.admin import Room, instructors_key
from servebook.settings import load_settings

app = typer.Typer(no_args_is_help=True, help="A room of learners: JupyterHub, and one engine with a key for each.")
out = Console(highlight=False, soft_wrap=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A learner.")]


@app.command()
def start() -> None:
    """Start engine, front and JupyterHub, and keep them until Ctrl-C; then everything ends, desks included."""
    settings = load_settings(api_key=instructors_key(load_settings()))
    up_before = {entry["name"] for entry in launch.status(settings) if entry["state"] != "stopped"}
    hub = launch.serve("hub", settings=settings)
    out.print(f"Learners sign up and work at {hub.url} ({settings.room_seats} seats). Ctrl-C ends the room.")
    try:
        while any(entry["name"] == "hub" and entry["state"] != "failed" for entry in launch.status(settings)):
            time.sleep(1)
        raise LaunchError("JupyterHub has ended.", "See `servebook logs hub`.")
    finally:
        for name in ("hub", "room", "vllm"):
            if name not in up_before:
                launch.down(name, settings)


@app.command()
def learners() -> None:
    """List the learners: what they have under way, what was served and refused since the room is up."""
    table = Table("learner", "under way", "served", "refused", "")
    for row in Room(load_settings()).learners():
        numbers = (str(row[column]) for column in ("under_way", "served", "refused"))
        table.add_row(row["name"], *numbers, "revoked" if row["revoked"] else "")
    out.print(table)


@app.command()
def admit(name: Name) -> None:
    """Give a learner a new key: for a machine of their own, or after `revoke`."""
    room = Room(load_settings())
    print(f"export SERVEBOOK_ENGINE_URL={room.url} SERVEBOOK_API_KEY={room.admit(name)}")


@app.command()
def revoke(name: Name) -> None:
    """Take a learner's key away: what is under way is broken off, and nothing more is served."""
    Room(load_settings()).revoke(name)
    out.print(f"{name}: revoked; `servebook room admit {name}` lets them in again")
