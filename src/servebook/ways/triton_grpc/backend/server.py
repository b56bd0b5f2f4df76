"""The command that runs a real tritonserver on this machine: binary, libraries, backends, ports."""

from __future__ import annotations

import filecmp
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from servebook.errors import LaunchError
from servebook.settings import in_address, is_loopback

SHARED_MEMORY = Path("/dev/shm")
LOCKED = ("model-repository", "trace", "logging")
NOBODY = "no\nbody"
"""The header that opens what is locked. Every user of the machine can read it in /proc, so it is one that cannot be
sent: a line ends a header in HTTP/1.1, and Triton's HTTP/2 refuses the name."""


def tritonserver_command(
    repository: Path,
    scratch: Path,
    *,
    grpc_port: int,
    http_port: int,
    metrics_port: int,
    host: str = "127.0.0.1",
    gpu: bool = False,
    shared_memory: bool = False,
) -> list[str]:
    """The words that start Triton with every model of `repository`; run them with `tritonserver_env` of the same `gpu`.

    `scratch` is a folder of your own that may be kept from run to run: the backends are laid out there.
    Both backends are at hand, `vllm` (ours) and `python`. With `shared_memory` clients may have their tensors there.

    Raises:
        LaunchError: Triton is not installed, there is no such repository, or `host` is not of this machine.
    """
    if not is_loopback(host):
        raise LaunchError(
            f"Triton knows no API keys, so it is not opened to the network ({host}).",
            "Leave SERVEBOOK_HOST at 127.0.0.1, and reach it from elsewhere through an SSH tunnel.",
        )
    for place in (repository, scratch, _tritonserver(), Path(sys.executable)):
        if not str(place).isascii():
            raise LaunchError(
                f"Triton takes no folder with other letters than ASCII's, and this is one: {place}.",
                "Set SERVEBOOK_STATE_DIR and SERVEBOOK_CACHE_DIR to other folders, or move the clone.",
            )
    if not repository.is_dir():
        raise LaunchError(f"There is no model repository {repository}.", "Name a folder that holds model folders.")
    # To load a model is to run its code, and through shared memory one reaches Triton's own. A model can be unloaded by
    # its own backend (that needs the mode "explicit"), but nobody may ask for any of it over the network.
    locked = f"{','.join([*LOCKED, *([] if shared_memory else ['shared-memory'])])}:{NOBODY}=x"
    return [
        str(_tritonserver() / "bin/tritonserver"),
        f"--model-repository={repository}",
        "--model-control-mode=explicit",
        "--load-model=*",
        f"--backend-directory={lay_out_backends(scratch / 'backends')}",
        f"--grpc-address={in_address(host)}",
        *(f"--{kind}-address={host if ':' not in host else f'ipv6:{host}'}" for kind in ("http", "metrics")),
        *(f"--grpc-port={grpc_port}", f"--http-port={http_port}", f"--metrics-port={metrics_port}"),
        *(f"--grpc-restricted-protocol={locked}", f"--http-restricted-api={locked}"),
        *([] if gpu else ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]),
        "--exit-timeout-secs=12",  # an engine takes up to 6 s to end; the launcher waits for 15
        "--log-format=ISO8601",
    ]


@contextmanager
def own_shared_memory(scratch: Path) -> Iterator[list[str]]:
    """Words for a Triton's command by which its backends' shared memory bears the name of its `scratch` folder.

    What it leaves there when it is killed goes with the block.
    """
    prefix = f"{scratch.name}-"
    try:
        yield [f"--backend-config={backend},shm-region-prefix-name={prefix}" for backend in ("vllm", "python")]
    finally:
        for region in SHARED_MEMORY.glob(f"{prefix}*"):
            region.unlink(missing_ok=True)


def tritonserver_env(*, gpu: bool = False) -> dict[str, str]:
    """What Triton's environment must hold in addition, so that it finds its libraries and this Python.

    Without `gpu` it sees no card: it might take memory of it, for models that never use it.
    """
    libraries = [str(_tritonserver().parents[1] / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    return {
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *_given("LD_LIBRARY_PATH")]),
        # The stub takes its packages from the python3 that comes first.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), *_given("PATH")]),
        **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}),
    }


def lay_out_backends(folder: Path) -> Path:
    """Fill a backend directory: the wheel's Python backend with the stub of this Python, and ours.

    Copies, because Triton refuses links that lead out of its backend directory.
    """
    tritonserver = _tritonserver()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    sources = {
        "python": [
            *(tritonserver / "backends/python").glob("*.*"),
            tritonserver / "python_backend_stubs" / version / "triton_python_backend_stub",
        ],
        "vllm": [Path(__file__).with_name("model.py")],
    }
    for backend, files in sources.items():
        (folder / backend).mkdir(parents=True, exist_ok=True)
        for source in files:
            target = folder / backend / source.name
            if not target.is_file() or not filecmp.cmp(source, target):
                draft = target.with_name(f"{target.name}.{os.getpid()}")
                shutil.copy2(source, draft)
                draft.replace(target)  # whole at any moment, also for a server that starts beside this one
    return folder


def _tritonserver() -> Path:
    spec = find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise LaunchError("nvidia-pytriton, which carries tritonserver, is not installed.", "Run `make setup`.")
    return Path(spec.submodule_search_locations[0]) / "tritonserver"


def _given(name: str) -> list[str]:
    return [os.environ[name]] if os.environ.get(name) else []
