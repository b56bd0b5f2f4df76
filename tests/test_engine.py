"""Engine arguments, environment and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path

import psutil
import pytest
from vllm.v1.structured_output import StructuredOutputManager

from servebook.engine import arguments as engine
from servebook.engine.model import model_path
from servebook.engine.quiet_compiler import LOWEST_PRIORITY, register
from servebook.errors import LaunchError
from servebook.settings import Settings, load_settings

GIB = 2**30


@pytest.fixture
def cpu() -> Settings:
    return load_settings(device="cpu")


@pytest.fixture
def gpu() -> Settings:
    return load_settings(device="gpu")


def test_cpu_runs_eager_and_gpu_captures_graphs(cpu: Settings, gpu: Settings) -> None:
    assert "--enforce-eager" in engine.engine_argv(cpu, Path("/m"))
    words = engine.engine_argv(gpu, Path("/m"))
    assert "--enforce-eager" not in words
    config = engine.engine_args(words).compilation_config
    assert (config.mode, config.cudagraph_mode.name) == (0, "FULL_DECODE_ONLY"), "graphs, and no torch.compile"


@pytest.mark.parametrize(
    ("flags", "float32"), [({"avx2"}, True), ({"avx2", "avx512_bf16"}, False), ({"amx_bf16"}, False)]
)
def test_float32_where_the_processor_has_no_bfloat16(
    flags: set[str], float32: bool, cpu: Settings, gpu: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "cpu_flags", lambda: flags)
    assert ("--dtype float32" in " ".join(engine.engine_argv(cpu, Path("/m")))) is float32
    assert "--dtype" not in engine.engine_argv(gpu, Path("/m"))


def test_a_readers_arguments_come_last_and_win(cpu: Settings) -> None:
    settings = cpu.model_copy(update={"engine_args": "--max-model-len 64 --seed 7"})
    args = engine.engine_args(engine.engine_argv(settings, model_path(cpu)))
    assert (args.max_model_len, args.seed) == (64, 7)
    assert args.served_model_name == ["smollm2"]
    assert args.kv_cache_memory_bytes == GIB
    assert args.enforce_eager is True


@pytest.mark.parametrize(("logical", "physical", "threads"), [(1, 1, 1), (2, 1, 2), (8, 4, 3), (8, 8, 7), (4, None, 3)])
def test_threads(
    cpu: Settings, monkeypatch: pytest.MonkeyPatch, logical: int, physical: int | None, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(logical)))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
    assert engine.engine_env(cpu)["OMP_NUM_THREADS"] == str(threads)


def test_a_replica_stays_on_its_cores(cpu: Settings) -> None:
    env = engine.engine_env(cpu.model_copy(update={"cores": "1,3"}))
    assert env.items() >= {"OMP_NUM_THREADS": "2", "KMP_AFFINITY": "granularity=fine,explicit,proclist=[1,3]"}.items()
    assert "KMP_AFFINITY" not in engine.engine_env(cpu)


def test_openmp_is_preloaded_from_a_folder_with_a_blank_too(
    cpu: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "my clone/.venv"
    prefix.mkdir(parents=True)
    (prefix / "lib").symlink_to(Path(sys.prefix) / "lib")
    monkeypatch.setattr(sys, "prefix", str(prefix))
    show = [sys.executable, "-c", "print(open('/proc/self/maps').read())"]
    done = subprocess.run(show, env=os.environ | engine.engine_env(cpu), capture_output=True, text=True, check=True)
    assert "libiomp5.so" in done.stdout
    assert not done.stderr


def test_a_gpus_engine_keeps_vllms_threads(gpu: Settings) -> None:
    assert not engine.engine_env(gpu).keys() & {"OMP_NUM_THREADS", "KMP_BLOCKTIME", "VLLM_ENABLE_V1_MULTIPROCESSING"}


def test_no_statistics_leave_the_machine(cpu: Settings) -> None:
    assert engine.engine_env(cpu).items() >= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}.items()


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().available / GIB
    assert engine.available_gib(tmp_path) == pytest.approx(machine, rel=0.2)
    write(tmp_path, memory__max="max", memory__current=GIB, memory__stat="inactive_file 0")
    assert engine.available_gib(tmp_path) == pytest.approx(machine, rel=0.2)
    write(tmp_path, memory__max=GIB, memory__current=GIB // 2, memory__stat=f"anon 1\ninactive_file {GIB // 4}")
    assert engine.available_gib(tmp_path) == pytest.approx(0.75)


def test_a_containers_limit_counts_in_the_older_layout(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    write(
        folder, memory__limit_in_bytes=GIB, memory__usage_in_bytes=GIB, memory__stat=f"total_inactive_file {GIB // 2}"
    )
    assert engine.available_gib(tmp_path) == pytest.approx(0.5)


def test_memory(cpu: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(3 * GIB)
    monkeypatch.setattr(engine, "cpu_flags", lambda: {"avx2"})
    assert engine.needed_gib(cpu, tmp_path) == 2 * 3 + 1 + engine.RUNTIME_GIB
    monkeypatch.setattr(engine, "cpu_flags", lambda: {"avx2", "avx512_bf16"})
    assert engine.needed_gib(cpu, tmp_path) == 3 + 1 + engine.RUNTIME_GIB
    monkeypatch.setattr(engine, "available_gib", lambda: 5.5)
    engine.require_memory(cpu, tmp_path)
    monkeypatch.setattr(engine, "available_gib", lambda: 5.0)
    with pytest.raises(LaunchError, match=r"about 5\.4 GiB of memory, and 5\.0 GiB"):
        engine.require_memory(cpu, tmp_path)


def test_a_gpus_engine_builds_no_sampler(gpu: Settings) -> None:
    assert engine.engine_env(gpu)["VLLM_USE_FLASHINFER_SAMPLER"] == "0"


def test_grammars_compile_at_the_lowest_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """In vLLM's pool of threads for this, and not where it has none and compiles in the engine's own thread."""

    def priority(*_: object) -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    monkeypatch.setattr(StructuredOutputManager, "_create_grammar", priority)
    register()
    compile_grammar = StructuredOutputManager._create_grammar
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(compile_grammar, None, None).result() == LOWEST_PRIORITY
    assert compile_grammar(None, None) == priority() < LOWEST_PRIORITY
    names = {point.value for point in entry_points(group="vllm.general_plugins")}
    assert "servebook.engine.quiet_compiler:register" in names, "`make setup` tells vLLM of it"
