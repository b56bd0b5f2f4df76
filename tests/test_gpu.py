"""Engines that share a GPU: what each asks for, what is refused, two starts at once. NVML's C functions are faked."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from desk import TINY, Desk
from nvml import FakeCard, install
from tiny_server import AGAIN

from servebook.engine import arguments as engine
from servebook.engine import gpu
from servebook.engine.gpu import GIB
from servebook.errors import LaunchError, ModelError
from servebook.launch import find_server, keep, memory, serve
from servebook.launch.display import Progress
from servebook.launch.memory import memory_for
from servebook.launch.plan import Start
from servebook.processes import KEPT
from servebook.settings import Settings, load_settings

CARDS = {  # total as NVML has it, GiB; how many engines of the bundled model fit where nothing else is there
    "NVIDIA GeForce RTX 4060": (8.0, 2),
    "Tesla T4": (15.0, 5),
    "NVIDIA L4": (22.5, 8),
    "NVIDIA GeForce RTX 4090": (24.0, 8),
    "NVIDIA L40S": (45.0, 16),
    "NVIDIA H100 80GB HBM3": (79.6, 28),
    "NVIDIA H200": (140.4, 50),
}


@pytest.fixture
def enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine, for all that starts here, whatever other tests have just taken of it."""
    for module in (engine, memory):
        monkeypatch.setattr(module, "available_gib", lambda: 64.0)


