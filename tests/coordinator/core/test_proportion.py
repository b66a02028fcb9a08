"""What an event costs does not grow with the cluster; and what is kept so that it does not is never behind.

Cost is counted in instructions of the interpreter, not in time: the same on any machine and under any load.
"""

from __future__ import annotations

import itertools
import random
import sys
from dataclasses import replace

import pytest

from coordinator import queries, views
from coordinator.core.cluster import NodeView, Pause, Size, VolumeEntry
from coordinator.core.context import Identity, Settings
from coordinator.core.engine import Engine
from coordinator.core.events import (
    AgentConnected,
    AgentDisconnected,
    AgentHeard,
    Answer,
    GiveOrder,
    Loaded,
    OrderAnswered,
    ReplicaReported,
    Requested,
    SendExamine,
    Ticked,
)
from coordinator.core.requests import PauseRequest, PlanRequest, RemoveRequest
from coordinator.shown import Shown
from resilver.v1 import coordinator_pb2 as api
from resilver.volume import LiveState
from tests.crowd import START_MS, Shape, next_point, node_name, volume_name

NOW_MS = START_MS + 3_600_000
SMALL, LARGE = 6, 60
MORE_AT_MOST = 1.15
"""A larger number has more digits, a fuller table another probe: what grows with the cluster would be tenfold."""


class Told:
    """An engine that has heard a whole cluster, and whatever it is told next."""

    def __init__(self, agents: int, volumes: int = 10) -> None:
        self.shape = Shape(agents, volumes)
        self.now_ms = NOW_MS
        self._seqs = itertools.count(1)
        ids = itertools.count(1)
        entries = {}
        for at in range(self.shape.volume_count):
            record = self.shape.report(at, self.shape.members(at)[0]).record
            assert record is not None
            entries[record.volume] = VolumeEntry(record, newest_cp_time_ms=START_MS)
        self.engine = Engine(
            Identity("test", "st", 1, "lead"),
            Settings(),
            Loaded(entries, {}, {}, {}),
            NOW_MS,
            lambda: f"i{next(ids)}",
            new_ticket=lambda: "ticket",
        )
        self.reports = {
            (node_name(agent), volume_name(at)): self.shape.report(at, node_name(agent))
            for agent in range(agents)
            for at in self.shape.volumes_of(agent)
        }
        for agent in range(agents):
            self.connect(node_name(agent))
        for node, volume in self.reports:
            self.say(node, volume)

    def step(self, event) -> list:
        actions = self.engine.step(event, self.now_ms)
        for action in actions:
            if isinstance(action, GiveOrder):
                self.engine.step(OrderAnswered(action.order_id, Size(1 << 20, 16, 1 << 30)), self.now_ms)
        return actions

    def connect(self, node: str, boot: str = "1", volumes_max: int | None = None) -> list:
        volumes = tuple(volume_name(at) for at in self.shape.volumes_of(int(node[1:])))[:volumes_max]
        view = NodeView(node, f"boot-{node}-{boot}", f"{node}:1", f"{node}:2", "0", volumes)
        return self.step(AgentConnected(f"{node}/{boot}", view, "test", "st", 0))

    def say(self, node: str, volume: str, examine_id: str = "", boot: str = "1") -> list:
        report = self.reports[node, volume]
        return self.step(ReplicaReported(f"{node}/{boot}", next(self._seqs), report, examine_id))

    def point(self, *where: str) -> None:
        """The primary of the volume has taken a CP."""
        volume = where[-1]
        primary = self.engine.view(volume).record.primary
        report = self.reports[primary, volume]
        self.reports[primary, volume] = replace(report, lineage=next_point(report.lineage))


