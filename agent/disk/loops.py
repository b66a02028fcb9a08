"""Loop devices and mounts: what stands on a file, and what is mounted from that.

A loop device is found by the device and inode of its file, so that hard links and renames hide nothing. Mounts are
looked for in every mount namespace that a process lives in, not only in ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.disk import ioctl

_BLOCK: Final = Path("/sys/block")


@dataclass(frozen=True, slots=True)
class Loop:
    """An attached loop device."""

    device: Path
    read_only: bool


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of a mountinfo; `root` is what of the file system is mounted, `reach` a path to it from here."""

    device: str
    root: str
    point: str
    source: str
    reach: Path


def loops_on(stat: os.stat_result) -> list[Loop]:
    """The loop devices whose file is this inode. Without the right to ask a device, its file's name is looked up."""
    found = []
    for entry in sorted(_BLOCK.glob("loop*")):
        try:
            backing = (entry / "loop" / "backing_file").read_text().removesuffix("\n")
        except OSError:
            continue
        device = Path("/dev") / entry.name
        status = ioctl.loop_status(device)
        if status is not None:
            there = (status.major, status.minor, status.inode)
            if there == (os.major(stat.st_dev), os.minor(stat.st_dev), stat.st_ino):
                found.append(Loop(device, status.read_only))
        elif _is_same(Path(backing), stat):
            found.append(Loop(device, (entry / "ro").read_text().strip() == "1"))
    return found


def _is_same(path: Path, stat: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), stat)
    except OSError:
        return False


def mounts_of(loop: Loop) -> list[Mount]:
    """What is mounted from a loop device, its partitions, and what is stacked upon them; each file system once."""
    numbers, names = set(), set()
    for entry in _stacked(_BLOCK / loop.device.name):
        try:
            numbers.add((entry / "dev").read_text().strip())
        except OSError:
            continue
        names.add(f"/dev/{entry.name}")
    seen: dict[str, Mount] = {}
    for mount in all_mounts():
        if mount.device in numbers or mount.source in names:
            seen.setdefault(mount.device, mount)
    return list(seen.values())


def _stacked(entry: Path) -> Iterator[Path]:
    """A block device, its partitions, and the devices that hold any of them."""
    yield entry
    for partition in entry.glob(f"{entry.name}p*"):
        yield from _stacked(partition)
    for holder in (entry / "holders").glob("*"):
        yield from _stacked(holder.resolve())


def own_mounts() -> list[Mount]:
    """The mounts of our own namespace."""
    return _parse(Path("/proc/self/mountinfo"), Path("/"))


def all_mounts() -> Iterator[Mount]:
    """The mounts of every namespace, ours first."""
    seen = {_namespace(Path("/proc/self"))}
    yield from own_mounts()
    for process in Path("/proc").glob("[0-9]*"):
        namespace = _namespace(process)
        if namespace and namespace not in seen:
            seen.add(namespace)
            yield from _parse(process / "mountinfo", process / "root")


def _namespace(process: Path) -> str:
    try:
        return os.readlink(process / "ns" / "mnt")  # noqa: PTH115  # the target is no path
    except OSError:
        return ""


def _parse(mountinfo: Path, root: Path) -> list[Mount]:
    try:
        lines = mountinfo.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    made = []
    for line in lines:
        fields = line.split(" ")
        tail = fields[fields.index("-") + 1 :]
        point = _plain(fields[4])
        made.append(Mount(fields[2], _plain(fields[3]), point, _plain(tail[1]), root / point.lstrip("/")))
    return made


def _plain(field: str) -> str:
    """Undoes the octal escapes of a mountinfo."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field
