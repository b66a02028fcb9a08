"""What an agent counts, in the default registry. No id, path or pid stands in a label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import Counter, Gauge, Histogram

from resilver.volume import ResyncState

if TYPE_CHECKING:
    from resilver.volume import Progress, ReplicaReport

CONNECTED: Final = Gauge("resilver_agent_coordinator_connected", "Whether a leading coordinator is being reported to.")
ORDERS_REFUSED: Final = Counter("resilver_agent_orders_refused", "Orders that were refused, by reason.", ["reason"])
SNAPSHOT_SECONDS: Final = Histogram(
    "resilver_agent_snapshot_duration_seconds", "How long taking a consistency point took.", ["volume"]
)
VERIFY_FAILURES: Final = Counter(
    "resilver_agent_verify_failures", "Data that was not what it should be, by the step that found it.", ["stage"]
)
_FREE: Final = Gauge("resilver_agent_free_bytes", "Free bytes of the volume's file system.", ["volume"])
_SNAPSHOTS: Final = Gauge("resilver_agent_snapshots", "Snapshots whose data is here.", ["volume"])
_PRESERVED: Final = Gauge("resilver_agent_preserved_bytes", "Sizes of the preserved copies together.", ["volume"])
_EXTENTS: Final = Gauge(
    "resilver_agent_live_extents", "Extents of the live copy, where they can be counted.", ["volume"]
)
_PAYLOAD: Final = Counter("resilver_agent_received_payload_bytes", "Changed bytes received.", ["volume"])
_WIRE: Final = Counter("resilver_agent_received_wire_bytes", "Bytes that the block stream brought.", ["volume"])
_RESENT: Final = Counter("resilver_agent_resent_bytes", "Bytes that had to be sent again.", ["volume"])

_BEFORE: Final = frozenset({ResyncState.QUEUED, ResyncState.PREPARING})
_STAGES: Final = {"BASE_MISMATCH": "base", "SOURCE_DAMAGED": "transfer", "READBACK_MISMATCH": "readback"}


def saw(report: ReplicaReport) -> None:
    """Takes on what a look has found."""
    volume = report.volume
    _FREE.labels(volume).set(report.free_bytes)
    _SNAPSHOTS.labels(volume).set(sum(record.present for record in report.lineage))
    _PRESERVED.labels(volume).set(
        sum(copy.size_bytes if copy.exclusive_bytes is None else copy.exclusive_bytes for copy in report.preserved)
    )
    if report.live.extent_count is not None:
        _EXTENTS.labels(volume).set(report.live.extent_count)


class Received:
    """Turns the totals that a run tells into what was added; a total that falls is another run's, and begins anew.

    What a run has before it transfers was received by an earlier start of this agent.
    """

    def __init__(self) -> None:
        self._last: dict[str, Progress] = {}

    def saw(self, progress: Progress) -> None:
        before = self._last.get(progress.volume)
        same = before is not None and before.resync_id == progress.resync_id
        for counter, name in ((_PAYLOAD, "done_bytes"), (_WIRE, "wire_bytes"), (_RESENT, "resent_bytes")):
            earlier = getattr(before, name) if same else 0
            if progress.state in _BEFORE:
                earlier = getattr(progress, name)
            counter.labels(progress.volume).inc(max(getattr(progress, name) - earlier, 0))
        if progress.reason in _STAGES and (not same or (before is not None and before.reason != progress.reason)):
            VERIFY_FAILURES.labels(_STAGES[progress.reason]).inc()
        self._last[progress.volume] = progress
