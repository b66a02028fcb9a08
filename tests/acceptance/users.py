"""Users of an image, as guests and tools are: each is a process or a device, and ends with its block."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.loopfs import attached

_MAPPER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
mapped = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
os.close(fd)
print(flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def opened(image: Path) -> Iterator[str]:
    """A process that has the image open for reading, and does nothing."""
    with image.open("rb") as file:
        process = subprocess.Popen(["sleep", "infinity"], stdin=file)
    with _ended(process):
        yield f"sleep pid {process.pid}"


@contextlib.contextmanager
def mapped(image: Path) -> Iterator[str]:
    """A process that has the image mapped, and its descriptor closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _MAPPER, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with _ended(process):
        assert process.stdout is not None
        process.stdout.readline()
        yield f"pid {process.pid}"


@contextlib.contextmanager
def looped(image: Path) -> Iterator[str]:
    """A read-only loop device that was attached through another name of the image."""
    other = image.with_suffix(".link")
    other.hardlink_to(image)
    try:
        with attached(other, read_only=True) as device:
            yield str(device)
            other.unlink()
    finally:
        other.unlink(missing_ok=True)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    with process:
        try:
            yield
        finally:
            process.kill()
