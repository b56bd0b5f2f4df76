"""Step 3 of the gateway: failures have our words: a status before the first byte, an event after it.

Still wrong: it takes whatever comes: empty messages, endless answers, any number of callers at a time.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from openai import APIConnectionError, APIError, AsyncOpenAI, BadRequestError
from pydantic import BaseModel

from servebook.settings import load_settings
from servebook.ways.asgi import CancelOnDisconnect


class Ask(BaseModel):
    message: str
    max_tokens: int = 100


def create_app(upstream: str, key: str | None) -> FastAPI:
    """The two endpoints over one asynchronous client."""
    app = FastAPI()
    app.add_middleware(CancelOnDisconnect)  # cancels the handler at its `await`, which closes the request to vLLM
    client = AsyncOpenAI(base_url=f"{upstream}/v1", api_key=key or "none", max_retries=0)

    @app.exception_handler(APIError)
    async def engine_failed(_: Request, error: APIError) -> JSONResponse:
        if isinstance(error, BadRequestError):
            return JSONResponse({"detail": "The engine does not accept this request."}, 400)
        if isinstance(error, APIConnectionError):
            return JSONResponse({"detail": "The engine cannot be reached."}, 503, {"Retry-After": "5"})
        return JSONResponse({"detail": "The engine could not answer."}, 502)

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
        chunks = await client.chat.completions.create(**request(ask), stream=True)  # a refusal is still a status

        async def events() -> AsyncIterator[str]:
            try:
                async for chunk in chunks:
                    if chunk.choices and (text := chunk.choices[0].delta.content):
                        yield f"data: {json.dumps({'text': text})}\n\n"
                yield "data: [DONE]\n\n"
            except APIError:
                yield 'event: error\ndata: {"detail": "The engine broke off its answer."}\n\n'

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def main(upstream: str = typer.Option(), http_port: int = 8081) -> None:
    """Serve on 127.0.0.1 until a signal comes."""
    uvicorn.run(create_app(upstream, load_settings().key), port=http_port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
