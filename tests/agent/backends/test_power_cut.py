"""The power goes at every named step: what was not synced is gone, and still the path shows one whole image.

The file system under test stands on a disk image on XFS. At each step the image is cloned: the clone has what had
reached the disk at that moment, and nothing that was only in memory. Each clone is mounted where the original was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.backends import image_commit, image_compact, image_snapshot
from agent.disk import ioctl
from tests.agent.backends.conformance.cases import Case
from tests.agent.backends.crash import whole
from tests.agent.backends.fragments import Picture, check_same, made, torn
from tests.agent.backends.kinds.image import ImageKind, ImagePlace
from tests.agent.backends.replica import STAGES, Replica, noise
from tests.loopfs import make_fs, run


@pytest.fixture(params=["xfs", "btrfs", "ext4"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


class Machine:
    """A disk that can be photographed, and a mount point for it and its photographs."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.disk = directory / "disk"
        self.point = directory / "mnt"
        self.point.mkdir()
        make_fs(kind, self.disk, 320 << 20)

    @contextlib.contextmanager
    def on(self, disk: Path) -> Iterator[None]:
        run("mount", "-o", "loop", disk, self.point)
        try:
            yield
        finally:
            while STAGES:
                STAGES.pop().close()
            run("umount", self.point)

    def cut(self, name: str) -> None:
        """What would be left if the power went now."""
        with self.disk.open("rb") as now, self.disk.with_name(f"cut-{name}").open("wb") as left:
            ioctl.clone(left.fileno(), now.fileno())

    def after(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self.on(self.disk.with_name(f"cut-{name}"))


@pytest.fixture
def machine(mounts, kind, tmp_path_factory) -> Iterator[Machine]:
    directory = mounts("xfs") / uuid.uuid4().hex
    directory.mkdir()
    yield Machine(directory, kind)
    shutil.rmtree(directory)


@pytest.mark.parametrize("scenario", ["stale", "diverged", "newcomer"])
def test_power_cut_in_a_commit(machine, kind, scenario):
    with machine.on(machine.disk):
        case = Case(ImagePlace(ImageKind(kind), machine.point), scenario)
        os.sync()
        case.commit(machine.cut)
        machine.cut("end")
    decided = image_commit.STEPS.index("commit.exchanged")
    for number, step in enumerate((*image_commit.STEPS, "end")):
        with machine.after(step):
            came = case.check_one_whole()
            assert came is (number > decided) or number == decided, step
            assert case.recover() is came
            case.commit()
            case.check_done()


def test_power_cut_in_a_snapshot(machine):
    with machine.on(machine.disk):
        replica = Replica(machine.point / "a")
        replica.create()
        first = replica.snapshot()
        replica.write(50_000, noise(3, 100_000))
        os.sync()
        live = replica.content
        second = Replica(replica.directory, step=machine.cut).snapshot()
        machine.cut("end")
    for step in (*image_snapshot.STEPS, "end"):
        with machine.after(step):
            assert replica.content == live
            replica.backend.recover()
            tip = replica.lineage.tip_id
            assert tip == second.id or (tip == first.id and step not in {"snapshot.synced", "end"}), step
            if tip == first.id:
                replica.snapshot()
            assert replica.data(replica.lineage.tip_id).read_bytes() == live
            whole(replica)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_power_cut_in_compacting(machine):
    """Every file as it was, and every delta too once the agent has started again."""
    with machine.on(machine.disk):
        replica = torn(machine.point / "a")
        before = Picture(replica)
        os.sync()
        cut: set[str] = set()

        def step(name: str) -> None:
            if name not in cut:
                cut.add(name)
                machine.cut(name)

        made(replica.directory, step=step).backend.compact(lambda: False)
    for name in image_compact.STEPS:
        with machine.after(name):
            again = made(replica.directory)
            again.backend.recover()
            check_same(again, before)
            whole(again)
