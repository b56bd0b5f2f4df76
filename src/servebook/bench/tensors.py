"""What a big tensor costs on its way to a model and back: six encodings, two servers, 1 KB to 64 MB.

The model only answers with its input, so nothing but the transport is measured: the client's encoding, the
server's decoding and encoding, the client's decoding, and the bytes in between, over loopback.
"""

from __future__ import annotations

import base64
import shutil
import statistics
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import tritonclient.grpc as v2_grpc
import tritonclient.http as v2_http
from pydantic import BaseModel, Field
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, shared_memory

from servebook.bench.load import BenchError
from servebook.launch import Server, find_server, serve
from servebook.launch.probes import http_ok
from servebook.launch.table import Endpoints
from servebook.processes import wait_until
from servebook.settings import Settings

Array = npt.NDArray[np.float32]

KIB, MIB = 2**10, 2**20
SIZES = (KIB, 16 * KIB, 256 * KIB, 4 * MIB, 15 * MIB, 64 * MIB)
"""In bytes. 15 MiB is the article's: a batch of 32 pictures."""

SECONDS_PER_CELL = 0.4
GIVE_UP_SECONDS = 4.0
"""An encoding whose last size took longer than this is not tried with the next: the picture is clear by then."""

LET_GO_SECONDS = 10.0

CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: 0
input [{{ name: "{tensor}", data_type: {kind}, dims: [-1] }}]
output [{{ name: "{tensor}", data_type: {kind}, dims: [-1] }}]
instance_group [{{ count: 1, kind: KIND_CPU }}]
"""


class TensorCost(BaseModel):
    """One tensor of float32, there and back."""

    server: str
    encoding: str
    tensor_bytes: int
    request_bytes: int = Field(description="The body of the request: what the encoding makes of the tensor.")
    median_ms: float = Field(description="Round trip, with encoding and decoding on both sides.")
    repeats: int


def identity_server(name: str, settings: Settings) -> Server:
    """Start `triton` or `kserve` with the identity model and without an engine, as an instance of its own.

    Raises:
        LaunchError: it cannot start.
    """
    spec = find_server(name)

    def argv(settings: Settings, _: Path, __: dict[str, Endpoints]) -> list[str]:
        module = "servebook.ways.triton_grpc.backend" if name == "triton" else "servebook.bench.identity_kserve"
        ports = [word for kind in spec.ports for word in (f"--{kind}-port", f"{{{kind}}}")]
        repository = ["--shared-memory", "--model-repository", str(_repository(settings))] if name == "triton" else []
        return [sys.executable, "-m", module, "--host", settings.host, *ports, *repository]

    made = replace(spec, argv=argv, has_engine=False, ready=lambda at: http_ok(at["http"], "/v2/models/identity/ready"))
    return serve(name, instance=f"{name}-identity", settings=settings, spec=made)


def _repository(settings: Settings) -> Path:
    repository = settings.state_dir / "bench" / "triton-identity"
    for name, tensor, kind in (("identity", "TENSOR", "TYPE_FP32"), ("identity_base64", "BASE64", "TYPE_STRING")):
        (repository / name / "1").mkdir(parents=True, exist_ok=True)
        (repository / name / "config.pbtxt").write_text(CONFIG.format(name=name, tensor=tensor, kind=kind))
        shutil.copyfile(Path(__file__).with_name("identity_triton.py"), repository / name / "1" / "model.py")
    return repository


class Encoding(ABC):
    """One way to send a tensor to the server at `server` and get it back."""

    def __init__(self, server: Server) -> None:
        self.server = server

    @abstractmethod
    def request_bytes(self, array: Array) -> int:
        """How long the request's body is."""

    @abstractmethod
    def there_and_back(self, array: Array) -> Array:
        """The array that the server sent back."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held."""


