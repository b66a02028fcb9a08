"""A writer that leaves a trail while consistency points are taken: each holds all its writes up to one, and none after.

The writer is a process of its own. It numbers its writes, each to the next of a ring of slots, and syncs now and then
as a guest does; so from any image the last number tells what every slot must hold. It writes buffered, with O_DIRECT,
through a mapping, by all three in turn, and by three threads that hand the turn on.

What holds, and is tested here:

* Where files can be cloned (XFS, Btrfs), a clone of an image in use is a point in the order of writes, synced or not.
  Of one single write, what a call wrote within a block is whole; through a mapping that goes for one aligned word.
* A writer within a mount of the image is seen through that mount's cache: frozen, its order holds as well, synced or
  not. Where the mount cannot be frozen, only what the writer had synced is certain, and the order of its synced writes.
* Elsewhere (ext4) an image that is written to is refused, unless the mount that writes to it can be frozen; once it is
  closed it is taken. (A lease answers who has it open: also a mapping whose descriptor is closed, also a loop device.)
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from agent.disk import quiesce
from resilver.errors import Refused
from resilver.lineage import Consistency
from tests.agent.agents import until
from tests.agent.backends.replica import BLOCK, Replica
from tests.loopfs import mounted_image, run

HOWS = ("buffered", "direct", "mapped", "mixed", "threads")
SLOTS = 96  # of each of the three ways
REGION = 1 << 20
SIZE = 4 * REGION
TAKES = 4

WRITER = """
import itertools, mmap, os, struct, sys, threading
path, how, sync_every, told = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
slots, region = int(sys.argv[5]), int(sys.argv[6])
fd = os.open(path, os.O_RDWR)
direct_fd = os.open(path, os.O_RDWR | os.O_DIRECT) if how in ("direct", "mixed", "threads") else -1
held = mmap.mmap(fd, 3 * region) if how in ("mapped", "mixed", "threads") else None
page = mmap.mmap(-1, 4096)
counter = mmap.mmap(os.open(told, os.O_RDWR), 8)

def write(number):
    way = {"buffered": 0, "direct": 1, "mapped": 2}.get(how, number % 3)
    at = way * region + number // 3 % slots * 4096
    if how in ("buffered", "direct", "mapped"):
        at = way * region + number % slots * 4096
    if way == 0:
        os.pwrite(fd, number.to_bytes(8, "little") * 512, at)
    elif way == 1:
        page[:] = number.to_bytes(8, "little") * 512
        os.pwritev(direct_fd, [page], at)
    else:
        held[at : at + 8] = number.to_bytes(8, "little")
    if number % sync_every == 0:
        held.flush() if way == 2 else os.fdatasync(fd)
    counter[:] = number.to_bytes(8, "little")

def turns(first, mine, next_):
    for number in itertools.count(first, 3):
        mine.acquire()
        write(number)
        next_.release()

if how == "threads":
    turn = [threading.Semaphore(1), threading.Semaphore(0), threading.Semaphore(0)]
    for at in range(3):
        threading.Thread(target=turns, args=(at + 1, turn[at], turn[(at + 1) % 3])).start()
else:
    for number in itertools.count(1):
        write(number)
