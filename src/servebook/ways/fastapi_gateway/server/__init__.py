"""The FastAPI gateway in front of vLLM: a small API of our own, limits, a key, metrics and a chat page.

`chat` holds the two endpoints, `engine` the way to vLLM; what happens when a caller leaves is in `ways/asgi.py`.
"""
