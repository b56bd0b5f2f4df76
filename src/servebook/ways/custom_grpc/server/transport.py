"""The listening side of the server: port, TLS, keepalive, limits, reflection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from servebook.errors import LaunchError
from servebook.processes import can_bind
from servebook.protos.llm.v1 import llm_pb2_grpc
from servebook.settings import LOOPBACK, in_address
from servebook.ways.custom_grpc.server.auth import KeyInterceptor
from servebook.ways.custom_grpc.server.health import SERVICE, Health
from servebook.ways.limits import BODY_SECONDS

MAX_MESSAGE_BYTES = 4 * 2**20
"""Of one request or response; a larger request is refused with RESOURCE_EXHAUSTED before it is decoded."""

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # More wait at the client. Answers that nobody reads, of health to callers without a key too, stay until it leaves.
    ("grpc.max_concurrent_streams", 1024),
    # Notice a client that vanished without a word (a dropped network) within 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A unary call is silent while the engine works: without these, a client that pings meanwhile is
    # thrown out with too_many_pings. gRPC ignores a misspelt name: a test holds the second, which alone would do.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]


@dataclass(frozen=True)
class Tls:
    """PEM files: the server's certificate and key; with `client_ca`, clients need a certificate too (mTLS)."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Read the files; whether they fit was seen before (`require_tls`)."""
        return grpc.ssl_server_credentials(
            [(self.key.read_bytes(), self.certificate.read_bytes())],
            root_certificates=self.client_ca.read_bytes() if self.client_ca else None,
            require_client_auth=self.client_ca is not None,
        )


def make_server(
    address: str,
    servicer: llm_pb2_grpc.LLMServiceServicer,
    health: Health,
    key: str | None,
    tls: Tls | None,
    shared: bool = False,
) -> grpc.aio.Server:
    """A server bound to `address` ("host:port"), not started yet; others may listen there too if it is `shared`.

    Raises:
        LaunchError: the port is taken, or a TLS file cannot be read or used any more.
    """
    # gRPC's default is to share: a second server would start unnoticed, and get some of the calls.
    options = [*OPTIONS, ("grpc.so_reuseport", int(shared))]
    server = grpc.aio.server(interceptors=[KeyInterceptor(key)] if key else [], options=options)
    llm_pb2_grpc.add_LLMServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name), server)
    try:
        if tls:
            server.add_secure_port(address, tls.credentials())
        else:
            server.add_insecure_port(address)
    except (RuntimeError, OSError) as error:
        raise LaunchError(
            f"Cannot listen on {address}: {error}", "Choose another --grpc-port, or check the TLS files."
        ) from None
    return server


def require_port(host: str, port: int, option: str) -> None:
    """Look whether a server can listen there.

    Raises:
        LaunchError: the port is taken or not for this user, or `host` is no address of this machine.
    """
    address = f"{in_address(host)}:{port}"
    try:
        if can_bind(host, port):
            return
        problem, remedy = f"Cannot listen on {address}: the port is taken.", f"Choose another {option}."
    except PermissionError as error:
        problem = f"Cannot listen on {address}: {error.strerror}."
        remedy = f"Choose another {option}, from 1024 upwards."
    except OSError as error:
        problem, remedy = f"Cannot listen on {address}: {error.strerror}.", "Choose another --host."
    raise LaunchError(problem, remedy)


def show_metrics(port: int, registry: CollectorRegistry = REGISTRY) -> None:
    """Prometheus' page, on 127.0.0.1 only: it asks for no key.

    Raises:
        LaunchError: the port is taken.
    """
    try:
        page, _ = start_http_server(port, LOOPBACK, registry)
    except OSError as error:
        raise LaunchError(
            f"Cannot show metrics on {LOOPBACK}:{port}: {error.strerror}", "Choose another --metrics-port."
        ) from None
    # Each connection has a thread of the server's, and would keep it while nobody asks for anything.
    page.RequestHandlerClass.timeout = BODY_SECONDS  # type: ignore[attr-defined]
    page.handle_error = lambda *_: None  # type: ignore[method-assign]  # it would write a traceback for each
