"""Keeps one server and everything that it starts; it imports little but the standard library.

One supervisor runs per server. It holds a lock in the state folder, which the kernel drops with the last process that
has it: that keeps a second start away, and cannot go stale. Beside the lock it listens on a Unix socket: who is
answered there knows that the server is there. The protocol is one JSON object a line, answered by a `Description`:

    {"op": "info"}     → nothing else
    {"op": "attach"}   → the connection is a lease: while it is open, the server lives
    {"op": "ready"}    → the server has answered: if it does not any more, it is not starting but broken
    {"op": "keep"}     → the server outlives its leases, until {"op": "stop"}
    {"op": "stop"}     → ends the server; the connection closes when nothing is left of it

The server's descendants are found through PR_SET_CHILD_SUBREAPER: whatever loses its parent becomes the
supervisor's child. The supervisor's own parent, the guardian, does nothing but wait: if the supervisor is
killed with SIGKILL, what it kept becomes the guardian's and is ended there; if the guardian is killed, the
supervisor ends in order.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypedDict

from servebook.launch.files import Files
from servebook.processes import (
    KEPT,
    KILL_SECONDS,
    adopt_orphans,
    can_bind,
    children,
    claim_name,
    die_with_parent,
    is_tracker,
    peer,
    wait_until,
)
from servebook.whole import write_whole

EX_IOERR, EX_TEMPFAIL = 74, 75
FIRST_LEASE_SECONDS = 15.0
"""How long a server without an owner waits for its first lease (its starter may have died)."""
MOST_OPEN_FILES = 65536
"""As many a server may open, where the machine lets it; what it needs is `link.OPEN_FILES`."""
LOG_BYTES = 1 << 20
"""How much room a disk must have for the log of a server that starts; one says 20 to 200 KB."""
PORTS = range(1, 65536)
CONNECT_SECONDS = 10.0
"""How long a supervisor may take to see that somebody is there; one that is well takes no time."""
TERM_SECONDS = 15.0
"""Grace time of the server itself."""
STARTING_SECONDS = 3.0
"""Grace time of a server that was never ready: it has no answers to finish, and vLLM's would not listen before."""
ORPHAN_SECONDS = 3.0
"""Grace time of what it left behind."""
END_SECONDS = TERM_SECONDS + ORPHAN_SECONDS + KILL_SECONDS
"""The grace times together: so long ends a server at most, and so long a start waits for what is left of one."""
Owner = Literal["cli", "kernel"]
Op = Literal["info", "attach", "ready", "keep", "stop"]


class Order(TypedDict):
    """What a supervisor is told to keep, with the server's whole environment.

    `{http}` in `argv` (or another kind) stands for the port that it chooses. `hosts` are where the ports listen,
    `client_hosts` how clients write them. `avoid` are other servers' ports.
    """

    name: str
    server: str
    argv: list[str]
    env: dict[str, str]
    host: str
    hosts: dict[str, str]
    client_hosts: dict[str, str]
    ports: dict[str, int]
    avoid: list[int]
    model: str
    owner: Owner
    fingerprint: str
    state_dir: str


class Description(TypedDict):
    """What callers may know of a server; its environment, which holds keys, stays out. `seconds` is its age."""

    name: str
    server: str
    pid: int | None
    model: str
    host: str
    endpoints: dict[str, str]
    preferred: dict[str, int]
    owner: Owner
    fingerprint: str
    log: str
    was_ready: bool
    seconds: float


