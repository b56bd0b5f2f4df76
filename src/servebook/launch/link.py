"""A supervisor's client: attach to the server that is there, or start the supervisor of a new one."""

from __future__ import annotations

import json
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from servebook.errors import LaunchError
from servebook.launch import supervisor
from servebook.launch.files import Files, read_log, visible
from servebook.launch.supervisor import END_SECONDS, EX_IOERR, EX_TEMPFAIL, Description, Op, Order, files_of
from servebook.processes import peer
from servebook.settings import is_loopback

SUPERVISOR_SECONDS = END_SECONDS + 7.0
"""How long a supervisor may take to listen: a few ms, but where the one before it is still ending its server."""
OPEN_FILES = 1024
"""What an engine takes (its libraries, a few sockets for each process) and some hundreds of callers."""
STOP_SECONDS = END_SECONDS + 17.0
"""How long a supervisor may take to answer, and to end: longer than its grace times together."""


class Link:
    """A connection to one supervisor; while it is open after `attach`, it is a lease on the server."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.connection.settimeout(STOP_SECONDS)
        self.silent = False

    @classmethod
    def open(cls, files: Files) -> Link | None:
        """Connect to the supervisor of an instance; None where there is none."""
        connection = supervisor.connect(files.socket)
        return cls(connection) if connection else None

    def ask(self, op: Op) -> Description | None:
        """Send one request; None where the supervisor has gone, or is `silent`."""
        try:
            self.connection.sendall(json.dumps({"op": op}).encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                if not (chunk := self.connection.recv(65536)):
                    return None
                answer += chunk
            description: Description = json.loads(answer)
        except TimeoutError:
            self.silent = True
            return None
        except (OSError, ValueError):
            return None
        return description

    @property
    def keeper(self) -> int:
        """The supervisor's process; 0 where that is one of another container, which has no number here."""
        return peer(self.connection)[0]

    def alive(self) -> bool:
        """Whether the supervisor still holds its end."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return not poll.poll(0)

    def wait_closed(self, seconds: float) -> bool:
        """Wait until the supervisor, and with it everything that it kept, has gone."""
        self.connection.settimeout(seconds)
        with suppress(ConnectionError):
            try:
                while self.connection.recv(65536):
                    pass
            except TimeoutError:
                return False
        return True

    def close(self) -> None:
        self.connection.close()


Lease = tuple[Link, Description]


def attach(order: Order) -> Lease | None:
    """A lease on the server that is there; None where there is none, or none any more.

    Raises:
        LaunchError: it is not the one that is ordered, or does not answer.
    """
    while link := Link.open(files_of(order)):
        there = link.ask("attach")
        if there and serves(there, order):
            return link, there
        link.close()
        if link.silent:
            raise LaunchError(
                f"The process that keeps {order['name']} has not answered for {STOP_SECONDS:.0f} s.",
                f"End it with `servebook down {order['name']}`, and start it again.",
            )
        if there:
            raise LaunchError(
                f"{there['name']} is up with other settings (model {there['model']}).",
                f"End it with `servebook down {there['name']}`, or ask for the settings that it has.",
            )
    # It was ending, for example because its kernel was restarted: then it was asked until it had.
    return None


def serves(there: Description, order: Order) -> bool:
    """Whether the server that is there is the one that is asked for.

    One that was opened to the network on purpose also serves those who ask for it on this machine.
    """
    return there["fingerprint"] == order["fingerprint"] and (
        there["host"] == order["host"] or is_loopback(order["host"])
    )


def spawn(order: Order, wait: Callable[[str], None]) -> Lease:
    """A lease on a new server, or on that of another start that was first.

    At each look for it this says so to `wait`, which may raise; whatever is raised, nothing that this started goes on.

    Raises:
        LaunchError: there can be no supervisor, or its server ended at once.
    """
    files = files_of(order)
    if (most := resource.getrlimit(resource.RLIMIT_NOFILE)[1]) < OPEN_FILES:
        raise LaunchError(
            f"A process may open {most} files here, and a server needs {OPEN_FILES}.",
            f"Raise the limit (`ulimit -n {OPEN_FILES}`, or in a container --ulimit nofile={OPEN_FILES}).",
        )
    try:
        files.make_folders()
    except OSError as error:
        raise unusable_folder(error.filename, str(error.strerror)) from None
    process = subprocess.Popen(
        [sys.executable, "-I", "-X", "utf8", "-m", supervisor.__name__],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin
    assert process.stderr
    with suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(json.dumps(order).encode())
    deadline = time.monotonic() + SUPERVISOR_SECONDS
    try:
        with process.stderr as said:
            while time.monotonic() < deadline:
                code = process.poll()
                if lease := attach(order):
                    return lease
                if code == EX_IOERR:
                    raise unusable_folder(files.state_dir, said.read().decode(errors="replace").strip())
                if code == EX_TEMPFAIL and not supervisor.is_kept(files.socket):
                    return spawn(order, wait)  # what the other start had begun has ended meanwhile
                if code not in (None, EX_TEMPFAIL):  # TEMPFAIL: another start was first, and is about to listen
                    break
                wait("importing")
                time.sleep(0.02)
        if code == EX_TEMPFAIL:
            raise LaunchError(
                f"{files.instance} is kept by a process that cannot be reached from here: one in another container, or "
                "on another machine, with the same state folder.",
                "Set SERVEBOOK_STATE_DIR to a folder of this machine's own.",
            )
        raise died(files)
    except BaseException:
        process.kill()  # without a lease it would wait for one, or for what is left of the server before
        raise


def unusable_folder(folder: object, why: str) -> LaunchError:
    elsewhere = "Set SERVEBOOK_STATE_DIR to a folder that you, and only you, can write to."
    return LaunchError(f"The state folder {folder} cannot be used: {why}.", remedy_for(why) or elsewhere)


def died(files: Files) -> LaunchError:
    """A server that ended before it was ready: how, and the end of its log."""
    code = files.read_record().get("exit")
    how = "" if not isinstance(code, int) else f" (killed by signal {-code})" if code < 0 else f" (exit code {code})"
    cause = root_cause(read_log(files.log))
    hint = f"{remedy} " if (remedy := remedy_for(cause)) else ""
    if code == -signal.SIGKILL:
        hint = "If memory is short, Linux kills the largest process: see `servebook doctor`. "
    return LaunchError(
        f"{files.instance} ended before it was ready{how}{': ' if cause else '.'}{visible(cause)}\n"
        f"The end of its log:\n{files.tail()}",
        f"{hint}More of the log: `servebook logs {files.instance} -n 1000`.",
    )


REMEDIES = {
    "cuda out of memory": "End another program that uses the GPU (`nvidia-smi`).",
    "free memory on device": "End another program that uses the GPU (`nvidia-smi`).",
    "no space left on device": "Free some disk space (`servebook doctor` says where).",
    "too many open files": "Raise the limit of open files (`ulimit -n 4096`).",
    "address already in use": "End the program that has the port, or choose another one.",
    "permission denied": "Let this user write there, or set another folder.",
    "read-only file system": "Set another folder.",
    "unrecognized arguments": "Correct SERVEBOOK_ENGINE_ARGS.",
}
"""What to do about a cause that holds these words."""


def remedy_for(cause: str) -> str:
    """The first of REMEDIES that fits; "" where none does."""
    return next((remedy for words, remedy in REMEDIES.items() if words in cause.lower()), "")


RAISED = re.compile(
    r"""^(?:\(\S+\ pid=\d+\)\ )?(?:(?:ERROR|CRITICAL)\ [^\]]*\]\ )?
    (?:servebook:\ )?(?P<cause>(?<=servebook:\ ).+|[\w.]*(?:Error|Exception)\b:\ .+|[\w.\ ]+:\ error:\ .+)$""",
    re.M | re.X,
)
"""The line of a traceback that names the exception, also where vLLM puts a process and a place before it."""


def root_cause(log: str) -> str:
    """The first exception in a log, which those after it follow from; "" where there is none."""
    found = RAISED.search(log)
    return found["cause"].strip() if found else ""
