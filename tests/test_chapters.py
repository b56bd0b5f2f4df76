"""The manifest of chapters, and that README, notebooks and tree are as it says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
from typer.testing import CliRunner

from servebook.checkout import ROOT
from servebook.cli import app
from servebook.errors import ServebookError
from servebook.lab.manifest import load_labs
from servebook.launch import SERVERS
from servebook.workbook.chapters import Chapter, files_of, find_chapter, load_chapters, word_on
from servebook.workbook.notebook import difference

WAYS = ROOT / "src/servebook/ways"
SHARED = {"v2"}
"""Folders of `ways/` that are no way: several ways stand on them."""
ABOVE_ALL = "ways|lab|bench|room|workbook"
"""What stands on `engine/` and `launch/`, as CONTRIBUTING.md draws it."""

chapters = pytest.mark.parametrize("chapter", load_chapters(), ids=lambda chapter: chapter.stem)


def test_manifest_has_each_notebook_and_lab_in_order() -> None:
    stems = [chapter.stem for chapter in load_chapters()]
    assert stems == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    labs = [lab.stem for lab in load_labs()]
    assert labs == [stem for stem in stems if stem in labs]


@chapters
def test_readme_and_notebook_say_what_the_manifest_says(chapter: Chapter) -> None:
    linked = f"[`{chapter.stem}`](notebooks/{chapter.stem}.ipynb)"
    assert f"| {linked} | {chapter.about} | {chapter.minutes} |" in (ROOT / "README.md").read_text()
    notebook = nbformat.read(ROOT / f"notebooks/{chapter.stem}.ipynb", as_version=4)
    assert notebook.cells[0].source.partition("\n")[0] == f"# {chapter.number} · {chapter.title}"
    assert f"{chapter.minutes} minutes, of which" in "".join(cell.source for cell in notebook.cells[:4])
    assert notebook.metadata.servebook.get("servers", []) == list(chapter.servers)
    assert set(chapter.servers) <= SERVERS.keys()


@chapters
def test_every_place_that_the_manifest_names_is_there(chapter: Chapter) -> None:
    assert not [place for place in chapter.code if not (ROOT / place).exists()]
    found = [path.relative_to(ROOT).as_posix() for path in files_of(chapter)]
    assert len(found) == len(set(found))
    assert {f"notebooks/{chapter.stem}.ipynb", f"tests/test_{chapter.stem}.py"} <= set(found)


@chapters
def test_where_has_a_word_on_each_file(chapter: Chapter) -> None:
    shown = CliRunner().invoke(app, ["where", chapter.number])
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert len(lines) == len(list(files_of(chapter)))
    assert not [line for line in lines if len(line.split()) < 2]


def test_where_names_the_chapters_that_there_are() -> None:
    with pytest.raises(ServebookError, match="04_custom_grpc"):
        find_chapter("77")
    assert find_chapter("4") is find_chapter("04_custom_grpc")


def test_a_file_of_another_kind_gets_no_word_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# What it is.\na: 1\n")
    (tmp_path / "b.bin").write_bytes(b"\xff\x00")
    assert word_on(tmp_path / "a.yaml") == "What it is."
    assert word_on(tmp_path / "b.bin") == ""


def test_every_file_of_a_way_belongs_to_one_chapter() -> None:
    owners: dict[Path, list[str]] = {}
    for chapter in load_chapters():
        for path in files_of(chapter):
            owners.setdefault(path, []).append(chapter.stem)
    loose = []
    for folder in (path for path in WAYS.iterdir() if path.is_dir() and path.name not in {"__pycache__", *SHARED}):
        for path in folder.rglob("*.*"):
            if "__pycache__" not in path.parts and path.stat().st_size:
                [stem] = owners.get(path, ["none"])
                if stem[3:] != folder.name:
                    loose.append(f"{path.relative_to(ROOT)}: {stem}")
    assert not loose


def imported(path: Path) -> Iterator[str]:
    """What a file imports, wherever in it: modules, and what it takes from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_way_imports_another_or_the_machinery_above() -> None:
    """What is taught stands on its own: a way knows what ways share, and the engine below."""
    wrong = []
    for path in WAYS.rglob("*.py"):
        own = path.relative_to(WAYS).parts[0]
        for name in imported(path):
            way = re.match(r"servebook\.ways\.(\w+)", name)
            shared = way and (way[1] in SHARED or (WAYS / f"{way[1]}.py").is_file())
            above = re.match(r"servebook\.(lab|bench|room|workbook)\b", name)
            if above or (way and way[1] != own and not shared):
                wrong.append(f"{path.relative_to(WAYS)}: {name}")
    assert not wrong


@pytest.mark.parametrize(("below", "above"), [("engine", f"launch|{ABOVE_ALL}"), ("launch", ABOVE_ALL)])
def test_what_serves_all_imports_nothing_above_it(below: str, above: str) -> None:
    folder = ROOT / "src/servebook" / below
    names = [(path.name, name) for path in folder.rglob("*.py") for name in imported(path)]
    assert len(names) > 50
    assert not [(path, name) for path, name in names if re.match(rf"servebook\.({above})\b", name)]


def rungs() -> Iterator[Any]:
    """Each step towards a server with the one before it; the first of all may be the mistake itself."""
    for chapter in load_chapters():
        way = WAYS / chapter.stem[3:]
        steps = sorted(way.glob("steps/step_*.py"))
        if steps and steps[0].name.startswith("step_1"):
            steps.insert(0, way / "mistake.py")
        for before, after in pairwise(steps):
            yield pytest.param(before, after, id=f"{chapter.stem}-{after.stem}")


@pytest.mark.parametrize(("before", "after"), list(rungs()))
def test_a_step_is_small_and_says_what_it_leaves(before: Path, after: Path) -> None:
    assert 1 <= sum(line[:1] == "+" and line[1:] != "" for line in difference(before, after)) <= 30
    assert re.search("\nStill (wrong|missing): ", after.read_text())


def test_contributing_names_every_place_of_a_chapter_an_exercise_and_a_server() -> None:
    """Its three lists, filled in for one that is there, lead to files; and what a stem finds is in them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    example = {"NN_name": "04_custom_grpc", "/name/": "/custom_grpc/"}
    for part in ("Add a chapter", "Add an exercise", "Add a server"):
        section = text.partition(f"## {part}\n")[2].partition("\n## ")[0]
        places = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
        assert len(places) >= 5, part
        for place in places:
            for word, name in example.items():
                place = place.replace(word, name)
            assert (ROOT / place).exists(), f"{part}: {place}"
    found = {path.relative_to(ROOT).as_posix() for path in files_of(find_chapter("04"))}
    by_stem = {path.replace("04_custom_grpc", "NN_name") for path in found if "04_custom_grpc" in path}
    assert not [place for place in by_stem if f"`{place}`" not in text]
