"""A filter on a thread's system calls (seccomp) that has another process answer for some of them: x86-64 alone."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import Final

_LOAD: Final = 0x20
_EQUAL: Final = 0x15
_ANY_BIT: Final = 0x45
_RETURN: Final = 0x06
_NUMBER: Final = 0  # where it stands in what a filter is given; so the next two
_ARCHITECTURE: Final = 4
_FLAGS: Final = 16 + 8 * 2  # of openat
_ALLOW: Final = 0x7FFF0000
_NOTIFY: Final = 0x7FC00000
_X86_64: Final = 0xC000003E
_SYS_SECCOMP: Final = 317
_NEW_LISTENER: Final = 8


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


def told_of(calls: Iterable[int], *, making_only: int) -> int:
    """Puts the filter on this thread, for good; the descriptor on which its calls of such numbers are told.

    Of the call `making_only`, an openat (-1: of none), only one is told that may make a file.
    """
    numbers = sorted(calls)
    # Behind the numbers: go on; look at the flags of an openat; tell.
    rows = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 0, len(numbers) + 1, _X86_64), (_LOAD, 0, 0, _NUMBER)]
    for at, number in enumerate(numbers):
        behind = len(numbers) - at - 1
        rows.append((_EQUAL, behind + (1 if number == making_only else 3), 0, number))
    rows += [(_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, _FLAGS), (_ANY_BIT, 0, 1, os.O_CREAT)]
    rows += [(_RETURN, 0, 0, _NOTIFY), (_RETURN, 0, 0, _ALLOW)]
    program = (_Instruction * len(rows))(*[_Instruction(*row) for row in rows])
    libc = ctypes.CDLL(None, use_errno=True)
    made: int = libc.syscall(_SYS_SECCOMP, 1, _NEW_LISTENER, ctypes.byref(_Program(len(rows), program)))
    if made < 0:
        raise OSError(ctypes.get_errno(), "no filter on system calls")
    return made