class Http(Encoding):
    """REST through tritonclient: the tensor as a JSON list, or in binary after the JSON."""

    binary = False
    name, kind = "TENSOR", "FP32"
    model = "identity"

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.client = v2_http.InferenceServerClient(server.http, network_timeout=120, connection_timeout=120)

    def input(self, array: npt.NDArray[Any]) -> v2_http.InferInput:
        tensor = v2_http.InferInput(self.name, list(array.shape), self.kind)
        return tensor.set_data_from_numpy(array, binary_data=self.binary)

    def outputs(self) -> list[v2_http.InferRequestedOutput]:
        return [v2_http.InferRequestedOutput(self.name, binary_data=self.binary)]

    def infer(self, array: Array) -> npt.NDArray[Any]:
        # KServe takes a body without this header for a binary one.
        headers = None if self.binary else {"Content-Type": "application/json"}
        result = self.client.infer(self.model, [self.input(array)], outputs=self.outputs(), headers=headers)
        return np.asarray(result.as_numpy(self.name))

    def request_bytes(self, array: Array) -> int:
        body, _ = self.client.generate_request_body([self.input(array)], self.outputs())
        return len(body)

    def there_and_back(self, array: Array) -> Array:
        return np.asarray(self.infer(array), dtype=np.float32)

    def close(self) -> None:
        self.client.close()


class HttpBinary(Http):
    """The binary extension of the protocol: the tensor's own bytes after the JSON."""

    binary = True


class Base64(Http):
    """The tensor's bytes as base64 in a JSON string; the model decodes and encodes."""

    name, kind = "BASE64", "BYTES"
    model = "identity_base64"

    def input(self, array: npt.NDArray[Any]) -> v2_http.InferInput:
        return super().input(np.array([base64.b64encode(array.data)], dtype=np.object_))

    def there_and_back(self, array: Array) -> Array:
        return np.frombuffer(base64.b64decode(self.infer(array)[0]), dtype=np.float32)


class GrpcRaw(Encoding):
    """gRPC with the tensor's own bytes in `raw_input_contents`: what tritonclient sends."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.client = v2_grpc.InferenceServerClient(server.grpc)

    def input(self, array: Array) -> v2_grpc.InferInput:
        return v2_grpc.InferInput("TENSOR", list(array.shape), "FP32").set_data_from_numpy(array)

    def request_bytes(self, array: Array) -> int:
        message = service_pb2.ModelInferRequest(model_name="identity", raw_input_contents=[array.tobytes()])
        message.inputs.add(name="TENSOR", datatype="FP32", shape=array.shape)
        return int(message.ByteSize())

    def there_and_back(self, array: Array) -> Array:
        return np.asarray(self.client.infer("identity", [self.input(array)]).as_numpy("TENSOR"))

    def close(self) -> None:
        self.client.close()


class GrpcTyped(Encoding):
    """gRPC with `fp32_contents`, a list of numbers: what one writes first, with nothing but the proto at hand.

    Triton and KServe answer in raw bytes wherever they can, so this is typed on the way there only.
    """

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        limits = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
        self.channel = grpc.insecure_channel(server.grpc, options=limits)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def request(self, array: Array) -> service_pb2.ModelInferRequest:
        message = service_pb2.ModelInferRequest(model_name="identity")
        message.inputs.add(name="TENSOR", datatype="FP32", shape=array.shape).contents.fp32_contents.extend(array)
        return message

    def request_bytes(self, array: Array) -> int:
        return int(self.request(array).ByteSize())

    def there_and_back(self, array: Array) -> Array:
        response = self.stub.ModelInfer(self.request(array), timeout=120)
        if response.raw_output_contents:
            return np.frombuffer(response.raw_output_contents[0], dtype=np.float32)
        return np.array(response.outputs[0].contents.fp32_contents, dtype=np.float32)

    def close(self) -> None:
        self.channel.close()


class SharedMemory(Encoding):
    """Triton's extension for a client on the same machine: gRPC carries only the name of a shared memory region."""

    size = max(SIZES)

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.regions, self.names = {}, {}
        with ExitStack() as held:  # memory that nobody gives back stays until the machine is started anew
            self.client = v2_grpc.InferenceServerClient(server.grpc)
            held.callback(self.client.close)
            for way in ("in", "out"):
                name = self.names[way] = f"servebook-{way}-{uuid.uuid4().hex[:8]}"
                self.regions[way] = shared_memory.create_shared_memory_region(name, f"/{name}", self.size)
                held.callback(shared_memory.destroy_shared_memory_region, self.regions[way])
                self.client.register_system_shared_memory(name, f"/{name}", self.size)
                held.callback(self.take_back, name)
            self.held = held.pop_all()

    def request_bytes(self, array: Array) -> int:
        message = service_pb2.ModelInferRequest(model_name="identity")
        parameters = message.inputs.add(name="TENSOR", datatype="FP32", shape=array.shape).parameters
        parameters["shared_memory_region"].string_param = self.names["in"]
        parameters["shared_memory_byte_size"].int64_param = array.nbytes
        return int(message.ByteSize())

    def there_and_back(self, array: Array) -> Array:
        shared_memory.set_shared_memory_region(self.regions["in"], [array])
        sent = v2_grpc.InferInput("TENSOR", list(array.shape), "FP32")
        sent.set_shared_memory(self.names["in"], array.nbytes)
        wanted = v2_grpc.InferRequestedOutput("TENSOR")
        wanted.set_shared_memory(self.names["out"], array.nbytes)
        self.client.infer("identity", [sent], outputs=[wanted])
        return np.array(shared_memory.get_contents_as_numpy(self.regions["out"], np.float32, array.shape))

    def close(self) -> None:
        self.held.close()

    def take_back(self, name: str) -> None:
        """Wait until Triton has let the region go: it is done with it a moment after its answer.

        Raises:
            BenchError: it does not.
        """
        if not wait_until(partial(self.let_go, name), LET_GO_SECONDS):
            raise BenchError(f"Triton does not let go of {name}.", "See `servebook logs triton`.")

    def let_go(self, name: str) -> bool:
        """Take the region back from Triton, unless a request is still in it."""
        try:
            self.client.unregister_system_shared_memory(name)
        except InferenceServerException as error:
            if "currently in use" in str(error):
                return False
            raise
        return True


