"""The I/O priority of threads: what mirroring reads and writes may wait behind everybody else's.

A thread hands its priority down to the threads and processes that it starts: it is set once, where a transfer begins,
and holds for all that works for it. Whether the disk heeds it is up to the kernel's scheduler for that disk: bfq and
mq-deadline do, none does not.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from resilver.config import IoPriority

_SET_GET: Final = {"x86_64": (251, 252)}
_SET_GET_GENERIC: Final = (30, 31)
_WHO_THREAD: Final = 1
_CLASS_SHIFT: Final = 13
_CLASSES: Final[dict[IoPriority, int]] = {"normal": 0, "idle": 3}

_libc: Final = ctypes.CDLL(None, use_errno=True)


def set_io_priority(priority: IoPriority) -> None:
    """That of the calling thread, and of what it starts from now on."""
    _call(0, _WHO_THREAD, 0, _CLASSES[priority] << _CLASS_SHIFT)


def io_class(thread: int = 0) -> int:
    """The class of a thread by its native id, 0 for the caller: 0 is the kernel's own choice, 3 is idle."""
    return _call(1, _WHO_THREAD, thread) >> _CLASS_SHIFT


@contextmanager
def io_priority(priority: IoPriority) -> Iterator[None]:
    """The calling thread's for a while; what it starts meanwhile keeps it."""
    if priority == "normal":
        yield
        return
    set_io_priority(priority)
    try:
        yield
    finally:
        set_io_priority("normal")


def _call(which: int, *arguments: int) -> int:
    number = _SET_GET.get(platform.machine(), _SET_GET_GENERIC)[which]
    answer = _libc.syscall(number, *arguments)
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(answer)
