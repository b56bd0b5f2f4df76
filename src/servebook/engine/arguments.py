"""How this workbook runs a vLLM engine: arguments, environment and memory, chosen in this one place."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from servebook.engine.gpu import GIB, cards
from servebook.errors import ModelError
from servebook.settings import Settings

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

RUNTIME_GIB = 1.4
"""Memory of a server and its engine beyond weights and KV cache (measured: 1.2 to 1.3 GiB on CPU)."""
HOST_GIB = 2.7
"""Memory of the machine for a server with its engine on a GPU, whatever the model (measured with the bundled one: 2.5
to 2.6 GiB)."""
GPU_RUNTIME_GIB = 1.5
"""GPU memory beyond weights and KV cache: CUDA's context, kernels, graphs and activations (measured with the bundled
model: 1.0 GiB on one H100, 1.05 to 1.45 on one H200)."""
GPU_ACTIVATIONS = 0.1
"""What a larger model's activations add to that, for each byte of its weights: an estimate, not measured yet."""
GRAPHS = '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}'
"""On a GPU the steps are captured as CUDA graphs, and nothing is compiled by torch.compile. Measured with the bundled
model on one H100, tokens/s for 1 / 32 / 64 callers: 444 / 8,002 / 13,411, eager 66 / 1,916 / 3,335. Ready after 55 s
the first time on the machine and 30 s from then on, eager 28 s; on an H200 torch.compile alone had taken 22 s."""
SEQUENCES, BATCHED_TOKENS = 256, 2048
"""Of one step on a GPU. vLLM's own defaults depend on the card and on the kind of server; memory and the comparison of
servers must depend on neither."""
KEEP_ALIVE_SECONDS = 120
"""How long an HTTP server leaves an idle connection open: longer than its clients do (httpx 5 s, aiohttp 15, nginx 60,
Go and Rust's reqwest 90). Where the server closes first, a request may be on its way just then and is lost with the
connection; and a POST must not simply be sent again. uvicorn, and with it vLLM, has 5 s by itself, as httpx has."""


ENGINE_TITLES = ("VLLM::EngineCore", "VLLM::Worker")
"""The titles that vLLM gives to the processes of its engine; workers only where it uses several GPUs, or is told to."""
CORE_GIB = 2.1
"""EngineCore with the workbook's own model on a CPU, when all of its KV cache has been used (measured)."""
LARGE = 128 * 2**20
"""Bytes of unused memory in one piece that is a cache: what malloc keeps for each thread is half of it."""
CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where the kernel has its control groups, and in which of them this process is, a line `number:controllers:path`
each; of the newer layout there is one, without controllers."""
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}
"""A processor with one of these computes in bfloat16. The others, most laptops among them, only emulate it."""


def cpu_name() -> str:
    """This machine's processor as the kernel calls it; its architecture where the kernel has no name for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cpu_flags() -> set[str]:
    """What this machine's processor can do, in Linux' words, such as "avx2"."""
    match = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return set(match[1].split()) if match else set()


def engine_argv(settings: Settings, model: Path) -> list[str]:
    """vLLM's engine arguments as command-line words; `SERVEBOOK_ENGINE_ARGS` comes last and wins.

    On CPU, eager mode: compiling costs about 80 s at start and gains nothing at this model's size. And float32
    where bfloat16 would be emulated: measured on 2 cores with AVX2, tokens/s at 1, 4, 16 and 32 requests were 13,
    41, 114 and 167 instead of 14, 27, 39 and 42.

    One backend for structured outputs. With "auto", vLLM's default, the first request chooses it for all that follow:
    whether `\\p{L}+` is served depends on who came before. xgrammar compiles beside the engine, and then costs a token
    some milliseconds at most (what would cost more is refused: `quiet_compiler`); guidance takes up to 10 s for one
    token of `(a{1000}){1000}`, in the engine's own loop.
    """
    return [
        *("--model", str(model)),
        *("--served-model-name", settings.model_name),
        *("--max-model-len", str(settings.max_model_len)),
        *("--kv-cache-memory-bytes", str(round(settings.kv_cache_gib * GIB))),
        *("--structured-outputs-config", '{"backend": "xgrammar"}'),
        *(_gpu_words(settings, model) if settings.on_gpu else ["--enforce-eager"]),
        *(["--dtype", "float32"] if in_float32(settings) else []),
        *shlex.split(settings.engine_args),
    ]


