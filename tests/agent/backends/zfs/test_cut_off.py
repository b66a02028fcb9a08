"""A commit that is cut off by a kill, and a dataset that is mounted and written to before the agent starts again.

What was written since is in the live copy, or in a preserved one; where nothing was, all is as before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.backends.base import StreamOrigin
from agent.backends.zfs import ZfsBackend
from agent.disk import orphans
from agent.disk import zfs as commands
from agent.disk.durable import read_json, write_json
from resilver.errors import Damaged, Refused
from resilver.volume import LiveState
from tests.agent.backends.crash import Step, killed
from tests.agent.backends.zfs.replica import Replica, equal
from tests.cluster import wait_for
from tests.zfsfs import zfs

WORDS = b"written before the agent was there again"


class Small(Replica):
    """Of one file, so that a turn is short."""

    def again(self, **options) -> Small:
        return Small(self.pool, self.work, self.name, **options)

    def start(self) -> None:
        zfs("create", "-o", f"mountpoint={self.point}", self.dataset)
        self.put("data", os.urandom(50_000))

    def put(self, name: str, data: bytes = WORDS) -> None:
        """By somebody who mounts it to write, and goes."""
        if not os.path.ismount(self.point):
            for setting in ("readonly=off", "canmount=on", f"mountpoint={self.point}"):
                zfs("set", setting, self.dataset)
        if not os.path.ismount(self.point):
            zfs("mount", self.dataset)
        (self.point / name).write_bytes(data)
        zfs("unmount", self.dataset)

    def has(self, name: str, of: str = "") -> bool:
        with self.walked(of) as path:
            return (path / name).exists() and (path / name).read_bytes() == WORDS

    def settings(self) -> list[str]:
        return zfs("get", "-H", "-o", "value", "readonly,canmount", self.dataset).split("\n")[:-1]


@pytest.fixture
def pair(service, tmp_path):
    """A source that is ahead, and a target at its base that its operator may write to, as a deposed primary is."""
    with service.pool() as one, service.pool() as other:
        made = []
        for pool in (one, other):
            (tmp_path / pool).mkdir()
            made.append(Small(pool, tmp_path / pool))
        source, target = made
        source.start()
        source.snapshot()
        target.receive(source)
        for setting in ("readonly=off", "canmount=on", f"mountpoint={target.point}"):
            zfs("set", setting, target.dataset)
        zfs("unmount", target.dataset) if os.path.ismount(target.point) else None
        source.put("data", os.urandom(60_000))
        source.snapshot()
        yield source, target


def stage_of(source: Replica, target: Replica, base: str) -> None:
    target.fill(source, base, source.tip.id).close()


def cut_off(source: Replica, target: Replica, base: str, step: str, **options) -> None:
    """The agent is killed at that step of the commit."""
    lineage = source.lineage
    order = target.order(lineage, **options)
    origin = StreamOrigin(
        source.backend.native_id(base), source.backend.native_id(lineage.tip_id), source.backend.formats()
    )

    def work(at: Step) -> None:
        backend: ZfsBackend = target.again(step=at).backend
        stage = backend.open_stream_stage(base, lineage.tip_id, origin)
        assert stage.complete
        backend.commit(stage, order)

    assert killed(work, step), step


def test_what_was_written_to_a_follow_that_was_cut_off_is_kept(pair):
    """Before anything was received, and after: it is modified, and what replaces it preserves it."""
    source, target = pair
    base = target.tip.id
    stage_of(source, target, base)
    cut_off(source, target, base, "commit.shut")
    assert target.settings() == ["on", "noauto"], "no boot mounts it writable"
    again = target.again()
    again.backend.recover()
    assert again.state is LiveState.UNMODIFIED
    assert target.settings() == ["off", "on"], "it is as it was"
    assert not os.path.ismount(target.point)

    cut_off(source, target, base, "commit.received")
    target.put("after")
    again = target.again()
    again.backend.recover()
    assert again.has("after")
    assert again.tip.id == base
    assert again.state is LiveState.MODIFIED
    assert target.settings() == ["off", "on"]
    assert not [name for name in target.traces() if f"{target.dataset}@resilver-incoming" in name or "look" in name]
    (copy,) = again.receive(source, base)
    assert again.has("after", copy.path)
    assert equal(source, again)


def test_nor_is_what_is_written_while_it_is_taken_back_lost(pair, monkeypatch):
    """By somebody who mounts it when what came is destroyed already, and is not rolled back yet."""
    source, target = pair
    base = target.tip.id
    stage_of(source, target, base)
    cut_off(source, target, base, "commit.received")
    destroy = commands.destroy

    def and_then(name: str) -> None:
        destroy(name)
        if name.endswith("@resilver-incoming"):
            target.put("late")

    monkeypatch.setattr(commands, "destroy", and_then)
    again = target.again()
    again.backend.recover()
    assert again.has("late")
    assert again.state is LiveState.MODIFIED
    again.backend.recover()
    assert again.has("late")


@contextlib.contextmanager
def still_running(target: Replica, program: str = "zfs", verb: str = "rename") -> Iterator[None]:
    """A command of the agent that was killed."""
    script = f"exec -a {program} bash -c 'read -t 600 <> <(:); :' {verb} {target.dataset} >/dev/null 2>&1 & echo $!"
    done = subprocess.run(["bash", "-c", f"({script})"], capture_output=True, text=True, check=True, timeout=30)
    pid = int(done.stdout)
    wait_for(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"{program}\0".encode()), "it has its name")
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)


def test_nothing_is_decided_while_a_command_of_the_agent_that_was_killed_runs(pair, monkeypatch):
    """Nor by a look, at whatever time; and whoever only looks decides nothing at all."""
    source, target = pair
    base = target.tip.id
    stage_of(source, target, base)
    cut_off(source, target, base, "commit.shut")
    monkeypatch.setattr(orphans, "WAIT_MAX_S", 0.1)
    before = (target.traces(), target.settings())
    again = target.again()
    with still_running(target):
        for work in (again.backend.recover, again.backend.discard_stage, again.snapshot):
            with pytest.raises(Damaged, match="still runs"):
                work()
            assert any("a commit was cut off" in problem for problem in again.backend.examine().problems)
            assert (target.traces(), target.settings()) == before
    with still_running(target, "umount", "-v"), pytest.raises(Damaged, match="still runs"):
        again.backend.recover()
    assert any("a commit was cut off" in problem for problem in again.backend.examine().problems)
    assert (target.traces(), target.settings()) == before
    again.backend.recover()
    assert again.backend.examine().problems == ()
    assert target.settings() == ["off", "on"]


def half_back(source: Replica, target: Replica, base: str) -> None:
    """As a kill leaves it between the destroying of what came and the rolling back."""
    cut_off(source, target, base, "commit.received")
    path = target.root / "commit.json"
    write_json(path, {**(read_json(path) or {}), "rolling": True})
    zfs("destroy", f"{target.dataset}@resilver-incoming")


def test_a_taking_back_that_was_cut_off_itself_is_gone_on_with(pair):
    """Unless somebody has opened the live copy since: then nobody can tell what he wrote from what came."""
    source, target = pair
    base = target.tip.id
    stage_of(source, target, base)
    half_back(source, target, base)
    again = target.again()
    again.backend.recover()
    assert again.state is LiveState.UNMODIFIED
    assert again.tip.id == base
    assert again.settings() == ["off", "on"]
    half_back(source, target, base)
    target.put("between")
    again = target.again()
    again.backend.recover()
    assert again.has("between")
    assert again.state is LiveState.MODIFIED


def test_nor_is_one_rolled_back_that_may_have_been_mounted_as_fstab_says(pair):
    """Such a mount is writable although the dataset's `readonly` is on."""
    source, target = pair
    base = target.tip.id
    stage_of(source, target, base)
    half_back(source, target, base)
    zfs("set", "mountpoint=legacy", target.dataset)
    again = target.again()
    again.backend.recover()
    assert again.state is LiveState.MODIFIED
    (copy,) = again.receive(source, base)
    assert equal(source, again)
    with again.walked(copy.path) as kept, source.walked() as came:
        assert (kept / "data").read_bytes() == (came / "data").read_bytes()


