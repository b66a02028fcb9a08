"""Btrfs subvolumes through the kernel's own calls: what one is, making, removing and finding them; no policy.

* A subvolume's root is an inode 256. Inodes repeat in every subvolume, so that a tree id (`Info.tree`) is what an inode
  is elsewhere: never used twice in the life of a file system.
* `ctransid` is the transaction in which anything in the subvolume was last changed, `otransid` the one in which it came
  to be, `rtransid` the one in which receiving it ended. Dirty pages do not count before they are synced.
* Nothing here follows a symbolic link in the last part of a path, and removing takes one subvolume, never what is in
  another one within it.

Finding subvolumes by their parents reads the tree of roots, which only root may.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.disk import ioctl, loops

SUBVOLUME_INODE: Final = 256
TOP_TREE: Final = 5

_SNAP_CREATE_V2: Final = 0x50009417
_SUBVOL_CREATE_V2: Final = 0x50009418
_SNAP_DESTROY: Final = 0x5000940F
_GETFLAGS: Final = 0x80089419
_SETFLAGS: Final = 0x4008941A
_GET_SUBVOL_INFO: Final = 0x81F8943C
_INO_LOOKUP: Final = 0xD0009412
_SYNC: Final = 0x9408

_RDONLY: Final = 1 << 1
_ROOT_TREE: Final = 1
_ROOT_ITEM: Final = 132
_ROOT_BACKREF: Final = 144
_INFO: Final = struct.Struct("<Q256s4Q16s16s16s4QQI4xQI4xQI4xQI4x64x")
_V2: Final = struct.Struct("<qQQ32s4040s")
_V1: Final = struct.Struct("<q4088s")
_LOOKUP: Final = struct.Struct("<QQ4080s")
_ITEM_HEADER: Final = struct.Struct("<QQQII")
_ROOT_TIMES: Final = struct.Struct("<Q16s16s16s4Q12sQI12sQI")  # of a root item, from generation_v2 on
_ROOT_TIMES_AT: Final = 239
_ROOT_FLAGS_AT: Final = 208
_BACKREF: Final = struct.Struct("<QQH")
_ALL: Final = (1 << 64) - 1
_INODE_ITEM: Final = 1
_CTIME: Final = struct.Struct("<QI")
_CTIME_AT: Final = 124
_SEARCH_BYTES: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Info:
    """What a subvolume is. Since `since_ns` (Unix time) nobody should have changed it: received, or made, by then."""

    tree: int
    parent_tree: int
    uuid: str
    parent_uuid: str
    received_uuid: str
    ctransid: int
    otransid: int
    stransid: int
    rtransid: int
    otime_ms: int
    since_ns: int
    read_only: bool

    @property
    def native_id(self) -> str:
        """What a send stream calls it: the same on every file system that has it."""
        return self.received_uuid or self.uuid

    @property
    def untouched(self) -> bool:
        """Whether nothing in it was changed since it came to be: received, or taken."""
        return self.ctransid <= (self.rtransid if self.received_uuid else self.otransid)


def _call(fd: int, request: int, argument: bytes) -> bytearray:
    """An ioctl with an argument of any length; what it has become."""
    buffer = bytearray(argument)
    fcntl.ioctl(fd, request, buffer, True)
    return buffer


def uuid_text(raw: bytes) -> str:
    """A UUID as it is written, empty if it is all zeros or not there."""
    return str(uuid.UUID(bytes=raw)) if any(raw) else ""


def open_dir(path: Path) -> int:
    """A descriptor of a directory, not through a symbolic link."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


@contextlib.contextmanager
def opened_dir(path: Path) -> Iterator[int]:
    fd = open_dir(path)
    try:
        yield fd
    finally:
        os.close(fd)


def is_btrfs(path: Path) -> bool:
    """Whether a path that is there lies on Btrfs."""
    return ioctl.fs_magic(path) == ioctl.BTRFS_MAGIC


def is_subvolume(path: Path) -> bool:
    """Whether a path is the root of a subvolume; False for anything else, and where nothing is."""
    try:
        stat = path.lstat()
        return stat.st_ino == SUBVOLUME_INODE and path.is_dir() and not path.is_symlink() and is_btrfs(path)
    except (FileNotFoundError, NotADirectoryError):
        return False


def info(path: Path) -> Info:
    """What the subvolume at a path is. OSError if there is none."""
    with opened_dir(path) as fd:
        return info_of(fd)


def info_of(fd: int) -> Info:
    if os.fstat(fd).st_ino != SUBVOLUME_INODE:
        raise OSError(errno.EINVAL, "no subvolume")
    raw = _call(fd, _GET_SUBVOL_INFO, bytes(_INFO.size))
    (tree, _name, parent_tree, _dir, _generation, flags, own, parent, received, ctransid, otransid, stransid, rtransid,
     _cs, _cn, otime_s, otime_ns, _ss, _sn, rtime_s, rtime_ns) = _INFO.unpack(raw)  # fmt: skip
    return Info(
        tree=tree,
        parent_tree=parent_tree,
        uuid=uuid_text(own),
        parent_uuid=uuid_text(parent),
        received_uuid=uuid_text(received),
        ctransid=ctransid,
        otransid=otransid,
        stransid=stransid,
        rtransid=rtransid,
        otime_ms=otime_s * 1000 + otime_ns // 1_000_000,
        since_ns=_nanoseconds(rtime_s, rtime_ns) if any(received) else _nanoseconds(otime_s, otime_ns),
        read_only=bool(flags & 1),
    )


