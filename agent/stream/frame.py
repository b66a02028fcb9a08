"""The frames of the block stream: a codec without I/O.

A frame is a header of 68 bytes and a payload of at most 1 MiB::

    magic 4 | version 1 | kind 1 | flags 2 | offset 8 | length 8 | stored 4 | digest 32 | check 8

`length` counts the bytes as they read in the volume, `stored` those that follow the header; they differ under the
`ZSTD` flag alone, which `DATA`, `GROUP` and `REQUEST` may have. `digest` is the BLAKE3 of the bytes as they read in the
volume, `check` the BLAKE3 (its first eight bytes) of the sixty before it. Numbers are little-endian. The rules:

* A header is believed only after its check, and a payload only after its digest. So whatever is flipped, cut or made
  up is refused with `Damaged("DIGEST_MISMATCH")`, or reads as exactly the bytes that were sent.
* After a damaged payload the stream is still in step, and the next frame can be read. After a damaged header it is
  not, and the connection is of no more use: every later call of that `FrameBuffer` refuses too.
* The meaning is as strict as the form: unknown flags, a length that a kind cannot have, an offset beyond 2^63 are
  refused. Only a sound header of another version is no damage but `Refused("NOT_SUPPORTED")`.
* Nothing is allocated by a number that came from outside before it was compared with a bound.

`DATA` answers one requested range, `GROUP` several small ones at once (`group.py`), `ZERO` says that such a range reads
as zero (a header only). The other kinds carry small bodies: JSON, or for `REQUEST` pairs of numbers. `WAIT` may come
before any answer: it says that the source lives.

Where a HELLO wishes for a file system's own stream, nothing is requested: `DATA` and `ZERO` come in the order of the
stream, 1 MiB each but the last, and `END` with the length and the chain of all digests (`extend_chain`), by which two
streams with one beginning know each other.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
import numpy as np
import zstandard
from blake3 import blake3

from resilver.errors import Damaged, Refused, ResilverError, error_for

MAGIC: Final = b"RSVB"
VERSION: Final = 1
PAYLOAD_BYTES_MAX: Final = 1 << 20
CONTROL_BYTES_MAX: Final = 64 << 10
FLAG_ZSTD: Final = 1
VOLUME_BYTES_MAX: Final = (1 << 63) - 1
MESSAGE_CHARS_MAX: Final = 2048

_FIELDS: Final = struct.Struct("<4sBBHQQI32s")
_CHECK_BYTES: Final = 8
HEADER_BYTES: Final = _FIELDS.size + _CHECK_BYTES
NO_DIGEST: Final = bytes(32)
_EMPTY: Final = memoryview(b"")
_RANGE: Final = np.dtype([("offset", "<u8"), ("length", "<u8")])
REQUEST_RANGES_MAX: Final = CONTROL_BYTES_MAX // _RANGE.itemsize
_REASON: Final = re.compile(r"[A-Z][A-Z0-9_]{0,62}")

Bytes = bytes | bytearray | memoryview
T = TypeVar("T")


class Kind(IntEnum):
    """What a frame is; client and server in the order in which they meet."""

    HELLO = 1  # client: who, with which ticket, wants what
    WELCOME = 2  # server: the ticket holds
    REQUEST = 3  # client: ranges of at most 1 MiB, answered one by one in their order
    DATA = 4  # server: the bytes of a range
    ZERO = 5  # server: a range that reads as zero
    ERROR = 6  # server: a reason and a sentence; the connection ends
    BYE = 7  # either: nothing more will come, and nothing is wrong
    WAIT = 8  # server: what comes next is still being read, or made
    END = 9  # server: the stream is whole
    GROUP = 10  # server: the bytes of several requested ranges, one after the other


class Header(NamedTuple):
    kind: Kind
    flags: int
    offset: int
    length: int
    stored: int
    digest: bytes


class Frame(NamedTuple):
    """A frame whose header holds; `stored` is as it came, and proves nothing until `payload` has looked at it."""

    header: Header
    stored: memoryview

    def payload(self) -> memoryview:
        """The bytes as they read in the volume; Damaged("DIGEST_MISMATCH") unless they match the digest."""
        header, body = self.header, self.expanded()
        if header.kind is not Kind.ZERO and blake3(body).digest() != header.digest:
            raise _damaged("a payload does not match its digest", header.offset)
        return body

    def expanded(self) -> memoryview:
        """The bytes of the length that the header says, compared with nothing."""
        return _expanded(self.stored, self.header.length) if self.header.flags & FLAG_ZSTD else self.stored


class Range(NamedTuple):
    """A stretch that is asked for, in bytes."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class StreamWish:
    """A stream that is wanted from `offset` on, a multiple of 1 MiB; `chain` is that of all before it, in hex.

    `formats` are those that the target can take; `token` is what its file system said of where it stopped.
    """

    formats: tuple[str, ...]
    offset: int = 0
    chain: str = ""
    token: str = ""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who asks, for which run, and for which snapshot of which volume; with a wish, for a stream to it."""

    ticket: str
    resync_id: str
    volume: str
    target: str
    target_node: str
    stream: StreamWish | None = None


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the server will read from; of a stream, its format, and no size.

    `packed_requests`: it takes them under the ZSTD flag. One of an earlier version does not.
    """

    size_bytes: int
    format: str = ""
    packed_requests: bool = False


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """How long a stream was, and the chain of its digests, in hex."""

    length: int
    chain: str


