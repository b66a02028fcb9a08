"""What counts of what agents say, when it comes twice, late, or from two of one name."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from coordinator.core import events as e
from coordinator.core.cluster import (
    ElectionRecord,
    NodeView,
    PlanAction,
    Refusal,
    ReplicaPlan,
    ReplicaState,
    Resync,
    VolumeEntry,
)
from coordinator.core.context import Identity, Settings
from coordinator.core.engine import Engine
from coordinator.core.orders import Done, Taken, TakeSnapshot
from coordinator.core.requests import ElectRequest, RemoveRequest, SnapshotRequest
from coordinator.core.tasks import Flow, at_once
from coordinator.records import key_of
from coordinator.store.base import WRITES_MAX
from resilver.errors import Exhausted
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.volume import Grant, LiveCopy, LiveState, Presence, ReplicaReport, ResyncState, VolumeRecord

NOW_MS = 1_700_000_000_000


@pytest.fixture
def engine() -> Engine:
    record = VolumeRecord("vm1", "V1", 1, "E1", "a", ("a", "b"), ConsistencyPoint(1, 1), "s1")
    ids = itertools.count(1)
    loaded = e.Loaded({"vm1": VolumeEntry(record)}, {}, {}, {})
    return Engine(
        Identity("demo", "store-1", 3, "leader-1"),
        Settings(),
        loaded,
        NOW_MS,
        lambda: f"i{next(ids)}",
        new_ticket=lambda: "ticket",
    )


def connect(
    engine: Engine, stream: str, node: str, boot: str, *, address: str = "x:1", term: int = 0, leader: str = ""
) -> list[e.Action]:
    hello = NodeView(node, boot, address, address, "1", ("vm1",))
    return engine.step(e.AgentConnected(stream, hello, "demo", "store-1", term, leader), NOW_MS)


def report(engine: Engine, stream: str, seq: int, *ids: str, examine: str = "", grant: bool = False) -> list[e.Action]:
    records = [
        Snapshot(name, ConsistencyPoint(1, len(ids) - at), parent=parent)
        for at, (name, parent) in enumerate(zip(ids, (*ids[1:], ""), strict=True))
    ]
    lineage = Lineage(tuple(records))
    held = Grant("V1", 1, "E1") if grant else None
    said = ReplicaReport("vm1", Presence.PRESENT, "V1", lineage, LiveCopy(LiveState.UNMODIFIED), grant=held)
    return engine.step(e.ReplicaReported(stream, seq, said, examine), NOW_MS)


def tip(engine: Engine, node: str) -> str:
    return engine.view("vm1").replica(node).lineage.tip_id


def test_what_is_away_was_last_heard_with_the_last_heartbeat(engine):
    connect(engine, "b1", "b", "boot-1")
    report(engine, "b1", 1, "s1")
    engine.step(e.AgentHeard("b1", None), NOW_MS + 40_000)
    assert engine.view("vm1").replica("b").report_time_ms == NOW_MS
    engine.step(e.AgentDisconnected("b1"), NOW_MS + 49_000)
    assert engine.view("vm1").replica("b").report_time_ms == engine.nodes()["b"].last_heard_ms == NOW_MS + 40_000
    # The agent is back, and gone before it has reported: what it had was heard when it was.
    engine.step(e.AgentConnected("b2", NodeView("b", "boot-2", "x:1", "x:1", "1", ("vm1",)), "demo", "store-1", 0, ""),
                NOW_MS + 90_000)  # fmt: skip
    engine.step(e.AgentDisconnected("b2"), NOW_MS + 99_000)
    assert engine.view("vm1").replica("b").report_time_ms == NOW_MS + 40_000


def test_an_older_report_that_comes_by_the_stream_before_is_dropped(engine):
    connect(engine, "first", "b", "boot-1")
    report(engine, "first", 2, "s1")
    connect(engine, "second", "b", "boot-1")
    report(engine, "second", 9, "s2", "s1")
    report(engine, "first", 5, "s1")
    assert tip(engine, "b") == "s2"
    connect(engine, "third", "b", "boot-1")
    report(engine, "third", 11, "s3", "s2", "s1")
    assert tip(engine, "b") == "s3"


def test_a_node_that_has_reconnected_is_asked_by_its_newest_stream(engine):
    connect(engine, "first", "b", "boot-1")
    connect(engine, "second", "b", "boot-1")
    asked = engine.step(e.Requested("r1", ElectRequest("vm1")), NOW_MS)
    assert [one.stream for one in asked if isinstance(one, e.SendExamine)] == ["second"]


def test_the_twin_that_is_left_is_reached_where_it_is(engine):
    connect(engine, "first", "b", "boot-1", address="original:1")
    connect(engine, "second", "b", "boot-2", address="clone:1")
    assert engine.nodes()["b"].duplicate
    engine.step(e.AgentDisconnected("first"), NOW_MS)
    left = engine.nodes()["b"]
    assert (left.boot, left.address, left.duplicate, left.reachable) == ("boot-2", "clone:1", False, True)


@pytest.mark.parametrize(("term", "leader"), [(7, "leader-0"), (3, "leader-0")])
def test_a_store_that_has_forgotten_a_term_has_forgotten_what_was_stored_under_it(engine, term, leader):
    done = connect(engine, "first", "b", "boot-1", term=term, leader=leader)
    assert e.RaiseTerm(term) in done
    stored = [record for one in done if isinstance(one, e.Persist) for record in one.records]
    assert [record.entry.recovering for record in stored if isinstance(record, e.Volume)] == [True]
    kinds = [type(one) for one in done]
    assert kinds.index(e.Persist) < kinds.index(e.RaiseTerm)


@pytest.mark.parametrize(("term", "leader"), [(0, ""), (2, "leader-0"), (3, "leader-1")])
def test_a_term_that_the_store_has_given_proves_nothing(engine, term, leader):
    connect(engine, "first", "b", "boot-1", term=term, leader=leader)
    assert not engine.view("vm1").entry.recovering


@pytest.mark.parametrize("opening", [False, True])
def test_a_volume_may_be_removed_while_its_point_is_awaited(opening):
    record = VolumeRecord("vm1", "V1", 1, "E1", "a", ("a",), ConsistencyPoint(1, 1), "s1")
    ids = itertools.count(1)
    loaded = e.Loaded({"vm1": VolumeEntry(record, opening=opening)}, {}, {}, {})
    engine = Engine(
        Identity("demo", "store-1", 3, "leader-1"),
        Settings(),
        loaded,
        NOW_MS,
        lambda: f"i{next(ids)}",
        new_ticket=lambda: "ticket",
    )
    connect(engine, "first", "a", "boot-1")
    done = report(engine, "first", 1, "s1", grant=True)
    if not opening:
        done = engine.step(e.Requested("r1", SnapshotRequest(("vm1",))), NOW_MS)
        asked = next(one.examine_id for one in done if isinstance(one, e.SendExamine))
        done = report(engine, "first", 2, "s1", examine=asked, grant=True)
    while orders := [one for one in done if isinstance(one, e.GiveOrder)]:
        made = Snapshot("s2", ConsistencyPoint(1, 2))
        answer = Taken(made, taken=True) if isinstance(orders[0].order, TakeSnapshot) else Done()
        done = engine.step(e.OrderAnswered(orders[0].order_id, answer), NOW_MS)
    engine.step(e.AgentDisconnected("first"), NOW_MS)
    engine.step(e.Requested("r2", RemoveRequest("vm1")), NOW_MS)
    assert "vm1" not in engine.volume_names()
    engine.step(e.Ticked(), NOW_MS + 700_000)


def answer_of_a_twin(engine: Engine, ends: str) -> ElectionRecord:
    """a answers, a second one of that name comes, and one of both streams ends before b has answered too."""
    connect(engine, "first", "a", "boot-1")
    connect(engine, "other", "b", "boot-1")
    asked = engine.step(e.Requested("r1", ElectRequest("vm1")), NOW_MS)
    examine = next(one.examine_id for one in asked if isinstance(one, e.SendExamine))
    report(engine, "first", 1, "s1", examine=examine, grant=True)
    connect(engine, "second", "a", "boot-2")
    engine.step(e.AgentDisconnected(ends), NOW_MS)
    done = report(engine, "other", 1, "s1", examine=examine)
    (answer,) = [one.answer for one in done if isinstance(one, e.Answer)]
    assert isinstance(answer, ElectionRecord)
    return answer


def test_an_answer_does_not_outlive_the_start_that_gave_it(engine):
    refusal = answer_of_a_twin(engine, "first").refusal
    assert refusal is not None
    assert refusal.reasons == ("PRIMARY_AWAY",)


def test_an_answer_outlives_another_agent_of_that_name(engine):
    found = answer_of_a_twin(engine, "second")
    assert (found.refusal, found.winner) == (None, "a")


def test_what_came_by_a_stream_that_has_ended_is_not_fresh_whoever_is_asked_for(engine):
    connect(engine, "first", "b", "boot-1")
    report(engine, "first", 1, "s1")
    known = engine._context
    assert known.view("vm1", {"b"}).replica("b").fresh
    assert not known.view("vm1", {"a"}).replica("b").fresh
    engine.step(e.AgentDisconnected("first"), NOW_MS)
    connect(engine, "second", "b", "boot-1")
    assert not known.view("vm1", {"b"}).replica("b").fresh


def told(engine: Engine, stream: str, seq: int, members: str, *, examine: str = "", grant: bool = False):
    """A report at the store's epoch and CP, whose record names these members."""
    record = VolumeRecord("vm1", "V1", 1, "E1", "a", tuple(members), ConsistencyPoint(1, 1), "s1")
    lineage = Lineage((Snapshot("s1", ConsistencyPoint(1, 1), epoch_id="E1"),))
    held = Grant("V1", 1, "E1") if grant else None
    said = ReplicaReport("vm1", Presence.PRESENT, "V1", lineage, LiveCopy(LiveState.UNMODIFIED), record, held)
    return engine.step(e.ReplicaReported(stream, seq, said, examine), NOW_MS)


