"""Lets EngineCore begin as a fork of its server on a CPU too, where vLLM spawns it whatever it is told.

A spawned one is a new interpreter, which imports torch and vLLM once more. Measured (2 cores, Intel Xeon): ready after
23 s, of which 26 s of a core; forked after 15 s and 17 s, and with 0.2 GB less.

Only vLLM's own HTTP server asks for it (`launch/table.py`): a process in which gRPC's threads run cannot be forked.

vLLM loads this into each of its processes, as a plugin (`vllm.general_plugins` in pyproject.toml).
"""

from __future__ import annotations

import os
import signal
from typing import Any

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


def register() -> None:
    """Where "fork" is asked for, let it stand."""
    if os.environ.get(METHOD) != "fork":
        return
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_keep(config: Any) -> None:
        check(config)
        spans = config.observability_config.otlp_traces_endpoint  # leave by gRPC
        if not spans and config.parallel_config.world_size_across_dp == 1:  # the workers of several stay vLLM's affair
            os.environ[METHOD] = "fork"

    CpuPlatform.check_and_update_config = staticmethod(check_and_keep)
    # The event loop of the server would hear of the engine's signals.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
