"""`servebook bench`. What it measures with is imported when it runs: other commands should not wait for that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from servebook.checkout import ROOT
from servebook.errors import ServebookError
from servebook.launch.display import plain_console
from servebook.settings import load_settings
from servebook.whole import write_whole

if TYPE_CHECKING:
    from servebook.bench.arms import Workload
    from servebook.bench.report import Rows
    from servebook.bench.results import Results
    from servebook.bench.run import Plan
    from servebook.bench.stats import ServiceLevel

console = plain_console(soft_wrap=True)

LOAD = {"paths", "output", "concurrency", "prompt_tokens", "max_tokens", "shared_prefix", "turns", "scripted"}
OPTIONS: dict[str, set[str]] = {
    "--schema": {"schema"},
    "--guard": {"guard", "store"},
    "--report": {"as_report"},
    "--sweep": LOAD | {"to_saturation", "ttft_ms", "tpot_ms"},
    "--rate": LOAD - {"concurrency"} | {"rate", "rounds", "force"},
    "a run of PATH": LOAD | {"rounds", "force"},
    "a run without PATH": {"full", "output", "force"},
}
"""What each thing that `bench` does makes use of; any other option would be left out of account."""


HOUR_MS = 3_600_000

Callers = Annotated[list[int] | None, typer.Option("-c", "--concurrency", min=1, max=512, help="Callers at a time.")]


def bench(
    ctx: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH]…", help="Only these, such as grpc; any other word names them all."),
    ] = None,
    full: Annotated[bool, typer.Option("--full/--quick", help="Everything (1.5 to 3 hours), or a look.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Grows step by step; the same command goes on, and a sweep begins anew.",
            show_default="bench.json, or sweep.json for --sweep",
        ),
    ] = None,
    concurrency: Callers = None,
    rate: Annotated[
        float | None, typer.Option(min=0.01, max=10_000, help="Open loop: requests a second, not callers.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=10, max=1_000_000)] = 40,
    max_tokens: Annotated[
        int, typer.Option(min=2, max=1_000_000, help="Of an answer: from half to one and a half times as many.")
    ] = 48,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Of four interleaved blocks.")] = 3,
    shared_prefix: Annotated[int, typer.Option(min=0, max=1_000_000, help="Tokens that every prompt begins with.")] = 0,
    turns: Annotated[int, typer.Option(min=1, max=1000, help="Of each chat.")] = 1,
    to_saturation: Annotated[bool, typer.Option("--sweep", help="One PATH: more callers until no more helps.")] = False,
    ttft_ms: Annotated[
        float, typer.Option(min=0.01, max=HOUR_MS, help="--sweep: a good request's first text comes within.")
    ] = 1000,
    tpot_ms: Annotated[
        float, typer.Option(min=0.01, max=HOUR_MS, help="--sweep: and each token after it within.")
    ] = 100,
    scripted: Annotated[bool, typer.Option(help="The scripted token source instead of a model.")] = False,
    guard: Annotated[bool, typer.Option(help="Three minutes: has a change made a front dearer in CPU?")] = False,
    store: Annotated[bool, typer.Option(help="With --guard: these ratios are the right ones from now on.")] = False,
    force: Annotated[bool, typer.Option(help="Go on when the control is off; the results say so.")] = False,
    as_report: Annotated[bool, typer.Option("--report", help="Write BENCHMARKS.md from the stored results.")] = False,
    schema: Annotated[bool, typer.Option(help="Print the JSON schema of the result file.")] = False,
) -> None:
    """Measure the paths against vLLM's own server, side by side in one run.

    Without PATH, a quick or a full plan; with PATH, these at the given load. Ctrl-C keeps what is done.
    """
    import uvloop

    from servebook.bench.arms import Workload
    from servebook.bench.load import MAX_CONCURRENCY
    from servebook.bench.report import markdown
    from servebook.bench.results import Results, stored
    from servebook.bench.run import FULL, QUICK, start
    from servebook.bench.stats import ServiceLevel

    chosen = {"--schema": schema, "--guard": guard, "--report": as_report, "--sweep": to_saturation}
    alone = ("--rate" if rate else "a run of PATH") if paths else "a run without PATH"
    refuse_unused(ctx, next((name for name, asked in chosen.items() if asked), alone))
    if schema:
        print(json.dumps(Results.model_json_schema(), indent=2))
        return
    if guard:
        watch(store)
        return
    if as_report:
        write_whole(file := ROOT / "BENCHMARKS.md", markdown(stored()))
        console.print(f"{file} is written.")
        return
    plan = FULL if full else QUICK
    wants = Workload(
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        rounds=rounds,
        rate=rate,
        shared_prefix_tokens=shared_prefix,
        turns=turns,
    )
    settings = load_settings()
    # A later turn asks no more than "And then?": some 15 tokens with the template.
    longest = shared_prefix + prompt_tokens + turns * (max_tokens + max_tokens // 2) + 15 * (turns - 1)
    if not settings.engine_url and longest > settings.max_model_len:
        raise ServebookError(
            f"A prompt and the longest of answers take {longest} tokens, and the engine has room for "
            f"{settings.max_model_len}.",
            "Ask for shorter ones, or set SERVEBOOK_MAX_MODEL_LEN.",
        )
    if to_saturation:
        level = ServiceLevel(ttft_ms=ttft_ms, tpot_ms=tpot_ms)
        most = max(concurrency or [MAX_CONCURRENCY])
        saturate(paths or ["sse"], wants, level, most, scripted, output or Path("sweep.json"))
        return
    if paths:
        plan = custom(paths, [0] if rate else concurrency or [1, 8], wants, scripted)
    output = output or Path("bench.json")
    run = start(plan, settings, output, force)
    run.say = console.print
    try:
        uvloop.run(run.all())
    except KeyboardInterrupt:
        console.print(f"Stopped. {len(run.results.done)} of {len(plan)} steps are in {output}; run the same to go on.")
        raise
    show(run.results)
    if left_out := plan.without(run.results.done):
        console.print(f"Left out, as the load generator would have measured itself: {', '.join(left_out)}.")
    if left_out or run.results.verdict == "void":
        raise typer.Exit(1)


def refuse_unused(ctx: typer.Context, what: str) -> None:
    """Raise BadParameter for an option that was given and that `what`, a key of OPTIONS, would leave out of account."""
    for each in ctx.command.params:
        name = each.name or ""
        source = ctx.get_parameter_source(name)
        # `--quick`, or a prefix of 0 tokens, says what is so anyway.
        if source and source.name == "COMMANDLINE" and ctx.params[name] and name not in OPTIONS[what]:
            raise typer.BadParameter(f"{what} takes no {'PATH' if name == 'paths' else each.opts[-1]}")


def saturate(paths: list[str], wants: Workload, level: ServiceLevel, most: int, scripted: bool, output: Path) -> None:
    """Sweep one path, and leave its points in `output`, one after the other.

    Raises:
        BenchError: `output` cannot be written or holds something else, there is more than one path, it cannot have
            the workload, or the generator is the bottleneck.
    """
    import uvloop

    from servebook.bench.arms import require_turns
    from servebook.bench.load import BenchError
    from servebook.bench.paths import find_path
    from servebook.bench.protocol import serve_scripted
    from servebook.bench.sweep import Point, Sweep, require_sweep, sweep, table

    if len(paths) != 1:
        raise BenchError("A sweep is of one path.", "Name one, such as sse.")
    path, settings = find_path(paths[0]), load_settings()
    require_turns(path, wants)
    require_sweep(output)
    server = serve_scripted(path, settings) if scripted else path.serve(settings)

    kept: list[Point] = []

    def keep(so_far: Sweep) -> None:
        so_far.save(output)
        kept.append(point := so_far.points[-1])
        load = f"{point.callers} callers" if point.callers else f"{point.rate:.1f} requests/s asked for"
        console.print(f"  {load}: {point.summary.tokens_per_s:.0f} tokens/s, {point.goodput:.1f} good requests/s")

    try:
        found = uvloop.run(sweep(path, server, wants, level, most, scripted, keep))
    except KeyboardInterrupt:
        console.print(f"Stopped. The points above are in {output}." if kept else "Stopped before the first point.")
        raise
    show_table(table(found), f"{path.name} to saturation: {'the scripted source' if scripted else settings.model_name}")
    end = "" if found.saturated else ", the most that were tried: more may give more"
    console.print(
        f"The knee is at {found.knee.callers} callers{end}. A good request: TTFT within {level.ttft_ms:g} ms, then "
        f"{level.tpot_ms:g} ms a token. The points are in {output}."
    )


def watch(store: bool) -> None:
    """Measure each front's CPU, and compare it with what is stored or store it."""
    import uvloop

    from servebook.bench import guard

    found = uvloop.run(guard.measure(load_settings()))
    if store:
        guard.store(found)
    rows = guard.verdicts(found)
    show_table(rows, "CPU of each front (scripted token source)")
    if any(row[-1] == "dearer" for row in rows[1]):
        raise typer.Exit(1)


