"""A beginning: it answers, and does little else of what the brief asks for."""

import os

import requests
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel

ENGINE = os.environ["ENGINE_URL"]
KEY = {"Authorization": f"Bearer {os.environ['ENGINE_KEY']}"}

app = FastAPI()


class Ask(BaseModel):
    prompt: str
    max_tokens: int


@app.get("/health")
def health() -> Response:
    try:
        return Response(status_code=requests.get(f"{ENGINE}/health", headers=KEY, timeout=1).status_code)
    except requests.RequestException:
        return Response(status_code=503)


@app.post("/generate")
def generate(ask: Ask) -> dict[str, str | int]:
    body = {"model": os.environ["ENGINE_MODEL"], "prompt": ask.prompt, "max_tokens": ask.max_tokens, "temperature": 0}
    answer = requests.post(f"{ENGINE}/v1/completions", headers=KEY, json=body, timeout=60).json()
    return {"text": answer["choices"][0]["text"], "tokens": answer["usage"]["completion_tokens"]}


uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning")
