"""Keeps the C library from holding memory that nobody uses.

glibc gives every thread an arena of its own, eight for each processor, and what a thread frees stays in its arena. An
agent has dozens of threads with buffers of megabytes: without a bound its resident set grows to several times what it
needs. Two arenas cost nothing measurable, because the threads mostly wait for disks and sockets.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Final

_M_ARENA_MAX: Final = -8
_M_MMAP_THRESHOLD: Final = -3
ARENAS_MAX: Final = 2
MMAP_THRESHOLD_BYTES: Final = 256 << 10


def bound_arenas() -> None:
    """To be called before threads are started; where the C library is another one, nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, ARENAS_MAX)
        # A fixed threshold: glibc would raise it to the largest buffer that was ever freed, and keep such ones.
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
