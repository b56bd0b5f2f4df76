"""The table of servers: how each is started, when it is ready, what it says on the way."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path

from pydantic import SecretStr

from servebook.bearer import engine_key
from servebook.engine.arguments import engine_argv
from servebook.engine.rust_front import rust_front
from servebook.engine.start import WITH_ENGINE
from servebook.errors import LaunchError
from servebook.launch.probes import grpc_serving, http_ok, https_ok, listens, others_listen
from servebook.settings import LOOPBACK, TENSOR_MODEL_NAME, Settings, in_address, is_loopback, url_of
from servebook.tls import require_tls

Endpoints = Mapping[str, str]
Argv = Callable[[Settings, Path, dict[str, Endpoints]], list[str]]
Needs = Callable[[Settings], dict[str, Settings]]
Env = Callable[[Settings, Callable[[str], None]], dict[str, str]]

REPLICA = "vllm-replica-"
"""What the names of the router's engines begin with; their numbers count from 1."""

KEY_ON_EVERY_PATH = ["--middleware", "servebook.ways.openai_rest.key.KeyOnEveryPath"]
"""For a vLLM that others reach: beyond this machine, or from the desks of a room."""

ROOM_STEP_TOKENS = 24
"""What one step of a room's engine computes at most, on a CPU; see `in_a_room`."""

ENGINE_PHASES = {
    "Initializing a V1 LLM engine": "starting the engine",
    "Starting to load model": "loading weights",
    "Loading model from scratch": "loading weights",  # the same on a GPU
    "Loading weights took": "warming up",
    "JIT kernel warmup starting": "building kernels: long only the first time on a machine",
    "Capturing CUDA graphs": "capturing graphs",
    "init engine": "opening the port",
}
"""The words in vLLM's log that begin a phase, in their order, and what a reader sees from then on."""


@dataclass(frozen=True)
class ServerSpec:
    """One kind of server.

    `argv` gives the command; the word `"{http}"` (or another kind of port) stands for the port chosen
    at start; those that are `local` listen on 127.0.0.1 wherever the others do. `ready` asks the server itself.
    `needs` names the instances that must be up before, each with its settings; engines among them start at once.
    `env` adds to the environment; where it has to fetch something for that, it says so to its second argument.
    Where its log has the words `again`, it ended by chance and is started once more.
    One that does not check an API key on every port is refused beyond this machine.
    """

    name: str
    about: str
    ports: tuple[str, ...]
    argv: Argv
    ready: Callable[[Endpoints], bool]
    has_engine: bool = True
    checks_key: bool = True
    local: tuple[str, ...] = ()
    again: str = ""
    needs: Needs = lambda _: {}
    env: Env = lambda *_: {}

    def answers(self, at: Endpoints) -> bool:
        """Whether it is ready, and all of its ports are open, none of them another user's: several open theirs one
        after the other."""
        return self.ready(at) and all(map(listens, at.values())) and not any(map(others_listen, at.values()))


def _vllm(settings: Settings, model: Path, _: dict[str, Endpoints]) -> list[str]:
    return [
        *(*WITH_ENGINE, "vllm.entrypoints.cli.main", "serve"),
        *("--host", settings.host, "--port", "{http}"),
        "--disable-uvicorn-access-log",
        "--enable-scale-out",  # /inference/v1/generate: token ids in, token ids out
        *([] if is_loopback(settings.host) else KEY_ON_EVERY_PATH),
        *engine_argv(settings, model),
    ]


def _module(name: str, *ports: str) -> Argv:
    """The command of a server of ours that holds an engine, `servebook.ways.<name>`."""

    def argv(settings: Settings, model: Path, _: dict[str, Endpoints]) -> list[str]:
        return [
            *(*WITH_ENGINE, f"servebook.ways.{name}", "--host", settings.host),
            *(word for kind in ports for word in (f"--{kind}-port", f"{{{kind}}}")),
            *engine_argv(settings, model),
        ]

    return argv


def _grpc(settings: Settings, model: Path, needs: dict[str, Endpoints]) -> list[str]:
    _check_tls(settings)
    files = {"cert": settings.tls_cert, "key": settings.tls_key, "client-ca": settings.tls_client_ca}
    return [
        *_module("custom_grpc.server", "grpc", "metrics")(settings, model, needs),
        *(word for name, file in files.items() if file for word in (f"--tls-{name}", str(file.resolve()))),
        *(["--fronts", str(settings.fronts)] if settings.fronts > 1 else []),
    ]


def _gateway(settings: Settings, _: Path, needs: dict[str, Endpoints]) -> list[str]:
    return [
        *(sys.executable, "-m", "servebook.ways.fastapi_gateway.server", "--host", settings.host),
        *("--http-port", "{http}"),
        *("--upstream", url_of(needs["vllm"]["http"])),
    ]