def _gpu_words(settings: Settings, model: Path) -> list[str]:
    """What an engine on a GPU is told besides: graphs, the size of its steps, and its part of the card.

    vLLM does not start unless `--gpu-memory-utilization` (by default 0.92) of the whole card is free, also where
    `--kv-cache-memory-bytes` sets what it will take (`vllm/v1/worker/utils.py`, `request_memory`).
    """
    share = gpu_share(settings, model)
    return [
        *("--compilation-config", GRAPHS),
        *("--max-num-seqs", str(SEQUENCES), "--max-num-batched-tokens", str(BATCHED_TOKENS)),
        "--no-enable-flashinfer-autotune",  # else at each start where nvcc is, though no kernel of it is used
        *(["--gpu-memory-utilization", str(share)] if share else []),
    ]


def gpu_share(settings: Settings, model: Path) -> float | None:
    """The part of the GPU that an engine for `model` needs; None where there is no GPU."""
    return next((card.share(gpu_gib(settings, model)) for card in cards()), None)


def in_float32(settings: Settings) -> bool:
    """Whether the engine computes in float32, whatever the weights are stored in."""
    return not settings.on_gpu and not cpu_flags() & BFLOAT16_FLAGS


def engine_args(argv: list[str]) -> AsyncEngineArgs:
    """The same words as vLLM's own parser reads them, for servers that hold an `AsyncLLM` themselves."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(argv))


def engine_env(settings: Settings) -> dict[str, str]:
    """The environment of every process that holds an engine."""
    env = {
        "HF_HUB_OFFLINE": "1",  # the model is a local folder by now
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": str(settings.cache_dir / "vllm"),
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS),
        "PYTHONUNBUFFERED": "1",
        # vLLM's gRPC server would first visit some fifty shapes of GPU kernels, for minutes on a CPU.
        "SMG_VLLM_SERVICER_WARMUP": "off",
    }
    if settings.on_gpu:
        return env | {
            # FlashInfer's sampler is built by nvcc at the first start: 97 s, and a CUDA toolkit. vLLM's own is there.
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML counts, by which the memory is reckoned
        }
    # The model runs in EngineCore itself. In a process of its own, vLLM's default on a CPU, it takes a third longer to
    # start and 0.6 GB more, and EngineCore polls that process at full speed.
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(_threads(settings))}
    env["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # faster_start.py
    if not _compiles(settings):
        # Else vLLM compiles a line of the sampler for the first request with `logprobs`: for seconds, in which nobody
        # gets a token, and on a machine without a C++ compiler that request is the end of the engine.
        env["TORCHDYNAMO_DISABLE"] = "1"
    # All but the KV cache in pages of 2 MB, where the kernel has them: a start has 0.1 million page faults and not 0.5,
    # and a fork has a fortieth of the pages to note. With small pages the first of two engines was 4 % slower than the
    # second (2 cores, Intel Xeon), which no comparison of servers could bear.
    env["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    openmp = Path(sys.prefix) / "lib/libiomp5.so"
    if openmp.is_file() and ":" not in str(openmp):  # with which the loader ends a name, and there is no way around
        # A thread waits 1 ms for the next layer's work and then sleeps. One that spins on holds up the layer that waits
        # for it whenever another program has its core, and one that sleeps at once has to be woken for each layer.
        # Measured on 2 cores, tokens/s alone and beside a busy loop: 30 and 20; spinning 30 and 12, sleeping 20 and 20.
        env |= {"LD_PRELOAD": str(openmp), "KMP_BLOCKTIME": "1"}
        if " " in str(openmp):  # where LD_PRELOAD ends a name
            folders = [str(openmp.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
            env |= {"LD_PRELOAD": openmp.name, "LD_LIBRARY_PATH": ":".join(folders)}
        if settings.cores:
            env["KMP_AFFINITY"] = f"granularity=fine,explicit,proclist=[{settings.cores}]"
    else:
        env["OMP_WAIT_POLICY"] = "passive"
    return env


def _compiles(settings: Settings) -> bool:
    """Whether an engine on a CPU compiles: SERVEBOOK_ENGINE_ARGS takes back what prevents it."""
    return any(word.replace("_", "-").startswith("--no-enforce-e") for word in shlex.split(settings.engine_args))


def _threads(settings: Settings) -> int:
    """How many threads the engine computes with: on few cores all, on more one a core, and a core for the server.

    Whoever sets OpenMP's own variable knows better: beside other work a second thread makes an engine slower, since the
    first waits for it at each layer. Measured on 2 busy cores (Intel Xeon), tokens/s and ms of a core for one: 9 and 60
    with two threads, 24 and 42 with one.
    """
    if settings.cores:
        return len(settings.cores.split(","))
    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(given):
        return int(given)
    logical = len(os.sched_getaffinity(0))
    if (quota := cpu_quota()) is not None and quota < logical:
        # Threads that share less than a core each are stopped together: measured at half a core, two wrote 15 tokens/s
        # and one 25.
        return max(1, int(quota))
    return logical if logical <= 2 else max(2, min(logical, psutil.cpu_count(logical=False) or logical) - 1)


def control_groups(cgroups: Path, controller: str = "") -> Iterator[Path]:
    """The folders below `cgroups` with the limits on this process: of its control group, and of each around that one.

    In a container that is mostly the root. A user's slice, which JupyterHub may start a server in, and a batch system's
    job lie deeper. In the older layout each `controller` has folders of its own.
    """
    own = Path("/")
    with suppress(OSError, ValueError):  # or a name that is no text
        for line in MEMBERSHIP.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                own = Path(path)
    for group in (own, *own.parents):
        yield cgroups / controller / group.relative_to("/")


def cpu_quota(cgroups: Path = CGROUPS) -> float | None:
    """The cores' worth of time that a container, slice or job may use, such as 0.5; None where there is no limit."""
    found = []
    for controller, *files in (("", "cpu.max"), ("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")):
        for group in control_groups(cgroups, controller):
            try:
                quota, period = (int(word) for file in files for word in (group / file).read_text().split())
            except (OSError, ValueError):  # no such controller, or "max"
                continue
            if quota > 0:
                found.append(quota / period)
    return min(found, default=None)


