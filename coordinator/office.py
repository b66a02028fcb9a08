"""What the services need of the process they run in: questions in, answers and changes out.

The rules:

* A standby has no engine: `engine()` raises `Superseded("NOT_LEADER")` with the leader's address, and every service
  lets that error through.
* What the engine lends is read within one turn of the event loop and not kept; whatever lasts longer goes through
  `ask`, `post` and `watch`.
* Nothing here waits without a bound, and nothing queues without one: a watch merges what happened since it was last
  asked, an outbox that is full ends its stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol, Self

from coordinator.core.audited import Asked, AuditEntry
from coordinator.core.cluster import ClusterEvent, ElectionRecord, NodeView, Resync, Size, VolumeView
from coordinator.core.events import Changed, Event, RefuseAgent, SendExamine, SendRecord
from coordinator.core.known import RefusedAgent
from coordinator.core.requests import Request
from coordinator.store.base import Health, Leader
from resilver.limits import NodeLimits


class Identity(Protocol):
    """Who leads, under which term, on which store."""

    @property
    def cluster(self) -> str: ...
    @property
    def store_id(self) -> str: ...
    @property
    def term(self) -> int: ...
    @property
    def leader_id(self) -> str: ...
    @property
    def name(self) -> str: ...


class Engine(Protocol):
    """The reading side of the engine."""

    @property
    def identity(self) -> Identity: ...

    def volume_names(self) -> tuple[str, ...]:
        """Every volume that is in the store or reported, in order."""

    def node_names(self) -> frozenset[str]:
        """Every node that is known, or has a replica of any volume."""

    def view(self, volume: str) -> VolumeView:
        """One volume, where fresh means connected. Raises `NotFound("VOLUME_NOT_FOUND")` with the nearest name."""

    def nodes(self) -> Mapping[str, NodeView]: ...

    def limits(self, node: str) -> NodeLimits | None:
        """What is allowed on a node; None while it is away."""

    def refused(self) -> Mapping[str, RefusedAgent]:
        """The agents that were turned away lately, by the names that they gave."""

    def resyncs(self) -> Mapping[str, Resync]:
        """All that are kept, by id, finished ones among them."""

    def active_resync(self, volume: str, node: str) -> Resync | None: ...

    def elections(self, volume: str) -> tuple[ElectionRecord, ...]:
        """Newest first, refusals among them."""

    def audit(self) -> tuple[AuditEntry, ...]:
        """Orders and refused attempts, oldest first."""

    def size(self, volume: str, base: str, target: str) -> Size | None:
        """What that delta costs, where a source has worked it out."""

    def pinned_by(self, volume: str, node: str, snapshot_id: str) -> tuple[str, ...]:
        """Why that copy may not be dropped, in words; empty if it may."""


class Watch(Protocol):
    """Tells one reader what has changed since it last asked."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

    async def next(self, timeout_s: float) -> Changed | None:
        """What changed, as soon as anything has; None if nothing did in time.

        A new event of the cluster wakes it too, with an empty `Changed` if nothing else is new. Raises
        `Superseded("NOT_LEADER")` or `Conflict("LEADERSHIP_LOST")` once the reign has ended.
        """


class Span(Protocol):
    """Which events are kept: those after `gone`, up to `newest`; both 0 if there has never been one."""

    @property
    def gone(self) -> int: ...
    @property
    def newest(self) -> int: ...


class StreamOut(Protocol):
    """What is to be sent to one agent's stream; bounded."""

    async def get(self) -> SendExamine | SendRecord | RefuseAgent:
        """The next one. Raises `Superseded("NOT_LEADER")` or `Conflict("LEADERSHIP_LOST")` once the reign has ended,
        and `Exhausted("TOO_LARGE")` if the agent did not take what was there to be sent.
        """


class Office(Protocol):
    """The process around the services."""

    @property
    def cluster(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def insecure(self) -> bool: ...
    @property
    def version(self) -> str: ...

    def engine(self) -> Engine:
        """Raises `Superseded("NOT_LEADER", ..., leader_address=...)` on a standby."""

    async def settled(self) -> Engine:
        """The same, in a moment in which all that it shows is stored: it is read before anything is awaited.

        Raises also `Unavailable("STORE_UNAVAILABLE")` if the store takes too long, and what ended the reign.
        """

    async def ask(self, request: Request, timeout_s: float, asked: Asked | None = None) -> object:
        """What the engine answers, or the error that it answers, raised. `Unavailable("DEADLINE")` if it takes longer.
        `asked` is for the audit trail, of what changes something.

        ================== ============================================================================
        ResyncRequest      ResyncsStarted (with `validate_only` of resyncs that were not begun)
        PlanRequest        Planned
        ElectRequest       ElectionRecord
        SnapshotRequest    SnapshotsTaken
        CancelRequest      Resync
        DropRequest        Dropped
        PruneRequest       Pruned
        ExportRequest      Exported
        PauseRequest       Done
        RemoveRequest      Done
        AdoptStoreRequest  Done
        ================== ============================================================================
        """

    def post(self, event: Event) -> None:
        """Hands an event to the engine.

        Raises `Superseded("NOT_LEADER")` on a standby, `Exhausted("TOO_LARGE")` while the engine is behind.
        """

    def watch(self) -> Watch: ...

    def events_after(self, sequence: int) -> Sequence[ClusterEvent]:
        """The events that are stored and come after this one, oldest first."""

    def events_span(self) -> Span:
        """Which events are kept."""

    def open_stream(self, stream: str) -> StreamOut: ...

    def close_stream(self, stream: str) -> None: ...

    async def leader(self) -> Leader | None: ...

    async def store_health(self) -> Health: ...

    def export_store(self) -> AsyncIterator[bytes]: ...

    def now_ms(self) -> int: ...
