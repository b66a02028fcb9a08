"""What may go wrong between target and source, and how a transfer ends then."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from agent.delta import DeltaMap, DeltaRange
from agent.stream import lane, lanes, lifesign
from agent.stream.frame import HEADER_BYTES, Hello, Welcome, encode_welcome
from agent.stream.receiver import Stopped
from agent.stream.sender import BlockServer
from agent.stream.sources import Sources
from resilver.address import Address
from resilver.errors import Damaged, Refused, Unauthenticated
from tests.agent.stream.support import (
    HELLO,
    MIB,
    FileReader,
    FileStage,
    Proxy,
    Transfer,
    at,
    random_file,
    scattered,
    serving,
)

SIZE = 8 * MIB


@pytest.fixture
def source(tmp_path):
    return random_file(tmp_path / "source", SIZE)


@pytest.fixture
def transfer(tmp_path):
    return Transfer(FileStage(tmp_path / "stage", SIZE), DeltaMap.of(SIZE, [DeltaRange(0, SIZE)]))


@pytest.fixture
def after_one_is_gone(monkeypatch, source):
    """A source that answers once another one has been left for good."""
    gone, leave = threading.Event(), Sources.leave

    def noted(self, one, failed):
        leave(self, one, failed)
        if one not in self.alive:
            gone.set()

    monkeypatch.setattr(Sources, "leave", noted)
    with serving(source, lambda path: FileReader(path, lambda _offset: gone.wait(30))) as server:
        yield server


def flip(*positions):
    """Flips one bit of each byte that passes at these places of the stream, once for the whole proxy."""
    left = set(positions)

    def hurt(data, passed):
        for position in sorted(left):
            if passed <= position < passed + len(data):
                data[position - passed] ^= 16
                left.discard(position)

    return hurt


def after_welcome(offset):
    """A place within the answers: what comes before them is one small frame."""
    return 2 * HEADER_BYTES + offset


def test_a_damaged_payload_is_asked_for_again(transfer, source):
    with serving(source) as server, Proxy(server.port, flip(after_welcome(1000))) as proxy:
        received = transfer.run(at(proxy.port))
        assert proxy.connections == 1
    assert received.counters.resent_bytes == MIB
    assert received.counters.done_bytes == SIZE
    assert [problem.reason for problem in received.problems] == ["DIGEST_MISMATCH"]
    assert transfer.stage.path.read_bytes() == source.read_bytes()


def test_a_damaged_header_costs_the_connection_and_no_data(transfer, source):
    with serving(source) as server:
        position = len(encode_welcome(Welcome(SIZE, packed_requests=True))) + HEADER_BYTES + MIB + 13
        with Proxy(server.port, flip(position)) as proxy:
            received = transfer.run(at(proxy.port))
            assert proxy.connections == 2
    assert received.counters.resent_bytes == MIB
    assert transfer.stage.path.read_bytes() == source.read_bytes()


def test_a_source_that_keeps_sending_damaged_frames_is_left(transfer, source, after_one_is_gone):
    def hurt(data, passed):
        if passed > 1000:
            data[0] ^= 1

    with serving(source) as server, Proxy(server.port, hurt) as proxy:
        received = transfer.run(at(proxy.port, "bad"), at(after_one_is_gone.port, "good"))
    assert [(problem.node, problem.reason) for problem in received.problems] == [("bad", "SOURCE_DAMAGED")]
    assert 0 < received.counters.resent_bytes <= 3 * MIB
    assert received.counters.done_bytes == SIZE
    assert transfer.stage.path.read_bytes() == source.read_bytes()


def test_damage_without_another_source_ends_the_run(transfer, source):
    def hurt(data, passed):
        data[-1] ^= 1

    with serving(source) as server, Proxy(server.port, hurt) as proxy, pytest.raises(Damaged) as failed:
        transfer.run(at(proxy.port))
    assert failed.value.reason == "SOURCE_DAMAGED"


def test_a_wrong_ticket_is_refused_at_once(transfer, source):
    started = time.monotonic()
    wrong = Hello("stolen", HELLO.resync_id, HELLO.volume, HELLO.target, HELLO.target_node)
    with serving(source) as server, pytest.raises(Unauthenticated) as failed:
        transfer.run(at(server.port), hello=wrong)
    assert failed.value.reason == "TICKET_INVALID"
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("reason", ["TARGET_GONE", "BASE_GONE"])
def test_a_source_without_the_snapshot_is_passed_over_at_once(transfer, after_one_is_gone, reason):
    def gone(_hello):
        raise Refused(reason, "pruned")

    server = BlockServer(Address("127.0.0.1", 0), gone)
    server.start()
    received = transfer.run(at(server.port, "a"), at(after_one_is_gone.port, "b"))
    assert [(problem.node, problem.reason) for problem in received.problems] == [("a", reason)]

    again = Transfer(FileStage(transfer.stage.path.with_name("other"), SIZE), transfer.delta)
    with pytest.raises(Refused) as failed:
        again.run(at(server.port, "a"), at(server.port, "c"))
    assert failed.value.reason == reason
    assert server.stop(5)


@pytest.mark.parametrize("error", [Refused("NO_SPACE", "full"), Damaged("BASE_MISMATCH", "written to")])
def test_what_a_source_says_of_its_own_disk_is_not_ours(transfer, after_one_is_gone, error):
    """Said of ours, it would cost the stage."""

    def broken(_hello):
        raise error

    server = BlockServer(Address("127.0.0.1", 0), broken)
    server.start()
    received = transfer.run(at(server.port, "a"), at(after_one_is_gone.port, "b"))
    assert [(problem.node, problem.reason) for problem in received.problems] == [("a", "SOURCE_DAMAGED")]
    again = Transfer(FileStage(transfer.stage.path.with_name("other"), SIZE), transfer.delta)
    with pytest.raises(Damaged, match=error.message) as failed:
        again.run(at(server.port, "a"))
    assert failed.value.reason == "SOURCE_DAMAGED"
    assert server.stop(5)


def test_a_source_that_never_answers_holds_nobody_up(transfer, source):
    with socket.create_server(("127.0.0.1", 0)) as silent, serving(source) as server:
        received = transfer.run(at(silent.getsockname()[1], "silent"), at(server.port, "b"), silence=20.0)
    assert {share.node: share.wire_bytes > 0 for share in received.counters.sources} == {"silent": False, "b": True}
    assert transfer.stage.path.read_bytes() == source.read_bytes()


def sticks(path, stuck, gate):
    """A source whose first read never ends before the gate is open; `stuck` is set when it has begun."""

    def before_read(_offset):
        stuck.set()
        gate.wait(30)

    return FileReader(path, before_read)


def test_a_source_that_falls_silent_in_the_middle_is_left_for_another(transfer, source):
    stuck, gate = threading.Event(), threading.Event()
    with (
        serving(source, lambda path: sticks(path, stuck, gate), wait_s=60.0) as first,
        serving(source, lambda path: FileReader(path, lambda _offset: stuck.wait(30))) as second,
    ):
        received = transfer.run(at(first.port, "a"), at(second.port, "b"), silence=0.6)
        gate.set()
    assert [(problem.node, problem.reason) for problem in received.problems] == [("a", "DEADLINE")]
    assert transfer.stage.path.read_bytes() == source.read_bytes()


def test_a_source_that_lives_and_is_too_slow_loses_its_work_to_those_who_wait(monkeypatch, transfer, source):
    monkeypatch.setattr(lanes, "SLOW_S", 0.5)
    monkeypatch.setattr(lane, "RATE_WINDOW_S", 0.5)
    stuck, gate = threading.Event(), threading.Event()
    with (
        serving(source, lambda path: sticks(path, stuck, gate), wait_s=0.2) as first,
        serving(source, lambda path: FileReader(path, lambda _offset: stuck.wait(30))) as second,
    ):
        received = transfer.run(at(first.port, "slow"), at(second.port, "b"))
        gate.set()
    assert [(problem.node, problem.reason) for problem in received.problems] == [("slow", "DEADLINE")]
    assert transfer.stage.writes == SIZE // MIB
    assert transfer.stage.path.read_bytes() == source.read_bytes()


def test_a_slow_source_that_is_alone_is_waited_for(monkeypatch, transfer, source):
    monkeypatch.setattr(lanes, "SLOW_S", 0.1)
    monkeypatch.setattr(lane, "RATE_WINDOW_S", 0.1)
    with serving(source, lambda path: FileReader(path, lambda _offset: time.sleep(0.2))) as server:
        received = transfer.run(at(server.port))
    assert received.problems == ()
    assert transfer.stage.path.read_bytes() == source.read_bytes()


def slow_disk(path, *, first_read_s, opened_s=0.0):
    """A disk that takes so long to open and to give what is read first."""
    pauses = [opened_s, first_read_s]

    def make(image):
        threading.Event().wait(pauses.pop(0))
        return FileReader(image, lambda offset: threading.Event().wait(pauses.pop()) if pauses else None)

    return serving(path, make, wait_s=0.1)


def test_a_source_whose_disk_is_slow_is_not_silent(transfer, source):
    with slow_disk(source, opened_s=2.0, first_read_s=2.0) as server, Proxy(server.port) as proxy:
        received = transfer.run(at(proxy.port), silence=0.8)
        assert proxy.connections == 1
    assert not received.problems
    assert transfer.stage.path.read_bytes() == source.read_bytes()


def test_a_source_whose_disk_hangs_is_left_for_another(monkeypatch, transfer, source):
    monkeypatch.setattr(lifesign, "DISK_MAX_S", 0.5)
    stuck, gate = threading.Event(), threading.Event()
    with (
        serving(source, lambda path: sticks(path, stuck, gate), wait_s=0.1) as hanging,
        serving(source, lambda path: FileReader(path, lambda _offset: stuck.wait(30))) as server,
    ):
        received = transfer.run(at(hanging.port, "slow"), at(server.port, "b"), silence=0.8)
        gate.set()
    assert [(problem.node, problem.reason) for problem in received.problems] == [("slow", "DEADLINE")]
    assert transfer.stage.path.read_bytes() == source.read_bytes()


def test_without_a_byte_the_run_ends_in_bounded_time(transfer):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(Refused) as failed:
        transfer.run(at(port, "a"), at(port, "b"), idle=1.0)
    assert failed.value.reason == "NO_SOURCE"
    assert "a: " in failed.value.message
    assert "b: " in failed.value.message
    assert 0.9 < time.monotonic() - started < 30


def test_no_source_given_is_no_source(transfer):
    with pytest.raises(Refused) as failed:
        transfer.run()
    assert failed.value.reason == "NO_SOURCE"


def test_bytes_that_never_become_a_frame_do_not_hold_the_run(transfer):
    def trickle(listener):
        connection, _peer = listener.accept()
        with connection:
            try:
                while True:
                    connection.sendall(b"R")
                    threading.Event().wait(0.05)
                    if len(sent) > 40:
                        return
                    sent.append(1)
            except OSError:
                return

    sent = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle, args=(listener,))
        thread.start()
        with pytest.raises(Refused) as failed:
            transfer.run(at(listener.getsockname()[1]), idle=1.0)
        thread.join(10)
    assert failed.value.reason == "NO_SOURCE"


def test_a_stop_is_noticed_while_nothing_comes(transfer):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        timer = threading.Timer(0.3, transfer.stop.set)
        timer.start()
        started = time.monotonic()
        with pytest.raises(Stopped):
            transfer.run(at(silent.getsockname()[1]))
        timer.join()
    assert time.monotonic() - started < 30


def test_a_source_of_another_size_is_not_believed(transfer, tmp_path):
    with serving(random_file(tmp_path / "other", SIZE + 512)) as server, pytest.raises(Damaged) as failed:
        transfer.run(at(server.port))
    assert failed.value.reason == "SOURCE_DAMAGED"


def test_a_source_that_cannot_read_its_disk_is_left(transfer, source, after_one_is_gone):
    def torn(_offset):
        raise Damaged("IO_ERROR", "sector 17")

    with serving(source, lambda path: FileReader(path, torn)) as first:
        received = transfer.run(at(first.port, "a"), at(after_one_is_gone.port, "b"))
    assert [(problem.node, problem.reason) for problem in received.problems] == [("a", "SOURCE_DAMAGED")]
    assert "sector 17" in received.problems[0].message
    assert transfer.stage.path.read_bytes() == source.read_bytes()


def test_a_source_that_stops_says_so_and_the_next_one_goes_on(tmp_path, source):
    delta = DeltaMap.of(SIZE, scattered(SIZE // 16384))
    transfer = Transfer(FileStage(tmp_path / "stage", SIZE), delta)
    reading, gate = threading.Event(), threading.Event()

    first = serving(source, lambda path: sticks(path, reading, gate))
    server = first.__enter__()
    with serving(source, lambda path: FileReader(path, lambda _offset: reading.wait(30))) as second:
        run = threading.Thread(target=transfer.run, args=(at(server.port, "a"), at(second.port, "b")))
        run.start()
        assert reading.wait(10)
        stopping = threading.Thread(target=first.__exit__, args=(None, None, None))
        stopping.start()
        gate.set()
        stopping.join(15)
        run.join(15)
    assert transfer.seen[-1].done_bytes == delta.data_bytes
