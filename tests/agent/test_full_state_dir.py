"""An agent whose state_dir is full, or may not be written to: what it cannot keep it does not obey, and it says so.

A small file system of its own carries the state_dir; the volume's disk is well.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from resilver.errors import ResilverError
from resilver.v1 import agent_pb2, volume_pb2
from tests import loopfs
from tests.agent.agents import DEADLINE_S, AgentProcess, Leader, agents, write_image
from tests.loopfs import mounted, run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount file systems")


@dataclass
class Scene:
    agent: AgentProcess
    leader: Leader
    disk: Path

    def restart(self) -> None:
        self.agent.kill()
        self.agent.start()

    @property
    def term(self) -> int:
        return self.agent.call("GetAgent", agent_pb2.GetAgentRequest()).highest_term

    def last_word(self) -> str:
        """What an agent says that cannot start."""
        self.agent.launch()
        assert self.agent.process is not None
        assert self.agent.process.running is not None
        assert self.agent.process.running.wait(DEADLINE_S) == 1
        log = self.agent.log()
        assert "Traceback" not in log
        assert str(self.agent.directory) in log.splitlines()[-1]
        return log.splitlines()[-1]

    def refused(self, order: Callable[[], object]) -> str:
        with pytest.raises(ResilverError) as caught:
            order()
        assert str(self.agent.directory) in caught.value.message, "the path is named"
        return caught.value.reason


@pytest.fixture
def scene(xfs: Path, tmp_path: Path) -> Iterator[Scene]:
    place = xfs / uuid.uuid4().hex
    place.mkdir()
    with mounted("ext4", 16 << 20) as disk:
        (tmp_path / "state-a").symlink_to(disk)
        with agents(tmp_path, place, "a") as (agent,):
            leader = Leader(term=1)
            write_image(agent.image(), 1 << 20)
            agent.open_epoch(leader)
            agent.snapshot(leader, opening=True)
            yield Scene(agent, leader, disk)


def test_a_full_state_dir(scene: Scene) -> None:
    agent, leader = scene.agent, scene.leader
    higher = replace(leader, term=2, leader_id="leader-2")
    tip = agent.tip()
    loopfs.fill(scene.disk)

    # A term that cannot be kept is not obeyed; the one that is kept goes on.
    assert scene.refused(lambda: agent.snapshot(higher)) == "NO_SPACE"
    assert (scene.term, agent.tip()) == (1, tip)
    taken = agent.snapshot(leader)
    assert agent.tip() == taken.id
    problems = agent.examine().problems
    assert any(problem.startswith("NO_SPACE: what is here cannot be remembered") for problem in problems), problems

    # Neither is a ticket honoured, nor a run begun.
    resync_id = str(uuid.uuid4())
    assert scene.refused(lambda: agent.prepare(leader, resync_id, "", taken.id, "b")) == "NO_SPACE"
    ask = agent_pb2.StreamDeltaRequest(
        volume="vm1", resync_id=resync_id, ticket=resync_id, target=taken.id, target_node="b"
    )
    with pytest.raises(ResilverError) as caught:
        list(agent.stream(ask))
    assert caught.value.reason == "TICKET_INVALID"

    # It starts all the same, and knows what it knew.
    scene.restart()
    assert scene.term == 1
    assert agent.tip() == taken.id
    assert scene.refused(lambda: agent.snapshot(higher)) == "NO_SPACE"

    loopfs.make_room(scene.disk)
    assert agent.snapshot(higher).id == agent.tip()
    assert scene.term == 2
    with pytest.raises(ResilverError) as caught:
        agent.snapshot(leader)
    assert caught.value.reason == "STALE_TERM"
    assert not any("NO_SPACE" in problem for problem in agent.examine().problems)


def test_a_run_that_cannot_be_kept_is_not_begun(scene: Scene) -> None:
    agent, leader = scene.agent, replace(scene.leader, epoch=2, epoch_id="epoch-2")
    agent.open_epoch(leader, primary="b")
    resync_id, target, tip = str(uuid.uuid4()), str(uuid.uuid4()), agent.tip()
    loopfs.fill(scene.disk)
    assert scene.refused(lambda: agent.receive(leader, resync_id, tip, target, agent)) == "NO_SPACE"
    assert agent.run(resync_id) is None
    scene.restart()
    assert agent.run(resync_id) is None
    assert agent.tip() == tip
    loopfs.make_room(scene.disk)
    assert agent.receive(leader, resync_id, tip, target, agent).state != volume_pb2.RESYNC_STATE_UNSPECIFIED
    assert agent.run(resync_id) is not None


def test_a_state_dir_that_may_not_be_written_to(scene: Scene) -> None:
    agent, leader = scene.agent, scene.leader
    higher = replace(leader, term=2, leader_id="leader-2")
    run("chattr", "+i", scene.disk)
    try:
        assert scene.refused(lambda: agent.snapshot(higher)) == "IO_ERROR"
        assert scene.term == 1
        assert agent.snapshot(leader).id == agent.tip()
    finally:
        run("chattr", "-i", scene.disk)
    assert agent.snapshot(higher).id == agent.tip()
    assert scene.term == 2


def test_a_state_dir_that_takes_nothing_at_the_start(scene: Scene) -> None:
    """Read-only, or full before what every agent needs is there: it says why in a sentence, and ends."""
    agent = scene.agent
    agent.kill()
    run("mount", "-o", "remount,ro", scene.disk)
    assert "Read-only file system" in scene.last_word()
    run("mount", "-o", "remount,rw", scene.disk)
    (scene.disk / "runs").rmdir()
    loopfs.fill(scene.disk)
    assert "no space left on device" in scene.last_word()
    loopfs.make_room(scene.disk)
    agent.start()
    assert scene.term == 1
