"""Reading whole files where their extents cannot be shared: sparse copies, digest tables, comparisons.

A table stands beside each snapshot of a file system without shared extents: the BLAKE3 digest of every 4 KiB block,
32 bytes each, made in the pass that copies it. A block of zeros has a digest of zeros, so that a hole in the file is a
hole in the table. Two snapshots are compared by their tables, 1/128 of the data. The last block counts as if filled
up with zeros. A table has a digest of its own, kept in the snapshot's record, and is checked whenever it is read
through; files are walked in windows of 1 MiB, after each of which `advanced` is called, and holes are stepped over.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import blake3
import numpy as np
import numpy.typing as npt

from agent.delta import DeltaRange
from agent.disk.advance import advanced
from resilver.errors import Damaged

BLOCK_BYTES: Final = 4096
WINDOW_BYTES: Final = 1 << 20
DIGEST_BYTES: Final = 32
WINDOW_BLOCKS: Final = WINDOW_BYTES // BLOCK_BYTES
_ROW_BYTES: Final = WINDOW_BLOCKS * DIGEST_BYTES
_ROWS_AT_ONCE: Final = 16  # of 8 KiB: with more, most of what is compared of a sparse volume is holes
_WORDS: Final = BLOCK_BYTES // 8
_END: Final = (1 << 63) - 1
_ZEROS: Final = memoryview(bytes(WINDOW_BYTES))

Blocks = npt.NDArray[np.uint64]
Changes = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]


def _never() -> None:
    return None


def read_exactly(fd: int, offset: int, view: memoryview) -> None:
    """Fills the view; `Damaged("IO_ERROR")` if the file ends before."""
    got = 0
    while got < len(view):
        step = os.preadv(fd, [view[got:]], offset + got)
        if step == 0:
            raise Damaged("IO_ERROR", f"the file ends at byte {offset + got}, {len(view) - got} bytes too early")
        got += step


def write_all(fd: int, offset: int, view: memoryview) -> None:
    """Writes the whole view."""
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def announce(fd: int, ranges: Iterable[DeltaRange]) -> None:
    """Tells the kernel what will be read soon."""
    for row in ranges:
        if not row.zero:
            os.posix_fadvise(fd, row.offset, row.length, os.POSIX_FADV_WILLNEED)


def data_windows(fds: tuple[int, ...], start: int, end: int, step: int = WINDOW_BYTES) -> Iterator[tuple[int, int]]:
    """(offset, length) of the windows in [start, end) in which any of the files has data; aligned to `step`."""
    at = start
    while at < end:
        data = min(_next_data(fd, at) for fd in fds)
        at = max(at, data // step * step)
        if at >= end:
            return
        until = min((at // step + 1) * step, end)
        yield at, until - at
        at = until


def _next_data(fd: int, at: int) -> int:
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return _END
        if error.errno == errno.EINVAL:  # a file system that does not tell
            return at
        raise


def _next_hole(fd: int, at: int) -> int:
    try:
        return os.lseek(fd, at, os.SEEK_HOLE)
    except OSError as error:
        if error.errno in {errno.ENXIO, errno.EINVAL}:  # at its end by now; a file system that does not tell
            return _END
        raise


def _read_sparse(fd: int, offset: int, view: memoryview, data_until: int) -> int:
    """Fills a view of at most a window, with zeros for holes and beyond the end: to read a hole takes longest.

    `data_until`: up to where there was data when the stretch before was read; up to where there is now is answered. It
    is not asked for again before that: a tmpfs looks at every page up to the next hole each time. What has become a
    hole meanwhile is read as one.
    """
    at, end = offset, offset + len(view)
    while at < end:
        if at >= data_until:
            data = min(_next_data(fd, at), end)
            view[at - offset : data - offset] = _ZEROS[: data - at]
            if data == end:
                break
            at, data_until = data, _next_hole(fd, data)
        hole = min(data_until, end)
        while at < hole:
            step = os.preadv(fd, [view[at - offset : hole - offset]], at)
            if step == 0:  # it has become shorter
                view[at - offset :] = _ZEROS[: end - at]
                return 0
            at += step
    return data_until


class _Window:
    """One reused buffer that is read into, filled up with zeros beyond the end of the file."""

    def __init__(self) -> None:
        self._buffer = bytearray(WINDOW_BYTES)
        self._words = np.frombuffer(self._buffer, np.uint64).reshape(-1, _WORDS)
        self.view = memoryview(self._buffer)
        self._at = self._data_until = 0

    def read(self, fd: int | None, offset: int, length: int) -> Blocks:
        """The blocks of a stretch, 512 words each; without a file, zeros."""
        used = -(-length // BLOCK_BYTES)
        got = length if fd is not None else 0
        if fd is not None:
            known = self._data_until if offset == self._at else 0
            self._data_until = _read_sparse(fd, offset, self.view[:length], known)
            self._at = offset + length
        self.view[got : used * BLOCK_BYTES] = _ZEROS[: used * BLOCK_BYTES - got]
        return self._words[:used]


def _runs(states: npt.NDArray[np.int8], offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(offset, length, state) of the stretches of equal state among blocks that begin at an offset."""
    edges = np.flatnonzero(np.diff(states)) + 1
    bounds = [0, *edges.tolist(), len(states)]
    for first, last in itertools.pairwise(bounds):
        begin, finish = first * BLOCK_BYTES, min(last * BLOCK_BYTES, length)
        yield offset + begin, finish - begin, int(states[first])


