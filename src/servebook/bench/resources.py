"""CPU seconds and memory of a server's process tree, its engine apart, and of this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from pydantic import BaseModel, Field

from servebook.bench.load import BenchError
from servebook.engine.arguments import ENGINE_TITLES

ENGINE_NAME = ENGINE_TITLES[0][:15]
"""Linux keeps 15 characters of a process's name; psutil adds the rest where this user may read the command line."""


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

    A pid of None is a server that runs elsewhere: then nothing is known of any. A helper that ends counts with what it
    had spent when it was last read.

    Raises:
        BenchError: a server has ended; from every method, too.
    """

    def __init__(self, *pids: int | None) -> None:
        self.front: list[psutil.Process] = []
        self.engine: list[psutil.Process] = []
        self.known = None not in pids
        self.roots = [pid for pid in pids if pid is not None]
        self.spent: dict[int, float] = {}
        for pid in self.roots:
            with self.helpers_may_end(pid):
                root = psutil.Process(pid)
                for process in [root, *root.children(recursive=True)]:
                    with self.helpers_may_end(process.pid):
                        if process.status() != psutil.STATUS_ZOMBIE:
                            (self.engine if is_engine(process) else self.front).append(process)

    def cpu(self) -> CpuSeconds:
        """CPU seconds spent so far; subtract an earlier reading."""
        return CpuSeconds(
            front=self._cpu(self.front) if self.known else None,
            engine=self._cpu(self.engine) if self.known else None,
            client=time.process_time(),
        )

    def by_process(self) -> list[float]:
        """CPU seconds spent so far by each process outside of the engine."""
        return [self._cpu([process]) for process in self.front]

    def memory_mib(self) -> float | None:
        """Memory in MiB as PSS: a page that n processes share counts as 1/n in each."""
        if not self.known:
            return None
        pss = 0
        for process in [*self.front, *self.engine]:
            with self.helpers_may_end(process.pid):
                pss += process.memory_full_info().pss
        return pss / 2**20

    def _cpu(self, processes: list[psutil.Process]) -> float:
        """By each process's own clock, to the nanosecond: /proc counts hundredths of a second, in which a front writes
        many tokens. The clock's number is made of the pid (MAKE_PROCESS_CPUCLOCK in Linux' `posix-timers_types.h`)."""
        for pid in (process.pid for process in processes):
            with self.helpers_may_end(pid):
                self.spent[pid] = time.clock_gettime(~pid << 3 | 2)
        return sum(self.spent.get(process.pid, 0.0) for process in processes)

    @contextmanager
    def helpers_may_end(self, pid: int) -> Iterator[None]:
        """What is asked of one process is left out where that is no more; of a server's first process it is an error.

        Raises:
            BenchError: a server has ended.
        """
        try:
            yield
        except (psutil.NoSuchProcess, OSError):  # of psutil, and of the clock
            if pid in self.roots or any(pid == process.pid for process in self.engine):
                raise BenchError(
                    f"A server that was measured has ended (process {pid}).",
                    "See its log (`servebook logs NAME`), and start again.",
                ) from None


def is_engine(process: psutil.Process) -> bool:
    """Whether it is one of vLLM's engine processes."""
    try:
        return " ".join(process.cmdline()).startswith(ENGINE_TITLES)
    except psutil.NoSuchProcess:
        return False


def engines_up() -> int:
    """How many engines are in memory on this machine, whoever started them."""
    return sum((process.info["name"] or "").startswith(ENGINE_NAME) for process in psutil.process_iter(["name"]))
