"""What the engine knows, and what its flows act with: the one owner of the core's mutable state."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

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
    AnyOrder,
    Changed,
    Forgotten,
    GiveOrder,
    Kept,
    OrderResult,
    Persist,
    SendRecord,
    Tell,
    Volume,
)
from coordinator.core.history import History
from coordinator.core.tasks import Flow, Tasks, Wait
from resilver.errors import NotFound, ResilverError, Unavailable
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
    history: History
    now_ms: int = 0
    tasks: Tasks = field(default_factory=Tasks)
    actions: list[Action] = field(default_factory=list)
    entries: dict[str, VolumeEntry] = field(default_factory=dict)
    nodes: dict[str, NodeView] = field(default_factory=dict)
    streams: dict[str, NodeView] = field(default_factory=dict)
    refused: dict[str, RefusedAgent] = field(default_factory=dict)
    heard: dict[str, dict[str, Heard]] = field(default_factory=dict)
    examines: dict[str, Examine] = field(default_factory=dict)
    orders: dict[str, OrderSlot] = field(default_factory=dict)
    locks: set[str] = field(default_factory=set)
    elections: dict[str, deque[ElectionRecord]] = field(default_factory=dict)
    resyncs: dict[str, Resync] = field(default_factory=dict)
    sizes: dict[tuple[str, str, str], Size] = field(default_factory=dict)
    busy: dict[str, int] = field(default_factory=dict)
    adopting: bool = False

    # ------------------------------------------------------------ reading

    def names(self) -> tuple[str, ...]:
        """Every volume that is stored or reported."""
        offered = {volume for node in self.nodes.values() for volume in node.volumes if node.connected}
        return tuple(sorted({*self.entries, *self.heard, *offered}))

    def require(self, volume: str) -> None:
        """Raises NotFound with the nearest name for a volume that nobody knows."""
        known = self.names()
        if volume not in known:
            raise NotFound("VOLUME_NOT_FOUND", f"no volume is named {volume!r}{nearest(volume, known)}", volume=volume)

    def view(self, volume: str, fresh: Iterable[str] | None = None) -> VolumeView:
        """One volume as decisions see it. `fresh` None: a report counts if its node is connected."""
        entry = self.entries.get(volume)
        heard = self.heard.get(volume, {})
        removed = set(entry.removed) if entry else set()
        # Before the first epoch whoever once offered the volume may have its newest data, also after a restart here.
        silent_too = entry is None or not entry.record.epoch
        offering = {
            name for name, node in self.nodes.items() if (node.connected or silent_too) and volume in node.volumes
        }
        names = ({*heard} - removed) | offering | set(entry.record.members if entry else ())
        wanted = None if fresh is None else frozenset(fresh)
        replicas: dict[str, ReplicaView] = {}
        for name in sorted(names):
            one = heard.get(name)
            duplicate = name in self.nodes and self.nodes[name].duplicate
            if one is None:
                replicas[name] = ReplicaView(name, duplicate=duplicate)
                continue
            is_fresh = self.current(name, one) if wanted is None else name in wanted
            replicas[name] = ReplicaView(name, one.report, one.time_ms, is_fresh, duplicate)
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
        return next((stream for stream, one in reversed(self.streams.items()) if one.name == node), "")

    def active_resync(self, volume: str, node: str) -> Resync | None:
        return next(
            (one for one in self.resyncs.values() if one.volume == volume and one.node == node and not one.state.final),
            None,
        )

    # ------------------------------------------------------------ acting

    def emit(self, *actions: Action) -> None:
        self.actions.extend(actions)

    def persist(self, *records: Kept) -> None:
        """Remembers in the store, before any later action, and in the view."""
        for record in records:
            if isinstance(record, Volume):
                if record.entry is None:
                    self.entries.pop(record.name, None)
                else:
                    self.entries[record.name] = record.entry
                self.changed(record.name)
            elif isinstance(record, ElectionRecord):
                records = (*records, *self._keep_election(record))
            elif isinstance(record, Resync):
                self.resyncs[record.id] = record
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
        self.tasks.touch(f"volume:{volume}", *(f"resync:{one}" for one in resyncs))
        self.emit(Changed(frozenset({volume}), frozenset(resyncs)))

    def tell(self, kind: str, message: str, **about: str) -> None:
        """Something happened that an operator may want to know: stored with what was stored last in this step, in one
        transaction. So there is no change that was not told of and nothing told that is not so, whoever dies.
        """
        event, forgotten = self.history.add(self.now_ms, kind, message, **about)
        kept: tuple[Kept, ...] = (event, *forgotten)
        for at in range(len(self.actions) - 1, -1, -1):
            last = self.actions[at]
            if isinstance(last, Persist):
                if len(last.records) + len(kept) <= RECORDS_AT_ONCE_MAX:
                    self.actions[at] = Persist((*last.records, *kept))
                    kept = ()
                break
        if kept:
            self.emit(Persist(kept))
        self.emit(Tell(event))

    def tell_once(self, kind: str, message: str, **about: str) -> None:
        """The same of what is found again and again: nothing, if it was the last word on this within the hour."""
        if not self.history.says(self.now_ms, kind, message, **about):
            self.tell(kind, message, **about)

    def header(self, volume: str, expected_tip: str | None = None) -> Order:
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


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` or what is known, for the end of a NotFound's sentence."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names[:8])}" if names else "; none is known yet"
