"""What learners get: `labs/` out of `solutions/`, and the student bundle without solutions.

`python -m servebook.lab.release` writes `labs/`.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat
from nbconvert.exporters import NotebookExporter
from nbgrader.preprocessors import SaveCells

from servebook.checkout import ROOT
from servebook.errors import ServebookError
from servebook.lab.manifest import load_labs
from servebook.lab.preprocessors import STEPS
from servebook.lab.shell import tagged

BUNDLE = (
    *("README.md", "BENCHMARKS.md", "LICENSE", "Makefile", "pyproject.toml", "environment.yml"),
    *("requirements", "scripts", "shims", "src", "protos", "triton", "kubernetes", "jupyter", "notebooks"),
)
"""What a student's machine needs; tests hold answers, `docs` is the instructor's, and labs are made anew."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#]+)[^)]*\)")
"""A relative link in Markdown: its words, and the file. Not a picture."""
LEFTOVERS = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.egg-info", ".*_cache")


def student_notebook(solution: Path) -> str:
    """The text of the student's notebook for the solution in that file; the same at every call."""
    exporter = NotebookExporter()
    for step in STEPS:
        if step is not SaveCells:
            exporter.register_preprocessor(step, enabled=True)
    text, _ = exporter.from_filename(str(solution))
    return str(text)


def require_solutions(root: Path) -> Path:
    """The folder of solutions.

    Raises:
        ServebookError: this is not the instructor's repository.
    """
    if not (root / "solutions").is_dir():
        raise ServebookError(f"{root} holds no solutions.", "Run this in the instructor's repository.")
    return root / "solutions"


def write_labs(target: Path, root: Path = ROOT) -> list[Path]:
    """Write every lab's student notebook below `target`; return their paths."""
    solutions = require_solutions(root)
    written = []
    for lab in load_labs():
        path = target / lab.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(student_notebook(solutions / lab.path))
        written.append(path)
    return written


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
    for path in (target / "notebooks").rglob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "instructor")]
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = without_dead_links(cell.source, path.parent)
        nbformat.write(notebook, path)
    for path in target.glob("*.md"):
        path.write_text(without_dead_links(path.read_text(), target))


def without_dead_links(text: str, folder: Path) -> str:
    """Markdown that lies in `folder`; where a link leads to no file, only its words are left."""
    return LINK.sub(lambda link: link[0] if (folder / link[2]).exists() else link[1], text)


if __name__ == "__main__":
    for path in write_labs(ROOT / "labs"):
        print(path.relative_to(ROOT))
