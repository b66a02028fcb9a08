"""What differs between two files that share extents, found from their extent maps: no data is read.

Two files are compared only while both are immutable, or under a lease, and both open: equal addresses prove equal
bytes only then. Rules:

* A stretch is equal if both sides read as zero there (hole, or unwritten), or both stand at the same place on disk.
* UNKNOWN, DELALLOC, INLINE and ENCODED extents are never equal by their address. Such stretches are *uncertain*, and
  their contents are compared instead; what remains is exact.
* Btrfs: as root its own tree is searched (disk address and offset within the extent: exact for compressed ones too).
* Sizes do not show in a map: the base reads as zero beyond its end, and nothing is named beyond the target's.
* XFS splits records at sharing boundaries and may join them again: only stretches are compared, never records.

Both maps are walked in windows of at most 65,536 records a side, so that memory does not grow with the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from agent.delta import DeltaMap, merged
from agent.disk import contents, ioctl

Int64s = npt.NDArray[np.int64]
Kinds = npt.NDArray[np.int8]

ZERO: Final = 0
DATA: Final = 1
UNCERTAIN: Final = 2

# How a stretch of the target is to the base.
EQUAL: Final = 0
DIFFERENT: Final = 1
ZEROED: Final = 2
DOUBTFUL: Final = 3

END: Final = (1 << 63) - 1

# Most images have few extents, and a buffer for 65,536 costs more to get than such a map to read.
_RECORDS_FIRST: Final = 1024
_SEARCH_FIRST_BYTES: Final = 64 << 10

_NEVER_EQUAL: Final = (
    ioctl.EXTENT_UNKNOWN
    | ioctl.EXTENT_DELALLOC
    | ioctl.EXTENT_ENCODED
    | ioctl.EXTENT_ENCRYPTED
    | ioctl.EXTENT_NOT_ALIGNED
    | ioctl.EXTENT_INLINE
    | ioctl.EXTENT_TAIL
)


@dataclass(frozen=True, slots=True)
class Extents:
    """A stretch of a file's map, in order: bytes [start, end) are of a kind, at the place (disk, shift).

    `shift` is the address minus the logical offset, so that equal pairs mean equal places. Gaps are holes.
    """

    start: Int64s
    end: Int64s
    kind: Kinds
    disk: Int64s
    shift: Int64s

    def clipped(self, low: int, high: int) -> Extents:
        """The part within [low, high)."""
        first = int(np.searchsorted(self.end, low, side="right"))
        last = int(np.searchsorted(self.start, high, side="left"))
        rows = slice(first, max(first, last))
        return Extents(
            np.maximum(self.start[rows], low),
            np.minimum(self.end[rows], high),
            self.kind[rows],
            self.disk[rows],
            self.shift[rows],
        )


NOTHING: Final = Extents(
    np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int8), np.empty(0, np.int64), np.empty(0, np.int64)
)


class Source(Protocol):
    """Where a file's map comes from."""

    def fetch(self, start: int) -> tuple[Extents, int]:
        """The next extents at or after `start`, and up to where they tell the whole truth (END: to the last)."""


class FiemapSource:
    """The map as every file system tells it; `end` is how far anybody wants to know it."""

    def __init__(self, fd: int, records_max: int = ioctl.FIEMAP_RECORDS_MAX, end: int = END) -> None:
        self._fd = fd
        self._records_max = records_max
        self._asked = min(_RECORDS_FIRST, records_max)
        self._end = end

    def fetch(self, start: int) -> tuple[Extents, int]:
        asked, self._asked = self._asked, self._records_max
        rows = ioctl.fiemap(self._fd, start, asked, self._end)
        if not len(rows):
            return NOTHING, END
        logical = rows["logical"].astype(np.int64)
        flags = rows["flags"]
        kind = np.full(len(rows), DATA, np.int8)
        kind[(flags & _NEVER_EQUAL) != 0] = UNCERTAIN
        kind[(flags & ioctl.EXTENT_UNWRITTEN) != 0] = ZERO
        end = logical + rows["length"].astype(np.int64)
        shift = rows["physical"].astype(np.int64) - logical
        whole = bool(flags[-1] & ioctl.EXTENT_LAST) or len(rows) < asked
        return Extents(logical, end, kind, np.zeros(len(rows), np.int64), shift), END if whole else int(end[-1])


