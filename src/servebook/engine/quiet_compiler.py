"""Keeps the compiler of schemas, regexes and grammars out of the way of those who wait for tokens.

vLLM loads this into each of its engines, as a plugin (`vllm.general_plugins` in pyproject.toml).
"""

from __future__ import annotations

import os
import threading
from typing import Any

LOWEST_PRIORITY = 19


def register() -> None:
    """Let grammars compile at the lowest priority.

    What `ways/limits.py` lets pass may take a core for six seconds (200 letters, counted, in a JSON schema, with a
    vocabulary of 49,152; measured on an AMD EPYC), and xgrammar takes eight threads: more than the engine has.
    """
    from vllm.v1.structured_output import StructuredOutputManager

    compile_grammar = StructuredOutputManager._create_grammar

    def quietly(manager: StructuredOutputManager, request: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():  # vLLM's pool for this; its threads are no others
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)  # and of those begun from here
        return compile_grammar(manager, request)

    StructuredOutputManager._create_grammar = quietly
