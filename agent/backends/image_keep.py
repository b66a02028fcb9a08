"""Keeping and letting go: preserved copies, the spare, dropped snapshots.

* A preserved copy appears in one step, by the rename of its directory, in which `preserved.json` was written before.
* Nothing that was once a live copy is removed before it was found, under a lease, to equal a snapshot that is kept, or
  that was still equal when nobody could open it any more. Otherwise it is preserved.
* A snapshot is let go by a rename; its record is in the log of ancestry before. The data is removed afterwards.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import numpy.typing as npt

from agent.backends.image_copy import Copier, opened, remove_tree
from agent.backends.image_layout import (
    Layout,
    State,
    append_records,
    load_preserved,
    save_preserved,
)
from agent.delta import DeltaMap, merged
from agent.disk.durable import DIR_MODE, disk_errors, fsync_dir, make_dir
from agent.disk.inuse import InUseError, Lease
from resilver.errors import Damaged
from resilver.lineage import NO_CP, Snapshot
from resilver.volume import PreservedCopy


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def describe(
    copier: Copier, data: Path, snapshot: Snapshot | None, against: Path | None, *, live: bool, resync_id: str
) -> PreservedCopy:
    """What a file will be as a preserved copy; `against` is the snapshot that its own bytes are counted from."""
    with opened(data) as fd:
        return describe_open(copier, fd, data, snapshot, against, live=live, resync_id=resync_id)


def describe_open(  # a file has a descriptor and a path, and both are needed
    copier: Copier, fd: int, data: Path, snapshot: Snapshot | None, against: Path | None, *, live: bool, resync_id: str
) -> PreservedCopy:
    """As `describe`, through the only descriptor that a lease allows."""
    stat = data.lstat()
    own = copier.own_bytes(fd, against)
    return PreservedCopy(
        id=str(uuid.uuid4()),
        path=str(data),
        based_on=snapshot.id if snapshot is not None else "",
        cp=snapshot.cp if snapshot is not None else NO_CP,
        live=live,
        create_time_ms=now_ms(),
        size_bytes=stat.st_size,
        exclusive_bytes=own if own is not None else stat.st_blocks * 512,
        resync_id=resync_id,
    )


def prepare_keep(layout: Layout, copy: PreservedCopy) -> None:
    """Makes the directory that a live copy will be preserved in, on the disk, without its data."""
    directory = layout.keep(copy.id)
    remove_tree(directory)
    directory.mkdir(mode=DIR_MODE)
    save_preserved(directory, copy)
    make_dir(layout.preserved)
    fsync_dir(layout.root)


def keep_file(layout: Layout, path: Path, pid: str) -> None:
    """Moves a file into its prepared directory, and that among the preserved copies; again after a crash is fine.

    Damaged if one of the two is not there and that is not done: what was a live copy is never let go for that.
    """
    directory = layout.keep(pid)
    there = os.path.lexists(path)
    if not directory.exists():
        if there and not (layout.preserved / pid).exists():
            said = f"{directory}, in which {path} was to be preserved, is not there; move {path} to a place of your own"
            raise Damaged("IO_ERROR", said, path=str(directory))
        return
    if there:
        path.rename(directory / "data")
        fsync_dir(directory)
    elif not (directory / "data").exists():
        said = f"{path}, which was to be preserved, is not there; remove {directory} to go on without it"
        raise Damaged("IO_ERROR", said, path=str(path))
    keep_directory(layout, directory, pid)


def keep_directory(layout: Layout, directory: Path, pid: str) -> None:
    """Moves a directory that has its `preserved.json` among the preserved copies, in one step."""
    if directory.exists():
        make_dir(layout.preserved)
        directory.rename(layout.preserved / pid)
        fsync_dir(layout.preserved)
        fsync_dir(layout.root)


def let_go(layout: Layout, copier: Copier, path: Path, equal_to: Path | None, snapshot: Snapshot | None) -> None:
    """Removes a former live copy if it equals the snapshot in that directory, else preserves it."""
    if not path.exists():
        return
    try:
        with Lease(path) as lease:
            if equal_to is not None and (equal_to / "data").exists() and copier.live_equals(lease, equal_to):
                path.unlink()
                fsync_dir(path.parent)
                return
    except InUseError:
        pass
    copy = describe(copier, path, snapshot, equal_to, live=True, resync_id="")
    prepare_keep(layout, copy)
    keep_file(layout, path, copy.id)


def sweep(layout: Layout, copier: Copier, state: State) -> None:
    """At start: finishes what was being preserved, and removes what is part of nothing."""
    if not layout.root.is_dir():
        return
    for entry in sorted(layout.root.iterdir()):
        name = entry.name
        if name.startswith(".keep-") and (entry / "data").exists():
            keep_directory(layout, entry, name.removeprefix(".keep-"))
        elif name.startswith(".spare-"):
            of = name.removeprefix(".spare-")
            record = state.lineage.find(of)
            if record is None or not record.present:
                let_go(layout, copier, entry, None, state.known.get(of))
        elif name.startswith((".keep-", ".new-", ".trash-")) or name == ".live" or fnmatch(name, ".*.tmp"):
            remove_tree(entry)


def drop_preserved(layout: Layout, pid: str, step: Callable[[str], None]) -> int:
    """Lets a preserved copy go; the bytes that it held alone."""
    copy = load_preserved(layout.preserved / pid)
    with disk_errors(layout.preserved):
        gone = layout.trash(pid)
        remove_tree(gone)
        (layout.preserved / pid).rename(gone)
        fsync_dir(layout.preserved)
        fsync_dir(layout.root)
        step("drop.renamed")
        remove_tree(gone)
    return copy.exclusive_bytes or 0


def drop_snapshot(layout: Layout, copier: Copier, state: State, snapshot_id: str, step: Callable[[str], None]) -> int:
    """Lets a snapshot that is not the tip go; the bytes that no neighbour shares."""
    with disk_errors(layout.snapshot(snapshot_id)):
        freed = _alone(layout, copier, state, snapshot_id)
        append_records(layout, [state.known[snapshot_id]], state, logged=[snapshot_id])
        step("prune.logged")
        let_go(layout, copier, layout.spare(snapshot_id), layout.snapshot(snapshot_id), state.lineage.find(snapshot_id))
        gone = layout.trash(snapshot_id)
        remove_tree(gone)
        layout.snapshot(snapshot_id).rename(gone)
        fsync_dir(layout.root)
        step("prune.renamed")
        remove_tree(gone)
        step("prune.removed")
    return freed


def _alone(layout: Layout, copier: Copier, state: State, snapshot_id: str) -> int:
    """Bytes of a snapshot that neither the next older nor the next newer one has: what dropping it gives back."""
    here = [record.id for record in state.lineage if record.present]
    if snapshot_id not in here:
        return 0
    if not copier.reflink:
        return layout.data(snapshot_id).stat().st_blocks * 512
    at = here.index(snapshot_id)
    mine = layout.snapshot(snapshot_id)
    newer = copier.delta(layout.snapshot(here[at - 1]), mine) if at > 0 else None
    older = copier.delta(layout.snapshot(here[at + 1]), mine) if at + 1 < len(here) else None
    if newer is None or older is None:
        found = newer if newer is not None else older
        return found.data_bytes if found is not None else 0
    return overlap(newer, older)


def overlap(one: DeltaMap, other: DeltaMap) -> int:
    """Bytes of data that stand in both maps."""
    bounds = merged(one.offsets, one.offsets + one.lengths, other.offsets, other.offsets + other.lengths)
    if not len(bounds):
        return 0
    points = bounds[:-1]
    both = _covers(one, points) & _covers(other, points)
    return int(np.diff(bounds)[both].sum())


def _covers(delta: DeltaMap, points: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """At which points the map names data."""
    if not len(delta.offsets):
        return np.zeros(len(points), np.bool_)
    row = np.searchsorted(delta.offsets, points, side="right") - 1
    return np.asarray((row >= 0) & (points < delta.offsets[row] + delta.lengths[row]) & ~delta.zeros[row], np.bool_)
