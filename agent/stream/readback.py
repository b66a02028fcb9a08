"""Reads what a transfer wrote back from the disk and compares it with what was sent.

The cache is dropped first, so that the answer is the disk's. Cold scattered reads wait for the disk, not for a
processor: several threads read at once, each with a buffer of 1 MiB, and what is small is announced a share at a time,
so that the disk has many to choose from. Of a zero range only what is not a hole is read,
so that one of a TiB takes no longer than what it holds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Final

import numpy as np
from blake3 import blake3

from agent.backends.base import Stage
from agent.delta import DeltaMap, DeltaRange
from agent.stream.chunks import CHUNK_BYTES_MAX
from agent.stream.frame import NO_DIGEST, reads_as_zero
from agent.stream.journal import Journal, Record
from agent.stream.mapfile import map_digest
from agent.stream.work import Stopped
from resilver.errors import Damaged

READERS: Final = 8
_SHARE_RECORDS: Final = 128
_ANNOUNCED_BYTES_MAX: Final = 64 << 10
"""A larger record keeps a disk busy by itself."""


def check_map(delta: DeltaMap, journal: Journal) -> None:
    """Refuses a map that is not the journal's: what is done in one says nothing of another."""
    if delta is not journal.delta and map_digest(delta) != journal.key.map_digest:
        raise ValueError("the journal was made for another delta map")


def verify(
    stage: Stage,
    delta: DeltaMap,
    journal: Journal,
    *,
    stop: threading.Event | None = None,
    on_share: Callable[[], None] | None = None,
) -> int:
    """Returns the bytes compared, when every range of the map reads as it was sent.

    `on_share` is called from this thread whenever some more has been compared, at most 128 MiB of data apart.

    Damaged("READBACK_MISMATCH") otherwise, also if a range was never journaled: the stage is then of no use, and has to
    be discarded. Stopped if `stop` is set meanwhile.
    """
    check_map(delta, journal)
    stage.drop_cache()
    buffers: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(READERS):
        buffers.put(memoryview(bytearray(CHUNK_BYTES_MAX)))

    def compare(records: Sequence[Record]) -> int:
        buffer = buffers.get()
        try:
            small = [DeltaRange(one.offset, one.length) for one in records if one.digest != NO_DIGEST]
            stage.announce([row for row in small if row.length <= _ANNOUNCED_BYTES_MAX])
            return sum(_compared(stage, record, buffer, stop) for record in records)
        finally:
            buffers.put(buffer)

    seen = np.zeros(len(journal.table), dtype=np.bool_)
    compared = 0
    with ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="stream-verify") as pool:
        for records in journal.records():
            offsets = np.fromiter((record.offset for record in records), dtype=np.int64, count=len(records))
            lengths = np.fromiter((record.length for record in records), dtype=np.int64, count=len(records))
            numbers = journal.table.numbers_of(offsets, lengths)
            seen[numbers[numbers >= 0]] = True
            shares = [records[at : at + _SHARE_RECORDS] for at in range(0, len(records), _SHARE_RECORDS)]
            for length in pool.map(compare, shares):
                compared += length
                if on_share is not None:
                    on_share()
    if not seen.all():
        missing = int(len(seen) - seen.sum())
        raise Damaged("READBACK_MISMATCH", f"{missing} of {len(seen)} pieces of the delta were never received")
    return compared


def _compared(stage: Stage, record: Record, buffer: memoryview, stop: threading.Event | None) -> int:
    """Reads one record's range and compares it; its length."""
    zero = record.digest == NO_DIGEST
    pieces = stage.data_within(record.offset, record.length) if zero else [(record.offset, record.length)]
    _go_on(stop)
    for offset, length in pieces:
        _go_on(stop)
        view = buffer[:length]
        stage.read_into(offset, view)
        same = reads_as_zero(view) if zero else blake3(view).digest() == record.digest
        if not same:
            raise Damaged(
                "READBACK_MISMATCH",
                f"the disk gives back other bytes than were written, between {offset} and {offset + len(view)}",
                offset=str(offset),
                length=str(len(view)),
            )
    return record.length


def _go_on(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Stopped
