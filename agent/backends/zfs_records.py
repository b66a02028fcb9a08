"""The dataset that holds the records of a replica, beside its live copy: made, and mounted where they belong."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from agent.backends.zfs_layout import OWNER, Layout
from agent.disk import zfs, zfs_mounts
from agent.disk.claim import Claim
from agent.disk.durable import DIR_MODE, disk_errors
from resilver.errors import Damaged, Invalid


def ready(layout: Layout) -> bool:
    """Whether the records are there; mounts them if only that is missing. Makes nothing."""
    return mounted(layout, zfs.look(layout.records, OWNER))


def mounted(layout: Layout, records: zfs.Dataset | None) -> bool:
    """As `ready`, of the dataset that was looked up."""
    if records is None:
        return False
    if records.own.get(OWNER) != layout.volume:
        raise Invalid(
            "INVALID_FIELD",
            f"{layout.records} was not made for volume {layout.volume}: rename it, or give path another name",
            field="path",
        )
    if records.mountpoint != str(layout.root):
        _refuse_another(layout, records)
        zfs.patient("zfs", "set", f"mountpoint={layout.root}", layout.records)
    if not (records.mounted and os.path.ismount(layout.root)):
        zfs_mounts.mount(layout.records)
    if not os.path.ismount(layout.root):
        raise Damaged("IO_ERROR", f"{layout.records} is not mounted at {layout.root}", path=str(layout.root))
    return True


def _refuse_another(layout: Layout, records: zfs.Dataset) -> None:
    """IN_USE if they are another living agent's, that has another snapshot_dir for the same dataset."""
    if not records.mountpoint.startswith("/"):
        return
    with contextlib.suppress(zfs.ZfsError):  # where they cannot be mounted nobody works with them
        zfs_mounts.mount(layout.records)
    if os.path.ismount(records.mountpoint):
        with disk_errors(records.mountpoint):
            Claim(Path(records.mountpoint), layout.state_dir).check()


def make_root(layout: Layout) -> None:
    """Makes the datasets beside the live copy. The one above them must be there: its pool may not be imported."""
    if ready(layout):
        return
    if zfs.look(layout.parent) is None:
        raise Invalid(
            "INVALID_FIELD",
            f"there is no dataset {layout.parent}: create it, or import its pool, before {layout.live} can be there",
            field="path",
        )
    group = zfs.look(layout.group, OWNER)
    if group is not None and group.own.get(OWNER) != layout.volume:
        said = (
            f"{layout.group} is there and was not made for volume {layout.volume}: rename it, or give path another name"
        )
        raise Invalid("INVALID_FIELD", said, field="path")
    if group is None:
        unseen = ("mountpoint=none", "canmount=off", "primarycache=metadata", "com.sun:auto-snapshot=false")
        _create(layout.group, *unseen, f"{OWNER}={layout.volume}")
    with disk_errors(layout.root):
        layout.root.mkdir(mode=DIR_MODE, parents=True, exist_ok=True)
    # The pool's own settings are the operator's, for data: none of them may hide or export these files.
    plain = ("canmount=noauto", "readonly=off", "atime=off", "sharenfs=off", "sharesmb=off", "primarycache=all")
    _create(layout.records, *plain, f"mountpoint={layout.root}", f"{OWNER}={layout.volume}")
    ready(layout)
    with disk_errors(layout.root):
        layout.root.chmod(DIR_MODE)


def _create(name: str, *properties: str) -> None:
    options = [part for prop in properties for part in ("-o", prop)]
    try:
        zfs.run("zfs", "create", *options, name)
    except zfs.ZfsError as error:
        if not error.exists:
            raise