@pytest.mark.parametrize("first", "ab")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_store_that_has_forgotten_a_member_wants_it(engine, first, when):
    """Whoever is heard first, and also if the gap is noticed only after the one that knows the member was heard."""
    connect(engine, "to-b", "b", "boot-1", term=7 if when == "before" else 0)
    connect(engine, "to-a", "a", "boot-1")
    for node in sorted("ab", key=lambda node: node != first):
        told(engine, f"to-{node}", 1, "ab" if node == "a" else "abc")
    if when == "after":
        assert engine.view("vm1").record.members == ("a", "b"), "a whole store knows who is a member"
        connect(engine, "again", "b", "boot-1", term=7)
    assert engine.view("vm1").entry.recovering
    assert engine.view("vm1").record.members == ("a", "b", "c")
    asked = engine.step(e.Requested("r1", ElectRequest("vm1")), NOW_MS)
    examine = next(one.examine_id for one in asked if isinstance(one, e.SendExamine))
    told(engine, "to-a", 2, "ab", examine=examine, grant=True)
    done = told(engine, "again" if when == "after" else "to-b", 2, "abc", examine=examine)
    (answer,) = [one.answer for one in done if isinstance(one, e.Answer)]
    assert answer.refusal.reasons == ("RECOVERING",)
    assert answer.refusal.missing_nodes == ("c",)