@dataclass(frozen=True, slots=True)
class _Error:
    reason: str
    message: str


def pack_header(view: memoryview, at: int, header: Header) -> None:
    """Writes a header with its check into the buffer."""
    end = at + _FIELDS.size
    _FIELDS.pack_into(
        view, at, MAGIC, VERSION, header.kind, header.flags, header.offset, header.length, header.stored, header.digest
    )
    view[end : end + _CHECK_BYTES] = blake3(view[at:end]).digest(_CHECK_BYTES)


def unpack_header(view: memoryview, at: int = 0, *, payload_bytes_max: int = PAYLOAD_BYTES_MAX) -> Header:
    """Reads a header of at least HEADER_BYTES; Damaged unless its check and its meaning hold."""
    end = at + _FIELDS.size
    if len(view) < end + _CHECK_BYTES:
        raise _damaged("a frame's header is cut short")
    if blake3(view[at:end]).digest(_CHECK_BYTES) != view[end : end + _CHECK_BYTES]:
        raise _damaged("a frame's header does not match its check")
    magic, version, kind, flags, offset, length, stored, digest = _FIELDS.unpack_from(view, at)
    if magic != MAGIC:
        raise _damaged("this is no frame of the block stream")
    if version != VERSION:
        raise Refused("NOT_SUPPORTED", f"the block stream is of version {version} there, and {VERSION} here")
    try:
        header = Header(Kind(kind), flags, offset, length, stored, digest)
    except ValueError:
        raise _damaged(f"a frame is of the unknown kind {kind}") from None
    if not _sound(header) or stored > payload_bytes_max:
        raise _damaged("a frame's header contradicts itself", offset)
    return header


def _sound(header: Header) -> bool:
    """Whether a header says what its kind can mean."""
    kind, flags, offset, length, stored, _digest = header
    if flags & ~FLAG_ZSTD or offset + length > VOLUME_BYTES_MAX:
        return False
    if kind is Kind.ZERO:
        return length > 0 and stored == 0 and flags == 0
    if kind in {Kind.DATA, Kind.GROUP}:
        fits = 0 < length <= PAYLOAD_BYTES_MAX and 0 < stored <= PAYLOAD_BYTES_MAX
        return fits and (flags == FLAG_ZSTD or stored == length)
    if kind is Kind.REQUEST and flags == FLAG_ZSTD:
        return offset == 0 and 0 < stored <= length <= CONTROL_BYTES_MAX
    return offset == 0 and flags == 0 and stored == length <= CONTROL_BYTES_MAX


