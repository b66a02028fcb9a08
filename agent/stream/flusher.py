"""Syncs a stage in the background and journals what a sync has covered; for several writers at once.

While one mark's worth is being synced the next one is written; when that is full too, the writer waits. So what a
crash can lose is at most two marks: 16 MiB, whether the writes are scattered or sequential. (A larger mark for
sequential writes would save little, and would break the promise of how much is fetched again.)

An error of the disk ends everything: after a failed fsync the kernel may call the pages clean, so a later sync that
succeeds would prove nothing.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from agent.backends.base import Stage
from agent.stream.chunks import CHUNK_BYTES_MAX
from agent.stream.journal import Journal

MARK_BYTES: Final = 4 << 20
MARK_CHUNKS: Final = 4096


class Flusher:
    """Chunks on their way to the disk; `finish` or `close` ends it."""

    def __init__(self, stage: Stage, journal: Journal) -> None:
        self._stage = stage
        self._journal = journal
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream-flush")
        self._adding = threading.Lock()
        self._running: Future[None] | None = None
        self._numbers: list[int] = []
        self._digests: list[bytes] = []
        self._bytes = 0

    def add(self, number: int, digest: bytes, data_bytes: int) -> None:
        """Takes a chunk that has been written; may wait for the disk. Raises what the last sync raised."""
        with self._adding:
            self._numbers.append(number)
            self._digests.append(digest)
            self._bytes += data_bytes
            if self._bytes > MARK_BYTES - CHUNK_BYTES_MAX or len(self._numbers) >= MARK_CHUNKS:
                self._hand_over()

    def finish(self) -> None:
        """Returns when everything that was added is on the disk and journaled."""
        with self._adding:
            self._hand_over()
            self._wait()

    def close(self) -> None:
        """Ends the thread; what was not handed over is not journaled."""
        self._pool.shutdown(wait=True)

    def _hand_over(self) -> None:
        self._wait()
        if self._numbers:
            self._running = self._pool.submit(self._flush, self._numbers, self._digests)
            self._numbers, self._digests, self._bytes = [], [], 0

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()

    def _flush(self, numbers: list[int], digests: list[bytes]) -> None:
        self._stage.sync()
        self._journal.append_many(numbers, digests)
