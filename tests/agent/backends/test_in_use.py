"""While anybody has the live copy open nothing is called unmodified, and nothing is replaced; who it is, is told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.backends.base import Stage
from agent.backends.image import ImageBackend
from agent.disk import quiesce
from agent.disk.durable import write_json
from agent.disk.inuse import InUseError, Lease, users_of
from resilver.errors import Invalid, Refused
from resilver.lineage import Consistency
from resilver.volume import Grant, LiveState
from tests.agent.backends.replica import SIZE, Replica, noise
from tests.loopfs import attached, mounted_image, run


@pytest.fixture
def ready(replica: Replica, other: Replica) -> Stage:
    """The other is at 1-1, and has a filled stage of 1-2."""
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    replica.write(50_000, noise(1, 20_000))
    stage, _ = other.stage_from(replica, base.id, replica.snapshot())
    return stage


def test_opened_while_the_commit_runs(place, replica):
    """Somebody opens the live copy after the lease was taken: he waits, and gets the file that the path shows."""
    replica.create()
    base = replica.snapshot()
    opener: list[subprocess.Popen[bytes]] = []

    def step(name: str) -> None:
        if name == "commit.intended":
            code = "import sys; f = open(sys.argv[1], 'r+b'); print('open', flush=True); f.write(b'HELLO')"
            child = subprocess.Popen([sys.executable, "-c", code, str(other.path)], stdout=subprocess.PIPE)
            opener.append(child)
            wait_for_opener(other.path.stat().st_ino)

    Replica(place / "b").receive(replica)
    other = Replica(place / "b", step=step)
    replica.write(0, noise(4, 9000))
    stage, _ = other.stage_from(replica, base.id, replica.snapshot())
    with pytest.raises(Refused) as refused:
        other.backend.commit(stage, other.order(replica.lineage))
    assert refused.value.reason == "IN_USE"
    opener[-1].communicate()
    assert other.content[:5] == b"HELLO", "what was written through the path is under the path"
    assert other.lineage.tip_id == base.id
    assert not (other.root / "commit.json").exists()
    quiet = Replica(place / "b")
    (kept,) = quiet.backend.commit(stage, quiet.order(replica.lineage))
    assert Path(kept.path).read_bytes()[:5] == b"HELLO"
    assert quiet.content == replica.content


def wait_for_opener(inode: int) -> None:
    """Returns when somebody waits in the kernel for a lease on that inode to end."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for line in Path("/proc/locks").read_text().splitlines():
            if "LEASE" in line and "BREAKING" in line and f":{inode} " in line:
                return
        os.sched_yield()
    raise AssertionError("the opener never came to wait")


def test_a_late_writer_goes_to_the_preserved_copy(place, replica):
    """After the exchange the old file is what is preserved, so that nothing written through it is lost."""
    replica.create()
    base = replica.snapshot()
    other = Replica(place / "b")
    other.receive(replica)
    other.write(0, b"mine")
    inode = other.path.stat().st_ino
    replica.write(0, noise(4, 9000))
    replica.snapshot()
    (kept,) = other.receive(replica, base.id)
    assert Path(kept.path).stat().st_ino == inode


def test_hard_linked(replica, other, ready):
    link = other.path.with_name("link")
    link.hardlink_to(other.path)
    found = other.backend.examine()
    assert found.live.state is LiveState.UNKNOWN
    assert "hard link" in found.problems[0]
    before = other.content
    with pytest.raises(Refused, match="hard link"):
        other.backend.commit(ready, other.order(replica.lineage))
    assert other.content == before
    link.unlink()
    other.backend.commit(ready, other.order(replica.lineage))
    assert other.content == replica.content


def test_bind_mounted(replica, other, ready):
    point = other.directory / "bound.img"
    point.touch()
    run("mount", "--bind", other.path, point)
    try:
        found = other.backend.examine()
        assert found.live.state is LiveState.UNKNOWN
        assert str(point) in found.problems[0]
        with pytest.raises(Refused, match="bind-mounted"):
            other.backend.commit(ready, other.order(replica.lineage))
    finally:
        run("umount", point)
    other.backend.commit(ready, other.order(replica.lineage))


def test_what_cannot_be_a_live_copy(place):
    replica = Replica(place / "a")
    replica.path.mkdir()
    with pytest.raises(Invalid, match=r"directory.*disk\.img") as refused:
        replica.backend.examine()
    assert refused.value.metadata["field"] == "path"
    replica.path.rmdir()
    replica.path.symlink_to("elsewhere")
    with pytest.raises(Invalid, match=r"symbolic link.*elsewhere"):
        replica.backend.examine()


