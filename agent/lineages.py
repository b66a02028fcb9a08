"""A lineage as JSON, for the file beside a stage's journal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilver.lineage import Consistency, ConsistencyPoint, Lineage, Origin, Snapshot

if TYPE_CHECKING:
    from agent.disk.durable import Json


def lineage_to_json(lineage: Lineage) -> Json:
    """Every record, tip first."""
    return {"records": [_record_to_json(record) for record in lineage]}


def lineage_from_json(value: Json) -> Lineage | None:
    """The lineage; None for anything that is not one, such as the file of another version."""
    try:
        return Lineage(tuple(_record_from_json(row) for row in value["records"]))
    except (KeyError, TypeError, ValueError):
        return None


def _record_to_json(record: Snapshot) -> Json:
    return {
        "id": record.id,
        "cp": str(record.cp),
        "parent": record.parent,
        "present": record.present,
        "epoch_id": record.epoch_id,
        "create_time_ms": record.create_time_ms,
        "size_bytes": record.size_bytes,
        "consistency": record.consistency.value,
        "origin": record.origin.value,
        "note": record.note,
    }


def _record_from_json(row: Json) -> Snapshot:
    return Snapshot(
        id=row["id"],
        cp=ConsistencyPoint.parse(row["cp"]),
        parent=row["parent"],
        present=row["present"],
        epoch_id=row["epoch_id"],
        create_time_ms=row["create_time_ms"],
        size_bytes=row["size_bytes"],
        consistency=Consistency(row["consistency"]),
        origin=Origin(row["origin"]),
        note=row["note"],
    )