class BtrfsSource:
    """The map as Btrfs keeps it, compressed extents included."""

    def __init__(self, fd: int, end: int = END) -> None:
        self._fd = fd
        self._inode = os.fstat(fd).st_ino
        self._end = end
        self._buffer_bytes = _SEARCH_FIRST_BYTES
        os.fsync(fd)

    def fetch(self, start: int) -> tuple[Extents, int]:
        rows = ioctl.btrfs_extents(self._fd, self._inode, start, self._end, self._buffer_bytes)
        self._buffer_bytes = ioctl.SEARCH_BUFFER_BYTES
        if not len(rows):
            return NOTHING, END
        logical = rows["logical"].astype(np.int64)
        disk = rows["disk"].astype(np.int64)
        kind = np.full(len(rows), DATA, np.int8)
        kind[(rows["type"] == ioctl.BTRFS_PREALLOCATED) | (disk == 0)] = ZERO
        kind[rows["type"] == ioctl.BTRFS_INLINE] = UNCERTAIN
        end = logical + rows["length"].astype(np.int64)
        # A buffer that is full says nothing of what follows; the next fetch does.
        return Extents(logical, end, kind, disk, rows["offset"].astype(np.int64) - logical), int(end[-1])


def source_of(fd: int, end: int = END) -> Source:
    """The best source for an open file."""
    if ioctl.fs_magic(fd) == ioctl.BTRFS_MAGIC:
        try:
            ioctl.btrfs_extents(fd, os.fstat(fd).st_ino, END, buffer_bytes=_SEARCH_FIRST_BYTES)
        except PermissionError:
            return FiemapSource(fd, end=end)
        return BtrfsSource(fd, end)
    return FiemapSource(fd, end=end)


class _Walker:
    """Hands out a map from the start to the end, window by window."""

    def __init__(self, source: Source | None, size: int) -> None:
        self._source = source
        self._size = size
        self._held = NOTHING
        self.known_to = 0 if source is not None else END

    def fill(self, at: int) -> None:
        """Sees to it that something after `at` is known."""
        while self._source is not None and self.known_to <= at:
            self._held, self.known_to = self._source.fetch(max(at, self.known_to))
            if self.known_to >= self._size:
                self.known_to = END

    def take(self, low: int, high: int) -> Extents:
        return self._held.clipped(low, min(high, self._size)) if low < self._size else NOTHING


def segments(base: Source | None, base_size: int, target: Source, target_size: int) -> Iterator[tuple[Int64s, Kinds]]:
    """Window after window: the bounds of stretches (n + 1 offsets) and how each is to the base (n states)."""
    old, new = _Walker(base, base_size), _Walker(target, target_size)
    at = 0
    while at < target_size:
        old.fill(at)
        new.fill(at)
        until = min(old.known_to, new.known_to, target_size)
        yield _compare(old.take(at, until), new.take(at, until), at, until)
        at = until


def _compare(old: Extents, new: Extents, low: int, high: int) -> tuple[Int64s, Kinds]:
    bounds = merged(old.start, old.end, new.start, new.end, np.array([low, high], np.int64))
    points = bounds[:-1]
    old_kind, old_disk, old_shift = at_points(old, points)
    new_kind, new_disk, new_shift = at_points(new, points)
    state = np.full(len(points), DIFFERENT, np.int8)
    state[(new_kind == ZERO)] = ZEROED
    state[(old_kind == UNCERTAIN) | (new_kind == UNCERTAIN)] = DOUBTFUL
    same_place = (old_disk == new_disk) & (old_shift == new_shift)
    state[(old_kind == new_kind) & ((old_kind == ZERO) | ((old_kind == DATA) & same_place))] = EQUAL
    return _joined(bounds, state)


