"""A model that answers with its input, in KServe's ModelServer: `python -m servebook.bench.identity_kserve`."""

from __future__ import annotations

import argparse
import asyncio
import base64
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np

from servebook.numbers import port
from servebook.settings import in_address

MAX_MESSAGE_BYTES = 512 * 2**20


def main() -> None:
    """Serve the models `identity` and `identity_base64` until a signal comes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--http-port", type=port, required=True)
    parser.add_argument("--grpc-port", type=port, required=True)
    options = parser.parse_args()
    sys.argv[1:] = []  # KServe's import parses them for options of its own

    from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
    from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
    from kserve.protocol.grpc.servicer import InferenceServicer

    class Identity(Model):  # type: ignore[misc]
        """Sends an array back; a BASE64 input is decoded to an array and encoded again."""

        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.ready = True

        async def predict(self, payload: InferRequest, *_: Any, **__: Any) -> InferResponse:
            tensor = payload.inputs[0]
            array = tensor.as_numpy()
            if tensor.name == "BASE64":
                values = np.frombuffer(base64.b64decode(array[0]), dtype=np.float32)
                array = np.array([base64.b64encode(values.data)], dtype=np.object_)
            return InferResponse(
                payload.id or "0",
                self.name,
                [InferOutput(tensor.name, list(array.shape), tensor.datatype, array)],
                use_binary_outputs=payload.use_binary_outputs and not payload.from_grpc,  # gRPC: raw without asking
                requested_outputs=payload.request_outputs,
            )

    class Server(ModelServer):  # type: ignore[misc]
        """On one address only, and with room for large messages."""

        async def _serve(self) -> None:
            self._rest_server.config.host = options.host
            limits = [(f"grpc.max_{way}_message_length", MAX_MESSAGE_BYTES) for way in ("send", "receive")]
            server = grpc.aio.server(ThreadPoolExecutor(2), options=limits)
            servicer = InferenceServicer(self.dataplane, self.model_repository_extension)
            grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
            server.add_insecure_port(f"{in_address(options.host)}:{options.grpc_port}")
            await asyncio.gather(server.start(), super()._serve())

    Server(http_port=options.http_port, enable_grpc=False).start([Identity("identity"), Identity("identity_base64")])


if __name__ == "__main__":
    main()
