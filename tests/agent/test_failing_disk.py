"""What an agent makes of a disk that fails under it: it says so, it touches nothing more, and it goes on by itself.

The calls of the volume's own thread fail for real (`tests/faults.py`).
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.backends import image_commit
from agent.backends.base import NewSnapshot
from agent.backends.image import ImageBackend
from agent.disk import freeze
from agent.examiner import ReplicaSettings
from agent.identity import Identity
from agent.peers import Peers
from agent.replica import Replica
from agent.runfile import RunOrder
from agent.runs import Runs
from agent.tickets import Tickets
from agent.worker import Worker
from resilver.errors import Damaged, Refused
from resilver.lineage import ConsistencyPoint
from resilver.volume import Grant, Order, Presence, Progress, ResyncState, VolumeRecord
from tests import faults
from tests.agent.agents import until
from tests.faults import Fault, Outcome, faulty
from tests.loopfs import mounted_image, run

pytestmark = pytest.mark.skipif(bool(faults.available()), reason=faults.available() or "-")
ORDER = Order("test", "S", 1, "L", "vm1", volume_id="V", epoch=1, epoch_id="e1")


class Scene:
    """A primary's replica with one CP; what it is asked is done by a thread whose disk fails."""

    def __init__(self, disk: Path, state: Path) -> None:
        self.disk, self.state = disk, state
        self.identity = Identity(state, "test", "a")
        self.image, self.root = disk / "vm1.img", disk / ".resilver" / "vm1"
        self.image.write_bytes(os.urandom(1 << 20))
        backend = ImageBackend("vm1", self.image, self.root, reserve_min_bytes=0)
        self.replica = Replica("vm1", "a", backend, self.identity, ReplicaSettings())
        self.replica.recover()
        backend.save_record(VolumeRecord("vm1", "V", 1, "e1", "a"))
        backend.save_grant(Grant("V", 1, "e1"))
        backend.take_snapshot(NewSnapshot("s1", "V", ConsistencyPoint(1, 1), "", "e1", 1))
        self.replica.examine()

    def take(self) -> None:
        self.replica.take_snapshot(ORDER, "")

    def taking(self, fault: Fault) -> Outcome:
        return faulty(lambda _step: self.take(), self.disk, fault)

    @property
    def left_over(self) -> list[str]:
        return [entry.name for entry in self.root.iterdir() if entry.name.startswith(".")]


@pytest.fixture
def scene(xfs: Path, tmp_path: Path) -> Iterator[Scene]:
    disk = xfs / uuid.uuid4().hex
    disk.mkdir()
    made = Scene(disk, tmp_path / "state")
    yield made
    made.replica.close()
    made.identity.close()
    shutil.rmtree(disk)


def test_a_disk_that_cannot_be_looked_at_is_lost_until_it_can(scene: Scene) -> None:
    """Whichever call it is that fails, also the very first."""
    tip = scene.replica.examine().lineage.tip_id
    lost = 0
    for skip in range(1000):
        outcome = faulty(lambda _step: scene.replica.examine(), scene.disk, Fault("EIO", skip=skip, lasting=True))
        assert outcome.reason == ""
        if not outcome.failed:
            break
        report = scene.replica.last
        assert report is not None
        lost += report.presence is Presence.LOST
        assert report.presence is Presence.PRESENT or any("IO_ERROR" in said for said in report.problems), outcome
        again = scene.replica.examine()
        assert (again.presence, again.lineage.tip_id) == (Presence.PRESENT, tip), outcome
    assert lost > 5
    assert scene.replica.examine().reflink, "what the file system can do is asked again when the disk answers"


def test_a_cp_on_a_failing_disk_leaves_nothing_behind(scene: Scene) -> None:
    """Its half is removed before the next look, whatever could not be removed at the time."""
    seen_left = 0
    for error, reason in (("EIO", "IO_ERROR"), ("ENOSPC", "NO_SPACE")):
        for skip in range(0, 200, 6):
            before = scene.replica.examine().lineage
            outcome = scene.taking(Fault(error, skip=skip, lasting=True))
            assert outcome.reason in {"", reason}, outcome
            seen_left += bool(scene.left_over)
            after = scene.replica.examine().lineage
            assert scene.left_over == [], outcome
            assert before.tip_id in after.ids()
            if not outcome.failed:
                break
    assert seen_left, "there was something to remove"
    scene.take()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("error", "reason"), [("EIO", "IO_ERROR"), ("ENOSPC", "NO_SPACE")])
def test_a_mount_is_never_left_frozen(scene: Scene, tmp_path: Path, error: str, reason: str) -> None:
    """Whatever fails while a CP is taken of an image that is mounted."""
    with scene.image.open("r+b") as file:
        file.truncate(16 << 20)
    run("mkfs.ext4", "-q", "-F", scene.image)
    frozen = 0
    with mounted_image(scene.image, tmp_path / "guest"):
        for skip in range(0, 400, 6):
            outcome = scene.taking(Fault(error, skip=skip, lasting=bool(skip % 2)))
            assert outcome.reason in {"", reason}, outcome
            frozen += any(call.path.endswith("frozen.json") and not call.failed for call in outcome.calls)
            fd = os.open(tmp_path / "guest", os.O_RDONLY)
            try:
                with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
                    freeze.thaw(fd)
            finally:
                os.close(fd)
            scene.replica.examine()
            assert scene.left_over == [], outcome
            if not outcome.failed:
                break
    assert frozen