def _vllm_grpc(settings: Settings, model: Path, _: dict[str, Endpoints]) -> list[str]:
    return [
        *(*WITH_ENGINE, "vllm.entrypoints.launchers.grpc_server"),
        *("--host", in_address(settings.host), "--port", "{grpc}"),
        *engine_argv(settings, model),
    ]


def _vllm_rs(settings: Settings, model: Path, needs: dict[str, Endpoints]) -> list[str]:
    return [*_vllm(settings, model, needs), "--grpc-port", "{grpc}", *_tls_of_vllm(settings)]


def _tls_of_vllm(settings: Settings) -> list[str]:
    """vLLM's options for the TLS files.

    Raises:
        LaunchError: they cannot be used.
    """
    _check_tls(settings)
    cert, key, authority = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if not (cert and key):
        return []
    own = ["--ssl-certfile", str(cert.resolve()), "--ssl-keyfile", str(key.resolve())]
    return own + (["--ssl-ca-certs", str(authority.resolve()), "--ssl-cert-reqs", "2"] if authority else [])


def _check_tls(settings: Settings) -> None:
    remedy = "Correct SERVEBOOK_TLS_CERT, SERVEBOOK_TLS_KEY and SERVEBOOK_TLS_CLIENT_CA, or unset all three."
    require_tls(settings.tls_cert, settings.tls_key, settings.tls_client_ca, remedy)


def _rust_env(settings: Settings, say: Callable[[str], None]) -> dict[str, str]:
    return {
        "VLLM_USE_RUST_FRONTEND": "1",
        "VLLM_RUST_FRONTEND_PATH": str(rust_front(settings, say)),
        "NO_COLOR": "1",  # its part of the log
    }


def behind(settings: Settings) -> Settings:
    """The settings of what stands behind a front: it listens on this machine only, wherever the front listens."""
    return settings.model_copy(update={"host": LOOPBACK})


def in_a_room(settings: Settings) -> Settings:
    """The settings of a room's engine: on a CPU with short steps, so that nobody's long prompts hold up the others.

    All who are in a step wait until it is computed, and vLLM's own computes up to 2,048 tokens of prompts. Measured on
    2 cores (AMD EPYC), the p99 between one learner's tokens beside another's 16 prompts of 2,000 tokens: 23 times what
    it is alone; with steps of 64 tokens 5 times, of 32 3.1, of 24 2.5. The price: a prompt of 256 tokens is read in
    1.2 s instead of 0.6, four of 1,900 in 48 s instead of 30, and of more than 24 answers some wait for a step.
    """
    if settings.on_gpu:
        return settings
    words = f"--max-num-batched-tokens {ROOM_STEP_TOKENS} --max-num-seqs {ROOM_STEP_TOKENS}"
    return settings.model_copy(update={"engine_args": f"{words} {settings.engine_args}"})


def rooms_engine(settings: Settings) -> Settings:
    """The settings of the engine behind a room's front: `in_a_room`, and if it is started here with a key of its own.

    Desks on this machine reach its port as well: no path of it serves who has not that key.
    """
    engine = in_a_room(behind(settings))
    if settings.engine_url or not settings.key:
        return engine
    words = f"{shlex.join(KEY_ON_EVERY_PATH)} {engine.engine_args}"
    return engine.model_copy(update={"api_key": SecretStr(engine_key(settings.key)), "engine_args": words})


def _replicas(settings: Settings) -> dict[str, Settings]:
    """The router's engines: each with a port of its own and, on a CPU, with cores of its own.

    Raises:
        LaunchError: there are fewer cores than replicas, or there is no router to put in front.
    """
    if find_spec("vllm_router") is None:
        raise LaunchError("vLLM's router is not installed.", "Run `make setup`: it is in the lock.")
    chosen = map(int, settings.cores.split(",")) if settings.cores else os.sched_getaffinity(0)
    cores, number = sorted(chosen), settings.replicas
    others = {settings.port(spec.name, kind) for spec in SERVERS.values() for kind in spec.ports}
    ports = (port for port in count(settings.router_metrics_port + 1) if port not in others)
    if not settings.on_gpu and number > len(cores):
        raise LaunchError(
            f"{number} replicas need {number} cores, one each, and {len(cores)} can be used here.",
            f"Ask for --replicas {len(cores)} or fewer.",
        )

    def replica(index: int) -> Settings:
        mine = cores[index * len(cores) // number : (index + 1) * len(cores) // number]
        return settings.model_copy(
            update={
                "vllm_http_port": next(ports),
                "cores": ",".join(map(str, mine)),
            }
        )

    return {f"{REPLICA}{index + 1}": replica(index) for index in range(number)}


def _router(settings: Settings, _: Path, needs: dict[str, Endpoints]) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm_router.launch_router"),
        *("--host", settings.host, "--port", "{http}"),
        *("--prometheus-host", settings.host, "--prometheus-port", "{metrics}"),
        *("--policy", settings.router_policy),
        *("--worker-urls", *(f"http://{at['http']}" for at in needs.values())),
        # A dead replica is left out after 3 failures in a row (the circuit breaker, asked again after 5 s) or two
        # checks, whichever comes first; the defaults are 10 failures, a minute, and checks a minute apart.
        *("--cb-failure-threshold", "3", "--cb-success-threshold", "1", "--cb-timeout-duration-secs", "5"),
        *("--health-check-interval-secs", "2", "--health-failure-threshold", "2", "--health-success-threshold", "1"),
    ]


