"""Consistency points, lineages and their order: tables by hand, laws by Hypothesis."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilver.lineage import (
    NO_CP,
    BaseGone,
    ConsistencyPoint,
    Lineage,
    NothingInCommon,
    Origin,
    Relation,
    Snapshot,
    newest_in_common,
    newest_shared,
    relate,
)

LAW = settings(deadline=None)


def chain(*ids: str, pruned: str = "") -> Lineage:
    """Oldest first; the ids in `pruned` have lost their data."""
    records = []
    parent = ""
    for number, one in enumerate(ids, start=1):
        records.append(Snapshot(one, ConsistencyPoint(1, number), parent, one not in pruned.split()))
        parent = one
    return Lineage(tuple(reversed(records)))


@st.composite
def forests(draw: st.DrawFn) -> dict[str, Snapshot]:
    known: dict[str, Snapshot] = {}
    for index in range(draw(st.integers(1, 10))):
        parent = draw(st.sampled_from(["", *sorted(known)]))
        cp = ConsistencyPoint(1, known[parent].cp.sequence + 1 if parent else 1)
        known[f"s{index}"] = Snapshot(f"s{index}", cp, parent)
    return known


@st.composite
def three(draw: st.DrawFn) -> tuple[Lineage, Lineage, Lineage]:
    """Three lineages of one world, pruned here and there."""
    known = draw(forests())
    made = []
    for _ in range(3):
        full = Lineage.from_tip(draw(st.sampled_from(["", *sorted(known)])), known)
        made.append(full.with_presence({record.id for record in full if draw(st.booleans())}))
    return made[0], made[1], made[2]


class TestConsistencyPoint:
    def test_is_written_epoch_sequence_and_read_back(self) -> None:
        assert str(ConsistencyPoint(3, 42)) == "3-42"
        assert ConsistencyPoint.parse("3-42") == ConsistencyPoint(3, 42)
        assert str(NO_CP) == "0-0"

    @LAW
    @given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
    def test_every_one_survives_the_round_trip(self, epoch: int, sequence: int) -> None:
        cp = ConsistencyPoint(epoch, sequence)
        assert ConsistencyPoint.parse(str(cp)) == cp

    @pytest.mark.parametrize(
        "text", ["", "3", "3-", "-42", "3-42-1", "03-1", "3-01", "a-1", " 3-4", "3-4\n", "٣-٤", "3--4"]
    )
    def test_anything_else_is_refused_with_a_sentence(self, text: str) -> None:
        with pytest.raises(ValueError, match="is no consistency point"):
            ConsistencyPoint.parse(text)

    def test_the_epoch_goes_before_the_sequence(self) -> None:
        assert ConsistencyPoint(2, 1) > ConsistencyPoint(1, 99)


class TestLineage:
    def test_records_must_form_a_chain(self) -> None:
        with pytest.raises(ValueError, match="names x as its parent"):
            Lineage((Snapshot("b", parent="x"), Snapshot("a")))

    def test_an_id_stands_once(self) -> None:
        with pytest.raises(ValueError, match="twice"):
            Lineage((Snapshot("a", parent="a"), Snapshot("a")))

    def test_from_tip_walks_as_far_as_records_are_known(self) -> None:
        known = {"c": Snapshot("c", parent="b"), "b": Snapshot("b", parent="a")}
        assert [record.id for record in Lineage.from_tip("c", known)] == ["c", "b"]
        assert Lineage.from_tip("x", known) == Lineage()

    def test_a_circle_of_parents_is_refused(self) -> None:
        known = {"a": Snapshot("a", parent="b"), "b": Snapshot("b", parent="a")}
        with pytest.raises(ValueError, match="circle"):
            Lineage.from_tip("a", known)

    def test_after_and_since(self) -> None:
        line = chain("a", "b", "c")
        assert [record.id for record in line.after("a")] == ["c", "b"]
        assert line.after("x") == line.records
        assert [record.id for record in line.since("b")] == ["b", "a"]
        assert line.since("x") == Lineage()
        assert line.cp == ConsistencyPoint(1, 3)
        assert Lineage().tip_id == ""


class TestRelation:
    @pytest.mark.parametrize(
        ("mine", "theirs", "relation"),
        [
            (chain(), chain(), Relation.EQUAL),
            (chain(), chain("a"), Relation.BEHIND),
            (chain("a"), chain(), Relation.AHEAD),
            (chain("a", "b"), chain("a", "b"), Relation.EQUAL),
            (chain("a"), chain("a", "b"), Relation.BEHIND),
            (chain("a", "b", "c"), chain("a"), Relation.AHEAD),
            (chain("a", "b"), chain("a", "x", "y"), Relation.DIVERGED),
            (chain("a", "b"), chain("x", "y"), Relation.UNRELATED),
        ],
    )
    def test_table(self, mine: Lineage, theirs: Lineage, relation: Relation) -> None:
        assert relate(mine, theirs) is relation

    def test_pruning_changes_no_relation(self) -> None:
        assert relate(chain("a", "b", pruned="a"), chain("a", "x", pruned="a")) is Relation.DIVERGED

    @LAW
    @given(three())
    def test_containment_is_a_partial_order(self, lines: tuple[Lineage, Lineage, Lineage]) -> None:
        one, two, other = lines
        assert one.contains(one)
        if one.contains(two) and two.contains(one):
            assert one.tip_id == two.tip_id
            assert one.ids() == two.ids()
        if one.contains(two) and two.contains(other):
            assert one.contains(other)

    @LAW
    @given(three())
    def test_a_relation_is_decided_for_every_pair_and_turns_round(
        self, lines: tuple[Lineage, Lineage, Lineage]
    ) -> None:
        one, two, _ = lines
        mirrored = {Relation.BEHIND: Relation.AHEAD, Relation.AHEAD: Relation.BEHIND}
        there = relate(one, two)
        assert relate(two, one) is mirrored.get(there, there)

    @LAW
    @given(three())
    def test_the_fork_is_the_same_from_both_sides(self, lines: tuple[Lineage, Lineage, Lineage]) -> None:
        one, two, _ = lines
        mine, theirs = newest_shared(one, two), newest_shared(two, one)
        assert (mine and mine.id) == (theirs and theirs.id)
        if mine is not None:
            assert not {record.id for record in one.after(mine.id)} & two.ids()


class TestNewestInCommon:
    def test_the_newest_that_both_still_have(self) -> None:
        found = newest_in_common(chain("a", "b", "c", pruned="c"), chain("a", "b", "c", "d"))
        assert isinstance(found, Snapshot)
        assert found.id == "b"

    def test_nothing_in_common_carries_both_lists(self) -> None:
        mine, theirs = chain("a"), chain("x", "y")
        assert newest_in_common(mine, theirs) == NothingInCommon(mine, theirs)
        assert str(NothingInCommon(mine, theirs)) == "no snapshot in common: 1-1 here, 1-2, 1-1 there"

    def test_a_base_that_is_gone_carries_both_lists_and_the_fork(self) -> None:
        mine, theirs = chain("a", "b", pruned="a"), chain("a", "x", pruned="a")
        found = newest_in_common(mine, theirs)
        assert isinstance(found, BaseGone)
        assert found.newest_shared.id == "a"
        assert "1-2 here, 1-2 there" in str(found)

    @LAW
    @given(three())
    def test_the_base_is_in_both_and_nothing_newer_is(self, lines: tuple[Lineage, Lineage, Lineage]) -> None:
        mine, theirs, _ = lines
        both = {record.id for record in mine if record.present} & {record.id for record in theirs if record.present}
        match newest_in_common(mine, theirs):
            case Snapshot(id=base):
                assert base in both
                assert not both & {record.id for record in mine.after(base)}
                assert not both & {record.id for record in theirs.after(base)}
            case BaseGone(newest_shared=fork):
                assert not both
                assert fork.id in mine.ids() & theirs.ids()
            case NothingInCommon():
                assert not mine.ids() & theirs.ids()

    @LAW
    @given(three())
    def test_it_is_the_same_from_both_sides(self, lines: tuple[Lineage, Lineage, Lineage]) -> None:
        mine, theirs, _ = lines
        here, there = newest_in_common(mine, theirs), newest_in_common(theirs, mine)
        assert type(here) is type(there)
        if isinstance(here, Snapshot) and isinstance(there, Snapshot):
            assert here.id == there.id


class TestAdopted:
    """Snapshots of other tools: no CP, and parents that are each node's own."""

    def test_two_that_hold_different_ones_of_one_history_are_ordered_by_their_tips(self) -> None:
        assert relate(adopted("1", "3"), adopted("2", "3", "4")) is Relation.BEHIND
        assert relate(adopted("2", "3", "4"), adopted("1", "3")) is Relation.AHEAD
        assert relate(adopted("1", "3"), adopted("2", "3")) is Relation.EQUAL
        assert relate(adopted("1", "3"), adopted("1", "2")) is Relation.DIVERGED

    def test_where_they_disagree_about_the_order_neither_is_the_newer(self) -> None:
        mine, theirs = adopted("1", "2", "3"), adopted("1", "3", "2")
        assert relate(mine, theirs) is relate(theirs, mine) is Relation.DIVERGED

    def test_they_are_called_by_the_name_that_they_have(self) -> None:
        lineage = adopted("1", "2")
        assert (lineage.tip_name, Lineage().tip_name) == ("daily-2", "none")
        assert Snapshot("77").name == "77"
        assert Snapshot("s1", ConsistencyPoint(3, 1), note="before the upgrade").name == "3-1"
        gone = newest_in_common(adopted("1").with_presence(()), lineage)
        assert "daily-1, but its data" in str(gone)
        assert "nothing here, daily-2, daily-1 there" in str(gone)


def adopted(*ids: str) -> Lineage:
    """Oldest first, each with the one before it on this node as its parent."""
    made = chain(*ids).records
    return Lineage(tuple(replace(one, cp=NO_CP, origin=Origin.ADOPTED, note=f"daily-{one.id}") for one in made))
