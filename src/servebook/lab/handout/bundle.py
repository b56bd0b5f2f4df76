"""The student bundle: the workbook without solutions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import nbformat

from servebook.checkout import ROOT
from servebook.errors import ServebookError
from servebook.lab.handout.blanks import drop_instructor_cells, require_solutions, write_labs
from servebook.lab.manifest import load_labs

BUNDLE = (
    *("README.md", "BENCHMARKS.md", "LICENSE", "Makefile", "pyproject.toml", "environment.yml"),
    *("requirements", "scripts", "shims", "src", "protos", "triton", "kubernetes", "jupyter", "notebooks"),
    *("docs/images", "docs/cheatsheets"),
)
"""What a student's machine needs: tests hold answers, most of `docs` is the instructor's, and labs are made anew."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#]+)[^)]*\)")
"""A relative link in Markdown: its words, and the file. Not a picture."""
INSTRUCTORS = re.compile(
    r"^\$ make test [^\n]*\n|^(`make test`|To add to the workbook|To try one of them|### In a container\n).*?\n(?=\n)\n"
    r"|^\| the tests need [^\n]*\n|^## A room of learners\n.*?(?=^## )",
    re.DOTALL | re.MULTILINE,
)
"""What README says of parts that a bundle does not have."""


def write_bundle(target: Path, root: Path = ROOT, solutions: bool = False) -> None:
    """Copy to `target` what students get: the workbook, with neither solutions nor an instructor's notes.

    After the course also the labs' solutions, but no notes on them. Only what Git tracks is copied: beside it may lie
    keys, grades and anything else.

    Raises:
        ServebookError: `target` is not empty or lies in the repository, this is no clone, or there are no solutions to
            make the labs from.
    """
    require_solutions(root)
    if target.resolve().is_relative_to(root.resolve()):
        raise ServebookError(f"{target} lies in the repository.", "Name a folder outside of it.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ServebookError(f"{target} is not empty.", "Name a new folder.")
    target.mkdir(parents=True, exist_ok=True)
    copy_tracked(root, BUNDLE, target)
    write_labs(target / "labs", root)
    if solutions:
        copy_tracked(root, [*(f"solutions/{lab.path}" for lab in load_labs()), "solutions/14_capstone"], target)
    for folder in ("notebooks", "solutions"):
        clean_notebooks(target / folder)
    for path in target.glob("*.md"):
        text = INSTRUCTORS.sub("", path.read_text(encoding="utf-8"))
        path.write_text(without_dead_links(text, target), encoding="utf-8")


def copy_tracked(root: Path, names: Iterable[str], target: Path) -> None:
    """Copy to `target` the files, links left out, that Git tracks below `names`.

    Raises:
        ServebookError: Git does not know this folder.
    """
    # A hook, or a shell in one, may point Git elsewhere.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), "ls-files", "-z", "--", *names]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", check=True)
    except FileNotFoundError:
        raise ServebookError(
            "Git, which knows what belongs to the workbook, is not installed.", "Install it."
        ) from None
    except subprocess.CalledProcessError as error:
        raise ServebookError(
            f"Git does not say what belongs to the workbook: {error.stderr.strip()}", "Run this in a clone of yours."
        ) from None
    for name in filter(None, done.stdout.split("\0")):
        if (root / name).is_file() and not (root / name).is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def clean_notebooks(folder: Path) -> None:
    """Take the instructor's cells, and links that lead nowhere, out of every notebook in `folder`."""
    for path in folder.rglob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        drop_instructor_cells(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = without_dead_links(cell.source, path.parent)
        nbformat.write(notebook, path)


def without_dead_links(text: str, folder: Path) -> str:
    """Markdown that lies in `folder`; where a link leads to no file, only its words are left."""
    return LINK.sub(lambda link: link[0] if (folder / link[2]).exists() else link[1], text)
