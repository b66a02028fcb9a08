"""A disk that fails: the kernel answers the system calls of some work with EIO or ENOSPC, as a test orders.

The work runs in a thread of its own under a seccomp filter, so that nothing else of the process is touched, and what it
does next it does on a disk that is well again. The rules:

* Each call of CALLS that the thread makes, or a command that it starts, is held by the kernel and shown to a second
  process, which lets it go on or has it fail. A second process, because a thread may make a call while it holds the
  interpreter's lock (loading a module does).
* Only calls about files under one directory count: the log and the pipes of a command are no disk.
* A fault begins at a step, at its nth occurrence; of the calls that follow, `skip` go on first. Then one fails, or, if
  it is `lasting`, each until the work has ended.
* ENOSPC meets only calls that could need room: what is removed, read or overwritten by another name is let through.
* With `kill` the process is gone before that call is made; such work has to be done in a child (`killed`).

As root on x86-64, which is where the calls' numbers are known; anywhere else `available` says why not.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from resilver.errors import ResilverError
from tests.seccomp import told_of

Step = Callable[[str], None]
Work = Callable[[Step], object]

WORK_MAX_S: Final = 120.0
ERRORS: Final = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}

FD: Final = "fd"
PATH: Final = "path"
AT: Final = "at"
"""An argument and the next one: a directory's descriptor, and a path from there."""
CALLS: Final[dict[str, tuple[int, tuple[tuple[str, int], ...]]]] = {
    "read": (0, ((FD, 0),)),
    "write": (1, ((FD, 0),)),
    "ioctl": (16, ((FD, 0),)),
    "pread64": (17, ((FD, 0),)),
    "pwrite64": (18, ((FD, 0),)),
    "writev": (20, ((FD, 0),)),
    "fsync": (74, ((FD, 0),)),
    "fdatasync": (75, ((FD, 0),)),
    "truncate": (76, ((PATH, 0),)),
    "ftruncate": (77, ((FD, 0),)),
    "rename": (82, ((PATH, 0), (PATH, 1))),
    "mkdir": (83, ((PATH, 0),)),
    "rmdir": (84, ((PATH, 0),)),
    "link": (86, ((PATH, 0), (PATH, 1))),
    "unlink": (87, ((PATH, 0),)),
    "chmod": (90, ((PATH, 0),)),
    "fchmod": (91, ((FD, 0),)),
    "chown": (92, ((PATH, 0),)),
    "fchown": (93, ((FD, 0),)),
    "setxattr": (188, ((PATH, 0),)),
    "fsetxattr": (190, ((FD, 0),)),
    "getdents64": (217, ((FD, 0),)),
    "openat": (257, ((AT, 0),)),
    "mkdirat": (258, ((AT, 0),)),
    "newfstatat": (262, ((AT, 0),)),
    "unlinkat": (263, ((AT, 0),)),
    "renameat": (264, ((AT, 0), (AT, 2))),
    "linkat": (265, ((AT, 0), (AT, 2))),
    "sync_file_range": (277, ((FD, 0),)),
    "fallocate": (285, ((FD, 0),)),
    "pwritev": (296, ((FD, 0),)),
    "syncfs": (306, ((FD, 0),)),
    "renameat2": (316, ((AT, 0), (AT, 2))),
    "copy_file_range": (326, ((FD, 2),)),
    "statx": (332, ((AT, 0),)),
}
_NAMES: Final = {number: name for name, (number, _about) in CALLS.items()}
_READING: Final = frozenset({"read", "pread64", "getdents64", "newfstatat", "statx"})
_MAKING: Final = frozenset({"mkdir", "mkdirat", "openat"})
_GROWING: Final = frozenset(
    {
        *("write", "pwrite64", "writev", "pwritev", "fallocate", "ftruncate", "copy_file_range"),
        *("rename", "renameat", "renameat2", "link", "linkat", "setxattr", "fsetxattr", "fsync", "fdatasync", "syncfs"),
    }
)
_CLONING: Final = frozenset({0x40049409, 0x4020940D, 0x50009417, 0x50009418})  # FICLONE(RANGE), Btrfs makes subvolumes
_IS_TERMINAL: Final = 0x5401  # asked of every file that is opened
_CHANGING: Final = frozenset({*_GROWING, "mkdir", "mkdirat", "unlink", "unlinkat", "rmdir"})


@dataclass(frozen=True)
class Fault:
    """What is to happen, and when; see the rules above. Without a step it begins with the work."""

    error: str = "EIO"
    step: str = ""
    nth: int = 1
    skip: int = 0
    lasting: bool = False
    kill: bool = False

    def __str__(self) -> str:
        at = self.step if self.nth == 1 else f"{self.step}({self.nth})"
        what = "SIGKILL" if self.kill else self.error
        return f"{what} {'from' if self.lasting else 'once'} {at or 'the start'}{f' +{self.skip}' if self.skip else ''}"


