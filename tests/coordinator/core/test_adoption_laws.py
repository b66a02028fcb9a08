"""What holds of every volume that another tool has mirrored, whatever that tool has made, sent and let go of.

One true history `t0 t1 …` is written on one node. Each node has kept some of what it had of it; a node may have made
snapshots of its own (`x…`), and its order may be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from coordinator.core.cluster import Elected, PlanAction, ReplicaState, ReplicaView, VolumeEntry, VolumeView
from coordinator.core.election import elect
from coordinator.core.planner import plan_volume
from coordinator.core.status import status_of
from resilver.lineage import ConsistencyPoint, Lineage, Origin, Relation, Snapshot, newest_shared, relate
from resilver.volume import Grant, LiveCopy, LiveState, Presence, ReplicaReport, VolumeRecord

LAW = settings(max_examples=300, deadline=None)
NODES = ("a", "b", "c")
NOW_MS = 1_700_000_000_000
LIVES = st.sampled_from([LiveState.UNMODIFIED, LiveState.MODIFIED, LiveState.ABSENT, LiveState.UNKNOWN])


@dataclass(frozen=True)
class Held:
    """What one node really is: how far it has come, and what it has that nobody else has."""

    view: ReplicaView
    reached: int
    own_tip: bool
    shuffled: bool


def lineage(names: list[str]) -> Lineage:
    """Adopted snapshots, oldest first; each one's parent is the one before it on this node."""
    records = [
        Snapshot(name, parent=names[at - 1] if at else "", origin=Origin.ADOPTED, note=f"auto-{name}")
        for at, name in enumerate(names)
    ]
    return Lineage(tuple(reversed(records)))


@st.composite
def nodes(draw: st.DrawFn, node: str, length: int) -> Held:
    reached = draw(st.integers(0, length - 1))
    kept = [f"t{at}" for at in range(reached) if draw(st.booleans())] + [f"t{reached}"]
    own = [f"x{node}{at}" for at in range(draw(st.sampled_from([0, 0, 0, 1, 2])))]
    at_tip = bool(own) and draw(st.booleans())
    names = [*kept, *own] if at_tip else [*own, *kept]
    shuffled = draw(st.integers(0, 7)) == 0
    if shuffled:
        names = draw(st.permutations(names))
        shuffled = [name for name in names if name in kept] != kept
        at_tip = bool(own) and names[-1] in own
    report = ReplicaReport(
        "vm1", Presence.PRESENT, lineage=lineage(names), live=LiveCopy(draw(LIVES)), backend="btrfs",
        priority=draw(st.integers(0, 1)),
    )  # fmt: skip
    return Held(ReplicaView(node, report, NOW_MS, draw(st.integers(0, 9)) > 0), reached, at_tip, shuffled)


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Held]:
    length = draw(st.integers(1, 6))
    return {node: draw(nodes(node, length)) for node in draw(st.sampled_from([NODES[:2], NODES]))}


def first_sight(world: dict[str, Held]) -> VolumeView:
    return VolumeView("vm1", None, {node: held.view for node, held in world.items()})


def opened(world: dict[str, Held], winner: str) -> VolumeView:
    """The same once the winner has its epoch and its first CP, on top of what it had."""
    report = world[winner].view.report
    assert report is not None
    top = Snapshot("s1", ConsistencyPoint(1, 1), report.lineage.tip_id, epoch_id="E1", create_time_ms=NOW_MS)
    record = VolumeRecord("vm1", "V", 1, "E1", winner, (winner,), top.cp, top.id)
    reigning = replace(
        report, volume_id="V", lineage=Lineage((top, *report.lineage)), record=record, grant=Grant("V", 1, "E1")
    )
    replicas = {node: held.view for node, held in world.items()}
    replicas[winner] = replace(replicas[winner], report=reigning, fresh=True)
    return VolumeView("vm1", VolumeEntry(record), replicas)


@LAW
@given(worlds())
def test_who_is_elected_without_a_word_has_come_as_far_as_anybody(world: dict[str, Held]) -> None:
    found = elect(first_sight(world), now_ms=NOW_MS)
    if not isinstance(found, Elected):
        event(f"refused {found.refusal.reasons}")
        return
    event("elected")
    winner = world[found.winner].view
    assert winner.report is not None
    assert winner.report.live.state is not LiveState.ABSENT
    for node, held in world.items():
        assert held.view.fresh
        if node == found.winner:
            continue
        assert winner.lineage.find(held.view.lineage.tip_id) is not None, "what it has newest is here too"
        assert not held.view.live_modified
        if not held.shuffled and not world[found.winner].shuffled:
            assert world[found.winner].reached >= held.reached or world[found.winner].own_tip
        assert relate(winner.lineage, held.view.lineage) in (Relation.EQUAL, Relation.AHEAD)


