"""Runs the steps that need an `AsyncLLM` over one of them: `python -m servebook.ways.custom_grpc.steps`."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

from prometheus_client import start_http_server

from servebook.engine.arguments import engine_args, engine_argv
from servebook.engine.model import model_path
from servebook.settings import LOOPBACK, load_settings

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


async def main() -> None:
    """Start the engine and every step, print where they listen as one line of JSON, serve until a signal comes."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from servebook.ways.custom_grpc.steps import step_1_stream, step_2_cancel, step_3_status, step_4_limits

    settings = load_settings()
    engine = AsyncLLM.from_engine_args(engine_args(engine_argv(settings, model_path(settings))))
    await seconds_for(engine, 1)  # what only the first request pays for
    # So that all of the context takes too long on a fast engine, too. A slow one is known when it has not written a
    # sixteenth in a quarter of the time.
    quarter = 4 * await seconds_for(engine, settings.max_model_len // 16, at_most=step_3_status.MOST_SECONDS / 4)
    if quarter < step_3_status.MOST_SECONDS:
        step_3_status.MOST_SECONDS = round(quarter, 2)  # type: ignore[assignment]  # whole seconds are easier to read
    page, _ = start_http_server(0, LOOPBACK)
    servers, ports = [], []
    for step in (step_1_stream, step_2_cancel, step_3_status, step_4_limits):
        server, port = await step.start(engine)
        servers.append(server)  # one that nobody holds ends
        ports.append(f"{LOOPBACK}:{port}")
    print(json.dumps({"steps": ports, "metrics": f"{LOOPBACK}:{page.server_port}"}), flush=True)
    await asyncio.Event().wait()


async def seconds_for(engine: AsyncLLM, tokens: int, at_most: float | None = None) -> float:
    """How long the engine writes an answer of so many tokens, or for how long it tried."""
    from vllm import SamplingParams

    [prompt] = await engine.renderer.render_cmpl_async([{"prompt": "Once"}])
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    started = time.monotonic()
    with suppress(TimeoutError):
        async with asyncio.timeout(at_most), aclosing(engine.generate(prompt, params, uuid4().hex)) as outputs:
            async for _ in outputs:
                pass
    return time.monotonic() - started


if __name__ == "__main__":
    asyncio.run(main())
