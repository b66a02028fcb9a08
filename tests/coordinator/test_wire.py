"""What operators are told: whole, bounded, and with nothing invented."""

from __future__ import annotations

import re
import uuid
from dataclasses import replace

import pytest

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
    Role,
    Size,
    VolumePlan,
    VolumeState,
)
from coordinator.core.requests import Planned, Pruned, ResyncsStarted, VolumeRefusal
from coordinator.wire import (
    ACTIONS,
    REPLICA_STATES,
    ROLES,
    VOLUME_STATES,
    duration_to_proto,
    election_to_proto,
    event_to_proto,
    need_bytes,
    node_to_proto,
    pause_to_proto,
    plan_to_proto,
    pruned_to_proto,
    refusal_to_proto,
    remaining_ms,
    replica_plan_to_proto,
    resync_to_proto,
    started_to_proto,
)
from resilver.lineage import ConsistencyPoint
from resilver.v1 import volume_pb2
from resilver.volume import LiveState, Progress, ResyncState, SourceShare

CP = ConsistencyPoint(3, 42)
PLAN = ReplicaPlan(
    node="c",
    state=ReplicaState.STALE,
    action=PlanAction.DELTA,
    why="3-39 is intact",
    base="s39",
    base_cp=ConsistencyPoint(3, 39),
    target="s42",
    target_cp=CP,
    sources=("a", "b"),
    size=Size(1000, 10, 1 << 30),
    exact=True,
    free_bytes=5,
)
RESYNC = Resync("r1", "vm1", "c", PLAN, epoch=3, principal="ops", term=12, create_time_ms=1500)


@pytest.mark.parametrize(
    ("kind", "table"),
    [(Role, ROLES), (ReplicaState, REPLICA_STATES), (VolumeState, VOLUME_STATES), (PlanAction, ACTIONS)],
)
def test_every_word_has_its_own_on_the_wire(kind, table):
    assert set(table) == set(kind)
    assert len(set(table.values())) == len(kind)
    assert 0 not in table.values()


def test_an_election_tells_who_and_why():
    candidate = Candidate("a", True, 5000, CP, "s42", LiveState.MODIFIED, ReplicaState.IN_SYNC, CP, -3, "won")
    election = ElectionRecord(
        "vm1", 7250, 4, "e4", "a", "b", CP, "equal CP", (candidate,), None, ("b",), "ops", 12, {"a": ("3-42 s42",)}
    )
    message = election_to_proto(election)
    assert (message.epoch, message.epoch_id, message.winner, message.previous_primary) == (4, "e4", "a", "b")
    assert message.create_time.ToMilliseconds() == 7250
    assert message.cp.text == "3-42"
    assert not message.HasField("refusal")
    told = message.candidates[0]
    assert (told.priority, told.live, told.verdict) == (-3, volume_pb2.LIVE_STATE_MODIFIED, "won")
    assert told.report_time.ToMilliseconds() == 5000
    unheard = election_to_proto(replace(election, candidates=(replace(candidate, report_time_ms=0),)))
    assert not unheard.candidates[0].HasField("report_time")


def test_a_refusal_tells_each_loss_and_what_is_not_known_stays_unset():
    losses = (
        Loss("a", ConsistencyPoint(3, 41), CP, 2, live_modified=True, unseen_ms=1500),
        Loss("b"),
    )
    message = refusal_to_proto(Refusal(("PRIMARY_AWAY",), "away", ("a",), ("b",), losses, "resilver elect vm1"))
    first, second = message.losses
    assert (first.from_cp, first.to_cp, first.lost_cps, first.unseen_seconds) == ("3-41", "3-42", 2, 1.5)
    assert (second.from_cp, second.to_cp) == ("", "")
    assert not second.HasField("lost_cps")
    assert not second.HasField("unseen_seconds")


def test_a_refusal_is_bounded():
    nodes = tuple(f"n{number}" for number in range(1000))
    refusal = Refusal(("AMBIGUOUS",), "m" * 10_000, nodes, nodes, tuple(map(Loss, nodes)), "x" * 10_000)
    message = refusal_to_proto(refusal)
    assert len(message.losses) == len(message.candidates) == 256
    assert message.ByteSize() < 32 << 10


def test_a_plan_keeps_zero_apart_from_unknown():
    known = replica_plan_to_proto(replace(PLAN, size=Size(0, 0, 0), preserve_bytes=0))
    assert known.HasField("copy_bytes")
    assert known.HasField("range_count")
    assert known.HasField("preserve_bytes")
    unknown = replica_plan_to_proto(replace(PLAN, size=None))
    assert not unknown.HasField("copy_bytes")
    assert not unknown.HasField("preserve_bytes")
    planned = Planned("e1", 9000, (VolumePlan("vm1", "a", CP, takes_snapshot=True, replicas=(PLAN,)),))
    message = plan_to_proto(planned)
    assert (message.etag, message.volumes[0].takes_snapshot) == ("e1", True)
    assert message.volumes[0].replicas[0].sources == ["a", "b"]


def test_the_room_needed_holds_data_metadata_and_a_margin():
    assert need_bytes(PLAN) == 1000 + 10 * 34 + (64 << 20)
    large = replace(PLAN, size=Size(100 << 30, 0, 0))
    assert need_bytes(large) == (100 << 30) + (1 << 30)
    assert need_bytes(replace(PLAN, action=PlanAction.NONE)) == 0
    assert need_bytes(replace(PLAN, size=None)) == 0


def test_what_a_file_system_estimates_is_told_as_that():
    about = replica_plan_to_proto(replace(PLAN, size=Size(1000, None, 0)))
    assert (about.copy_bytes, about.estimated, about.exact, about.HasField("range_count")) == (1000, True, False, False)
    assert about.need_bytes == 1000 + (64 << 20)
    silent = replica_plan_to_proto(replace(PLAN, size=Size(None, None, 0)))
    assert silent.estimated
    assert not any(silent.HasField(field) for field in ("copy_bytes", "range_count", "need_bytes"))


