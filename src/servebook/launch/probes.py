"""Whether a server answers, and whose it is: asked past any proxy, and without a slow import."""

from __future__ import annotations

import os
import socket
import ssl
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

from servebook.processes import listeners

PROBE_SECONDS = 2.0


def listens(address: str) -> bool:
    """Whether somebody takes connections at `address`, "host:port"; an IPv6 host is in brackets."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def others_listen(address: str) -> bool:
    """Whether a program of another user takes connections at `address`, "host:port" of this machine.

    A port is free when it is chosen, and its server listens some seconds later: somebody may take it meanwhile, and
    would be told keys. Where the kernel does not say, this is False.
    """
    host, _, port = address.rpartition(":")
    with suppress(OSError):
        return bool(_who_listens(host.strip("[]"), int(port)) - {os.getuid()})
    return False


def only_ours(url: str) -> bool:
    """Whether programs of this user, and of no other, listen where a URL of this machine leads.

    Who sends a secret there asks first: when a server has ended, another user may take its port.
    """
    at = urlsplit(url)
    assert at.hostname, f"{url} names no host"
    with suppress(OSError):
        return _who_listens(at.hostname, at.port or 80) == {os.getuid()}
    return False


def _who_listens(host: str, port: int) -> set[int]:
    """The users whose programs listen at `host`, at each address that such a name as "localhost" has.

    Raises:
        OSError: there is no such host, or the kernel does not say.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return set().union(*(listeners(str(each[4][0]), port) for each in found))


def http_ok(address: str, path: str, words: bytes = b"") -> bool:
    """Whether GET answers 200 with `words` in the body."""
    connection = HTTPConnection(address, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status == 200 and words in response.read()
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def https_ok(address: str, path: str) -> bool:
    """As `http_ok` of a server with TLS, whoever signed its certificate; one that asks for ours (mTLS) is there too."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # with 1.3 a refusal may come, or get lost, after the handshake
    connection = HTTPSConnection(address, timeout=PROBE_SECONDS, context=context)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except ssl.SSLError as error:
        return error.reason == "SSLV3_ALERT_HANDSHAKE_FAILURE"
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def grpc_serving(address: str) -> bool:
    """Whether grpc.health.v1 answers SERVING for the whole server."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PROBE_SECONDS)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        except grpc.RpcError:
            return False
