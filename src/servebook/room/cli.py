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

SHARES = (0.5, 0.95, 0.99, 1)
HISTOGRAMS = {
    "a request": "room_request_seconds",
    "to its first byte": "room_first_byte_seconds",
    "of it, waiting for a place": "room_wait_seconds",
}

Name = Annotated[str, typer.Argument(metavar="NAME", help="A learner.")]


@app.command()
def start() -> None:
    """Start engine, front and JupyterHub, and keep them until Ctrl-C; then everything ends, desks included."""
    settings = load_settings(api_key=instructors_key(load_settings()))
    up_before = {entry["name"] for entry in launch.status(settings) if entry["state"] != "stopped"}
    hub = launch.serve("hub", settings=settings)
    out.print(f"Learners sign up and work at {hub.url} ({settings.room_seats} seats). Ctrl-C ends the room.")
    try:
        # Not its state: a hub that is being restarted does not answer for a while, and the room goes on.
        while any(entry["name"] == "hub" and entry["pid"] for entry in launch.status(settings)):
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


@app.command()
def load(
    learners: Annotated[int, typer.Option(min=1, max=200, help="How many at once.")] = 30,
) -> None:
    """Let so many learners do labs 01 and 02 at once on the room that is up; exit code 1 if a check failed.

    A check that was refused, because the room is full, is not a failed one.
    """
    from servebook.room import load as room_load

    outcome = room_load.run(Room(load_settings()), learners)
    table = Table(
        "", "p50", "p95", "p99", "most", title=f"{learners} learners at once, {outcome.seconds:.0f} s; seconds"
    )
    waits = sorted(check.seconds for check in outcome.checks)
    if waits:
        table.add_row("a check", *(f"{waits[min(len(waits) - 1, int(share * len(waits)))]:.1f}" for share in SHARES))
    for what, histogram in HISTOGRAMS.items():
        table.add_row(what, *(f"≤ {outcome.requests_within(histogram, share):g}" for share in SHARES))
    out.print(table)
    statuses = (f"{count} × {status}" for status, count in outcome.statuses().items())
    out.print(f"answers by status: {', '.join(statuses)}")
    out.print(", ".join(f"{outcome.count(word)} checks {word}" for word in ("passed", "refused", "failed")))
    for check in outcome.checks:
        if check.outcome == "failed":
            out.print(f"  {check.result.exercise.id}: {check.result.got} — {check.result.cause}", markup=False)
    if outcome.count("failed"):
        raise typer.Exit(1)
