"""What the engine's flows act with: on top of what is known, the clock, the outbox and whatever is under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from coordinator.core.audited import Asked, AuditEntry
from coordinator.core.cluster import (
    ElectionRecord,
    Resync,
    Size,
    VolumeEntry,
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
from coordinator.core.known import Known
from coordinator.core.orders import AnyOrder, OrderResult
from coordinator.core.places import Places
from coordinator.core.tasks import Flow, Tasks, Wait
from coordinator.core.trail import Trail
from resilver.errors import ResilverError, Unavailable
from resilver.limits import NodeLimits
from resilver.volume import Order, VolumeRecord

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


def accept(kept: Kept) -> None:
    """No bound on what is stored, where nothing is."""


@dataclass(slots=True)
class Examine:
    """One question to every member; later callers join it. `answered`: by which start of its agent each has."""

    id: str
    waiting: set[str]
    answered: dict[str, str]


@dataclass(slots=True)
class OrderSlot:
    """An order under way; `answer` None until it comes back."""

    node: str
    answer: OrderResult | ResilverError | None = None


@dataclass(slots=True)
class Context(Known):
    """State, clock and outbox of one step. Flows call it; only `Engine` makes one."""

    identity: Identity
    settings: Settings
    new_id: Callable[[], str]
    new_ticket: Callable[[], str]
    history: History
    now_ms: int = 0
    tasks: Tasks = field(default_factory=Tasks)
    actions: list[Action] = field(default_factory=list)
    examines: dict[str, Examine] = field(default_factory=dict)
    orders: dict[str, OrderSlot] = field(default_factory=dict)
    locks: set[str] = field(default_factory=set)
    elections: dict[str, deque[ElectionRecord]] = field(default_factory=dict)
    places: Places = field(default_factory=Places)
    sizes: dict[tuple[str, str, str], Size] = field(default_factory=dict)
    busy: dict[str, int] = field(default_factory=dict)
    trail: Trail = field(default_factory=lambda: Trail(0))
    check: Callable[[Kept], None] = accept
    led: dict[str, int] = field(default_factory=dict)
    """The resyncs that a flow leads, and when each was last heard of, or last had nothing to be heard of."""
    stopping: set[str] = field(default_factory=set)
    """The resyncs that have ended, and whose target is being told."""
    retrying: set[tuple[str, str]] = field(default_factory=set)
    """The replicas (volume, node) whose blocked resync goes on after a pause."""
    adopting: bool = False
    asking: list[tuple[str, frozenset[str]]] = field(default_factory=list)
    examine_id: str = ""

    def emit(self, *actions: Action) -> None:
        self.actions.extend(actions)

    def persist(self, *records: Kept) -> None:
        """Remembers in the store, before any later action, and in the view. Raises TOO_LARGE, before any of it, for
        what the store would not take or a later leader could not read: whatever asked for it has failed then.
        """
        for record in records:
            self.check(record)
        kept: list[Kept] = []
        for record in records:
            if isinstance(record, Volume):
                self.put_entry(record.name, record.entry)
                self.hold(record.name, record.entry)
                self.changed(record.name)
                kept.append(record)
            elif isinstance(record, ElectionRecord):
                kept += self._keep_election(record)
            elif isinstance(record, Resync):
                self.resyncs.put(record)
                self.changed(record.volume, record.id)
                kept.append(record)
            else:
                kept.append(record)
        self.emit(Persist(tuple(kept)))

    def _keep_election(self, record: ElectionRecord) -> list[Kept]:
        """The decision at a time of its own, which is its key: two of one moment are a millisecond apart."""
        kept = self.elections.setdefault(record.volume, deque())
        taken = {one.create_time_ms for one in kept}
        while record.create_time_ms in taken:
            record = replace(record, create_time_ms=record.create_time_ms + 1)
        kept.appendleft(record)
        gone: list[Kept] = [record]
        while len(kept) > ELECTIONS_KEPT_MAX:
            gone.append(Forgotten(kept.pop()))
        return gone

    def over(self, resync: Resync) -> bool:
        """Whether nothing looks it up any more: one that ended just now may still have an order on its way."""
        return resync.state.final and self.now_ms - resync.end_time_ms > self.settings.order_timeout_ms

    def put_record(self, volume: str, record: VolumeRecord, **changes: object) -> None:
        """Stores a volume's new record and tells it to every member that is connected."""
        entry = self.entries.get(volume) or VolumeEntry(record)
        self.persist(Volume(volume, replace(entry, record=record, **changes)))  # type: ignore[arg-type]  # fields by name
        self.send_record(record)

    def send_record(self, record: VolumeRecord) -> None:
        """Tells a volume's record to every member that is connected."""
        for member in record.members:
            stream = self.stream_of(member)
            if stream and self.reachable(member):
                self.emit(SendRecord(stream, record))

    def changed(self, volume: str, *resyncs: str) -> None:
        self.look_again(volume)
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

    def hold(self, volume: str, entry: VolumeEntry | None) -> None:
        """Nothing of a paused volume begins; once it is no longer paused, what waits may."""
        if self.places.hold(volume, held=entry is not None and entry.pause is not None):
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
