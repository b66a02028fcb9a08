"""The journal: what it says survives, and what it cannot prove it does not say."""

from __future__ import annotations

import os

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from agent.delta import DeltaMap, DeltaRange
from agent.stream.chunks import CHUNK_BYTES_MAX, ChunkTable
from agent.stream.frame import NO_DIGEST
from agent.stream.journal import JOURNAL_FILE, MAP_FILE, Journal, Record
from agent.stream.mapfile import JournalKey
from agent.stream.work import Work
from resilver.errors import Damaged

MIB = 1 << 20
DELTA = DeltaMap.of(
    100 * MIB, [DeltaRange(0, 3 * MIB + 5), DeltaRange(8 * MIB, MIB, zero=True), DeltaRange(50 * MIB, 9)]
)
KEY = JournalKey.of("base", "target", DELTA)
DIGESTS = [blake3(bytes([number])).digest() for number in range(6)]


def all_records(journal):
    return [record for batch in journal.records() for record in batch]


def test_what_was_appended_is_there_after_a_restart(tmp_path):
    journal = Journal.open(tmp_path, KEY, DELTA)
    assert len(journal.table) == 6
    assert journal.done_bytes == 0
    journal.append_many([0, 1, 3], DIGESTS[:3])
    journal.append_many([4], [NO_DIGEST])
    assert journal.done_bytes == 2 * MIB + 5
    journal.close()
    for again in (Journal.load(tmp_path), Journal.open(tmp_path, KEY, DELTA)):
        assert again.key == KEY
        assert again.delta.capacity_bytes == DELTA.capacity_bytes
        assert list(again.delta) == list(DELTA)
        assert again.done.tolist() == [True, True, False, True, True, False]
        assert again.done_bytes == 2 * MIB + 5
        assert not again.complete
        assert all_records(again) == [
            Record(0, MIB, DIGESTS[0]),
            Record(MIB, MIB, DIGESTS[1]),
            Record(3 * MIB, 5, DIGESTS[2]),
            Record(8 * MIB, MIB, NO_DIGEST),
        ]
        again.close()


def test_nothing_there_is_nothing(tmp_path):
    assert Journal.load(tmp_path) is None


@pytest.mark.parametrize(
    "key",
    [
        JournalKey.of("other", "target", DELTA),
        JournalKey.of("base", "other", DELTA),
        JournalKey.of("base", "target", DeltaMap.of(100 * MIB, [DeltaRange(0, 4096)])),
        JournalKey.of("base", "target", DeltaMap(200 * MIB, DELTA.offsets, DELTA.lengths, DELTA.zeros)),
    ],
)
def test_another_key_begins_anew(tmp_path, key):
    journal = Journal.open(tmp_path, KEY, DELTA)
    journal.append_many([0], DIGESTS[:1])
    journal.close()
    delta = DELTA if key.map_digest == KEY.map_digest else DeltaMap.of(100 * MIB, [DeltaRange(0, 4096)])
    if key.capacity_bytes != DELTA.capacity_bytes:
        delta = DeltaMap(200 * MIB, DELTA.offsets, DELTA.lengths, DELTA.zeros)
    other = Journal.open(tmp_path, key, delta)
    assert other.done_bytes == 0
    assert not other.done.any()
    other.close()
    assert Journal.load(tmp_path).key == key


def test_every_truncation_keeps_the_whole_batches_before_it(tmp_path):
    journal = Journal.open(tmp_path, KEY, DELTA)
    ends = [(tmp_path / JOURNAL_FILE).stat().st_size]
    for number in range(4):
        journal.append_many([number], [DIGESTS[number]])
        ends.append((tmp_path / JOURNAL_FILE).stat().st_size)
    journal.close()
    whole = (tmp_path / JOURNAL_FILE).read_bytes()
    for length in range(len(whole) + 1):
        (tmp_path / JOURNAL_FILE).write_bytes(whole[:length])
        cut = Journal.load(tmp_path)
        kept = sum(end <= length for end in ends[1:])
        assert cut.done.sum() == kept
        assert (tmp_path / JOURNAL_FILE).stat().st_size == ends[kept]
        cut.append_many([5], [DIGESTS[5]])
        cut.close()
        again = Journal.load(tmp_path)
        assert again.done.sum() == kept + 1
        assert len(all_records(again)) == kept + 1
        again.close()