def test_a_member_is_told_of_once_and_comes_back_by_no_old_record(engine):
    connect(engine, "to-b", "b", "boot-1", term=7)
    done = told(engine, "to-b", 1, "abc")
    assert [one.event.type for one in done if isinstance(one, e.Tell)] == ["RECOVERING"]
    assert not [one for one in told(engine, "to-b", 2, "abc") if isinstance(one, e.Persist | e.Tell)]
    connect(engine, "to-c", "c", "boot-1")
    engine.step(e.AgentDisconnected("to-c"), NOW_MS)
    engine.step(e.Requested("r1", RemoveRequest("vm1", "c")), NOW_MS)
    assert engine.view("vm1").record.members == ("a", "b")
    assert not [one for one in told(engine, "to-b", 3, "abc") if isinstance(one, e.Persist | e.Tell)]
    assert engine.view("vm1").record.members == ("a", "b")


def kept(actions: list[e.Action]) -> list[e.Kept]:
    return [record for one in actions if isinstance(one, e.Persist) for record in one.records]


def test_two_decisions_of_one_moment_are_two(engine):
    made = [one for _ in range(3) for one in kept(engine.step(e.Requested("r", ElectRequest("vm1")), NOW_MS))]
    made += kept(engine.step(e.Ticked(), NOW_MS + 60_000))
    elections = [one for one in made if isinstance(one, ElectionRecord)]
    assert len({key_of(one) for one in elections}) == len(elections) == 3
    assert list(engine.elections("vm1")) == elections[::-1]