class Call(NamedTuple):
    """A call that counted: after which step it came, and about which file."""

    step: str
    name: str
    path: str
    failed: bool


@dataclass(frozen=True)
class Outcome:
    """How some work ended: `reason` is empty if it was done."""

    reason: str
    message: str
    calls: tuple[Call, ...]

    @property
    def failed(self) -> tuple[Call, ...]:
        return tuple(call for call in self.calls if call.failed)

    def __str__(self) -> str:
        hit = ", ".join(f"{call.name} {call.path}" for call in self.failed[:3])
        return f"{self.reason or 'done'} ({self.message}) after {hit or 'nothing'}"


@functools.cache
def available() -> str:
    """Why calls cannot be made to fail on this machine, empty if they can."""
    if os.geteuid() != 0:
        return "only root can hold its own system calls"
    if platform.machine() != "x86_64":
        return "the numbers of the system calls are known for x86-64 only"
    with ThreadPoolExecutor(1) as once:
        try:
            os.close(once.submit(told_of, (), making_only=-1).result())
        except OSError as error:
            return f"system calls cannot be held here: {error.strerror}"
    return ""


def faulty(work: Work, under: Path, fault: Fault | None) -> Outcome:
    """Does the work on a disk that fails; anything that it raises but a ResilverError is raised here.

    None for a fault: nothing fails, and all that counts is told.
    """
    ended: list[BaseException | None] = []

    def do() -> None:
        try:
            _watched(under, fault)
            work(_say)
            ended.append(None)
        except BaseException as error:  # noqa: BLE001 - it is raised where the test waits
            ended.append(error)

    thread = threading.Thread(target=do, name="on a failing disk", daemon=True)
    thread.start()
    thread.join(WORK_MAX_S)
    assert not thread.is_alive(), f"still at it, {fault}"
    calls = _told()
    (error,) = ended
    if error is not None and not isinstance(error, ResilverError):
        raise error
    return Outcome("" if error is None else error.reason, "" if error is None else error.message, calls)


def killed(work: Work, under: Path, fault: Fault) -> Outcome | None:
    """Does the work in a child that is killed before a call; None if it was, and how it ended if it came to its end."""
    _second()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _watched(under, fault)
            work(_say)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    calls = _told()
    if os.WIFSIGNALED(status):
        return None
    assert os.WEXITSTATUS(status) == 0, f"failed before {fault}"
    return Outcome("", "", calls)


# On the side of the work.

_STEP: Final = "step:"


def _say(step: str) -> None:
    """Tells the second process of a step, by a call that it knows for what it is."""
    with contextlib.suppress(FileNotFoundError):
        Path(f"{_STEP}{step}").rmdir()


@functools.cache
def _second() -> socket.socket:
    """The second process, started once; it ends with this one."""
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.faults", str(other.fileno())]
    process = subprocess.Popen(command, pass_fds=[other.fileno()], cwd=Path(__file__).parents[1])
    other.close()
    atexit.register(process.wait)
    atexit.register(mine.shutdown, socket.SHUT_RDWR)
    return mine


def _watched(under: Path, fault: Fault | None) -> None:
    second = _second()
    order = json.dumps({"under": str(under.resolve()), "fault": None if fault is None else asdict(fault)}).encode()
    changing = fault is not None and (fault.kill or fault.error == "ENOSPC")
    names = CALLS.keys() - _READING if changing else CALLS
    listener = told_of([CALLS[name][0] for name in names], making_only=CALLS["openat"][0] if changing else -1)
    socket.send_fds(second, [order], [listener])
    os.close(listener)


def _told() -> tuple[Call, ...]:
    second = _second()
    second.send(b"end")
    told = b""
    while not told.endswith(b"\n"):
        told += second.recv(1 << 16)
    return tuple(Call(*row) for row in json.loads(told))


# The second process.

_RECEIVE: Final = 0xC0502100
_ANSWER: Final = 0xC0182101
_IS_VALID: Final = 0x40082102
_CONTINUE: Final = 1
_NOTICE: Final = struct.Struct("QIIiIQ6Q")  # id, pid, flags, nr, arch, instruction pointer, arguments
_CWD: Final = -100


