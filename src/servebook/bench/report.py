"""Turns stored results into tables: BENCHMARKS.md, and what a terminal shows at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from servebook.bench.arms import CONTROL_LIMIT, Comparison, off_by
from servebook.bench.load import BenchError
from servebook.bench.results import Results
from servebook.bench.stats import Estimate

Row = Sequence[str]
Rows = tuple[Row, list[Row]]


class Verdict(NamedTuple):
    """One thing that a chapter asks of its server, and what a run says about it."""

    claim: str
    measured: str
    answer: str


@dataclass(frozen=True)
class Claim:
    """Something asked: `read` finds its figure in a run (None: not measured), `bound` is where it must stay."""

    text: str
    read: Callable[[Results], Estimate | None]
    bound: float
    at_least: bool = True

    def judge(self, results: Results) -> Verdict:
        """Met, met within the noise (the interval holds the bound), missed, or not measured."""
        found = self.read(results)
        wanted = f"{self.text} {'≥' if self.at_least else '≤'} {self.bound:g}"
        if found is None:
            return Verdict(wanted, "–", "not measured")
        within = found.value >= self.bound if self.at_least else found.value <= self.bound
        near = found.high >= self.bound if self.at_least else found.low <= self.bound
        return Verdict(wanted, interval(found), "met" if within else "within noise" if near else "missed")


def cell(name: str, field: str, part: str = "engine") -> Callable[[Results], Estimate | None]:
    """Reads one estimate of the comparison called `name`."""

    def read(results: Results) -> Estimate | None:
        found: list[Comparison] = getattr(results, part)
        return next((getattr(each, field) for each in found if each.name == name), None)

    return read


def bytes_ratio(path: str, against: str) -> Callable[[Results], Estimate | None]:
    """Bytes per token of `path` / those of `against`; counted, not sampled, so without an interval."""

    def read(results: Results) -> Estimate | None:
        cost = {each.path: each.bytes_per_token for each in results.wire}
        if path not in cost or against not in cost:
            return None
        value = cost[path] / cost[against]
        return Estimate(value=value, low=value, high=value)

    return read


CLAIMS = (
    *(Claim(f"triton, tokens/s at {n}", cell(f"triton @{n}", "tokens_per_s"), 0.97) for n in (1, 8, 32)),
    *(Claim(f"grpc, tokens/s at {n}", cell(f"grpc @{n}", "tokens_per_s"), 1.0) for n in (1, 4, 16, 32)),
    *(Claim(f"grpc, TTFT p50 at {n}", cell(f"grpc @{n}", "ttft_p50"), 1.0, at_least=False) for n in (1, 4, 16, 32)),
    *(Claim(f"grpc, ITL p50 at {n}", cell(f"grpc @{n}", "itl_p50"), 1.0, at_least=False) for n in (1, 4, 16, 32)),
    Claim("grpc, bytes per token", bytes_ratio("grpc", "sse"), 0.2, at_least=False),
    Claim(
        "grpc, server CPU per token (scripted)", cell("scripted grpc @25", "front_cpu", "protocol"), 0.5, at_least=False
    ),
    Claim("gateway, TTFT p50 at 1, ms more", cell("gateway @1", "ttft_p50_ms"), 3.0, at_least=False),
    Claim("gateway, TTFT p50 at 32", cell("gateway @32", "ttft_p50"), 1.1, at_least=False),
    *(Claim(f"gateway, tokens/s at {n}", cell(f"gateway @{n}", "tokens_per_s"), 0.97) for n in (1, 32)),
    Claim("the article's gateway, tokens/s at 16", cell("gateway-article @16", "tokens_per_s"), 0.2, at_least=False),
)
"""What was asked of Triton, our own gRPC and the gateway before anything was measured: ratios to vLLM's own server."""


def interval(found: Estimate | None, digits: int = 2) -> str:
    """Value and 95 % interval; "–" where there is none."""
    if found is None:
        return "–"
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def verdict_table(results: Results) -> Rows:
    """Head and rows: every claim, judged by one run."""
    return ("asked", "measured", "verdict"), [claim.judge(results) for claim in CLAIMS]