RESYNC = Resync("q", "vm1", "b", ReplicaPlan("b", ReplicaState.STALE, PlanAction.DELTA, ""), 1, "", 1, NOW_MS)
IN_USE = Refusal(("IN_USE",), "b is in use")
REFUSED = ElectionRecord("vm1", NOW_MS)


def test_a_removed_volume_takes_its_decisions_and_its_resyncs_along():
    record = VolumeRecord("vm1", "V1", 1, "E1", "a", ("a", "b"), ConsistencyPoint(1, 1), "s1")
    long_ago = replace(RESYNC, id="old", state=ResyncState.FAILED, end_time_ms=NOW_MS - 700_000)
    blocked = replace(RESYNC, id="blocked", state=ResyncState.BLOCKED, end_time_ms=NOW_MS - 1, refusal=IN_USE)
    elections = tuple(replace(REFUSED, create_time_ms=NOW_MS - at) for at in range(100))
    loaded = e.Loaded(
        {"vm1": VolumeEntry(record), "vm2": VolumeEntry(replace(record, volume="vm2"))},
        {"vm1": elections, "vm2": (replace(REFUSED, volume="vm2"),)},
        {one.id: one for one in (RESYNC, long_ago, blocked, replace(long_ago, id="other", volume="vm2"))},
        {},
    )
    ids = itertools.count(1)
    identity = Identity("demo", "store-1", 3, "leader-1")
    engine = Engine(identity, Settings(), loaded, NOW_MS, lambda: f"i{next(ids)}", new_ticket=lambda: "ticket")
    done = engine.step(e.Requested("r", RemoveRequest("vm1")), NOW_MS)
    gone = {key_of(one) for one in kept(done) if isinstance(one, e.Forgotten)}
    assert gone == {key_of(one) for one in (*elections, long_ago)}
    persists = [one for one in done if isinstance(one, e.Persist)]
    assert max(len(one.records) for one in persists) <= WRITES_MAX
    assert isinstance(persists[-1].records[0], e.Volume), "the volume goes last"
    assert engine.elections("vm1") == ()
    left = engine.resyncs()
    assert set(left) == {"q", "blocked", "other"}
    assert left["q"].state is ResyncState.CANCELLED
    assert left["blocked"].refusal.reasons == ("CANCELLED",), "nothing tries it again"
    done = engine.step(e.Ticked(), NOW_MS + 700_000)
    assert {one.record.id for one in kept(done) if isinstance(one, e.Forgotten)} == {"q", "blocked"}
    assert set(engine.resyncs()) == {"other"}
    assert len(engine.elections("vm2")) == 1


def test_a_flow_that_cannot_store_ends_and_gives_its_lock_back(engine):
    refused = []

    def check(one: e.Kept) -> None:
        if isinstance(one, ElectionRecord) and not refused:
            refused.append(one)
            raise Exhausted("TOO_LARGE", "it would have a byte too many")

    engine._context.check = check
    answers = []
    for at in range(2):
        done = engine.step(e.Requested(f"r{at}", ElectRequest("vm1")), NOW_MS + at)
        answers += [one.answer for one in done if isinstance(one, e.Answer)]
    assert [type(one) for one in answers] == [Exhausted, ElectionRecord]
    assert not engine._context.locks


def test_a_flow_that_nobody_joins_and_cannot_store_is_told_of(engine):
    def fails() -> Flow[None]:
        yield from at_once()
        raise Exhausted("TOO_LARGE", "it would have a byte too many")

    engine._context.tasks.spawn(fails())
    done = engine.step(e.Ticked(), NOW_MS)
    assert [(one.event.type, one.event.reason) for one in done if isinstance(one, e.Tell)] == [
        ("NOT_STORED", "TOO_LARGE")
    ]
