"""The live copy as it is found: whether it can be served at all, who uses it, and what it is to its tip.

It is *unmodified* only if nobody has it open (a lease proves it), its size is the tip's, the comparison with the tip is
empty, and its path is its only name. In use, it is modified if anybody could have written to it, else unknown.
"""

from __future__ import annotations

import os
import stat as modes
import time
from pathlib import Path
from typing import Final

from blake3 import blake3

from agent.backends.image_copy import Copier, opened
from agent.backends.image_kept import FRESH_NS, stamp_of
from agent.backends.image_layout import Layout, State
from agent.disk import ioctl, loops
from agent.disk.inuse import InUseError, Lease, names
from resilver.errors import Invalid, Refused
from resilver.volume import LiveCopy, LiveState

_KINDS: Final = {
    modes.S_IFDIR: "a directory",
    modes.S_IFLNK: "a symbolic link",
    modes.S_IFBLK: "a block device",
    modes.S_IFCHR: "a character device",
}


def check_live(path: Path) -> os.stat_result | None:
    """Stat of the live copy, None if it is not there; raises Invalid if it is no file that this backend can serve."""
    try:
        stat = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    kind = modes.S_IFMT(stat.st_mode)
    if kind == modes.S_IFREG:
        return stat
    right = "the image backend wants a raw image file"
    if kind == modes.S_IFLNK:
        right = f"name the file itself, {path.resolve()}"
    if kind == modes.S_IFDIR:
        right = f"name an image file in it, such as {path / 'disk.img'}"
    raise Invalid("INVALID_FIELD", f"{path} is {_KINDS.get(kind, 'no regular file')}; {right}", field="path")


def other_names(path: Path, stat: os.stat_result) -> str:
    """Why the path is not the only way to the live copy, as words to go on with; empty if it is."""
    if stat.st_nlink > 1:
        return f"has {stat.st_nlink - 1} more hard link(s): remove them"
    for mount in loops.own_mounts():
        if mount.point == str(path):
            return "is a bind mount itself: name the file that is mounted there"
        if mount.root.endswith(f"/{path.name}") and _leads_to(mount.reach, stat):
            return f"is bind-mounted at {mount.point}: unmount that"
    return ""


def _leads_to(path: Path, stat: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), stat)
    except OSError:
        return False


def refuse_other_names(path: Path, stat: os.stat_result) -> None:
    """Raises Refused if replacing the path would leave somebody with the old image."""
    why = other_names(path, stat)
    if why:
        raise Refused("NOT_SUPPORTED", f"{path} {why}; until then it is not replaced, because the old image would stay")


def look(layout: Layout, state: State, copier: Copier, *, compare: bool) -> tuple[LiveCopy, tuple[str, ...]]:
    """The live copy, and what an operator should know of it."""
    path = layout.live
    stat = check_live(path)
    if stat is None:
        return LiveCopy(LiveState.ABSENT, str(path), based_on=state.tip), ()
    problems = []
    aliased = other_names(path, stat)
    if aliased:
        problems.append(f"{path} {aliased}; until then it is neither called unmodified nor replaced")
    users: tuple[str, ...] = ()
    try:
        with Lease(path) as lease:
            found, own_bytes = _against_tip(lease, layout, state, copier, compare=compare)
            if not lease.certain:
                problems.append(f"leases do not work on {path}: only users that this agent can see count")
    except InUseError as error:
        users, own_bytes = names(error.users), None
        may_write = not error.users or any(user.writes for user in error.users)
        found = LiveState.MODIFIED if may_write or _differs(state, stat.st_size) else LiveState.UNKNOWN
    except FileNotFoundError:
        return LiveCopy(LiveState.ABSENT, str(path), based_on=state.tip), ()
    if aliased and found is LiveState.UNMODIFIED:
        found = LiveState.UNKNOWN
    live = LiveCopy(
        state=found,
        path=str(path),
        size_bytes=stat.st_size,
        allocated_bytes=stat.st_blocks * 512,
        based_on=state.tip,
        in_use=bool(users),
        in_use_by=users,
        extent_count=_extent_count(path),
        modified_bytes=own_bytes,
    )
    return live, tuple(problems)


def glance(layout: Layout, space: object) -> bytes | None:
    """A few bytes that stay the same as long as a look would find the same: of what is renamed into place here, the
    directories tell. None while the live copy is in use, where leases do not work, and within two seconds of a change,
    because the next one may have the same time.
    """
    live, root = str(layout.live), str(layout.root)
    stamps = [
        stamp_of(path) for path in (live, root, f"{root}/preserved", f"{root}/ancestry.jsonl", str(layout.live.parent))
    ]
    until_ns = time.time_ns() - FRESH_NS
    if any(stamp is not None and max(stamp[3], stamp[4]) > until_ns for stamp in stamps):
        return None
    try:
        stat = check_live(layout.live)
        if stat is not None:
            with Lease(layout.live) as lease:
                if not lease.certain:
                    return None
    except (OSError, InUseError, Invalid):
        return None
    about = None if stat is None else (stat.st_ino, stat.st_nlink, stat.st_blocks)
    # A digest, because it is kept, and a node may have 10,000 volumes.
    return blake3(repr((stamps, about, space, loops.mounts_read())).encode()).digest()


def _differs(state: State, size: int) -> bool:
    """Whether it is certainly not its tip: there is none, or the size is another."""
    tip = state.lineage.tip
    return tip is None or tip.size_bytes != size


def _against_tip(
    lease: Lease, layout: Layout, state: State, copier: Copier, *, compare: bool
) -> tuple[LiveState, int | None]:
    """What it is to its tip, and by how many bytes of data it differs, where that is cheap to know."""
    tip = state.lineage.tip
    if tip is None:
        return LiveState.MODIFIED, None
    snapshot = layout.snapshot(tip.id)
    same_size = tip.size_bytes == os.fstat(lease.fd).st_size
    if same_size and not (compare and tip.present):
        return LiveState.UNKNOWN, None
    if not compare:
        return LiveState.MODIFIED, None
    found = copier.differences(lease, snapshot)
    equal = same_size and (copier.live_equals(lease, snapshot) if found is None else not len(found))
    if equal:
        return LiveState.UNMODIFIED, 0
    return LiveState.MODIFIED, found.data_bytes if found is not None else None


def _extent_count(path: Path) -> int | None:
    try:
        with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
            return ioctl.extent_count(fd)
    except OSError:
        return None
