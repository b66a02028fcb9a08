"""What a screen shows of a volume: the figures behind each word, and nothing that nobody knows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator import views
from coordinator.core.cluster import NodeView, Pause, Size
from coordinator.core.events import GiveOrder, OrderAnswered, ReplicaReported
from coordinator.core.orders import PrepareSend
from resilver.lineage import ConsistencyPoint, Origin, Snapshot
from resilver.v1 import volume_pb2 as pb
from resilver.volume import LiveState, Presence, PreservedCopy
from tests.coordinator.known import MINUTE_MS, NOW_MS, Known, entry, granted, report, snapshot

VM1 = entry("vm1", "a", "abc", "3-42")
COPY = PreservedCopy("p1", "/srv/p1", "s3-39", ConsistencyPoint(3, 39), True, NOW_MS, 1 << 30, 4096, "r1")


def three() -> Known:
    """a is primary at 3-42, b stale at 3-40, c diverged from 3-39 with two CPs of its own and a preserved copy."""
    known = Known([VM1])
    known.hear("a", report("vm1", "-3-38 3-39 3-40 3-41 3-42", LiveState.MODIFIED, **granted(VM1)))
    known.hear("b", report("vm1", "3-39 3-40"))
    known.hear("c", report("vm1", "3-39 2-40 2-41", LiveState.MODIFIED, preserved=[COPY]))
    return known


def volume(known: Known, name: str = "vm1", *, full: bool = False) -> pb.Volume:
    return views.volume_to_proto(known.engine, known.engine.view(name), NOW_MS, full=full)


def replica(known: Known, node: str, **options) -> pb.Replica:
    return next(one for one in volume(known, **options).replicas if one.node == node)


def test_a_volume_shows_its_record():
    message = volume(three())
    assert (message.name, message.epoch, message.epoch_id, message.primary) == ("vm1", 3, "eid3", "a")
    assert (message.newest_cp.text, message.newest_id) == ("3-42", "s3-42")
    assert message.newest_cp_time.ToMilliseconds() == snapshot("3-42").create_time_ms
    assert message.state == pb.VOLUME_STATE_DEGRADED
    assert [one.node for one in message.replicas] == ["a", "b", "c"]
    assert not message.HasField("pause")


def test_the_primary_lacks_nothing():
    one = replica(three(), "a")
    assert (one.role, one.state) == (pb.REPLICA_ROLE_PRIMARY, pb.REPLICA_STATE_IN_SYNC)
    assert (one.behind_cps, one.own_cps, one.out_of_sync_bytes) == (0, 0, 0)
    assert one.HasField("behind_cps")
    assert not one.HasField("behind_duration")
    assert one.live.state == pb.LIVE_STATE_MODIFIED
    assert not one.lineage


def test_a_stale_replica_tells_what_it_lacks_and_since_when():
    one = replica(three(), "b")
    assert one.state == pb.REPLICA_STATE_STALE
    assert (one.cp.text, one.common_cp.text, one.common) == ("3-40", "3-40", "s3-40")
    assert (one.behind_cps, one.own_cps) == (2, 0)
    # The age of 3-41, the first that it lacks, and not of 3-42.
    assert one.behind_duration.ToMilliseconds() == (1000 - 41) * MINUTE_MS
    assert not one.HasField("out_of_sync_bytes")


def test_a_diverged_replica_tells_its_own_and_what_was_preserved():
    one = replica(three(), "c")
    assert one.state == pb.REPLICA_STATE_DIVERGED
    assert (one.common_cp.text, one.behind_cps, one.own_cps) == ("3-39", 3, 2)
    assert (one.preserved_count, one.preserved_bytes) == (1, 4096)
    assert one.problems
    assert one.problems[0].next_command


def test_the_size_appears_once_a_source_has_worked_it_out():
    known = Known([VM1])
    known.hear("a", report("vm1", "3-40 3-41 3-42", **granted(VM1)))
    known.connect("b", "vm1")
    seen = known.engine.step(ReplicaReported("stream-b", 99, report("vm1", "3-40")), NOW_MS)
    asked = [one for one in seen if isinstance(one, GiveOrder) and isinstance(one.order, PrepareSend)]
    assert asked, "the engine asks a source for the size"
    known.engine.step(OrderAnswered(asked[0].order_id, Size(4096, 1, 1 << 30)), NOW_MS)
    assert replica(known, "b").out_of_sync_bytes == 4096


def test_a_replica_that_is_away_shows_the_last_that_was_known():
    known = three()
    known.disconnect("b")
    one = replica(known, "b")
    assert not one.reachable
    assert one.state == pb.REPLICA_STATE_UNKNOWN
    assert (one.cp.text, one.behind_cps) == ("3-40", 2)
    assert one.report_time.ToMilliseconds() == NOW_MS


def test_a_member_that_was_never_heard_of_has_no_figures():
    one = replica(Known([VM1]), "b")
    assert (one.state, one.member, one.reachable) == (pb.REPLICA_STATE_UNKNOWN, True, False)
    for name in ("report_time", "behind_cps", "own_cps", "out_of_sync_bytes", "behind_duration", "live"):
        assert not one.HasField(name), name


def test_a_newcomer_is_no_member():
    known = three()
    known.hear("d", report("vm1", "", LiveState.ABSENT, presence=Presence.EMPTY))
    one = replica(known, "d")
    assert (one.role, one.state, one.member) == (pb.REPLICA_ROLE_NEWCOMER, pb.REPLICA_STATE_EMPTY, False)


def test_the_full_view_has_lineages_and_says_what_is_pruned():
    one = replica(three(), "a", full=True)
    assert [(record.id, record.present) for record in one.lineage] == [
        ("s3-42", True),
        ("s3-41", True),
        ("s3-40", True),
        ("s3-39", True),
        ("s3-38", False),
    ]


def test_a_first_sight_has_no_record():
    known = Known()
    known.hear("a", report("db1", "", LiveState.MODIFIED, volume_id=""))
    message = volume(known, "db1")
    assert (message.state, message.epoch, message.primary) == (pb.VOLUME_STATE_UNINITIALIZED, 0, "")
    assert not message.HasField("newest_cp_time")


def test_the_etag_changes_with_what_decisions_depend_on_and_with_nothing_else():
    def etag(known: Known) -> str:
        return volume(known).etag

    same, known = three(), three()
    assert etag(same) == etag(known)
    known.hear("b", replace(report("vm1", "3-39 3-40"), free_bytes=1, examine_time_ms=5))
    assert etag(known) == etag(same)
    for change in (
        lambda known: known.disconnect("b"),
        lambda known: known.hear("b", report("vm1", "3-39 3-40 3-41")),
        lambda known: known.hear("b", report("vm1", "3-39 3-40", LiveState.MODIFIED)),
    ):
        known = three()
        change(known)
        assert etag(known) != etag(same)
    paused = Known([replace(VM1, pause=Pause("why", None, "ops"))])
    assert etag(paused) != etag(Known([VM1]))
    assert volume(paused).pause.reason == "why"


def test_a_large_volume_fits_one_message():
    known = Known([VM1])
    long = "y" * 2000
    history = " ".join(f"3-{sequence}" for sequence in range(1, 1500))
    for number in range(12):
        told = report("vm1", history)
        known.hear(f"n{number}", replace(told, live=replace(told.live, in_use_by=(long,) * 16), problems=(long,) * 32))
    message = volume(known, full=True)
    assert message.ByteSize() < views.VOLUME_BYTES_MAX
    assert len(message.replicas) == 15
    assert all(one.lineage[0].cp.text == "3-1499" for one in message.replicas if one.lineage)
    assert any(one.lineage for one in message.replicas)


def test_snapshots_are_merged_over_nodes_newest_first():
    known = three()
    held = views.held_snapshots(known.engine.view("vm1"))
    assert [one.snapshot.id for one in held] == ["s3-42", "s3-41", "s3-40", "s3-39", "s2-41", "s2-40"]
    assert [one.nodes for one in held] == [["a"], ["a"], ["a", "b"], ["a", "b", "c"], ["c"], ["c"]]
    assert [one.snapshot.id for one in views.held_snapshots(known.engine.view("vm1"), "b")] == ["s3-40", "s3-39"]
    message = views.snapshot_to_view(known.engine, held[0])
    assert (message.volume, message.copies[0].node) == ("vm1", "a")
    assert "tip" in list(message.copies[0].pinned_by)


def test_another_tools_snapshots_are_listed_with_who_has_them_beside_the_lineage():
    known = three()
    mine = Snapshot("77", create_time_ms=NOW_MS, origin=Origin.ADOPTED, note="autosnap_daily")
    shared = replace(snapshot("3-40"), origin=Origin.ADOPTED)
    known.hear("c", replace(known.engine.view("vm1").replica("c").report, others=(mine, shared)))
    held = {one.snapshot.id: one for one in views.held_snapshots(known.engine.view("vm1"))}
    message = views.snapshot_to_view(known.engine, held["77"])
    assert (message.note, [(copy.node, copy.off_lineage) for copy in message.copies]) == (
        "autosnap_daily",
        [("c", True)],
    )
    assert message.origin == pb.ORIGIN_ADOPTED
    assert list(message.copies[0].pinned_by) == ["another tool's"]
    message = views.snapshot_to_view(known.engine, held["s3-40"])
    assert [(copy.node, copy.off_lineage) for copy in message.copies] == [("a", False), ("b", False), ("c", True)]
    assert [one.snapshot.id for one in views.held_snapshots(known.engine.view("vm1"), "b")] == ["s3-40", "s3-39"]


def test_preserved_copies_say_whose_they_are():
    view = three().engine.view("vm1")
    (found,) = views.preserved_copies(view)
    message = found.to_proto()
    assert (message.id, message.volume, message.node, message.cp.text) == ("p1", "vm1", "c", "3-39")
    assert views.preserved_copies(view, "a") == []
    assert views.holders(view, "p1") == ("c",)
    assert views.holders(view, "s3-40") == ("a", "b")
    assert views.holders(view, "s3-38") == ()


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (NodeView("a", connected=True), ""),
        (NodeView("a", connected=True, duplicate=True), "DUPLICATE_NODE"),
        (NodeView("a", last_heard_ms=NOW_MS - MINUTE_MS), "NODE_OFFLINE"),
        (NodeView("a"), "NODE_OFFLINE"),
    ],
)
def test_what_is_wrong_with_a_node(node, reason):
    found = views.problems_of_node(node, NOW_MS)
    assert [problem.reason for problem in found] == ([reason] if reason else [])
