"""The same load by vLLM's own benchmark (`vllm bench serve`), to check our generator against a well-kept one."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE, STDOUT

from pydantic import BaseModel, Field

from servebook.bench import workload
from servebook.bench.arms import Workload
from servebook.bench.load import BenchError, Job, closed_loop
from servebook.bench.paths import find_path
from servebook.bench.stats import Summary, summarize
from servebook.engine.arguments import engine_env
from servebook.engine.model import model_path
from servebook.environment import child_environment
from servebook.launch import Server


class CrossCheck(BaseModel):
    """Our figures and those of `vllm bench serve`, for prompts of the same kind, against the same server."""

    concurrency: int
    requests: int
    ours: Summary
    theirs_tokens_per_s: float
    theirs_ttft_p50_ms: float
    theirs_tpot_p50_ms: float
    tokens_per_s_ratio: float = Field(description="Ours / theirs; agreement is within 5 %.")


async def cross_check(server: Server, wants: Workload, concurrency: int, requests: int, seed: int) -> CrossCheck:
    """Run ours, theirs, ours: ours is the mean of what was before and after. `seed` draws the prompts of all three.

    Raises:
        BenchError: vLLM's benchmark fails, or counts other tokens than were asked for.
    """
    jobs = workload.completions(wants.prompt_tokens, wants.max_tokens, seed)
    async with find_path("sse").open(server) as send:
        await closed_loop(send, workload.take(jobs, concurrency), concurrency)
        before = await closed_loop(send, workload.take(jobs, requests), concurrency)
        same = workload.take(jobs, requests)
        theirs = await _vllm_bench(server, same, concurrency)
        after = await closed_loop(send, workload.take(jobs, requests), concurrency)
    asked, counted = sum(job.max_tokens for job in same), theirs["total_output_tokens"]
    if counted != asked:
        raise BenchError(
            f"`vllm bench serve` counts {counted} tokens, and {asked} were asked for.",
            "See the server's log (`servebook logs NAME`): an answer ended early, or a request failed.",
        )
    ours = summarize(before, after)
    tokens_per_s, ttft, tpot = theirs["output_throughput"], theirs["p50_ttft_ms"], theirs["p50_tpot_ms"]
    return CrossCheck(
        concurrency=concurrency,
        requests=requests,
        ours=ours,
        theirs_tokens_per_s=tokens_per_s,
        theirs_ttft_p50_ms=ttft,
        theirs_tpot_p50_ms=tpot,
        tokens_per_s_ratio=ours.tokens_per_s / tokens_per_s,
    )


async def _vllm_bench(server: Server, jobs: list[Job], concurrency: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        prompts, result = Path(folder) / "prompts.jsonl", Path(folder) / "result.json"
        lines = [json.dumps({"prompt": job.prompt, "output_tokens": job.max_tokens}) for job in jobs]
        prompts.write_text("\n".join(lines))
        words = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
            *("--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions"),
            *("--model", server.model, "--tokenizer", str(model_path(server.settings))),
            *("--dataset-name", "custom", "--dataset-path", str(prompts), "--custom-output-len", "-1"),
            *("--skip-chat-template", "--disable-shuffle", "--num-prompts", str(len(jobs))),
            *("--max-concurrency", str(concurrency), "--temperature", "0", "--disable-tqdm"),
            *("--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50"),
            *("--save-result", "--result-dir", folder, "--result-filename", result.name),
        ]
        # Not by the event loop: whoever cancels that while it starts a process has none to end.
        with subprocess.Popen(words, env=_environment(server), stdout=PIPE, stderr=STDOUT) as process:  # noqa: ASYNC220
            try:
                output, _ = await asyncio.to_thread(process.communicate)
            finally:  # Ctrl-C, too: it would go on and load the engine
                process.kill()
        if process.returncode:
            last = output.decode(errors="replace").strip().splitlines()[-3:]
            raise BenchError(
                f"`vllm bench serve` failed: {' / '.join(last)}.",
                "See the server's log (`servebook logs NAME`), and start again: what is measured is kept.",
            )
        return dict(json.loads(result.read_text()))


def _environment(server: Server) -> dict[str, str]:
    key = {"OPENAI_API_KEY": server.settings.key} if server.settings.key else {}
    return child_environment() | engine_env(server.settings) | key
