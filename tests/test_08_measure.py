"""Chapter 08: the notebook; every path gives the same answer; and the measurements measure what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jsonschema
import pytest
from smg_grpc_proto import vllm_engine_pb2
from typer.testing import CliRunner

from servebook.bench import workload
from servebook.bench.arms import Workload, compare, open_arm
from servebook.bench.crosscheck import cross_check
from servebook.bench.load import BenchError, Job, Sample, ask, closed_loop
from servebook.bench.paths import PATHS, find_path
from servebook.bench.results import Results, load_results
from servebook.bench.run import Plan, finished, start
from servebook.bench.tensors import ENCODINGS, KIB, SERVERS, tensor_costs
from servebook.bench.wire import wire_cost
from servebook.cli import app
from servebook.launch import Server
from servebook.settings import Settings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

EACH = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.needs(path.server)) for name, path in PATHS.items() if path.spec is None],
)

PROMPTS = {
    False: Job("100, 102, 104, 106, 108,", 24),
    True: Job("Count from 1 to 100.", 24),
}
"""A completion and a chat, greedy, that run to their last token; the model is sure of each, whoever else is served."""

EVENS = "".join(f" {number}," for number in range(110, 200, 2))
"""How the completion goes on; test_fronts.py holds `grpc-fronts` to it, on the server that it has anyway."""

QUESTION = "What is the capital of Japan?"
ENDING = {False: f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n", True: QUESTION}
"""The same for an answer that ends by itself."""


@pytest.mark.lane("own")
@pytest.mark.needs("vllm", "grpc")
def test_notebook(run_notebook: Callable[[str], None]) -> None:
    run_notebook("08_measure")


async def answer(path: str, server: Server, job: Job) -> Sample:
    async with find_path(path).open(server) as send:
        return await ask(send, job)


REFERENCES: dict[Job, Sample] = {}


async def reference(vllm: Server, job: Job, *, chat: bool) -> Sample:
    """What vLLM's own server answers, asked once."""
    if job not in REFERENCES:
        REFERENCES[job] = await answer("rest-chat" if chat else "rest", vllm, job)
    return REFERENCES[job]


@EACH
async def test_parity(name: str, vllm: Server, server_of: Callable[[str], Server]) -> None:
    """The same greedy request gives the same text, finish reason and usage on every path."""
    path = find_path(name)
    server = server_of(path.server)
    job = PROMPTS[path.chat]
    expected = await reference(vllm, job, chat=path.chat)
    found = await answer(name, server, job)
    assert found.text == expected.text
    assert path.chat or EVENS.startswith(found.text)
    assert (found.finish_reason, found.prompt_tokens, found.output_tokens) == (
        expected.finish_reason,
        expected.prompt_tokens,
        expected.output_tokens,
    )
    assert found.output_tokens == job.max_tokens
    assert (len(found.arrivals) > 1) == path.streams


@EACH
async def test_a_natural_end_is_told_on_every_path(name: str, vllm: Server, server_of: Callable[[str], Server]) -> None:
    path = find_path(name)
    server = server_of(path.server)
    job = Job(ENDING[path.chat], 100)
    expected = await reference(vllm, job, chat=path.chat)
    assert expected.finish_reason == "stop"
    found = await answer(name, server, job)
    assert (found.text, found.finish_reason) == (expected.text, "stop")
    assert found.output_tokens == expected.output_tokens


async def test_what_a_path_cannot_carry(vllm: Server) -> None:
    """The lists in `PATHS` are true: vLLM's gRPC has no text, the article's gateway neither reason nor usage."""
    assert PATHS["vllm-grpc"].cannot == ("text",)
    fields = [
        field.name
        for message in (vllm_engine_pb2.GenerateStreamChunk, vllm_engine_pb2.GenerateComplete)
        for field in message.DESCRIPTOR.fields
        if field.type == field.TYPE_STRING
    ]
    assert "text" not in fields
    article = find_path("gateway-article")
    assert article.cannot == ("temperature", "finish_reason", "usage")
    server = article.serve(vllm.settings)
    try:
        found = await answer(article.name, server, PROMPTS[True])
    finally:
        server.stop()
    assert found.text
    assert (found.finish_reason, found.prompt_tokens) == (None, 0)


async def test_tokens_do_not_depend_on_how_they_are_counted(vllm: Server) -> None:
    jobs = workload.take(workload.completions(40, 16), 16)
    async with find_path("sse").open(vllm) as send:
        load = await closed_loop(send, jobs, 8)
    assert load.output_tokens == sum(job.max_tokens for job in jobs)
    assert all(sample.finish_reason == "length" for sample in load.samples), "the workload's answers do not end early"
    assert all(30 <= sample.prompt_tokens <= 50 for sample in load.samples)


