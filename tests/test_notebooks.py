"""The gate itself: what must turn it red does; and what holds for every notebook without running it."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

from servebook.checkout import ROOT
from servebook.workbook import gate as notebook_gate
from servebook.workbook.gate import NOTEBOOKS
from servebook.workbook.notebook import difference

TESTS = Path(__file__).parent
CANARIES = TESTS / "canaries"
CHAPTERS = sorted(NOTEBOOKS.glob("*.ipynb"))
PARAMETERS = ['model = ""', 'engine_url = ""', 'api_key = ""']
KEPT_OUT = re.compile(r"> [a-z]+(?:-rs|-grpc)?: \w[^<]*; port \d+ was taken")
"""A server by its plain name that had to take another port: something was up beside the notebook."""
MACHINE_PATH = re.compile(r"(?<![\w.])/(root|home|tmp|work|Users)/")


@pytest.mark.lifetime
@pytest.mark.parametrize(
    ("canary", "problem"),
    [
        ("error", "RuntimeError: on purpose"),
        ("drift", "cell drifted: stdout differs:"),
        ("hang", "a cell ran beyond its time"),
        ("slow", "the notebook beyond its 3 s"),
        ("dead_kernel", "the kernel died"),
        ("no_server", "There is no server 'nothing'"),
        ("few_cells", "1 code cells were executed, and at least 2 must be"),
        ("nothing_stored", "nothing is stored to compare with"),
        ("blank_stored", "nothing is stored to compare with"),
    ],
)
def test_canary_turns_the_gate_red(canary: str, problem: str) -> None:
    assert problem in notebook_gate.run(CANARIES / f"{canary}.ipynb").problem


@pytest.mark.lifetime
def test_green_canary_runs_in_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the user has a kernel of the same name that belongs to another Python."""
    spec = tmp_path / "data/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "other", "language": "python"}))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    copy = tmp_path / "green.ipynb"
    copy.write_bytes((CANARIES / "green.ipynb").read_bytes())

    result = notebook_gate.run(copy)
    assert (result.problem, result.executed, result.skipped, result.compared) == ("", 3, 0, 1)

    assert not notebook_gate.run(copy, store=True).problem
    stored = copy.read_bytes()
    cells = nbformat.reads(stored.decode(), as_version=4).cells
    assert [cell.id for cell in cells] == ["intro", "parameters", "greet", "kernel"]
    assert [cell.get("execution_count") for cell in cells] == [None, 1, 2, 3]
    assert cells[-1].outputs[0].text.strip() == sys.executable
    assert b"papermill" not in stored

    assert [notebook_gate.literal(text) for text in ("3", "False", "smollm2")] == [3, False, "smollm2"]
    monkeypatch.setattr(sys, "argv", ["gate", "--store", str(copy)])
    assert notebook_gate.main() == 0
    assert copy.read_bytes() == stored, "storing twice must give the same bytes"


@pytest.mark.parametrize(("home", "stored"), [("/home/ada", "~/a/b"), ("/", "/home/ada/a/b")])
def test_a_home_folder_is_stored_as_such_unless_it_is_the_root(
    home: str, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    cell = new_code_cell(outputs=[new_output("stream", text="/home/ada/a/b")])
    notebook_gate._store(tmp_path / "a.ipynb", new_notebook(cells=[cell]), [(cell, cell.copy())])
    assert nbformat.read(tmp_path / "a.ipynb", as_version=4).cells[0].outputs[0].text == stored


def test_a_kernel_that_does_not_come_up_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object, **__: object) -> None:
        raise RuntimeError("Kernel didn't respond in 60 seconds")  # as jupyter_client says it

    monkeypatch.setattr("papermill.execute_notebook", late)
    problem = notebook_gate.run(CANARIES / "green.ipynb").problem
    assert problem.startswith("the kernel did not start: Kernel didn't respond in 60 seconds")


@pytest.mark.lifetime
def test_parameters_reach_the_notebook() -> None:
    assert "+bye" in notebook_gate.run(CANARIES / "green.ipynb", {"greeting": "bye"}).problem


