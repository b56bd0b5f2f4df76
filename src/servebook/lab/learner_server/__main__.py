"""Runs a server that a learner wrote: `python -m servebook.lab.learner_server FILE PORT`.

FILE defines `app`, an ASGI application, or `Servicer`, a class that implements `llm.v1.LLMService` with grpc.aio, and
may have a list of `interceptors` for it. Beside a Servicer there is grpc.health.v1.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from servebook.lab.handout.landlock import confine_as_told


def load(path: Path) -> ModuleType:
    """Import a file; modules beside it are found too."""
    sys.path.append(str(path.parent))  # last: a random.py of the learner's stands in nobody's way
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def serve_grpc(module: ModuleType, port: int) -> None:
    """Serve `module.Servicer` until the process ends."""
    import grpc
    from grpc_health.v1 import health, health_pb2_grpc

    from servebook.protos.llm.v1 import llm_pb2_grpc

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)], interceptors=list(getattr(module, "interceptors", [])))
    llm_pb2_grpc.add_LLMServiceServicer_to_server(module.Servicer(), server)
    health_pb2_grpc.add_HealthServicer_to_server(
        health.aio.HealthServicer(),  # type: ignore[attr-defined]  # the stubs are older
        server,
    )
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def main() -> None:
    """Load the file and serve it."""
    confine_as_told()
    path, port = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    module = load(path)
    if hasattr(module, "app"):
        import uvicorn

        from servebook.engine.arguments import KEEP_ALIVE_SECONDS

        # A caller who pauses must not meet the end of a connection.
        uvicorn.run(module.app, port=port, log_level="warning", timeout_keep_alive=KEEP_ALIVE_SECONDS)
    elif hasattr(module, "Servicer"):
        asyncio.run(serve_grpc(module, port))
    else:
        sys.exit(f"{path.name} defines neither app nor Servicer")


if __name__ == "__main__":
    main()
