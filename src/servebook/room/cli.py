"""`servebook room …`: for the instructor of a room."""

from __future__ import annotations

import getpass
import math
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.live import Live
from rich.table import Table

from servebook import launch
from servebook.checkout import ROOT
from servebook.errors import LaunchError, ServebookError
from servebook.lab.manifest import load_labs
from servebook.launch.display import plain_console
from servebook.launch.files import Files, visible
from servebook.launch.states import Status, describe
from servebook.launch.table import rooms_engine
from servebook.processes import can_bind
from servebook.room import collect as hand_in
from servebook.room.admin import (
    NOT_UP,
    HubAdmin,
    RoomAdmin,
    forget_password,
    instructors_settings,
    join_code,
    rooms_settings,
    signed_up,
    with_rooms_key,
)
from servebook.room.board import watch_key
from servebook.room.hub import require_safe, why_not_apart
from servebook.room.tls import address, files, fingerprint, host_for_learners
from servebook.settings import LOOPBACK, Settings, in_address, is_loopback, own_settings

app = typer.Typer(no_args_is_help=True, help="A room of learners: JupyterHub, and one engine with a key for each.")
out = plain_console(soft_wrap=True)

FRONT_SECONDS = 30.0
"""How long a front may take to come back: it waits for the engine, and meanwhile nobody brings that back."""
LOOKED_FOR = {"vllm": ("engine", "the front asks for the engine"), "front": ("front", "desks ask for the front")}
RETRY_SECONDS = 10.0
"""Between two tries to start an engine again."""
PICTURE = "import segno, sys; segno.make_qr(sys.stdin.read(), error='L').terminal(compact=True)"
SHARES = (0.5, 0.95, 0.99, 1)
HISTOGRAMS = {
    "a request": "room_request_seconds",
    "to its first byte": "room_first_byte_seconds",
    "of it, waiting for a place": "room_wait_seconds",
}

ANEW = "File → Hub Control Panel → Stop My Server, then Start My Server"
"""How a learner's desk gets another key."""

Name = Annotated[str, typer.Argument(metavar="NAME", help="A learner.")]


def say(text: str) -> None:
    """Print it, control characters written out: some of the words are learners'."""
    out.print(visible(text))


def add_row(table: Table, *words: str, style: str = "") -> None:
    """The same for a row of a table."""
    table.add_row(*map(visible, words), style=style)


@app.command()
def start(
    trusted: Annotated[bool, typer.Option(help="Open the room even if desks cannot be kept apart.")] = False,
) -> None:
    """Start engine, front and JupyterHub, and keep them until Ctrl-C; then everything ends, desks included."""
    settings = instructors_settings()
    if trusted:
        settings = settings.model_copy(update={"room": settings.room.model_copy(update={"trusted": True})})
        os.environ["SERVEBOOK_ROOM_TRUSTED"] = "true"  # the hub reads its settings itself
    up_before = {entry["name"] for entry in launch.status(settings) if entry["pid"]}
    if "hub" in up_before:
        code()
        say("The room is up already; its own terminal ends it.")
        return
    require_safe(settings)
    hub = launch.serve("hub", settings=settings)
    there = {entry["name"]: entry for entry in launch.status(settings)}
    engine, front = there["vllm"], there["front"]
    opened = describe(Files(settings.state_dir, "front"))  # it may have been up before, and be open to others
    fronts = settings.model_copy(
        update={"host": opened["host"] if opened else LOOPBACK, "start_timeout": FRONT_SECONDS}
    )
    show_door(settings, hub.url.rpartition(":")[2])
    say(f"{settings.room.seats} seats. Ctrl-C ends the room.")
    try:
        # Not its state: a hub that is being restarted does not answer for a while, and the room goes on.
        while describe(Files(settings.state_dir, "hub")):
            if engine["pid"] and not describe(Files(settings.state_dir, "vllm")):
                bring_back("vllm", engine, rooms_engine(settings))
            elif front["pid"] and not describe(Files(settings.state_dir, "front")):
                bring_back("front", front, fronts)
            time.sleep(1)
        raise LaunchError("JupyterHub has ended.", "See `servebook logs hub`.")
    except KeyboardInterrupt:
        pass
    finally:
        for name in ("hub", "front", "vllm"):
            if name not in up_before:
                launch.down(name, settings)
    say("The room is closed; desks and passwords are kept for next time.")


