"""What a kind of volume must be able to do.

A backend owns one replica's data on one node: the live copy, the snapshots with their records, stages and preserved
copies. It decides nothing about epochs, terms or who is primary (`agent/replica.py` does); it promises that

* a snapshot's data and record appear in one step, and never change afterwards;
* the live copy's path shows a whole old image or a whole new one at every instant, also after a kill;
* nothing is replaced that was not kept, and nothing is replaced while somebody has it open.

There are two shapes of delta. A **block** backend tells the ranges that differ, and any node that has the target
serves them in any order. A **stream** backend has its file system write what differs as one stream, which only the
other end's file system can read; it is made and taken from its first byte to its last.

Every method blocks and is called from a worker thread. Methods of one backend are never called concurrently, except
`delta_map`, `open_reader`, `delta_bytes`, `open_send` and the methods of what was opened. Errors are those of
`resilver.errors`; an OSError from the disk becomes `Damaged("IO_ERROR")` or `Refused("NO_SPACE")`. What may take more
than minutes calls `agent.disk.advance.advanced` with each piece that is done: a run that is silent counts as gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from agent.delta import DeltaMap, DeltaRange
from resilver.lineage import Consistency, ConsistencyPoint, Lineage, Snapshot
from resilver.volume import Grant, LiveCopy, Presence, PreservedCopy, VolumeRecord


@dataclass(frozen=True, slots=True)
class Examined:
    """What is there, by looking: nothing is remembered between two calls but what stands on the disk.

    `file_system_id` names the file system (its UUID, or what comes nearest), so that an absent disk is told from
    an empty one. `record` and `grant` are the copies that stand beside the snapshots. `others` are snapshots that other
    tools made and that are not in the lineage: never a tip, only shown.
    """

    presence: Presence
    volume_id: str
    lineage: Lineage
    live: LiveCopy
    record: VolumeRecord | None
    grant: Grant | None
    preserved: tuple[PreservedCopy, ...]
    free_bytes: int
    reserve_bytes: int
    reflink: bool
    file_system_id: str
    problems: tuple[str, ...] = ()
    others: tuple[Snapshot, ...] = ()


def _as_found(consistency: Consistency) -> Consistency:
    return consistency


@dataclass(frozen=True, slots=True)
class NewSnapshot:
    """What the caller decides of a snapshot that is to be taken; size and consistency are the backend's to fill in.

    `volume_id` is written beside the record, and stamps a replica that had none. `settle` is asked by `record`.
    """

    id: str
    volume_id: str
    cp: ConsistencyPoint
    parent: str
    epoch_id: str
    create_time_ms: int
    note: str = ""
    group_id: str = ""
    settle: Callable[[Consistency], Consistency] = _as_found

    def record(self, size_bytes: int, consistency: Consistency) -> Snapshot:
        """The record to write: asked for once, when the data is a point in time and whatever the backend held for it is
        let go, and before anything shows the snapshot.

        It waits for the other volumes of a group. If it raises, the snapshot does not count: the backend removes what
        it has made, and passes the error on.
        """
        return Snapshot(
            id=self.id,
            cp=self.cp,
            parent=self.parent,
            epoch_id=self.epoch_id,
            create_time_ms=self.create_time_ms,
            size_bytes=size_bytes,
            consistency=self.settle(consistency),
            note=self.note,
            group_id=self.group_id,
        )


@dataclass(frozen=True, slots=True)
class CommitOrder:
    """What a finished stage is to become.

    `lineage` is the new lineage, tip (the target) first, as the source told it. `expected_tip` is compared and set:
    another tip is TARGET_CHANGED, and one that is the target already is done. Own snapshots that are off the new
    lineage are moved among the preserved copies only if `replace_own_data`; a replica that shares no record with the
    new lineage, or of another volume_id, is replaced (after preserving) only if `replace_unrelated`. Writes to the
    live copy since its tip are always found and preserved.
    """

    resync_id: str
    volume_id: str
    lineage: Lineage
    expected_tip: str
    replace_own_data: bool = False
    replace_unrelated: bool = False


class SnapshotReader(Protocol):
    """An open snapshot; usable from several threads."""

    size_bytes: int

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills the view from that offset; Damaged("IO_ERROR") if the disk does not give it all."""

    def announce(self, ranges: Sequence[DeltaRange]) -> None:
        """Tells the kernel what will be read soon."""

    def close(self) -> None: ...


