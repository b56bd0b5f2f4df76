"""What a rehearsing Triton runs in place of the `vllm` backend: the same, without the engine."""

from __future__ import annotations

import os
import sys

# The stub's interpreter is an isolated one: it ignores PYTHONPATH.
sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))

from servebook.ways.triton_grpc.backend.model import TritonPythonModel as Backend  # noqa: E402


class TritonPythonModel(Backend):
    """Completes the configuration, and leaves it at that."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start nothing."""
