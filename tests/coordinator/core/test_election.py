"""Every reason and what overrides it, as tables of histories; the laws stand in test_election_laws.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from coordinator.core.cluster import Elected, Loss, VolumeView
from resilver.lineage import ConsistencyPoint
from tests.coordinator.core.commands import elected, refused, run
from tests.coordinator.core.histories import view


class TestThePrimaryStays:
    @pytest.mark.parametrize(
        "seen",
        [
            view("a: 1 2 | b: 1 2"),
            view("a: 1 2 * | b: 1 | c: away 1 2"),
            view("a: 1 2 ? | b: silent"),
            view("a: 1 2 3 | b: 1 2", newest="2"),
            view("a: 1 2-2 | b: 1 2 3 4 5"),
            view("a: 1 2 | b: 1 2 *"),
            view("a: 1 2 | b: 1' 2' 3' | c: foreign 1 | d: lost"),
            view("a: 1 2 | b: 1 2", recovering=True),
            view("a: 1 2 | b: 1 2 | c: empty", recovering=True),
            view("a: 1 2 | b: 1 2 grant=1", epoch=2),
            view("a: 1 2 | b: away 1 2 grant=1", epoch=1),
        ],
    )
    def test_while_it_is_here_with_the_newest_known_cp_and_the_grant(self, seen: VolumeView) -> None:
        for options in ("", "--choose a"):
            found = elected(seen, options)
            assert (found.winner, found.new_epoch, found.accepted) == ("a", False, ())
        assert found.fork == seen.replicas["a"].lineage.tip

    @pytest.mark.parametrize("grant", ["nogrant", "grant=1", "grant=2"])
    def test_while_its_epoch_is_being_opened_the_grant_may_be_on_its_way(self, grant: str) -> None:
        seen = view(f"b: 1 2 {grant} | a: 1 2 3", primary="b", newest="2", epoch=2, opening=True)
        found = elected(seen)
        assert (found.winner, found.new_epoch) == ("b", False), "the old primary's tail was given up"
        assert found.rule == "its epoch is being opened"

    def test_an_opening_that_was_interrupted_before_the_first_cp_goes_on(self) -> None:
        seen = view("a: * raw nogrant | b: empty", epoch=1, opening=True)
        assert elected(seen).winner == "a"

    def test_there_is_no_loss_to_accept(self) -> None:
        found = refused(view("a: 1 2 | b: 1"), "--accept-loss b")
        assert found.refusal.reasons == ("LOSS_NOT_NAMED",)
        assert found.refusal.message == "a stays primary of vm1: there is no loss to accept"
        assert found.refusal.next_command == "resilver elect vm1"


class TestReasons:
    """Each refusal: its reasons, who would win, what is lost, and that its next command is enough."""

    @pytest.mark.parametrize(
        ("seen", "reasons", "would_win", "losses"),
        [
            # The primary does not answer, or has nothing to go on with.
            (view("a: away 1 2 3 | b: 1 2 3 | c: 1 2"), "PRIMARY_AWAY", "b", "a"),
            (view("a: silent | b: 1 2", newest="2"), "PRIMARY_AWAY", "b", "a"),
            (view("a: empty | b: 1 2", newest="2"), "PRIMARY_AWAY", "b", "a"),
            (view("a: lost | b: 1 2", newest="2"), "PRIMARY_AWAY", "b", "a"),
            (view("a: foreign 1 2 | b: 1 2", newest="2"), "PRIMARY_AWAY", "b", "a"),
            (view("a: 1 2 ! | b: 1 2"), "PRIMARY_AWAY", "b", "a"),
            (view("b: 1 2", newest="2"), "PRIMARY_AWAY", "b", "a"),
            # Its last CP is on it alone.
            (view("a: away 1 2 3 4 | b: 1 2 3 | c: 1 2"), "PRIMARY_AWAY NEWEST_COPY_MISSING", "b", "a"),
            (view("a: away 1 2 3 | b: away 1 2 3 | c: 1 2"), "PRIMARY_AWAY NEWEST_COPY_MISSING", "c", "a b"),
            (view("a: silent | c: 1 2", newest="3"), "PRIMARY_AWAY NEWEST_COPY_MISSING", "c", "a"),
            (view("a: 1 2 3 ! | b: 1 2"), "PRIMARY_AWAY NEWEST_COPY_MISSING", "b", "a"),
            # It is here without what was acknowledged.
            (view("a: 1 2 | b: 1 2 3", newest="3"), "PRIMARY_BEHIND", "b", "a"),
            (view("a: 1 2 3' 4' | b: 1 2 3", newest="3"), "PRIMARY_BEHIND", "b", "a"),
            (view("a: 1 2 * | b: away 1 2 3", newest="3"), "PRIMARY_BEHIND NEWEST_COPY_MISSING", "a", "a b"),
            (view("a: 1 2 | b: 1", newest="3"), "PRIMARY_BEHIND NEWEST_COPY_MISSING", "a", "a"),
            (view("a: 1 2 | b: 1 2 3", newest="2"), "PRIMARY_BEHIND", "b", "a"),
            # The store was behind, and somebody has not answered.
            (view("a: 1 2 | b: silent", recovering=True), "RECOVERING", "a", "b"),
            (view("a: 1 2 | b: lost", recovering=True), "RECOVERING", "a", "b"),
            (view("a: 1 2 | b: away 1 2 3 | c: 1", recovering=True, newest="2"), "RECOVERING", "a", "b"),
            (view("a: away 1 2 | b: 1 2 | c: silent", recovering=True), "PRIMARY_AWAY RECOVERING", "b", "a c"),
            (view("a: away 1 2-2 | b: 1 2-2 | c: 1 2", recovering=True), "PRIMARY_AWAY RECOVERING", "b", "a c"),
            # Who is ahead but has no live copy is not passed over in silence.
            (
                view("a: away 1 2 | b: 1 2 | c: 1 2 3 !", newest="2"),
                "PRIMARY_AWAY NEWEST_COPY_MISSING",
                "b",
                "a c",
            ),
        ],
    )
    def test_those_that_acceptance_overrides(self, seen: VolumeView, reasons: str, would_win: str, losses: str) -> None:
        found = refused(seen)
        assert found.refusal.reasons == tuple(reasons.split())
        assert found.would_win == would_win
        named = [loss.node for loss in found.refusal.losses]
        assert named == losses.split()
        assert found.refusal.next_command == "resilver elect vm1" + "".join(f" --accept-loss {one}" for one in named)
        after = run(seen, found.refusal.next_command)
        assert isinstance(after, Elected)
        assert (after.winner, after.new_epoch, after.accepted) == (would_win, True, tuple(named))
        assert after.fork == seen.replica(would_win).lineage.tip

    def test_nothing_is_given_up_of_a_node_that_is_only_busy_before_it_was_asked_again(self) -> None:
        seen = view("a: away 1 2 * | b: 1 2")
        late = replace(seen, replicas={**seen.replicas, "a": replace(seen.replica("a"), late=True)})
        found = refused(late)
        assert found.refusal.reasons == ("PRIMARY_AWAY",)
        assert found.refusal.next_command == "resilver elect vm1 --dry-run"
        assert found.refusal.message.endswith(
            "; ask again when a may have answered, before you give that up with --accept-loss a"
        )
        assert elected(late, "--accept-loss a").winner == "b", "its disk may hang for good"
        assert refused(late, "--accept-loss b").refusal.next_command == "resilver elect vm1 --accept-loss a"

    @pytest.mark.parametrize(
        ("seen", "reasons", "choices"),
        [
            # Nobody can say which branch counts.
            (view("a: away 1 2 | b: 1 2 3 | c: 1 2 3'"), "PRIMARY_AWAY AMBIGUOUS", {"b": "a", "c": "a"}),
            (
                view("a: away 1 2 3 | b: 1 2' | c: 1 2''"),
                "PRIMARY_AWAY NEWEST_COPY_MISSING AMBIGUOUS",
                {"b": "a", "c": "a"},
            ),
            # The primary is here, but has no right, or not the only one.
            (view("a: 1 2 nogrant | b: 1 2"), "PRIMARY_UNCLEAR", {"a": "", "b": ""}),
            (view("a: 1 2 * grant=1x | b: 1 2"), "PRIMARY_UNCLEAR", {"a": "", "b": "a"}),
            (view("a: 1 2 grant=1 | b: 1 2", epoch=2), "PRIMARY_UNCLEAR", {"a": "", "b": ""}),
            (view("a: 1 2 * | b: 1 2 grant=1"), "PRIMARY_UNCLEAR", {"a": "", "b": "a"}),
            (view("a: 1 2 | b: 1 2 * grant=1"), "PRIMARY_UNCLEAR", {"a": "b", "b": ""}),
            (view("a: 1 2 | b: 1 2' grant=1x"), "PRIMARY_UNCLEAR", {"a": "b", "b": "a"}),
            (view("a: 1 2 | b: 1 2 told=1x"), "PRIMARY_UNCLEAR", {"a": "", "b": ""}),
            (view("a: 1 2 | b: 1 2 2-3"), "PRIMARY_BEHIND PRIMARY_UNCLEAR", {"a": "a b", "b": "a"}),
            (view("a: 1 2 | b: 1 2' 2-3'"), "PRIMARY_UNCLEAR", {"a": "b", "b": "a"}),
            (view("a: 1 2 | b: 1 | c: away 1 2 grant=7"), "PRIMARY_UNCLEAR", {"a": "c", "b": "a c"}),
            (view("a: away 1 2 | b: 1 2 | c: 1 2 grant=1"), "PRIMARY_AWAY PRIMARY_UNCLEAR", {"b": "a", "c": "a"}),
        ],
    )
    def test_those_that_need_a_choice(self, seen: VolumeView, reasons: str, choices: dict[str, str]) -> None:
        found = refused(seen)
        assert found.refusal.reasons == tuple(reasons.split())
        assert found.would_win == "", "no acceptance is enough"
        everybody = " ".join(f"--accept-loss {node}" for node in seen.replicas)
        for options in (everybody, "--accept-loss a"):
            assert found.refusal.reasons == tuple(
                reason for reason in refused(seen, options).refusal.reasons if reason != "LOSS_NOT_NAMED"
            )
        for node, losses in choices.items():
            accepted = "".join(f" --accept-loss {one}" for one in losses.split())
            after = elected(seen, f"--choose {node}{accepted}")
            assert (after.winner, after.new_epoch, after.rule) == (node, True, "chosen by the operator")
            if losses:
                again = refused(seen, f"--choose {node}")
                assert again.refusal.next_command == f"resilver elect vm1 --choose {node}{accepted}"

    def test_the_next_command_of_an_unclear_primary_is_whole_and_of_an_ambiguous_one_asks(self) -> None:
        unclear = view("a: 1 2 * | b: 1 2 * grant=1")
        command = refused(unclear).refusal.next_command
        assert command == "resilver elect vm1 --choose a --accept-loss b"
        assert isinstance(run(unclear, command), Elected)
        found = refused(view("a: away 1 2 | b: 1 2 3 | c: 1 2 3'"))
        assert found.refusal.next_command == "resilver elect vm1 --choose NODE"
        assert found.refusal.candidates == ("b", "c")
        assert "b at 1-3, c at 1-3" in found.refusal.message

    def test_nobody_to_go_on_with(self) -> None:
        for seen in (view("a: away 1 | b: empty"), view("a: away 1 | b: 1' 2'"), view("a: away 1 | b: foreign 1")):
            found = refused(seen, "--accept-loss a")
            assert "NO_DATA" in found.refusal.reasons
            assert found.refusal.next_command == "resilver status vm1"

    def test_the_message_names_the_node_its_last_cp_and_what_is_given_up(self) -> None:
        found = refused(view("a: away 1 2 3 4 * | b: 1 2 | c: 1 2 "))
        assert found.refusal.message == (
            "the primary a does not answer; its last CP was 1-4, heard 47s ago, live copy modified; "
            "nobody who could go on has the newest known CP 1-4; it was last seen on a; "
            "b would go on without what is only on a (1-3 .. 1-4 (2 CPs), live writes)"
        )
        cp = ConsistencyPoint
        assert found.refusal.losses == (Loss("a", cp(1, 3), cp(1, 4), 2, live_modified=True, unseen_ms=47_000),)
        assert found.refusal.missing_nodes == ("a",)

    def test_a_node_that_was_never_heard_is_a_loss_of_unknown_size(self) -> None:
        (loss,) = refused(view("a: silent | b: 1 2", newest="3")).refusal.losses
        assert loss == Loss("a", None, ConsistencyPoint(1, 3), None, live_modified=False, unseen_ms=None)


class TestLossesMustBeNamedExactly:
    SEEN = view("a: away 1 2 3 | b: away 1 2 3 | c: 1 2 | d: 1")

    @pytest.mark.parametrize("names", ["a", "b", "c", "a c", "a b c", "d", "a b d", "x", "a b x"])
    def test_neither_fewer_nor_more_nor_others(self, names: str) -> None:
        found = refused(self.SEEN, " ".join(f"--accept-loss {name}" for name in names.split()))
        assert found.refusal.reasons == ("PRIMARY_AWAY", "NEWEST_COPY_MISSING", "LOSS_NOT_NAMED")
        assert f"what was accepted is {', '.join(names.split())}" in found.refusal.message
        assert found.refusal.next_command == "resilver elect vm1 --accept-loss a --accept-loss b"

    def test_just_these(self) -> None:
        assert elected(self.SEEN, "--accept-loss b --accept-loss a").accepted == ("a", "b")

    def test_nothing_is_lost_and_yet_something_was_accepted(self) -> None:
        found = refused(view("a: 1 2 | b: 1 2"), "--choose b --accept-loss a")
        assert found.refusal.reasons == ("LOSS_NOT_NAMED",)
        assert "there is no loss to accept" in found.refusal.message
        assert found.refusal.next_command == "resilver elect vm1 --choose b"


class TestTheMostUpToDateReplica:
    """With the primary away and its loss accepted."""

    @pytest.mark.parametrize(
        ("others", "newest", "winner", "rule"),
        [
            ("b: 1 2", "2", "b", "the only candidate"),
            ("b: 1 2 | c: 1 2 3 | d: 1", "2", "c", "contains every other candidate"),
            ("b: 1 2 | c: 1 2", "2", "b", "equal CP, then name (b, c)"),
            ("b: 1 2 | c: 1 2 prio=5", "2", "c", "equal CP, then priority (c 5, b 0)"),
            ("b: 1 2 * prio=5 | c: 1 2", "2", "c", "equal CP, then a live copy that is not modified"),
            ("b: 1 2 ? prio=5 | c: 1 2", "2", "c", "equal CP, then a live copy that is not modified"),
            ("b: 1 2 3 4 5 6 | c: 1 2 2-3", "2", "c", "the tip of the higher epoch"),
            ("b: 1 2 3 * | c: 1 2", "2", "b", "contains every other candidate"),
            # The newest known CP goes before a higher epoch that was given up, and before a longer tail.
            ("b: 1 2 3 | c: 1 2 2-3", "3", "b", "the only candidate"),
            ("b: 1 2 3' 4' 5' | c: 1 2 3", "3", "c", "the only candidate"),
            # Never these, however much they have.
            ("b: 1 | c: 1' 2' 3' | d: foreign 1 2 3", "1", "b", "the only candidate"),
            ("b: 1 | c: * | d: empty", "1", "b", "the only candidate"),
        ],
    )
    def test_wins(self, others: str, newest: str, winner: str, rule: str) -> None:
        seen = view(f"a: away 1 | {others}", newest=newest, epoch=3)
        found = elected(seen, "--accept-loss a")
        assert (found.winner, found.rule) == (winner, rule)

    def test_the_old_primary_that_returns_is_not_elected_by_its_sequence(self) -> None:
        """It had a CP that was given up; the new one has only its opening CP."""
        assert elected(view("b: 1 2 2-3 | a: 1 2 3 4 5 grant=1", primary="b")).winner == "b"
        found = refused(view("b: away 1 2 2-3 | a: 1 2 3 4 5 | c: 1 2 2-3", primary="b"))
        assert found.would_win == "c"

    def test_a_removed_node_is_out_of_it_unless_it_is_chosen(self) -> None:
        seen = view("a: away 1 2 | b: 1 | c: 1 2", removed="c")
        assert refused(seen).would_win == "b"
        assert elected(seen, "--choose c --accept-loss a").winner == "c"

    def test_a_present_primary_wins_a_tie(self) -> None:
        seen = view("b: 1 2 * | a: 1 2 prio=9 | c: silent", primary="b", recovering=True)
        assert elected(seen, "--accept-loss c").rule == "equal CP, then the present primary"

    def test_a_volume_whose_primary_was_removed_goes_on_with_whom_has_everything(self) -> None:
        seen = view("a: 1 2 | b: 1 2 3", newest="3")
        assert seen.entry is not None
        orphan = replace(seen, entry=replace(seen.entry, record=replace(seen.record, primary="", members=("a", "b"))))
        found = elected(orphan)
        assert (found.winner, found.new_epoch) == ("b", True)


class TestVerdicts:
    def test_every_replica_is_told_why(self) -> None:
        seen = view("a: away 1 2 3 * | b: 1 2 | c: 1 2 | d: 1 2' | e: empty | f: foreign 1 | g: * | h: 1", newest="2")
        found = elected(seen, "--accept-loss a")
        assert {one.node: one.verdict for one in found.candidates} == {
            "a": "does not answer; what only it has was accepted as lost: --accept-loss a",
            "b": "won",
            "c": "has the same CP as b",
            "d": "split from b at 1-1, with 1-2 of its own",
            "e": "has no data",
            "f": "has the data of another volume",
            "g": "has nothing in common with the volume",
            "h": "is contained in b",
        }
        assert [one.node for one in found.candidates] == list("abcdefgh")


@dataclass(frozen=True)
class _Step:
    """One command of the operator's and what it answers."""

    options: str
    answer: str


def test_an_outage_as_an_operator_meets_it() -> None:
    """The primary with a CP of its own stops; it is refused, accepted, and later comes back."""
    seen = view("a: away 1 2 3 * | b: 1 2 | c: 1")
    for step in (
        _Step("", "PRIMARY_AWAY NEWEST_COPY_MISSING"),
        _Step("--accept-loss b", "PRIMARY_AWAY NEWEST_COPY_MISSING LOSS_NOT_NAMED"),
        _Step("--accept-loss a", "b"),
    ):
        found = run(seen, f"resilver elect vm1 {step.options}")
        got = found.winner if isinstance(found, Elected) else " ".join(found.refusal.reasons)
        assert got == step.answer
    back = view("a: 1 2 3 * told=1 grant=1 | b: 1 2 2-3 | c: 1 2 2-3", primary="b")
    assert elected(back).new_epoch is False