def test_no_flipped_bit_makes_a_record(tmp_path):
    journal = Journal.open(tmp_path, KEY, DELTA)
    for number in range(3):
        journal.append_many([number], [DIGESTS[number]])
    true = set(all_records(journal))
    journal.close()
    whole = (tmp_path / JOURNAL_FILE).read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        hurt = bytearray(whole)
        hurt[bit // 8] ^= 1 << bit % 8
        (tmp_path / JOURNAL_FILE).write_bytes(hurt)
        found = Journal.load(tmp_path)
        assert set(all_records(found)) < true
        found.close()


def test_a_damaged_map_is_as_good_as_none(tmp_path):
    Journal.open(tmp_path, KEY, DELTA).close()
    whole = (tmp_path / MAP_FILE).read_bytes()
    for bit in range(8 * len(whole)):
        hurt = bytearray(whole)
        hurt[bit // 8] ^= 1 << bit % 8
        (tmp_path / MAP_FILE).write_bytes(hurt)
        assert Journal.load(tmp_path) is None
    for length in range(len(whole)):
        (tmp_path / MAP_FILE).write_bytes(whole[:length])
        assert Journal.load(tmp_path) is None


def test_a_journal_that_changes_under_a_reader_is_an_io_error(tmp_path):
    journal = Journal.open(tmp_path, KEY, DELTA)
    journal.append_many([0], DIGESTS[:1])
    with (tmp_path / JOURNAL_FILE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(Damaged) as found:
        all_records(journal)
    assert found.value.reason == "IO_ERROR"
    journal.close()


def test_after_a_failed_append_nothing_more_is_taken(tmp_path):
    journal = Journal.open(tmp_path, KEY, DELTA)
    writable = os.dup(journal._fd)
    read_only = os.open(tmp_path / JOURNAL_FILE, os.O_RDONLY)
    for fd in (read_only, writable):
        os.dup2(fd, journal._fd)
        os.close(fd)
        with pytest.raises(Damaged) as failed:
            journal.append_many([0], DIGESTS[:1])
        assert failed.value.reason == "IO_ERROR"
    assert not journal.done.any()
    journal.close()


def test_a_million_ranges_load_and_append(tmp_path):
    count = 1_000_000
    offsets = np.arange(count, dtype=np.int64) * 8192
    delta = DeltaMap(count * 8192, offsets, np.full(count, 4096, dtype=np.int64), np.zeros(count, dtype=np.bool_))
    journal = Journal.open(tmp_path, JournalKey.of("b", "t", delta), delta)
    digests = [DIGESTS[0]] * 2000
    for start in range(0, count - 2000, 2000):
        journal.append_many(range(start, start + 2000), digests)
    journal.close()
    again = Journal.load(tmp_path)
    assert again.done.sum() == count - 2000
    assert again.done_bytes == (count - 2000) * 4096
    left = Work(again.table, again.done).take(10_000, 1 << 40)
    assert [chunk.number for chunk in left] == list(range(count - 2000, count))
    again.close()


RANGES = st.lists(st.tuples(st.integers(0, 2 * MIB), st.integers(1, 4 * MIB), st.booleans()), max_size=12).map(
    lambda rows: list(_placed(rows))
)


def _placed(rows):
    at = 0
    for gap, length, zero in rows:
        yield DeltaRange(at + gap, length, zero)
        at += gap + length


@given(RANGES)
def test_chunks_are_the_map_cut_into_pieces(rows):
    table = ChunkTable.of(DeltaMap.of(1 << 40, rows))
    numbers = np.arange(len(table), dtype=np.int64)
    offsets, lengths, zeros = table.at(numbers)
    expected = []
    for row in rows:
        step = row.length if row.zero else CHUNK_BYTES_MAX
        ends = range(row.offset, row.offset + row.length, step)
        expected += [(at, min(step, row.offset + row.length - at), row.zero) for at in ends]
    assert list(zip(offsets.tolist(), lengths.tolist(), zeros.tolist(), strict=True)) == expected
    assert table.numbers_of(offsets, lengths).tolist() == numbers.tolist()
    known = {chunk[:2]: number for number, chunk in enumerate(expected)}
    for beside, longer in ((1, 0), (0, 1)):
        asked = list(zip((offsets + beside).tolist(), (lengths + longer).tolist(), strict=True))
        found = table.numbers_of(offsets + beside, lengths + longer).tolist()
        assert found == [known.get(chunk, -1) for chunk in asked]


@given(RANGES, st.data())
def test_work_hands_every_data_chunk_out_once_and_again_if_it_comes_back(rows, data):
    table = ChunkTable.of(DeltaMap.of(1 << 40, rows))
    done = np.array(data.draw(st.lists(st.booleans(), min_size=len(table), max_size=len(table))), dtype=np.bool_)
    work = Work(table, done)
    _offsets, _lengths, zeros = table.at(np.arange(len(table), dtype=np.int64))
    assert [chunk.number for chunk in work.zero_chunks()] == np.flatnonzero(zeros & ~done).tolist()
    finished = []
    while work.left:
        chunks = work.take(data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3 * MIB)))
        assert chunks
        keep = data.draw(st.integers(1, len(chunks)))
        finished += [chunk.number for chunk in chunks[:keep]]
        work.give_back(chunks[keep:])
        assert not work.complete
        work.finished(keep)
    assert finished == np.flatnonzero(~zeros & ~done).tolist()
    assert work.complete
    assert work.take(5, MIB) == []
