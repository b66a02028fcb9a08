"""What only image files have, on every kind of file system: sizes, holes, attributes, writers, spares.

What every backend must give is in `conformance/`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent.delta import DeltaRange
from agent.disk import ioctl
from resilver.errors import Invalid, NotFound, Refused
from resilver.lineage import Consistency
from resilver.volume import LiveState, Presence, VolumeRecord
from tests.agent.backends.replica import BLOCK, SIZE, VOLUME_ID, Replica, digest, noise


def state(replica: Replica) -> LiveState:
    return replica.backend.examine().live.state


# Looking.


def test_first_sight(replica):
    replica.create()
    found = replica.backend.examine()
    assert found.presence is Presence.PRESENT
    assert found.live.state is LiveState.MODIFIED
    assert found.live.size_bytes == SIZE
    assert found.live.allocated_bytes < SIZE
    assert found.live.in_use is False


def test_a_disk_that_is_not_there(place):
    missing = Replica(place / "gone")
    missing.directory.rmdir()
    found = missing.backend.examine()
    assert (found.presence, found.file_system_id) == (Presence.EMPTY, "")
    assert str(missing.directory) in found.problems[0]
    with pytest.raises(Invalid, match="no directory"):
        missing.backend.save_record(VolumeRecord("vm1"))


# Snapshots.


def test_snapshot(replica, kind):
    replica.create()
    taken = replica.snapshot(note="first")
    assert taken.size_bytes == SIZE
    assert taken.consistency is Consistency.CLOSED
    found = replica.backend.examine()
    assert found.lineage.records == (taken,)
    assert found.volume_id == VOLUME_ID
    assert (found.live.state, found.live.based_on) == (LiveState.UNMODIFIED, taken.id)
    before = replica.content
    replica.write(12345, b"something else")
    assert replica.data(taken.id).read_bytes() == before
    assert replica.data(taken.id).stat().st_mode & 0o777 == 0o600
    found = replica.backend.examine()
    assert found.live.state is LiveState.MODIFIED
    assert found.live.modified_bytes == (None if kind == "ext4" else BLOCK)
    assert replica.backend.examine(compare_live=False).live.state is LiveState.UNKNOWN
    assert found.reflink is (kind != "ext4")


def test_what_only_became_zero_is_modified_and_holds_nothing_of_its_own(replica, kind):
    replica.create()
    replica.snapshot()
    with replica.path.open("r+b") as file:
        ioctl.punch_hole(file.fileno(), 0, SIZE)
    found = replica.backend.examine().live
    assert (found.state, found.modified_bytes) == (LiveState.MODIFIED, None if kind == "ext4" else 0)


def test_modified_is_found_without_times(replica):
    replica.create()
    replica.snapshot()
    times = replica.path.stat()
    replica.write(SIZE - 1, b"x")
    os.utime(replica.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert state(replica) is LiveState.MODIFIED


def test_touched_is_not_modified(replica):
    replica.create()
    replica.snapshot()
    os.utime(replica.path)
    replica.path.chmod(0o640)
    assert state(replica) is LiveState.UNMODIFIED


@pytest.mark.parametrize("size", [SIZE + BLOCK, SIZE - BLOCK, SIZE + 1, 0])
def test_another_size_is_modified(replica, size):
    replica.create()
    replica.snapshot()
    replica.resize(size)
    assert state(replica) is LiveState.MODIFIED


WRITER = """
import mmap, os, sys
how, path = sys.argv[1:]
with open(path, "r+b", buffering=0) as file:
    size = os.fstat(file.fileno()).st_size
    view = mmap.mmap(file.fileno(), size)
    print("writes", flush=True)
    for count in range(1, 1 << 60):
        raw = count.to_bytes(8, "little")
        for at in (0, size - 8):
            if how == "mapped":
                view[at : at + 8] = raw
            else:
                os.pwrite(file.fileno(), raw, at)
