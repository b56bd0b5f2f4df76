"""Cells of the notebooks, executed without a kernel."""

from __future__ import annotations

import ast
import inspect
import json
from typing import Any

from servebook.workbook.gate import NOTEBOOKS


async def run(stem: str, ids: list[str], space: dict[str, Any]) -> None:
    """Execute cells of a notebook, as a kernel would, on the names in `space`."""
    (notebook,) = NOTEBOOKS.glob(f"{stem}_*.ipynb")
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"]}
    for name in ids:
        code = compile(cells[name], f"{stem} {name}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, space)
        if inspect.isawaitable(result):
            await result