"""


@dataclass
class Trail:
    """A running writer, and what is to be found of it."""

    how: str
    counter: Path
    process: subprocess.Popen[bytes]
    within: bool = False  # in a mount of the image

    @property
    def done(self) -> int:
        """The number of the last write that has returned."""
        return int.from_bytes(self.counter.read_bytes(), "little")

    def wait_for(self, more: int) -> None:
        """Returns once it has gone on by so many writes: it is not held up by anything."""
        goal = self.done + more
        until(lambda: self.done >= goal, f"the writer comes to {goal}", 60)

    def last_in(self, image: Path) -> int:
        """The last write in an image; fails unless all before it are there too, and none after."""
        with image.open("rb") as file, mmap.mmap(file.fileno(), 3 * REGION, prot=mmap.PROT_READ) as view:
            words = np.frombuffer(view[:], np.uint64).reshape(3, -1, BLOCK // 8)[:, :SLOTS]
        for way, name in enumerate(HOWS[:2]):
            assert (words[way] == words[way, :, :1]).all(), f"a {name} write of one block is torn"
        found = words[:, :, 0].astype(np.int64)
        last = int(found.max())
        assert (found == self.expected(last)).all(), f"not all up to {last}, or some after it"
        return last

    def expected(self, last: int) -> np.ndarray:
        """What each slot holds after that write."""
        held = np.zeros((3, SLOTS), np.int64)
        for number in range(max(1, last - 6 * SLOTS), last + 1):
            if self.how in HOWS[:3]:
                held[HOWS.index(self.how), number % SLOTS] = number
            else:
                held[number % 3, number // 3 % SLOTS] = number
        return held


@contextlib.contextmanager
def writing(path: Path, how: str, told: Path, *, sync_every: int = 50, within: bool = False) -> Iterator[Trail]:
    """The writer at work on a file; killed with the block."""
    told.write_bytes(bytes(8))
    arguments = [str(path), how, str(sync_every), str(told), str(SLOTS), str(REGION)]
    process = subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stderr=subprocess.PIPE)
    trail = Trail(how, told, process, within)
    try:
        trail.wait_for(6 * SLOTS)
        yield trail
        assert process.poll() is None, process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def taken(replica: Replica, trail: Trail) -> Consistency:
    """Takes a consistency point under the writer, and follows the trail in it."""
    before = trail.done
    made = replica.snapshot()
    after = trail.done
    last = trail.last_in(replica.data(made.id))
    assert before <= last <= after + 1, "what it holds was written before it was ordered, or while it was taken"
    return made.consistency


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "btrfs-compressed"])
@pytest.mark.parametrize("how", HOWS)
def test_an_image_in_use(replica, tmp_path, how):
    replica.create(size=SIZE, data=0)
    with writing(replica.path, how, tmp_path / "told") as trail:
        for _ in range(TAKES):
            assert taken(replica, trail) is Consistency.CRASH
            trail.wait_for(2 * SLOTS)
    assert taken(replica, trail) is Consistency.CLOSED


def refused(replica: Replica, trail: Trail, attempts: int = 30) -> Refused:
    """The refusal of a snapshot under the writer; if that pauses for a whole copy, as it may, one can be taken."""
    for _attempt in range(attempts):
        try:
            made = replica.snapshot()
        except Refused as error:
            return error
        if not trail.within:
            trail.last_in(replica.data(made.id))
    raise AssertionError("never refused")


@pytest.mark.parametrize("kind", ["ext4"])
@pytest.mark.parametrize("how", HOWS)
def test_an_image_in_use_that_cannot_be_cloned(replica, tmp_path, how):
    replica.create(size=SIZE, data=0)
    with writing(replica.path, how, tmp_path / "told") as trail:
        for _ in range(TAKES):
            error = refused(replica, trail)
            assert error.reason == "SNAPSHOT_NOT_ATOMIC"
            assert f"pid {trail.process.pid}" in error.message
            trail.wait_for(2 * SLOTS)
        assert not list(replica.root.glob(".*")), "nothing is left of what was begun"
    assert taken(replica, trail) is Consistency.CLOSED


# Within a file system that is mounted from the image.


@dataclass
class Guest:
    """The image's own file system, mounted, with a file in it."""

    replica: Replica
    point: Path
    look: Path

    @property
    def file(self) -> Path:
        return self.point / "trail"

    def taken(self, trail: Trail, wanted: Consistency, attempts: int = 30) -> None:
        """As above, of what is in the mount.

        Where files cannot be cloned, and the writer pauses for a whole copy, there was no need to freeze anything, and
        what it had not synced is not promised: then once more.
        """
        for _attempt in range(attempts):
            before = trail.done
            made = self.replica.snapshot()
            after = trail.done
            if made.consistency is wanted:
                assert before <= self.in_snapshot(trail, made.id) <= after + 1
                return
            assert made.consistency is Consistency.SYNCED
            assert not self.replica.backend.examine(compare_live=False).reflink
        raise AssertionError(f"never {wanted}")

    def in_snapshot(self, trail: Trail, snapshot_id: str) -> int:
        """The last write in a snapshot, seen through a copy whose journal may be replayed."""
        copy = self.replica.data(snapshot_id).with_name("look")
        run("cp", self.replica.data(snapshot_id), copy)
        try:
            with mounted_image(copy, self.look):
                return trail.last_in(self.look / "trail")
        finally:
            copy.unlink()


