"""Consistency points are taken and travel: first copies, deltas, and what has to be preserved."""

from __future__ import annotations

from resilver.volume import LiveState, Presence
from tests.agent.backends.zfs.replica import Replica, equal


def same(one: Replica, other: Replica) -> None:
    assert equal(one, other)
    assert [record.id for record in one.lineage] == [record.id for record in other.lineage]
    for each in (one, other):
        assert each.state is LiveState.UNMODIFIED
        assert each.backend.examine().problems == ()


def test_first_copy_and_deltas(replica, other):
    assert other.backend.examine().presence is Presence.EMPTY
    replica.create()
    assert replica.state is LiveState.MODIFIED
    base = replica.snapshot(note="first №")
    assert replica.state is LiveState.UNMODIFIED
    assert other.receive(replica) == ()
    same(replica, other)
    assert other.tip == base
    for turn in range(4):
        replica.write(turn)
        assert replica.state is LiveState.MODIFIED
        taken = replica.snapshot()
        assert other.receive(replica, base.id) == ()
        same(replica, other)
        base = taken
    again = other.again()
    again.backend.recover()
    same(replica, again)
    assert [record.present for record in again.lineage] == [True] * 5


def test_diverged(replica, other):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    replica.write(1)
    replica.snapshot()
    other.write(2)
    mine = other.snapshot(epoch=1)
    other.write(3)
    copies = other.receive(replica, base.id, replace_own_data=True)
    same(replica, other)
    assert [(copy.live, copy.based_on) for copy in copies] == [(False, mine.id), (True, mine.id)]
    assert set(other.backend.examine().preserved) == set(copies)
