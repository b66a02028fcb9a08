"""Agents that are killed, stopped and started again in the middle of a transfer, with no coordinator to help them."""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from resilver.errors import ResilverError
from resilver.v1 import agent_pb2, volume_pb2
from tests.agent.agents import DEADLINE_S, FINAL, MIB, AgentProcess, Leader, agents, scatter, until, write_image
from tests.agent.relay import Relay

SUCCEEDED = volume_pb2.RESYNC_STATE_SUCCEEDED
TRANSFERRING = volume_pb2.RESYNC_STATE_TRANSFERRING
SIZE_BYTES = 96 * MIB
HOLD_AFTER = 48 * MIB
VOLUMES = tuple(f"vm{number}" for number in range(1, 12))


@dataclass
class Scene:
    """Sources of a volume of this test's own, and a target that has nothing of it."""

    leader: Leader
    target: AgentProcess
    source: AgentProcess
    second: AgentProcess
    first: str
    relay: Relay

    @property
    def volume(self) -> str:
        return self.leader.volume

    @property
    def stage(self) -> Path:
        return self.target.place / ".resilver" / self.volume / "stage"

    def begin(self, *sources: AgentProcess) -> str:
        """Orders a full copy; returns when it is in its middle, where it stays until the relay lets it go on."""
        resync_id = str(uuid.uuid4())
        for source in sources or (self.source,):
            source.prepare(self.leader, resync_id, "", self.first, self.target.node)
        self.target.receive(self.leader, resync_id, "", self.first, *(sources or (self.source,)), expected_tip="")
        assert self.relay.held.wait(DEADLINE_S), "the middle is reached"
        until(lambda: self.progress(resync_id).done_bytes > HOLD_AFTER - 8 * MIB, "what came is taken in")
        return resync_id

    def progress(self, resync_id: str) -> volume_pb2.ResyncProgress:
        found = self.target.run(resync_id)
        assert found is not None
        return found

    def check(self) -> None:
        assert self.target.image(self.volume).read_bytes() == self.source.image(self.volume).read_bytes()
        assert not self.stage.exists()


@pytest.fixture(scope="module")
def trio(xfs, tmp_path_factory):
    place = xfs / "trio"
    place.mkdir()
    with agents(tmp_path_factory.mktemp("trio"), place, "a", "b", "c", volumes=VOLUMES) as made:
        yield made


@pytest.fixture(scope="module")
def names():
    return iter(VOLUMES)


@pytest.fixture
def scene(trio, names):
    a, b, c = trio
    leader = Leader(volume=next(names))
    write_image(a.image(leader.volume), SIZE_BYTES, holes=False)
    a.open_epoch(leader)
    first = a.snapshot(leader, opening=True).id
    b.open_epoch(leader, primary="a")
    with Relay(a.stream_port, HOLD_AFTER) as relay:
        a.reached_at = relay.port
        yield Scene(leader, b, a, c, first, relay)
        a.reached_at = 0
    for agent in trio:
        if not agent.process.alive:
            agent.start()
        # Room for the next one: its volume is never asked for again.
        shutil.rmtree(agent.place / ".resilver" / leader.volume, ignore_errors=True)
        agent.image(leader.volume).unlink(missing_ok=True)


def test_a_killed_target_goes_on_by_itself_where_it_was(scene):
    resync_id = scene.begin()
    scene.target.kill()
    assert not scene.target.image(scene.volume).exists()
    scene.relay.release()
    scene.target.start()
    run = scene.target.ended(resync_id)
    assert run.state == SUCCEEDED, run
    assert run.done_bytes == run.total_bytes
    scene.check()
    fetched_again = sum(share.wire_bytes for share in run.sources)
    assert fetched_again < SIZE_BYTES - HOLD_AFTER + 32 * MIB, "only the rest was asked for"
    assert run.done_bytes <= run.wire_bytes < run.done_bytes + 32 * MIB, "what came before the kill counts too"
    again = scene.target.receive(scene.leader, resync_id, "", scene.first, scene.source, expected_tip="")
    assert again == run, "the order again, after all that, is answered with what there is"


def test_a_target_killed_again_and_again_comes_to_its_end(scene):
    resync_id = scene.begin()
    for _ in range(2):
        scene.target.kill()
        scene.target.start()
    scene.relay.release()
    assert scene.target.ended(resync_id).state == SUCCEEDED
    scene.check()


def test_a_killed_source_is_waited_for(scene):
    resync_id = scene.begin()
    scene.source.kill()
    scene.relay.release()
    assert scene.progress(resync_id).state == TRANSFERRING
    scene.source.start()
    assert scene.target.ended(resync_id).state == SUCCEEDED
    scene.check()


def test_a_transfer_goes_on_from_another_source(scene):
    first, second = scene.source, scene.second
    second.open_epoch(scene.leader, primary="a")
    first.reached_at = 0
    assert second.resync(scene.leader, first, "", scene.first).state == SUCCEEDED
    first.reached_at = scene.relay.port
    scene.relay.hold(MIB)
    resync_id = scene.begin(first, second)
    first.kill()
    scene.relay.release()
    run = scene.target.ended(resync_id)
    assert run.state == SUCCEEDED, run
    assert {share.node for share in run.sources if share.wire_bytes} == {"a", "c"}
    scene.check()