def test_what_was_written_before_anything_came_is_kept(pair):
    source, target = pair
    base = target.tip.id
    stage_of(source, target, base)
    cut_off(source, target, base, "commit.intended")
    target.put("before")
    again = target.again()
    again.backend.recover()
    assert again.has("before")
    assert again.state is LiveState.MODIFIED


def test_what_was_written_to_a_copy_that_was_to_go_is_kept(pair):
    """A replaced live copy with nothing of its own is looked at again before it is destroyed."""
    source, target = pair
    base = target.tip.id
    target.receive(source, base)
    newest = target.tip.id
    source.put("data", os.urandom(70_000))
    tip = source.snapshot().id
    source.backend.drop(newest)
    stage_of(source, target, base)
    cut_off(source, target, base, "commit.moved")
    (name,) = [one for one in target.traces() if "/kept-" in one and "@" not in one]
    point = Path(zfs("get", "-H", "-o", "value", "mountpoint", name).strip())
    zfs("set", "readonly=off", name)
    zfs("mount", name)
    (point / "late").write_bytes(WORDS)
    zfs("unmount", name)
    again = target.again()
    again.backend.recover()
    assert again.tip.id == tip
    assert again.state is LiveState.UNMODIFIED
    (copy,) = again.backend.examine().preserved
    assert copy.live
    assert again.has("late", copy.path)
    again.backend.recover()
    assert again.backend.examine().preserved == (copy,), "told once"
    assert again.backend.drop(copy.id) >= 0
    assert not [one for one in again.traces() if "/kept-" in one]


