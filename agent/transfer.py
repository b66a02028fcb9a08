"""What brings a stage to its target: one way for volumes of blocks, one for a file system's own stream.

A run decides and tells; a transfer prepares a stage and fills it. Whatever ends it in between, the stage's directory
says how far it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from agent.disk.durable import read_json
from agent.lineages import lineage_from_json
from agent.stream.receiver import SourceAddress
from resilver.address import parse_address
from resilver.errors import ResilverError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path

    from agent.backends.base import AnyStage
    from agent.peers import Peers, Source, Wanted
    from agent.replica import Replica
    from agent.runfile import RunOrder, StagePlace
    from agent.stream.counters import Counters
    from agent.stream.throttle import Throttle
    from resilver.credentials import Credentials
    from resilver.lineage import Lineage
    from resilver.volume import Progress, ReplicaReport

T = TypeVar("T")

SOURCES_SILENT_MAX_S: Final = 600.0
LINEAGE_FILE: Final = "lineage.json"


class Desk(Protocol):
    """What a transfer needs of its run."""

    place: StagePlace | None

    @property
    def wanted(self) -> RunOrder: ...

    @property
    def replica(self) -> Replica: ...

    @property
    def peers(self) -> Peers: ...

    @property
    def stop(self) -> threading.Event: ...

    @property
    def spool_max_bytes(self) -> int: ...

    @property
    def throttle(self) -> Throttle:
        """What this node may receive."""

    @property
    def progress(self) -> Progress: ...

    def on_worker(self, job: Callable[[], T]) -> T:
        """Has it done on the volume's own thread."""

    def ask(self, call: Callable[[Source], T]) -> T:
        """The first good answer of a source."""

    def request(self) -> Wanted: ...

    def may_replace(self, report: ReplicaReport, lineage: Lineage) -> None:
        """Refuses before a byte has moved what the commit would refuse."""

    def tell(self, **changes: object) -> None: ...

    def advanced(self) -> None:
        """Some more is done of what no figure tells. To be called often: it is told now and then."""

    def received_before(self, *, done_bytes: int) -> None: ...

    def count(self, counters: Counters) -> None: ...


class Transfer(Protocol):
    """`prepare` or `restore` first, then `stage` is there; `close` always."""

    @property
    def stage(self) -> AnyStage: ...

    def prepare(self, report: ReplicaReport) -> Lineage:
        """Opens the stage, new or as it was left, and answers what it is to become."""

    def restore(self, report: ReplicaReport) -> None:
        """Opens a stage that needs nothing: the live copy is to become a clone of its own tip."""

    def move(self) -> None:
        """Fills the stage and reads it back."""

    def close(self) -> None: ...


def lineage_left_in(directory: Path, target: str) -> Lineage | None:
    """The lineage that an earlier run has left beside a stage; None unless it is whole and the target's."""
    try:
        value = read_json(directory / LINEAGE_FILE)
    except ResilverError:
        return None
    lineage = None if value is None else lineage_from_json(value)
    return lineage if lineage is not None and lineage.tip_id == target else None


def stream_of(source: Source, tls: Credentials | None) -> SourceAddress:
    """Where a source's block stream listens."""
    address = parse_address(source.stream_address)
    return SourceAddress(source.node, address.host, address.port, tls)
