"""Preserved copies, dropping, and what is swept at the start.

A live copy that is replaced moves, by renaming and without copying, to `<dataset>.resilver/kept-<id>` with all
snapshots that came after what it shared with the new one. Each of our CPs among them, and the live copy if it held
data of its own, has a description under `preserved/`. When the last one is dropped the dataset goes, unless another
tool's snapshot is in it: then it stays until that is gone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from agent.backends.zfs_layout import RECORD, SEND_TAG, TAG, TAKING, Layout, State
from agent.backends.zfs_log import append_records
from agent.disk import zfs, zfs_mounts
from agent.disk.durable import disk_errors, fsync_dir, make_dir, read_json, write_json
from agent.stored import typed
from resilver.errors import Damaged, Invalid, Refused
from resilver.lineage import NO_CP, Snapshot
from resilver.volume import PreservedCopy

COPY_TIMEOUT_S: Final = 24 * 3600.0
_WHERE: Final = "preserved.json"
_CLONED: Final = ("dependent clones", "snapshot is cloned")  # zfs-fuse, OpenZFS


def describe(
    path: str, snapshot: Snapshot | None, size_bytes: int, own_bytes: int, *, live: bool, resync_id: str
) -> PreservedCopy:
    """What a dataset or a snapshot will be as a preserved copy at that name."""
    return PreservedCopy(
        id=str(uuid.uuid4()),
        path=path,
        based_on=snapshot.id if snapshot is not None else "",
        cp=snapshot.cp if snapshot is not None else NO_CP,
        live=live,
        create_time_ms=time.time_ns() // 1_000_000,
        size_bytes=size_bytes,
        exclusive_bytes=own_bytes,
        resync_id=resync_id,
    )


def save_description(layout: Layout, copy: PreservedCopy) -> None:
    with disk_errors(layout.files.preserved):
        make_dir(layout.files.preserved / copy.id)
    value = {name: getattr(copy, name) for name in PreservedCopy.__slots__}
    write_json(layout.files.preserved / copy.id / _WHERE, {**value, "cp": str(copy.cp)})


def remove_description(layout: Layout, pid: str) -> None:
    with disk_errors(layout.files.preserved):
        shutil.rmtree(layout.files.preserved / pid, ignore_errors=True)
        if layout.files.preserved.is_dir():
            fsync_dir(layout.files.preserved)


def list_preserved(layout: Layout) -> tuple[PreservedCopy, ...]:
    """The descriptions, oldest first."""
    with disk_errors(layout.files.preserved):
        entries = sorted(layout.files.preserved.glob(f"*/{_WHERE}"))
    values = [(entry, value) for entry in entries if (value := read_json(entry)) is not None]
    copies = [typed(entry, value, PreservedCopy) for entry, value in values]
    return tuple(sorted(copies, key=lambda copy: (copy.create_time_ms, copy.id)))


def destroy_snapshot(name: str) -> int:
    """Destroys a snapshot of ours; the bytes that it held alone. PINNED if a clone or another's hold needs it."""
    found = zfs.look(name)
    if found is None:
        return 0
    zfs.release(TAG, name)
    try:
        zfs.destroy(name)
    except zfs.ZfsError as error:
        cloned = any(words in error.text for words in _CLONED)
        if cloned or error.busy or "being held" in error.text:
            zfs.hold(TAG, name)
            why = "a clone stands on it" if cloned else "another tool holds it"
            raise Refused("PINNED", f"{name} cannot be destroyed, because {why}: {error.text}") from error
        raise
    return found.used_bytes


def drop_preserved(layout: Layout, copy: PreservedCopy, step: Callable[[str], None]) -> int:
    """Lets a preserved copy go, and its dataset with the last one; the bytes that come free, about."""
    dataset = copy.path.partition("@")[0]
    rest = [one for one in list_preserved(layout) if one.id != copy.id and one.path.partition("@")[0] == dataset]
    freed = copy.exclusive_bytes or 0
    if rest:
        freed = destroy_snapshot(copy.path) if "@" in copy.path else 0  # its blocks go with the last one
        step("drop.destroyed")
        remove_description(layout, copy.id)
        return freed
    destroy_kept(dataset)
    step("drop.destroyed")
    remove_description(layout, copy.id)
    return freed


def destroy_kept(dataset: str) -> None:
    """Destroys a replaced dataset with our snapshots in it; refused, before anything, if others' are there."""
    found = zfs.family(dataset, RECORD, TAKING)
    snapshots = zfs.snapshots_of(found, dataset)
    foreign = [one.name for one in snapshots if RECORD not in one.own and TAKING not in one.own]
    foreign += [name for name in found if name.startswith(f"{dataset}/")]
    if foreign:
        names = ", ".join(foreign[:5])
        raise Refused(
            "PINNED", f"{dataset} also holds what another tool made: {names}; destroy that, then drop it again"
        )
    if dataset in found:
        if not zfs_mounts.unmount(dataset):
            raise Refused("IN_USE", f"{dataset} is mounted and in use: it is not dropped until that ends")
        for one in snapshots:
            destroy_snapshot(one.name)
        zfs.destroy(dataset)


