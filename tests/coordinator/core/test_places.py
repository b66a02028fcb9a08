"""Which resyncs begin when places are scarce, and whom each asks first."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.cluster import NodeView, PlanAction, ReplicaPlan, ReplicaState, Resync, VolumeEntry
from coordinator.core.context import Identity, Settings
from coordinator.core.engine import Engine
from coordinator.core.events import AgentConnected, AgentHeard, Loaded, ProgressReported, Ticked
from coordinator.core.places import Busy, Turns
from coordinator.core.rolls import RUNNING, Resyncs
from resilver.limits import NOT_KNOWN, NodeLimits
from resilver.volume import Progress, ResyncState, SourceShare, VolumeRecord

S = ResyncState
NODES = ("a", "b", "c", "d")


def resync(number: int, node: str, sources: tuple[str, ...], *, priority: int = 0, state: S = S.QUEUED) -> Resync:
    plan = ReplicaPlan(
        node, ReplicaState.STALE, PlanAction.DELTA, "", base="s1", target="s2", expected_tip="s1", sources=sources
    )
    return Resync(
        f"r{number}", f"v{number}", node, plan, epoch=1, principal="", term=1, create_time_ms=number, state=state,
        priority=priority,
    )  # fmt: skip


def turns(queued, limits=None, resyncs_max=100, running=()):
    known = dict.fromkeys(NODES, NOT_KNOWN) | (limits or {})
    made = Turns(Busy.with_all(running), known, resyncs_max)
    made.consider(queued)
    return made.begin


def test_a_target_gets_as_many_as_it_takes_and_another_is_not_held_up():
    queued = [resync(at, "b", ("a",)) for at in range(5)] + [resync(5, "c", ("a",))]
    assert turns(queued, {"b": NodeLimits(receive_max_count=2)}) == {"r0", "r1", "r5"}


def test_a_source_that_is_full_is_waited_for_unless_another_has_room():
    limits = {"a": NodeLimits(send_max_count=1), "b": NodeLimits(send_max_count=1)}
    queued = [resync(0, "c", ("a",)), resync(1, "c", ("a",)), resync(2, "c", ("a", "b")), resync(3, "c", ("b",))]
    assert turns(queued, limits) == {"r0", "r2"}


def test_what_a_node_has_not_told_is_no_bound_and_the_clusters_is():
    assert len(turns([resync(at, "b", ("a",)) for at in range(9)], resyncs_max=4)) == 4
    running = [resync(at, "c", ("a",), state=S.TRANSFERRING) for at in range(10, 13)]
    assert turns([resync(0, "b", ()), resync(1, "b", ())], resyncs_max=4, running=running) == {"r0"}


def test_the_higher_priority_goes_first_and_then_the_first_come():
    known = Resyncs()
    for at, priority in enumerate((0, 5, 0, -1, 5)):
        known.put(resync(at, "b", ("a",), priority=priority))
    assert [one.id for one in known.queued()] == ["r1", "r4", "r0", "r2", "r3"]
    known.put(replace(known["r1"], state=S.PREPARING))
    known.put(replace(known["r0"], state=S.CANCELLED))
    known.drop("r4")
    assert [one.id for one in known.queued()] == ["r2", "r3"]
    assert [one.id for one in known.running()] == ["r1"]


def test_whoever_serves_the_fewest_is_asked_first_and_the_plan_breaks_ties():
    told = Progress("r1", "v1", S.TRANSFERRING, sources=(SourceShare("a", 9, 0), SourceShare("c", 9, 100)))
    running = [
        replace(resync(1, "d", ("a", "b"), state=S.TRANSFERRING), progress=told),  # by now it is c that sends
        resync(2, "d", ("b", "c"), state=S.PREPARING),
    ]
    busy = Busy.with_all(running)
    assert busy.serving == Counter(b=1, c=1)
    assert busy.in_order(("c", "b", "a")) == ("a", "c", "b")
    assert busy.in_order(("b", "c")) == ("b", "c")


@given(
    st.lists(st.tuples(st.sampled_from(NODES), st.permutations(NODES), st.integers(0, 2)), max_size=30),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 20),
)  # fmt: skip
def test_no_node_is_swamped_and_none_is_idle_while_there_is_work_for_it(drawn, receive_max, send_max, resyncs_max):
    limits = {node: NodeLimits(receive_max_count=receive_max, send_max_count=send_max) for node in NODES}
    queued = [
        resync(at, node, tuple(one for one in sources if one != node)[:2], priority=priority)
        for at, (node, sources, priority) in enumerate(drawn)
    ]
    made = Turns(Busy(), limits, resyncs_max)
    made.consider(queued)
    assert made.busy.running == len(made.begin) <= resyncs_max
    assert all(count <= receive_max for count in made.busy.receiving.values())
    assert all(count <= send_max for count in made.busy.serving.values())
    if made.busy.running < resyncs_max:
        for left in (one for one in queued if one.id not in made.begin):
            full = made.busy.receiving[left.node] >= receive_max
            assert full or all(made.busy.serving[node] >= send_max for node in left.plan.sources)


def engine(resyncs: list[Resync], **settings: int) -> Engine:
    entries = {
        one.volume: VolumeEntry(VolumeRecord(one.volume, f"id-{one.volume}", 1, "e1", "a", ("a", one.node)))
        for one in resyncs
    }
    ids = itertools.count()
    loaded = Loaded(entries, {}, {one.id: one for one in resyncs}, {})
    return Engine(
        Identity("test", "st", 1, "lead"),
        Settings(**settings),
        loaded,
        0,
        lambda: f"i{next(ids)}",
        new_ticket=lambda: "ticket",
    )


def hello(node: str, volumes: tuple[str, ...], limits: NodeLimits) -> AgentConnected:
    view = NodeView(node, f"boot-{node}", f"{node}:1", f"{node}:2", "0", volumes)
    return AgentConnected(f"s-{node}", view, "test", "st", 1, "lead", limits)


def under_way(made: Engine) -> list[str]:
    return [one.id for one in made.resyncs().values() if one.state in RUNNING]


def test_resyncs_begin_as_places_come_free():
    queued = [resync(at, "b", ("a",), priority=at // 4) for at in range(6)]
    volumes = tuple(one.volume for one in queued)
    made = engine(queued, resyncs_max=5)
    made.step(Ticked(), 0)
    assert under_way(made) == []  # a new leader knows nobody yet
    made.step(hello("b", volumes, NodeLimits(receive_max_count=1)), 1)
    assert under_way(made) == ["r4"]
    # A reload allows more; then one ends.
    made.step(AgentHeard("s-b", NodeLimits(receive_max_count=3)), 2)
    assert under_way(made) == ["r0", "r4", "r5"]
    made.step(ProgressReported("s-b", Progress("r5", "v5", S.FAILED, reason="IO_ERROR", message="no")), 3)
    made.step(Ticked(), 4)
    assert under_way(made) == ["r0", "r1", "r4"]
    assert made.limits("b") == NodeLimits(receive_max_count=3)
    assert made.limits("a") is None


def test_a_source_that_has_given_all_it_has_to_one_resync_is_free_for_the_next():
    queued = [resync(0, "c", ("a", "b")), resync(1, "d", ("a",))]
    made = engine(queued, resyncs_max=5)
    volumes = tuple(one.volume for one in queued)
    made.step(hello("a", volumes, NodeLimits(send_max_count=1)), 1)
    made.step(hello("c", volumes, NodeLimits()), 2)
    made.step(hello("d", volumes, NodeLimits()), 3)
    assert under_way(made) == ["r0"]
    for now, sending, begun in ((4, ("a", "b"), ["r0"]), (5, ("b",), ["r0", "r1"])):
        shares = tuple(SourceShare(node, 1, bytes_per_second=int(node in sending)) for node in ("a", "b"))
        made.step(ProgressReported("s-c", Progress("r0", "v0", S.TRANSFERRING, sources=shares)), now)
        assert under_way(made) == begun


@pytest.mark.parametrize("count", [50, 400])
def test_many_that_wait_cost_each_the_same(count):
    """Not their number squared: what is worked out for all of them is worked out once."""
    made = Resyncs()
    looks = 0

    class Counted(Busy):
        def has_room(self, one, limits):
            nonlocal looks
            looks += 1
            return super().has_room(one, limits)

    found = Turns(Counted(), {"b": NodeLimits(receive_max_count=1)}, 16)
    for at in range(count):
        made.put(resync(at, "b", ("a",)))
        found.consider(made.come)
        made.come.clear()
    assert looks == count
    assert found.begin == {"r0"}