def test_a_stream_that_runs_has_no_ranges_and_an_estimated_total_or_none():
    message = resync_to_proto(progress(range_count=0))
    assert (message.total_bytes, message.estimated, message.HasField("range_count")) == (1000, True, False)
    longer = progress(range_count=0, done_bytes=1000)
    assert remaining_ms(longer) is None
    message = resync_to_proto(replace(progress(range_count=0, total_bytes=None), plan=replace(PLAN, size=None)))
    assert (message.estimated, message.HasField("total_bytes"), message.HasField("range_count")) == (True, False, False)
    message = resync_to_proto(progress(range_count=0, done_bytes=1000, state=ResyncState.VERIFYING))
    assert (message.total_bytes, message.estimated) == (1000, False)
    message = resync_to_proto(progress(range_count=0, total_bytes=0, done_bytes=0))
    assert (message.total_bytes, message.range_count, message.estimated) == (0, 0, False)


def progress(**changes):
    told = Progress("r1", "vm1", ResyncState.TRANSFERRING, 1000, 10, 400, 410, 0, (SourceShare("a", 410, 100),))
    return replace(RESYNC, state=ResyncState.TRANSFERRING, progress=replace(told, **changes))


def test_what_is_left_follows_from_the_rate():
    assert remaining_ms(progress()) == 6000
    assert remaining_ms(progress(done_bytes=1000)) == 0
    assert remaining_ms(progress(sources=())) is None
    assert remaining_ms(progress(total_bytes=None)) is None
    assert remaining_ms(replace(progress(), state=ResyncState.FAILED)) is None
    assert remaining_ms(RESYNC) is None


def test_a_resync_before_its_first_word_tells_what_was_planned():
    message = resync_to_proto(RESYNC)
    assert (message.total_bytes, message.range_count) == (1000, 10)
    assert [source.node for source in message.sources] == ["a", "b"]
    assert not message.HasField("done_bytes")
    assert not message.HasField("start_time")
    lower_bound = resync_to_proto(replace(RESYNC, plan=replace(PLAN, exact=False)))
    assert not lower_bound.HasField("total_bytes")


def test_a_resync_under_way_tells_what_its_target_told():
    message = resync_to_proto(replace(progress(preserved=("p1",)), start_time_ms=2000, attempt_count=2))
    assert (message.done_bytes, message.wire_bytes, message.resent_bytes) == (400, 410, 0)
    assert message.HasField("resent_bytes")
    assert message.remaining_duration.ToMilliseconds() == 6000
    assert [(source.node, source.bytes_per_second) for source in message.sources] == [("a", 100)]
    assert message.preserved == ["p1"]
    assert message.start_time.ToMilliseconds() == 2000


def test_the_rest():
    node = node_to_proto(NodeView("a", "boot", "h:1", "h:2", "0.1", ("v1", "v2"), connected=True, last_heard_ms=10))
    assert (node.reachable, node.volume_count, node.report_time.ToMilliseconds()) == (True, 2, 10)
    assert not pause_to_proto(Pause("why", None, "ops")).HasField("until_time")
    assert pause_to_proto(Pause("why", 1000, "ops")).until_time.seconds == 1
    event = event_to_proto(ClusterEvent(7, 8000, "ELECTED", "vm1", "a", "", "", "a is primary", "ops"))
    assert (event.sequence, event.type, event.message) == (7, "ELECTED", "a is primary")
    pruned = pruned_to_proto(Pruned((("a", "s1", 4096),), (("a", "s2", ("tip",)),)))
    assert (pruned.dropped[0].freed_bytes, pruned.kept[0].pinned_by) == (4096, ["tip"])
    assert duration_to_proto(-5).ToMilliseconds() == 0


@pytest.mark.parametrize(("begun", "refused", "more"), [
    (3, 2, ""), (6_000, 1_000, ""), (7_000, 12_000, "0 more resyncs"), (20_000, 9, "9 more refusals")
])  # fmt: skip
def test_what_was_begun_is_told_in_one_message_however_much_it_is(begun, refused, more):
    resyncs = tuple(
        replace(RESYNC, id=str(uuid.UUID(int=at)), volume=f"v{at:05d}", node="n0001") for at in range(begun)
    )
    why = Refusal(("NODE_OFFLINE",), "n0002 has not been heard of for 3 minutes", next_command="resilver nodes")
    refusals = tuple(VolumeRefusal(f"v{at:05d}", why, "n0002") for at in range(refused))
    told = started_to_proto(ResyncsStarted(resyncs, refusals))
    assert told.ByteSize() < 1 << 20
    assert [one.id for one in told.resyncs] == [one.id for one in resyncs[: len(told.resyncs)]]
    assert {(one.volume, one.node, one.state) for one in told.resyncs[:1]} == {("v00000", "n0001", 1)}
    assert told.resyncs[0].HasField("plan") == (begun < 1000)
    if more:
        assert told.refusals[-1].refusal.reasons == ["TOO_LARGE"]
        assert more in told.refusals[-1].refusal.message
        counted = re.findall(r"\d+", told.refusals[-1].refusal.message)
        assert (len(told.resyncs) + int(counted[0]), len(told.refusals) - 1 + int(counted[1])) == (begun, refused)
    else:
        assert (len(told.resyncs), len(told.refusals)) == (begun, refused)


def test_nobody_is_shown_a_ticket():
    told = resync_to_proto(replace(RESYNC, ticket="5ec2e7"))
    assert b"5ec2e7" not in told.SerializeToString()
