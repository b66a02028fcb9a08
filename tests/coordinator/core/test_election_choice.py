"""Elections where an operator names the winner, and those of volumes that have no primary yet."""

from __future__ import annotations

import pytest

from coordinator.core.cluster import Elected
from tests.coordinator.core.commands import elected, refused, run
from tests.coordinator.core.histories import view


class TestChoose:
    def test_a_handover_to_one_that_has_everything_costs_nothing(self) -> None:
        found = elected(view("a: 1 2 | b: 1 2"), "--choose b")
        assert (found.winner, found.new_epoch, found.accepted) == ("b", True, ())

    @pytest.mark.parametrize(
        ("histories", "losses"),
        [
            ("a: 1 2 * | b: 1 2", "a"),
            ("a: 1 2 ? | b: 1 2", "a"),
            ("a: 1 2 3 | b: 1 2", "a"),
            ("a: 1 2 3 | b: 1 2 | c: 1 2 3 | d: 1", "a c"),
            ("a: 1 2 3 | b: 1 2 | c: away 1 2 3", "a c"),
            ("a: 1 2 3 4 | b: 1 2 3' | c: 1 2 3 4 | d: 1 2", "a c"),
            ("a: 1 2 3 4 | b: * | c: 1 2 3 4", "a c"),
        ],
    )
    def test_one_that_lacks_something_costs_everybody_who_has_it(self, histories: str, losses: str) -> None:
        seen = view(histories)
        found = refused(seen, "--choose b")
        assert found.refusal.reasons == ("LOSS_NOT_NAMED",)
        assert [loss.node for loss in found.refusal.losses] == losses.split()
        assert found.would_win == "b"
        assert isinstance(run(seen, found.refusal.next_command), Elected)

    def test_does_not_stand_in_for_acceptance(self) -> None:
        seen = view("a: away 1 2 | b: 1 2 | c: 1 2")
        found = refused(seen, "--choose c")
        assert found.refusal.reasons == ("PRIMARY_AWAY",)
        assert found.refusal.next_command == "resilver elect vm1 --choose c --accept-loss a"
        assert elected(seen, "--choose c --accept-loss a").winner == "c"

    @pytest.mark.parametrize(
        ("b", "reason"),
        [
            ("away 1 2", "NODE_OFFLINE"),
            ("silent", "NODE_OFFLINE"),
            ("empty", "NO_DATA"),
            ("lost", "REPLICA_LOST"),
            ("foreign 1 2", "REPLICA_FOREIGN"),
            ("1 2 !", "NO_DATA"),
        ],
    )
    def test_who_cannot_be_chosen_and_why(self, b: str, reason: str) -> None:
        for accepted in ("", "--accept-loss a", "--accept-loss a --accept-loss b"):
            found = refused(view(f"a: 1 2 | b: {b} | c: 1"), f"--choose b {accepted}")
            assert found.refusal.reasons == (reason,)
            assert "it cannot be chosen" in found.refusal.message

    def test_a_node_that_nobody_knows(self) -> None:
        assert refused(view("a: 1 2 | b: 1"), "--choose x").refusal.reasons == ("NODE_OFFLINE",)


class TestFirstSight:
    @pytest.mark.parametrize(
        ("histories", "winner"),
        [
            ("a: empty | b: raw * | c: empty", "b"),
            ("a: raw", "a"),
            ("a: 1 2 3 | b: 1 2 | c: empty", "a"),
            ("a: 1 2 | b: 1 2 *", "b"),
            ("a: 1 2 | b: 1 2 ?", "b"),
            ("a: 1 2 | b: 1 2 prio=1", "b"),
            ("a: 1 2 ! | b: 1 2", "b"),
        ],
    )
    def test_the_one_that_contains_all_others_wins_without_a_word(self, histories: str, winner: str) -> None:
        found = elected(view(histories, primary=""))
        assert (found.winner, found.new_epoch, found.accepted) == (winner, True, ())
        assert found.fork == view(histories, primary="").replicas[winner].lineage.tip

    @pytest.mark.parametrize(
        ("histories", "choices"),
        [
            ("a: raw * | b: raw * | c: empty", "a b"),
            ("a: raw | b: raw", "a b"),
            ("a: 1 2 | b: 1 2'", "a b"),
            ("a: 1 2 3 | b: 1 2 2-3", "a b"),
            ("a: 1 2 * | b: 1 2 *", "a b"),
            ("a: 1 2 3 | b: 1 2 *", "a"),
            ("a: 1 2 | b: raw *", "a b"),
            ("a: 1 2 | b: foreign 1 2", "a b"),
            ("a: 1 2 | b: lost", "a"),
            ("a: 1 2 | b: silent", "a"),
            ("a: 1 2 | b: away empty", "a"),
        ],
    )
    def test_several_or_a_silent_one_need_a_choice(self, histories: str, choices: str) -> None:
        seen = view(histories, primary="")
        found = refused(seen)
        assert found.refusal.reasons == ("AMBIGUOUS",)
        for node in choices.split():
            assert elected(seen, f"--choose {node}").winner == node

    def test_a_silent_one_is_named(self) -> None:
        found = refused(view("a: 1 | b: silent | c: lost", primary=""))
        assert found.refusal.missing_nodes == ("b", "c")
        assert found.refusal.next_command == "resilver elect vm1 --choose a"

    def test_choosing_one_that_another_exceeds_costs_the_other(self) -> None:
        seen = view("a: 1 2 3 | b: 1 2", primary="")
        assert refused(seen, "--choose b").refusal.next_command == "resilver elect vm1 --choose b --accept-loss a"

    def test_no_data_anywhere(self) -> None:
        found = refused(view("a: empty | b: empty", primary=""))
        assert found.refusal.reasons == ("NO_DATA",)
        assert refused(view("a: empty", primary=""), "--choose a").refusal.reasons == ("NO_DATA",)

    def test_the_most_is_where_no_live_copy_is(self) -> None:
        found = refused(view("a: 1 2 3 ! | b: 1 2", primary=""))
        assert found.refusal.reasons == ("NEWEST_COPY_MISSING",)
        assert found.refusal.next_command == "resilver elect vm1 --accept-loss a"