class Stage(Protocol):
    """A writable clone of the base (or nothing) that is becoming the target; survives restarts, keyed (base, target).

    `directory` is where a transfer may keep its journal; it goes when the stage does.
    """

    base: str
    target: str
    size_bytes: int
    directory: Path
    resumed: bool

    def write(self, offset: int, data: memoryview) -> None:
        """Of two writes to one place the later counts; what was written can be read after the next `sync`."""

    def zero(self, offset: int, length: int) -> None:
        """Makes a hole."""

    def sync(self) -> None:
        """Returns when everything written so far is on the disk."""

    def drop_cache(self) -> None:
        """Makes the next reads come from the disk."""

    def announce(self, ranges: Sequence[DeltaRange]) -> None:
        """Tells the kernel what will be read soon."""

    def read_into(self, offset: int, view: memoryview) -> None: ...

    def data_within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of what is not a hole there, in order, at most 1 MiB each: the rest reads as zero."""

    def close(self) -> None: ...


class SendStream(Protocol):
    """What the source's file system writes, from the first byte. `format` is one of `StreamBackend.formats`."""

    format: str

    def read_into(self, view: memoryview) -> int:
        """Fills the view as far as there is something, at least one byte; 0 at the end of a whole stream.

        `Damaged("IO_ERROR")` with the file system's own words if it could not write all of it.
        """

    def close(self) -> None:
        """Ends whatever makes the stream, also in the middle, and from another thread; again is fine."""


@dataclass(frozen=True, slots=True)
class StreamOrigin:
    """What a source says of the two ends of a delta: their names in its file system, which travel with the data.

    `native_base` is empty for a full copy. `stream_bytes` is about what will travel, None where nobody can say.
    """

    native_base: str
    native_target: str
    formats: tuple[str, ...]
    stream_bytes: int | None = None


class StreamStage(Protocol):
    """What is becoming the target of a stream; survives restarts, keyed (base, target).

    `directory` is where a transfer may keep its journal and its spool; it goes when the stage does. Used from one
    thread at a time, but for `close`, which may come from another in the middle of any other call. `spools`: what comes
    may lie there as it came; not where the stage is encrypted and the directory is not.
    """

    base: str
    target: str
    directory: Path
    resumed: bool
    spools: bool

    @property
    def complete(self) -> bool:
        """Whether a whole stream has been taken, now or before a restart: `finish` has succeeded, nothing is fed."""

    def resume_token(self) -> str:
        """What the source's file system needs to go on where this one stopped; empty where it must start again."""

    def start(self, stream_format: str, token: str = "") -> None:
        """Takes a stream from its first byte (with a token: from where it stopped). What came before is discarded."""

    def feed(self, data: memoryview) -> None:
        """Takes the next bytes; blocks while the file system is busy, and raises its own words if it gave up."""

    def finish(self) -> None:
        """The stream is whole: returns when all of it is on the disk and is what `StreamOrigin.native_target` names.

        `Damaged("SOURCE_DAMAGED")` if it became something else. Again after success changes nothing. The live copy is
        as it was.
        """

    def verify(self, stop: threading.Event, on_share: Callable[[], None] | None = None) -> None:
        """Reads back from the disk what came; `Damaged("READBACK_MISMATCH")`.

        `on_share` is called from this thread with each MiB or less that was read, and with nothing else.
        """

    def close(self) -> None:
        """Ends whatever takes the stream; what came is kept as far as `resumed` and the spool allow."""


