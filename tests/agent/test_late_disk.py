"""A disk that is mounted after the agent has started: what a killed agent has left there is finished or undone then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.examiner import Examiner, ReplicaSettings
from agent.identity import Identity
from resilver.volume import LiveState, Presence
from tests.agent.backends.adapter import Replica
from tests.agent.backends.crash import killed
from tests.agent.backends.kinds.btrfs import BtrfsKind, BtrfsReplica
from tests.agent.backends.kinds.image import ImageKind, ImageReplica
from tests.loopfs import mounted, needs_root, run

pytestmark = needs_root


def image(point: Path) -> Replica:
    made = ImageReplica(point)
    made.kind = ImageKind("xfs")
    return made


def subvolume(point: Path) -> Replica:
    return BtrfsReplica(BtrfsKind(), point, "a", "vm1")


@dataclass
class Disk:
    """A mount point whose disk comes and goes; while it is away, an empty directory of another file system is there."""

    point: Path

    def remove(self) -> None:
        run("umount", self.point)

    def attach(self) -> None:
        if not os.path.ismount(self.point):
            run("mount", "-o", "loop", self.point.parent / "disk", self.point)


KINDS = {"image": (image, "xfs"), "btrfs": (subvolume, "btrfs")}


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Replica, Replica, Disk]]:
    """A source, a target that stands right in a mount point, and that one's disk."""
    make, file_system = KINDS[request.param]
    with mounted(file_system, 512 << 20) as here, mounted(file_system, 512 << 20) as there:
        disk = Disk(there)
        try:
            yield make(here), make(there), disk
        finally:
            disk.attach()


def test_what_was_cut_off_is_finished_once_the_disk_is_there(pair, tmp_path):
    source, target, disk = pair
    source.create()
    base = source.snapshot().id
    target.receive(source)
    source.edit(5)
    source.snapshot()
    identity = Identity(tmp_path / "state", "prod", "b")
    Examiner("vm1", "b", target.backend, identity, ReplicaSettings()).examine(compare_live=False)
    assert killed(lambda step: target.again(step=step).receive(source, base), "commit.exchanged")
    assert (target.root / "commit.json").exists()

    disk.remove()
    looks = Examiner("vm1", "b", target.again().backend, identity, ReplicaSettings())
    looks.recover()
    for _ in range(2):
        assert looks.examine_surely().presence is Presence.LOST
    disk.attach()
    assert looks.changed()
    found = looks.examine_surely()
    identity.close()
    assert (found.presence, found.live.state, found.problems) == (Presence.PRESENT, LiveState.UNMODIFIED, ())
    assert found.lineage.ids() == source.lineage.ids()
    assert not (target.root / "commit.json").exists()
    assert target.debris() == []
    assert target.contents() == source.contents()


def test_a_volume_that_is_new_is_not_recovered_over_and_over(pair, tmp_path, monkeypatch):
    """What is being received there would be taken for what a killed agent has left."""
    source, target, _disk = pair
    source.create()
    source.snapshot()
    identity = Identity(tmp_path / "state", "prod", "b")
    looks = Examiner("vm1", "b", target.backend, identity, ReplicaSettings())
    looks.recover()
    assert looks.examine_surely().presence is Presence.EMPTY
    monkeypatch.setattr(target.backend, "recover", lambda: pytest.fail("recovered again"))
    target.receive(source)
    assert looks.examine_surely().presence is Presence.PRESENT
    identity.close()