def test_snapshots_on_another_file_system(place, tmp_path):
    backend = ImageBackend("vm1", place / "vm1.img", tmp_path / "snapshots", reserve_min_bytes=0)
    with pytest.raises(Invalid, match="another file system"):
        backend.save_grant(Grant("v", 1, "e"))


# A file system within the image.


@pytest.fixture
def guest(replica: Replica) -> Replica:
    """A replica whose image holds an ext4."""
    replica.create(size=64 << 20, data=0)
    run("mkfs.ext4", "-q", "-F", replica.path)
    return replica


def files_in(snapshot: Path, point: Path) -> dict[str, int]:
    """What a snapshot's file system holds, seen through a copy that may replay its journal."""
    copy = snapshot.parent / "look"
    run("cp", "--sparse=always", snapshot, copy)
    try:
        with mounted_image(copy, point):
            return {entry.name: entry.stat().st_size for entry in point.iterdir() if entry.is_file()}
    finally:
        copy.unlink()


@pytest.mark.parametrize("freezing", [True, False])
def test_loop_mounted_with_unsynced_files(guest, place, monkeypatch, freezing):
    """A mount's files are in the CP, whether or not they were synced, and whether or not it can be frozen."""
    if not freezing:
        monkeypatch.setattr(quiesce._Helper, "start", classmethod(lambda _cls, _mount, _deadline: None))
    first = guest.snapshot()
    assert first.consistency is Consistency.CLOSED
    point = place / "point"
    with mounted_image(guest.path, point) as device:
        (point / "fresh").write_bytes(noise(3, 300_000))
        found = guest.backend.examine()
        assert found.live.state is LiveState.MODIFIED
        assert found.live.in_use_by == (str(device),)
        taken = guest.snapshot()
        assert not (guest.root / "frozen.json").exists()
        (point / "after").write_bytes(b"thawed")
        reflink = guest.backend.examine().reflink
        assert taken.consistency is (Consistency.FROZEN if freezing and reflink else Consistency.SYNCED)
    assert files_in(guest.data(taken.id), place / "look") == {"fresh": 300_000}


def test_attached_without_a_mount(guest):
    with attached(guest.path) as device:
        with device.open("r+b", buffering=0) as file:
            file.seek(32 << 20)
            file.write(noise(8, 8192))
        assert guest.backend.examine().live.state is LiveState.MODIFIED
        taken = guest.snapshot()
        assert taken.consistency is Consistency.SYNCED
    assert guest.data(taken.id).read_bytes()[32 << 20 : (32 << 20) + 8192] == noise(8, 8192)


def test_a_mount_that_was_left_frozen_is_thawed(guest, place):
    """The agent and its helper were killed in between."""
    guest.snapshot()
    point = place / "point"
    with mounted_image(guest.path, point):
        write_json(guest.root / "frozen.json", {"mounts": [str(point)]})
        run("fsfreeze", "--freeze", point)
        try:
            Replica(guest.directory).backend.recover()
            (point / "works").write_bytes(b"again")
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", point], check=False, capture_output=True)
        assert not (guest.root / "frozen.json").exists()


@pytest.mark.parametrize("kind", ["xfs"], indirect=False)
def test_the_helper_thaws_by_itself(guest, place):
    """At its deadline, and when whoever started it is gone."""
    point = place / "point"
    with mounted_image(guest.path, point):
        late = quiesce._Helper.start(point, 0.2)
        (point / "waits").write_bytes(b"until the deadline")
        assert late.thaw() is False
        gone = quiesce._Helper.start(point, 60.0)
        gone._process.stdin.close()
        (point / "goes on").write_bytes(b"at once")
        assert gone._process.wait(10) == 0
        gone._process.stdout.close()


# Leases by themselves.


def test_lease(place):
    path = place / "file"
    path.write_bytes(b"x" * SIZE)
    with Lease(path) as lease:
        assert lease.certain
        assert not lease.broken()
        lease.check()
    with path.open("rb") as file:
        users = users_of(path.stat())
        assert [user.writes for user in users] == [False]
        assert str(os.getpid()) in users[0].name
        with pytest.raises(InUseError):
            Lease(path)
        del file
    Lease(path, writable=True).close()
