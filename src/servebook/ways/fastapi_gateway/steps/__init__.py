"""From `mistake.py` to `server/`, one idea at a time: each step is a whole program, and the next changes a few lines.

`python -m servebook.ways.fastapi_gateway.steps.step_1_await --upstream http://127.0.0.1:8000` runs one.
"""
