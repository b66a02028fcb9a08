"""The log of ancestry beside a dataset is made shorter as any other, and says of each snapshot what it said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.backends import ancestry
from agent.backends.zfs_layout import RECORD, read_ancestry, record_property
from agent.disk.durable import read_log, rewrite_log
from agent.lineages import record_to_json
from resilver.lineage import ConsistencyPoint, Snapshot
from tests.zfsfs import zfs

LONG, KEPT = 401, 200


@pytest.fixture(autouse=True)
def bounds(monkeypatch):
    """A hundredth of the real ones."""
    for name, value in (("RECORDS_MAX", LONG - 1), ("LINEAGE_RECORDS_MIN", KEPT), ("GOING_RECORDS_MIN", KEPT)):
        monkeypatch.setattr(ancestry, name, value)


def chain() -> list[Snapshot]:
    """Oldest first."""
    return [
        Snapshot(f"r{at}", ConsistencyPoint(1, at), f"r{at - 1}" if at else "", present=False) for at in range(LONG)
    ]


def test_a_long_log_is_made_shorter_and_the_lineage_stays(replica, other):
    replica.create()
    first = replica.snapshot()
    log, layout = replica.root / "ancestry.jsonl", replica.backend._layout
    guid = read_ancestry(layout)[1][first.id]
    mine = chain()
    # As the log would be after years: whatever was dropped has its record and its guid in it.
    past = [{"records": [record_to_json(one)], "natives": {one.id: f"1{one.cp.sequence}"}} for one in mine]
    grown = replace(first, parent=mine[-1].id)
    rewrite_log(log, [*past, {"records": [record_to_json(grown)], "natives": {first.id: guid}}])
    # Somebody's snapshot that says it is one which was dropped long ago.
    false = f"{replica.dataset}@somebodys"
    zfs("snapshot", "-o", f"{RECORD}={record_property(mine[7], 'V')}", false)
    before = replica.lineage
    assert [one.id for one in before] == [first.id, *(one.id for one in reversed(mine))]
    replica.write(2)
    second = replica.snapshot()
    expected = [second.id, *(one.id for one in before.records[:KEPT])]
    assert [one.id for one in replica.lineage] == expected
    assert len(read_log(log)) < LONG
    found = replica.again().backend.examine()
    assert [one.id for one in found.lineage if one.present] == [second.id, first.id]
    assert any(false in problem for problem in found.problems), "still not taken for what it says"
    known, guids = read_ancestry(layout)
    assert set(known) == {*expected, mine[7].id}
    assert {key: guids[key] for key in (first.id, "r7", "r300")} == {first.id: guid, "r7": "17", "r300": "1300"}
    zfs("destroy", false)
    other.receive(replica)
    assert [one.id for one in other.lineage] == expected
