"""The block stream: frames, what stands in them, map files and journals, and file systems' own streams."""

from __future__ import annotations

import contextlib
import json
import struct
from collections import deque
from typing import Any, Final

import msgspec
import zstandard
from blake3 import blake3

from agent.backends.btrfs_stream import Attribute, Meter, Parser
from agent.backends.zfs_stream import Change, Reader
from agent.stream import frame as frames
from agent.stream import group
from agent.stream.frame import (
    CONTROL_BYTES_MAX,
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    Frame,
    FrameBuffer,
    Header,
    Kind,
    Range,
)
from agent.stream.journal import JOURNAL_FILE, MAP_FILE, Journal
from agent.stream.mapfile import load_map, save_map
from agent.stream.pump import check_wish
from fuzz.target import as_json, fresh, target
from resilver.errors import Damaged, Exhausted, Invalid, Refused, ResilverError
from resilver.fields import check_id, check_name

_DECODERS: Final = {
    Kind.HELLO: (frames.decode_hello, frames.encode_hello),
    Kind.WELCOME: (frames.decode_welcome, frames.encode_welcome),
    Kind.REQUEST: (frames.decode_request, frames.encode_request),
    Kind.END: (frames.decode_end, frames.encode_end),
}
_LENGTHS: Final = struct.Struct("<BBHQQ")


