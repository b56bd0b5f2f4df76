"""How a call is refused: a gRPC status code for programs, a message for people, `google.rpc` details for both."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from servebook.ways.limits import GIVEN_UP
from servebook.ways.refusals import cut, reason

DOMAIN = "servebook"
RETRY_SECONDS = 1


class Refusal(Exception):
    """An expected end of a call: the status that the client gets.

    Attributes:
        code: what a program decides by.
        details: `google.rpc` messages; they travel in the trailer `grpc-status-details-bin`.
    """

    def __init__(self, code: grpc.StatusCode, message: str, *details: Message) -> None:
        super().__init__(message)
        self.code = code
        self.details = details

    def trailer(self) -> tuple[str, bytes]:
        """The trailer that carries the details; `grpc_status.rpc_status.from_call` reads it."""
        packed = [any_pb2.Any() for _ in self.details]
        for box, detail in zip(packed, self.details, strict=True):
            box.Pack(detail)
        status = status_pb2.Status(code=self.code.value[0], message=str(self), details=packed)
        return "grpc-status-details-bin", status.SerializeToString()


def invalid(field: str, problem: str) -> Refusal:
    """INVALID_ARGUMENT: the request's `field` (a path such as `sampling.top_p`) has to change."""
    problem = cut(problem)
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=problem)
    return Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{field}: {problem}",
        error_details_pb2.BadRequest(field_violations=[violation]),
    )


def queue_full(limit: int) -> Refusal:
    """RESOURCE_EXHAUSTED: `limit` calls are in the server already; the same request may succeed later."""
    return busy(f"The server is busy with {limit} calls, its limit")


def busy(why: str) -> Refusal:
    """RESOURCE_EXHAUSTED, with the time after which to try again."""
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromSeconds(RETRY_SECONDS)
    return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{why}; try again in {RETRY_SECONDS} s.", retry)


def unavailable(reason: str, message: str) -> Refusal:
    """UNAVAILABLE: no engine behind this server, for a `reason` in UPPER_SNAKE_CASE; another server may have one."""
    return Refusal(grpc.StatusCode.UNAVAILABLE, message, error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))


def engine_dead() -> Refusal:
    """UNAVAILABLE for every call from the moment that the engine has died."""
    return unavailable("ENGINE_DEAD", "The engine of this server has died; the server has to be restarted.")


def no_text(constraint: str) -> Refusal:
    """The engine could not end the text: no token fits the `constraint`, or it gave the request up by itself."""
    if constraint:
        return invalid(constraint, GIVEN_UP)
    return unavailable("ENGINE_ABORTED", "The engine gave this request up.")


def refusal_for(error: Exception, call_id: str, constraint: str) -> Refusal:
    """What the client gets for any error of a call; INTERNAL where it is nobody's expected one.

    `constraint` is the request's field that says which form the text must have.
    """
    if isinstance(error, Refusal):
        return error
    # Not before this point: while the engine starts, another thread imports vLLM and whoever wants it has to wait.
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    match error:
        case EngineDeadError():
            return engine_dead()
        case VLLMClientError():  # what is left for the engine to check: whether the regex, schema or choice compiles
            return invalid(constraint or "sampling", reason(error))
        case GracefulHTTPError():  # vLLM's own limits (--max-num-queued-reqs), whatever they are
            return busy("The engine's queue is full")
        case _:
            return Refusal(grpc.StatusCode.INTERNAL, f"The server failed; its log has the cause under {call_id}.")
