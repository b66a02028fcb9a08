"""Nodes, streams and resyncs, each found by what is asked for: a report costs the same in a cluster of any size.

The rules:

* Each is a mapping that anybody may read; `put` and `drop` alone change it, and keep what it is found by.
* What is found stands in the order in which it was first put, so that the same events always give the same actions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from coordinator.core.cluster import NodeView, Resync
from resilver.volume import ResyncState

RUNNING: Final = frozenset(
    {ResyncState.PREPARING, ResyncState.TRANSFERRING, ResyncState.VERIFYING, ResyncState.COMMITTING}
)


class Nodes(dict[str, NodeView]):
    """Every node that is known, by name. `changes` counts what may change which volumes there are."""

    def __init__(self) -> None:
        super().__init__()
        self._offering: dict[str, dict[str, None]] = {}
        self.changes = 0

    def put(self, node: NodeView) -> None:
        old = self.get(node.name)
        self[node.name] = node
        if old is not None and old.volumes == node.volumes and old.connected == node.connected:
            return
        self.changes += 1
        if old is not None:
            self._forget(old)
        for volume in node.volumes:
            self._offering.setdefault(volume, {})[node.name] = None

    def drop(self, name: str) -> None:
        old = self.pop(name, None)
        if old is not None:
            self.changes += 1
            self._forget(old)

    def offering(self, volume: str) -> Iterable[NodeView]:
        """The nodes that have the volume in their configuration, connected or not."""
        return (self[name] for name in self._offering.get(volume, ()))

    def _forget(self, node: NodeView) -> None:
        for volume in set(node.volumes):
            there = self._offering[volume]
            there.pop(node.name, None)
            if not there:
                del self._offering[volume]


class Streams(dict[str, NodeView]):
    """Every stream that is open, and what the agent said of itself on it."""

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[str, dict[str, None]] = {}

    def put(self, stream: str, node: NodeView) -> None:
        self[stream] = node
        self._of.setdefault(node.name, {})[stream] = None

    def drop(self, stream: str) -> NodeView | None:
        """Who it was of; None if it is not known."""
        node = self.pop(stream, None)
        if node is not None:
            there = self._of[node.name]
            del there[stream]
            if not there:
                del self._of[node.name]
        return node

    def of(self, node: str) -> dict[str, NodeView]:
        """The streams of one node, oldest first."""
        return {stream: self[stream] for stream in self._of.get(node, ())}


class Resyncs(dict[str, Resync]):
    """Every resync that is kept, by id. `changes` counts what may change which of those that wait begin next, and
    `come` are those that have begun to wait since that was last worked out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[str, dict[str, None]] = {}
        self._running: dict[str, None] = {}
        self._queued: dict[int, dict[str, None]] = {}
        self.changes = 0
        self.come: list[Resync] = []

    def put(self, resync: Resync) -> None:
        old = self.get(resync.id)
        self[resync.id] = resync
        self._of.setdefault(resync.volume, {})[resync.id] = None
        if old is not None and old.state is resync.state:
            # A source that has nothing more to give to this one has room for another.
            self.changes += resync.state in RUNNING and old.senders != resync.senders
            return
        if resync.state is ResyncState.QUEUED:
            self._queued.setdefault(resync.priority, {})[resync.id] = None
            self.come.append(resync)
            return
        self._forget_place(old)
        if resync.state in RUNNING:
            self._running[resync.id] = None

    def running(self) -> list[Resync]:
        """Those that have a place."""
        return [self[one] for one in self._running]

    def queued(self) -> Iterator[Resync]:
        """Those that wait for one: the higher priority first, then the first come."""
        for priority in sorted(self._queued, reverse=True):
            for one in self._queued[priority]:
                yield self[one]

    def _forget_place(self, old: Resync | None) -> None:
        self.changes += 1
        if old is None:
            return
        self._running.pop(old.id, None)
        waiting = self._queued.get(old.priority, {})
        waiting.pop(old.id, None)
        if not waiting:
            self._queued.pop(old.priority, None)

    def drop(self, resync_id: str) -> None:
        resync = self.pop(resync_id)
        self._forget_place(resync)
        there = self._of[resync.volume]
        del there[resync_id]
        if not there:
            del self._of[resync.volume]

    def volumes(self) -> Iterable[str]:
        """Of which there are any."""
        return self._of.keys()

    def of(self, volume: str) -> list[Resync]:
        """Those of one volume, oldest first; at most as many as are kept of each."""
        return [self[one] for one in self._of.get(volume, ())]
