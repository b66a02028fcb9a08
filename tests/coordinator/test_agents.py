"""Orders reach agents whole, and every order gets its answer, whatever becomes of the agent."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest
from grpc import aio

from coordinator.agents import DEADLINES_S, Agents
from coordinator.core.cluster import Size
from coordinator.core.events import GiveOrder
from coordinator.core.orders import (
    AnyOrder,
    CloneSnapshot,
    Done,
    Dropped,
    DropSnapshot,
    Exported,
    OpenEpoch,
    PrepareSend,
    Receive,
    Source,
    StopTransfer,
    Taken,
    TakenTogether,
    TakeSnapshot,
    TakeSnapshots,
)
from resilver.address import Address
from resilver.errors import Exhausted, Invalid, Refused, ResilverError, Superseded, Unavailable
from resilver.lineage import ConsistencyPoint, Snapshot
from resilver.rpc import bind, make_channel, make_server
from resilver.v1 import agent_pb2, agent_pb2_grpc
from resilver.volume import Order, Progress, ResyncState, VolumeRecord
from resilver.wire import order_from_proto, progress_to_proto, record_from_proto, snapshot_to_proto

ORDER = Order("demo", "st1", 12, "lead1", "vm1", "vid1", 3, "eid3", "s41")
RECORD = VolumeRecord("vm1", "vid1", 3, "eid3", "a", ("a", "b"), ConsistencyPoint(3, 41), "s41")
TAKEN = Snapshot("s42", ConsistencyPoint(3, 42), "s41", epoch_id="eid3", create_time_ms=5000, size_bytes=1 << 30)
PROGRESS = Progress("r1", "vm1", ResyncState.PREPARING, total_bytes=100)


SIZES = {
    "s42": agent_pb2.PrepareSendResponse(delta_bytes=100, range_count=3, capacity_bytes=1 << 30),
    # A file system that sends its own stream: about how long it will be, or nothing.
    "stream": agent_pb2.PrepareSendResponse(delta_bytes=100),
    "silent": agent_pb2.PrepareSendResponse(),
    "same": agent_pb2.PrepareSendResponse(delta_bytes=0),
}


class Agent(agent_pb2_grpc.AgentServicer):
    """An agent that keeps what it was told and answers the same each time."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.raises: Exception | None = None
        self.hangs = False
        self.hanging = asyncio.Semaphore(0)
        self.go_on = asyncio.Event()
        self.answer: object = None

    async def _obey(self, request, answer):
        self.told.append(request)
        if self.raises is not None:
            raise self.raises
        if self.hangs:
            self.hanging.release()
            await self.go_on.wait()
        return self.answer if self.answer is not None else answer

    async def OpenEpoch(self, request, context):  # noqa: N802 - the protocol's name
        return await self._obey(request, agent_pb2.OpenEpochResponse())

    async def TakeSnapshot(self, request, context):  # noqa: N802 - as above
        return await self._obey(request, agent_pb2.TakeSnapshotResponse(snapshot=snapshot_to_proto(TAKEN), taken=True))

    async def TakeSnapshots(self, request, context):  # noqa: N802 - as above
        one = agent_pb2.TakeSnapshotResponse(snapshot=snapshot_to_proto(TAKEN), taken=True)
        return await self._obey(request, agent_pb2.TakeSnapshotsResponse(snapshots=[one] * len(request.requests)))

    async def PrepareSend(self, request, context):  # noqa: N802 - as above
        return await self._obey(request, SIZES[request.target])

    async def Receive(self, request, context):  # noqa: N802 - as above
        return await self._obey(request, agent_pb2.ReceiveResponse(progress=progress_to_proto(PROGRESS)))

    async def StopTransfer(self, request, context):  # noqa: N802 - as above
        return await self._obey(request, agent_pb2.StopTransferResponse())

    async def DropSnapshot(self, request, context):  # noqa: N802 - as above
        return await self._obey(request, agent_pb2.DropSnapshotResponse(freed_bytes=4096))

    async def CloneSnapshot(self, request, context):  # noqa: N802 - as above
        return await self._obey(request, agent_pb2.CloneSnapshotResponse(path="/srv/x", size_bytes=1 << 30))

    async def GetAgent(self, request, context):  # noqa: N802 - as above
        return agent_pb2.GetAgentResponse()

    async def ExamineReplica(self, request, context):  # noqa: N802 - as above
        return agent_pb2.ExamineReplicaResponse()