@pytest.mark.lifetime
def test_a_red_notebook_is_an_exit_code_and_a_row_and_is_not_stored(tmp_path: Path) -> None:
    copy = tmp_path / "error.ipynb"
    copy.write_bytes((CANARIES / "error.ipynb").read_bytes())
    green = tmp_path / "green.ipynb"
    green.write_bytes((CANARIES / "green.ipynb").read_bytes())
    gate = [sys.executable, "-m", "servebook.workbook.gate", "--store"]
    done = subprocess.run([*gate, copy, green], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    rows = done.stdout.splitlines()[-2:]
    assert rows[0].split()[0] == "error"
    assert rows[0].endswith("FAILED")
    assert rows[1].split()[0] == "green"
    assert not rows[1].endswith("FAILED")
    assert copy.read_bytes() == (CANARIES / "error.ipynb").read_bytes()


@pytest.fixture(scope="module", params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request: pytest.FixtureRequest) -> tuple[str, NotebookNode]:
    path: Path = request.param
    return path.stem, nbformat.read(path, as_version=4)


Chapter = tuple[str, NotebookNode]


def test_form(chapter: Chapter) -> None:
    stem, notebook = chapter
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))
    assert not [each for each in ids if re.fullmatch(r"[0-9a-f]{8}", each)], "ids are to be readable"
    assert notebook.cells[0].source.startswith("# ")
    assert "By the end you will have seen that" in notebook.cells[0].source
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert parameters.source.splitlines()[:3] == PARAMETERS
    code = sum(cell.cell_type == "code" for cell in notebook.cells)
    assert code - 2 <= notebook.metadata.servebook.min_cells <= code, "else many cells could go unrun unheard"
    assert f'run_notebook("{stem}")' in (TESTS / f"test_{stem}.py").read_text(), "its chapter's tests must run it"


def test_pictures_in_text_survive_jupyterlab(chapter: Chapter) -> None:
    """JupyterLab strips a bare <svg> from Markdown; a file in notebooks/images/ shows everywhere."""
    _, notebook = chapter
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "<svg" not in text, "put it into notebooks/images/ and write ![what it shows](images/name.svg)"
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text)
    assert pictures, "a chapter has a map"
    for alt, path in pictures:
        assert len(alt) > 20, f"{path} needs a text that says what it shows"
        assert (NOTEBOOKS / path).is_file()


def test_links_lead_somewhere(chapter: Chapter) -> None:
    _, notebook = chapter
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"(?<!!)\[[^\]]*\]\((?!https?:|#|attachment:)([^)#]+)", text)
    assert links, "a chapter names the next one"
    assert not [link for link in links if not (NOTEBOOKS / link).exists()]


def test_outputs_are_those_of_one_run(chapter: Chapter) -> None:
    _, notebook = chapter
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    ran = [cell.execution_count for cell in code if "skip-execution" not in cell.metadata.get("tags", [])]
    assert ran == list(range(1, len(ran) + 1)), "run `make notebooks`"
    checked = [cell for cell in code if notebook_gate.CHECKED in cell.metadata.get("tags", [])]
    assert len(checked) >= 3
    assert not [cell.id for cell in checked if not notebook_gate.says_something(cell)]
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not MACHINE_PATH.search(json.dumps(outputs)), "an output names a path of the machine that ran it"
    assert not KEPT_OUT.search(json.dumps(outputs)), "store it anew where no other server is up"
    assert not {"papermill", "execution"} & {key for cell in code for key in cell.metadata}


def test_shown_source_is_todays(chapter: Chapter) -> None:
    """What `show(…)` has stored in a notebook is what the repository has now, but for the line's number."""
    _, notebook = chapter
    stale = []
    for cell in notebook.cells:
        if cell.cell_type != "code" or not re.search(r"\bshow\(", cell.source):
            continue
        calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
        asked = sum(len(call.args) for call in calls if isinstance(call.func, ast.Name) and call.func.id == "show")
        bundles = [output.data["text/plain"] for output in cell.outputs if "text/html" in output.get("data", {})]
        assert len(bundles) == asked, f"cell {cell.id}: {asked} were to be shown"
        for bundle in bundles:
            head, _, text = bundle.partition("\n")
            name = head.partition(", line ")[0]
            # A name without a folder is a file outside of the repository.
            if "/" in name and text not in showable(ROOT / name):
                stale.append(f"cell {cell.id}: {name}")
    assert not stale, "run `make notebooks`"


