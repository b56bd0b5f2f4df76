"""Runs the steps that need an `AsyncLLM` over one of them: `python -m servebook.ways.custom_grpc.steps`."""

from __future__ import annotations

import asyncio
import json

from prometheus_client import start_http_server

from servebook.engine.arguments import engine_args, engine_argv
from servebook.engine.model import model_path
from servebook.settings import LOOPBACK, load_settings


async def main() -> None:
    """Start the engine and every step, print where they listen as one line of JSON, serve until a signal comes."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from servebook.ways.custom_grpc.steps import step_1_stream, step_2_cancel, step_3_status, step_4_limits

    settings = load_settings()
    engine = AsyncLLM.from_engine_args(engine_args(engine_argv(settings, model_path(settings))))
    page, _ = start_http_server(0, LOOPBACK)
    servers, ports = [], []
    for step in (step_1_stream, step_2_cancel, step_3_status, step_4_limits):
        server, port = await step.start(engine)
        servers.append(server)  # one that nobody holds ends
        ports.append(f"{LOOPBACK}:{port}")
    print(json.dumps({"steps": ports, "metrics": f"{LOOPBACK}:{page.server_port}"}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
