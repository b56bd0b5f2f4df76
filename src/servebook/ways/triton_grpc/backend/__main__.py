"""`python -m servebook.ways.triton_grpc.backend`: prepares a model repository and becomes tritonserver."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from servebook.errors import ServebookError
from servebook.numbers import port
from servebook.settings import load_settings
from servebook.ways.triton_grpc.backend.files import ModelFilesError
from servebook.ways.triton_grpc.backend.repository import MODEL_REPOSITORY, render_repository
from servebook.ways.triton_grpc.backend.server import tritonserver_command, tritonserver_env


def main() -> None:
    """Read the words, lay out the files, become tritonserver."""
    parser = argparse.ArgumentParser(
        prog="python -m servebook.ways.triton_grpc.backend",
        description="Triton with the vllm backend. Words not listed here are vLLM's and go into model.json.",
        allow_abbrev=False,  # --model is vLLM's, not --model-repository
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--grpc-port", type=port, default=8001)
    parser.add_argument("--metrics-port", type=port, default=8002)
    parser.add_argument("--http-port", type=port, default=8003)
    parser.add_argument("--model-repository", type=Path, help="serve this one as it is, without vLLM's words")
    parser.add_argument("--shared-memory", action="store_true", help="let clients have their tensors there")
    options, engine_words = parser.parse_known_args()
    if options.model_repository and engine_words:
        parser.error(f"{engine_words[0]}: with --model-repository, engine arguments belong into its model.json")
    if other := next((word for word in engine_words if not word.isascii()), ""):
        parser.error(f"Triton reads ASCII only, and this is not: {other} (set SERVEBOOK_CACHE_DIR or SERVEBOOK_MODEL)")
    try:
        settings = load_settings()
        scratch = settings.state_dir / "triton"
        command = tritonserver_command(
            options.model_repository or render_repository(MODEL_REPOSITORY, scratch, engine_words),
            scratch,
            host=options.host,
            grpc_port=options.grpc_port,
            http_port=options.http_port,
            metrics_port=options.metrics_port,
            gpu=settings.on_gpu,
            shared_memory=options.shared_memory,
        )
    except (ServebookError, ModelFilesError) as error:
        sys.exit(f"servebook: {error}")
    # Becomes it rather than starts it: who ends this process ends Triton.
    os.execve(command[0], command, os.environ | tritonserver_env(gpu=settings.on_gpu))


if __name__ == "__main__":
    main()
