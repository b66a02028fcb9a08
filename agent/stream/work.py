"""What a transfer still has to do, and who has taken which part of it.

Chunks are handed out once, in the order of their offsets; what its taker could not finish is given back and goes
first. Several connections may share one `Work`. What is left is looked up a window at a time, in the journal's bool
for each chunk.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import numpy as np

from agent.stream.chunks import Bools, ChunkTable
from resilver.errors import ResilverError

WINDOW_CHUNKS: Final = 1 << 14


class Stopped(ResilverError):
    """The caller's stop event was set: everything that was received is journaled, and can be gone on with."""

    status = "CANCELLED"
    reasons = frozenset({"CANCELLED"})

    def __init__(self) -> None:
        super().__init__("CANCELLED", "the transfer was stopped")


class Chunk(NamedTuple):
    number: int
    offset: int
    length: int


class Work:
    """The chunks of a table that are not done."""

    def __init__(self, table: ChunkTable, done: Bools) -> None:
        self._table = table
        self._done = done
        self._lock = threading.Lock()
        self._again: deque[Chunk] = deque()
        self._ahead: deque[Chunk] = deque()
        self._cursor = 0
        self._taken_count = 0

    def take(self, chunks_max: int, bytes_max: int) -> list[Chunk]:
        """The next data chunks, at most so many and so much, but at least one; nothing if all have been taken."""
        taken: list[Chunk] = []
        size = 0
        with self._lock:
            while len(taken) < chunks_max and (queue := self._next_queue()):
                size += queue[0].length
                if taken and size > bytes_max:
                    break
                taken.append(queue.popleft())
            self._taken_count += len(taken)
        return taken

    def give_back(self, chunks: Iterable[Chunk]) -> None:
        """Takes back what was not finished; it is handed out before anything else."""
        back = list(chunks)
        with self._lock:
            self._again.extendleft(reversed(back))
            self._taken_count -= len(back)

    def finished(self, count: int) -> None:
        """So many chunks that were taken are in the stage."""
        with self._lock:
            self._taken_count -= count

    @property
    def complete(self) -> bool:
        """Whether all has been taken, and finished by whoever took it."""
        with self._lock:
            return not self._taken_count and not self._next_queue()

    @property
    def left(self) -> bool:
        """Whether there is a data chunk that nobody has taken."""
        with self._lock:
            return bool(self._next_queue())

    def zero_chunks(self) -> Iterator[Chunk]:
        """The zero ranges that are not done: nobody has to be asked for them."""
        for start in range(0, len(self._table), WINDOW_CHUNKS):
            yield from self._window(start, zero=True)

    def _next_queue(self) -> deque[Chunk]:
        while not self._ahead and self._cursor < len(self._table):
            self._ahead.extend(self._window(self._cursor, zero=False))
            self._cursor += WINDOW_CHUNKS
        return self._again or self._ahead

    def _window(self, start: int, *, zero: bool) -> list[Chunk]:
        numbers = start + np.flatnonzero(~self._done[start : start + WINDOW_CHUNKS])
        offsets, lengths, zeros = self._table.at(numbers)
        wanted = zeros == zero
        columns = numbers[wanted].tolist(), offsets[wanted].tolist(), lengths[wanted].tolist()
        return [Chunk(*row) for row in zip(*columns, strict=True)]
