"""Killed at every named step, and out of space: the path shows one whole volume, and the next start makes all whole.

A forked child does the work and kills itself at a step. What it left is looked at before anything is recovered. One
pair of replicas goes through all of it, each kill from the state that the one before has left and a start has mended.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.backends import lvm_commit, lvm_snapshot
from agent.backends.lvm import STEPS
from agent.backends.lvm_place import load_ref
from agent.disk import dm, lvm, thin
from agent.examiner import Examiner, ReplicaSettings
from agent.identity import Identity
from resilver.errors import Refused, ResilverError
from resilver.volume import LiveState, Presence, VolumeRecord
from tests.vm.inside.backend import names_with
from tests.vm.inside.node import CHUNK, GROUP, SIZE, VOLUME_ID, Node, killed, make_pool, noise, run

DECIDES = lvm_commit.STEPS.index("commit.exchanged")


def fresh(node: Node, **options) -> Node:
    """The same replica after a restart of its agent."""
    made = Node(node.name, node.pool, **options)
    made.backend.recover()
    return made


def whole(node: Node) -> None:
    """Records and logical volumes name each other, nothing is left over, nothing is held."""
    found = node.backend.examine()
    assert found.live.state is LiveState.UNMODIFIED
    assert not [problem for problem in found.problems if "tag" in problem or "compared" in problem]
    left = (".new", ".keep", ".trash", "commit.json", "next.json", "away.json", "metadata.json")
    assert not [entry.name for entry in node.root.iterdir() if entry.name.startswith(left)]
    named = 2 + sum(record.present for record in found.lineage) + len(found.preserved)
    assert len(node.lvs()) == named + (node.root / "stage").exists(), node.lvs()
    assert held_root(node) == "-"


def held_root(node: Node) -> str:
    return run("dmsetup", "status", f"{GROUP}-{node.pool}-tpool").split()[6]


def test_killed_while_the_records_are_made(node):
    for step in ("records.created", "records.formatted"):
        assert killed(lambda at: Node(node.name, step=at).backend.save_record(VolumeRecord("vm1")), step)
        assert node.backend.examine().record is None
    node.backend.save_record(VolumeRecord("vm1", VOLUME_ID))
    assert node.backend.examine().record == VolumeRecord("vm1", VOLUME_ID)
    assert node.lvs() == [f"{node.name}.resilver"]


def test_killed_in_a_snapshot(node):
    node.create()
    node.snapshot()
    for turn, step in enumerate(lvm_snapshot.STEPS):
        node.write(turn * CHUNK, noise(turn, 9000))
        live, tip = node.content, node.lineage.tip_id
        assert killed(lambda at, name=node.name: Node(name, step=at).snapshot(), step)
        assert node.content == live
        came = node.lineage.tip_id != tip
        assert came is (step in {"snapshot.renamed", "snapshot.synced"})
        node = fresh(node)
        assert (node.lineage.tip_id != tip) is came
        if not came:
            node.snapshot()
        whole(node)
    assert node.read(node.lineage.tip_id) == live


def test_killed_with_a_metadata_snapshot(node, monkeypatch):
    """It is released by the process that holds it; if that is killed too, by whoever needs one next, or at the next
    start. One of which nobody knows whose it is stays, and is told.
    """
    node.create()
    name, tip = node.name, node.snapshot().id
    steps = ("metadata.marked", "metadata.reserved", "metadata.known")
    for step in steps:
        assert killed(lambda at: Node(name, step=at).backend.delta_map("", tip), step)
        node = fresh(node)
        assert held_root(node) == "-"
        whole(node)
    for step in steps:
        assert killed(lambda at, last=step: Node(name, step=with_children(at, last)).backend.delta_map("", tip), step)
        assert (held_root(node) == "-") is (step == "metadata.marked")
        node = fresh(node)
        if step == "metadata.reserved":
            monkeypatch.setattr(thin, "FOREIGN_MAX_S", 0.1)
            with pytest.raises(Refused, match="not known whether") as refused:
                node.backend.delta_map("", tip)
            run(*refused.value.next_command.split())
        assert len(node.backend.delta_map("", tip))
        assert held_root(node) == "-"
    whole(node)
    # Another tool's, long after one of ours that was never made.
    assert killed(lambda at: Node(name, step=at).backend.delta_map("", tip), "metadata.marked")
    run("dmsetup", "message", f"{GROUP}-{node.pool}-tpool", "0", "reserve_metadata_snap")
    node = fresh(node)
    assert held_root(node) != "-"
    run(*refused.value.next_command.split())
    whole(node)


def with_children(at, last):
    """Kills what this process has started before it kills itself."""

    def step(name):
        parent = f"PPid:\t{os.getpid()}\n"
        for process in Path("/proc").glob("[0-9]*/status") if name == last else ():
            if parent in process.read_text():
                os.kill(int(process.parent.name), signal.SIGKILL)
                os.waitpid(int(process.parent.name), 0)
        at(name)

    return step


class Pair:
    """A source, and a target that has data of its own in its live copy."""

    def __init__(self, source: Node, target: Node) -> None:
        self.source, self.target = source, target
        source.create()
        source.snapshot()
        target.receive(source)
        self.turn = 0

    def diverge(self) -> None:
        """A new goal, a filled stage, and own data that is to be preserved."""
        self.turn += 1
        self.source.write(CHUNK * self.turn, noise(self.turn, 70_000))
        self.source.snapshot(epoch=1 + self.turn)
        self.target.write(SIZE - CHUNK * self.turn, noise(100 + self.turn, 5000))
        self.old, self.new = self.target.content, self.source.content
        self.base = self.target.lineage.tip_id
        self.kept = len(self.target.backend.examine().preserved)
        stage, _delta = self.target.stage_from(self.source, self.base, self.source.lineage.tip)
        stage.close()

    def commit(self, step=lambda _name: None) -> None:
        node = Node(self.target.name, step=step)
        stage = node.backend.open_stage(self.base, self.source.lineage.tip_id, len(self.new))
        try:
            node.backend.commit(stage, node.order(self.source.lineage, expected_tip=self.base, replace_own_data=True))
        finally:
            stage.close()

    def came(self, step: str) -> bool:
        """Looks at what was left, unrecovered; whether it is the new volume."""
        shown = self.target.content
        assert shown in {self.old, self.new} or (shown is None and step == "commit.moved"), step
        tip = Node(self.target.name).lineage.tip_id
        assert tip == (self.source.lineage.tip_id if shown == self.new else self.base), step
        return shown == self.new


def test_killed_in_a_commit(node, other):
    pair = Pair(node, other)
    pair.diverge()
    for step in lvm_commit.STEPS[:DECIDES]:
        assert killed(pair.commit, step), step
        assert not pair.came(step), step
        pair.target = fresh(pair.target)
        found = pair.target.backend.examine()
        assert (pair.target.content, found.lineage.tip_id) == (pair.old, pair.base), step
        assert (found.live.state, len(found.preserved)) == (LiveState.MODIFIED, pair.kept), step
    for step in lvm_commit.STEPS[DECIDES:]:
        assert killed(pair.commit, step), step
        assert pair.came(step), step
        if step == "commit.kept":  # and the finishing is killed too
            work = lambda at: Node(pair.target.name, step=at).backend.recover()  # noqa: E731
            assert killed(work, "commit.live_kept")
        pair.target = fresh(pair.target)
        assert pair.came(step), step
        pair.target.backend.discard_stage()
        whole(pair.target)
        preserved = pair.target.backend.examine().preserved
        assert len(preserved) == pair.kept + 1, step
        assert pair.target.read(preserved[-1].id) == pair.old, step
        pair.diverge()


def test_a_group_that_comes_after_the_agent_has_started(node, other, tmp_path):
    """What a killed agent has left in it is finished by the first look that finds it, which tells nothing untrue."""
    pair = Pair(node, other)
    pair.diverge()
    identity = Identity(tmp_path, "prod", "b")
    looks = Examiner("vm1", "b", other.backend, identity, ReplicaSettings())
    assert looks.examine(compare_live=True).presence is Presence.PRESENT
    assert killed(pair.commit, "commit.exchanged")
    run("umount", other.root)
    run("vgrename", GROUP, "away")
    looks = Examiner("vm1", "b", Node(other.name).backend, identity, ReplicaSettings())
    looks.recover()
    assert looks.examine_surely().presence is Presence.LOST
    run("vgrename", "away", GROUP)
    assert looks.changed()
    found = looks.examine_surely()
    assert (found.presence, found.live.state) == (Presence.PRESENT, LiveState.UNMODIFIED)
    assert other.device.exists()
    assert (other.content, len(found.preserved)) == (pair.new, 1)
    assert other.read(found.preserved[0].id) == pair.old
    identity.close()
    other.backend.discard_stage()
    whole(other)


def test_what_is_to_be_removed_and_is_open_waits(node, other):
    """Somebody who reads a logical volume that is part of nothing any more keeps nobody from the replica."""
    pair = Pair(node, other)
    pair.diverge()
    assert killed(pair.commit, "commit.cloned")
    left = load_ref(other.root / "next.json").name
    with opened(left):
        again = fresh(other)
        assert load_ref(other.root / "next.json").name == left
        assert again.backend.examine().live.state is LiveState.MODIFIED
        with pytest.raises(Refused, match=f"{left}, of a commit that was given up") as refused:
            pair.commit()
        assert refused.value.reason == "IN_USE"
        assert left in other.lvs()
    pair.commit()
    whole(fresh(other))

    tag = f"resilver.id={node.lineage.records[-1].id}"
    (name,) = (lv for lv in names_with(tag) if f"/{node.name}." in lv)
    assert killed(lambda at: Node(node.name, step=at).backend.prune(1, frozenset()), "prune.renamed")
    with opened(name.partition("/")[2]):
        assert fresh(node).backend.examine().live.state is LiveState.UNMODIFIED
        assert name.partition("/")[2] in node.lvs()
    whole(fresh(node))


@contextlib.contextmanager
def opened(name: str) -> Iterator[None]:
    run("lvchange", "-ay", "-K", f"{GROUP}/{name}")
    with Path(f"/dev/{GROUP}/{name}").open("rb"):
        yield


def test_killed_in_a_stage_a_prune_and_a_drop(node, other):
    pair = Pair(node, other)
    for step in ("stage.named", "stage.made"):
        work = lambda at: Node(other.name, step=at).backend.open_stage("", "goal", SIZE).close()  # noqa: E731
        assert killed(work, step)
        fresh(other)
        whole(other)
    pair.diverge()
    pair.commit()
    copy = other.backend.examine().preserved[0]
    assert killed(lambda at: Node(other.name, step=at).backend.drop(copy.id) and None, "drop.renamed")
    fresh(other)
    assert other.backend.examine().preserved == ()
    for step in ("prune.logged", "prune.renamed", "prune.removed"):
        ids = node.lineage.ids()
        assert killed(lambda at: Node(node.name, step=at).backend.prune(1, frozenset()), step)
        assert fresh(node).lineage.ids() == ids
        whole(node)
        if len([record for record in node.lineage if record.present]) == 1:
            node.write(0, noise(9, 5000))
            node.snapshot()
    whole(other)


def test_a_full_pool(number):
    """Refused before it begins; a stage that fills the pool fails; the replica and its records stay as they were."""
    make_pool("small", 96)
    run("lvchange", "--errorwhenfull", "y", f"{GROUP}/small")
    source, target = Node(f"a{number}"), Node(f"b{number}", pool="small")
    source.create()
    base = source.snapshot()
    target.receive(source)
    shown = target.content
    source.write(0, noise(3, SIZE))
    goal = source.snapshot()

    run("lvcreate", "-V", "128m", "-n", "filler", "--thinpool", "small", GROUP)
    fill(Path(f"/dev/{GROUP}/filler"), free_bytes(target) - (4 << 20))
    with pytest.raises(Refused, match="are free in thin pool") as refused:
        target.stage_from(source, base.id, goal)
    assert refused.value.reason == "NO_SPACE"

    stage = target.backend.open_stage(base.id, goal.id, SIZE)
    with pytest.raises(ResilverError) as failed:
        fill_stage(stage)
    assert failed.value.reason in {"NO_SPACE", "IO_ERROR"}
    stage.close()
    target.backend.save_record(VolumeRecord("vm1", VOLUME_ID, 7))
    assert target.backend.examine().record.epoch == 7
    target.backend.discard_stage()
    run("lvremove", "-y", f"{GROUP}/filler")
    target = fresh(target)
    assert target.content == shown
    target.receive(source, base.id)
    assert target.content == source.content
    whole(target)


def fill_stage(stage) -> None:
    stage.write(0, memoryview(noise(3, SIZE)))
    stage.sync()


def free_bytes(node: Node) -> int:
    return node.backend.examine(compare_live=False).free_bytes


def fill(device: Path, length: int) -> None:
    with device.open("r+b", buffering=0) as file:
        for at in range(0, length, 1 << 20):
            file.seek(at)
            file.write(b"\xff" * min(1 << 20, length - at))


def test_steps_are_named_once() -> None:
    assert len(set(STEPS)) == len(STEPS)
    assert dm.find("LVM-nothing") is None
    assert lvm.look("nowhere") is None
