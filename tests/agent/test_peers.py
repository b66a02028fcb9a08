"""What a target asks of a source has an end, whatever the source does."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from agent import peers
from agent.peers import Peers, Source, Wanted
from resilver.errors import Unavailable
from resilver.rpc import make_server
from resilver.v1 import agent_pb2, agent_pb2_grpc


class Trickling(agent_pb2_grpc.PeerServicer):
    """A source that tells a delta for ever, and nothing in it."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def StreamDelta(self, _request, _context):  # noqa: N802 - the name in the proto
        try:
            while True:
                yield agent_pb2.StreamDeltaResponse()
                await asyncio.sleep(0.01)  # it is slow, not silent
        finally:
            self.ended.set()


@contextlib.asynccontextmanager
async def served(servicer):
    server = make_server()
    agent_pb2_grpc.add_PeerServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Source("a", f"127.0.0.1:{port}", "127.0.0.1:1")
    finally:
        await server.stop(0)


async def test_a_source_that_tells_a_delta_for_ever_is_left(monkeypatch):
    monkeypatch.setattr(peers, "FETCH_MAX_S", 1.0)
    trickling = Trickling()
    async with served(trickling) as source:
        asking = Peers(asyncio.get_running_loop())
        wanted = Wanted("r1", "secret", "vm1", "", "s1", "b")
        with pytest.raises(Unavailable) as left:
            await asyncio.to_thread(asking.fetch, source, wanted, threading.Event())
        assert left.value.reason == "DEADLINE"
        assert "node a was not done" in left.value.message
        async with asyncio.timeout(30):
            await trickling.ended.wait()
