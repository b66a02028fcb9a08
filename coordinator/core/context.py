"""What the engine knows, and what its flows act with: the one owner of the core's mutable state."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from coordinator.core.audited import Asked, AuditEntry
from coordinator.core.claims import Problem
from coordinator.core.cluster import (
    ElectionRecord,
    NodeView,
    ReplicaView,
    Resync,
    Size,
    VolumeEntry,
    VolumeView,
)
from coordinator.core.events import (
    Action,
    Changed,
    Forgotten,
    GiveOrder,
    Kept,
    Persist,
    Recorded,
    SendExamine,
    SendRecord,
    Tell,
    Volume,
)
from coordinator.core.history import History
from coordinator.core.orders import AnyOrder, OrderResult
from coordinator.core.places import Places
from coordinator.core.rolls import Nodes, Resyncs, Streams
from coordinator.core.tasks import Flow, Tasks, Wait
from coordinator.core.trail import Trail
from coordinator.core.words import nearest
from resilver.errors import NotFound, ResilverError, Unavailable
from resilver.limits import NodeLimits
from resilver.volume import Order, ReplicaReport, VolumeRecord

ELECTIONS_KEPT_MAX: Final = 1_000
SIZES_MAX: Final = 10_000
RECORDS_AT_ONCE_MAX: Final = 32
"""In one transaction, its events among them: a store takes some more."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Under what right this engine gives orders."""

    cluster: str
    store_id: str
    term: int
    leader_id: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """Bounds of the engine. The order timeouts are longer than those of the calls, which always answer."""

    examine_timeout_ms: int = 10_000
    order_timeout_ms: int = 650_000
    opening_timeout_ms: int = 60_000
    lock_timeout_ms: int = 120_000
    resyncs_max: int = 16
    queued_max_ms: int = 24 * 3600 * 1000
    silence_max_ms: int = 15 * 60 * 1000


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


@dataclass(slots=True)
class Examine:
    """One question to every member; later callers join it."""

    id: str
    waiting: set[str]
    answered: set[str]


@dataclass(slots=True)
class OrderSlot:
    """An order under way; `answer` None until it comes back."""

    node: str
    answer: OrderResult | ResilverError | None = None


