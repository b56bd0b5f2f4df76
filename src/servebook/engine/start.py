"""Runs a module that will hold an engine: `python -m servebook.engine.start MODULE WORD…` is `python -m MODULE WORD…`.

It is ready sooner. What it imports is some million objects, which stay, and meanwhile Python would search them for
garbage again and again. Here it does not until vLLM loads `faster_start.py`, when all is imported. Measured (2 cores,
Intel Xeon): vLLM's own server is ready after 12.3 s and not 14.3.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys

WITH_ENGINE = (sys.executable, "-m", __name__)
"""What comes before a module that will hold an engine, and its words."""
PLUGIN = "servebook_faster_start"
"""By this name vLLM knows `faster_start.py` (pyproject.toml)."""


def pause() -> None:
    """Search for no garbage until `faster_start.py` is loaded; not where VLLM_PLUGINS leaves it out."""
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is None or PLUGIN in plugins.split(","):
        gc.disable()


if __name__ == "__main__":
    pause()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
