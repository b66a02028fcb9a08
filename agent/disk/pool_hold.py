"""Holds the metadata snapshot of a thin pool: `pool_hold.py UUID MARKER`, a process that outlives the agent.

A metadata snapshot outlives whoever reserved it, and the kernel does not say who that was. So whoever reserves it is a
process that does nothing else: it says `reserved ROOT`, and releases when its standard input closes (the agent is done,
or dead). It keeps the agent's lock for the pool open until then, so that the next agent waits for it. One that another
tool holds is left alone: `failed ERRNO`. So is one that stands elsewhere by the time it ends: somebody has released
ours, and holds another. The agent's marker goes with it: what another tool reserves later may stand in the same block.

It is started by its path with `-I -S`, and needs few modules: it begins before each comparison. `call` is the device
mapper's way in for `dm.py` too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import sys
from contextlib import suppress

CONTROL = "/dev/mapper/control"
HEADER = struct.Struct("<3I 3I i 3I Q 128s 129s 7x")
SPEC = struct.Struct("<QQiI16s")
TABLE_STATUS = 12
TARGET_MESSAGE = 14
_BUFFER_BYTES = 16 << 10
_HELD_WORD = 3


def call(number: int, uuid: str, data: bytes = b"") -> bytearray:
    """One of the device mapper's ioctls, for the device of that UUID; OSError as the kernel answers."""
    buffer = bytearray(_BUFFER_BYTES)
    HEADER.pack_into(buffer, 0, 4, 0, 0, len(buffer), HEADER.size, 0, 0, 0, 0, 0, 0, b"", uuid.encode())
    buffer[HEADER.size : HEADER.size + len(data)] = data
    fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, 0xC000FD00 | HEADER.size << 16 | number, buffer, True)
    finally:
        os.close(fd)
    return buffer


def message(uuid: str, text: str) -> None:
    """Sends a message to the target at sector 0; OSError as the target answers."""
    call(TARGET_MESSAGE, uuid, struct.pack("<Q", 0) + text.encode() + b"\0")


def release(uuid: str) -> None:
    """Releases the pool's metadata snapshot, if one is held."""
    try:
        message(uuid, "release_metadata_snap")
    except OSError as error:
        if error.errno != errno.EINVAL:  # none is held
            raise


def held(uuid: str) -> bytes:
    """The word of a pool's status that says where its metadata snapshot stands; `-` if there is none."""
    raw = call(TABLE_STATUS, uuid)
    start = HEADER.unpack_from(raw)[4] + SPEC.size
    return bytes(raw[start:]).split(b"\0", 1)[0].split()[_HELD_WORD]


def forget(marker: str) -> None:
    """As `hookwatch.py` does: with `-I` neither of the two can load a module of ours."""
    with suppress(OSError):
        os.unlink(marker)  # noqa: PTH108 - pathlib takes longer to load than all this takes to run
        fd = os.open(os.path.dirname(marker), os.O_RDONLY | os.O_DIRECTORY)  # noqa: PTH120 - as above
        os.fsync(fd)
        os.close(fd)


def main(arguments: list[str]) -> int:
    """Exit code 0: what was reserved is held no more; 1: nothing was reserved, with the reason on stdout."""
    uuid, marker = arguments
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    try:
        message(uuid, "reserve_metadata_snap")
    except OSError as error:
        forget(marker)
        os.write(1, b"failed %d\n" % (error.errno or 0))
        return 1
    mine = b""
    try:
        mine = held(uuid)
        os.write(1, b"reserved %s\n" % mine)
        while os.read(0, 1):
            pass
    finally:
        if not mine or held(uuid) == mine:
            release(uuid)
        forget(marker)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
