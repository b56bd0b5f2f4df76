"""A scripted token source, for the benchmark's protocol arm and for lessons about time: an engine without a model.

It takes the place of vLLM's model executor, by `--distributed-executor-backend`. All else is as it is: the server, its
tokenizer and detokenizer, vLLM's scheduler, and the sockets between them, for Python's fronts and for the Rust one. So
what the front costs is what it costs. The answers mean nothing, and no server that a user starts has it.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput

from servebook.bench.protocol import SCRIPTED_RATE, SENTENCE

MOST_STEPS = 400
"""Steps a second that vLLM's scheduler makes on any machine; a faster source gives several tokens in each."""


class ScriptedExecutor(Executor):  # type: ignore[misc]
    """Gives every request the same sentence, over and over, `SCRIPTED_RATE` tokens a second."""

    supported_tasks = ("generate",)

    def _init_executor(self) -> None:
        tokenizer = Tokenizer.from_file(str(Path(self.model_config.tokenizer) / "tokenizer.json"))
        self.script: list[int] = tokenizer.encode(SENTENCE, add_special_tokens=False).ids
        self.tokens = max(1, round(SCRIPTED_RATE / MOST_STEPS))
        self.due = 0.0
        self.prompts: dict[str, int] = {}
        self.made: dict[str, int] = {}

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """One step: wait until it is due, then a request whose prompt is read gets its next tokens."""
        if scheduler_output.total_num_scheduled_tokens:  # else it only tells who has gone
            now = time.monotonic()
            idle = not scheduler_output.scheduled_cached_reqs.req_ids  # until now: nobody is there who had a token
            self.due = (now if idle else self.due) + self.tokens / SCRIPTED_RATE
            time.sleep(max(0.0, self.due - now))
        output = self.step(scheduler_output)
        if not non_block:
            return output
        done: Future[ModelRunnerOutput] = Future()
        done.set_result(output)
        return done

    def step(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """The tokens of one step; none for a request of whose prompt a part is still to be read."""
        for request in scheduled.finished_req_ids:
            self.prompts.pop(request, None)
            self.made.pop(request, None)
        cached = scheduled.scheduled_cached_reqs
        before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduled.scheduled_new_reqs:
            before[new.req_id] = new.num_computed_tokens
            self.prompts[new.req_id] = len(new.prompt_token_ids or ())
            self.made[new.req_id] = 0
        requests = list(scheduled.num_scheduled_tokens)
        tokens: list[list[int]] = []
        for request in requests:
            made = self.made[request]
            read = before[request] + scheduled.num_scheduled_tokens[request] >= self.prompts[request] + made
            count = self.tokens if read else 0
            tokens.append([self.script[index % len(self.script)] for index in range(made, made + count)])
            self.made[request] += count
        return ModelRunnerOutput(
            req_ids=requests,
            req_id_to_index={request: index for index, request in enumerate(requests)},
            sampled_token_ids=tokens,
        )

    def get_kv_cache_specs(self) -> list[dict[str, FullAttentionSpec]]:
        """One small layer: the scheduler hands out its blocks, and nobody writes to them."""
        size = self.cache_config.block_size
        return [{"layer": FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=8, dtype=torch.float16)}]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["NHD"]]

    def determine_available_memory(self) -> list[int]:
        return [self.cache_config.kv_cache_memory_bytes]

    def collective_rpc(self, *_: Any, **__: Any) -> list[None]:
        """What workers would be told: there are none."""
        return [None]

    def compile_or_warm_up_model(self) -> None:
        """There is nothing to compile."""

    def check_health(self) -> None:
        """It is well while its process lives."""
