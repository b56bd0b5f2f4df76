"""Runs requests on an `AsyncLLM` that lives on an event loop in a thread of its own.

Everything that talks to the engine or to a response sender happens on that loop, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import traceback
import uuid
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Any

import triton_python_backend_utils as pb_utils
import uvloop
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import TextPrompt
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from servebook.ways.pace import Pace
from servebook.ways.triton_grpc.backend.guardian import start_guardian
from servebook.ways.triton_grpc.backend.metrics import Factory
from servebook.ways.triton_grpc.backend.tensors import arrays, elements
from servebook.ways.v2.contract import BadRequest, GaveUp, UnsupportedRequest
from servebook.ways.v2.request import GenerateRequest, read_request, refused
from servebook.ways.v2.response import Responses

POLL_SECONDS = 0.05
"""How often cancelled requests are looked for: Triton offers no callback. A cancel must be seen within 0.2 s."""

UNLOAD_SECONDS = 3.0
"""Grace time of the engine's processes; all of the unloading must fit into the 12 s that Triton allows at its exit."""

REFUSAL_SECONDS = 0.1
"""How long a refusal is held back: one that overtakes Triton's own hand-over of the request crashes Triton 24.10
(segmentation fault in its stream handler) for clients that ask for gRPC status codes. Measured on two cores with
eight such clients and four busy loops: without, dead within 2,000 refusals; with 0.02 s, none in 18,000."""

PACE_ON_SHARED_CORES = Pace(per_second=130 * len(os.sched_getaffinity(0)), most_seconds=0.1)
"""Where the model runs on the cores that Triton runs on. A response costs Triton's two processes 0.3 ms: with one for
each token, 8 streams on two cores lost 7 % of the engine's tokens per second, and 32 lost 14 %; this spends 4 % of the
cores. Beside a GPU no token waits: vLLM merges just what comes while the responses before are on their way."""

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
Error = pb_utils.TritonError


