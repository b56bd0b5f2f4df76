"""The engine."""

import os

from openai import AsyncOpenAI

URL, KEY, MODEL = (os.environ[name] for name in ("ENGINE_URL", "ENGINE_KEY", "ENGINE_MODEL"))
TIMEOUT = float(os.environ["ENGINE_TIMEOUT"])  # seconds
client = AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=TIMEOUT)
