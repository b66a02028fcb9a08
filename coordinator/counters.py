"""What a coordinator counts as it happens; what it reads off the engine when it is asked is in `metrics.py`.

A resync's end and a decision are counted once they are stored, by the leader that stored them, so that over all
coordinators each counts once at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from coordinator.core.cluster import ElectionRecord, Resync
from coordinator.core.events import Kept, Volume
from resilver.volume import ResyncState

LEADER_CHANGES: Final = Counter("resilver_coordinator_leader_changes", "Leaders that this coordinator saw begin.")
STORE_UP: Final = Gauge("resilver_store_up", "Whether the store answered when it was last asked.")
STORE_SECONDS: Final = Histogram(
    "resilver_store_request_duration_seconds", "How long the store took, also to fail.", ["operation"]
)
_FINISHED: Final = Counter("resilver_resyncs_finished", "Resyncs that ended.", ["action", "result", "reason"])
_RESYNC_SECONDS: Final = Histogram(
    "resilver_resync_duration_seconds",
    "From a resync's start to its end, of those that succeeded.",
    buckets=(1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600),
)
_ELECTIONS: Final = Counter("resilver_elections", "Decisions on who is primary.", ["result"])

for _result in ("elected", "stays", "refused"):
    _ELECTIONS.labels(_result)


class Leaders:
    """Counts each leader once."""

    def __init__(self) -> None:
        self._last = ""

    def saw(self, leader_id: str) -> None:
        if leader_id != self._last:
            self._last = leader_id
            LEADER_CHANGES.inc()


def stored(records: Sequence[Kept]) -> None:
    """Takes on what one transaction has stored."""
    opened = {one.entry.record.epoch_id for one in records if isinstance(one, Volume) and one.entry is not None}
    for one in records:
        if isinstance(one, Resync) and one.state.final:
            reason = one.refusal.reasons[0] if one.refusal is not None and one.refusal.reasons else ""
            _FINISHED.labels(one.plan.action.value, one.state.name, reason).inc()
            if one.state is ResyncState.SUCCEEDED:
                _RESYNC_SECONDS.observe(max(0, one.end_time_ms - (one.start_time_ms or one.create_time_ms)) / 1000)
        elif isinstance(one, ElectionRecord):
            stays = "elected" if one.epoch_id in opened else "stays"
            _ELECTIONS.labels("refused" if one.refusal is not None else stays).inc()
