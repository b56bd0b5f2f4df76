"""A client of vLLM's Rust front end over gRPC (`vllm.Inference`): text or token ids in, text and token ids out."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servebook.protos.vllm import inference_pb2 as pb
from servebook.protos.vllm import inference_pb2_grpc
from servebook.ways.client import Answer, Piece
from servebook.ways.grpc_streams import check_end

SERVICE = "vllm.Inference"
REASONS = {
    pb.FINISH_REASON_UNSPECIFIED: "",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_ABORTED: "abort",
}
"""In the words of the REST API on the other port; a server may tell none."""


def request(
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 0,
    temperature: float | None = None,
    top_p: float = 0,
    top_k: int = 0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    choice: Sequence[str] = (),
    regex: str | None = None,
    json: str | None = None,
    grammar: str | None = None,
    token_ids: bool = False,
    model: str = "",
    request_id: str = "",
) -> pb.GenerateRequest:
    """The message for the usual names of sampling parameters; `max_tokens` 0 goes on until the context is full.

    At most one of `choice`, `regex`, `json` (a JSON Schema) and `grammar` (EBNF); `token_ids` asks for ids beside the
    text.

    Raises:
        TypeError: there are several of them.
    """
    if sum(each is not None for each in (choice or None, regex, json, grammar)) > 1:  # a oneof keeps one, silently
        raise TypeError("at most one of choice, regex, json and grammar: the message has room for one")
    message = pb.GenerateRequest(
        request_id=request_id,
        model=model,
        temperature=temperature,
        sampling=pb.Sampling(top_p=top_p, top_k=top_k, seed=seed),
        decoding=pb.Decoding(
            regex=regex, json=json, grammar=grammar, choice=pb.Choice(choices=choice) if choice else None
        ),
        stopping=pb.Stopping(max_new_tokens=max_tokens, stop_strings=stop, ignore_eos=ignore_eos),
        output=pb.Output(token_ids=token_ids),
    )
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    return message


class InferenceClient:
    """A client of the server at `address` ("host:port"); use it in a `with` block, from any number of threads.

    `credentials` (`grpc.ssl_channel_credentials(…)`) switch TLS on. Errors are `grpc.RpcError` with `code()`.
    """

    def __init__(self, address: str, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self.channel = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)

    def generate(self, prompt: str | Sequence[int], *, timeout: float = 60, **sampling: Any) -> Answer:
        """The whole answer within `timeout` seconds; `sampling` are the names that `request` takes."""
        return read_answer(self.stub.Generate(request(prompt, **sampling), timeout=timeout))

    def stream(self, prompt: str | Sequence[int], *, timeout: float = 60, **sampling: Any) -> Generator[Piece]:
        """Yield what is new as it comes; leaving the loop, or closing the generator, cancels the call."""
        call = self.stub.GenerateStream(request(prompt, **sampling), timeout=timeout)
        piece = None
        try:
            for response in call:
                for output in response.outputs:
                    yield (piece := read_piece(output))
            check_end(piece)
        finally:
            call.cancel()  # type: ignore[no-untyped-call]

    def serving(self, service: str = SERVICE) -> bool:
        """Whether grpc.health.v1 answers SERVING for `service`; "" is the process."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def __enter__(self) -> InferenceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


def read_answer(response: pb.GenerateResponse) -> Answer:
    """The one output of a response that is the whole answer."""
    (output,) = response.outputs
    reason, prompt_tokens = REASONS[output.finish_info.finish_reason], response.prompt_info.num_prompt_tokens
    return Answer(output.text, output.num_tokens, prompt_tokens, reason, tuple(output.token_ids))


def read_piece(output: pb.Generated) -> Piece:
    """One output of a response of a stream; the first response has none."""
    reason = REASONS[output.finish_info.finish_reason] if output.HasField("finish_info") else None
    return Piece(output.text, output.num_tokens, reason, tuple(output.token_ids))
