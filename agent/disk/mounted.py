"""Who uses a file system that is mounted: for volumes that are whole file systems, and no file of their own.

Looked for in every mount namespace: where it is mounted, and which processes have a file or a directory of it open,
mapped, as their root or their working directory; and which loop devices stand on a file in it. Nothing is asked of the
file systems of others: a descriptor's mount is told by its fdinfo, so that a dead network mount hangs nobody.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.disk import proc
from agent.disk.loops import is_within, mount_lines, mount_namespace, plain

_HEX: Final = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) [1-9]", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Place:
    """A place where a file system is mounted: `device` as mountinfo writes it, `own` if it is in our own namespace.

    `linked`: mounts and unmounts elsewhere may reach it, so that it goes when ours does. `options` are those of this
    one place, as mountinfo writes them: "rw,nosuid,relatime".
    """

    mount_id: str
    device: str
    root: str
    point: str
    own: bool
    linked: bool
    options: str


def places(source: str) -> list[Place]:
    """Where a file system with that source is mounted, in all namespaces; ours first."""
    seen: dict[str, Place] = {}
    for place in _all(source):
        seen.setdefault(place.mount_id, place)
    return list(seen.values())


def _all(source: str) -> Iterator[Place]:
    own = mount_namespace("/proc/self")
    yield from _parse(Path("/proc/self/mountinfo"), source, own=True)
    known = {own}
    for process in proc.processes():
        for bearer in proc.bearers(process):
            namespace = mount_namespace(bearer)
            if namespace and namespace not in known:
                known.add(namespace)
                yield from _parse(Path(bearer) / "mountinfo", source, own=False)


def _parse(mountinfo: Path, source: str, *, own: bool) -> Iterator[Place]:
    for fields, tail in mount_lines(mountinfo):
        if plain(tail[1]) == source:
            linked = any(field.startswith(("shared:", "master:")) for field in fields[6:])
            yield Place(fields[0], fields[2], plain(fields[3]), plain(fields[4]), own, linked, fields[5])


def users(where: Iterable[Place]) -> tuple[str, ...]:
    """The processes and loop devices that use a file system mounted there, by name."""
    found = list(where)
    if not found:
        return ()
    own = mount_namespace("/proc/self")
    processes = [
        process for process in proc.processes() if any(_uses(bearer, found, own) for bearer in proc.bearers(process))
    ]
    return (
        *sorted(f"{proc.command_of(process)} pid {process.rpartition('/')[2]}" for process in processes),
        *_loops(found),
    )


def _uses(process: str, where: list[Place], own: str) -> bool:
    """In our own namespace a descriptor's link says its path, which is quicker to ask for than its mount."""
    has_open = _has_open_below if mount_namespace(process) == own else _has_open_on
    return _stands_in(process, where) or has_open(process, where) or _has_mapped(process, where)


def _below(path: str, where: list[Place]) -> bool:
    return any(is_within(path, place.point) for place in where)


def _stands_in(process: str, where: list[Place]) -> bool:
    """Working directory, root or program. The link says the path, or that it cannot be reached from here."""
    for name in ("cwd", "root", "exe"):
        try:
            at = proc.target(process, name)
        except OSError:
            continue
        if _below(at, where):
            return True
    return False


def _has_open_below(process: str, where: list[Place]) -> bool:
    for number in proc.descriptors(process):
        try:
            if _below(proc.target(process, f"fd/{number}"), where):
                return True
        except OSError:
            continue
    return False


def _has_open_on(process: str, where: list[Place]) -> bool:
    ids = {place.mount_id for place in where}
    for number in proc.descriptors(process):
        try:
            if proc.fields(process, number).get("mnt_id") in ids:
                return True
        except (OSError, ValueError):
            continue
    return False


def _has_mapped(process: str, where: list[Place]) -> bool:
    devices = {tuple(map(int, place.device.split(":"))) for place in where}
    try:
        raw = Path(f"{process}/maps").read_bytes()
    except OSError:
        return False
    return any((int(major, 16), int(minor, 16)) in devices for major, minor in set(_HEX.findall(raw)))


def _loops(where: list[Place]) -> Iterator[str]:
    for entry in sorted(Path("/sys/block").glob("loop*")):
        try:
            backing = (entry / "loop" / "backing_file").read_text(errors="surrogateescape").removesuffix("\n")
        except OSError:
            continue
        if _below(backing, where):
            yield f"/dev/{entry.name}"
