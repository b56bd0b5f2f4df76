"""Servers that exist to be measured or to go wrong on purpose."""

from servebook.launch.child import child_server

__all__ = ["child_server"]
