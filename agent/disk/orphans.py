"""Commands that outlive the agent which started them: whoever comes after it waits until they have ended.

An agent that is killed in the middle of `zfs rename` or `lvm lvrename` leaves the command running. A successor that
looked at once could see the state before it, undo what was begun, and then have the command end after all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from resilver.errors import Damaged

WAIT_MAX_S: Final = 60.0
WAIT_EVERY_S: Final = 0.05


def wait(concerns: Callable[[str, list[str]], bool]) -> None:
    """Returns once no such command runs that this process has not started itself.

    `concerns` says of a program, by its name without a directory, and its arguments whether it is about what is ours.
    Raises IO_ERROR if one still runs after `WAIT_MAX_S`: nothing can be decided before it has ended.
    """
    deadline = time.monotonic() + WAIT_MAX_S
    while running := [command for command in _others() if concerns(Path(command[0]).name, command[1:])]:
        if time.monotonic() >= deadline:
            shown = " ".join(running[0])
            raise Damaged("IO_ERROR", f"{shown!r} of an agent that has ended still runs after {WAIT_MAX_S:g} s")
        time.sleep(WAIT_EVERY_S)  # until the deadline: the end of another process' child is told to nobody else


def _others() -> Iterator[list[str]]:
    """The command lines of processes that are no children of ours."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")[:-1]
            if not words:
                continue  # of the kernel
            # Behind the command's name, which may hold blanks and brackets: state, then the parent.
            parent = int((process / "stat").read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # it has ended
        if parent != os.getpid():
            yield [os.fsdecode(word) for word in words]
