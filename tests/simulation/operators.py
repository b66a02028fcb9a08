"""Who types commands: at random while faults last, and then until everything is in sync again.

An operator only ever accepts what the last refusal named, exactly, and names with --choose whom it proposed or any
node that stands; nothing else could have come from the screens.
"""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any, Protocol

from coordinator.core import events as e
from coordinator.core.cluster import ElectionRecord, Refusal
from coordinator.core.requests import (
    CancelRequest,
    DropRequest,
    ElectRequest,
    PlanRequest,
    PruneRequest,
    Request,
    ResyncRequest,
    ResyncsStarted,
    SnapshotRequest,
)
from resilver.errors import ResilverError
from tests.simulation.coordinator import Coordinator

# What is typed, and how often of so many.
COMMANDS = {"resync": 10, "elect": 10, "snapshot": 4, "prune": 2, "plan": 1, "cancel": 1, "drop": 1}


class World(Protocol):
    """What an operator sees."""

    random: Any
    volumes: tuple[str, ...]
    agents: list[Any]

    def next_id(self, kind: str) -> str: ...
    def leader(self) -> Coordinator | None: ...
    def log(self, line: Any) -> None: ...


class Operator:
    """Keeps what was answered last, by volume."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.refusals: dict[str, Refusal] = {}
        self.rows: dict[tuple[str, str], Refusal] = {}
        self.answers: dict[str, object] = {}

    def ask(self, request: Request) -> str:
        """The key under which the answer will come; empty if nobody leads."""
        leader = self.world.leader()
        if leader is None:
            return ""
        key = self.world.next_id("r")
        self.world.log(lambda: f"operator to {leader.name}: {key} {_words(request)}")
        leader.post(e.Requested(key, request))
        return key

    def told(self, coordinator: Coordinator, action: e.Answer) -> None:
        answer = action.answer
        self.answers[action.key] = answer
        self.world.log(lambda: f"operator is answered {action.key}: {_short(answer)}")
        if isinstance(answer, ElectionRecord):
            self.refusals.pop(answer.volume, None)
            if answer.refusal is not None:
                self.refusals[answer.volume] = answer.refusal
        elif isinstance(answer, ResyncsStarted):
            for one in answer.refusals:
                if one.node:
                    self.rows[one.volume, one.node] = one.refusal
                else:
                    self.refusals[one.volume] = one.refusal

    # At random.

    def anything(self) -> None:
        world = self.world
        chance = world.random
        volume = chance.choice(world.volumes)
        refusal = self.refusals.get(volume)
        if refusal is not None and refusal.next_command.startswith("resilver elect") and chance.random() < 0.5:
            self.ask(self.as_told(volume, refusal))
            return
        kind = chance.choices(
            ("resync", "elect", "snapshot", "prune", "plan", "cancel", "drop"), (10, 10, 4, 2, 1, 1, 1)
        )[0]
        match kind:
            case "resync":
                self.ask(self.resync(volume))
            case "elect":
                self.ask(self.elect(volume))
            case "snapshot":
                self.ask(SnapshotRequest((volume,)))
            case "prune":
                self.ask(PruneRequest(volume, keep_last=chance.choice((1, 2, 3))))
            case "plan":
                self.ask(PlanRequest((volume,), take_snapshot=chance.random() < 0.5))
            case "cancel":
                self._cancel()
            case "drop":
                self._drop(volume)

    def resync(self, volume: str) -> ResyncRequest:
        chance = self.world.random
        nodes = frozenset({chance.choice(self.world.agents).name}) if chance.random() < 0.3 else frozenset()
        blocked = {node: one for (name, node), one in self.rows.items() if name == volume}
        replace = frozenset(node for node, one in blocked.items() if "--replace" in one.next_command)
        if chance.random() < 0.7:
            replace = frozenset()
        return ResyncRequest((volume,), nodes, full=chance.random() < 0.1, replace=replace)

    def elect(self, volume: str) -> ElectRequest:
        """Nothing accepted, or exactly what the last refusal says; sometimes another one is chosen."""
        chance = self.world.random
        refusal = self.refusals.get(volume)
        draw = chance.random()
        if refusal is not None and draw < 0.6:
            return self.as_told(volume, refusal)
        if draw > 0.85:
            return ElectRequest(volume, choose=chance.choice(self.world.agents).name)
        return ElectRequest(volume)

    def as_told(self, volume: str, refusal: Refusal) -> ElectRequest:
        """The refusal's own next command, or what it names where that only asks again."""
        words = shlex.split(refusal.next_command)
        accept = frozenset(words[at + 1] for at, word in enumerate(words) if word == "--accept-loss")
        if "--dry-run" in words:  # somebody may only be busy: this operator knows that they hang
            accept = frozenset(loss.node for loss in refusal.losses)
        choose = next((words[at + 1] for at, word in enumerate(words) if word == "--choose"), "")
        if choose == "NODE":
            choose = self.world.random.choice(sorted(refusal.candidates))
        return ElectRequest(volume, choose, accept)

    def _cancel(self) -> None:
        leader = self.world.leader()
        active = [one.id for one in leader.engine.resyncs().values() if not one.state.final] if leader else []
        if active:
            self.ask(CancelRequest(self.world.random.choice(active), self.world.random.random() < 0.5))

    def _drop(self, volume: str) -> None:
        agent = self.world.random.choice(self.world.agents)
        stored = sorted(agent.disks[volume].stored)
        if stored:
            self.ask(DropRequest(self.world.random.choice(stored), frozenset({agent.name})))


def _words(request: Request) -> str:
    """The request without what is not said, sets in order."""
    said = {one.name: getattr(request, one.name) for one in fields(request)}
    shown = [
        f"{name}={sorted(value) if isinstance(value, frozenset) else value}" for name, value in said.items() if value
    ]
    return " ".join([type(request).__name__, *shown])


def _short(answer: object) -> str:
    match answer:
        case ResilverError():
            return f"{answer.reason}: {answer.message}"
        case ElectionRecord() if answer.refusal is not None:
            return f"{answer.refusal.reasons}: {answer.refusal.message}; {answer.refusal.next_command}"
        case ElectionRecord():
            return f"{answer.winner} in epoch {answer.epoch}: {answer.rule}"
        case ResyncsStarted():
            refused = [f"{one.node or one.volume} {one.refusal.reasons}" for one in answer.refusals]
            return f"resyncs {[(one.id, one.node) for one in answer.resyncs]}, refused {refused}"
        case _:
            return str(answer)[:300]
