"""A real server that is up at once, in the place of vLLM's: for the tests of `launch` itself.

It has a child and, in a session of its own, a grandchild: the worst that an engine's workers can be.
`python tiny_server.py cli up vllm` is the command line with it, `python tiny_server.py kernel` a process that
holds a lease as a notebook does; with a word more it starts it by `serve_all`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHILD = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
time.sleep(600)
"""
AGAIN = "nobody's fault"
GRANDCHILD = "import time; time.sleep(600)"
DEAF_GRANDCHILD = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + GRANDCHILD


class Handler(BaseHTTPRequestHandler):
    healthy = True

    def do_GET(self) -> None:
        """Health, which GET /break ends: as a server that has lost its engine but not its life."""
        if self.path == "/break":
            Handler.healthy = False
        self.send_response({"/health": 200 if self.healthy else 503, "/break": 200}.get(self.path, 404))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve_http(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--delay", type=float, default=0, help="seconds until it listens")
    parser.add_argument("--until", type=Path, help="a file; it listens once that is there")
    parser.add_argument("--linger", type=float, default=0, help="seconds that it takes to end")
    parser.add_argument("--deaf", action="store_true", help="the grandchild ignores SIGTERM")
    parser.add_argument("--die", type=int, help="exit code of a server that does not come up")
    parser.add_argument("--lost", type=Path, help="a file; where it is not there it is made, and the server ends")
    for ours in ("--max-num-batched-tokens", "--max-num-seqs", "--middleware"):
        parser.add_argument(ours, help="of a room's engine; this one computes nothing")
    args = parser.parse_args(words)
    print("tiny: Starting to load model", flush=True)
    if args.die is not None:
        print("tiny: the weights are torn", flush=True)
        sys.exit(args.die)

    if args.lost and not args.lost.exists():
        args.lost.touch()
        sys.exit(f"tiny: {AGAIN}")

    def end(*_: object) -> None:
        time.sleep(args.linger)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    subprocess.Popen([sys.executable, "-c", CHILD, DEAF_GRANDCHILD if args.deaf else GRANDCHILD])
    time.sleep(args.delay)
    while args.until and not args.until.exists():
        time.sleep(0.02)
    ThreadingHTTPServer.address_family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with ThreadingHTTPServer((args.host, args.port), Handler) as server:
        server.serve_forever()


def install() -> None:
    """Put this server in vLLM's place in the table; SERVEBOOK_ENGINE_ARGS goes to it."""
    from servebook.launch import SERVERS, keep

    keep.BROKEN_SECONDS = 2
    SERVERS["vllm"] = replace(
        SERVERS["vllm"],
        has_engine=False,
        again=AGAIN,
        argv=lambda settings, model, needs: [
            *(sys.executable, str(Path(__file__)), "server", "--host", settings.host, "--port", "{http}"),
            *shlex.split(settings.engine_args),
        ],
    )


def main() -> None:
    command, *words = sys.argv[1:]
    if command == "server":
        return serve_http(words)
    install()
    if command == "cli":
        from servebook import cli

        sys.argv = ["servebook", *words]
        return cli.main()
    from servebook import launch

    server = launch.serve_all(["vllm"])["vllm"] if words else launch.serve("vllm")
    print(json.dumps({"pid": server.pid, **server.endpoints}), flush=True)
    sys.stdin.read()
    return None


if __name__ == "__main__":
    main()