class ReplicaBackend(Protocol):
    """One replica's data on one node: what every kind has."""

    kind: str

    def set_reserve(self, ratio: float, min_bytes: int) -> None:
        """What must stay free of the file system, the larger of the two, from the next look at the space on."""

    def recover(self) -> str:
        """At start: thaws what was left frozen, finishes or undoes an interrupted commit, sweeps debris.

        Answers where: the `Examined.file_system_id` of what was there when it began, empty if nothing was. Whoever sees
        another one later calls it again, because what came since is as it was left.
        """

    def examine(self, *, compare_live: bool = True) -> Examined:
        """Looks. Without `compare_live` the live copy's state may be UNKNOWN (cheap, for heartbeats)."""

    def save_record(self, record: VolumeRecord) -> None:
        """Writes the volume record beside the snapshots, atomically; an EMPTY replica gets its directory."""

    def save_grant(self, grant: Grant | None) -> None: ...

    def take_snapshot(self, new: NewSnapshot) -> Snapshot:
        """Takes a CP of the live copy, whose record is `new.record(…)`. SNAPSHOT_NOT_ATOMIC where it cannot be one,
        NO_SPACE below the reserve.
        """

    def discard_stage(self) -> None: ...

    def commit(self, stage: AnyStage, order: CommitOrder) -> tuple[PreservedCopy, ...]:
        """Makes the stage a snapshot and the live copy its clone; answers what was preserved.

        IN_USE names who has the live copy open, TARGET_CHANGED the tip that was found: then nothing has changed
        and the stage is kept.
        """

    def drop(self, snapshot_id: str) -> int:
        """Lets a snapshot's or a preserved copy's data go; its record stays. Bytes freed (an estimate)."""

    def prune(self, keep_last: int, pinned: frozenset[str]) -> tuple[tuple[str, int], ...]:
        """Drops all but the newest `keep_last` snapshots, the pinned ones and the tip: (id, bytes freed) of each."""

    def export(self, snapshot_id: str, path: Path, *, writable: bool) -> int:
        """Copies a snapshot or preserved copy to a path that does not exist yet; its size in bytes."""


class BlockBackend(ReplicaBackend, Protocol):
    """A volume of blocks."""

    shape: Literal["blocks"]

    def delta_map(self, base: str, target: str) -> DeltaMap:
        """The ranges that differ; base empty: what is allocated in the target. BASE_GONE, TARGET_GONE."""

    def open_reader(self, snapshot_id: str) -> SnapshotReader: ...

    def check_space(self, delta: DeltaMap, *, resumed_bytes: int = 0) -> int:
        """The bytes that receiving the delta needs; NO_SPACE if they are not free above the reserve."""

    def open_stage(self, base: str, target: str, size_bytes: int) -> Stage:
        """The stage of (base, target), made if it is not there; stages of another pair are discarded first."""


class StreamBackend(ReplicaBackend, Protocol):
    """A volume whose file system writes and reads its own deltas."""

    shape: Literal["stream"]

    def formats(self) -> tuple[str, ...]:
        """The formats of streams that this end can write and read, the best first."""

    def delta_bytes(self, base: str, target: str) -> int | None:
        """About how long the stream would be, without reading data; None where nobody can say. BASE_GONE, TARGET_GONE.

        Base empty: a full copy.
        """

    def native_id(self, snapshot_id: str) -> str:
        """What the file system calls that snapshot, the same on every node that has it. TARGET_GONE."""

    def open_send(self, base: str, target: str, stream_format: str, token: str = "") -> SendStream:
        """Begins to write the stream. A token that is of another base or target is refused as TICKET_INVALID."""

    def check_base(self, base: str, native_base: str) -> None:
        """That the base here is the source's and untouched since it came: BASE_GONE, `Damaged("BASE_MISMATCH")`."""

    def check_stream_space(self, stream_bytes: int | None, *, resumed_bytes: int = 0) -> int:
        """The bytes that receiving needs, the spool not counted; NO_SPACE if they are not free above the reserve."""

    def open_stream_stage(self, base: str, target: str, origin: StreamOrigin) -> StreamStage:
        """The stage of (base, target, native target), made if it is not there; any other is discarded first.

        Where base and target are one, nothing is to be received: the commit only sets the live copy right.
        """


Backend: TypeAlias = BlockBackend | StreamBackend
AnyStage: TypeAlias = Stage | StreamStage


@runtime_checkable
class Glancing(Protocol):
    """A backend that can tell by a few calls whether a look would find anything new."""

    def glance(self) -> object | None:
        """Equal to an earlier one: nothing has changed since, but perhaps within a snapshot's directory. None: look."""


@runtime_checkable
class Checking(Protocol):
    """A backend whose snapshots anybody may write to who can write to its directory, and that finds it out cheaply."""

    def check_untouched(self, *snapshot_ids: str) -> None:
        """`Damaged("BASE_MISMATCH")` for one that was written to; nothing for one that is gone, nor for an empty id."""


@runtime_checkable
class Compacting(Protocol):
    """A backend whose live copy is torn apart by being written to, and can be put together in small steps."""

    def compact(self, go_on: Callable[[], bool]) -> bool:
        """A step, and more while `go_on`; whether more is to be done. No byte, delta or id is changed by it."""
