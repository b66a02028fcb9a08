"""What of a run is kept on disk, and how long a stage that nobody uses is."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import replace

import pytest

from agent import run as run_module
from agent import runs as module
from agent.backends.base import NewSnapshot
from agent.backends.image import ImageBackend
from agent.backends.image_layout import save_preserved
from agent.basecheck import BLOCKS_MAX, check_lineages, pick_blocks
from agent.delta import DeltaMap, DeltaRange
from agent.disk.durable import read_json
from agent.examiner import ReplicaSettings, now_ms
from agent.identity import Identity, Remembered
from agent.peers import Source
from agent.replica import Replica
from agent.runfile import RunOrder, SavedRun, StagePlace, run_from_json, run_to_json
from resilver.errors import ResilverError
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.volume import LiveState, Order, PreservedCopy, Progress, ResyncState, SourceShare, VolumeRecord
from tests.agent.agents import resumed_runs, until

MIB = 1 << 20
NOW_MS = 1_700_000_000_000
DAY_MS = 24 * 3_600_000


def saved(state=ResyncState.BLOCKED, time_ms=NOW_MS):
    order = Order("prod", "S", 3, "L", "vm1", "V", 2, "e2", "s1")
    source = Source("a", "h:1", "h:2")
    wanted = RunOrder(order, "r1", "s1", "s2", "t", (source,), replace_own_data=True)
    progress = Progress("r1", "vm1", state, 9, 1, 5, 6, 0, (SourceShare("a", 6, 1),), "IN_USE", "by qemu", ("p1",))
    return SavedRun(wanted, progress, StagePlace(MIB), time_ms)


def test_a_run_comes_back_as_it_was_kept():
    assert run_from_json(run_to_json(saved())) == saved()
    for broken in ({}, {"wanted": 1}, run_to_json(saved()) | {"progress": {"state": "dancing"}}):
        assert run_from_json(broken) is None


@pytest.fixture
def replica(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    identity = Identity(tmp_path / "state", "prod", "b")
    backend = ImageBackend("vm1", disk / "vm1.img", disk / ".resilver" / "vm1", reserve_min_bytes=0)
    made = Replica("vm1", "b", backend, identity, ReplicaSettings())
    yield made
    made.close()
    identity.close()


@pytest.fixture
def kept(replica, tmp_path):
    """Runs that have read what was left by an earlier start."""

    def make(*left):
        loop = asyncio.new_event_loop()
        loop.close()
        return resumed_runs(tmp_path, replica, loop, *left)

    return make


def stage_of(replica):
    stage = replica.backend.open_stage("", "s2", MIB)
    stage.close()
    return stage.directory


def test_a_stage_is_kept_for_a_day_after_its_run(replica, kept, monkeypatch):
    stage = stage_of(replica)
    runs = kept(saved())
    monkeypatch.setattr(module, "now_ms", lambda: NOW_MS + DAY_MS - 1)
    runs.sweep("vm1")
    assert stage.exists()
    monkeypatch.setattr(module, "now_ms", lambda: NOW_MS + DAY_MS + 1)
    runs.sweep("vm1")
    assert not stage.exists()


def test_a_stage_without_a_run_is_debris(replica, kept):
    stage = stage_of(replica)
    kept().sweep("vm1")
    assert not stage.exists()


def test_a_run_that_has_ended_still_answers_for_itself(kept):
    runs = kept(saved(ResyncState.FAILED))
    assert runs.progresses() == (saved(ResyncState.FAILED).progress,)
    assert runs.receive(saved().wanted) == saved(ResyncState.FAILED).progress
    assert runs.pinned("vm1") == frozenset()
    with pytest.raises(ResilverError) as caught:
        runs.stop("vm1", "another", discard_stage=True)
    assert caught.value.reason == "RESYNC_NOT_FOUND"


def ordered(resync_id, **changes):
    """An order of its own, for a replica that has nothing."""
    wanted = saved().wanted
    return replace(
        wanted, order=replace(wanted.order, expected_tip=""), resync_id=resync_id, base="", sources=(), **changes
    )


def ended(runs):
    """What became of the volume's run, once it has ended."""
    assert runs._runs["vm1"].ended.wait(60)
    (progress,) = runs.progresses()
    return progress


def test_a_run_that_came_meanwhile_keeps_its_stage(replica, kept):
    """The end of a run, with its stage, is ordered; before the disk's thread comes to it another run is."""
    runs = kept(saved())
    stage = stage_of(replica)
    begun, go = threading.Event(), threading.Event()
    held = replica.worker.submit(lambda: (begun.set(), go.wait(60)))
    assert begun.wait(60)
    came = replica.worker.submit(lambda: runs.receive(ordered("r2")))
    stopping = threading.Thread(target=runs.stop, args=("vm1", "r1"), kwargs={"discard_stage": True})
    stopping.start()
    until(lambda: len(replica.worker._jobs) == 2, "both wait for the disk's thread")
    go.set()
    stopping.join(60)
    assert held.done()
    assert came.result(60).resync_id == "r2"
    assert stage.exists()
    assert ended(runs).resync_id == "r2"
    runs.stop("vm1", "r2", discard_stage=True)
    assert not stage.exists(), "the last run's own order is obeyed"


def lose(replica):
    """What was on the disk is not there any more."""
    replica._examiner._identity.remember("vm1", Remembered("another", "s0", "V"))