def encode(kind: Kind, body: Bytes = b"", *, offset: int = 0, compress: bool = False) -> bytes:
    """A whole frame of any kind but ZERO; compressed if asked to and if that makes it shorter."""
    stored, flags = bytes(body), 0
    if compress:
        packed = zstandard.ZstdCompressor(level=1).compress(stored)
        if len(packed) < len(stored):
            stored, flags = packed, FLAG_ZSTD
    header = bytearray(HEADER_BYTES)
    digest = blake3(body).digest()
    pack_header(memoryview(header), 0, Header(kind, flags, offset, len(body), len(stored), digest))
    return bytes(header) + stored


def encode_zero(offset: int, length: int) -> bytes:
    header = bytearray(HEADER_BYTES)
    pack_header(memoryview(header), 0, Header(Kind.ZERO, 0, offset, length, 0, NO_DIGEST))
    return bytes(header)


def encode_hello(hello: Hello) -> bytes:
    return encode(Kind.HELLO, msgspec.json.encode(hello))


def encode_welcome(welcome: Welcome) -> bytes:
    return encode(Kind.WELCOME, msgspec.json.encode(welcome))


def encode_end(end: StreamEnd) -> bytes:
    return encode(Kind.END, msgspec.json.encode(end))


def encode_request(ranges: Sequence[tuple[int, int]], *, packed: bool = False) -> bytes:
    """At most REQUEST_RANGES_MAX ranges, each of at most PAYLOAD_BYTES_MAX.

    Of scattered blocks of 4 KiB a request is 0.4 % of the answer, packed 0.05 %.
    """
    return encode(Kind.REQUEST, np.array(list(ranges), dtype=_RANGE).tobytes(), compress=packed)


def encode_error(error: ResilverError) -> bytes:
    body = _Error(error.reason, error.message[:MESSAGE_CHARS_MAX].encode("utf-8", "replace").decode())
    return encode(Kind.ERROR, msgspec.json.encode(body))


def decode_hello(frame: Frame) -> Hello:
    return _json(frame, Hello)


def decode_welcome(frame: Frame) -> Welcome:
    welcome = _json(frame, Welcome)
    if not 0 <= welcome.size_bytes <= VOLUME_BYTES_MAX:
        raise _damaged("a WELCOME names an impossible size")
    return welcome


def decode_end(frame: Frame) -> StreamEnd:
    return _json(frame, StreamEnd)


def decode_request(frame: Frame) -> list[Range]:
    """The ranges of a REQUEST, each not empty and of at most PAYLOAD_BYTES_MAX."""
    body = frame.payload()
    if len(body) % _RANGE.itemsize:
        raise _damaged("a REQUEST holds half a range")
    rows = np.frombuffer(body, dtype=_RANGE) if body else np.zeros(0, dtype=_RANGE)
    lengths, offsets = rows["length"], rows["offset"]
    if bool((lengths == 0).any()) or bool((lengths > PAYLOAD_BYTES_MAX).any()):
        raise _damaged("a REQUEST holds an empty range or one above 1 MiB")
    if bool((offsets > VOLUME_BYTES_MAX - PAYLOAD_BYTES_MAX).any()):
        raise _damaged("a REQUEST goes beyond every volume")
    return [Range(offset, length) for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True)]


def decode_error(frame: Frame) -> ResilverError:
    """The error that an ERROR frame tells, of the class of its reason."""
    told = _json(frame, _Error)
    if _REASON.fullmatch(told.reason) is None:
        raise _damaged("an ERROR names no reason")
    return error_for(told.reason, told.message[:MESSAGE_CHARS_MAX])


def extend_chain(chain: bytes, digest: bytes) -> bytes:
    """The chain of digests, one piece longer."""
    return blake3(chain + digest).digest()


