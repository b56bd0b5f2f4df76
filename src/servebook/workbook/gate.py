"""The gate for notebooks: `python -m servebook.workbook.gate [--store] [NOTEBOOK…]`; the tests call `run` too.

papermill executes a notebook, nbval's rules compare the cells tagged `nbval-check-output` with the outputs that
the notebook stores. A notebook says what it needs in its metadata:

    "servebook": {"servers": ["vllm"], "timeout": 240, "cell_timeout": 120, "min_cells": 20}

The servers are brought up first and shared with later notebooks, but not where outputs are stored; times are in
seconds, `timeout` for the whole notebook. Fewer than `min_cells` executed code cells (by default: fewer than all) are a
failure. A cell tagged `skip-execution` is not run and counts as skipped.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path
from typing import Any, ClassVar

import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbval.plugin import IPyNbCell, coalesce_streams, nocolors
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from servebook.checkout import ROOT
from servebook.errors import ServebookError
from servebook.launch import serve_all
from servebook.whole import write_whole

NOTEBOOKS = ROOT / "notebooks"
CHECKED = "nbval-check-output"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
"""As JupyterLab writes it: otherwise a notebook counts as changed when it is only opened."""


@dataclass(frozen=True)
class Result:
    """What became of one notebook: `executed` and `skipped` count code cells; `problem` is "" where all went well."""

    notebook: Path
    seconds: float
    executed: int
    skipped: int
    compared: int
    problem: str = ""


class Comparison:
    """nbval's comparison of outputs without nbval's run: what this class does not define is nbval's own."""

    colors = nocolors
    compare = IPyNbCell.compare_outputs
    ignored: ClassVar = ("metadata", "output_type", "name", "execution_count", "image/png", "image/jpeg")

    def __init__(self) -> None:
        self.comparison_traceback: list[str] = []

    def sanitize(self, text: Any) -> Any:
        return text

    def format_output_compare(self, key: str, stored: Any, new: Any) -> None:
        lines = unified_diff(str(stored).splitlines(), str(new).splitlines(), "stored", "new", lineterm="", n=1)
        self.comparison_traceback += [f"{key} differs:", *lines]


def difference(stored: NotebookNode, new: NotebookNode) -> str:
    """How the outputs of `new` differ from those of `stored`, both the same code cell; "" where they do not."""
    if not says_something(stored):
        return "nothing is stored to compare with, or only white space: run `make notebooks`"
    comparison = Comparison()
    same = comparison.compare(
        coalesce_streams(new.outputs), coalesce_streams(stored.outputs), skip_compare=comparison.ignored
    )
    return "" if same else "\n".join(comparison.comparison_traceback)


def says_something(cell: NotebookNode) -> bool:
    """Whether a code cell has stored anything that a comparison would look at, beyond white space."""
    parts = [output.get("data", output) for output in cell.outputs]
    return any(str(value).strip() for part in parts for key, value in part.items() if key not in Comparison.ignored)


def run(notebook: Path, parameters: Mapping[str, Any] | None = None, store: bool = False) -> Result:
    """Execute one notebook and compare it; with `store`, keep the new outputs instead if no cell failed.

    `parameters` replace those of the cell tagged `parameters`.
    """
    source = nbformat.read(notebook, as_version=4)
    wants = source.metadata.get("servebook", {})
    code = [cell for cell in source.cells if cell.cell_type == "code"]
    try:
        if not store:  # what is stored shows how servers come up, as its first reader will see it
            serve_all(wants.get("servers", []))
    except ServebookError as error:
        return Result(notebook, 0, 0, len(code), 0, str(error))
    started = time.monotonic()
    executed, problem = _execute(notebook, wants, parameters or {})
    seconds = time.monotonic() - started

    pairs = [(cell, executed.get(cell.id)) for cell in code]
    done = [(cell, new) for cell, new in pairs if new and new.execution_count is not None]
    floor = wants.get("min_cells", len(pairs))
    checked = [] if store else [(cell, new) for cell, new in done if CHECKED in cell.metadata.get("tags", [])]
    problems = [problem] if problem else []
    problems += [f"cell {cell.id}: {text}" for cell, new in checked if (text := difference(cell, new))]
    if len(done) < floor:
        problems.append(f"{len(done)} code cells were executed, and at least {floor} must be")
    if store and not problems:
        _store(notebook, source, done)
    return Result(notebook, seconds, len(done), len(pairs) - len(done), len(checked), "\n".join(problems))


