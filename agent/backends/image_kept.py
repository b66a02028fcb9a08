"""What was read of a replica's records, kept until it is another file: a look costs what has changed since the last.

* A file is the same if inode, size, times of its content and of itself are. One that was changed within the last two
  seconds is read again, because a second change in the same tick of the clock would not show.
* Which snapshots there are, and whether their data is, is asked of the disk each time; so is whether each record is
  still the same. A volume with a thousand snapshots costs two thousand `stat`, and nothing is parsed.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")

FRESH_NS: Final = 2_000_000_000
_GONE: Final = (FileNotFoundError, NotADirectoryError)

Stamp = tuple[int, int, int, int, int]

_PACKED: Final = struct.Struct("<QQQqq")  # as it is kept: a third of the room, and a node may have 10,000 volumes


def stamp_of(path: str) -> Stamp | None:
    """What tells a file from what it was before; None if it is not there."""
    try:
        stat = os.stat(path)  # noqa: PTH116 - thousands of them, and a Path costs more than the call
    except _GONE:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class Kept:
    """One replica's. Only its worker's thread changes it; another that reads at the same time reads a file twice."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, Any]] = {}
        self.state: tuple[object, Any] = (None, None)

    def read(self, path: str, stamp: Stamp | None, read: Callable[[str], T]) -> T:
        """What the file holds, whose stamp was taken before; `path` may be any name that is only this file's."""
        known, packed = self._files.get(path), _PACKED.pack(*stamp) if stamp is not None else b""
        if known is not None and known[0] == packed:
            found: T = known[1]
            return found
        found = read(path)
        self._files.pop(path, None)
        if stamp is not None and time.time_ns() - max(stamp[3], stamp[4]) > FRESH_NS:
            self._files[path] = packed, found
        return found

    def forget_all_but(self, paths: set[str]) -> None:
        """Once in a while: what is no longer there takes no room."""
        if len(self._files) > 2 * len(paths) + 64:
            self._files = {path: kept for path, kept in self._files.items() if path in paths}
