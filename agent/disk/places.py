"""Where each block of a stretch of a file stands on the disk: what two files share there, and how scattered it is.

A *seam* is where one block of data follows another in the file but not on the disk: an extent more that need not be.
Holes make no seams, so that a sparse file is not taken for a fragmented one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from agent.disk import extents, ioctl
from agent.disk.extents import DATA, END, Int64s, Kinds

Mask = npt.NDArray[np.bool_]

# What Btrfs puts into one extent where it compresses: such seams stay.
_BTRFS_EXTENT_BYTES: Final = 128 << 10


@dataclass(frozen=True, slots=True)
class Places:
    """The blocks from a byte offset on, `block` bytes each."""

    low: int
    block: int
    kind: Kinds
    disk: Int64s
    shift: Int64s

    @property
    def data(self) -> Mask:
        """Which blocks hold data."""
        return np.asarray(self.kind == DATA, np.bool_)

    def shared(self, other: Places) -> Mask:
        """Which blocks of data stand at the same place in both."""
        same = (self.disk == other.disk) & (self.shift == other.shift)
        return np.asarray(self.data & other.data & same, np.bool_)

    def seams(self, mask: Mask) -> int:
        """How many there are among these blocks."""
        both = mask[1:] & mask[:-1]
        return int((both & ((self.disk[1:] != self.disk[:-1]) | (self.shift[1:] != self.shift[:-1]))).sum())

    def ranges(self, mask: Mask, bytes_max: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the runs of these blocks, none longer than that."""
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)) * self.block + self.low
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            for at in range(start, end, bytes_max):
                yield at, min(bytes_max, end - at)


def places(fd: int, low: int, high: int, block: int) -> Places:
    """The blocks in [low, high). The last block of a file that fills it only in part counts as without data."""
    points = np.arange(low, high, block, dtype=np.int64)
    found = Places(
        low, block, np.zeros(len(points), np.int8), np.zeros(len(points), np.int64), np.zeros(len(points), np.int64)
    )
    end = min(high, os.fstat(fd).st_size // block * block)
    source = extents.source_of(fd, end)
    at = _beginning(fd, low) if low < end else end
    while at < end:
        held, known_to = source.fetch(at)
        until = min(known_to, end)
        inside = (points >= at) & (points < until)
        kind, disk, shift = extents.at_points(held.clipped(low, end), points[inside])
        found.kind[inside], found.disk[inside], found.shift[inside] = kind, disk, shift
        at = until
    return found


def _beginning(fd: int, low: int) -> int:
    """Where to begin to ask: Btrfs finds an extent by where it begins, which may be before."""
    if ioctl.fs_magic(fd) != ioctl.BTRFS_MAGIC:
        return low
    rows = ioctl.fiemap(fd, low, 1)
    return min(low, int(rows[0]["logical"])) if len(rows) else low


def seams_by_part(fd: int, part_bytes: int) -> Int64s:
    """For each part of a file, how many seams it has more than it need have."""
    size = os.fstat(fd).st_size
    count = np.zeros(-(-size // part_bytes), np.int64)
    source = extents.source_of(fd)
    at, end, kind, disk, shift = 0, -1, 0, 0, 0
    while at < size:
        held, known_to = source.fetch(at)
        at = END if known_to >= size else known_to
        held = held.clipped(0, size)
        if not len(held.start):
            continue
        follows = held.start == np.concatenate(([end], held.end[:-1]))
        both = (held.kind == DATA) & (np.concatenate(([kind], held.kind[:-1])) == DATA)
        moved = (held.disk != np.concatenate(([disk], held.disk[:-1]))) | (
            held.shift != np.concatenate(([shift], held.shift[:-1]))
        )
        count += np.bincount(held.start[follows & both & moved] // part_bytes, minlength=len(count))
        end, kind, disk, shift = (int(each[-1]) for each in (held.end, held.kind, held.disk, held.shift))
    if ioctl.fs_magic(fd) == ioctl.BTRFS_MAGIC:
        return np.maximum(count - part_bytes // _BTRFS_EXTENT_BYTES, 0)
    return count
