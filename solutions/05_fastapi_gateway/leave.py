"""A gateway that stops for callers who have left."""

import asyncio

from fastapi import FastAPI, HTTPException, Request
from upstream import MODEL, Ask, client

app = FastAPI()


### BEGIN SOLUTION POST /chat: the engine's call as a task, the caller's presence beside it (about 11 lines)
@app.post("/chat")
async def chat(ask: Ask, request: Request) -> dict[str, str]:
    messages = [{"role": "user", "content": ask.message}]
    call = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=ask.max_tokens)
    task = asyncio.create_task(call)
    while not task.done():
        await asyncio.wait({task}, timeout=0.1)
        if await request.is_disconnected():
            task.cancel()
            raise HTTPException(499)
    return {"response": task.result().choices[0].message.content}


### END SOLUTION
