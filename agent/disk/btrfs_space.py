"""What is free on a Btrfs: for data, as statvfs estimates it, and for metadata, which it does not tell.

Space is given to data or to metadata in large chunks. Where all of it is given, one may be full while the other
has room: a receive that is short of metadata fails however much statvfs shows.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.disk import btrfs, ioctl

_SPACE_INFO: Final = 0xC0109414
_DEV_INFO: Final = 0xD000941E
_SPACE: Final = struct.Struct("<QQQ")
_SPACES_MAX: Final = 64
_METADATA: Final = 4
_TWICE: Final = 1 << 4 | 1 << 5 | 1 << 6  # RAID1, DUP, RAID10


@dataclass(frozen=True, slots=True)
class Space:
    """What a file system has, in bytes of data that could be written; `metadata_free` besides, for names."""

    free: int
    total: int
    metadata_free: int


def space(path: Path) -> Space:
    """What statvfs tells, and what is left for metadata: unallocated space, and what its own chunks have free."""
    with btrfs.opened_dir(path) as fd:
        stat = os.fstatvfs(fd)
        buffer = bytearray(16 + _SPACES_MAX * _SPACE.size)
        struct.pack_into("<Q", buffer, 0, _SPACES_MAX)
        fcntl.ioctl(fd, _SPACE_INFO, buffer, True)
        count = min(_SPACES_MAX, struct.unpack_from("<Q", buffer, 8)[0])
        unallocated = _unallocated(fd)
    metadata, copies = 0, 1
    for at in range(count):
        flags, total, used = _SPACE.unpack_from(buffer, 16 + at * _SPACE.size)
        if flags & 1 << 49:  # the global reserve stands within the metadata
            metadata -= total - used
        elif flags & _METADATA:
            metadata += total - used
            copies = 2 if flags & _TWICE else 1
    free = stat.f_bavail * stat.f_frsize
    return Space(free, stat.f_blocks * stat.f_frsize, max(0, metadata + unallocated // copies))


def _unallocated(fd: int) -> int:
    raw = fcntl.ioctl(fd, ioctl.BTRFS_FS_INFO, bytes(1024))
    highest, count = struct.unpack_from("<QQ", raw)
    found = seen = 0
    for device in range(highest + 1):
        buffer = bytearray(4096)
        struct.pack_into("<Q", buffer, 0, device)
        try:
            fcntl.ioctl(fd, _DEV_INFO, buffer, True)
        except OSError as error:
            if error.errno == errno.ENODEV:
                continue
            raise
        used, total = struct.unpack_from("<QQ", buffer, 24)
        found += max(0, total - used)
        seen += 1
        if seen == count:
            break
    return found
