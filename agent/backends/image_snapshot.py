"""Taking a consistency point of the live copy.

Where extents are shared, a clone is a point in time under any writer; what is mounted from the file through a loop
device is brought to rest around it, so that the clone has what the mount had. Elsewhere the file is copied, and a copy
of a file that somebody writes is no point in time. It counts only if

* a lease held from beginning to end: nobody had the file open (`closed`), or
* its times are the same after the copy as before a sync that came before the copy: kernels from 6.13 on stamp every
  write that follows a look, and after a sync the first write through each mapped page too, or
* everything that could write was frozen, and was still when the copy was done (30 seconds at most).

Else it is `SNAPSHOT_NOT_ATOMIC`. The record says how it was: closed, frozen, synced or crash.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from agent.backends import rules
from agent.backends.base import NewSnapshot
from agent.backends.image_copy import Copier, fresh_dir, hint, opened, remove_tree
from agent.backends.image_layout import Layout, State, Stored, check_id, save_stored
from agent.backends.image_live import check_live
from agent.disk import ioctl
from agent.disk.durable import disk_errors, fsync_dir
from agent.disk.inuse import InUseError, Lease, User, names
from agent.disk.quiesce import quiesced
from resilver.errors import Refused
from resilver.lineage import Consistency, Snapshot

STEPS = ("snapshot.begun", "snapshot.cloned", "snapshot.recorded", "snapshot.renamed", "snapshot.synced")

COPY_FREEZE_MAX_S: Final = 30.0
_COPY_ATTEMPTS_MAX: Final = 2
_STAMPS_EVERY_CHANGE: Final = (6, 13)
_STAMPING: Final = frozenset({ioctl.EXT4_MAGIC, ioctl.XFS_MAGIC, ioctl.BTRFS_MAGIC, ioctl.TMPFS_MAGIC})


def take(layout: Layout, copier: Copier, state: State, new: NewSnapshot, step: Callable[[str], None]) -> Snapshot:
    """See `Backend.take_snapshot`; the caller has checked the space."""
    check_id(new.id)
    found = state.stored.get(new.id)
    if found is not None and found.snapshot.parent == new.parent:
        return found.snapshot
    rules.check_new(state, new, layout.live, live=check_live(layout.live) is not None)
    layout.make_root()
    making = layout.new(new.id)
    try:
        with disk_errors(layout.root):
            return _take(layout, copier, new, making, step)
    except BaseException:
        remove_tree(making)
        raise


def _take(layout: Layout, copier: Copier, new: NewSnapshot, making: Path, step: Callable[[str], None]) -> Snapshot:
    fresh_dir(making)
    step("snapshot.begun")
    table, consistency = _duplicate(layout, copier, making)
    step("snapshot.cloned")
    data = (making / "data").stat()
    made = new.record(data.st_size, consistency)
    save_stored(making, Stored(made, new.volume_id, table, data.st_mtime_ns))
    step("snapshot.recorded")
    making.rename(layout.snapshot(new.id))
    step("snapshot.renamed")
    fsync_dir(layout.root)
    step("snapshot.synced")
    return replace(made, present=True)


def _duplicate(layout: Layout, copier: Copier, making: Path) -> tuple[str, Consistency]:
    try:
        with Lease(layout.live) as lease:
            hint(lease.fd)
            table = copier.duplicate(lease.fd, making, check=lease.check)
            lease.check()
            # Without a certain lease somebody out of sight may have it open.
            return table, Consistency.CLOSED if lease.certain else Consistency.CRASH
    except InUseError as error:
        users = error.users
    fresh_dir(making)
    if copier.reflink:
        return _clone_in_use(layout, copier, making, users)
    return _copy_in_use(layout, copier, making, users)


def _others_write(users: list[User]) -> bool:
    """Whether anybody but a loop device may write; somebody who cannot be seen may."""
    return not users or any(user.writes and not user.name.startswith("/dev/loop") for user in users)


def _clone_in_use(layout: Layout, copier: Copier, making: Path, users: list[User]) -> tuple[str, Consistency]:
    with opened(layout.live) as fd:
        hint(fd)
        with quiesced(os.fstat(fd), layout.frozen, others_write=_others_write(users)) as rest:
            table = copier.duplicate(fd, making)
    return table, rest.consistency


def _copy_in_use(layout: Layout, copier: Copier, making: Path, users: list[User]) -> tuple[str, Consistency]:
    others_write = _others_write(users)
    with opened(layout.live) as fd:
        stat = os.fstat(fd)
        if stamps_every_change(fd):
            for _attempt in range(_COPY_ATTEMPTS_MAX):
                with quiesced(stat, layout.frozen, others_write=others_write, may_freeze=False) as rest:
                    before = _stamp(fd)
                    # In this order: the sync makes every mapped page stamp its next write, and the copy has all before.
                    os.fsync(fd)
                    table = copier.duplicate(fd, making)
                    same = _stamp(fd) == before
                if same:
                    return table, rest.consistency
                fresh_dir(making)
        if not others_write:
            frozen = quiesced(stat, layout.frozen, others_write=False, deadline_s=COPY_FREEZE_MAX_S)
            with frozen as rest:
                table = copier.duplicate(fd, making)
            if rest.consistency is Consistency.FROZEN:
                return table, rest.consistency
    who = ", ".join(names(users))
    raise Refused(
        "SNAPSHOT_NOT_ATOMIC",
        f"{layout.live} is written to by {who} while it is copied, and its file system cannot clone files: stop the "
        "writer for a moment, or keep the volume on XFS or Btrfs",
        in_use_by=who,
    )


def _stamp(fd: int) -> tuple[int, ...]:
    """What any write changes, and the first one through a mapping after a sync."""
    stat = os.fstat(fd)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def stamps_every_change(fd: int) -> bool:
    """Whether two different contents can never show the same times."""
    numbers = re.match(r"(\d+)\.(\d+)", platform.release())
    if numbers is None or (int(numbers[1]), int(numbers[2])) < _STAMPS_EVERY_CHANGE:
        return False
    return ioctl.fs_magic(fd) in _STAMPING
