"""Names that a package offers and loads only when they are used (PEP 562): a server then need not load the launcher."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazily(package: str, **names: tuple[str, ...]) -> Callable[[str], Any]:
    """A package's `__getattr__`: `names` are what each of its modules gives."""
    home = {name: f"{package}.{module}" for module, given in names.items() for name in given}

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    return load
