"""Real ZFS for tests: zfs-fuse, with a daemon for each test process and pools on sparse files in memory.

The daemon's socket has a fixed name, so each test process has it in a mount namespace of its own (`namespace.py`):
workers that run at the same time do not meet, and a daemon of the machine's is not touched. When the process is killed
the daemon goes with it, and so do the mounts and the files of the pools.

Where RESILVER_TEST_OPENZFS is set, the kernel's own OpenZFS takes its place: for a machine with nothing to lose.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loopfs import run

_PLACES = ("/run/zfs", "/run/lock/zfs", "/var/lib/zfs")
_OPTIONS = ("--no-daemon", "--no-kstat-mount", "-m", "64", "-p", "/run/zfs/pid")
POOL_BYTES = 1 << 30
_numbers = itertools.count()


def kernel() -> bool:
    """Whether the tests are served by the kernel's OpenZFS."""
    return bool(os.environ.get("RESILVER_TEST_OPENZFS"))


def unavailable() -> str:
    """Why there is no ZFS for tests on this machine; empty if there is."""
    if os.geteuid() != 0:
        return "only root can mount file systems"
    if kernel():
        return "" if Path("/sys/module/zfs").exists() else "the module zfs is not loaded"
    if not shutil.which("zfs-fuse", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        return "zfs-fuse is not installed"
    return "" if Path("/dev/fuse").exists() else "there is no /dev/fuse"


needs_zfs = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


def zfs(*arguments: str | Path) -> str:
    """Again for a while as long as it is busy: zfs-fuse notices late that a file system is not mounted any more."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return run("zfs", *arguments)
        except RuntimeError as error:
            if "is busy" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def fill(path: Path) -> None:
    """Writes into a file until there is no room for a block."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for size in (1 << 20, 64 << 10, 4096):
        with contextlib.suppress(OSError):
            while True:
                os.write(fd, os.urandom(size))
    with contextlib.suppress(OSError):
        os.close(fd)


class Zfs:
    """A running daemon; none where the kernel serves."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.daemon: subprocess.Popen[bytes] | None = None
        if kernel():
            return
        self.daemon = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "zfs-fuse", *_OPTIONS],
            stdout=subprocess.DEVNULL,
            stderr=(work / "log").open("wb"),
        )
        deadline = time.monotonic() + 30
        while subprocess.run(["zpool", "list"], capture_output=True, check=False).returncode != 0:
            assert self.daemon.poll() is None, (work / "log").read_text()
            assert time.monotonic() < deadline, "zfs-fuse does not answer"
            time.sleep(0.02)

    @contextlib.contextmanager
    def pool(self, size_bytes: int = POOL_BYTES, *options: str) -> Iterator[str]:
        """A pool of its own, with nothing mounted."""
        name = f"pool{os.getpid()}n{next(_numbers)}"  # of other workers' pools the mounts are seen too
        disk = self.work / name
        with disk.open("wb") as file:
            file.truncate(size_bytes)
        run("zpool", "create", *options, "-m", "none", name, disk)
        try:
            yield name
        finally:
            destroy_pool(name)
            disk.unlink()

    def close(self) -> None:
        if self.daemon is None:
            return
        self.daemon.terminate()
        try:
            self.daemon.wait(30)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()


def destroy_pool(name: str) -> None:
    """Whatever is mounted from it is let go of first; a test that failed may hold it for a moment."""
    deadline = time.monotonic() + 20
    while True:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split(" ")
            source = fields[fields.index("-") + 2]
            if source.partition("/")[0] == name:
                subprocess.run(["umount", "--lazy", fields[4].replace("\\040", " ")], check=False)
        done = subprocess.run(["zpool", "destroy", "-f", name], capture_output=True, text=True, check=False)
        if done.returncode == 0 or "no such pool" in done.stderr:
            return
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.1)


@contextlib.contextmanager
def running(disk: Path | None = None) -> Iterator[Zfs]:
    """The daemon, with memory for its pools, or a directory on a disk."""
    # The kernel opens the files of a pool where no test's mount namespace is seen.
    memory = Path("/dev/shm") if kernel() else None
    work = Path(tempfile.mkdtemp(prefix="zfsfs-", dir=disk or memory))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        for place in (*(() if kernel() else map(Path, _PLACES)), *(() if disk or memory else (work,))):
            place.mkdir(parents=True, exist_ok=True)
            run("mount", "-t", "tmpfs", "none", place)
            stack.callback(run, "umount", "--lazy", place)
        made = Zfs(work)
        stack.callback(made.close)
        yield made