def show_table(rows: Rows, title: str) -> None:
    table = Table(*rows[0], title=title)
    for row in rows[1]:
        table.add_row(*row)
    console.print(table)


def custom(paths: list[str], loads: list[int], wants: Workload, scripted: bool) -> Plan:
    """A plan for some paths only, with a control of its own; its name says all that tells it from another.

    Raises:
        BenchError: a path is unknown, or cannot have the workload.
    """
    from servebook.bench.arms import require_turns
    from servebook.bench.paths import find_path
    from servebook.bench.run import Plan, cells

    for path in paths:
        require_turns(find_path(path), wants)
    # Each once: a step is known by its name.
    chosen = tuple(dict.fromkeys(cell for path in paths for cell in cells(find_path(path).name, *loads)))
    asked = [f"{name}={value}" for name, value in wants.model_dump(exclude_none=True).items()]
    return Plan(
        name=f"{'scripted' if scripted else 'custom'} {' '.join(paths)} @{','.join(map(str, loads))} {' '.join(asked)}",
        workload=wants,
        control=tuple(loads[:1]),
        engine=() if scripted else chosen,
        protocol=chosen if scripted else (),
        wire=tuple(dict.fromkeys(paths)) if scripted else (),
    )


def show(results: Results) -> None:
    """Print the tables of a run."""
    from servebook.bench import report

    found = [*results.control, *results.engine]
    tables = {"Against vLLM's own server": report.ratios(found), "Latency": report.latencies(found)}
    if results.protocol:
        tables["Protocol alone (scripted token source)"] = report.protocol_costs(results)
    if results.tensors:
        tables["Big tensors, there and back, ms"] = report.tensor_table(results)
    if results.plan == "full":
        tables["Targets"] = report.verdict_table(results)
    for title, rows in tables.items():
        show_table(rows, title)
    console.print(report.control_line(results))
