"""The commit: what is replaced and what is kept, compared and set, refused and done again."""

from __future__ import annotations

import uuid

import pytest

from resilver.errors import Invalid, NotFound, Refused
from resilver.lineage import NO_CP, Lineage
from resilver.volume import LiveState
from tests.agent.backends.adapter import SIZE
from tests.agent.backends.conformance.cases import SCENARIOS, Case
from tests.agent.backends.transfer import open_stage

ALLOWANCES = {"diverged": "replace_own_data", "back": "replace_own_data", "unrelated": "replace_unrelated"}
REASONS = {"diverged": "TARGET_CHANGED", "back": "TARGET_CHANGED", "unrelated": "REPLICA_UNRELATED"}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_commit(place, scenario):
    """The target is at its goal, what was its own is kept, and doing it again is done."""
    case = Case(place, scenario)
    kept = case.commit()
    case.check_done()
    assert set(case.target.preserved) == set(kept)
    assert {("live" if copy.live else copy.based_on) for copy in kept} == set(case.own)
    again = case.commit()
    assert set(again) == (set(kept) if scenario != "cleaned" else set()), "asked again, it tells what it preserved"
    case.check_done()
    case.target.again().backend.recover()
    case.check_done()


@pytest.mark.parametrize("scenario", ALLOWANCES)
def test_own_data_is_replaced_only_by_leave(place, scenario):
    case = Case(place, scenario)
    with pytest.raises(Refused) as refused:
        case.commit(**{ALLOWANCES[scenario]: False})
    assert refused.value.reason == REASONS[scenario]
    assert case.target.contents() == case.old
    assert case.target.lineage == case.before
    assert case.target.preserved == ()
    case.commit()
    case.check_done()


def test_what_a_preserved_copy_tells(place, kind):
    case = Case(place, "written")
    (kept,) = case.commit()
    base = case.before.tip
    assert (kept.live, kept.based_on, kept.cp, kept.resync_id) == (True, base.id, base.cp, "r1")
    assert kept.size_bytes == (SIZE if kind.shape == "blocks" else kept.size_bytes)
    assert kept.create_time_ms > 1_600_000_000_000
    assert kept.path
    assert case.target.again().preserved == (kept,)


def test_a_preserved_copy_goes_out_and_away(place):
    case = Case(place, "diverged")
    for copy in case.commit():
        path = case.target.export_path(copy.id)
        for writable in (False, True):
            out = path.with_name(f"{path.name}-{writable}")
            assert case.target.backend.export(copy.id, out, writable=writable) >= 0
            assert case.target.exported(out) == case.own["live" if copy.live else copy.based_on]
            with pytest.raises(Invalid, match="already"):
                case.target.backend.export(copy.id, out, writable=writable)
        assert case.target.backend.drop(copy.id) >= 0
        assert copy not in case.target.preserved
        assert case.target.contents(copy) is None
        with pytest.raises(NotFound):
            case.target.backend.drop(copy.id)
    case.own.clear()
    case.check_done()


def test_it_goes_on_as_a_replica_like_any_other(place):
    for number, scenario in enumerate(("diverged", "back", "unrelated")):
        case = Case(place, scenario, f"vm{number}")
        case.commit()
        if scenario == "back":
            case.source.change(60)
            tip = case.source.tip.id
        else:
            tip = case.source.tip.id
            case.source.change(61)
        case.source.snapshot(epoch=3)
        assert case.target.receive(case.source, tip) == ()
        assert case.target.contents() == case.source.contents()
        kept = {("live" if copy.live else copy.based_on): case.target.contents(copy) for copy in case.target.preserved}
        assert kept == case.own
        # And it can be the primary: the delta goes the other way.
        base = case.target.tip.id
        case.target.change(62)
        case.target.snapshot(epoch=4)
        case.source.receive(case.target, base)
        assert case.source.contents() == case.target.contents()


def test_commit_compares_and_sets(place):
    case = Case(place, "stale")
    with pytest.raises(Refused) as refused:
        case.commit(expected_tip="another")
    assert refused.value.reason == "TARGET_CHANGED"
    assert case.target.contents() == case.old
    case.commit()
    assert case.commit(expected_tip="the one before") == ()
    case.check_done()


