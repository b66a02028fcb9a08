"""A log of ancestry that has become long is made shorter, and the lineage is what it was."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest

from agent.backends import ancestry
from agent.backends.image_kept import FRESH_NS
from agent.disk import durable
from agent.disk.durable import append_log, read_json, read_log, rewrite_log, write_json
from agent.lineages import record_to_json
from resilver.errors import Refused
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.wire_pages import LINEAGE_RECORDS_MAX
from tests.loopfs import fill, make_room, mounted, needs_root

LONG, KEPT, MORE = 401, 200, 50


@pytest.fixture
def kind() -> str:
    return "xfs"


@pytest.fixture(autouse=True)
def bounds(monkeypatch):
    """A hundredth of the real ones: each look at forty thousand records takes a second."""
    real = ancestry.RECORDS_MAX, ancestry.LINEAGE_RECORDS_MIN, ancestry.GOING_RECORDS_MIN
    assert ancestry.LINEAGE_RECORDS_MIN >= LINEAGE_RECORDS_MAX, "as many stay as travel"
    for name, value in (("RECORDS_MAX", LONG - 1), ("LINEAGE_RECORDS_MIN", KEPT), ("GOING_RECORDS_MIN", KEPT)):
        monkeypatch.setattr(ancestry, name, value)
    monkeypatch.setattr(ancestry, "_LINE_RECORDS", 30)
    assert real == (100 * (LONG - 1), 100 * KEPT, 100 * KEPT)


def chain(count: int, name: str = "r") -> list[Snapshot]:
    """Oldest first."""
    parents = itertools.chain([""], (f"{name}{at}" for at in range(count)))
    return [
        Snapshot(f"{name}{at}", ConsistencyPoint(1, at), parent, present=False)
        for at, parent in zip(range(count), parents, strict=False)
    ]


def log_of(path, records):
    """As snapshots were dropped, one after the other."""
    rewrite_log(path, ({"records": [record_to_json(record)]} for record in records))


def ids_in(path):
    return [record["id"] for line in read_log(path) for record in line["records"]]


def parented(replica, snapshot, parent):
    """The snapshot as one that has ancestors."""
    path = replica.root / snapshot.id / "record.json"
    write_json(path, {**read_json(path), "parent": parent})


def test_a_long_log_is_made_shorter_and_the_lineage_stays(replica):
    log = replica.root / "ancestry.jsonl"
    replica.create()
    first = replica.snapshot()
    parented(replica, first, f"r{LONG - 2}")
    branch = [Snapshot("b0", parent="r5"), Snapshot("b1", parent="b0")]
    log_of(log, [*branch, *chain(LONG)[:-1]])
    replica.edit(2)
    second = replica.snapshot()
    before = replica.lineage
    assert len(before) == LONG + 1
    time.sleep(FRESH_NS / 1e9 + 0.1)  # nothing is said at a glance, or kept of a file, that has changed just now
    assert len(replica.lineage) == LONG + 1
    words, inode = replica.backend.glance(), log.stat().st_ino
    assert words is not None
    replica.backend.drop(first.id)
    assert log.stat().st_ino != inode, "it was replaced, so that whoever has read it sees that it is another"
    assert replica.backend.glance() != words, "a look is due"
    expected = tuple(replace(record, present=record.id == second.id) for record in before.records[:KEPT])
    assert replica.lineage.records == expected
    assert replica.again().backend.examine().lineage.records == expected, "and to one who reads it for the first time"
    logged = ids_in(log)
    assert logged == [record.id for record in reversed(expected[1:])], "in the order in which they came"
    replica.edit(3)
    third = replica.snapshot()
    replica.backend.drop(second.id)
    assert [record.id for record in replica.lineage] == [third.id, *(record.id for record in expected)]
    assert ids_in(log) == [*logged, second.id], "added, and no more"


def test_an_old_snapshot_and_a_preserved_copy_keep_what_leads_to_them(replica):
    log = replica.root / "ancestry.jsonl"
    replica.create()
    old = replica.snapshot()
    parented(replica, old, f"r{LONG - 1}")
    after = [replace(record, parent=record.parent or old.id) for record in chain(KEPT + MORE, "n")]
    log_of(log, [*chain(LONG), *after])
    replica.edit(2)
    middle = replica.snapshot()
    parented(replica, middle, after[-1].id)
    replica.edit(3)
    tip = replica.snapshot()
    kept = replica.root / "preserved" / "p1"
    kept.mkdir(parents=True)
    about = {"id": "p1", "based_on": "r7", "cp": "1-7", "live": True, "create_time_ms": 1, "size_bytes": 1}
    write_json(kept / "preserved.json", {**about, "exclusive_bytes": 1, "resync_id": "x"})
    before = replica.lineage
    replica.backend.drop(middle.id)
    remaining = [tip.id, middle.id, *(record.id for record in reversed(after)), old.id]
    assert [record.id for record in replica.lineage] == remaining == [record.id for record in before][: len(remaining)]
    assert [record.id for record in replica.lineage if record.present] == [tip.id, old.id]
    assert ids_in(log) == ["r7", *(record.id for record in after), middle.id]
    assert replica.preserved[0].based_on == "r7"


def test_what_comes_with_a_commit_is_not_left_out(tmp_path):
    """A log may hold a branch that the replica is just being brought back to."""
    path = tmp_path / "ancestry.jsonl"
    mine, theirs = chain(LONG), chain(LONG, "t")
    logged = {record.id: record for record in [*mine, *theirs]}
    lineage = Lineage(tuple(reversed(mine)))
    leaving = mine[0].id
    assert ancestry.shorten(path, logged, lineage, {"r9"}, named={leaving}, coming=theirs[::-1])
    assert ids_in(path) == [leaving, *(one.id for one in mine[9:]), *(one.id for one in theirs[-KEPT:])]


def test_guids_stay_with_their_records(tmp_path):
    path = tmp_path / "ancestry.jsonl"
    mine = chain(LONG)
    logged = {record.id: record for record in mine}
    natives = {record.id: f"guid of {record.id}" for record in mine[::2]}
    lineage = Lineage(tuple(reversed(mine)))
    assert ancestry.shorten(path, logged, lineage, (), named=(), coming=(), natives=natives)
    lines = read_log(path)
    assert all(set(line["natives"]) <= {record["id"] for record in line["records"]} for line in lines)
    kept = {key: guid for line in lines for key, guid in line["natives"].items()}
    assert kept == {record.id: natives[record.id] for record in mine[-KEPT:] if record.id in natives}


def test_nothing_is_rewritten_for_little(tmp_path):
    path = tmp_path / "ancestry.jsonl"
    mine = chain(LONG)
    lineage = Lineage(tuple(reversed(mine)))
    logged = {record.id: record for record in mine}
    assert not ancestry.shorten(path, logged, lineage, {"r3"}, named=(), coming=())
    assert not path.exists()


@needs_root
def test_without_room_for_another_file_it_stays_and_grows_on():
    with mounted("ext4", 64 << 20) as point:
        path, mine = point / "ancestry.jsonl", chain(LONG)
        log_of(path, mine)
        whole = path.read_bytes()
        fill(point)
        logged = {record.id: record for record in mine}
        lineage = Lineage(tuple(reversed(mine)))
        assert not ancestry.shorten(path, logged, lineage, (), named=(), coming=())
        assert path.read_bytes() == whole
        assert sorted(entry.name for entry in point.iterdir()) == ["ancestry.jsonl", "filler", "lost+found"]
        make_room(point)
        assert ancestry.shorten(path, logged, lineage, (), named=(), coming=())
        assert ids_in(path) == [record.id for record in mine[-KEPT:]]


def test_a_log_never_becomes_too_long_to_be_read(tmp_path):
    path = tmp_path / "log"
    append_log(path, {"n": 1})
    bound = path.stat().st_size * 2
    append_log(path, {"n": 2}, bytes_max=bound)
    whole = path.read_bytes()
    with pytest.raises(Refused) as refused:
        append_log(path, {"n": 3}, bytes_max=bound, advice=ancestry.ADVICE)
    assert refused.value.reason == "NO_SPACE"
    assert str(path) in refused.value.message
    assert path.read_bytes() == whole


def test_the_drop_that_helps_is_let_through_for_longer():
    lineage = Lineage(tuple(reversed(chain(9))))
    bound = durable.LOG_BYTES_MAX - durable.LOG_RESERVE_BYTES
    assert ancestry.bytes_max(lineage, {"r2", "r5", "r8"}, {"r2"}) == durable.LOG_BYTES_MAX
    assert ancestry.bytes_max(lineage, {"r2", "r5", "r8"}, {"r5"}) == bound
    assert ancestry.bytes_max(lineage, {"r2", "r5", "r8"}, ()) == bound
    assert ancestry.bytes_max(Lineage(), (), ()) == bound
