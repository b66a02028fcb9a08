"""The stream that `zfs send` writes: read record by record as it passes, and changed in its first record where needed.

A stream is a row of records of 312 bytes, some with a payload behind them. The first (BEGIN) names the snapshot that
it makes and the one that it stands on, by guid; the last (END) carries a Fletcher-4 checksum of all before it. OpenZFS
puts such a running checksum at the end of every record too, zfs-fuse leaves those zero.

* **A digest of the contents.** What ZFS makes of a stream can be read back by sending it again. The two are not equal
  byte for byte (the name of the dataset stands in the first record, and holes may be told in other pieces), but every
  object and every block of data must be: those go into the digest, blocks of zeros left out, because one side may keep
  them and the other make them holes. Streams of blocks as they are stored may differ in more: ZFS compresses by the
  target's own property what came uncompressed. So there is a second digest, of the objects and of where data is.
* **A change of the first record** (`Change`): where the stream is to be received as a clone of its base, or on top of a
  later snapshot that equals the base. Fletcher-4 is linear, so the difference that a change makes is carried along with
  two additions for each record, and every checksum behind it is set right without summing up the stream again.

Strict and bounded: a record of unknown type, a payload larger than a block of ZFS can be, or bytes behind the end are
`Damaged("SOURCE_DAMAGED")`. Pure: bytes in, bytes out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import blake3

from resilver.errors import Damaged, Refused

RECORD_BYTES: Final = 312
PAYLOAD_MAX_BYTES: Final = 16 << 20

_MAGIC: Final = 0x2F5BACBAC
_SWAPPED: Final = int.from_bytes(_MAGIC.to_bytes(8, "little"), "big")
_SINGLE: Final = 1
_CLONE: Final = 1
_BEGIN, _OBJECT, _FREE_OBJECTS, _WRITE, _FREE, _END, _BY_REFERENCE, _SPILL, _EMBEDDED, _RANGE = range(10)
_FLAGS_AT: Final = 36
_FROM_GUID_AT: Final = 48
_END_SUM_AT: Final = 8
_SUM_AT: Final = 280
_SUM_BYTES: Final = 32
_WORD: Final = (1 << 64) - 1
_ZEROS: Final = bytes(128 << 10)


@dataclass(frozen=True, slots=True)
class Begin:
    """What a stream says of itself: guids as ZFS prints them, `from_guid` empty for a whole snapshot."""

    to_guid: str
    from_guid: str
    to_name: str
    clone: bool


@dataclass(frozen=True, slots=True)
class Contents:
    """What a stream has told: all of it, what of it does not depend on how blocks are stored, and the longest block."""

    digest: str
    outline: str
    block_bytes_max: int


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be written into the first record; None leaves it as it is."""

    clone: bool | None = None
    from_guid: str | None = None


_Sums = tuple[int, int, int, int]
"""By how much the four running sums of Fletcher-4 differ from those of the stream as it came."""

_NONE: Final[_Sums] = (0, 0, 0, 0)


def _same(sums: _Sums, words: int) -> _Sums:
    """After so many words that were left as they are."""
    a, b, c, d = sums
    two, three = words * (words + 1) // 2, words * (words + 1) * (words + 2) // 6
    return (
        a,
        (b + words * a) & _WORD,
        (c + words * b + two * a) & _WORD,
        (d + words * c + two * b + three * a) & _WORD,
    )


def _changed(sums: _Sums, old: bytes, new: bytes) -> _Sums:
    """After words that were changed."""
    a, b, c, d = sums
    count = len(old) // 4
    for was, now in zip(struct.unpack(f"<{count}I", old), struct.unpack(f"<{count}I", new), strict=True):
        a = (a + now - was) & _WORD
        b = (b + a) & _WORD
        c = (c + b) & _WORD
        d = (d + c) & _WORD
    return a, b, c, d


def _applied(sums: _Sums, stored: bytes) -> bytes:
    """A checksum set right."""
    return struct.pack(
        "<4Q", *((had + more) & _WORD for had, more in zip(struct.unpack("<4Q", stored), sums, strict=True))
    )