@pytest.mark.parametrize("lost_before", [False, True])
def test_a_run_does_not_take_a_disk_that_is_away_for_the_one_to_be_replaced(replica, kept, tmp_path, lost_before):
    """`--replace` of a replica that was there; the node is started again, and its disk is not mounted."""
    if lost_before:
        lose(replica)
    first = kept()
    assert first.receive(ordered("r1", replace_unrelated=True)).resync_id == "r1"
    ended(first)
    at = tmp_path / "runs" / "vm1.json"
    left = run_from_json(read_json(at))
    assert left.wanted.replaces_lost is lost_before
    lose(replica)
    # As a kill would have left it: begun, and not ended.
    again = kept(replace(left, progress=replace(left.progress, state=ResyncState.TRANSFERRING, reason="", message="")))
    assert (ended(again).reason == "REPLICA_LOST") is not lost_before


def test_a_damaged_run_file_costs_the_run_and_nothing_else(kept, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "vm1.json").write_text("{")
    assert kept().progresses() == ()


def test_the_sample_lies_where_the_data_is():
    data = DeltaMap.of(1 << 40, [DeltaRange(7 << 30, 64 << 10), DeltaRange(1 << 39, 1 << 20, zero=True)])
    blocks = pick_blocks(1 << 40, data, random.Random(1))
    assert len(blocks) <= BLOCKS_MAX
    assert blocks == sorted(set(blocks))
    assert sum((7 << 30) <= block.offset < (7 << 30) + (64 << 10) for block in blocks) > 5
    assert all(block.offset + block.length <= 1 << 40 for block in blocks)
    assert pick_blocks(0, DeltaMap.of(0, []), random.Random(1)) == []
    assert pick_blocks(100, DeltaMap.of(100, [DeltaRange(0, 100)]), random.Random(1)) == [DeltaRange(0, 100)]


def record(name="s1", *, size=4096, present=True, cp=1):
    return Lineage((Snapshot(name, ConsistencyPoint(1, cp), present=present, size_bytes=size),))


@pytest.mark.parametrize(
    ("mine", "theirs", "reason"),
    [
        (record(), record(), ""),
        (record(), record(present=False), ""),
        (record(present=False), record(), "BASE_GONE"),
        (Lineage(), record(), "BASE_GONE"),
        (record(), record("other"), "BASE_GONE"),
        (record(), record(size=8192), "BASE_MISMATCH"),
        (record(), record(cp=2), "BASE_MISMATCH"),
    ],
)
def test_a_base_is_one_and_the_same_on_both_sides(mine, theirs, reason):
    if not reason:
        check_lineages("s1", mine, theirs)
        return
    with pytest.raises(ResilverError) as caught:
        check_lineages("s1", mine, theirs)
    assert caught.value.reason == reason


def test_what_advances_is_told_now_and_then_and_never_after_the_end(replica, kept, monkeypatch):
    monkeypatch.setattr(run_module, "ADVANCE_TOLD_S", 1e9)
    run, told = kept()._made(saved().wanted, replica, place=None), []
    run._told = lambda one: told.append(one.progress.state)
    run.advanced()
    run.advanced()
    assert told == [ResyncState.QUEUED], "once in a while"
    monkeypatch.setattr(run_module, "ADVANCE_TOLD_S", 0.0)
    run.advanced()
    run.tell(state=ResyncState.SUCCEEDED)
    run.advanced()
    assert told == [ResyncState.QUEUED, ResyncState.QUEUED, ResyncState.SUCCEEDED]


@pytest.fixture
def looked(replica, monkeypatch):
    """A secondary at its tip, and for each look at it from now on whether the live copy was compared."""
    backend, image = replica.backend, replica.backend._layout.live
    image.write_bytes(bytes(8192))
    backend.take_snapshot(NewSnapshot("s1", "V", ConsistencyPoint(1, 1), "", "e1", 1))
    backend.save_record(VolumeRecord("vm1", "V", 1, "e1", "a"))
    replica.examine()
    image.write_bytes(b"x" * 8192)
    looks, examine = [], backend.examine

    def counted(*, compare_live=True):
        looks.append(compare_live)
        return examine(compare_live=compare_live)

    monkeypatch.setattr(backend, "examine", counted)
    return looks


ORDER = Order("prod", "S", 1, "L", "vm1", "V", 1, "e1", "s1")


def test_an_order_to_receive_compares_only_where_its_answer_depends_on_that(replica, looked):
    report = replica.check_receive(ORDER, replaces=False)
    assert (looked, report.lineage.tip_id) == ([False], "s1")
    assert replica.check_receive(ORDER, replaces=False, compare_live=True).live.state is LiveState.MODIFIED
    assert looked == [False, True]


def test_a_live_copy_that_was_preserved_lately_is_compared(replica, looked, tmp_path):
    preserved = replica.backend._layout.preserved / "p1"
    preserved.mkdir(parents=True)
    (preserved / "data").write_bytes(b"y")
    save_preserved(preserved, PreservedCopy("p1", "", "s0", ConsistencyPoint(1, 0), True, now_ms(), 1, 1, "r0"))
    with pytest.raises(ResilverError) as refused:
        replica.check_receive(ORDER, replaces=False)
    assert (refused.value.reason, looked) == ("KEEPS_BEING_WRITTEN", [False, True])
    assert replica.check_receive(ORDER, replaces=True)
    assert looked == [False, True, False], "the operator named this node"