@contextlib.asynccontextmanager
async def served():
    """An agent, its address, and the orders' way to it."""
    agent = Agent()
    server = make_server()
    agent_pb2_grpc.add_AgentServicer_to_server(agent, server)
    port = bind(server, Address("127.0.0.1", 0))
    await server.start()
    agents = Agents(make_channel, clock=asyncio.get_running_loop().time)
    try:
        yield agent, f"127.0.0.1:{port}", agents
    finally:
        await agents.close()
        await server.stop(None)


@pytest.mark.parametrize(
    ("order", "answer"),
    [
        (OpenEpoch(ORDER, RECORD, grant=True), Done()),
        (TakeSnapshot(ORDER, "req1", only_if_modified=True, opening=True, note="n"), Taken(TAKEN, taken=True)),
        (PrepareSend(ORDER, "r1", "s41", "s42", "c", "t1"), Size(100, 3, 1 << 30)),
        (PrepareSend(ORDER, "r1", "s41", "stream", "c", "t1"), Size(100, None, 0)),
        (PrepareSend(ORDER, "r1", "s41", "silent", "c", "t1"), Size(None, None, 0)),
        (PrepareSend(ORDER, "r1", "s41", "same", "c", "t1"), Size(0, 0, 0)),
        (Receive(ORDER, "r1", "s41", "s42", "t1", (Source("a", "h:1", "h:2"),), replace_own_data=True), PROGRESS),
        (StopTransfer(ORDER, "r1", discard_stage=True), Done()),
        (DropSnapshot(ORDER, "s40"), Dropped(4096)),
        (CloneSnapshot(ORDER, "s40", "/srv/x", writable=True), Exported("/srv/x", 1 << 30)),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_each_order_travels_whole_and_is_answered(order: AnyOrder, answer):
    async with served() as (agent, address, agents):
        answered = await agents.carry(GiveOrder("o1", "a", address, order))
    assert (answered.order_id, answered.answer) == ("o1", answer)
    (told,) = agent.told
    assert order_from_proto(told.header) == ORDER
    match order:
        case OpenEpoch():
            assert (record_from_proto(told.record), told.grant) == (RECORD, True)
        case TakeSnapshot():
            assert (told.request_id, told.only_if_modified, told.opening, told.note) == ("req1", True, True, "n")
        case PrepareSend():
            assert (told.resync_id, told.base, told.target, told.target_node, told.ticket, told.size_only) == (
                ("r1", "s41", order.target, "c", "t1", False)
            )
            assert told.ticket_lifetime_seconds > 0
        case Receive():
            assert (told.resync_id, told.base, told.target, told.ticket) == ("r1", "s41", "s42", "t1")
            assert (told.replace_own_data, told.replace_unrelated) == (True, False)
            assert [(one.node, one.address, one.stream_address) for one in told.sources] == [("a", "h:1", "h:2")]
        case StopTransfer():
            assert (told.resync_id, told.discard_stage) == ("r1", True)
        case DropSnapshot():
            assert told.id == "s40"
        case CloneSnapshot():
            assert (told.id, told.path, told.writable) == ("s40", "/srv/x", True)


async def test_an_order_for_several_volumes_is_one_call():
    orders = tuple(
        TakeSnapshot(replace(ORDER, volume=volume), f"req-{volume}", only_if_modified=True) for volume in ("vm1", "vm2")
    )
    async with served() as (agent, address, agents):
        given = GiveOrder("o1", "a", address, TakeSnapshots(orders, "g1"))
        answered = (await agents.carry(given)).answer
        agent.answer = agent_pb2.TakeSnapshotsResponse()
        short = (await agents.carry(given)).answer
    assert answered == TakenTogether((Taken(TAKEN, taken=True),) * 2)
    told = agent.told[0]
    assert told.group_id == "g1"
    assert [(order_from_proto(one.header), one.request_id, one.only_if_modified) for one in told.requests] == [
        (one.order, one.request_id, True) for one in orders
    ]
    assert isinstance(short, Invalid), "an answer for none of them"


def test_every_kind_of_order_has_a_deadline():
    assert set(DEADLINES_S) == set(AnyOrder.__args__)


@pytest.mark.parametrize(
    "error",
    [Refused("TARGET_CHANGED", "another tip", tip="s43"), Superseded("STALE_TERM", "term 13 was obeyed", term="13")],
)
async def test_what_an_agent_raises_is_the_answer(error):
    async with served() as (agent, address, agents):
        agent.raises = error
        answer = (await agents.carry(GiveOrder("o1", "a", address, DropSnapshot(ORDER, "s40")))).answer
    assert (type(answer), answer.reason, answer.message, answer.metadata) == (
        (type(error), error.reason, error.message, error.metadata)
    )


async def test_an_answer_that_makes_no_sense_is_an_error():
    async with served() as (agent, address, agents):
        agent.answer = agent_pb2.TakeSnapshotResponse(taken=True)
        answer = (await agents.carry(GiveOrder("o1", "a", address, TakeSnapshot(ORDER, "req1")))).answer
    assert isinstance(answer, Invalid)


async def test_nobody_there_is_unreachable():
    async with served() as (_, _, agents):
        for address in ("127.0.0.1:1", ""):
            answer = (await agents.carry(GiveOrder("o1", "a", address, DropSnapshot(ORDER, "s40")))).answer
            assert isinstance(answer, Unavailable)
            assert answer.reason == "NODE_UNREACHABLE"
            assert "node a" in answer.message


async def test_an_agent_that_does_not_answer_is_unreachable(monkeypatch):
    monkeypatch.setitem(DEADLINES_S, DropSnapshot, 0.2)
    async with served() as (agent, address, agents):
        agent.hangs = True
        answer = (await agents.carry(GiveOrder("o1", "a", address, DropSnapshot(ORDER, "s40")))).answer
    assert answer.reason == "NODE_UNREACHABLE"
    assert "0.2 s" in answer.message


class Dialled:
    """Makes real channels, and remembers which are open."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.count = 0

    def __call__(self, address: str, node: str) -> aio.Channel:
        channel = make_channel(address)
        self.open.append(address)
        self.count += 1
        close = channel.close

        async def closing(grace=None):
            self.open.remove(address)
            await close(grace)

        channel.close = closing
        return channel


async def give(agents, address):
    return (await agents.carry(GiveOrder("o1", "a", address, DropSnapshot(ORDER, "s40")))).answer


async def test_one_channel_for_an_address_and_idle_ones_are_closed():
    now = 0.0
    dial = Dialled()
    agents = Agents(dial, clock=lambda: now, idle_s=60.0)
    await give(agents, "127.0.0.1:1")
    await give(agents, "127.0.0.1:1")
    assert dial.count == 1
    now = 61.0
    await give(agents, "127.0.0.1:2")
    assert dial.open == ["127.0.0.1:2"]
    await agents.close()
    assert dial.open == []


async def test_new_certificate_files_make_new_channels_and_cut_no_call():
    number = 1
    async with served() as (agent, address, _agents):
        dial = Dialled()
        agents = Agents(dial, clock=lambda: 0.0, number=lambda: number)
        await give(agents, address)
        agent.hangs = True
        waiting = asyncio.create_task(give(agents, address))
        await asyncio.wait_for(agent.hanging.acquire(), 20)
        agent.hangs, number = False, 2
        assert not isinstance(await give(agents, address), ResilverError)
        assert (dial.count, len(dial.open)) == (2, 2)
        agent.go_on.set()
        assert not isinstance(await waiting, ResilverError)
        assert (dial.count, len(dial.open)) == (2, 1)
        await agents.close()


async def test_the_number_of_channels_is_bounded():
    dial = Dialled()
    async with served() as (agent, address, _):
        agents = Agents(dial, clock=lambda: 0.0, channels_max=2)
        for port in (1, 2, 3):
            await give(agents, f"127.0.0.1:{port}")
        assert dial.open == ["127.0.0.1:2", "127.0.0.1:3"]
        agent.hangs = True
        busy = [asyncio.create_task(give(agents, where)) for where in (address, f"localhost:{address[10:]}")]
        for _ in busy:
            await agent.hanging.acquire()
        assert isinstance(await give(agents, "127.0.0.1:4"), Exhausted)
        for task in busy:
            task.cancel()
        await asyncio.wait(busy)
        await agents.close()
