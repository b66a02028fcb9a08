"""A delta map cut into chunks: what is asked for, written, journaled and read back as one.

A data range is cut into pieces of at most 1 MiB from its own start; a zero range is one chunk, however long. A chunk
is named by its number in the order of offsets, so that "done" is one bool for each. Nothing is laid out chunk by
chunk: a full copy of a TiB has a million of them, and eight bytes for each *range* is all that is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from agent.delta import DeltaMap
from agent.stream.frame import PAYLOAD_BYTES_MAX
from resilver.errors import Exhausted

CHUNK_BYTES_MAX: Final = PAYLOAD_BYTES_MAX
CHUNKS_MAX: Final = 1 << 28
"""256 TiB of data; each takes a byte of memory while a transfer runs."""

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """`first[i]` is the number of range i's first chunk; the last entry is the number of chunks."""

    delta: DeltaMap
    first: Ints

    @classmethod
    def of(cls, delta: DeltaMap) -> ChunkTable:
        counts = np.where(delta.zeros, 1, -(-delta.lengths // CHUNK_BYTES_MAX))
        count = int(counts.sum())
        if count > CHUNKS_MAX:
            said = f"a delta of {count:,} chunks of 1 MiB; at most {CHUNKS_MAX:,} are taken in one transfer"
            raise Exhausted("TOO_LARGE", said)
        first = np.zeros(len(delta) + 1, dtype=np.int64)
        np.cumsum(counts, out=first[1:])
        return cls(delta, first)

    def __len__(self) -> int:
        return int(self.first[-1])

    def at(self, numbers: Ints) -> tuple[Ints, Ints, Bools]:
        """Offsets, lengths and whether they are zero, of chunks by their numbers."""
        if not len(numbers):
            return numbers, numbers, np.zeros(0, dtype=np.bool_)
        rows = np.searchsorted(self.first, numbers, side="right") - 1
        within = (numbers - self.first[rows]) * CHUNK_BYTES_MAX
        zeros = self.delta.zeros[rows]
        left = self.delta.lengths[rows] - within
        return self.delta.offsets[rows] + within, np.where(zeros, left, np.minimum(left, CHUNK_BYTES_MAX)), zeros

    def numbers_of(self, offsets: Ints, lengths: Ints) -> Ints:
        """The numbers of chunks by where they are; -1 for what is no chunk of this table."""
        if not len(self.delta) or not len(offsets):
            return np.full(len(offsets), -1, dtype=np.int64)
        rows = np.clip(np.searchsorted(self.delta.offsets, offsets, side="right") - 1, 0, None)
        guess = self.first[rows] + (offsets - self.delta.offsets[rows]) // CHUNK_BYTES_MAX
        guess = np.clip(guess, 0, len(self) - 1)
        at, size, _zeros = self.at(guess)
        return np.where((at == offsets) & (size == lengths), guess, -1)
