"""Whole transfers: real sockets on loopback, real files."""

from __future__ import annotations

import hashlib
import threading
import time

import pytest

from agent.delta import DeltaMap, DeltaRange
from agent.stream.flusher import MARK_BYTES
from agent.stream.journal import Journal
from agent.stream.lanes import ALONE_TWICE_BYTES, LANES_MAX
from agent.stream.receiver import Stopped, verify
from resilver.errors import Damaged
from tests.agent.stream.support import (
    HELLO,
    MIB,
    FileReader,
    FileStage,
    Proxy,
    Transfer,
    at,
    random_file,
    same,
    scattered,
    serving,
)


@pytest.fixture
def source(tmp_path):
    return random_file(tmp_path / "source", 24 * MIB)


def test_scattered_blocks_arrive_with_little_overhead_and_little_work(tmp_path):
    image = tmp_path / "source"
    blocks = scattered(10_000)
    with image.open("wb") as file:
        for row in blocks:
            file.seek(row.offset)
            file.write(hashlib.sha256(str(row.offset).encode()).digest() * 128)
        file.truncate(blocks[-1].offset + 16384)
    delta = DeltaMap.of(image.stat().st_size, blocks)
    transfer = Transfer(FileStage(tmp_path / "stage", delta.capacity_bytes), delta)
    before = time.process_time()
    with serving(image) as server:
        received = transfer.run(at(server.port))
    spent = time.process_time() - before
    assert received.counters.done_bytes == received.counters.total_bytes == 10_000 * 4096
    assert received.counters.wire_bytes <= 1.03 * received.counters.done_bytes
    assert received.counters.resent_bytes == 0
    assert received.problems == ()
    assert same(image, transfer.stage.path, delta)
    told: list[float] = []
    compared = verify(transfer.stage, delta, transfer.journal, on_share=lambda: told.append(time.monotonic()))
    assert compared == 10_000 * 4096
    assert len(told) >= 10_000 // 128, "whoever waits for it hears of it"
    assert spent < 2.0, "both ends together, on one processor"


def test_long_ranges_are_cut_into_frames_and_zero_ranges_ask_nobody(tmp_path, source):
    rows = [DeltaRange(100, 5 * MIB + 7), DeltaRange(6 * MIB, 3 * MIB, zero=True), DeltaRange(20 * MIB, 4 * MIB)]
    delta = DeltaMap.of(24 * MIB, rows)
    stage = FileStage(tmp_path / "stage", 24 * MIB)
    stage.write(6 * MIB, memoryview(b"x" * MIB))
    transfer = Transfer(stage, delta)
    with serving(source) as server:
        received = transfer.run(at(server.port))
    assert received.counters.done_bytes == delta.data_bytes == 9 * MIB + 7
    assert same(source, stage.path, DeltaMap.of(24 * MIB, [rows[0], rows[2]]))
    assert stage.path.read_bytes()[6 * MIB : 9 * MIB] == bytes(3 * MIB)
    assert verify(stage, delta, transfer.journal) == 12 * MIB + 7


def test_only_zero_ranges_need_no_source_at_all(tmp_path):
    delta = DeltaMap.of(MIB, [DeltaRange(0, MIB, zero=True)])
    transfer = Transfer(FileStage(tmp_path / "stage", MIB), delta)
    assert transfer.run().counters.done_bytes == 0
    assert transfer.journal.complete


def test_an_empty_map_is_done_at_once(tmp_path):
    delta = DeltaMap.of(MIB, [])
    transfer = Transfer(FileStage(tmp_path / "stage", MIB), delta)
    transfer.run()
    assert verify(transfer.stage, delta, transfer.journal) == 0


def test_data_that_reads_as_zero_travels_as_a_header(tmp_path):
    image = tmp_path / "source"
    image.write_bytes(bytes(4 * MIB) + b"end")
    delta = DeltaMap.of(4 * MIB + 3, [DeltaRange(0, 4 * MIB + 3)])
    stage = FileStage(tmp_path / "stage", 4 * MIB + 3)
    stage.write(0, memoryview(b"old" * 1000))
    transfer = Transfer(stage, delta)
    with serving(image) as server:
        received = transfer.run(at(server.port))
    assert received.counters.wire_bytes < 1000
    assert received.counters.done_bytes == 4 * MIB + 3
    assert stage.path.read_bytes() == image.read_bytes()
    verify(stage, delta, transfer.journal)


def test_what_is_read_was_announced(tmp_path, source):
    readers = []

    def make(path):
        readers.append(FileReader(path))
        return readers[-1]

    delta = DeltaMap.of(24 * MIB, scattered(1500))
    with serving(source, make) as server:
        Transfer(FileStage(tmp_path / "stage", 24 * MIB), delta).run(at(server.port))
    assert readers[0].announced > 0


