"""Agents that are killed, stopped and started again in the middle of a transfer, with no coordinator to help them."""

from __future__ import annotations

import os
import signal
import uuid
from dataclasses import dataclass

import pytest

from resilver.errors import ResilverError
from resilver.v1 import agent_pb2, volume_pb2
from tests.agent.agents import FINAL, MIB, AgentProcess, Leader, agents, scatter, until, write_image

SUCCEEDED = volume_pb2.RESYNC_STATE_SUCCEEDED
TRANSFERRING = volume_pb2.RESYNC_STATE_TRANSFERRING
SIZE_BYTES = 160 * MIB


@dataclass
class Scene:
    """Sources that have a first snapshot, and a target that has nothing."""

    leader: Leader
    target: AgentProcess
    sources: list[AgentProcess]
    first: str

    def begin(self, *sources: AgentProcess) -> str:
        """Orders a full copy; returns when bytes of it have come."""
        resync_id = str(uuid.uuid4())
        for source in sources:
            source.prepare(self.leader, resync_id, "", self.first, self.target.node)
        self.target.receive(self.leader, resync_id, "", self.first, *sources, expected_tip="")
        until(lambda: self.progress(resync_id).done_bytes > 16 * MIB, "bytes come")
        return resync_id

    def progress(self, resync_id: str) -> volume_pb2.ResyncProgress:
        found = self.target.run(resync_id)
        assert found is not None
        return found

    def check(self) -> None:
        assert self.target.image().read_bytes() == self.sources[0].image().read_bytes()
        assert self.target.tip() == self.first
        assert not (self.target.place / ".resilver" / "vm1" / "stage").exists()


@pytest.fixture
def scene(xfs, tmp_path):
    place = xfs / uuid.uuid4().hex
    place.mkdir()
    with agents(tmp_path, place, "a", "b") as (a, b):
        leader = Leader()
        write_image(a.image(), SIZE_BYTES, holes=False)
        a.open_epoch(leader)
        first = a.snapshot(leader, opening=True).id
        b.open_epoch(leader, primary="a")
        yield Scene(leader, b, [a], first)
    for left in (*place.glob("*/*.img"), *place.glob("*/.resilver/*/*/data"), *place.glob("*/.resilver/*/*/*/data")):
        left.unlink()


def test_a_killed_target_goes_on_by_itself_where_it_was(scene):
    (source,) = scene.sources
    resync_id = scene.begin(source)
    scene.target.kill()
    assert not scene.target.image().exists()
    scene.target.start()
    run = scene.target.ended(resync_id)
    assert run.state == SUCCEEDED, run
    assert run.done_bytes == run.total_bytes
    scene.check()
    fetched_again = sum(share.wire_bytes for share in run.sources)
    assert fetched_again < run.total_bytes, "only the rest was asked for"
    again = scene.target.receive(scene.leader, resync_id, "", scene.first, source, expected_tip="")
    assert again == run, "the order again, after all that, is answered with what there is"


def test_a_target_killed_again_and_again_comes_to_its_end(scene):
    (source,) = scene.sources
    resync_id = scene.begin(source)
    for _ in range(2):
        scene.target.kill()
        scene.target.start()
    assert scene.target.ended(resync_id).state == SUCCEEDED
    scene.check()


def test_a_killed_source_is_waited_for(scene):
    (source,) = scene.sources
    resync_id = scene.begin(source)
    source.kill()
    assert scene.progress(resync_id).state == TRANSFERRING
    source.start()
    run = scene.target.ended(resync_id)
    assert run.state == SUCCEEDED, run
    scene.check()


def test_a_transfer_goes_on_from_another_source(scene, tmp_path):
    (first,) = scene.sources
    with agents(tmp_path, scene.target.place.parent, "c") as (second,):
        second.open_epoch(scene.leader, primary="a")
        assert second.resync(scene.leader, first, "", scene.first).state == SUCCEEDED
        resync_id = scene.begin(first, second)
        first.kill()
        run = scene.target.ended(resync_id)
        assert run.state == SUCCEEDED, run
        assert {share.node for share in run.sources if share.wire_bytes} == {"a", "c"}
        scene.check()