def reads_as_zero(body: memoryview) -> bool:
    """Whether every byte is zero; the first ones settle it for nearly all data."""
    if any(body[:8]):
        return False
    words = len(body) & ~7
    return not any(body[words:]) and (not words or not np.frombuffer(body[:words], dtype=np.uint64).any())


def zero_digest(length: int) -> bytes:
    """The BLAKE3 of so many zeros, at most PAYLOAD_BYTES_MAX."""
    digest = _ZERO_DIGESTS.get(length)
    if digest is None:
        digest = blake3(bytes(length)).digest()
        if len(_ZERO_DIGESTS) < _ZERO_DIGESTS_MAX:
            _ZERO_DIGESTS[length] = digest
    return digest


_ZERO_DIGESTS: Final[dict[int, bytes]] = {}
_ZERO_DIGESTS_MAX: Final = 1024


class FrameBuffer:
    """Bytes in, frames out, in one buffer that is used again and again.

    `space` gives room to read into, `filled` says how much came, `next` gives frames until it gives None. A frame's
    bytes lie in the buffer: they are good until the next `space`.
    """

    def __init__(self, payload_bytes_max: int = PAYLOAD_BYTES_MAX, buffer_bytes: int = 0) -> None:
        self._payload_bytes_max = payload_bytes_max
        self._view = memoryview(bytearray(max(buffer_bytes, HEADER_BYTES + payload_bytes_max)))
        self._start = 0
        self._end = 0
        self._header: Header | None = None

    def clear(self) -> None:
        """Forgets everything, for another connection."""
        self._start = self._end = 0
        self._header = None

    @property
    def pending_bytes(self) -> int:
        """Bytes of frames that were not taken yet."""
        return self._end - self._start

    def space(self) -> memoryview:
        """Room for what comes next, never empty if `next` was asked until it gave None."""
        size = len(self._view)
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start and size - self._end < size // 2:
            # Only the beginning of one frame is left, so moving it costs at most one frame's bytes a round.
            self._view[: self._end - self._start] = self._view[self._start : self._end]
            self._start, self._end = 0, self._end - self._start
        return self._view[self._end :]

    def filled(self, count: int) -> None:
        self._end += count

    def next(self) -> Frame | None:
        """The next whole frame, None if there is none yet; Damaged if its header does not hold, then and ever after."""
        header = self._header
        if header is None:
            if self._end - self._start < HEADER_BYTES:
                return None
            # One that does not hold stays where it is, and is refused again. An error that was kept would hold the
            # buffer by its traceback, in a circle, until the next look for those.
            header = self._header = unpack_header(self._view, self._start, payload_bytes_max=self._payload_bytes_max)
        body = self._start + HEADER_BYTES
        if self._end - body < header.stored:
            return None
        self._header = None
        self._start = body + header.stored
        return Frame(header, self._view[body : self._start])

    def finish(self) -> None:
        """The stream has ended: Damaged if it did so within a frame."""
        if self.pending_bytes:
            raise _damaged("the stream ends within a frame")


def _expanded(stored: memoryview, length: int) -> memoryview:
    """The payload behind the ZSTD flag; what does not say its true size is refused before room is made for it."""
    try:
        parameters = zstandard.get_frame_parameters(stored)
        if parameters.content_size != length or parameters.dict_id:
            raise _damaged("a compressed payload is not of the length that its header says")
        body = zstandard.ZstdDecompressor().decompress(stored, max_output_size=length, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as error:
        raise _damaged(f"a compressed payload cannot be read: {error}") from None
    if len(body) != length:
        raise _damaged("a compressed payload is not of the length that its header says")
    return memoryview(body)


def _json(frame: Frame, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(frame.payload() or _EMPTY, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _damaged(f"a frame of the kind {frame.header.kind.name} cannot be read: {error}") from None


def _damaged(why: str, offset: int | None = None) -> Damaged:
    where: dict[str, Any] = {} if offset is None else {"offset": str(offset)}
    return Damaged("DIGEST_MISMATCH", why, **where)
