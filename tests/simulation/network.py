"""What is on its way between coordinators and agents.

A stream carries messages in order, both ways, until it breaks: then what was on its way is lost from some message on,
and the coordinator learns of it some time later. Orders are calls: each may arrive twice, late, or never; what comes
back is one answer, or that the node was not reached, and that may come although the order was obeyed, or will be.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from coordinator.core import events as e
from coordinator.core.orders import AnyOrder, OrderResult
from resilver.errors import ResilverError
from resilver.volume import Progress, ReplicaReport
from tests.simulation.agent import Agent
from tests.simulation.coordinator import Coordinator


@dataclass(frozen=True, slots=True)
class Ack:
    """What every message of a coordinator begins with: who leads, and under which term."""

    term: int
    leader_id: str


Up = e.AgentConnected | Progress | tuple[int, ReplicaReport, str] | None
Down = tuple[Ack, e.SendExamine | e.SendRecord | e.RefuseAgent | None]


@dataclass
class Stream:
    """`up` ends with None once it is broken; `reign` is the one that it was opened to."""

    id: str
    agent: Agent
    coordinator: Coordinator
    reign: str
    ack: Ack
    up: deque[Up] = field(default_factory=deque)
    down: deque[Down] = field(default_factory=deque)
    broken: bool = False
    ended: bool = False
    heard: bool = False

    def __repr__(self) -> str:
        return f"{self.id} {self.agent.name}->{self.coordinator.name}"


@dataclass
class Call:
    """An order on its way to a node. `answered`: whoever gave it waits no more, also of its `twin`, if it is doubled.

    It arrives at no step before `not_before`.
    """

    order_id: str
    coordinator: Coordinator
    reign: str
    agent: Agent
    order: AnyOrder
    answered: bool = False
    not_before: int = 0
    twin: Call | None = None

    @property
    def settled(self) -> bool:
        return self.answered or (self.twin is not None and self.twin.answered)

    def __repr__(self) -> str:
        header = self.order.order
        kind = type(self.order).__name__
        return f"{kind} {self.order_id} to {self.agent.name} (term {header.term} epoch {header.epoch})"


@dataclass
class Reply:
    """An answer on its way back."""

    order_id: str
    coordinator: Coordinator
    reign: str
    answer: OrderResult | ResilverError
    not_before: int = 0

    def __repr__(self) -> str:
        said = self.answer.reason if isinstance(self.answer, ResilverError) else type(self.answer).__name__
        return f"{said} for {self.order_id} to {self.coordinator.name}"
