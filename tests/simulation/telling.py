"""How a trace tells what came and what was answered."""

from __future__ import annotations

from typing import Any

from coordinator.core import events as e
from resilver.errors import ResilverError


def said(answer: list[Any]) -> str:
    if not answer:
        return "it dies"
    return f"{answer[0].reason}: {answer[0].message}" if isinstance(answer[0], ResilverError) else str(answer[0])


def told(event: e.Event) -> str:
    if isinstance(event, e.ReplicaReported):
        report = event.report
        line = " ".join(f"{one.cp}:{one.id}{'' if one.present else '-'}" for one in report.lineage)
        right = f"grant {report.grant.epoch} " if report.grant is not None else ""
        known = f"record {report.record.epoch} {report.record.newest_id} " if report.record is not None else ""
        answers = f"answers {event.examine_id}" if event.examine_id else ""
        return f"{report.volume} {report.presence.value} {line} {report.live.state.value} {right}{known}{answers}"
    if isinstance(event, e.ProgressReported):
        return f"{event.progress.resync_id} {event.progress.state.value} {event.progress.reason}"
    return type(event).__name__
