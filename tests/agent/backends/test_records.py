"""What stands on disk is never guessed at: damaged records, foreign directories, and data that is not what it was."""

from __future__ import annotations

import os

import pytest

from agent.backends.image_layout import append_records, load_state
from agent.disk.durable import read_json, write_json
from resilver.errors import Damaged
from resilver.lineage import Lineage, Snapshot
from resilver.volume import LiveState
from tests.agent.backends.replica import noise


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