@st.composite
def plain_worlds(draw: st.DrawFn) -> dict[str, Held]:
    """One node is written to, and has come the furthest; the others have older ones, of which it has the newest."""
    length = draw(st.integers(1, 6))
    kept = sorted(draw(st.sets(st.integers(0, length - 1), min_size=1)))
    live = draw(st.sampled_from([LiveState.MODIFIED, LiveState.UNKNOWN, LiveState.UNMODIFIED]))
    names = {"a": kept}
    for node in draw(st.sampled_from([NODES[1:2], NODES[1:]])):
        newest = draw(st.sampled_from(kept))
        names[node] = [at for at in range(newest) if draw(st.booleans())] + [newest]
    return {
        node: Held(
            ReplicaView(
                node,
                ReplicaReport(
                    "vm1",
                    Presence.PRESENT,
                    lineage=lineage([f"t{at}" for at in here]),
                    live=LiveCopy(
                        live if node == "a" else draw(st.sampled_from([LiveState.ABSENT, LiveState.UNMODIFIED]))
                    ),
                    priority=1 if node == "a" else 0,
                ),
                NOW_MS,
                fresh=True,
            ),
            here[-1],
            own_tip=False,
            shuffled=False,
        )
        for node, here in names.items()
    }


@LAW
@given(plain_worlds())
def test_a_plain_history_is_never_refused(world: dict[str, Held]) -> None:
    found = elect(first_sight(world), now_ms=NOW_MS)
    assert isinstance(found, Elected)
    if world["a"].view.live_modified:
        assert found.winner == "a"
    for row in plan_volume(opened(world, "a"), target=None, takes_snapshot=False, now_ms=NOW_MS).replicas:
        assert (row.state, row.action) == (ReplicaState.STALE, PlanAction.DELTA)
        assert row.base == world[row.node].view.lineage.tip_id


@LAW
@given(worlds(), st.sampled_from(NODES))
def test_the_first_delta_starts_from_the_newest_that_both_have(world: dict[str, Held], winner: str) -> None:
    assume(winner in world)
    report = world[winner].view.report
    assume(report is not None and report.live.state is not LiveState.ABSENT)
    seen = opened(world, winner)
    reference = seen.replicas[winner].lineage
    for row in plan_volume(seen, target=None, takes_snapshot=False, now_ms=NOW_MS).replicas:
        held = world[row.node]
        if not held.view.fresh:
            assert row.action is PlanAction.BLOCKED
            continue
        both = [record.id for record in reference if held.view.lineage.find(record.id) is not None]
        assert row.base == (both[0] if both else "")
        assert (row.action is PlanAction.DELTA) == bool(both), "nothing is copied whole in silence"
        assert row.preserve in ((), ("live writes",), ("live writes, if there are any",)) or not both
        assert row.base_name == (f"auto-{row.base}" if row.base else "")
        if row.action is PlanAction.DELTA:
            event(row.state.value)
            fork = newest_shared(held.view.lineage, reference)
            behind = fork is not None and fork.id == held.view.lineage.tip_id
            assert (row.state is ReplicaState.DIVERGED) == (not behind or _modified(held)), (
                "its newest is the newest of the primary's that it has"
            )
            assert row.replace_own_data is (row.state is ReplicaState.DIVERGED)


@LAW
@given(worlds(), st.sampled_from(NODES))
def test_once_an_epoch_is_open_nothing_of_another_tools_deposes_its_primary(
    world: dict[str, Held], winner: str
) -> None:
    assume(winner in world)
    report = world[winner].view.report
    assume(report is not None and report.live.state is not LiveState.ABSENT)
    seen = opened(world, winner)
    found = elect(seen, now_ms=NOW_MS)
    assert isinstance(found, Elected)
    assert (found.winner, found.new_epoch) == (winner, False)
    away = replace(seen, replicas={**seen.replicas, winner: replace(seen.replicas[winner], fresh=False)})
    gone = elect(away, now_ms=NOW_MS)
    assert not isinstance(gone, Elected), "the first CP is nowhere else"


@LAW
@given(worlds(), st.sampled_from(NODES), st.lists(st.sampled_from(["t0", "t5", "xz"]), unique=True))
def test_what_is_beside_the_lineages_decides_nothing(world: dict[str, Held], winner: str, beside: list[str]) -> None:
    assume(winner in world)
    others = tuple(Snapshot(name, origin=Origin.ADOPTED, note=name) for name in beside)

    def with_others(seen: VolumeView) -> VolumeView:
        return replace(
            seen,
            replicas={
                node: replace(one, report=replace(one.report, others=others)) if one.report is not None else one
                for node, one in seen.replicas.items()
            },
        )

    for seen in (first_sight(world), opened(world, winner)):
        assert elect(with_others(seen), now_ms=NOW_MS) == elect(seen, now_ms=NOW_MS)
        for node in world:
            assert status_of(with_others(seen), node) == status_of(seen, node)


def _modified(held: Held) -> bool:
    return held.view.report is not None and held.view.report.live.state is LiveState.MODIFIED
