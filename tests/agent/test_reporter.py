"""What an agent says on its stream and what it makes of the answers: the test plays the coordinator, over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid

import pytest
import structlog

from agent.node import AgentNode
from resilver import wire_pages
from resilver.config import load_agent_config
from resilver.rpc import make_server
from resilver.v1 import agent_pb2, agent_pb2_grpc, volume_pb2
from tests.agent.agents import MIB, AgentProcess, Leader, scatter, write_image

DEADLINE_S = 20.0


class Stream:
    """One stream of an agent: what it said, and a way to answer."""

    def __init__(self):
        self.said = asyncio.Queue()
        self.answers = asyncio.Queue()
        self.ended = asyncio.Event()

    def answer(self, *, store="store-1", term=1, leader="leader-1", **fields):
        self.answers.put_nowait(
            agent_pb2.ReportResponse(acked_seq=1, term=term, leader_id=leader, store_id=store, **fields)
        )

    async def next(self, body=None, *, where=lambda _message: True):
        """The next message of that kind; others are passed over."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                message = await self.said.get()
                if body in {None, message.WhichOneof("body")} and where(message):
                    return message


class Coordinator(agent_pb2_grpc.ReportsServicer):
    """A port that agents report to; each stream is handed to the test as it is opened."""

    def __init__(self):
        self.streams = asyncio.Queue()

    async def Report(self, request_iterator, context):  # noqa: N802 - the method's name in the protocol
        stream = Stream()
        self.streams.put_nowait(stream)

        async def listen():
            async for message in request_iterator:
                stream.said.put_nowait(message)

        listening = asyncio.create_task(listen())
        try:
            while (answer := await stream.answers.get()) is not None:
                yield answer
        finally:
            listening.cancel()
            stream.ended.set()

    async def stream(self):
        async with asyncio.timeout(DEADLINE_S):
            return await self.streams.get()