def instructions(work) -> int:
    """How many the interpreter carries out for it, in all that it calls."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def at_each_size(act) -> list[int]:
    """What the same costs in a small cluster and in a large one; once before, for what is worked out once."""
    costs = []
    for agents in (SMALL, LARGE):
        told = Told(agents)
        act(told)
        costs.append(instructions(lambda told=told: act(told)))
    return costs


def plan(told: Told, volumes: tuple[str, ...]):
    """A plan of these volumes, every examine answered."""
    asked = [one for one in told.step(Requested("q", PlanRequest(volumes))) if isinstance(one, SendExamine)]
    answers = []
    for one in asked:
        for volume in one.volumes:
            answers += told.say(one.stream.partition("/")[0], volume, one.examine_id)
    (answer,) = (one for one in answers if isinstance(one, Answer))
    return answer.answer


def come_and_go(told: Told) -> None:
    told.step(AgentDisconnected("n0001/1"))
    told.connect("n0001")


def take_a_point(told: Told) -> None:
    told.point("v00001")
    told.say(told.engine.view("v00001").record.primary, "v00001")


@pytest.mark.parametrize(
    "act",
    [
        lambda told: told.say("n0001", "v00001" if ("n0001", "v00001") in told.reports else "v00000"),
        take_a_point,
        lambda told: told.step(AgentHeard("n0001/1")),
        come_and_go,
        lambda told: told.step(Requested("q", PauseRequest(("v00001",), Pause("why", None, "me")))),
        lambda told: views.volume_to_proto(told.engine, told.engine.view("v00001"), NOW_MS, full=True),
        lambda told: Shown().volume(told.engine, "v00001", NOW_MS),
    ],
    ids=["report", "point", "heartbeat", "reconnect", "pause", "volume", "shown"],
)
def test_one_event_costs_the_same_in_a_cluster_of_any_size(act):
    small, large = at_each_size(act)
    assert small > 50
    assert large <= small * MORE_AT_MOST


def test_a_plan_of_all_costs_as_much_more_as_there_are_more_volumes():
    costs = []
    for agents in (SMALL, LARGE):
        told = Told(agents, volumes=3)
        costs.append(instructions(lambda told=told: plan(told, told.engine.volume_names())))
        assert len(plan(told, told.engine.volume_names()).volumes) == told.shape.volume_count
    assert costs[1] <= costs[0] * LARGE / SMALL * MORE_AT_MOST


def test_of_a_plan_each_node_is_asked_once():
    told = Told(LARGE, volumes=3)
    asked = [
        one
        for one in told.step(Requested("q", PlanRequest(told.engine.volume_names())))
        if isinstance(one, SendExamine)
    ]
    assert sorted(one.stream for one in asked) == [f"{node_name(agent)}/1" for agent in range(LARGE)]
    assert sum(len(one.volumes) for one in asked) == len(told.reports)


def listing(told: Told, shown: Shown) -> api.ListVolumesResponse:
    return queries.list_volumes(told.engine, shown, api.ListVolumesRequest(page_size=1000), told.now_ms)


def test_what_has_not_changed_is_not_worked_out_again():
    told, shown = Told(LARGE, volumes=3), Shown()
    first = instructions(lambda: listing(told, shown))
    assert instructions(lambda: listing(told, shown)) * 10 < first
    take_a_point(told)
    changed = instructions(lambda: listing(told, shown))
    assert changed < first / 10 + 3 * first / told.shape.volume_count


class Life:
    """Whatever may happen in a small cluster, by chance."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.told = Told(4, volumes=3)
        self.boots = {node_name(agent): {"1"} for agent in range(4)}

    def go_on(self) -> None:
        told, chance = self.told, self.chance
        told.now_ms += chance.choice([0, 1, 900, 2_000, 61_000, 7_300_000])
        node, volume = chance.choice(sorted(told.reports))
        chance.choice([self.leave, self.come, self.change, self.pause, self.remove, told.point])(node, volume)
        for boot in sorted(self.boots[node]):
            told.say(node, volume, boot=boot)

    def leave(self, node: str, _: str) -> None:
        for boot in sorted(self.boots[node])[:1]:
            self.boots[node].discard(boot)
            self.told.step(AgentDisconnected(f"{node}/{boot}"))

    def come(self, node: str, _: str) -> None:
        boot = self.chance.choice("123")
        self.boots[node].add(boot)
        self.told.connect(node, boot, self.chance.randrange(4))

    def change(self, node: str, volume: str) -> None:
        report, chance = self.told.reports[node, volume], self.chance
        changes = [
            {"free_bytes": chance.randrange(1 << 30), "examine_time_ms": self.told.now_ms},
            {"live": replace(report.live, state=chance.choice(list(LiveState)))},
            {"lineage": report.lineage.since(report.lineage.records[-2].id)},
        ]
        self.told.reports[node, volume] = replace(report, **chance.choice(changes))

    def pause(self, _: str, volume: str) -> None:
        pause = self.chance.choice([None, Pause("why", self.told.now_ms + 90_000, "me")])
        self.told.step(Requested("q", PauseRequest((volume,), pause)))
        self.told.step(Ticked())

    def remove(self, node: str, volume: str) -> None:
        self.told.step(Requested("q", RemoveRequest(volume=self.chance.choice(["", volume]), node=node)))


def test_what_is_kept_is_what_would_be_found_anew():
    """Whatever happens: each view, and each volume as it is shown, is as if it were made for the first time."""
    life, shown = Life(5), Shown()
    engine, context = life.told.engine, life.told.engine._context
    for _ in range(250):
        life.go_on()
        offered = {volume for node in context.nodes.values() if node.connected for volume in node.volumes}
        assert engine.volume_names() == tuple(sorted({*context.entries, *context.heard, *offered}))
        for name in engine.volume_names():
            view = context._look_at(name)
            assert engine.view(name) == view
            anew = views.volume_to_proto(engine, view, life.told.now_ms, full=False)
            assert shown.volume(engine, name, life.told.now_ms) == anew
