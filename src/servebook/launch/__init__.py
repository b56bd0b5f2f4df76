"""Server lifetimes: one way to start, await, attach to, watch and end any server."""

from servebook.launch.lifetime import Server, down, log_path, serve, status, tail, up
from servebook.launch.servers import REPLICA, SERVERS, ServerSpec, find_server

__all__ = [
    "REPLICA",
    "SERVERS",
    "Server",
    "ServerSpec",
    "down",
    "find_server",
    "log_path",
    "serve",
    "status",
    "tail",
    "up",
]
