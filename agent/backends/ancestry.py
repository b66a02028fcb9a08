"""The log of ancestry is made shorter once it is long: records that nothing here needs any more are left out.

It gets a record with each snapshot that is dropped, and is read at each look that follows. Beyond 40,000 records it is
replaced, in one step, by one that holds

* the newest 20,000 of the lineage: more do not travel to any other node;
* all of the lineage from there to the oldest snapshot that is here: the tip is found by walking from one to the other,
  and a gap would make each part a lineage of its own;
* those that something beside the lineage names: preserved copies, snapshots that are just leaving, and the first
  20,000 of those that are just coming.

What stays is as it was and in its order, so the lineage is the same from its tip to where it now ends; with a record of
ZFS stays the guid that the log has of it. It is done only if at least 20,000 records go, or a snapshot that is kept for
years would have it done again each time: then the log grows on, and what would make it too long to be read is refused.
The drop of the oldest snapshot, which is what helps, is let through for longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from agent.disk.durable import LOG_BYTES_MAX, LOG_RESERVE_BYTES, rewrite_log
from agent.lineages import record_to_json
from resilver.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from agent.disk.durable import Json
    from resilver.lineage import Lineage, Snapshot

_log = structlog.get_logger(__name__)

RECORDS_MAX: Final = 40_000
LINEAGE_RECORDS_MIN: Final = 20_000
GOING_RECORDS_MIN: Final = 20_000
ADVICE: Final = "; drop the volume's oldest snapshots, and it is made shorter"
_LINE_RECORDS: Final = 500


def shorten(
    path: Path,
    logged: Mapping[str, Snapshot],
    lineage: Lineage,
    here: Collection[str],
    *,
    named: Iterable[str],
    coming: Sequence[Snapshot],
    natives: Mapping[str, str] | None = None,
) -> bool:
    """Replaces a log that holds `logged`, more than RECORDS_MAX, if that makes it much shorter; whether it did.

    `here` and `named` are ids of snapshots; `natives` are the guids that the log has, by id. Without room for another
    file it stays as it is: a snapshot must be dropped on a full disk too.
    """
    deepest = max((at for at, record in enumerate(lineage.records) if record.id in here), default=0)
    keep = {record.id for record in lineage.records[: max(LINEAGE_RECORDS_MIN, deepest + 1)]}
    keep |= {record.id for record in coming[:LINEAGE_RECORDS_MIN]}
    keep.update(here, named)
    staying = [record for record in logged.values() if record.id in keep]
    if len(logged) - len(staying) < GOING_RECORDS_MIN:
        return False
    try:
        rewrite_log(path, _lines(staying, natives))
    except Refused as error:
        _log.warning("the log of ancestry was not made shorter", reason=error.reason, message=error.message)
        return False
    return True


def bytes_max(lineage: Lineage, here: Collection[str], going: Collection[str]) -> int:
    """How large the log may become when `going` are logged: all of it for the oldest snapshot that is here."""
    oldest = next((record.id for record in reversed(lineage.records) if record.id in here), "")
    return LOG_BYTES_MAX if set(going) == {oldest} else LOG_BYTES_MAX - LOG_RESERVE_BYTES


def _lines(records: Sequence[Snapshot], natives: Mapping[str, str] | None) -> Iterator[Json]:
    for at in range(0, len(records), _LINE_RECORDS):
        some = records[at : at + _LINE_RECORDS]
        line: Json = {"records": [record_to_json(record) for record in some]}
        if natives is not None:
            line["natives"] = {record.id: natives[record.id] for record in some if record.id in natives}
        yield line
