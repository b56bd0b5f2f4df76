"""Listens in on an HTTP/2 connection: a proxy that passes every byte on and notes the frames that the server sends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

KINDS = {
    0: "DATA",
    1: "HEADERS",
    3: "RST_STREAM",
    4: "SETTINGS",
    6: "PING",
    7: "GOAWAY",
    8: "WINDOW_UPDATE",
}
"""Of RFC 9113, section 6; what gRPC does not use is left out."""

END_STREAM = 1


@dataclass(frozen=True)
class Frame:
    """One frame: 9 bytes of header, then `payload`. `stream` numbers the calls of a connection: 1, 3, 5 …"""

    kind: str
    stream: int
    payload: bytes
    ends_stream: bool


@contextmanager
def listen_in(address: str) -> Iterator[tuple[str, list[Frame]]]:
    """Yield the address of a proxy for one connection to `address`, and the list that its frames are added to."""
    host, port = address.rsplit(":", 1)
    frames: list[Frame] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def relay() -> None:
            with (
                suppress(OSError),  # nobody has come, or there is no server
                listener.accept()[0] as client,
                socket.create_connection((host.strip("[]"), int(port))) as server,
                server.makefile("rb") as incoming,
            ):
                threading.Thread(target=_pass_on, args=(client, server), daemon=True).start()
                _note(incoming, client, frames)

        threading.Thread(target=relay, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", frames
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # a thread in accept() would not hear of its end by close() alone


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:  # the other side has gone
        return


def _note(incoming: BinaryIO, client: socket.socket, frames: list[Frame]) -> None:
    try:
        while len(header := incoming.read(9)) == 9:
            payload = incoming.read(int.from_bytes(header[:3]))
            kind, flags, stream = header[3], header[4], int.from_bytes(header[5:])
            ends = kind in (0, 1) and bool(flags & END_STREAM)
            frames.append(Frame(KINDS.get(kind, str(kind)), stream, payload, ends))
            client.sendall(header + payload)
    except OSError:  # the other side has gone
        return
