"""The workbook's model repository, made ready for this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from servebook.checkout import ROOT
from servebook.errors import LaunchError
from servebook.settings import TENSOR_MODEL_NAME
from servebook.ways.triton_grpc.backend.files import ENGINE_ARGS, engine_words_as_json

MODEL_REPOSITORY = ROOT / "triton/model_repository"
"""As it would be used in NVIDIA's container, unchanged."""


def render_repository(source: Path, scratch: Path, engine_words: list[str]) -> Path:
    """Copy `source` into `scratch` with this machine's engine arguments in model.json; return the copy.

    model.json of the copy is that of the source with the keys that `engine_words` name replaced: the
    settings decide about the model and its memory, the file about everything else. The copy's name is a
    hash of what is in it, so servers with other settings do not meet.

    Raises:
        LaunchError: there is no repository at `source`.
        ModelFilesError: its model.json or a word does not fit.
    """
    version = source / TENSOR_MODEL_NAME / "1"
    if not (version / ENGINE_ARGS).is_file():
        raise LaunchError(
            f"There is no {version / ENGINE_ARGS}.",
            "Run from a checkout of the workbook, or give a repository of your own: --model-repository DIR.",
        )
    text = json.dumps(json.loads((version / ENGINE_ARGS).read_text()) | engine_words_as_json(engine_words), indent=4)
    content = b"".join(path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()) + text.encode()
    target = scratch / f"repository-{hashlib.sha256(content).hexdigest()[:12]}"
    if not target.is_dir():
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch) as draft:
            copy = Path(shutil.copytree(source, Path(draft) / "repository"))
            (copy / TENSOR_MODEL_NAME / "1" / ENGINE_ARGS).write_text(text + "\n")
            try:
                copy.rename(target)
            except OSError:
                if not target.is_dir():  # else another server has made the same copy meanwhile
                    raise
    return target
