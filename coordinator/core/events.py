"""Every input and every output of the engine: events and requests in, actions and orders out.

Times are Unix milliseconds. Orders go to agents and come back as `OrderAnswered`; requests come from operators and
are answered by `Answer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.core.cluster import (
    ClusterEvent,
    ElectionRecord,
    NodeView,
    Pause,
    Refusal,
    Resync,
    Size,
    VolumeEntry,
    VolumePlan,
)
from resilver.errors import ResilverError
from resilver.lineage import Snapshot
from resilver.volume import Order, Progress, ReplicaReport, VolumeRecord

# ---------------------------------------------------------------- requests


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


# ---------------------------------------------------------------- orders and what they answer


@dataclass(frozen=True, slots=True)
class OpenEpoch:
    order: Order
    record: VolumeRecord
    grant: bool


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    order: Order
    request_id: str
    only_if_modified: bool = False
    opening: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class TakeSnapshots:
    """One order for several volumes of a node, to be taken while all of them are held."""

    orders: tuple[TakeSnapshot, ...]
    group_id: str

    @property
    def order(self) -> Order:
        """Under what right: the first volume's order; each has its own."""
        return self.orders[0].order


@dataclass(frozen=True, slots=True)
class PrepareSend:
    order: Order
    resync_id: str
    base: str
    target: str
    target_node: str
    ticket: str = ""
    size_only: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    node: str
    address: str
    stream_address: str


@dataclass(frozen=True, slots=True)
class Receive:
    order: Order
    resync_id: str
    base: str
    target: str
    ticket: str
    sources: tuple[Source, ...]
    replace_own_data: bool = False
    replace_unrelated: bool = False


@dataclass(frozen=True, slots=True)
class StopTransfer:
    order: Order
    resync_id: str
    discard_stage: bool = False


@dataclass(frozen=True, slots=True)
class DropSnapshot:
    order: Order
    snapshot_id: str


@dataclass(frozen=True, slots=True)
class CloneSnapshot:
    order: Order
    snapshot_id: str
    path: str
    writable: bool = False


AnyOrder = (
    OpenEpoch | TakeSnapshot | TakeSnapshots | PrepareSend | Receive | StopTransfer | DropSnapshot | CloneSnapshot
)


@dataclass(frozen=True, slots=True)
class Taken:
    """`taken` False: the live copy was unmodified, and the tip is answered."""

    snapshot: Snapshot
    taken: bool


@dataclass(frozen=True, slots=True)
class TakenTogether:
    """In the order of the volumes that were asked for."""

    taken: tuple[Taken, ...]


@dataclass(frozen=True, slots=True)
class Exported:
    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Dropped:
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Done:
    """An order that has nothing to tell."""


OrderResult = Taken | TakenTogether | Size | Progress | Exported | Dropped | Done

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class AgentConnected:
    """A stream opened with this hello. `stream` names it among all streams of this reign.

    `highest_leader_id` is whose the highest term was; empty if the agent has obeyed nobody yet.
    """

    stream: str
    node: NodeView
    cluster: str
    store_id: str
    highest_term: int
    highest_leader_id: str = ""


@dataclass(frozen=True, slots=True)
class AgentDisconnected:
    stream: str


@dataclass(frozen=True, slots=True)
class AgentHeard:
    """A heartbeat."""

    stream: str


@dataclass(frozen=True, slots=True)
class ReplicaReported:
    """`seq` grows within a stream's boot; an older one is dropped."""

    stream: str
    seq: int
    report: ReplicaReport
    examine_id: str = ""


@dataclass(frozen=True, slots=True)
class ProgressReported:
    stream: str
    progress: Progress


@dataclass(frozen=True, slots=True)
class OrderAnswered:
    """What an agent answered, or why it did not."""

    order_id: str
    answer: OrderResult | ResilverError


@dataclass(frozen=True, slots=True)
class Requested:
    key: str
    request: Request


@dataclass(frozen=True, slots=True)
class Ticked:
    """Once a second: deadlines are looked at."""


Event = (
    AgentConnected
    | AgentDisconnected
    | AgentHeard
    | ReplicaReported
    | ProgressReported
    | OrderAnswered
    | Requested
    | Ticked
)

# ---------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume's record for the store; `entry` None deletes it."""

    name: str
    entry: VolumeEntry | None


@dataclass(frozen=True, slots=True)
class DeletedNode:
    name: str


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A decision, a finished resync or an event past its bound: deleted from the store."""

    record: ElectionRecord | Resync | ClusterEvent


Kept = Volume | ElectionRecord | Resync | NodeView | ClusterEvent | DeletedNode | Forgotten


@dataclass(frozen=True, slots=True)
class Persist:
    """Written in one transaction, before any action that follows. If it fails, the reign ends."""

    records: tuple[Kept, ...]


@dataclass(frozen=True, slots=True)
class SendExamine:
    stream: str
    examine_id: str
    volumes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SendRecord:
    stream: str
    record: VolumeRecord


@dataclass(frozen=True, slots=True)
class RefuseAgent:
    """Tells the agent why and ends its stream; `adopt` tells it to take on this store first."""

    stream: str
    reason: str
    message: str
    adopt: bool = False


@dataclass(frozen=True, slots=True)
class GiveOrder:
    order_id: str
    node: str
    address: str
    order: AnyOrder


@dataclass(frozen=True, slots=True)
class Answer:
    key: str
    answer: object | ResilverError


@dataclass(frozen=True, slots=True)
class Tell:
    """Something happened, and is stored: goes to the log, the event list and the watchers."""

    event: ClusterEvent


@dataclass(frozen=True, slots=True)
class Changed:
    """Watchers of these volumes and resyncs have something new to see."""

    volumes: frozenset[str] = frozenset()
    resyncs: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RaiseTerm:
    """An agent of this store has obeyed a higher term: campaign again above it."""

    above: int


Action = Persist | SendExamine | SendRecord | RefuseAgent | GiveOrder | Answer | Tell | Changed | RaiseTerm

# ---------------------------------------------------------------- what a reign begins with


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that the store holds, as read at take-over. Elections are newest first, events oldest first; resyncs
    are by id.
    """

    volumes: Mapping[str, VolumeEntry]
    elections: Mapping[str, tuple[ElectionRecord, ...]]
    resyncs: Mapping[str, Resync]
    nodes: Mapping[str, NodeView]
    events: tuple[ClusterEvent, ...] = ()
