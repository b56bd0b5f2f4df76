"""What a measurement is made of, when a part of it fails; without a server."""

from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock
from uuid import uuid4

import psutil
import pytest
from desk import IPV6
from tritonclient.utils import InferenceServerException

from servebook.bench import generators, tensors, workload
from servebook.bench.load import BenchError
from servebook.bench.paths import find_path
from servebook.launch import Server
from servebook.launch.child import run_child
from servebook.launch.probes import http_ok, listens
from servebook.processes import free_port
from servebook.settings import load_settings

SERVER = Server("x", "m", {"grpc": "127.0.0.1:1"}, load_settings())


async def load_by_two(port: int) -> None:
    """A load by two processes, of a server at `port` that never lets them begin; neither outlives it."""
    server = Server("x", "m", {"http": f"127.0.0.1:{port}"}, load_settings())
    begun: list[bool] = []
    try:
        jobs = workload.completions(20, 2)
        await generators.spread(find_path("sse"), server, jobs, 2, None, 2, 2, 1, lambda: begun.append(True))
    finally:
        assert not begun
        assert not generating()


def generating() -> list[psutil.Process]:
    """The load generator's processes that this one has started."""
    return [each for each in psutil.Process().children() if "spawn_main" in " ".join(each.cmdline())]


async def test_a_part_that_fails_ends_the_load_and_says_why() -> None:
    with pytest.raises(BenchError, match="Every request failed: ClientConnectorError"):
        await load_by_two(free_port())


async def test_a_part_that_is_killed_ends_the_load_at_once() -> None:
    """Whatever the others do: here they wait for an answer for as long as a request may take, ten minutes."""

    def serve() -> None:
        for _ in range(2):
            callers.enter_context(door.accept()[0])
        generating()[0].kill()

    with socket.create_server(("127.0.0.1", 0)) as door, ExitStack() as callers, ThreadPoolExecutor() as pool:
        served = pool.submit(serve)
        with pytest.raises(BenchError, match=r"A process of the load generator was ended\.\n→ If memory is short"):
            await load_by_two(door.getsockname()[1])
        served.result()


class Triton(MagicMock):
    """A client of a Triton that takes so many regions, and lets none of them go where it is `stuck`."""

    room, stuck = 2, False

    def register_system_shared_memory(self, *_: object) -> None:
        if not self.room:
            raise InferenceServerException("shared memory is restricted")
        self.room -= 1

    def unregister_system_shared_memory(self, _: str) -> None:
        if self.stuck:
            raise InferenceServerException("the server is gone")


@pytest.mark.parametrize("fault", [{"room": 1}, {"stuck": True}, {}])
def test_no_shared_memory_stays_behind(fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    client = Triton(**fault)
    monkeypatch.setattr("servebook.bench.tensors.v2_grpc.InferenceServerClient", lambda _: client)
    monkeypatch.setattr(tensors.SharedMemory, "size", 4096)
    drawn = uuid4()
    monkeypatch.setattr("servebook.bench.tensors.uuid.uuid4", lambda: drawn)
    regions = [Path(f"/dev/shm/servebook-{way}-{drawn.hex[:8]}") for way in ("in", "out")]

    def use() -> None:
        encoding = tensors.SharedMemory(SERVER)
        assert all(map(Path.exists, regions))
        encoding.close()

    try:
        if fault:
            with pytest.raises(InferenceServerException):
                use()
        else:
            use()
        assert not any(map(Path.exists, regions))
        client.close.assert_called_once()
    finally:
        for region in regions:
            region.unlink(missing_ok=True)


@pytest.mark.lifetime
@IPV6
def test_the_identity_model_is_served_at_an_ipv6_address() -> None:
    http, grpc = free_port("::1"), free_port("::1")
    words = ["--host", "::1", "--http-port", str(http), "--grpc-port", str(grpc)]
    command = [sys.executable, "-m", "servebook.bench.identity_kserve", *words]
    with run_child(command, lambda _: http_ok(f"[::1]:{http}", "/v2/models/identity/ready")):
        assert listens(f"[::1]:{grpc}")
