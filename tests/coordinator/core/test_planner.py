"""What each replica needs: one table for every state, and what holds of every plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from coordinator.core.claims import is_here
from coordinator.core.cluster import PlanAction, ReplicaPlan, ReplicaState, Size, VolumePlan, VolumeView
from coordinator.core.planner import plan_etag, plan_volume
from coordinator.core.status import problems_of_replica
from resilver.lineage import Lineage
from resilver.volume import Grant, LiveState
from tests.coordinator.core.histories import NOW_MS, snapshot, view
from tests.coordinator.core.worlds import views

LAW = settings(max_examples=200, deadline=None)


def plan(seen: VolumeView, **options: object) -> VolumePlan:
    asked = {"target": None, "takes_snapshot": False, "now_ms": NOW_MS, **options}
    return plan_volume(seen, **asked)  # type: ignore[arg-type]  # options by name


def row(seen: VolumeView, node: str = "b", **options: object) -> ReplicaPlan:
    return next(one for one in plan(seen, **options).replicas if one.node == node)


class TestRows:
    @pytest.mark.parametrize(
        ("histories", "state", "action", "copied", "preserve"),
        [
            ("a: 1 2 3 | b: 1 2 3", "IN_SYNC", "NONE", " < ", ""),
            ("a: 1 2 3 | b: 1 2", "STALE", "DELTA", "1-2 < a", ""),
            ("a: 1 2 3 | b: 1 2 | c: 1 2 3", "STALE", "DELTA", "1-2 < a c", ""),
            ("a: 1 2 3 | b: 1 2 | c: 1 2 3 | d: 1 2 3 prio=1", "STALE", "DELTA", "1-2 < a d c", ""),
            ("a: 1 2 3 | b: 1 2 ?", "STALE", "DELTA", "1-2 < a", ""),
            ("a: 1 2 3 | b: 1 2 !", "STALE", "DELTA", "1-2 < a", ""),
            ("a: 1 2 3 | b: 1 2 3 !", "STALE", "DELTA", "1-3 < a", ""),
            ("a: 1 2 3 | b: 1 2 3 ?", "STALE", "DELTA", "1-3 < a", ""),
            ("a: 1 2 3 | b: 1 2 3 *", "DIVERGED", "DELTA", "1-3 < a", "live writes"),
            ("a: 1 2 3 | b: 1 2 *", "DIVERGED", "DELTA", "1-2 < a", "live writes"),
            ("a: 1 2 3 | b: 1 2' 3' *", "DIVERGED", "DELTA", "1-1 < a", "1-2, 1-3|live writes"),
            ("a: 1 2 3 | b: 1 2' ?", "DIVERGED", "DELTA", "1-1 < a", "1-2|live writes, if there are any"),
            ("a: 1 2 3 | b: 1 2 3 4", "DIVERGED", "DELTA", "1-3 < a", "1-4"),
            ("a: 1 2 3 | b: empty", "EMPTY", "FULL", " < a", ""),
            ("a: 1 2 3 | b: empty | c: 1 2 3 | d: 1 2", "EMPTY", "FULL", " < a c", ""),
            # Pruned ones are no base, and no source; each source must have base and target.
            ("a: 1 (2) 3 | b: 1 2", "STALE", "DELTA", "1-1 < a", ""),
            ("a: 1 (2) 3 | b: 1 2 | c: 1 2 3", "STALE", "DELTA", "1-2 < c", ""),
            ("a: 1 2 3 | b: 1 2 | c: (1) (2) 3", "STALE", "DELTA", "1-2 < a", ""),
            ("a: 1 2 (3) | b: 1 2 | c: 1 2 3 4'", "STALE", "DELTA", "1-2 < c", ""),
            ("a: 1 2 3 | b: 1 2 | c: away 1 2 3", "STALE", "DELTA", "1-2 < a", ""),
            ("a: 1 2 3 | b: 1 2 | c: foreign 1 2 3", "STALE", "DELTA", "1-2 < a", ""),
        ],
    )
    def test_that_go(self, histories: str, state: str, action: str, copied: str, preserve: str) -> None:
        found = row(view(histories))
        assert (found.state, found.action) == (ReplicaState(state), PlanAction(action))
        assert f"{found.base} < {' '.join(found.sources)}" == copied
        assert found.preserve == tuple(preserve.split("|") if preserve else ())
        assert found.replace_own_data is (state == "DIVERGED")
        assert not found.replace_unrelated
        assert found.refusal is None
        assert (found.target, str(found.target_cp), found.exact) == ("1-3", "1-3", True)
        assert found.why

    @pytest.mark.parametrize(
        ("histories", "reason", "command"),
        [
            ("a: 1 2 | b: silent", "NODE_OFFLINE", "resilver nodes"),
            ("a: 1 2 | b: away 1", "NODE_OFFLINE", "resilver nodes"),
            ("a: (1) 2 | b: 1", "BASE_GONE", "resilver resync vm1 --to b --full"),
            ("a: 1 (2) 3 | b: (1) 2 | c: 1 (2) 3", "BASE_GONE", "resilver resync vm1 --to b --full"),
            ("a: (1) 2 | b: 1 2' *", "BASE_GONE", "resilver resync vm1 --to b --full"),
            ("a: 1 2 | b: 1' 2'", "REPLICA_UNRELATED", "resilver resync vm1 --replace b"),
            ("a: 1 2 | b: raw *", "REPLICA_UNRELATED", "resilver resync vm1 --replace b"),
            ("a: 1 2 | b: foreign 1 2", "REPLICA_FOREIGN", "resilver resync vm1 --replace b"),
            ("a: 1 2 | b: lost", "REPLICA_LOST", "resilver resync vm1 --replace b"),
            ("a: 1 (2) | b: empty", "NO_SOURCE", "resilver snapshots vm1"),
        ],
    )
    def test_that_are_blocked_and_what_to_run(self, histories: str, reason: str, command: str) -> None:
        found = row(view(histories))
        assert found.action is PlanAction.BLOCKED
        assert found.refusal is not None
        assert (found.refusal.reasons, found.refusal.next_command) == ((reason,), command)
        assert found.why == found.refusal.message
        assert (found.replace_own_data, found.replace_unrelated) == (False, False)
        assert (found.preserve, found.sources) == ((), ())

    def test_a_copy_that_could_not_be_looked_at_is_not_called_gone(self) -> None:
        seen = view("a: 1 2 | b: lost")
        report = seen.replicas["b"].report
        assert report is not None
        told = replace(report, problems=("IN_USE: /r is in use by another agent",))
        seen = replace(seen, replicas={**seen.replicas, "b": replace(seen.replicas["b"], report=told)})
        found = row(seen)
        assert found.refusal is not None
        assert (found.refusal.reasons, found.refusal.next_command) == (("REPLICA_LOST",), "resilver explain vm1 b")
        assert "cannot look at its copy (IN_USE: /r is in use by another agent)" in found.why
        assert row(seen, replace=frozenset({"b"})).action is PlanAction.FULL
        (lost, *_) = problems_of_replica(seen, "b", NOW_MS)
        assert (lost.reason, lost.next_command) == ("LOST", "")
        assert "cannot look at its copy of vm1" in lost.message
        gone = replace(told, problems=("REPLICA_LOST: there was data", "IO_ERROR: x"))
        seen = replace(seen, replicas={**seen.replicas, "b": replace(seen.replicas["b"], report=gone)})
        assert row(seen).refusal.next_command == "resilver resync vm1 --replace b"

    def test_a_base_that_is_gone_names_both_lists(self) -> None:
        found = row(view("a: (1) (2) 3 4 | b: 1 2"))
        assert "1-2, 1-1 here, 1-4, 1-3 there" in found.why

    def test_backends_do_not_mix(self) -> None:
        seen = view("a: 1 2 | b: 1")
        report = seen.replicas["b"].report
        assert report is not None
        other = replace(seen.replicas["b"], report=replace(report, backend="zfs"))
        found = row(replace(seen, replicas={**seen.replicas, "b": other}))
        assert found.refusal is not None
        assert found.refusal.reasons == ("BACKEND_MISMATCH",)

    def test_one_in_use_is_planned_and_told_that_its_commit_waits(self) -> None:
        seen = view("a: 1 2 | b: 1")
        report = seen.replicas["b"].report
        assert report is not None
        live = replace(report.live, in_use=True, in_use_by=("qemu pid 7",))
        used = replace(seen.replicas["b"], report=replace(report, live=live))
        found = row(replace(seen, replicas={**seen.replicas, "b": used}))
        assert found.action is PlanAction.DELTA
        assert found.why.endswith("its live copy is in use by qemu pid 7: the commit waits until it is closed")


class TestNaming:
    @pytest.mark.parametrize(
        ("b", "preserve", "expected_tip"),
        [
            ("1' 2' *", ("snapshots 1-1, 1-2", "the whole live copy"), "1-2'"),
            ("raw *", ("the whole live copy",), ""),
            ("foreign 1 2", ("snapshots 1-1, 1-2", "the whole live copy"), "1-2"),
            ("lost", (), ""),
        ],
    )
    def test_a_node_by_replace_brings_everything_and_keeps_what_was_there(
        self, b: str, preserve: tuple[str, ...], expected_tip: str
    ) -> None:
        found = row(view(f"a: 1 2 | b: {b}"), replace=frozenset({"b"}))
        assert (found.action, found.base, found.sources) == (PlanAction.FULL, "", ("a",))
        assert found.replace_unrelated
        assert (found.preserve, found.expected_tip) == (preserve, expected_tip)

    def test_a_node_that_need_not_be_named_is_treated_as_ever(self) -> None:
        assert row(view("a: 1 2 | b: 1"), replace=frozenset({"b"})) == row(view("a: 1 2 | b: 1"))

    def test_a_diverged_node_is_replaced_although_it_keeps_being_written(self) -> None:
        found = row(view("a: 1 2 | b: 1 *"), replace=frozenset({"b"}))
        assert (found.action, found.base) == (PlanAction.DELTA, "1-1")
        assert (found.replace_own_data, found.replace_unrelated) == (True, True)
        assert found.preserve == ("live writes",)

    def test_another_node_does_not_help(self) -> None:
        assert row(view("a: 1 2 | b: lost"), replace=frozenset({"c"})).action is PlanAction.BLOCKED

    def test_some_nodes_only(self) -> None:
        found = plan(view("a: 1 2 | b: 1 | c: 1 | d: 1"), nodes=frozenset({"d", "b", "a"}))
        assert [one.node for one in found.replicas] == ["b", "d"]


class TestFull:
    def test_is_only_done_when_asked_for(self) -> None:
        found = row(view("a: (1) 2 | b: 1"), full=True)
        assert (found.action, found.base, found.sources) == (PlanAction.FULL, "", ("a",))
        assert found.why == "a full copy was asked for"

    def test_keeps_what_a_diverged_replica_has(self) -> None:
        found = row(view("a: (1) 2 3 | b: 1 2' *"), full=True)
        assert (found.action, found.replace_own_data) == (PlanAction.FULL, True)
        assert found.preserve == ("1-2", "live writes")

    def test_does_not_copy_what_is_there(self) -> None:
        assert row(view("a: 1 2 | b: 1 2"), full=True).action is PlanAction.NONE
        found = row(view("a: 1 2 | b: 1 2 *"), full=True)
        assert (found.action, found.base) == (PlanAction.DELTA, "1-2")


class TestTakingThePointFirst:
    def test_the_primary_alone_has_it_and_nothing_is_exact(self) -> None:
        found = plan(view("a: 1 2 * | b: 1 2 | c: 1 | d: empty"), takes_snapshot=True)
        assert (str(found.target_cp), found.takes_snapshot) == ("1-3", True)
        assert [(one.node, one.action, one.base, one.sources) for one in found.replicas] == [
            ("b", PlanAction.DELTA, "1-2", ("a",)),
            ("c", PlanAction.DELTA, "1-1", ("a",)),
            ("d", PlanAction.FULL, "", ("a",)),
        ]
        assert not any(one.exact or one.target for one in found.replicas)

    def test_an_epoch_that_is_being_opened_takes_its_opening_point(self) -> None:
        found = plan(view("b: 1 2 nogrant | a: 1 2 3", primary="b", newest="2", epoch=2, opening=True))
        assert (str(found.target_cp), found.takes_snapshot) == ("2-3", True)
        assert found.replicas[0].preserve == ("1-3",)

    def test_the_first_of_all_is_1_1(self) -> None:
        seen = view("a: * raw | b: empty", epoch=1, opening=True)
        found = plan(seen)
        assert str(found.target_cp) == "1-1"
        assert found.replicas[0].action is PlanAction.FULL

    def test_a_base_that_only_another_secondary_still_has_is_no_base(self) -> None:
        found = row(view("a: (1) 2 3 | b: 1 | c: 1 2 3"), takes_snapshot=True)
        assert found.refusal is not None
        assert found.refusal.reasons == ("BASE_GONE",)


class TestWholePlans:
    def test_a_primary_that_is_away_plans_nothing(self) -> None:
        found = plan(view("a: away 1 2 | b: 1"))
        assert found.refusal is not None
        assert (found.refusal.reasons, found.replicas) == (("PRIMARY_AWAY",), ())

    def test_without_a_point_there_is_nothing_to_bring(self) -> None:
        found = plan(view("a: * raw | b: empty"))
        assert found.refusal is not None
        assert found.refusal.next_command == "resilver plan vm1 --snapshot"

    def test_an_older_target(self) -> None:
        seen = view("a: 1 2 3 | b: 1 | c: 1 2 | d: 1 2'")
        found = plan(seen, target=snapshot("2", "1 2 3"))
        assert str(found.target_cp) == "1-2"
        assert [(one.node, one.action, one.base, one.sources) for one in found.replicas] == [
            ("b", PlanAction.DELTA, "1-1", ("a", "c")),
            ("c", PlanAction.NONE, "", ()),
            ("d", PlanAction.DELTA, "1-1", ("a", "c")),
        ]

    def test_a_primary_without_what_was_acknowledged_is_nobodys_measure(self) -> None:
        found = row(view("a: * | b: 1 2", newest="2"), takes_snapshot=True)
        assert found.refusal is not None
        assert found.refusal.reasons == ("PRIMARY_BEHIND",)

    def test_going_back_to_an_older_target_preserves_all_that_is_off_its_lineage(self) -> None:
        seen = view("a: 1 2 3 | b: 1 2 3'")
        found = row(seen, target=snapshot("1", "1"))
        assert (found.base, found.preserve) == ("1-1", ("1-2, 1-3",))
        found = row(view("a: 1 2 3 | b: 1 2 !"), target=snapshot("1", "1"))
        assert (found.base, found.preserve, found.replace_own_data) == ("1-1", ("1-2",), True)


class TestEtag:
    SEEN = view("a: 1 2 3 | b: 1 2 | c: 1 2' 3' * | d: empty")

    def test_is_short_and_the_same_for_the_same_plan(self) -> None:
        found = plan_etag([plan(self.SEEN)])
        assert len(found) == 8
        assert int(found, 16) >= 0
        assert plan_etag([plan(self.SEEN)]) == found

    def test_sizes_times_and_free_room_do_not_change_it(self) -> None:
        made = plan(self.SEEN)
        rows = tuple(
            replace(one, size=Size(1, 2, 3), preserve_bytes=7, free_bytes=9, why="other words") for one in made.replicas
        )
        assert plan_etag([replace(made, replicas=rows)]) == plan_etag([made])
        assert plan_etag([plan(self.SEEN, now_ms=NOW_MS + 5000)]) == plan_etag([made])

    @pytest.mark.parametrize(
        "histories",
        [
            "a: 1 2 3 4 | b: 1 2 | c: 1 2' 3' * | d: empty",
            "a: 1 2 3 | b: 1 | c: 1 2' 3' * | d: empty",
            "a: 1 2 3 | b: 1 2 * | c: 1 2' 3' * | d: empty",
            "a: 1 2 3 | b: 1 2 | c: 1 2' 3' | d: empty",
            "a: 1 2 3 | b: 1 2 | c: 1 2' * | d: empty",
            "a: 1 2 3 | b: 1 2 | c: 1 2' 3' * | d: lost",
            "a: 1 2 3 | b: 1 2 | c: 1 2' 3' *",
        ],
    )
    def test_what_would_be_done_otherwise_changes_it(self, histories: str) -> None:
        assert plan_etag([plan(view(histories))]) != plan_etag([plan(self.SEEN)])

    def test_so_does_how_it_is_asked(self) -> None:
        asked = [{}, {"takes_snapshot": True}, {"full": True}, {"nodes": frozenset({"b"})}]
        assert len({plan_etag([plan(self.SEEN, **options)]) for options in asked}) == len(asked)

    def test_the_order_of_volumes_does_not(self) -> None:
        one, two = plan(self.SEEN), replace(plan(self.SEEN), volume="vm2")
        assert plan_etag([one, two]) == plan_etag([two, one])


@st.composite
def settled(draw: st.DrawFn) -> VolumeView:
    """A view whose primary is here with its grant, as an election leaves it."""
    seen = draw(views().filter(lambda one: any(is_here(one, replica) for replica in one.replicas.values())))
    here = [node for node, replica in sorted(seen.replicas.items()) if is_here(seen, replica)]
    base = seen.entry or view("a: 1").entry
    assert base is not None
    record = replace(base.record, primary=draw(st.sampled_from(here)))
    primary = seen.replicas[record.primary]
    assert primary.report is not None
    grant = Grant(record.volume_id, record.epoch, record.epoch_id)
    report = replace(primary.report, grant=grant, volume_id=record.volume_id)
    return replace(
        seen,
        entry=replace(base, record=record, recovering=False),
        replicas={**seen.replicas, record.primary: replace(primary, report=report)},
    )


OPTIONS = st.fixed_dictionaries(
    {
        "takes_snapshot": st.booleans(),
        "full": st.booleans(),
        "replace": st.sampled_from([frozenset(), frozenset({"a", "b", "c", "d"})]),
    }
)


@LAW
@given(settled(), OPTIONS)
def test_whatever_is_replaced_is_preserved_by_name_or_contained(seen: VolumeView, options: dict[str, object]) -> None:
    primary = seen.replicas[seen.record.primary].lineage
    for one in plan(seen, **options).replicas:
        replica = seen.replicas[one.node]
        if one.action not in (PlanAction.DELTA, PlanAction.FULL) or replica.report is None:
            continue
        event(f"{one.state.value} {one.action.value}")
        own = [record for record in replica.lineage if primary.find(record.id) is None]
        live = replica.report.live.state
        if own:
            assert one.replace_own_data or one.replace_unrelated
            assert one.preserve
        if live is LiveState.MODIFIED:
            assert one.preserve
            assert one.preserve[-1] in ("live writes", "the whole live copy")
        assert one.expected_tip == replica.lineage.tip_id
        named = one.node in options["replace"]  # type: ignore[operator]  # a frozenset
        assert one.replace_unrelated <= named


@LAW
@given(settled(), OPTIONS)
def test_the_base_is_had_by_the_replica_and_every_source_and_nothing_newer_is(
    seen: VolumeView, options: dict[str, object]
) -> None:
    for one in plan(seen, **options).replicas:
        mine = present(seen.replicas[one.node].lineage)
        for source in one.sources:
            theirs = seen.replicas[source]
            assert is_here(seen, theirs)
            assert source != one.node
            assert one.target in {*present(theirs.lineage), ""}
            assert one.base in {*present(theirs.lineage), ""}
        if one.action is PlanAction.DELTA:
            assert one.base in mine
            assert one.sources or one.base == one.target
            newer = {record.id for record in seen.replicas[seen.record.primary].lineage.after(one.base)}
            for source in one.sources:
                assert not newer & mine & present(seen.replicas[source].lineage)
        if one.action is PlanAction.FULL:
            asked = options["full"] or one.replace_unrelated or one.state is ReplicaState.EMPTY
            assert asked, "never a full copy where a delta was expected"
            assert one.sources


@LAW
@given(settled(), OPTIONS, st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_reports_changes_no_plan(seen: VolumeView, options: dict[str, object], order: list[str]) -> None:
    other = replace(seen, replicas={node: seen.replicas[node] for node in order if node in seen.replicas})
    assert plan(other, **options) == plan(seen, **options)


def present(lineage: Lineage) -> set[str]:
    return {record.id for record in lineage if record.present}
