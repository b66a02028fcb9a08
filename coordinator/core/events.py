"""Every input and every output of the engine: events in, actions out. Times are Unix milliseconds.

Orders go to agents and come back as `OrderAnswered`; requests come from operators and are answered by `Answer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.core.audited import Asked, AuditEntry
from coordinator.core.cluster import (
    ClusterEvent,
    ElectionRecord,
    NodeView,
    Resync,
    VolumeEntry,
)
from coordinator.core.orders import AnyOrder, OrderResult
from coordinator.core.requests import Request
from resilver.errors import ResilverError
from resilver.limits import NOT_KNOWN, NodeLimits
from resilver.volume import Progress, ReplicaReport, VolumeRecord


@dataclass(frozen=True, slots=True)
class AgentConnected:
    """A stream opened with this hello. `stream` names it among all streams of this reign.

    `highest_leader_id` is whose the highest term was; empty if the agent has obeyed nobody yet.
    """

    stream: str
    node: NodeView
    cluster: str
    store_id: str
    highest_term: int
    highest_leader_id: str = ""
    limits: NodeLimits = NOT_KNOWN


@dataclass(frozen=True, slots=True)
class AgentDisconnected:
    stream: str


@dataclass(frozen=True, slots=True)
class AgentHeard:
    """A heartbeat, with what is allowed on the node where that has changed."""

    stream: str
    limits: NodeLimits | None = None


@dataclass(frozen=True, slots=True)
class ReplicaReported:
    """`seq` grows within a stream's boot; an older one is dropped."""

    stream: str
    seq: int
    report: ReplicaReport
    examine_id: str = ""


@dataclass(frozen=True, slots=True)
class ProgressReported:
    stream: str
    progress: Progress


@dataclass(frozen=True, slots=True)
class OrderAnswered:
    """What an agent answered, or why it did not."""

    order_id: str
    answer: OrderResult | ResilverError


@dataclass(frozen=True, slots=True)
class Requested:
    """`asked`: who gives the order, for the audit trail; None for what changes nothing."""

    key: str
    request: Request
    asked: Asked | None = None


@dataclass(frozen=True, slots=True)
class Attempted:
    """Something was refused before it became an order."""

    asked: Asked
    error: ResilverError


@dataclass(frozen=True, slots=True)
class Ticked:
    """Once a second: deadlines are looked at."""


Event = (
    AgentConnected
    | AgentDisconnected
    | AgentHeard
    | ReplicaReported
    | ProgressReported
    | OrderAnswered
    | Requested
    | Attempted
    | Ticked
)

# ---------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume's record for the store; `entry` None deletes it."""

    name: str
    entry: VolumeEntry | None


@dataclass(frozen=True, slots=True)
class DeletedNode:
    name: str


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A decision, a finished resync, an event or an audit entry past its bound: deleted from the store."""

    record: ElectionRecord | Resync | ClusterEvent | AuditEntry


Kept = Volume | ElectionRecord | Resync | NodeView | ClusterEvent | AuditEntry | DeletedNode | Forgotten


@dataclass(frozen=True, slots=True)
class Persist:
    """Written in one transaction, before any action that follows. If it fails, the reign ends."""

    records: tuple[Kept, ...]


@dataclass(frozen=True, slots=True)
class SendExamine:
    stream: str
    examine_id: str
    volumes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SendRecord:
    stream: str
    record: VolumeRecord


@dataclass(frozen=True, slots=True)
class RefuseAgent:
    """Tells the agent why and ends its stream; `adopt` tells it to take on this store first."""

    stream: str
    reason: str
    message: str
    adopt: bool = False


@dataclass(frozen=True, slots=True)
class GiveOrder:
    order_id: str
    node: str
    address: str
    order: AnyOrder


@dataclass(frozen=True, slots=True)
class Answer:
    key: str
    answer: object | ResilverError


@dataclass(frozen=True, slots=True)
class Tell:
    """Something happened, and is stored: goes to the log, the event list and the watchers."""

    event: ClusterEvent


@dataclass(frozen=True, slots=True)
class Recorded:
    """An order was answered, or attempts were refused, and that is stored: goes to the log."""

    entry: AuditEntry


@dataclass(frozen=True, slots=True)
class Changed:
    """Watchers of these volumes and resyncs have something new to see."""

    volumes: frozenset[str] = frozenset()
    resyncs: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RaiseTerm:
    """An agent of this store has obeyed a higher term: campaign again above it."""

    above: int


Action = Persist | SendExamine | SendRecord | RefuseAgent | GiveOrder | Answer | Tell | Recorded | Changed | RaiseTerm

# ---------------------------------------------------------------- what a reign begins with


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that the store holds, as read at take-over. Elections are newest first, events and audit entries
    oldest first; resyncs are by id.
    """

    volumes: Mapping[str, VolumeEntry]
    elections: Mapping[str, tuple[ElectionRecord, ...]]
    resyncs: Mapping[str, Resync]
    nodes: Mapping[str, NodeView]
    events: tuple[ClusterEvent, ...] = ()
    audit: tuple[AuditEntry, ...] = ()
