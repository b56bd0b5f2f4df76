"""Keeps one server and everything that it starts; run by path, with the standard library only.

One supervisor runs per server. It listens on an abstract Unix socket, whose name only one process can
hold: that is the lock against a second start and the proof that the server is there, and it cannot go
stale, because the kernel drops it with the process. The protocol is one JSON object a line:

    {"op": "info"}     → what `describe` returns
    {"op": "attach"}   → the same, and the connection is a lease: while it is open, the server lives
    {"op": "keep"}     → the server outlives its leases, until {"op": "stop"}
    {"op": "stop"}     → ends the server; the connection closes when nothing is left of it

The server's descendants are found through PR_SET_CHILD_SUBREAPER: whatever loses its parent becomes the
supervisor's child. A guardian, forked before all else, kills the server's process group if the supervisor
itself is killed with SIGKILL.
"""

import ctypes
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

PR_SET_CHILD_SUBREAPER = 36
FIRST_LEASE_SECONDS = 15.0
"""How long a server without an owner waits for its first lease (its starter may have died)."""
TERM_SECONDS = 15.0
"""Grace time of the server itself."""
ORPHAN_SECONDS = 3.0
"""Grace time of what it left behind; enough for Python's resource tracker to free shared memory."""
KILL_SECONDS = 5.0


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
    """Whether a server could listen on `host`:`port` now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def choose_port(host: str, preferred: int, others: set[int]) -> tuple[int, socket.socket]:
    """Return the first free port from `preferred` upwards that is nobody else's default, and its claim."""
    for port in range(preferred, 65536):
        if port != preferred and port in others:
            continue
        if can_bind(host, port) and (claim := reserve(port)):
            return port, claim
    raise OSError(f"no free port from {preferred} upwards")


def start_guardian() -> socket.socket:
    """Fork a process that waits for this one to end, then kills the group whose id it was sent."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        os.setsid()
        ours.close()
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sig, signal.SIG_IGN)
        words = b""
        while chunk := theirs.recv(64):
            words += chunk
        last = words.decode().split()[-1:] or ["done"]
        if last != ["done"]:
            with suppress(ProcessLookupError):
                os.killpg(int(last[0]), signal.SIGKILL)
        os._exit(0)
    theirs.close()
    return ours


def children() -> list[int]:
    """The live children of this process, adopted ones included."""
    with suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    return []


def free_openmp_files() -> None:
    """Remove what Intel's OpenMP leaves in shared memory when its process is killed (a small file each)."""
    for file in Path("/dev/shm").glob(f"__KMP_REGISTERED_LIB_*_{os.getuid()}"):
        if not Path("/proc", file.name.split("_")[-2]).exists():
            file.unlink(missing_ok=True)


class Supervisor:
    """One server's life: start, answer, end."""

    def __init__(self, spec: dict[str, Any], listener: socket.socket, guardian: socket.socket) -> None:
        self.spec = spec
        self.guardian = guardian
        self.guardian_pids = set(children())
        self.keep = False
        self.leases: set[socket.socket] = set()
        self.started = time.time()
        self.had_lease = False
        self.stopping = False
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, self.accept)
        self.claims: dict[str, socket.socket] = {}
        self.ports: dict[str, int] = {}
        for kind, preferred in spec["ports"].items():
            self.ports[kind], self.claims[kind] = choose_port(spec["host"], preferred, set(spec["avoid"]))
        self.record_path = Path(spec["record"])
        self.child = self.spawn()
        self.guardian.sendall(f"{self.child.pid}\n".encode())
        self.pidfd = os.pidfd_open(self.child.pid)
        self.selector.register(self.pidfd, selectors.EVENT_READ, self.child_ended)
        self.record("running")

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the server in a session of its own, so that a notebook's Interrupt does not reach it."""
        words = {f"{{{kind}}}": str(port) for kind, port in self.ports.items()}
        argv = [words.get(word, word) for word in self.spec["argv"]]
        with Path(self.spec["log"]).open("ab") as log:
            return subprocess.Popen(
                argv,
                env=os.environ | self.spec["env"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def describe(self) -> dict[str, Any]:
        """What callers may know; the environment, which holds keys, stays out."""
        return {
            "name": self.spec["name"],
            "server": self.spec["server"],
            "pid": self.child.pid,
            "model": self.spec["model"],
            "endpoints": {kind: f"{self.spec['client_host']}:{port}" for kind, port in self.ports.items()},
            "preferred": self.spec["ports"],
            "owner": "cli" if self.keep else self.spec["owner"],
            "fingerprint": self.spec["fingerprint"],
            "log": self.spec["log"],
            "started": self.started,
        }

    def record(self, state: str, **more: Any) -> None:
        """Write what is left to read when the supervisor is gone; whole or not at all."""
        draft = self.record_path.with_suffix(".draft")
        draft.write_text(json.dumps(self.describe() | {"state": state} | more))
        draft.replace(self.record_path)

    def run(self) -> None:
        """Serve requests until the server ended or nobody needs it any more."""
        while not self.stopping:
            for key, _ in self.selector.select(timeout=1.0):
                key.data(key.fileobj)
            if not self.keep and not self.leases:
                waited = time.time() - self.started
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
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(TERM_SECONDS)
        self.sweep(signal.SIGTERM, ORPHAN_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.sweep(signal.SIGKILL, KILL_SECONDS)
        free_openmp_files()
        if not by_itself:
            self.record_path.unlink(missing_ok=True)
        self.guardian.sendall(b"done\n")

    def sweep(self, sig: signal.Signals, seconds: float) -> None:
        """Signal each descendant once as it becomes our child, and reap until none is left or time is up."""
        deadline = time.monotonic() + seconds
        signalled: set[int] = set()
        while (left := set(children()) - self.guardian_pids) and time.monotonic() < deadline:
            for pid in left - signalled:
                with suppress(ProcessLookupError):
                    os.kill(pid, sig)
            signalled |= left
            for pid in left:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.02)


def main() -> int:
    """Read the spec from standard input; exit with 75 (EX_TEMPFAIL) if the server has a supervisor already."""
    spec = json.load(sys.stdin)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind("\0" + spec["address"])
    except OSError:
        return 75
    listener.listen(64)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    guardian = start_guardian()
    for sig in (signal.SIGINT, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)
    supervisor = Supervisor(spec, listener, guardian)
    signal.signal(signal.SIGTERM, lambda *_: setattr(supervisor, "stopping", True))
    supervisor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
