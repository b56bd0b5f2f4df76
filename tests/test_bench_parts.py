"""What a measurement is made of, when a part of it fails; without a server."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock
from uuid import uuid4

import pytest
from desk import IPV6
from tritonclient.utils import InferenceServerException

from servebook.bench import generators, tensors, workload
from servebook.bench.load import BenchError, Load
from servebook.bench.paths import find_path
from servebook.launch import Server
from servebook.launch.child import run_child
from servebook.launch.probes import http_ok, listens
from servebook.processes import free_port
from servebook.settings import load_settings

SERVER = Server("x", "m", {"grpc": "127.0.0.1:1"}, load_settings())
WAIT_SECONDS = 20.0


Part = Callable[..., Coroutine[Any, Any, Load]]


async def load_by_two(
    part: Part, monkeypatch: pytest.MonkeyPatch, barrier: type[threading.Barrier] = threading.Barrier
) -> None:
    """A load of which two threads have each a `part`."""

    def pool(parts: int, _: object, meet: Callable[..., None], at: tuple[Any]) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(parts, initializer=meet, initargs=at)

    monkeypatch.setattr(generators, "_part", part)
    monkeypatch.setattr(generators, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(generators, "die_with_parent", lambda: None)
    monkeypatch.setattr(
        "servebook.bench.generators.multiprocessing.get_context", lambda _: SimpleNamespace(Barrier=barrier)
    )
    begun: list[bool] = []
    jobs = workload.completions(20, 2)
    try:
        await generators.spread(find_path("sse"), SERVER, jobs, 2, None, 2, 2, 1, lambda: begun.append(True))
    finally:
        assert not begun


async def test_a_part_that_fails_ends_the_load_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others do not wait for it, nor does what they say of that hide its own words."""
    others_know = threading.Event()
    in_time: list[bool] = []

    class Barrier(threading.Barrier):
        def abort(self) -> None:
            super().abort()
            in_time.append(others_know.wait(WAIT_SECONDS))

    async def part(*asked: Any, all_here: Callable[[], object]) -> Load:
        if asked[-1] == 3:
            raise BenchError("no connection is left")
        try:
            all_here()
        finally:
            others_know.set()
        raise AssertionError("it began without the other")

    monkeypatch.setattr(generators, "BARRIER_SECONDS", WAIT_SECONDS)
    with pytest.raises(BenchError, match="no connection is left"):
        await load_by_two(part, monkeypatch, Barrier)
    assert all(in_time)
    assert in_time, "the others were told, and did not wait until their time was up"


async def test_parts_that_wait_in_vain_for_each_other_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that stood still no part knows why, and a traceback told of a BrokenBarrierError."""
    ready = threading.Event()

    async def part(*asked: Any, all_here: Callable[[], object]) -> Load:
        if asked[-1] == 3:
            await asyncio.to_thread(ready.wait, WAIT_SECONDS)  # until the other's time is up
        try:
            all_here()
        finally:
            ready.set()
        raise AssertionError("it began without the other")

    monkeypatch.setattr(generators, "BARRIER_SECONDS", 0.2)
    with pytest.raises(BenchError, match="were not all ready"):
        await load_by_two(part, monkeypatch)


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
