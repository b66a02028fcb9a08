"""Reading the stream that `btrfs send` writes, as it comes: a codec, no I/O.

A stream is a header and commands; a command is a length, a kind, a checksum and attributes, each with a type and a
length, but that in version 2 the data goes to the end of its command without one. Nothing is taken on trust: versions,
lengths and paths are checked, and a command has a bound, so that memory has one. The checksums are left to
`btrfs receive`, and the frames that a stream travels in have digests.

Whoever reads one must ask `whole` at its end: `btrfs receive` takes a stream that stops between two commands for whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from resilver.errors import Damaged

MAGIC: Final = b"btrfs-stream\0"
VERSIONS: Final = frozenset({1, 2, 3})
COMMAND_BYTES_MAX: Final = 1 << 20
PATH_BYTES_MAX: Final = 4096

_HEADER: Final = struct.Struct("<13sI")
_COMMAND: Final = struct.Struct("<IHI")
_ATTRIBUTE: Final = struct.Struct("<HH")
_U64: Final = struct.Struct("<Q")
_DATA: Final = 19
_TIME: Final = struct.Struct("<QI")


class Kind(IntEnum):
    """What a command does."""

    SUBVOL = 1
    SNAPSHOT = 2
    MKFILE = 3
    MKDIR = 4
    MKNOD = 5
    MKFIFO = 6
    MKSOCK = 7
    SYMLINK = 8
    RENAME = 9
    LINK = 10
    UNLINK = 11
    RMDIR = 12
    SET_XATTR = 13
    REMOVE_XATTR = 14
    WRITE = 15
    CLONE = 16
    TRUNCATE = 17
    CHMOD = 18
    CHOWN = 19
    UTIMES = 20
    END = 21
    UPDATE_EXTENT = 22
    FALLOCATE = 23
    FILEATTR = 24
    ENCODED_WRITE = 25
    ENABLE_VERITY = 26


_SYMLINK: Final = int(Kind.SYMLINK)
_UPDATE_EXTENT: Final = int(Kind.UPDATE_EXTENT)
_END: Final = int(Kind.END)


class Attribute(IntEnum):
    """What is read of a command here; the others are passed over."""

    UUID = 1
    SIZE = 4
    CTIME = 9
    MTIME = 10
    ATIME = 11
    XATTR_NAME = 13
    XATTR_DATA = 14
    PATH = 15
    PATH_TO = 16
    PATH_LINK = 17
    OFFSET = 18
    DATA = 19
    CLONE_UUID = 20
    CLONE_PATH = 22
    CLONE_LEN = 24
    UNENCODED_FILE_LEN = 27
    UNENCODED_LEN = 28
    UNENCODED_OFFSET = 29
    COMPRESSION = 30


_PATHS: Final = (Attribute.PATH, Attribute.PATH_TO, Attribute.PATH_LINK, Attribute.CLONE_PATH)


@dataclass(frozen=True, slots=True)
class Command:
    """One command; `attributes` are its parts by type."""

    kind: int
    attributes: dict[int, memoryview]

    def number(self, which: Attribute) -> int:
        """A number of 64 or 32 bits; 0 if it is not there."""
        raw = self.attributes.get(which)
        if raw is None:
            return 0
        if len(raw) not in (4, 8):
            raise _damaged(f"{which.name} is {len(raw)} bytes long")
        return int.from_bytes(raw, "little")

    def time_ns(self, which: Attribute) -> int:
        raw = self.attributes.get(which)
        if raw is None or len(raw) != _TIME.size:
            raise _damaged(f"{which.name} is missing or cut short")
        seconds, nanoseconds = _TIME.unpack(raw)
        seconds -= 1 << 64 if seconds >= 1 << 63 else 0
        return int(seconds) * 1_000_000_000 + int(nanoseconds)

    def path(self, which: Attribute = Attribute.PATH) -> bytes:
        """A path within the subvolume, empty for its root: never one that leads out of it."""
        raw = bytes(self.attributes.get(which, b""))
        if len(raw) > PATH_BYTES_MAX or b"\0" in raw or raw.startswith(b"/") or b".." in raw.split(b"/"):
            raise _damaged(f"{raw[:80]!r} is no path within a subvolume")
        return raw

    def check_paths(self) -> None:
        """That none of its paths leads out of the subvolume; where a symbolic link leads is its own affair."""
        for which in _PATHS:
            if which in self.attributes and not (which is Attribute.PATH_LINK and self.kind == _SYMLINK):
                self.path(which)

    def data(self) -> memoryview:
        return self.attributes.get(Attribute.DATA, memoryview(b""))


END_BYTES: Final = _COMMAND.size


def root_times(atime_ns: int, mtime_ns: int) -> bytes:
    """The command that sets the times of the subvolume's own directory."""
    times = ((Attribute.ATIME, atime_ns), (Attribute.MTIME, mtime_ns), (Attribute.CTIME, mtime_ns))
    body = _ATTRIBUTE.pack(Attribute.PATH, 0)
    for which, time_ns in times:
        seconds, rest = divmod(time_ns, 1_000_000_000)
        body += _ATTRIBUTE.pack(which, _TIME.size) + _TIME.pack(seconds % (1 << 64), rest)
    checksum = _crc32c(_COMMAND.pack(len(body), Kind.UTIMES, 0) + body)
    return _COMMAND.pack(len(body), Kind.UTIMES, checksum) + body