def files_of(order: Order) -> Files:
    """Where the files of the server that is ordered lie."""
    return Files(Path(order["state_dir"]), order["name"])


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Another name for `path`, whose folder exists: a socket's may have 107 bytes, and state folders lie deep."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def connect(path: Path) -> socket.socket | None:
    """A connection to the supervisor of this user that listens there; None where there is none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(CONNECT_SECONDS)
    try:
        with short_path(path) as name:
            connection.connect(name)
        if peer(connection)[1] == os.getuid():
            return connection
    except OSError:
        pass
    connection.close()
    return None


def claim(path: Path) -> socket.socket | None:
    """The listening end of the socket, for whoever holds the lock beside it; None where another server is there.

    The lock is this process's, and its children's by `fork`, until they end.
    """
    lock = os.open(path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT, 0o600)

    def locked() -> bool:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def somebody_answers() -> bool:
        if there := connect(path):
            there.close()
        return there is not None

    if not wait_until(lambda: locked() or somebody_answers(), END_SECONDS) or not locked():
        return None
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with short_path(path) as name:
        listener.bind(name)
    path.chmod(0o600)
    return listener


def is_kept(path: Path) -> bool:
    """Whether a process has the lock beside the socket, which a start has found taken; it may be out of reach."""
    with path.with_suffix(".lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def ports_before(order: Order) -> dict[str, int]:
    """Where a server of this order was that was ready and died; {} where there was none, or it was ended in order.

    What stands in front of it still looks for it there, though its own port may be free again.
    """
    record = files_of(order).read_record()
    endpoints = record.get("endpoints")
    if not record.get("was_ready") or record.get("preferred") != order["ports"] or not isinstance(endpoints, dict):
        return {}
    with suppress(ValueError):
        return {kind: int(str(address).rpartition(":")[2]) for kind, address in endpoints.items()}
    return {}


def choose_port(host: str, preferred: int, others: set[int], before: int | None = None) -> tuple[int, socket.socket]:
    """Return the port `before`, else `preferred`, or the first free one after it that is none of `others`; and a claim.

    The claim is among all users' supervisors. Another user can take its name, as he can take the port itself: then it
    is the next one.
    """
    for port in (*([before] if before in PORTS else []), *range(preferred, PORTS.stop)):
        if port != preferred and port in others:
            continue
        if can_bind(host, port) and (claimed := claim_name(f"port-{port}")):
            return port, claimed
    raise OSError(f"no free port from {preferred} upwards")


def fork_under_guardian(listener: socket.socket, path: Path, scratch: str) -> None:
    """Go on in a child process; this one stays behind as its guardian and ends with it."""
    adopt_orphans()
    guardian = os.getpid()
    supervisor = os.fork()
    if supervisor == 0:
        os.setsid()  # a signal to the guardian's group must not reach both
        die_with_parent(signal.SIGTERM)
        adopt_orphans()
        if os.getppid() != guardian:
            os._exit(1)
        return
    listener.close()
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)
    _, status = os.waitpid(supervisor, 0)
    # A process that dies hands its children to us before it can be waited for: this loop misses none.
    while left := children():
        for pid in [pid for pid in left if not is_tracker(pid)]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if all(map(is_tracker, left)):
            os.waitpid(left.pop(), 0)
    remove_leftovers(scratch)
    path.unlink(missing_ok=True)  # the lock is still ours: nobody else listens there yet
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def open_log(log: Path) -> None:
    """Make `log` the output of this process and its children; the run before it is kept as `.log.1`.

    Raises:
        OSError: it cannot be written, or has no room for LOG_BYTES: then nobody could read why the server ended.
    """
    if shutil.disk_usage(log.parent).free < LOG_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def complain(what: object) -> None:
    """Say it in the log, which may lie on the full disk that it is about."""
    with suppress(OSError):
        print(f"supervisor: {what}", file=sys.stderr, flush=True)


def remove_leftovers(scratch: str) -> None:
    """Remove the folder with vLLM's sockets, and what Intel's OpenMP leaves in shared memory when it is killed."""
    shutil.rmtree(scratch, ignore_errors=True)
    for file in Path("/dev/shm").glob(f"__KMP_REGISTERED_LIB_*_{os.getuid()}"):
        if not Path("/proc", file.name.split("_")[-2]).exists():
            with suppress(OSError):  # another user may have made one of this name, which only he can remove
                file.unlink()


class Supervisor:
    """One server's life: start, answer, end."""

    def __init__(self, order: Order, before: dict[str, int], listener: socket.socket, scratch: str) -> None:
        self.order = order
        self.scratch = scratch
        self.keep = False
        self.leases: set[socket.socket] = set()
        self.started = time.monotonic()
        self.had_lease = False
        self.was_ready = False
        self.stopping = False
        signal.signal(signal.SIGTERM, self.terminate)
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, self.accept)
        self.claims: dict[str, socket.socket] = {}
        self.ports: dict[str, int] = {}
        for kind, preferred in order["ports"].items():
            self.ports[kind], self.claims[kind] = choose_port(
                order["hosts"][kind], preferred, set(order["avoid"]), before.get(kind)
            )
        self.files = files_of(order)
        self.child = self.spawn()
        self.pidfd = os.pidfd_open(self.child.pid)
        self.selector.register(self.pidfd, selectors.EVENT_READ, self.child_ended)
        self.record("running")

    def terminate(self, *_: object) -> None:
        """End in order; also what the guardian's death asks for."""
        self.stopping = True

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the server in a session of its own, so that a notebook's Interrupt does not reach it."""
        words = {f"{{{kind}}}": str(port) for kind, port in self.ports.items()}
        argv = [words.get(word, word) for word in self.order["argv"]]
        env = self.order["env"] | {KEPT: str(self.files.socket)}
        # Not TMPDIR: torch keeps there what it compiles, 150 MB and 6 s of a core, for the next server.
        env["VLLM_RPC_BASE_PATH"] = self.scratch
        return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, start_new_session=True)

    def describe(self) -> Description:
        """What callers may know."""
        return {
            "name": self.order["name"],
            "server": self.order["server"],
            "pid": self.child.pid,
            "model": self.order["model"],
            "host": self.order["host"],
            "endpoints": {kind: f"{self.order['client_hosts'][kind]}:{port}" for kind, port in self.ports.items()},
            "preferred": self.order["ports"],
            "owner": "cli" if self.keep else self.order["owner"],
            "fingerprint": self.order["fingerprint"],
            "log": str(self.files.log),
            "was_ready": self.was_ready,
            "seconds": round(time.monotonic() - self.started, 1),
        }

    def record(self, state: str, **more: Any) -> None:
        """Write what is left to read when the supervisor is gone; whole or not at all."""
        try:
            write_whole(self.files.record, json.dumps({**self.describe(), "state": state, **more}))
        except OSError as error:
            complain(error)  # a full disk must not end a server that runs

    def run(self) -> None:
        """Serve requests until the server ended or nobody needs it any more."""
        while not self.stopping:
            for key, _ in self.selector.select(timeout=1.0):
                key.data(key.fileobj)
            if not self.keep and not self.leases:
                waited = time.monotonic() - self.started
                if self.had_lease or waited > FIRST_LEASE_SECONDS:
                    self.stopping = True
        self.end()

    def accept(self, listener: socket.socket) -> None:
        """Take a connection of this user; the socket's mode keeps others out."""
        connection, _ = listener.accept()
        connection.settimeout(2.0)
        self.selector.register(connection, selectors.EVENT_READ, self.answer)

    def answer(self, connection: socket.socket) -> None:
        """Answer one request line, or forget a connection that closed."""
        try:
            line = connection.recv(4096)
            op = json.loads(line)["op"] if line else "leave"
        except (OSError, ValueError, KeyError, TypeError):
            op = "leave"
        if op == "leave":
            self.selector.unregister(connection)
            self.leases.discard(connection)
            connection.close()
            return
        if op == "attach":
            self.leases.add(connection)
            self.had_lease = True
        elif op == "ready":
            self.was_ready = True
        elif op == "keep":
            self.keep = True
            self.record("running")
        elif op == "stop":
            self.stopping = True
        with suppress(OSError):
            connection.sendall(json.dumps(self.describe()).encode() + b"\n")

    def child_ended(self, _: int) -> None:
        """The server ended by itself: say so on disk, then take the rest of its family along."""
        self.selector.unregister(self.pidfd)
        self.record("failed", exit=self.child.wait())
        self.stopping = True

    def end(self) -> None:
        """End the server and every descendant: SIGTERM and a grace time for it, SIGKILL for what is left."""
        by_itself = self.child.poll() is not None
        if not by_itself:
            self.child.terminate()
            try:
                self.child.wait(TERM_SECONDS if self.was_ready else STARTING_SECONDS)
            except subprocess.TimeoutExpired:
                self.child.kill()
        self.sweep(signal.SIGTERM, ORPHAN_SECONDS)
        self.sweep(signal.SIGKILL, KILL_SECONDS)
        remove_leftovers(self.scratch)
        if not by_itself:
            with suppress(OSError):
                self.files.record.unlink(missing_ok=True)

    def sweep(self, sig: signal.Signals, seconds: float) -> None:
        """Signal each descendant once as it becomes our child, and reap until none is left or time is up."""
        signalled: set[int] = set()

        def all_ended() -> bool:
            left = children()
            for pid in left - signalled:
                if not is_tracker(pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, sig)
            signalled.update(left)
            for pid in left:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            return not left

        wait_until(all_ended, seconds, every=0.02)


