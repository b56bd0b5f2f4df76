"""Server lifetimes: one way to start, await, attach to, watch and end any server.

Its names are loaded when they are first used: a supervisor lives in this package, and has no use for them.
"""

from typing import TYPE_CHECKING

from servebook.lazy import lazily

if TYPE_CHECKING:
    from servebook.launch.files import Files
    from servebook.launch.lifetime import Server, down, serve, serve_all, up
    from servebook.launch.states import Status, status
    from servebook.launch.table import REPLICA, SERVERS, ServerSpec, find_server

__all__ = [
    "REPLICA",
    "SERVERS",
    "Files",
    "Server",
    "ServerSpec",
    "Status",
    "down",
    "find_server",
    "serve",
    "serve_all",
    "status",
    "up",
]

__getattr__ = lazily(
    __name__,
    files=("Files",),
    lifetime=("Server", "down", "serve", "serve_all", "up"),
    states=("Status", "status"),
    table=("REPLICA", "SERVERS", "ServerSpec", "find_server"),
)
