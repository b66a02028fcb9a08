"""The live subvolume as it is found: whether it can be served, who uses it, and what it is to its tip.

It is *unmodified* only if nobody uses it and nothing in it differs from its tip. After a sync, the transaction in which
it was last changed tells that at once, where the one was made from the other. Where it was changed since, the file
system's own comparison decides: reading files sets their access times, which is no change.

Without the sync a write that is still in memory would not be seen: 40 of 40 appends in trials, and none with it.
"""

from __future__ import annotations

import contextlib
import errno
import stat as modes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.backends import btrfs_send
from agent.backends.btrfs_debris import Debris
from agent.backends.btrfs_layout import SubvolumeLayout, is_untouched, remove, unused
from agent.disk import btrfs
from agent.disk.btrfs_use import users_of
from agent.disk.inuse import InUseError, User, names
from resilver.errors import Invalid, Refused
from resilver.volume import LiveCopy, LiveState

COMPARE_MAX_S: Final = 600.0
COMPARED: Final = "resilver-compared-"
COUNT_MAX_S: Final = 3.0  # a look waits for it: well within the coordinator's `examine_timeout_s`
_NAMED_MAX: Final = 8
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # for the snapshot that it is compared by


@dataclass(frozen=True, slots=True)
class Tip:
    """What the live copy is compared with: a read-only subvolume, and its path."""

    id: str
    path: Path


def check_live(path: Path) -> btrfs.Info | None:
    """What the live copy is, None if it is not there; Invalid if it is nothing that this backend can serve."""
    try:
        stat = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if modes.S_ISLNK(stat.st_mode):
        raise Invalid(
            "INVALID_FIELD", f"{path} is a symbolic link; name the subvolume itself, {path.resolve()}", field="path"
        )
    if not modes.S_ISDIR(stat.st_mode):
        raise Invalid("INVALID_FIELD", f"{path} is no directory; the btrfs backend wants a subvolume", field="path")
    if not btrfs.is_btrfs(path):
        raise Invalid("INVALID_FIELD", f"{path} is not on Btrfs", field="path")
    if stat.st_ino != btrfs.SUBVOLUME_INODE:
        raise Invalid(
            "INVALID_FIELD",
            f"{path} is a plain directory; make a subvolume (`btrfs subvolume create`) and move what is in it there",
            field="path",
        )
    return btrfs.info(path)


def nested_names(path: Path) -> str:
    """The subvolumes within the live copy, which are in no snapshot of it, in words; empty if there are none.

    The outermost are named, by their paths in it, and the rest counted: below snapper's `.snapshots` lie hundreds.
    """
    inside = btrfs.nested(path)
    if not inside:
        return ""
    own, place = btrfs.info(path).tree, btrfs.place_of(path)
    above = f"{place[1].rstrip('/')}/" if place is not None else ""
    outermost = [one for one in inside if one.info.parent_tree == own]
    found = sorted(one.path.removeprefix(above) or f"subvolume {one.info.tree}" for one in outermost)
    more = f" and {len(found) - _NAMED_MAX} more" if len(found) > _NAMED_MAX else ""
    deeper = len(inside) - len(outermost)
    return ", ".join(found[:_NAMED_MAX]) + more + (f" ({deeper:,} more inside)" if deeper else "")


def refuse_use(path: Path) -> None:
    """Raises InUseError if anybody uses the subvolume."""
    found = users_of(path)
    if found:
        raise InUseError(found)


def refuse_irreplaceable(path: Path, info: btrfs.Info) -> None:
    """Raises Refused if another subvolume in its place would lose something, or could not come there."""
    inside = nested_names(path)
    if inside:
        raise Refused(
            "NOT_SUPPORTED",
            f"{path} holds other subvolumes, which would not be in what replaces it: {inside}; move them out",
        )
    if info.read_only:
        raise Refused(
            "NOT_SUPPORTED",
            f"{path} is a read-only subvolume, which cannot be moved away: name a path that is not there yet, and let "
            "`adopt` name this one",
        )