def state_of(name: str, settings: Settings) -> Status:
    """A server as `servebook status` has it."""
    return next(entry for entry in launch.status(settings) if entry["name"] == name)


def bring_back(name: Literal["vllm", "front"], was: Status, settings: Settings) -> None:
    """Start the engine or the front again by its `settings`, where it is looked for; what was under way is lost.

    Where that cannot be, say why and wait a moment.
    """
    what, who = LOOKED_FOR[name]
    hint = " `servebook logs front` says who asked last." if name == "vllm" else ""
    say(f"{time.strftime('%H:%M:%S')} The {what} has ended, and is started again.{hint}")
    port = int(was["endpoints"]["http"].rpartition(":")[2])
    again = settings.model_copy(update={f"{name}_http_port": port})
    try:
        if not can_bind(settings.host, port):
            raise taken(port, who)
        if launch.serve(name, settings=again).endpoints != was["endpoints"]:  # the port was taken meanwhile
            launch.down(name, settings)
            raise taken(port, who)
    except (ServebookError, OSError) as error:  # OSError: its address is not this machine's any more
        pause = f"The room stays open without its {what}; the next try is in {RETRY_SECONDS:g} s."
        say(f"{error}\n{pause}")
        time.sleep(RETRY_SECONDS)


def taken(port: int, who: str) -> LaunchError:
    """A server's port is another program's: at another port it is not found."""
    return LaunchError(
        f"Port {port}, where {who}, is held by another program.",
        f"End that program: `ss -ltnp sport = :{port}` says which it is, perhaps a learner's.",
    )


def show_door(settings: Settings, port: str) -> None:
    """Print the address, the join code, a picture that has both for a telephone or tablet, and what that gives away."""
    url = address(settings, port)
    if settings.room.open_sign_up:
        say(f"Learners sign up at {url} without a code: whoever reaches that address gets a desk.")
    else:
        code = join_code(settings)
        print(picture(settings, f"{url}/hub/login#{code}"))
        say(f"Learners sign up at {url} with the join code {code}.")
    if is_loopback(settings.host) and not settings.room.url:
        say("Only this machine reaches it; for learners' machines: SERVEBOOK_HOST=0.0.0.0 make room")
    if (tls := files(settings)) and tls[0].exists():
        say(f"Its certificate's SHA-256 fingerprint, to compare in the browser: {fingerprint(tls[0])}")
    if why := why_not_apart(settings):
        say(
            f"A desk is a shell on this machine as {getpass.getuser()}, whom you are too ({why}): "
            "let in only those whom you trust with your files."
        )
    else:
        say("A desk is a shell on this machine, as a user of its own that sees neither your files nor others'.")


def picture(settings: Settings, url: str) -> str:
    """The address as a QR code, by segno in the room's environment; in its place why there is none.

    The address has the join code, so it goes by a pipe: every user of the machine sees command lines.
    """
    words = [str(settings.room.env / "bin" / "python"), "-I", "-X", "utf8", "-c", PICTURE]
    with suppress(OSError):
        drawn = subprocess.run(words, input=url, capture_output=True, encoding="utf-8", check=False)
        if drawn.returncode == 0:
            return drawn.stdout
    return f"There is no picture of the address: segno is not in {settings.room.env}, where `make room` installs it."


@app.command()
def code(new: Annotated[bool, typer.Option(help="The old one counts no more.")] = False) -> None:
    """Show the room's address and join code again, or make a new code."""
    settings = rooms_settings()
    entry = state_of("hub", settings)
    if not entry["pid"]:
        raise ServebookError(*NOT_UP)
    if new:
        join_code(settings, new=True)
    show_door(settings, entry["endpoints"]["http"].rpartition(":")[2])


@app.command()
def reset(name: Name) -> None:
    """Forget a learner's password: with the join code they choose a new one, and find their files as they left them.

    Whoever is signed in by that name is signed out, and the desk is closed.
    """
    name = name.lower()  # as the door takes it
    settings = rooms_settings()
    had_one, was_in = forget_password(settings, name), False
    if state_of("hub", settings)["pid"]:
        try:
            was_in = HubAdmin(settings).sign_out(name)
        except ServebookError as error:
            problem = str(error).partition("\n")[0]
            raise ServebookError(
                f"{name} has no password now, but is not signed out yet: {problem}", f"`servebook room reset {name}`"
            ) from None
    if not had_one and not was_in:
        names = ", ".join(signed_up(settings))
        raise ServebookError(f"No {name} has signed up.", f"Who has: {names}." if names else "Nobody has yet.")
    with_what = "" if settings.room.open_sign_up else f" with the join code {join_code(settings)}"
    say(f"{name} has no password now: sign up anew{with_what}" + ("; signed out, the desk closed" if was_in else ""))