@dataclass(slots=True)
class Context:
    """State, clock and outbox of one step. Flows call it; only `Engine` makes one."""

    identity: Identity
    settings: Settings
    new_id: Callable[[], str]
    new_ticket: Callable[[], str]
    history: History
    now_ms: int = 0
    tasks: Tasks = field(default_factory=Tasks)
    actions: list[Action] = field(default_factory=list)
    entries: dict[str, VolumeEntry] = field(default_factory=dict)
    nodes: Nodes = field(default_factory=Nodes)
    streams: Streams = field(default_factory=Streams)
    refused: dict[str, RefusedAgent] = field(default_factory=dict)
    heard: dict[str, dict[str, Heard]] = field(default_factory=dict)
    examines: dict[str, Examine] = field(default_factory=dict)
    orders: dict[str, OrderSlot] = field(default_factory=dict)
    locks: set[str] = field(default_factory=set)
    elections: dict[str, deque[ElectionRecord]] = field(default_factory=dict)
    resyncs: Resyncs = field(default_factory=Resyncs)
    places: Places = field(default_factory=Places)
    sizes: dict[tuple[str, str, str], Size] = field(default_factory=dict)
    busy: dict[str, int] = field(default_factory=dict)
    trail: Trail = field(default_factory=lambda: Trail(0))
    adopting: bool = False
    asking: list[tuple[str, frozenset[str]]] = field(default_factory=list)
    examine_id: str = ""
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
        """One volume as decisions see it. `fresh` None: a report counts if its node is connected.

        That one is kept until something that it, or a screen of it, shows has changed: as long as it is the same
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
            name: one if one.report is None or one.fresh == (name in wanted) else replace(one, fresh=name in wanted)
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
        """Whether that report came by the node's present stream."""
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

    def _node_changed(self, name: str, *volumes: str) -> None:
        for volume in {*volumes, *self._viewed.pop(name, ())}:
            self._views.pop(volume, None)

    # ------------------------------------------------------------ acting

    def emit(self, *actions: Action) -> None:
        self.actions.extend(actions)

    def persist(self, *records: Kept) -> None:
        """Remembers in the store, before any later action, and in the view."""
        for record in records:
            if isinstance(record, Volume):
                if record.entry is None or record.name not in self.entries:
                    self._renamed += 1
                if record.entry is None:
                    self.entries.pop(record.name, None)
                else:
                    self.entries[record.name] = record.entry
                self.changed(record.name)
            elif isinstance(record, ElectionRecord):
                records = (*records, *self._keep_election(record))
            elif isinstance(record, Resync):
                self.resyncs.put(record)
                self.changed(record.volume, record.id)
        self.emit(Persist(records))

    def _keep_election(self, record: ElectionRecord) -> tuple[Forgotten, ...]:
        kept = self.elections.setdefault(record.volume, deque())
        kept.appendleft(record)
        gone = []
        while len(kept) > ELECTIONS_KEPT_MAX:
            gone.append(Forgotten(kept.pop()))
        return tuple(gone)

    def put_record(self, volume: str, record: VolumeRecord, **changes: object) -> None:
        """Stores a volume's new record and tells it to every member that is connected."""
        entry = self.entries.get(volume) or VolumeEntry(record)
        self.persist(Volume(volume, replace(entry, record=record, **changes)))  # type: ignore[arg-type]  # fields by name
        for member in record.members:
            stream = self.stream_of(member)
            if stream and self.reachable(member):
                self.emit(SendRecord(stream, record))

    def changed(self, volume: str, *resyncs: str) -> None:
        self._views.pop(volume, None)
        self.tasks.touch(f"volume:{volume}", *(f"resync:{one}" for one in resyncs))
        self.emit(Changed(frozenset({volume}), frozenset(resyncs)))

    def tell(self, kind: str, message: str, **about: str) -> None:
        """Something happened that an operator may want to know: stored with what was stored last in this step, in one
        transaction. So there is no change that was not told of and nothing told that is not so, whoever dies.
        """
        event, forgotten = self.history.add(self.now_ms, kind, message, **about)
        self._persist_with_last((event, *forgotten))
        self.emit(Tell(event))

    def _persist_with_last(self, kept: tuple[Kept, ...]) -> None:
        """In one transaction with what was stored last in this step, if anything was."""
        for at in range(len(self.actions) - 1, -1, -1):
            last = self.actions[at]
            if isinstance(last, Persist):
                if len(last.records) + len(kept) <= RECORDS_AT_ONCE_MAX:
                    self.actions[at] = Persist((*last.records, *kept))
                    kept = ()
                break
        if kept:
            self.emit(Persist(kept))

    def enter(self, asked: Asked) -> AuditEntry:
        """Enters an order into the audit trail: stored before anything that it does."""
        entry, kept = self.trail.begin(self.now_ms, asked)
        self.emit(Persist(kept))
        return entry

    def enter_answer(self, entry: AuditEntry, answer: object) -> None:
        """What it was answered: stored with what was stored last in this step, and before anybody hears it."""
        ended, kept = self.trail.end(self.now_ms, entry, answer)
        self._persist_with_last(kept)
        self.emit(Recorded(ended))

    def enter_attempts(self) -> None:
        """What was refused since the last tick."""
        entries, kept = self.trail.flush(self.now_ms)
        if kept:
            self._persist_with_last(kept)
        for entry in entries:
            self.emit(Recorded(entry))

    def tell_once(self, kind: str, message: str, **about: str) -> None:
        """The same of what is found again and again: nothing, if it was the last word on this within the hour."""
        if not self.history.says(self.now_ms, kind, message, **about):
            self.tell(kind, message, **about)

    def ask(self, volume: str, nodes: Iterable[str]) -> str:
        """Has the nodes examine a volume once the step is done; answers the examine's id, which all of a step share."""
        if not self.asking:
            self.examine_id = self.new_id()
        self.asking.append((volume, frozenset(nodes)))
        return self.examine_id

    def send_examines(self) -> None:
        """One message for each node that is asked."""
        of: dict[str, list[str]] = {}
        for volume, nodes in self.asking:
            for node in sorted(nodes):
                of.setdefault(node, []).append(volume)
        for node, volumes in of.items():
            self.emit(SendExamine(self.stream_of(node), self.examine_id, tuple(volumes)))
        self.asking.clear()

    def allow(self, node: str, limits: NodeLimits) -> None:
        """Takes on what a node says is allowed on it; whoever waits for a place there may have one now."""
        if self.places.allow(node, limits):
            self.tasks.touch("slots")

    def header(self, volume: str = "", expected_tip: str | None = None) -> Order:
        """Under what right an order is given; without a volume it is about the node."""
        entry = self.entries.get(volume)
        record = entry.record if entry is not None else VolumeRecord(volume)
        return Order(
            cluster=self.identity.cluster,
            store_id=self.identity.store_id,
            term=self.identity.term,
            leader_id=self.identity.leader_id,
            volume=volume,
            volume_id=record.volume_id,
            epoch=record.epoch,
            epoch_id=record.epoch_id,
            expected_tip=expected_tip,
        )

    def give(self, orders: Mapping[str, AnyOrder]) -> Flow[dict[str, OrderResult | ResilverError]]:
        """Gives each node its order and waits until all have answered, or answers for those that did not."""
        ids: dict[str, str] = {}
        for node, order in orders.items():
            order_id = self.new_id()
            ids[node] = order_id
            self.orders[order_id] = OrderSlot(node)
            if self.reachable(node):
                self.emit(GiveOrder(order_id, node, self.nodes[node].address, order))
            else:
                self.orders[order_id].answer = Unavailable(
                    "NODE_UNREACHABLE", f"node {node} is not connected", node=node
                )
        slots = [self.orders[order_id] for order_id in ids.values()]
        yield Wait(
            frozenset(f"order:{order_id}" for order_id in ids.values()) or frozenset({"tick"}),
            lambda: all(slot.answer is not None for slot in slots),
            self.now_ms + self.settings.order_timeout_ms,
        )
        answers: dict[str, OrderResult | ResilverError] = {}
        for node, order_id in ids.items():
            answer = self.orders.pop(order_id).answer
            answers[node] = answer or Unavailable("NODE_UNREACHABLE", f"node {node} did not answer in time", node=node)
        return answers

    def order_answered(self, order_id: str, answer: OrderResult | ResilverError) -> None:
        slot = self.orders.get(order_id)
        if slot is not None:
            slot.answer = answer
            self.tasks.touch(f"order:{order_id}")

    def lock(self, *volumes: str) -> Flow[bool]:
        """Waits for the volumes' turn, and takes all of them at once: one operation that may change a volume's primary
        or its CPs at a time.
        """
        if not (
            yield Wait(
                frozenset(f"lock:{volume}" for volume in volumes),
                lambda: self.locks.isdisjoint(volumes),
                self.now_ms + self.settings.lock_timeout_ms,
            )
        ):
            return False
        self.locks.update(volumes)
        return True

    def unlock(self, *volumes: str) -> None:
        self.locks.difference_update(volumes)
        self.tasks.touch(*(f"lock:{volume}" for volume in volumes))
