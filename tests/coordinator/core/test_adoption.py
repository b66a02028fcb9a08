"""Replicas that other tools have mirrored: who is elected, what is planned, and what is said of them.

`g4` is a snapshot that another tool made; two nodes may hold different ones of the same history.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.core.claims import next_epoch
from coordinator.core.cluster import PlanAction, ReplicaPlan, ReplicaState, ReplicaView, VolumeEntry, VolumeView
from coordinator.core.planner import plan_volume
from coordinator.core.status import problems_of_replica, status_of
from resilver.volume import VolumeRecord
from tests.coordinator.core.commands import elected, refused
from tests.coordinator.core.histories import NOW_MS, view


def first_sight(text: str) -> VolumeView:
    """Nobody has been elected yet, and nobody has a volume_id."""
    return view(" | ".join(part if "silent" in part else f"{part} raw" for part in text.split("|")), primary="")


def imagined(text: str, primary: str = "a") -> VolumeView:
    """As a plan sees it that is made before the first election: no epoch, but a primary."""
    seen = first_sight(text)
    return VolumeView(
        seen.name, VolumeEntry(VolumeRecord(seen.name, primary=primary, members=(primary,))), seen.replicas
    )


def row(seen: VolumeView, node: str = "b", **options: object) -> ReplicaPlan:
    asked = {"target": None, "takes_snapshot": False, "now_ms": NOW_MS, **options}
    found = plan_volume(seen, **asked)  # type: ignore[arg-type]  # options by name
    assert found.refusal is None
    return next(one for one in found.replicas if one.node == node)


def _made_after(one: ReplicaView) -> ReplicaView:
    """What lies beside its lineage was made a second later than all that is in it."""
    assert one.report is not None
    others = tuple(replace(other, create_time_ms=other.create_time_ms + 1000) for other in one.report.others)
    return replace(one, report=replace(one.report, others=others))


class TestFirstElection:
    @pytest.mark.parametrize(
        ("histories", "rule"),
        [
            # What the other node has is a subset, whoever pruned what; the newest that it has is here.
            ("a: g1 g2 g3 g4 g5 * | b: g1 g2 g3 !", "the only candidate"),
            ("a: g1 g2 g3 g4 g5 * | b: g1 g2 g3", "contains every other candidate"),
            ("a: g3 g5 * | b: g1 g2 g3", "contains every other candidate"),
            ("a: g1 g3 g5 ? | b: g1 g2 g3", "contains every other candidate"),
            ("a: g5 * | b: g1 g2 g3 g4 g5", "contains every other candidate"),
            ("a: g1 g5 | b: g5", "equal newest snapshot, then name (a, b)"),
            ("a: g1 g5 prio=1 | b: g5 !", "the only candidate"),
            ("a: g4 g5 * | b: g4 ! | c: g1 g5 !", "the only candidate"),
            ("a: * | b: empty", "the only candidate"),
        ],
    )
    def test_who_has_all_that_the_others_have_is_elected(self, histories: str, rule: str) -> None:
        found = elected(first_sight(histories))
        assert (found.winner, found.new_epoch, found.accepted, found.rule) == ("a", True, (), rule)
        assert found.fork == first_sight(histories).replicas["a"].lineage.tip

    @pytest.mark.parametrize(
        ("histories", "reason", "said"),
        [
            # The primary's tool has let go of what the other node has as its newest: it may be a branch of its own.
            (
                "a: g1 g3 g5 * | b: g1 g3 g4",
                "AMBIGUOUS",
                (
                    "several replicas have data, and none contains all others: a at auto-g5, with live writes, b at "
                    "auto-g4; the newest that all of them have is auto-g3"
                ),
            ),
            (
                "a: g1 g3 g5 * | b: g1 g3 g4 !",
                "NEWEST_COPY_MISSING",
                (
                    "a at auto-g5 is without what others have that no live copy descends from: b at auto-g4; "
                    "the newest that all of them have is auto-g3; "
                    "a would go on without what is only on b (auto-g4 (1 snapshot))"
                ),
            ),
            (
                "a: g5 * | b: g1 g3 g4",
                "AMBIGUOUS",
                (
                    "several replicas have data, and none contains all others: a at auto-g5, with live writes, b at "
                    "auto-g4; nothing is in all of them"
                ),
            ),
            # The other node was written to, or its tool has made snapshots of its own.
            ("a: g1 g2 * | b: g1 *", "AMBIGUOUS", ""),
            ("a: g1 g2 * | b: g1 g7", "AMBIGUOUS", ""),
            ("a: g1 g2 | b: g1 *", "AMBIGUOUS", ""),
            # It has more, but cannot go on with it; or the one with the live copy went on by itself.
            ("a: g1 g2 * | b: g1 g2 g3 !", "NEWEST_COPY_MISSING", ""),
            ("a: g1 g2 * | b: g1 g2 g3", "AMBIGUOUS", ""),
            # The same snapshots in another order: which of them is the newest?
            ("a: g1 g2 g3 | b: g1 g3 g2", "AMBIGUOUS", ""),
            ("a: g1 g2 g3 | b: g1 g3 g2 !", "NEWEST_COPY_MISSING", ""),
            # Somebody who may have more says nothing.
            ("a: g1 g2 * | b: silent", "AMBIGUOUS", ""),
            ("a: g1 g2 * | b: away g1", "AMBIGUOUS", ""),
            ("a: g1 g2 * | b: lost", "AMBIGUOUS", ""),
            ("a: g1 ! | b: g1 !", "NO_DATA", ""),
        ],
    )
    def test_whatever_is_not_certain_is_refused(self, histories: str, reason: str, said: str) -> None:
        found = refused(first_sight(histories))
        assert found.refusal.reasons == (reason,)
        if said:
            assert found.refusal.message == said

    def test_a_refusal_ends_in_the_command_that_settles_it(self) -> None:
        seen = first_sight("a: g1 g3 g5 * | b: g1 g3 g4 g6")
        assert refused(seen).refusal.next_command == "resilver elect vm1 --choose NODE"
        assert elected(seen, "--choose a").winner == "a", "what b has of its own stays there, and makes it DIVERGED"
        seen = first_sight("a: g1 g3 g5 * | b: g1 g3 g4 g6 !")
        found = refused(seen)
        assert found.refusal.next_command == "resilver elect vm1 --accept-loss b"
        assert found.refusal.message.endswith("what is only on b (auto-g4 .. auto-g6 (2 snapshots))")
        assert elected(seen, "--accept-loss b").winner == "a"

    def test_the_first_epoch_is_1(self) -> None:
        assert next_epoch(first_sight("a: g1 g2 * | b: g1")) == 1


class TestTheFirstPlan:
    """Before anything has moved: 1-1 is still to be taken, on top of the newest snapshot of the primary."""

    @pytest.mark.parametrize(
        ("histories", "state", "base"),
        [
            ("a: g1 g2 g3 g4 g5 * | b: g1 g2 g3 !", "STALE", "g3"),
            ("a: g1 g2 g3 g4 g5 * | b: g1 g2 g3", "STALE", "g3"),
            ("a: g2 g3 g5 * | b: g1 g2 g3", "STALE", "g3"),
            ("a: g2 (g3) g5 * | b: g1 g2 g3", "STALE", "g2"),
            ("a: g1 g5 * | b: g5", "IN_SYNC", "g5"),
            ("a: g1 g3 g5 * | b: g1 g3 g4 !", "DIVERGED", "g3"),
        ],
    )
    def test_starts_from_the_newest_in_common_by_its_name(self, histories: str, state: str, base: str) -> None:
        found = row(imagined(histories), takes_snapshot=True)
        assert (found.state, found.action) == (ReplicaState(state), PlanAction.DELTA)
        assert (found.base, found.base_name, str(found.base_cp)) == (base, f"auto-{base}", "0-0")
        assert (found.target, str(found.target_cp), found.exact) == ("", "1-1", False)
        assert found.why.startswith(f"auto-{base} is the newest snapshot in common")
        assert found.preserve == ()

    def test_without_one_in_common_nothing_is_copied_whole_in_silence(self) -> None:
        found = row(imagined("a: g5 * | b: g1 g2"), takes_snapshot=True)
        assert found.refusal is not None
        assert found.refusal.reasons == ("REPLICA_UNRELATED",)
        found = row(imagined("a: (g1) g5 * | b: g1"), takes_snapshot=True)
        assert found.refusal is not None
        assert found.refusal.reasons == ("BASE_GONE",)
        assert "auto-g1" in found.why


class TestAfterwards:
    @pytest.mark.parametrize(
        ("histories", "state", "base", "why"),
        [
            ("a: g1 g3 g5 1 | b: g1 g3 !", "STALE", "g3", "auto-g3 is the newest snapshot in common"),
            # What was let go of on the primary is still in its lineage, as a record.
            ("a: g1 (g3) g5 1 | b: g1 g3", "STALE", "g1", "auto-g1 is the newest snapshot in common"),
            ("a: g1 g3 g5 1 2 | b: g1 g3 g5 1", "STALE", "1-1", "1-1 is the newest snapshot in common"),
            # The other tool went on after 1-1: on the primary that is beside the lineage.
            (
                "a: g1 g5 1 ~g6 * | b: g1 g5 g6 !",
                "DIVERGED",
                "g5",
                "auto-g5 is the newest snapshot in common; another tool's auto-g6 is kept, off the lineage",
            ),
            (
                "a: g1 g5 1 | b: g1 g4 g6",
                "DIVERGED",
                "g1",
                "auto-g1 is the newest snapshot in common; another tool's auto-g4, auto-g6 are kept, off the lineage",
            ),
        ],
    )
    def test_a_replica_is_what_its_newest_snapshot_is(self, histories: str, state: str, base: str, why: str) -> None:
        found = row(view(histories))
        assert (found.state, found.action) == (ReplicaState(state), PlanAction.DELTA)
        assert (found.base, found.why, found.preserve) == (base, why, ())
        assert found.replace_own_data is (state == "DIVERGED")

    @pytest.mark.parametrize(
        ("histories", "message"),
        [
            ("a: g1 g5 1 | b: g1 g5 !", "1h behind; common snapshot auto-g5 is intact, a delta is possible."),
            ("a: g1 g5 1 | b: g1 g5 1 !", "its snapshots are in sync, but it has no live copy; a resync makes one"),
            (
                "a: g1 g5 1 ~g6 | b: g1 g5 g6 !",
                (
                    "split at auto-g5; another tool has gone on to auto-g6, which is on a too, but off the volume's "
                    "lineage. Stop that tool's replication, then resync."
                ),
            ),
            (
                "a: g1 g5 1 | b: g1 g6 g7",
                "split at auto-g1; 2 snapshots are only on b. Nothing replaces them until you say so.",
            ),
            (
                "a: g1 g2 g3 | b: g1 g3 g2",
                (
                    "it has the primary's snapshots in another order, with auto-g2 as its newest. "
                    "A resync brings it to the primary's order."
                ),
            ),
        ],
    )
    def test_its_problem_is_told_with_the_names_that_the_other_tool_gave(self, histories: str, message: str) -> None:
        (found,) = problems_of_replica(view(histories, epoch=1), "b", NOW_MS)
        assert found.message == message

    @pytest.mark.parametrize(("kind", "told"), [("zfs", True), ("btrfs", False)])
    def test_what_a_tool_that_was_left_on_has_received_into_the_live_copy_is_named(self, kind: str, told: bool) -> None:
        seen = view(f"a: g1 1 ~g6 * kind={kind} | b: g1 1 ~g6 * kind={kind}")
        later = {node: _made_after(one) for node, one in seen.replicas.items()}
        (found,) = problems_of_replica(replace(seen, replicas=later), "b", NOW_MS)
        named = "Another tool has brought auto-g6 here from a: stop its replication. " if told else ""
        assert found.message == (
            f"split at 1-1; live writes are only on b. {named}Nothing replaces them until you say so."
        )

    def test_a_snapshot_beside_the_lineage_decides_nothing(self) -> None:
        plain, beside = "a: g1 g5 1 2 * | b: g1 g5 1", "a: g1 g5 1 2 * ~g6 ~g7 | b: g1 g5 1 ~g2 ~g6"
        assert elected(view(beside)) == elected(view(plain))
        assert row(view(beside)) == row(view(plain))
        assert status_of(view(beside), "b") == status_of(view(plain), "b")

    def test_cps_of_a_later_reign_go_over_another_tools_snapshots(self) -> None:
        seen = view("a: away g1 g5 1 | b: g1 g5 g6 | c: g1 g5 1", newest="1")
        found = elected(seen, "--accept-loss a")
        assert found.winner == "c", "b has more snapshots, but not the newest known CP"


class TestKinds:
    @pytest.mark.parametrize(("mine", "theirs"), [("image", "lvm-thin"), ("lvm-thin", "image"), ("zfs", "zfs")])
    def test_those_that_read_each_others_deltas_mix(self, mine: str, theirs: str) -> None:
        assert row(view(f"a: 1 2 kind={theirs} | b: 1 kind={mine}")).action is PlanAction.DELTA

    @pytest.mark.parametrize(
        ("mine", "theirs", "right"),
        [
            ("btrfs", "image", '"image" or "lvm-thin"'),
            ("zfs", "lvm-thin", '"image" or "lvm-thin"'),
            ("image", "zfs", '"zfs"'),
            ("btrfs", "zfs", '"zfs"'),
            ("zfs", "btrfs", '"btrfs"'),
        ],
    )
    def test_others_are_told_what_would_be_right(self, mine: str, theirs: str, right: str) -> None:
        found = row(view(f"a: 1 2 kind={theirs} | b: 1 kind={mine}"))
        assert found.refusal is not None
        assert found.refusal.reasons == ("BACKEND_MISMATCH",)
        assert found.why == (
            f"b keeps vm1 as {mine}, the primary a as {theirs}, and neither can read what the other sends: "
            f"configure vm1 on b with backend = {right}"
        )

    def test_only_who_can_be_read_is_a_source(self) -> None:
        seen = view("a: 1 2 3 kind=image | b: 1 kind=lvm-thin | c: 1 2 3 kind=lvm-thin | d: 1 2 3 kind=zfs")
        assert row(seen).sources == ("a", "c")
