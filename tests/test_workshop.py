"""What an instructor shows and hands out: agendas, slides and handout follow the manifests and the notebooks."""

from __future__ import annotations

import re
import symtable
from collections import defaultdict
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from servebook.checkout import ROOT
from servebook.lab.manifest import find_exercise
from servebook.lab.shell import tagged
from servebook.workbook.agenda import GUIDE, Agenda, line, load_agendas, sections, written
from servebook.workbook.chapters import find_chapter, load_chapters
from servebook.workbook.deck import handout, key_points, read, slides, with_slides, write_deck

agendas = pytest.mark.parametrize("agenda", load_agendas(), ids=lambda agenda: agenda.title)


def test_the_guide_has_the_agendas_of_the_manifests() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    assert written(guide) == guide, "run `make agendas`"


@agendas
def test_an_agenda_names_what_there_is_and_has_breaks(agenda: Agenda) -> None:
    since_break, first_lab = 0, True
    for step in agenda.steps:
        minutes, what, _ = line(step, first_lab)
        assert minutes > 0
        if step.chapter:
            there = sections(find_chapter(step.chapter).stem).keys()
            assert there == set(range(1, len(there) + 1))
            assert set(step.skip) < there
            shown = {int(number) for number in re.findall(r"section (\d+)", step.show)}
            assert shown <= there - set(step.skip), f"{what}: what is skipped cannot be shown"
        assert {find_exercise(each)[0].stem[:2] for each in step.exercises} <= {step.lab}
        first_lab = first_lab and not step.lab
        since_break = 0 if step.say in ("Break", "Lunch") else since_break + minutes
        assert since_break <= 120, f"{what}: two hours without a break"


@agendas
def test_an_agenda_has_core_exercises_and_leaves_the_extra_ones_for_home(agenda: Agenda) -> None:
    chosen = [find_exercise(each)[1] for step in agenda.steps for each in step.exercises]
    assert [each.id for each in chosen if each.importance != "core"] == []


@agendas
def test_in_a_room_no_desk_starts_the_engine_that_chapter_02_kills(agenda: Agenda) -> None:
    assert [step.skip for step in agenda.steps if step.chapter == "02" and 7 not in step.skip] == []


@agendas
def test_what_is_skipped_is_not_needed_later(agenda: Agenda) -> None:
    """No cell of a section that is kept uses a name that only skipped sections set."""
    for step in agenda.steps:
        if step.chapter:
            made, used = names_by_section(find_chapter(step.chapter).stem)
            kept = {name for number, names in made.items() if number not in step.skip for name in names}
            skipped = {name: number for number in step.skip for name in made[number]}
            lost = {
                (number, name, skipped[name])
                for number, names in used.items()
                if number not in step.skip
                for name in (names - kept) & skipped.keys()
            }
            assert not lost, f"{agenda.title}, chapter {step.chapter}: (section, name, where it is set) {lost}"


def names_by_section(stem: str) -> tuple[dict[int, set[str]], dict[int, set[str]]]:
    """The names that the cells of each section of a notebook set, and those that they use; 0 is what comes before."""
    made: defaultdict[int, set[str]] = defaultdict(set)
    used: defaultdict[int, set[str]] = defaultdict(set)
    section = 0
    for cell in nbformat.read(ROOT / f"notebooks/{stem}.ipynb", as_version=4).cells:
        if heading := re.match(r"## (\d+)", cell.source):
            section = int(heading[1])
        elif cell.cell_type == "code":
            top = symtable.symtable(TransformerManager().transform_cell(cell.source), cell.id, "exec")
            made[section] |= {each.get_name() for each in top.get_symbols() if each.is_assigned() or each.is_imported()}
            used[section] |= {each.get_name() for each in top.get_symbols() if each.is_referenced()}
            used[section] |= globals_within(top)
    return made, used


def globals_within(scope: symtable.SymbolTable) -> set[str]:
    """The global names that functions, classes and comprehensions of this scope use."""
    found = set[str]()
    for inner in scope.get_children():
        found |= {each.get_name() for each in inner.get_symbols() if each.is_global()} | globals_within(inner)
    return found


def test_less_is_skipped_more_time_is_taken() -> None:
    whole, part = (
        line(step.model_copy(update={"skip": skip}), False)[0]
        for step in load_agendas()[0].steps
        if step.chapter == "01"
        for skip in ((), (1, 2, 3, 4))
    )
    assert (whole, part) == (find_chapter("01").minutes, find_chapter("01").minutes / 2)


def test_a_deck_has_a_slide_for_each_heading_and_the_instructors_notes() -> None:
    chapter = find_chapter("09")
    notebook = with_slides(read(chapter))
    kinds = [cell.metadata.slideshow["slide_type"] for cell in notebook.cells]
    headings = sum(cell.cell_type == "markdown" and cell.source.startswith("#") for cell in notebook.cells)
    assert kinds.count("slide") == headings > 5
    assert kinds.count("notes") == sum(tagged(cell, "instructor") for cell in notebook.cells) > 0
    assert not [cell for cell in notebook.cells if tagged(cell, "instructor") and "<details>" in cell.source]
    own = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# x", metadata={"slideshow": {"slide_type": "skip"}})]
    )
    assert with_slides(own).cells[0].metadata.slideshow["slide_type"] == "skip"
    page = slides(chapter)
    assert '<aside class="notes">' in page
    assert "Reveal.initialize" in page
    assert not re.findall(r'src="(?!https?:|data:)[^"]*"', page)


def test_the_handout_has_every_chapters_key_points_and_no_notes() -> None:
    page = handout()
    source = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(text, metadata={"tags": tags})
            for text, tags in (("# 01 · A", []), ("## Key points", []), ("Say it.", ["instructor"]), ("## Next", []))
        ]
    )
    assert [cell.source for cell in key_points(source)] == ["# 01 · A", "## Key points"]
    for chapter in load_chapters():
        assert chapter.title.replace("'", "&#39;") in page or chapter.title in page
    assert page.count("Key points</h2>") + page.count("Key points<a") == len(load_chapters())


def test_a_deck_is_the_slides_of_each_chapter_and_the_handout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chapter = find_chapter("09")
    monkeypatch.setattr("servebook.workbook.deck.load_chapters", lambda: (chapter,))
    write_deck(tmp_path / "of" / "mine")
    pages = {str(page.relative_to(tmp_path)): page.read_text() for page in tmp_path.rglob("*.*")}
    assert pages.keys() == {"of/mine/slides/09_choose.slides.html", "of/mine/handout.html"}
    assert ["Reveal.initialize" in page for page in pages.values()] == ["slides" in name for name in pages]
    assert all(chapter.title in page for page in pages.values())
