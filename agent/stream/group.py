"""Answers to requested ranges, in their order: one frame for each, or one for several small ones.

A frame's header is 68 bytes, which is nothing beside a MiB and a sixtieth of 4 KiB. So small ranges that were asked for
one after the other are answered by one `GROUP`: their bytes, and under one header a digest of all their places and
digests (`group_digest`). The target takes each range's digest anyway, for its journal; so it checks the group without
hashing a byte twice, and what was asked for elsewhere, or in another order, does not pass for it.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from blake3 import blake3

from agent.stream.frame import (
    FLAG_ZSTD,
    HEADER_BYTES,
    NO_DIGEST,
    Frame,
    Header,
    Kind,
    Range,
    pack_header,
    reads_as_zero,
    zero_digest,
)
from resilver.errors import Damaged

if TYPE_CHECKING:
    from agent.backends.base import SnapshotReader

SMALL_BYTES_MAX: Final = 64 << 10
GROUP_BYTES_MAX: Final = 256 << 10
_PLACE: Final = struct.Struct("<QQ")

Pack = Callable[[memoryview], bytes | None]


class Piece(NamedTuple):
    """A range's bytes as they read in the volume, and their BLAKE3."""

    body: memoryview
    digest: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What was written to a buffer: its size there, how many ranges it answers, and how long these are."""

    size: int
    count: int
    raw_bytes: int


def group_digest(ranges: Iterable[tuple[int, int]], digests: Iterable[bytes]) -> bytes:
    """The digest of a group: of the offset, the length and the digest of each range."""
    hasher = blake3()
    for (offset, length), digest in zip(ranges, digests, strict=True):
        hasher.update(_PLACE.pack(offset, length) + digest)
    return hasher.digest()


def answer_next(pending: deque[Range], reader: SnapshotReader, view: memoryview, at: int, pack: Pack) -> Answer:
    """Takes the next range, or several small ones, and writes the answer; of size 0 if the buffer has no room for it.

    A range that reads as zero is answered by a header alone. What `pack` makes of the bytes stands in their place, if
    it makes any.
    """
    start = end = at + HEADER_BYTES
    ranges: list[Range] = []
    digests: list[bytes] = []
    zero: Range | None = None
    while pending and zero is None and end + HEADER_BYTES + pending[0].length <= len(view):
        length = pending[0].length
        if ranges and (length > SMALL_BYTES_MAX or end - start + length > GROUP_BYTES_MAX):
            break
        asked, body = pending.popleft(), view[end : end + length]
        reader.read_into(asked.offset, body)
        if reads_as_zero(body):
            zero = asked
        else:
            ranges.append(asked)
            digests.append(blake3(body).digest())
            end += length
    size = _sealed(view, at, ranges, digests, pack) if ranges else 0
    if zero is not None:
        pack_header(view, at + size, Header(Kind.ZERO, 0, zero.offset, zero.length, 0, NO_DIGEST))
        size += HEADER_BYTES
    raw_bytes = end - start + (zero.length if zero is not None else 0)
    return Answer(size, len(ranges) + (zero is not None), raw_bytes)


def seal(view: memoryview, at: int, offset: int, length: int, pack: Pack) -> int:
    """Writes the header for one payload that already stands HEADER_BYTES after `at`; the size of the whole frame."""
    body = view[at + HEADER_BYTES : at + HEADER_BYTES + length]
    if reads_as_zero(body):
        pack_header(view, at, Header(Kind.ZERO, 0, offset, length, 0, NO_DIGEST))
        return HEADER_BYTES
    return _sealed(view, at, [Range(offset, length)], [blake3(body).digest()], pack)


def _sealed(view: memoryview, at: int, ranges: Sequence[Range], digests: Sequence[bytes], pack: Pack) -> int:
    start, length = at + HEADER_BYTES, sum(one.length for one in ranges)
    kind, digest = Kind.DATA, digests[0]
    if len(ranges) > 1:
        kind, digest = Kind.GROUP, group_digest(ranges, digests)
    packed = pack(view[start : start + length])
    flags, stored = (0, length) if packed is None else (FLAG_ZSTD, len(packed))
    if packed is not None:
        view[start : start + stored] = packed
    pack_header(view, at, Header(kind, flags, ranges[0].offset, length, stored, digest))
    return HEADER_BYTES + stored


def pieces(frame: Frame, ranges: Sequence[tuple[int, int]]) -> list[Piece]:
    """What a frame answers these ranges with, whose lengths make up its own; of a `ZERO` no bytes.

    Damaged("DIGEST_MISMATCH") unless all of them are what the source read, at these places.
    """
    if frame.header.kind is Kind.ZERO:
        return [Piece(frame.stored, zero_digest(frame.header.length))]
    if frame.header.kind is Kind.DATA:
        return [Piece(frame.payload(), frame.header.digest)]
    body, found, at = frame.expanded(), [], 0
    for _offset, length in ranges:
        piece = body[at : at + length]
        found.append(Piece(piece, blake3(piece).digest()))
        at += length
    if group_digest(ranges, [piece.digest for piece in found]) != frame.header.digest:
        raise Damaged("DIGEST_MISMATCH", "a group does not match its digest", offset=str(frame.header.offset))
    return found
