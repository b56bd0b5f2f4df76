"""Runs all steps, each in a process of its own: `python -m servebook.ways.kserve.steps UPSTREAM`."""

from __future__ import annotations

import json
import os
import sys

from servebook.processes import free_port
from servebook.settings import LOOPBACK, load_settings


def main(upstream: str, key: str | None) -> None:
    """Import KServe once, which takes seconds, fork for each step, print their addresses, and end with the first."""
    sys.argv[1:] = []  # KServe's import parses it, too
    # KServe would import it for its OpenAI endpoints, which no step has.
    sys.modules["vllm"] = None  # type: ignore[assignment]

    from servebook.ways.kserve.steps import step_0_blocking, step_1_await, step_2_errors, step_3_leave

    addresses = []
    for step in (step_0_blocking, step_1_await, step_2_errors, step_3_leave):
        port = free_port()
        if not os.fork():
            step.start(upstream, key, port)
            sys.exit()
        addresses.append(f"{LOOPBACK}:{port}")
    print(json.dumps(addresses), flush=True)
    os.wait()
    sys.exit("A step has ended.")


if __name__ == "__main__":
    main(sys.argv[1], load_settings().key)
