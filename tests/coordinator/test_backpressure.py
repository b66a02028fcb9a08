"""While the engine is behind, an agent waits, and its end is not lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time

from grpc import aio

from coordinator import reign as reign_module
from coordinator.agents import Agents
from coordinator.core.context import Settings
from coordinator.core.events import Ticked
from coordinator.front import Front
from coordinator.reign import CurrentReign
from coordinator.reports import Reports
from coordinator.store.base import Reign
from coordinator.store.sqlite import SqliteStore
from resilver.address import Address
from resilver.errors import Conflict, Exhausted
from resilver.rpc import bind, make_channel, make_server
from resilver.v1 import agent_pb2, agent_pb2_grpc
from tests.coordinator.running import WITHIN_S
from tests.coordinator.small_agent import SmallAgent, written

QUEUE_MAX = 50


@contextlib.asynccontextmanager
async def reigning(tmp_path, monkeypatch):
    """A reign with a short queue whose loop has not begun, and the address at which it hears agents."""
    monkeypatch.setattr(reign_module, "QUEUE_MAX", QUEUE_MAX)
    store = SqliteStore(tmp_path / "store.db", "test", 10.0)
    store_id = await store.open()
    reign = await store.campaign("c1", "127.0.0.1:1")
    assert isinstance(reign, Reign)
    agents = Agents(make_channel, clock=time.monotonic)
    current = CurrentReign(store, reign, agents, settings=Settings(), cluster="test", store_id=store_id)
    await current.load()
    front = Front("test", "c1", "127.0.0.1:1", True, "0.1.0", store)
    front.reign = current
    server = make_server()
    agent_pb2_grpc.add_ReportsServicer_to_server(Reports(front, node_timeout_s=WITHIN_S), server)
    port = bind(server, Address("127.0.0.1", 0))
    await server.start()
    try:
        yield current, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
        await agents.close()
        await store.close()


def fill(current: CurrentReign) -> None:
    with contextlib.suppress(Exhausted):
        for _ in range(QUEUE_MAX + 1):
            current.post(Ticked())


async def test_an_agent_that_left_while_the_engine_was_behind_is_known_to_have_left(tmp_path, monkeypatch):
    async with reigning(tmp_path, monkeypatch) as (current, address):
        agent = SmallAgent("a", {}, replicas={"vm1": written("vm1")})
        async with agent.running(address):
            fill(current)
        working = asyncio.create_task(current.run(lambda: True))
        async with asyncio.timeout(WITHIN_S):
            with current.watch() as watch:
                while "a" not in current.engine.nodes() or current.engine.nodes()["a"].connected:
                    await watch.next(0.1)
        working.cancel()
        assert agent.ended.is_set()


async def test_what_was_said_while_the_engine_was_behind_is_heard_later(tmp_path, monkeypatch):
    async with reigning(tmp_path, monkeypatch) as (current, address):
        agent = SmallAgent("a", {}, replicas={"vm1": written("vm1")})
        async with make_channel(address) as channel:
            stream = agent_pb2_grpc.ReportsStub(channel).Report()
            await stream.write(agent_pb2.ReportRequest(boot=agent.boot, seq=1, hello=hello(agent)))
            await stream.read()
            fill(current)
            await stream.write(agent_pb2.ReportRequest(boot=agent.boot, seq=2, heartbeat=agent_pb2.Heartbeat()))
            reading = asyncio.create_task(stream.read())
            done, _ = await asyncio.wait({reading}, timeout=0.5)
            assert not done, "nothing is acknowledged that was not taken"
            working = asyncio.create_task(current.run(lambda: True))
            async with asyncio.timeout(WITHIN_S):
                assert (await reading).acked_seq == 2
            working.cancel()
            stream.cancel()


def hello(agent: SmallAgent) -> agent_pb2.AgentHello:
    agent.port = 1
    return agent.hello()


async def test_a_stream_on_which_both_sides_fail_at_once_ends_without_a_trace(tmp_path, monkeypatch):
    """The reign ends while a message of the agent's is being taken: of the two errors one is told, none is logged."""
    forgotten: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: forgotten.append(context["message"]))
    ended = Conflict("LEADERSHIP_LOST", "the coordinator has stopped leading")
    async with reigning(tmp_path, monkeypatch) as (current, address):
        agent = SmallAgent("a", {}, replicas={"vm1": written("vm1")})
        async with make_channel(address) as channel:
            stream = agent_pb2_grpc.ReportsStub(channel).Report()
            await stream.write(agent_pb2.ReportRequest(boot=agent.boot, seq=1, hello=hello(agent)))
            await stream.read()

            def taking(_event: object) -> None:
                # As a post does once the reign has ended, in the very turn of the loop in which the outbox hears of it.
                current.end(ended)
                raise ended

            monkeypatch.setattr(current, "post", taking)
            await stream.write(agent_pb2.ReportRequest(boot=agent.boot, seq=2, heartbeat=agent_pb2.Heartbeat()))
            async with asyncio.timeout(WITHIN_S):
                assert (await stream.read()).WhichOneof("body") == "not_leader"
                assert await stream.read() is aio.EOF
    ended.with_traceback(None)  # its frames would keep what is to be collected
    gc.collect()
    assert not forgotten
