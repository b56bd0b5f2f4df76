"""The protocol arm: servers around the scripted token source, so that what is left is the cost of the protocol."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from servebook.engine.arguments import engine_argv
from servebook.launch import Server, ServerSpec, find_server, serve
from servebook.launch.table import Endpoints
from servebook.settings import TENSOR_MODEL_NAME, Settings

SCRIPTED_RATE = float(os.environ.get("SERVEBOOK_SCRIPTED_RATE", "20"))
"""Tokens a second for each stream: what the engine of a 2-core machine gives to each of 25. One H200 gives the bundled
model's 190 to each of 32, which takes more cores."""

TRITON_CONFIG = f"""\
name: "{TENSOR_MODEL_NAME}"
backend: "python"
instance_group [{{ count: 1, kind: KIND_CPU }}]
"""


def serve_scripted(server: str, settings: Settings) -> Server:
    """Start `server` without an engine, as an instance of its own; a server in front of vLLM gets a scripted vLLM.

    Raises:
        LaunchError: it cannot start.
    """
    instance = f"{server}-scripted"
    if not find_server(server).has_engine:
        return serve(server, instance=instance, settings=settings, engine_url=serve_scripted("vllm", settings).url)
    return serve(server, instance=instance, settings=settings, spec=scripted(server))


def scripted(server: str) -> ServerSpec:
    """How to start `server` around the scripted source (`bench.scripted`) instead of an engine."""
    spec = find_server(server)

    def argv(settings: Settings, model: Path, needs: dict[str, Endpoints]) -> list[str]:
        words = spec.argv(settings, model, needs)
        engine_words = engine_argv(settings, model)
        if server == "triton":  # starts its engine in a stub of its own, so the repository says what is in there
            own = words[: len(words) - len(engine_words)]
            return [*own, "--model-repository", str(_triton_repository(settings, engine_words))]
        python, dash_m, *module = words
        return [python, dash_m, "servebook.bench.scripted", *module]

    return replace(spec, argv=argv, has_engine=False)


def _triton_repository(settings: Settings, engine_words: list[str]) -> Path:
    from servebook.ways.triton_grpc.backend.files import ENGINE_ARGS, engine_words_as_json

    repository = settings.state_dir / "bench" / "triton-scripted"
    version = repository / TENSOR_MODEL_NAME / "1"
    version.mkdir(parents=True, exist_ok=True)
    (version.parent / "config.pbtxt").write_text(TRITON_CONFIG)
    (version / ENGINE_ARGS).write_text(json.dumps(engine_words_as_json(engine_words)))
    shutil.copyfile(Path(__file__).with_name("scripted_triton.py"), version / "model.py")
    return repository