def test_a_snapshot_that_came_meanwhile(place):
    """The target took a CP after the stage was filled: the order is of another tip."""
    case = Case(place, "stale")
    case.target.edit(5)
    mine = case.target.snapshot()
    was = case.target.contents()
    with pytest.raises(Refused) as refused:
        case.commit()
    assert refused.value.reason == "TARGET_CHANGED"
    assert case.target.lineage.tip_id == mine.id
    assert case.target.contents() == was


def test_wrong_stage_is_refused(replica, other):
    replica.create()
    first = replica.snapshot()
    replica.change(1)
    replica.snapshot()
    stage = other.fill(replica, "", first)
    with pytest.raises(Invalid):
        other.backend.commit(stage, other.order(replica.lineage))
    with pytest.raises(Invalid):
        other.backend.commit(stage, other.order(Lineage()))
    assert other.contents() is None
    assert not other.lineage.records


def test_a_removed_live_copy_is_restored(replica, kind):
    if not kind.outlives_live:
        pytest.skip("its snapshots go with it, so that a copy of another node is what restores it")
    replica.create()
    taken = replica.snapshot()
    before = replica.contents()
    replica.remove_live()
    stage = open_stage(replica, replica, taken.id, taken)
    assert replica.backend.commit(stage, replica.order(replica.lineage)) == ()
    assert replica.contents() == before
    assert replica.state is LiveState.UNMODIFIED
    assert replica.debris() == []


def test_data_without_any_snapshot(replica, other):
    """A live copy that was never mirrored: replaced by leave only, and kept."""
    replica.create()
    tip = replica.snapshot()
    other.create(99)
    mine = other.contents()
    stage = other.fill(replica, "", tip)
    with pytest.raises(Refused) as refused:
        other.backend.commit(stage, other.order(replica.lineage))
    assert refused.value.reason == "REPLICA_UNRELATED"
    assert other.contents() == mine
    (kept,) = other.backend.commit(stage, other.order(replica.lineage, replace_unrelated=True))
    assert (kept.live, kept.based_on, kept.cp) == (True, "", NO_CP)
    assert other.contents(kept) == mine
    assert other.contents() == replica.contents()


def test_another_volume(replica, other):
    replica.create()
    tip = replica.snapshot()
    other.create(99)
    other.volume_id = "another"
    other.snapshot()
    mine = other.contents()
    other = other.again()
    other.volume_id = replica.volume_id
    stage = other.fill(replica, "", tip)
    with pytest.raises(Refused) as refused:
        other.backend.commit(stage, other.order(replica.lineage, replace_own_data=True))
    assert refused.value.reason == "REPLICA_FOREIGN"
    assert other.contents() == mine
    kept = other.backend.commit(stage, other.order(replica.lineage, replace_unrelated=True))
    assert [copy.live for copy in kept] == [False], "the live copy was that snapshot"
    assert other.contents(kept[0]) == mine
    assert other.contents() == replica.contents()
    assert other.backend.examine().volume_id == replica.volume_id


def test_preserved_copies_are_bounded(place):
    source, target = place.replica("a"), place.replica("b", preserved_max_count=1)
    source.create()
    source.snapshot()
    target.receive(source)
    for turn in range(2):
        target.edit(turn)
        source.edit(turn + 8)
        base = source.tip.id
        stage = target.fill(source, base, source.snapshot())
        if turn == 0:
            target.backend.commit(stage, target.order(source.lineage))
            continue
        mine = target.contents()
        with pytest.raises(Refused) as refused:
            target.backend.commit(stage, target.order(source.lineage))
        assert refused.value.reason == "PRESERVED_FULL"
        assert target.contents() == mine
        assert len(target.preserved) == 1
        target.backend.drop(target.preserved[0].id)
        target.backend.commit(stage, target.order(source.lineage))
        assert target.contents() == source.contents()
    assert len(target.lineage) == 3


def test_export_of_a_snapshot(replica):
    replica.create()
    taken = replica.snapshot()
    before = replica.contents()
    replica.change(1)
    out = replica.export_path("out")
    replica.backend.export(taken.id, out, writable=False)
    assert replica.exported(out) == before
    with pytest.raises(NotFound):
        replica.backend.export(str(uuid.uuid4()), replica.export_path("out2"), writable=False)
    with pytest.raises(Invalid):
        replica.backend.export(taken.id, replica.export_path("no") / "such" / "place", writable=False)
    assert replica.contents(taken.id) == before
