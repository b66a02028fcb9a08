"""What the store forgot and reports still know; and what a gap in its memory forbids."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from coordinator.core.cluster import VolumeEntry, VolumeView
from coordinator.core.election import next_epoch, reconcile
from resilver.volume import VolumeRecord
from tests.coordinator.core.commands import elected, refused
from tests.coordinator.core.histories import VOLUME_ID, cp_of, id_of, view


class TestReconcile:
    """The store forgot, or was restored from a backup; the replicas' own records know."""

    def told(self, epoch: int, newest: str, **facts: object) -> VolumeRecord:
        members = ("a", "b", "c")
        record = VolumeRecord("vm1", VOLUME_ID, epoch, f"e{epoch}", "b", members, cp_of(newest), id_of(newest))
        return replace(record, **facts)  # type: ignore[arg-type]  # fields by name

    def seen(self, histories: str, *, forgotten: bool = False, **told: VolumeRecord | None) -> VolumeView:
        made = view(histories)
        replicas = dict(made.replicas)
        for node, record in told.items():
            one = replicas[node]
            assert one.report is not None
            replicas[node] = replace(one, report=replace(one.report, record=record))
        return replace(made, replicas=replicas, entry=None if forgotten else made.entry)

    def test_a_store_that_knows_as_much_is_right(self) -> None:
        assert reconcile(view("a: 1 2 3 | b: 1 2")) is None
        assert reconcile(self.seen("a: 1 2 | b: 1 2", b=self.told(1, "1"))) is None, "older is no news"
        assert reconcile(self.seen("a: 1 2 | b: 1 2", b=self.told(1, "3", epoch_id="other"))) is None
        assert reconcile(self.seen("a: 1 2 | b: 1 2", b=self.told(9, "3", volume_id="W"))) is None
        assert reconcile(view("a: 1 2 3 | b: 1", newest="2")) is None, "the primary's own tip is acknowledged, not news"

    def test_a_higher_epoch_is_taken_on_whole(self) -> None:
        found = reconcile(self.seen("a: 1 2 3 | b: 1 2 2-3", b=self.told(2, "2-3")))
        assert found is not None
        assert found.recovering
        assert not found.opening
        assert (found.record.epoch, found.record.primary, found.record.newest_id) == (2, "b", "2-3")
        assert found.record.members == ("a", "b", "c")

    def test_a_newer_known_cp_of_the_same_epoch_is_taken_on(self) -> None:
        found = reconcile(self.seen("a: 1 2 | b: 1 2 3", b=self.told(1, "3", primary="a")))
        assert found is not None
        assert (found.record.newest_id, found.record.primary, found.recovering) == ("1-3", "a", True)

    def test_an_empty_store_learns_everything_also_from_the_empty_and_the_away(self) -> None:
        for b in ("1 2 2-3", "empty", "away 1 2"):
            found = reconcile(self.seen(f"a: 1 2 3 | b: {b}", forgotten=True, b=self.told(2, "2-3")))
            assert found is not None
            assert (found.record.epoch, found.record.epoch_id, found.record.newest_id) == (2, "e2", "2-3")

    def test_an_opening_that_the_store_forgot_is_one_still(self) -> None:
        found = reconcile(self.seen("a: 1 2 3 | b: 1 2", b=self.told(2, "2")))
        assert found is not None
        assert found.opening
        found = reconcile(self.seen("a: 1 2 3 | b: 1 2 2-3", b=self.told(2, "2")))
        assert found is not None
        assert not found.opening, "its opening CP has been seen"

    def test_records_of_two_volumes_and_no_store_cannot_be_reconciled(self) -> None:
        seen = self.seen(
            "a: 1 2 | b: foreign 1 2", forgotten=True, a=self.told(1, "2"), b=self.told(3, "2", volume_id="W")
        )
        assert reconcile(seen) is None
        assert refused(seen).refusal.reasons == ("AMBIGUOUS",)
        # The one that is chosen says which volume is meant; what its own record wants still holds.
        assert refused(seen, "--choose a").refusal.reasons[0] == "PRIMARY_AWAY"

    def test_a_removed_member_is_not_wanted_unless_the_highest_record_has_it(self) -> None:
        seen = self.seen("a: 1 2 | b: 1 2", b=self.told(2, "2", members=("a", "b")), a=self.told(1, "2"))
        assert seen.entry is not None
        found = reconcile(replace(seen, entry=replace(seen.entry, removed=("c",))))
        assert found is not None
        assert found.record.members == ("a", "b")

    def test_while_recovering_every_member_counts_that_a_record_names(self) -> None:
        """However old that record is: what the store forgot may be any of it."""
        seen = self.seen("a: 1 2 | b: 1 2", a=self.told(1, "2", members=("a", "b")), b=self.told(1, "1"))
        assert seen.entry is not None
        entry = replace(seen.entry, record=self.told(1, "2", primary="a", members=("a", "b")))
        assert reconcile(replace(seen, entry=entry)) is None, "a store that is whole knows who was removed"
        gap = replace(entry, recovering=True)
        found = reconcile(replace(seen, entry=gap))
        assert found == replace(gap, record=replace(entry.record, members=("a", "b", "c")))
        assert reconcile(replace(seen, entry=found)) is None
        assert reconcile(replace(seen, entry=replace(gap, removed=("c",)))) is None

    @pytest.mark.parametrize(("held", "removed"), [(0, ""), (1, ""), (2, ""), (2, "d"), (3, "d")])
    def test_members_are_the_same_whoever_is_heard_first(self, held: int, removed: str) -> None:
        """The store is empty, or an older copy of itself that holds the records up to one epoch."""
        told = {
            "a": self.told(3, "3", members=("a", "b")),
            "b": self.told(3, "3", members=("a", "b", "c")),
            "c": self.told(3, "2", members=("c", "e")),
            "d": self.told(2, "2", members=("a", "d")),
        }
        whole = self.seen("a: 1 2 3 | b: 1 2 3 | c: 1 2 3 | d: 1 2", forgotten=True, **told)
        record = self.told(held, str(held), members=("a", "b"))
        stored = VolumeEntry(record, recovering=True, removed=tuple(removed)) if held else None
        for order in itertools.permutations("abcd"):
            entry = stored
            for count in range(1, 5):
                heard = {node: whole.replicas[node] for node in order[:count]}
                entry = reconcile(replace(whole, entry=entry, replicas=heard)) or entry
            assert entry is not None
            assert entry.recovering
            assert (entry.record.epoch, entry.record.newest_id) == (3, "1-3")
            assert entry.record.members == tuple(node for node in "abcde" if node not in removed), order

    def test_what_was_learnt_is_learnt_once(self) -> None:
        seen = self.seen("a: 1 2 3 | b: 1 2 2-3", b=self.told(2, "2-3"))
        raised = reconcile(seen)
        assert reconcile(replace(seen, entry=raised)) is None

    def test_the_election_knows_it_at_once_and_wants_every_member(self) -> None:
        seen = self.seen("a: 1 2 | b: 1 2 2-3 grant=2", forgotten=True, b=self.told(2, "2-3"), a=self.told(1, "2"))
        found = refused(seen)
        assert found.refusal.reasons == ("RECOVERING",)
        assert [loss.node for loss in found.refusal.losses] == ["c"]
        with_c = replace(seen, replicas={**seen.replicas, "c": view("c: 1 2", primary="").replicas["c"]})
        stays = elected(with_c)
        assert (stays.winner, stays.new_epoch) == ("b", False)

    def test_the_next_epoch_is_above_everything_that_anybody_knows(self) -> None:
        assert next_epoch(view("a: 1 2 | b: 1", epoch=4)) == 5
        assert next_epoch(view("a: 1 2 | b: away 1 6-2")) == 7
        assert next_epoch(view("a: 1 2 | b: 1 grant=8")) == 9
        assert next_epoch(view("a: 1 2 | b: empty told=3")) == 4
        assert next_epoch(view("a: raw * | b: empty", primary="")) == 1

    def test_while_recovering_a_branch_that_only_one_has_may_have_counted(self) -> None:
        """The store that would know that it was given up is gone."""
        seen = view("a: 1 2 2-3 | b: 1 2 3 | c: 1 2", recovering=True)
        found = refused(seen)
        assert found.refusal.reasons == ("RECOVERING",)
        assert "CPs that only b has may have counted" in found.refusal.message
        assert found.refusal.next_command == "resilver elect vm1 --accept-loss b"
        assert elected(seen, "--accept-loss b").winner == "a"
        assert refused(seen, "--choose b").refusal.next_command.endswith(" --choose b --accept-loss a")
