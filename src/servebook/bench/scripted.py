"""A scripted token source, for the benchmark's protocol arm only: the real servers around no model at all.

    python -m servebook.bench.scripted vllm.entrypoints.cli.main serve --model …

runs the named module unchanged, with `ScriptedLLM` in the place of vLLM's `AsyncLLM`. What is left is what
a protocol costs: parsing, tokenizing the prompt, turning each output into a message and sending it. Its
answers mean nothing, and nothing but the benchmark ever starts it.
"""

from __future__ import annotations

import asyncio
import runpy
import sys
from collections.abc import AsyncGenerator
from typing import Any

import vllm.v1.engine.async_llm
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import renderer_from_config
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import RequestOutputCollector

from servebook.bench.protocol import SCRIPTED_RATE

SENTENCE = " The quick brown fox jumps over the lazy dog and runs along the river."


class ScriptedLLM(AsyncLLM):  # type: ignore[misc]
    """What a server sees of `AsyncLLM`, without EngineCore: every request gets the same sentence, over and over.

    All requests step together, as the requests of one batch do in an engine, and their outputs wait in vLLM's own
    queues: those of a reader that is slow, or that takes its time on purpose, are merged there.
    """

    def __init__(self, vllm_config: Any, executor_class: Any, log_stats: bool, **_: Any) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.scheduler_config = vllm_config.scheduler_config
        self.observability_config = vllm_config.observability_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.logger_manager = None
        self.log_stats = self.log_requests = False
        tokenizer = self.renderer.get_tokenizer()
        ids = tokenizer.encode(SENTENCE, add_special_tokens=False)
        self.script = [(token, tokenizer.decode([token])) for token in ids]
        self.running: set[Request] = set()
        self.stepping: asyncio.Task[None] | None = None

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **_: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Emit `max_tokens` tokens as `output_kind` asks: deltas, the text so far, or only the end."""
        if not (isinstance(prompt, dict) and "prompt_token_ids" in prompt):
            prompt = self.input_processor.process_inputs(
                request_id, prompt, sampling_params, supported_tasks=await self.get_supported_tasks()
            )
            prompt_ids = prompt.prompt_token_ids
        else:
            prompt_ids = prompt["prompt_token_ids"]
        request = Request(request_id, prompt_ids, sampling_params)
        self.running.add(request)
        if self.stepping is None or self.stepping.done():
            self.stepping = asyncio.create_task(self.steps())
        try:
            finished = False
            while not finished:
                output = request.queue.get_nowait() or await request.queue.get()
                finished = output.finished
                yield output
        finally:
            self.running.discard(request)

    async def steps(self) -> None:
        """A token for every request, `SCRIPTED_RATE` times a second, until there is none."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while self.running:
            due += 1 / SCRIPTED_RATE
            await asyncio.sleep(due - loop.time())
            for request in list(self.running):
                request.step(self.script)
                if request.made == request.count:
                    self.running.discard(request)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Every request is taken."""

    async def get_supported_tasks(self) -> tuple[Any, ...]:
        return ("generate",)

    async def abort(self, request_id: Any, internal: bool = False) -> None:
        """Leaving the generator is all that there is to end."""

    async def reset_mm_cache(self) -> None:
        """There is none."""

    @property
    def is_running(self) -> bool:
        return True

    @property
    def errored(self) -> bool:
        return False

    def shutdown(self, timeout: float | None = None) -> None:
        if renderer := getattr(self, "renderer", None):
            renderer.shutdown()


class Request:
    """One request and what there is of its answer."""

    def __init__(self, request_id: str, prompt_ids: list[int], params: SamplingParams) -> None:
        self.id, self.prompt_ids, self.kind = request_id, prompt_ids, params.output_kind
        self.count = params.max_tokens or 16
        self.interval = params.stream_interval or 1
        self.queue = RequestOutputCollector(self.kind, request_id)
        self.made = 0
        self.text, self.ids = "", list[int]()

    def step(self, script: list[tuple[int, str]]) -> None:
        """One token more; as in vLLM, the first and the last are never held back by `stream_interval`."""
        token, piece = script[self.made % len(script)]
        self.made += 1
        self.text += piece
        self.ids.append(token)
        last = self.made == self.count
        if not last and (self.kind == RequestOutputKind.FINAL_ONLY or (self.made - 1) % self.interval):
            return
        ids = list(self.ids)
        completion = CompletionOutput(0, self.text, ids, None, None, finish_reason="length" if last else None)
        self.queue.put(RequestOutput(self.id, None, self.prompt_ids, None, [completion], last))
        if self.kind == RequestOutputKind.DELTA:
            self.text, self.ids = "", []


def install() -> None:
    """From here on this process gets the scripted source wherever it imports `AsyncLLM`."""
    vllm.v1.engine.async_llm.AsyncLLM = ScriptedLLM


def main() -> None:
    """Run the module that the command line names, with its own arguments."""
    install()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
