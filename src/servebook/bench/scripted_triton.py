"""Triton's `vllm` backend around the scripted source. `bench.protocol` copies this file into a model repository."""

from __future__ import annotations

import locale
import os
import sys

# The stub's interpreter is an isolated one: it ignores PYTHONPATH.
sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))

from servebook.ways.triton_grpc.backend.model import TritonPythonModel as VllmBackend  # noqa: E402


class TritonPythonModel(VllmBackend):
    """The unchanged backend, but for the engine that it starts."""

    def initialize(self, args: dict[str, str]) -> None:
        locale.setlocale(locale.LC_ALL, "C.UTF-8")  # as in the backend, before vLLM is imported
        from servebook.bench.scripted import install

        install()
        super().initialize(args)
