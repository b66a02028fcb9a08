"""Events outlive the leader that told them, on every store: a reader goes on where it was, and none is told twice."""

from __future__ import annotations

import asyncio
import contextlib
import time

import grpc
import pytest

from coordinator.agents import Agents
from coordinator.api import Coordinator
from coordinator.core import history
from coordinator.core.cluster import NodeView
from coordinator.core.context import Settings
from coordinator.core.events import AgentConnected
from coordinator.front import Front
from coordinator.reign import CurrentReign
from coordinator.store.base import Reign
from resilver.address import Address
from resilver.errors import Conflict
from resilver.rpc import bind, make_channel, make_server
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import coordinator_pb2_grpc
from tests.coordinator.running import WITHIN_S

EVENTS_MAX = 20


class Leading:
    """A reign at work on a store, and what answers for it."""

    def __init__(self, current: CurrentReign, front: Front, working: asyncio.Task[None], stub) -> None:
        self.current, self.front, self.working, self.stub = current, front, working, stub
        self.term = current.engine.identity.term

    async def happens(self, *nodes: str) -> None:
        """Something to tell of each: an agent of another cluster comes by. Returns when all of it was told."""
        for node in nodes:
            self.current.post(AgentConnected(f"{node}-{self.term}", NodeView(node), "another", "", 0))
        with self.current.watch() as watch:
            while nodes and nodes[-1] not in [event.node for event in self.current.events_after(0)]:
                async with asyncio.timeout(WITHIN_S):
                    await watch.next(WITHIN_S)

    async def listed(self) -> list[str]:
        return [one.node for one in (await self.stub.ListEvents(api.ListEventsRequest(page_size=1000))).events][::-1]


@contextlib.asynccontextmanager
async def leading(store, monkeypatch, *, resigns=True):
    monkeypatch.setattr(history, "EVENTS_MAX", EVENTS_MAX)
    reign = await store.campaign("c1", "127.0.0.1:1")
    assert isinstance(reign, Reign)
    agents = Agents(make_channel, clock=time.monotonic)
    current = CurrentReign(store, reign, agents, settings=Settings(), cluster="demo", store_id="s")
    await current.load()
    front = Front("demo", "c1", "127.0.0.1:1", True, "0.1.0", store)
    front.reign = current
    server = make_server()
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(Coordinator(front), server)
    port = bind(server, Address("127.0.0.1", 0))
    await server.start()
    working = asyncio.create_task(current.run(lambda: True))
    try:
        async with make_channel(f"127.0.0.1:{port}") as channel:
            yield Leading(current, front, working, coordinator_pb2_grpc.CoordinatorStub(channel))
    finally:
        working.cancel()
        await asyncio.wait([working])
        current.end(Conflict("LEADERSHIP_LOST", "the end"))
        await server.stop(None)
        await agents.close()
        if resigns:
            await store.resign(reign)


async def read(stream, count):
    """So many events of a stream, and the last cursor."""
    found = []
    async with asyncio.timeout(WITHIN_S):
        while len(found) < count:
            answer = await stream.read()
            found += answer.events
    stream.cancel()
    return found, answer.up_to_sequence


async def test_the_next_leader_tells_the_same_and_a_follower_goes_on(another, monkeypatch):
    store = await another()
    async with leading(store, monkeypatch) as first:
        await first.happens("n1", "n2", "n3")
        begun, seen = await read(first.stub.WatchEvents(api.WatchEventsRequest(from_oldest=True)), 3)
        assert seen == begun[-1].sequence
        await first.happens("n4")
    async with leading(store, monkeypatch) as second:
        assert await second.listed() == ["n1", "n2", "n3", "n4"]
        await second.happens("n4", "n5")  # it knows that n4 was told of
        onward, seen = await read(second.stub.WatchEvents(api.WatchEventsRequest(after_sequence=seen)), 2)
        followed = [*begun, *onward]
        assert [one.node for one in followed] == ["n1", "n2", "n3", "n4", "n5"] == await second.listed()
        assert [one.previous_sequence for one in followed] == [0, *(one.sequence for one in followed[:-1])]
        assert [one.sequence >> 32 for one in followed] == [first.term] * 4 + [second.term]
        answer = await second.stub.ListEvents(api.ListEventsRequest(page_size=1))
        assert answer.newest_sequence == seen == followed[-1].sequence


async def test_what_cannot_be_stored_is_shown_to_nobody(another, monkeypatch):
    store, other = await another(), await another()
    async with leading(store, monkeypatch, resigns=False) as deposed:
        await deposed.happens("n1")
        watch = deposed.stub.WatchEvents(api.WatchEventsRequest(from_oldest=True))
        assert [one.node for one in (await watch.read()).events] == ["n1"]
        await store.resign(deposed.current._reign)
        async with leading(other, monkeypatch) as present:
            deposed.current.post(AgentConnected("x", NodeView("n2"), "another", "", 0))
            await present.happens("n3")
            await asyncio.wait([deposed.working], timeout=WITHIN_S)
            assert isinstance(deposed.working.exception(), Conflict)
            assert await deposed.listed() == ["n1"]
            assert await present.listed() == ["n1", "n3"]


async def test_only_so_many_are_kept_and_a_reader_that_is_behind_is_told(another, monkeypatch):
    store = await another()
    names = [f"n{number}" for number in range(1, EVENTS_MAX + 8)]
    async with leading(store, monkeypatch) as first:
        await first.happens(*names)
        stored = [key for key in await store.read_all() if key.startswith("events/")]
        assert len(stored) == EVENTS_MAX
        numbers = [one.sequence for one in (await first.stub.ListEvents(api.ListEventsRequest())).events][::-1]
    async with leading(store, monkeypatch) as second:
        assert await second.listed() == names[-EVENTS_MAX:]
        kept, _ = await read(second.stub.WatchEvents(api.WatchEventsRequest(from_oldest=True)), EVENTS_MAX)
        assert [one.node for one in kept] == names[-EVENTS_MAX:]
        gone = kept[0].previous_sequence
        all_of_them, _ = await read(second.stub.WatchEvents(api.WatchEventsRequest(after_sequence=gone)), EVENTS_MAX)
        assert all_of_them == kept
        for lost, why in ((gone - 1, "no longer kept"), (numbers[-1] + 1, "put back to an older copy")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await second.stub.WatchEvents(api.WatchEventsRequest(after_sequence=lost)).read()
            assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
            assert why in caught.value.details()


async def test_a_reader_of_one_node_moves_on_with_what_happens_to_others(another, monkeypatch):
    store = await another()
    async with leading(store, monkeypatch) as first:
        await first.happens("n1")
        first.current.engine._context.nodes["n1"] = NodeView("n1")  # so that it may be named
        watch = first.stub.WatchEvents(api.WatchEventsRequest(node="n1"))
        begun = await watch.read()
        assert not begun.events, "from now on"
        await first.happens("n2")
        assert begun.up_to_sequence < first.front.events_span().newest
        monkeypatch.setattr("coordinator.watches.KEEPALIVE_S", 0.1)
        async with asyncio.timeout(WITHIN_S):
            while (await watch.read()).up_to_sequence < first.front.events_span().newest:
                pass
        watch.cancel()