def _frames(data: bytes, payload_bytes_max: int) -> list[frames.Frame]:
    """All frames of some bytes that arrive in pieces; their payloads are looked at before the buffer is used again."""
    buffer, found = FrameBuffer(payload_bytes_max), []
    left = memoryview(data)
    while left:
        space = buffer.space()
        assert len(space), "there is always room for more"
        piece = left[: min(len(space), 1 + len(left) // 3)]
        space[: len(piece)] = piece
        buffer.filled(len(piece))
        left = left[len(piece) :]
        while (frame := buffer.next()) is not None:
            found.append(frame)
            with contextlib.suppress(Damaged):
                assert len(frame.payload()) <= PAYLOAD_BYTES_MAX
            _meaning(frame)
    buffer.finish()
    return found


def _meaning(frame: frames.Frame) -> None:
    """What stands in a frame, and the same written and read again."""
    if frame.header.kind is Kind.ERROR:
        with contextlib.suppress(Damaged):
            told = frames.decode_error(frame)
            again = frames.decode_error(_only(frames.encode_error(told)))
            assert (again.reason, again.message) == (told.reason, told.message)
        return
    coders = _DECODERS.get(frame.header.kind)
    if coders is None:
        return
    decode: Any = coders[0]
    encode: Any = coders[1]
    with contextlib.suppress(Damaged):
        value = decode(frame)
        assert decode(_only(encode(value))) == value


def _only(raw: bytes) -> frames.Frame:
    header = frames.unpack_header(memoryview(raw))
    return frames.Frame(header, memoryview(raw)[HEADER_BYTES:])


@target("frames")
def raw_frames(data: bytes) -> None:
    """Bytes as they come off a socket, at both ends."""
    for payload_bytes_max in (PAYLOAD_BYTES_MAX, CONTROL_BYTES_MAX):
        with contextlib.suppress(Damaged, Refused):
            _frames(data, payload_bytes_max)


@target("frames_sealed")
def sealed_frames(data: bytes) -> None:
    """Headers whose check holds, whatever they say: the first bytes are the fields, the rest the payload."""
    if len(data) < _LENGTHS.size + 2:
        return
    kind, flags, offset_shift, offset, length = _LENGTHS.unpack_from(data)
    body = data[_LENGTHS.size :]
    stored = len(body) if data[-1] & 3 else length & 0xFFFFFFFF
    if data[-2] & 1:
        length = len(body)
    raw = bytearray(HEADER_BYTES)
    digest = blake3(body).digest()
    header = Header(kind, flags, offset >> (offset_shift & 63), length, stored, digest)  # type: ignore[arg-type]
    frames.pack_header(memoryview(raw), 0, header)
    with contextlib.suppress(Damaged, Refused):
        _frames(bytes(raw) + body, PAYLOAD_BYTES_MAX)


@target("packed")
def packed(data: bytes) -> None:
    """Compressed payloads: what zstd makes of them is bounded by what the header says, whatever they say themselves."""
    size = zstandard.FrameParameters
    lengths = {1, len(data), PAYLOAD_BYTES_MAX}
    with contextlib.suppress(zstandard.ZstdError):
        size = zstandard.get_frame_parameters(data)
        lengths.add(min(max(size.content_size, 1), PAYLOAD_BYTES_MAX))
    for length in sorted(lengths):
        raw = bytearray(HEADER_BYTES)
        header = Header(Kind.DATA, frames.FLAG_ZSTD, 0, length, len(data), bytes(32))
        frames.pack_header(memoryview(raw), 0, header)
        with contextlib.suppress(Damaged):
            _frames(bytes(raw) + data, PAYLOAD_BYTES_MAX)
    if 0 < len(data) <= PAYLOAD_BYTES_MAX:
        frame = _only(frames.encode(Kind.DATA, data, compress=True))
        assert bytes(frame.payload()) == data


@target("hello", form="json")
def hello(data: bytes) -> None:
    """The first frame of a connection, and what is checked before anything else happens."""
    if not data or len(data) > CONTROL_BYTES_MAX:
        return
    with contextlib.suppress(Damaged, Invalid, Refused):
        told = frames.decode_hello(_only(frames.encode(Kind.HELLO, data)))
        check_id(told.ticket, "ticket")
        check_id(told.resync_id, "resync_id")
        check_name(told.volume, "volume")
        check_id(told.target, "target")
        check_name(told.target_node, "target_node")
        if told.stream is not None:
            check_wish(told.stream)
        assert frames.decode_hello(_only(frames.encode_hello(told))) == told
    for kind in (Kind.WELCOME, Kind.END, Kind.ERROR):
        _meaning(_only(frames.encode(kind, data)))


@target("map_file")
def map_file(data: bytes) -> None:
    """A map beside a stage: as it stands, and with a digest that fits."""
    with fresh("map") as directory:
        path = directory / MAP_FILE
        for raw in (data, data + blake3(data).digest()):
            path.write_bytes(raw)
            found = load_map(path)
            if found is None:
                continue
            key, delta = found
            delta.check()
            save_map(path, key.base, key.target, delta)
            again = load_map(path)
            assert again is not None
            assert again[0] == key


@target("journal")
def journal(data: bytes) -> None:
    """A map and the journal of it: two bytes say where the one ends."""
    if len(data) < 2:
        return
    at = int.from_bytes(data[:2], "little") % len(data)
    body, log = data[2 : 2 + at], data[2 + at :]
    with fresh("journal") as directory:
        (directory / MAP_FILE).write_bytes(body + blake3(body).digest())
        (directory / JOURNAL_FILE).write_bytes(log)
        with contextlib.suppress(Damaged, Exhausted):
            _read_journal(Journal.load(directory))
        known = load_map(directory / MAP_FILE)
        if known is None:
            return
        # The same with a head that belongs to it, and batches whose digests fit.
        head = struct.pack("<4sIQ32s", b"RSVJ", 1, PAYLOAD_BYTES_MAX, known[0].digest())
        rows = log[: len(log) // 48 * 48]
        batch = struct.pack("<4sI32s", b"RSVR", len(rows) // 48, blake3(rows).digest()) + rows
        (directory / JOURNAL_FILE).write_bytes(head + blake3(head).digest() + batch + log)
        with contextlib.suppress(Damaged, Exhausted):
            _read_journal(Journal.load(directory))


def _read_journal(found: Journal | None) -> None:
    if found is None:
        return
    try:
        records = [record for part in found.records() for record in part]
        assert found.done_bytes <= found.delta.data_bytes
        assert found.done.sum() <= len(records)
    finally:
        found.close()


@target("btrfs_stream")
def btrfs_stream(data: bytes) -> None:
    """What `btrfs send` writes."""
    for size in (len(data) or 1, 7 + len(data) // 40):
        with contextlib.suppress(Damaged):
            parser = Parser()
            for at in range(0, len(data), size):
                for command in parser.feed(data[at : at + size]):
                    _ask(command)
    with contextlib.suppress(Damaged):
        meter = Meter()
        for at in range(0, len(data), 1000):
            meter.feed(data[at : at + 1000])


def _ask(command: Any) -> None:
    for which in Attribute:
        with contextlib.suppress(Damaged):
            command.number(which)
        with contextlib.suppress(Damaged):
            command.time_ns(which)
        with contextlib.suppress(Damaged):
            path = command.path(which)
            assert b".." not in path.split(b"/")
    command.data()


@target("zfs_stream")
def zfs_stream(data: bytes) -> None:
    """What `zfs send` writes, read alone and changed in its first record; a reader gives out what it was given."""
    for change in (None, Change(clone=True, from_guid="7"), Change(clone=False, from_guid="")):
        with contextlib.suppress(Damaged, Refused):
            reader, out = Reader(change), 0
            for at in range(0, len(data), 1000):
                for piece in reader.feed(memoryview(data)[at : at + 1000]):
                    out += len(piece)
            reader.contents()
            assert out <= len(data)


@target("error_frame", form="json")
def error_frame(data: bytes) -> None:
    """What a peer says went wrong becomes an error of the class of its reason, of ours or of nobody's."""
    value = as_json(data)
    if not isinstance(value, dict):
        return
    body = json.dumps(value).encode()[:CONTROL_BYTES_MAX]
    with contextlib.suppress(Damaged):
        told = frames.decode_error(_only(frames.encode(Kind.ERROR, body)))
        assert isinstance(told, ResilverError)
        msgspec.json.encode(told.message)


class _Volume:
    """A reader of some bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size_bytes = len(data)

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self.data[offset : offset + len(view)]

    def announce(self, ranges: Any) -> None: ...

    def close(self) -> None: ...


@target("groups")
def groups(data: bytes) -> None:
    """Small ranges in one frame: what was answered reads the same, and nothing else passes for an answer.

    The first eight bytes are the lengths of ranges, the rest what stands in them.
    """
    lengths = [1 + 3 * each for each in data[:8]]
    body = data[8 : 8 + sum(lengths)]
    ranges, at = [], 0
    for length in lengths:
        if at + length <= len(body):
            ranges.append(Range(at, length))
            at += length
    if not ranges:
        return
    view, pending, written = memoryview(bytearray(1 << 20)), deque(ranges), 0
    packer = zstandard.ZstdCompressor(level=1)
    answered = 0
    while pending:
        answer = group.answer_next(pending, _Volume(body), view, written, packer.compress if data[0] & 1 else _as_is)
        assert answer.size
        written += answer.size
        answered += answer.count
    assert answered == len(ranges)
    found, left = FrameBuffer(), deque(ranges)
    space = found.space()
    space[:written] = view[:written]
    found.filled(written)
    while (frame := found.next()) is not None:
        mine = _answered_by(frame, left)
        pieces = group.pieces(frame, mine)
        if frame.header.kind is not Kind.ZERO:
            told = b"".join(bytes(piece.body) for piece in pieces)
            assert told == body[mine[0].offset : mine[-1].offset + mine[-1].length]
        if frame.header.kind is Kind.GROUP:
            with contextlib.suppress(Damaged):
                group.pieces(frame, mine[::-1])
                assert mine == mine[::-1], "ranges in another order pass for an answer"
            raw = Frame(frame.header._replace(digest=bytes(32)), frame.stored)
            with contextlib.suppress(Damaged):
                group.pieces(raw, mine)
                raise AssertionError("a group without its digest passes for an answer")
    assert not left


def _answered_by(frame: Frame, left: deque[Range]) -> list[Range]:
    mine, length = [left.popleft()], 0
    length = mine[0].length
    while length < frame.header.length:
        mine.append(left.popleft())
        length += mine[-1].length
    return mine


def _as_is(_body: memoryview) -> bytes | None:
    return None
