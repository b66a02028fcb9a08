"""What must not end a reign or stop its clock: full queues, large nodes, odd numbers, slow commits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

import pytest

from coordinator import records
from coordinator import reign as reign_module
from coordinator.agents import Agents
from coordinator.core import events as e
from coordinator.core.cluster import NodeView, PlanAction, ReplicaPlan, ReplicaState, Resync, VolumeEntry
from coordinator.core.context import Settings
from coordinator.core.history import TERM_MAX
from coordinator.core.orders import StopTransfer
from coordinator.core.requests import PauseRequest
from coordinator.reign import CurrentReign
from coordinator.reports import VOLUMES_MAX
from coordinator.store.base import Reign, Write
from coordinator.store.sqlite import SqliteStore
from resilver.errors import Conflict, Exhausted, Unavailable
from resilver.lineage import ConsistencyPoint
from resilver.rpc import make_channel
from resilver.volume import Order, Presence, ReplicaReport, VolumeRecord
from tests.coordinator.running import WITHIN_S


class GatedStore(SqliteStore):
    """The store; commits wait while the gate is shut, and fail with `fault` if there is one."""

    gate: asyncio.Event
    under_way: asyncio.Event
    fault: Conflict | None = None

    async def commit(self, reign, writes):
        self.under_way.set()
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return await super().commit(reign, writes)


@contextlib.asynccontextmanager
async def reigning(tmp_path, *, above=0, first=()):
    store = GatedStore(tmp_path / "store.db", "test", 10.0)
    store.gate, store.under_way = asyncio.Event(), asyncio.Event()
    store.gate.set()
    store_id = await store.open()
    reign = await store.campaign("c1", "127.0.0.1:1", above_term=above)
    assert isinstance(reign, Reign)
    if first:
        await store.commit(reign, [Write(records.key_of(one), records.to_json(one)) for one in first])
        store.under_way.clear()
    agents = Agents(make_channel, clock=time.monotonic)
    current = CurrentReign(store, reign, agents, settings=Settings(), cluster="test", store_id=store_id)
    try:
        await current.load()
        yield store, current, store_id
    finally:
        await agents.close()
        await store.close()


@contextlib.asynccontextmanager
async def at_work(current):
    working = asyncio.create_task(current.run(lambda: True))
    try:
        async with asyncio.timeout(WITHIN_S):
            yield working
    finally:
        working.cancel()
        await asyncio.wait([working])


async def idle(current):
    """Until everything that was posted is done with: a step whose answer comes after it."""
    with contextlib.suppress(Exception):
        await current.ask(PauseRequest(volumes=("nothing",), pause=None, principal=""), WITHIN_S)


def hello(store_id, name="n0", *, volumes=(), term=0, cluster="test", leader=""):
    node = NodeView(name, f"boot-{name}", address="h:1", stream_address="h:2", volumes=volumes)
    return e.AgentConnected(f"stream-{name}", node, cluster, store_id, term, leader)


def volume(name="vm1", **about):
    return e.Volume(name, VolumeEntry(VolumeRecord(name, "V1", 1, "E1", "n0", ("n0",), **about)))


# ------------------------------------------------------------ the queue


async def test_a_full_queue_loses_neither_a_tick_nor_an_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(reign_module, "TICK_S", 0.01)
    monkeypatch.setattr(reign_module, "QUEUE_MAX", 20)
    async with reigning(tmp_path) as (store, current, store_id):
        seen, ticked, answered = [], asyncio.Event(), asyncio.Event()
        step = current.engine.step

        def noted(event, now_ms):
            seen.append(event)
            if isinstance(event, e.Ticked) and store.gate.is_set():
                ticked.set()
            if isinstance(event, e.OrderAnswered):
                answered.set()
            return step(event, now_ms)

        current.engine.step = noted
        store.gate.clear()
        async with at_work(current):
            current.post(hello(store_id))
            await store.under_way.wait()
            while current._events.qsize() < reign_module.QUEUE_MAX:
                current.post(e.AgentHeard("stream-n0"))
            with pytest.raises(Exhausted):
                current.post(e.AgentHeard("stream-n0"))
            # An order to a node without an address is answered at once.
            current._do(e.GiveOrder("o1", "n9", "", StopTransfer(Order("test", store_id, 1, "l", "vm1"), "r1")))
            await asyncio.gather(*current._orders)
            waiting = current._events.qsize()
            assert waiting > reign_module.QUEUE_MAX
            while not any(isinstance(one, e.Ticked) for one in current._events._queue):  # noqa: ASYNC110 - no event of it
                await asyncio.sleep(0.01)  # a tick comes by itself, and nobody tells
            assert current._events.qsize() <= waiting + 1, "one tick waits, however long the store takes"
            seen.clear()
            store.gate.set()
            await ticked.wait()
            await answered.wait()
            ticked.clear()
            await ticked.wait()


async def test_a_reign_whose_clock_dies_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(reign_module, "TICK_S", "no number")
    async with reigning(tmp_path) as (_, current, _), asyncio.timeout(WITHIN_S):
        with pytest.raises(Conflict, match="clock of this reign"):
            await current.run(lambda: True)


# ------------------------------------------------------------ what is too large


async def test_a_node_with_all_the_volumes_that_it_may_have(tmp_path):
    volumes = tuple(f"v{at:062d}" for at in range(VOLUMES_MAX))
    async with reigning(tmp_path) as (store, current, store_id):
        async with at_work(current) as working:
            current.post(hello(store_id, volumes=volumes))
            current.post(hello(store_id, "n1", volumes=volumes))
            await idle(current)
            assert not working.done()
        assert (await store.read_all())["nodes/n1"].value["volumes"] == list(volumes)
        await current.load()
        assert current.engine.nodes()["n0"].volumes == volumes


async def test_a_report_that_makes_a_record_too_large_costs_only_what_it_says(tmp_path):
    members = tuple(f"n{at:062d}" for at in range(15_000))
    record = VolumeRecord("vm1", "V1", 2, "E2", "n0", members, ConsistencyPoint(2, 1), "s1")
    async with reigning(tmp_path, first=[volume()]) as (store, current, store_id):
        async with at_work(current) as working:
            current.post(hello(store_id, volumes=("vm1",)))
            report = ReplicaReport("vm1", Presence.PRESENT, "V1", record=record)
            current.post(e.ReplicaReported("stream-n0", 1, report))
            await idle(current)
            assert not working.done()
            assert current.engine.view("vm1").record.epoch == 1
        told = [one for one in current.events_after(0) if one.type == "NOT_STORED"]
        assert [(one.volume, one.node, one.reason) for one in told] == [("vm1", "n0", "TOO_LARGE")]
        assert (await store.read_all())["volumes/vm1"].value["record"]["epoch"] == 1


async def test_a_hello_that_cannot_be_stored_is_refused(tmp_path):
    volumes = tuple(f"v{at:062d}" for at in range(2 * VOLUMES_MAX))
    async with reigning(tmp_path) as (store, current, store_id):
        outbox = current.open_stream("stream-n0")
        async with at_work(current) as working:
            current.post(hello(store_id, volumes=volumes))
            refusal = await outbox.get()
            assert isinstance(refusal, e.RefuseAgent)
            assert refusal.reason == "TOO_LARGE"
            assert "nodes/n0" in refusal.message
            current.post(hello(store_id, "n1"))
            await idle(current)
            assert not working.done()
        assert "nodes/n0" not in await store.read_all()
        assert "n1" in current.engine.nodes()


# ------------------------------------------------------------ numbers


async def test_the_highest_term_that_is_believed_leaves_the_store_readable(tmp_path):
    async with reigning(tmp_path) as (_, current, store_id):
        current.post(hello(store_id, term=TERM_MAX, leader="L"))
        with pytest.raises(Conflict):
            await current.run(lambda: True)
        wanted = current.term_wanted
        assert wanted == TERM_MAX
    for above in (wanted, 0):
        async with reigning(tmp_path, above=above) as (_, current, store_id):
            before = current.span().newest
            async with at_work(current):
                current.post(hello(store_id, f"n{above}", cluster="other"))  # an event is stored
                current.post(hello(store_id, term=current.engine.identity.term))
                await idle(current)
            assert current.span().newest > before
            assert current.engine.nodes()["n0"].connected


async def test_a_term_that_nobody_can_have_given_is_refused(tmp_path):
    async with reigning(tmp_path) as (_, current, store_id):
        outbox = current.open_stream("stream-n0")
        async with at_work(current) as working:
            current.post(hello(store_id, term=TERM_MAX + 1))
            refusal = await outbox.get()
            assert isinstance(refusal, e.RefuseAgent)
            assert refusal.reason == "INVALID_FIELD"
            assert str(TERM_MAX + 1) in refusal.message
            assert not working.done()
        assert current.term_wanted == 0


# ------------------------------------------------------------ reading


async def test_a_reader_waits_for_the_commit_and_is_not_shown_what_is_lost(tmp_path):
    async with reigning(tmp_path) as (store, current, store_id):
        async with at_work(current):
            store.gate.clear()
            current.post(hello(store_id))
            await store.under_way.wait()
            assert "n0" in current.engine.nodes()
            reading = asyncio.create_task(current.settled())
            await asyncio.sleep(0)  # it has begun to wait
            assert not reading.done()
            store.gate.set()
            assert "n0" in (await reading).nodes()
        assert "nodes/n0" in await store.read_all()
        store.gate.clear()
        store.under_way.clear()
        store.fault = Conflict("LEADERSHIP_LOST", "another leads")
        working = asyncio.create_task(current.run(lambda: True))
        current.post(hello(store_id, "n1"))
        await store.under_way.wait()
        reading = asyncio.create_task(current.settled())
        await asyncio.sleep(0)  # it has begun to wait
        store.gate.set()
        with pytest.raises(Conflict) as caught:
            await working
        current.end(caught.value)
        with pytest.raises(Conflict):
            await reading


async def test_a_reader_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.readers.STORED_WITHIN_S", 0.01)
    async with reigning(tmp_path) as (store, current, store_id), at_work(current):
        store.gate.clear()
        current.post(hello(store_id))
        await store.under_way.wait()
        with pytest.raises(Unavailable) as caught:
            await current.settled()
        assert caught.value.reason == "STORE_UNAVAILABLE"
        store.gate.set()


# ------------------------------------------------------------ the export


async def test_an_export_has_no_ticket_and_a_leader_that_finds_none_makes_one(tmp_path):
    plan = ReplicaPlan("n1", ReplicaState.STALE, PlanAction.DELTA, "", target="s2")
    resync = Resync("r1", "vm1", "n1", plan, 1, "", 1, 1, ticket="secret-ticket")
    async with reigning(tmp_path, first=[volume(), resync]) as (store, current, _):
        assert current.engine.resyncs()["r1"].ticket == "secret-ticket"
        lines = [json.loads(line) async for line in current.export()]
        assert "secret-ticket" not in json.dumps(lines)
        assert {line["key"] for line in lines} == {"volumes/vm1", "resyncs/vm1/r1"}
        for line in lines:
            await store.commit(current._reign, [Write(line["key"], line["value"])])
        await current.load()
        assert current.engine.resyncs()["r1"].ticket
        assert current.engine.resyncs()["r1"].ticket != "secret-ticket"
