"""What a replica is to the primary, what a volume is, and what an operator is told of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.cluster import Pause, ReplicaState, ReplicaView, Role, VolumeState, VolumeView
from coordinator.core.status import (
    problems_of_replica,
    problems_of_volume,
    reference_lineage,
    role_of,
    status_of,
    volume_state,
)
from resilver.lineage import Lineage
from resilver.volume import Presence
from tests.coordinator.core.histories import HEARD_MS, NOW_MS, lineage, view
from tests.coordinator.core.worlds import views

LAW = settings(deadline=None)


def changed(seen: VolumeView, node: str, **facts: object) -> VolumeView:
    """The view with other facts in one report; `live_…` facts are the live copy's."""
    one = seen.replicas[node]
    assert one.report is not None
    live = {key.removeprefix("live_"): value for key, value in facts.items() if key.startswith("live_")}
    rest = {key: value for key, value in facts.items() if not key.startswith("live_")}
    report = replace(one.report, live=replace(one.report.live, **live), **rest)
    return replace(seen, replicas={**seen.replicas, node: replace(one, report=report)})


@pytest.mark.parametrize(
    ("histories", "state", "behind", "own"),
    [
        ("a: 1 2 3 | b: 1 2 3", "IN_SYNC", 0, 0),
        ("a: 1 2 3 * | b: 1 2 3", "IN_SYNC", 0, 0),
        ("a: 1 2 3 | b: 1 2 3 *", "DIVERGED", 0, 0),
        ("a: 1 2 3 | b: 1 2 3 ?", "STALE", 0, 0),
        ("a: 1 2 3 | b: 1 2 3 !", "STALE", 0, 0),
        ("a: 1 2 3 | b: 1", "STALE", 2, 0),
        ("a: 1 2 3 | b: 1 ?", "STALE", 2, 0),
        ("a: 1 2 3 | b: 1 !", "STALE", 2, 0),
        ("a: 1 2 3 | b: 1 *", "DIVERGED", 2, 0),
        ("a: 1 2 3 | b: 1 2' 3' 4'", "DIVERGED", 2, 3),
        ("a: 1 2 3 | b: 1 2 3 4", "DIVERGED", 0, 1),
        ("a: 1 2-2 | b: 1 2 3", "DIVERGED", 1, 2),
        ("a: 1 2 3 | b: 1' 2'", "UNRELATED", None, None),
        ("a: 1 2 3 | b: *", "UNRELATED", None, None),
        ("a: 1 2 3 | b: raw *", "UNRELATED", None, None),
        ("a: 1 2 3 | b: raw !", "EMPTY", 3, None),
        ("a: 1 2 3 | b: foreign 1 2 3", "FOREIGN", None, None),
        ("a: 1 2 3 | b: empty", "EMPTY", 3, None),
        ("a: 1 2 3 | b: lost", "LOST", None, None),
        ("a: 1 2 3 | b: silent", "UNKNOWN", None, None),
        ("a: 1 2 3 | b: away 1 2", "UNKNOWN", 1, 0),
        ("a: away 1 2 3 | b: 1 2", "STALE", 1, 0),
        ("a: empty | b: 1 2 | c: 1 2 3", "STALE", 1, 0),
        ("a: silent | b: 1 2", "UNKNOWN", None, None),
        ("a: * | b: 1 2 3", "UNKNOWN", None, None),
    ],
)
def test_every_state(histories: str, state: str, behind: int | None, own: int | None) -> None:
    found = status_of(view(histories, newest="3" if "2-2" not in histories else "2-2"), "b")
    assert (found.state, found.behind_cps, found.own_cps) == (ReplicaState(state), behind, own)


@pytest.mark.parametrize(
    ("a", "state"),
    [
        ("1 2 *", "IN_SYNC"),
        ("1 2 !", "IN_SYNC"),
        ("*", "IN_SYNC"),
        ("empty", "EMPTY"),
        ("lost", "LOST"),
        ("foreign 1", "FOREIGN"),
        ("away 1", "UNKNOWN"),
    ],
)
def test_the_primary_is_compared_with_nothing_but_itself(a: str, state: str) -> None:
    assert status_of(view(f"a: {a} | b: 1 2", newest="2"), "a").state is ReplicaState(state)


