"""Killed at every named step: the path shows one whole subvolume, and the next start makes all whole.

A forked child does the work and kills itself at a step. What it left is looked at before anything is recovered.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.backends import btrfs_commit
from agent.disk import btrfs
from resilver.volume import LiveState
from tests.agent.backends.btrfs.nodes import Node, same
from tests.agent.backends.crash import killed
from tests.loopfs import run


def debris(node: Node) -> list[str]:
    left = [entry.name for entry in node.root.iterdir() if entry.name.startswith(".") or entry.name == "commit.json"]
    return left + [found.path for found in btrfs.subvolumes(node.directory) if "/in-" in found.path]


def whole(node: Node) -> None:
    """The record, the snapshots and the live copy agree, and nothing is left over."""
    found = node.backend.examine()
    assert found.live.state is LiveState.UNMODIFIED
    assert debris(node) == []
    for record in found.lineage:
        assert record.present == node.data(record.id).exists()


class Case:
    """A source and a target with a filled stage, and what the target shows before and after."""

    def __init__(self, places: tuple[Path, Path], scenario: str) -> None:
        self.source, self.target = Node(places[0] / "a"), Node(places[1] / "b")
        self.source.create()
        self.base = self.source.snapshot().id
        self.own: set[bytes] = set()
        if scenario == "newcomer":
            self.base = ""
        else:
            self.target.receive(self.source)
        if scenario == "diverged":
            for turn in (b"1", b"2"):
                self.target.write("own", turn)
                self.target.snapshot()
            self.target.write("own", b"3")
            self.own = {b"1", b"2", b"3"}
        self.source.write("a", b"newer")
        self.goal = self.source.snapshot(epoch=2).id
        self.before = self.target.lineage
        self.old = self._shown()
        stage = self.target.stage_from(self.source, self.base)
        stage.close()

    def _shown(self) -> tuple[bytes, bytes] | None:
        path = self.target.path
        if not path.exists():
            return None
        return (path / "a").read_bytes(), (path / "own").read_bytes() if (path / "own").exists() else b""

    def commit(self, step: Callable[[str], None] = lambda _name: None) -> None:
        node = Node(self.target.directory, step=step)
        origin = self.source.origin(self.base, self.goal)
        stage = node.backend.open_stream_stage(self.base, self.goal, origin)
        try:
            if node.lineage.tip_id != self.goal:
                assert stage.resumed
                assert stage.complete
            order = node.order(self.source.lineage, expected_tip=self.before.tip_id, replace_own_data=True)
            node.backend.commit(stage, order)
        finally:
            stage.close()

    def check_one_whole(self) -> bool:
        """Looks at what was left, unrecovered; whether it is the new one."""
        shown = self._shown()
        assert shown in {self.old, (b"newer", b"")}
        new = shown == (b"newer", b"")
        assert Node(self.target.directory).lineage.tip_id == (self.goal if new else self.before.tip_id)
        return new

    def check_after(self, *, came: bool) -> None:
        """Recovers; all is as it was found, the commit can be done or is done, and all own data is there."""
        again = Node(self.target.directory)
        again.backend.recover()
        assert self.check_one_whole() is came
        if not came:
            assert again.backend.examine().preserved == ()
            assert again.lineage.ids() == self.before.ids()
        self.commit()
        if came:
            again.backend.discard_stage()
        same(self.source.path, again.path)
        whole(again)
        assert again.lineage.ids() == self.source.lineage.ids()
        kept = again.backend.examine().preserved
        assert {(Path(copy.path) / "own").read_bytes() for copy in kept} == self.own
        assert len(kept) == len(self.own)


LATE = btrfs_commit.STEPS[btrfs_commit.STEPS.index("commit.synced") :]


@pytest.mark.parametrize("step", LATE)
def test_killed_after_the_exchange(places, step):
    case = Case(places, "diverged")
    assert killed(case.commit, step)
    assert case.check_one_whole()
    case.check_after(came=True)


def test_killed_while_receiving(places):
    """The agent dies in the middle of a stream: its `btrfs receive` ends by itself, and what it left is swept."""
    source, target = Node(places[0] / "a"), Node(places[1] / "b")
    source.create()
    source.write("big", os.urandom(8 << 20))
    source.snapshot()
    origin = source.origin("", source.lineage.tip_id)

    def half(step: Callable[[str], None]) -> None:
        target.stage_from(source, "", limit=4 << 20)
        step("here")

    assert killed(half, "here")
    again = Node(target.directory)
    again.backend.recover()
    stage = again.backend.open_stream_stage("", source.lineage.tip_id, origin)
    assert stage.resumed
    assert not stage.complete
    stage.close()
    again.receive(source)
    same(source.path, again.path)
    whole(again)


def test_a_power_cut_leaves_what_was_committed(places, tmp_path):
    """The device is copied while it is mounted, as a cut would leave it, and the copy is mounted."""
    from tests.loopfs import make_fs

    source = Node(places[0] / "a")
    source.create()
    base = source.snapshot()
    image, point, cut = tmp_path / "disk", tmp_path / "mnt", tmp_path / "cut"
    make_fs("btrfs", image, 256 << 20)
    point.mkdir()
    run("mount", "-o", "loop", image, point)
    seen = []
    try:
        target = Node(point / "b")
        target.receive(source)
        source.write("a", b"newer")
        source.snapshot()

        def step(name: str) -> None:
            if name.startswith("commit."):
                copy = cut.with_suffix(f".{len(seen)}")
                run("cp", "--sparse=always", image, copy)
                seen.append((name, copy))

        Node(target.directory, step=step).receive(source, base.id)
    finally:
        run("umount", point)
    states = []
    for _name, copy in seen:
        # The copies have the same file system's identity: one at a time, and its own is unmounted.
        run("mount", "-o", "loop", copy, point)
        try:
            again = Node(point / "b")
            again.backend.recover()
            whole(again)
            states.append((again.path / "a").read_bytes() == b"newer")
        finally:
            run("umount", point)
        copy.unlink()
    assert states == sorted(states)
    assert not states[0]
    assert states[-1]
