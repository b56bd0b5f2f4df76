"""From a model that answers once to `backend/`, one idea at a time: each step changes a few lines of the one before.

Each is a model of Triton's `python` backend. None has an engine: it hands on to the Triton that has one. `with
ladder(address) as steps` serves them all, from one repository; `stream` asks one of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from servebook.launch.child import run_child
from servebook.launch.probes import http_ok
from servebook.processes import free_port
from servebook.settings import LOOPBACK
from servebook.ways.triton_grpc.backend.server import own_shared_memory, tritonserver_command, tritonserver_env
from servebook.ways.triton_grpc.client import TritonClient, infer_inputs

STEPS = sorted(Path(__file__).parent.glob("step_*.py"))
"""Their files, in order."""

INPUTS = ("text_input", "sampling_parameters")
"""What a step takes of the inputs that the chapter's client sends."""

START_SECONDS = 120


@contextmanager
def ladder(upstream: str) -> Iterator[str]:
    """Serve the models `step_0` to `step_3` and give their gRPC address; `upstream` is that of the engine's Triton.

    Raises:
        LaunchError: it did not start; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder, own_shared_memory(Path(folder)) as words:
        repository = Path(folder) / "models"
        for number, step in enumerate(STEPS):
            version = repository / f"step_{number}" / "1"
            version.mkdir(parents=True)
            (version / "model.py").write_text(step.read_text(encoding="utf-8"), encoding="utf-8")
            (version.parent / "config.pbtxt").write_text(
                f'backend: "python"\nparameters {{ key: "upstream" value: {{ string_value: "{upstream}" }} }}\n',
                encoding="utf-8",
            )
        grpc, http, metrics = free_port(), free_port(), free_port()
        command = tritonserver_command(repository, Path(folder), grpc_port=grpc, http_port=http, metrics_port=metrics)
        ready = f"{LOOPBACK}:{http}", "/v2/health/ready"
        with run_child(
            [*command, *words],
            lambda _: http_ok(*ready),
            name="the ladder",
            env=tritonserver_env(),
            seconds=START_SECONDS,
            grace=0,  # Triton would wait for the request that step 2 never answers
        ):
            yield f"{LOOPBACK}:{grpc}"


def stream(address: str, step: int, prompt: str, *, timeout: float = 60, **sampling: Any) -> Generator[str]:
    """Yield the texts of a step's responses as they come; closing the generator cancels the request.

    Raises:
        InferenceServerException: the step refused it, or `timeout` seconds have passed.
    """
    inputs = [each for each in infer_inputs(prompt, stream=True, **sampling) if each.name() in INPUTS]
    with closing(TritonClient(address, f"step_{step}")._responses(inputs, timeout)) as responses:
        for response in responses:
            yield response["text_output"][0].decode()
