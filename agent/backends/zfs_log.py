"""The log of ancestry beside a dataset: what it does not hold yet is added, and a long one is made shorter.

It has the record of each snapshot from when that is taken or comes, and its guid once it was here. What `ancestry.py`
says of it holds, and one thing more stays: whatever a snapshot of the dataset says that it is. One that is not it
is known by the guid in the log, and by that alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.backends import ancestry
from agent.backends.image_layout import list_preserved
from agent.backends.zfs_layout import RECORD, read_ancestry, read_record
from agent.disk.durable import append_log
from agent.lineages import record_to_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from agent.backends.zfs_layout import Layout, State
    from resilver.lineage import Snapshot


def append_records(
    layout: Layout,
    records: Iterable[Snapshot],
    natives: Mapping[str, str],
    state: State,
    going: Iterable[str] = (),
) -> None:
    """Adds to the log what it does not hold yet; `going` are the ids of snapshots that are about to leave.

    NO_SPACE if it would become too long to be read, and nothing has changed.
    """
    records, going = tuple(records), set(going)
    known, guids = read_ancestry(layout)
    # While a commit is under way two lineages count; and where there is no dataset none is seen.
    if len(known) > ancestry.RECORDS_MAX and state.head is not None and not layout.files.commit.exists():
        _shorten(layout, state, known, guids, coming=records, going=going)
    missing = [record for record in records if record.id not in known]
    news = {key: guid for key, guid in natives.items() if guids.get(key) != guid}
    if missing or news:
        value = {"records": [record_to_json(one) for one in missing], "natives": news}
        bound = ancestry.bytes_max(state.lineage, state.where, going)
        append_log(layout.files.ancestry, value, bytes_max=bound, advice=ancestry.ADVICE)


def _shorten(
    layout: Layout,
    state: State,
    known: Mapping[str, Snapshot],
    guids: Mapping[str, str],
    *,
    coming: tuple[Snapshot, ...],
    going: set[str],
) -> None:
    claims = (read_record(one.own[RECORD]) for one in state.every if RECORD in one.own)
    claimed = {claim[0].id for claim in claims if claim is not None}
    named = {copy.based_on for copy in list_preserved(layout.files)} | claimed | going
    ancestry.shorten(
        layout.files.ancestry, known, state.lineage, state.where, named=named, coming=coming, natives=guids
    )
