"""A gateway that answers a message whole."""

from fastapi import FastAPI
from openai import OpenAI
from upstream import KEY, MODEL, URL, Ask, client

app = FastAPI()


@app.get("/healthz")
async def healthz() -> str:
    return "alive"


### BEGIN SOLUTION POST /chat, without blocking the event loop (about 5 lines)
@app.post("/chat")
async def chat(ask: Ask) -> dict[str, str]:
    messages = [{"role": "user", "content": ask.message}]
    answer = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=ask.max_tokens)
    return {"response": answer.choices[0].message.content}


### END SOLUTION
