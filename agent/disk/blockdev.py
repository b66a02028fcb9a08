"""Block devices: their size, making a stretch read as zero, and who has one open.

*Whether* somebody has a device open is the device mapper's count of opens. *Who* is found by looking: mounts in every
namespace, swap, devices that stand upon it, loop devices, open descriptors of all processes, each by device number.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat as modes
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent.disk import contents, loops, proc
from agent.disk.inuse import User

BLKGETSIZE64: Final = 0x80081272
BLKDISCARD: Final = 0x1277
BLKFLSBUF: Final = 0x1261

_ZEROS: Final = memoryview(bytes(1 << 20))
_NO_DISCARD: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY})


def size_of(fd: int) -> int:
    return int(struct.unpack("<Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0])


def write_zeros(fd: int, start: int, end: int) -> None:
    for at in range(start, end, len(_ZEROS)):
        contents.write_all(fd, at, _ZEROS[: end - at])


def zero(fd: int, start: int, end: int, chunk_bytes: int) -> None:
    """Makes [start, end) read as zero: whole chunks are given back to the pool, and what is left of others written.

    A chunk that is only partly discarded keeps what it holds, so that is never relied upon.
    """
    low, high = -(-start // chunk_bytes) * chunk_bytes, end // chunk_bytes * chunk_bytes
    if low >= high:
        write_zeros(fd, start, end)
        return
    try:
        fcntl.ioctl(fd, BLKDISCARD, struct.pack("<QQ", low, high - low))
    except OSError as error:
        if error.errno not in _NO_DISCARD:
            raise
        low = high  # the pool ignores discards: all of it is written
    write_zeros(fd, start, low)
    write_zeros(fd, high, end)


def flush_cache(fd: int) -> None:
    """Writes what is cached of a device, and forgets it: the next reads come from below."""
    fcntl.ioctl(fd, BLKFLSBUF, 0)


def users_of(number: int, own_fd: int = -1) -> list[User]:
    """Everybody who can be seen to have a device open, by its number; a descriptor of our own does not count."""
    found: dict[str, bool] = {}
    for user in _looked_up(number, own_fd):
        found[user.name] = found.get(user.name, False) or user.writes
    return [User(name, writes) for name, writes in sorted(found.items())]


def mounts_of(number: int) -> list[str]:
    """Where the device itself is mounted, in any namespace."""
    text = f"{os.major(number)}:{os.minor(number)}"
    return sorted({mount.point for mount in loops.all_mounts() if mount.device == text})


def _looked_up(number: int, own_fd: int) -> Iterator[User]:
    text = f"{os.major(number)}:{os.minor(number)}"
    for point in mounts_of(number):
        yield User(f"mount {point}", True)
    for line in _lines(Path("/proc/swaps"))[1:]:
        if _is_device(loops.plain(line.partition(" ")[0].partition("\t")[0]), number):
            yield User("swap", True)
    for holder in sorted(Path(f"/sys/dev/block/{text}/holders").glob("*")):
        name = next(iter(_lines(holder / "dm" / "name")), holder.name)
        yield User(f"device {name}", True)
    for entry in sorted(Path("/sys/block").glob("loop*")):
        for name in _lines(entry / "loop" / "backing_file"):
            if _is_device(name, number):
                yield User(f"/dev/{entry.name}", _lines(entry / "ro") != ["1"])
    yield from _processes(number, own_fd)


def _processes(number: int, own_fd: int) -> Iterator[User]:
    own = f"/proc/{os.getpid()}"
    for process in proc.processes():
        for bearer in proc.bearers(process):
            for writes in _open_modes(bearer, number, own_fd if process == own else -1):
                yield User(f"{proc.command_of(process)} pid {process.rpartition('/')[2]}", writes)


def _open_modes(process: str, number: int, besides_fd: int) -> Iterator[bool]:
    """For each descriptor of a process on the device, whether it may write."""
    for descriptor in proc.descriptors(process):
        if int(descriptor) == besides_fd:
            continue
        try:
            # By its name first: a stat of a descriptor on a dead network mount could hang.
            if not proc.target(process, f"fd/{descriptor}").startswith("/dev/"):
                continue
            if _is_device(f"{process}/fd/{descriptor}", number):
                yield proc.may_write(proc.fields(process, descriptor))
        except (OSError, ValueError, KeyError):
            continue


def _is_device(name: str, number: int) -> bool:
    try:
        found = Path(name).stat()
    except OSError:
        return False
    return modes.S_ISBLK(found.st_mode) and found.st_rdev == number


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
