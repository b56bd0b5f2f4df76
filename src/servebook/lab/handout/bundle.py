"""The student bundle: the workbook without solutions."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat

from servebook.checkout import ROOT
from servebook.errors import ServebookError
from servebook.lab.handout.blanks import drop_instructor_cells, require_solutions, write_labs

BUNDLE = (
    *("README.md", "BENCHMARKS.md", "LICENSE", "Makefile", "pyproject.toml", "environment.yml"),
    *("requirements", "scripts", "shims", "src", "protos", "triton", "kubernetes", "jupyter", "notebooks"),
)
"""What a student's machine needs; tests hold answers, `docs` is the instructor's, and labs are made anew."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#]+)[^)]*\)")
"""A relative link in Markdown: its words, and the file. Not a picture."""
LEFTOVERS = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.egg-info", ".*_cache")


def write_bundle(target: Path, root: Path = ROOT) -> None:
    """Copy to `target` what students get: the workbook, with neither solutions nor an instructor's notes.

    Raises:
        ServebookError: `target` is not empty, or there are no solutions to make the labs from.
    """
    require_solutions(root)
    if target.exists() and any(target.iterdir()):
        raise ServebookError(f"{target} is not empty.", "Name a new folder.")
    target.mkdir(parents=True, exist_ok=True)
    for name in BUNDLE:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=LEFTOVERS)
        elif (root / name).is_file():
            shutil.copy2(root / name, target / name)
    write_labs(target / "labs", root)
    clean_notebooks(target / "notebooks")
    for path in target.glob("*.md"):
        path.write_text(without_dead_links(path.read_text(), target))


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
