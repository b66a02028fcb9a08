"""Volumes for the acceptance tests: made, changed in scattered blocks, and compared byte for byte.

Bytes come from a seeded generator, so that a failure can be looked at again. Nothing here knows of the code under test.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

BLOCK = 4096
MIB = 1 << 20


def make(path: Path, size_bytes: int, data_bytes: int, seed: int, stripe_bytes: int = MIB) -> Path:
    """An image with that much data, in stripes that are evenly spread over it; holes between them."""
    source = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = data_bytes // stripe_bytes
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for index in range(count):
            file.seek(index * (size_bytes // count) // BLOCK * BLOCK)
            file.write(source.randbytes(stripe_bytes))
    return path


def scattered(size_bytes: int, count: int, seed: int) -> list[int]:
    """Offsets of blocks, in no order, of which no two are neighbours: each is a range of its own."""
    return [block * 2 * BLOCK for block in random.Random(seed).sample(range(size_bytes // BLOCK // 2), count)]


def write(path: Path, offsets: Iterable[int], seed: int) -> None:
    """New bytes in the blocks at these offsets."""
    source = random.Random(seed)
    fd = os.open(path, os.O_RDWR)
    try:
        for offset in offsets:
            os.pwrite(fd, source.randbytes(BLOCK), offset)
    finally:
        os.close(fd)


def copy(path: Path, to: Path) -> Path:
    """Every byte of a file, in one that shares nothing with it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as source, to.open("xb") as target:
        target.truncate(path.stat().st_size)
        for start, end in _data(source.fileno()):
            source.seek(start)
            target.seek(start)
            for _ in range(start, end, MIB):
                target.write(source.read(min(MIB, end - source.tell())))
    shutil.copystat(path, to)
    return to


def identical(one: Path, other: Path) -> bool:
    """Whether both have the same size and every byte the same; only what is a hole in both is not read."""
    with one.open("rb") as mine, other.open("rb") as theirs:
        if os.fstat(mine.fileno()).st_size != os.fstat(theirs.fileno()).st_size:
            return False
        for fd in (mine.fileno(), theirs.fileno()):
            for start, end in _data(fd):
                for at in range(start, end, MIB):
                    length = min(MIB, end - at)
                    if os.pread(mine.fileno(), length, at) != os.pread(theirs.fileno(), length, at):
                        return False
    return True


def _data(fd: int) -> Iterator[tuple[int, int]]:
    """The stretches of a file that are not holes."""
    end, size_bytes = 0, os.fstat(fd).st_size
    while end < size_bytes:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end
