"""A stream from its first byte to its last: broken off anywhere, and gone on with by whoever may."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import replace

import pytest

from agent.stream import pump as pumping
from agent.stream import stream_receiver
from agent.stream.connection import ServedStream
from agent.stream.counters import Counters
from agent.stream.frame import FrameBuffer, Hello, Kind, StreamWish, decode_end
from agent.stream.link import SourceAddress
from agent.stream.pump import Pump
from agent.stream.sender import BlockServer
from agent.stream.throttle import Throttle
from agent.stream.work import Stopped
from resilver.address import Address
from resilver.errors import Damaged, Refused, ResilverError, Unauthenticated
from tests.agent.stream.cats import ORIGIN, WHOLE, Call, CatStage, CatStream, broken_off, digest, nothing, serving
from tests.agent.stream.support import HELLO, MIB, Proxy, at


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "stream"
    path.write_bytes(os.urandom(2 * MIB) + bytes(MIB) + os.urandom(WHOLE - 3 * MIB))
    return path


@pytest.fixture
def stage(tmp_path):
    made = CatStage(tmp_path / "stage")
    yield made
    made.close()


@pytest.mark.parametrize("side", ["send", "receive"])
def test_a_stream_keeps_to_the_cap_of_either_side(tmp_path, stage, side):
    source, samples = tmp_path / "stream", []
    source.write_bytes(os.urandom(3 * MIB))
    call, throttle = Call(stage), Throttle(1_000_000)
    if side == "receive":
        call.throttle = throttle

    def passed(data: bytearray, _passed: int) -> None:
        samples.append((time.monotonic(), len(data)))

    with (
        serving(source, throttle=throttle if side == "send" else None) as server,
        Proxy(server.port, passed) as proxy,
    ):
        call.run(at(proxy.port))
    assert stage.digest == digest(source)
    assert samples[-1][0] - samples[0][0] > 2.5
    for at_first, (start, _) in enumerate(samples):
        window = sum(count for when, count in samples[at_first:] if when - start < 2.0)
        assert window <= 1.2 * 2_000_000


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB, WHOLE])
def test_a_whole_stream(tmp_path, stage, size):
    source = tmp_path / "stream"
    source.write_bytes(os.urandom(size))
    with serving(source) as server:
        counters = Call(stage).run(at(server.port))
    assert stage.digest == digest(source)
    assert (counters.done_bytes, counters.resent_bytes) == (size, 0)
    assert counters.wire_bytes < size + 100 * (size // MIB + 1) + 1000
    assert stage.starts == [("cat-1", "")]


def test_zeros_travel_as_a_header(tmp_path, stage):
    source = tmp_path / "stream"
    source.write_bytes(bytes(4 * MIB + 1))
    with serving(source) as server:
        counters = Call(stage).run(at(server.port))
    assert stage.digest == digest(source)
    assert counters.wire_bytes < 10_000


def test_the_best_format_that_both_know(stage, source):
    with serving(source) as server:
        Call(stage).run(at(server.port), formats=("cat-1", "cat-2", "cat-3"))
    assert stage.starts == [("cat-2", "")]


def test_no_format_in_common(stage, source):
    with serving(source) as server, pytest.raises(Refused) as refused:
        Call(stage).run(at(server.port), formats=("tape",))
    assert refused.value.reason == "NOT_SUPPORTED"
    assert not stage.starts


def test_a_connection_that_breaks_is_gone_on_with(stage, source):
    """The source makes the stream again, and sends only what had not come."""
    cut: list[int] = []

    def hurt(_data: bytearray, passed: int) -> None:
        if passed > 3 * MIB and not cut:
            cut.append(passed)
            raise OSError("cut")

    with serving(source) as server, Proxy(server.port, hurt) as proxy:
        counters = Call(stage).run(at(proxy.port))
        assert proxy.connections == 2
    assert stage.digest == digest(source)
    assert stage.starts == [("cat-1", "")]
    assert (stage.fed, counters.done_bytes, counters.resent_bytes) == (WHOLE, WHOLE, 0)
    assert counters.wire_bytes < WHOLE + 2 * MIB


def test_a_damaged_piece_is_asked_for_again(stage, source):
    hurt_once: list[int] = []

    def hurt(data: bytearray, passed: int) -> None:
        if passed > MIB // 2 and not hurt_once:
            hurt_once.append(passed)
            data[len(data) // 2] ^= 1

    with serving(source) as server, Proxy(server.port, hurt) as proxy:
        counters = Call(stage).run(at(proxy.port))
    assert stage.digest == digest(source)
    assert counters.resent_bytes == MIB
    assert stage.fed == WHOLE


def test_a_restarted_target_goes_on_from_its_spool(tmp_path, stage, source):
    fed = broken_off(stage, source, 3 * MIB)
    assert fed == 3 * MIB
    again = CatStage(stage.directory)
    with serving(source) as server:
        counters = Call(again).run(at(server.port))
    assert again.digest == digest(source)
    assert again.starts == [("cat-1", "")]
    assert (again.fed, counters.done_bytes, counters.resent_bytes) == (WHOLE, WHOLE, 0)
    # The third MiB is zeros, and the rest is what had not come.
    assert counters.wire_bytes < WHOLE - 3 * MIB + MIB // 2


@pytest.mark.parametrize("harm", ["flipped", "cut", "chain", "about"])
def test_a_spool_that_does_not_hold_is_believed_as_far_as_it_does(stage, source, harm):
    broken_off(stage, source, 3 * MIB)
    data, chain, about = (stage.directory / f"spool.{name}" for name in ("data", "chain", "json"))
    if harm == "flipped":
        with data.open("r+b") as file:
            file.seek(MIB + 5)
            byte = file.read(1)
            file.seek(MIB + 5)
            file.write(bytes([byte[0] ^ 1]))
    elif harm == "cut":
        os.truncate(data, MIB + 17)
    elif harm == "chain":
        os.truncate(chain, 32)
    else:
        about.write_bytes(b"{")
    again = CatStage(stage.directory)
    with serving(source) as server:
        counters = Call(again).run(at(server.port))
    assert again.digest == digest(source)
    kept = 0 if harm == "about" else MIB
    # Of the five MiB one is zeros, which cost nothing on the wire.
    assert WHOLE - kept - MIB < counters.wire_bytes < WHOLE - kept - MIB // 2


def test_a_stream_that_is_another_one_begins_again(stage, source):
    broken_off(stage, source, 3 * MIB)
    source.write_bytes(os.urandom(WHOLE))
    again = CatStage(stage.directory)
    with serving(source) as server:
        counters = Call(again).run(at(server.port))
    assert again.digest == digest(source)
    assert [each for each, _token in again.starts] == ["cat-1", "cat-1"]
    assert counters.resent_bytes == 3 * MIB
    assert counters.done_bytes == WHOLE


def test_a_stream_that_is_shorter_now_begins_again(stage, source):
    broken_off(stage, source, 3 * MIB)
    source.write_bytes(source.read_bytes()[: 2 * MIB])
    again = CatStage(stage.directory)
    with serving(source) as server:
        counters = Call(again).run(at(server.port))
    assert again.digest == digest(source)
    assert counters.resent_bytes == 3 * MIB


def test_the_stream_of_another_source_is_another_stream(stage, source):
    """The first source is no source any more: its successor begins at the first byte."""
    broken_off(stage, source, 3 * MIB)
    again = CatStage(stage.directory)
    with serving(source) as server:
        counters = Call(again).run(at(server.port, "b"))
    assert again.digest == digest(source)
    assert (again.fed, counters.done_bytes) == (WHOLE, WHOLE)
    assert not (stage.directory / "spool.json").exists() or again.starts == [("cat-1", "")]


def test_a_source_that_stays_away_is_replaced(monkeypatch, stage, source, tmp_path):
    """After a while another begins anew, and what had come is counted as sent again."""
    monkeypatch.setattr(stream_receiver, "STAY_S", 0.0)
    other = tmp_path / "other"
    other.write_bytes(os.urandom(WHOLE))
    cut: list[int] = []

    def hurt(_data: bytearray, passed: int) -> None:
        if cut or passed > 2 * MIB:
            cut.append(passed)
            raise OSError("cut")

    with serving(source) as server, Proxy(server.port, hurt) as proxy, serving(other) as second:
        counters = Call(stage).run(at(proxy.port, "a"), at(second.port, "b"))
    assert stage.digest == digest(other)
    assert counters.resent_bytes >= MIB
    assert counters.done_bytes == WHOLE


def test_other_ends_are_another_stream(stage, source):
    broken_off(stage, source, 3 * MIB)
    again = CatStage(stage.directory)
    with serving(source) as server:
        Call(again, origin=replace(ORIGIN, native_base="another")).run(at(server.port))
    assert again.digest == digest(source)
    assert again.fed == WHOLE


def test_a_stage_that_is_not_to_be_spooled(stage, source):
    """Neither kept nor read, and what an earlier start has kept is removed."""
    broken_off(stage, source, 3 * MIB)
    names = {"spool.json", "spool.data", "spool.chain"}
    assert {each.name for each in stage.directory.iterdir()} >= names
    again = CatStage(stage.directory)
    again.spools = False
    assert broken_off(again, source, 3 * MIB) == 3 * MIB
    assert not names.intersection(each.name for each in stage.directory.iterdir())
    with serving(source) as server:
        Call(again).run(at(server.port))
    assert again.digest == digest(source)


@pytest.mark.parametrize("bound", [0, 2 * MIB])
def test_a_spool_has_a_bound(stage, source, bound):
    fed = broken_off(stage, source, 3 * MIB, spool_bytes=bound)
    assert fed == 3 * MIB
    assert not [each for each in stage.directory.iterdir() if each.name.startswith("spool")]
    again = CatStage(stage.directory)
    with serving(source) as server:
        counters = Call(again, bound).run(at(server.port))
    assert again.digest == digest(source)
    assert counters.wire_bytes > WHOLE - MIB - 1000


def test_a_stage_that_is_complete_asks_nobody(stage, source):
    with serving(source) as server:
        Call(stage).run(at(server.port))
    again = CatStage(stage.directory)
    counters = Call(again).run(at(1))
    assert counters.wire_bytes == 0
    assert not again.starts


def test_a_token_goes_before_the_spool(tmp_path, source):
    stage = CatStage(tmp_path / "stage", token="where-i-was")
    seen: list[StreamWish] = []

    def authorize(hello: Hello) -> ServedStream:
        assert hello.stream is not None
        seen.append(hello.stream)
        return ServedStream(CatStream(source, "cat-1", nothing))

    server = BlockServer(Address("127.0.0.1", 0), authorize)
    server.start()
    try:
        Call(stage).run(at(server.port))
    finally:
        assert server.stop(10.0)
    assert [(wish.offset, wish.token) for wish in seen] == [(0, "where-i-was")]
    assert stage.starts == [("cat-1", "where-i-was")]
    assert not (stage.directory / "spool.data").exists()


@pytest.mark.parametrize("when", ["asked", "sent"])
def test_a_source_that_cannot_go_on_from_a_token_begins_anew(tmp_path, source, when):
    stage = CatStage(tmp_path / "stage", token="where-i-was")
    seen: list[str] = []

    def authorize(hello: Hello) -> ServedStream:
        assert hello.stream is not None
        seen.append(hello.stream.token)
        if hello.stream.token and when == "asked":
            raise Unauthenticated("TICKET_INVALID", "the resume token is refused: it is not there any more")
        return ServedStream(CatStream(tmp_path / "gone" if hello.stream.token else source, "cat-1", nothing))

    server = BlockServer(Address("127.0.0.1", 0), authorize)
    server.start()
    try:
        Call(stage).run(at(server.port))
    finally:
        assert server.stop(10.0)
    assert stage.digest == digest(source)
    assert seen == ["where-i-was", ""]
    assert stage.starts[-1] == ("cat-1", "")


def test_a_source_that_refuses_without_a_token_too_is_left(tmp_path):
    stage = CatStage(tmp_path / "stage", token="where-i-was")
    seen: list[str] = []

    def authorize(hello: Hello) -> ServedStream:
        assert hello.stream is not None
        seen.append(hello.stream.token)
        raise Unauthenticated("TICKET_INVALID", "this ticket was never given out")

    server = BlockServer(Address("127.0.0.1", 0), authorize)
    server.start()
    try:
        with pytest.raises(Unauthenticated):
            Call(stage).run(at(server.port))
    finally:
        assert server.stop(10.0)
    assert seen == ["where-i-was", ""]
    assert not stage.starts


def test_a_file_system_that_cannot_write_it_damages_the_source(stage, source, tmp_path):
    with serving(tmp_path / "not there") as server, pytest.raises(Damaged) as damaged:
        Call(stage).run(at(server.port))
    assert damaged.value.reason == "SOURCE_DAMAGED"
    assert not stage.complete


def test_the_target_s_own_error_ends_it(stage, source):
    def feed(_data: memoryview) -> None:
        raise Refused("NO_SPACE", "full")

    stage.feed = feed
    with serving(source) as server, pytest.raises(Refused) as refused:
        Call(stage).run(at(server.port))
    assert refused.value.reason == "NO_SPACE"


def test_what_the_target_s_file_system_refuses_at_the_end_is_not_kept(stage, source):
    def finish() -> None:
        raise Damaged("SOURCE_DAMAGED", "it is another snapshot")

    stage.finish = finish
    with serving(source) as server, pytest.raises(Damaged, match="another snapshot"):
        Call(stage).run(at(server.port))
    assert not (stage.directory / "spool.json").exists()


def test_a_stop_is_noticed(stage, source):
    call = Call(stage)

    def on_progress(_counters: Counters) -> None:
        call.stop.set()

    call.on_progress = on_progress
    with serving(source) as server, pytest.raises(Stopped):
        call.run(at(server.port))


def test_who_waits_is_told_so(monkeypatch, source):
    """The stream goes on once a WAIT has been seen, so without one this does not end."""
    monkeypatch.setattr(pumping, "WAIT_S", 0.05)
    monkeypatch.setattr(pumping, "STOP_LOOK_S", 0.02)
    go_on = threading.Event()

    def before(position: int) -> None:
        if position >= 2 * MIB:
            assert go_on.wait(30)

    buffer, kinds = FrameBuffer(buffer_bytes=4 * MIB), []

    def send(data: bytes | memoryview) -> None:
        buffer.space()[: len(data)] = data
        buffer.filled(len(data))
        while (frame := buffer.next()) is not None:
            kinds.append(frame.header.kind)
            if frame.header.kind is Kind.WAIT:
                go_on.set()
            if frame.header.kind is Kind.END:
                assert decode_end(frame).length == WHOLE

    with contextlib.closing(Pump(CatStream(source, "cat-1", before), "test")) as pump:
        assert pump.run(StreamWish(("cat-1",)), send, lambda: False)
    assert Kind.WAIT in kinds
    assert kinds[-1] is Kind.END
    assert kinds.count(Kind.DATA) + kinds.count(Kind.ZERO) == 6


@pytest.mark.parametrize("offset", [-1, 5, MIB + 1])
def test_a_wish_that_nobody_can_have(source, stage, offset):
    with serving(source) as server:
        call = Call(stage)
        hello = replace(HELLO, stream=StreamWish(("cat-1",), offset))
        with pytest.raises(ResilverError) as refused:
            _greet(call, at(server.port), hello)
    assert refused.value.reason == "INVALID_FIELD"


def _greet(call: Call, source: SourceAddress, hello: Hello) -> None:
    from agent.stream.counters import Meter
    from agent.stream.link import Link, SourceFailed

    meter = Meter([source.node], done_bytes=0, total_bytes=0, clock=lambda: 0.0)
    buffer = FrameBuffer(buffer_bytes=4 * MIB)
    with Link(source, buffer, meter, waited=lambda _s: None, silence_timeout_s=5.0) as link:
        try:
            link.greet(hello)
        except SourceFailed as failed:
            raise failed.error from failed
