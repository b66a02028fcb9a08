"""One agent at a time in a snapshot directory.

* Whoever changes something there holds a lock (`flock`) on the directory while it does, and not a moment longer: a
  descriptor that was kept open would keep the disk from being unmounted.
* Between two changes `agent.json` says whose directory it is, by the lock that an agent holds on its state_dir as long
  as it lives. Another agent's word counts as long as that lock is held; then the directory is taken over.
* An agent whose state_dir cannot be seen from here, in another container or on another machine, is only met by the lock
  of the directory, if both change something at once. Commits trust no path besides (`image_commit.py`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent.disk.durable import Json, open_own, read_json, write_json
from resilver.errors import Damaged, Refused, ResilverError

# EBADF: what NFS says of the lock of a directory.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF})


def may_lock(fd: int) -> bool:
    """Locks a file or directory, without waiting: False if another one has. Where there are no locks, nobody has.

    OSError of the disk.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


class Claim:
    """On one directory, by the agent with that state_dir; without one nothing is written, and only the lock is left."""

    def __init__(self, directory: Path, state_dir: Path | None) -> None:
        self._directory: Final = directory
        self._state_dir: Final = state_dir
        self._turn: Final = threading.RLock()
        self._depth = 0

    @contextlib.contextmanager
    def held(self, *, takes: bool = True) -> Iterator[None]:
        """Around every change, also within another one. IN_USE names the other agent. OSError of the disk.

        `takes`: the directory is this agent's from now on, until it ends. One that is not there yet is nobody's; what
        is a link is refused by those who look.
        """
        with self._turn, contextlib.ExitStack() as stack:
            if not self._depth:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    stack.enter_context(self._locked(takes=takes))
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    @contextlib.contextmanager
    def _locked(self, *, takes: bool) -> Iterator[None]:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not may_lock(fd):
                raise self._refused("another agent at this moment")
            try:
                self._take(_place(fd), takes=takes)
                yield
            finally:
                # Not left to the closing: a process that is just being started has a copy of the descriptor.
                with contextlib.suppress(OSError):
                    fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)

    def check(self) -> None:
        """As `held` refuses, but takes nothing over. OSError of the disk, also if the directory is not there."""
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            mine = self._mine(_place(fd))
        finally:
            os.close(fd)
        if mine is not None:
            self._is_mine(mine)

    def _take(self, place: str, *, takes: bool) -> None:
        mine = self._mine(place)
        if mine is None or self._is_mine(mine) or not takes:
            return
        # On a full disk the agent goes on without: it is tried again with the next change.
        with contextlib.suppress(ResilverError):
            write_json(self._directory / "agent.json", mine)

    def _is_mine(self, mine: Json) -> bool:
        """Whether the directory says so already; IN_USE if it is another living agent's."""
        try:
            found = read_json(self._directory / "agent.json")
        except Damaged:
            found = None
        if found == mine:
            return True
        if found is not None and found.get("place") == mine["place"]:
            other = _alive(found)
            if other:
                raise self._refused(other)
        return False

    def _mine(self, place: str) -> Json | None:
        """Which agent this is, and of which directory it says so: a copy of the directory is another one."""
        if self._state_dir is None:
            return None
        try:
            lock = (self._state_dir / "lock").stat()
        except OSError:
            return None
        return {
            "state_dir": str(self._state_dir.absolute()),
            "lock": f"{lock.st_dev}-{lock.st_ino}",
            "place": place,
        }

    def _refused(self, who: str) -> Refused:
        said = (
            f"{self._directory} is in use by {who}: give each a path and a snapshot_dir of its own, or stop one of them"
        )
        return Refused("IN_USE", said, in_use_by=who)


def _place(fd: int) -> str:
    """Which directory it is, also after the file system was unmounted and mounted again: on Btrfs, ZFS and logical
    volumes the number of the device is another one then.
    """
    return f"{os.fstatvfs(fd).f_fsid}-{os.fstat(fd).st_ino}"


def _alive(found: Json) -> str:
    """The agent by name that says so of itself, if it lives."""
    state_dir = found.get("state_dir")
    if not isinstance(state_dir, str) or not state_dir.startswith("/") or "\0" in state_dir:
        return ""
    try:
        fd = open_own(Path(state_dir) / "lock", os.O_RDONLY)
    except (OSError, Damaged):
        return ""
    try:
        stat = os.fstat(fd)
        if found.get("lock") != f"{stat.st_dev}-{stat.st_ino}" or not _is_held(fd):
            return ""
        pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
    finally:
        os.close(fd)
    return f"the agent with pid {pid}, whose state_dir is {state_dir}"


def _is_held(fd: int) -> bool:
    """Whether another one holds the lock of that file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
