"""The contract: linted, unbroken, and the stubs in `servebook.protos` made from it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PROTOS = REPOSITORY / "protos"
BUF = Path(sys.executable).with_name("buf")


def buf(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BUF, *words], capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the protos, to be edited."""
    return Path(shutil.copytree(PROTOS, tmp_path / "protos"))


def edit(protos: Path, old: str, new: str) -> None:
    path = protos / "llm/v1/llm.proto"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def breaking(protos: Path) -> subprocess.CompletedProcess[str]:
    """Against the contract as it was released: a stored image, because a shallow clone has no history."""
    return buf("breaking", str(protos), "--against", str(PROTOS / "baseline.binpb"))


def test_lint_is_clean_and_can_fail(copy: Path) -> None:
    done = buf("lint", str(PROTOS))
    assert done.returncode == 0, done.stdout + done.stderr
    edit(copy, "rpc StreamGenerate(StreamGenerateRequest)", "rpc StreamGenerate(GenerateRequest)")
    done = buf("lint", str(copy))
    assert "should be named" in done.stdout, done.stderr


def test_nothing_released_was_broken() -> None:
    done = breaking(PROTOS)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("optional int32 max_tokens = 2;", "optional int32 max_tokens = 9;"),
        ("optional float temperature = 3;", "optional double temperature = 3;"),
        ("bool is_finished = 2;", "bool done = 2;"),
        ("rpc StreamGenerate(StreamGenerateRequest) returns (stream StreamGenerateResponse);", ""),
        ("FINISH_REASON_LENGTH = 2;", "FINISH_REASON_LENGTH = 3;"),
    ],
)
def test_a_breaking_edit_is_found(copy: Path, old: str, new: str) -> None:
    edit(copy, old, new)
    done = breaking(copy)
    assert done.returncode, f"{old} → {new} went unnoticed"
    assert "llm.proto" in done.stdout


def test_an_added_field_breaks_nobody(copy: Path) -> None:
    edit(copy, "bool ignore_eos = 8;", "bool ignore_eos = 8;\n  // New.\n  optional float min_p = 9;")
    done = breaking(copy)
    assert done.returncode == 0, done.stdout


def test_stubs_are_fresh(tmp_path: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    [words] = re.findall(r"\$\(python\) (-m grpc_tools\.protoc .+)", makefile)
    command = words.replace("=src", f"={tmp_path}").replace(":src", f":{tmp_path}").split()
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True, timeout=60)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*"))
    assert len(made) == 8
    for name in made:
        assert (REPOSITORY / "src" / name).read_text() == (tmp_path / name).read_text(), f"{name}: run `make protos`"


def test_the_articles_fields_keep_names_and_numbers() -> None:
    from servebook.protos.llm.v1 import llm_pb2 as pb

    def numbers(message: type) -> dict[str, int]:
        return {field.name: field.number for field in message.DESCRIPTOR.fields}  # type: ignore[attr-defined]

    for request in (pb.GenerateRequest, pb.StreamGenerateRequest):
        assert numbers(request).items() >= {"prompt": 1, "max_tokens": 2, "temperature": 3}.items()
    assert numbers(pb.GenerateResponse)["text"] == 1
    assert numbers(pb.StreamGenerateResponse).items() >= {"text": 1, "is_finished": 2}.items()
