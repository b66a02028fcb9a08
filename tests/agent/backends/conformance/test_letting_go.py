"""Pruning and dropping: the data goes, the record stays, and what is needed is refused."""

from __future__ import annotations

import pytest

from resilver.errors import NotFound, Refused, ResilverError
from resilver.volume import LiveState


def test_prune(replica):
    replica.create()
    taken = []
    for turn in range(5):
        replica.edit(16 * turn)
        taken.append(replica.snapshot())
    contents = {record.id: replica.contents(record.id) for record in taken}
    dropped = replica.backend.prune(2, frozenset({taken[0].id}))
    assert {gone for gone, _ in dropped} == {taken[1].id, taken[2].id}
    assert all(freed >= 0 for _, freed in dropped)
    assert replica.kind.shape != "blocks" or all(freed > 0 for _, freed in dropped)
    lineage = replica.lineage
    assert [record.present for record in lineage] == [True, True, False, False, True]
    assert lineage.ids() == {record.id for record in taken}
    for record in lineage:
        assert replica.contents(record.id) == (contents[record.id] if record.present else None)
    assert replica.backend.prune(0, frozenset()) != ()
    assert [record.present for record in replica.again().lineage] == [True, False, False, False, False]
    assert replica.state is LiveState.UNMODIFIED
    with pytest.raises(Refused) as refused:
        replica.backend.drop(taken[-1].id)
    assert refused.value.reason == "PINNED"
    assert replica.backend.drop(taken[0].id) == 0
    with pytest.raises(NotFound):
        replica.backend.drop("unknown")
    assert replica.contents(taken[-1].id) == contents[taken[-1].id]
    assert replica.debris() == []


def test_what_was_dropped_is_no_base(replica, other):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    replica.change(1)
    tip = replica.snapshot()
    replica.backend.drop(base.id)
    with pytest.raises(ResilverError) as gone:
        other.fill(replica, base.id, tip)
    assert gone.value.reason == "BASE_GONE"
    other.backend.discard_stage()
    other.receive(replica, "")
    assert other.contents() == replica.contents()
    stays = other.kind.stands_alone
    assert [record.present for record in other.lineage] == [True, stays], "what the target has is its own affair"


def test_prune_and_receive_go_together(replica, other):
    """Pruned bases and exchanged live copies: the lineage and the contents stay right over many rounds."""
    replica.create()
    base = ""
    for turn in range(6):
        replica.change(turn)
        tip = replica.snapshot()
        other.receive(replica, base)
        base = tip.id
        for each in (replica, other):
            each.backend.prune(2, frozenset())
            assert sum(record.present for record in each.lineage) <= 2
        assert other.contents() == other.contents(tip.id) == replica.contents()
        assert other.debris() == []
    assert other.preserved == ()
    assert len(other.lineage) == 6
    again = other.again()
    again.backend.recover()
    assert again.contents() == replica.contents()
    assert len(again.traces()) <= len(other.traces())


def test_the_preserved_are_not_pruned(replica, other):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    other.edit(1)
    mine = other.contents()
    replica.change(2)
    replica.snapshot()
    (kept,) = other.receive(replica, base.id)
    pruned = other.backend.prune(1, frozenset())
    assert bool(pruned) is other.kind.stands_alone
    assert other.preserved == (kept,)
    assert other.contents(kept) == mine
    assert other.contents() == replica.contents()
    if not pruned:
        other.backend.drop(kept.id)
        assert [one for one, _freed in other.backend.prune(1, frozenset())] == [base.id]
        assert other.contents() == replica.contents()
