"""Whether anybody has a file open, and who.

A write lease (`F_SETLEASE F_WRLCK`) is refused by the kernel if anything else has the file open, mapped (also with the
descriptor closed) or attached to a loop device (also read-only, also through a hard link): it answers *whether*, and
while it is held every other open waits. *Who* is found by looking: open files and mappings of all processes, and all
loop devices, each by device and inode.

* The lease wants that this process has the file open once: everything done under it goes through `Lease.fd`.
* The kernel takes a lease away after 45 seconds if somebody waits. Whoever works long under one asks `check`.
* The signal that tells of a waiter is SIGURG, which is ignored unless somebody asks for it; SIGIO would kill us.
* Where leases do not work (network file systems; not root and not the owner), only the looking is left, and
  `Lease.certain` is False.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from agent.disk import loops, proc
from resilver.errors import Refused

_F_SETLEASE: Final = 1024
_F_GETLEASE: Final = 1025
_IN_USE: Final = frozenset({errno.EAGAIN, errno.EBUSY, errno.ETXTBSY})


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who has a file open; `writes` if it may write through it."""

    name: str
    writes: bool


class InUseError(Exception):
    """Internal: the lease was refused; `users` may be empty if nobody who has it open could be seen."""

    def __init__(self, users: list[User]) -> None:
        super().__init__(", ".join(names(users)))
        self.users = users

    def refused(self, path: Path) -> Refused:
        """The refusal that an operator is to read."""
        who = ", ".join(names(self.users))
        return Refused("IN_USE", f"{path} is in use by {who}; it is not touched until that ends", in_use_by=who)


def names(users: list[User]) -> tuple[str, ...]:
    """The users by name, or words for one that cannot be seen from here."""
    return tuple(user.name for user in users) or ("a process that cannot be seen from here",)


class Lease:
    """Holds a file so that nobody else has it open. Raises InUseError, or OSError if it cannot be opened."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.fd = os.open(path, flags)
        except BlockingIOError:  # another one holds a lease
            raise InUseError(users_of(path.stat())) from None
        try:
            self.certain = self._take()
        except BaseException:
            os.close(self.fd)
            raise

    def _take(self) -> bool:
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self.fd, _F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            found = users_of(os.fstat(self.fd), besides_fd=self.fd)
            if error.errno in _IN_USE or found:
                raise InUseError(found) from None
            return False
        return True

    def broken(self) -> bool:
        """Whether somebody waits for the file, or has got it."""
        if self.certain:
            return bool(fcntl.fcntl(self.fd, _F_GETLEASE) != fcntl.F_WRLCK)
        return bool(users_of(os.fstat(self.fd), besides_fd=self.fd))

    def check(self) -> None:
        """Raises InUseError if the lease is broken."""
        if self.broken():
            raise InUseError(
                users_of(os.fstat(self.fd), besides_fd=self.fd) or [User("a process that waits for it", True)]
            )

    def close(self) -> None:
        if self.fd < 0:
            return
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.fd, _F_SETLEASE, fcntl.F_UNLCK)
        os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def users_of(stat: os.stat_result, *, besides_fd: int = -1) -> list[User]:
    """Everybody who has the inode open, mapped or attached, as far as this process may see."""
    found: dict[str, bool] = {}
    for user in _looked_up(stat, besides_fd):
        found[user.name] = found.get(user.name, False) or user.writes
    return [User(name, writes) for name, writes in sorted(found.items())]


def _looked_up(stat: os.stat_result, besides_fd: int) -> Iterator[User]:
    for loop in loops.loops_on(stat):
        yield User(str(loop.path), not loop.read_only)
    own = os.getpid()
    for process in proc.processes():
        pid = int(process.rpartition("/")[2])
        modes: list[bool] = []
        for bearer in proc.bearers(process):
            modes += _open_modes(bearer, stat, besides_fd if pid == own else -1)
            modes += _mapped_modes(bearer, stat)
        if modes:
            yield User(f"{proc.command_of(process)} pid {pid}", any(modes))


def _open_modes(process: str, stat: os.stat_result, besides_fd: int) -> Iterator[bool]:
    """For each descriptor of a process on the inode, whether it may write.

    The inode is asked of fdinfo first: a stat of a descriptor on a dead network mount could hang.
    """
    for number in proc.descriptors(process):
        if number == str(besides_fd):
            continue
        try:
            # Sockets, pipes and the like, which are most, have no path.
            if not proc.target(process, f"fd/{number}").startswith("/"):
                continue
            fields = proc.fields(process, number)
            if "ino" in fields and int(fields["ino"]) != stat.st_ino:
                continue
            if os.path.samestat(Path(f"{process}/fd/{number}").stat(), stat):
                yield proc.may_write(fields)
        except (OSError, ValueError, KeyError):
            continue


def _mapped_modes(process: str, stat: os.stat_result) -> Iterator[bool]:
    """For each mapping of the inode, whether it writes to the file.

    The device in maps is not that of stat on Btrfs: map_files tells, and where it may not be read, a match counts.
    """
    try:
        raw = Path(f"{process}/maps").read_bytes()
    except OSError:
        return
    inode = str(stat.st_ino).encode()
    for line in raw.splitlines() if b" %b " % inode in raw else ():
        fields = line.split(None, 5)
        if len(fields) < 5 or fields[4] != inode:
            continue
        try:
            same = os.path.samestat(Path(f"{process}/map_files/{fields[0].decode()}").stat(), stat)
        except OSError:
            same = True
        if same:
            yield fields[1][1:2] == b"w" and fields[1][3:4] == b"s"