def test_common_is_what_both_still_have_and_fork_is_where_they_split() -> None:
    found = status_of(view("a: 1 2 (3) 4 | b: 1 2 3 4'"), "b")
    assert found.common is not None
    assert found.fork is not None
    assert (found.common.id, found.fork.id) == ("1-2", "1-3")


def test_what_an_away_member_has_in_common_is_still_known() -> None:
    found = status_of(view("a: 1 2 3 | b: away 1 2"), "b")
    assert found.common is not None
    assert found.common.id == "1-2"


class TestReference:
    def test_is_the_primarys_last_known_lineage_also_if_it_is_away(self) -> None:
        assert reference_lineage(view("a: away 1 2 | b: 1 2 3", newest="3")) == lineage("1 2")

    def test_without_it_what_anybody_has_up_to_the_newest_known_cp(self) -> None:
        seen = view("a: lost | b: away 1 (2) 3 | c: 1 2 3 4'", newest="3")
        assert reference_lineage(seen) == lineage("1 2 3"), "c answers, b does not"

    def test_another_volumes_is_none(self) -> None:
        assert reference_lineage(view("a: foreign 1 2 | b: foreign 1 2 ", newest="2")) == Lineage()

    def test_nothing_at_first_sight(self) -> None:
        assert reference_lineage(view("a: 1 2 | b: 1", primary="")) == Lineage()


def test_roles() -> None:
    seen = view("a: 1 | b: 1 | c: 1", members="a b")
    assert [role_of(seen, node) for node in "abc"] == [Role.PRIMARY, Role.SECONDARY, Role.NEWCOMER]


@pytest.mark.parametrize(
    ("seen", "state"),
    [
        (view("a: 1 2 * | b: 1 2"), "HEALTHY"),
        (view("a: 1 2 | b: 1"), "DEGRADED"),
        (view("a: 1 2 | b: silent"), "DEGRADED"),
        (view("a: away 1 2 | b: 1 2"), "BLOCKED"),
        (view("a: 1 2 nogrant | b: 1 2"), "BLOCKED"),
        (view("a: 1 | b: 1 2", newest="2"), "BLOCKED"),
        (view("a: 1 2 | b: 1 2", opening=True), "OPENING"),
        (view("a: away 1 2 | b: 1 2", opening=True), "BLOCKED"),
        (view("a: 1 2 | b: 1 2", recovering=True), "RECOVERING"),
        (view("a: * | b: empty", primary=""), "UNINITIALIZED"),
    ],
)
def test_volume_states(seen: VolumeView, state: str) -> None:
    assert volume_state(seen) is VolumeState(state)


