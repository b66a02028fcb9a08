"""The others, each as its own manual has it for this job. Whoever is not installed says so, and is shown so.

`source` is the file as it is to become, `base` the target's file before; each run begins with a fresh clone of that.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.suite.data import Disk, Images, clone, remove, run
from bench.suite.measure import DIES_WITH_US, NOT_COUNTED, Used, tool
from tests.zfsfs import running, unavailable

PORT_TIMEOUT_S: Final = 20.0
_PATHS: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def found(*commands: str) -> str:
    """Which of the commands are not installed, as a sentence; empty if all are."""
    absent = [command for command in commands if shutil.which(command, path=_PATHS) is None]
    return f"{', '.join(absent)}: not installed" if absent else ""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port


def told_bytes(*words: str) -> int:
    """How much a command writes."""
    total = 0
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as telling:
        assert telling.stdout is not None
        while part := telling.stdout.read(1 << 20):
            total += len(part)
    return total


class Daemon:
    """A server that is started before the clock and stopped after it."""

    def __init__(self, port: int, *words: str | Path) -> None:
        self.process = subprocess.Popen(
            [*DIES_WITH_US, *(str(word) for word in words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        end = time.monotonic() + PORT_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            if self.process.poll() is not None or time.monotonic() > end:
                said = b"" if self.process.stderr is None else self.process.stderr.read()
                raise RuntimeError(f"{words[0]} does not listen: {said.decode(errors='replace')}")
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


class FileTool:
    """What brings one file over, from `source` to `target`; `base` None: to nothing."""

    name: str
    how: str
    commands: tuple[str, ...]

    def __init__(self, source: Path, base: Path | None, target: Path) -> None:
        self.source, self.base, self.target = source, base, target
        self.daemon: Daemon | None = None

    def missing(self) -> str:
        return found(*self.commands)

    def before(self) -> None:
        remove(self.target)
        if self.base is not None:
            clone(self.base, self.target)

    def run(self) -> Used:
        raise NotImplementedError

    def result(self) -> Path:
        return self.target

    def after(self) -> None:
        if self.daemon is not None:
            self.daemon.stop()
            self.daemon = None
        remove(self.target)

    @property
    def daemons(self) -> tuple[int, ...]:
        return (self.daemon.pid,) if self.daemon is not None else ()


class RsyncLocal(FileTool):
    name = "rsync, locally"
    how = "`rsync --inplace --no-whole-file --ignore-times`, from file to file; wire bytes by its own `--stats`"
    commands = ("rsync",)

    def run(self) -> Used:
        told = self.target.with_name("rsync.stats")
        words = ["rsync", "--inplace", "--no-whole-file", "--ignore-times", "--stats", f"--log-file={told}"]
        used = tool([*words, self.source, self.target])
        used.wire_bytes = self._wire(told)
        return used

    def _wire(self, told: Path) -> int:
        """From the log: `sent N bytes  received N bytes  total size N`."""
        lines = [line for line in told.read_text().splitlines() if "] sent " in line]
        told.unlink()
        words = lines[-1].partition("] sent ")[2].replace(",", "").split()
        return int(words[0]) + int(words[3])


class RsyncDaemon(FileTool):
    name = "rsync, over its daemon"
    how = "`rsync --inplace --no-whole-file --ignore-times` from `rsync --daemon` on loopback"
    commands = ("rsync",)
    options: tuple[str, ...] = ("--inplace", "--no-whole-file", "--ignore-times")

    def before(self) -> None:
        super().before()
        config = self.target.with_name("rsyncd.conf")
        config.write_text(
            f"use chroot = no\nuid = 0\ngid = 0\nlog file = /dev/null\n[src]\npath = {self.source.parent}\n"
        )
        self.port = free_port()
        self.daemon = Daemon(
            self.port,
            *("rsync", "--daemon", "--no-detach", f"--config={config}", f"--port={self.port}", "--address=127.0.0.1"),
        )

    def run(self) -> Used:
        url = f"rsync://127.0.0.1:{self.port}/src/{self.source.name}"
        return tool(["rsync", *self.options, url, self.target], daemons=self.daemons)


class RsyncWhole(RsyncDaemon):
    how = "`rsync --whole-file --inplace` from `rsync --daemon` on loopback"
    options = ("--whole-file", "--inplace", "--ignore-times")


class Casync(FileTool):
    name = "casync"
    how = "`casync make` into a store, `casync extract` from it with the base as seed; its wire is not counted"
    commands = ("casync",)

    def run(self) -> Used:
        index, store = self.target.with_suffix(".caibx"), self.target.with_suffix(".castr")
        seed = [f"--seed={self.base}"] if self.base is not None else []
        made = tool(["casync", "make", f"--store={store}", index, self.source])
        remove(self.target)  # it wants to make its target itself
        taken = tool(["casync", "extract", f"--store={store}", *seed, index, self.target])
        return Used(made.cpu_s + taken.cpu_s, max(made.peak_bytes, taken.peak_bytes), wire_bytes=NOT_COUNTED)

    def after(self) -> None:
        super().after()
        for suffix in (".caibx", ".castr"):
            remove(self.target.with_suffix(suffix))


class Bdsync(FileTool):
    name = "bdsync"
    how = "`bdsync 'bdsync --server' target source`, then `bdsync --patch`; wire bytes are the patch's"
    commands = ("bdsync",)

    def run(self) -> Used:
        patch = self.target.with_suffix(".bdsync")
        made = tool(
            ["sh", "-c", 'bdsync "bdsync --server" "$1" "$2" >"$3"', "sh", str(self.source), str(self.target), patch]
        )
        applied = tool(["sh", "-c", 'bdsync --patch="$1" <"$2"', "sh", str(self.target), patch])
        wire = patch.stat().st_size
        patch.unlink()
        return Used(made.cpu_s + applied.cpu_s, max(made.peak_bytes, applied.peak_bytes), wire_bytes=wire)


class Copy(FileTool):
    name = "cp"
    how = "`cp --sparse=never`, from file to file; no wire"
    commands = ("cp",)

    def run(self) -> Used:
        used = tool(["cp", "--sparse=never", "--reflink=never", self.source, self.target])
        used.wire_bytes = NOT_COUNTED
        return used


class NbdTool(FileTool):
    """What reads from `nbdkit file` on loopback."""

    def before(self) -> None:
        super().before()
        self.port = free_port()
        words = ("nbdkit", "--foreground", "--readonly", f"--port={self.port}", "--ipaddr=127.0.0.1")
        self.daemon = Daemon(self.port, *words, "file", self.source)

    @property
    def url(self) -> str:
        return f"nbd://127.0.0.1:{self.port}"


class Nbdcopy(NbdTool):
    name = "nbdcopy"
    how = "`nbdcopy --flush` from `nbdkit file` on loopback"
    commands = ("nbdcopy", "nbdkit")

    def run(self) -> Used:
        self.target.touch()
        return tool(["nbdcopy", "--flush", self.url, self.target], daemons=self.daemons)


class QemuImg(NbdTool):
    name = "qemu-img convert"
    how = "`qemu-img convert -O raw -W -m 8` from `nbdkit file` on loopback"
    commands = ("qemu-img", "nbdkit")

    def run(self) -> Used:
        words = ["qemu-img", "convert", "-f", "raw", "-O", "raw", "-W", "-m", "8"]
        return tool([*words, self.url, self.target], daemons=self.daemons)


class BtrfsSend:
    """The same image and change, in subvolumes of two file systems of its own."""

    name = "btrfs send and receive"
    how = "`btrfs send -p | btrfs receive`, the same change in Btrfs subvolumes; wire bytes are the stream's"

    def __init__(self, source: Disk, target: Disk) -> None:
        self.source, self.target = source, target
        self._wire_bytes = -1

    def missing(self) -> str:
        return found("btrfs", "mkfs.btrfs")

    def before(self) -> None:
        if self._wire_bytes < 0:  # measured once, outside of all runs: the stream is the same each time
            self._wire_bytes = told_bytes(*self._send)

    @property
    def _send(self) -> list[str]:
        base, goal = self.source.point / "base", self.source.point / "goal"
        return ["btrfs", "-q", "send", "-p", str(base), str(goal)]

    def run(self) -> Used:
        used = tool(self._send, ["btrfs", "-q", "receive", str(self.target.point)])
        used.wire_bytes = self._wire_bytes
        return used

    def result(self) -> Path:
        return self.target.point / "goal" / "image"

    def after(self) -> None:
        if self.result().exists():
            run("btrfs", "-q", "subvolume", "delete", "--commit-after", self.target.point / "goal")
            run("btrfs", "subvolume", "sync", self.target.point)


class ZfsSend:
    """The same image and change, in datasets of two pools of zfs-fuse: for interest, the kernel's is faster."""

    name = "zfs-fuse send and receive"
    how = "`zfs send -i | zfs receive` with zfs-fuse, the same change in datasets; wire bytes are the stream's"

    def __init__(self, source: str, target: str) -> None:
        self.source, self.target = source, target
        self._wire_bytes = -1

    def missing(self) -> str:
        return found("zfs-fuse") if self.source else "zfs-fuse: not installed"

    def before(self) -> None:
        if self._wire_bytes < 0:
            self._wire_bytes = told_bytes(*self._send)

    @property
    def _send(self) -> list[str]:
        return ["zfs", "send", "-i", f"{self.source}@base", f"{self.source}@goal"]

    def run(self) -> Used:
        used = tool(self._send, ["zfs", "receive", "-F", self.target])
        used.wire_bytes = self._wire_bytes
        used.read_bytes = NOT_COUNTED  # the pools' files are not on a loop device of ours
        return used

    def result(self) -> None:
        return None

    def after(self) -> None:
        run("zfs", "rollback", "-r", f"{self.target}@base")