def ratios(found: Iterable[Comparison]) -> Rows:
    """Head and rows of the table of ratios."""
    head = ("path", "against", "callers", "tokens/s", "ratio", "TTFT p50, ms", "difference, ms", "ITL p50, ms", "ratio")
    rows: list[Row] = []
    for each in found:
        arm, itl = each.arm.summary, each.arm.summary.itl_ms
        streams = each.itl_p50 is not None
        rows.append(
            (
                each.arm.path,
                each.reference.path,
                str(each.concurrency) if each.concurrency else f"{each.workload.rate:g}/s",
                f"{arm.tokens_per_s:.0f}",
                interval(each.tokens_per_s),
                f"{arm.ttft_ms.p50:.0f}" if streams else "–",
                interval(each.ttft_p50_ms, 1) if streams else "–",
                f"{itl.p50:.1f}" if itl else "–",
                interval(each.itl_p50),
            )
        )
    return head, rows


def protocol_costs(results: Results) -> Rows:
    """Head and rows of what each token costs outside of any engine."""
    bytes_of = {each.path: each for each in results.wire}
    costs: dict[str, tuple[float | None, float, str]] = {}
    for each in results.protocol:
        for side, ratio in ((each.reference, "1"), (each.arm, interval(each.front_cpu))):
            costs.setdefault(side.path, (side.cpu_per_1000.front, side.cpu_per_1000.client, ratio))
    head = ("path", "server CPU, µs a token", "ratio to vLLM's SSE", "client CPU, µs a token", "bytes a token")
    rows: list[Row] = []
    for path, (server, client, ratio) in costs.items():
        wire = f"{bytes_of[path].bytes_per_token:.0f}" if path in bytes_of else "–"
        rows.append((path, f"{server * 1e3:.0f}" if server else "–", ratio, f"{client * 1e3:.0f}", wire))
    return head, rows


def tensor_table(results: Results) -> Rows:
    """Head and rows: one row per server and encoding, one column per size, in milliseconds."""
    sizes = sorted({cost.tensor_bytes for cost in results.tensors})
    found = {(cost.server, cost.encoding, cost.tensor_bytes): cost.median_ms for cost in results.tensors}
    rows: list[Row] = []
    for server, encoding in dict.fromkeys((cost.server, cost.encoding) for cost in results.tensors):
        times = [found.get((server, encoding, size)) for size in sizes]
        rows.append((server, encoding, *("too slow" if ms is None else f"{ms:.3g}" for ms in times)))
    return ("server", "encoding", *map(size_name, sizes)), rows


def size_name(count: int) -> str:
    """1024 → "1 KiB"."""
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count // unit} {name}"
    return f"{count} B"