class TestProblems:
    """Each names its reason and the command to run next."""

    @pytest.mark.parametrize(
        ("histories", "reason", "message", "command"),
        [
            (
                "a: 1 2 3 | b: 1 2' 3' *",
                "DIVERGED",
                "split at 1-1; 2 CPs and live writes are only on b. Nothing replaces them until you say so.",
                "resilver explain vm1 b",
            ),
            (
                "a: 1 2 3 | b: 1 2 3'",
                "DIVERGED",
                "split at 1-2; 1 CP is only on b. Nothing replaces them until you say so.",
                "resilver explain vm1 b",
            ),
            (
                "a: 1 2 3 | b: 1 2",
                "STALE",
                "1h behind; common snapshot 1-2 is intact, a delta is possible.",
                "resilver resync vm1",
            ),
            (
                "a: away 1 2 3 | b: 1 2",
                "STALE",
                "1h behind; common snapshot 1-2 is intact, a delta is possible.",
                "resilver elect vm1",
            ),
            (
                "a: 1 2 3 | b: 1 2 3 !",
                "STALE",
                "its snapshots are in sync, but it has no live copy; a resync makes one",
                "resilver resync vm1",
            ),
            (
                "a: (1) 2 3 | b: 1",
                "BASE_GONE",
                "1h behind; no common snapshot is left on both sides (1-1); only a full copy is possible",
                "resilver resync vm1 --to b --full",
            ),
            (
                "a: 1 | b: silent",
                "UNKNOWN",
                "b does not answer; nothing has been heard of it",
                "resilver nodes",
            ),
            (
                "a: 1 | b: away 1 *",
                "UNKNOWN",
                "b does not answer; its last CP was 1-1, heard 47s ago, live copy modified",
                "resilver nodes",
            ),
            ("a: 1 | b: empty", "EMPTY", "empty: the first resync copies the whole volume", "resilver resync vm1"),
            (
                "a: 1 | b: lost",
                "LOST",
                "b had data of vm1, and its disk is not there: mount it, or begin anew",
                "resilver resync vm1 --replace b",
            ),
            (
                "a: 1 | b: foreign 1",
                "FOREIGN",
                "the data on b is another volume's (W); nothing replaces it until you name it",
                "resilver resync vm1 --replace b",
            ),
            (
                "a: 1 | b: *",
                "UNRELATED",
                "the data on b has nothing in common with vm1; nothing replaces it until you name it",
                "resilver resync vm1 --replace b",
            ),
        ],
    )
    def test_of_a_replica(self, histories: str, reason: str, message: str, command: str) -> None:
        assert problems_of_replica(view(histories), "b", NOW_MS) == ((reason, message, command),)

    def test_one_in_use_is_not_accused_of_anything(self) -> None:
        seen = changed(view("a: 1 2 | b: 1 2 ?"), "b", live_in_use=True, live_in_use_by=("qemu pid 7",))
        (problem,) = problems_of_replica(seen, "b", NOW_MS)
        assert problem.reason == "IN_USE"
        assert "in use by qemu pid 7" in problem.message

    def test_one_that_is_being_written_to_says_by_whom(self) -> None:
        seen = changed(view("a: 1 2 | b: 1 2 *"), "b", live_in_use=True, live_in_use_by=("qemu pid 7",))
        (problem,) = problems_of_replica(seen, "b", NOW_MS)
        assert problem.message == (
            "split at 1-2; there may be live writes that only b has, because it is open for writing. It is in use by "
            "qemu pid 7. Nothing replaces what it has until you say so."
        )

    def test_what_one_has_beside_what_it_may_have(self) -> None:
        seen = changed(view("a: 1 2 | b: 1 2' *"), "b", live_in_use=True)
        (problem,) = problems_of_replica(seen, "b", NOW_MS)
        assert "1 CP is only on b, and there may be live writes that only it has" in problem.message

    def test_a_newcomer_is_called_one(self) -> None:
        (problem,) = problems_of_replica(view("a: 1 | b: empty", members="a"), "b", NOW_MS)
        assert problem.message.startswith("a newcomer, empty")

    def test_live_writes_have_their_size(self) -> None:
        seen = changed(view("a: 1 2 | b: 1 2 *"), "b", live_modified_bytes=61 * 2**20)
        (problem,) = problems_of_replica(seen, "b", NOW_MS)
        assert "live writes (61.0 MiB) are only on b" in problem.message

    def test_room_fragments_and_what_the_agent_says(self) -> None:
        seen = changed(
            view("a: 1 | b: 1"),
            "a",
            free_bytes=2**29,
            reserve_bytes=2**30,
            live_extent_count=100_000,
            problems=("KEEPS_BEING_WRITTEN: again after 10 minutes", "leases do not work here"),
        )
        found = problems_of_replica(seen, "a", NOW_MS)
        assert [problem.reason for problem in found] == ["NO_SPACE", "FRAGMENTED", "KEEPS_BEING_WRITTEN", "REPORTED"]
        assert "512.0 MiB free is below the reserve of 1.0 GiB" in found[0].message
        assert "about 2.0 s" in found[1].message
        assert found[2].message == "again after 10 minutes"
        assert found[2].next_command == "resilver resync vm1 --replace a"

    @pytest.mark.parametrize(
        ("seen", "reasons"),
        [
            (view("a: 1 2 | b: 1 2"), ()),
            (view("a: away 1 2 | b: 1 2"), ("PRIMARY_AWAY",)),
            (view("a: 1 | b: 1 2", newest="2"), ("PRIMARY_BEHIND",)),
            (view("a: 1 2 grant=1x | b: 1 2"), ("PRIMARY_UNCLEAR",)),
            (view("a: 1 2 | b: silent", recovering=True), ("RECOVERING",)),
            (view("a: 1 2 | b: 1 2", recovering=True), ("RECOVERING",)),
            (view("a: 1 2 | b: 1 2", opening=True), ("OPENING",)),
            (view("a: empty | b: empty", primary=""), ("NO_DATA",)),
            (view("a: * | b: empty", primary=""), ("UNINITIALIZED",)),
            (view("a: g1 g2 raw ! | b: silent", primary=""), ("NO_DATA",)),
        ],
    )
    def test_of_a_volume(self, seen: VolumeView, reasons: tuple[str, ...]) -> None:
        assert tuple(problem.reason for problem in problems_of_volume(seen, NOW_MS)) == reasons

    def test_the_primary_that_is_away_is_told_with_its_last_cp(self) -> None:
        (problem,) = problems_of_volume(view("a: away 1 2 * | b: 1 2"), NOW_MS)
        assert problem.message == (
            "the primary a does not answer; its last CP was 1-2, heard 47s ago, live copy modified"
        )
        assert problem.next_command == "resilver elect vm1"

    def test_a_pause_says_by_whom_and_for_how_long(self) -> None:
        seen = view("a: 1 | b: 1")
        assert seen.entry is not None
        paused = replace(seen, entry=replace(seen.entry, pause=Pause("disk swap", HEARD_MS + 47_000 + 60_000, "ops")))
        (problem,) = problems_of_volume(paused, NOW_MS)
        assert problem == ("PAUSED", "paused by ops, for 1m more: disk swap", "resilver unpause vm1")


