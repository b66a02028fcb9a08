"""The device mapper, asked directly: whether a device is there, who counts as having it open, messages, statuses.

Devices are named by their UUID, which LVM makes of its own (`LVM-<vg><lv>`), so that a rename hides nothing. The
answers are the kernel's, and cost no process. Every device is reached as `/dev/dm-<minor>`, which the kernel makes
itself: nothing waits for udev.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.disk import pool_hold
from agent.disk.pool_hold import HEADER, SPEC, TABLE_STATUS, call

CONTROL: Final = Path(pool_hold.CONTROL)

_DEV_STATUS: Final = 7
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
        raw = call(_DEV_STATUS, uuid)
    except OSError as error:
        if error.errno in {errno.ENXIO, errno.ENOENT}:
            return None
        raise
    fields = HEADER.unpack_from(raw)
    flags, number = fields[7], fields[10]
    return Device(_decoded(number), fields[6], bool(flags & _SUSPENDED), bool(flags & _READ_ONLY))


def status(uuid: str) -> tuple[str, str]:
    """The type and the status words of a device's only target."""
    raw = call(TABLE_STATUS, uuid)
    start = HEADER.unpack_from(raw)[4]
    *_rest, kind = SPEC.unpack_from(raw, start)
    words = raw[start + SPEC.size :]
    return _text(kind), _text(bytes(words))


def _decoded(number: int) -> int:
    """The kernel's own packing of a device number, as the C library has it."""
    return os.makedev(number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00)


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode()
