"""A client for each server, all of one shape: to ask every way the same, loop over CLIENTS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from servebook.launch import Server
from servebook.ways.client import AioClient, Client
from servebook.ways.custom_grpc.aio_client import GrpcAioClient
from servebook.ways.custom_grpc.client import GrpcClient
from servebook.ways.fastapi_gateway.client import GatewayAioClient, GatewayClient
from servebook.ways.kserve.aio_client import V2AioClient
from servebook.ways.kserve.client import V2Client
from servebook.ways.openai_rest.client import OpenAIAioClient, OpenAIClient
from servebook.ways.triton_grpc.aio_client import TritonAioClient
from servebook.ways.triton_grpc.client import TritonClient
from servebook.ways.vllm_native_grpc.aio_client import InferenceAioClient, VllmGrpcAioClient
from servebook.ways.vllm_native_grpc.client import VllmGrpcClient
from servebook.ways.vllm_native_grpc.inference_client import InferenceClient


@dataclass(frozen=True)
class Clients:
    """How a server's two clients are made; `chats` where the prompt becomes a message of a chat."""

    client: Callable[[Server], Client]
    aio_client: Callable[[Server], AioClient]
    chats: bool = False


OPENAI = Clients(
    lambda server: OpenAIClient(server.url, api_key=server.settings.key),
    lambda server: OpenAIAioClient(server.url, api_key=server.settings.key),
)

CLIENTS = {
    "vllm": OPENAI,
    "triton": Clients(lambda server: TritonClient(server.grpc), lambda server: TritonAioClient(server.grpc)),
    "grpc": Clients(
        lambda server: GrpcClient(server.grpc, api_key=server.settings.key),
        lambda server: GrpcAioClient(server.grpc, api_key=server.settings.key),
    ),
    "gateway": Clients(
        lambda server: GatewayClient(server.url, api_key=server.settings.key),
        lambda server: GatewayAioClient(server.url, api_key=server.settings.key),
        chats=True,
    ),
    "kserve": Clients(lambda server: V2Client(server.grpc), lambda server: V2AioClient(server.grpc)),
    "vllm-rs": Clients(lambda server: InferenceClient(server.grpc), lambda server: InferenceAioClient(server.grpc)),
    "vllm-grpc": Clients(lambda server: VllmGrpcClient(server.grpc), lambda server: VllmGrpcAioClient(server.grpc)),
    "router": OPENAI,
}
"""By the names that `serve` knows."""
