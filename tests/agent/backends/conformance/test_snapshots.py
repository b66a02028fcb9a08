"""Taking consistency points."""

from __future__ import annotations

import dataclasses

import pytest

from agent.backends.base import NewSnapshot
from resilver.errors import Invalid, Refused
from resilver.lineage import Consistency, ConsistencyPoint
from resilver.volume import LiveState
from tests.agent.backends.adapter import SIZE, VOLUME_ID

FIRST = NewSnapshot("s1", VOLUME_ID, ConsistencyPoint(1, 1), "", "e", 5)


def test_snapshot(replica, kind):
    replica.create()
    before = replica.contents()
    taken = replica.snapshot(note="first")
    assert (taken.note, taken.epoch_id, taken.create_time_ms, taken.present) == ("first", "e", 1, True)
    assert taken.size_bytes == (SIZE if kind.shape == "blocks" else 0)
    found = replica.backend.examine()
    assert found.lineage.records == (taken,)
    assert found.volume_id == VOLUME_ID
    assert (found.live.state, found.live.based_on) == (LiveState.UNMODIFIED, taken.id)
    assert replica.contents() == before
    replica.change(1)
    assert replica.contents() != before
    assert replica.contents(taken.id) == before, "a snapshot never changes"
    assert replica.state is LiveState.MODIFIED
    cheap = replica.backend.examine(compare_live=False).live.state
    assert cheap in {LiveState.UNKNOWN, LiveState.MODIFIED}
    assert replica.debris() == []


def test_a_chain_of_snapshots(replica):
    """Each has what there was when it was taken, also for an agent that has been started since."""
    replica.create()
    contents = {}
    for seed in range(4):
        replica.change(seed)
        contents[replica.snapshot().id] = replica.contents()
    again = replica.again()
    again.backend.recover()
    assert again.lineage == replica.lineage
    assert [record.cp.sequence for record in again.lineage] == [4, 3, 2, 1]
    assert {record.id: again.contents(record.id) for record in again.lineage} == contents


@pytest.mark.parametrize("seed", range(3))
def test_the_smallest_change_is_found(replica, seed):
    replica.create()
    replica.change(seed)
    replica.snapshot()
    assert replica.state is LiveState.UNMODIFIED
    replica.edit(seed)
    assert replica.state is LiveState.MODIFIED
    replica.snapshot()
    assert replica.state is LiveState.UNMODIFIED


def test_an_unmodified_live_copy_makes_a_snapshot_too(replica):
    """The opening CP of an epoch is taken whether anything was written or not."""
    replica.create()
    first = replica.snapshot()
    second = replica.snapshot(epoch=2)
    assert (second.parent, second.cp) == (first.id, ConsistencyPoint(2, 2))
    assert replica.contents(second.id) == replica.contents(first.id)
    assert replica.state is LiveState.UNMODIFIED


def test_the_same_snapshot_again_is_the_same(replica):
    replica.create()
    taken = replica.backend.take_snapshot(FIRST)
    assert replica.backend.take_snapshot(FIRST) == taken
    replica.edit(1)
    assert replica.again().backend.take_snapshot(FIRST) == taken
    assert len(replica.lineage) == 1


def test_snapshots_that_are_refused(replica):
    with pytest.raises(Refused, match="not there") as refused:
        replica.backend.take_snapshot(FIRST)
    assert refused.value.reason == "NO_DATA"
    replica.create()
    replica.backend.take_snapshot(FIRST)
    with pytest.raises(Refused) as refused:
        replica.backend.take_snapshot(NewSnapshot("s2", VOLUME_ID, ConsistencyPoint(1, 2), "other", "e", 5))
    assert refused.value.reason == "TARGET_CHANGED"
    with pytest.raises(Refused) as refused:
        replica.backend.take_snapshot(NewSnapshot("s2", "another volume", ConsistencyPoint(1, 2), "s1", "e", 5))
    assert refused.value.reason == "REPLICA_FOREIGN"
    for bad in ("../s2", "", "stage", ".s2", "a/b", "a b", "a@b", "s2\n"):
        with pytest.raises(Invalid):
            replica.backend.take_snapshot(NewSnapshot(bad, VOLUME_ID, ConsistencyPoint(1, 2), "s1", "e", 5))
    assert len(replica.lineage) == 1
    assert replica.debris() == []


def test_a_snapshot_counts_only_if_whoever_ordered_it_says_so(replica):
    replica.create()
    tip = replica.snapshot()
    before = replica.traces()
    asked = []

    def refuse(consistency: Consistency) -> Consistency:
        asked.append(replica.lineage.tip_id)
        raise Refused("HOOK_FAILED", "the deadline had passed")

    new = dataclasses.replace(replica.new_snapshot(), group_id="g1", settle=refuse)
    with pytest.raises(Refused, match="the deadline had passed"):
        replica.backend.take_snapshot(new)
    assert asked == [tip.id]
    assert replica.lineage.records == (tip,)
    assert replica.traces() == before
    made = replica.backend.take_snapshot(dataclasses.replace(new, settle=lambda _found: Consistency.FROZEN))
    assert (made.consistency, made.group_id) == (Consistency.FROZEN, "g1")
    assert replica.lineage.tip == made
    assert replica.again().lineage.tip == made


def test_snapshot_of_a_live_copy_in_use(replica, use):
    """The primary's live copy is in use nearly always: a CP is taken nevertheless, and is what was there."""
    replica.create()
    before = replica.contents()
    with use.hold(replica):
        taken = replica.snapshot()
        if use.writes:
            assert taken.consistency is not Consistency.CLOSED
            assert replica.state is not LiveState.UNMODIFIED, "somebody may write at any moment"
    assert replica.contents(taken.id) == before
    assert replica.state is LiveState.UNMODIFIED


def test_a_live_copy_that_is_gone(replica, kind):
    replica.create()
    taken = replica.snapshot()
    was = replica.contents()
    replica.remove_live()
    found = replica.backend.examine()
    assert found.live.state is LiveState.ABSENT
    assert not kind.outlives_live or found.lineage.records == (taken,)
    with pytest.raises(Refused) as refused:
        replica.snapshot()
    assert refused.value.reason == "NO_DATA"
    assert replica.contents(taken.id) == (was if kind.outlives_live else None)
