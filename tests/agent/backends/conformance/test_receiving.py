"""A replica is brought to another one's consistency point: from nothing, from a base, by way of a third one."""

from __future__ import annotations

import pytest

from resilver.errors import ResilverError
from resilver.lineage import newest_in_common
from resilver.volume import LiveState
from tests.agent.backends.transfer import open_stage, transfer


def same(*replicas) -> None:
    """Live copies, tips and lineages are the same, and nothing is left over."""
    first = replicas[0]
    for replica in replicas:
        assert replica.contents() == first.contents()
        assert replica.contents(replica.tip.id) == first.contents()
        assert replica.lineage.ids() == first.lineage.ids()
        assert [record.id for record in replica.lineage] == [record.id for record in first.lineage]
        assert replica.state is LiveState.UNMODIFIED
        assert replica.debris() == []


def reason_of(work) -> str:
    try:
        work()
    except ResilverError as error:
        return error.reason
    return ""


def test_first_copy(replica, other):
    replica.create()
    taken = replica.snapshot(note="first")
    before = replica.contents()
    assert other.receive(replica) == ()
    same(replica, other)
    assert replica.contents() == before
    assert other.lineage.records == (taken,)
    assert other.backend.examine().volume_id == replica.volume_id
    assert other.backend.examine().live.based_on == taken.id


def test_receive_again_and_again(replica, other):
    """Five consistency points, the last two in one step; live copies and lineages are the same each time."""
    replica.create()
    base = ""
    for turn in range(5):
        replica.change(turn)
        taken = replica.snapshot()
        if turn == 3:
            continue
        assert other.receive(replica, base) == ()
        base = taken.id
        same(replica, other)
    present = [record.cp.sequence for record in other.lineage if record.present]
    assert present == [5, 3, 2, 1], "4 was never here, but its record is"
    again = other.again()
    again.backend.recover()
    same(replica, again)


def test_from_one_that_has_received_it(replica, other, third):
    """What was received is sent on, and then a delta comes from the one that took it: all name it alike."""
    replica.create()
    first = replica.snapshot()
    other.receive(replica)
    third.receive(other)
    same(replica, other, third)
    replica.change(1)
    second = replica.snapshot()
    third.receive(replica, first.id)
    same(replica, third)
    other.receive(third, first.id)
    same(replica, other, third)
    replica.change(2)
    replica.snapshot()
    other.receive(replica, second.id)
    third.receive(other, second.id)
    same(replica, other, third)


def test_the_other_way_round(replica, other, third):
    """The primary changes: the one that took the base gets a delta upon it from the one that received it."""
    replica.create()
    base = replica.snapshot()
    for each in (other, third):
        each.receive(replica)
    other.change(1)
    middle = other.snapshot(epoch=2)
    assert replica.receive(other, base.id) == ()
    same(replica, other)
    third.change(2)
    (kept,) = third.receive(other, base.id)
    assert kept.live
    same(replica, other, third)
    replica.change(3)
    replica.snapshot(epoch=3)
    other.receive(replica, middle.id)
    third.receive(replica, middle.id)
    same(replica, other, third)


def test_names_with_everything_in_them(place, kind):
    one, two = place.replica("a", kind.odd_name), place.replica("b", kind.odd_name)
    one.create()
    base = one.snapshot(note="Büro № 1\n'quoted' \"twice\" $HOME; *")
    two.receive(one)
    same(one, two)
    assert two.tip.note == one.tip.note
    one.change(1)
    one.snapshot()
    two.edit(2)
    mine = two.contents()
    (kept,) = two.receive(one, base.id)
    same(one, two)
    assert two.contents(kept) == mine
    two.backend.prune(1, frozenset())
    again = two.again()
    again.backend.recover()
    assert again.contents() == one.contents()


def test_two_volumes_on_one_node_do_not_meet(place):
    one, two = place.replica("a", "vm1"), place.replica("a", "vm1.2")
    one.create(1)
    two.create(2)
    contents = one.contents(), two.contents()
    mine, theirs = one.snapshot(), two.snapshot()
    for replica in (one.again(), two.again()):
        replica.litter()
        replica.backend.recover()
    assert (one.lineage.records, two.lineage.records) == ((mine,), (theirs,))
    assert (one.contents(), two.contents()) == contents
    assert (one.contents(mine.id), two.contents(theirs.id)) == contents


def test_a_stage_changes_nothing_until_its_commit(replica, other):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    was = other.contents()
    replica.change(1)
    tip = replica.snapshot()
    stage = other.fill(replica, base.id, tip)
    found = other.backend.examine()
    assert found.lineage.tip_id == base.id
    assert found.live.state is LiveState.UNMODIFIED
    assert other.contents() == other.contents(base.id) == was
    stage.close()
    other.backend.discard_stage()
    assert other.debris() == []
    other.backend.discard_stage()
    assert (other.contents(), other.lineage.tip_id) == (was, base.id)
    other.receive(replica, base.id)
    same(replica, other)