@app.command()
def close(name: Name) -> None:
    """Close a learner's desk: its notebooks' kernels end, its files stay, its seat is free."""
    name = name.lower()
    became = HubAdmin(rooms_settings()).close(name)
    if not became:
        raise ServebookError(f"No {name} has come in by the door.", "See `servebook room learners`.")
    say(f"{name}: the desk {became}")


@app.command()
def learners() -> None:
    """List the learners: what they have under way, what was served and refused since the room is up."""
    table = Table("learner", "under way", "served", "refused", "")
    for row in RoomAdmin(rooms_settings()).learners():
        numbers = (str(row[column]) for column in ("under_way", "served", "refused"))
        add_row(table, row["name"], *numbers, "revoked" if row["revoked"] else "")
    out.print(table)


@app.command()
def watch(
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
    hide_names: Annotated[bool, typer.Option("--hide-names", help="For a projector.")] = False,
) -> None:
    """Show who is at which exercise, and who needs help; first, the address of a page that shows the same."""
    settings = rooms_settings()
    room = RoomAdmin(settings)
    hub = state_of("hub", settings)
    root = address(settings, hub["endpoints"]["http"].rpartition(":")[2]) if hub["pid"] else room.url
    say(f"For a browser: {root}/services/watch/#{watch_key(room.key)}")
    if once:
        out.print(board_table(room.board(), hide_names))
        return
    with suppress(KeyboardInterrupt), Live(console=out, auto_refresh=False) as screen:
        while True:
            screen.update(board_table(room.board(), hide_names), refresh=True)
            time.sleep(2)


def board_table(board: dict[str, Any], hide_names: bool) -> Table:
    """The board as a table; who needs help comes first, and is marked."""
    engine = board["engine"]
    load = f"{engine['running']} of {engine['places']} answers being written, {engine['waiting']} waiting"
    state = "engine ready" if engine["ready"] else "THE ENGINE DOES NOT ANSWER"
    title = f"{board['checks_per_minute']} checks in the last minute · {load} · {state}"
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in ("learner", "at", "check", "tries", "min", "likely cause", "✓", "share"):
        table.add_column(column, no_wrap=column != "likely cause", overflow="fold")
    numbers = {name: number for number, name in enumerate(sorted(row["name"] for row in board["learners"]), 1)}
    for row in board["learners"]:
        name = f"learner {numbers[row['name']]}" if hide_names else row["name"]
        name += " (revoked)" if row["revoked"] else ""
        minutes = (row["quiet"] if row["state"] == "passed" else row["since"]) // 60
        words = [name, row["exercise"], row["state"], str(row["tries"]), str(minutes)]
        words += [row["cause"], str(row["passed"]), f"{row['share']} %"]
        add_row(table, *words, style="bold yellow" if row["needs_help"] else "")
    return table


@app.command()
def admit(name: Name) -> None:
    """Give a learner a new key in place of the old: for a machine of their own, or after `revoke`."""
    name = name.lower()
    settings = rooms_settings()
    room = RoomAdmin(settings)
    front = describe(Files(settings.state_dir, "front"))  # which a room opens only where it was opened before
    opened = settings.model_copy(update={"host": front["host"] if front else LOOPBACK})
    port = room.url.rpartition(":")[2]
    url = room.url if is_loopback(opened.host) else f"http://{in_address(host_for_learners(opened))}:{port}"
    known = any(row["name"] == name for row in room.learners())
    print(f"export SERVEBOOK_ENGINE_URL={url} SERVEBOOK_API_KEY={room.admit(name)}")
    if known:
        print(f"{name}'s key before this one is void. At a desk that is open: {ANEW}.", file=sys.stderr)
    else:
        print(f"new learner {name}; `servebook room forget {name}` strikes them off again", file=sys.stderr)