def _nanoseconds(seconds: int, rest: int) -> int:
    return seconds * 1_000_000_000 + rest


def tree_of(path: Path) -> int:
    """The tree that a path lies in."""
    with opened_dir(path) as fd:
        tree: int = _LOOKUP.unpack(_call(fd, _INO_LOOKUP, _LOOKUP.pack(0, SUBVOLUME_INODE, b"")))[0]
        return tree


def create(path: Path) -> None:
    """Makes an empty subvolume of a name that must not exist."""
    with opened_dir(path.parent) as parent:
        _call(parent, _SUBVOL_CREATE_V2, _V2.pack(0, 0, 0, b"", os.fsencode(path.name)))


def snapshot(source: Path, path: Path, *, read_only: bool) -> None:
    """Makes a snapshot of a subvolume, of a name that must not exist; on the disk when this returns."""
    with opened_dir(source) as source_fd, opened_dir(path.parent) as parent:
        flags = _RDONLY if read_only else 0
        _call(parent, _SNAP_CREATE_V2, _V2.pack(source_fd, 0, flags, b"", os.fsencode(path.name)))


def destroy(path: Path) -> None:
    """Removes one subvolume and all its files, read-only or not. ENOTEMPTY if it holds another subvolume."""
    with opened_dir(path.parent) as parent:
        _call(parent, _SNAP_DESTROY, _V1.pack(0, os.fsencode(path.name)))


def set_read_only(path: Path, *, read_only: bool) -> None:
    with opened_dir(path) as fd:
        flags = struct.unpack("<Q", fcntl.ioctl(fd, _GETFLAGS, bytes(8)))[0]
        wanted = flags | _RDONLY if read_only else flags & ~_RDONLY
        if wanted != flags:
            fcntl.ioctl(fd, _SETFLAGS, struct.pack("<Q", wanted))


def sync(path: Path) -> None:
    """Returns when all that was written and made on the file system of a directory is on its device."""
    with opened_dir(path) as fd:
        ioctl.syncfs(fd)
        fcntl.ioctl(fd, _SYNC)


@dataclass(frozen=True, slots=True)
class Found:
    """A subvolume of a file system and its path from the topmost one, empty if that cannot be told."""

    info: Info
    path: str


def subvolumes(path: Path) -> list[Found]:
    """All subvolumes of the file system that a directory lies on, but the topmost; those being removed left out."""
    with opened_dir(path) as fd:
        infos = {tree: made for tree, made in _root_items(fd) if made is not None}
        names = dict(_backrefs(fd))
        paths: dict[int, str | None] = {TOP_TREE: ""}
        return [Found(made, _path(fd, tree, names, paths) or "") for tree, made in sorted(infos.items())]


def _path(fd: int, tree: int, names: dict[int, tuple[int, int, str]], paths: dict[int, str | None]) -> str | None:
    """Of a subvolume from the topmost one. Chains are short: their length is bounded by the file system's depth."""
    if tree not in paths:
        paths[tree] = None  # a circle cannot be, and would end here
        if tree in names:
            parent, directory, name = names[tree]
            above = _path(fd, parent, names, paths)
            try:
                raw = _call(fd, _INO_LOOKUP, _LOOKUP.pack(parent, directory, b""))
            except OSError:
                return None
            within = os.fsdecode(_LOOKUP.unpack(raw)[2].split(b"\0", 1)[0])
            paths[tree] = f"{above}/{within}{name}" if above is not None else None
    return paths[tree]


def _root_items(fd: int) -> Iterator[tuple[int, Info | None]]:
    parents = {tree: parent for tree, (parent, _dir, _name) in _backrefs(fd)}
    for tree, _offset, body in _search(fd, _ROOT_ITEM):
        if tree < SUBVOLUME_INODE or tree not in parents or len(body) < _ROOT_TIMES_AT + _ROOT_TIMES.size:
            continue
        flags = struct.unpack_from("<Q", body, _ROOT_FLAGS_AT)[0]
        times = _ROOT_TIMES.unpack_from(body, _ROOT_TIMES_AT)
        (_generation, own, parent, received, ctransid, otransid, stransid, rtransid,
         _ctime, otime_s, otime_ns, _stime, rtime_s, rtime_ns) = times  # fmt: skip
        yield (
            tree,
            Info(
                tree=tree,
                parent_tree=parents[tree],
                uuid=uuid_text(own),
                parent_uuid=uuid_text(parent),
                received_uuid=uuid_text(received),
                ctransid=ctransid,
                otransid=otransid,
                stransid=stransid,
                rtransid=rtransid,
                otime_ms=otime_s * 1000 + otime_ns // 1_000_000,
                since_ns=_nanoseconds(rtime_s, rtime_ns) if any(received) else _nanoseconds(otime_s, otime_ns),
                read_only=bool(flags & 1),
            ),
        )


