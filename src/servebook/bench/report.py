"""Turns stored results into tables: BENCHMARKS.md, and what a terminal shows at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from servebook.bench.arms import CONTROL_LIMIT, ArmResult, Comparison, off_by
from servebook.bench.cost import LENGTHS
from servebook.bench.crosscheck import CrossCheck
from servebook.bench.generators import GENERATOR_LIMIT
from servebook.bench.load import BenchError
from servebook.bench.results import Results
from servebook.bench.run import FULL
from servebook.bench.stats import Estimate, Percentiles

Row = Sequence[str]
Rows = tuple[Row, list[Row]]

TEXT = Path(__file__).with_name("text")
"""What BENCHMARKS.md says around its tables."""


MESSAGE_A_TOKEN = 1.05
"""Tokens in a message, on average, that still count as one: a busy machine merges a few by itself."""


class Judged(NamedTuple):
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

    def judge(self, results: Results) -> Judged:
        """Met or missed where the whole interval says so; else undecided, or not measured."""
        found = self.read(results)
        wanted = f"{self.text} {'≥' if self.at_least else '≤'} {self.bound:g}"
        if found is None:
            return Judged(wanted, "–", "not measured")
        measured = f"{interval(found, 3)}, {found.pairs} pairs" if found.pairs else f"{found.value:.2f}, counted"
        low, high, bound = found.low, found.high, self.bound
        if low is None or high is None:
            return Judged(wanted, measured, "undecided")
        met, missed = (low >= bound, high < bound) if self.at_least else (high <= bound, low > bound)
        return Judged(wanted, measured, "met" if met else "missed" if missed else "undecided")


def cell(name: str, field: str, part: str = "engine") -> Callable[[Results], Estimate | None]:
    """Reads one estimate of the comparison called `name`."""

    def read(results: Results) -> Estimate | None:
        found: list[Comparison] = getattr(results, part)
        return next((getattr(each, field) for each in found if each.name == name), None)

    return read


def front_cpu(path: str, *, merged: bool, callers: int | None = None) -> Callable[[Results], Estimate | None]:
    """Reads CPU per token around the scripted source, where tokens shared messages, or none did; at the most callers.

    Whether they do is the server's choice, by its load (`ways.pace`): a bound for one says nothing of the other.
    """

    def read(results: Results) -> Estimate | None:
        fits = [
            each
            for each in (*results.protocol, *results.merging)
            if (each.arm.summary.tokens_per_message > MESSAGE_A_TOKEN) == merged and callers in (None, each.concurrency)
        ]
        found = at_most_callers(fits, path)
        return found.front_cpu if found else None

    return read


def bytes_ratio(path: str, against: str) -> Callable[[Results], Estimate | None]:
    """Bytes per token of `path` / those of `against`; counted, not sampled, so without an interval."""

    def read(results: Results) -> Estimate | None:
        cost = {each.path: each.bytes_per_token for each in results.wire}
        if path not in cost or against not in cost:
            return None
        value = cost[path] / cost[against]
        return Estimate(value=value, low=value, high=value, pairs=0)

    return read


CLAIMS = (
    *(Claim(f"triton, tokens/s at {n}", cell(f"triton @{n}", "tokens_per_s"), 0.97) for n in (1, 8, 32)),
    *(Claim(f"triton, TTFT p50 at {n}", cell(f"triton @{n}", "ttft_p50"), 1.1, at_least=False) for n in (1, 8, 32)),
    *(Claim(f"triton, ITL p50 at {n}", cell(f"triton @{n}", "itl_p50"), 1.3, at_least=False) for n in (1, 8, 32)),
    *(Claim(f"grpc, tokens/s at {n}", cell(f"grpc @{n}", "tokens_per_s"), 1.0) for n in (1, 4, 16, 32, 64)),
    *(Claim(f"grpc, TTFT p50 at {n}", cell(f"grpc @{n}", "ttft_p50"), 1.0, at_least=False) for n in (1, 4, 16, 32)),
    *(Claim(f"grpc, ITL p50 at {n}", cell(f"grpc @{n}", "itl_p50"), 1.0, at_least=False) for n in (1, 4, 16, 32)),
    Claim("grpc, bytes per token", bytes_ratio("grpc", "sse"), 0.2, at_least=False),
    Claim(
        "grpc, server CPU per token (scripted)", cell("scripted grpc @32", "front_cpu", "protocol"), 0.5, at_least=False
    ),
    Claim(
        "grpc, server CPU per token at 32, a message a token (scripted)",
        front_cpu("grpc", merged=False, callers=32),
        0.6,
        at_least=False,
    ),
    Claim("grpc, server CPU per token where it merges (scripted)", front_cpu("grpc", merged=True), 0.4, at_least=False),
    Claim("gateway, TTFT p50 at 1, ms more", cell("gateway @1", "ttft_p50_ms"), 3.0, at_least=False),
    Claim("gateway, TTFT p50 at 32", cell("gateway @32", "ttft_p50"), 1.1, at_least=False),
    *(Claim(f"gateway, tokens/s at {n}", cell(f"gateway @{n}", "tokens_per_s"), 0.97) for n in (1, 32)),
    Claim("the article's gateway, tokens/s at 16", cell("gateway-article @16", "tokens_per_s"), 0.2, at_least=False),
)
"""What was asked of Triton, our own gRPC and the gateway: ratios to vLLM's own server."""
ASKED_LATER = (
    "Set before anything was measured; but Triton's latencies, gRPC at 64 callers, and its CPU at 0.6 and 0.4 after a "
    "first run on a GPU."
)


