"""What a coordinator bounds against the outside, each gone past: clients that say nothing, calls, watches, sizes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import grpc
import pytest
from grpc import aio

from coordinator.reign import WATCHES_MAX
from resilver import rpc
from resilver.rpc import make_channel
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import coordinator_pb2_grpc
from tests.coordinator.running import client

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WITHIN_S = 60.0


def test_whoever_connects_and_does_not_open_is_dropped(coordinator):
    """Who says nothing, half of what opens a connection, or no settings after it: all at once: each takes long."""
    host, _, port = coordinator.rpartition(":")
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection((host, int(port)), timeout=WITHIN_S)) for _ in range(60)]
        for at, one in enumerate(silent):
            one.sendall((b"", PREFACE[:10], PREFACE)[at % 3])
        for one in silent:
            with contextlib.suppress(ConnectionResetError):
                while one.recv(4096):
                    pass
    assert time.monotonic() - begun < rpc.HANDSHAKE_TIMEOUT_MS / 1000 + WITHIN_S


async def test_more_watches_than_are_served_are_told_so(coordinator):
    async with client(coordinator) as stub, contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(make_channel(coordinator)) for _ in range(2)]
        calls = []
        for at in range(WATCHES_MAX):
            watcher = coordinator_pb2_grpc.CoordinatorStub(channels[at % 2])
            calls.append(watcher.WatchEvents(api.WatchEventsRequest(), timeout=WITHIN_S))
        for at in range(0, len(calls), 100):
            await asyncio.gather(*(call.read() for call in calls[at : at + 100]))
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.WatchEvents(api.WatchEventsRequest(), timeout=WITHIN_S).read()
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(WATCHES_MAX) in caught.value.details()
        assert (await stub.GetCluster(api.GetClusterRequest())).cluster
        for call in calls:
            call.cancel()
        async with asyncio.timeout(WITHIN_S):
            while True:
                with contextlib.suppress(aio.AioRpcError):
                    await stub.WatchEvents(api.WatchEventsRequest(), timeout=WITHIN_S).read()
                    break


async def test_a_message_that_is_too_large_is_refused_and_the_next_one_served(coordinator):
    async with client(coordinator) as stub, aio.insecure_channel(coordinator) as open_ended:
        large = coordinator_pb2_grpc.CoordinatorStub(open_ended)
        with pytest.raises(aio.AioRpcError) as caught:
            await large.GetVolume(api.GetVolumeRequest(volume="x" * (rpc.RECEIVE_BYTES_MAX + 1)), timeout=WITHIN_S)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.GetCluster(api.GetClusterRequest())).cluster


async def test_metadata_that_is_too_large_is_refused(coordinator):
    async with client(coordinator) as stub:
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.GetCluster(api.GetClusterRequest(), metadata=(("x-much", "y" * (128 << 10)),), timeout=WITHIN_S)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.GetCluster(api.GetClusterRequest())).cluster