def available_gib(cgroups: Path = CGROUPS) -> float:
    """Memory that a new process can have, in GiB: the machine's, or that of a container, slice or job if it is less.

    What running engines have not used yet of their KV caches is theirs.
    """
    left = [psutil.virtual_memory().available - promised_bytes()]
    left += [limit - used - promised_bytes(inside(group)) for limit, used, group in memory_limits(cgroups)]
    return max(0, min(left)) / GIB


def total_gib(cgroups: Path = CGROUPS) -> float:
    """Memory that all processes here can have together, in GiB, by the same limits."""
    return min([psutil.virtual_memory().total, *(limit for limit, _, _ in memory_limits(cgroups))]) / GIB


def memory_limits(cgroups: Path) -> Iterator[tuple[int, int, Path]]:
    """The limits on this process, what is taken of each, in bytes, and the folder of the group that has it.

    None that is more than the machine has, as it is in the older layout where none was set: to reckon with one takes a
    look at each process in its group.
    """
    machine = psutil.virtual_memory().total
    for controller, limit_file, usage_file, cache in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for group in control_groups(cgroups, controller):
            try:
                if (limit := int((group / limit_file).read_text())) >= machine:
                    continue
                used = int((group / usage_file).read_text())
                words = (group / "memory.stat").read_text().split()
                # A group's usage counts the files that it has read; those are given back when memory is asked for.
                yield limit, used - int(words[words.index(cache) + 1]), group
            except (OSError, ValueError):  # no such controller, or "max"
                continue


