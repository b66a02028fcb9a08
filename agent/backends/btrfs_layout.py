"""Where a subvolume's snapshots and records stand, and what each is in its file system.

As `image_layout.py` says, but that `data` is a read-only subvolume, and `.live` and a preserved live copy are writable
ones. A read-only subvolume cannot be renamed into another directory: the directory around it is. Beside `record.json`::

    <id>/native.json    what the file system calls it, and when it was last changed: by that a base is known again
    stage/in-<hex>/     what `btrfs receive` is making; of another name at every start, so that one that outlives its
                        agent never writes into the next one's
    stage/tree/data     what was received, whole, with stage/received.json

**Untouched.** A snapshot's `ctransid` never changes, and is compared. If it did (somebody made it writable, or a
deduplicator has shared its extents), the inodes in the leaves that are newer are looked at: a change of content or
attributes sets an inode's ctime, sharing and moving extents does not. So neither a balance nor `bees` costs a full
copy.

The weak spot: a clock that was set back while a snapshot was tampered with hides it.
"""

from __future__ import annotations

import errno
import stat
import uuid
from dataclasses import dataclass
from pathlib import Path

from agent.backends.image_layout import Layout
from agent.disk import btrfs
from agent.disk.durable import disk_errors, make_dir, read_json, write_json
from agent.stored import typed
from resilver.errors import Damaged, Invalid, Refused


class SubvolumeLayout(Layout):
    """The paths of one replica whose data are subvolumes."""

    __slots__ = ()

    def identity(self, path: Path) -> int:
        """A subvolume's inode is always the same: its tree is what tells it from others."""
        return btrfs.tree_of(path)

    def make_root(self) -> None:
        """Makes the snapshot directory: on the same file system and under the same mount as the live copy."""
        if not self.live.parent.is_dir():
            raise Invalid(
                "INVALID_FIELD",
                f"{self.live.parent} is no directory: create it, or mount the disk that {self.live.name} is to be on",
                field="path",
            )
        if not btrfs.is_btrfs(self.live.parent):
            raise Invalid("INVALID_FIELD", f"{self.live.parent} is not on Btrfs", field="path")
        with disk_errors(self.root):
            make_dir(self.root)
            if mount_id(self.root) != mount_id(self.live.parent):
                raise Invalid(
                    "INVALID_FIELD",
                    f"{self.root} is on another mount than {self.live}; snapshot_dir must be on the same one",
                    field="snapshot_dir",
                )

    @property
    def received(self) -> Path:
        return self.stage / "received.json"


def mount_id(path: Path) -> int:
    """Which mount a directory is reached through."""
    with btrfs.opened_dir(path) as fd:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))


@dataclass(frozen=True, slots=True)
class Native:
    """What a snapshot is in its file system, as it was when it came to be."""

    uuid: str
    received_uuid: str
    ctransid: int
    time_ns: int

    @property
    def native_id(self) -> str:
        return self.received_uuid or self.uuid


def native_of(path: Path, time_ns: int) -> Native:
    """What the subvolume at a path is now; `time_ns` is a time at which nothing in it was being changed any more."""
    found = btrfs.info(path)
    return Native(found.uuid, found.received_uuid, found.ctransid, time_ns)


def save_native(path: Path, native: Native) -> None:
    write_json(path, {name: getattr(native, name) for name in Native.__slots__})


def load_native(path: Path) -> Native | None:
    value = read_json(path)
    return None if value is None else typed(path, value, Native)


def check_untouched(layout: Layout, snapshot_id: str, gone: str = "BASE_GONE") -> Native:
    """That a snapshot of ours is still what its record was written beside; what that is."""
    directory = layout.snapshot(snapshot_id)
    native = load_native(directory / "native.json")
    if native is None or not (directory / "data").exists():
        raise Refused(gone, f"the data of snapshot {snapshot_id} is not on this node")
    with disk_errors(directory):
        why = touched(directory / "data", native)
    if why:
        raise Damaged(
            "BASE_MISMATCH", f"{directory / 'data'} {why}: it is not that snapshot any more", path=str(directory)
        )
    return native


def touched(path: Path, native: Native) -> str:
    """Why a subvolume is not what it was, as words to go on with; empty if it is."""
    if not btrfs.is_subvolume(path):
        return "is no subvolume"
    found = btrfs.info(path)
    if found.uuid != native.uuid:
        return "is another subvolume"
    if found.received_uuid != native.received_uuid:
        return "was made writable, or received anew"
    if not found.read_only:
        return "is writable"
    if found.ctransid != native.ctransid and changed_since(path, native.ctransid, native.time_ns):
        return "was written to after it was taken"
    return ""


def is_untouched(layout: Layout, snapshot_id: str, path: Path, found: btrfs.Info) -> bool:
    """Whether the data of a snapshot, which is at that path, is what it was: by our record, or else by its own word."""
    native = load_native(layout.snapshot(snapshot_id) / "native.json") if path == layout.data(snapshot_id) else None
    return not touched(path, native) if native is not None else vouched(path, found)


def vouched(path: Path, found: btrfs.Info) -> bool:
    """Whether a snapshot that we have no record of is what it was when it came to be.

    Received data is written back to the disk after the receive has ended, so that the transaction alone says nothing.
    """
    if not found.read_only:
        return False
    if found.untouched:
        return True
    transid = found.rtransid if found.received_uuid else found.otransid
    return not changed_since(path, transid, found.since_ns)


def changed_since(path: Path, transid: int, time_ns: int) -> bool:
    """Whether an inode in what was written after a transaction was changed after that time."""
    with btrfs.opened_dir(path) as fd:
        return any(ctime > time_ns for ctime in btrfs.changed_inodes(fd, transid))


def remove(path: Path) -> None:
    """Removes a file, a subvolume, or a directory with all in it, subvolumes too; one that is not there is no error.

    What is within a subvolume goes with it, unseen; another subvolume within it is not removed: NOT_SUPPORTED.
    """
    try:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            path.unlink()
        elif found.st_ino == btrfs.SUBVOLUME_INODE and btrfs.is_btrfs(path):
            _destroy(path)
        else:
            for entry in path.iterdir():
                remove(entry)
            path.rmdir()
    except FileNotFoundError:
        return


def _destroy(path: Path) -> None:
    try:
        btrfs.destroy(path)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        first = f"make {path} writable, then " if btrfs.info(path).read_only else ""
        raise Refused(
            "NOT_SUPPORTED",
            f"{path} holds another subvolume, which is not removed with it: {first}move that out, or delete it",
        ) from error


def fresh_dir(path: Path) -> Path:
    """Makes an empty private directory; what an earlier attempt has left of it goes first."""
    remove(path)
    path.mkdir(mode=0o700)
    return path


def unused(prefix: str) -> str:
    """A name that nothing has had before."""
    return f"{prefix}{uuid.uuid4().hex}"