def test_shown_difference_is_todays(chapter: Chapter) -> None:
    """The same for `show_difference(…)`, which has its two files in the title."""
    _, notebook = chapter
    for cell in notebook.cells:
        if cell.cell_type == "code" and "show_difference(" in cell.source and "import" not in cell.source:
            bundles = [output.data["text/plain"] for output in cell.outputs if "text/html" in output.get("data", {})]
            assert len(bundles) == cell.source.count("show_difference("), cell.id
            for bundle in bundles:
                title, *lines = bundle.splitlines()
                before, after = (ROOT / name for name in title.split(" → "))
                assert lines == difference(before, after), f"cell {cell.id}: run `make notebooks`"


def test_right_answers_of_the_quizzes_are_spread() -> None:
    """Who always opens the same choice is not to be right by it: no place has more than half of the right answers."""
    places = []
    for path in CHAPTERS:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.id == "quiz":
                for question in re.split(r"(?m)^(?=\*\*\d\. )", cell.source)[1:]:
                    choices = re.findall(r"<details><summary>.*?</summary><dd>(Yes|No)", question)
                    assert choices.count("Yes") == 1, f"{path.stem}: {question[:40]}"
                    places.append(choices.index("Yes"))
    assert len(places) >= 3 * len(CHAPTERS)
    assert max(places.count(place) for place in range(3)) <= len(places) / 2


def test_a_chapter_leads_to_its_sources(chapter: Chapter) -> None:
    """Outside links to where a fact comes from: a specification, a paper, the documentation of the program."""
    _, notebook = chapter
    assert re.search(r"\]\(https://(?!github\.com/\w+/servebook)", prose(notebook))


def test_a_chapter_has_something_for_those_who_are_done_early(chapter: Chapter) -> None:
    """Nobody checks it, so it says how one knows."""
    _, notebook = chapter
    (text,) = (cell.source for cell in notebook.cells if cell.id == "try")
    assert re.search(r"\*\*Stretch\.\*\* .+ \*Done when\* .+\.$", text)


def test_what_is_for_instructors_is_folded_away(chapter: Chapter) -> None:
    """In the student bundle it is not there at all."""
    _, notebook = chapter
    (cell,) = (cell for cell in notebook.cells if "instructor" in cell.metadata.get("tags", ()))
    assert re.fullmatch(r"<details><summary>For instructors</summary>\n\n.+\n\n</details>", cell.source)


def test_a_chapter_leads_to_the_glossary(chapter: Chapter) -> None:
    _, notebook = chapter
    assert "](glossary.md)" in prose(notebook)


def test_the_glossarys_words_stand_in_the_chapters_that_it_names() -> None:
    text = (NOTEBOOKS / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| (.+?) \| .+ \| \[(\d\d)\]\((\2\w+\.ipynb)\) \|$", text)
    words = [word for word, _, _ in rows]
    assert len(rows) == len(text.split("|---|---|---|\n")[1].splitlines())
    assert words == sorted(words, key=str.lower)
    for word, _, file in rows:
        assert word.lower() in prose(nbformat.read(NOTEBOOKS / file, as_version=4)).lower(), f"{file} has no {word!r}"


def prose(notebook: NotebookNode) -> str:
    """A notebook's text cells."""
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_no_wall_of_source_or_output(chapter: Chapter) -> None:
    """What is longer than a screen or two is folded away, or cut."""
    _, notebook = chapter
    for cell in notebook.cells:
        for output in cell.outputs if cell.cell_type == "code" else ():
            data = output.get("data", {})
            text = output.get("text") or data.get("text/plain", "")
            if "<details>" not in data.get("text/html", ""):
                assert len(text.splitlines()) <= 61, f"cell {cell.id}: {len(text.splitlines())} lines"


@cache
def showable(path: Path) -> set[str]:
    """Every text that `show` may make of a file: of the whole, and of each function and class in it."""
    if not path.is_file():
        return set()
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    found = {text, inspect.cleandoc("\n" + text)}
    for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min(part.lineno for part in (node, *node.decorator_list))
            found.add(inspect.cleandoc("\n" + "".join(inspect.getblock(lines[first - 1 :]))))
    return found


@pytest.mark.lifetime
def test_nbval_agrees() -> None:
    """People who use nbval by itself get the same answer as from the gate; here of a chapter that needs no server."""
    nbval = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval-lax",
        "--nbval-cell-timeout",
        "60",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([*nbval, NOTEBOOKS / "09_choose.ipynb"], capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b\d+ passed", done.stdout)
