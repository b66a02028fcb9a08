"""What of a stage is safely on the disk, so that a transfer goes on where a crash left it.

Two files in the stage's directory: `map.bin` (see `mapfile.py`) and `journal.bin`::

    header:  magic 4 | version 4 | chunk size 8 | key 32 | check 32
    batches: magic 4 | count 4 | BLAKE3 of the records 32 | records: offset 8, length 8, digest 32 each

The rules:

* A record is appended only after the data that it speaks of has been synced; `append_many` returns when the records
  are on the disk themselves. So a record that can be read is true, whenever the power went.
* The key (base, target, capacity, digest of the map) does not name the resync: another run for the same pair goes on
  with the same stage. A journal of another key is replaced by an empty one.
* Records are checked a batch at a time. What follows the last sound batch is a torn tail: it is cut off, and fetched
  again. A batch is at most what one sync covered.
* The digest is of the bytes as they were sent; a zero range has none (zeros). Reading back compares with it.

One owner, one thread at a time. In memory stands one byte for each chunk, never the records.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from agent.delta import DeltaMap
from agent.disk.durable import disk_errors, open_own
from agent.stream.chunks import CHUNK_BYTES_MAX, Bools, ChunkTable, Ints
from agent.stream.frame import NO_DIGEST
from agent.stream.mapfile import JournalKey, load_map, replace_file, save_map, write_all
from resilver.errors import Damaged

MAP_FILE: Final = "map.bin"
JOURNAL_FILE: Final = "journal.bin"
BATCH_RECORDS_MAX: Final = 1 << 16

_MAGIC: Final = b"RSVJ"
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<4sIQ32s")
_HEAD_BYTES: Final = _HEAD.size + 32
_BATCH_MAGIC: Final = b"RSVR"
_BATCH: Final = struct.Struct("<4sI32s")
_RECORD: Final = np.dtype([("offset", "<i8"), ("length", "<i8"), ("digest", "u1", 32)])


class Record(NamedTuple):
    """A chunk that is on the disk; `digest` is NO_DIGEST for a zero range."""

    offset: int
    length: int
    digest: bytes


class Journal:
    """The journal of one stage; `open` or `load` make it, `close` ends it."""

    def __init__(self, path: Path, fd: int, key: JournalKey, table: ChunkTable) -> None:
        self._path = path
        self._fd = fd
        self._end = _HEAD_BYTES
        self._lost = False
        self.key: Final = key
        self.table: Final = table
        self.done: Final[Bools] = np.zeros(len(table), dtype=np.bool_)
        self.done_bytes = 0

    @classmethod
    def open(cls, directory: Path, key: JournalKey, delta: DeltaMap) -> Journal:
        """The journal of that key, gone on with if it is there, made anew (with the map) if not."""
        known = load_map(directory / MAP_FILE)
        if known is None or known[0] != key:
            save_map(directory / MAP_FILE, key.base, key.target, delta)
        return cls._opened(directory / JOURNAL_FILE, key, delta)

    @classmethod
    def load(cls, directory: Path) -> Journal | None:
        """The journal that stands in the directory, with the map it was made for; None if there is no sound map."""
        known = load_map(directory / MAP_FILE)
        return None if known is None else cls._opened(directory / JOURNAL_FILE, *known)

    @classmethod
    def _opened(cls, path: Path, key: JournalKey, delta: DeltaMap) -> Journal:
        head = _HEAD.pack(_MAGIC, _VERSION, CHUNK_BYTES_MAX, key.digest())
        head += blake3(head).digest()
        with disk_errors(path):
            if _first_bytes(path) != head:
                replace_file(path, lambda fd: write_all(fd, head))
            table = ChunkTable.of(delta)
            journal = cls(path, open_own(path, os.O_RDWR), key, table)
        try:
            journal._read()
        except BaseException:
            journal.close()
            raise
        return journal

    @property
    def delta(self) -> DeltaMap:
        return self.table.delta

    @property
    def complete(self) -> bool:
        """Whether every range of the map is on the disk."""
        return bool(self.done.all())

    def append_many(self, numbers: Sequence[int], digests: Sequence[bytes]) -> None:
        """Records chunks whose data has been synced; returns when the records are on the disk.

        After an error nothing more is taken: what the disk holds is only known by reading it again.
        """
        if self._lost:
            raise Damaged("IO_ERROR", f"{self._path}: a write to the journal has failed before", path=str(self._path))
        self._lost = True
        for start in range(0, len(numbers), BATCH_RECORDS_MAX):
            part = slice(start, start + BATCH_RECORDS_MAX)
            self._append(np.asarray(numbers[part], dtype=np.int64), digests[part])
        with disk_errors(self._path):
            os.fdatasync(self._fd)
        self._mark(np.asarray(numbers, dtype=np.int64))
        self._lost = False

    def records(self) -> Iterator[list[Record]]:
        """All records, in batches, in the order in which they were written; Damaged("IO_ERROR") if one has changed."""
        at = _HEAD_BYTES
        while at < self._end:
            rows, after = self._batch(at)
            if rows is None:
                raise Damaged("IO_ERROR", f"{self._path} is damaged at byte {at}", path=str(self._path))
            at = after
            columns = rows["offset"].tolist(), rows["length"].tolist(), rows["digest"]
            yield [Record(offset, length, digest.tobytes()) for offset, length, digest in zip(*columns, strict=True)]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, numbers: Ints, digests: Sequence[bytes]) -> None:
        rows = np.zeros(len(numbers), dtype=_RECORD)
        rows["offset"], rows["length"], _zeros = self.table.at(numbers)
        rows["digest"] = np.frombuffer(b"".join(digests), dtype="u1").reshape(-1, len(NO_DIGEST))
        body = rows.tobytes()
        view = memoryview(_BATCH.pack(_BATCH_MAGIC, len(rows), blake3(body).digest()) + body)
        with disk_errors(self._path):
            while view:
                done = os.pwrite(self._fd, view, self._end)
                view, self._end = view[done:], self._end + done

    def _read(self) -> None:
        """Takes in every sound batch and cuts off what follows."""
        while True:
            rows, self._end = self._batch(self._end)
            if rows is None:
                break
            numbers = self.table.numbers_of(rows["offset"].astype(np.int64), rows["length"].astype(np.int64))
            self._mark(numbers[numbers >= 0])
        with disk_errors(self._path):
            if os.fstat(self._fd).st_size > self._end:
                os.ftruncate(self._fd, self._end)
                os.fsync(self._fd)

    def _batch(self, at: int) -> tuple[npt.NDArray[np.void] | None, int]:
        """The records of the batch that begins there, and where the next one does; None if it is not sound."""
        with disk_errors(self._path):
            head = os.pread(self._fd, _BATCH.size, at)
            if len(head) < _BATCH.size:
                return None, at
            magic, count, digest = _BATCH.unpack(head)
            if magic != _BATCH_MAGIC or not 0 < count <= BATCH_RECORDS_MAX:
                return None, at
            body = os.pread(self._fd, count * _RECORD.itemsize, at + _BATCH.size)
        if len(body) < count * _RECORD.itemsize or blake3(body).digest() != digest:
            return None, at
        return np.frombuffer(body, dtype=_RECORD), at + _BATCH.size + len(body)

    def _mark(self, numbers: Ints) -> None:
        new = np.unique(numbers[~self.done[numbers]])
        self.done[new] = True
        _offsets, lengths, zeros = self.table.at(new)
        self.done_bytes += int(lengths[~zeros].sum())


def _first_bytes(path: Path) -> bytes:
    try:
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
            return file.read(_HEAD_BYTES)
    except FileNotFoundError:
        return b""
