"""A whole run: which arms at which load, which servers that takes, and a result file that grows step by step."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic

from servebook import launch
from servebook.bench import workload
from servebook.bench.arms import (
    CONTROL_LIMIT,
    Comparison,
    Workload,
    compare_unhindered,
    judge_control,
    off_by,
    open_arm,
)
from servebook.bench.cost import fit_cost
from servebook.bench.crosscheck import cross_check
from servebook.bench.generators import BusyGenerator
from servebook.bench.load import MAX_CONCURRENCY, BenchError
from servebook.bench.paths import ServingPath, find_path
from servebook.bench.protocol import MERGING_RATE, SCRIPTED_RATE, scripted_instance, serve_scripted
from servebook.bench.results import Results, load_results, new_results, now, require_writable
from servebook.bench.tensors import SERVERS, SIZES, tensor_costs
from servebook.bench.wire import wire_cost
from servebook.launch import Server, find_server
from servebook.settings import Settings

Cell = tuple[str, int]
"""A path and how many callers it has at a time."""


@dataclass(frozen=True)
class Plan:
    """What to measure. The cells of one server stand together, so that it is started once.

    `own_control` gives the A/A control an engine of its own, as every other arm has one; else both of its
    arms are the same server. `merging` are cells of the protocol arm at a rate at which servers merge tokens.
    `workloads` is for steps that have another one than the rest, by the first word of their name. The workload's
    rounds decide how sure every cell is: with one caller, neighbouring blocks
    of one engine differed by 6 % (one standard deviation) on a quiet machine with two shared cores, so that a median
    is good to 3 % only after two dozen pairs. `rounds` is for steps that need more or fewer than the workload has, by
    their name or its first word: a control that is to show 3 %, and what nothing is claimed of.
    """

    name: str
    workload: Workload
    control: tuple[int, ...]
    engine: tuple[Cell, ...]
    protocol: tuple[Cell, ...] = ()
    merging: tuple[Cell, ...] = ()
    wire: tuple[str, ...] = ()
    tensors: tuple[int, ...] = ()
    cross_check: tuple[int, ...] = ()
    own_control: bool = False
    workloads: Mapping[str, Workload] = field(default_factory=dict)
    rounds: Mapping[str, int] = field(default_factory=dict)

    @property
    def steps(self) -> list[str]:
        """Their names, as `Results.done` has them."""
        return [
            *(f"control @{callers}" for callers in self.control),
            *(f"{path} @{callers}" for path, callers in self.engine),
            *(f"cross-check @{callers}" for callers in self.cross_check),
            *(f"wire {path}" for path in self.wire),
            *(f"scripted {path} @{callers}" for path, callers in self.protocol),
            *(f"merging {path} @{callers}" for path, callers in self.merging),
            *(f"tensors {server}" for server in SERVERS if self.tensors),
        ]

    def __len__(self) -> int:
        return len(self.steps)

    def without(self, done: Sequence[str]) -> list[str]:
        """Its steps that are not among those `done`."""
        return [step for step in self.steps if step not in done]

    def workload_of(self, step: str) -> Workload:
        """The workload, with as many rounds as this step has."""
        first = step.split()[0]
        wants = self.workloads.get(first, self.workload)
        rounds = self.rounds.get(step) or self.rounds.get(first, wants.rounds)
        return wants.model_copy(update={"rounds": rounds})


def cells(path: str, *concurrencies: int) -> tuple[Cell, ...]:
    """The same path under several loads."""
    return tuple((path, concurrency) for concurrency in concurrencies)


SCRIPTED_CALLERS = max(1, min(MAX_CONCURRENCY, round(500 / SCRIPTED_RATE)))
"""About 500 tokens a second through one server process."""

OTHER_FILE = "Name another file with --output, or remove this one."

CHECKED = 32
"""Requests of a cross-check, at least; six for each caller where that is more."""

STREAMING = ("grpc", "grpc-fronts", "triton", "vllm-grpc", "rust-sse", "rust-grpc", "kserve-sse", "gateway")

QUICK = Plan(
    name="quick",
    workload=Workload(rounds=1, max_tokens=32),
    control=(8,),
    engine=(*cells("rest", 8), *cells("gateway", 1, 16), *cells("grpc", 1, 16)),
)

FULL = Plan(
    name="full",
    workload=Workload(rounds=6, max_tokens=32),
    rounds={"control @1": 24, "control @32": 8}
    | dict.fromkeys(("rest", "gateway-article", "grpc-unary", "kserve-rest", "kserve-grpc", "kserve-sse"), 3)
    | dict.fromkeys(("vllm-grpc", "rust-sse", "rust-grpc"), 3),
    control=(1, 32),
    own_control=True,
    engine=(
        *cells("rest", 1, 32),
        *cells("gateway", 1, 32),
        *cells("gateway-article", 16),
        *cells("triton", 1, 8, 32),
        *cells("grpc", 1, 4, 16, 32, 64),
        *cells("grpc-unary", 8),
        *cells("kserve-sse", 1, 32),
        *cells("kserve-rest", 8),
        *cells("kserve-grpc", 8),
        *cells("vllm-grpc", 1, 8, 32),
        *cells("rust-sse", 1, 32),
        *cells("rust-grpc", 1, 32),
    ),
    protocol=tuple(cell for path in STREAMING for cell in cells(path, 1, 8, 32, 64)),
    merging=cells("grpc", 32),
    # Those that merge have answers long enough for it: of 16 tokens, the first and the last few never wait.
    workloads={"scripted": Workload(max_tokens=16), "merging": Workload(max_tokens=48)},
    wire=("sse", "sse-chat", *STREAMING),
    tensors=SIZES,
    cross_check=(1, 8, 32),
)


@dataclass
class Run:
    """A run that is going on: its servers, its results so far, and the person who watches."""

    plan: Plan
    settings: Settings
    results: Results
    output: Path
    force: bool = False
    say: Callable[[str], None] = print
    seeds: Iterator[int] = field(default_factory=workload.seeds)
    servers: dict[str, Server] = field(default_factory=dict)
    ours: set[str] = field(default_factory=set)
    step: int = 0

    async def all(self) -> Results:
        """Make every step that is not done yet. After each the file is whole: stop and resume whenever you like.

        Raises:
            BenchError: the control is off, and `force` was not asked for; its load generator would have measured
                itself; or every request of a block failed.
            LaunchError: a server cannot start.
        """
        try:
            await self.controls()
            await self.engines()
            await self.protocols()
            await self.merging()
            await self.tensors()
        finally:
            self.end_all()
        self.results.finished = now()
        self.results.save(self.output)
        return self.results

    async def controls(self) -> None:
        """vLLM's server against itself: what a ratio of exactly 1 looks like on this machine.

        With the scripted source where the plan has nothing else: no engine is started for its sake.
        """
        path = find_path("sse-chat" if self.plan.workload.turns > 1 else "sse")
        up = self.up if self.plan.engine else self.up_scripted
        own = self.plan.own_control and not self.settings.engine_url
        for concurrency in self.plan.control:
            name = f"control @{concurrency}"
            if self.skip(name):
                continue
            up(path)  # before the step, so that its time is the measurement's alone
            arm = self.up(path, instance="vllm-control") if own else None
            with self.measured(name):
                found = await self.compare(name, path, path, concurrency, up, arm)
                verdict = judge_control(found)
                if verdict == "undecided" and not own:
                    self.say(
                        f"  The control is off by {off_by(found):.1%}: these pairs do not tell a difference of that "
                        "size from chance. More --rounds do."
                    )
                elif verdict != "good" and not self.force:
                    raise BenchError(
                        f"The A/A control is off by {off_by(found):.1%}: the same server against itself must be within "
                        f"{CONTROL_LIMIT:.0%}. Nothing measured now would be worth much.",
                        "End what else runs on this machine and start again; or --force, and the results are marked "
                        f"as {verdict}.",
                    )
                self.results.control.append(found)
        self.end("vllm-control")

    async def engines(self) -> None:
        """Every path on a real engine, one server after the other."""
        wanted = [cell for cell in self.plan.engine if f"{cell[0]} @{cell[1]}" not in self.results.done]
        self.step += len(self.plan.engine) - len(wanted)
        for server, group in itertools.groupby(wanted, lambda cell: find_path(cell[0]).instance):
            for name, concurrency in group:
                await self.cell(self.results.engine, f"{name} @{concurrency}", find_path(name), concurrency, self.up)
            if server != "vllm":
                self.end(server)
        for concurrency in self.plan.cross_check:
            name = f"cross-check @{concurrency}"
            if not self.skip(name):
                server_there = self.up(find_path("sse"))
                with self.measured(name):
                    requests = max(CHECKED, 6 * concurrency)
                    found = await cross_check(server_there, self.plan.workload, concurrency, requests, next(self.seeds))
                    self.results.cross_check.append(found)
                    self.say(f"  ours / vllm bench serve: {found.tokens_per_s_ratio:.3f} tokens/s")
        self.end("gateway")
        self.end("vllm")

    async def protocols(self) -> None:
        """The protocol alone: the same servers around the scripted token source."""
        names = dict.fromkeys([*self.plan.wire, *(name for name, _ in self.plan.protocol)])
        paths = sorted(map(find_path, names), key=lambda path: path.server == "gateway")
        for server, group in itertools.groupby(paths, lambda path: path.instance):
            for path in group:
                await self.protocol(path)
            if server != "vllm":  # the reference of all
                self.end(scripted_instance(server))
        self.end(scripted_instance("vllm"))

    async def protocol(self, path: ServingPath) -> None:
        """Bytes and CPU of one path."""
        wire = f"wire {path.name}"
        if path.name in self.plan.wire and not self.skip(wire):
            with self.measured(wire):
                found = await wire_cost(path, self.up_scripted(path))
                self.results.wire.append(found)
                self.say(f"  {found.bytes_per_token:.0f} bytes a token")
                behind = self.behind(path, self.up_scripted)
                wants, seed = self.plan.workload, next(self.seeds)
                async with open_arm(path, self.up_scripted(path), wants, seed, behind) as arm:
                    self.results.costs.append(await fit_cost(arm, SCRIPTED_CALLERS))
                self.say(f"  {self.results.costs[-1]}")
        for _, concurrency in (cell for cell in self.plan.protocol if cell[0] == path.name):
            name = f"scripted {path.name} @{concurrency}"
            if not self.skip(name):
                await self.cell(self.results.protocol, name, path, concurrency, self.up_scripted)

    async def merging(self) -> None:
        """The protocol alone where tokens are so near that servers merge them: by sources of another rate."""
        up = partial(self.up_scripted, rate=MERGING_RATE)
        for path, concurrency in self.plan.merging:
            name = f"merging {path} @{concurrency}"
            if not self.skip(name):
                await self.cell(self.results.merging, name, find_path(path), concurrency, up)
        self.end_all()

    async def tensors(self) -> None:
        """Big tensors there and back."""
        for server in SERVERS if self.plan.tensors else ():
            name = f"tensors {server}"
            if not self.skip(name):
                with self.measured(name), interruptible():
                    self.results.tensors += list(tensor_costs(server, self.settings, self.plan.tensors))

    async def cell(
        self,
        found: list[Comparison],
        name: str,
        path: ServingPath,
        concurrency: int,
        up: Callable[[ServingPath], Server],
    ) -> None:
        """One step that adds a cell to `found`. Where the load generator would measure itself, it is left out and said
        so, and stays off the steps that are done: the others are worth no less for it."""
        against = find_path(path.against)
        for each in (path, against):
            up(each)  # before the step, so that its time is the measurement's alone
        try:
            with self.measured(name):
                found.append(await self.compare(name, path, against, concurrency, up))
        except BusyGenerator as busy:
            self.say(f"  left out: {busy}")

    async def compare(
        self,
        name: str,
        path: ServingPath,
        against: ServingPath,
        concurrency: int,
        up: Callable[[ServingPath], Server],
        arm: Server | None = None,
    ) -> Comparison:
        """One cell on the servers that `up` gives; the CPU of those behind a gateway counts as its own."""
        wants = self.plan.workload_of(name)
        async with (
            open_arm(path, arm or up(path), wants, next(self.seeds), self.behind(path, up)) as one,
            open_arm(against, up(against), wants, next(self.seeds), self.behind(against, up)) as other,
        ):
            found = await compare_unhindered(name, one, other, concurrency, wants, self.on_block)
        self.say(f"  tokens/s {found.tokens_per_s} · TTFT p50 {found.ttft_p50_ms.value:+.1f} ms")
        return found

    def behind(self, path: ServingPath, up: Callable[[ServingPath], Server]) -> list[Server]:
        """The servers behind a path's own: their CPU counts with it."""
        return [] if find_server(path.server).has_engine else [up(find_path("sse"))]

    def up(self, path: ServingPath, instance: str = "") -> Server:
        """The path's server, attached to or started; first the vLLM that it asks, to know whether that was up."""
        if not find_server(path.server).has_engine:
            self.up(find_path("sse"))

        def serve() -> Server:
            if instance:
                return launch.serve(path.server, instance=instance, settings=self.settings)
            return path.serve(self.settings)

        return self.keep(instance or path.instance, serve)

    def up_scripted(self, path: ServingPath, rate: float | None = None) -> Server:
        """The path's server around the scripted source, at the `rate` that `serve_scripted` has."""
        if not find_server(path.server).has_engine:
            self.up_scripted(find_path("sse"), rate)
        return self.keep(scripted_instance(path.instance, rate), lambda: serve_scripted(path, self.settings, rate))

    def keep(self, name: str, serve: Callable[[], Server]) -> Server:
        """Remember a server, and whether it was up before."""
        if name not in self.servers:
            up = {entry["name"] for entry in launch.status(self.settings) if entry["pid"] is not None}
            with interruptible():
                self.servers[name] = serve()
            if name not in up:
                self.ours.add(name)
        return self.servers[name]

    def end(self, name: str) -> None:
        """End a server that this run started; others stay up."""
        server = self.servers.pop(name, None)
        if server and name in self.ours:
            self.ours.discard(name)
            server.stop()

    def end_all(self) -> None:
        """End all of them."""
        for name in reversed(list(self.servers)):  # a gateway before its vLLM
            self.end(name)

    def skip(self, name: str) -> bool:
        """Whether this step was made before."""
        self.step += name in self.results.done
        return name in self.results.done

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Say what comes, and write it to the file when it is there."""
        self.step += 1
        self.say(f"[{self.step}/{len(self.plan)}] {name}")
        started = monotonic()
        yield
        self.results.seconds += monotonic() - started
        self.results.done.append(name)
        self.results.save(self.output)

    def on_block(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r  block {done} of {total} \r" if done < total else "\r" + " " * 20 + "\r")
            sys.stderr.flush()


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends at once what the event loop waits for here; asyncio's own handler would wait for the next `await`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


async def finished(plan: Plan, settings: Settings, output: Path) -> Results:
    """The run of this plan in `output`; made first, or to its end, where it is not there or not whole.

    Raises:
        BenchError: as `start`, but for a run of the same that has finished.
    """
    there = load_results(output) if await asyncio.to_thread(output.exists) else None
    if there and there.finished:
        require_same(there, empty_results(plan, settings), output)
        return there
    return await start(plan, settings, output).all()


def start(plan: Plan, settings: Settings, output: Path, force: bool = False) -> Run:
    """A new run, or the one in `output` where it left off.

    Raises:
        BenchError: `output` cannot be written, or holds a finished run, or one of another plan or machine.
    """
    require_writable(output)
    results = empty_results(plan, settings)
    if output.exists():
        there = load_results(output)
        if there.finished:
            raise BenchError(f"{output} holds a finished run.", OTHER_FILE)
        require_same(there, results, output)
        results = there
    return Run(plan, settings, results, output, force)


def empty_results(plan: Plan, settings: Settings) -> Results:
    """What a run of this plan begins with, on this machine."""
    device = "gpu" if settings.on_gpu else "cpu"
    return new_results(plan.name, settings.model_name, device, engine_args=settings.engine_args)


def require_same(kept: Results, new: Results, output: Path) -> None:
    """Require the run `kept` in `output` to be one of what `new` is for.

    Raises:
        BenchError: it is of another plan, model or machine.
    """
    for what in ("plan", "model", "engine_args", "scripted_rate"):
        there, here = getattr(kept, what), getattr(new, what)
        if there != here:
            raise BenchError(f"{output} holds a run with {what} {there!r}, and this one has {here!r}.", OTHER_FILE)
    if (kept.machine, kept.versions) != (new.machine, new.versions):
        raise BenchError(f"{output} holds a run of another machine, or of other versions.", OTHER_FILE)
