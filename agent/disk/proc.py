"""What /proc tells of processes: their descriptors, and their names.

A process is named by its directory, such as `/proc/17`. Whatever ends meanwhile, or may not be looked at, has nothing.
What stands there is chosen by whoever runs the process: it is read as text that may be anything.

A process goes on when its first thread ends, and its directory then says nothing of what it has open: `bearers`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

Process = str | Path

_EXITING: Final = 0x4  # PF_EXITING: set before a thread lets go of what it has open
_KERNEL: Final = 0x200000  # PF_KTHREAD
_FLAGS_AT: Final = 6  # in /proc/17/stat, behind the name, which may hold blanks and brackets

# ruff: noqa: PTH115, PTH208 - text, not a Path for each of very many; and what a link says need be no path


def processes() -> list[str]:
    """Every one that there is now."""
    return [f"/proc/{name}" for name in os.listdir("/proc") if name.isdigit()]


def bearers(process: Process) -> Iterator[str]:
    """The directories that say what a process has: its own and, if its first thread has ended, those of the others.

    To be looked at one by one: whether the first has ended is asked after it was looked at, so that none ends between.
    """
    yield str(process)
    if _flags(process) & _EXITING:
        try:
            threads = os.listdir(f"{process}/task")
        except OSError:
            return
        # Not below task: what is mapped is told only of a directory in /proc itself, which every thread has.
        yield from (f"/proc/{thread}" for thread in threads if not str(process).endswith(f"/{thread}"))


def is_kernel(process: Process) -> bool:
    """Whether it is a thread of the kernel, which has neither a program nor descriptors."""
    return bool(_flags(process) & _KERNEL)


def _flags(process: Process) -> int:
    try:
        raw = Path(f"{process}/stat").read_bytes()
        return int(raw.rpartition(b")")[2].split()[_FLAGS_AT])
    except (OSError, ValueError, IndexError):
        return 0


def descriptors(process: Process) -> list[str]:
    """The numbers of all that a process has open."""
    try:
        return os.listdir(f"{process}/fd")
    except OSError:
        return []


def target(process: Process, link: str) -> str:
    """What a link below a process says, such as `fd/3`, `exe` or `ns/mnt`; OSError if it cannot be asked."""
    return os.readlink(f"{process}/{link}")


def fields(process: Process, number: str) -> dict[str, str]:
    """What is known of a descriptor without touching what it is on: pos, flags, mnt_id, ino. OSError, ValueError."""
    text = Path(f"{process}/fdinfo/{number}").read_text(errors="replace")
    return {name: value.strip() for name, value in (line.split(":", 1) for line in text.splitlines()[:4])}


def may_write(of: dict[str, str]) -> bool:
    """Whether a descriptor of those fields was opened for writing; KeyError, ValueError."""
    return int(of["flags"], 8) & os.O_ACCMODE != os.O_RDONLY


def command_of(process: Process) -> str:
    try:
        return Path(f"{process}/comm").read_text(errors="replace").strip() or "?"
    except OSError:
        return "?"
