"""What agents are told to do, and what they answer. Times are Unix milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.core.cluster import (
    Size,
)
from resilver.limits import LimitChange, NodeLimits
from resilver.lineage import Snapshot
from resilver.volume import Order, Progress, VolumeRecord


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
    priority: int = 0


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


@dataclass(frozen=True, slots=True)
class SetLimits:
    """Of a node, for a while; its order names no volume."""

    order: Order
    change: LimitChange


AnyOrder = (
    OpenEpoch
    | TakeSnapshot
    | TakeSnapshots
    | PrepareSend
    | Receive
    | StopTransfer
    | DropSnapshot
    | CloneSnapshot
    | SetLimits
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


OrderResult = Taken | TakenTogether | Size | Progress | Exported | Dropped | NodeLimits | Done
