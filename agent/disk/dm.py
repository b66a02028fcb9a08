"""The device mapper, asked directly: whether a device is there, who counts as having it open, messages, statuses.

Devices are named by their UUID, which LVM makes of its own (`LVM-<vg><lv>`), so that a rename hides nothing. The
answers are the kernel's, and cost no process. Every device is reached as `/dev/dm-<minor>`, which the kernel makes
itself: nothing waits for udev.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CONTROL: Final = Path("/dev/mapper/control")

_HEADER: Final = struct.Struct("<3I 3I i 3I Q 128s 129s 7x")
_SPEC: Final = struct.Struct("<QQiI16s")
_BUFFER_BYTES: Final = 16 << 10
_DEV_STATUS: Final = 7
_TABLE_STATUS: Final = 12
_TARGET_MESSAGE: Final = 14
_READ_ONLY: Final = 1 << 0
_SUSPENDED: Final = 1 << 1


@dataclass(frozen=True, slots=True)
class Device:
    """A device that is active. `open_count` counts every open, mount and device upon it, ours too."""

    number: int
    open_count: int
    suspended: bool
    read_only: bool

    @property
    def node(self) -> Path:
        return Path(f"/dev/dm-{os.minor(self.number)}")


def find(uuid: str) -> Device | None:
    """The device with that UUID; None if it is not active."""
    try:
        raw = _call(_DEV_STATUS, uuid)
    except OSError as error:
        if error.errno in {errno.ENXIO, errno.ENOENT}:
            return None
        raise
    fields = _HEADER.unpack_from(raw)
    flags, number = fields[7], fields[10]
    return Device(_decoded(number), fields[6], bool(flags & _SUSPENDED), bool(flags & _READ_ONLY))


def status(uuid: str) -> tuple[str, str]:
    """The type and the status words of a device's only target."""
    raw = _call(_TABLE_STATUS, uuid)
    start = _HEADER.unpack_from(raw)[4]
    *_rest, kind = _SPEC.unpack_from(raw, start)
    words = raw[start + _SPEC.size :]
    return _text(kind), _text(bytes(words))


def message(uuid: str, text: str) -> None:
    """Sends a message to the target at sector 0; OSError as the target answers."""
    _call(_TARGET_MESSAGE, uuid, struct.pack("<Q", 0) + text.encode() + b"\0")


def _call(number: int, uuid: str, data: bytes = b"") -> bytearray:
    buffer = bytearray(_BUFFER_BYTES)
    _HEADER.pack_into(buffer, 0, 4, 0, 0, len(buffer), _HEADER.size, 0, 0, 0, 0, 0, 0, b"", uuid.encode())
    buffer[_HEADER.size : _HEADER.size + len(data)] = data
    fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, 0xC000FD00 | _HEADER.size << 16 | number, buffer, True)
    finally:
        os.close(fd)
    return buffer


def _decoded(number: int) -> int:
    """The kernel's own packing of a device number, as the C library has it."""
    return os.makedev(number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00)


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode()
