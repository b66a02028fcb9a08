"""System calls that Python does not wrap, each as one small function; no policy.

Numbers are those of the generic Linux ABI (x86-64, arm64, riscv64). Functions raise OSError as the kernel does,
unless their docstring says otherwise. Freezing is in `freeze.py`, which must not import this module.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

FICLONE: Final = 0x40049409
FICLONERANGE: Final = 0x4020940D
FIDEDUPERANGE: Final = 0xC0189436
FIEMAP: Final = 0xC020660B
FSGETXATTR: Final = 0x801C581F
FSSETXATTR: Final = 0x401C5820
GETFLAGS: Final = 0x80086601
SETFLAGS: Final = 0x40086602
GETFSUUID: Final = 0x80111500
XFS_FSGEOMETRY_V1: Final = 0x80705864
BTRFS_FS_INFO: Final = 0x8400941F
BTRFS_TREE_SEARCH_V2: Final = 0xC0709411
LOOP_GET_STATUS64: Final = 0x4C05

XFS_MAGIC: Final = 0x58465342
BTRFS_MAGIC: Final = 0x9123683E
EXT4_MAGIC: Final = 0xEF53
TMPFS_MAGIC: Final = 0x01021994

_XFS_FSGEOMETRY_V1: Final = 0x80705864
_XFS_GEOMETRY_BYTES: Final = 112
_XFS_GEOMETRY_FLAGS_AT: Final = 92
_XFS_HAS_REFLINK: Final = 1 << 20

FIEMAP_SYNC: Final = 0x1
EXTENT_LAST: Final = 0x1
EXTENT_UNKNOWN: Final = 0x2
EXTENT_DELALLOC: Final = 0x4
EXTENT_ENCODED: Final = 0x8
EXTENT_ENCRYPTED: Final = 0x80
EXTENT_NOT_ALIGNED: Final = 0x100
EXTENT_INLINE: Final = 0x200
EXTENT_TAIL: Final = 0x400
EXTENT_UNWRITTEN: Final = 0x800

FIEMAP_RECORDS_MAX: Final = 65536
SEARCH_BUFFER_BYTES: Final = 4 << 20

_NOCOW: Final = 0x00800000
_XFLAG_COWEXTSIZE: Final = 0x00010000
_AT_FDCWD: Final = -100
_NOREPLACE: Final = 1
_EXCHANGE: Final = 2
_KEEP_SIZE_PUNCH_HOLE: Final = 3
_LOOP_READ_ONLY: Final = 1
_EXTENT_DATA_KEY: Final = 108
_EVERYTHING: Final = (1 << 64) - 1

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

FIEMAP_DTYPE: Final = np.dtype(
    [
        ("logical", "<u8"),
        ("physical", "<u8"),
        ("length", "<u8"),
        ("reserved64", "<u8", 2),
        ("flags", "<u4"),
        ("reserved32", "<u4", 3),
    ]
)


def _check(result: int, path: str = "") -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path or None)


def clone(target_fd: int, source_fd: int) -> None:
    """Makes the target share all the source's extents."""
    fcntl.ioctl(target_fd, FICLONE, source_fd)


def clone_range(target_fd: int, target_offset: int, source_fd: int, source_offset: int, length: int) -> None:
    """Makes a range of the target share a range of the source; all three numbers are of whole blocks."""
    fcntl.ioctl(target_fd, FICLONERANGE, struct.pack("<qQQQ", source_fd, source_offset, length, target_offset))


def dedupe(target_fd: int, source_fd: int, offset: int, length: int) -> int | None:
    """Makes a range of the target share the source's blocks; bytes that do now, None if the contents differ there.

    The kernel compares under both files' locks, so that nobody who writes to the target meanwhile can lose anything.
    Neither file's times change. A length that ends within a block is cut to whole ones.
    """
    buffer = bytearray(struct.pack("<QQHHIqQQiI", offset, length, 1, 0, 0, target_fd, offset, 0, 0, 0))
    fcntl.ioctl(source_fd, FIDEDUPERANGE, buffer, True)
    done, status = struct.unpack_from("<Qi", buffer, 40)
    if status < 0:
        raise OSError(-status, os.strerror(-status))
    return None if status else int(done)


