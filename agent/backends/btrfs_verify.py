"""What came in a stream, read back from the disk.

While a stream is fed to `btrfs receive`, each run of data that it writes is noted in a file beside: which file, where,
how long, and the BLAKE3 digest of its bytes, taken before the file system had them. Afterwards each run is read from
the received subvolume, past the cache, and compared.

Runs of one file that follow each other are one, up to 1 MiB. What is kept in memory is the directories only that
hold files with data, for they may still be renamed: a file's own name is final before its data comes (the kernel sends
an inode's names first, and moves only those out of the way whose turn has not come). Nothing depends on the number of
files, or on how long they are.

What is not read back: names, owners, modes, times and attributes (`btrfs receive` fails if it cannot set one), extents
that were cloned from the base, and what is in LZO-compressed extents: these are read, so that the kernel compares its
own checksums, and not compared with what came.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import blake3
import zstandard

from agent.backends.btrfs_stream import Attribute, Command, Kind
from agent.stream.work import Stopped
from resilver.errors import Damaged

RUN_BYTES_MAX: Final = 1 << 20
EXTENT_BYTES_MAX: Final = 1 << 20
_NO_DIGEST: Final = bytes(32)
_FILE: Final = 0
_RUN: Final = 1
_FILE_HEAD: Final = struct.Struct("<BIH")
_RUN_HEAD: Final = struct.Struct("<BQI32s")
# Plain numbers: comparing with members of an enum takes longer than all else that is done with most commands.
_WRITES: Final = frozenset({int(Kind.WRITE), int(Kind.ENCODED_WRITE)})
_OVERWRITES: Final = frozenset({int(Kind.TRUNCATE), int(Kind.CLONE), int(Kind.FALLOCATE)})
_RENAME: Final = int(Kind.RENAME)
_RMDIR: Final = int(Kind.RMDIR)
_ZLIB: Final = 1
_ZSTD: Final = 2


class _Directory:
    """A directory that holds noted files, or leads to one."""

    __slots__ = ("children", "name", "number", "parent")

    def __init__(self, parent: _Directory | None, name: bytes, number: int) -> None:
        self.parent, self.name, self.number = parent, name, number
        self.children: dict[bytes, _Directory] = {}

    def path(self) -> bytes:
        parts: list[bytes] = []
        at: _Directory | None = self
        while at is not None and at.parent is not None:
            parts.append(at.name)
            at = at.parent
        return b"/".join(reversed(parts))


class Recorder:
    """Notes what a stream writes. `directory` gets the files `runs` and, when the stream is whole, `places`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for name in ("runs", "places"):
            (directory / name).unlink(missing_ok=True)
        self._file: BinaryIO = (directory / "runs").open("wb")
        self._root = _Directory(None, b"", 0)
        self._directories = [self._root]
        self._path: bytes | None = None
        self._open: tuple[int, int] | None = None  # the run that is growing: where it began, and its length
        self._hasher = blake3.blake3()
        self._checked = True
        self._high = 0
        self._held: list[tuple[int, int, bytes]] = []

    def take(self, command: Command) -> None:
        """Notes one command."""
        kind = command.kind
        if kind in _WRITES:
            self._write(command)
        elif kind == _RENAME:
            self._rename(command.path(), command.path(Attribute.PATH_TO))
        elif kind == _RMDIR:
            self._detach(command.path())
        elif kind in _OVERWRITES:
            self._overwritten(command)

    def _write(self, command: Command) -> None:
        path = command.path()
        if path != self._path:
            self._next_file(path)
        offset = command.number(Attribute.OFFSET)
        data: bytes | memoryview | None = command.data()
        length = len(command.data())
        if command.kind == Kind.ENCODED_WRITE:
            length = command.number(Attribute.UNENCODED_FILE_LEN)
            data = _decoded(command)
        if offset < self._high:
            self._forget(offset, offset + length)
        at = self._open
        if (
            at is None
            or at[0] + at[1] != offset
            or at[1] + length > RUN_BYTES_MAX
            or self._checked != (data is not None)
        ):
            self._close_run()
            self._open = (offset, 0)
            self._checked = data is not None
            at = self._open
        if data is not None:
            self._hasher.update(data)
        self._open = (at[0], at[1] + length)
        self._high = max(self._high, offset + length)

    def _overwritten(self, command: Command) -> None:
        """Data of this file that something else in the stream takes the place of: what is there then is not noted."""
        if command.path() != self._path:
            return
        if command.kind == Kind.TRUNCATE:
            start, end = command.number(Attribute.SIZE), 1 << 63
        else:
            start = command.number(Attribute.OFFSET)
            length = Attribute.CLONE_LEN if command.kind == Kind.CLONE else Attribute.SIZE
            end = start + command.number(length)
        if start < self._high:
            self._forget(start, end)

    def _forget(self, start: int, end: int) -> None:
        """Kernels write each range once; should one not, the runs that are touched are told to be unchecked."""
        self._close_run()
        self._file.write(_RUN_HEAD.pack(_RUN + 1, start, 0, struct.pack("<Q24x", end)))

    def _close_run(self) -> None:
        if self._open is not None and self._open[1]:
            digest = self._hasher.digest() if self._checked else _NO_DIGEST
            self._file.write(_RUN_HEAD.pack(_RUN, self._open[0], self._open[1], digest))
        self._open = None
        self._hasher = blake3.blake3()

    def _next_file(self, path: bytes) -> None:
        self._close_run()
        self._path, self._high = path, 0
        above, _, name = path.rpartition(b"/")
        self._file.write(_FILE_HEAD.pack(_FILE, self._directory_at(above).number, len(name)) + name)

    def _directory_at(self, path: bytes) -> _Directory:
        at = self._root
        for name in path.split(b"/") if path else ():
            found = at.children.get(name)
            if found is None:
                found = at.children[name] = _Directory(at, name, len(self._directories))
                self._directories.append(found)
            at = found
        return at

    def _known(self, path: bytes) -> _Directory | None:
        at = self._root
        for name in path.split(b"/"):
            found = at.children.get(name)
            if found is None:
                return None
            at = found
        return at

    def _detach(self, path: bytes) -> _Directory | None:
        found = self._known(path)
        if found is not None and found.parent is not None:
            del found.parent.children[found.name]
        return found

    def _rename(self, path: bytes, to: bytes) -> None:
        if path == self._path:
            self._close_run()
            self._path = None
        moved = self._detach(path)
        if moved is not None:
            above, _, name = to.rpartition(b"/")
            moved.parent, moved.name = self._directory_at(above), name
            moved.parent.children[name] = moved

    def finish(self) -> None:
        """The stream is whole: where each directory has come to lie is written down, and all of it is on the disk."""
        self._close_run()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with (self._directory / "places").open("wb") as file:
            for directory in self._directories:
                path = directory.path()
                file.write(struct.pack("<I", len(path)) + path)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """What was not finished is of no use, also if a full disk does not take the rest of it."""
        with contextlib.suppress(OSError):
            self._file.close()


