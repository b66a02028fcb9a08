"""A short text that changes whenever something changes that a decision about a volume depends on."""

from __future__ import annotations

import hashlib
from typing import Final

from coordinator.core.cluster import VolumeView

ETAG_CHARS: Final = 12


def volume_etag(view: VolumeView) -> str:
    """Of the volume's record, its marks, and of what each replica is, not of when it was heard."""
    entry = view.entry
    marks = None if entry is None else (entry.record, entry.opening, entry.recovering, entry.removed, entry.pause)
    replicas = []
    for node in sorted(view.replicas):
        replica = view.replicas[node]
        report = replica.report
        facts = None
        if report is not None:
            facts = (report.presence, report.volume_id, report.lineage.tip_id, report.live.state, report.grant)
        replicas.append((node, replica.fresh, facts))
    return hashlib.sha256(repr((view.name, marks, replicas)).encode()).hexdigest()[:ETAG_CHARS]