@contextlib.contextmanager
def subvolumes(source: Disk, target: Disk, images: Images) -> Iterator[BtrfsSend]:
    """The image as it was and as it is to become, as read-only subvolumes; the target has the first."""
    made = BtrfsSend(source, target)
    if not made.missing():
        live = source.point / "live"
        run("btrfs", "-q", "subvolume", "create", live)
        run("cp", images.before, live / "image")
        run("btrfs", "-q", "subvolume", "snapshot", "-r", live, source.point / "base")
        images.change(live / "image")
        run("btrfs", "-q", "subvolume", "snapshot", "-r", live, source.point / "goal")
        tool(["btrfs", "-q", "send", source.point / "base"], ["btrfs", "-q", "receive", target.point])
        target.sync()
    yield made


@contextlib.contextmanager
def datasets(work: Path, images: Images, pool_bytes: int) -> Iterator[ZfsSend]:
    """The image as it was and as it is to become, as snapshots in one pool; another has the first."""
    if unavailable():
        yield ZfsSend("", "")
        return
    with running(work) as zfs, zfs.pool(pool_bytes) as one, zfs.pool(pool_bytes) as other:
        source, target = f"{one}/volume", f"{other}/volume"
        point = zfs.work / "volume"
        run("zfs", "create", "-o", f"mountpoint={point}", source)
        run("cp", images.before, point / "image")
        run("zfs", "snapshot", f"{source}@base")
        images.change(point / "image")
        run("zfs", "snapshot", f"{source}@goal")
        tool(["zfs", "send", f"{source}@base"], ["zfs", "receive", "-u", target])
        run("zfs", "set", "readonly=on", target)
        yield ZfsSend(source, target)
