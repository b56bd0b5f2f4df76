"""The engine, and what callers may ask."""

import os

from openai import AsyncOpenAI
from pydantic import BaseModel

URL, KEY, MODEL = (os.environ[name] for name in ("ENGINE_URL", "ENGINE_KEY", "ENGINE_MODEL"))
TIMEOUT = float(os.environ["ENGINE_TIMEOUT"])  # seconds
client = AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=TIMEOUT)


class Ask(BaseModel):
    """The body of a request."""

    message: str
    max_tokens: int = 100
