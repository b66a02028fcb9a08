"""Who uses a subvolume: anybody with something of it open, mapped, or as a directory, and whatever is mounted from it.

A subvolume has a device number of its own in `stat`, so that one look at each descriptor tells. There is no lease on a
directory tree: these are looks, and somebody may come right after one. Whoever acts on one looks again afterwards.

* Processes: open files and directories, mappings, working directory, root and program, in all namespaces.
* Loop devices and active swap files on files in it.
* Mounts of it or of a directory in it, in every mount namespace, also its own path if something is mounted there. A
  mount does not write by itself: what is written through it is open.
* Exports of the kernel's NFS server that show it: of it, of a directory in it, or of one above it on the same file
  system, also through another mount of that. What is written through these is open in no process.
* Overlay mounts, in every mount namespace, that have a directory in it as a layer.

What lies on a mount whose server may be away (anything but the usual local file systems) is not looked at: a dead one
would hang us. Which mount that is, is asked of the mount's number in fdinfo, or of what a link says, and of no server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.disk import btrfs, exports, ioctl, loops, overlays, proc
from agent.disk.inuse import User

_SWAPS: Final = Path("/proc/swaps")
_OWN: Final = "/proc/thread-self"
_NEAR: Final = frozenset(
    (
        *("bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs", "fusectl", "hugetlbfs"),
        *("mqueue", "nsfs", "proc", "pstore", "ramfs", "securityfs", "sysfs", "tmpfs", "tracefs"),
        *("btrfs", "ext2", "ext3", "ext4", "f2fs", "iso9660", "overlay", "squashfs", "vfat", "xfs", "zfs"),
    )
)


@dataclass(frozen=True, slots=True)
class _Far:
    """The mounts whose server may be away, by number; and all that there are, in their order, and whether it is one."""

    ids: frozenset[str] = frozenset()
    points: tuple[tuple[str, bool], ...] = ()

    def holds(self, path: str) -> bool:
        """Whether a path is reached through one of them: of the mounts at one place, the last counts."""
        if not any(is_far and loops.is_within(path, point) for point, is_far in self.points):
            return False
        above = [(len(point), is_far) for point, is_far in self.points if loops.is_within(path, point)]
        longest = max(length for length, _is_far in above)
        return next(is_far for length, is_far in reversed(above) if length == longest)


def users_of(path: Path, *, from_above: bool = True) -> list[User]:
    """Everybody who uses the subvolume at a path, as far as this process may see; itself too.

    `from_above`: also exports of a directory above it, which show it and may be meant for what lies beside it.
    """
    stat = path.lstat()
    place = btrfs.place_of(path.parent)
    device = place[0].device if place is not None else ""
    top = f"{place[1].rstrip('/')}/{path.name}" if place is not None else ""
    found: dict[str, bool] = {}
    for user in (
        *_processes(stat.st_dev, device),
        *_loops(stat.st_dev),
        *_mounts(stat.st_dev, device, top),
        *_swaps(stat.st_dev),
        *_layers(stat.st_dev, device),
        *_exports(str(path.parent.resolve() / path.name), device, top, from_above=from_above),
    ):
        found[user.name] = found.get(user.name, False) or user.writes
    return [User(name, writes) for name, writes in sorted(found.items())]


def _processes(subvolume: int, device: str) -> Iterator[User]:
    known: dict[tuple[str, str], _Far] = {}
    for process in proc.processes():
        if proc.is_kernel(process):
            continue
        modes: list[bool] = []
        for bearer in proc.bearers(process):
            far = _far_mounts(bearer, known)
            modes += _open_modes(bearer, subvolume, far)
            modes += [False] * _stands_in(bearer, subvolume, far)
            modes += _mapped_modes(bearer, subvolume, device)
        if modes:
            yield User(f"{proc.command_of(process)} pid {process.rpartition('/')[2]}", any(modes))


def _is_on(path: str, subvolume: int) -> bool:
    try:
        return Path(path).stat().st_dev == subvolume
    except OSError:
        return False


def _far_mounts(process: str, known: dict[tuple[str, str], _Far]) -> _Far:
    """The mounts of a process whose server may be away.

    A link says a path as it is seen from here, or of another namespace one from its topmost mount; its mountinfo says
    one from the root of the process that it is asked of.
    """
    try:
        namespace, above = proc.target(process, "ns/mnt"), proc.target(process, "root")
        if namespace == proc.target(_OWN, "ns/mnt"):
            process, above = _OWN, "/"
        key = (namespace, above)
        if key not in known:
            lines = list(loops.mount_lines(Path(f"{process}/mountinfo")))
            known[key] = _Far(
                frozenset(fields[0] for fields, tail in lines if tail[0] not in _NEAR),
                tuple(
                    ((above.rstrip("/") + loops.plain(fields[4])).rstrip("/") or "/", tail[0] not in _NEAR)
                    for fields, tail in lines
                ),
            )
        return known[key]
    except OSError:
        return _Far()


def _stands_in(process: str, subvolume: int, far: _Far) -> bool:
    """Whether its working directory, root or program is in the subvolume."""
    for name in ("cwd", "root", "exe"):
        try:
            if far.ids and far.holds(proc.target(process, name)):
                continue
        except OSError:
            continue
        if _is_on(f"{process}/{name}", subvolume):
            return True
    return False


def _open_modes(process: str, subvolume: int, far: _Far) -> Iterator[bool]:
    """For each descriptor of a process on the subvolume, whether it may write."""
    for number in proc.descriptors(process):
        name = f"{process}/fd/{number}"
        try:
            # Sockets, pipes and the like, which are most, have no path.
            if not proc.target(process, f"fd/{number}").startswith("/"):
                continue
            if far.ids and proc.fields(process, number)["mnt_id"] in far.ids:
                continue
            if _is_on(name, subvolume):
                yield proc.may_write(proc.fields(process, number))
        except (OSError, ValueError, KeyError):
            continue


def _mapped_modes(process: str, subvolume: int, device: str) -> Iterator[bool]:
    """For each mapping of a file in the subvolume, whether it writes there.

    Maps show the file system's device, not the subvolume's: map_files tells, each inode being looked at once.
    """
    try:
        raw = Path(f"{process}/maps").read_bytes()
    except OSError:
        return
    major, _, minor = device.partition(":")
    mark = b"%02x:%02x" % (int(major), int(minor)) if minor else b""
    if not mark or mark not in raw:
        return
    seen: dict[tuple[bytes, bytes], bool] = {}
    for line in raw.splitlines():
        fields = line.split(None, 5)
        if len(fields) < 6 or fields[3] != mark:
            continue
        writes = fields[1][1:2] == b"w" and fields[1][3:4] == b"s"
        key = (fields[4], fields[5])
        if key not in seen:
            seen[key] = _is_on(f"{process}/map_files/{fields[0].decode()}", subvolume)
        if seen[key]:
            yield writes


def _loops(subvolume: int) -> Iterator[User]:
    for entry in sorted(Path("/sys/block").glob("loop*")):
        if (entry / "loop" / "backing_file").exists():
            status = ioctl.loop_status(Path("/dev") / entry.name)
            if status is not None and os.makedev(status.major, status.minor) == subvolume:
                yield User(f"/dev/{entry.name}", not status.read_only)


def _mounts(subvolume: int, device: str, top: str) -> Iterator[User]:
    """Mounts of the subvolume or within it; one whose place is hidden by another mount is known by its root."""
    for mount in loops.all_mounts():
        if mount.device != device:
            continue
        within = bool(top) and (mount.root == top or mount.root.startswith(f"{top}/"))
        if within or _is_on(str(mount.reach), subvolume):
            yield User(f"mount at {mount.point}", writes=False)


def _swaps(subvolume: int) -> Iterator[User]:
    try:
        lines = _SWAPS.read_text(errors="surrogateescape").splitlines()[1:]
    except OSError:
        return
    for line in lines:
        name = line.split(" ", 1)[0].split("\t", 1)[0].replace("\\040", " ")
        if _is_on(name, subvolume):
            yield User(f"swap file {name}", writes=True)


def _layers(subvolume: int, device: str) -> Iterator[User]:
    for layer in overlays.layers():
        if layer.device == device and _is_on(str(layer.reach), subvolume):
            yield User(f"overlay mount at {layer.point}", layer.writes)


def _exports(path: str, device: str, top: str, *, from_above: bool) -> Iterator[User]:
    """Exports that show the subvolume, by its path or, through any mount of the file system, by that from the top."""
    mounts = loops.own_mounts()
    for export in exports.exports():
        mount = loops.mount_above(export.path, mounts)
        shown = loops.is_within(export.path, path)
        shown = shown or (from_above and export.crosses and loops.is_within(path, export.path))
        if not shown and top and mount is not None and mount.device == device:
            there = loops.from_top(export.path, mount)
            shown = loops.is_within(there, top) or (from_above and loops.is_within(top, there))
        if shown:
            yield User(f"NFS export {export.path}", export.writes)
