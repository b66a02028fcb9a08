"""Channels and servers: limits, keepalive, deadlines, and errors that arrive as they were raised.

The rules:

* A `ResilverError` raised in a servicer reaches the caller whole: gRPC status by its class, `google.rpc.ErrorInfo`
  with reason and metadata, and the one detail that fits (`status_details.py`). Anything else is a bug of ours: it is
  logged here, and the caller gets INTERNAL with a number to look for in the log, never a traceback.
* A call that answers once and came without a deadline gets `CALL_TIMEOUT_MAX_S`. Streams live as long as both ends
  do, which keepalive watches: a hung peer is noticed in seven seconds.
* A message stays under 1 MiB. Receivers take twice that, so that the sender is the one to fail, at home.
* With credentials a port asks for a certificate and a channel shows one: who is reached is checked by the channel, in
  the handshake, and who calls by the server, in each call (`access.py`). Without, both are plaintext, and `config.py`
  keeps that to loopback or `insecure`.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from typing import Any, Final, TypeAlias

import grpc
import structlog
from google.protobuf import descriptor_pb2, descriptor_pool
from google.rpc import error_details_pb2  # noqa: F401 - imported so that reflection can show what errors carry
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from prometheus_client import Counter, Histogram

from resilver.access import Gate, Refused
from resilver.address import Address
from resilver.credentials import Credentials
from resilver.errors import Forbidden, Invalid, ResilverError, Unauthenticated
from resilver.status_details import DeadlinePassed, to_error, to_status

__all__ = [
    "CALL_TIMEOUT_MAX_S",
    "MESSAGE_BYTES_MAX",
    "add_health_and_reflection",
    "bind",
    "make_channel",
    "make_server",
    "stop",
    "to_error",
]

MESSAGE_BYTES_MAX: Final = 1 << 20
RECEIVE_BYTES_MAX: Final = 2 << 20
CALL_TIMEOUT_MAX_S: Final = 60.0
CONCURRENT_CALLS_MAX: Final = 4096
CONNECTION_CALLS_MAX: Final = 1024
HANDSHAKE_TIMEOUT_MS: Final = 10_000
NO_DEADLINE_S: Final = 365 * 24 * 3600.0
"""gRPC tells a call without a deadline by a time that is centuries away."""

_LIMITS: Final = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    # The details of an error travel in the trailers: twice gRPC's own bound, so that a long one is never dropped.
    ("grpc.max_metadata_size", 32 << 10),
    ("grpc.absolute_max_metadata_size", 64 << 10),
)
_KEEPALIVE: Final = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    # Without this one a hung peer is noticed after a minute, whatever the two above say.
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_SERVER: Final = (
    *_LIMITS,
    *_KEEPALIVE,
    # Else it takes the pings of a caller who waits long for an answer for abuse, and ends the connection.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    # Whoever connects and then says nothing, or half of what opens a connection, is dropped after this.
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
    # Of one connection; further calls wait at the caller. So no one of them takes all of CONCURRENT_CALLS_MAX.
    ("grpc.max_concurrent_streams", CONNECTION_CALLS_MAX),
    # gRPC would let a second process listen on the same port and take half of the calls.
    ("grpc.so_reuseport", 0),
)
# What was checked in the handshake (the time, the authority) is checked anew in a day at most: until then whoever has a
# connection keeps it. The longest call that is under way may end.
_SECURED: Final = (
    ("grpc.max_connection_age_ms", 24 * 3600 * 1000),
    ("grpc.max_connection_age_grace_ms", 900_000),
)
_CHANNEL: Final = (
    *_LIMITS,
    *_KEEPALIVE,
    # A cluster's own traffic never goes by way of the proxy that the environment may name.
    ("grpc.enable_http_proxy", 0),
    # Channels to one address would otherwise share one back-off, and a new one wait for an old one's failure.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
)

_HANDLED: Final = Counter(
    "grpc_server_handled", "Calls that ended, by code.", ("grpc_service", "grpc_method", "grpc_code")
)
_HANDLING: Final = Histogram(
    "grpc_server_handling_seconds", "How long calls that answer once took.", ("grpc_service", "grpc_method")
)

_log: Final = structlog.get_logger(__name__)

# As text: the stubs make them generic, the classes themselves are not.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "aio.ServicerContext[Any, Any]"


def make_channel(
    address: str | Address,
    node: str = "",
    *,
    tls: Credentials | None = None,
    interceptors: Sequence[aio.ClientInterceptor] = (),
) -> aio.Channel:
    """A channel that dials at its first call. Close it.

    With `tls`, whoever answers must be that node of the cluster, or, where none is named, a coordinator of it.
    """
    target = _dialled(str(address))
    if tls is None:
        return aio.insecure_channel(target, options=_CHANNEL, interceptors=interceptors)
    whom = tls.to_node(node) if node else tls.to_coordinator()
    options = (*_CHANNEL, ("grpc.ssl_target_name_override", whom))
    return aio.secure_channel(target, tls.channel(), options=options, interceptors=interceptors)


def make_server(
    *,
    tls: Credentials | None = None,
    refused: Refused | None = None,
    interceptors: Sequence[aio.ServerInterceptor] = (),
) -> aio.Server:
    """A server without a port, with the errors' interceptor outermost.

    With `tls` it asks each caller who it is, and tells `refused` of those that it does not let in.
    """
    errors = Errors(Gate(tls.name.cluster, refused) if tls is not None else None)
    return aio.server(
        interceptors=(errors, *interceptors),
        options=_SERVER if tls is None else (*_SERVER, *_SECURED),
        maximum_concurrent_rpcs=CONCURRENT_CALLS_MAX,
    )


def bind(server: aio.Server, address: Address, field: str = "listen", *, tls: Credentials | None = None) -> int:
    """Takes the port and answers its number; raises Invalid with the reason if it cannot be had."""
    target = str(Address(address.host or "::", address.port))
    why, port = _why_not(address), 0
    if not why:
        with suppress(RuntimeError):
            port = server.add_insecure_port(target) if tls is None else server.add_secure_port(target, tls.server())
        why = "it was taken for a moment; try again"
    if port == 0:
        raise Invalid("CONFIG_INVALID", f"{field}: cannot listen on {address}: {why}", field=field)
    return port


async def stop(server: aio.Server, servicer: health.aio.HealthServicer | None, grace_s: float) -> None:
    """Says NOT_SERVING first, refuses new calls, and gives the running ones `grace_s` to end."""
    if servicer is not None:
        await servicer.enter_graceful_shutdown()
    await server.stop(grace_s)


async def add_health_and_reflection(
    server: aio.Server, service_names: Iterable[str], *, serving: bool = True
) -> health.aio.HealthServicer:
    """Adds `grpc.health.v1.Health`, and reflection as v1 and v1alpha, before the server starts.

    Health for `""` is SERVING; for each named service it is what `serving` says. The servicer is returned so that the
    process can change that.
    """
    names = frozenset(service_names)
    servicer = health.aio.HealthServicer()
    state = health_pb2.HealthCheckResponse
    await servicer.set("", state.SERVING)
    for name in names:
        await servicer.set(name, state.SERVING if serving else state.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    _add_reflection(server, names)
    return servicer


class Errors(aio.ServerInterceptor):
    """Lets calls in, turns what a servicer raises into a status, bounds calls without a deadline, and counts."""

    def __init__(self, gate: Gate | None = None) -> None:
        self._gate: Final = gate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        # A method that nobody knows has no handler, and gRPC answers UNIMPLEMENTED by itself.
        return None if handler is None else _wrapped(handler, str(handler_call_details.method), self._gate)


def _wrapped(handler: Handler, method: str, gate: Gate | None) -> Handler:
    types = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    if handler.stream_stream is not None:
        return grpc.stream_stream_rpc_method_handler(_stream(handler.stream_stream, method, gate), **types)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream, method, gate), **types)
    if handler.stream_unary is not None:
        return grpc.stream_unary_rpc_method_handler(_once(handler.stream_unary, method, gate), **types)
    assert handler.unary_unary is not None, "a handler has one of the four shapes"
    return grpc.unary_unary_rpc_method_handler(_once(handler.unary_unary, method, gate), **types)


def _once(inner: Callable[..., Any], method: str, gate: Gate | None) -> Callable[..., Any]:
    """A handler that answers once, under a deadline."""

    async def answer(request: Any, context: Context) -> Any:
        remaining_s = context.time_remaining()
        bound_s = CALL_TIMEOUT_MAX_S if remaining_s is None or remaining_s > NO_DEADLINE_S else None
        begun = time.monotonic()
        try:
            if gate is not None:
                gate.admit(method, request, context)
            async with asyncio.timeout(bound_s) as bound:
                response = await inner(request, context)
        except TimeoutError as error:
            await _end(context, method, DeadlinePassed(CALL_TIMEOUT_MAX_S) if bound.expired() else error)
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the caller gets a status
            await _end(context, method, error)
        else:
            _count(method, "OK")
            return response
        finally:
            _HANDLING.labels(*_names(method)).observe(time.monotonic() - begun)

    return answer


def _stream(inner: Callable[..., Any], method: str, gate: Gate | None) -> Callable[..., Any]:
    """A handler that answers many times, written as a generator or with `context.write`."""

    async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            if gate is not None:
                gate.admit(method, request, context)
            async with aclosing(inner(request, context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:  # noqa: BLE001 - the edge, as above
            await _end(context, method, error)
        else:
            _count(method, "OK")

    async def write(request: Any, context: Context) -> None:
        try:
            if gate is not None:
                gate.admit(method, request, context)
            await inner(request, context)
        except Exception as error:  # noqa: BLE001 - the edge, as above
            await _end(context, method, error)
        else:
            _count(method, "OK")

    return generate if inspect.isasyncgenfunction(inner) else write


async def _end(context: Context, method: str, error: Exception) -> None:
    """Ends the call with the error's status; always raises."""
    if isinstance(error, aio.AbortError):
        _count(method, "ABORTED_BY_SERVICER")
        raise error
    if not isinstance(error, ResilverError):
        number = uuid.uuid4().hex[:8]
        _log.error("a call failed for an unforeseen reason", method=method, number=number, exc_info=error)
        error = ResilverError("INTERNAL", f"internal error; the server's log has it under number {number}")
    if isinstance(error, Unauthenticated | Forbidden) and not error.logged:
        _log.warning("refused", method=method, peer=context.peer(), reason=error.reason, why=error.message)
    status = to_status(error)
    _count(method, status.code.name)
    await context.abort_with_status(status)