def slow_reader(pause_s):
    return lambda path: FileReader(path, lambda _offset: time.sleep(pause_s))


def test_several_sources_share_one_transfer_and_the_faster_gives_more(tmp_path, source):
    delta = DeltaMap.of(24 * MIB, [DeltaRange(0, 24 * MIB)])
    transfer = Transfer(FileStage(tmp_path / "stage", 24 * MIB), delta)
    with serving(source, slow_reader(0.02)) as fast, serving(source, slow_reader(0.2)) as slow:
        received = transfer.run(at(slow.port, "slow"), at(fast.port, "fast"))
    shares = {share.node: share.wire_bytes for share in received.counters.sources}
    assert shares["fast"] > shares["slow"] > MIB
    assert received.counters.wire_bytes < 1.01 * 24 * MIB
    assert transfer.stage.writes == 24
    assert transfer.stage.path.read_bytes() == source.read_bytes()
    assert verify(transfer.stage, delta, transfer.journal) == 24 * MIB


def test_more_sources_than_lanes_are_a_reserve(tmp_path, source):
    delta = DeltaMap.of(24 * MIB, [DeltaRange(0, 24 * MIB)])
    transfer = Transfer(FileStage(tmp_path / "stage", 24 * MIB), delta)
    gone = [at(1, f"gone{number}") for number in range(LANES_MAX + 1)]
    with serving(source) as server:
        received = transfer.run(*gone, at(server.port, "z"))
    assert {problem.node for problem in received.problems} >= {f"gone{number}" for number in range(LANES_MAX)}
    assert transfer.stage.path.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(("size", "connections"), [(24 * MIB, 1), (ALONE_TWICE_BYTES + MIB, 2)])
def test_a_source_that_is_alone_and_has_much_to_give_is_asked_twice(tmp_path, size, connections):
    image = random_file(tmp_path / "source", size)
    transfer = Transfer(FileStage(tmp_path / "stage", size), DeltaMap.of(size, [DeltaRange(0, size)]))
    with serving(image) as server, Proxy(server.port) as proxy:
        received = transfer.run(at(proxy.port))
        assert proxy.connections == connections
    assert received.counters.wire_bytes < 1.01 * size
    assert transfer.stage.path.read_bytes() == image.read_bytes()


def test_progress_only_grows_and_never_exceeds_the_total(tmp_path, source):
    delta = DeltaMap.of(24 * MIB, [DeltaRange(0, 24 * MIB)])
    transfer = Transfer(FileStage(tmp_path / "stage", 24 * MIB), delta)
    with serving(source, lambda path: FileReader(path, lambda _offset: time.sleep(0.03))) as server:
        transfer.run(at(server.port))
    done = [counters.done_bytes for counters in transfer.seen]
    assert len(done) > 2
    assert done == sorted(done)
    assert done[-1] == 24 * MIB
    assert all(counters.total_bytes == 24 * MIB for counters in transfer.seen)
    assert max(counters.sources[0].bytes_per_second for counters in transfer.seen) > MIB


def test_a_stop_keeps_what_came_and_the_next_run_goes_on(tmp_path, source):
    delta = DeltaMap.of(24 * MIB, [DeltaRange(0, 24 * MIB)])
    first = Transfer(FileStage(tmp_path / "stage", 24 * MIB), delta)
    gate = threading.Event()

    def before_read(offset):
        if offset >= 10 * MIB and not gate.is_set():
            first.stop.set()
            gate.wait(30)

    with serving(source, lambda path: FileReader(path, before_read)) as server:
        with pytest.raises(Stopped) as stopped:
            first.run(at(server.port))
        gate.set()
        assert stopped.value.reason == "CANCELLED"
        first.journal.close()
        second = Transfer(FileStage(tmp_path / "stage", 24 * MIB), delta)
        assert second.journal.done_bytes == first.seen[-1].done_bytes > 0
        received = second.run(at(server.port))
    assert received.counters.wire_bytes < 24 * MIB - second.seen[0].done_bytes + 10_000
    assert received.counters.done_bytes == 24 * MIB
    assert second.stage.path.read_bytes() == source.read_bytes()
    verify(second.stage, delta, second.journal)


class FailingStage(FileStage):
    """A disk whose third sync fails; knows what the syncs before it had covered."""

    def __init__(self, path, size_bytes):
        super().__init__(path, size_bytes)
        self.written = set()
        self.synced = set()

    def write(self, offset, data):
        super().write(offset, data)
        self.written.add(offset)

    def sync(self):
        covered = set(self.written)
        if self.syncs == 2:
            raise Damaged("IO_ERROR", "the disk is worn out")
        super().sync()
        self.synced |= covered