def drop_snapshot(layout: Layout, state: State, snapshot_id: str, step: Callable[[str], None]) -> int:
    """Lets a snapshot of the lineage go; its record stays in the log."""
    append_records(layout, [state.known[snapshot_id]], {}, state, [snapshot_id])
    step("drop.logged")
    freed = destroy_snapshot(state.where[snapshot_id].name)
    step("drop.destroyed")
    return freed


# Exporting.


@contextmanager
def opened(layout: Layout, name: str) -> Iterator[Path]:
    """A path at which a snapshot, or a kept dataset as it is now, can be read; leaves nothing behind."""
    mark = uuid.uuid4().hex[:12]
    clone, point = f"{layout.group}/export-{mark}", layout.root / f".export-{mark}"
    moment = "" if "@" in name else f"{name}@resilver-look-{mark}"
    if moment:
        zfs.run("zfs", "snapshot", "-o", f"{TAKING}=export", moment)
    try:
        options = [f"mountpoint={point}", "canmount=noauto", "readonly=on"]
        zfs.run("zfs", "clone", *(part for option in options for part in ("-o", option)), moment or name, clone)
        try:
            zfs_mounts.mount(clone)
            if not os.path.ismount(point):
                raise Damaged("IO_ERROR", f"{clone} is not mounted at {point}")
            yield point
        finally:
            zfs_mounts.unmount(clone)
            zfs.destroy(clone)
            with disk_errors(point):
                if point.is_dir():
                    point.rmdir()
    finally:
        if moment:
            zfs.destroy(moment)


def check_export(path: Path) -> None:
    """INVALID_FIELD if nothing can be exported there."""
    if not path.is_absolute() or not path.parent.is_dir():
        raise Invalid("INVALID_FIELD", f"{path.parent} is no directory: an export needs an existing one", field="path")
    if os.path.lexists(path):
        raise Invalid("INVALID_FIELD", f"{path} exists already: an export makes a new directory", field="path")


def export_tree(layout: Layout, name: str, path: Path) -> int:
    """Copies what is in a snapshot or a kept dataset to a directory that does not exist yet."""
    making = path.with_name(f".{path.name}.export")
    with opened(layout, name) as point, disk_errors(path):
        shutil.rmtree(making, ignore_errors=True)
        try:
            _copy(point, making)
            making.rename(path)
            fsync_dir(path.parent)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
    found = zfs.look(name)
    return found.referenced_bytes if found is not None else 0


def _copy(source: Path, making: Path) -> None:
    """With everything that the file system has: owners, modes, times, links, holes, attributes and ACLs."""
    try:
        done = subprocess.run(
            ["cp", "-a", "--", str(source), str(making)],
            capture_output=True,
            env=zfs.environment(),
            timeout=COPY_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Damaged("IO_ERROR", f"{making}: copying has not ended within a day") from None
    if done.returncode != 0:
        said = zfs.brief(done.stderr)
        if "No space left" in said or "quota" in said.lower():
            raise Refused("NO_SPACE", f"{making}: {said}; free some space there and try again")
        raise Damaged("IO_ERROR", f"{making}: {said}")
    subprocess.run(["sync", "-f", str(making)], check=True, timeout=COPY_TIMEOUT_S)


# At the start.


def sweep(layout: Layout, state: State) -> None:
    """Removes what a kill has left, and sets the holds right."""
    for one in state.unfinished:
        if TAKING in one.own:
            zfs.destroy(one.name)
    for name in sorted(zfs.family(layout.group)):
        if name.startswith(f"{layout.group}/export-"):
            zfs_mounts.unmount(name)
            zfs.destroy(name)
    for copy in list_preserved(layout):
        kept = copy.path.partition("@")[0]
        found = zfs.family(kept, RECORD, TAKING)
        for one in zfs.snapshots_of(found, kept):
            if TAKING in one.own and RECORD not in one.own:
                zfs.destroy(one.name)
        if copy.path not in found:  # described, and never replaced; or destroyed by hand
            remove_description(layout, copy.id)
    _sweep_files(layout)
    _set_holds(layout, state)


def _sweep_files(layout: Layout) -> None:
    with disk_errors(layout.root):
        for entry in layout.root.iterdir():
            if entry.name.startswith((".new-", ".trash-")):
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name.startswith(".export-") and not os.path.ismount(entry):
                entry.rmdir()
            elif entry.name.endswith(".tmp"):
                entry.unlink()


def _set_holds(layout: Layout, state: State) -> None:
    """Each CP of ours is held once, and the guid of each is in the log."""
    natives = {key: one.guid for key, one in state.where.items() if state.is_ours(key)}
    append_records(layout, [state.known[key] for key in natives], natives, state)
    for key, one in state.where.items():
        ours = state.is_ours(key)
        if one.holds > int(ours):
            zfs.release(SEND_TAG, one.name)
        if ours and not one.holds:
            zfs.hold(TAG, one.name)