@pytest.fixture
def guest(replica: Replica, place: Path) -> Iterator[Guest]:
    replica.create(size=64 << 20, data=0)
    run("mkfs.ext4", "-q", "-F", replica.path)
    with mounted_image(replica.path, place / "point"):
        made = Guest(replica, place / "point", place / "look")
        with made.file.open("wb") as file:
            file.write(bytes(SIZE))
            file.flush()
            os.fsync(file.fileno())
        yield made


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "btrfs-compressed", "ext4"])
@pytest.mark.parametrize("how", ["mixed", "threads"])
def test_a_mount_that_is_frozen(guest, tmp_path, how):
    """Also on ext4: the copy is made while nothing can be written, and the writer goes on after it."""
    with writing(guest.file, how, tmp_path / "told", within=True) as trail:
        for _ in range(TAKES // 2):
            guest.taken(trail, Consistency.FROZEN)
            trail.wait_for(2 * SLOTS)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
@pytest.mark.parametrize("how", ["buffered", "direct", "mapped"])
def test_a_mount_that_cannot_be_frozen(guest, tmp_path, monkeypatch, how):
    """What was synced is there, in its order: this writer syncs every single write."""
    monkeypatch.setattr(quiesce._Helper, "start", classmethod(lambda _cls, _mount, _deadline: None))
    with writing(guest.file, how, tmp_path / "told", sync_every=1, within=True) as trail:
        for _ in range(TAKES // 2):
            guest.taken(trail, Consistency.SYNCED)
            trail.wait_for(SLOTS)


@pytest.mark.parametrize("kind", ["ext4"])
def test_a_mount_that_cannot_be_frozen_nor_cloned(guest, tmp_path, monkeypatch):
    monkeypatch.setattr(quiesce._Helper, "start", classmethod(lambda _cls, _mount, _deadline: None))
    with writing(guest.file, "mixed", tmp_path / "told", within=True) as trail:
        assert refused(guest.replica, trail).reason == "SNAPSHOT_NOT_ATOMIC"
        trail.wait_for(SLOTS)


def test_a_trail_with_a_gap_is_found(tmp_path):
    """The check itself: a write that is missing, and one too many."""
    trail = Trail("mixed", tmp_path / "told", None)
    words = np.zeros((4, REGION // BLOCK, BLOCK // 8), np.uint64)
    words[:3, :SLOTS] = trail.expected(1000)[:, :, None]
    path = tmp_path / "image"
    path.write_bytes(words.tobytes())
    assert trail.last_in(path) == 1000
    for number, wrong in ((999, 999 - 3 * SLOTS), (997, 0), (1000 - 3 * SLOTS + 1, 1001 + 1)):
        torn = words.copy()
        torn[number % 3, number // 3 % SLOTS] = wrong
        path.write_bytes(torn.tobytes())
        with pytest.raises(AssertionError, match="not all up to"):
            trail.last_in(path)
    words[0, 5, 7] += 1
    path.write_bytes(words.tobytes())
    with pytest.raises(AssertionError, match="torn"):
        trail.last_in(path)
