"""Hooks around a consistency point, of agents as processes: in what order, how long, and that `after` always runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import hooks
from agent.taking import all_or_why
from resilver.errors import Refused
from resilver.lineage import ConsistencyPoint, Snapshot
from resilver.v1 import volume_pb2
from tests import postgres
from tests.agent.agents import until
from tests.agent.hook_scene import VOLUMES, Scene, hooked, reason_of, running


@pytest.fixture
def scene(tmp_path: Path, xfs: Path) -> Iterator[Scene]:
    with running(tmp_path, xfs) as made:
        yield made


def test_hooks_run_around_the_snapshot_and_are_told_of_what(scene: Scene) -> None:
    scene.does("before", "vm3", f"printf stopped > {scene.agent.image('vm3')}")
    scene.does("after", "vm3", f"printf going > {scene.agent.image('vm3')}")
    made = scene.take()
    assert scene.log() == ["before vm3 a 1-1 alone", "after vm3 a 1-1 alone"]
    assert scene.agent.snapshot_data("vm3", made.id).read_bytes() == b"stopped"
    assert scene.agent.image("vm3").read_bytes() == b"going"
    assert made.consistency == volume_pb2.CONSISTENCY_CLOSED
    assert made.group_id == ""
    assert not scene.pending()


def test_a_volume_is_frozen_if_its_hooks_are_said_to_freeze_it(scene: Scene) -> None:
    with scene.agent.image("vm3").open("r+b"):
        assert scene.take().consistency == volume_pb2.CONSISTENCY_CRASH
        scene.change_config("vm3", hooked(scene.directory, "timeout_s = 60\nfreezes = true"))
        assert scene.take().consistency == volume_pb2.CONSISTENCY_FROZEN
    # That nobody had it open says more.
    assert scene.take().consistency == volume_pb2.CONSISTENCY_CLOSED


def test_a_group_is_held_as_a_whole(scene: Scene) -> None:
    writer = scene.agent.image("vm1"), scene.agent.image("vm2")
    scene.does("before", "vm2", f"printf stopped | tee {writer[0]} > {writer[1]}")
    scene.does("after", "vm2", f"printf going | tee {writer[0]} > {writer[1]}")
    group_id, answers = scene.take_together("vm2", "vm1")
    assert [line.split()[:2] for line in scene.log()] == [
        ["before", "vm1"], ["before", "vm2"], ["after", "vm2"], ["after", "vm1"],
    ]  # fmt: skip
    assert {line.split()[4] for line in scene.log()} == {"db"}
    made = dict(zip(("vm2", "vm1"), answers, strict=True))
    for volume, answer in made.items():
        assert answer.taken
        assert answer.snapshot.group_id == group_id
        assert scene.agent.records(volume)[0].group_id == group_id
        assert scene.agent.snapshot_data(volume, answer.snapshot.id).read_bytes() == b"stopped"
    assert not scene.pending()
    # What is written beside the data is what is told: also after a restart.
    scene.agent.kill()
    scene.agent.start()
    assert scene.agent.records("vm1")[0].group_id == group_id


def test_a_group_is_taken_if_one_of_it_is_modified(scene: Scene) -> None:
    scene.take_together("vm1", "vm2")
    before = scene.tips()
    _, answers = scene.take_together("vm1", "vm2", only_if_modified=True)
    assert not any(answer.taken for answer in answers)
    assert scene.tips() == before
    scene.ran()
    scene.agent.image("vm2").write_bytes(b"new")
    group_id, answers = scene.take_together("vm1", "vm2", only_if_modified=True)
    assert [(answer.taken, answer.snapshot.group_id) for answer in answers] == [(True, group_id)] * 2
    assert len(scene.ran()) == 4


def test_a_group_is_taken_whole_or_not_at_all(scene: Scene) -> None:
    scene.take_together("vm1", "vm2")
    before = scene.tips()
    scene.ran()
    reason, said = reason_of(lambda: scene.take_together("vm1", "vm2", expected={"vm2": "another"}))
    assert reason == "TARGET_CHANGED"
    assert "vm2" in said
    assert scene.ran() == [], "nothing is held for an order that is refused"
    # One that fails while all are held: its live copy is gone.
    scene.does("before", "vm2", f"rm {scene.agent.image('vm2')}")
    reason, said = reason_of(lambda: scene.take_together("vm1", "vm2"))
    assert reason == "NO_DATA"
    assert scene.ran() == ["before vm1", "before vm2", "after vm2", "after vm1"]
    assert scene.tips() == before
    assert not any(path.name.startswith("new") for path in (scene.agent.place / ".resilver" / "vm1").iterdir())


def test_what_is_no_order_for_a_group(scene: Scene) -> None:
    for ask in (
        scene.take_together,
        lambda: scene.take_together("vm1", "vm1"),
        lambda: scene.take_together("vm1", "vm2", opening=True),
    ):
        reason, said = reason_of(ask)
        assert (reason, said.split()[0]) == ("INVALID_FIELD", "requests")
    assert scene.tips() == dict.fromkeys(VOLUMES, "")
    assert scene.ran() == []


def test_a_hook_that_fails_is_a_refusal_and_after_has_run(scene: Scene) -> None:
    scene.does("before", "vm3", "echo no database here; exit 7")
    reason, said = reason_of(scene.take)
    assert reason == "HOOK_FAILED"
    assert "ended with 7" in said
    assert scene.ran() == ["before vm3", "after vm3"]
    assert scene.agent.tip("vm3") == ""
    assert "no database here" in scene.agent.log()
    scene.does("before", "vm3", "")
    assert scene.take().cp.text == "1-1"


def test_the_second_hook_of_a_group_fails(scene: Scene) -> None:
    scene.does("before", "vm1", "exit 1")
    assert reason_of(lambda: scene.take_together("vm1", "vm2"))[0] == "HOOK_FAILED"
    assert scene.ran() == ["before vm1", "after vm1"], "what was not begun is not ended"
    scene.does("before", "vm1", "")
    scene.does("before", "vm2", "exit 1")
    assert reason_of(lambda: scene.take_together("vm1", "vm2"))[0] == "HOOK_FAILED"
    assert scene.ran() == ["before vm1", "before vm2", "after vm2", "after vm1"]
    assert scene.tips() == dict.fromkeys(VOLUMES, "")


def test_a_hook_that_hangs_is_ended(scene: Scene) -> None:
    scene.change_config("vm3", hooked(scene.directory, "timeout_s = 0.5"))
    scene.does("before", "vm3", "sleep infinity")
    reason, said = reason_of(scene.take)
    assert reason == "HOOK_FAILED"
    assert "did not end within" in said
    assert scene.ran() == ["before vm3", "after vm3"]


def test_a_program_that_is_left_behind_is_not_waited_for(scene: Scene) -> None:
    scene.does("before", "vm3", f"sleep infinity & echo $! > {scene.directory}/left")
    try:
        assert scene.take().cp.text == "1-1"
    finally:
        os.kill(int((scene.directory / "left").read_text()), signal.SIGKILL)


def test_a_snapshot_does_not_count_once_the_deadline_has_passed(scene: Scene) -> None:
    scene.change_config("vm3", hooked(scene.directory, "timeout_s = 5"))
    scene.does("before", "vm3", f"kill -STOP {scene.pid()}")
    scene.does("after", "vm3", f"kill -CONT {scene.pid()}")
    reason, said = reason_of(scene.take)
    assert reason == "HOOK_FAILED"
    assert "deadline" in said
    assert scene.ran() == ["before vm3", "after vm3"]
    assert scene.agent.tip("vm3") == ""
    assert [path.name for path in (scene.agent.place / ".resilver" / "vm3").iterdir() if path.is_dir()] == []


def test_after_runs_also_when_the_agent_is_killed(scene: Scene) -> None:
    scene.does("before", "vm3", f"kill -KILL {scene.pid()}")
    assert reason_of(scene.take)[0] == "NODE_UNREACHABLE"
    until(lambda: not scene.pending() and "after vm3 a 1-1 alone" in scene.log(), "after has run by itself")
    scene.does("before", "vm3", "")
    scene.agent.kill()
    scene.agent.start()
    assert scene.ran() == ["before vm3", "after vm3"], "and only once"
    assert scene.take().cp.text == "1-1"


def test_the_next_agent_waits_for_what_still_ends_what_was_held(scene: Scene) -> None:
    scene.does("before", "vm3", f"kill -KILL {scene.pid()}")
    scene.does(
        "after", "vm3", f"until [ -e {scene.directory}/go ]; do sleep 0.05; done; echo over >> {scene.directory}/log"
    )
    assert reason_of(scene.take)[0] == "NODE_UNREACHABLE"
    until(lambda: "after vm3 a 1-1 alone" in scene.log(), "after has begun")
    scene.agent.kill()
    scene.does("before", "vm3", "")
    scene.agent.start()
    (scene.directory / "go").touch()
    assert scene.take().cp.text == "1-1"
    assert scene.ran() == ["before vm3", "after vm3", "over", "before vm3", "after vm3", "over"]


def test_a_program_that_others_may_write_to_is_not_run(scene: Scene) -> None:
    (scene.directory / "hook").chmod(0o722)
    reason, said = reason_of(scene.take)
    assert reason == "HOOK_FAILED"
    assert "can be written to by others" in said
    assert scene.ran() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run programs as another user")
def test_hooks_run_as_the_user_that_is_named(scene: Scene) -> None:
    scene.change_config("vm3", '[volumes.hooks]\nbefore = ["/bin/sh", "-c", "id -un; env"]\nuser = "nobody"\n')
    scene.take()
    assert "nobody\\n" in scene.agent.log()
    assert "RESILVER_CP=1-1" in scene.agent.log()
    assert "PYTHONPATH" not in scene.agent.log()


def test_a_program_is_looked_at_before_it_is_run(tmp_path: Path) -> None:
    program = tmp_path / "x"
    assert "no such file" in hooks.program_fault([str(program)])
    assert "is no file" in hooks.program_fault([str(tmp_path)])
    program.write_text("")
    program.chmod(0o600)
    assert "not executable" in hooks.program_fault([str(program)])
    program.chmod(0o700)
    assert hooks.program_fault([str(program)]) == ""
    link = tmp_path / "open" / "link"
    link.parent.mkdir(mode=0o777)
    link.parent.chmod(0o777)
    link.symlink_to(program)
    assert f"{link.parent} can be written to" in hooks.program_fault([str(link)])
    tmp_path.chmod(0o777)
    assert f"{tmp_path} can be written to" in hooks.program_fault([str(program)])
    assert "no user is named" in hooks.user_fault("nobody-of-that-name")


@postgres.needs_postgres
@pytest.mark.skipif(os.geteuid() != 0, reason="PostgreSQL runs as another user than the agent")
def test_a_checkpoint_before(scene: Scene) -> None:
    """The first example of docs/hooks.md."""
    place = Path(tempfile.mkdtemp(prefix="hooks-"))  # not below pytest's own, which only root comes through
    place.chmod(0o755)
    try:
        postgres.initialise(place / "pg")
        with postgres.running(place / "pg") as server:
            words = [
                "/usr/bin/psql",
                "-X",
                "-h",
                str(server._sockets),
                "-U",
                "postgres",
                "-c",
                "CHECKPOINT",
                "postgres",
            ]
            scene.change_config("vm3", f'[volumes.hooks]\nbefore = {json.dumps(words)}\nuser = "nobody"\n')
            before = server.ask("select checkpoint_lsn from pg_control_checkpoint()")
            server.ask("create table t as select 1")
            scene.take()
            assert server.ask("select checkpoint_lsn from pg_control_checkpoint()") != before
    finally:
        shutil.rmtree(place)


def test_what_was_taken_of_a_group_that_failed_is_told() -> None:
    """A snapshot that could not be made permanent, after another one had been."""
    error = Refused("NO_SPACE", "the disk is full", path="/srv")
    follower = Refused("NO_SPACE", "vm1 was not taken, because vm2 was not: the disk is full", because="vm2")
    made = Snapshot("s1", ConsistencyPoint(3, 42))
    with pytest.raises(Refused) as raised:
        all_or_why(["vm1", "vm2", "vm3"], [follower, error, (made, True)])
    assert raised.value.reason == "NO_SPACE"
    assert raised.value.message == "the disk is full; of this group only this was taken: vm3 3-42"
    with pytest.raises(Refused, match=r"^the disk is full$"):
        all_or_why(["vm1", "vm2"], [follower, error])
