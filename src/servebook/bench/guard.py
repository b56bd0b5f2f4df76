"""`servebook bench --guard`: has a change made a front dearer? The scripted source, minutes, and a stored ratio."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from servebook.bench.arms import Comparison, Workload
from servebook.bench.load import BenchError
from servebook.bench.protocol import DEFAULT_RATE, RATE_VARIABLE, SCRIPTED_RATE
from servebook.bench.report import Row, Rows, interval
from servebook.bench.run import SCRIPTED_CALLERS, Plan, start
from servebook.bench.stats import Estimate
from servebook.settings import Settings
from servebook.whole import write_whole

STORED = Path(__file__).with_name("guard.json")
"""CPU of each front per token / that of vLLM's SSE, as it was when somebody last said that it was right."""

LIMIT = 0.1
"""A front is as before while its ratio is within a tenth of the stored one."""

OURS = ("grpc", "triton", "kserve-sse", "gateway")
"""The fronts with code of this repository on each token's way."""

PLAN = Plan(
    name="guard",
    workload=Workload(max_tokens=8, block_seconds=0.1, rounds=3),
    control=(),
    engine=(),
    protocol=tuple((path, SCRIPTED_CALLERS) for path in OURS),
)
"""Short answers, so that a block takes a good second; three rounds give an interval."""


def judge(found: Estimate, stored: float) -> str:
    """Dearer, cheaper or as before where the whole interval says so; else undecided."""
    least, most = stored * (1 - LIMIT), stored * (1 + LIMIT)
    if found.low is None or found.high is None:
        return "undecided"
    if found.low > most:
        return "dearer"
    if found.high < least:
        return "cheaper"
    return "as before" if least <= found.low and found.high <= most else "undecided"


async def measure(settings: Settings) -> list[Comparison]:
    """Each front against vLLM's SSE, around the scripted source.

    Raises:
        BenchError: the source has another rate than what is stored was measured at; or a front was left out, as the
            load generator would have measured itself.
        LaunchError: a server cannot start.
    """
    if SCRIPTED_RATE != DEFAULT_RATE:
        raise BenchError(
            f"The guard's ratios are those of {DEFAULT_RATE:g} tokens a second, and {RATE_VARIABLE} is "
            f"{SCRIPTED_RATE:g}.",
            "Unset it.",
        )
    with tempfile.TemporaryDirectory() as folder:
        run = await start(PLAN, settings, Path(folder) / "guard.json").all()
    if left_out := PLAN.without(run.done):
        raise BenchError(
            f"The load generator would have measured itself: {', '.join(left_out)}.",
            "End what else runs, or use a machine with more cores.",
        )
    return run.protocol


def store(found: list[Comparison]) -> None:
    """From now on these ratios are the right ones."""
    ratios = {each.arm.path: round(each.front_cpu.value, 3) for each in found if each.front_cpu}
    write_whole(STORED, json.dumps(ratios, indent=1) + "\n")


def verdicts(found: list[Comparison]) -> Rows:
    """Head and rows: a front a line, its verdict last."""
    stored: dict[str, float] = json.loads(STORED.read_text(encoding="utf-8"))
    rows: list[Row] = []
    for each in found:
        before = stored.get(each.arm.path)
        verdict = judge(each.front_cpu, before) if each.front_cpu and before else "not stored"
        cpu = "–" if each.arm.cpu_per_1000.front is None else f"{1e3 * each.arm.cpu_per_1000.front:.0f}"
        rows.append((each.arm.path, cpu, interval(each.front_cpu), f"{before:.2f}" if before else "–", verdict))
    return ("front", "CPU, µs a token", "ratio to vLLM's SSE", "stored", "verdict"), rows
