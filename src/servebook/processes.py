"""Tools for processes and ports, with the standard library only: a supervisor and an engine use them too."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import NoReturn, TypeVar

T = TypeVar("T")
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.05
KILL_SECONDS = 5.0
"""How long the kernel may take to end what got SIGKILL."""
EXEC_MS = 100
"""How long an `exec` may be half done: a busy machine may stop for a while in the midst of it."""
KEPT = "SERVEBOOK_SUPERVISOR"
"""In the environment of each process that a supervisor started: the path of its socket. An orphan is known by it."""
GIVEN_PORTS = range(20_000, 30_000)
"""What `free_port` chooses from. By default Linux gives none of them to who connects, or asks for any: those are from
32768 upwards, and one of them was now and then another program's before its server listened."""
GIVEN_AT_A_TIME = 64
_given: deque[socket.socket] = deque()
"""The claims to the last ports that were given away; of those before, the servers listen by now, or never will."""
_libc = ctypes.CDLL(None, use_errno=True)


def wait_until(condition: Callable[[], T], seconds: float, every: float = POLL_SECONDS) -> T:
    """Ask until `condition()` is true; return its last value, which is false where time was up first.

    What this process overslept does not count: where the machine stood still, or was suspended, so did what is waited
    for.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()) and (asleep := time.monotonic()) < deadline:
        time.sleep(every)
        deadline += max(0.0, time.monotonic() - asleep - every)
    return value


def end_without_reader() -> NoReturn:
    """End this process as one that writes to a pipe which nobody reads any more: by SIGPIPE, without a word."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, for the sake of sockets
    os.kill(os.getpid(), signal.SIGPIPE)
    os._exit(128 + signal.SIGPIPE)  # where it is blocked


def die_with_parent(sig: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel send `sig` to this process when the thread that started it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0)


def die_with_asker(sig: signal.Signals = signal.SIGKILL) -> None:
    """In a process that a fork server made: send it `sig` when the process that asked for it ends, however that ends.

    The fork server is its parent and does not end then: it lives as long as what it has forked.
    """
    from multiprocessing import connection, parent_process

    asker = parent_process()
    assert asker, "this process was not made by multiprocessing"

    def watch() -> None:
        connection.wait([asker.sentinel])
        os.kill(os.getpid(), sig)

    Thread(target=watch, daemon=True).start()


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> set[int]:
    """The children of this process, adopted and ended ones included."""
    with suppress(OSError):
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split()))
    return set()


def is_tracker(pid: int) -> bool:
    """Whether this is a resource tracker of Python's: it frees what the killed have left in shared memory, and ends."""
    return b"resource_tracker" in _read(pid, "cmdline")


def marked(mark: str) -> dict[int, str]:
    """The live processes, but for this one, that have "NAME=value" in their environment, with their command lines.

    Resource trackers are left out. vLLM's processes rename themselves, and keep the mark only with SPT_NOENV=1.
    """
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):  # noqa: PTH208  # a third of iterdir's time
        if pid != os.getpid() and mark.encode() in _environ(pid).split(b"\0") and not is_tracker(pid):
            found[pid] = _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with; nothing where it has ended, or is another user's."""
    words = (os.fsdecode(word).partition("=") for word in _environ(pid).split(b"\0"))
    return {name: value for name, _, value in words if name}


def end(mark: str, grace: float) -> set[str]:
    """End what is `marked`: SIGTERM, and after `grace` seconds SIGKILL, until none is left. Return the command lines.

    A server is its supervisor's to end, in order: until the grace is over, only the supervisor is told.
    """
    asked: dict[int, str] = {}
    deadline = time.monotonic() + grace

    def all_ended() -> bool:
        left = marked(mark)
        late = time.monotonic() >= deadline
        for pid in left:
            if late:
                _signal(pid, signal.SIGKILL)
            elif pid not in asked and f"\0{KEPT}=".encode() not in b"\0" + _environ(pid):
                _signal(pid, signal.SIGTERM)
        asked.update(left)
        return not left

    wait_until(all_ended, grace + KILL_SECONDS)
    return set(asked.values())


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nobody listens now, and which no other call gives away while a server for it starts.

    Raises:
        OSError: none was found.
    """
    for port in random.SystemRandom().sample(GIVEN_PORTS, 1000):
        if can_bind(host, port) and (taken := claim_name(f"given-port-{port}")):
            _given.append(taken)
            if len(_given) > GIVEN_AT_A_TIME:
                _given.popleft().close()
            return port
    raise OSError(f"no free port among {GIVEN_PORTS.start} to {GIVEN_PORTS.stop}")


def claim_name(name: str) -> socket.socket | None:
    """Claim `name` among all users of this machine, until the returned socket is closed; None: somebody else has it.

    It is an abstract socket, which the kernel drops with its process.
    """
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(f"\0servebook-{name}")
    except OSError:
        held.close()
        return None
    return held


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end of a Unix socket (`struct ucred`: pid, uid, gid)."""
    layout = struct.Struct("3i")
    pid, uid, _ = layout.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))
    return pid, uid


def can_bind(host: str, port: int) -> bool:
    """Whether a server could listen on `host`:`port` now.

    Raises:
        PermissionError: never on this port, which is not for this user: mostly one below 1024.
        OSError: not on any port: `host` is not an address of this machine.
    """
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def listeners(address: str, port: int) -> set[int]:
    """The users, by number, whose programs take connections to `address`:`port` of this machine, IPv4 or IPv6.

    As /proc/net/tcp has it: `sl local_address rem_address st tx:rx tr:when retrnsmt uid …`, where 0A is LISTEN. Who
    listens at the address itself takes them before those who listen at any, and of these, for IPv4, one of IPv4 before
    one of IPv6. (That takes none where it was told so, by IPV6_V6ONLY, which is not in there.)

    Raises:
        OSError: the kernel does not say, or `address` is none.
    """
    if _family(address) == socket.AF_INET6:
        found = [_listening(address, port), _listening("::", port)]
    else:
        found = [
            _listening(address, port) | _listening(f"::ffff:{address}", port),
            _listening("0.0.0.0", port),
            _listening("::", port),
        ]
    return next(filter(None, found), set())


def _listening(address: str, port: int) -> set[int]:
    """The users whose sockets listen at exactly this address."""
    family = _family(address)
    table = Path("/proc/net/tcp6" if family == socket.AF_INET6 else "/proc/net/tcp")
    if family == socket.AF_INET6 and not table.exists():  # a kernel without IPv6
        return set()
    packed = socket.inet_pton(family, address)
    words = (int.from_bytes(packed[i : i + 4], sys.byteorder) for i in range(0, len(packed), 4))
    place = f"{''.join(f'{word:08X}' for word in words)}:{port:04X}"
    rows = (line.split() for line in table.read_text(encoding="ascii").splitlines()[1:])
    return {int(row[7]) for row in rows if row[1] == place and row[3] == "0A"}


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _signal(pid: int, sig: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, sig)


def _environ(pid: int) -> bytes:
    """A process's environment, "NAME=value" and a zero each.

    For an instant of an `exec` the kernel shows neither that nor a command line, and would hide a process from `end`.
    """
    for _ in range(EXEC_MS):
        found = _read(pid, "environ")
        no_program = _read(pid, "statm")[:2] in (b"", b"0 ")  # it has ended, or is a thread of the kernel
        if found or no_program:
            return found
        if _read(pid, "cmdline"):
            break
        time.sleep(0.001)
    return _read(pid, "environ")


def _read(pid: int, name: str) -> bytes:
    """A file of the process in /proc; nothing where it has ended, or is another user's."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""
