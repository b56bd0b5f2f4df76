"""A gateway that answers as it goes."""

import json

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from upstream import MODEL, Ask, client

app = FastAPI()


### BEGIN SOLUTION POST /chat/stream: events as they come, and an end (about 13 lines)
async def events(ask: Ask):
    messages = [{"role": "user", "content": ask.message}]
    async with await client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=ask.max_tokens, stream=True
    ) as chunks:
        async for chunk in chunks:
            if text := chunk.choices[0].delta.content:
                yield f"data: {json.dumps({'text': text})}\n\n"
    yield "data: [DONE]\n\n"


@app.post("/chat/stream")
async def chat_stream(ask: Ask) -> StreamingResponse:
    return StreamingResponse(events(ask), media_type="text/event-stream")


### END SOLUTION
