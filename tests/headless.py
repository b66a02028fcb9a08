"""A process whose first thread has ended: `/proc/PID` shows a zombie with nothing open, and its threads go on."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_SCRIPT = """
import ctypes, mmap, os, sys, threading
def go_on():
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)
ctypes.CDLL("libgcc_s.so.1")  # pthread_exit wants it, and finds it no more after a chroot
{hold}
threading.Thread(target=go_on).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@contextlib.contextmanager
def headless(hold: str, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs one that first does `hold`, Python that finds the arguments in sys.argv; ended at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT.format(hold=hold), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        until = time.monotonic() + 30
        while Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z":
            assert time.monotonic() < until, "its first thread has not ended"
            time.sleep(0.01)  # the end of a thread is told to nobody outside
        yield process
    finally:
        process.communicate(timeout=30)