class TestLaws:
    @LAW
    @given(views())
    def test_a_state_is_decided_for_every_replica_and_everything_can_be_told(self, seen: VolumeView) -> None:
        assert volume_state(seen) in VolumeState
        assert all(problem.message for problem in problems_of_volume(seen, NOW_MS))
        for node in seen.replicas:
            assert all(problem.message for problem in problems_of_replica(seen, node, NOW_MS))

    @LAW
    @given(views(), st.randoms(use_true_random=False))
    def test_the_order_of_reports_decides_nothing(self, seen: VolumeView, random: object) -> None:
        nodes = list(seen.replicas)
        random.shuffle(nodes)  # type: ignore[attr-defined]  # hypothesis types its Random loosely
        other = replace(seen, replicas={node: seen.replicas[node] for node in nodes})
        assert volume_state(other) is volume_state(seen)
        assert [status_of(other, node) for node in sorted(nodes)] == [status_of(seen, node) for node in sorted(nodes)]

    @LAW
    @given(views())
    def test_the_words_mean_what_they_say(self, seen: VolumeView) -> None:
        reference = reference_lineage(seen)
        for node, replica in seen.replicas.items():
            status = status_of(seen, node)
            assert (status.state is ReplicaState.UNKNOWN) >= (not replica.fresh)
            if node != seen.record.primary:
                self.check(replica, status.state, reference)

    def check(self, replica: ReplicaView, state: ReplicaState, reference: Lineage) -> None:
        shared = replica.lineage.ids() & reference.ids()
        match state:
            case ReplicaState.IN_SYNC:
                assert replica.lineage.tip_id == reference.tip_id
                assert not replica.live_modified
            case ReplicaState.STALE:
                assert reference.find(replica.lineage.tip_id) is not None
            case ReplicaState.DIVERGED:
                assert shared
                assert replica.live_modified or reference.find(replica.lineage.tip_id) is None
            case ReplicaState.UNRELATED:
                assert not shared
            case ReplicaState.EMPTY | ReplicaState.LOST:
                assert not replica.lineage.records
                assert replica.report is not None
                assert replica.report.presence is not Presence.PRESENT or not shared
            case _:
                pass