def test_a_copy_that_comes_into_use_keeps_the_stage(scene):
    source, target, volume = scene.source, scene.target, scene.volume
    source.reached_at = 0
    assert target.resync(scene.leader, source, "", scene.first).state == SUCCEEDED
    scatter(source.image(volume), 2_000)
    second = source.snapshot(scene.leader).id
    resync_id = str(uuid.uuid4())
    source.prepare(scene.leader, resync_id, scene.first, second, "b")
    before = target.image(volume).read_bytes()
    with Relay(source.stream_port, MIB) as relay:
        source.reached_at = relay.port
        target.receive(scene.leader, resync_id, scene.first, second, source)
        assert relay.held.wait(DEADLINE_S)
        with target.image(volume).open("rb"):
            relay.release()
            run = target.ended(resync_id)
        assert (run.state, run.reason) == (volume_pb2.RESYNC_STATE_BLOCKED, "IN_USE"), run
        assert f"pid {os.getpid()}" in run.message
        assert target.image(volume).read_bytes() == before
    again = target.resync(scene.leader, source, scene.first, second)
    assert again.state == SUCCEEDED, again
    assert (again.wire_bytes, again.done_bytes) == (0, again.total_bytes), "nothing had to come again"
    assert target.image(volume).read_bytes() == source.image(volume).read_bytes()


def test_writes_during_a_transfer_are_found_and_kept(scene):
    source, target, volume = scene.source, scene.target, scene.volume
    source.reached_at = 0
    assert target.resync(scene.leader, source, "", scene.first).state == SUCCEEDED
    scatter(source.image(volume), 2_000)
    second = source.snapshot(scene.leader).id
    resync_id = str(uuid.uuid4())
    source.prepare(scene.leader, resync_id, scene.first, second, "b")
    with Relay(source.stream_port, MIB) as relay:
        source.reached_at = relay.port
        target.receive(scene.leader, resync_id, scene.first, second, source)
        assert relay.held.wait(DEADLINE_S)
        scatter(target.image(volume), 3, seed=77)
        written = target.image(volume).read_bytes()
        relay.release()
        run = target.ended(resync_id)
    assert run.state == SUCCEEDED, run
    assert target.image(volume).read_bytes() == source.image(volume).read_bytes()
    (kept,) = target.examine(volume).preserved
    assert kept.live
    assert Path(kept.path).read_bytes() == written


def test_a_cancelled_run_keeps_its_stage_for_the_next(scene):
    resync_id = scene.begin()
    stop = agent_pb2.StopTransferRequest(header=scene.leader.header(), resync_id=resync_id)
    run = scene.target.call("StopTransfer", stop).progress
    assert run.state == volume_pb2.RESYNC_STATE_CANCELLED
    assert scene.target.call("StopTransfer", stop).progress == run
    assert scene.stage.exists()
    scene.relay.release()
    again = scene.target.resync(scene.leader, scene.source, "", scene.first)
    assert again.state == SUCCEEDED
    assert again.wire_bytes < SIZE_BYTES - HOLD_AFTER + 32 * MIB
    scene.check()


def test_a_newer_order_replaces_the_run_and_discarding_discards(scene):
    older, newer = scene.begin(), str(uuid.uuid4())
    scene.source.prepare(scene.leader, newer, "", scene.first, "b")
    scene.target.receive(scene.leader, newer, "", scene.first, scene.source)
    assert scene.target.run(older) is None, "one run for each replica"
    stop = agent_pb2.StopTransferRequest(header=scene.leader.header(), resync_id=newer, discard_stage=True)
    assert scene.target.call("StopTransfer", stop).progress.state == volume_pb2.RESYNC_STATE_CANCELLED
    assert not scene.stage.exists()
    stop.resync_id = older
    with pytest.raises(ResilverError) as caught:
        scene.target.call("StopTransfer", stop)
    assert caught.value.reason == "RESYNC_NOT_FOUND"


def test_a_higher_epoch_ends_the_run(scene):
    resync_id = scene.begin()
    later = Leader(volume=scene.volume, volume_id=scene.leader.volume_id, epoch=2, epoch_id="epoch-2")
    scene.target.open_epoch(later, primary="a")
    run = scene.target.ended(resync_id)
    assert (run.state, run.reason) == (volume_pb2.RESYNC_STATE_FAILED, "STALE_EPOCH")
    with pytest.raises(ResilverError) as caught:
        scene.target.receive(scene.leader, "r", "", scene.first, scene.source)
    assert caught.value.reason == "STALE_EPOCH"


def test_a_stopped_agent_pauses_its_run_and_goes_on(scene):
    resync_id = scene.begin()
    scene.target.process.stop()
    scene.target.start()
    assert scene.progress(resync_id).state not in FINAL
    scene.relay.release()
    assert scene.target.ended(resync_id).state == SUCCEEDED
    scene.check()


def test_a_term_that_was_obeyed_outlives_a_kill(tmp_path):
    with agents(tmp_path, tmp_path, "d") as (alone,):
        write_image(alone.image(), MIB)
        now = Leader(term=9, leader_id="leader-9")
        alone.open_epoch(now)
        alone.kill()
        alone.start()
        for late in (Leader(term=8), Leader(term=9, leader_id="other")):
            with pytest.raises(ResilverError) as caught:
                alone.snapshot(late)
            assert caught.value.reason == "STALE_TERM"
        alone.snapshot(now, opening=True)