"""


@pytest.mark.parametrize("how", ["plain", "mapped"])
def test_snapshots_under_a_writer_are_one_moment(replica, kind, how):
    """A writer stamps the first block, then the last, over and over: a snapshot never has the last one ahead."""
    replica.create()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, how, str(replica.path)], stdout=subprocess.PIPE)
    refused = []
    try:
        assert writer.stdout.readline() == b"writes\n"
        for _ in range(8):
            before = replica.lineage
            try:
                taken = replica.snapshot()
            except Refused as error:
                refused.append(error)
                assert replica.lineage == before
                continue
            assert taken.consistency is Consistency.CRASH
            raw = replica.data(taken.id).read_bytes()
            first, last = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[-8:], "little")
            assert first - last in {0, 1}
    finally:
        writer.kill()
        writer.communicate()
    # Where files are copied, only a pause of the writer (a busy machine) lets one through.
    assert bool(refused) is (kind == "ext4")
    for error in refused:
        assert error.reason == "SNAPSHOT_NOT_ATOMIC"
        assert f"pid {writer.pid}" in error.message


def test_open_but_still(replica):
    """Somebody has it open for writing and does not write: a point in time everywhere, and never called unmodified."""
    replica.create()
    with replica.path.open("r+b"):
        taken = replica.snapshot()
        assert taken.consistency is Consistency.CRASH
        assert state(replica) is LiveState.MODIFIED
    assert state(replica) is LiveState.UNMODIFIED


# Deltas.


@pytest.mark.parametrize("size", [SIZE + 10 * BLOCK, SIZE + 5001, SIZE - 7 * BLOCK, SIZE - 5001, 100])
def test_delta_with_another_size(replica, other, size):
    replica.create()
    replica.write(SIZE - 3 * BLOCK, noise(9, 3 * BLOCK))
    first = replica.snapshot()
    other.receive(replica)
    replica.resize(size)
    if size > SIZE:
        replica.write(size - 10, b"0123456789")
    new = replica.snapshot()
    delta = replica.backend.delta_map(first.id, new.id)
    assert delta.capacity_bytes == size
    assert delta.data_bytes <= 3 * BLOCK
    other.receive(replica, first.id)
    assert digest(other.path) == digest(replica.path)
    replica.resize(SIZE)
    last = replica.snapshot()
    other.receive(replica, new.id)
    assert other.content == replica.content
    assert other.lineage.tip == last


# Receiving.


def test_holes_stay_holes(replica, other):
    replica.create(size=64 << 20)
    replica.snapshot()
    other.receive(replica)
    assert other.content == replica.content
    for path in (other.path, other.data(other.lineage.tip_id), replica.data(replica.lineage.tip_id)):
        assert path.stat().st_blocks * 512 <= 2 << 20


def test_live_copy_keeps_its_attributes(replica, other):
    replica.create()
    first = replica.snapshot()
    other.receive(replica)
    os.chown(other.path, 1234, 4321)
    other.path.chmod(0o640)
    os.setxattr(other.path, "user.label", b"vm one")
    for base in (first.id, ""):
        replica.write(0, noise(11, 100))
        replica.snapshot()
        other.receive(replica, base)
        stat = other.path.stat()
        assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == (1234, 4321, 0o640)
        assert os.getxattr(other.path, "user.label") == b"vm one"


# Commit: what is replaced, and what is kept.


def test_a_written_live_copy_is_preserved(replica, other, place):
    replica.create()
    first = replica.snapshot()
    other.receive(replica)
    replica.write(100, noise(5, 9000))
    tip = replica.snapshot()
    stage, _ = other.stage_from(replica, first.id, tip)
    other.write(SIZE // 3, b"only here")
    mine = other.content
    (kept,) = other.backend.commit(stage, other.order(replica.lineage))
    assert other.content == replica.content
    assert (kept.live, kept.based_on, kept.cp, kept.size_bytes, kept.resync_id) == (
        True,
        first.id,
        first.cp,
        SIZE,
        "r1",
    )
    assert other.backend.examine().preserved == (kept,)
    assert other.backend.export(kept.id, place / "out.img", writable=True) == SIZE
    assert (place / "out.img").read_bytes() == mine
    assert (place / "out.img").stat().st_mode & 0o777 == 0o600
    with pytest.raises(Invalid, match="already"):
        other.backend.export(kept.id, place / "out.img", writable=True)
    # Asked again, it is done, and tells what it preserved.
    stage, _ = other.stage_from(replica, "", tip)
    assert other.backend.commit(stage, other.order(replica.lineage, expected_tip=first.id)) == (kept,)
    assert other.backend.drop(kept.id) > 0
    assert other.backend.examine().preserved == ()


def test_what_an_export_that_was_killed_has_left_is_replaced_by_the_next(replica, place, tmp_path):
    replica.create()
    taken = replica.snapshot()
    data, out = replica.backend.examine().live.path, tmp_path / "out.img"
    # It is killed by itself where it would copy the first block, or share it.
    code = f"""
