"""One adapter per path: how a client of that path sends a job and reads the answer, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial

from servebook.bench.load import BenchError, Send
from servebook.bench.paths import custom_grpc, fastapi_gateway, openai_rest, v2, vllm_native_grpc
from servebook.launch import Server, ServerSpec, serve
from servebook.settings import TENSOR_MODEL_NAME, Settings

Open = Callable[[Server], AbstractAsyncContextManager[Send]]


@dataclass(frozen=True)
class ServingPath:
    """A way from a client to the engine.

    `against` names the path of vLLM's own server that it is compared with: the one that asks the engine for the
    same work. `history`: a request carries the turns of its chat before it. `cannot` lists what its answers do not
    carry, in the terms of the parity test. `spec` is for a server that is none of the workbook's own.
    """

    name: str
    about: str
    server: str
    open: Open
    against: str = "sse"
    chat: bool = False
    history: bool = False
    streams: bool = True
    cannot: tuple[str, ...] = ()
    spec: ServerSpec | None = None

    @property
    def instance(self) -> str:
        """The name of its server among those that run."""
        return self.name if self.spec else self.server

    def serve(self, settings: Settings | None = None) -> Server:
        """Attach to its server, or start it."""
        return serve(self.server, instance=self.instance if self.spec else None, settings=settings, spec=self.spec)


kserve_sse = partial(openai_rest.sse, prefix="/openai", model=TENSOR_MODEL_NAME)

PATHS: dict[str, ServingPath] = {
    path.name: path
    for path in (
        ServingPath("sse", "vLLM's OpenAI server: completion, SSE", "vllm", openai_rest.sse),
        ServingPath(
            "rest",
            "vLLM's OpenAI server: completion, one JSON answer",
            "vllm",
            openai_rest.rest,
            streams=False,
        ),
        ServingPath(
            "sse-chat",
            "vLLM's OpenAI server: chat, SSE",
            "vllm",
            partial(openai_rest.sse, chat=True),
            against="sse-chat",
            chat=True,
            history=True,
        ),
        ServingPath(
            "rest-chat",
            "vLLM's OpenAI server: chat, one JSON answer",
            "vllm",
            partial(openai_rest.rest, chat=True),
            against="sse-chat",
            chat=True,
            history=True,
            streams=False,
        ),
        ServingPath("triton", "Triton with the vLLM backend: ModelStreamInfer", "triton", v2.grpc_stream),
        ServingPath("grpc", "our llm.v1.LLMService: StreamGenerate", "grpc", custom_grpc.stream),
        ServingPath(
            "grpc-fronts",
            "our llm.v1.LLMService with several fronts: StreamGenerate",
            "grpc",
            custom_grpc.spread,
            spec=custom_grpc.SEVERAL,
        ),
        ServingPath(
            "grpc-unary", "our llm.v1.LLMService: Generate", "grpc", custom_grpc.unary, against="rest", streams=False
        ),
        ServingPath(
            "gateway",
            "our FastAPI gateway: /chat/stream",
            "gateway",
            fastapi_gateway.stream,
            against="sse-chat",
            chat=True,
            history=True,
        ),
        ServingPath(
            "gateway-whole",
            "our FastAPI gateway: /chat",
            "gateway",
            fastapi_gateway.whole,
            against="rest-chat",
            chat=True,
            history=True,
            streams=False,
        ),
        ServingPath(
            "gateway-article",
            "the article's gateway, a blocking client in async def: /chat",
            "gateway",
            fastapi_gateway.article,
            against="gateway-whole",
            chat=True,
            streams=False,
            cannot=("temperature", "finish_reason", "usage"),
            spec=fastapi_gateway.ARTICLE,
        ),
        ServingPath("kserve-rest", "KServe: V2 over REST", "kserve", v2.rest, against="rest", streams=False),
        ServingPath("kserve-grpc", "KServe: V2 over gRPC", "kserve", v2.grpc_unary, against="rest", streams=False),
        ServingPath("kserve-sse", "KServe: its OpenAI route, SSE", "kserve", kserve_sse),
        ServingPath(
            "vllm-grpc", "vLLM's own gRPC server: token ids", "vllm-grpc", vllm_native_grpc.stream, cannot=("text",)
        ),
        ServingPath("rust-sse", "vLLM's Rust front end: completion, SSE", "vllm-rs", openai_rest.sse),
        ServingPath("rust-grpc", "vLLM's Rust front end: vllm.Inference", "vllm-rs", vllm_native_grpc.inference),
    )
}


def find_path(name: str) -> ServingPath:
    """The path called `name`.

    Raises:
        BenchError: there is none; the message lists them.
    """
    try:
        return PATHS[name]
    except KeyError:
        raise BenchError(f"There is no path {name!r}.", f"Choose from {', '.join(PATHS)}.") from None
