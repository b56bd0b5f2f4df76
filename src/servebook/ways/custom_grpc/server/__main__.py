"""Starts and stops the server: `python -m servebook.ways.custom_grpc.server --grpc-port 50051 … <vLLM arguments>`."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from pathlib import Path

import uvloop

from servebook.errors import ServebookError
from servebook.numbers import HOUR_SECONDS, number, port
from servebook.settings import LOOPBACK, MAX_FRONTS, is_loopback, load_settings
from servebook.tls import require_tls
from servebook.ways.custom_grpc.server.serving import serve, set_up_log, start_engine
from servebook.ways.custom_grpc.server.transport import require_port


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, and the rest, which is vLLM's."""
    parser = argparse.ArgumentParser(prog="python -m servebook.ways.custom_grpc.server", allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--grpc-port", type=port, default=50051)
    parser.add_argument("--metrics-port", type=port, default=9051, help="Prometheus, plain HTTP, on 127.0.0.1 only")
    calls, fronts, seconds = number(int, 1), number(int, 1, MAX_FRONTS), number(float, 0, HOUR_SECONDS)
    parser.add_argument("--max-calls", type=calls, default=512, help="open calls of a front; more: RESOURCE_EXHAUSTED")
    parser.add_argument("--fronts", type=fronts, default=1, help="processes that share the port and the engine")
    parser.add_argument("--grace", type=seconds, default=8.0, help="seconds that open calls have after SIGTERM")
    parser.add_argument("--tls-cert", type=Path, help="PEM; clients must then use TLS")
    parser.add_argument("--tls-key", type=Path, help="PEM")
    parser.add_argument("--tls-client-ca", type=Path, help="PEM; clients must then show a certificate of it (mTLS)")
    ours, engine_words = parser.parse_known_args(argv)
    if (ours.tls_cert is None) != (ours.tls_key is None) or (ours.tls_client_ca and not ours.tls_cert):
        parser.error("--tls-cert and --tls-key go together, and --tls-client-ca needs both")
    ours.key = load_settings().key
    if not is_loopback(ours.host) and not (ours.tls_cert and ours.key):
        parser.error(
            f"--host {ours.host} opens the server to the network: set SERVEBOOK_API_KEY, --tls-cert and --tls-key "
            "(for `servebook up grpc` SERVEBOOK_TLS_CERT and SERVEBOOK_TLS_KEY), or stay on 127.0.0.1"
        )
    return ours, engine_words


def main() -> None:
    """Run the server; exit code 1 with one line if it cannot start."""
    set_up_log()
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork is for CPUs (engine/faster_start.py)
    try:
        options, engine_words = read_arguments(sys.argv[1:])
        # What cannot be had is told now, and not when the engine has started.
        require_tls(options.tls_cert, options.tls_key, options.tls_client_ca, "Correct --tls-cert and the others.")
        require_port(options.host, options.grpc_port, "--grpc-port")
        require_port(LOOPBACK, options.metrics_port, "--metrics-port")
        if options.fronts > 1:
            from servebook.ways.custom_grpc.server.fronts import Fronts

            Fronts(options, engine_words).run()
        else:
            uvloop.run(serve(options, lambda: start_engine(engine_words)))
            # At its end Python would come to the engine once more, when the modules that it ends with are gone.
            atexit._run_exitfuncs()
            os._exit(0)
    except ServebookError as error:
        sys.exit(f"servebook.ways.custom_grpc.server: {error}")


if __name__ == "__main__":
    main()
