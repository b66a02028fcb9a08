"""What /proc tells of processes: their descriptors, and their names.

A process is named by its directory, such as `/proc/17`. Whatever ends meanwhile, or may not be looked at, has nothing.
What stands there is chosen by whoever runs the process: it is read as text that may be anything.
"""

from __future__ import annotations

import os
from pathlib import Path

Process = str | Path

# ruff: noqa: PTH115, PTH208 - text, not a Path for each of very many; and what a link says need be no path


def processes() -> list[str]:
    """Every one that there is now."""
    return [f"/proc/{name}" for name in os.listdir("/proc") if name.isdigit()]


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