def _decoded(command: Command) -> bytes | memoryview | None:
    """The part of a compressed extent that the file shows; None where this program cannot decompress it."""
    data, how = command.data(), command.number(Attribute.COMPRESSION)
    whole, start = command.number(Attribute.UNENCODED_LEN), command.number(Attribute.UNENCODED_OFFSET)
    length = command.number(Attribute.UNENCODED_FILE_LEN)
    if whole > EXTENT_BYTES_MAX or start + length > whole:
        raise Damaged("SOURCE_DAMAGED", "an extent of the stream is longer than Btrfs makes them")
    try:
        if how == _ZLIB:
            plain = zlib.decompressobj().decompress(data, whole)
        elif how == _ZSTD:
            plain = _zstd(data, whole)
        elif how == 0:
            plain = bytes(data)
        else:
            return None
    except (zlib.error, zstandard.ZstdError) as error:
        raise Damaged("SOURCE_DAMAGED", f"an extent of the stream cannot be decompressed: {error}") from error
    # What is compressed may end before its extent does: the rest of it is zeros.
    return plain[start : start + length].ljust(length, b"\0")


def _zstd(data: memoryview, whole: int) -> bytes:
    """One frame; after it come the zeros that fill its last sector."""
    if zstandard.frame_content_size(data) > whole:
        raise Damaged("SOURCE_DAMAGED", "an extent of the stream holds more than it says")
    plain: bytes = zstandard.ZstdDecompressor().decompress(data, max_output_size=whole, allow_extra_data=True)
    return plain