def _execute(notebook: Path, wants: Mapping[str, Any], parameters: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The executed cells by id, as far as they came, and what stopped them."""
    # The kernel named python3 is this environment's, whatever the user has installed under that name.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    limit = wants.get("timeout", 240)
    problem = ""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / notebook.name
        try:
            papermill.execute_notebook(
                notebook,
                output,
                parameters=parameters,
                kernel_name="python3",
                progress_bar=False,
                cwd=notebook.parent,
                timeout_func=_time_left(limit, wants.get("cell_timeout", 120)),
                config=_kernel_in(Path(scratch)),
            )
        except PapermillExecutionError as error:
            problem = str(error).strip()
        except CellTimeoutError as error:
            problem = f"a cell ran beyond its time, or the notebook beyond its {limit} s: {error}"
        except DeadKernelError:
            problem = "the kernel died"
        except RuntimeError as error:  # jupyter_client's, of a kernel that does not come up in time
            problem = f"the kernel did not start: {error}"
        cells = nbformat.read(output, as_version=4).cells if output.is_file() else []
    return {cell.id: cell for cell in cells}, problem


def _kernel_in(folder: Path) -> Config:
    """Talk to the kernel through sockets in `folder`: no ports to collide on, and no other user can listen."""
    return Config(KernelManager={"transport": "ipc", "ip": str(folder / "kernel")})


def _time_left(notebook_seconds: float, cell_seconds: float) -> Callable[[Any], float]:
    """nbclient's `timeout_func`: what the next cell may take, in seconds, never 0 (which would mean no limit)."""
    deadline = time.monotonic() + notebook_seconds
    return lambda _: max(0.1, min(cell_seconds, deadline - time.monotonic()))


def _store(notebook: Path, source: NotebookNode, done: Sequence[tuple[NotebookNode, NotebookNode]]) -> None:
    """Write the new outputs into the notebook, and nothing else of the run: no times, no papermill metadata.

    The home folder is written as `~`: an output that names it would differ on every machine.
    """
    home = Path.home()
    for cell in source.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    for count, (cell, new) in enumerate(done, start=1):
        cell.execution_count = count
        outputs = json.dumps(coalesce_streams(new.outputs))
        if home.parts[1:]:  # not "/", as of a container's user without a name: "/" stands in every picture
            outputs = outputs.replace(str(home), "~")
        cell.outputs = nbformat.from_dict(json.loads(outputs))
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    source.metadata.kernelspec = KERNEL
    nbformat.validate(source)
    write_whole(notebook, f"{nbformat.writes(source)}\n")


def table(results: Sequence[Result]) -> str:
    """One line per notebook: minutes, code cells executed, skipped and compared, and whether it held."""
    width = max((len(result.notebook.stem) for result in results), default=8)
    lines = [f"{'notebook':{width}}  minutes  executed  skipped  compared"]
    lines += [
        f"{result.notebook.stem:{width}}  {result.seconds / 60:7.2f}  {result.executed:8}  {result.skipped:7}"
        f"  {result.compared:8}{'  FAILED' if result.problem else ''}"
        for result in results
    ]
    return "\n".join(lines)


def literal(text: str) -> Any:
    """A value as Python writes it: 3, False; a text needs no quotes."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> int:
    """Run the notebooks named, or all; exit with 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m servebook.workbook.gate", description="Run and check notebooks.")
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--store", action="store_true", help="keep the new outputs in the notebooks")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter, as Python has it"
    )
    options = parser.parse_args()
    results = []
    for notebook in options.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        print(f"{notebook.stem} …", flush=True)
        results.append(run(notebook.resolve(), {name: literal(text) for name, text in options.p}, options.store))
        if results[-1].problem:
            print(f"{results[-1].problem}\n", file=sys.stderr)
    print(table(results))
    return int(any(result.problem for result in results))


if __name__ == "__main__":
    sys.exit(main())
