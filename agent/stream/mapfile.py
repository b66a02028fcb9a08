"""A delta map as a file, so that a transfer can go on after a restart without asking any source for it again.

    magic 4 | version 4 | capacity 8 | ranges 8 | base, target: length 2 and UTF-8 each
    offsets, 8 each | lengths, 8 each | zeros, 1 each | BLAKE3 of all that 32

Numbers are little-endian. The file is written whole under another name, synced and renamed: it is there in full or
not at all. One that does not match its digest is as good as none, because the source can still be asked.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from blake3 import blake3

from agent.delta import DeltaMap
from agent.disk.durable import disk_errors, fsync_dir, open_own, read_own

MAP_BYTES_MAX: Final = 128 << 20

_MAGIC: Final = b"RSVM"
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<4sIQQ")
_TEXT: Final = struct.Struct("<H")
_RANGE_BYTES: Final = 17
_DIGEST_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class JournalKey:
    """What a stage is to become, whichever resync asks for it. `map_digest` tells one map of a pair from another."""

    base: str
    target: str
    capacity_bytes: int
    map_digest: bytes

    @classmethod
    def of(cls, base: str, target: str, delta: DeltaMap) -> JournalKey:
        return cls(base, target, delta.capacity_bytes, map_digest(delta))

    def digest(self) -> bytes:
        """One value for the whole key, for a header of fixed size."""
        texts = b"".join(_packed(text) for text in (self.base, self.target))
        return blake3(texts + self.capacity_bytes.to_bytes(8, "little") + self.map_digest).digest()


def map_digest(delta: DeltaMap) -> bytes:
    """The BLAKE3 of a map's capacity and ranges."""
    digest = blake3(delta.capacity_bytes.to_bytes(8, "little"))
    for part in _arrays(delta):
        digest.update(part)
    return digest.digest()


def save_map(path: Path, base: str, target: str, delta: DeltaMap) -> None:
    """Writes a map, atomically and durably."""
    head = _HEAD.pack(_MAGIC, _VERSION, delta.capacity_bytes, len(delta)) + _packed(base) + _packed(target)

    def write(fd: int) -> None:
        digest = blake3(head)
        write_all(fd, head)
        for part in _arrays(delta):
            digest.update(part)
            write_all(fd, part)
        write_all(fd, digest.digest())

    replace_file(path, write)


def load_map(path: Path) -> tuple[JournalKey, DeltaMap] | None:
    """The map in a file with the key that it belongs to; None if there is none that can be trusted."""
    with disk_errors(path):
        try:
            raw = read_own(path, MAP_BYTES_MAX)
        except FileNotFoundError:
            return None
    try:
        return _read(raw)
    except (ValueError, struct.error):
        return None


def replace_file(path: Path, write: Callable[[int], None]) -> None:
    """Makes a file by what `write` puts into its descriptor: the whole of it under that name, or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        fd = open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            write(fd)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
        fsync_dir(path.parent)


def write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def _read(raw: bytes) -> tuple[JournalKey, DeltaMap]:
    """The content of a map file; ValueError or struct.error if it is none."""
    body = memoryview(raw)[:-_DIGEST_BYTES]
    magic, version, capacity, count = _HEAD.unpack_from(body)
    if blake3(body).digest() != raw[-_DIGEST_BYTES:] or magic != _MAGIC or version != _VERSION:
        raise ValueError("no delta map")
    base, at = _unpacked(body, _HEAD.size)
    target, at = _unpacked(body, at)
    if len(body) - at != count * _RANGE_BYTES:
        raise ValueError("a delta map of another length")
    delta = _delta(capacity, count, body[at:])
    return JournalKey.of(base, target, delta), delta


def _arrays(delta: DeltaMap) -> tuple[memoryview, memoryview, memoryview]:
    return (
        np.ascontiguousarray(delta.offsets, dtype="<i8").data.cast("B"),
        np.ascontiguousarray(delta.lengths, dtype="<i8").data.cast("B"),
        np.ascontiguousarray(delta.zeros, dtype="u1").data.cast("B"),
    )


def _delta(capacity: int, count: int, body: memoryview) -> DeltaMap:
    """The map in its three arrays; ValueError if they are no map."""
    if not count:
        return DeltaMap.of(capacity, ())
    numbers = np.frombuffer(body, dtype="<i8", count=2 * count).astype(np.int64)
    zeros = np.frombuffer(body, dtype="u1", offset=16 * count).astype(np.bool_)
    delta = DeltaMap(capacity, numbers[:count], numbers[count:], zeros)
    delta.check()
    return delta


def _packed(text: str) -> bytes:
    raw = text.encode()
    return _TEXT.pack(len(raw)) + raw


def _unpacked(body: memoryview, at: int) -> tuple[str, int]:
    (length,) = _TEXT.unpack_from(body, at)
    at += _TEXT.size
    return bytes(body[at : at + length]).decode(), at + length