def test_a_copy_that_comes_into_use_keeps_the_stage(scene):
    (source,) = scene.sources
    assert scene.target.resync(scene.leader, source, "", scene.first).state == SUCCEEDED
    scatter(source.image(), 6_000)
    second = source.snapshot(scene.leader).id
    resync_id = str(uuid.uuid4())
    source.prepare(scene.leader, resync_id, scene.first, second, "b")
    source.process.send(signal.SIGSTOP)
    scene.target.receive(scene.leader, resync_id, scene.first, second, source)
    before = scene.target.image().read_bytes()
    with scene.target.image().open("rb"):
        source.process.send(signal.SIGCONT)
        run = scene.target.ended(resync_id)
        assert (run.state, run.reason) == (volume_pb2.RESYNC_STATE_BLOCKED, "IN_USE"), run
        assert f"pid {os.getpid()}" in run.message
        assert scene.target.image().read_bytes() == before
    again = scene.target.resync(scene.leader, source, scene.first, second)
    assert again.state == SUCCEEDED
    assert (again.wire_bytes, again.done_bytes) == (0, again.total_bytes), "nothing had to come again"
    assert scene.target.image().read_bytes() == source.image().read_bytes()


def test_a_cancelled_run_keeps_its_stage_for_the_next(scene):
    (source,) = scene.sources
    resync_id = scene.begin(source)
    stop = agent_pb2.StopTransferRequest(header=scene.leader.header(), resync_id=resync_id)
    run = scene.target.call("StopTransfer", stop).progress
    assert run.state == volume_pb2.RESYNC_STATE_CANCELLED
    assert scene.target.call("StopTransfer", stop).progress == run
    stage = scene.target.place / ".resilver" / "vm1" / "stage"
    assert stage.exists()
    again = scene.target.resync(scene.leader, source, "", scene.first)
    assert again.state == SUCCEEDED
    assert again.wire_bytes < again.total_bytes
    scene.check()


def test_a_newer_order_replaces_the_run_and_discarding_discards(scene):
    (source,) = scene.sources
    older = scene.begin(source)
    newer = scene.begin(source)
    assert scene.target.run(older) is None, "one run for each replica"
    stop = agent_pb2.StopTransferRequest(header=scene.leader.header(), resync_id=newer, discard_stage=True)
    scene.target.call("StopTransfer", stop)
    assert not (scene.target.place / ".resilver" / "vm1" / "stage").exists()
    stop.resync_id = older
    with pytest.raises(ResilverError) as caught:
        scene.target.call("StopTransfer", stop)
    assert caught.value.reason == "RESYNC_NOT_FOUND"


def test_a_higher_epoch_ends_the_run(scene):
    (source,) = scene.sources
    resync_id = scene.begin(source)
    source.process.send(signal.SIGSTOP)
    later = Leader(volume_id=scene.leader.volume_id, epoch=2, epoch_id="epoch-2")
    scene.target.open_epoch(later, primary="a")
    run = scene.target.ended(resync_id)
    source.process.send(signal.SIGCONT)
    assert (run.state, run.reason) == (volume_pb2.RESYNC_STATE_FAILED, "STALE_EPOCH")
    with pytest.raises(ResilverError) as caught:
        scene.target.receive(scene.leader, "r", "", scene.first, source)
    assert caught.value.reason == "STALE_EPOCH"


def test_a_stopped_agent_pauses_its_run_and_goes_on(scene):
    (source,) = scene.sources
    resync_id = scene.begin(source)
    scene.target.process.stop()
    scene.target.start()
    assert scene.progress(resync_id).state not in FINAL or scene.progress(resync_id).state == SUCCEEDED
    run = scene.target.ended(resync_id)
    assert run.state == SUCCEEDED, run
    scene.check()


def test_a_term_that_was_obeyed_outlives_a_kill(scene):
    (source,) = scene.sources
    source.open_epoch(Leader(volume_id=scene.leader.volume_id, term=9, leader_id="leader-9"))
    source.kill()
    source.start()
    for late in (scene.leader, Leader(volume_id=scene.leader.volume_id, term=9, leader_id="other")):
        with pytest.raises(ResilverError) as caught:
            source.snapshot(late)
        assert caught.value.reason == "STALE_TERM"
