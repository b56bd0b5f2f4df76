"""Engine arguments, environment and memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import xgrammar
from desk import held_open
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from servebook.engine import arguments as engine
from servebook.engine import faster_cpu
from servebook.engine.model import model_path
from servebook.engine.quiet_compiler import BrokenOffError, ProcessCompiler, TooDear
from servebook.engine.start import PLUGIN, WITH_ENGINE
from servebook.launch import Server
from servebook.processes import is_tracker
from servebook.settings import Settings, load_settings
from servebook.ways import limits
from servebook.ways.limits import Limits

GIB = 2**30


@pytest.fixture
def cpu() -> Settings:
    return load_settings(device="cpu", kv_cache_gib=1)


@pytest.fixture
def gpu() -> Settings:
    return load_settings(device="gpu")


@pytest.fixture
def openmp() -> None:
    """Intel's, which comes with vLLM's build for CPUs alone."""
    if not (Path(sys.prefix) / "lib/libiomp5.so").is_file():
        pytest.skip("the environment for GPUs has no libiomp5.so")


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


@pytest.mark.parametrize(
    ("logical", "physical", "quota", "threads"),
    [
        *((1, 1, None, 1), (2, 1, None, 2), (8, 4, None, 3), (8, 8, None, 7), (4, None, None, 3)),
        *((8, 4, 2.5, 2), (8, 4, 0.5, 1), (2, 2, 2.0, 2), (2, 2, 1.5, 1), (8, 4, 64.0, 3)),
    ],
)
def test_threads(
    cpu: Settings,
    monkeypatch: pytest.MonkeyPatch,
    logical: int,
    physical: int | None,
    quota: float | None,
    threads: int,
) -> None:
    monkeypatch.setattr(engine, "cpu_quota", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(logical)))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
    assert engine.engine_env(cpu)["OMP_NUM_THREADS"] == str(threads)


@pytest.mark.parametrize(("given", "threads"), [("1", "1"), ("3", "3"), ("", "2"), ("0", "2"), ("2,1", "2")])
def test_who_sets_openmps_own_variable_is_followed(
    cpu: Settings, monkeypatch: pytest.MonkeyPatch, given: str, threads: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(engine, "cpu_quota", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert engine.engine_env(cpu)["OMP_NUM_THREADS"] == threads


@pytest.mark.usefixtures("openmp")
def test_a_replica_stays_on_its_cores(cpu: Settings) -> None:
    env = engine.engine_env(cpu.model_copy(update={"cores": "1,3"}))
    assert env.items() >= {"OMP_NUM_THREADS": "2", "KMP_AFFINITY": "granularity=fine,explicit,proclist=[1,3]"}.items()
    assert "KMP_AFFINITY" not in engine.engine_env(cpu)


@pytest.mark.usefixtures("openmp")
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


def test_large_memory_comes_in_large_pages(cpu: Settings) -> None:
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    # With [always] there is nothing to ask for, with [never] nothing to be had: malloc asks in neither case.
    if not pages.is_file() or "[madvise]" not in pages.read_text():
        pytest.skip("this kernel gives large pages to all or to nobody")
    show = [sys.executable, "-c", "large = bytearray(2**26); print(open('/proc/self/smaps').read())"]
    for env, wanted in ((engine.engine_env(cpu), True), ({}, False)):
        done = subprocess.run(show, env=os.environ | env, capture_output=True, text=True, check=True)
        assert any(line.startswith("VmFlags:") and "hg" in line.split() for line in done.stdout.splitlines()) is wanted


def test_a_gpus_engine_keeps_vllms_threads(gpu: Settings) -> None:
    assert not engine.engine_env(gpu).keys() & {"OMP_NUM_THREADS", "KMP_BLOCKTIME", "VLLM_ENABLE_V1_MULTIPROCESSING"}


@pytest.mark.parametrize(
    "words", ["", "-O2", "--compilation-config.mode 3", "--no-enforce-eager", "--no_enforce_eager"]
)
def test_no_engine_on_a_cpu_wants_a_compiler_unless_it_compiles(cpu: Settings, words: str) -> None:
    """The first request with log probabilities would: without a C++ compiler it ended the engine."""
    settings = cpu.model_copy(update={"engine_args": words})
    eager = engine.engine_args(engine.engine_argv(settings, Path("/m"))).enforce_eager
    assert eager is not words.startswith("--no")
    assert engine.engine_env(settings).get("TORCHDYNAMO_DISABLE") == ("1" if eager else None)


def test_no_statistics_leave_the_machine(cpu: Settings) -> None:
    assert engine.engine_env(cpu).items() >= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}.items()


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs on this machine, beside these tests perhaps, is not to be reckoned with."""
    memory = psutil.virtual_memory()._replace(available=3 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(engine, "promised_bytes", lambda *_: 0)


@pytest.mark.usefixtures("no_engines")
def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert engine.available_gib(tmp_path) == 3
    write(tmp_path, memory__max="max", memory__current=GIB, memory__stat="inactive_file 0")
    assert engine.available_gib(tmp_path) == 3
    write(tmp_path, memory__max=GIB, memory__current=GIB // 2, memory__stat=f"anon 1\ninactive_file {GIB // 4}")
    assert engine.available_gib(tmp_path) == pytest.approx(0.75)
    assert engine.total_gib(tmp_path) == 1, "an engine that needs more will not fit, whatever is ended"


@pytest.mark.usefixtures("no_engines")
def test_a_containers_limit_counts_in_the_older_layout(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    write(
        folder, memory__limit_in_bytes=GIB, memory__usage_in_bytes=GIB, memory__stat=f"total_inactive_file {GIB // 2}"
    )
    assert engine.available_gib(tmp_path) == pytest.approx(0.5)


@pytest.mark.usefixtures("no_engines")
def test_the_limits_of_a_users_slice_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd's, in which JupyterHub may start a server, or a batch system's job: the root has none of its own."""
    member = tmp_path / "cgroup"
    member.write_text("0::/user.slice/user-1000.slice/session-2.scope\n")
    monkeypatch.setattr(engine, "MEMBERSHIP", member)
    mine = tmp_path / "user.slice/user-1000.slice"
    write(mine, memory__max=GIB, memory__current=GIB // 2, memory__stat="inactive_file 0", cpu__max="150000 100000")
    write(mine / "session-2.scope", memory__max="max", memory__current=0, memory__stat="", cpu__max="max 100000")
    write(tmp_path / "user.slice", cpu__max="400000 100000")
    write(tmp_path / "user.slice/user-1001.slice", memory__max=0, memory__current=0, memory__stat="inactive_file 0")
    monkeypatch.setattr(engine, "promised_bytes", lambda of=None: GIB if of is None else 0)
    assert engine.available_gib(tmp_path) == pytest.approx(0.5), "a neighbour's engine takes nothing of it"
    assert engine.cpu_quota(tmp_path) == 1.5
    member.write_bytes(b"0::/caf\xe9.slice\n")
    assert engine.cpu_quota(tmp_path) is None


def test_whose_engines_count_in_a_group(tmp_path: Path) -> None:
    (tmp_path / "within").mkdir()
    (tmp_path / "cgroup.procs").write_text(f"0\n{2**30}\n")  # one of another container, and one that has just ended
    (tmp_path / "within/cgroup.procs").write_text(f"{os.getpid()}\n")
    assert [process.pid for process in engine.inside(tmp_path)] == [os.getpid()]
    assert not [*engine.inside(tmp_path / "gone")]


@pytest.mark.usefixtures("no_engines")
def test_the_limits_of_a_job_count_in_the_older_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = tmp_path / "cgroup"
    member.write_text("5:cpuacct,cpu:/slurm/job_7\n4:memory:/slurm/job_7/step_0\n1:name=systemd:/\n0::/\n")
    monkeypatch.setattr(engine, "MEMBERSHIP", member)
    limit = {"memory__limit_in_bytes": GIB, "memory__usage_in_bytes": GIB // 4, "memory__stat": "total_inactive_file 0"}
    write(tmp_path / "memory/slurm/job_7", **limit)
    write(tmp_path / "cpu/slurm/job_7", cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000)
    assert engine.available_gib(tmp_path) == pytest.approx(0.75)
    assert engine.cpu_quota(tmp_path) == 0.5


def test_what_limits_nothing_is_not_reckoned_with(tmp_path: Path) -> None:
    """As the older layout has it where no limit was set: each process in such a group would be looked at."""
    none = {"memory__limit_in_bytes": 2**63 - 4096, "memory__usage_in_bytes": GIB}
    write(tmp_path / "memory", **none, memory__stat="total_inactive_file 0")
    assert not [*engine.memory_limits(tmp_path)]


CACHE = """
import sys, torch
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_EXEC, PROT_READ, PROT_WRITE, mmap
from setproctitle import setproctitle
from servebook.engine.faster_cpu import NewMemory
setproctitle("VLLM::EngineCore")
with NewMemory():
    cache = torch.zeros(2**30, dtype=torch.int8, device=torch.device("cpu"))
cache[: 2**28] = 1
kernels = mmap(-1, 2**28, flags=MAP_PRIVATE | MAP_ANONYMOUS, prot=PROT_READ | PROT_WRITE | PROT_EXEC)
print("there", flush=True)
sys.stdin.read()
"""


def denied(**_: object) -> None:
    """What psutil says of another user's process."""
    raise psutil.AccessDenied


def test_a_cache_that_is_not_used_yet_is_taken_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another engine could have been started in what this one has been promised, and one of them would be killed."""
    with subprocess.Popen([sys.executable, "-c", CACHE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as core:
        assert core.stdout
        assert core.stdout.readline() == b"there\n"
        process = psutil.Process(core.pid)
        promised = engine.promised_bytes([process])
        assert promised == pytest.approx(0.75 * GIB, rel=0.1)
        assert engine.promised_bytes() >= promised
        with monkeypatch.context() as another:
            another.setattr(process, "memory_maps", denied)
            elsewhere = engine.promised_bytes([process])
            assert elsewhere == pytest.approx(engine.CORE_GIB * GIB - process.memory_info().rss)
        core.communicate()
    monkeypatch.setattr(engine, "promised_bytes", lambda *_: promised)
    write(tmp_path, memory__max=3 * GIB, memory__current=GIB, memory__stat="inactive_file 0")
    assert engine.available_gib(tmp_path) == pytest.approx(2 - promised / GIB)


@pytest.mark.parametrize(("device", "promised"), [("/dev/nvidia0", 0), ("/dev/dxg", 0), ("/dev/null", GIB)])
def test_what_an_engine_on_a_gpu_has_not_used_is_promised_to_nobody(device: str, promised: int) -> None:
    """Of the machine's memory: its cache is on the card."""
    maps = [
        SimpleNamespace(path="[anon]", perms="rw-p", size=GIB, rss=0),
        SimpleNamespace(path=device, perms="rw-s", size=4096, rss=4096),
    ]
    process: Any = SimpleNamespace(name=lambda: engine.ENGINE_TITLES[0], memory_maps=lambda grouped: maps)
    assert engine.promised_bytes([process]) == promised


def test_memory(cpu: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(3 * GIB)
    monkeypatch.setattr(engine, "cpu_flags", lambda: {"avx2"})
    assert engine.needed_gib(cpu, tmp_path) == 2 * 3 + 1 + engine.RUNTIME_GIB
    monkeypatch.setattr(engine, "cpu_flags", lambda: {"avx2", "avx512_bf16"})
    assert engine.needed_gib(cpu, tmp_path) == 3 + 1 + engine.RUNTIME_GIB


def test_a_gpus_engine_builds_no_sampler(gpu: Settings) -> None:
    assert engine.engine_env(gpu)["VLLM_USE_FLASHINFER_SAMPLER"] == "0"


@pytest.fixture(scope="module")
def compiler() -> ProcessCompiler:
    """One that gives a second of a core to each, with the vocabulary of the workbook's model."""
    tokens = AutoTokenizer.from_pretrained(model_path(load_settings()))
    return ProcessCompiler(xgrammar.TokenizerInfo.from_huggingface(tokens), seconds=1.0)


RULES = "\n".join(f'r{n} ::= [^a]* r{(n + 1) % 32} | [a-z] r{n * 7 % 32} | ""' for n in range(32))
DEAR = {
    "rules that lead to each other": ("compile_grammar", f"root ::= r0\n{RULES}"),
    "a grammar of 2,000 characters": ("compile_grammar", "root ::= " + "[^a] " * 2000),
    "a regex of 2,000 characters": ("compile_regex", "." * 2000),
    "a regex of 500 repetitions": ("compile_regex", ".*" * 500),
}


@pytest.mark.parametrize("name", DEAR)
def test_a_dear_constraint_is_given_up_and_holds_up_no_other(
    name: str, compiler: ProcessCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(psutil.Process().children())
    method, text = DEAR[name]
    limits.check(Limits(), **{method.removeprefix("compile_"): text})  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as pool:
        dear = [pool.submit(getattr(compiler, method), text) for _ in range(2)]
        assert compiler.compile_json_schema(json.dumps({"const": name})).memory_size_bytes
        assert not any(each.done() for each in dear), "the other was compiled beside them"
        for each in dear:
            with pytest.raises(TooDear, match=r"more than 1\.0 s of a core"):
                each.result()
    monkeypatch.delattr(os, "fork")
    frames: set[int] = set()
    for _ in range(3):
        with pytest.raises(TooDear) as caught:
            getattr(compiler, method)(text)
        frames.add(len(caught.traceback))
    assert len(frames) == 1, "who is refused leaves nothing behind"
    assert set(psutil.Process().children()) <= others, "nothing compiles on"


BEHIND = "(.{1,30}[.,]?){1,6}"


@pytest.mark.parametrize(
    "regex",
    [
        "(.{0,16}.{0,16}){0,8}",
        "(.{1,30}[.,]?){1,8}",
        "qzxjkvw" * 57 + BEHIND,
        "qzxjkvw" * 57 + "(é|è)" + BEHIND,
        "[ab]" * 120 + BEHIND,
    ],
    ids=["ambiguous", "a few words", "behind what is certain", "behind half a character", "behind what is cheap"],
)
def test_what_would_be_dear_for_each_token_is_given_up(regex: str, compiler: ProcessCompiler) -> None:
    """It is short, within every limit, and compiled in no time; the engine would stand still at each token."""
    limits.check(Limits(), regex=regex)
    with pytest.raises(TooDear, match="2 s of a core for 256 tokens"):
        compiler.compile_regex(regex)
    assert compiler.compile_regex("[a-z]{1,64}@[a-z]{1,16}").memory_size_bytes


PIECES = st.sampled_from(["a", ".", "[^a]", "[a-z]", r"\d", "(ab|c)", "(.|a)", "(a*)"])
REGEXES = st.lists(st.tuples(PIECES, st.sampled_from(["", "*", "+", "?"])), min_size=1, max_size=60).map(
    lambda pieces: "".join(map("".join, pieces))
)
ELEMENTS = st.sampled_from(["r0", "r1", "r2", "r3", "[^a]*", "[a-z]", '"b"', '""', "(r1 | r2)?"])
ALTERNATIVES = st.lists(st.lists(ELEMENTS, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=4)
GRAMMARS = st.lists(ALTERNATIVES.map(" | ".join), min_size=4, max_size=4).map(
    lambda rules: "\n".join(["root ::= r0", *(f"r{at} ::= {rule}" for at, rule in enumerate(rules))])
)


@given(regex=REGEXES, grammar=GRAMMARS)
@hypothesis_settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_compiled_comes_to_an_end(compiler: ProcessCompiler, regex: str, grammar: str) -> None:
    """It is compiled, too dear, or wrong: no compiler crashes or goes on."""
    others = set(psutil.Process().children())
    brief = ProcessCompiler(compiler.vocabulary, seconds=0.2)
    for compile_it, text in ((brief.compile_regex, regex), (brief.compile_grammar, grammar)):
        with suppress(ValueError):
            assert xgrammar.GrammarMatcher(compile_it(text))
    assert set(psutil.Process().children()) <= others


def test_a_compiler_that_cannot_be_begun_leaves_nothing_open(
    compiler: ProcessCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise BlockingIOError

    before = held_open("pipe:")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", refuse)
        with pytest.raises(BlockingIOError):
            compiler.compile_regex("not begun")
    assert held_open("pipe:") == before
    assert compiler.compile_regex("not begun"), "another try is made"


def test_a_compiler_that_is_ended_from_outside_is_begun_once_more(
    compiler: ProcessCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, ends = os.fork, 0

    def fork_and_end() -> int:
        nonlocal ends
        ends -= 1
        if child := fork():
            return child
        if ends >= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    monkeypatch.setattr(os, "fork", fork_and_end)
    ends = 1
    assert compiler.compile_regex("ended once")
    ends = 2
    with pytest.raises(BrokenOffError, match="SIGKILL"):
        compiler.compile_regex("ended twice")
    assert compiler.compile_regex("ended twice"), "it was not its fault, and is not remembered"


def test_what_is_compiled_elsewhere_is_the_same(compiler: ProcessCompiler) -> None:
    for method, text in (("compile_regex", "(19|20)[0-9]{2}"), ("compile_grammar", 'root ::= "a" | "b" root')):
        here = getattr(compiler.compiler, method)(text)
        there = getattr(compiler, method)(text)
        assert there.serialize_json() == here.serialize_json()
        assert getattr(compiler, method)(text) is there, "remembered"
    with pytest.raises(ValueError, match="EBNF parser error"):
        compiler.compile_grammar("root ::=")


@pytest.mark.parametrize(
    ("plugins", "searched"),
    [(None, False), (f"{PLUGIN},lora_filesystem_resolver", False), ("lora_filesystem_resolver", True)],
)
def test_nothing_is_searched_for_garbage_until_the_engine_is_built(
    tmp_path: Path, plugins: str | None, searched: bool
) -> None:
    """And the module that is run is `__main__`, with its own words, for those too whom multiprocessing starts."""
    (tmp_path / "holder.py").write_text(HOLDER)
    command = [*WITH_ENGINE, "holder", "serve", "--port"]
    assert PLUGIN in entry_points(group="vllm.general_plugins").names
    env = os.environ | {"PYTHONPATH": "."} | ({"VLLM_PLUGINS": plugins} if plugins else {})
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.stdout == f"holder ['serve', '--port'] {searched} True\nchild True\n", done.stderr


HOLDER = """
import gc, multiprocessing, sys, types

def child():
    print("child", gc.isenabled(), flush=True)

if __name__ == "__main__":
    print(__spec__.name, sys.argv[1:], gc.isenabled(), end=" ")
    platform = types.SimpleNamespace(is_cpu=lambda: True)
    sys.modules["vllm"] = types.ModuleType("vllm")
    sys.modules["vllm.platforms"] = types.SimpleNamespace(current_platform=platform)
    from servebook.engine.faster_start import register
    register()
    print(gc.isenabled(), flush=True)
    spawned = multiprocessing.get_context("spawn").Process(target=child)
    spawned.start()
    spawned.join()
"""


FORK = """
import asyncio, gc, os, signal, sys, types
from servebook.engine.faster_start import METHOD, register

class CpuPlatform:
    @classmethod
    def check_and_update_config(cls, config):
        os.environ[METHOD] = "spawn"

def config(endpoint, workers):
    observability = types.SimpleNamespace(otlp_traces_endpoint=endpoint)
    parallel = types.SimpleNamespace(world_size_across_dp=int(workers))
    return types.SimpleNamespace(observability_config=observability, parallel_config=parallel)

for name in ("vllm", "vllm.platforms", "vllm.platforms.cpu"):
    sys.modules[name] = types.SimpleNamespace(  # vLLM's own takes 8 s to import
        CpuPlatform=CpuPlatform, current_platform=types.SimpleNamespace(is_cpu=lambda: device == "cpu")
    )
device, *asked = sys.argv[1:]
register()
if device == "cpu":
    CpuPlatform.check_and_update_config(config(*asked))

async def server():
    heard = []
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, heard.append, "SIGTERM")
    if not os.fork():
        gc.unfreeze()
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7 if gc.get_freeze_count() else 8))
        signal.raise_signal(signal.SIGTERM)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    for _ in range(3):  # it would be read from a socket by now
        await asyncio.sleep(0)
    print(os.environ.get(METHOD), status, heard, gc.get_freeze_count() > 1000)

asyncio.run(server())
"""


@pytest.mark.parametrize(
    ("device", "asked", "traces", "workers", "seen"),
    [
        ("cpu", "fork", "", "1", "fork 7 [] True"),
        ("cpu", "fork", "http://127.0.0.1:4317", "1", "spawn 7 [] True"),
        ("cpu", "fork", "", "2", "spawn 7 [] True"),
        ("cpu", "spawn", "", "1", "spawn 8 [] True"),
        ("gpu", None, "", "1", "None 8 [] True"),  # where vLLM forks by itself
    ],
)
def test_a_fork_is_kept_where_it_is_asked_for_and_its_signals_are_its_own(
    device: str, asked: str | None, traces: str, workers: str, seen: str
) -> None:
    """Status 7: vLLM's `gc.unfreeze` at its end changes nothing there."""
    env = {name: value for name, value in os.environ.items() if name != "VLLM_WORKER_MULTIPROC_METHOD"}
    if asked:
        env["VLLM_WORKER_MULTIPROC_METHOD"] = asked
    words = [sys.executable, "-c", FORK, device, traces, workers]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == seen, done.stderr


ENDS = """
import atexit, gc, multiprocessing, sys, types

platform = types.SimpleNamespace(is_cpu=lambda: sys.argv[1] == "cpu")
sys.modules["vllm"] = types.ModuleType("vllm")
sys.modules["vllm.platforms"] = types.SimpleNamespace(current_platform=platform)

def process(name):
    atexit.register(lambda: print(name, gc.get_freeze_count() > 1000))  # the last of all
    from servebook.engine.faster_start import register
    register()
    gc.unfreeze()
    print(name, gc.get_freeze_count() > 1000)

def core():
    process("core")
    atexit._run_exitfuncs()  # as at the end of a process that is no fork

child = multiprocessing.get_context("fork").Process(target=core)
child.start()
child.join()
process("server")
"""


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_only_a_cpus_engine_ends_without_a_search_for_garbage(device: str) -> None:
    """True: all that is there is exempt from it; once vLLM has asked for it, and once Python is about to."""
    env = os.environ | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    done = subprocess.run([sys.executable, "-uc", ENDS, device], env=env, capture_output=True, text=True)
    exempt = device == "cpu"
    seen = [f"core {exempt}", f"core {exempt}", "server False", "server False"]
    assert done.stdout.splitlines() == seen, done.stderr


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "forked"),
    [
        pytest.param(name, forked, marks=pytest.mark.needs(name))
        for forked, names in ((True, ("vllm", "vllm-rs", "grpc", "vllm-grpc", "kserve")), (False, ("triton",)))
        for name in names
    ],
)
def test_a_server_is_forked_where_grpcs_threads_come_later(
    name: str, forked: bool, settings: Settings, server_of: Callable[[str], Server]
) -> None:
    if settings.on_gpu:
        pytest.skip("on a GPU that is vLLM's own affair")
    family = psutil.Process(server_of(name).pid).children(recursive=True)
    assert [child for child in family if child.name().startswith(engine.ENGINE_TITLES)]
    assert any(is_tracker(child.pid) for child in family) != forked, "beside a spawned engine is a resource tracker"


@pytest.fixture(scope="module")
def norms() -> Any:
    from vllm import ir
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    if not current_platform.is_cpu():
        pytest.skip("vLLM's build for GPUs has norms of its own: nothing is registered there")
    load_general_plugins()
    return ir.ops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 576), (7, 3, 64)])
def test_vllms_own_norm_is_the_same_norm(norms: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, *shape, dtype=dtype)
    weight = torch.randn(shape[-1], dtype=dtype)
    for norm, args in ((norms.rms_norm, (x, weight, 1e-5)), (norms.fused_add_rms_norm, (x, residual, weight, 1e-5))):
        with norm.set_priority([faster_cpu.OURS, "native"]):
            assert norm.dispatch(*args).provider == faster_cpu.OURS
            ours = norm(*args)
        with norm.set_priority(["native"]):
            torch.testing.assert_close(ours, norm(*args), **norm.get_tolerance(dtype))


def test_a_norm_that_vllms_own_would_read_wrongly_is_torchs(norms: Any) -> None:
    x, weight = torch.randn(4, 64), torch.randn(64)
    with norms.rms_norm.set_priority([faster_cpu.OURS, "native"]):
        for args in (
            (torch.randn(4, 128)[:, :64], weight, 1e-5),  # a part of each row, as queries and keys of some models are
            (torch.randn(4, 63), torch.randn(63), 1e-5),
            (x, weight.double(), 1e-5),
            (x.bfloat16(), weight, 1e-5),
            (x, weight, 1e-5, 32),
        ):
            assert norms.rms_norm.dispatch(*args).provider == "native"
        assert norms.rms_norm.dispatch(x, weight, 1e-5).provider == faster_cpu.OURS


@pytest.mark.parametrize(("mode", "first"), [("NONE", faster_cpu.OURS), ("VLLM_COMPILE", "native")])
def test_what_is_compiled_keeps_torchs_norm(norms: Any, mode: str, first: str) -> None:
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    config = SimpleNamespace(compilation_config=SimpleNamespace(mode=CompilationMode[mode]))
    priority = CpuPlatform.get_default_ir_op_priority(config)
    assert (priority.rms_norm[0], priority.fused_add_rms_norm[0]) == (first, first)
    assert priority.gelu_and_mul_sparse == ["native"]


def test_memory_that_is_zero_because_it_is_new() -> None:
    size = 2**26
    used = psutil.Process().memory_info().rss
    with faster_cpu.NewMemory():
        cache = torch.zeros(size, dtype=torch.int8, device=torch.device("cpu"))
        others = [torch.zeros(3, 2), torch.zeros(0, dtype=torch.int8), torch.zeros(4, dtype=torch.int8, device="meta")]
    assert psutil.Process().memory_info().rss - used < size / 2
    assert (cache.shape, cache.dtype, cache.data_ptr() % 4096) == ((size,), torch.int8, 0)
    cache[:: 2**12] += 1
    assert cache.sum() == size / 2**12, "elsewhere it is zero"
    assert [tensor.shape for tensor in others] == [(3, 2), (0,), (4,)]
    assert others[-1].is_meta


def test_vllm_is_told_of_the_plugins() -> None:
    names = {point.value for point in entry_points(group="vllm.general_plugins")}
    ours = {f"servebook.engine.{plugin}:register" for plugin in ("quiet_compiler", "faster_start", "faster_cpu")}
    assert names >= ours, "`make setup` tells vLLM of them"
