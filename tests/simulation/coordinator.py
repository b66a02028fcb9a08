"""Coordinators and their store: real engines, run as `coordinator/reign.py` runs them.

A reign takes an event, steps its engine, and runs the actions in order; each Persist is a guarded commit, and one that
fails, or of which nothing is heard, ends the reign. A coordinator may be stopped between any two actions (`frozen`),
and go on when it has long been deposed, with the one action that it had checked its lease for.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from coordinator import records
from coordinator.core import events as e
from coordinator.core.cluster import ClusterEvent, ElectionRecord, Resync, VolumeEntry
from coordinator.core.context import Identity, Settings
from coordinator.core.engine import Engine
from coordinator.store.base import Stored
from resilver.volume import VolumeRecord
from tests.simulation.agent import CLUSTER
from tests.simulation.guarantees import Guarantees

LEASE_MS = 10_000
SAFETY_MS = 500
STORE_ID = "store-1"


class ReignEnded(Exception):
    """The leadership is lost, or may be."""


@dataclass
class Store:
    """One leader, guarded writes. Times are the store's own, which are true."""

    watch: Guarantees
    term: int = 0
    leader_id: str = ""
    lease_ends: int = 0
    rows: dict[str, tuple[e.Kept, int]] = field(default_factory=dict)
    revision: int = 0
    backup: tuple[int, dict[str, tuple[e.Kept, int]]] | None = None

    def back_up(self) -> None:
        self.backup = (self.term, dict(self.rows))

    def restore(self) -> None:
        """From the backup, by the documented procedure: every volume is recovering."""
        assert self.backup is not None
        (self.term, self.rows), self.backup = self.backup, None
        self.leader_id, self.lease_ends = "", 0
        entries = {}
        for key, (kept, _) in self.rows.items():
            if isinstance(kept, e.Volume) and kept.entry is not None:
                entries[kept.name] = replace(kept.entry, recovering=True)
                self.revision += 1
                self.rows[key] = (e.Volume(kept.name, entries[kept.name]), self.revision)
        events = {kept.sequence: kept for kept, _ in self.rows.values() if isinstance(kept, ClusterEvent)}
        self.watch.store_restored(entries, events)

    def found(self, volume: str, record: VolumeRecord) -> None:
        """A volume as an earlier reign left it: all members in sync."""
        bases = {member: record.newest_id for member in record.members if member != record.primary}
        entry = VolumeEntry(record, bases=bases)
        self.revision += 1
        self.rows[f"volumes/{volume}"] = (e.Volume(volume, entry), self.revision)
        self.watch.store[volume] = entry
        self.watch.acknowledged[volume] = {record.newest_id}

    def campaign(self, now: int, leader_id: str, above: int) -> int | None:
        """The new term, None while somebody else's lease lasts."""
        if now < self.lease_ends:
            return None
        self.term = max(self.term, above) + 1
        self.leader_id, self.lease_ends = leader_id, now + LEASE_MS
        return self.term

    def renew(self, since: int, now: int, leader_id: str) -> bool:
        """As it was renewed all the time from `since` to now."""
        if self.leader_id != leader_id or since >= self.lease_ends:
            return False
        self.lease_ends = now + LEASE_MS
        return True

    def resign(self, leader_id: str) -> None:
        if self.leader_id == leader_id:
            self.leader_id, self.lease_ends = "", 0

    def commit(
        self, now: int, leader_id: str, expected: dict[str, int], kept: tuple[e.Kept, ...], answered: dict[str, Any]
    ) -> int:
        if self.leader_id != leader_id or now >= self.lease_ends:
            raise ReignEnded("another reign has begun")
        for key, revision in expected.items():
            if self.rows.get(key, (None, 0))[1] != revision:
                raise ReignEnded(f"{key} was written by somebody else")
        self.revision += 1
        for one in kept:
            key = records.key_of(one)
            if isinstance(one, e.DeletedNode | e.Forgotten) or (isinstance(one, e.Volume) and one.entry is None):
                self.rows.pop(key, None)
            else:
                self.rows[key] = (one, self.revision)
        self.watch.committed(kept, answered)
        return self.revision

    def read(self) -> tuple[e.Loaded, dict[str, int]]:
        """What a new reign begins with, through the JSON that a store keeps."""
        stored = {}
        for key, (kept, revision) in self.rows.items():
            value = records.to_json(kept)
            assert value is not None
            stored[key] = Stored(json.loads(json.dumps(value)), revision)
        return records.load(stored), {key: revision for key, (_, revision) in self.rows.items()}


