"""What is measured on: file systems on loop devices of their own, images of incompressible data, and a change to one.

A loop device is what `mount -o loop` makes, which goes through the cache of the file system below it: a scattered write
then costs what it costs on a disk with a cache of its own. With `direct` it goes past that cache, and each block that
is written becomes a request of its own to the disk below, in which everybody's differences drown.

Whatever is made here is unmounted, detached and removed at the end of its block.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.backends.image_copy import hint, opened
from agent.disk import ioctl

BLOCK: Final = 4096
KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
SECTOR_BYTES: Final = 512
TOOL_TIMEOUT_S: Final = 1800.0
_DISK_BYTES_MIN: Final = 512 * MIB  # mkfs.xfs takes no less than 300 MiB
POOL_BYTES_MIN: Final = 128 * MIB


def amount(count: int) -> str:
    """So many bytes, for people."""
    return f"{count / GIB:g} GiB" if count >= GIB else f"{count / MIB:g} MiB"


def run(*command: str | Path, timeout_s: float = TOOL_TIMEOUT_S) -> str:
    """Runs a command that is not measured and answers its output; its errors go into the exception."""
    words = [str(part) for part in command]
    env = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=timeout_s, env=env)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Disk:
    """A mounted file system; `device` is its loop device, or empty if it stands in memory."""

    point: Path
    device: str = ""

    def _sectors(self, column: int) -> int:
        if not self.device:
            return 0
        return int(Path(f"/sys/block/{self.device}/stat").read_text().split()[column])

    @property
    def read_bytes(self) -> int:
        """What was read from the device so far."""
        return self._sectors(2) * SECTOR_BYTES

    @property
    def written_bytes(self) -> int:
        return self._sectors(6) * SECTOR_BYTES

    def sync(self) -> None:
        """Returns when everything on it is on its device."""
        fd = os.open(self.point, os.O_RDONLY)
        try:
            ioctl.syncfs(fd)
        finally:
            os.close(fd)


def attach(image: Path, *, direct: bool) -> str:
    """The loop device that now stands on a file."""
    return run("losetup", "--show", "--find", *(["--direct-io=on"] if direct else []), image).strip()


@contextlib.contextmanager
def disk(work: Path, name: str, kind: str, size_bytes: int, *, direct: bool = False) -> Iterator[Disk]:
    """A file system of `kind` (xfs, btrfs) in a sparse file below `work`.

    The file has no name any more once it is attached, and the device goes with its last mount, which goes with this
    process's namespace and whoever is in it: so a suite that is killed leaves neither mounts nor disks behind.
    """
    image, point = work / f"{name}.disk", work / name
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(max(size_bytes, _DISK_BYTES_MIN))
    with contextlib.ExitStack() as stack:
        stack.callback(image.unlink, missing_ok=True)
        device = attach(image, direct=direct)
        image.unlink()
        with contextlib.ExitStack() as attached:
            attached.callback(run, "losetup", "--detach", device)  # while it is mounted: once it is no more
            run(f"mkfs.{kind}", "-q", "-f", device)
            run("mount", device, point)
            # Lazily: a run that failed may hold a file open.
            stack.callback(run, "umount", "--lazy", point)
        yield Disk(point, Path(device).name)


@contextlib.contextmanager
def memory(work: Path, name: str, size_bytes: int) -> Iterator[Disk]:
    """A file system in memory."""
    point = work / name
    point.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", point)
    try:
        yield Disk(point)
    finally:
        run("umount", "--lazy", point)


def memory_available_bytes() -> int:
    """What programs can have without anything being swapped out."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith("MemAvailable"))


def noise(count: int) -> bytes:
    """Bytes that nothing can compress."""
    return os.urandom(count)


def fill(path: Path, size_bytes: int) -> None:
    """A file of bytes that nothing can compress."""
    with path.open("wb") as file:
        for at in range(0, size_bytes, MIB):
            file.write(noise(min(MIB, size_bytes - at)))
        file.flush()
        os.fsync(file.fileno())


def scattered(size_bytes: int, count: int, seed: int) -> list[int]:
    """Offsets of blocks in order, of which no two are neighbours: each is a range of its own."""
    blocks = random.Random(seed).sample(range(size_bytes // BLOCK // 2), count)
    return sorted(2 * BLOCK * block for block in blocks)


def change(path: Path, offsets: Iterable[int], seed: int) -> None:
    """New bytes in the blocks at these offsets: the same ones for the same seed, in an order that no reader follows."""
    source = random.Random(seed)
    order = list(offsets)
    source.shuffle(order)
    fd = os.open(path, os.O_RDWR)
    try:
        for offset in order:
            os.pwrite(fd, source.randbytes(BLOCK), offset)
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Images:
    """An image before and after a change of the blocks at `offsets`; neither is ever written to."""

    before: Path
    after: Path
    offsets: Sequence[int]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [(offset, BLOCK) for offset in self.offsets]

    def change(self, path: Path) -> None:
        """Makes a copy of `before` one of `after`, in an order that no reader follows."""
        order = list(self.offsets)
        random.Random(1).shuffle(order)
        with self.after.open("rb") as changed, path.open("r+b", buffering=0) as file:
            for offset in order:
                os.pwrite(file.fileno(), os.pread(changed.fileno(), BLOCK, offset), offset)
            os.fsync(file.fileno())


def differing(one: Path, other: Path, ranges: Sequence[tuple[int, int]], samples: int = 256) -> str:
    """Where two files differ, in these ranges or in a sample of all blocks; empty if nowhere."""
    with one.open("rb") as mine, other.open("rb") as theirs:
        size = os.fstat(mine.fileno()).st_size
        if size != os.fstat(theirs.fileno()).st_size:
            return f"{other} has {os.fstat(theirs.fileno()).st_size} bytes and not {size}"
        chance = random.Random(1)
        picked = [(chance.randrange(size // BLOCK) * BLOCK, BLOCK) for _ in range(samples)]
        for offset, length in [*ranges, *picked]:
            for at in range(offset, offset + length, MIB):
                count = min(MIB, offset + length - at)
                if os.pread(mine.fileno(), count, at) != os.pread(theirs.fileno(), count, at):
                    return f"{other} differs from {one} at byte {at}"
    return ""


def clone(path: Path, to: Path) -> None:
    """A file that shares the other one's blocks, and like ours holds one block for each that is written to it."""
    run("cp", "--reflink=always", path, to)
    with opened(to, os.O_RDWR) as fd:
        hint(fd)


def drop_caches() -> None:
    """Whatever is clean and not in use leaves the memory: the next reads come from the disks."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def warm(path: Path) -> None:
    """The whole file is in memory."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(MIB)
        while file.readinto(buffer):
            pass


def remove(path: Path) -> None:
    """A file or a tree; nothing if it is not there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
