"""Stops the work for callers who have left: cancels their request, streaming or not."""

from __future__ import annotations

import asyncio
import time

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelOnDisconnect:
    """ASGI middleware that cancels the application when its caller disconnects, or stops reading.

    FastAPI notices a disconnect only where it streams; a handler that waits for the engine's whole answer
    would wait on, and the engine would compute for nobody. Here a task of its own reads what the server
    receives, ahead of the application, and so sees `http.disconnect` when it comes. Cancelling closes the
    connection to vLLM (`engine.EngineCall`), and vLLM aborts a request whose connection closes.

    `reader_seconds` is how long a caller may leave a full socket unread before they count as gone.
    What is read ahead is bounded by `limits.BodyLimit`, which must be outside of this.
    """

    def __init__(self, app: ASGIApp, reader_seconds: float = 30) -> None:
        self.app = app
        self.reader_seconds = reader_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue[Message] = asyncio.Queue()
        sending_since: float | None = None
        with anyio.CancelScope() as request:

            async def read_ahead() -> None:
                while (message := await receive())["type"] != "http.disconnect":
                    messages.put_nowait(message)
                request.cancel()

            async def note_and_send(message: Message) -> None:
                nonlocal sending_since
                sending_since = time.monotonic()
                await send(message)
                sending_since = None

            async def watch_reader() -> None:
                # One timer per request, for all that it sends: a timer per token would cost more than the token.
                while True:
                    await asyncio.sleep(self.reader_seconds / 4)
                    if sending_since and time.monotonic() > sending_since + self.reader_seconds:
                        request.cancel()

            watching = [asyncio.create_task(read_ahead()), asyncio.create_task(watch_reader())]
            try:
                await self.app(scope, messages.get, note_and_send)
            finally:
                for task in watching:
                    task.cancel()