class World(Protocol):
    """What a coordinator has around it."""

    watch: Guarantees
    store: Store

    def next_id(self, kind: str) -> str: ...
    def now_ms(self, who: str) -> int: ...
    def true_ms(self) -> int: ...
    def linked(self, one: str, other: str) -> bool: ...
    def speaker(self, stream: str) -> str: ...
    def chance(self, fault: str) -> bool: ...
    def give(self, coordinator: Coordinator, action: e.GiveOrder) -> None: ...
    def send(self, action: e.SendExamine | e.SendRecord | e.RefuseAgent) -> None: ...
    def answered(self, coordinator: Coordinator, action: e.Answer) -> None: ...
    def reign_ended(self, coordinator: Coordinator) -> None: ...
    def log(self, line: Callable[[], str]) -> None: ...


class Coordinator:
    """A process that leads now and then."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.alive, self.frozen = True, False
        self.engine: Engine | None = None
        self.reigns = 0
        self.term_wanted = 0
        self._forget()

    def _forget(self) -> None:
        self.engine = None
        self.leader_id = ""
        self.lease_ends = 0
        self.events: deque[e.Event] = deque()
        self.pending: deque[e.Action] = deque()
        self.revisions: dict[str, int] = {}
        self.asked: dict[str, tuple[str, set[str]]] = {}

    @property
    def leads(self) -> bool:
        """Whether it believes so, by its own clock."""
        return self.engine is not None and self.world.true_ms() < self.lease_ends - SAFETY_MS

    def campaign(self) -> None:
        world, now = self.world, self.world.true_ms()
        leader_id = world.next_id(f"{self.name}-reign-")
        term = world.store.campaign(now, leader_id, self.term_wanted)
        if term is None:
            return
        self._forget()
        self.reigns += 1
        self.leader_id, self.lease_ends = leader_id, now + LEASE_MS
        loaded, self.revisions = world.store.read()
        identity = Identity(CLUSTER, STORE_ID, term, leader_id, self.name)
        world.watch.met("the store", term, leader_id, "a campaign")
        self.engine = Engine(
            identity,
            Settings(),
            loaded,
            world.now_ms(self.name),
            lambda: world.next_id("i"),
            new_ticket=lambda: world.next_id("t"),
            check=records.check,
        )
        world.watch.counts["reigns"] += 1
        world.log(lambda: f"{self.name} leads, term {term}")

    def renew(self, since: int) -> None:
        """As time has passed: at a third of the lease, so that no jump of the simulated time ends a healthy reign."""
        if self.engine is None or self.frozen:
            return
        now = self.world.true_ms()
        if self.world.linked(self.name, "store") and self.world.store.renew(since, now, self.leader_id):
            self.lease_ends = now + LEASE_MS
        elif not self.leads:
            self.end("its lease was not renewed")

    def end(self, why: str) -> None:
        if self.engine is None:
            return
        self.world.log(lambda: f"{self.name}: the reign has ended: {why}")
        if self.world.linked(self.name, "store"):
            self.world.store.resign(self.leader_id)
        self._forget()
        self.world.reign_ended(self)

    def crash(self) -> None:
        self.alive = self.frozen = False
        self._forget()
        self.world.reign_ended(self)

    # The one loop.

    def post(self, event: e.Event) -> None:
        self.events.append(event)
        self.work()

    def work(self, *, thawed: bool = False) -> None:
        """Runs what is left of the step under way, then takes event after event."""
        try:
            self._run(checked=thawed)
            while self.events and self.engine is not None and not self.frozen:
                event = self.events.popleft()
                self._note(event)
                self.pending.extend(self.engine.step(event, self.world.now_ms(self.name)))
                self._run(checked=False)
        except ReignEnded as error:
            self.end(str(error))

    def _run(self, *, checked: bool) -> None:
        while self.pending and self.engine is not None and not self.frozen:
            if not checked and not self.leads:
                raise ReignEnded("its lease may have ended")
            if self.world.chance("freeze") or (isinstance(self.pending[0], e.Persist) and self.world.chance("freeze")):
                self.world.log(lambda: f"{self.name} is frozen before {type(self.pending[0]).__name__}")
                self.frozen = True
                return
            if self.world.chance("coordinator dies"):
                self.world.log(lambda: f"{self.name} dies before {type(self.pending[0]).__name__}")
                self.crash()
                return
            checked = False
            self._do(self.pending.popleft())

    def _do(self, action: e.Action) -> None:
        world = self.world
        match action:
            case e.Persist():
                self._persist(action)
            case e.GiveOrder():
                world.give(self, action)
            case e.SendExamine():
                for volume in action.volumes:
                    examine = self._examine(volume)
                    if examine == action.examine_id and self.asked.get(volume, ("",))[0] != examine:
                        self.asked[volume] = (examine, set())
                world.send(action)
            case e.SendRecord() | e.RefuseAgent():
                world.send(action)
            case e.Answer():
                world.answered(self, action)
            case e.RaiseTerm():
                self.term_wanted = max(self.term_wanted, action.above)
                raise ReignEnded(f"an agent has obeyed term {action.above}")
            case e.Tell():
                world.watch.told(action.event)
                world.log(lambda: f"{self.name}: {action.event.type}: {action.event.message}")

    def _persist(self, action: e.Persist) -> None:
        world = self.world
        if not world.linked(self.name, "store"):
            raise ReignEnded("the store is away")
        expected = {records.key_of(one): self.revisions.get(records.key_of(one), 0) for one in action.records}
        if world.chance("commit refused"):
            raise ReignEnded("the store is unavailable")
        answered = {volume: frozenset(nodes) for volume, (_, nodes) in self.asked.items()}
        revision = world.store.commit(world.true_ms(), self.leader_id, expected, action.records, answered)
        assert self.engine is not None
        world.watch.met("the store", self.engine.identity.term, self.leader_id, "a commit")
        world.watch.events_stored(action.records)
        world.log(lambda: f"{self.name} stores {[_short(one) for one in action.records]}")
        if world.chance("commit unknown"):
            raise ReignEnded("the outcome of a commit is not known")
        for key in expected:
            self.revisions[key] = revision

    def _note(self, event: e.Event) -> None:
        """Who has answered which examine, as the engine may know it."""
        if isinstance(event, e.ReplicaReported) and event.examine_id:
            examine = self.asked.get(event.report.volume)
            if examine is not None and examine[0] == event.examine_id == self._examine(event.report.volume):
                examine[1].add(self.world.speaker(event.stream))

    def _examine(self, volume: str) -> str:
        """The id of the examine that is under way, as the engine has it."""
        assert self.engine is not None
        examine = self.engine._context.examines.get(volume)
        return examine.id if examine is not None else ""


def _short(kept: e.Kept) -> str:
    match kept:
        case e.Volume(name, entry) if entry is not None:
            record = entry.record
            flags = "".join(f" {flag}" for flag in ("opening", "recovering") if getattr(entry, flag))
            reign = f"{record.epoch} ({record.epoch_id}) {record.primary}"
            return f"{name} {reign} {record.newest_cp} {record.newest_id}{flags}"
        case ElectionRecord() if kept.refusal is not None:
            return f"refusal {kept.volume} {kept.refusal.reasons} {kept.refusal.next_command}"
        case ElectionRecord():
            return f"election {kept.volume} {kept.epoch} {kept.winner}: {kept.rule}, accepted {kept.accepted}"
        case Resync():
            row = kept.plan
            return f"resync {kept.id} {kept.volume} {kept.node} {kept.state.value} {row.base}..{row.target}"
        case _:
            return records.key_of(kept)
