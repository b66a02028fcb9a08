"""Loop devices and mounts: what stands on a file or a block device, and what is mounted from that.

A loop device is found by the device and inode of its file, so that hard links and renames hide nothing. Mounts are
looked for in every mount namespace that a process lives in, not only in ours.
"""

from __future__ import annotations

import os
import re
import select
import stat as modes
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.disk import ioctl, proc

_BLOCK: Final = Path("/sys/block")
_FIELDS_BEFORE: Final = 6
_FIELDS_BEHIND: Final = 2
_ESCAPED: Final = re.compile(r"\\(?!000)([0-3][0-7]{2})")
_EVERY_BLOCK: Final = Path("/sys/class/block")  # partitions too


@dataclass(frozen=True, slots=True)
class Device:
    """A block device that something may be mounted from."""

    path: Path
    read_only: bool


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of a mountinfo; `root` is what of the file system is mounted, `reach` a path to it from here.

    `layers` are the options of an overlay, escaped as they stand there; empty for any other file system.
    """

    device: str
    root: str
    point: str
    source: str
    reach: Path
    layers: str = ""


def devices_on(stat: os.stat_result) -> list[Device]:
    """What a file or a block device can be mounted by: the loop devices that stand on it, or the device itself."""
    if not modes.S_ISBLK(stat.st_mode):
        return loops_on(stat)
    entry = Path(f"/sys/dev/block/{os.major(stat.st_rdev)}:{os.minor(stat.st_rdev)}").resolve()
    try:
        return [Device(Path("/dev") / entry.name, (entry / "ro").read_text().strip() == "1")]
    except OSError:
        return []


def loops_on(stat: os.stat_result) -> list[Device]:
    """The loop devices whose file is this inode. Without the right to ask a device, its file's name is looked up."""
    found = []
    for entry in sorted(_BLOCK.glob("loop*")):
        try:
            backing = (entry / "loop" / "backing_file").read_text(errors="surrogateescape").removesuffix("\n")
        except OSError:
            continue
        device = Path("/dev") / entry.name
        status = ioctl.loop_status(device)
        if status is not None:
            there = (status.major, status.minor, status.inode)
            if there == (os.major(stat.st_dev), os.minor(stat.st_dev), stat.st_ino):
                found.append(Device(device, status.read_only))
        elif _is_same(Path(backing), stat):
            found.append(Device(device, (entry / "ro").read_text().strip() == "1"))
    return found


def _is_same(path: Path, stat: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), stat)
    except OSError:
        return False


def mounts_of(device: Device) -> list[Mount]:
    """What is mounted from a device, its partitions, and what is stacked upon them; each file system once."""
    numbers = set()
    for entry in _stacked(_EVERY_BLOCK / device.path.name):
        try:
            numbers.add((entry / "dev").read_text().strip())
        except OSError:
            continue
    seen: dict[str, Mount] = {}
    for mount in all_mounts():
        if mount.device in numbers or _number_of(mount) in numbers:
            seen.setdefault(mount.device, mount)
    return list(seen.values())


def mount_upon(stat: os.stat_result) -> Mount | None:
    """The mount of a device of the device mapper itself, such as an LV; None of others, and of what stands upon it."""
    number = f"{os.major(stat.st_rdev)}:{os.minor(stat.st_rdev)}"
    if not modes.S_ISBLK(stat.st_mode) or not Path(f"/sys/dev/block/{number}/dm").is_dir():
        return None
    found = (mount for device in devices_on(stat) for mount in mounts_of(device))
    return next((mount for mount in found if number in {mount.device, _number_of(mount)}), None)


def _number_of(mount: Mount) -> str:
    """The device that a mount names as its source, where its own number tells nothing (Btrfs); empty if it has none."""
    if not (mount.device.startswith("0:") and mount.source.startswith("/dev/")):
        return ""
    try:
        number = Path(mount.source).stat().st_rdev
    except OSError:
        return ""
    return f"{os.major(number)}:{os.minor(number)}"


def _stacked(entry: Path) -> Iterator[Path]:
    """A block device, its partitions, and the devices that hold any of them."""
    yield entry
    for partition in entry.glob("*/partition"):
        yield from _stacked(partition.parent)
    for holder in (entry / "holders").glob("*"):
        yield from _stacked(holder.resolve())


