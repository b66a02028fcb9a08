"""Real file systems on loop devices for tests: made once for a session, unmounted and detached at its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PLAIN_XFS = "xfs-without-reflink"
KINDS = ("xfs", "btrfs", "btrfs-compressed", "ext4")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount file systems")


def run(*command: str | Path) -> str:
    """Runs a command and answers its output; its errors go into the exception."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout


def make_fs(kind: str, image: Path, size_bytes: int) -> None:
    """Makes a file system in a sparse file."""
    with image.open("wb") as file:
        file.truncate(size_bytes)
    if kind in {"xfs", PLAIN_XFS}:
        run("mkfs.xfs", "-q", "-f", "-m", f"reflink={int(kind == 'xfs')}", image)
    elif kind == "ext4":
        run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,nodiscard", image)
    else:
        run("mkfs.btrfs", "-q", "-f", image)


def _roomy() -> Path | None:
    """Memory, where there is enough: the tests sync a lot, and what they test is the file system above."""
    memory = Path("/dev/shm")  # the files get a private directory
    if memory.is_dir():
        stat = os.statvfs(memory)
        if stat.f_bavail * stat.f_frsize > 4 << 30:
            return memory
    return None


@contextlib.contextmanager
def mounted(kind: str, size_bytes: int = 1 << 30) -> Iterator[Path]:
    """A mounted file system of one of KINDS, or of PLAIN_XFS. The loop device detaches itself when it is unmounted."""
    work = Path(tempfile.mkdtemp(prefix="loopfs-", dir=_roomy()))
    image, point = work / "disk", work / "mnt"
    point.mkdir()
    try:
        make_fs(kind, image, size_bytes)
        options = "loop,compress-force=zstd" if kind == "btrfs-compressed" else "loop"
        run("mount", "-o", options, image, point)
        try:
            yield point
        finally:
            # A test that failed may hold a file open: the device goes with its last one.
            run("umount", "--lazy", point)
    finally:
        shutil.rmtree(work)


def fill(directory: Path) -> Path:
    """Takes all that is free on a file system; the file that does."""
    path = directory / "filler"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        size, at = 1 << 30, os.fstat(fd).st_size
        while size >= 4096:
            try:
                os.posix_fallocate(fd, at, size)
                at += size
            except OSError:
                size //= 2
    finally:
        os.close(fd)
    return path


def make_room(directory: Path) -> None:
    """Gives back what `fill` took; returns when it is free again, which on Btrfs is not at once."""
    filler = directory / "filler"
    if filler.exists():
        filler.unlink()
        run("sync", "--file-system", directory)


@contextlib.contextmanager
def attached(path: Path, *, read_only: bool = False) -> Iterator[Path]:
    """A loop device that stands on a file."""
    device = Path(run("losetup", "--show", "-f", *(["-r"] if read_only else []), path).strip())
    try:
        yield device
    finally:
        run("losetup", "-d", device)


@contextlib.contextmanager
def mounted_image(image: Path, point: Path) -> Iterator[Path]:
    """What is in an image, mounted; the loop device that it stands on is told."""
    point.mkdir(exist_ok=True)
    run("mount", "-o", "loop", image, point)
    try:
        yield Path(run("findmnt", "-n", "-o", "SOURCE", point).strip())
    finally:
        run("umount", point)