def inside(group: Path) -> Iterator[psutil.Process]:
    """The processes in a control group, and in those within it: a neighbour's engine takes nothing of its limit."""
    with suppress(OSError):  # a group has just ended
        for file in group.rglob("cgroup.procs"):
            with suppress(OSError):
                for pid in file.read_text().split():
                    with suppress(psutil.Error):
                        yield psutil.Process(int(pid))


def promised_bytes(processes: Iterable[psutil.Process] | None = None) -> int:
    """What engines on CPUs have been given for their KV caches and have not used yet (`faster_cpu.py`), in bytes.

    Without `processes` of all that run here. Of another user's engine one sees how much it has in all, and takes it for
    one with the workbook's own model.
    """
    promised = 0
    for process in psutil.process_iter() if processes is None else processes:
        with suppress(psutil.Error, ValueError):  # it has just ended, or changed meanwhile
            if process.name().startswith(ENGINE_TITLES):
                promised += _promised(process)
    return promised


def _promised(process: psutil.Process) -> int:
    try:
        maps = process.memory_maps(grouped=False)
    except (psutil.AccessDenied, AttributeError):  # another user's, or a kernel that tells nobody
        return max(0, int(CORE_GIB * GIB) - process.memory_info().rss)
    if any(each.path.startswith(("/dev/nvidia", "/dev/dxg")) for each in maps):  # its cache is there (dxg: in WSL 2)
        return 0
    unused = (each.size - each.rss for each in maps if each.path == "[anon]" and each.perms == "rw-p")
    return sum(size for size in unused if size > LARGE)


def needed_gib(settings: Settings, model: Path) -> float:
    """What an engine for `model` will take of the machine's memory, in GiB: weights, KV cache and the processes."""
    if settings.on_gpu:
        return HOST_GIB
    return weights_gib(model) * (2 if in_float32(settings) else 1) + settings.kv_cache_gib + RUNTIME_GIB


def gpu_gib(settings: Settings, model: Path) -> float:
    """What an engine for `model` will take of a GPU's memory, in GiB: weights, KV cache, runtime and activations."""
    return weights_gib(model) * (1 + GPU_ACTIVATIONS) + settings.kv_cache_gib + GPU_RUNTIME_GIB


def weights_gib(model: Path) -> float:
    """The model's weights at 16 bits each, in GiB: the size of its files, or of its shape where it has none.

    A folder without weights serves with `--load-format dummy`, to measure a shape's memory and speed.

    Raises:
        ModelError: it has no such files, and its `config.json` describes no language model.
    """
    if not os.access(model, os.R_OK | os.X_OK):  # not there, or not for this user: the model's check says so
        return 0.0
    if files := list(model.glob("*.safetensors")):
        return sum(file.stat().st_size for file in files) / GIB
    return _shape_gib(model) if (model / "config.json").is_file() else 0.0


@lru_cache
def _shape_gib(model: Path) -> float:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):  # shapes without memory
            shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    except Exception:  # whatever the file's content leads to in transformers
        raise ModelError(
            f"{model} has no *.safetensors, and its config.json describes no language model.",
            "Set SERVEBOOK_MODEL to a folder in Hugging Face's layout, or unset it for the bundled model.",
        ) from None
    return float(2 * sum(weight.numel() for weight in shape.parameters()) / GIB)


def has_room(settings: Settings, model: Path, engines: int) -> bool:
    """Whether memory is free for `engines` more: the machine's, and on a GPU the card's as well."""
    if settings.on_gpu and not any(card.free >= engines * gpu_gib(settings, model) * GIB for card in cards()[:1]):
        return False
    return available_gib() >= engines * needed_gib(settings, model)
