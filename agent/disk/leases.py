"""Whether anything at all has a file below a directory open for writing: asked of the kernel, file by file.

A descriptor may stand in no process' table: on its way through a socket, a fixed file of io_uring, or the kernel's own,
as those of its NFS and SCSI servers. A read lease (`F_SETLEASE F_RDLCK`) is refused while anything has the file open
for writing, or mapped so, and costs an open: 100,000 files take seconds. It is given back at once.

For a tree that nobody can open anything of for writing any more: else whoever does so just then waits for the lease,
and SIGIO, which the kernel sends its holder, would end us.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Final

from agent.disk.advance import advanced

_F_SETLEASE: Final = 1024
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_for_writing(top: Path, max_s: float) -> str | None:
    """A file below a directory that is open for writing, by its path from there; empty if there is none.

    None if not all of them could be asked: in that time, or at all. Symbolic links are not followed.
    """
    end = time.monotonic() + max_s
    waiting = ["."]
    try:
        top_fd = os.open(top, _OPEN | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        while waiting:
            directory = waiting.pop()
            found = _look_in(top_fd, directory, waiting, end)
            if found:
                return os.path.normpath(f"{directory}/{found}")
            advanced()
    except OSError:  # a TimeoutError is one
        return None
    finally:
        os.close(top_fd)
    return ""


def _look_in(top_fd: int, directory: str, waiting: list[str], end: float) -> str:
    """The name of a file in one directory that is open for writing; the directories in it are added to the others."""
    fd = os.open(directory, _OPEN | os.O_DIRECTORY, dir_fd=top_fd)
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                if time.monotonic() >= end:
                    raise TimeoutError
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{directory}/{entry.name}")
                elif entry.is_file(follow_symlinks=False) and _is_written(fd, entry.name):
                    return entry.name
    finally:
        os.close(fd)
    return ""


def _is_written(directory_fd: int, name: str) -> bool:
    fd = os.open(name, _OPEN, dir_fd=directory_fd)
    try:
        fcntl.fcntl(fd, _F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise
        return True
    finally:
        os.close(fd)
    return False
