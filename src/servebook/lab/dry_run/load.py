"""Loads a model repository for real, all but the engine: a check has five seconds, an engine takes thirty.

Triton itself reads config.pbtxt and finds backend and version, the backend completes the configuration, and vLLM
reads the engine arguments and makes its own configuration of them. Either may run what the learner wrote, so neither
may look into the process that judges.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from servebook.environment import child_environment
from servebook.errors import LaunchError
from servebook.lab.handout.landlock import as_told
from servebook.lab.judge.process import hear
from servebook.launch.child import Child, run_child
from servebook.processes import free_port
from servebook.ways.triton_grpc.backend.server import own_shared_memory, tritonserver_command, tritonserver_env

LOAD_SECONDS = 30
FACTS_SECONDS = 90.0
"""How long vLLM may take over a model.json, and to be imported first, perhaps beside much else."""
LAST_WORDS = 500
COMPLAINT = re.compile(r"Error parsing.*|(?<=\] \").*(?:[Pp]oll failed|failed to load).*(?=\")")


class Refused(Exception):
    """Triton or vLLM does not take what it read; the message is its own."""


def loaded_config(repository: Path, name: str) -> Any:
    """Load the model `name` in a Triton of its own; return its ModelConfig as Triton and the backend completed it.

    Raises:
        Refused: Triton does not load it.
        LaunchError: Triton cannot run here.
    """
    with tempfile.TemporaryDirectory() as scratch, own_shared_memory(Path(scratch)) as words:
        command = tritonserver_command(
            repository, Path(scratch), grpc_port=free_port(), http_port=free_port(), metrics_port=free_port()
        )
        shutil.copy(Path(__file__).with_name("model.py"), Path(scratch) / "backends/vllm/model.py")
        command += words
        address = next(word for word in command if word.startswith("--grpc-port=")).partition("=")[2]
        # Ending in good order takes Triton three seconds, and there is nothing in it to be saved: no grace.
        with run_child(as_told(command), env=tritonserver_env(), grace=0) as triton:
            config = _config_once_ready(triton, f"127.0.0.1:{address}", name)
            said, ended = triton.said(), triton.process.poll() is not None
        if config is None:
            if ended and not COMPLAINT.search(said):
                raise LaunchError(f"Triton ended by itself, and named no model: {said[-LAST_WORDS:].strip()}")
            raise Refused("\n".join(COMPLAINT.findall(said)[:2]) or "it never becomes ready")
        return config


def _config_once_ready(triton: Child, address: str, name: str) -> Any:
    deadline = time.monotonic() + LOAD_SECONDS
    with triton_grpc.InferenceServerClient(address) as client:
        while triton.process.poll() is None and time.monotonic() < deadline:
            try:
                if client.is_server_ready():
                    return client.get_model_config(name).config
            except InferenceServerException as error:
                if error.status() != "StatusCode.UNAVAILABLE":
                    raise Refused(error.message()) from None
            time.sleep(0.02)
    return None


def engine_facts(version: Path) -> dict[str, Any]:
    """What vLLM makes of `version`/model.json: the values that 03.2 asks for, by name.

    Raises:
        Refused: the backend's reader or vLLM refuses it.
        LaunchError: the process that asks vLLM has died, or takes longer than FACTS_SECONDS.
    """
    process = vllm_process()
    assert process.stdin
    try:
        with suppress(BrokenPipeError):
            print(version, file=process.stdin, flush=True)
        answer = hear(process, FACTS_SECONDS)
    except BaseException:  # an Interrupt, too: what it says later would be taken for the next answer
        end()
        raise
    if not answer:
        end()
        raise LaunchError(
            f"The process that reads engine arguments has died, or takes longer than {FACTS_SECONDS:.0f} s.",
            "Is there enough memory? Look at what model.json names, and check again: another process is started.",
        )
    facts: dict[str, Any] = json.loads(answer)
    if "refused" in facts:
        raise Refused(facts["refused"])
    return facts


@cache
def vllm_process() -> subprocess.Popen[str]:
    """A process that has vLLM imported, which takes seconds, and keeps it for the next check. Ends with this one."""
    return subprocess.Popen(
        as_told([sys.executable, "-P", "-m", "servebook.lab.dry_run.engine_facts"]),
        env=child_environment() | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def end() -> None:
    """End the process that has vLLM imported, if there is one."""
    if vllm_process.cache_info().currsize:
        vllm_process().kill()
        vllm_process().communicate()
        vllm_process.cache_clear()