class Watcher:
    """Decides of each call of one piece of work."""

    def __init__(self, under: str, fault: Fault | None) -> None:
        self._under = under
        self._fault = fault
        self._left = 0 if fault is None else fault.skip
        self._armed = fault is not None and not fault.step
        self._hit = False
        self._step = ""
        self._seen: dict[str, int] = {}
        self.calls: list[Call] = []

    def decide(self, pid: int, name: str, arguments: tuple[int, ...]) -> int:
        """The error number that the call is to fail with, 0 to let it go on."""
        paths = self._paths(pid, name, arguments)
        if paths and paths[0].rpartition("/")[2].startswith(_STEP):
            self._at(paths[0].rpartition("/")[2].removeprefix(_STEP))
            return errno.ENOENT
        path = next((path for path in paths if path.startswith(f"{self._under}/") or path == self._under), None)
        if path is None or (name == "ioctl" and arguments[1] & 0xFFFFFFFF == _IS_TERMINAL):
            return 0
        fails = self._fails(name, path, arguments)
        if fails and self._fault is not None and self._fault.kill:
            os.kill(pid, signal.SIGKILL)
        self.calls.append(Call(self._step, name, path[len(self._under) + 1 :], fails))
        return ERRORS[self._fault.error] if fails and self._fault is not None else 0

    def _at(self, step: str) -> None:
        self._step = step
        self._seen[step] = self._seen.get(step, 0) + 1
        fault = self._fault
        if fault is not None and (step, self._seen[step]) == (fault.step, fault.nth):
            self._armed = True

    def _fails(self, name: str, path: str, arguments: tuple[int, ...]) -> bool:
        fault = self._fault
        if fault is None or not self._armed or (self._hit and not fault.lasting):
            return False
        if fault.kill and name not in _CHANGING and not (name == "openat" and _creates(path, arguments[2])):
            return False
        if fault.error == "ENOSPC" and not fault.kill and not self._needs_room(name, path, arguments):
            return False
        if self._left:
            self._left -= 1
            return False
        self._hit = True
        return True

    def _needs_room(self, name: str, path: str, arguments: tuple[int, ...]) -> bool:
        if name == "ioctl":
            return arguments[1] & 0xFFFFFFFF in _CLONING
        if name in _MAKING:
            return not Path(path).exists() and (name != "openat" or _creates(path, arguments[2]))
        return name in _GROWING

    def _paths(self, pid: int, name: str, arguments: tuple[int, ...]) -> list[str]:
        found = []
        for how, at in CALLS[name][1]:
            if how == FD:
                found.append(_link(pid, f"fd/{_signed(arguments[at])}"))
                continue
            given = _text(pid, arguments[at + (how == AT)])
            if not given:  # of a descriptor: what is open is known
                continue
            if not given.startswith("/"):
                fd = _CWD if how == PATH else _signed(arguments[at])
                given = f"{_link(pid, 'cwd' if fd == _CWD else f'fd/{fd}')}/{given}"
            found.append(given)
        return found


def _creates(path: str, flags: int) -> bool:
    return bool(flags & os.O_CREAT) and not os.path.lexists(path)


def _signed(argument: int) -> int:
    return ctypes.c_int(argument & 0xFFFFFFFF).value


def _link(pid: int, what: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/{what}").readlink())
    except OSError:
        return ""


def _text(pid: int, address: int) -> str:
    """The string at an address in another process."""
    found = b""
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    except OSError:
        return ""
    try:
        while b"\0" not in found and len(found) < os.pathconf("/", "PC_PATH_MAX"):
            found += os.pread(memory, 4096 - (address + len(found)) % 4096, address + len(found))
    except OSError:
        return ""
    finally:
        os.close(memory)
    return found.split(b"\0", 1)[0].decode(errors="surrogateescape")


def _watch(listener: int, watcher: Watcher, orders: socket.socket) -> bool:
    """Answers calls until the work has ended; whether there is more to come."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(orders, select.POLLIN)
    while True:
        for fd, event in poll.poll():
            if fd == orders.fileno():
                return bool(orders.recv(16))
            if event & select.POLLIN:
                _answer(listener, watcher)
            else:  # everybody under the filter is gone
                poll.unregister(listener)


def _answer(listener: int, watcher: Watcher) -> None:
    notice = bytearray(_NOTICE.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, notice, True)
        which, pid, _flags, number, _arch, _at, *arguments = _NOTICE.unpack(notice)
        fails = watcher.decide(pid, _NAMES[number], tuple(arguments))
        answer = struct.pack("QqiI", which, 0, -fails, 0 if fails else _CONTINUE)
        fcntl.ioctl(listener, _ANSWER, bytearray(answer), True)
    except OSError as error:
        if error.errno != errno.ENOENT:  # whoever called is gone
            raise


def main() -> None:
    """One piece of work after the other, until the test's process ends."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    more = True
    while more:
        message, descriptors, _flags, _address = socket.recv_fds(orders, 1 << 16, 1)
        if not message:
            return
        order: dict[str, Any] = json.loads(message)
        fault = None if order["fault"] is None else Fault(**order["fault"])
        watcher = Watcher(order["under"], fault)
        more = _watch(descriptors[0], watcher, orders)
        os.close(descriptors[0])
        told = json.dumps(watcher.calls).encode() + b"\n"
        for at in range(0, len(told), 1 << 15):
            orders.send(told[at : at + (1 << 15)])


if __name__ == "__main__":
    main()