def _count(method: str, code: str) -> None:
    _HANDLED.labels(*_names(method), code).inc()


def _names(method: str) -> tuple[str, str]:
    service, _, name = method.strip("/").rpartition("/")
    return service, name


def _dialled(target: str) -> str:
    return f"localhost{target}" if target.startswith(":") else target


def taken(address: Address) -> bool:
    """Whether something listens there already."""
    error = _refused(address)
    return error is not None and error.errno == errno.EADDRINUSE


def _why_not(address: Address) -> str:
    """What forbids listening there, empty if nothing does. gRPC would not pass it on, and write to stderr itself."""
    error = _refused(address)
    if error is None:
        return ""
    advice = {
        errno.EADDRINUSE: "stop what uses it, or choose another address",
        errno.EADDRNOTAVAIL: "choose an address that this machine has",
        errno.EACCES: "choose a port that this user may use",
    }
    return f"{error.strerror}; {advice.get(error.errno or 0, 'choose another address')}"


def _refused(address: Address) -> OSError | None:
    host = address.host or "::"
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen(1)
    except OSError as error:
        return error
    return None


def _add_reflection(server: aio.Server, names: frozenset[str]) -> None:
    second = "grpc.reflection.v1.ServerReflection"
    _describe_reflection_v1()
    servicer = reflection.aio.ReflectionServicer([*names, health.SERVICE_NAME, reflection.SERVICE_NAME, second])
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]  # generated
    # v1 has the messages of v1alpha under another package: byte for byte the same on the wire.
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(second, {"ServerReflectionInfo": method}),))


def _describe_reflection_v1() -> None:
    """Gives the pool a description of v1, which the package lacks, so that a client that asks for it gets one."""
    pool = descriptor_pool.Default()
    name = reflection_pb2.DESCRIPTOR.name.replace("v1alpha", "v1")
    try:
        pool.FindFileByName(name)
    except KeyError:
        pass
    else:
        return
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name = name
    file.package = "grpc.reflection.v1"
    for message in file.message_type:
        for field in message.field:
            # Set only where it was: an empty type name is not the same as none.
            if field.type_name:
                field.type_name = field.type_name.replace(".v1alpha.", ".v1.")
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(".v1alpha.", ".v1.")
        method.output_type = method.output_type.replace(".v1alpha.", ".v1.")
    pool.AddSerializedFile(file.SerializeToString())
