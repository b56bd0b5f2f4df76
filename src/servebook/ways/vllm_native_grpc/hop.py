"""vLLM's router in front of a Rust front end, over gRPC: it makes token ids of a chat, and text of token ids."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servebook.engine.model import model_path
from servebook.launch import Server
from servebook.launch.child import run_child
from servebook.launch.probes import http_ok
from servebook.processes import free_port
from servebook.settings import Settings


@contextmanager
def router_over_grpc(replica: Server, settings: Settings) -> Iterator[str]:
    """The URL of a router whose one replica is the gRPC port of `replica`, a vllm-rs, while the block lasts.

    It takes chats, whole or streamed, and completions whose prompt is one list of token ids (vllm-router 0.1.17). It
    asks for no key. gRPC with TLS it does not speak.

    Raises:
        LaunchError: the router did not start.
    """
    port, metrics_port = free_port(), free_port()
    words = [
        *(sys.executable, "-m", "vllm_router.launch_router"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
        *("--worker-urls", f"grpc://{replica.grpc}"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        # It looks for the tokenizer under the name that the replica serves: in its working folder, then on the Hub.
        link = Path(folder, replica.model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(model_path(settings), target_is_directory=True)
        offline = {"HF_HUB_OFFLINE": "1"}
        ready = f"127.0.0.1:{port}"
        with run_child(words, lambda _: http_ok(ready, "/readiness"), name="router", env=offline, cwd=Path(folder)):
            yield f"http://{ready}"