ENCODINGS: dict[str, Callable[[Server], Encoding]] = {
    "JSON list": Http,
    "JSON base64": Base64,
    "HTTP binary": HttpBinary,
    "gRPC typed": GrpcTyped,
    "gRPC raw": GrpcRaw,
    "shared memory": SharedMemory,
}

SERVERS = {"triton": tuple(ENCODINGS), "kserve": tuple(name for name in ENCODINGS if name != "shared memory")}
"""The encodings of each server: shared memory is an extension that KServe does not have."""


@contextmanager
def opened(server: Server, names: Sequence[str]) -> Iterator[dict[str, Encoding]]:
    """The encodings called `names`, connected to `server`."""
    with ExitStack() as stack:
        made = {}
        for name in names:
            made[name] = ENCODINGS[name](server)
            stack.callback(made[name].close)
        yield made


def tensor_costs(name: str, settings: Settings, sizes: Sequence[int] = SIZES) -> Iterator[TensorCost]:
    """Measure each encoding of server `name` ("triton" or "kserve") at each size, smallest first.

    Raises:
        BenchError: what came back is not what was sent.
        LaunchError: the server cannot start.
    """
    server = identity_server(name, settings)
    try:
        with opened(server, SERVERS[name]) as encodings:
            for label, encoding in encodings.items():
                for size in sorted(sizes):
                    cost = measure(name, label, encoding, size)
                    yield cost
                    if cost.median_ms > GIVE_UP_SECONDS * 1e3:
                        break
    finally:
        server.stop()


def measure(server: str, label: str, encoding: Encoding, size: int) -> TensorCost:
    """Send a random tensor of `size` bytes there and back until enough time was spent; the first time does not count.

    Raises:
        BenchError: what came back is not what was sent.
    """
    array = np.random.default_rng(size).standard_normal(size // 4, dtype=np.float32)
    if not np.array_equal(encoding.there_and_back(array), array):
        raise BenchError(f"{label} on {server} does not bring back what was sent.", "See the server's log.")
    times: list[float] = []
    while not times or (sum(times) < SECONDS_PER_CELL and len(times) < 200):
        started = perf_counter()
        encoding.there_and_back(array)
        times.append(perf_counter() - started)
    return TensorCost(
        server=server,
        encoding=label,
        tensor_bytes=size,
        request_bytes=encoding.request_bytes(array),
        median_ms=statistics.median(times) * 1e3,
        repeats=len(times),
    )
