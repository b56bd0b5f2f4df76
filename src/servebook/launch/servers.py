"""The table of servers: how each is started, when it is ready, what it says on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from servebook.engine import engine_argv
from servebook.errors import LaunchError
from servebook.settings import TENSOR_MODEL_NAME, Settings, is_loopback

Endpoints = Mapping[str, str]
Argv = Callable[[Settings, Path, dict[str, Endpoints]], list[str]]

ENGINE_PHASES = {
    "starting the engine": "Initializing a V1 LLM engine",
    "loading weights": "Starting to load model",
    "warming up": "Loading weights took",
    "opening the port": "init engine",
}
"""What a reader sees while waiting, and the words in vLLM's log that begin it."""


@dataclass(frozen=True)
class ServerSpec:
    """One kind of server.

    `argv` gives the command; the word `"{http}"` (or another kind of port) stands for the port chosen
    at start. `ready` asks the server itself. `needs` names the servers that must be up before.
    """

    name: str
    about: str
    ports: tuple[str, ...]
    argv: Argv
    ready: Callable[[Endpoints], bool]
    has_engine: bool = True
    needs: tuple[str, ...] = ()


def http_ok(address: str, path: str, words: bytes = b"", timeout: float = 2.0) -> bool:
    """Whether GET answers 200 with `words` in the body; asked past any proxy, and without a slow import."""
    connection = HTTPConnection(address, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status == 200 and words in response.read()
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def grpc_serving(address: str, timeout: float = 2.0) -> bool:
    """Whether grpc.health.v1 answers SERVING for the whole server."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        except grpc.RpcError:
            return False


def _vllm(settings: Settings, model: Path, _: dict[str, Endpoints]) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"),
        *("--host", settings.host, "--port", "{http}"),
        "--disable-uvicorn-access-log",
        "--enable-scale-out",  # /inference/v1/generate: token ids in, token ids out (chapter 7)
        *engine_argv(settings, model),
    ]


def _module(name: str, *ports: str) -> Argv:
    """The command of a server of ours that holds an engine: `python -m servebook.<name>`."""

    def argv(settings: Settings, model: Path, _: dict[str, Endpoints]) -> list[str]:
        return [
            *(sys.executable, "-m", f"servebook.{name}", "--host", settings.host),
            *(word for kind in ports for word in (f"--{kind}-port", f"{{{kind}}}")),
            *engine_argv(settings, model),
        ]

    return argv


def _grpc(settings: Settings, model: Path, needs: dict[str, Endpoints]) -> list[str]:
    files = {"cert": settings.tls_cert, "key": settings.tls_key, "client-ca": settings.tls_client_ca}
    return [
        *_module("grpc_server", "grpc", "metrics")(settings, model, needs),
        *(word for name, file in files.items() if file for word in (f"--tls-{name}", str(file.resolve()))),
    ]


def _keyless(name: str, argv: Argv) -> Argv:
    """The same command, refused beyond this machine: the server checks no key."""

    def guarded(settings: Settings, model: Path, needs: dict[str, Endpoints]) -> list[str]:
        if not is_loopback(settings.host):
            raise LaunchError(
                f"{name} checks no API key, so it is not opened to {settings.host}.",
                "Unset SERVEBOOK_HOST; to publish it, put a proxy with TLS and keys in front.",
            )
        return argv(settings, model, needs)

    return guarded


def _gateway(settings: Settings, _: Path, needs: dict[str, Endpoints]) -> list[str]:
    upstream = needs["vllm"]["http"]
    return [
        *(sys.executable, "-m", "servebook.gateway", "--host", settings.host, "--http-port", "{http}"),
        *("--upstream", upstream if "://" in upstream else f"http://{upstream}"),
    ]


def _vllm_grpc(settings: Settings, model: Path, _: dict[str, Endpoints]) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm.entrypoints.launchers.grpc_server"),
        *("--host", settings.host, "--port", "{grpc}"),
        *engine_argv(settings, model),
    ]


def _room(settings: Settings, _: Path, needs: dict[str, Endpoints]) -> list[str]:
    if not settings.key:
        raise LaunchError(
            "room needs a key of the instructor's, which learners do not get.",
            "Set SERVEBOOK_API_KEY, or start the whole room with `servebook room start`, which makes one.",
        )
    upstream = needs["vllm"]["http"]
    return [
        *(sys.executable, "-m", "servebook.room", "--host", settings.host, "--http-port", "{http}"),
        *("--upstream", upstream if "://" in upstream else f"http://{upstream}"),
        *("--roll", str(settings.state_dir / "room" / "keys.json")),
        *("--places", str(settings.room_places), "--learner-places", str(settings.room_learner_places)),
        *("--requests-per-minute", str(settings.room_requests_per_minute)),
        *("--tokens-per-minute", str(settings.room_tokens_per_minute)),
    ]


def _hub(settings: Settings, _: Path, needs: dict[str, Endpoints]) -> list[str]:
    return [
        *(sys.executable, "-m", "servebook.room.hub", "--host", settings.host),
        *("--front", f"http://{needs['room']['http']}"),
        *("--http-port", "{http}", "--routes-port", "{routes}", "--api-port", "{api}"),
    ]


SERVERS: dict[str, ServerSpec] = {
    spec.name: spec
    for spec in (
        ServerSpec(
            name="vllm",
            about="vLLM's OpenAI server",
            ports=("http",),
            argv=_vllm,
            ready=lambda at: http_ok(at["http"], "/health"),
        ),
        ServerSpec(
            name="triton",
            about="Triton with the vLLM backend",
            ports=("grpc", "metrics", "http"),
            argv=_module("triton_backend", "grpc", "metrics", "http"),
            ready=lambda at: http_ok(at["http"], f"/v2/models/{TENSOR_MODEL_NAME}/ready"),
        ),
        ServerSpec(
            name="grpc",
            about="our llm.v1.LLMService",
            ports=("grpc", "metrics"),
            argv=_grpc,
            # Not asked by gRPC: under mTLS the launcher would need a certificate.
            ready=lambda at: http_ok(at["metrics"], "/metrics", b"servebook_grpc_serving 1.0"),
        ),
        ServerSpec(
            name="gateway",
            about="our FastAPI gateway, in front of vllm",
            ports=("http",),
            argv=_gateway,
            ready=lambda at: http_ok(at["http"], "/readyz"),
            has_engine=False,
            needs=("vllm",),
        ),
        ServerSpec(
            name="kserve",
            about="KServe's ModelServer with our predictor",
            ports=("grpc", "http"),
            argv=_keyless("kserve", _module("kserve_server", "grpc", "http")),
            ready=lambda at: http_ok(at["http"], f"/v2/models/{TENSOR_MODEL_NAME}/ready"),
        ),
        ServerSpec(
            name="vllm-grpc",
            about="vLLM's own gRPC server",
            ports=("grpc",),
            argv=_keyless("vllm-grpc", _vllm_grpc),
            ready=lambda at: grpc_serving(at["grpc"]),
        ),
        ServerSpec(
            name="room",
            about="a room's front to vllm: a key and a share for each learner",
            ports=("http",),
            argv=_room,
            ready=lambda at: http_ok(at["http"], "/room/health"),
            has_engine=False,
            needs=("vllm",),
        ),
        ServerSpec(
            name="hub",
            about="JupyterHub for a room of learners",
            ports=("http", "routes", "api"),
            argv=_hub,
            # The hub itself first: until it is there, the proxy would fill the log with its errors.
            ready=lambda at: http_ok(at["api"], "/hub/health") and http_ok(at["http"], "/hub/health"),
            has_engine=False,
            needs=("room",),
        ),
    )
}


def find_server(name: str) -> ServerSpec:
    """The spec of `name`.

    Raises:
        LaunchError: no such server; the message lists them.
    """
    try:
        return SERVERS[name]
    except KeyError:
        raise LaunchError(f"There is no server {name!r}.", f"Choose from {', '.join(SERVERS)}.") from None
