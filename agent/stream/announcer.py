"""Tells the kernel what one connection will read soon, from a thread of its own.

Announcing can block for as long as the disk's queue is full, so it must not stand in the sender's way. The thread runs
32 to 256 ranges ahead of the sender, and not more than 32 MiB: further would only push out what others have cached.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Final

from agent.backends.base import SnapshotReader
from agent.delta import DeltaRange
from agent.stream.frame import Range
from resilver.errors import ResilverError

AHEAD_RANGES_MIN: Final = 32
AHEAD_RANGES_MAX: Final = 256
AHEAD_BYTES_MAX: Final = 32 << 20


class Announcer:
    """Ranges go in as they are asked for, `sent` says how far the sender is; `close` returns when the thread ended."""

    def __init__(self, reader: SnapshotReader, name: str) -> None:
        self._reader = reader
        self._changed = threading.Condition()
        self._queue: deque[Range] = deque()
        self._ahead: deque[int] = deque()
        self._ahead_bytes = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"stream-announce-{name}", daemon=True)
        self._thread.start()

    def add(self, ranges: Sequence[Range]) -> None:
        with self._changed:
            self._queue.extend(ranges)
            self._changed.notify()

    def sent(self, count: int) -> None:
        """The next so many ranges, in the order of `add`, have been read."""
        with self._changed:
            for _ in range(count):
                if self._ahead:
                    self._ahead_bytes -= self._ahead.popleft()
                else:
                    self._queue.popleft()  # read before it was announced: too late to be of use
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while ranges := self._next():
                self._reader.announce(ranges)
        except ResilverError:
            # Advice that the disk does not take costs speed alone; what cannot be read will be said by the read.
            return

    def _next(self) -> list[DeltaRange]:
        """The ranges to announce now; waits until there is room for a few at once. Nothing when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room())
            ranges: list[DeltaRange] = []
            while not self._closed and self._queue and self._fits(self._queue[0]):
                offset, length = self._queue.popleft()
                self._ahead.append(length)
                self._ahead_bytes += length
                ranges.append(DeltaRange(offset, length))
            return ranges

    def _has_room(self) -> bool:
        return (
            bool(self._queue) and len(self._ahead) <= AHEAD_RANGES_MAX - AHEAD_RANGES_MIN and self._fits(self._queue[0])
        )

    def _fits(self, nearest: Range) -> bool:
        return len(self._ahead) < AHEAD_RANGES_MAX and self._ahead_bytes + nearest.length <= AHEAD_BYTES_MAX