async def test_a_comparison_over_real_servers(vllm: Server) -> None:
    wants = Workload(prompt_tokens=10, rounds=1, max_tokens=4, block_seconds=0.1)
    async with open_arm(find_path("rest"), vllm, wants, 1) as arm, open_arm(find_path("sse"), vllm, wants, 2) as other:
        found = await compare("rest @2", arm, other, 2, wants)
    assert found.engines_up >= (vllm.pid is not None)
    assert found.itl_p50 is None, "one arm does not stream"
    assert len(found.arm.block_tokens_per_s) == len(found.reference.block_tokens_per_s) == 2
    assert (found.tokens_per_s.pairs, found.tokens_per_s.low) == (2, None), "too few for an interval"


async def test_grpc_puts_a_fifth_of_the_bytes_of_sse_on_the_wire(vllm: Server, grpc_server: Server) -> None:
    sse = await wire_cost(find_path("sse"), vllm)
    grpc = await wire_cost(find_path("grpc"), grpc_server)
    assert sse.bytes_per_token > 200
    assert grpc.bytes_per_token <= sse.bytes_per_token / 5


@pytest.mark.parametrize("server", SERVERS)
def test_big_tensors_come_back_in_every_encoding(server: str, settings: Settings) -> None:
    """`tensor_costs` itself checks that what comes back is what was sent."""
    sizes = (KIB, 256 * KIB)
    costs = {(cost.encoding, cost.tensor_bytes): cost for cost in tensor_costs(server, settings, sizes)}
    assert costs.keys() == {(name, size) for name in SERVERS[server] for size in sizes}
    size = {name: costs[name, 256 * KIB].request_bytes / (256 * KIB) for name in SERVERS[server]}
    assert size["JSON list"] > 4, "a float as text takes some twenty bytes"
    assert size["JSON base64"] == pytest.approx(4 / 3, rel=0.01)
    assert size["HTTP binary"] == pytest.approx(1, rel=0.01)
    assert size["gRPC raw"] == pytest.approx(1, rel=0.01)
    assert size.get("shared memory", 0) < 0.01
    assert set(SERVERS["triton"]) == set(ENCODINGS)


async def test_vllms_own_benchmark_counts_the_same(vllm: Server) -> None:
    """Each token that was asked for. That its times agree within 5 % is of the full run, on a quiet machine."""
    found = await cross_check(vllm, Workload(prompt_tokens=10, max_tokens=8), 2, 6, seed=7)
    jobs = workload.take(workload.completions(10, 8, seed=7), 2 + 3 * 6)
    ours = [*jobs[2:8], *jobs[14:]]  # before theirs and after
    assert found.ours.output_tokens == sum(job.max_tokens for job in ours)
    assert found.theirs_tokens_per_s > 0
    assert found.tokens_per_s_ratio == found.ours.tokens_per_s / found.theirs_tokens_per_s


TINY = Plan(
    name="tiny",
    workload=Workload(prompt_tokens=10, rounds=1, max_tokens=4, block_seconds=0.05),
    control=(1,),
    engine=(("rest", 1), ("rest", 2)),
    rounds={"control": 2},
)


async def test_an_interrupted_run_goes_on_where_it_was(vllm: Server, tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    said: list[str] = []

    def interrupt(line: str) -> None:
        said.append(line)
        if line.startswith("[3/3]"):
            raise KeyboardInterrupt

    run = start(TINY, vllm.settings, output, force=True)
    run.say = interrupt
    with pytest.raises(KeyboardInterrupt):
        await run.all()
    assert load_results(output).done == ["control @1", "rest @1"]

    again = start(TINY, vllm.settings, output, force=True)
    again.say = said.append
    results = await again.all()
    assert results.done == ["control @1", "rest @1", "rest @2"]
    assert [line for line in said if line.startswith("[")] == [
        "[1/3] control @1",
        "[2/3] rest @1",
        *["[3/3] rest @2"] * 2,
    ]
    assert [found.name for found in results.engine] == ["rest @1", "rest @2"]
    assert [found.tokens_per_s.pairs for found in (*results.control, *results.engine)] == [4, 2, 2]
    jsonschema.validate(json.loads(output.read_text()), Results.model_json_schema())
    with pytest.raises(BenchError, match="finished run"):
        start(TINY, vllm.settings, output)
    shown = await finished(TINY, vllm.settings, output)
    assert (shown.started, shown.done) == (results.started, results.done), "as often as the notebook is run"


async def test_a_restless_control_stops_the_run(vllm: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servebook.bench.run.judge_control", lambda _: "void")
    with pytest.raises(BenchError, match="A/A control is off"):
        await start(TINY, vllm.settings, tmp_path / "run.json").all()
    assert not (tmp_path / "run.json").exists()


@pytest.mark.usefixtures("vllm")
def test_the_command_measures_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servebook.bench.arms.Workload", partial(Workload, block_seconds=0.05))
    words = "bench rest -c 1 --rounds 1 --max-tokens 4 --force --output"
    done = CliRunner().invoke(app, [*words.split(), str(output := tmp_path / "bench.json")])
    results = load_results(output)
    assert (results.done, [found.name for found in results.engine]) == (["control @1", "rest @1"], ["rest @1"])
    assert "Against vLLM's own server" in done.output
    assert done.exit_code == (results.verdict == "void"), done.output
