"""What both sides know of a volume: the values that travel, without their wire form.

Pure: no I/O, no clock. `resilver/wire.py` turns them to protobuf and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from resilver.lineage import NO_CP, ConsistencyPoint, Lineage, Snapshot


class LiveState(Enum):
    """A live copy against its tip."""

    UNMODIFIED = "unmodified"
    MODIFIED = "modified"
    UNKNOWN = "unknown"
    ABSENT = "absent"


class Presence(Enum):
    """Whether a node has data of a volume."""

    PRESENT = "present"
    EMPTY = "empty"
    LOST = "lost"


class ResyncState(Enum):
    """Where a resync stands; the last four are final, BLOCKED ones are planned anew when the cause is gone."""

    QUEUED = "queued"
    PREPARING = "preparing"
    TRANSFERRING = "transferring"
    VERIFYING = "verifying"
    COMMITTING = "committing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    BLOCKED = "blocked"

    @property
    def final(self) -> bool:
        return self in FINAL_RESYNC_STATES


FINAL_RESYNC_STATES = frozenset({ResyncState.SUCCEEDED, ResyncState.FAILED, ResyncState.CANCELLED, ResyncState.BLOCKED})


@dataclass(frozen=True, slots=True)
class LiveCopy:
    """The writable state of a replica, after its tip. `modified_bytes` is what differs from the tip, where known."""

    state: LiveState = LiveState.ABSENT
    path: str = ""
    size_bytes: int = 0
    allocated_bytes: int = 0
    based_on: str = ""
    in_use: bool | None = None
    in_use_by: tuple[str, ...] = ()
    extent_count: int | None = None
    modified_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """What the store and every member remember of a volume; the higher epoch wins, then the newer CP."""

    volume: str
    volume_id: str = ""
    epoch: int = 0
    epoch_id: str = ""
    primary: str = ""
    members: tuple[str, ...] = ()
    newest_cp: ConsistencyPoint = NO_CP
    newest_id: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """The right to take CPs in an epoch."""

    volume_id: str
    epoch: int
    epoch_id: str


@dataclass(frozen=True, slots=True)
class PreservedCopy:
    """A losing copy that was kept before it was replaced. `cp` is the snapshot's, or the one it descends from."""

    id: str
    path: str
    based_on: str
    cp: ConsistencyPoint
    live: bool
    create_time_ms: int
    size_bytes: int
    exclusive_bytes: int | None = None
    resync_id: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a node says of its replica. `volume_id` is the data's own, empty where it was never mirrored.

    `group` is the configuration's: volumes of one node that have the same are snapshotted together.
    `others` are snapshots of other tools that are not in the lineage: shown, and never decided by.
    """

    volume: str
    presence: Presence
    volume_id: str = ""
    lineage: Lineage = field(default_factory=Lineage)
    live: LiveCopy = field(default_factory=LiveCopy)
    record: VolumeRecord | None = None
    grant: Grant | None = None
    backend: str = ""
    priority: int = 0
    keep_last: int = 16
    free_bytes: int = 0
    reserve_bytes: int = 0
    reflink: bool = False
    preserved: tuple[PreservedCopy, ...] = ()
    problems: tuple[str, ...] = ()
    examine_time_ms: int = 0
    group: str = ""
    resync_priority: int = 0
    others: tuple[Snapshot, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceShare:
    """What one source has sent of a run."""

    node: str
    wire_bytes: int = 0
    bytes_per_second: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is, as the target node tells it. `done_bytes` never falls and never exceeds `total_bytes`."""

    resync_id: str
    volume: str
    state: ResyncState
    total_bytes: int | None = None
    range_count: int | None = None
    done_bytes: int = 0
    wire_bytes: int = 0
    resent_bytes: int = 0
    sources: tuple[SourceShare, ...] = ()
    reason: str = ""
    message: str = ""
    preserved: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Order:
    """Who gives an order and under what right; `expected_tip` None is not checked."""

    cluster: str
    store_id: str
    term: int
    leader_id: str
    volume: str
    volume_id: str = ""
    epoch: int = 0
    epoch_id: str = ""
    expected_tip: str | None = None
