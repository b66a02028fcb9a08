"""Freezes a mount for a moment: `freeze.py MOUNT DEADLINE_S`, a process of its own.

A freeze outlives the process that made it, so that an agent that is killed in between would leave a guest hanging.
This helper freezes, says `frozen`, and thaws when its standard input closes (the agent is done, or dead) or when the
deadline passes, whichever is first; then it says `thawed`, or `late` if it was the deadline, or somebody else had
thawed the mount. Each byte that it is sent before, it answers with `held`. It is started by its path with `-I -S` (it
starts in 15 ms, and needs nothing but the standard library).
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
import time

FIFREEZE = 0xC0045877
FITHAW = 0xC0045878


def freeze(fd: int) -> None:
    fcntl.ioctl(fd, FIFREEZE, 0)


def thaw(fd: int) -> None:
    fcntl.ioctl(fd, FITHAW, 0)


def main(arguments: list[str]) -> int:
    """Exit code 0: it was frozen until we were told; 1: it could not be frozen, with the reason on stdout."""
    mount, deadline_s = arguments[0], float(arguments[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    try:
        fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
        freeze(fd)
    except OSError as error:
        print(f"failed {error.errno}", flush=True)  # noqa: T201 - the agent reads it
        return 1
    until = time.monotonic() + deadline_s
    late = True
    try:
        os.write(1, b"frozen\n")
        while (left := until - time.monotonic()) > 0:
            readable, _, _ = select.select([0], [], [], left)
            if not readable:
                continue
            if not os.read(0, 1):
                late = False
                break
            os.write(1, b"held\n")
    finally:
        try:
            thaw(fd)
        except OSError:
            late = True  # somebody else has: nobody knows since when
    os.write(1, b"late\n" if late else b"thawed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