def interval(found: Estimate | None, digits: int = 2) -> str:
    """Value and 95 % interval, or its number of pairs; "–" where nothing was measured."""
    return found.text(digits) if found else "–"


def at_most_callers(found: Iterable[Comparison], path: str) -> Comparison | None:
    """The comparison of `path` with the most callers that were measured."""
    return max((each for each in found if each.arm.path == path), key=lambda each: each.concurrency, default=None)


def overview(runs: Sequence[Results]) -> Rows:
    """Head and rows: what each path costs on the engines of the runs, the slowest first, and around the scripted one.

    All but bytes and full cores are ratios to vLLM's own server, with the most callers that were measured. What is not
    of an engine is from the run on the fastest.
    """
    slowest_first = sorted(runs, key=_engine_speed)
    last = slowest_first[-1]
    bytes_of = {each.path: f"{each.bytes_per_token:.0f}" for each in last.wire}
    full_at = {each.path: f"{each.core_full_at(256):,.0f}" for each in last.costs}
    scripted = max((each.reference.summary.tokens_per_s for each in last.protocol), default=0.0)
    head = (
        "path",
        *(f"tokens/s: {run.machine.device} engine, {_engine_speed(run):.0f} tokens/s" for run in slowest_first),
        f"tokens/s: scripted engine, {scripted:,.0f} tokens/s",
        *("server CPU a token", "bytes a token", "tokens/s that fill a core"),
    )
    rows: list[Row] = []
    for path in dict.fromkeys(each.arm.path for run in slowest_first for each in (*run.engine, *run.protocol)):
        engines = [at_most_callers(run.engine, path) for run in slowest_first]
        fast = at_most_callers(last.protocol, path)
        ratios = [f"{interval(each.tokens_per_s)} @{each.concurrency}" if each else "–" for each in (*engines, fast)]
        cpu = interval(fast.front_cpu) if fast else "–"
        rows.append((path, *ratios, cpu, bytes_of.get(path, "–"), full_at.get(path, "–")))
    return head, rows


def _engine_speed(run: Results) -> float:
    return max(each.reference.summary.tokens_per_s for each in run.control)


def verdict_table(results: Results) -> Rows:
    """Head and rows: every claim, judged by one run."""
    return ("asked", "measured", "verdict"), [claim.judge(results) for claim in CLAIMS]


def ratios(found: Iterable[Comparison]) -> Rows:
    """Head and rows: tokens/s of each path and of its reference, and how the pairs of their ratio lie."""
    head = (
        *("path", "against", "callers", "requests", "tokens/s", "reference", "ratio"),
        *("pairs: lowest to highest", "generator, % of a core"),
    )
    rows: list[Row] = []
    for each in found:
        pairs = each.tokens_per_s
        sides = (each.arm, each.reference)
        rows.append(
            (
                *_who(each),
                _requests(*sides),
                *(f"{side.summary.tokens_per_s:.0f}" for side in sides),
                interval(pairs),
                f"{pairs.pairs}: {min(pairs.each):.2f} to {max(pairs.each):.2f}",
                generator_share(max(side.generator_share for side in sides), each.arm.processes),
            )
        )
    return head, rows


