"""Records of snapshots as JSON: beside their data, in a replica's log, and beside a stage's journal."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec

from agent.stored import checked
from resilver.errors import Invalid
from resilver.lineage import Lineage, Snapshot

if TYPE_CHECKING:
    from agent.disk.durable import Json


def lineage_to_json(lineage: Lineage) -> Json:
    """Every record, tip first, with what the teller still has."""
    return {"records": [{**record_to_json(record), "present": record.present} for record in lineage]}


def lineage_from_json(value: Json) -> Lineage | None:
    """The lineage; None for anything that is not one, such as the file of another version."""
    try:
        rows = value["records"]
        return Lineage(tuple(replace(record_from_json(row), present=row["present"]) for row in rows))
    except (KeyError, TypeError, ValueError, Invalid):
        return None


def record_to_json(record: Snapshot) -> Json:
    """What is true of a snapshot on every node, so not whether it is present."""
    return {
        "id": record.id,
        "cp": str(record.cp),
        "parent": record.parent,
        "epoch_id": record.epoch_id,
        "create_time_ms": record.create_time_ms,
        "size_bytes": record.size_bytes,
        "consistency": record.consistency.value,
        "origin": record.origin.value,
        "note": record.note,
        "group_id": record.group_id,
    }


def record_from_json(value: Json) -> Snapshot:
    """The record, as present: whoever reads it knows better if it is not. Raises KeyError, ValueError or Invalid.

    Only the `group_id` may be missing: of a record that was written before there were groups.
    """
    if not value["id"]:
        raise ValueError("a record without an id")
    fields = {name: value[name] for name in _FIELDS} | {"group_id": value.get("group_id", "")}
    return msgspec.convert(checked(fields), Snapshot)


_FIELDS: Final = (
    "id", "cp", "parent", "epoch_id", "create_time_ms", "size_bytes", "consistency", "origin", "note"
)  # fmt: skip
