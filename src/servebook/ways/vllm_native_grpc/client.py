"""A client of vLLM's own gRPC server in Python, which takes and gives token ids: the text is this side's work."""

from __future__ import annotations

import io
import time
import uuid
import zipfile
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import cached_property
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from servebook.ways.client import Answer, Piece, one_answer
from servebook.ways.grpc_streams import check_end

ENGINE = "vllm.grpc.engine.VllmEngine"
"""The name under which health answers for the engine; "" is the process."""

TOKENIZER_SECONDS = 30
"""How long a tokenizer is waited for, where no call needs it sooner."""


class VllmGrpcClient:
    """A client of the server at `address` ("host:port"); use it in a `with` block, from any number of threads.

    Errors are `grpc.RpcError` with `code()` and `details()`.
    """

    def __init__(self, address: str) -> None:
        # The server sends messages of any size; gRPC's default would refuse a tokenizer or logprobs beyond 4 MB.
        self.channel = grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)])
        self.stub = vllm_engine_pb2_grpc.VllmEngineStub(self.channel)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The engine's own tokenizer, fetched from the server: ids from any other would be another language."""
        return self._fetch_tokenizer(TOKENIZER_SECONDS)

    def _fetch_tokenizer(self, seconds: float) -> Tokenizer:
        chunks = self.stub.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=seconds)
        return read_tokenizer(b"".join(chunk.data for chunk in chunks))

    def stream_ids(
        self, prompt: Sequence[int], *, request_id: str = "", timeout: float = 60, **sampling: Any
    ) -> Generator[pb.GenerateResponse]:
        """Yield the server's messages as they come; leaving the loop, or closing the generator, cancels the call.

        `sampling` holds fields of the proto's SamplingParams. Without `max_tokens` the engine runs to the end of
        its context.
        """
        call = self.stub.Generate(request_for(prompt, request_id, **sampling), timeout=timeout)
        try:
            yield from call
        finally:
            call.cancel()

    def stream(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Generator[Piece]:
        """Tokenize `prompt`, and yield text as it becomes whole; `sampling` as for `stream_ids`, and no `n`.

        The string of `stop` that ended it is still in the text; the server's last message names it (`stream_ids`).
        """
        one_answer(sampling)
        end = time.monotonic() + timeout
        if "tokenizer" not in vars(self):  # the first call fetches it, within its own time
            self.tokenizer = self._fetch_tokenizer(timeout)
        ids = self.tokenizer.encode(prompt).ids
        decoder = decoder_after(ids, self.tokenizer)
        with closing(self.stream_ids(ids, timeout=end - time.monotonic(), **sampling)) as messages:
            piece = None
            for message in messages:
                yield (piece := read_piece(message, decoder, self.tokenizer))
            check_end(piece)

    def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:
        """The whole answer; what `stream` says holds here, too."""
        pieces = list(self.stream(prompt, timeout=timeout, **sampling))
        return put_together(pieces, len(self.tokenizer.encode(prompt).ids))

    def abort(self, *request_ids: str) -> None:
        """Stop requests by their ids, whoever began them: the server asks for no right to do so."""
        self.stub.Abort(pb.AbortRequest(request_ids=request_ids), timeout=10)

    def model_info(self) -> pb.GetModelInfoResponse:
        return self.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=10)

    def server_info(self) -> pb.GetServerInfoResponse:
        return self.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10)

    def load(self) -> pb.SchedulerLoad:
        """Running and waiting requests and the part of the KV cache in use, as of the engine's last step."""
        return self.stub.GetLoads(pb.GetLoadsRequest(), timeout=10).loads[0]

    def serving(self, service: str = ENGINE) -> bool:
        """Whether grpc.health.v1 answers SERVING for `service`."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def __enter__(self) -> VllmGrpcClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


def request_for(ids: Sequence[int], request_id: str = "", **sampling: Any) -> pb.GenerateRequest:
    """The message that asks for a stream; `sampling` are fields of the proto's SamplingParams."""
    return pb.GenerateRequest(
        request_id=request_id or str(uuid.uuid4()),
        tokenized=pb.TokenizedInput(input_ids=ids),
        sampling_params=pb.SamplingParams(**sampling),
        stream=True,
    )


def read_tokenizer(bundle: bytes) -> Tokenizer:
    """The tokenizer in the zip file that the server sends."""
    with zipfile.ZipFile(io.BytesIO(bundle)) as files:
        return Tokenizer.from_buffer(files.read("tokenizer.json"))


def decoder_after(prompt: Sequence[int], tokenizer: Tokenizer) -> DecodeStream:
    """What makes text of the ids that follow a prompt's: alone, a blank in front is lost with tokenizers like Llama's.

    Where the prompt ends within a character, it would give the whole prompt once more with the answer's first text.
    """
    within = tokenizer.decode(prompt, skip_special_tokens=False).endswith("\ufffd")
    return DecodeStream(ids=[] if within else prompt, skip_special_tokens=True)


def read_piece(message: pb.GenerateResponse, decoder: DecodeStream, tokenizer: Tokenizer) -> Piece:
    """What a message brings: the decoder keeps an unfinished character's tokens until the rest has come."""
    if not message.HasField("chunk"):
        return Piece("", finish_reason=message.complete.finish_reason)
    ids = tuple(message.chunk.token_ids)
    return Piece("".join(decoder.step(tokenizer, each) or "" for each in ids), len(ids), token_ids=ids)


def put_together(pieces: Sequence[Piece], prompt_tokens: int) -> Answer:
    """The answer that came in pieces."""
    ids = tuple(each for piece in pieces for each in piece.token_ids)
    return Answer("".join(piece.text for piece in pieces), len(ids), prompt_tokens, pieces[-1].finish_reason or "", ids)
