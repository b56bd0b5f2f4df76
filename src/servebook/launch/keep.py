"""Carries a plan out: attaches to the servers that are there, starts the others, waits until they answer."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

from servebook.engine.model import model_path
from servebook.errors import LaunchError
from servebook.launch.display import Progress, progress
from servebook.launch.elsewhere import ask_elsewhere
from servebook.launch.files import Files, read_log
from servebook.launch.link import Link, attach, died, spawn
from servebook.launch.memory import memory_for
from servebook.launch.plan import Start
from servebook.launch.probes import others_listen
from servebook.launch.supervisor import Description
from servebook.launch.table import ENGINE_PHASES, Endpoints, find_server

POLL_SECONDS = 0.1
ABANDONED: ContextVar[Event | None] = ContextVar("abandoned", default=None)
"""Set where nobody waits any more for what this thread starts."""
BROKEN_SECONDS = 30.0
"""How long a server that was ready, and is not, may take to come back: longer than a busy one needs to answer."""
_turns: dict[Files, Lock] = {}
"""Of two threads that want one server the second finds what the first has begun, and claims no memory for another."""


@dataclass(frozen=True)
class Kept:
    """A server that is on its way, or was there before (`attached`), the lease on it, and its claim to memory."""

    start: Start
    link: Link
    there: Description
    attached: bool
    display: Progress
    claim: ExitStack


def keep(waves: list[list[Start]]) -> tuple[Description, dict[Files, Link]]:
    """Start or attach to all servers of the plan; return the last one's description, and a lease on each.

    Raises:
        LaunchError: one cannot start; what was started for it ends.
        ModelError: as `model_path`.
    """
    at: dict[str, Endpoints] = {}
    with ExitStack() as leases:
        kept: list[Kept] = []
        remote = ""
        for wave in waves:
            with ExitStack() as starting:
                begun: list[Kept] = []
                for start in wave:
                    if start.elsewhere:
                        remote, at[start.instance] = ask_elsewhere(start.settings)
                        continue
                    display = starting.enter_context(progress(start.instance))
                    claim = starting.enter_context(ExitStack())
                    one = begin(start, at, remote, display, claim)
                    leases.callback(one.link.close)
                    begun.append(one)
                for number, one in enumerate(begun):
                    try:
                        await_ready(one)
                    except LaunchError:
                        if not by_chance(one):
                            raise
                        one.claim.close()  # what it claimed is free again, and the next try is not refused for it
                        begun[number] = one = begin(one.start, at, remote, one.display, one.claim)
                        leases.callback(one.link.close)
                        await_ready(one)
                    one.claim.close()
                    at[one.start.instance] = one.there["endpoints"]
                kept += begun
        leases.pop_all()
    return kept[-1].there, {one.start.files: one.link for one in kept}


def begin(start: Start, needs: dict[str, Endpoints], remote: str, display: Progress, claim: ExitStack) -> Kept:
    """Take a lease on the server that is there, or on a new one; does not wait until it is ready.

    `remote` is the model's name where the engine is elsewhere: who stands before that needs no model here.
    The memory that its engine will take is held for it until `claim` is closed.
    """

    def say(phase: str) -> None:
        require_wanted(start.instance)
        display.phase(phase)

    ahead = "" if find_server(start.spec.name).has_engine else remote
    if ahead:
        model = Path(ahead)
    else:
        say("looking for the model")
        model = model_path(start.settings)
    order = start.order(model, needs, ahead)
    # Not a defaultdict's, which lets another thread in while it hashes such a key, and gives each a lock of its own.
    with _turns.setdefault(start.files, Lock()):
        if lease := attach(order):
            return Kept(start, *lease, attached=True, display=display, claim=claim)
        order["env"] |= start.spec.env(start.settings, say)
        if start.spec.has_engine:
            claim.enter_context(memory_for(start.settings, model, say))
        return Kept(start, *spawn(order, say), attached=False, display=display, claim=claim)


def require_wanted(name: str) -> None:
    """Raise LaunchError where nobody waits for `name` any more. Each wait of a start looks, and whoever took long."""
    if (abandoned := ABANDONED.get()) and abandoned.is_set():
        raise LaunchError(f"{name} was given up.", "Start it again.")


def await_ready(kept: Kept) -> None:
    """Wait until the server answers, and say so on the display.

    Raises:
        LaunchError: it ended, or does not answer in time (the message has the end of its log); or another user has one
            of its ports.
    """
    start, there, display = kept.start, kept.there, kept.display
    at = there["endpoints"]
    name, was_ready = start.instance, there["was_ready"]
    patience = BROKEN_SECONDS if was_ready else start.settings.start_timeout
    deadline = time.monotonic() + patience
    phase = Phase(start.files.log)
    while True:
        require_wanted(name)
        if start.spec.answers(at):
            break
        if not kept.link.alive():
            raise died(start.files)
        if (theirs := list(filter(others_listen, at.values()))) and start.spec.ready(at):
            raise LaunchError(
                f"Another user's program listens at {' and '.join(theirs)}, where {name} should.",
                f"`servebook down {name}`, then start it again: it takes the next free port.",
            )
        if time.monotonic() > deadline:
            late = "was ready and is not any more" if was_ready else f"was not ready within {patience:.0f} s"
            raise LaunchError(
                f"{name} {late}. The end of its log:\n{start.files.tail()}",
                f"`servebook down {name}`, then start it again."
                if was_ready
                else "Raise SERVEBOOK_START_TIMEOUT for a large model or a slow disk.",
            )
        display.phase(phase.now())
        time.sleep(POLL_SECONDS)
    if kept.link.ask("ready") is None:  # it was ended in this moment
        raise died(start.files)
    where = ", ".join(f"{kind} {address}" for kind, address in at.items())
    moved = [str(port) for kind, port in there["preferred"].items() if not at[kind].endswith(f":{port}")]
    is_taken = "; port {} was taken" if len(moved) == 1 else "; ports {} were taken"
    taken = is_taken.format(", ".join(moved)) if moved else ""
    display.done(f"{'attached to' if kept.attached else 'ready'}: {where} ({display.elapsed}){taken}")


def by_chance(kept: Kept) -> bool:
    """Whether it ended for a reason that another start does not meet."""
    words = kept.start.spec.again
    return bool(words) and not kept.link.alive() and words in read_log(kept.start.files.log)


class Phase:
    """What vLLM is doing, by its log, each whole line of which is read once: it is asked ten times a second."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.read = 0
        self.reached = -1

    def now(self) -> str:
        """The last phase in the order of ENGINE_PHASES that has begun."""
        with suppress(OSError), self.log.open("rb") as log:
            log.seek(self.read)
            for line in log:
                for number, words in enumerate(ENGINE_PHASES):
                    if words.encode() in line:
                        self.reached = max(self.reached, number)
                if not line.endswith(b"\n"):  # a bar of progress has no end until it is full: read again, with the rest
                    break
                self.read += len(line)
        return [*ENGINE_PHASES.values(), "importing"][self.reached]
