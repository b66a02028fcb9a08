"""One replica's disk as a model: the agent's `Backend` in memory, and what stands in its state_dir.

A volume is a few blocks, each with the number of the write that it holds; a snapshot is a frozen copy of them. What
the backend promises is modelled as kept, by the rules of `agent/backends/image_commit.py`: a snapshot and a commit each
appear in one step. Where a crash can fall is before and after each of those steps (`step`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from agent.backends.base import CommitOrder, Examined, NewSnapshot
from agent.identity import Identity, Pin, Remembered
from agent.runfile import SavedRun
from agent.tickets import Ticket, Tickets
from resilver.errors import Invalid, Refused
from resilver.lineage import NO_CP, Consistency, Lineage, Origin, Snapshot, newest_shared
from resilver.volume import Grant, LiveCopy, LiveState, Presence, PreservedCopy, VolumeRecord
from tests.simulation.guarantees import Guarantees, Was

BLOCKS = 5
Content = tuple[int, ...]
NEW_DISK: Content = (0,) * BLOCKS


class Host(Protocol):
    """The machine: where ids and the time come from, and where a crash may fall."""

    def next_id(self, kind: str) -> str: ...
    def now_ms(self) -> int: ...
    def step(self, name: str) -> None:
        """A crash here ends the agent."""


@dataclass
class Stage:
    """A clone of the base that is becoming the target. `left` are the blocks that are still to come."""

    base: str
    target: str
    content: list[int]
    left: list[int] = field(default_factory=list)
    lineage: Lineage | None = None

    def close(self) -> None:
        return


class Disk:
    """A `Backend` on the machine of `host`."""

    kind = "image"

    def __init__(self, node: str, volume: str, watch: Guarantees, host: Host) -> None:
        self.node, self.volume = node, volume
        self._watch, self._host, self._step = watch, host, host.step
        self.mounted = True
        self.user = ""
        self.volume_id = ""
        self.records: tuple[Snapshot, ...] = ()
        self.stored: dict[str, Content] = {}
        self.beside: dict[str, Content] = {}
        self.live: Content | None = None
        self.stage: Stage | None = None
        self.preserved: tuple[PreservedCopy, ...] = ()
        self.preserved_bytes: dict[str, Content] = {}
        self.record: VolumeRecord | None = None
        self.grant: Grant | None = None
        self.decided_on = ""
        self.image: tuple[object, ...] | None = None
        self._lineage: tuple[tuple[Snapshot, ...], frozenset[str], Lineage] | None = None

    @property
    def tip(self) -> str:
        return self.records[0].id if self.records else ""

    @property
    def lineage(self) -> Lineage:
        known = self._lineage
        here = frozenset(self.stored)
        if known is None or known[0] is not self.records or known[1] != here:
            known = self._lineage = (self.records, here, Lineage(self.records).with_presence(here))
        return known[2]

    def holds(self, snapshot_id: str) -> bool:
        return any(one.id == snapshot_id for one in self.records)

    def write(self, block: int, number: int) -> None:
        """Somebody writes to the live copy; nobody needs a right for that."""
        content = list(self.live or NEW_DISK)
        content[block] = number
        self.live = tuple(content)

    def take_image(self) -> None:
        """Somebody copies the whole disk away."""
        held = (
            dict(self.stored),
            dict(self.beside),
            dict(self.preserved_bytes),
            self.records,
            self.live,
            self.volume_id,
        )
        self.image = (*held, self.preserved, self.record, self.grant)

    def restore_image(self) -> None:
        """And back, while the agent is down: what was since is nowhere on this node any more."""
        assert self.image is not None
        (self.stored, self.beside, self.preserved_bytes, self.records, self.live, self.volume_id, *rest) = self.image  # type: ignore[assignment]
        (self.preserved, self.record, self.grant), self.stage, self.image = rest, None, None  # type: ignore[assignment]
        self._watch.restored(self)

    # What the agent asks.

    def recover(self) -> str:
        return f"fs-{self.node}" if self.mounted else ""

    def examine(self, *, compare_live: bool = True) -> Examined:
        there = self.mounted and (bool(self.records) or self.live is not None)
        return Examined(
            presence=Presence.PRESENT if there else Presence.EMPTY,
            volume_id=self.volume_id if self.mounted else "",
            lineage=self.lineage if self.mounted else Lineage(),
            live=self._live(compare=compare_live) if self.mounted else LiveCopy(),
            record=self.record if self.mounted else None,
            grant=self.grant if self.mounted else None,
            preserved=self.preserved if self.mounted else (),
            free_bytes=1 << 30,
            reserve_bytes=0,
            reflink=True,
            file_system_id=f"fs-{self.node}" if self.mounted else "",
            others=tuple(Snapshot(one, origin=Origin.ADOPTED) for one in sorted(self.beside)) if self.mounted else (),
        )

    def _live(self, *, compare: bool) -> LiveCopy:
        if self.live is None:
            return LiveCopy(LiveState.ABSENT, based_on=self.tip)
        if self.user:
            state = LiveState.MODIFIED if self.user == "writer" else LiveState.UNKNOWN
            return LiveCopy(state, based_on=self.tip, in_use=True, in_use_by=(self.user,))
        state = LiveState.MODIFIED
        if self.tip and not compare:
            state = LiveState.UNKNOWN
        elif self.tip and self.live == self.stored.get(self.tip):
            state = LiveState.UNMODIFIED
        return LiveCopy(state, based_on=self.tip, in_use=False)

    def save_record(self, record: VolumeRecord) -> None:
        if not self.mounted:
            raise Invalid("INVALID_FIELD", "the directory is not there: mount the disk that it is on")
        self._step("record.begun")
        self._watch.recorded(self, self.record, record)
        self.record = record
        self._step("record.written")

    def save_grant(self, grant: Grant | None) -> None:
        self._step("grant.begun")
        self._watch.granted(self, grant)
        self.grant = grant
        self._step("grant.written")

    def take_snapshot(self, new: NewSnapshot) -> Snapshot:
        if self.tip != new.parent:
            raise Refused("TARGET_CHANGED", f"the tip here is {self.tip or 'none'}, not {new.parent or 'none'}")
        if self.volume_id and self.volume_id != new.volume_id:
            raise Refused("REPLICA_FOREIGN", f"the data here is of volume {self.volume_id}, not {new.volume_id}")
        if self.live is None:
            raise Refused("NO_DATA", "a consistency point is taken of the live copy")
        self._step("snapshot.begun")
        made = new.record(BLOCKS, Consistency.CRASH)
        self._watch.took(self, made, self.live)
        self.records, self.volume_id = (made, *self.records), new.volume_id
        self.stored[made.id] = self.live
        self._step("snapshot.renamed")
        return made

    def delta(self, base: str, target: str) -> list[int]:
        """The blocks that differ."""
        after, before = self.read(target), (0,) * BLOCKS
        if base:
            if base not in self.stored:
                raise Refused("BASE_GONE", f"the data of {base} is not on {self.node}")
            before = self.stored[base]
        return [block for block in range(BLOCKS) if before[block] != after[block]]

    def read(self, snapshot_id: str) -> Content:
        if snapshot_id not in self.stored or not self.mounted:
            raise Refused("TARGET_GONE", f"the data of {snapshot_id} is not on {self.node}")
        return self.stored[snapshot_id]

    def open_stage(self, base: str, target: str, _size_bytes: int) -> Stage:
        stage = self.stage
        if stage is None or (stage.base, stage.target) != (base, target):
            if base and base not in self.stored:
                raise Refused("BASE_GONE", f"the data of {base} is not on this node")
            self._step("stage.begun")
            stage = self.stage = Stage(base, target, list(self.stored[base] if base else NEW_DISK))
        return stage

    def discard_stage(self) -> None:
        self.stage = None

    def commit(self, stage: Stage, order: CommitOrder) -> tuple[PreservedCopy, ...]:
        target = order.lineage.tip
        assert target is not None
        assert target.id == stage.target
        if self.tip != order.expected_tip:
            if self.tip == target.id:
                return tuple(copy for copy in self.preserved if copy.resync_id == order.resync_id)
            raise Refused("TARGET_CHANGED", f"the tip here is {self.tip}, no longer the one this was decided on")
        self._check_relation(order)
        shared = newest_shared(self.lineage, order.lineage)
        leaving = self.lineage.after(shared.id) if shared is not None else self.records
        if leaving and shared is not None and not order.replace_own_data:
            raise Refused("TARGET_CHANGED", f"{leaving[-1].cp} to {leaving[0].cp} are only here")
        if self.user:
            raise Refused("IN_USE", f"in use by {self.user}")
        if stage.left:
            raise AssertionError("a stage is committed that is not whole")
        self._step("commit.begun")
        was = Was(self.live, dict(self.stored), self.tip, self.decided_on)
        ours = tuple(one for one in leaving if one.id in self.stored and one.origin is not Origin.ADOPTED)
        copies = self.preserve(ours, order.resync_id)
        self._draw_line({one.id for one in order.lineage})
        self.stored.setdefault(target.id, tuple(stage.content))
        self.records = tuple(replace(one, present=True) for one in order.lineage)
        self.live, self.volume_id, self.stage = self.stored[target.id], order.volume_id, None
        self._watch.stored(self, target.id, self.stored[target.id])
        self._watch.replaced(self, order, was)
        self._step("commit.swept")
        return copies

    def _draw_line(self, line: set[str]) -> None:
        """What another tool made stays where it is, in the lineage or beside it."""
        adopted = {one.id for one in self.records if one.origin is Origin.ADOPTED}
        held = {**self.beside, **self.stored}
        self.stored = {one: content for one, content in held.items() if one in line}
        theirs = {*self.beside, *adopted}
        self.beside = {one: content for one, content in held.items() if one not in line and one in theirs}

    def preserve(self, leaving: tuple[Snapshot, ...], resync_id: str) -> tuple[PreservedCopy, ...]:
        """Keeps what the new lineage does not have: snapshots of its own, and a live copy that is not its tip."""
        kept = [(one, self.stored[one.id], False) for one in leaving]
        if self.live is not None and self.live != self.stored.get(self.tip):
            kept.append((self.records[0] if self.records else None, self.live, True))
        copies = []
        for of, content, live in kept:
            known = self._host.next_id("p"), "", of.id if of else "", of.cp if of else NO_CP
            copies.append(PreservedCopy(*known, live, self._host.now_ms(), BLOCKS, resync_id=resync_id))
            self.preserved_bytes[copies[-1].id] = content
        self.preserved = (*self.preserved, *copies)
        return tuple(copies)

    def _check_relation(self, order: CommitOrder) -> None:
        if order.replace_unrelated:
            return
        if self.volume_id and self.volume_id != order.volume_id:
            raise Refused("REPLICA_FOREIGN", f"the data here is of another volume, {self.volume_id}")
        bare = not self.records and self.live is not None
        if bare or (self.records and newest_shared(self.lineage, order.lineage) is None):
            raise Refused("REPLICA_UNRELATED", "what is here shares no snapshot with what would replace it")

    def drop(self, snapshot_id: str) -> int:
        self._step("drop.begun")
        if snapshot_id in self.preserved_bytes:
            self.preserved = tuple(copy for copy in self.preserved if copy.id != snapshot_id)
            del self.preserved_bytes[snapshot_id]
            return BLOCKS
        if snapshot_id == self.tip:
            raise Refused("PINNED", f"{snapshot_id} is the newest snapshot here, which the live copy stands on")
        if any(one.id == snapshot_id and one.origin is Origin.ADOPTED for one in self.records):
            self._watch.not_ours(self, snapshot_id)
        self.stored.pop(snapshot_id, None)
        self._watch.newest_is_kept(self.volume)
        self._step("drop.renamed")
        return BLOCKS


@dataclass
class StateDir:
    """What stands in an agent's state_dir."""

    pin: Pin
    remembered: dict[str, Remembered] = field(default_factory=dict)
    runs: dict[str, SavedRun] = field(default_factory=dict)
    tickets: dict[tuple[str, str], Ticket] = field(default_factory=dict)


class KeptIdentity(Identity):
    """The real rules of whom to obey, above a state_dir in memory."""

    def __init__(self, kept: StateDir, boot: str, step: Callable[[str], None]) -> None:
        # Its lock and its files are what is not modelled, so the real one is not called.
        self.boot = boot
        self._mutex = threading.Lock()
        self._kept, self._step = kept, step
        self._pin = kept.pin

    def remembered(self, volume: str) -> Remembered | None:
        return self._kept.remembered.get(volume)

    def remember(self, volume: str, remembered: Remembered) -> None:
        self._kept.remembered[volume] = remembered

    def _save(self, pin: Pin) -> None:
        self._step("pin.begun")
        self._kept.pin = self._pin = pin
        self._step("pin.written")


class KeptTickets(Tickets):
    """The real tickets, above a state_dir in memory."""

    def __init__(self, kept: StateDir, clock: Callable[[], float]) -> None:
        self._kept = kept
        self._clock = self._wall = clock
        self._mutex = threading.Lock()
        self._tickets = dict(kept.tickets)
        self._saved_at = clock()

    def _save(self, tickets: dict[tuple[str, str], Ticket]) -> None:
        self._kept.tickets = self._tickets = tickets
        self._saved_at = self._clock()