def main() -> int:
    """Read the order from standard input and keep its server.

    Exits with EX_TEMPFAIL if the server has a supervisor already, with EX_IOERR if there can be no socket or log.
    """
    order: Order = json.load(sys.stdin)
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The server's too: an engine and its callers take many. And no more: some programs look at every one that may be.
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, min(most, MOST_OPEN_FILES)), most))
    files = files_of(order)
    try:
        listener = claim(files.socket)
        if listener is None:
            return EX_TEMPFAIL
        before = ports_before(order)
        files.record.unlink(missing_ok=True)  # how the run before ended says nothing about this one
        open_log(files.log)
    except OSError as error:
        print(error.strerror, file=sys.stderr)
        return EX_IOERR
    os.environ["TMPDIR"] = order["env"].get("TMPDIR", "")  # the server's, which is short enough for sockets
    try:
        scratch = tempfile.mkdtemp(prefix="servebook-")
    except OSError as error:
        complain(f"cannot make a folder for temporary files: {error}")
        return 1
    fork_under_guardian(listener, files.socket, scratch)
    listener.listen(64)
    for sig in (signal.SIGINT, signal.SIGHUP):
        signal.signal(sig, lambda *_: None)  # not SIG_IGN, which the server would inherit
    try:
        supervisor = Supervisor(order, before, listener, scratch)
    except OSError as error:
        complain(f"cannot start {order['name']} on {order['host']}: {error}")
        return 1
    supervisor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
