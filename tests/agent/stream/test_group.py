"""Answers to ranges: what comes out is what was read, at the places that were asked for, and at little cost."""

from __future__ import annotations

from collections import deque

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from agent.stream import frame as frames
from agent.stream.frame import HEADER_BYTES, FrameBuffer, Kind, Range
from agent.stream.group import GROUP_BYTES_MAX, SMALL_BYTES_MAX, answer_next, pieces, seal
from resilver.errors import Damaged

BLOCK = 4096


class Held:
    """A snapshot in memory, of which some blocks are zero."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read_into(self, offset, view):
        view[:] = self.data[offset : offset + len(view)]


def as_it_is(_body):
    return None


def packed(body):
    return zstandard.ZstdCompressor(level=1).compress(body)


def answered(held, ranges, room, pack=as_it_is):
    """All the frames that answer the ranges, a buffer of `room` bytes at a time."""
    pending, view, found = deque(ranges), memoryview(bytearray(room)), []
    while pending:
        at = count = 0
        while pending:
            before = len(pending)
            answer = answer_next(pending, held, view, at, pack)
            assert before - len(pending) == answer.count
            if not answer.size:
                break
            at += answer.size
            count += answer.count
        assert count, "a buffer takes at least one range"
        buffer = FrameBuffer(buffer_bytes=room)
        buffer.space()[:at] = view[:at]
        buffer.filled(at)
        while (frame := buffer.next()) is not None:
            found.append(frames.Frame(frame.header, memoryview(bytes(frame.stored))))
        buffer.finish()
    return found


def taken(found, ranges):
    """What the frames say of each range, in their order."""
    left, bodies = deque(ranges), []
    for frame in found:
        of_frame, length = [], 0
        while length < frame.header.length:
            of_frame.append(left.popleft())
            length += of_frame[-1][1]
        assert (length, of_frame[0][0]) == (frame.header.length, frame.header.offset)
        for (_offset, size), piece in zip(of_frame, pieces(frame, of_frame), strict=True):
            bodies.append(bytes(size) if frame.header.kind is Kind.ZERO else bytes(piece.body))
    assert not left
    return bodies


LENGTHS = st.one_of(
    st.integers(1, 300), st.integers(SMALL_BYTES_MAX - 2, SMALL_BYTES_MAX + 2), st.just(GROUP_BYTES_MAX)
)


@given(st.lists(st.tuples(LENGTHS, st.booleans()), min_size=1, max_size=12), st.booleans(), st.integers(0, 9))
def test_whatever_is_asked_for_comes_whole_and_in_its_order(wished, compress, seed):
    data, ranges = bytearray(), []
    for number, (length, zero) in enumerate(wished):
        ranges.append(Range(len(data), length))
        data += (
            bytes(length)
            if zero
            else bytes((seed + number + at * at) % 255 + 1 for at in range(64)) * (length // 64 + 1)
        )
        del data[ranges[-1].offset + length :]
        data += b"between"
    held, room = Held(bytes(data)), 2 * HEADER_BYTES + GROUP_BYTES_MAX
    found = answered(held, ranges, room, packed if compress else as_it_is)
    assert taken(found, ranges) == [held.data[offset : offset + length] for offset, length in ranges]
    zeros = sum(not any(held.data[offset : offset + length]) for offset, length in ranges)
    assert sum(frame.header.kind is Kind.ZERO for frame in found) == zeros


def scattered(count):
    data = bytes(number * 7 % 251 + 1 for number in range(BLOCK)) * (2 * count)
    return Held(data), [Range(2 * BLOCK * number, BLOCK) for number in range(count)]


def test_scattered_blocks_cost_next_to_nothing_beside_their_bytes():
    held, ranges = scattered(512)
    wire_bytes = sum(HEADER_BYTES + frame.header.stored for frame in answered(held, ranges, 1 << 21))
    assert wire_bytes <= 1.0005 * 512 * BLOCK


def test_a_group_is_believed_only_of_the_ranges_that_were_asked_for():
    held, ranges = scattered(8)
    [frame] = answered(held, ranges, 1 << 20)
    assert frame.header.kind is Kind.GROUP
    assert len(pieces(frame, ranges)) == 8
    for other in (
        [*ranges[:-1], Range(0, BLOCK)],
        [ranges[0], ranges[2], ranges[1], *ranges[3:]],
        [Range(0, 2 * BLOCK), *ranges[2:]],
    ):
        with pytest.raises(Damaged):
            pieces(frame, other)


@pytest.mark.parametrize("at", [0, BLOCK, 8 * BLOCK - 1])
def test_one_bit_anywhere_in_a_group_is_seen(at):
    held, ranges = scattered(8)
    [frame] = answered(held, ranges, 1 << 20)
    hurt = bytearray(frame.stored)
    hurt[at] ^= 1
    with pytest.raises(Damaged) as raised:
        pieces(frames.Frame(frame.header, memoryview(hurt)), ranges)
    assert raised.value.reason == "DIGEST_MISMATCH"


def test_large_ranges_have_a_frame_each():
    held = Held(b"x" * (4 * SMALL_BYTES_MAX))
    ranges = [Range(0, SMALL_BYTES_MAX + 1), Range(SMALL_BYTES_MAX + 1, SMALL_BYTES_MAX + 1)]
    assert [frame.header.kind for frame in answered(held, ranges, 1 << 20)] == [Kind.DATA, Kind.DATA]


def test_sealing_in_place_is_encoding():
    buffer = memoryview(bytearray(HEADER_BYTES + 100))
    buffer[HEADER_BYTES : HEADER_BYTES + 5] = b"hello"
    size = seal(buffer, 0, 77, 5, as_it_is)
    assert bytes(buffer[:size]) == frames.encode(Kind.DATA, b"hello", offset=77)
    buffer[HEADER_BYTES : HEADER_BYTES + 5] = bytes(5)
    size = seal(buffer, 0, 77, 5, as_it_is)
    assert bytes(buffer[:size]) == frames.encode_zero(77, 5)
