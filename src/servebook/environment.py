"""The environment that a program of ours gets: without what was meant for others and would break or open it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

GIVEN = dict(os.environ)
"""This process's environment as it was given."""
JUDGE_APART = "SERVEBOOK_JUDGE_APART"
"""Set at the desks of a room, and nowhere else: `check` then asks a judge in a process apart."""
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
NO_PROXIES = ("no_proxy", "NO_PROXY", "no_grpc_proxy")
"""What Python's clients and curl read in either case; gRPC reads small letters only, and its own name first."""

TAKEN_OUT = {
    "VLLM_API_KEY": "the key comes from SERVEBOOK_API_KEY",
    "PYTHONWARNINGS": "a library's warning would end a server",
    "PYTHONOPTIMIZE": "libraries rely on their assertions and docstrings",
    "PYTHONINSPECT": "a server that ends would wait for a person",
}
"""What a child does not get, and why."""
HOMES = {"HF_HOME": "huggingface", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "../.config"}
"""Where an engine's libraries write, by variable; the default is in ~/.cache."""
SOCKET_FOLDER_CHARACTERS = 48
"""The longest folder for temporary files in which there may be a server's folder of vLLM's sockets.

A socket's name has at most 107 bytes; that folder's takes 19 of them, and the socket's in it 37.
"""


def module_command(module: str) -> str:
    """How one runs a module of this environment at a prompt, which may know nothing of it."""
    return f"{shlex.quote(sys.executable)} -P -m {module}"


def child_environment(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """A copy of this environment for a child, which imports nothing from the reader's folder and speaks UTF-8."""
    env = {name: value for name, value in given.items() if name not in unwelcome(given)}
    env |= {"PYTHONSAFEPATH": "1", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}
    # vLLM's processes rename themselves, and that would write over their environment, with the mark that they are ours.
    env["SPT_NOENV"] = "1"
    if short := short_tmpdir(given):
        env["TMPDIR"] = short
    return env


def unwelcome(given: Mapping[str, str]) -> dict[str, str]:
    """The variables that a child does not get, with the reason."""
    found = {name: why for name, why in TAKEN_OUT.items() if given.get(name)}
    if not given.get("VLLM_PORT", "0").isdigit():  # Kubernetes sets it where a service is named vllm
        found["VLLM_PORT"] = "it is not a port"
    return found


def short_tmpdir(given: Mapping[str, str]) -> str:
    """A folder for temporary files where the one that is set is too long for sockets; "" where it is not."""
    folder = next(filter(None, (given.get(name) for name in ("TMPDIR", "TEMP", "TMP"))), "")  # as tempfile looks
    return "/tmp" if len(os.fsencode(folder)) > SOCKET_FOLDER_CHARACTERS else ""


def writable_homes(cache_dir: Path, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """A folder below `cache_dir` for each of HOMES that cannot be written to; vLLM's own where one is given."""
    cache = Path("~/.cache").expanduser()
    folders = {name: Path(given.get(name) or cache / default) for name, default in HOMES.items()}
    found = {name: str(cache_dir / name.lower()) for name, folder in folders.items() if not can_write(folder)}
    return found | {name: given[name] for name in ("VLLM_CACHE_ROOT",) if name in given}


def can_write(folder: Path) -> bool:
    """Whether files can be made in `folder`, which may have to be made itself."""
    try:
        there = next(each for each in (folder, *folder.parents) if each.exists())
    except OSError:
        return False
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def reach_loopback_directly() -> None:
    """Where a proxy is set for this process, let it not stand between a client of ours and this very machine."""
    if not any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES):
        return
    said = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    for name in NO_PROXIES:
        if name == "no_grpc_proxy" and name not in os.environ:
            continue
        exceptions = [word for word in (os.environ.get(name) or said).split(",") if word.strip()]
        if "*" not in exceptions:
            exceptions += [each for each in LOOPBACK_NAMES if each not in exceptions]
        os.environ[name] = ",".join(exceptions)
