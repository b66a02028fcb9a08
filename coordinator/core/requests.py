"""What operators ask of the engine, and what they are answered. Times are Unix milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.core.cluster import (
    Pause,
    Refusal,
    Resync,
    VolumePlan,
)
from resilver.limits import LimitChange
from resilver.lineage import Snapshot


@dataclass(frozen=True, slots=True)
class ResyncRequest:
    """`volumes` empty: all. `plan_etag` set: the plan must still be that one."""

    volumes: tuple[str, ...]
    nodes: frozenset[str] = frozenset()
    plan_etag: str = ""
    full: bool = False
    replace: frozenset[str] = frozenset()
    validate_only: bool = False
    principal: str = ""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a resync would do; `take_snapshot` takes the CP first."""

    volumes: tuple[str, ...]
    nodes: frozenset[str] = frozenset()
    full: bool = False
    replace: frozenset[str] = frozenset()
    take_snapshot: bool = False
    principal: str = ""


@dataclass(frozen=True, slots=True)
class ElectRequest:
    """`dry_run` decides and writes nothing; `etag` as `volume_etag`, empty: not compared."""

    volume: str
    choose: str = ""
    accept_loss: frozenset[str] = frozenset()
    dry_run: bool = False
    etag: str = ""
    principal: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """A CP on each primary now, modified or not."""

    volumes: tuple[str, ...]
    note: str = ""
    validate_only: bool = False
    principal: str = ""


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Ends a resync; the stage is kept unless it is to be discarded."""

    resync_id: str
    discard_stage: bool = False
    principal: str = ""


@dataclass(frozen=True, slots=True)
class DropRequest:
    """`nodes` empty: every node that has it."""

    snapshot_id: str
    nodes: frozenset[str] = frozenset()
    validate_only: bool = False
    principal: str = ""


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """`keep_last` 0: each node's own."""

    volume: str
    keep_last: int = 0
    validate_only: bool = False
    principal: str = ""


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Copies a snapshot or a preserved copy out, on its node."""

    snapshot_id: str
    node: str
    path: str
    writable: bool = False
    principal: str = ""


@dataclass(frozen=True, slots=True)
class PauseRequest:
    """`pause` None resumes."""

    volumes: tuple[str, ...]
    pause: Pause | None
    principal: str = ""


@dataclass(frozen=True, slots=True)
class RemoveRequest:
    """`volume` empty: the node from every volume. `node` empty: the whole volume."""

    volume: str = ""
    node: str = ""
    etag: str = ""
    validate_only: bool = False
    principal: str = ""


@dataclass(frozen=True, slots=True)
class AdoptStoreRequest:
    """Agents pinned to another store are told to take on this one, which must be named by its id."""

    store_id: str
    principal: str = ""


@dataclass(frozen=True, slots=True)
class LimitRequest:
    """Caps of a node for a while."""

    node: str
    change: LimitChange
    principal: str = ""


Request = (
    ResyncRequest
    | PlanRequest
    | ElectRequest
    | SnapshotRequest
    | CancelRequest
    | DropRequest
    | PruneRequest
    | ExportRequest
    | PauseRequest
    | RemoveRequest
    | AdoptStoreRequest
    | LimitRequest
)

# ---------------------------------------------------------------- answers


@dataclass(frozen=True, slots=True)
class VolumeRefusal:
    """One volume, or one replica of it, that was refused among others that were not."""

    volume: str
    refusal: Refusal
    node: str = ""


@dataclass(frozen=True, slots=True)
class ResyncsStarted:
    resyncs: tuple[Resync, ...]
    refusals: tuple[VolumeRefusal, ...]


@dataclass(frozen=True, slots=True)
class Planned:
    etag: str
    create_time_ms: int
    volumes: tuple[VolumePlan, ...]


@dataclass(frozen=True, slots=True)
class SnapshotsTaken:
    """`snapshots` pairs a volume with the record that its primary wrote."""

    snapshots: tuple[tuple[str, Snapshot], ...]
    refusals: tuple[VolumeRefusal, ...]


@dataclass(frozen=True, slots=True)
class Pruned:
    """Rows of (node, snapshot id, freed bytes, why kept)."""

    dropped: tuple[tuple[str, str, int], ...]
    kept: tuple[tuple[str, str, tuple[str, ...]], ...]