def markdown_table(head: Row, rows: Iterable[Row]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


INTRODUCTION = """\
# Benchmarks

Made by `servebook bench --report` from the results in `src/servebook/bench/stored/`; made anew on your machine by
`servebook bench --full --output mine.json`. Chapter 8 explains the method and the pictures.

**Method.** A closed loop of callers sends prompts that are never repeated, greedy, and asks for answers of mixed length
(32 tokens on average, in the same order for both arms). A path and the path of vLLM's own server that asks for the same
work are measured in interleaved blocks (ABBA, then BAAB), never both at a time, each on an engine of its own (the
gateway shares vLLM's). Ratios are medians over pairs of
neighbouring blocks; the interval in brackets is a 95 % bootstrap over these pairs. Tokens are counted from the server's
usage or from token ids, never from messages. An A/A control, two engines of vLLM's server against each other, voids the
run when it is off by more than 3 %. Server, engine and load generator share one machine. CPU is that of the server's
processes without EngineCore. The protocol arm puts a scripted token source (the same sentence over and over,
20 tokens a second for each stream) in the place of the engine, and nothing else is changed; bytes are counted there by
a TCP proxy, with all framing.
"""

PROFILE = """\
## Where the time goes

Measured by hand with `perf` and process times on 2 cores: 25 streams, the scripted source, long answers; µs of server
CPU per token.

| server | CPU | of which |
|---|---|---|
| vLLM's SSE | 81 | 14 in the kernel |
| our gRPC | 72 | 28 in the kernel; 50 by a bare `grpc.aio` server that writes ready bytes on the same timers |
| Triton | 323 | half in the kernel: a response wakes Triton through shared memory, and is acknowledged |

So half of SSE's CPU is out of reach for gRPC in Python with a message for each token, whatever its handler does: a
message costs a system call and two wake-ups, and that is most of it. (`grpclib`, which is Python throughout, came out
the same as a bare `grpc.aio` server.) What helps is fewer messages. With more than 8 open calls our server lets a
stream wait for up to 25 ms after a message, the longer the more calls are open, and vLLM merges the tokens that come
meanwhile; the first token and the last ones never wait. At 190 tokens a second for each stream, the pace of one H200,
on two cores that were busy with other work:

| callers | tokens a message | our gRPC, µs a token | vLLM's SSE | ratio |
|---|---|---|---|---|
| 8 | 1.0 | 203 | 207 | 0.98 |
| 16 | 1.9 | 127 | 201 | 0.63 |
| 32 | 3.2 | 89 | 179 | 0.50 |

(Of the 89, 36 are a request's: answers of 48 tokens.) The more time tokens take, the less there is to merge: at 60 a
second for each stream, 32 callers had 1.1 tokens a message and 1.08 of SSE's CPU, 64 had 1.9 and 0.80.

Triton's hop took, on cores that it shares with the engine, 7 % of the tokens per second at 8 streams and 14 % at 32, as
long as every token had a response of its own: that is what the run of 2026-11-22 has. Up to four tokens in a response
brought 0.97 [0.94, 0.99] of SSE's tokens per second at 8 streams and 0.96 [0.94, 0.99] at 32, for an ITL, which is
taken between messages, four times as long; and on an H200, whose tokens are 5 ms apart, ITL became 3.8 times SSE's.
Since then the backend spends 4 % of the cores on responses where the model runs on them too, and a stream waits for
0.1 s at most; beside a GPU none waits. What that gives was not measured yet, neither on a GPU nor on quiet cores.

That run had the model in a process beside EngineCore, vLLM's default on a CPU, which EngineCore polls; so each block
began after a pause of 1.2 s. Since then the model runs in EngineCore, and there is nothing to wait for.
"""


def markdown(runs: Sequence[Results]) -> str:
    """The whole of BENCHMARKS.md.

    Raises:
        BenchError: there is no run, or one is void.
    """
    if not runs:
        raise BenchError("There are no stored results.", "Make them with `servebook bench --full`.")
    if any(run.void for run in runs):
        raise BenchError("A stored run is void: its A/A control is off.", "Measure again on a quiet machine.")
    return "\n".join([INTRODUCTION, *(section(run) for run in runs), PROFILE])


def section(run: Results) -> str:
    """One run: machine, verdicts, tables."""
    machine = run.machine
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    engines = max((each.engines_up for each in run.engine), default=0)
    parts = [
        f"## {machine.cpu}, {machine.cores} cores, engine on {machine.device}",
        f"Model {run.model}; {run.started:%Y-%m-%d}, {run.seconds / 60:.0f} minutes; at most {engines} engines in "
        f"memory, one of them at work; {machine.memory_gib:g} GiB; {machine.system}; Python {machine.python}; "
        f"{versions}.",
        "### Targets, set before anything was measured",
        markdown_table(*verdict_table(run)),
        "### Ratios to vLLM's own server",
        "Above 1 in tokens/s, and below 1 (or 0 ms) in the latencies, the path is better than its reference.",
        markdown_table(*ratios([*run.control, *run.engine])),
    ]
    if run.protocol:
        parts += ["### What the protocol costs", markdown_table(*protocol_costs(run))]
    if run.tensors:
        parts += ["### Big tensors, there and back, ms", markdown_table(*tensor_table(run))]
    if check := run.cross_check:
        parts += [
            "### Cross-check",
            f"The same load by `vllm bench serve`, {check.concurrency} callers: {check.theirs_tokens_per_s:.0f} "
            f"tokens/s; by this generator: {check.ours.tokens_per_s:.0f} (ratio {check.tokens_per_s_ratio:.3f}).",
        ]
    return "\n\n".join(parts) + "\n"


def control_line(run: Results) -> str:
    """One line on whether a run may be believed."""
    worst = max((off_by(control) for control in run.control), default=float("nan"))
    state = "VOID" if run.void else "good"
    return f"A/A control off by {worst:.1%} (limit {CONTROL_LIMIT:.0%}): the run is {state}."


def break_even_tokens_per_s(front_cpu_seconds_per_token: float, share: float = 0.05) -> float:
    """Tokens a second, of all streams of one server process, at which its protocol work fills `share` of a core.

    The same number answers the question for one stream: below it, the protocol takes less than `share` of the time
    between two tokens.
    """
    return share / front_cpu_seconds_per_token


def reference_cpu(run: Results, path: str) -> float | None:
    """CPU seconds per token outside of the engine for `path` in the protocol arm; None if not measured."""
    for each in run.protocol:
        for side in (each.arm, each.reference):
            if side.path == path and side.cpu_per_1000.front is not None:
                return side.cpu_per_1000.front / 1000
    return None