def test_a_cut_off_commit_waits_for_who_uses_the_live_copy(pair):
    """And is taken back once he is gone; a snapshot that another tool has made meanwhile is never destroyed."""
    source, target = pair
    base = target.tip.id
    stage_of(source, target, base)
    cut_off(source, target, base, "commit.received")
    zfs("mount", target.dataset)
    again = target.again()
    with (target.point / "data").open("rb"):
        again.backend.recover()
        examined = again.backend.examine()
        assert [problem for problem in examined.problems if "waits" in problem]
        assert examined.live.in_use
        assert (target.root / "commit.json").exists()
        assert target.settings()[1] == "noauto"
        with pytest.raises(Refused) as refused:
            again.snapshot()
        assert refused.value.reason == "IN_USE"
    assert again.state is LiveState.UNMODIFIED, "it came back by itself"
    assert again.tip.id == base
    zfs("unmount", target.dataset)
    assert target.settings() == ["off", "on"]

    cut_off(source, target, base, "commit.received")
    zfs("snapshot", f"{target.dataset}@daily")
    again = target.again()
    again.backend.recover()
    assert f"{target.dataset}@daily" in target.traces()
    assert again.state is LiveState.MODIFIED


@pytest.mark.parametrize(
    ("own", "step"),
    [
        *(
            (False, f"commit.{step}")
            for step in ("aside", "compared", "shut", "received", "recorded", "kept", "closed")
        ),
        *((True, f"commit.{step}") for step in ("described", "moved", "placed")),
    ],
)
def test_what_was_mounted_is_mounted_again(pair, own, step):
    """Wherever the commit was cut off, also before its intention was written; once, and no more after that."""
    source, target = pair
    base = target.tip.id
    if own:
        target.put("own")
    stage_of(source, target, base)
    zfs("mount", target.dataset)
    cut_off(source, target, base, step, replace_own_data=True)
    assert os.path.ismount(target.point) is (step == "commit.closed")
    again = target.again()
    again.backend.recover()
    assert os.path.ismount(target.point)
    zfs("unmount", target.dataset)
    again.backend.recover()
    assert not os.path.ismount(target.point), "whoever unmounts it afterwards is not overruled"


def test_a_dataset_that_is_mounted_while_it_receives_keeps_what_is_written(pair):
    """Without a kill: the receive fails, and nothing is rolled back."""
    source, target = pair
    base = target.tip.id

    def step(name: str) -> None:
        if name == "commit.shut":
            target.put("meanwhile")

    stage = target.fill(source, base, source.tip.id)
    with pytest.raises(Exception, match="modified"):
        target.again(step=step).backend.commit(stage, target.order(source.lineage))
    stage.close()
    assert target.has("meanwhile")
    assert target.state is LiveState.MODIFIED
    assert not (target.root / "commit.json").exists()
