"""A FUSE mount that has stopped to answer, with a process that stands in it: as of a server that hangs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Speaks as much of the protocol as a working directory in the root of the mount wants, then nothing more.
_SCRIPT = r"""
import ctypes, os, select, signal, struct, sys
point, beside, how = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
if how == "namespace":
    assert libc.unshare(0x20000) == 0
    assert libc.mount(b"none", b"/", None, (1 << 14) | (1 << 18), None) == 0
if os.fork() == 0:
    os.chdir(beside)
    sys.stdin.read()
    os._exit(0)
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
assert libc.mount(b"dead", point.encode(), b"fuse", 0, options) == 0, os.strerror(ctypes.get_errno())
reader, writer = os.pipe()
server = os.fork()
if server == 0:
    os.close(writer)
    while fd in (ready := select.select([fd, reader], [], [])[0]) and reader not in ready:
        size, opcode, unique = struct.unpack_from("<IIQ", os.read(fd, 1 << 20))
        error, body = -38, b""  # ENOSYS
        if opcode == 26:  # INIT
            error, body = 0, struct.pack("<4I2H2I2H8I", 7, 31, 0, 0, 1, 1, 4096, 1, 1, 0, *[0] * 8)
        elif opcode == 3:  # GETATTR: a directory, to be asked about anew every time
            error, body = 0, struct.pack("<QII6Q10I", 0, 0, 0, 1, *[0] * 8, 0o40755, 2, *[0] * 5)
        os.write(fd, struct.pack("<IiQ", 16 + len(body), error, unique) + body)
    signal.pause()
os.close(fd)
os.chdir(point)
if how == "chroot":
    os.chroot(point)
    os.chdir("/")
os.close(writer)
print("ready", flush=True)
sys.stdin.read()
os.kill(server, signal.SIGKILL)
os.wait()
"""


@contextlib.contextmanager
def dead_mount(point: Path, beside: Path, how: str = "") -> Iterator[None]:
    """Mounted at a directory, with a process in it and another in a directory `beside`; unmounted at the end.

    how: "namespace" for all of it in a mount namespace of its own, "chroot" for a process whose root it is.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(point), str(beside), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.communicate(timeout=30)  # its server ends with it, so that nothing waits for that any more
        if how != "namespace":
            subprocess.run(["umount", "--lazy", str(point)], check=False, timeout=30)
