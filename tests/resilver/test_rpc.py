"""Servers and channels over real sockets: errors travel whole, hung peers are noticed, anybody can look inside."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time

import grpc
import pytest
from google.protobuf import descriptor_database, descriptor_pb2, descriptor_pool, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from structlog.testing import capture_logs

from resilver import rpc
from resilver.config import Address
from resilver.errors import CLASSES, Invalid, NotFound, Refused, ResilverError, Superseded, Unavailable
from resilver.v1 import coordinator_pb2

LOOPBACK = Address("127.0.0.1", 0)
SERVICE = "resilver.test.Probe"
COORDINATOR = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"].full_name


def encode(text: str | bytes) -> bytes:
    """gRPC encodes a text by itself before it calls the serializer."""
    return text if isinstance(text, bytes) else text.encode()


TEXT = {"request_deserializer": bytes.decode, "response_serializer": encode}


class Probe:
    """A service of four shapes that raises whatever it is given."""

    def __init__(self):
        self.raises: BaseException | None = None
        self.closed = asyncio.Event()
        self.started = asyncio.Event()

    async def once(self, request, context):
        self.started.set()
        if self.raises is not None:
            raise self.raises
        if request == "hang":
            await asyncio.Event().wait()
        if request == "abort":
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "by hand")
        return "x" * int(request[4:]) if request.startswith("size") else request

    async def collect(self, requests, _context):
        return "+".join([request async for request in requests])

    async def many(self, request, _context):
        try:
            for part in request.split(","):
                if part == "raise":
                    raise self.raises
                if part == "hang":
                    self.started.set()
                    await asyncio.Event().wait()
                yield part
        finally:
            self.closed.set()

    async def written(self, request, context):
        for part in request.split(","):
            if part == "raise":
                raise self.raises
            await context.write(part)

    async def both(self, requests, _context):
        async for request in requests:
            if request == "raise":
                raise self.raises
            yield request

    def handler(self):
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Once": grpc.unary_unary_rpc_method_handler(self.once, **TEXT),
                "Collect": grpc.stream_unary_rpc_method_handler(self.collect, **TEXT),
                "Many": grpc.unary_stream_rpc_method_handler(self.many, **TEXT),
                "Written": grpc.unary_stream_rpc_method_handler(self.written, **TEXT),
                "Both": grpc.stream_stream_rpc_method_handler(self.both, **TEXT),
            },
        )


class Client:
    def __init__(self, channel):
        text = {"request_serializer": encode, "response_deserializer": bytes.decode}
        self.once = channel.unary_unary(f"/{SERVICE}/Once", **text)
        self.collect = channel.stream_unary(f"/{SERVICE}/Collect", **text)
        self.many = channel.unary_stream(f"/{SERVICE}/Many", **text)
        self.written = channel.unary_stream(f"/{SERVICE}/Written", **text)
        self.both = channel.stream_stream(f"/{SERVICE}/Both", **text)
        self.none = channel.unary_unary(f"/{SERVICE}/None", **text)


@pytest.fixture
async def probe():
    return Probe()


@pytest.fixture
async def port(probe):
    server = rpc.make_server()
    server.add_generic_rpc_handlers((probe.handler(),))
    servicer = await rpc.add_health_and_reflection(server, [COORDINATOR], serving=False)
    port = rpc.bind(server, LOOPBACK)
    await server.start()
    yield port
    await rpc.stop(server, servicer, 0)


@pytest.fixture
async def channel(port):
    async with rpc.make_channel(f"127.0.0.1:{port}") as channel:
        yield channel


@pytest.fixture
def client(channel):
    return Client(channel)


async def error_of(call) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return caught.value


async def read(call) -> list[str]:
    return [item async for item in call]


@pytest.mark.parametrize("cls", CLASSES)
async def test_an_error_of_each_class_arrives_as_it_was_raised(probe, client, cls):
    reason = min(cls.reasons)
    probe.raises = cls(reason, "so it is: é", next_command="resilver plan vm1", volume="vm1", node="b", field="f")
    error = await error_of(client.once("x"))
    assert error.code().name == cls.status
    back = rpc.to_error(error)
    assert type(back) is cls
    assert (back.reason, back.message, back.next_command) == (reason, "so it is: é", "resilver plan vm1")
    assert back.metadata == {"volume": "vm1", "node": "b", "field": "f"}


def details_of(error: aio.AioRpcError) -> dict[str, object]:
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    found = {}
    for detail in status.details:
        name = detail.TypeName().rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        assert detail.Unpack(found[name])
    return found


async def test_the_detail_that_fits_the_class(probe, client):
    probe.raises = Invalid("INVALID_FIELD", "wrong", field="volumes[0]")
    bad = details_of(await error_of(client.once("x")))["BadRequest"].field_violations[0]
    assert (bad.field, bad.description) == ("volumes[0]", "wrong")
    probe.raises = Refused("IN_USE", "by qemu", volume="vm1", node="b")
    violation = details_of(await error_of(client.once("x")))["PreconditionFailure"].violations[0]
    assert (violation.type, violation.subject, violation.description) == ("IN_USE", "vm1/b", "by qemu")
    probe.raises = NotFound("VOLUME_NOT_FOUND", "no vm9; did you mean vm1?", volume="vm9")
    resource = details_of(await error_of(client.once("x")))["ResourceInfo"]
    assert (resource.resource_type, resource.resource_name) == ("volume", "vm9")
    probe.raises = Unavailable("STORE_UNAVAILABLE", "etcd")
    found = details_of(await error_of(client.once("x")))
    assert found["RetryInfo"].retry_delay.seconds == 1
    assert found["ErrorInfo"].domain == "resilver"


async def test_errors_of_streams_come_after_what_was_sent(probe, client):
    probe.raises = Superseded("NOT_LEADER", "ask c2", leader_address="c2:7400")
    for method in (client.many, client.written):
        call = method("a,b,raise")
        assert [await call.read(), await call.read()] == ["a", "b"]
        error = rpc.to_error(await error_of(call.read()))
        assert (error.reason, error.metadata) == ("NOT_LEADER", {"leader_address": "c2:7400"})
        assert await read(method("a,b")) == ["a", "b"]
    both = client.both()
    await both.write("a")
    assert await both.read() == "a"
    await both.write("raise")
    assert rpc.to_error(await error_of(both.read())).reason == "NOT_LEADER"
    assert await client.collect(iter(["a", "b"])) == "a+b"


async def test_a_bug_is_logged_and_told_without_its_traceback(probe, client):
    probe.raises = ZeroDivisionError("secret detail")
    with capture_logs() as logs:
        error = await error_of(client.once("x"))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in error.details()
    assert "Traceback" not in error.details()
    (line,) = logs
    assert line["method"] == f"/{SERVICE}/Once"
    assert line["number"] in error.details()
    back = rpc.to_error(error)
    assert type(back) is ResilverError
    assert (back.reason, back.exit_code) == ("INTERNAL", 1)


async def test_what_the_servicer_aborts_itself_stays(client):
    error = await error_of(client.once("abort"))
    assert (error.code(), error.details()) == (grpc.StatusCode.ALREADY_EXISTS, "by hand")


async def test_a_call_without_a_deadline_gets_one(monkeypatch, client):
    monkeypatch.setattr(rpc, "CALL_TIMEOUT_MAX_S", 0.2)
    begun = time.monotonic()
    error = await error_of(client.once("hang"))
    assert time.monotonic() - begun < 30
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert isinstance(rpc.to_error(error), Unavailable)
    assert rpc.to_error(error).reason == "DEADLINE"
    assert await client.once("next") == "next"


async def test_a_callers_own_deadline_counts(client):
    error = rpc.to_error(await error_of(client.once("hang", timeout=0.2)))
    assert (error.reason, error.exit_code) == ("DEADLINE", 4)


async def test_a_timeout_inside_a_servicer_is_a_bug_and_no_deadline(probe, client):
    probe.raises = TimeoutError("inner")
    with capture_logs():
        assert (await error_of(client.once("x"))).code() is grpc.StatusCode.INTERNAL


async def test_a_caller_that_leaves_ends_the_stream_at_the_server(probe, client):
    call = client.many("a,hang")
    assert await call.read() == "a"
    await asyncio.wait_for(probe.started.wait(), 5)
    call.cancel()
    await asyncio.wait_for(probe.closed.wait(), 5)


async def test_the_size_of_messages_is_bounded(client):
    assert len(await client.once(f"size{rpc.MESSAGE_BYTES_MAX - 100}")) == rpc.MESSAGE_BYTES_MAX - 100
    error = rpc.to_error(await error_of(client.once("x" * (rpc.MESSAGE_BYTES_MAX + 100))))
    assert (error.reason, error.status) == ("TOO_LARGE", "RESOURCE_EXHAUSTED")


async def test_a_long_refusal_is_cut_and_not_dropped(probe, port):
    probe.raises = Refused("AMBIGUOUS", "ö" * 20_000, node="b", candidates="x" * 30_000)
    # A client with gRPC's own bounds, as others write them.
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        error = rpc.to_error(await error_of(Client(channel).once("x")))
    assert error.reason == "AMBIGUOUS"
    assert error.metadata == {"node": "b"}
    assert error.message.endswith("ö…")


async def test_metadata_of_a_newer_peer_cannot_break_the_reading(probe, client):
    class Newer(ResilverError):
        status = "ABORTED"

    probe.raises = Newer("BRAND_NEW", "new")
    probe.raises.metadata.update({"reason": "x", "message": "y", "self": "z", "next_command": "n", "ok": "1"})
    error = rpc.to_error(await error_of(client.once("x")))
    assert (error.reason, error.message, error.metadata) == ("BRAND_NEW", "new", {"ok": "1"})


async def test_nobody_there_and_unknown_calls(client):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with rpc.make_channel(Address("127.0.0.1", taken.getsockname()[1])) as channel:
            error = rpc.to_error(
                await error_of(Client(channel).once("x", timeout=5)), unreachable="NODE_UNREACHABLE", who="node b"
            )
    assert (error.reason, error.exit_code) == ("NODE_UNREACHABLE", 4)
    assert "node b cannot be reached" in error.message
    assert rpc.to_error(await error_of(client.none("x"))).reason == "NOT_SUPPORTED"


async def test_a_port_in_use_is_named(port):
    server = rpc.make_server()
    with pytest.raises(Invalid, match=f"cannot listen on 127.0.0.1:{port}: Address already in use") as caught:
        rpc.bind(server, Address("127.0.0.1", port), "stream_listen")
    assert rpc.taken(Address("127.0.0.1", port))
    assert caught.value.metadata["field"] == "stream_listen"
    assert not rpc.taken(Address("192.0.2.1", 7400))
    with pytest.raises(Invalid, match="choose an address that this machine has"):
        rpc.bind(server, Address("192.0.2.1", 7400))
    await server.stop(None)


async def test_health_says_who_serves(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse
    assert (await stub.Check(health_pb2.HealthCheckRequest())).status == serving.SERVING
    request = health_pb2.HealthCheckRequest(service=COORDINATOR)
    assert (await stub.Check(request)).status == serving.NOT_SERVING


async def test_a_watched_health_turns_at_a_graceful_stop():
    server = rpc.make_server()
    servicer = await rpc.add_health_and_reflection(server, [])
    port = rpc.bind(server, LOOPBACK)
    await server.start()
    async with rpc.make_channel(f"127.0.0.1:{port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(rpc.stop(server, servicer, 1))
        assert (await asyncio.wait_for(watch.read(), 5)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        await stopping


async def reflect(channel, version, request):
    call = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )()
    await call.write(request)
    answer = await call.read()
    await call.done_writing()
    assert await call.read() is aio.EOF
    return answer


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_a_client_that_knows_nothing_can_look_inside(channel, version):
    answer = await reflect(channel, version, reflection_pb2.ServerReflectionRequest(list_services=""))
    services = [service.name for service in answer.list_services_response.service]
    assert COORDINATOR in services
    assert "grpc.reflection.v1.ServerReflection" in services
    for symbol in (*services, "google.rpc.ErrorInfo", "google.rpc.RetryInfo"):
        answer = await reflect(channel, version, reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol))
        files = answer.file_descriptor_response.file_descriptor_proto
        assert files, symbol
        database = descriptor_database.DescriptorDatabase()
        for file in files:
            database.Add(descriptor_pb2.FileDescriptorProto.FromString(file))
        pool = descriptor_pool.DescriptorPool(database)
        if symbol in services:
            for method in pool.FindServiceByName(symbol).methods:
                message_factory.GetMessageClass(method.input_type)


HUNG_SERVER = """
import asyncio
from resilver import rpc
from resilver.config import Address
async def main():
    server = rpc.make_server()
    await rpc.add_health_and_reflection(server, [])
    print(rpc.bind(server, Address("127.0.0.1", 0)), flush=True)
    await server.start()
    await server.wait_for_termination()
asyncio.run(main())
"""


async def test_an_answer_that_takes_many_pings_is_waited_for(monkeypatch, port):
    faster = (("grpc.keepalive_time_ms", 1_100), ("grpc.keepalive_timeout_ms", 5_000))
    monkeypatch.setattr(rpc, "_CHANNEL", (*faster, *(row for row in rpc._CHANNEL if "keepalive_t" not in row[0])))
    async with rpc.make_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(aio.AioRpcError) as ended:
            await Client(channel).once("hang", timeout=8)
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_hung_peer_is_noticed_in_seconds():
    child = await asyncio.to_thread(
        subprocess.Popen, [sys.executable, "-c", HUNG_SERVER], stdout=subprocess.PIPE, text=True
    )
    try:
        port = int(await asyncio.to_thread(child.stdout.readline))
        async with rpc.make_channel(f"127.0.0.1:{port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            await watch.read()
            os.kill(child.pid, signal.SIGSTOP)
            begun = time.monotonic()
            error = rpc.to_error(await error_of(watch.read()), unreachable="NODE_UNREACHABLE", who="node b")
            assert error.reason == "NODE_UNREACHABLE"
            assert time.monotonic() - begun < 30
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
