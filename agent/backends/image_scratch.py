"""Small scattered pieces on their way into a stage on XFS: written one after the other, then shared into place.

A block that is written into a clone costs XFS room of its own, a write of its own, and at the end of that write an
exchange of the block in the file's map. Blocks that are written one behind the other into a second file are one write;
the exchange is then ordered from here (FICLONERANGE), and is all that is left to pay for each.

On Btrfs the same would keep each run of blocks whole for as long as one of them is in use, so it is not done there.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect, insort
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from agent.disk import contents, ioctl
from agent.disk.durable import FILE_MODE

SMALL_BYTES_MAX: Final = 64 << 10
"""What is larger is one write by itself."""


class _Piece(NamedTuple):
    offset: int
    at: int
    """Where its bytes are in the scratch file."""
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def _offset(piece: _Piece) -> int:
    return piece.offset


class Scratch:
    """A file without a name, which is gone with its descriptor, however that ends; usable from several threads.

    Of what is waiting no two pieces overlap, and nobody else may write there: `settle` comes before either.
    """

    def __init__(self, directory: Path, target_fd: int) -> None:
        self._target_fd: Final = target_fd
        self._block_bytes: Final = os.fstatvfs(target_fd).f_bsize
        self._placing: Final = threading.Lock()
        self._lock: Final = threading.Lock()
        self._waiting: list[_Piece] = []
        self._end = 0
        self._fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, FILE_MODE)

    def takes(self, offset: int, length: int) -> bool:
        """Whether a piece is small, and made of whole blocks: nothing else can be shared."""
        return 0 < length <= SMALL_BYTES_MAX and not (offset % self._block_bytes or length % self._block_bytes)

    def settle(self, offset: int, length: int) -> None:
        """Places what is waiting if some of it lies in that range, so that what comes now comes after it."""
        with self._lock:
            after = bisect(self._waiting, offset, key=_offset)
            overlaps = (after > 0 and self._waiting[after - 1].end > offset) or (
                after < len(self._waiting) and self._waiting[after].offset < offset + length
            )
        if overlaps:
            self.place()

    def write(self, offset: int, data: memoryview) -> None:
        """Takes a piece; the target has it when `place` has returned."""
        with self._lock:
            at = self._end
            self._end += len(data)
        contents.write_all(self._fd, at, data)
        with self._lock:
            insort(self._waiting, _Piece(offset, at, len(data)))

    def place(self) -> None:
        """Returns when the target has all that was written before the call; its map is on the disk with its next sync.

        What could not be placed is tried again by the next call. After a sync that failed that proves nothing, and
        whoever journals does not ask again (`stream/flusher.py`).
        """
        with self._placing:
            with self._lock:
                pieces = list(self._waiting)
            if not pieces:
                return
            # Before the target's map names the blocks they are on the disk.
            os.fdatasync(self._fd)
            for piece in _joined(pieces):
                ioctl.clone_range(self._target_fd, piece.offset, self._fd, piece.at, piece.length)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with self._lock:
                placed = set(pieces)
                self._waiting = [piece for piece in self._waiting if piece not in placed]

    def close(self) -> None:
        """What was not placed is lost."""
        os.close(self._fd)


def _joined(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """Neighbours in both files as one."""
    last: _Piece | None = None
    for piece in pieces:
        if last is not None and (piece.offset, piece.at) == (last.end, last.at + last.length):
            last = last._replace(length=last.length + piece.length)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last
