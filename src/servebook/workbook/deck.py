"""A deck for the projector and a handout, made from the notebooks: `python -m servebook.workbook.deck DIR`.

A heading begins a slide; what follows is below it, prose and the code that it leads to on one page. Cells tagged
`instructor` become speaker's notes. A cell with slide metadata of its own (`slideshow.slide_type`) is left as it is.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter, SlidesExporter
from nbformat.v4 import new_markdown_cell, new_notebook

from servebook.checkout import ROOT
from servebook.lab.shell import tagged
from servebook.workbook.chapters import Chapter, load_chapters

FOLD = re.compile(r"</?details>|<summary>.*</summary>")
"""What keeps an instructor's cell out of a reader's way in a notebook."""
FOR_THE_HANDOUT = ("## Key points", "## Quiz", "## Final quiz")


def with_slides(notebook: Any) -> Any:
    """The same notebook, every cell with its place in a deck."""
    before = ""
    for cell in notebook.cells:
        if tagged(cell, "instructor"):
            kind = "notes"
            cell.source = FOLD.sub("", cell.source)
        elif cell.cell_type == "markdown" and cell.source.startswith("#"):
            kind = "slide"
        else:
            kind = "subslide" if cell.cell_type == "markdown" and before == "code" else "-"
        cell.metadata.setdefault("slideshow", {"slide_type": kind})
        before = cell.cell_type if kind != "notes" else before
    return notebook


def key_points(notebook: Any) -> list[Any]:
    """What a handout repeats of a chapter: its title, the key points, the quiz."""
    kept = [notebook.cells[0].source.partition("\n")[0]]
    wanted = False
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            wanted = cell.source.startswith(FOR_THE_HANDOUT)
        if wanted and cell.cell_type == "markdown" and not tagged(cell, "instructor"):
            kept.append(cell.source)
    return [new_markdown_cell(source) for source in kept]


def slides(chapter: Chapter) -> str:
    """A chapter's deck, as a page."""
    return page_of(SlidesExporter(reveal_scroll=True, embed_images=True), with_slides(read(chapter)), chapter.title)


def handout() -> str:
    """The key points and quizzes of all chapters, as a page."""
    cells = [cell for chapter in load_chapters() for cell in key_points(read(chapter))]
    return page_of(HTMLExporter(embed_images=True), new_notebook(cells=cells), "Key points and quizzes")


def read(chapter: Chapter) -> Any:
    """Its notebook, with the stored outputs."""
    return nbformat.read(ROOT / "notebooks" / f"{chapter.stem}.ipynb", as_version=4)


def page_of(exporter: HTMLExporter, notebook: Any, title: str) -> str:
    """The notebook as a page that stands for itself: pictures, which lie beside the notebooks, are taken into it."""
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(ROOT / "notebooks"), "name": title}})
    return str(page)


def write_deck(target: Path) -> None:
    """Write `slides/CHAPTER.slides.html` of every chapter, and `handout.html`, to `target`."""
    (target / "slides").mkdir(parents=True, exist_ok=True)
    for chapter in load_chapters():
        (target / "slides" / f"{chapter.stem}.slides.html").write_text(slides(chapter), encoding="utf-8")
    (target / "handout.html").write_text(handout(), encoding="utf-8")


if __name__ == "__main__":
    write_deck(Path(sys.argv[1]))
