"""Memory for engines that start: refused before the start where it is missing, and never promised twice on a GPU."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil

from servebook.engine.arguments import gpu_gib, require_memory
from servebook.engine.gpu import GIB, Card, cards
from servebook.errors import LaunchError
from servebook.launch.processes import KEPT, claim_name, wait_until
from servebook.settings import Settings

POLL_SECONDS = 0.2
TURN_SECONDS = 5.0
"""How long a start waits for its turn to look, which is a matter of milliseconds: another user could hold the name."""
CLAIM_SECONDS = 900.0
"""How long it waits for memory that others have claimed: three times what SERVEBOOK_START_TIMEOUT lets a start take,
where nobody has raised it."""
UNIX_SOCKETS = Path("/proc/net/unix")
CLAIM = re.compile(r"@servebook-gpu-(?P<card>\S+)-(?P<pid>\d+)-(?P<number>\d+)-(?P<mib>\d+)$")


@contextmanager
def memory_for(settings: Settings, model: Path, engines: int, wait: Callable[[str], None]) -> Iterator[None]:
    """Memory for an engine that starts within the block, the last of `engines` that start together.

    On a GPU it is claimed until the block ends; by then the engine has taken it. What other starts have claimed is not
    free; where it would not suffice otherwise, this waits for them and says so to `wait`.

    Raises:
        LaunchError: less is available than is needed, others have claimed it for too long, or there is no GPU.
    """
    require_memory(settings, model, engines)
    if not settings.on_gpu:
        yield
        return
    needed = gpu_gib(settings, model)
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
        mine = sum(pid == os.getpid() for pid, _ in claims)
        if free >= needed * GIB:
            claim.bind(f"\0servebook-gpu-{card.uuid}-{os.getpid()}-{time.monotonic_ns()}-{needed * 1024:.0f}")
            return True
        if len(claims) > mine:
            return False
    others = f" {mine} more that started with it will take theirs." if mine else ""
    raise LaunchError(
        f"The engine needs about {needed:.1f} GiB of GPU memory, and {max(0, free) / GIB:.1f} of "
        f"{card.total / GIB:.1f} GiB are free on {card.name}.{others} {held_by(card)}".rstrip(),
        "End another server (`servebook status`, `servebook down NAME`) or program, or choose a smaller model or fewer "
        "replicas.",
    )


@contextmanager
def _one_at_a_time(card: Card) -> Iterator[None]:
    """Nobody else looks at the claims on `card` within the block, which takes milliseconds."""
    turn = wait_until(lambda: claim_name(f"gpu-{card.uuid}"), TURN_SECONDS, 0.01)
    with turn or nullcontext():  # without a turn the worst is that vLLM finds the memory taken
        yield


def _claims(card: Card) -> list[tuple[int, int]]:
    """Process and bytes of every claim on `card`."""
    sockets = UNIX_SOCKETS.read_text(encoding="utf-8", errors="replace")  # any user's, of any bytes
    matches = map(CLAIM.search, sockets.splitlines())
    return [(int(match["pid"]), int(match["mib"]) * 2**20) for match in matches if match and match["card"] == card.uuid]


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
