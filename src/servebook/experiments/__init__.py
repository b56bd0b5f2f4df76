"""Servers that exist to be measured or to go wrong on purpose; nothing in the workbook builds on them."""

from servebook.experiments.child import child_server

__all__ = ["child_server"]