def at_points(extents: Extents, points: Int64s) -> tuple[Kinds, Int64s, Int64s]:
    """Kind and place of the map at each point."""
    kind = np.zeros(len(points), np.int8)
    disk = np.zeros(len(points), np.int64)
    shift = np.zeros(len(points), np.int64)
    if len(extents.start):
        row = np.searchsorted(extents.start, points, side="right") - 1
        inside = (row >= 0) & (points < extents.end[row])
        kind[inside] = extents.kind[row[inside]]
        disk[inside] = extents.disk[row[inside]]
        shift[inside] = extents.shift[row[inside]]
    return kind, disk, shift


def _joined(bounds: Int64s, state: Kinds) -> tuple[Int64s, Kinds]:
    """Neighbours of one state become one stretch."""
    keep = np.ones(len(state), np.bool_)
    keep[1:] = state[1:] != state[:-1]
    return np.concatenate((bounds[:-1][keep], bounds[-1:])), state[keep]


def _never() -> None:
    return None


def changes(
    base_fd: int | None, target_fd: int, *, check: Callable[[], None] = _never
) -> Iterator[tuple[Int64s, Int64s, npt.NDArray[np.bool_]]]:
    """Windows of (offsets, lengths, zeros) that differ, in order; adjacent ranges may meet at a window's edge.

    `check` is called between windows, and stops the comparison by raising.
    """
    block = os.fstatvfs(target_fd).f_bsize
    target_size = os.fstat(target_fd).st_size
    base_size = os.fstat(base_fd).st_size if base_fd is not None else 0
    base = source_of(base_fd) if base_fd is not None else None
    # Within the base's last block both sides read as zero beyond its end: the kernel sees to that.
    base_bound = -(-base_size // block) * block
    for bounds, state in segments(base, base_bound, source_of(target_fd), target_size):
        check()
        offsets, lengths, states = bounds[:-1], np.diff(bounds), state
        if bool((states == DOUBTFUL).any()):
            rows = zip(offsets.tolist(), lengths.tolist(), states.tolist(), strict=True)
            offsets, lengths, states = _resolved(base_fd, target_fd, rows, check)
        differ = states != EQUAL
        if bool(differ.any()):
            yield offsets[differ], lengths[differ], states[differ] == ZEROED


def _resolved(
    base_fd: int | None, target_fd: int, rows: Iterable[tuple[int, int, int]], check: Callable[[], None]
) -> tuple[Int64s, Int64s, Kinds]:
    """Replaces each doubtful stretch by what a comparison of contents finds in it."""
    known: list[tuple[int, int, int]] = []
    for offset, length, state in rows:
        if state != DOUBTFUL:
            known.append((offset, length, state))
            continue
        found = contents.compare(base_fd, target_fd, offset, offset + length, check=check)
        known.extend((at, size, ZEROED if zero else DIFFERENT) for at, size, zero in found)
    made = np.array(known, np.int64).reshape(-1, 3)
    return made[:, 0], made[:, 1], made[:, 2].astype(np.int8)


def collect(capacity_bytes: int, windows: Iterator[tuple[Int64s, Int64s, npt.NDArray[np.bool_]]]) -> DeltaMap:
    """One map of all windows; ranges of one kind that touch become one.

    At its peak it takes little more than the map and half of it again: each column's windows go when they are joined,
    and where nothing touches, which is the rule where there are many, that is the map.
    """
    columns: tuple[list[npt.NDArray[Any]], ...] = ([], [], [])
    for window in windows:
        for column, part in zip(columns, window, strict=True):
            column.append(part)
    if not columns[0]:
        return DeltaMap.of(capacity_bytes, ())
    offsets, lengths, zeros = (_joined_up(column) for column in columns)
    starts = np.ones(len(offsets), np.bool_)
    starts[1:] = (offsets[1:] != offsets[:-1] + lengths[:-1]) | (zeros[1:] != zeros[:-1])
    if not bool(starts.all()):
        first = np.flatnonzero(starts)
        offsets, lengths, zeros = offsets[first], np.add.reduceat(lengths, first), zeros[first]
    made = DeltaMap(capacity_bytes, offsets, lengths, zeros)
    made.check()
    return made


def _joined_up(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The parts as one, which are let go."""
    made = np.concatenate(parts)
    parts.clear()
    return made
