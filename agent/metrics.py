"""What an agent counts, in the default registry. No id, path or pid stands in a label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import REGISTRY, CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from resilver.volume import ResyncState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from resilver.volume import Progress, ReplicaReport

Family = GaugeMetricFamily | CounterMetricFamily

CONNECTED: Final = Gauge("resilver_agent_coordinator_connected", "Whether a leading coordinator is being reported to.")
ORDERS_REFUSED: Final = Counter("resilver_agent_orders_refused", "Orders that were refused, by reason.", ["reason"])
SNAPSHOT_SECONDS: Final = Histogram(
    "resilver_agent_snapshot_duration_seconds", "How long taking a consistency point took."
)
VERIFY_FAILURES: Final = Counter(
    "resilver_agent_verify_failures", "Data that was not what it should be, by the step that found it.", ["stage"]
)
_BEFORE: Final = frozenset({ResyncState.QUEUED, ResyncState.PREPARING})
_STAGES: Final = {"BASE_MISMATCH": "base", "SOURCE_DAMAGED": "transfer", "READBACK_MISMATCH": "readback"}


class Replicas(Collector):
    """What is counted for each volume; kept as a few numbers, because a node may have 10,000 of them."""

    def __init__(self) -> None:
        self._reports: dict[str, ReplicaReport] = {}
        self._received: dict[str, tuple[int, int, int]] = {}

    def saw(self, report: ReplicaReport) -> None:
        """Takes on what a look has found."""
        self._reports[report.volume] = report

    def received(self, volume: str, payload_bytes: int, wire_bytes: int, resent_bytes: int) -> None:
        """Adds to what the volume has received."""
        payload, wire, resent = self._received.get(volume, (0, 0, 0))
        self._received[volume] = (payload + payload_bytes, wire + wire_bytes, resent + resent_bytes)

    def describe(self) -> Iterator[Family]:
        """The names and no figures."""
        return iter((*_seen(()), *_counted(())))

    def collect(self) -> Iterator[Family]:
        """The figures of now, also from another thread."""
        return iter((*_seen(tuple(self._reports.values())), *_counted(tuple(self._received.items()))))


def _seen(reports: Iterable[ReplicaReport]) -> Iterator[Family]:
    free = _gauge("free_bytes", "Free bytes of the volume's file system.")
    snapshots = _gauge("snapshots", "Snapshots whose data is here.")
    preserved = _gauge("preserved_bytes", "Sizes of the preserved copies together.")
    extents = _gauge("live_extents", "Extents of the live copy, where they can be counted.")
    for report in reports:
        volume = [report.volume]
        free.add_metric(volume, report.free_bytes)
        snapshots.add_metric(volume, sum(record.present for record in report.lineage))
        sizes = (copy.size_bytes if copy.exclusive_bytes is None else copy.exclusive_bytes for copy in report.preserved)
        preserved.add_metric(volume, sum(sizes))
        if report.live.extent_count is not None:
            extents.add_metric(volume, report.live.extent_count)
    yield from (free, snapshots, preserved, extents)


def _counted(received: Iterable[tuple[str, tuple[int, int, int]]]) -> Iterator[Family]:
    families = (
        _counter("received_payload_bytes", "Changed bytes received."),
        _counter("received_wire_bytes", "Bytes that the block stream brought."),
        _counter("resent_bytes", "Bytes that had to be sent again."),
    )
    for volume, counts in received:
        for family, count in zip(families, counts, strict=True):
            family.add_metric([volume], count)
    yield from families


def _gauge(name: str, about: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"resilver_agent_{name}", about, labels=["volume"])


def _counter(name: str, about: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"resilver_agent_{name}", about, labels=["volume"])


REPLICAS: Final = Replicas()
REGISTRY.register(REPLICAS)


class Received:
    """Turns the totals that a run tells into what was added; a total that falls is another run's, and begins anew.

    What a run has before it transfers was received by an earlier start of this agent.
    """

    def __init__(self) -> None:
        self._last: dict[str, Progress] = {}

    def saw(self, progress: Progress) -> None:
        before = self._last.get(progress.volume)
        same = before is not None and before.resync_id == progress.resync_id
        now = _bytes_of(progress)
        earlier = now if progress.state in _BEFORE else _bytes_of(before) if same and before else (0, 0, 0)
        payload, wire, resent = (max(new - old, 0) for new, old in zip(now, earlier, strict=True))
        REPLICAS.received(progress.volume, payload, wire, resent)
        if progress.reason in _STAGES and (not same or (before is not None and before.reason != progress.reason)):
            VERIFY_FAILURES.labels(_STAGES[progress.reason]).inc()
        self._last[progress.volume] = progress


def _bytes_of(progress: Progress) -> tuple[int, int, int]:
    return progress.done_bytes, progress.wire_bytes, progress.resent_bytes