def is_tip(live: Path, tip: Tip, layout: SubvolumeLayout) -> bool:
    """Whether the live copy has what its tip has, exactly. OSError if that cannot be found out."""
    btrfs.sync(live)
    now, then = btrfs.info(live), btrfs.info(tip.path)
    made_from_tip = now.parent_uuid == then.uuid and now.ctransid <= now.otransid
    is_source = then.parent_uuid == now.uuid and now.ctransid <= then.otransid
    # So it is what the tip was. If somebody has changed that since, both are read.
    if (made_from_tip or is_source) and is_untouched(layout, tip.id, tip.path, then):
        return True
    if not {now.parent_uuid, now.uuid} & ({then.uuid, then.parent_uuid} - {""}):
        return False  # of another origin: files would be compared by inode numbers that mean nothing
    with _frozen_copy(live, layout) as copy:
        return not btrfs_send.differs(tip.path, copy, COMPARE_MAX_S)


@contextlib.contextmanager
def _frozen_copy(live: Path, layout: SubvolumeLayout) -> Iterator[Path]:
    """A read-only snapshot of the live copy for the length of a block."""
    # Looking makes no directories: where there is none of ours yet, it stands beside the live copy.
    name = unused(COMPARED)
    path = layout.new(name) if layout.root.is_dir() else live.parent / f".{live.name}.{name}"
    btrfs.snapshot(live, path, read_only=True)
    try:
        yield path
    finally:
        remove(path)


def sweep(layout: SubvolumeLayout, debris: Debris) -> None:
    """Removes what a comparison that was killed has left beside the live copy."""
    for entry in layout.live.parent.iterdir():
        if entry.name.startswith(f".{layout.live.name}.{COMPARED}"):
            debris.remove(entry)


def own_bytes(live: Path, tip: Tip | None, layout: SubvolumeLayout, deadline_s: float) -> int | None:
    """How many bytes of data the tip does not have; None where that cannot be counted, or there is no tip."""
    if tip is None:
        return None
    try:
        with _frozen_copy(live, layout) as copy:
            return btrfs_send.estimate(tip.path, copy, deadline_s)
    except OSError:  # for the snapshot there may be no room
        return None


def look(layout: SubvolumeLayout, tip_id: str, tip: Tip | None, *, compare: bool) -> tuple[LiveCopy, tuple[str, ...]]:
    """The live copy, and what an operator should know of it. `tip` is None where its data is not here."""
    path = layout.live
    info = check_live(path)
    if info is None:
        return LiveCopy(LiveState.ABSENT, str(path), based_on=tip_id), ()
    problems = []
    inside = nested_names(path)
    if inside:
        problems.append(f"{path} holds subvolumes that are in no consistency point of it: {inside}")
    if info.read_only:
        problems.append(f"{path} is read-only: it can be neither written nor replaced")
    users = users_of(path)
    found, count = _against(layout, tip_id, tip, users, compare=compare)
    live = LiveCopy(
        state=found,
        path=str(path),
        based_on=tip_id,
        in_use=bool(users),
        in_use_by=names(users) if users else (),
        modified_bytes=count,
    )
    return live, tuple(problems)


def _against(
    layout: SubvolumeLayout, tip_id: str, tip: Tip | None, users: list[User], *, compare: bool
) -> tuple[LiveState, int | None]:
    """In use, it is modified if anybody may be writing to it, else never more than unknown."""
    if not tip_id or any(user.writes for user in users):
        return LiveState.MODIFIED, None
    if tip is None or not compare:
        return LiveState.UNKNOWN, None
    try:
        if not is_tip(layout.live, tip, layout):
            return LiveState.MODIFIED, own_bytes(layout.live, tip, layout, COUNT_MAX_S)
    except OSError as error:  # a TimeoutError is one
        if not isinstance(error, TimeoutError) and error.errno not in _NO_ROOM:
            raise
        return LiveState.UNKNOWN, None
    return (LiveState.UNKNOWN, None) if users else (LiveState.UNMODIFIED, 0)