def latencies(found: Iterable[Comparison]) -> Rows:
    """Head and rows: TTFT, ITL and TPOT, in milliseconds, of the paths that stream and of their references."""
    head = (
        *("path", "callers", "TTFT p50 / p90 / p99, ms", "reference", "p50: difference, ms"),
        *("ITL p50 / p90 / p99, ms", "reference", "p50: ratio", "TPOT p50 / p99, ms", "reference"),
    )
    rows: list[Row] = []
    for each in found:
        if each.itl_p50 is None:
            continue
        arm, reference = each.arm.summary, each.reference.summary
        rows.append(
            (
                *_who(each)[::2],
                *(percentiles_ms(side.ttft_ms) for side in (arm, reference)),
                interval(each.ttft_p50_ms, 1),
                *(percentiles_ms(side.itl_ms) for side in (arm, reference)),
                interval(each.itl_p50),
                *(f"{side.p50:.1f} / {side.p99:.1f}" if side else "–" for side in (arm.tpot_ms, reference.tpot_ms)),
            )
        )
    return head, rows


def generator_share(share: float, processes: int) -> str:
    """A cell of a table: what the load generator took of a core, in %, in each of its processes."""
    return f"{100 * share:.0f}" + (f" in each of {processes}" if processes > 1 else "")


def _who(each: Comparison) -> tuple[str, str, str]:
    load = str(each.concurrency) if each.concurrency else f"{each.workload.rate:g}/s"
    return each.arm.path, each.reference.path, load


def _requests(*sides: ArmResult) -> str:
    failed = sum(sum(side.summary.failed.values()) for side in sides)
    return " + ".join(str(side.summary.requests) for side in sides) + (f", {failed} failed" if failed else "")


def percentiles_ms(found: Percentiles | None) -> str:
    """A cell of a table: p50, p90 and p99 in whole milliseconds."""
    return f"{found.p50:.0f} / {found.p90:.0f} / {found.p99:.0f}" if found else "–"


def protocol_costs(results: Results) -> Rows:
    """Head and rows of what each token costs outside of any engine; a reference has its own figures in each row.

    What was measured at the rate at which servers merge tokens comes last, with that rate beside its callers.
    """
    bytes_of = {each.path: f"{each.bytes_per_token:.0f}" for each in results.wire}
    head = (
        *("path", "against", "callers", "requests", "server CPU, µs a token", "reference", "ratio", "pairs"),
        *("client CPU, µs a token", "reference", "bytes a token", "reference"),
    )
    rows: list[Row] = []
    merging = f" at {results.merging_rate:g}/s"
    for each, rate in (*((each, "") for each in results.protocol), *((each, merging) for each in results.merging)):
        sides = (each.arm, each.reference)
        *who, load = _who(each)
        rows.append(
            (
                *(*who, load + rate),
                _requests(*sides),
                *(_micros(side.cpu_per_1000.front) for side in sides),
                interval(each.front_cpu),
                str(each.front_cpu.pairs if each.front_cpu else 0),
                *(_micros(side.cpu_per_1000.client) for side in sides),
                *(bytes_of.get(side.path, "–") for side in sides),
            )
        )
    return head, rows


def cost_table(results: Results) -> Rows:
    """Head and rows: the fitted cost of each front, and the load that fills a core of its busiest process."""
    head = (
        *("path", "callers", "processes", "µs a request", "µs a token"),
        *("tokens/s that fill a core, answers of 32 tokens", "of 256"),
    )
    rows: list[Row] = []
    for each in results.costs:
        request = f"{each.request_us:.0f} ± {each.request_error:.0f}"
        token = f"{each.token_us:.0f} ± {each.token_error:.0f}"
        full = (f"{each.core_full_at(tokens):,.0f}" for tokens in (32, 256))
        rows.append((each.path, str(each.callers), str(each.processes), request, token, *full))
    return head, rows


def _micros(seconds_per_1000: float | None) -> str:
    return "–" if seconds_per_1000 is None else f"{1e3 * seconds_per_1000:.0f}"


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


def markdown(runs: Sequence[Results]) -> str:
    """The whole of BENCHMARKS.md.

    Raises:
        BenchError: there is no run, or one is not good.
    """
    if not runs:
        raise BenchError("There are no stored results.", "Make them with `servebook bench --full`.")
    if any(run.verdict != "good" for run in runs):
        raise BenchError(
            "A stored run is not good: its A/A control is off, or its generator was too busy.", "Measure again."
        )
    texts = ((TEXT / f"{name}.md").read_text(encoding="utf-8") for name in ("introduction", "overview", "profile"))
    introduction, above, profile = texts
    table = markdown_table(*overview(runs))
    return "\n".join([introduction, above, f"{table}\n", *(section(run) for run in runs), profile])


