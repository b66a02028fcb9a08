"""What orders have left held is ended: by the next start, by the next order, and by the agent again and again."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import leftovers
from agent.disk.durable import write_json
from resilver.errors import Refused
from tests.agent.agents import until
from tests.agent.hook_scene import VOLUMES, Scene, reason_of, running


@pytest.fixture
def scene(tmp_path: Path, xfs: Path) -> Iterator[Scene]:
    with running(tmp_path, xfs) as made:
        yield made


def test_after_runs_at_the_next_start_when_all_were_killed(scene: Scene) -> None:
    scene.does("before", "vm2", f"kill -STOP $PPID; kill -KILL {scene.pid()} $PPID")
    assert reason_of(lambda: scene.take_together("vm1", "vm2"))[0] == "NODE_UNREACHABLE"
    scene.agent.kill()
    assert scene.pending()
    assert scene.ran() == ["before vm1", "before vm2"]
    scene.agent.start()
    until(lambda: not scene.pending(), "what was left is ended")
    assert scene.ran() == ["after vm2", "after vm1"]


def test_an_after_that_fails_is_tried_until_it_succeeds(scene: Scene) -> None:
    """By the agent itself, and told once when it begins to fail and once when it does no more."""
    scene.does("after", "vm3", f"[ -e {scene.directory}/mended ] || exit $(cat {scene.directory}/code)")
    (scene.directory / "code").write_text("3")
    assert scene.take().cp.text == "1-1"
    assert scene.log()[:4] == ["before vm3 a 1-1 alone", *["after vm3 a 1-1 alone"] * 3]
    assert "ended with 3" in problem_of(scene)
    (scene.directory / "code").write_text("4")
    tries = len(scene.log())
    until(lambda: len(scene.log()) > tries + 6, "the agent tries again")
    assert "ended with 3" in problem_of(scene), "other words are no other problem"
    assert scene.pending()
    # The next CP does not wait for a pause to end.
    scene.take()
    assert "ended with 4" in problem_of(scene)
    (scene.directory / "mended").touch()
    until(lambda: not scene.pending(), "it succeeds")
    until(lambda: not scene.agent.examine("vm3").problems, "the problem has gone")
    scene.ran()
    scene.take()
    assert scene.ran() == ["before vm3", "after vm3"]


def problem_of(scene: Scene) -> str:
    (problem,) = scene.agent.examine("vm3").problems
    assert problem.startswith("HOOK_FAILED: `after`")
    return problem


def test_what_is_left_of_volumes_that_are_not_configured_any_more_is_ended(scene: Scene) -> None:
    scene.does("before", "vm2", f"kill -STOP $PPID; kill -KILL {scene.pid()} $PPID")
    assert reason_of(lambda: scene.take_together("vm1", "vm2"))[0] == "NODE_UNREACHABLE"
    scene.agent.kill()
    assert scene.ran() == ["before vm1", "before vm2"]
    scene.agent.volumes = ("vm3",)
    scene.agent.start()
    until(lambda: not scene.pending(), "what was left is ended")
    assert scene.ran() == ["after vm2", "after vm1"]


def test_a_record_that_cannot_be_read_stops_no_other(scene: Scene) -> None:
    scene.does("before", "vm3", f"kill -STOP $PPID; kill -KILL {scene.pid()} $PPID")
    assert reason_of(scene.take)[0] == "NODE_UNREACHABLE"
    scene.agent.kill()
    (left,) = scene.pending()
    damaged = left.with_name("0.json")
    damaged.write_bytes(left.read_bytes()[:-30])
    scene.does("before", "vm3", "")
    scene.agent.start()
    until(lambda: scene.pending() == [damaged], "the others are ended")
    assert scene.ran() == ["before vm3", "after vm3"]
    for volume in VOLUMES:
        until(lambda volume=volume: scene.agent.examine(volume).problems, "it is told")
        (problem,) = scene.agent.examine(volume).problems
        assert str(damaged) in problem
    # Whoever has its lock may yet run an `after` in the middle of what another order holds.
    with damaged.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        reason, said = reason_of(scene.take)
    assert reason == "HOOK_FAILED"
    assert str(damaged) in said
    assert scene.ran() == []
    assert scene.take().cp.text == "1-1"
    assert scene.ran() == ["before vm3", "after vm3"]
    damaged.unlink()
    until(lambda: not scene.agent.examine("vm3").problems, "the problem has gone")


def left_behind(directory: Path, program: str, *volumes: str) -> leftovers.Left:
    """A record of an order whose hooks were all killed."""
    record = directory / "x.json"
    hook = {"before": [], "after": [program], "timeout_s": 1, "env": {}, "uid": None, "gid": None, "groups": None}
    write_json(record, {"record": str(record), "hooks": [{**hook, "volume": volume} for volume in volumes]})
    return leftovers.Left(record, volumes)


def test_nothing_is_ended_while_an_order_holds_the_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `after` of an earlier order would let go what that one's `before` holds, whose CP would say `frozen`."""
    left = left_behind(tmp_path, "/bin/true", "vm1", "vm2")
    with leftovers.holding(("vm2",)):
        assert leftovers.end(left) is None
        assert leftovers.recover(tmp_path, "vm1") == {}
        with leftovers.holding(("vm1", "vm3")):
            assert leftovers.recover(tmp_path, "vm1", held=("vm1", "vm3")) == {}, "it goes on, with its own `before`"
        assert left.path.exists()
        # A process of an earlier agent may be at it, whom nothing keeps from running `after` in the middle.
        with left.path.open("rb") as file, leftovers.holding(("vm1",)):
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(Refused, match="still being run"):
                leftovers.recover(tmp_path, "vm1", held=("vm1",))
        assert leftovers.recover(tmp_path, "vm2", held=("vm2",)) == {}
        assert not left.path.exists(), "its own it ends first"
    monkeypatch.setattr(leftovers, "ENDING_MAX_S", 0.0)
    with leftovers._turns.ending(("vm1",), ()) as turn:
        assert turn
        with pytest.raises(Refused, match="still being ended"), leftovers.holding(("vm1",)):
            pass
    with leftovers.holding(("vm1",)):
        pass


async def stopped_trying(ending: leftovers.Leftovers) -> None:
    while ending._due:  # noqa: ASYNC110 - the loop tells nobody
        await asyncio.sleep(0.001)


async def test_the_pauses_between_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each twice the one before, to a bound; none once the record has gone."""
    monkeypatch.setattr(leftovers, "LOOK_S", 0.01)
    monkeypatch.setattr(leftovers, "PAUSE_MIN_S", 0.01)
    monkeypatch.setattr(leftovers, "PAUSE_MAX_S", 0.05)
    record = left_behind(tmp_path, "/bin/false", "gone").path
    ending = leftovers.Leftovers(tmp_path, {})
    task = asyncio.create_task(ending.run())
    pauses: set[float] = set()
    async with asyncio.timeout(60):
        while 0.05 not in pauses:
            pauses |= {due.pause_s for due in ending._due.values()}
            await asyncio.sleep(0.001)  # the loop tells nobody
        record.unlink()
        await stopped_trying(ending)
    assert pauses <= {0.01, 0.02, 0.04, 0.05}
    task.cancel()
    ending.close()
