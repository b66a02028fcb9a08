"""Records survive the store whole, are readable there, and stay within their bound."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType

import pytest

from coordinator.core.audited import AuditEntry
from coordinator.core.cluster import (
    Candidate,
    ClusterEvent,
    ElectionRecord,
    Loss,
    NodeView,
    Pause,
    PlanAction,
    Refusal,
    ReplicaPlan,
    ReplicaState,
    Resync,
    Size,
    VolumeEntry,
)
from coordinator.core.events import DeletedNode, Forgotten, Volume
from coordinator.core.history import History
from coordinator.records import NOTE_KEY, RECORD_BYTES_MAX, check, key_of, load, to_json
from coordinator.store.base import Stored
from resilver.errors import Damaged, Exhausted
from resilver.fields import CP_NUMBER_MAX, NUMBER_MAX
from resilver.lineage import ConsistencyPoint
from resilver.volume import LiveState, Progress, ResyncState, SourceShare, VolumeRecord

ENTRY = VolumeEntry(
    record=VolumeRecord("vm1", "vid", 3, "eid", "a", ("a", "b", "cp"), ConsistencyPoint(3, 42), "s42"),
    newest_cp_time_ms=1_795_000_000_000,
    opening=True,
    removed=("z",),
    pause=Pause("maintenance", 1_795_000_060_000, "ops"),
    bases=MappingProxyType({"b": "s42", "cp": "3-42", "x_cp": "s40"}),
)
CANDIDATE = Candidate(
    node="a",
    reported=True,
    report_time_ms=5,
    cp=ConsistencyPoint(3, 42),
    snapshot="s42",
    live=LiveState.MODIFIED,
    state=ReplicaState.IN_SYNC,
    common_cp=ConsistencyPoint(3, 41),
    priority=10,
    verdict="won",
)
ELECTION = ElectionRecord(
    volume="vm1",
    create_time_ms=1_795_401_600_000,
    epoch=4,
    epoch_id="eid4",
    winner="a",
    previous_primary="b",
    cp=ConsistencyPoint(3, 42),
    rule="equal CP, then priority",
    candidates=(CANDIDATE, replace(CANDIDATE, node="b", verdict="away")),
    accepted=("b",),
    principal="ops@jump1",
    term=12,
    evidence={"a": ("3-42 s42", "3-41 s41"), "cp": ("3-41 s41",)},
)
REFUSED = ElectionRecord(
    volume="vm1",
    create_time_ms=1_795_401_600_001,
    refusal=Refusal(
        ("PRIMARY_AWAY",),
        "vm1's primary is away",
        missing_nodes=("a",),
        losses=(Loss("a", ConsistencyPoint(3, 41), ConsistencyPoint(3, 42), 2, live_modified=True, unseen_ms=900),),
        next_command="resilver elect vm1 --accept-loss a",
    ),
)
RESYNC = Resync(
    id="0b5c9d0e-1111-4222-8333-444455556666",
    volume="vm1",
    node="c",
    plan=ReplicaPlan(
        node="c",
        state=ReplicaState.STALE,
        action=PlanAction.DELTA,
        why="3-39 is intact",
        base="s39",
        base_cp=ConsistencyPoint(3, 39),
        target="s42",
        target_cp=ConsistencyPoint(3, 42),
        sources=("a", "b"),
        size=Size(4096, 1, 1 << 30),
    ),
    epoch=3,
    principal="ops",
    term=12,
    create_time_ms=1_795_401_600_002,
    state=ResyncState.TRANSFERRING,
    progress=Progress("0b5c9d0e", "vm1", ResyncState.TRANSFERRING, 4096, 1, 10, 12, 0, (SourceShare("a", 12, 3),)),
)
NODE = NodeView("a", "boot", "h:1", "h:2", "0.1", ("vm1",), connected=True, duplicate=True, last_heard_ms=7)


def stored(*kept):
    """As the store would hand them back: through JSON."""
    return {key_of(each): Stored(json.loads(json.dumps(to_json(each))), 1) for each in kept}


def test_everything_comes_back_as_it_was():
    loaded = load(stored(Volume("vm1", ENTRY), ELECTION, REFUSED, RESYNC, NODE))
    assert loaded.volumes == {"vm1": replace(ENTRY, bases=dict(ENTRY.bases))}
    assert loaded.elections == {"vm1": (REFUSED, ELECTION)}
    assert loaded.resyncs == {RESYNC.id: RESYNC}
    assert loaded.nodes == {"a": replace(NODE, connected=False, duplicate=False)}


def test_keys_are_readable_and_elections_sort_by_time():
    assert key_of(Volume("vm1", None)) == "volumes/vm1"
    assert key_of(RESYNC) == f"resyncs/vm1/{RESYNC.id}"
    assert key_of(NODE) == key_of(DeletedNode("a")) == "nodes/a"
    assert key_of(Forgotten(RESYNC)) == key_of(RESYNC)
    times = (5, 999_999_999_999, 1_000_000_000_000, 1_795_401_600_000)
    keys = [key_of(replace(ELECTION, create_time_ms=time_ms)) for time_ms in times]
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    "kept",
    [
        Volume("vm1", replace(ENTRY, record=replace(ENTRY.record, epoch=CP_NUMBER_MAX + 1))),
        Volume("vm1", replace(ENTRY, record=replace(ENTRY.record, newest_cp=ConsistencyPoint(1, CP_NUMBER_MAX + 1)))),
        Volume("vm1", replace(ENTRY, newest_cp_time_ms=NUMBER_MAX + 1)),
        replace(ELECTION, term=NUMBER_MAX + 1),
        replace(ELECTION, candidates=(replace(CANDIDATE, priority=-NUMBER_MAX - 1),)),
        replace(RESYNC, plan=replace(RESYNC.plan, target_cp=ConsistencyPoint(CP_NUMBER_MAX + 1, 1))),
        replace(RESYNC, attempt_count=-1),
        ClusterEvent(NUMBER_MAX + 1, 1, "X"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(kept):
    with pytest.raises(Exhausted) as caught:
        to_json(kept)
    assert caught.value.reason == "TOO_LARGE"


def test_the_largest_numbers_are_written_and_read_again():
    record = replace(ENTRY.record, epoch=CP_NUMBER_MAX, newest_cp=ConsistencyPoint(CP_NUMBER_MAX, CP_NUMBER_MAX))
    kept = (Volume("vm1", replace(ENTRY, record=record)), ClusterEvent(NUMBER_MAX, 1, "X"))
    loaded = load(stored(*kept))
    assert loaded.volumes["vm1"].record == record
    assert loaded.events == (kept[1],)
    for number, where in ((CP_NUMBER_MAX + 1, "epoch"), (f"{CP_NUMBER_MAX + 1}-1", "newest_cp")):
        rows = stored(kept[0])
        rows["volumes/vm1"].value["record"][where] = number
        with pytest.raises(Damaged, match="volumes/vm1"):
            load(rows)


def test_what_the_store_would_not_take_is_refused_before():
    check(NODE)
    check(DeletedNode("a"))
    with pytest.raises(Exhausted, match="nodes/a"):
        check(replace(NODE, volumes=("v" * 63,) * 12_000))


def test_what_is_deleted_has_no_value():
    assert to_json(Volume("vm1", None)) is None
    assert to_json(DeletedNode("a")) is None
    assert to_json(Forgotten(ELECTION)) is None


def test_consistency_points_are_written_as_operators_read_them():
    assert to_json(Volume("vm1", ENTRY))["record"]["newest_cp"] == "3-42"
    refusal = to_json(REFUSED)["refusal"]
    assert (refusal["losses"][0]["from_cp"], refusal["losses"][0]["to_cp"]) == ("3-41", "3-42")
    assert to_json(RESYNC)["plan"]["base_cp"] == "3-39"


def test_a_field_of_a_newer_version_is_passed_over():
    records = stored(NODE)
    records["nodes/a"].value["rack"] = "r7"
    assert load(records).nodes["a"].address == "h:1"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("volumes/vm1", {"record": {"volume": "vm1", "epoch": "three"}}),
        ("volumes/vm1", {"record": {"volume": "vm1", "newest_cp": "3.42"}}),
        ("volumes/vm2", {"record": {"volume": "vm1"}}),
        ("nodes/a", {}),
        ("elections/vm1/000000000000006", {"volume": "vm1", "create_time_ms": 5}),
        ("resyncs/vm1/r1", {"id": "r1", "volume": "vm1"}),
        ("policies/vm1", {}),
        ("volumes", {}),
    ],
)
def test_a_record_that_cannot_be_read_stops_the_take_over_and_is_named(key, value):
    with pytest.raises(Damaged) as caught:
        load({**stored(NODE, ELECTION), key: Stored(value, 1)})
    assert caught.value.reason == "IO_ERROR"
    assert caught.value.metadata["key"] == key
    assert key in caught.value.message


def test_a_long_election_is_shortened_and_says_so():
    nodes = [f"node-{number:03d}-{'x' * 50}" for number in range(200)]
    lines = tuple(f"3-{sequence} {sequence:032x}" for sequence in range(100))
    election = replace(
        ELECTION,
        winner=nodes[150],
        previous_primary=nodes[151],
        candidates=tuple(replace(CANDIDATE, node=node, verdict="v" * 200) for node in nodes),
        evidence=dict.fromkeys(nodes, lines),
    )
    record = to_json(election)
    assert len(json.dumps(record)) <= RECORD_BYTES_MAX + len(record["candidates"]) * 40
    kept = [candidate["node"] for candidate in record["candidates"]]
    assert {nodes[150], nodes[151]} <= set(kept)
    assert kept == sorted(kept)
    assert f"{200 - len(kept)} of 200 candidates" in record["evidence"][NOTE_KEY][0]
    assert load(stored(election)).elections["vm1"][0].winner == nodes[150]


def test_evidence_is_shortened_before_candidates():
    lines = tuple(f"3-{sequence} {sequence:032x}" for sequence in range(100))
    election = replace(ELECTION, evidence=dict.fromkeys([f"n{number}" for number in range(40)], lines))
    record = to_json(election)
    assert len(record["candidates"]) == 2
    assert record["evidence"]["n0"][0] == "3-0 " + "0" * 32
    assert "older ones" in record["evidence"]["n0"][-1]


def test_a_long_resync_is_shortened():
    progress = replace(RESYNC.progress, message="m" * 90_000, preserved=tuple(f"p{number}" for number in range(200)))
    record = to_json(replace(RESYNC, progress=progress))
    assert len(json.dumps(record)) < RECORD_BYTES_MAX
    assert len(record["progress"]["preserved"]) == 64


def test_an_event_is_read_as_it_was_written_and_its_key_sorts_by_number() -> None:
    events = [
        ClusterEvent(9, 5, "TOLD", message="first"),
        ClusterEvent((7 << 32) + 1, 6, "ELECTED", "vm1", "a", "", "PRIMARY_AWAY", "words", "ops", previous=9),
        ClusterEvent((1 << 40) + 3, 0, "TOLD", resync="r1", previous=(7 << 32) + 1),
    ]
    rows = {key_of(event): Stored(json.loads(json.dumps(to_json(event))), 1) for event in reversed(events)}
    assert load(rows).events == tuple(events)
    assert sorted(rows) == [key_of(event) for event in events]
    assert key_of(Forgotten(events[0])) == "events/00000000000000000009"
    assert to_json(Forgotten(events[0])) is None


def test_an_audit_entry_that_knows_nobody_is_read_as_it_was_written() -> None:
    entry = AuditEntry(9, 5, "StopTransfer", "", "")
    rows = {key_of(entry): Stored(json.loads(json.dumps(to_json(entry))), 1)}
    assert load(rows).audit == (entry,)


def test_the_longest_event_stays_within_its_bound() -> None:
    about = dict.fromkeys(("volume", "node", "resync", "reason", "principal"), "\U0001f4be" * 999)
    event, _ = History(1, ()).add(0, "TOLD", "\U0001f4be" * 9999, **about)
    assert len(json.dumps(to_json(event)).encode()) < RECORD_BYTES_MAX
