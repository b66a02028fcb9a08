"""Taking a consistency point: a read-only snapshot of the live subvolume, with its record, in one rename.

The kernel writes back what is in memory of a subvolume and takes its snapshot in one transaction, so that it is one
point in time under any writer, mapped files and several processes included. What an application has not written yet is
not in it. The record says how it was:

* `closed`: nobody used the subvolume before and after, and nothing was changed between the sync and the snapshot;
* `synced`: it was used, but by nobody that could have been in the middle of writing;
* `crash`: somebody had something in it open for writing.

Subvolumes within it are not in it; a subvolume with an active swap file cannot be snapshotted.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from agent.backends import rules
from agent.backends.base import NewSnapshot
from agent.backends.btrfs_adopt import Known
from agent.backends.btrfs_layout import SubvolumeLayout, fresh_dir, native_of, remove, save_native
from agent.backends.btrfs_live import check_live
from agent.backends.image_layout import Stored, append_records, check_id, save_stored
from agent.disk import btrfs
from agent.disk.btrfs_use import users_of
from agent.disk.durable import disk_errors, fsync_dir
from agent.disk.inuse import User
from resilver.errors import Refused
from resilver.lineage import Consistency, Snapshot

STEPS: Final = (
    "snapshot.begun",
    "snapshot.taken",
    "snapshot.recorded",
    "snapshot.logged",
    "snapshot.renamed",
    "snapshot.synced",
)


def take(known: Known, new: NewSnapshot, step: Callable[[str], None]) -> Snapshot:
    """See `ReplicaBackend.take_snapshot`; the caller has checked the space."""
    layout, state = known.layout, known.state
    check_id(new.id)
    found = state.stored.get(new.id)
    if found is not None and found.snapshot.parent == new.parent:
        return found.snapshot
    rules.check_new(state, new, layout.live, live=check_live(layout.live) is not None)
    layout.make_root()
    making = layout.new(new.id)
    try:
        with disk_errors(layout.root):
            return _take(known, new, making, step)
    except BaseException:
        remove(making)
        raise


def _take(known: Known, new: NewSnapshot, making: Path, step: Callable[[str], None]) -> Snapshot:
    layout = known.layout
    fresh_dir(making)
    step("snapshot.begun")
    consistency = _snapshot(layout, making / "data")
    step("snapshot.taken")
    save_native(making / "native.json", native_of(making / "data", time.time_ns()))
    made = new.record(0, consistency)
    save_stored(making, Stored(made, new.volume_id))
    btrfs.sync(making)
    step("snapshot.recorded")
    # What other tools made counts below our first CP only by being written down here.
    append_records(layout, known.state.lineage, known.state)
    step("snapshot.logged")
    making.rename(layout.snapshot(new.id))
    step("snapshot.renamed")
    fsync_dir(layout.root)
    step("snapshot.synced")
    return made


def _snapshot(layout: SubvolumeLayout, path: Path) -> Consistency:
    before = users_of(layout.live)
    btrfs.sync(layout.live)
    rest = btrfs.info(layout.live).ctransid
    try:
        # A read-only snapshot says of itself what its source says that it was received from: those of a copy that was
        # received and made writable would all be called the same.
        received = bool(btrfs.info(layout.live).received_uuid)
        btrfs.snapshot(layout.live, path, read_only=not received)
        if received:
            btrfs.set_read_only(path, read_only=True)
    except OSError as error:
        if error.errno in {errno.ETXTBSY, errno.EBUSY}:
            swaps = ", ".join(user.name for user in before if user.name.startswith("swap file"))
            raise Refused(
                "SNAPSHOT_NOT_ATOMIC",
                f"the kernel takes no snapshot of {layout.live}: it holds {swaps or 'an active swap file'}; keep swap "
                "files in a subvolume of their own",
                in_use_by=swaps,
            ) from error
        raise
    users = [*before, *users_of(layout.live)]
    if any(user.writes for user in users):
        return Consistency.CRASH
    untouched = btrfs.info(path).ctransid == rest
    return _rested(users) if untouched else Consistency.CRASH


def _rested(users: list[User]) -> Consistency:
    return Consistency.SYNCED if users else Consistency.CLOSED
