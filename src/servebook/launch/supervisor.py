"""Keeps one server and everything that it starts; run by path, with the standard library only.

One supervisor runs per server. It listens on an abstract Unix socket, whose name only one process can
hold: that is the lock against a second start and the proof that the server is there, and it cannot go
stale, because the kernel drops it with the process. The protocol is one JSON object a line:

    {"op": "info"}     → what `describe` returns
    {"op": "attach"}   → the same, and the connection is a lease: while it is open, the server lives
    {"op": "ready"}    → the server has answered: if it does not any more, it is not starting but broken
    {"op": "keep"}     → the server outlives its leases, until {"op": "stop"}
    {"op": "stop"}     → ends the server; the connection closes when nothing is left of it

The server's descendants are found through PR_SET_CHILD_SUBREAPER: whatever loses its parent becomes the
supervisor's child. The supervisor's own parent, the guardian, does nothing but wait: if the supervisor is
killed with SIGKILL, what it kept becomes the guardian's and is ended there; if the guardian is killed, the
supervisor ends in order.
"""

import ctypes
import errno
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
FIRST_LEASE_SECONDS = 15.0
"""How long a server without an owner waits for its first lease (its starter may have died)."""
TERM_SECONDS = 15.0
"""Grace time of the server itself."""
STARTING_SECONDS = 3.0
"""Grace time of a server that was never ready: it has no answers to finish, and vLLM's would not listen before."""
ORPHAN_SECONDS = 3.0
"""Grace time of what it left behind."""
KILL_SECONDS = 5.0
MARK = "SERVEBOOK_SUPERVISOR"
"""In the environment of each process that a supervisor started: its address. An orphan is known by it."""


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def reserve(port: int) -> socket.socket | None:
    """Claim `port` among all users' supervisors; the claim ends with the returned socket or its process."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0servebook-port-{port}")
    except OSError:
        claim.close()
        return None
    return claim


def can_bind(host: str, port: int) -> bool:
    """Whether a server could listen on `host`:`port` now.

    Raises:
        OSError: not on any port: `host` is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def choose_port(host: str, preferred: int, others: set[int]) -> tuple[int, socket.socket]:
    """Return the first free port from `preferred` upwards that is nobody else's default, and its claim."""
    for port in range(preferred, 65536):
        if port != preferred and port in others:
            continue
        if can_bind(host, port) and (claim := reserve(port)):
            return port, claim
    raise OSError(f"no free port from {preferred} upwards")


def fork_under_guardian(listener: socket.socket) -> None:
    """Go on in a child process; this one stays behind as its guardian and ends with it."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    guardian = os.getpid()
    supervisor = os.fork()
    if supervisor == 0:
        os.setsid()  # a signal to the guardian's group must not reach both
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
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
            os.waitpid(left[0], 0)
    free_openmp_files()
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def open_log(log: Path) -> None:
    """Make `log` the output of this process and its children; the run before it is kept as `.log.1`."""
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def children() -> list[int]:
    """The live children of this process, adopted ones included."""
    with suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    return []


def is_tracker(pid: int) -> bool:
    """Whether this is a resource tracker of Python's: it frees what the killed have left in shared memory, and ends."""
    with suppress(OSError):
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def free_openmp_files() -> None:
    """Remove what Intel's OpenMP leaves in shared memory when its process is killed (a small file each)."""
    for file in Path("/dev/shm").glob(f"__KMP_REGISTERED_LIB_*_{os.getuid()}"):
        if not Path("/proc", file.name.split("_")[-2]).exists():
            file.unlink(missing_ok=True)


class Supervisor:
    """One server's life: start, answer, end."""

    def __init__(self, spec: dict[str, Any], listener: socket.socket) -> None:
        self.spec = spec
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
        for kind, preferred in spec["ports"].items():
            self.ports[kind], self.claims[kind] = choose_port(spec["hosts"][kind], preferred, set(spec["avoid"]))
        self.record_path = Path(spec["record"])
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
        argv = [words.get(word, word) for word in self.spec["argv"]]
        # SPT_NOENV: vLLM's processes rename themselves, and that would write over their environment with the mark.
        env = os.environ | self.spec["env"] | {MARK: self.spec["address"], "SPT_NOENV": "1"}
        return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, start_new_session=True)

    def describe(self) -> dict[str, Any]:
        """What callers may know; the environment, which holds keys, stays out."""
        return {
            "name": self.spec["name"],
            "server": self.spec["server"],
            "pid": self.child.pid,
            "model": self.spec["model"],
            "host": self.spec["host"],
            "endpoints": {kind: f"{self.spec['client_hosts'][kind]}:{port}" for kind, port in self.ports.items()},
            "preferred": self.spec["ports"],
            "owner": "cli" if self.keep else self.spec["owner"],
            "fingerprint": self.spec["fingerprint"],
            "log": self.spec["log"],
            "was_ready": self.was_ready,
            "seconds": round(time.monotonic() - self.started, 1),
        }

    def record(self, state: str, **more: Any) -> None:
        """Write what is left to read when the supervisor is gone; whole or not at all."""
        draft = self.record_path.with_suffix(".draft")
        try:
            draft.write_text(json.dumps(self.describe() | {"state": state} | more))
            draft.replace(self.record_path)
        except OSError as error:  # a full disk must not end a server that runs
            print(f"supervisor: {error}", file=sys.stderr, flush=True)

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
        """Take a connection of the same user; refuse any other's."""
        connection, _ = listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[1] != os.getuid():
            connection.close()
            return
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
        free_openmp_files()
        if not by_itself:
            with suppress(OSError):
                self.record_path.unlink(missing_ok=True)

    def sweep(self, sig: signal.Signals, seconds: float) -> None:
        """Signal each descendant once as it becomes our child, and reap until none is left or time is up."""
        deadline = time.monotonic() + seconds
        signalled: set[int] = set()
        while (left := set(children())) and time.monotonic() < deadline:
            for pid in left - signalled:
                if is_tracker(pid):
                    continue
                with suppress(ProcessLookupError):
                    os.kill(pid, sig)
            signalled |= left
            for pid in left:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.02)


def main() -> int:
    """Read the spec from standard input and keep its server.

    Exits with 75 (EX_TEMPFAIL) if the server has a supervisor already, with 74 (EX_IOERR) if there can be no log.
    """
    spec = json.load(sys.stdin)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind("\0" + spec["address"])
    except OSError:
        return 75
    try:
        open_log(Path(spec["log"]))
    except OSError:
        return 74
    fork_under_guardian(listener)
    listener.listen(64)
    for sig in (signal.SIGINT, signal.SIGHUP):
        signal.signal(sig, lambda *_: None)  # not SIG_IGN, which the server would inherit
    try:
        supervisor = Supervisor(spec, listener)
    except OSError as error:
        print(f"supervisor: cannot start {spec['name']} on {spec['host']}: {error}", file=sys.stderr)
        return 1
    supervisor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
