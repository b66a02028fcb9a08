"""What stands on disk is never guessed at: damaged records, foreign directories, and data that is not what it was."""

from __future__ import annotations

import os

import pytest

from agent.backends.image_layout import append_records, load_state
from agent.deltas import Deltas
from agent.disk.durable import read_json, write_json
from resilver.errors import Damaged, Refused
from resilver.lineage import Lineage, Snapshot
from resilver.volume import LiveState
from tests.agent.backends.replica import Replica, noise


@pytest.fixture(params=["xfs", "btrfs", "ext4"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_base_of_which_the_end_is_missing_is_none(replica, other):
    replica.create()
    base = replica.snapshot().id
    other.receive(replica)
    replica.write(300_000, noise(7, 40_000))
    replica.snapshot()
    os.truncate(other.data(base), other.data(base).stat().st_size - 4096)
    before = other.content
    with pytest.raises(Damaged) as damaged:
        other.receive(replica, base)
    assert damaged.value.reason == "BASE_MISMATCH"
    assert other.content == before


@pytest.mark.parametrize("kind", ["xfs"])
def test_a_damaged_record_is_named(replica):
    replica.create()
    taken = replica.snapshot()
    path = replica.root / taken.id / "record.json"
    path.write_bytes(path.read_bytes().replace(b"crash", b"crush").replace(b"closed", b"clOsed"))
    with pytest.raises(Damaged, match=taken.id):
        replica.backend.examine()


@pytest.mark.parametrize("kind", ["xfs"])
def test_two_tips_are_refused(replica, other):
    replica.create()
    mine = replica.snapshot()
    other.create()
    theirs = other.snapshot()
    (other.root / theirs.id).rename(replica.root / theirs.id)
    with pytest.raises(Damaged, match="no single lineage") as refused:
        replica.backend.examine()
    assert mine.id in refused.value.message
    assert theirs.id in refused.value.message


@pytest.mark.parametrize("kind", ["xfs"])
def test_branches_in_the_log_are_no_tips(replica):
    replica.create()
    first = replica.snapshot()
    state = load_state(replica.backend._layout)
    branch = [Snapshot("b1", parent=first.id), Snapshot("b2", parent="b1"), Snapshot("c1", parent="elsewhere")]
    append_records(replica.backend._layout, branch, state)
    append_records(replica.backend._layout, branch, state)
    assert len((replica.root / "ancestry.jsonl").read_text().splitlines()) == 1
    assert replica.lineage == Lineage((first,))
    second = replica.snapshot()
    assert [record.id for record in replica.lineage] == [second.id, first.id]


@pytest.mark.parametrize("kind", ["xfs"])
def test_parents_in_a_circle_are_refused(replica):
    replica.create()
    first = replica.snapshot()
    path = replica.root / first.id / "record.json"
    write_json(path, {**read_json(path), "parent": "x"})
    append_records(replica.backend._layout, [Snapshot("x", parent=first.id)], load_state(replica.backend._layout))
    with pytest.raises(Damaged, match=r"circle|contradict"):
        replica.backend.examine()


@pytest.mark.parametrize("kind", ["xfs"])
def test_a_snapshot_without_data_is_not_present(replica):
    replica.create()
    first = replica.snapshot()
    replica.data(first.id).unlink()
    found = replica.backend.examine()
    assert [record.present for record in found.lineage] == [False]
    assert found.live.state is LiveState.UNKNOWN
    replica.snapshot()
    assert [record.present for record in replica.lineage] == [True, False]


def clock_ahead(path):
    """The file as one whose last write came before the clock was set back by an hour."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 3600 * 10**9))


def reason(work):
    with pytest.raises(Damaged) as damaged:
        work()
    return damaged.value.reason


@pytest.mark.parametrize("kind", ["xfs"])
def test_a_clock_that_steps_back_makes_no_snapshot_useless_and_hides_no_write(replica, other):
    replica.create()
    base = replica.snapshot().id
    other.receive(replica)
    replica.write(300_000, noise(7, 40_000))
    taking = Replica(replica.directory, step=lambda name: name == "snapshot.cloned" and clock_ahead(made(replica)))
    tip = taking.snapshot().id
    staged = other.root / "stage" / "tree" / "data"
    receiving = Replica(other.directory, step=lambda name: name == "commit.begun" and clock_ahead(staged))
    receiving.receive(replica, base)
    data = [replica.data(tip), other.data(tip)]
    for each in data:
        assert each.stat().st_mtime_ns > each.with_name("record.json").stat().st_mtime_ns
    for node in (replica, other):
        assert len(node.backend.delta_map(base, tip))
        times = node.data(tip).stat()
        with node.data(tip).open("r+b") as file:
            file.write(b"later by an earlier clock")
        assert reason(lambda at=node: at.backend.delta_map(base, tip)) == "BASE_MISMATCH"
        # As a program leaves it that keeps times by whole seconds, and as it was.
        for mtime_ns in (times.st_mtime_ns // 10**9 * 10**9, times.st_mtime_ns):
            os.utime(node.data(tip), ns=(times.st_atime_ns, mtime_ns))
            node.backend.delta_map(base, tip)


def made(replica):
    (directory,) = replica.root.glob(".new-*")
    return directory / "data"


@pytest.mark.parametrize("kind", ["xfs"])
def test_a_record_of_an_older_version_is_held_to_its_own_time(replica):
    replica.create()
    taken = replica.snapshot().id
    path = replica.root / taken / "record.json"
    value = read_json(path)
    assert value["data_mtime_ns"] == replica.data(taken).stat().st_mtime_ns
    for wrong in ("soon", -1, 1.5, 1 << 70):
        write_json(path, {**value, "data_mtime_ns": wrong})
        assert reason(lambda: replica.again().backend.delta_map("", taken)) == "IO_ERROR"
    del value["data_mtime_ns"]
    write_json(path, value)
    replica.backend.delta_map("", taken)
    clock_ahead(replica.data(taken))
    assert reason(lambda: replica.backend.delta_map("", taken)) == "BASE_MISMATCH"


@pytest.mark.parametrize("kind", ["xfs"])
def test_a_source_serves_nothing_that_was_written_to_since(replica):
    """Also where what differs was worked out before that."""
    replica.create()
    base = replica.snapshot().id
    replica.write(300_000, noise(7, 40_000))
    tip = replica.snapshot().id
    deltas = Deltas(replica.backend)
    size, differs = deltas.size(base, tip), deltas.map(base, tip)
    assert (deltas.size(base, tip), deltas.map(base, tip)) == (size, differs)
    replica.backend.open_reader(tip).close()
    for written, other in ((tip, base), (base, tip)):
        was = replica.data(written).read_bytes()
        times = replica.data(written).stat()
        replica.tamper(written)
        replica.backend.open_reader(other).close()
        for work in (
            lambda: deltas.size(base, tip),
            lambda: deltas.map(base, tip),
            lambda snapshot=written: replica.backend.open_reader(snapshot),
        ):
            assert reason(work) == "BASE_MISMATCH"
        replica.data(written).write_bytes(was)
        os.utime(replica.data(written), ns=(times.st_atime_ns, times.st_mtime_ns))
        assert deltas.size(base, tip) == size
    replica.lose(tip)
    with pytest.raises(Refused) as refused:
        replica.backend.open_reader(tip)
    assert refused.value.reason == "TARGET_GONE"
