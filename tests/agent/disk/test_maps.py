"""Extent maps in windows, contents and tables: against a comparison byte by byte."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.backends.image_copy import differing
from agent.disk import contents, extents, ioctl
from agent.disk.extents import DATA, DIFFERENT, DOUBTFUL, EQUAL, UNCERTAIN, ZERO, ZEROED, Extents, segments
from resilver.errors import Damaged
from tests.agent.backends.replica import noise

BLOCK = 4096


def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    return os.open(path, flags, 0o600)


# The comparison itself, on maps made up.

places = st.lists(
    st.tuples(st.sampled_from([ZERO, DATA, UNCERTAIN]), st.integers(0, 2), st.integers(0, 1)), max_size=40
)


class Made:
    """A map of one-block extents, told a few records at a time, split or joined as it likes."""

    def __init__(self, blocks: list[tuple[int, int, int]], window: int) -> None:
        self.blocks = [block if block[0] != ZERO else (ZERO, 0, 0) for block in blocks]
        self.window = window

    def fetch(self, start: int) -> tuple[Extents, int]:
        first = start // BLOCK
        last = min(first + self.window, len(self.blocks))
        rows = range(first, last)
        start_at = np.array([row * BLOCK for row in rows], np.int64)
        kind, disk, shift = (np.array([self.blocks[row][n] for row in rows], np.int64) for n in range(3))
        end = extents.END if last == len(self.blocks) else last * BLOCK
        return Extents(start_at, start_at + BLOCK, kind.astype(np.int8), disk, shift), end


def expected(old: tuple[int, int, int], new: tuple[int, int, int]) -> int:
    if UNCERTAIN in {old[0], new[0]}:
        return DOUBTFUL
    if new[0] == ZERO:
        return EQUAL if old[0] == ZERO else ZEROED
    return EQUAL if old == new else DIFFERENT


@settings(max_examples=200, deadline=None)
@given(old=places, new=places.filter(bool), windows=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_segments(old, new, windows):
    base, target = Made(old, windows[0]), Made(new, windows[1])
    found = []
    for bounds, states in segments(base, len(old) * BLOCK, target, len(new) * BLOCK):
        assert len(bounds) == len(states) + 1
        for low, high, state in zip(bounds[:-1], bounds[1:], states, strict=True):
            found += [int(state)] * int((high - low) // BLOCK)
    padded = base.blocks + [(ZERO, 0, 0)] * len(new)
    assert found == [expected(padded[at], target.blocks[at]) for at in range(len(new))]


def test_collected_ranges_join_across_windows():
    rows = [(np.array([at]), np.array([BLOCK]), np.array([at >= 3 * BLOCK])) for at in range(0, 5 * BLOCK, BLOCK)]
    assert [tuple(row) for row in extents.collect(1 << 20, iter(rows))] == [
        (0, 3 * BLOCK, False),
        (3 * BLOCK, 2 * BLOCK, True),
    ]


# Real files.


def scattered(path: Path, size: int, count: int, seed: int) -> None:
    chance = random.Random(seed)
    fd = opened(path)
    os.ftruncate(fd, size)
    for _ in range(count):
        at = chance.randrange(size // BLOCK) * BLOCK
        os.pwrite(fd, chance.randbytes(BLOCK), at)
    os.fsync(fd)
    os.close(fd)


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "btrfs-compressed"])
def test_small_windows_find_the_same(place, kind, monkeypatch):
    one, two = place / "one", place / "two"
    scattered(one, 16 << 20, 600, 1)
    source, target = opened(one), opened(two)
    ioctl.clone(target, source)
    for at in range(0, 16 << 20, 160 * 1024):
        os.pwrite(target, noise(at, 5000), at)
    ioctl.punch_hole(target, 3 << 20, 1 << 20)
    os.fsync(target)
    whole = list(differing(source, target))
    before, after = one.read_bytes(), two.read_bytes()
    rebuilt = bytearray(before)
    for offset, length, zero in whole:
        rebuilt[offset : offset + length] = bytes(length) if zero else after[offset : offset + length]
    assert bytes(rebuilt) == after
    written = len(range(0, 16 << 20, 160 * 1024)) * 2 * BLOCK
    assert sum(row.length for row in whole if not row.zero) <= written
    monkeypatch.setattr(ioctl, "FIEMAP_RECORDS_MAX", 7)
    monkeypatch.setattr(ioctl, "SEARCH_BUFFER_BYTES", 85 * 7)
    monkeypatch.setattr(extents, "_RECORDS_FIRST", 3)
    monkeypatch.setattr(extents, "_SEARCH_FIRST_BYTES", 85 * 3)
    monkeypatch.setattr(extents, "source_of", small_source)
    assert list(differing(source, target)) == whole
    os.close(source)
    os.close(target)


class Written:
    """A file that is changed in every way there is, and the blocks that were touched."""

    def __init__(self, path: Path, seed: int) -> None:
        self.fd = opened(path)
        self.chance = random.Random(seed)
        self.touched: set[int] = set()
        self.size = 6 << 20
        os.pwrite(self.fd, noise(seed, 2 << 20), 0)
        os.pwrite(self.fd, b"a line that repeats itself\n" * 80_000, 3 << 20)
        os.ftruncate(self.fd, self.size)

    def change(self) -> None:
        chance = self.chance
        what = chance.randrange(6)
        at, length = chance.randrange(self.size - 400_000), chance.choice([1, 700, BLOCK, 70_000, 300_000])
        if what <= 1:
            os.pwrite(self.fd, chance.randbytes(length), at)
        elif what == 2:
            os.pwrite(self.fd, (b"compressible " * 30_000)[:length], at)
        elif what == 3:
            ioctl.punch_hole(self.fd, at, length)
        elif what == 4:
            os.posix_fallocate(self.fd, at, length)
        else:
            os.ftruncate(self.fd, at)
            os.ftruncate(self.fd, self.size)
            length = self.size - at
        self.touched |= set(range(at // BLOCK, (at + length - 1) // BLOCK + 1))
        if chance.random() < 0.3:
            os.fsync(self.fd)

    def clone(self, path: Path) -> int:
        made = opened(path)
        ioctl.clone(made, self.fd)
        return made


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "btrfs-compressed"])
@pytest.mark.parametrize("seed", range(4))
def test_no_change_is_missed_and_none_is_made_up(place, seed):
    """Between any two of a chain of clones: all that differs, and nothing that was not written in between."""
    file = Written(place / "live", seed)
    clones, touched = [file.clone(place / "0")], []
    for number in range(1, 7):
        file.touched = set()
        for _ in range(file.chance.randrange(1, 12)):
            file.change()
        clones.append(file.clone(place / f"{number}"))
        touched.append(file.touched)
    for old in range(len(clones)):
        for new in range(old + 1, len(clones)):
            before, after = (place / f"{old}").read_bytes(), (place / f"{new}").read_bytes()
            rebuilt, named = bytearray(before), set()
            for offset, length, zero in differing(clones[old], clones[new]):
                rebuilt[offset : offset + length] = bytes(length) if zero else after[offset : offset + length]
                named |= set(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))
            assert bytes(rebuilt) == after
            assert named <= set().union(*touched[old:new])
    for fd in (file.fd, *clones):
        os.close(fd)


def small_source(fd: int) -> extents.Source:
    return extents.BtrfsSource(fd) if ioctl.fs_magic(fd) == ioctl.BTRFS_MAGIC else extents.FiemapSource(fd, 7)


@pytest.mark.parametrize("kind", ["btrfs-compressed"])
def test_compressed_without_root(place, kind, monkeypatch):
    """FIEMAP tells nothing of compressed extents: contents decide, exactly."""
    one, two = place / "one", place / "two"
    source, target = opened(one), opened(two)
    os.pwrite(source, b"a line that repeats itself\n" * 40_000, 0)
    os.fsync(source)
    ioctl.clone(target, source)
    monkeypatch.setattr(extents, "source_of", extents.FiemapSource)
    assert len(differing(source, target)) == 0
    os.pwrite(target, b"x", 500_000)
    os.fsync(target)
    assert [tuple(row) for row in differing(source, target)] == [(500_000 // BLOCK * BLOCK, BLOCK, False)]
    os.close(source)
    os.close(target)


def test_inline_and_unwritten(place):
    """A file within its own inode is compared by contents; preallocated space reads as zero."""
    one, two = place / "one", place / "two"
    one.write_bytes(b"tiny")
    two.write_bytes(b"tiny")
    source, target = opened(one), opened(two)
    if ioctl.fs_magic(source) == ioctl.BTRFS_MAGIC:
        assert len(differing(source, target)) == 0
    os.pwrite(target, b"T", 0)
    assert [row.length for row in differing(source, target)] == [4]
    os.ftruncate(source, 0)
    os.ftruncate(target, 0)
    os.ftruncate(source, 1 << 20)
    os.posix_fallocate(target, 0, 1 << 20)
    assert len(differing(source, target)) == 0
    assert len(differing(None, target)) == 0
    os.pwrite(source, b"x" * BLOCK, 8192)
    assert [tuple(row) for row in differing(source, target)] == [(8192, BLOCK, True)]
    os.close(source)
    os.close(target)


def test_fresh_writes_are_seen(place):
    """What is still in memory counts: the maps are asked for after a sync."""
    one, two = place / "one", place / "two"
    source, target = opened(one), opened(two)
    os.ftruncate(source, 1 << 20)
    os.ftruncate(target, 1 << 20)
    os.pwrite(target, b"x", 700_000)
    assert [row.offset for row in differing(source, target)] == [700_000 // BLOCK * BLOCK]
    os.close(source)
    os.close(target)


# Tables.


def copied(source: Path, directory: Path) -> tuple[int, int, str]:
    directory.mkdir()
    data, table = opened(directory / "data"), opened(directory / "table")
    source_fd = opened(source)
    digest = contents.copy(source_fd, data, table)
    os.close(source_fd)
    return data, table, digest


def test_tables(place):
    one = place / "one"
    scattered(one, 300 << 20, 50, 3)
    first, first_table, first_digest = copied(one, place / "a")
    assert (place / "a" / "data").read_bytes() == one.read_bytes()
    assert (place / "a" / "data").stat().st_blocks * 512 < 2 << 20
    fd = opened(one)
    assert contents.equals_table(fd, first_table)
    for at in (0, 100 << 20, (300 << 20) - 5):
        old = os.pread(fd, 5, at)
        os.pwrite(fd, b"other", at)
        assert not contents.equals_table(fd, first_table)
        os.pwrite(fd, old, at)
        assert contents.equals_table(fd, first_table)
    os.pwrite(fd, b"other", 200 << 20)
    filled = next(row for row in differing(None, fd) if any(os.pread(fd, BLOCK, row.offset)))
    ioctl.punch_hole(fd, filled.offset, BLOCK)
    os.ftruncate(fd, (300 << 20) + 100)
    _second, second_table, second_digest = copied(one, place / "b")
    changes = contents.table_changes(
        contents.Table(first_table, first_digest), contents.Table(second_table, second_digest), (300 << 20) + 100
    )
    found = extents.collect((300 << 20) + 100, changes)
    assert sorted(tuple(row) for row in found) == sorted([(filled.offset, BLOCK, True), (200 << 20, BLOCK, False)])
    os.pwrite(first_table, b"\xff", 40)
    with pytest.raises(Damaged, match="table"):
        list(contents.table_changes(None, contents.Table(first_table, first_digest), 300 << 20))
    del first


def test_reading_beyond_the_end(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"abc")
    fd = opened(path)
    with pytest.raises(Damaged, match="ends at byte 3"):
        contents.read_exactly(fd, 0, memoryview(bytearray(4)))
    os.close(fd)


# Size does not matter.

FLOW = """
import sys
from pathlib import Path
sys.path.insert(0, ".")
from tests.agent.backends.replica import Replica, noise
place = Path(sys.argv[1])
a, b = Replica(place / "a"), Replica(place / "b")
with a.path.open("wb") as file:
    file.truncate(1 << 40)
for part in range(20):
    a.write(part * 50_000_000_000, noise(part, 1 << 20))
first = a.snapshot()
b.receive(a)
a.write(999_999_999_999, noise(3, 1 << 20))
second = a.snapshot()
delta = a.backend.delta_map(first.id, second.id)
assert delta.data_bytes <= (1 << 20) + 4096, delta.data_bytes
b.receive(a, first.id)
assert len(b.backend.delta_map(first.id, second.id)) == len(delta)
assert b.backend.examine().live.state.value == "unmodified"
assert a.backend.examine().live.state.value == "unmodified"
with a.path.open("rb") as one, b.path.open("rb") as other:
    for part in range(20):
        one.seek(part * 50_000_000_000), other.seek(part * 50_000_000_000)
        assert one.read(1 << 20) == other.read(1 << 20)
assert b.path.stat().st_blocks * 512 < 40 << 20
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_a_sparse_tebibyte_works_like_a_small_one(place):
    done = subprocess.run(
        [sys.executable, "-c", FLOW, str(place)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120 << 10, "KiB at most, of which numpy and Python are half"