def compare(
    base_fd: int | None, target_fd: int, start: int, end: int, *, check: Callable[[], None] = _never
) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, zero) of the blocks of the target that differ, by reading both."""
    mine, theirs = _Window(), _Window()
    fds = (target_fd,) if base_fd is None else (base_fd, target_fd)
    for offset, length in data_windows(fds, start, end):
        check()
        old, new = mine.read(base_fd, offset, length), theirs.read(target_fd, offset, length)
        states = (old != new).any(axis=1).astype(np.int8)
        states[(states == 1) & ~new.any(axis=1)] = 2
        for at, size, state in _runs(states, offset, length):
            if state:
                yield at, size, state == 2
        advanced()


def copy(source_fd: int, target_fd: int, table_fd: int | None, *, check: Callable[[], None] = _never) -> str:
    """Copies into an empty file, holes and blocks of zeros as holes; answers the table's digest.

    The caller sees to it that the source does not change meanwhile, or asks afterwards whether it did.
    """
    size = os.fstat(source_fd).st_size
    os.ftruncate(target_fd, size)
    if table_fd is not None:
        os.ftruncate(table_fd, -(-size // BLOCK_BYTES) * DIGEST_BYTES)
    window, digest = _Window(), blake3.blake3()
    for offset, length in data_windows((source_fd,), 0, size):
        check()
        blocks = window.read(source_fd, offset, length)
        filled = _filled(blocks)
        for at, run, state in _runs(filled.astype(np.int8), offset, length):
            if state:
                write_all(target_fd, at, window.view[at - offset : at - offset + run])
        if table_fd is not None and bool(filled.any()):
            row = _digests(window.view, filled)
            write_all(table_fd, offset // BLOCK_BYTES * DIGEST_BYTES, memoryview(row)[: len(filled) * DIGEST_BYTES])
            digest.update(_row_key(offset) + row)
        advanced()
    return digest.hexdigest()


def _filled(blocks: Blocks) -> npt.NDArray[np.bool_]:
    """Which blocks hold anything but zeros."""
    return np.asarray(blocks.any(axis=1), np.bool_)


def _row_key(offset: int) -> bytes:
    return (offset // WINDOW_BYTES).to_bytes(8, "little")


def _digests(view: memoryview, filled: npt.NDArray[np.bool_]) -> bytes:
    """One row of a table: the digests of a window's blocks, zeros for blocks of zeros."""
    row = bytearray(_ROW_BYTES)
    for index in np.flatnonzero(filled).tolist():
        block = view[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
        row[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] = blake3.blake3(block).digest()
    return bytes(row)


class Table:
    """A table that is being read through, row by row, and checked at the end."""

    def __init__(self, fd: int, digest: str) -> None:
        self.fd = fd
        self._wanted = digest
        self._digest = blake3.blake3()

    def rows(self, first_row: int, count: int) -> npt.NDArray[np.uint64]:
        """Digests of `count` windows, four words each, shaped (blocks, 4)."""
        raw = bytearray(count * _ROW_BYTES)
        _read_sparse(self.fd, first_row * _ROW_BYTES, memoryview(raw), 0)
        words = np.frombuffer(raw, np.uint64).reshape(count, -1)
        for row in np.flatnonzero(words.any(axis=1)).tolist():
            self._digest.update((first_row + row).to_bytes(8, "little") + words[row].tobytes())
        return words.reshape(-1, 4)

    def finish(self) -> None:
        """Raises `Damaged("IO_ERROR")` if what was read is not what was written."""
        if self._digest.hexdigest() != self._wanted:
            raise Damaged("IO_ERROR", "a table of block digests beside a snapshot is damaged; a full copy replaces it")


def table_changes(base: Table | None, target: Table, target_size: int) -> Iterator[Changes]:
    """What differs between two snapshots by their tables; without a base, what is not zero in the target."""
    fds = (target.fd,) if base is None else (base.fd, target.fd)
    ends = max(os.fstat(fd).st_size for fd in fds)
    for offset, _length in data_windows(fds, 0, ends, _ROW_BYTES * _ROWS_AT_ONCE):
        row = offset // _ROW_BYTES
        new = target.rows(row, _ROWS_AT_ONCE)
        old = base.rows(row, _ROWS_AT_ONCE) if base is not None else np.zeros_like(new)
        states = (old != new).any(axis=1).astype(np.int8)
        states[(states == 1) & ~new.any(axis=1)] = 2
        start = row * WINDOW_BYTES
        found = [run for run in _runs(states, start, max(0, target_size - start)) if run[2] and run[1] > 0]
        if found:
            made = np.array(found, np.int64)
            yield made[:, 0], made[:, 1], made[:, 2] == 2
    target.finish()
    if base is not None:
        base.finish()


def equals_table(fd: int, table_fd: int, *, check: Callable[[], None] = _never) -> bool:
    """Whether a file of the same size has the contents that a table tells; reads the file, stops at a difference."""
    window = _Window()
    size = os.fstat(fd).st_size
    table = Table(table_fd, "")
    covered = -1
    for offset, length in data_windows((fd,), 0, size):
        check()
        row = offset // WINDOW_BYTES
        if not _rows_empty(table_fd, covered + 1, row):
            return False
        covered = row
        filled = _filled(window.read(fd, offset, length))
        if table.rows(row, 1).tobytes() != _digests(window.view, filled):
            return False
        advanced()
    return _rows_empty(table_fd, covered + 1, -(-size // WINDOW_BYTES))


def _rows_empty(table_fd: int, first: int, last: int) -> bool:
    """Whether the rows [first, last) of a table are zeros: those windows of the file are holes."""
    table = Table(table_fd, "")
    for offset, length in data_windows((table_fd,), first * _ROW_BYTES, last * _ROW_BYTES, _ROW_BYTES * _ROWS_AT_ONCE):
        low = max(offset // _ROW_BYTES, first)
        high = min(-(-(offset + length) // _ROW_BYTES), last)
        if bool(table.rows(low, high - low).any()):
            return False
    return True