class Engine:
    """A running engine and the requests in it.

    `loras` maps adapter names to paths (None: LoRA is off); `on_death` is called once if the engine dies.
    """

    def __init__(
        self,
        engine_args: AsyncEngineArgs,
        loras: dict[str, str] | None,
        stat_loggers: list[Factory],
        on_death: Callable[[], None] | None,
    ) -> None:
        # The log's statistics: Triton has them. (vLLM fills its own Prometheus registry all the same.)
        engine_args.disable_log_stats = True
        self.loras = loras
        self.on_death = on_death
        self.pace = PACE_ON_SHARED_CORES if current_platform.is_cpu() else None
        # Requests without their final response. Asking Triton about a sender after that crashes the server.
        self.waiting: dict[Any, asyncio.Task[None]] = {}
        self.guardian = start_guardian()
        self.loop = uvloop.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self.thread.start()
        try:
            self._on_loop(self._start(engine_args, stat_loggers))
        except BaseException:
            self._end_loop()
            self.guardian.release()
            raise

    def submit(self, tensors: Mapping[str, Any], parameters: str, sender: Any) -> None:
        """Take a request over from Triton, or refuse it. Called on Triton's thread."""
        try:
            request = read_request(elements(tensors), parameters)
            self._check_lora(request)
        except UnsupportedRequest as error:
            self._refuse(sender, str(error), Error.UNSUPPORTED)
        except BadRequest as error:
            self._refuse(sender, str(error), Error.INVALID_ARG)
        else:
            self.loop.call_soon_threadsafe(self._begin, request, sender)

    def _refuse(self, sender: Any, message: str, code: int) -> None:
        self.loop.call_soon_threadsafe(self.loop.call_later, REFUSAL_SECONDS, _send_error, sender, message, code)

    def shutdown(self) -> None:
        """End the engine and wait until its processes are gone. Triton has had all responses by now."""
        self.loop.call_soon_threadsafe(self.watcher.cancel)
        self.llm.shutdown(timeout=UNLOAD_SECONDS)
        self._end_loop()
        # An engine that died raises one error for all, whose traceback holds their tasks' frames, and so their senders.
        # One that is freed later, by chance in Python's last steps, waits for ever for a lock of the stub's.
        gc.collect()
        if self.llm.errored:  # also where nobody saw it yet
            self.guardian.expect_the_end()
        self.guardian.release()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def _end_loop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    async def _start(self, engine_args: AsyncEngineArgs, stat_loggers: list[Factory]) -> None:
        self.llm = AsyncLLM.from_engine_args(engine_args, stat_loggers=stat_loggers)
        self.watcher = asyncio.create_task(self._watch())

    def _begin(self, request: GenerateRequest, sender: Any) -> None:
        task = self.waiting[sender] = asyncio.create_task(self._serve(request, sender))
        # Not caught inside: a task may be cancelled before it began.
        task.add_done_callback(lambda _: self._fail(sender, "the client cancelled the request", Error.CANCELLED))

    async def _serve(self, request: GenerateRequest, sender: Any) -> None:
        """Send the engine's outputs as they come, or one error; exactly one response is flagged final."""
        try:
            await self._generate(request, sender)
        except BadRequest as error:
            self._fail(sender, str(error), Error.INVALID_ARG)
        except VLLMClientError as error:
            self._fail(sender, str(refused("sampling_parameters", error, request)), Error.INVALID_ARG)
        except (EngineDeadError, GaveUp, GracefulHTTPError) as error:
            self._fail(sender, f"the engine cannot serve: {error}", Error.UNAVAILABLE)
        except Exception as error:
            cause = error.__cause__ or error
            # Type and place, not the message: it may quote the prompt.
            place = "".join(traceback.format_tb(cause.__traceback__))
            pb_utils.Logger.log_error(f"request failed: {type(cause).__name__} at\n{place}")
            self._fail(sender, "generation failed; the server's log has the cause", Error.INTERNAL)

    def _fail(self, sender: Any, message: str, code: int) -> None:
        """Send the error as the final response, unless there was one."""
        if self.waiting.pop(sender, None):
            _send_error(sender, message, code)

    async def _generate(self, request: GenerateRequest, sender: Any) -> None:
        prompt = parse_model_prompt(self.llm.model_config, TextPrompt(prompt=request.prompt))
        try:
            (engine_input,) = await self.llm.renderer.render_cmpl_async([prompt])
        except VLLMClientError as error:
            raise refused("text_input", error) from None
        outputs = self.llm.generate(
            engine_input, request.sampling, uuid.uuid4().hex, lora_request=self._lora_request(request)
        )
        responses = Responses(request)
        left = request.sampling.n * (request.sampling.max_tokens or self.llm.model_config.max_model_len)
        async with aclosing(outputs):  # leaving early aborts the request in the engine
            async for output in outputs:
                tensors = [pb_utils.Tensor(name, array) for name, array in arrays(responses.values(output)).items()]
                if output.finished:
                    del self.waiting[sender]
                sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if output.finished else 0)
                if self.pace and not output.finished:
                    sent = sum(len(choice.token_ids) for choice in output.outputs)
                    left -= sent
                    await asyncio.sleep(self.pace.hold_seconds(len(self.waiting), sent, left))

    async def _watch(self) -> None:
        """Cancel what clients cancelled; notice an engine that died, also while nobody asks it for anything."""
        while not self.llm.errored:
            await asyncio.sleep(POLL_SECONDS)
            self._cancel_what_clients_left()
        pb_utils.Logger.log_error("the engine died")
        if self.on_death:
            self.guardian.expect_the_end()
            self.on_death()

    def _cancel_what_clients_left(self) -> None:
        # A function of its own: a sender that a task's frame still holds when the stub ends crashes the stub.
        for sender, task in self.waiting.items():
            if sender.is_cancelled():
                task.cancel()

    def _check_lora(self, request: GenerateRequest) -> None:
        if request.lora_name is None:
            return
        if self.loras is None:
            raise BadRequest("sampling_parameters.lora_name", "LoRA feature is not enabled.")
        if request.lora_name not in self.loras:
            raise BadRequest(
                "sampling_parameters.lora_name",
                f"LoRA {request.lora_name} is not supported, we currently support {list(self.loras)}",
            )

    def _lora_request(self, request: GenerateRequest) -> LoRARequest | None:
        if request.lora_name is None or self.loras is None:
            return None
        number = 1 + list(self.loras).index(request.lora_name)
        return LoRARequest(request.lora_name, number, self.loras[request.lora_name])


def _send_error(sender: Any, message: str, code: int) -> None:
    sender.send(pb_utils.InferenceResponse(error=Error(message, code)), flags=FINAL)