def fiemap(fd: int, start: int, records_max: int = FIEMAP_RECORDS_MAX, end: int = _EVERYTHING) -> npt.NDArray[np.void]:
    """The extents at or after a byte offset, written data flushed first; at most `records_max` of them."""
    header = struct.pack("<QQIIII", start, end - start, FIEMAP_SYNC, 0, records_max, 0)
    buffer = bytearray(len(header) + records_max * FIEMAP_DTYPE.itemsize)
    buffer[: len(header)] = header
    fcntl.ioctl(fd, FIEMAP, buffer, True)
    mapped = struct.unpack_from("<I", buffer, 20)[0]
    return np.frombuffer(buffer, dtype=FIEMAP_DTYPE, count=mapped, offset=len(header))


def exchange(one: Path, other: Path) -> None:
    """Two names change places in one step."""
    _check(_libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE), str(one))


def rename_new(source: Path, target: Path) -> None:
    """Renames to a name that must not exist yet: FileExistsError otherwise."""
    result = _libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _NOREPLACE)
    if result != 0 and ctypes.get_errno() == errno.EINVAL:  # a file system without the flag
        target.hardlink_to(source)
        source.unlink()
        return
    _check(result, str(target))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Makes a range read as zero and gives its blocks back; the size stays."""
    _check(_libc.fallocate(fd, _KEEP_SIZE_PUNCH_HOLE, offset, length))


def syncfs(fd: int) -> None:
    """Returns when everything written to the file system of that descriptor is on its device."""
    _check(_libc.syncfs(fd))


def fs_magic(path: Path | int) -> int:
    """The number that names a kind of file system."""
    buffer = ctypes.create_string_buffer(256)
    if isinstance(path, int):
        _check(_libc.fstatfs(path, buffer))
    else:
        _check(_libc.statfs(os.fsencode(path), buffer), str(path))
    return int(struct.unpack_from("<q", buffer)[0]) & 0xFFFFFFFF


def fs_id(path: Path) -> str:
    """The UUID of the file system, or the nearest that the kernel tells: stable across mounts where it can be."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for request, size, at in ((GETFSUUID, 17, 1), (BTRFS_FS_INFO, 1024, 16), (XFS_FSGEOMETRY_V1, 112, 64)):
            try:
                raw = fcntl.ioctl(fd, request, bytes(size))
            except OSError:
                continue
            found = raw[at : at + 16].hex()
            if int(found, 16):
                return f"{found[:8]}-{found[8:12]}-{found[12:16]}-{found[16:20]}-{found[20:]}"
        stat = os.fstatvfs(fd)
        return f"fsid-{stat.f_fsid & (1 << 64) - 1:016x}" if stat.f_fsid else f"device-{os.fstat(fd).st_dev:x}"
    finally:
        os.close(fd)


def xfs_shares(fd: int) -> bool:
    """Whether an XFS was made with shared extents (reflink=1), as it says itself."""
    raw = fcntl.ioctl(fd, _XFS_FSGEOMETRY_V1, bytes(_XFS_GEOMETRY_BYTES))
    return bool(struct.unpack_from("<I", raw, _XFS_GEOMETRY_FLAGS_AT)[0] & _XFS_HAS_REFLINK)


def set_cow_extent_hint(fd: int, block_bytes: int) -> None:
    """XFS: lets a scattered write into a clone hold one block instead of 32. Nothing on other file systems."""
    if fs_magic(fd) != XFS_MAGIC:
        return
    raw = bytearray(fcntl.ioctl(fd, FSGETXATTR, bytes(28)))
    flags, _extsize, _nextents, _projid, cow_bytes = struct.unpack_from("<5I", raw)
    if flags & _XFLAG_COWEXTSIZE and cow_bytes == block_bytes:
        return
    struct.pack_into("<I", raw, 0, flags | _XFLAG_COWEXTSIZE)
    struct.pack_into("<I", raw, 16, block_bytes)
    fcntl.ioctl(fd, FSSETXATTR, bytes(raw))


def extent_count(fd: int) -> int | None:
    """XFS: how many extents a file has, at no cost. None elsewhere."""
    if fs_magic(fd) != XFS_MAGIC:
        return None
    return int(struct.unpack_from("<5I", fcntl.ioctl(fd, FSGETXATTR, bytes(28)))[2])