def test_a_whole_stage_survives_a_restart(replica, other):
    """It is committed by an agent that was started since, though the source is gone for good."""
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    replica.change(1)
    tip = replica.snapshot()
    stage = other.fill(replica, base.id, tip)
    (stage.directory / "journal").write_text("where it was")
    stage.close()
    again = other.again()
    again.backend.recover()
    stage = open_stage(again, replica, base.id, tip)
    assert stage.resumed
    assert (stage.directory / "journal").read_text() == "where it was"
    if again.kind.shape == "stream":
        assert stage.complete
    assert again.backend.commit(stage, again.order(replica.lineage)) == ()
    same(replica, again)


def test_a_stage_of_another_pair_is_discarded(replica, other):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    replica.change(1)
    tip = replica.snapshot()
    stage = other.fill(replica, base.id, tip)
    (stage.directory / "journal").write_text("where it was")
    stage.close()
    stage = open_stage(other, replica, "", tip)
    assert not stage.resumed
    assert not (stage.directory / "journal").exists()
    transfer(replica, other, stage)
    other.backend.commit(stage, other.order(replica.lineage))
    same(replica, other)


def test_a_base_that_is_gone(replica, other):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    was = other.contents()
    replica.change(1)
    tip = replica.snapshot()
    other.lose(base.id)
    assert other.lineage.find(base.id).present is False
    assert newest_in_common(other.lineage, replica.lineage) is not base
    assert reason_of(lambda: other.receive(replica, base.id)) == "BASE_GONE"
    assert other.contents() == was
    other.backend.discard_stage()
    assert other.debris() == []
    other.receive(replica, "")
    assert other.contents() == replica.contents(tip.id)


def test_a_base_or_target_that_the_source_has_not(replica, other):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    replica.change(1)
    middle = replica.snapshot()
    replica.change(2)
    tip = replica.snapshot()
    replica.lose(middle.id)
    assert reason_of(lambda: transfer_map(replica, middle.id, tip)) == "BASE_GONE"
    assert reason_of(lambda: transfer_map(replica, base.id, middle)) == "TARGET_GONE"
    for unknown in ("x", "00000000-0000-4000-8000-000000000000"):
        assert reason_of(lambda unknown=unknown: transfer_map(replica, unknown, tip)) == "BASE_GONE"
    other.receive(replica, base.id)
    same(replica, other)


def transfer_map(source, base: str, target) -> None:
    """Asks the source what differs."""
    if source.kind.shape == "blocks":
        source.backend.delta_map(base, target.id)
    else:
        source.backend.delta_bytes(base, target.id)
        source.backend.open_send(base, target.id, source.backend.formats()[0]).close()


def test_a_base_that_was_written_to_is_none(replica, other):
    """As by mounting the snapshot to look into it: no sample would find it."""
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    replica.change(1)
    replica.snapshot()
    other.tamper(base.id)
    was = other.contents()
    assert reason_of(lambda: other.receive(replica, base.id)) in {"BASE_MISMATCH", "BASE_GONE"}
    assert other.contents() == was


def test_a_target_that_was_written_to_is_not_sent(replica, other):
    """Equal id means equal bytes: what is not the snapshot any more goes to nobody under its name."""
    replica.create()
    taken = replica.snapshot()
    was = replica.contents(taken.id)
    replica.edit(1)
    replica.tamper(taken.id)
    if reason_of(lambda: other.receive(replica)) == "":
        assert other.contents() == was, "the file system itself did not let it be written to"
    else:
        assert other.contents() is None


def test_reading_a_base_does_it_no_harm(replica, other):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    replica.change(1)
    replica.snapshot()
    for each in (replica, other):
        assert each.contents(base.id) is not None
    other.receive(replica, base.id)
    same(replica, other)


@pytest.mark.parametrize("seed", range(3))
def test_a_base_that_is_not_the_tip(replica, other, seed):
    """The source has pruned what they had in common since: the delta begins further back than the target is."""
    replica.create(seed)
    taken = []
    for turn in range(4):
        replica.change(10 * seed + turn)
        taken.append(replica.snapshot())
        other.receive(replica, taken[-2].id if turn else "")
    replica.change(10 * seed + 9)
    replica.snapshot()
    for gone in taken[seed + 1 :]:
        replica.backend.drop(gone.id)
    assert newest_in_common(other.lineage, replica.lineage).id == taken[seed].id
    assert other.receive(replica, taken[seed].id) == ()
    same(replica, other)