def test_nothing_is_journaled_before_it_is_synced(tmp_path, source):
    delta = DeltaMap.of(24 * MIB, [DeltaRange(0, 24 * MIB)])
    transfer = Transfer(FailingStage(tmp_path / "stage", 24 * MIB), delta)
    with serving(source) as server, pytest.raises(Damaged) as failed:
        transfer.run(at(server.port))
    assert failed.value.reason == "IO_ERROR"
    transfer.journal.close()
    journal = Journal.load(transfer.stage.directory)
    offsets = {record.offset for batch in journal.records() for record in batch}
    assert 0 < len(offsets) <= 2 * MARK_BYTES // MIB
    assert offsets <= transfer.stage.synced


def test_a_write_error_ends_the_run_with_its_own_reason(tmp_path, source):
    class Broken(FileStage):
        def write(self, offset, data):
            if offset >= 4 * MIB:
                raise Damaged("IO_ERROR", "no more")
            super().write(offset, data)

    delta = DeltaMap.of(24 * MIB, [DeltaRange(0, 24 * MIB)])
    transfer = Transfer(Broken(tmp_path / "stage", 24 * MIB), delta)
    with serving(source) as server, pytest.raises(Damaged) as failed:
        transfer.run(at(server.port))
    assert failed.value.reason == "IO_ERROR"
    assert transfer.journal.done_bytes == 4 * MIB


def test_a_byte_that_changed_on_the_disk_is_found(tmp_path, source):
    delta = DeltaMap.of(24 * MIB, scattered(100))
    transfer = Transfer(FileStage(tmp_path / "stage", 24 * MIB), delta)
    with serving(source) as server:
        transfer.run(at(server.port))
    with transfer.stage.path.open("r+b") as file:
        file.seek(16384 * 50 + 17)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(Damaged) as found:
        verify(transfer.stage, delta, transfer.journal)
    assert found.value.reason == "READBACK_MISMATCH"
    assert found.value.metadata["offset"] == str(16384 * 50)


def test_a_hole_that_is_none_is_found(tmp_path):
    delta = DeltaMap.of(4 * MIB, [DeltaRange(MIB, 3 * MIB, zero=True)])
    transfer = Transfer(FileStage(tmp_path / "stage", 4 * MIB), delta)
    transfer.run()
    transfer.stage.write(4 * MIB - 1, memoryview(b"x"))
    with pytest.raises(Damaged) as found:
        verify(transfer.stage, delta, transfer.journal)
    assert found.value.reason == "READBACK_MISMATCH"


def test_a_hole_of_a_tib_costs_what_it_holds(tmp_path):
    delta = DeltaMap.of(8 << 40, [DeltaRange(MIB, 1 << 40, zero=True)])
    transfer = Transfer(FileStage(tmp_path / "stage", 8 << 40), delta)
    transfer.run()
    transfer.stage.write(1 << 39, memoryview(bytes(MIB)))
    assert verify(transfer.stage, delta, transfer.journal) == 1 << 40
    assert transfer.stage.read_bytes == MIB
    transfer.stage.write(1 << 40, memoryview(b"x"))
    with pytest.raises(Damaged) as found:
        verify(transfer.stage, delta, transfer.journal)
    assert found.value.metadata["offset"] == str(1 << 40)


def test_what_was_never_received_does_not_pass_for_verified(tmp_path):
    delta = DeltaMap.of(4 * MIB, [DeltaRange(0, MIB), DeltaRange(2 * MIB, MIB, zero=True)])
    transfer = Transfer(FileStage(tmp_path / "stage", 4 * MIB), delta)
    transfer.journal.append_many([1], [bytes(32)])
    with pytest.raises(Damaged) as found:
        verify(transfer.stage, delta, transfer.journal)
    assert found.value.reason == "READBACK_MISMATCH"


def test_reading_back_stops_when_told(tmp_path):
    delta = DeltaMap.of(4 * MIB, [DeltaRange(0, MIB, zero=True)])
    transfer = Transfer(FileStage(tmp_path / "stage", 4 * MIB), delta)
    transfer.run()
    transfer.stop.set()
    with pytest.raises(Stopped):
        verify(transfer.stage, delta, transfer.journal, stop=transfer.stop)


def test_another_map_than_the_journals_is_refused(tmp_path):
    transfer = Transfer(FileStage(tmp_path / "stage", MIB), DeltaMap.of(MIB, [DeltaRange(0, 4096)]))
    transfer.delta = DeltaMap.of(MIB, [DeltaRange(4096, 4096)])
    with pytest.raises(ValueError, match="another delta map"):
        transfer.run(hello=HELLO)