def verify(subvolume: Path, directory: Path, stop: threading.Event, on_share: Callable[[], None] | None = None) -> int:
    """Reads back all that was noted; the bytes that were compared. `Damaged("READBACK_MISMATCH")` names the file.

    `on_share` is called after each run, which is of 1 MiB at most.
    """
    compared = 0
    places = _places(directory / "places")
    root = os.fsencode(subvolume)
    buffer = bytearray(RUN_BYTES_MAX + EXTENT_BYTES_MAX)
    for path, runs in _noted(directory / "runs", places):
        if stop.is_set():
            raise Stopped
        try:
            # O_NOFOLLOW: a name that has become a link is not what was written.
            fd = os.open(b"/".join((root, path)), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOATIME)
        except FileNotFoundError:
            raise _mismatch(subvolume, path, "is not there") from None
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for offset, length, digest in runs:
                if stop.is_set():
                    raise Stopped
                view = memoryview(buffer)[:length]
                _read(fd, offset, view, subvolume, path)
                if on_share is not None:
                    on_share()
                if digest == _NO_DIGEST:
                    continue
                if blake3.blake3(view).digest() != digest:
                    raise _mismatch(
                        subvolume, path, f"differs from what came, at byte {offset} or in {length} after it"
                    )
                compared += length
        finally:
            os.close(fd)
    return compared


def _read(fd: int, offset: int, view: memoryview, subvolume: Path, path: bytes) -> None:
    while view:
        count = os.preadv(fd, [view], offset)
        if not count:
            raise _mismatch(subvolume, path, f"ends at byte {offset}")
        view, offset = view[count:], offset + count


def _mismatch(subvolume: Path, path: bytes, what: str) -> Damaged:
    said = json.dumps(os.fsdecode(path), ensure_ascii=False)
    return Damaged("READBACK_MISMATCH", f"{subvolume}: {said} {what}", path=str(subvolume))


class _Places:
    """Where the noted directories lie: their paths, found by number without being held in memory."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        self._raw, self._at = raw, []
        at = 0
        while at < len(raw):
            self._at.append(at)
            at += 4 + struct.unpack_from("<I", raw, at)[0]

    def __getitem__(self, number: int) -> bytes:
        at = self._at[number]
        length = struct.unpack_from("<I", self._raw, at)[0]
        return self._raw[at + 4 : at + 4 + length]


def _places(path: Path) -> _Places:
    return _Places(path)


_Run = tuple[int, int, bytes]


def _noted(path: Path, places: _Places) -> Iterator[tuple[bytes, Iterator[_Run]]]:
    """The noted files with their runs, as they were written. A file's runs are to be used before the next one."""
    with path.open("rb", buffering=1 << 20) as file:
        kind = file.read(1)
        while kind == bytes([_FILE]):
            number, length = struct.unpack("<IH", file.read(6))
            name, above = file.read(length), places[number]
            start = file.tell()
            gone = list(_forgotten(file))
            after = file.tell()
            file.seek(start)
            yield (b"/".join((above, name)) if above else name), _runs(file, gone, after)
            file.seek(after)
            kind = file.read(1)


def _forgotten(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Runs through one file's records: where one says that ranges before it do not count, and which."""
    while True:
        at = file.tell()
        raw = file.read(_RUN_HEAD.size)
        if len(raw) < _RUN_HEAD.size or raw[0] == _FILE:
            file.seek(at)
            return
        kind, start, _length, rest = _RUN_HEAD.unpack(raw)
        if kind != _RUN:
            yield at, start, struct.unpack_from("<Q", rest)[0]


def _runs(file: BinaryIO, gone: list[tuple[int, int, int]], end: int) -> Iterator[_Run]:
    at = file.tell()
    while at < end:
        file.seek(at)
        kind, offset, length, digest = _RUN_HEAD.unpack(file.read(_RUN_HEAD.size))
        here, at = at, at + _RUN_HEAD.size
        if kind != _RUN:
            continue
        if any(where > here and offset < stop and offset + length > start for where, start, stop in gone):
            continue
        yield offset, length, digest
