"""Snapshots that other programs make beside ours are left alone, and stand in nobody's way."""

from __future__ import annotations

from tests.agent.backends.conformance.cases import Case


def test_looking_past_a_stranger(replica):
    replica.create()
    first = replica.snapshot()
    check = replica.stranger()
    assert replica.lineage.records == (first,)
    replica.change(1)
    second = replica.snapshot()
    assert [record.id for record in replica.lineage] == [second.id, first.id]
    assert second.parent == first.id, "a stranger's snapshot is no tip"
    replica.backend.prune(1, frozenset())
    again = replica.again()
    again.backend.recover()
    assert [record.id for record in again.lineage] == [second.id, first.id]
    assert again.preserved == ()
    check()


def test_a_stranger_on_the_source(replica, other):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    check = replica.stranger()
    replica.change(1)
    replica.snapshot()
    other.receive(replica, base.id)
    assert other.contents() == replica.contents()
    check()


def test_a_stranger_on_the_target(place):
    """Taken of its live copy by somebody's cron job: the next consistency point comes all the same."""
    for number, scenario in enumerate(("stale", "diverged")):
        case = Case(place, scenario, f"vm{number}")
        check = case.target.stranger()
        case.fill()
        case.commit()
        case.check_done()
        check()
        base = case.source.tip.id
        case.source.change(71)
        case.source.snapshot(epoch=3)
        case.target.receive(case.source, base)
        assert case.target.contents() == case.source.contents()
        check()