@app.command()
def revoke(name: Name) -> None:
    """Take a learner's key away: what is under way is broken off, and nothing more is served."""
    name = name.lower()
    RoomAdmin(rooms_settings()).revoke(name)
    say(f"{name}: revoked; `servebook room admit {name}` lets them in again")
    say(f"A desk that is open stays: `servebook room close {name}`")


@app.command()
def forget(name: Name) -> None:
    """Strike a learner off: key, share and standing are gone. A password and a desk's files stay."""
    name = name.lower()
    RoomAdmin(rooms_settings()).forget(name)
    say(f"{name}: struck off")


@app.command()
def collect(
    grade: Annotated[bool, typer.Option(help="Grade them too, put feedback on the desks, write grades.csv.")] = False,
    course: Annotated[
        Path, typer.Option(help="nbgrader's folder.", show_default="the repository", file_okay=False)
    ] = ROOT,
) -> None:
    """Copy what learners have saved in the labs to nbgrader's `submitted/`."""
    settings = own_settings()
    desks, submitted = settings.state_dir / "room" / "desks", course / "submitted"
    if not any(desks.glob("*/")):
        up = describe(Files(settings.state_dir, "hub"))
        remedy = (
            "The room is up: `servebook room code` shows how learners come in." if up else "Start a room: `make room`."
        )
        raise ServebookError(f"Nobody has come in yet, so there are no desks in {desks}.", remedy)
    passed = passed_on_the_board(settings)
    if not course.exists():
        course.mkdir(parents=True, mode=0o700)  # else every desk could read it
        say(f"new course folder {course}")
    elif (place := course.resolve()) != ROOT and all(each.stat().st_mode & 0o001 for each in (place, *place.parents)):
        raise ServebookError(f"Every desk could read {course}.", f"Close it to others first: chmod 700 {course}")
    for row in hand_in.collect(desks, submitted):
        unsaved = 0 if row.labs else passed.get(row.learner, 0)
        said = f"; passed {unsaved} on the board, nothing saved" if unsaved else ""
        say(f"{row.learner}: {len(row.labs)} of {len(load_labs())} labs{said}")
        for path, why in row.left.items():
            say(f"  {path!r} was left: {why}")
    if not grade:
        say(f"in {submitted}; `servebook room collect --grade` grades them too")
        return
    from servebook.room import grading

    for line in grading.grade(course.resolve(), settings, desks):
        say(line)


def passed_on_the_board(settings: Settings) -> dict[str, int]:
    """How many exercises each learner has passed while the front has been up; nobody where there is no room."""
    with suppress(ServebookError):
        return {row["name"]: row["passed"] for row in RoomAdmin(with_rooms_key(settings)).board()["learners"]}
    return {}


@app.command()
def load(
    learners: Annotated[int, typer.Option(min=1, max=200, help="How many at once.")] = 30,
) -> None:
    """Let so many learners do labs 01 and 02 at once on the room that is up; exit code 1 if a check failed.

    A check that was refused, because the room is full, is not a failed one.
    """
    import numpy as np  # slow to import, as is what follows

    from servebook.room import load as room_load

    outcome = room_load.run(RoomAdmin(rooms_settings()), learners)
    table = Table(
        "", "p50", "p95", "p99", "most", title=f"{learners} learners at once, {outcome.seconds:.0f} s; seconds"
    )
    waits = [check.seconds for check in outcome.checks]
    if waits:
        ranks = (np.percentile(waits, 100 * share, method="inverted_cdf") for share in SHARES)
        table.add_row("a check", *(f"{rank:.1f}" for rank in ranks))
    for what, histogram in HISTOGRAMS.items():
        within = (outcome.requests_within(histogram, share) for share in SHARES)
        table.add_row(what, *("–" if math.isnan(seconds) else f"≤ {seconds:g}" for seconds in within))
    out.print(table)
    statuses = (f"{count} × {status}" for status, count in outcome.statuses().items())
    say(f"answers by status: {', '.join(statuses)}")
    say(", ".join(f"{outcome.count(word)} checks {word}" for word in ("passed", "refused", "failed")))
    for check in outcome.checks:
        if check.outcome == "failed":
            say(f"  {check.result.exercise.id}: {check.result.got} — {check.result.cause}")
    if outcome.count("failed"):
        raise typer.Exit(1)
