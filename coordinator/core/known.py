"""What is known of nodes, streams, replicas, volumes and resyncs, and each volume as decisions see it.

The rules:

* Whatever is taken on goes through a method, which lets go of the views that it touches: a view that is still the same
  object shows what is so.
* It is told, and tells nobody: who stores, orders and answers is `Context`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from coordinator.core.claims import Problem
from coordinator.core.cluster import NodeView, ReplicaView, Resync, VolumeEntry, VolumeView
from coordinator.core.rolls import Nodes, Resyncs, Streams
from coordinator.core.words import nearest
from resilver.errors import NotFound
from resilver.volume import ReplicaReport


@dataclass(slots=True)
class Heard:
    """The last report of one replica, the stream that it came by, and the start of the agent that it is of."""

    report: ReplicaReport
    stream: str
    boot: str
    seq: int
    time_ms: int


@dataclass(frozen=True, slots=True)
class RefusedAgent:
    """An agent that this coordinator would not serve, and when it last asked."""

    node: NodeView
    problem: Problem
    time_ms: int


@dataclass(slots=True, kw_only=True)
class Known:
    """The one owner of it."""

    entries: dict[str, VolumeEntry] = field(default_factory=dict)
    nodes: Nodes = field(default_factory=Nodes)
    streams: Streams = field(default_factory=Streams)
    refused: dict[str, RefusedAgent] = field(default_factory=dict)
    heard: dict[str, dict[str, Heard]] = field(default_factory=dict)
    resyncs: Resyncs = field(default_factory=Resyncs)
    _names: tuple[tuple[int, int], tuple[str, ...]] = ((-1, -1), ())
    _renamed: int = 0
    _views: dict[str, VolumeView] = field(default_factory=dict)
    _viewed: dict[str, set[str]] = field(default_factory=dict)

    # ------------------------------------------------------------ reading

    def names(self) -> tuple[str, ...]:
        """Every volume that is stored or reported, in order; worked out when that has changed."""
        changes = (self.nodes.changes, self._renamed)
        if self._names[0] != changes:
            offered = {volume for node in self.nodes.values() for volume in node.volumes if node.connected}
            self._names = changes, tuple(sorted({*self.entries, *self.heard, *offered}))
        return self._names[1]

    def node_names(self) -> frozenset[str]:
        """Every node that is known, or has a replica of any volume."""
        members = {node for entry in self.entries.values() for node in entry.record.members}
        return frozenset(members.union(self.nodes, *self.heard.values()))

    def require(self, volume: str) -> None:
        """Raises NotFound with the nearest name for a volume that nobody knows."""
        if volume in self.entries or volume in self.heard:
            return
        if not any(node.connected for node in self.nodes.offering(volume)):
            known = self.names()
            raise NotFound("VOLUME_NOT_FOUND", f"no volume is named {volume!r}{nearest(volume, known)}", volume=volume)

    def view(self, volume: str, fresh: Iterable[str] | None = None) -> VolumeView:
        """One volume as decisions see it. `fresh` None: a report counts if it came by a stream that is still open; else
        only those of the nodes named do, and of them too whoever has gone, or begun anew, since it reported does not.

        The first is kept until something that it, or a screen of it, shows has changed: as long as it is the same
        object, nothing has.
        """
        kept = self._views.get(volume)
        if kept is None:
            kept = self._views[volume] = self._look_at(volume)
            for node in kept.replicas:
                self._viewed.setdefault(node, set()).add(volume)
        if fresh is None:
            return kept
        wanted = frozenset(fresh)
        replicas = {
            name: one if not one.fresh or name in wanted else replace(one, fresh=False, late=True)
            for name, one in kept.replicas.items()
        }
        return kept if replicas == kept.replicas else VolumeView(volume, kept.entry, replicas)

    def _look_at(self, volume: str) -> VolumeView:
        entry = self.entries.get(volume)
        heard = self.heard.get(volume, {})
        removed = set(entry.removed) if entry else set()
        # Before the first epoch whoever once offered the volume may have its newest data, also after a restart here.
        silent_too = entry is None or not entry.record.epoch
        offering = {node.name for node in self.nodes.offering(volume) if node.connected or silent_too}
        names = ({*heard} - removed) | offering | set(entry.record.members if entry else ())
        replicas: dict[str, ReplicaView] = {}
        for name in sorted(names):
            one = heard.get(name)
            duplicate = name in self.nodes and self.nodes[name].duplicate
            if one is None:
                replicas[name] = ReplicaView(name, duplicate=duplicate)
                continue
            replicas[name] = ReplicaView(name, one.report, one.time_ms, self.current(name, one), duplicate)
        return VolumeView(volume, entry, replicas)

    def current(self, node: str, heard: Heard) -> bool:
        """Whether that report came by a stream of the node that is still open: so it is of its present start, and
        whatever has changed since has been told.
        """
        return self.reachable(node) and heard.stream in self.streams

    def reachable(self, node: str) -> bool:
        known = self.nodes.get(node)
        return known is not None and known.reachable

    def speaker(self, stream: str) -> NodeView:
        """Who opened a stream, as it introduced itself; without a name if the stream has ended."""
        return self.streams.get(stream) or NodeView("")

    def stream_of(self, node: str) -> str:
        """The node's newest stream, empty if it has none: an older one may be dead, and nobody has noticed yet."""
        return next(reversed(self.streams.of(node)), "")

    def active_resync(self, volume: str, node: str) -> Resync | None:
        return next((one for one in self.resyncs.of(volume) if one.node == node and not one.state.final), None)

    # ------------------------------------------------------------ taking on

    def put_node(self, node: NodeView) -> None:
        old = self.nodes.get(node.name)
        self.nodes.put(node)
        if old is None or replace(old, last_heard_ms=node.last_heard_ms) != node:
            self._node_changed(node.name, *node.volumes, *(old.volumes if old is not None else ()))

    def drop_node(self, name: str) -> None:
        self.nodes.drop(name)
        self._node_changed(name)

    def open_stream(self, stream: str, node: NodeView) -> None:
        self.streams.put(stream, node)
        self._node_changed(node.name)

    def close_stream(self, stream: str) -> NodeView | None:
        """Who it was of; None if it is not known."""
        node = self.streams.drop(stream)
        if node is not None:
            self._node_changed(node.name)
        return node

    def hear(self, volume: str, node: str, heard: Heard, *, changed: bool) -> None:
        """Takes on a report. Not `changed`: nothing that anything is compared by is otherwise than before."""
        if volume not in self.heard:
            self._renamed += 1
        self.heard.setdefault(volume, {})[node] = heard
        kept = self._views.pop(volume, None)
        was = kept.replicas.get(node) if kept is not None else None
        if changed or kept is None or was is None:
            return
        again = ReplicaView(node, heard.report, heard.time_ms, was.fresh, was.duplicate)
        view = self._views[volume] = VolumeView(volume, kept.entry, {**kept.replicas, node: again})
        view.compared.update(kept.compared)

    def unhear(self, volume: str, node: str = "") -> None:
        """Forgets what was heard of a replica, or of the whole volume."""
        if node:
            self.heard.get(volume, {}).pop(node, None)
        else:
            self.heard.pop(volume, None)
            self._renamed += 1
        self._views.pop(volume, None)

    def put_entry(self, volume: str, entry: VolumeEntry | None) -> None:
        """What the store is to have of a volume; None: nothing any more."""
        if entry is None or volume not in self.entries:
            self._renamed += 1
        if entry is None:
            self.entries.pop(volume, None)
        else:
            self.entries[volume] = entry

    def look_again(self, volume: str) -> None:
        """Something that a view of the volume shows has changed."""
        self._views.pop(volume, None)

    def _node_changed(self, name: str, *volumes: str) -> None:
        for volume in {*volumes, *self._viewed.pop(name, ())}:
            self._views.pop(volume, None)
