"""A mount namespace of a test process's own: what it mounts is gone with it, however it ends.

A daemon that is started in it, and dies with its parent, leaves nothing behind either: neither mounts nor sockets. The
mounts of other test processes are let go of, so that their file systems end when they say so.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_MNT_DETACH = 2
_OTHERS = ("/loopfs-", "/zfsfs-", "/pytest-of-")


def enter() -> bool:
    """Enters a new one; False if this user may not. All threads that are started from now on are in it."""
    if os.geteuid() != 0:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        return False
    if libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        return False
    for line in Path("/proc/thread-self/mountinfo").read_text().splitlines():
        point = line.split(" ")[4]
        if any(part in point for part in _OTHERS):
            libc.umount2(point.encode().decode("unicode_escape").encode("latin-1"), _MNT_DETACH)
    return True
