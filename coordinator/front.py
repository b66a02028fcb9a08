"""What the services talk to: the present reign if this coordinator leads, and who leads if it does not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from coordinator.core.audited import Asked
from coordinator.core.cluster import ClusterEvent
from coordinator.core.engine import Engine
from coordinator.core.events import Event
from coordinator.core.requests import Request
from coordinator.readers import Outbox, Watcher
from coordinator.reign import CurrentReign, Span, now_ms
from coordinator.store.base import Health, Leader, Store
from resilver.errors import ResilverError, Superseded


@dataclass(slots=True)
class Front:
    """Implements `coordinator.office.Office`. `reign` and `known_leader` are set by whoever runs the campaign."""

    cluster: str
    name: str
    address: str
    insecure: bool
    version: str
    store: Store
    reign: CurrentReign | None = None
    known_leader: Leader | None = None

    def _present(self) -> CurrentReign:
        if self.reign is None:
            raise self.not_leader()
        return self.reign

    def not_leader(self) -> ResilverError:
        """What a standby answers."""
        leader = self.known_leader
        if leader is None or leader.name == self.name:
            return Superseded("NOT_LEADER", f"coordinator {self.name} does not lead, and no other one is known to yet")
        return Superseded(
            "NOT_LEADER",
            f"coordinator {self.name} does not lead; {leader.name} at {leader.address} does",
            leader_address=leader.address,
        )

    def engine(self) -> Engine:
        return self._present().engine

    async def settled(self) -> Engine:
        return await self._present().settled()

    async def ask(self, request: Request, timeout_s: float, asked: Asked | None = None) -> object:
        return await self._present().ask(request, timeout_s, asked)

    def post(self, event: Event) -> None:
        self._present().post(event)

    def watch(self) -> Watcher:
        return self._present().watch()

    def events_after(self, sequence: int) -> Sequence[ClusterEvent]:
        return self._present().events_after(sequence)

    def events_span(self) -> Span:
        return self._present().span()

    def open_stream(self, stream: str) -> Outbox:
        return self._present().open_stream(stream)

    def close_stream(self, stream: str) -> None:
        if self.reign is not None:
            self.reign.close_stream(stream)

    async def leader(self) -> Leader | None:
        return await self.store.leader()

    async def store_health(self) -> Health:
        return await self.store.health()

    def export_store(self) -> AsyncIterator[bytes]:
        return self._present().export()

    def now_ms(self) -> int:
        return now_ms()
