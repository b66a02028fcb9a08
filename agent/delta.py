"""Delta maps: the blocks that differ between two snapshots, without the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

CAPACITY_BYTES_MAX: Final = (1 << 63) - 1


class DeltaRange(NamedTuple):
    """A stretch of the target, in bytes. `zero`: it reads as zero, and no data travels."""

    offset: int
    length: int
    zero: bool = False


@dataclass(frozen=True, slots=True)
class DeltaMap:
    """Ordered, non-overlapping ranges over a target of `capacity_bytes`; a million of them take 17 MB.

    `offsets` and `lengths` are int64 arrays in bytes, `zeros` a bool array, all of one length. Beyond the base's end
    a range that the map does not name reads as zero.
    """

    capacity_bytes: int
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    zeros: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, capacity_bytes: int, ranges: Iterable[DeltaRange]) -> DeltaMap:
        """Builds a map from ranges in order; raises ValueError if they overlap, are empty or leave the capacity."""
        rows = list(ranges)
        made = cls(
            capacity_bytes,
            np.fromiter((row.offset for row in rows), dtype=np.int64, count=len(rows)),
            np.fromiter((row.length for row in rows), dtype=np.int64, count=len(rows)),
            np.fromiter((row.zero for row in rows), dtype=np.bool_, count=len(rows)),
        )
        made.check()
        return made

    def check(self) -> None:
        """Raises ValueError unless the ranges are ordered, non-empty, disjoint and within the capacity."""
        if not 0 <= self.capacity_bytes <= CAPACITY_BYTES_MAX:
            raise ValueError(f"a delta map of a volume of {self.capacity_bytes} bytes")
        if not len(self.offsets):
            return
        # Never by a sum before it is known to fit: what wraps round would look small.
        if bool((self.lengths <= 0).any()) or bool((self.offsets < 0).any()):
            raise ValueError("a delta map has an empty range or one outside the volume")
        if bool((self.lengths > self.capacity_bytes - self.offsets).any()):
            raise ValueError("a delta map has a range outside the volume")
        if bool(((self.offsets + self.lengths)[:-1] > self.offsets[1:]).any()):
            raise ValueError("the ranges of a delta map overlap or are out of order")

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[DeltaRange]:
        for offset, length, zero in zip(self.offsets, self.lengths, self.zeros, strict=True):
            yield DeltaRange(int(offset), int(length), bool(zero))

    @property
    def data_bytes(self) -> int:
        """Bytes that travel."""
        return int(self.lengths[~self.zeros].sum())

    @property
    def zero_bytes(self) -> int:
        return int(self.lengths[self.zeros].sum())

    def starting_at(self, offset: int) -> DeltaMap:
        """The ranges whose offset is at or after the one given."""
        first = int(np.searchsorted(self.offsets, offset))
        return DeltaMap(self.capacity_bytes, self.offsets[first:], self.lengths[first:], self.zeros[first:])


def merged(*parts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The distinct numbers of several arrays, each of which is in order, in order.

    A stable sort joins runs that are sorted already; `np.unique` hashes, and takes twenty times as long.
    """
    every = np.concatenate(parts)
    every.sort(kind="stable")
    first = np.ones(len(every), np.bool_)
    np.not_equal(every[1:], every[:-1], out=first[1:])
    return every[first]
