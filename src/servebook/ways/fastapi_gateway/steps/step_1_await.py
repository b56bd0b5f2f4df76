"""Step 1 of the gateway: a client that can be awaited. While one caller waits, the event loop serves the others.

Still wrong: the engine finishes an answer of `/chat` whose caller has hung up.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import typer
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI
from pydantic import BaseModel

from servebook.settings import load_settings


class Ask(BaseModel):
    message: str
    max_tokens: int = 100


def create_app(upstream: str, key: str | None) -> FastAPI:
    """The two endpoints over one asynchronous client."""
    app = FastAPI()
    client = AsyncOpenAI(base_url=f"{upstream}/v1", api_key=key or "none")

    def request(ask: Ask) -> dict[str, Any]:
        messages = [{"role": "user", "content": ask.message}]
        return {"model": "", "messages": messages, "max_tokens": ask.max_tokens}  # "": the one that is served

    @app.get("/healthz")
    async def healthz() -> str:
        return "alive"

    @app.post("/chat")
    async def chat(ask: Ask) -> dict[str, str]:
        answer = await client.chat.completions.create(**request(ask))
        return {"response": answer.choices[0].message.content or ""}

    @app.post("/chat/stream")
    async def chat_stream(ask: Ask) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            async for chunk in await client.chat.completions.create(**request(ask), stream=True):
                if chunk.choices and (text := chunk.choices[0].delta.content):
                    yield f"data: {json.dumps({'text': text})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def main(upstream: str = typer.Option(), http_port: int = 8081) -> None:
    """Serve on 127.0.0.1 until a signal comes."""
    uvicorn.run(create_app(upstream, load_settings().key), port=http_port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