@pytest.fixture
def settings(enough_memory: None) -> Settings:
    return load_settings(device="gpu", kv_cache_gib=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with weights of the bundled model's size."""
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(269_060_552)
    return tmp_path


def quiet(phase: str) -> None:
    raise AssertionError(f"there was nothing to wait for: {phase}")


@pytest.mark.parametrize(("name", "total", "engines"), [(name, *row) for name, row in CARDS.items()])
def test_each_engine_asks_for_what_it_needs(
    name: str, total: float, engines: int, settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeCard(total, total, name))
    words = engine.engine_argv(settings, model)
    share = float(words[words.index("--gpu-memory-utilization") + 1])
    needed = engine.gpu_gib(settings, model)
    assert 2.6 < needed < 3.0
    # What vLLM asks to be free at the start (`request_memory`); a ten-thousandth of the card is what rounding may do.
    assert share * total == pytest.approx(needed, abs=total / 1e4)
    assert 0 < share <= 1
    assert total // needed == engines
    # The last one that fits is let in, and the next is not.
    install(monkeypatch, FakeCard(total, total - (engines - 1) * needed, name))
    with memory_for(settings, model, quiet):
        pass
    install(monkeypatch, FakeCard(total, total - engines * needed, name))
    with (
        pytest.raises(LaunchError, match=f"needs about {needed:.1f} GiB of GPU memory"),
        memory_for(settings, model, quiet),
    ):
        pass


def test_whether_there_is_room_is_asked_of_machine_and_card(
    settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, room in ((6, True), (5, False)):  # two take 5.6 GiB
        install(monkeypatch, FakeCard(24, free))
        assert engine.has_room(settings, model, 2) is room
        assert engine.has_room(load_settings(device="cpu"), model, 2)
    install(monkeypatch)
    assert not engine.has_room(settings, model, 2), "no card answers"
    install(monkeypatch, FakeCard(24, 24))
    monkeypatch.setattr(engine, "available_gib", lambda: 5.0)
    assert not engine.has_room(settings, model, 2)


def test_a_model_without_weights_is_reckoned_by_its_shape(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "config.json").write_text(
        """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "vocab_size": 128256,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}"""
    )
    assert engine.weights_gib(tmp_path) == pytest.approx(8_030_261_248 * 2 / GIB)
    assert engine.gpu_gib(settings, tmp_path) == pytest.approx(8_030_261_248 * 2.2 / GIB + 1 + engine.GPU_RUNTIME_GIB)


@pytest.mark.parametrize("config", ["{}", "[]", "{", '{"model_type": "clip"}'])
def test_a_shape_that_is_no_language_models_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"describes no language model.*\n→ Set SERVEBOOK_MODEL"):
        engine.weights_gib(tmp_path)


def test_the_refusal_names_who_holds_the_memory(
    settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEPT, "")
    install(monkeypatch, FakeCard(8, 1, holders={os.getpid(): 2.5, 2**22: None}))
    with pytest.raises(LaunchError) as refused, memory_for(settings, model, quiet):
        pass
    assert "1.0 of 8.0 GiB are free on NVIDIA L4" in str(refused.value)
    assert f"(pid {os.getpid()}) 2.5 GiB, a process out of sight (pid {2**22})." in str(refused.value)


def test_without_a_card_the_start_is_refused(settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(LaunchError, match="No GPU answers"), memory_for(settings, model, quiet):
        pass


def test_engines_of_one_start_count_each_other(
    settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeCard(8, 6))
    with (
        memory_for(settings, model, quiet),
        memory_for(settings, model, quiet),
        pytest.raises(LaunchError, match="2 more that started with it"),
        memory_for(settings, model, quiet),
    ):
        pass
    with memory_for(settings, model, quiet):  # the claims ended with their starts
        pass


def start_elsewhere(settings: Settings, model: Path) -> tuple[ForkProcess, Connection]:
    """Another process that has claimed memory for its start, and ends when it is sent a word."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def start() -> None:
        with memory_for(settings, model, quiet):
            theirs.send("claimed")
            theirs.recv()

    other = context.Process(target=start)
    other.start()
    assert ours.recv() == "claimed"
    return other, ours


def test_two_starts_do_not_count_on_the_same_memory(
    settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeCard(8, 4))
    other, ours = start_elsewhere(settings, model)
    try:
        said: list[str] = []

        def wait(phase: str) -> None:
            if not said:
                ours.send("end")  # only now does the other start end
            said.append(phase)

        with memory_for(settings, model, wait):
            assert "another start has claimed" in said[0]
    finally:
        other.join(10)
    assert other.exitcode == 0


def test_what_is_claimed_of_another_card_is_not_missing_here(
    settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two users, each with a card by CUDA_VISIBLE_DEVICES, neither waits for the other."""
    install(monkeypatch, FakeCard(8, 4, "theirs", "GPU-theirs"), FakeCard(8, 4, "mine", "GPU-mine"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with memory_for(settings, model, quiet):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        with memory_for(settings, model, quiet):
            pass


def test_a_start_that_nobody_waits_for_any_more_does_not_wait_for_memory(
    settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeCard(8, 4))
    monkeypatch.setattr(memory, "CLAIM_SECONDS", 60.0)
    (model / "config.json").write_text("{}")
    abandoned = Event()

    class Display(Progress):
        def show(self, text: str, final: bool = False) -> None:
            if "another start has claimed" in text:
                abandoned.set()

    monkeypatch.setattr(keep, "ABANDONED", ContextVar("abandoned", default=abandoned))
    theirs = settings.model_copy(update={"model": str(model), "state_dir": model / "state"})
    start = Start(find_server("vllm"), theirs, "vllm", owner="kernel")
    (card,) = gpu.cards()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, ExitStack() as claim:
        other.bind(f"\0servebook-gpu-{card.uuid}-1-1-4096")
        with pytest.raises(LaunchError, match="given up"):
            keep.begin(start, {}, "", Display("vllm"), claim)


def test_a_killed_start_claims_nothing(settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(8, 4))
    other, _ = start_elsewhere(settings, model)
    other.kill()
    other.join(10)
    with memory_for(settings, model, quiet):
        pass


def test_names_that_somebody_holds_for_ever_do_not_hold_up_a_start_for_ever(
    settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every user of the machine can take these names."""
    install(monkeypatch, FakeCard(8, 4))
    monkeypatch.setattr(memory, "TURN_SECONDS", 0.05)
    monkeypatch.setattr(memory, "CLAIM_SECONDS", 0.05)
    (card,) = gpu.cards()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as turn:
        turn.bind(f"\0servebook-gpu-{card.uuid}")
        with memory_for(settings, model, quiet):
            pass
    said: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
        claim.bind(f"\0servebook-gpu-{card.uuid}-1-1-4096")
        with pytest.raises(LaunchError, match="claimed by other starts"), memory_for(settings, model, said.append):
            pass
    assert "another start has claimed" in said[0]


def test_a_socket_of_anybodys_with_a_name_of_any_bytes_stops_no_start(
    settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeCard(8, 4))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(b"\0\xff")
        with memory_for(settings, model, quiet):
            pass


@pytest.mark.lifetime
def test_a_second_try_counts_on_what_the_first_had_claimed(
    desk: Desk, enough_memory: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card holds one such engine; the server dies by chance, and is up when it is started once more."""
    install(monkeypatch, FakeCard(4, 4))
    (model / "config.json").write_text("{}")
    words = [sys.executable, str(TINY), "server", "--lost", str(desk.folder / "lost"), "--host", "127.0.0.1"]
    spec = replace(find_server("vllm"), again=AGAIN, env=lambda *_: {}, argv=lambda *_: [*words, "--port", "{http}"])
    server = serve("vllm", spec=spec, settings=desk.settings, device="gpu", model=str(model))
    assert (desk.folder / "lost").exists()
    assert desk.status()["state"] == "ready"
    with memory_for(server.settings, model, quiet):
        """What it claimed for its start is free again: the engine has it by now."""


@pytest.mark.lifetime
def test_of_two_who_want_one_server_the_second_claims_nothing(
    desk: Desk, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `serve_all` of a gateway and its engine: there is memory for one, and then no more."""
    (model / "config.json").write_text("{}")
    words = [sys.executable, str(TINY), "server", "--host", "127.0.0.1"]
    spec = replace(find_server("vllm"), env=lambda *_: {}, argv=lambda *_: [*words, "--port", "{http}"])
    needed = engine.needed_gib(load_settings(device="cpu"), model)
    looks = iter([1.2])
    monkeypatch.setattr(memory, "available_gib", lambda: next(looks, 0.4) * needed)
    with ThreadPoolExecutor(2) as pool:
        asked: dict[str, Any] = {"spec": spec, "settings": desk.settings, "device": "cpu", "model": str(model)}
        both = [pool.submit(serve, "vllm", **asked) for _ in range(2)]
        assert len({each.result(timeout=60).pid for each in both}) == 1


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["one", "two"]),
        ("1", ["two"]),
        ("1,0", ["two", "one"]),
        ("GPU-22", ["two"]),
        ("0,7,1", ["one"]),
        ("", []),
        ("-1", []),
    ],
)
def test_cuda_visible_devices(visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(8, 8, "one", "GPU-1111"), FakeCard(24, 24, "two", "GPU-2222"))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [card.name for card in gpu.cards()] == names


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["1g", "2g", "whole"]), ("0", ["1g"]), ("GPU-1", ["1g"]), ("1", ["whole"]), ("2", [])],
)
def test_of_a_card_that_is_cut_its_slices_are_seen(
    visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MIG: memory is the slice's, which vLLM's share is a part of. A card without slices gives nothing."""
    slices = {2: FakeCard(18, 18, "1g", "MIG-a"), 5: FakeCard(35, 35, "2g", "MIG-b")}
    install(
        monkeypatch,
        FakeCard(141, 141, "cut", "GPU-1111", slices=slices),
        FakeCard(24, 24, "whole", "GPU-2222"),
        FakeCard(24, 24, "none", "GPU-3333", slices={}),
    )
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [card.name for card in gpu.cards()] == names


def test_engines_of_one_process_count_each_other_on_a_cpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas as well as `serve_all`; what is there for two is not promised to three."""
    cpu = load_settings(device="cpu")
    needed = engine.needed_gib(cpu, model)
    monkeypatch.setattr(memory, "available_gib", lambda: 2.5 * needed)
    with (
        memory_for(cpu, model, quiet),
        memory_for(cpu, model, quiet),
        pytest.raises(LaunchError, match="2 more that started with it") as refused,
        memory_for(cpu, model, quiet),
    ):
        pass
    told = f"about {needed:.1f} GiB of memory, and {needed / 2:.1f} GiB are available"
    assert told in str(refused.value)
    with memory_for(cpu, model, quiet), memory_for(cpu, model, quiet):  # the claims ended with their starts
        pass


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_of_threads_that_start_at_once_one_waits_for_the_others_memory(
    device: str, enough_memory: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `serve_all` on a small machine: the first engine may need less than it claims while it starts."""
    install(monkeypatch, FakeCard(8, 4))
    here = load_settings(device=device, kv_cache_gib=1)
    if device == "cpu":
        monkeypatch.setattr(memory, "available_gib", lambda: 1.5 * engine.needed_gib(here, model))
    said, may_end = queue.SimpleQueue[str](), Event()

    def second() -> None:
        with memory_for(here, model, said.put):
            assert may_end.is_set(), "not before the first has ended its claim"

    with ThreadPoolExecutor(1) as pool, ExitStack() as first:
        first.enter_context(memory_for(here, model, quiet))
        waiting = pool.submit(second)
        assert "another start has claimed" in said.get(timeout=60)
        may_end.set()
        first.close()
        waiting.result(timeout=60)


@pytest.mark.usefixtures("enough_memory")
def test_on_a_cpu_no_card_is_asked(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(8, 0))
    cpu = load_settings(device="cpu")
    assert "--gpu-memory-utilization" not in engine.engine_argv(cpu, model)
    with memory_for(cpu, model, quiet):
        pass
