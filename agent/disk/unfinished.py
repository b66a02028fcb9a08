"""What an export makes, under another name beside its path until it is whole.

The name is the same each time, so that what an export that was killed has left is found, and replaced by the next one
to that path. Whoever makes it holds a lock (`flock`) on it; a command that copies into it inherits the descriptor, and
with that the lock, because such a command goes on when its agent is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from agent.disk.claim import may_lock
from resilver.errors import Refused

SUFFIX: Final = ".resilver-export"


@contextlib.contextmanager
def unfinished(path: Path, make: Callable[[Path], None], remove: Callable[[Path], None]) -> Iterator[tuple[Path, int]]:
    """Makes a file or directory for the length of a block, which is to rename it to `path`: (its path, a descriptor).

    IN_USE while another export to that path is under way. It is removed if the block fails. OSError of the disk.
    """
    temporary = path.with_name(f".{path.name}{SUFFIX}")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            stack.enter_context(_locked(temporary, path))
            remove(temporary)
        stack.close()
        try:
            make(temporary)
            fd = stack.enter_context(_locked(temporary, path))
        except (FileExistsError, FileNotFoundError):
            raise _in_use(path) from None  # another one has come in between
        try:
            yield temporary, fd
        except BaseException:
            remove(temporary)
            raise


@contextlib.contextmanager
def _locked(temporary: Path, path: Path) -> Iterator[int]:
    fd = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not may_lock(fd):
            raise _in_use(path)
        found, there = os.fstat(fd), temporary.lstat()
        if (found.st_dev, found.st_ino) != (there.st_dev, there.st_ino):
            raise _in_use(path)
        try:
            yield fd
        finally:
            # Not left to the closing: a process that is just being started has a copy of the descriptor.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def _in_use(path: Path) -> Refused:
    return Refused(
        "IN_USE",
        f"an export to {path} is under way, or a `cp` of one that was killed; wait for it, or name another path",
        path=str(path),
    )