def _backrefs(fd: int) -> Iterator[tuple[int, tuple[int, int, str]]]:
    """Of each subvolume: the tree that holds it, the directory in that, and its name there."""
    for tree, parent, body in _search(fd, _ROOT_BACKREF):
        directory, _sequence, length = _BACKREF.unpack_from(body)
        yield tree, (parent, directory, os.fsdecode(body[_BACKREF.size : _BACKREF.size + length]))


def _search(fd: int, kind: int) -> Iterator[tuple[int, int, bytes]]:
    """The items of one type in the tree of roots: (object, offset, body)."""
    for item, item_kind, offset, body in _items(fd, _ROOT_TREE, 0, kind, kind):
        if item_kind == kind:
            yield item, offset, body


def changed_inodes(fd: int, transid: int) -> Iterator[int]:
    """The ctime, in nanoseconds, of each inode of a subvolume that lies in a leaf newer than a transaction.

    More than what was changed, never less; the rest of the tree is not read.
    """
    for _inode, kind, _offset, body in _items(fd, 0, transid + 1, 0, 255):
        if kind == _INODE_ITEM and len(body) >= _CTIME_AT + _CTIME.size:
            seconds, nanoseconds = _CTIME.unpack_from(body, _CTIME_AT)
            yield _nanoseconds(seconds, nanoseconds)


def _items(fd: int, tree: int, transid: int, low: int, high: int) -> Iterator[tuple[int, int, int, bytes]]:
    """Items of a tree in leaves at least as new as a transaction: (object, type, offset, body).

    All of them from the first of type `low` to the last of `high`: keys are an order, and types in between come along.
    """
    at = (0, low, 0)
    while True:
        key = struct.pack("<7Q4I4Q", tree, at[0], _ALL, at[2], _ALL, transid, _ALL,
                          at[1], high, (1 << 32) - 1, 0, 0, 0, 0, 0)  # fmt: skip
        buffer = bytearray(len(key) + 8 + _SEARCH_BYTES)
        buffer[: len(key)] = key
        struct.pack_into("<Q", buffer, len(key), _SEARCH_BYTES)
        fcntl.ioctl(fd, ioctl.BTRFS_TREE_SEARCH_V2, buffer, True)
        found, place = struct.unpack_from("<I", buffer, 64)[0], len(key) + 8
        if not found:
            return
        for _ in range(found):
            _transid, item, offset, kind, length = _ITEM_HEADER.unpack_from(buffer, place)
            place += _ITEM_HEADER.size
            yield item, kind, offset, bytes(buffer[place : place + length])
            place += length
            at = (item, kind, offset)
        if at[2] < _ALL:
            at = (at[0], at[1], at[2] + 1)
        elif at[1] < 255:
            at = (at[0], at[1] + 1, 0)
        else:
            at = (at[0] + 1, 0, 0)


def nested(path: Path) -> list[Found]:
    """The subvolumes that lie within the one at a path, at any depth."""
    tree = info(path).tree
    every = subvolumes(path)
    held = {tree}
    while True:
        more = {one.info.tree for one in every if one.info.parent_tree in held} - held
        if not more:
            return [one for one in every if one.info.tree in held and one.info.tree != tree]
        held |= more


def place_of(path: Path) -> tuple[loops.Mount, str] | None:
    """The mount that a directory is reached through, and its path from the topmost subvolume."""
    real = str(path.resolve())
    mount = loops.mount_above(real, loops.own_mounts())
    return None if mount is None else (mount, loops.from_top(real, mount))


def mounts_of(path: Path) -> list[loops.Mount]:
    """Our mounts of the file system that a directory lies on; the one that it is reached through first.

    `btrfs send` and `btrfs receive` want both ends of a delta under one mount.
    """
    place = place_of(path)
    if place is None:
        return []
    return [place[0], *(mount for mount in loops.own_mounts() if mount.device == place[0].device and mount != place[0])]


def reach(found: Found, mounts: list[loops.Mount]) -> Path | None:
    """A path to a subvolume through the first of the mounts that shows it, if it is that subvolume.

    A mount does not show what lies below another mount upon it: that one may.
    Tree numbers and paths are the same on two file systems of two replicas: the uuid is not.
    """
    every = loops.own_mounts()
    for mount in mounts:
        root = mount.root.rstrip("/")
        if found.path and (found.path == root or found.path.startswith(f"{root}/")):
            path = Path(mount.point.rstrip("/") + found.path[len(root) :])
            if loops.mount_above(str(path), every) != mount:
                continue
            with contextlib.suppress(OSError):
                there = info(path)
                if (there.tree, there.uuid) == (found.info.tree, found.info.uuid):
                    return path
    return None


def through(path: Path, other: Path) -> Path:
    """The same subvolume by the mount that another directory is reached through, if that shows it; else as it is."""
    here, there = place_of(path), place_of(other)
    if here is None or there is None or here[0] == there[0]:
        return path
    with contextlib.suppress(OSError):
        return reach(Found(info(path), here[1]), [there[0]]) or path
    return path