class Reader:
    """Reads one stream. `begin` is there once the first record has passed, `ended` with the last."""

    def __init__(self, change: Change | None = None) -> None:
        self.begin: Begin | None = None
        self.ended = False
        self.content_records = 0
        self.data_bytes = 0
        self.block_bytes_max = 0
        self._change: Final = change
        self._sums = _NONE
        self._digest = blake3.blake3()
        self._outline = blake3.blake3()
        self._head = bytearray()
        self._key: bytes | None = None
        self._payload = bytearray()
        self._payload_left = 0

    @property
    def whole(self) -> bool:
        return self.ended and not self._head

    def digest(self) -> str:
        """The digest of the objects and data that have passed."""
        return self._digest.copy().hexdigest()

    def contents(self) -> Contents:
        return Contents(self.digest(), self._outline.copy().hexdigest(), self.block_bytes_max)

    def feed(self, data: memoryview) -> Iterator[bytes | memoryview]:
        """Takes the next bytes; what is to be passed on comes in order, and has to be taken to the end."""
        at = 0
        while at < len(data):
            if self._payload_left:
                piece = data[at : at + self._payload_left]
                self._take_payload(piece)
                yield piece
                at += len(piece)
                continue
            if self.ended:
                raise _damaged("goes on behind its end")
            piece = data[at : at + RECORD_BYTES - len(self._head)]
            self._head += piece
            at += len(piece)
            if len(self._head) == RECORD_BYTES:
                record, self._head = self._head, bytearray()
                yield self._take_record(record)

    def _take_payload(self, piece: memoryview) -> None:
        self._payload_left -= len(piece)
        if self._key is not None:
            self._payload += piece
        if not self._payload_left:
            self._finish_record()

    def _take_record(self, record: bytearray) -> bytes:
        kind, length = struct.unpack_from("<II", record)
        if (kind == _BEGIN) != (self.begin is None):
            raise _damaged("does not begin with its first record" if self.begin is None else "begins twice")
        if kind == _BEGIN:
            self._begin(record)
            self._key, size = None, length
        else:
            self._key, size = _measure(kind, record)
            self._set_right(kind, record)
        if size > PAYLOAD_MAX_BYTES or size % 4:
            raise _damaged(f"has a record of {size:,} bytes")
        self.ended = kind == _END
        self.content_records += kind not in {_BEGIN, _END}
        if kind in {_WRITE, _EMBEDDED, _SPILL}:
            self.data_bytes += size
        self._payload_left = size
        if self._sums != _NONE:
            self._sums = _same(self._sums, size // 4)
        if not size:
            self._finish_record()
        return bytes(record)

    def _begin(self, record: bytearray) -> None:
        magic, version, _time, _type, flags, to_guid, from_guid = struct.unpack_from("<QQQIIQQ", record, 8)
        if magic == _SWAPPED:
            raise Refused("NOT_SUPPORTED", "the stream comes from a machine of the other byte order")
        if magic != _MAGIC or version & 3 != _SINGLE:
            raise _damaged("is none of a single snapshot")
        name = bytes(record[56:]).split(b"\0", 1)[0].decode(errors="replace")
        self.begin = Begin(str(to_guid), str(from_guid) if from_guid else "", name, bool(flags & _CLONE))
        old = bytes(record)
        change = self._change
        if change is not None and change.clone is not None:
            struct.pack_into("<I", record, _FLAGS_AT, flags | _CLONE if change.clone else flags & ~_CLONE)
        if change is not None and change.from_guid is not None:
            struct.pack_into("<Q", record, _FROM_GUID_AT, int(change.from_guid or 0))
        self._sums = _changed(self._sums, old, bytes(record))

    def _set_right(self, kind: int, record: bytearray) -> None:
        """Every checksum in a record. What END tells is the sum before END; the one in a tail covers all before it."""
        if self._sums == _NONE:
            return
        before, at = self._sums, 0
        for place in (_END_SUM_AT, _SUM_AT) if kind == _END else (_SUM_AT,):
            self._sums = _same(self._sums, (place - at) // 4)
            old = bytes(record[place : place + _SUM_BYTES])
            new = _applied(before if place == _END_SUM_AT else self._sums, old) if any(old) else old
            record[place : place + _SUM_BYTES] = new
            self._sums = _changed(self._sums, old, new)
            at = place + _SUM_BYTES

    def _finish_record(self) -> None:
        key, self._key = self._key, None
        payload, self._payload = self._payload, bytearray()
        if key is None or _is_zero(payload):
            return
        self._digest.update(key)
        self._digest.update(payload)
        self._outline.update(key)
        if key[0] == _WRITE:
            self.block_bytes_max = max(self.block_bytes_max, *struct.unpack_from("<Q", key, 20))
        else:
            self._outline.update(payload)


def _measure(kind: int, record: bytearray) -> tuple[bytes | None, int]:
    """What a record is called in the digest (None: it is not in it), and how long its payload is."""
    if kind == _OBJECT:
        number, object_type, bonus_type, _block, bonus = struct.unpack_from("<QIIII", record, 8)
        raw: int = struct.unpack_from("<I", record, 36)[0]
        return struct.pack("<IQIII", kind, number, object_type, bonus_type, bonus), raw or _rounded(bonus)
    if kind == _WRITE:
        number, _type, _pad, offset, logical = struct.unpack_from("<QIIQQ", record, 8)
        compressed: int = struct.unpack_from("<Q", record, 96)[0]
        return struct.pack("<IQQQ", kind, number, offset, logical), compressed or logical
    if kind == _SPILL:
        number, length = struct.unpack_from("<QQ", record, 8)
        stored: int = struct.unpack_from("<Q", record, 40)[0]
        return struct.pack("<IQQ", kind, number, length), stored or length
    if kind == _EMBEDDED:
        number, offset, length = struct.unpack_from("<QQQ", record, 8)
        size: int = struct.unpack_from("<I", record, 52)[0]
        return struct.pack("<IQQQ", kind, number, offset, length), _rounded(size)
    if kind in {_FREE_OBJECTS, _FREE, _END, _RANGE}:
        return None, 0
    raise _damaged(f"has a record of unknown type {kind}")


def _rounded(size: int) -> int:
    return (size + 7) & ~7


def _is_zero(payload: bytearray) -> bool:
    if not payload:
        return False
    view = memoryview(payload)
    return all(view[at : at + len(_ZEROS)] == _ZEROS[: len(view) - at] for at in range(0, len(view), len(_ZEROS)))


def _damaged(what: str) -> Damaged:
    return Damaged("SOURCE_DAMAGED", f"the stream {what}: it is not what zfs send writes")
