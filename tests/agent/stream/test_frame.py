"""The codec: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

import contextlib
import os
import struct

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from agent.stream import frame as frames
from agent.stream.frame import (
    CONTROL_BYTES_MAX,
    FLAG_ZSTD,
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    VOLUME_BYTES_MAX,
    FrameBuffer,
    Header,
    Hello,
    Kind,
    Range,
    Welcome,
)
from resilver.errors import Damaged, Refused, error_for

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
BODIES = st.binary(min_size=1, max_size=2000)
OFFSETS = st.integers(0, VOLUME_BYTES_MAX - PAYLOAD_BYTES_MAX)


def read(data, **bounds):
    """Every frame in the data with its payload; Damaged if anything is wrong or left over."""
    buffer = FrameBuffer(**bounds)
    found, at = [], 0
    while at < len(data):
        space = buffer.space()
        part = data[at : at + len(space)]
        space[: len(part)] = part
        buffer.filled(len(part))
        at += len(part)
        while (frame := buffer.next()) is not None:
            found.append((frame.header, bytes(frame.payload())))
    buffer.finish()
    return found


def only(data):
    [(header, body)] = read(data)
    return frames.Frame(header._replace(flags=0, stored=len(body)), memoryview(body))


SAMPLES = [
    frames.encode_hello(Hello("t", "r", "v", "s", "n")),
    frames.encode_welcome(Welcome(4096)),
    frames.encode_request([(0, 4096), (1 << 40, PAYLOAD_BYTES_MAX)]),
    frames.encode(Kind.DATA, b"some bytes of a volume", offset=8192),
    frames.encode_zero(4096, 1 << 40),
    frames.encode_error(Refused("TARGET_GONE", "pruned")),
    frames.encode(Kind.BYE),
]


@given(BODIES, OFFSETS, st.booleans())
def test_data_comes_out_as_it_went_in(body, offset, compress):
    [(header, out)] = read(frames.encode(Kind.DATA, body, offset=offset, compress=compress))
    assert out == body
    assert (header.kind, header.offset, header.length) == (Kind.DATA, offset, len(body))


@given(TEXTS, TEXTS, TEXTS, TEXTS, TEXTS)
def test_hello_comes_out_as_it_went_in(ticket, resync_id, volume, target, node):
    hello = Hello(ticket, resync_id, volume, target, node)
    assert frames.decode_hello(only(frames.encode_hello(hello))) == hello


@given(st.lists(st.tuples(OFFSETS, st.integers(1, PAYLOAD_BYTES_MAX)), max_size=50), st.booleans())
def test_requests_come_out_as_they_went_in(ranges, packed):
    assert frames.decode_request(only(frames.encode_request(ranges, packed=packed))) == [Range(*row) for row in ranges]


def test_a_packed_request_takes_little_room():
    scattered = [(at * 409_600 // 4096 * 4096, 4096) for at in range(1024)]
    assert len(frames.encode_request(scattered, packed=True)) * 4 < len(frames.encode_request(scattered))


def test_a_packed_request_that_would_unfold_beyond_its_bound_is_refused():
    body = bytes(CONTROL_BYTES_MAX + 16)
    with pytest.raises(Damaged):
        read(frames.encode(Kind.REQUEST, body, compress=True))


@given(st.sampled_from(["TARGET_GONE", "TICKET_INVALID", "IO_ERROR", "A_NEWER_REASON"]), TEXTS)
def test_errors_come_out_in_their_class(reason, message):
    error = frames.decode_error(only(frames.encode_error(error_for(reason, message))))
    assert type(error) is type(error_for(reason, message))
    assert (error.reason, error.message) == (reason, message)


@given(st.lists(st.sampled_from(SAMPLES), max_size=8), st.lists(st.integers(1, 150), min_size=1, max_size=60))
def test_frames_come_out_whole_however_the_stream_is_cut(chosen, cuts):
    data = b"".join(chosen)
    buffer = FrameBuffer(CONTROL_BYTES_MAX)
    count = at = turn = 0
    while at < len(data):
        part = data[at : at + cuts[turn % len(cuts)]]
        space = buffer.space()
        space[: len(part)] = part
        buffer.filled(len(part))
        at, turn = at + len(part), turn + 1
        while (frame := buffer.next()) is not None:
            expected = only(chosen[count])
            assert frame.header == expected.header
            assert frame.payload() == expected.stored
            count += 1
    buffer.finish()
    assert count == len(chosen)


@pytest.mark.parametrize("sample", SAMPLES, ids=[sample[5] for sample in SAMPLES])
def test_every_single_bit_flip_is_refused(sample):
    for bit in range(8 * len(sample)):
        hurt = bytearray(sample)
        hurt[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged) as refused:
            read(bytes(hurt))
        assert refused.value.reason == "DIGEST_MISMATCH"


@pytest.mark.parametrize("sample", SAMPLES, ids=[sample[5] for sample in SAMPLES])
def test_every_truncation_is_refused(sample):
    for length in range(1, len(sample)):
        with pytest.raises(Damaged) as refused:
            read(sample[:length])
        assert refused.value.reason == "DIGEST_MISMATCH"


def test_a_flipped_bit_in_compressed_data_is_refused_or_changes_nothing():
    """Zstandard has bits that mean nothing: flipping one of those gives back the very same bytes."""
    body = os.urandom(40) * 20
    sample = frames.encode(Kind.DATA, body, compress=True)
    assert len(sample) < len(body)
    refused = 0
    for bit in range(8 * len(sample)):
        hurt = bytearray(sample)
        hurt[bit // 8] ^= 1 << bit % 8
        try:
            [(_header, out)] = read(bytes(hurt))
        except Damaged:
            refused += 1
        else:
            assert out == body
    assert refused >= 8 * (len(sample) - 2)


@given(st.binary(max_size=400))
def test_garbage_is_refused(garbage):
    if garbage:
        with pytest.raises(Damaged):
            read(garbage)


@given(st.binary(max_size=300), st.sampled_from(list(Kind)))
def test_a_sound_frame_with_a_senseless_body_is_refused_by_its_decoder(body, kind):
    """Whoever speaks our form may still speak nonsense: the answer is an error of ours, or a value."""
    decoders = {
        Kind.HELLO: frames.decode_hello,
        Kind.WELCOME: frames.decode_welcome,
        Kind.REQUEST: frames.decode_request,
        Kind.ERROR: frames.decode_error,
    }
    frame = frames.Frame(Header(kind, 0, 0, len(body), len(body), blake3(body).digest()), memoryview(body))
    for decode in decoders.values():
        with contextlib.suppress(Damaged):
            decode(frame)


def test_deep_json_is_refused():
    for body in (b"[" * 60_000, b'{"ticket":' * 6000, b'{"x":' + b"[" * 60_000):
        with pytest.raises(Damaged):
            frames.decode_hello(only(frames.encode(Kind.HELLO, body)))


@pytest.mark.parametrize(
    "header",
    [
        Header(Kind.DATA, 0, 0, 0, 0, bytes(32)),
        Header(Kind.DATA, 0, 0, 10, 11, bytes(32)),
        Header(Kind.DATA, 0, 0, PAYLOAD_BYTES_MAX + 1, PAYLOAD_BYTES_MAX + 1, bytes(32)),
        Header(Kind.DATA, FLAG_ZSTD, 0, PAYLOAD_BYTES_MAX + 1, 10, bytes(32)),
        Header(Kind.DATA, FLAG_ZSTD, 0, 10, 0, bytes(32)),
        Header(Kind.DATA, 2, 0, 10, 10, bytes(32)),
        Header(Kind.DATA, 0, VOLUME_BYTES_MAX - 9, 10, 10, bytes(32)),
        Header(Kind.ZERO, 0, 0, 0, 0, bytes(32)),
        Header(Kind.ZERO, 0, 0, 10, 10, bytes(32)),
        Header(Kind.ZERO, FLAG_ZSTD, 0, 10, 0, bytes(32)),
        Header(Kind.ZERO, 0, 0, (1 << 64) - 1, 0, bytes(32)),
        Header(Kind.BYE, 0, 1, 0, 0, bytes(32)),
        Header(Kind.HELLO, 0, 0, CONTROL_BYTES_MAX + 1, CONTROL_BYTES_MAX + 1, bytes(32)),
        Header(99, 0, 0, 0, 0, bytes(32)),
    ],
)
def test_a_header_that_cannot_be_meant_is_refused_though_its_check_holds(header):
    buffer = bytearray(HEADER_BYTES)
    frames.pack_header(memoryview(buffer), 0, header)
    with pytest.raises(Damaged):
        frames.unpack_header(memoryview(buffer))


def test_another_version_is_told_from_damage():
    header = bytearray(frames.encode(Kind.BYE))
    header[4] = 2
    header[-8:] = blake3(header[:-8]).digest(8)
    with pytest.raises(Refused) as refused:
        read(bytes(header))
    assert refused.value.reason == "NOT_SUPPORTED"


def test_a_server_makes_no_room_for_large_frames():
    with pytest.raises(Damaged):
        read(frames.encode(Kind.DATA, bytes(CONTROL_BYTES_MAX + 1)), payload_bytes_max=CONTROL_BYTES_MAX)


def compressed(stored, length, body):
    header = bytearray(HEADER_BYTES)
    frames.pack_header(
        memoryview(header), 0, Header(Kind.DATA, FLAG_ZSTD, 0, length, len(stored), blake3(body).digest())
    )
    return bytes(header) + stored


def test_compressed_data_is_bounded_by_what_its_header_says():
    body = bytes(PAYLOAD_BYTES_MAX)
    sound = zstandard.ZstdCompressor().compress(body)
    assert read(compressed(sound, len(body), body))[0][1] == body
    sizeless = zstandard.ZstdCompressor(write_content_size=False).compress(body)
    bomb = zstandard.ZstdCompressor().compress(bytes(64 * PAYLOAD_BYTES_MAX))
    # A frame that claims 2^62 bytes: magic, descriptor with an eight-byte size, size, an empty last block.
    claim = struct.pack("<IBQ", 0xFD2FB528, 0xE0, 1 << 62) + b"\x01\x00\x00"
    for stored in (sizeless, bomb, claim, sound[:-1], sound + b"x", sound + sound, b"junk"):
        with pytest.raises(Damaged) as refused:
            read(compressed(stored, len(body), body))
        assert refused.value.reason == "DIGEST_MISMATCH"


def test_after_a_damaged_payload_the_next_frame_still_reads():
    hurt = bytearray(frames.encode(Kind.DATA, b"abc", offset=1) + frames.encode(Kind.DATA, b"def", offset=2))
    hurt[HEADER_BYTES] ^= 1
    buffer = FrameBuffer()
    buffer.space()[: len(hurt)] = hurt
    buffer.filled(len(hurt))
    with pytest.raises(Damaged):
        buffer.next().payload()
    assert bytes(buffer.next().payload()) == b"def"


def test_after_a_damaged_header_nothing_is_read_any_more():
    hurt = bytearray(frames.encode(Kind.BYE) * 2)
    hurt[0] ^= 1
    buffer = FrameBuffer()
    buffer.space()[: len(hurt)] = hurt
    buffer.filled(len(hurt))
    for _ in range(3):
        with pytest.raises(Damaged):
            buffer.next()
    buffer.clear()
    assert buffer.next() is None


@given(st.integers(0, 40), st.integers(0, 39))
def test_zeros_are_told_from_data(length, position):
    body = bytearray(length)
    assert frames.reads_as_zero(memoryview(body))
    if position < length:
        body[position] = 1
        assert not frames.reads_as_zero(memoryview(body))
