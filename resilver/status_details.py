"""Errors as `google.rpc.Status`, and back.

What travels: the sentence, `ErrorInfo` (reason, domain `resilver`, metadata with `next_command`), and for some classes
one detail that a client of any language knows how to show. Everything is cut to fit the trailers of a call, where
gRPC drops what is larger than 8 KiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from resilver.errors import (
    Exhausted,
    Forbidden,
    Invalid,
    NotFound,
    Refused,
    ResilverError,
    Unauthenticated,
    Unavailable,
    error_for,
)

if TYPE_CHECKING:
    from grpc import aio

DOMAIN: Final = "resilver"
MESSAGE_BYTES_MAX: Final = 1_000
STATUS_BYTES_MAX: Final = 4_000
RETRY_DELAY_S: Final = 1

_DETAILS_KEY: Final = "grpc-status-details-bin"
_NEXT: Final = "next_command"
_NOT_METADATA: Final = frozenset({"self", "reason", "message", _NEXT})


class DeadlinePassed(Unavailable):
    """A call without a deadline took longer than the server allows."""

    status: ClassVar[str] = "DEADLINE_EXCEEDED"

    def __init__(self, bound_s: float) -> None:
        super().__init__("DEADLINE", f"no answer within the {bound_s:g} s that a call without a deadline has")


def to_status(error: ResilverError) -> grpc.Status:
    """The status to abort a call with."""
    message = _cut(error.message, MESSAGE_BYTES_MAX)
    metadata = dict(error.metadata)
    if error.next_command:
        metadata[_NEXT] = error.next_command
    code = grpc.StatusCode[error.status]
    while True:
        status = status_pb2.Status(code=code.value[0], message=message)
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
        detail = _detail(error, message)
        if detail is not None:
            status.details.add().Pack(detail)
        if status.ByteSize() <= STATUS_BYTES_MAX or not metadata:
            return rpc_status.to_status(status)
        # The longest goes first: names and codes are short, and what is long stands in the sentence too.
        del metadata[max(metadata, key=lambda key: len(metadata[key]))]


def to_error(error: aio.AioRpcError, *, unreachable: str = "NO_LEADER", who: str = "the coordinator") -> ResilverError:
    """The error that the server raised, or the nearest one to what gRPC itself says.

    `unreachable` is the reason for a peer that does not answer (NO_LEADER or NODE_UNREACHABLE), `who` its name.
    """
    rich = _rich(error.trailing_metadata())
    info = error_details_pb2.ErrorInfo()
    for detail in rich.details if rich is not None else ():
        if detail.Unpack(info) and info.domain == DOMAIN:
            metadata = {key: value for key, value in info.metadata.items() if key not in _NOT_METADATA}
            message = rich.message if rich is not None else ""
            return error_for(info.reason, message, next_command=info.metadata.get(_NEXT, ""), **metadata)
    said = error.details() or "no details"
    return _plain(error.code(), said, unreachable, who)


def _plain(code: grpc.StatusCode, said: str, unreachable: str, who: str) -> ResilverError:
    """What a status without our details means: gRPC's own, or a proxy's in between."""
    answers: Mapping[grpc.StatusCode, Callable[[], ResilverError]] = {
        grpc.StatusCode.UNAVAILABLE: lambda: Unavailable(unreachable, f"{who} cannot be reached: {said}"),
        grpc.StatusCode.CANCELLED: lambda: Unavailable(unreachable, f"{who} broke off the call: {said}"),
        grpc.StatusCode.DEADLINE_EXCEEDED: lambda: Unavailable("DEADLINE", f"{who} did not answer in time: {said}"),
        grpc.StatusCode.RESOURCE_EXHAUSTED: lambda: Exhausted("TOO_LARGE", f"{who} refused the size: {said}"),
        grpc.StatusCode.UNIMPLEMENTED: lambda: Refused(
            "NOT_SUPPORTED", f"{who} does not know this call; its version may be older, or it is no Resilver: {said}"
        ),
        grpc.StatusCode.INVALID_ARGUMENT: lambda: Invalid("INVALID_FIELD", said),
        grpc.StatusCode.UNAUTHENTICATED: lambda: Unauthenticated("NO_CERTIFICATE", said),
        grpc.StatusCode.PERMISSION_DENIED: lambda: Forbidden("ROLE_NOT_ALLOWED", said),
    }
    answer = answers.get(code)
    return answer() if answer is not None else ResilverError(code.name, f"{who} answered {code.name}: {said}")


def _detail(error: ResilverError, message: str) -> Any:
    """The detail that fits the class, a message of `google.rpc`, or None."""
    match error:
        case Invalid():
            bad = error_details_pb2.BadRequest()
            bad.field_violations.add(field=error.metadata.get("field", ""), description=message, reason=error.reason)
            return bad
        case Refused():
            failure = error_details_pb2.PreconditionFailure()
            failure.violations.add(type=error.reason, subject=_subject(error), description=message)
            return failure
        case NotFound():
            kind = error.reason.removesuffix("_NOT_FOUND").lower()
            resource = error_details_pb2.ResourceInfo(resource_type=kind, description=message)
            resource.resource_name = error.metadata.get(kind, "")
            return resource
        case Unavailable():
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.seconds = RETRY_DELAY_S
            return retry
    return None


def _subject(error: ResilverError) -> str:
    """`vm1/b`, or the half of it that is known."""
    return "/".join(error.metadata[key] for key in ("volume", "node") if error.metadata.get(key))


def _rich(trailers: Iterable[tuple[str, Any]] | None) -> status_pb2.Status | None:
    for key, value in trailers or ():
        if key == _DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _cut(text: str, bytes_max: int) -> str:
    data = text.encode()
    return text if len(data) <= bytes_max else data[: bytes_max - 3].decode(errors="ignore") + "…"