def test_a_state_dir_that_cannot_be_read_does_not_make_mirrored_data_lost(scene: Scene) -> None:
    def look(_step: object) -> None:
        scene.replica.examine()

    outcome = faulty(look, scene.state, Fault("EIO", lasting=True))
    assert outcome.failed
    report = scene.replica.last
    assert report is not None
    assert report.presence is Presence.PRESENT
    assert any(said.startswith("IO_ERROR: where the data was cannot be read") for said in report.problems)

    # Of what is not there nothing is known then: it is not called empty.
    shutil.rmtree(scene.root)
    scene.image.unlink()
    assert faulty(look, scene.state, Fault("EIO", lasting=True)).failed
    report = scene.replica.last
    assert report is not None
    assert report.presence is Presence.LOST


def test_whoever_waits_for_a_job_is_told_by_a_reason(tmp_path: Path) -> None:
    worker = Worker("disk of vm1")
    with pytest.raises(Damaged, match="Read-only") as caught:
        worker.call(lambda: (_ for _ in ()).throw(OSError(30, os.strerror(30), str(tmp_path))))
    assert caught.value.reason == "IO_ERROR"
    with pytest.raises(Refused) as full:
        worker.call(lambda: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    assert full.value.reason == "NO_SPACE"
    assert "disk of vm1" in full.value.message
    with pytest.raises(TimeoutError):
        worker.call(lambda: (_ for _ in ()).throw(TimeoutError()))
    worker.close()


class Target:
    """A secondary whose live copy was written to, and the run that sets it right again: it needs no source."""

    def __init__(self, directory: Path, disk: Path) -> None:
        self.directory, self.disk = directory, disk
        self.image, self.root = disk / "vm1.img", disk / ".resilver" / "vm1"
        backend = ImageBackend("vm1", self.image, self.root, reserve_min_bytes=0)
        self.image.write_bytes(os.urandom(1 << 20))
        self.mirrored = self.image.read_bytes()
        backend.save_record(VolumeRecord("vm1", "V", 1, "e1", "a"))
        backend.take_snapshot(NewSnapshot("s1", "V", ConsistencyPoint(1, 1), "", "e1", 1))
        with self.image.open("r+b") as file:
            file.write(b"written here")
        self.written = self.image.read_bytes()
        self.ended: list[tuple[Progress, list[str]]] = []

    def run_twice(self, step: Callable[[str], None]) -> None:
        """An agent that lives through a fault of its first run, if there is one, and is given another."""
        loop = asyncio.new_event_loop()
        identity = Identity(self.directory / "state", "test", "b")
        backend = ImageBackend("vm1", self.image, self.root, reserve_min_bytes=0, step=step)
        replica = Replica("vm1", "b", backend, identity, ReplicaSettings())
        tickets = Tickets(self.directory / "tickets.json")
        runs = Runs(
            self.directory / "runs",
            {"vm1": replica},
            Peers(loop),
            tickets,
            receive_max_count=1,
            spool_max_bytes=0,
            on_progress=lambda _progress: None,
        )
        try:
            for resync_id in ("r1", "r2"):
                order = Order("test", "S", 1, "L", "vm1", "V", 1, "e1")
                runs.receive(RunOrder(order, resync_id, "s1", "s1", "", (), replace_own_data=True))
                until(lambda: not runs.active_count, "the run ends")
                replica.worker.call(lambda: None)
                left = [
                    entry.name for entry in self.root.iterdir() if entry.name.startswith((".keep", ".new", ".live"))
                ]
                left += [name for name in ("stage", "commit.json") if (self.root / name).exists()]
                self.ended.append((runs.progresses()[0], left))
        finally:
            replica.close()
            identity.close()
            loop.close()


@pytest.mark.parametrize(("error", "reason"), [("EIO", "IO_ERROR"), ("ENOSPC", "NO_SPACE")])
def test_a_run_on_a_failing_disk_ends_and_the_next_succeeds(xfs: Path, tmp_path: Path, error: str, reason: str) -> None:
    """At each step of its commit one call fails: nothing is left of it, in the same process, and nothing is lost."""
    failed = 0
    for number, step in enumerate(image_commit.STEPS):
        disk, directory = xfs / uuid.uuid4().hex, tmp_path / f"{number}"
        disk.mkdir()
        directory.mkdir()
        target = Target(directory, disk)
        outcome = faulty(target.run_twice, disk, Fault(error, step))
        assert outcome.reason == ""
        (first, left), (second, _) = target.ended
        assert left == [], f"{step}: {first}"
        if first.state is ResyncState.FAILED:
            failed += 1
            assert first.reason == reason, f"{step}: {first}"
        else:
            assert first.state is ResyncState.SUCCEEDED, f"{step}: {first}"
        assert second.state is ResyncState.SUCCEEDED, f"{step}: {second}"
        assert target.image.read_bytes() == target.mirrored
        (kept,) = (target.root / "preserved").glob("*/data")
        assert kept.read_bytes() == target.written
        shutil.rmtree(disk)
    assert failed > len(image_commit.STEPS) // 2