def copy_nocow(source_fd: int, target_fd: int) -> None:
    """Btrfs: gives an empty file the source's "no copy on write" flag; files that differ in it cannot share."""
    if fs_magic(source_fd) != BTRFS_MAGIC:
        return
    wanted = struct.unpack("<q", fcntl.ioctl(source_fd, GETFLAGS, bytes(8)))[0] & _NOCOW
    flags = struct.unpack("<q", fcntl.ioctl(target_fd, GETFLAGS, bytes(8)))[0]
    if flags & _NOCOW != wanted:
        fcntl.ioctl(target_fd, SETFLAGS, struct.pack("<q", (flags & ~_NOCOW) | wanted))


@dataclass(frozen=True, slots=True)
class LoopStatus:
    """What a loop device stands on: device and inode of its file."""

    major: int
    minor: int
    inode: int
    read_only: bool


def loop_status(device: Path) -> LoopStatus | None:
    """None for a device that nothing is attached to, or that this process may not read."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        raw = fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(232))
    except OSError:
        return None
    finally:
        os.close(fd)
    number, inode = struct.unpack_from("<QQ", raw)
    flags = struct.unpack_from("<I", raw, 52)[0]
    return LoopStatus(os.major(number), os.minor(number), inode, bool(flags & _LOOP_READ_ONLY))


# One search result: a header, and the 53 bytes of a regular or preallocated file extent.
_ITEM_HEADER: Final = struct.Struct("<QQQII")
_ITEM: Final = struct.Struct("<QQBBHBQQQQ")
_ITEM_DTYPE: Final = np.dtype(
    [
        ("transid", "<u8"),
        ("objectid", "<u8"),
        ("logical", "<u8"),
        ("key_type", "<u4"),
        ("item_bytes", "<u4"),
        ("generation", "<u8"),
        ("ram_bytes", "<u8"),
        ("coding", "V4"),
        ("type", "u1"),
        ("disk", "<u8"),
        ("disk_bytes", "<u8"),
        ("offset", "<u8"),
        ("length", "<u8"),
    ]
)
BTRFS_INLINE: Final = 0
BTRFS_REGULAR: Final = 1
BTRFS_PREALLOCATED: Final = 2


def btrfs_extents(
    fd: int, inode: int, start: int, end: int = _EVERYTHING, buffer_bytes: int = SEARCH_BUFFER_BYTES
) -> npt.NDArray[np.void]:
    """The extent items of a file that begin in [start, end], as many as fit a buffer; needs root.

    Fields: logical, type, disk, offset, length (a disk of 0 is a hole; an inline one has its length in bytes).
    """
    key = struct.pack("<7Q4I4Q", 0, inode, inode, start, end, 0, (1 << 64) - 1,
                      _EXTENT_DATA_KEY, _EXTENT_DATA_KEY, (1 << 32) - 1, 0, 0, 0, 0, 0)  # fmt: skip
    buffer = bytearray(len(key) + 8 + buffer_bytes)
    buffer[: len(key)] = key
    struct.pack_into("<Q", buffer, len(key), buffer_bytes)
    fcntl.ioctl(fd, BTRFS_TREE_SEARCH_V2, buffer, True)
    found = struct.unpack_from("<I", buffer, 64)[0]
    rows = np.frombuffer(buffer, dtype=_ITEM_DTYPE, count=found, offset=len(key) + 8)
    if bool((rows["item_bytes"] == _ITEM.size).all()):
        return rows
    return _parse_items(buffer, len(key) + 8, found)


def _parse_items(buffer: bytearray, at: int, found: int) -> npt.NDArray[np.void]:
    """The slow way, for a file that holds an inline extent, whose item is of another length."""
    rows = np.zeros(found, dtype=_ITEM_DTYPE)
    for row in rows:
        _transid, _objectid, logical, _key_type, item_bytes = _ITEM_HEADER.unpack_from(buffer, at)
        item = bytes(buffer[at + _ITEM_HEADER.size : at + _ITEM_HEADER.size + item_bytes])
        row["logical"] = logical
        row["type"] = item[20]
        if item[20] == BTRFS_INLINE:
            row["length"] = struct.unpack_from("<Q", item, 8)[0]
        else:
            *_rest, row["disk"], _disk_bytes, row["offset"], row["length"] = _ITEM.unpack(item)
        at += _ITEM_HEADER.size + item_bytes
    return rows