def _front(settings: Settings, _: Path, needs: dict[str, Endpoints]) -> list[str]:
    if not settings.key:
        raise LaunchError(
            "front needs a key of the instructor's, which learners do not get.",
            "Set SERVEBOOK_API_KEY, or start the whole room with `servebook room start`, which makes one.",
        )
    return [
        *(sys.executable, "-m", "servebook.room", "--host", settings.host, "--http-port", "{http}"),
        *("--upstream", url_of(needs["vllm"]["http"])),
        *([] if settings.engine_url else ["--own-engine"]),
        *("--roll", str(settings.state_dir / "room" / "keys.json")),
        *("--places", str(settings.room.places), "--learner-places", str(settings.room.learner_places)),
        *("--requests-per-minute", str(settings.room.requests_per_minute)),
        *("--tokens-per-minute", str(settings.room.tokens_per_minute)),
    ]


def _hub(settings: Settings, _: Path, needs: dict[str, Endpoints]) -> list[str]:
    return [
        *(sys.executable, "-m", "servebook.room.hub", "--host", settings.host),
        *("--front", f"http://{needs['front']['http']}"),
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
            about="Triton with this workbook's vLLM backend",
            ports=("grpc", "metrics", "http"),
            argv=_module("triton_grpc.backend", "grpc", "metrics", "http"),
            ready=lambda at: http_ok(at["http"], f"/v2/models/{TENSOR_MODEL_NAME}/ready"),
            checks_key=False,
            again="Triton lost sight of its backend",  # as the backend's guardian says
        ),
        ServerSpec(
            name="grpc",
            about="our llm.v1.LLMService",
            ports=("grpc", "metrics"),
            argv=_grpc,
            local=("metrics",),  # Prometheus' page has neither TLS nor a key
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
            needs=lambda settings: {"vllm": behind(settings)},
        ),
        ServerSpec(
            name="kserve",
            about="KServe's ModelServer with our predictor",
            ports=("grpc", "http"),
            argv=_module("kserve.server", "grpc", "http"),
            ready=lambda at: http_ok(at["http"], f"/v2/models/{TENSOR_MODEL_NAME}/ready"),
            checks_key=False,
        ),
        ServerSpec(
            name="vllm-grpc",
            about="vLLM's own gRPC server",
            ports=("grpc",),
            argv=_vllm_grpc,
            ready=lambda at: grpc_serving(at["grpc"]),
            checks_key=False,
        ),
        ServerSpec(
            name="vllm-rs",
            about="vLLM's Rust front end: REST and gRPC",
            ports=("http", "grpc"),
            argv=_vllm_rs,
            ready=lambda at: http_ok(at["http"], "/health") or https_ok(at["http"], "/health"),
            checks_key=False,  # its REST port does, but its gRPC port generates, and even sleeps, for anybody
            env=_rust_env,
        ),
        ServerSpec(
            name="router",
            about="vLLM's router, in front of replicas of vllm",
            ports=("http", "metrics"),
            argv=_router,
            ready=lambda at: http_ok(at["http"], "/readiness"),
            has_engine=False,
            checks_key=False,  # the replicas check keys, but anybody could add or remove a replica
            needs=_replicas,
        ),
        ServerSpec(
            name="front",
            about="a room's front to vllm: a key and a share for each learner",
            ports=("http",),
            argv=_front,
            ready=lambda at: http_ok(at["http"], "/room/health"),
            has_engine=False,
            needs=lambda settings: {"vllm": rooms_engine(settings)},
        ),
        ServerSpec(
            name="hub",
            about="JupyterHub for a room of learners",
            ports=("http", "routes", "api"),
            argv=_hub,
            local=("routes", "api"),
            # The hub itself first: until it is there, the proxy would fill the log with its errors.
            ready=lambda at: (
                http_ok(at["api"], "/hub/health")
                and (https_ok(at["http"], "/hub/health") or http_ok(at["http"], "/hub/health"))
            ),
            has_engine=False,
            needs=lambda settings: {"front": behind(settings)},
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


def kind_of(instance: str) -> ServerSpec:
    """The spec of an instance that the table itself names: a replica is a vllm by another name."""
    return find_server("vllm" if instance.startswith(REPLICA) else instance)
