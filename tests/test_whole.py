"""Files that are there whole or not at all: on a full disk, and where two write at once."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from servebook.bench import guard
from servebook.checkout import ROOT
from servebook.cli import app
from servebook.lab import record
from servebook.lab.handout import copy
from servebook.lab.handout.blanks import write_labs
from servebook.lab.manifest import load_labs
from servebook.whole import write_whole
from servebook.workbook import gate


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A disk that takes names, and nothing that is written; `undo()` frees it."""

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    return monkeypatch


def test_what_cannot_be_written_stays_as_it_was(tmp_path: Path, full: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "after")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "before"}, "and no draft is left"
    full.undo()
    write_whole(file, "nâch")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": "nâch".encode()}


def test_a_file_has_the_mode_that_it_is_given_at_any_moment(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "secret", b"key", 0o600)
        write_whole(tmp_path / "shown", b"")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("secret", "shown")] == [0o600, 0o644]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def write_guard(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guard, "STORED", folder / "guard.json")
    guard.store([])


def write_report(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("servebook.bench.cli.ROOT", folder)
    if result := CliRunner().invoke(app, ["bench", "--report"]).exception:
        raise result


def write_outputs(folder: Path, patch: pytest.MonkeyPatch) -> None:
    notebook = next(folder.rglob("*.ipynb"))
    gate._store(notebook, nbformat.read(notebook, as_version=4), [])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("guard.json", write_guard),
        ("BENCHMARKS.md", write_report),
        (load_labs()[0].path, write_outputs),
        (load_labs()[0].path, lambda folder, _: write_labs(folder)),
    ],
)
def test_what_is_kept_in_the_repository_is_not_half_written(
    name: str, write: Callable[[Path, pytest.MonkeyPatch], object], tmp_path: Path, full: pytest.MonkeyPatch
) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    before = (ROOT / "labs" / name).read_text() if name.endswith(".ipynb") else "before"
    file.write_text(before)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, full)
    assert file.read_text() == before
    full.undo()
    write(tmp_path, full)
    assert file.read_text() != "before"
    assert not list(tmp_path.rglob(".*"))


def test_a_learners_notebook_is_not_half_written(tmp_path: Path, full: pytest.MonkeyPatch) -> None:
    """Neither when it is laid out, since what is there already is kept; nor when a blank of it is opened again."""
    full.setenv("SERVEBOOK_STATE_DIR", str(tmp_path / "state"))
    mine = tmp_path / "mine"
    with pytest.raises(OSError, match="No space left"):
        copy.make_copy(mine)
    assert not [path for path in mine.rglob("*") if path.is_file()]
    with full.context() as enough:
        enough.setattr(os, "fsync", lambda _: None)
        copy.make_copy(mine)
        lab = load_labs()[0]
        notebook = mine / lab.path
        notebook.write_text(before := notebook.read_text().replace('"outputs": []', '"outputs":  []'))
        exercise = lab.exercises[0].id
        copy.reset(exercise)
        assert notebook.read_text() != before
        notebook.write_text(before)
    full.setattr(record, "write_whole", lambda *_: None)  # the disk is full when the notebook's turn comes
    with pytest.raises(OSError, match="No space left"):
        copy.reset(exercise)
    assert notebook.read_text() == before