class _OwnMounts:
    """The mounts of our own namespace, read again when the kernel says that they have changed: it is asked of each
    volume every few seconds, and a machine may have hundreds.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._where: tuple[int, int] = (0, 0)
        self._fd = -1
        self._mounts: list[Mount] = []
        self.read_count = 0

    def get(self) -> list[Mount]:
        with self._mutex:
            try:
                # A child after a fork shares the descriptor, and what one of both is told the other one is not.
                where = (os.getpid(), os.stat("/proc/thread-self/ns/mnt").st_ino)  # noqa: PTH116 - asked very often
                changed = where != self._where or self._told()
            except OSError:
                return _parse(Path("/proc/self/mountinfo"), Path("/"))
            if changed:
                self._read(where)
            return self._mounts

    def _told(self) -> bool:
        asked = select.poll()
        asked.register(self._fd, select.POLLPRI)
        return bool(asked.poll(0))

    def _read(self, where: tuple[int, int]) -> None:
        fd = os.open("/proc/thread-self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        old, self._fd, self._where = self._fd, fd, (0, 0)
        if old >= 0:
            os.close(old)
        self._mounts = _parse(Path("/proc/thread-self/mountinfo"), Path("/"))
        self._where = where
        self.read_count += 1


_own_mounts: Final = _OwnMounts()


def own_mounts() -> list[Mount]:
    """The mounts of our own namespace."""
    return list(_own_mounts.get())


def mounts_read() -> int:
    """How often our own mounts had to be read so far: another number, and they may have changed."""
    _own_mounts.get()
    return _own_mounts.read_count


def mount_above(name: str, mounts: list[Mount]) -> Mount | None:
    """The mount that a path without symbolic links is reached through: of those at one place, the last."""
    best: Mount | None = None
    for mount in mounts:
        if is_within(name, mount.point) and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def from_top(name: str, mount: Mount) -> str:
    """A path that is reached through a mount, from the top of its file system."""
    return (mount.root.rstrip("/") + name[len(mount.point.rstrip("/")) :]) or "/"


def is_within(path: str, directory: str) -> bool:
    """Whether a path is a directory's own or below it."""
    return path == directory or path.startswith(f"{directory.rstrip('/')}/")


def all_mounts() -> Iterator[Mount]:
    """The mounts of every namespace, ours first."""
    for _root, mounts in mounts_by_namespace():
        yield from mounts


def mounts_by_namespace() -> Iterator[tuple[Path, list[Mount]]]:
    """The mounts of every namespace, ours first, each with a path to the root of a process that lives in it."""
    seen = {mount_namespace("/proc/self")}
    yield Path("/"), own_mounts()
    for process in proc.processes():
        for bearer in map(Path, proc.bearers(process)):
            namespace = mount_namespace(bearer)
            if namespace and namespace not in seen:
                seen.add(namespace)
                yield bearer / "root", _parse(bearer / "mountinfo", bearer / "root")


def mount_namespace(process: proc.Process) -> str:
    """What tells a process' mount namespace from others; empty if it has ended or may not be looked at."""
    try:
        return proc.target(process, "ns/mnt")
    except OSError:
        return ""


def _parse(mountinfo: Path, root: Path) -> list[Mount]:
    made = []
    for fields, tail in mount_lines(mountinfo):
        point = plain(fields[4])
        layers = tail[2] if tail[0] == "overlay" and len(tail) > _FIELDS_BEHIND else ""
        made.append(Mount(fields[2], plain(fields[3]), point, plain(tail[1]), root / point.lstrip("/"), layers))
    return made


def mount_lines(mountinfo: Path) -> Iterator[tuple[list[str], list[str]]]:
    """The fields of each line, before and behind the dash; none if it cannot be read.

    Whoever may mount in a namespace of his own chooses what stands there: only a new line ends a line, whatever else
    Python takes for one, and a line that is none of a mountinfo is passed over.
    """
    try:
        raw = mountinfo.read_bytes()
    except OSError:
        return
    for line in raw.split(b"\n"):
        before, dash, behind = os.fsdecode(line).partition(" - ")
        fields, tail = before.split(" "), behind.split(" ")
        if dash and len(fields) >= _FIELDS_BEFORE and len(tail) >= _FIELDS_BEHIND:
            yield fields, tail


def plain(field: str) -> str:
    """Undoes the octal escapes of a mountinfo, and of a list of swap space."""
    return _ESCAPED.sub(lambda found: os.fsdecode(bytes([int(found[1], 8)])), field)