@contextlib.asynccontextmanager
async def coordinator():
    """A coordinator and its port."""
    server = make_server()
    served = Coordinator()
    agent_pb2_grpc.add_ReportsServicer_to_server(served, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield served, port
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def running(agent):
    """The agent in this process, so that its looks can be made to follow each other quickly."""
    node = AgentNode(load_agent_config(agent.write_config()), look_s=0.3)
    try:
        await node.start()
        await asyncio.to_thread(agent.dial)
        yield agent
    finally:
        await node.close()
        agent.close()


@pytest.fixture
async def leader():
    async with coordinator() as made:
        yield made


@pytest.fixture
async def agent(leader, xfs, tmp_path):
    place = xfs / uuid.uuid4().hex
    place.mkdir()
    write_image(place / "vm1.img", 2 * MIB)
    async with running(AgentProcess("a", tmp_path, place, coordinator_port=leader[1])) as made:
        yield made


@pytest.fixture
async def stream(leader, agent):
    """The agent's first stream, with the hello taken and answered."""
    opened = await leader[0].stream()
    opened.hello = await opened.next()
    opened.answer()
    return opened


async def call(method, *args, **kwargs):
    return await asyncio.to_thread(method, *args, **kwargs)


async def test_hello_then_everything_then_heartbeats(agent, stream):
    hello = stream.hello
    assert hello.hello.node == "a"
    assert hello.hello.cluster == "test"
    assert hello.hello.store_id == ""
    assert list(hello.hello.volumes) == ["vm1"]
    assert hello.hello.address == f"127.0.0.1:{agent.port}"
    assert hello.hello.stream_address == f"127.0.0.1:{agent.stream_port}"
    page = await stream.next("replica")
    assert page.replica.last
    assert page.replica.replica.presence == volume_pb2.PRESENCE_PRESENT
    assert page.examine_id == ""
    first = await stream.next("heartbeat")
    second = await stream.next("heartbeat")
    assert hello.boot == page.boot == second.boot
    assert hello.seq < page.seq < second.seq
    assert first.seq < second.seq


async def test_an_examine_is_answered_by_its_id(agent, stream):
    await stream.next("replica")
    stream.answer(examine=agent_pb2.Examine(examine_id="x1", volumes=["vm1", "unknown"]))
    answer = await stream.next("replica", where=lambda message: message.examine_id == "x1")
    assert wire_pages.ReportAssembler().add(answer.replica).volume == "vm1"


async def examined(stream, examine_id, volumes):
    """Which messages answered, and of which volumes."""
    stream.answer(takes_pages=True, examine=agent_pb2.Examine(examine_id=examine_id, volumes=volumes))
    bodies, told = [], []
    while len(told) < len(volumes):
        message = await stream.next(where=lambda message: message.examine_id == examine_id)
        bodies.append(message.WhichOneof("body"))
        told += [page.replica.volume for page in (message.pages.pages or [message.replica])]
    return bodies, told


async def test_answers_to_one_examine_come_together_where_they_are_taken(leader, xfs, tmp_path):
    volumes = tuple(f"vm{number}" for number in range(1, 9))
    place = xfs / uuid.uuid4().hex
    place.mkdir()
    for volume in volumes:
        write_image(place / f"{volume}.img", 2 * MIB)
    async with running(AgentProcess("a", tmp_path, place, volumes, coordinator_port=leader[1])):
        opened = await leader[0].stream()
        await opened.next()
        opened.answer()  # as a coordinator that does not know of it
        bodies, told = await examined(opened, "x1", volumes)
        assert (set(bodies), sorted(told)) == ({"replica"}, [*volumes])
        opened.answers.put_nowait(None)
        opened = await leader[0].stream()
        await opened.next()
        opened.answer(takes_pages=True)
        async with asyncio.timeout(DEADLINE_S):
            for number in itertools.count(2):
                bodies, told = await examined(opened, f"x{number}", volumes)
                assert sorted(told) == [*volumes], "each once"
                if "pages" in bodies:
                    break


async def test_a_record_is_stored_beside_the_data(agent, stream):
    mine = Leader()
    stream.answer(record=mine.record("b", newest_id="s1"))
    page = await stream.next("replica", where=lambda message: message.replica.replica.HasField("record"))
    assert page.replica.replica.record.primary == "b"
    assert (agent.place / ".resilver" / "vm1" / "volume.json").exists()


async def test_a_point_and_a_writer_are_told_as_they_occur(agent, stream):
    mine = Leader()
    await call(agent.open_epoch, mine)
    taken = await call(agent.snapshot, mine, opening=True)
    await stream.next("replica", where=lambda message: [record.id for record in message.replica.records] == [taken.id])
    with agent.image().open("rb"):
        await stream.next("replica", where=lambda message: message.replica.replica.live.in_use)
    await stream.next("replica", where=lambda message: not message.replica.replica.live.in_use)
    scatter(agent.image(), 3)
    live = (await stream.next("replica")).replica.replica.live
    assert live.state == volume_pb2.LIVE_STATE_MODIFIED


async def test_the_last_word_of_a_run_goes_before_the_new_tip(agent, stream, xfs, tmp_path):
    source = AgentProcess("b", tmp_path, xfs / uuid.uuid4().hex, coordinator_port=agent.coordinator_port)
    source.place.mkdir()
    write_image(source.image(), 4 * MIB, seed=5)
    mine = Leader()
    async with running(source):
        await call(source.open_epoch, mine)
        first = await call(source.snapshot, mine, opening=True)
        run = await call(agent.resync, mine, source, "", first.id, replace_own_data=True, replace_unrelated=True)
        assert run.state == volume_pb2.RESYNC_STATE_SUCCEEDED
        told = []
        while not (told and told[-1].replica.records and told[-1].replica.records[0].id == first.id):
            told.append(await stream.next())
        states = [message.resync.state for message in told if message.HasField("resync")]
        assert states[-1] == volume_pb2.RESYNC_STATE_SUCCEEDED
        assert told[-1].replica.replica.live.state == volume_pb2.LIVE_STATE_UNMODIFIED


async def test_a_standby_names_the_leader_and_is_followed(agent, stream, leader):
    async with coordinator() as (other, port):
        stream.answer(not_leader=agent_pb2.NotLeader(address=f"127.0.0.1:{port}"))
        opened = await other.stream()
        hello = await opened.next()
        assert hello.WhichOneof("body") == "hello"
        assert hello.boot == stream.hello.boot
        assert hello.seq > stream.hello.seq
        assert hello.hello.store_id == "store-1", "pinned by the first leader"
        opened.answer(term=2, leader="leader-2")
        await opened.next("replica")
        opened.answers.put_nowait(None)
        again = await leader[0].stream()
        assert (await again.next()).hello.highest_term == 2


@pytest.mark.parametrize(
    "giver", [{"store": "store-2", "term": 9}, {"term": 1, "leader": "leader-2"}], ids=["another store", "stale"]
)
async def test_a_leader_that_may_not_lead_is_left(agent, stream, leader, giver):
    await stream.next("replica")
    stream.answer(**giver, record=Leader().record("b"))
    opened = await leader[0].stream()
    assert (await opened.next()).hello.store_id == "store-1"
    assert not (agent.place / ".resilver" / "vm1" / "volume.json").exists()


async def test_a_refusal_is_logged_once_and_a_store_is_adopted_when_told(agent, stream, leader):
    refusal = agent_pb2.ReportRefusal(reason="WRONG_STORE", message="this is store-2")
    refused = stream
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            refused.answer(store="store-2", term=5, refusal=refusal)
            refused = await leader[0].stream()
    assert ["this is store-2" in line["why"] for line in logs if "why" in line] == [True]
    refused.answer(store="store-2", term=5, refusal=refusal, adopt_store=True)
    opened = await leader[0].stream()
    hello = await opened.next()
    assert (hello.hello.store_id, hello.hello.highest_term) == ("store-2", 0)
    opened.answer(store="store-2", term=1, leader="new")
    await opened.next("replica")


async def test_nonsense_ends_the_stream_and_nothing_else(agent, stream, leader):
    with structlog.testing.capture_logs() as logs:
        stream.answer(record=volume_pb2.VolumeRecord(volume="../etc"))
        opened = await leader[0].stream()
    opened.answer()
    await opened.next("replica")
    assert any("INVALID_FIELD" in line.get("why", "") for line in logs)