import os, signal
from pathlib import Path
from agent.backends import image_copy
image_copy.ioctl.copy_nocow = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
image_copy.export_file(Path({str(data)!r}), Path({str(out)!r}), writable=True)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    assert replica.backend.export(taken.id, out, writable=True) == SIZE
    assert digest(out) == digest(replica.path)
    assert list(tmp_path.iterdir()) == [out]


def test_export_of_a_snapshot(replica, place):
    replica.create()
    taken = replica.snapshot()
    before = replica.content
    replica.write(0, b"later")
    assert replica.backend.export(taken.id, place / "out.img", writable=False) == SIZE
    assert (place / "out.img").read_bytes() == before
    assert (place / "out.img").stat().st_blocks * 512 <= 2 << 20
    with pytest.raises(NotFound):
        replica.backend.export("nothing", place / "out2.img", writable=False)
    with pytest.raises(Invalid, match="no directory"):
        replica.backend.export(taken.id, place / "no" / "out.img", writable=False)


def diverge(replica: Replica, other: Replica) -> tuple[str, dict[str, bytes]]:
    """Both have 1-1; the other goes on alone, with two CPs and live writes; the first takes 2-2."""
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    contents = {}
    for turn in range(2):
        other.write(turn * 100_000, noise(turn, 5000))
        contents[other.snapshot().id] = other.content
    other.write(300_000, b"live")
    contents["live"] = other.content
    replica.write(500_000, noise(50, 5000))
    replica.snapshot(epoch=2)
    return base.id, contents


def test_what_a_preserved_copy_holds_alone_is_counted_from_what_is_there(replica, other):
    base, _ = diverge(replica, other)
    first, *_ = reversed(other.lineage.after(base))
    other.backend.drop(first.id)
    stage, _ = other.stage_from(replica, base, replica.lineage.tip)
    kept = other.backend.commit(stage, other.order(replica.lineage, replace_own_data=True))
    assert kept
    for copy in kept:
        assert 0 < copy.exclusive_bytes < (64 << 10 if other.backend.examine().reflink else SIZE)


# Letting go.


def test_prune_and_receive_go_together(replica, other):
    """Spares, pruned bases and exchanged inodes: the lineage and the bytes stay right over many rounds."""
    replica.create()
    base = ""
    for turn in range(6):
        replica.write(turn * 30_000, noise(turn, 10_000))
        tip = replica.snapshot()
        other.receive(replica, base)
        base = tip.id
        for each in (replica, other):
            each.backend.prune(2, frozenset())
        assert other.content == replica.content
        assert len(list(other.root.glob(".spare-*"))) <= 1
    assert other.backend.examine().preserved == ()
    assert len(other.lineage) == 6


def test_a_late_writer_of_the_spare_is_not_lost(replica, other, kind):
    replica.create()
    base = replica.snapshot()
    other.receive(replica)
    replica.write(0, b"one")
    middle = replica.snapshot()
    other.receive(replica, base.id)
    if kind == "ext4":
        assert not list(other.root.glob(".spare-*")), "a spare saves nothing where files share no extents"
        return
    (spare,) = other.root.glob(".spare-*")
    with spare.open("r+b") as file:
        file.write(b"late")
    replica.write(0, b"two")
    replica.snapshot()
    other.receive(replica, middle.id)
    (kept,) = other.backend.examine().preserved
    assert Path(kept.path).read_bytes()[:4] == b"late"


# Space.


def test_reserve(place):
    replica = Replica(place / "a")
    replica.create()
    taken = replica.snapshot()
    delta = replica.backend.delta_map("", taken.id)
    assert replica.backend.check_space(delta) >= 2 * delta.data_bytes
    full = Replica(place / "a", reserve_min_bytes=1 << 50)
    found = full.backend.examine()
    assert found.reserve_bytes == 1 << 50
    for attempt in (
        full.snapshot,
        lambda: full.backend.check_space(delta),
        lambda: full.backend.open_stage("", "s", 4096),
    ):
        with pytest.raises(Refused) as refused:
            attempt()
        assert refused.value.reason == "NO_SPACE"
    assert len(full.lineage) == 1
    most = replica.backend.examine().free_bytes - (70 << 20)
    tight = Replica(place / "a", reserve_min_bytes=most)
    assert tight.backend.check_space(replica.backend.delta_map(taken.id, taken.id)) > 0
    with pytest.raises(Refused):
        Replica(place / "a", reserve_min_bytes=most).backend.check_space(
            type(delta).of(1 << 30, [DeltaRange(0, 1 << 28)])
        )