def _crc32c(data: bytes) -> int:
    """As Btrfs uses it: from zero, and not inverted. For the one command that is made here."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _bit in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


def _damaged(what: str) -> Damaged:
    return Damaged("SOURCE_DAMAGED", f"the stream of the source's file system makes no sense: {what}")


class Parser:
    """Takes a stream in pieces of any length, and gives its commands. One stream holds one subvolume."""

    def __init__(self) -> None:
        self._rest = b""
        self.version = 0
        self.ended = False

    @property
    def whole(self) -> bool:
        """Whether the stream has come to its end, and nothing after that."""
        return self.ended and not self._rest

    def feed(self, data: memoryview | bytes) -> Iterator[Command]:
        """The commands that are whole now. To be run through to the end before the next piece."""
        held = b"".join((self._rest, data))
        view = memoryview(held)
        at = 0
        if not self.version and len(held) >= _HEADER.size:
            self.version = _version(held)
            at = _HEADER.size
        while self.version and len(held) - at >= _COMMAND.size:
            length, kind, _checksum = _COMMAND.unpack_from(held, at)
            if length > COMMAND_BYTES_MAX:
                raise _damaged(f"a command of {length} bytes")
            if self.ended:
                raise _damaged("it goes on after its end")
            end = at + _COMMAND.size + length
            if end > len(held):
                break
            self.ended = kind == _END
            yield Command(kind, _attributes(view, at + _COMMAND.size, end, self.version))
            at = end
        self._rest = held[at:]


class Meter:
    """Counts a stream without data, ten times as fast as reading it: `data_bytes` is what its data would be."""

    def __init__(self) -> None:
        self._rest = b""
        self._begun = self._ended = False
        self.data_bytes = 0

    @property
    def whole(self) -> bool:
        return self._ended and not self._rest

    def feed(self, data: memoryview | bytes) -> None:
        held = b"".join((self._rest, data))
        at, last = 0, len(held) - _COMMAND.size
        if not self._begun and len(held) >= _HEADER.size:
            _version(held)
            self._begun, at = True, _HEADER.size
        while self._begun and at <= last:
            length, kind, _checksum = _COMMAND.unpack_from(held, at)
            end = at + _COMMAND.size + length
            if length > COMMAND_BYTES_MAX:
                raise _damaged(f"a command of {length} bytes")
            if end > len(held):
                break
            if kind == _UPDATE_EXTENT:
                # Its last attribute is how long the extent is.
                which, size = _ATTRIBUTE.unpack_from(held, end - _U64.size - _ATTRIBUTE.size)
                if (which, size) != (Attribute.SIZE, _U64.size):
                    raise _damaged("an extent without a length")
                self.data_bytes += _U64.unpack_from(held, end - _U64.size)[0]
            self._ended = kind == _END
            at = end
        self._rest = held[at:]


def _version(held: bytes) -> int:
    magic, version = _HEADER.unpack_from(held)
    if magic != MAGIC:
        raise _damaged("it does not begin like one of Btrfs")
    if version not in VERSIONS:
        raise _damaged(f"its version is {version}, and this program reads {', '.join(map(str, sorted(VERSIONS)))}")
    return int(version)


def _attributes(view: memoryview, at: int, end: int, version: int) -> dict[int, memoryview]:
    found: dict[int, memoryview] = {}
    while at < end:
        if end - at < 2:
            raise _damaged("an attribute is cut short")
        kind = view[at] | view[at + 1] << 8
        if kind == _DATA and version >= 2:
            found[kind] = view[at + 2 : end]
            return found
        if end - at < _ATTRIBUTE.size:
            raise _damaged("an attribute is cut short")
        length = view[at + 2] | view[at + 3] << 8
        at += _ATTRIBUTE.size
        if at + length > end:
            raise _damaged("an attribute is longer than its command")
        found[kind] = view[at : at + length]
        at += length
    return found
