"""The stream as bytes: read in any pieces, changed in its first record, and damaged ones refused."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from agent.backends.zfs_stream import PAYLOAD_MAX_BYTES, Change, Reader
from resilver.errors import Damaged, Refused

MAGIC = 0x2F5BACBAC
BEGIN, OBJECT, WRITE, FREE, END = 0, 1, 3, 4, 5


def fletcher(data: bytes) -> bytes:
    """Fletcher-4, the plain way."""
    a = b = c = d = 0
    for word in np.frombuffer(data, dtype="<u4").tolist():
        a = (a + word) & (2**64 - 1)
        b = (b + a) & (2**64 - 1)
        c = (c + b) & (2**64 - 1)
        d = (d + c) & (2**64 - 1)
    return struct.pack("<4Q", a, b, c, d)


def begin(flags: int = 0, from_guid: int = 7, magic: int = MAGIC, kind: int = 1) -> bytes:
    return struct.pack("<IIQQQIIQQ256s", BEGIN, 0, magic, kind, 1, 2, flags, 42, from_guid, b"tank/a@t")


def record(kind: int, body: bytes = b"", payload: bytes = b"") -> bytes:
    return (struct.pack("<II", kind, 0) + body).ljust(312, b"\0") + payload


def write(number: int, offset: int, payload: bytes) -> bytes:
    return record(WRITE, struct.pack("<QIIQQ", number, 19, 0, offset, len(payload)), payload)


def stream(records: list[bytes], *, tails: bool, **options: int) -> bytes:
    """A stream as zfs-fuse writes it or, with `tails`, as OpenZFS does: a running checksum in each record."""
    out = begin(**options)
    for one in records:
        head, payload = one[:312], one[312:]
        if tails:
            head = head[:280] + fletcher(out + head[:280])
        out += head + payload
    last = struct.pack("<II", END, 0) + fletcher(out) + struct.pack("<Q", 42)
    last = last.ljust(312, b"\0")
    if tails:
        last = last[:280] + fletcher(out + last[:280])
    return out + last


def pieces(data: bytes, seed: int) -> list[memoryview]:
    chance, at, made = random.Random(seed), 0, []
    while at < len(data):
        length = chance.randrange(1, 700)
        made.append(memoryview(data)[at : at + length])
        at += length
    return made


def passed(reader: Reader, data: bytes, seed: int = 1) -> bytes:
    return b"".join(bytes(piece) for part in pieces(data, seed) for piece in reader.feed(part))


CONTENT = [
    record(OBJECT, struct.pack("<QIIII", 5, 19, 44, 512, 12), bytes(range(16))),
    write(5, 0, random.Random(1).randbytes(4096)),
    record(FREE, struct.pack("<QQQ", 5, 4096, 9)),
    write(5, 8192, random.Random(2).randbytes(1024)),
]


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_changed_stream_is_what_its_sender_would_have_written(tails, seed):
    for change, options in (
        (Change(clone=True), {"flags": 1}),
        (Change(from_guid="123456789012345678"), {"from_guid": 123456789012345678}),
        (Change(clone=True, from_guid="9"), {"flags": 1, "from_guid": 9}),
        (None, {}),
    ):
        reader = Reader(change)
        assert passed(reader, stream(CONTENT, tails=tails), seed) == stream(CONTENT, tails=tails, **options)
        assert reader.whole
        assert reader.content_records == 4
        assert reader.data_bytes == 5120
        assert (reader.begin.to_guid, reader.begin.from_guid, reader.begin.to_name) == ("42", "7", "tank/a@t")


def test_the_digest_is_of_the_contents():
    def digest(records, **options):
        reader = Reader()
        passed(reader, stream(records, tails=False, **options))
        return reader.digest()

    same = digest(CONTENT)
    assert digest(CONTENT, from_guid=8, flags=1) == same
    assert digest([*CONTENT, record(FREE, struct.pack("<QQQ", 6, 0, 1))]) == same
    assert digest([*CONTENT, write(6, 0, bytes(4096))]) == same, "zeros may be holes"
    other = [*CONTENT[:1], write(5, 0, random.Random(3).randbytes(4096)), *CONTENT[2:]]
    assert digest(other) != same
    assert digest([*CONTENT, write(6, 0, b"\0" * 4095 + b"\1")]) != same
    assert digest(CONTENT[:3]) != same


@pytest.mark.parametrize(
    "data",
    [
        stream(CONTENT, tails=False)[312:],
        begin() + begin(),
        begin(kind=2),
        begin(magic=5),
        begin() + record(6),
        begin() + record(77),
        begin() + record(WRITE, struct.pack("<QIIQQ", 1, 1, 0, 0, PAYLOAD_MAX_BYTES + 512)),
        stream(CONTENT, tails=False) + b"more",
    ],
)
def test_what_is_no_stream_is_refused(data):
    with pytest.raises(Damaged) as damaged:
        passed(Reader(), data)
    assert damaged.value.reason == "SOURCE_DAMAGED"


def test_a_stream_of_the_other_byte_order_is_refused():
    swapped = int.from_bytes(MAGIC.to_bytes(8, "little"), "big")
    with pytest.raises(Refused):
        passed(Reader(), begin(magic=swapped))


def test_a_stream_that_ends_early_is_not_whole():
    data = stream(CONTENT, tails=True)
    for cut in (1, 312, len(data) - 312, len(data) - 1):
        reader = Reader()
        passed(reader, data[:cut])
        assert not reader.whole
