"""CPU seconds and memory of a server's process tree, its engine apart, and of this process."""

from __future__ import annotations

import time

import psutil
from pydantic import BaseModel, Field

from servebook.engine.arguments import ENGINE_TITLES


class CpuSeconds(BaseModel):
    """CPU time spent, in seconds, user and system."""

    front: float | None = Field(description="The server without its engine: protocol, tokenizer, detokenizer.")
    engine: float | None = Field(description="EngineCore, with the model in it; 0 where the server has none.")
    client: float = Field(description="The load generator.")

    def per_1000(self, tokens: int) -> CpuSeconds:
        """The same per 1,000 tokens."""
        scale = 1000 / tokens
        return CpuSeconds(
            front=None if self.front is None else self.front * scale,
            engine=None if self.engine is None else self.engine * scale,
            client=self.client * scale,
        )

    def __sub__(self, earlier: CpuSeconds) -> CpuSeconds:
        return CpuSeconds(
            front=None if self.front is None or earlier.front is None else self.front - earlier.front,
            engine=None if self.engine is None or earlier.engine is None else self.engine - earlier.engine,
            client=self.client - earlier.client,
        )


class ProcessTree:
    """The processes of a server, and of those that it stands in front of, found once.

    A pid of None is a server that runs elsewhere: then nothing is known of any.
    """

    def __init__(self, *pids: int | None) -> None:
        self.front: list[psutil.Process] = []
        self.engine: list[psutil.Process] = []
        self.known = None not in pids
        for root in (psutil.Process(pid) for pid in pids if pid is not None):
            for process in [root, *root.children(recursive=True)]:
                if process.status() != psutil.STATUS_ZOMBIE:
                    (self.engine if is_engine(process) else self.front).append(process)

    def cpu(self) -> CpuSeconds:
        """CPU seconds spent so far; subtract an earlier reading."""
        return CpuSeconds(
            front=_cpu(self.front) if self.known else None,
            engine=_cpu(self.engine) if self.known else None,
            client=time.process_time(),
        )

    def by_process(self) -> list[float]:
        """CPU seconds spent so far by each process outside of the engine."""
        return [_cpu([process]) for process in self.front]

    def memory_mib(self) -> float | None:
        """Memory in MiB as PSS: a page that n processes share counts as 1/n in each."""
        if not self.known:
            return None
        return float(sum(process.memory_full_info().pss for process in [*self.front, *self.engine]) / 2**20)


def is_engine(process: psutil.Process) -> bool:
    """Whether it is one of vLLM's engine processes."""
    try:
        return " ".join(process.cmdline()).startswith(ENGINE_TITLES)
    except psutil.NoSuchProcess:
        return False


def engines_up() -> int:
    """How many engines are in memory on this machine, whoever started them."""
    return sum(process.name().startswith("VLLM::EngineCor") for process in psutil.process_iter(["name"]))


def _cpu(processes: list[psutil.Process]) -> float:
    """By each process's own clock, to the nanosecond: /proc counts hundredths of a second, in which a front writes many
    tokens. The clock's number is made of the pid (MAKE_PROCESS_CPUCLOCK in Linux' `posix-timers_types.h`)."""
    return float(sum(time.clock_gettime(~process.pid << 3 | 2) for process in processes))
