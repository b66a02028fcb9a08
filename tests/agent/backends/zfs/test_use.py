"""A live copy in use: named, never called unmodified while somebody may write, never replaced."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess

import pytest

from agent.disk import exports
from resilver.errors import Refused
from resilver.lineage import Consistency
from resilver.volume import Grant, LiveState
from tests.agent.backends.zfs.replica import VOLUME_ID, equal
from tests.loopfs import attached, run
from tests.zfsfs import zfs


@contextlib.contextmanager
def opened(replica):
    # zfs-fuse leaves a mount writable whose `readonly` is set meanwhile.
    read_only = os.statvfs(replica.point).f_flag & os.ST_RDONLY
    with (replica.point / "zeros").open("rb" if read_only else "r+b"):
        yield f"pid {os.getpid()}"


@contextlib.contextmanager
def mapped(replica):
    fd = os.open(replica.point / "zeros", os.O_RDONLY)
    with mmap.mmap(fd, 4096, prot=mmap.PROT_READ):
        os.close(fd)
        yield f"pid {os.getpid()}"


@contextlib.contextmanager
def standing(replica):
    process = subprocess.Popen(["sleep", "600"], cwd=replica.point)
    try:
        yield f"sleep pid {process.pid}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def bound(replica):
    point = replica.work / "bound here"
    point.mkdir()
    run("mount", "--bind", replica.point, point)
    try:
        yield f"a mount at {point}"
    finally:
        run("umount", point)


@contextlib.contextmanager
def looped(replica):
    with attached(replica.point / "holes") as device:
        yield str(device)


@contextlib.contextmanager
def elsewhere(replica):
    """A process in a mount namespace of its own, in which it stays mounted."""
    process = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo in; exec sleep 600"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    try:
        yield "another namespace"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def exported(replica):
    """As by a line in /etc/exports, which `exportfs` writes into its table; the mount itself stays as it is."""
    table = replica.work / "etab"
    name = str(replica.point / "d").replace(" ", "\\040")
    table.write_text(f"{name}\t*(rw,sync)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "TABLES", (table,))
        yield f"NFS export {replica.point}/d"


@contextlib.contextmanager
def layered(replica):
    point, lower = replica.work / "merged", replica.work / "lower"
    point.mkdir()
    lower.mkdir()
    run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lower}:{replica.point}", point)
    try:
        yield f"overlay mount at {point}"
    finally:
        run("umount", point)


USES = [opened, mapped, standing, bound, looped, exported, layered]


@pytest.fixture
def stale(replica, other):
    """A source that is ahead, and a target that its operator has mounted."""
    replica.create()
    replica.snapshot()
    other.receive(replica)
    replica.write(1)
    replica.snapshot()
    zfs("set", f"mountpoint={other.point}", other.dataset)
    zfs("mount", other.dataset) if not os.path.ismount(other.point) else None
    return replica, other


@pytest.mark.parametrize("use", [*USES, elsewhere], ids=lambda use: use.__name__)
def test_a_target_in_use_is_left_alone(stale, use):
    source, target = stale
    base = target.tip.id
    stage = target.fill(source, base, source.tip.id)
    with use(target) as name:
        if use is not elsewhere:
            found = target.backend.examine().live
            assert found.in_use
            assert any(name in who for who in found.in_use_by), found.in_use_by
        with pytest.raises(Refused) as refused:
            target.backend.commit(stage, target.order(source.lineage))
        assert refused.value.reason == "IN_USE"
        assert name in refused.value.message
        assert target.tip.id == base
        assert os.path.ismount(target.point), "it is where it was"
    assert target.backend.commit(stage, target.order(source.lineage)) == ()
    assert equal(source, target)
    assert os.path.ismount(target.point), "it was mounted before, and is again"
    with pytest.raises(OSError, match="Read-only"):
        (target.point / "x").touch()


def test_a_snapshot_of_a_live_copy_in_use(replica):
    replica.create()
    with opened(replica):
        taken = replica.snapshot()
        assert taken.consistency is Consistency.SYNCED
        assert replica.state is LiveState.MODIFIED, "somebody may write at any moment"
    assert replica.state is LiveState.UNMODIFIED
    assert replica.snapshot().consistency is Consistency.CLOSED


def test_somebody_who_comes_while_a_snapshot_is_taken(replica):
    """He may have been writing: it is not said of it that nobody had anything open."""
    replica.create()
    file = None

    def step(name):
        nonlocal file
        if name == "snapshot.taken":
            file = (replica.point / "zeros").open("r+b")

    taken = replica.again(step=step).snapshot()
    assert file is not None
    file.close()
    assert taken.consistency is Consistency.SYNCED
    assert replica.tip.consistency is Consistency.SYNCED


def test_an_export_above_shows_a_mount_only_if_it_crosses(replica, monkeypatch):
    replica.create()
    table = replica.work / "etab"
    monkeypatch.setattr(exports, "TABLES", (table,))
    table.write_text("/\t10.0.0.1(rw)\n")
    assert replica.backend.examine().live.in_use_by == ()
    table.write_text("/\t10.0.0.1(rw,crossmnt)\n")
    assert replica.backend.examine().live.in_use_by == ("NFS export /",)


def test_what_was_written_through_a_mapping_is_in_the_snapshot(replica):
    replica.create()
    replica.snapshot()
    with (replica.point / "holes").open("r+b") as file, mmap.mmap(file.fileno(), 4096) as view:
        view[:6] = b"mapped"
        replica.snapshot()
        name = replica.traces()[-1]
    names = [one for one in replica.traces() if "@resilver-1-2" in one]
    assert names, name
    with replica.walked(names[0]) as path:
        assert (path / "holes").read_bytes()[:6] == b"mapped"


def test_an_export_is_use(replica):
    replica.create()
    replica.snapshot()
    subprocess.run(["zfs", "set", "sharenfs=on", replica.dataset], capture_output=True, check=False)
    assert "an export (sharenfs=on)" in replica.backend.examine().live.in_use_by


def test_a_primary_gets_its_dataset_back_as_it_was(replica, other):
    replica.create()
    replica.snapshot()
    other.receive(replica)

    def settings():
        values = zfs("get", "-H", "-o", "value,source", "readonly,canmount", other.dataset).split("\n")
        return values[:-1]

    assert settings() == ["on\tlocal", "noauto\tlocal"]
    other.backend.save_grant(Grant(VOLUME_ID, 2, "e2"))
    assert settings()[0] == "off\tdefault"
    assert settings()[1].startswith("on\t")
    other.write(1)
    base = replica.tip
    taken = other.snapshot(epoch=2)
    zfs("set", "readonly=off", replica.dataset)
    replica.receive(other, base.id)
    assert replica.tip == taken
    replica.backend.save_grant(Grant(VOLUME_ID, 3, "e3"))
    value = zfs("get", "-H", "-o", "value,source", "readonly", replica.dataset)
    assert value == "off\tlocal\n", "as the operator had set it"
