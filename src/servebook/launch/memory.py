"""Memory for engines that start: refused before the start where it is missing, and never promised twice."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Lock, get_native_id

import psutil

from servebook.engine.arguments import available_gib, gpu_gib, needed_gib
from servebook.engine.gpu import GIB, Card, cards
from servebook.errors import LaunchError
from servebook.processes import KEPT, claim_name, wait_until
from servebook.settings import Settings

POLL_SECONDS = 0.2
TURN_SECONDS = 5.0
"""How long a start waits for its turn to look, which is a matter of milliseconds: another user could hold the name."""
CLAIM_SECONDS = 900.0
"""How long it waits for memory that others have claimed: three times what SERVEBOOK_START_TIMEOUT lets a start take,
where nobody has raised it."""
UNIX_SOCKETS = Path("/proc/net/unix")
ELSE = (
    "End another server (`servebook status`, `servebook down NAME`) or program, or choose a smaller model or fewer "
    "replicas."
)
CLAIM = re.compile(r"@servebook-gpu-(?P<card>\S+)-(?P<thread>\d+)-(?P<number>\d+)-(?P<mib>\d+)$")
_claimed: list[tuple[int, float]] = []
"""For each engine that this process starts: its thread, and what it will take of the machine's memory, in GiB."""
_looking = Lock()
os.register_at_fork(after_in_child=_claimed.clear)


@contextmanager
def memory_for(settings: Settings, model: Path, wait: Callable[[str], None]) -> Iterator[None]:
    """Memory for an engine that starts within the block; it is claimed until the block ends, when the engine has it.

    What others that start have claimed is not free: of the machine's memory this process's, of a GPU's everybody's. If
    there are such, this waits for them and says so to `wait`; not if this thread has claims, as they could wait for it.

    Raises:
        LaunchError: less is available than is needed, others have claimed it for too long, or there is no GPU.
    """
    with _of_the_machine(needed_gib(settings, model), wait):
        if not settings.on_gpu:
            yield
            return
        with _of_a_gpu(gpu_gib(settings, model), wait):
            yield


@contextmanager
def _of_the_machine(needed: float, wait: Callable[[str], None]) -> Iterator[None]:
    """Claim `needed` GiB, without which the kernel would kill the engine."""
    claim = get_native_id(), needed

    def claimed() -> bool:
        with _looking:
            free = available_gib() - sum(gib for _, gib in _claimed)
            mine = sum(thread == get_native_id() for thread, _ in _claimed)
            if free >= needed:
                _claimed.append(claim)
                return True
            if mine or not _claimed:
                raise LaunchError(
                    f"The engine needs about {needed:.1f} GiB of memory, and {max(0.0, free):.1f} GiB are available."
                    f"{_with_it(mine)}",
                    ELSE,
                )
        wait("waiting for memory that another start has claimed")
        return False

    if not wait_until(claimed, CLAIM_SECONDS, POLL_SECONDS):
        raise LaunchError(
            f"Other starts of this process claim memory for {CLAIM_SECONDS / 60:.0f} minutes by now.", ELSE
        )
    try:
        yield
    finally:
        with _looking:
            _claimed.remove(claim)


@contextmanager
def _of_a_gpu(needed: float, wait: Callable[[str], None]) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:

        def claimed() -> bool:
            if taken := _claim(claim, needed):
                return taken
            wait("waiting for GPU memory that another start has claimed")
            return False

        if not wait_until(claimed, CLAIM_SECONDS, POLL_SECONDS):
            raise LaunchError(
                f"GPU memory is claimed by other starts, for {CLAIM_SECONDS / 60:.0f} minutes by now.",
                "See `ss -xa | grep servebook-gpu` for who claims it, or take another card with CUDA_VISIBLE_DEVICES.",
            )
        yield


def _claim(claim: socket.socket, needed: float) -> bool:
    """Take `needed` GiB if they are free; False: not before another start has ended.

    A claim is an abstract socket: every user sees its name, and the kernel drops it with this process.
    """
    found = cards()
    if not found:
        raise LaunchError(
            "No GPU answers: NVIDIA's driver is missing, or CUDA_VISIBLE_DEVICES hides it.",
            "See `servebook doctor`; or set SERVEBOOK_DEVICE=cpu and run `make setup DEVICE=cpu`.",
        )
    with _one_at_a_time(found[0]):
        card = cards()[0]
        claims = _claims(card)
        free = card.free - sum(claimed for _, claimed in claims)
        mine = sum(thread == get_native_id() for thread, _ in claims)
        if free >= needed * GIB:
            claim.bind(f"\0servebook-gpu-{card.uuid}-{get_native_id()}-{time.monotonic_ns()}-{needed * 1024:.0f}")
            return True
        if claims and not mine:
            return False
    raise LaunchError(
        f"The engine needs about {needed:.1f} GiB of GPU memory, and {max(0, free) / GIB:.1f} of "
        f"{card.total / GIB:.1f} GiB are free on {card.name}.{_with_it(mine)} {held_by(card)}".rstrip(),
        ELSE,
    )


def _with_it(others: int) -> str:
    return f" {others} more that started with it will take theirs." if others else ""


@contextmanager
def _one_at_a_time(card: Card) -> Iterator[None]:
    """Nobody else looks at the claims on `card` within the block, which takes milliseconds."""
    turn = wait_until(lambda: claim_name(f"gpu-{card.uuid}"), TURN_SECONDS, 0.01)
    with turn or nullcontext():  # without a turn the worst is that vLLM finds the memory taken
        yield


def _claims(card: Card) -> list[tuple[int, int]]:
    """Thread and bytes of every claim on `card`."""
    sockets = UNIX_SOCKETS.read_text(encoding="utf-8", errors="replace")  # any user's, of any bytes
    matches = map(CLAIM.search, sockets.splitlines())
    return [
        (int(match["thread"]), int(match["mib"]) * 2**20) for match in matches if match and match["card"] == card.uuid
    ]


def held_by(card: Card) -> str:
    """Who holds what is not free, such as "Held by: vllm 2.4 GiB."; "" where nobody can be seen."""
    by_size = sorted(card.holders.items(), key=lambda item: -(item[1] or 0))
    names = [_name(pid) + (f" {held / GIB:.1f} GiB" if held else "") for pid, held in by_size]
    return f"Held by: {', '.join(names)}." if names else ""


def _name(pid: int) -> str:
    """What a reader calls this process: our server's name, or the program's with its pid."""
    try:
        process = psutil.Process(pid)
        with suppress(psutil.AccessDenied):
            if socket_file := process.environ().get(KEPT):
                return Path(socket_file).stem
        return f"{process.name()} (pid {pid})"
    except psutil.Error:
        return f"a process out of sight (pid {pid})"