def section(run: Results) -> str:
    """One run: machine, verdicts, tables."""
    machine = run.machine
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    engines = max((each.engines_up for each in run.engine), default=0)
    missing = FULL.without(run.done)
    parts = [
        f"## {machine.cpu}, {machine.cores} cores, engine on {machine.device}",
        f"Model {run.model}; {run.started:%Y-%m-%d}, {run.seconds / 60:.0f} minutes; at most {engines} engines in "
        f"memory, one of them at work; {machine.memory_gib:g} GiB; {machine.system}; Python {machine.python}; "
        f"{versions}.",
        *([f"Of today's full plan this run does not have: {', '.join(missing)}."] if missing else []),
        "### Targets",
        ASKED_LATER,
        markdown_table(*verdict_table(run)),
        "### Ratios to vLLM's own server",
        "A ratio above 1 in tokens/s, and below 1 (or 0 ms) in the latencies: the path is better than its reference.",
        markdown_table(*ratios([*run.control, *run.engine])),
        markdown_table(*latencies([*run.control, *run.engine])),
    ]
    if run.protocol:
        tokens = run.protocol[0].workload.max_tokens
        parts += [
            "### What the protocol costs",
            f"Answers of {tokens} tokens: what a request costs is in these figures, spread over its tokens. A "
            "gateway's are those of two processes, its own and that of vLLM's server behind it."
            + (merging_note(run) if run.merging else ""),
            markdown_table(*protocol_costs(run)),
        ]
    if run.costs:
        parts += [
            f"CPU of a front = so much a request + so much a token, fitted to answers of {LENGTHS[0]} to "
            f"{LENGTHS[-1]} tokens; ± is a "
            "standard error. A core that is full makes answers wait; one that is not full hides its work behind the "
            "engine's next step, and adds nothing to the gap between two tokens.",
            markdown_table(*cost_table(run)),
        ]
    if run.tensors:
        parts += ["### Big tensors, there and back, ms", markdown_table(*tensor_table(run))]
    if run.cross_check:
        parts += ["### Cross-check", markdown_table(*cross_check_table(run.cross_check))]
    return "\n\n".join(parts) + "\n"


def merging_note(run: Results) -> str:
    """What tells the rows of the protocol's table that were measured at another rate from those above them."""
    tokens = run.merging[0].workload.max_tokens
    return (
        f" The last rows are those of {run.merging_rate:g} tokens a second for each stream, which a server may merge, "
        f"and of answers of {tokens} tokens."
    )


def cross_check_table(checks: Sequence[CrossCheck]) -> Rows:
    """Head and rows: this generator and `vllm bench serve` under the same loads, one after the other."""
    head = ("callers", "requests", "", "this generator", "`vllm bench serve`", "ratio")
    rows: list[Row] = []
    for check in checks:
        ours, tpot = check.ours, check.ours.tpot_ms
        for name, mine, theirs in (
            ("tokens/s", ours.tokens_per_s, check.theirs_tokens_per_s),
            ("TTFT p50, ms", ours.ttft_ms.p50, check.theirs_ttft_p50_ms),
            ("TPOT p50, ms", tpot.p50 if tpot else float("nan"), check.theirs_tpot_p50_ms),
        ):
            counts = (str(check.concurrency), f"{ours.requests} and {check.requests}")
            rows.append((*counts, name, f"{mine:.1f}", f"{theirs:.1f}", f"{mine / theirs:.3f}"))
    return head, rows


def control_line(run: Results) -> str:
    """One line on whether a run may be believed."""
    worst = max((off_by(control) for control in run.control), default=float("nan"))
    busiest = max((each.generator_share for each in run.sides), default=float("nan"))
    state = {"good": "good", "undecided": "undecided: more pairs would tell", "void": "VOID"}[run.verdict]
    return (
        f"A/A control off by {worst:.1%} at most, in tokens/s, TTFT or ITL (limit {CONTROL_LIMIT:.0%}); generator at "
        f"{busiest:.0%} of a core (limit {GENERATOR_LIMIT:.0%}): the run is {state}."
    )
