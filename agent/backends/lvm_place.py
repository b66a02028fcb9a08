"""Where a thin volume's snapshots and records stand: logical volumes of one pool, and a small file system beside them.

In the volume group, for a live copy `vg/lv`::

    lv                the live copy
    lv.resilver       the records: a small ext4 file system in the same pool, mounted at `snapshot_dir` when needed
    lv.r-<8 digits>   snapshots, the stage, the next live copy, preserved copies

Below `snapshot_dir` everything is as beside an image (`image_layout.py`), but that a `data` file does not hold a
snapshot's bytes: it names the logical volume that does, by UUID. So **the records decide** what a logical volume is, in
one rename. Its tags say the same to whoever looks with `lvs`, and are checked: `resilver.of=<UUID of the records'
volume>`, `resilver.id`, `resilver.cp`, `resilver.parent`.

Before a logical volume is made, its name is written where the next start finds it (`.new-*`, `next.json`). Only what is
so named, and has our tag, is ever removed without being asked for; a tagged volume that no record names is told.

The records' volume is filled with zeros when it is made, so that its blocks are the pool's already: a pool that is full
keeps nobody from writing down what happened.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.backends.image_layout import Layout, load_stored
from agent.disk import blockdev, lvm
from agent.disk.durable import disk_errors, make_dir, read_json, write_json
from agent.disk.lvm import Group, Lv
from agent.disk.thin import Pool
from agent.stored import typed, understood
from resilver.errors import Damaged, Invalid, Refused
from resilver.lineage import Snapshot

TAG_RECORDS: Final = "resilver.records"
TAG_MAKING: Final = "resilver.making"
RECORDS_SUFFIX: Final = ".resilver"
_RECORDS_MIN_BYTES: Final = 32 << 20
_RECORDS_MAX_BYTES: Final = 512 << 20
_RECORDS_SHARE: Final = 64
_MKFS: Final = ("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=0", "-L", "resilver")
_FROZEN: Final = re.compile("suspend ioctl .*[Bb]usy")
_CHANGING: Final = frozenset({"lvchange", "lvcreate", "lvremove", "lvrename", "lvresize"})
_MOUNT: Final = "noatime,nodev,nosuid,noexec"


@dataclass(frozen=True, slots=True)
class Ref:
    """Which logical volume a directory speaks of; without a UUID it was going to be made under that name."""

    name: str
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """A moment's picture of the volume group."""

    group: Group
    pool: Lv | None
    live: Lv | None
    records: Lv | None

    @property
    def tag(self) -> str:
        return f"resilver.of={self.records.uuid}" if self.records is not None else ""

    def find(self, ref: Ref | None) -> Lv | None:
        """The logical volume of a reference; one that is only named must have our tag."""
        if ref is None:
            return None
        if ref.uuid:
            return self.group.of_uuid(ref.uuid)
        found = self.group.named(ref.name)
        return found if found is not None and self.tag and self.tag in found.tags else None

    def kept(self, ref: Ref | None) -> Lv | None:
        """As `find`, but not the live copy: one that somebody has given that name changes."""
        found = self.find(ref)
        return None if found is not None and found == self.live else found


def save_ref(path: Path, ref: Ref) -> None:
    write_json(path, {"lv": ref.uuid, "name": ref.name})


def load_ref(path: Path) -> Ref | None:
    value = read_json(path)
    if value is None:
        return None
    with understood(path):
        return typed(path, {"name": value["name"], "uuid": value["lv"]}, Ref)


class Place:
    """One replica's place in a volume group; `step` is called by name where a crash would leave something to mend."""

    def __init__(self, volume: str, path: Path, snapshot_dir: Path, step: Callable[[str], None]) -> None:
        names = str(path).split("/")
        if len(names) not in {2, 3}:
            raise Invalid("INVALID_FIELD", f"{path} should be vg/lv, or vg/pool/lv", field="path")
        self.group_name: Final = names[0]
        self.name: Final = names[-1]
        self._pool_name = names[1] if len(names) == 3 else ""
        self.layout: Final = Layout(volume, Path(f"/dev/{names[0]}/{names[-1]}"), snapshot_dir.absolute())
        self.step: Final = step
        self._attaching = threading.Lock()

    @property
    def full_name(self) -> str:
        return f"{self.group_name}/{self.name}"

    def concerns(self, program: str, arguments: list[str]) -> bool:
        """Whether it is an LVM command that an agent changes this group with. Others, such as the `lvpoll` of an
        operator's `pvmove`, may run for hours, and undo nothing of ours.
        """
        if program != "lvm" or not arguments or arguments[0] not in _CHANGING:
            return False
        return any(word.partition("/")[0] == self.group_name for word in arguments)

    def new_name(self) -> str:
        return f"{self.name}.r-{secrets.token_hex(4)}"

    # Looking.

    def look(self) -> View | None:
        """What is there, the records mounted if there are any; None if the volume group is not there."""
        group = lvm.look(self.group_name)
        if group is None:
            return None
        live = group.named(self.name)
        if live is not None and live.kind != "thin":
            right = "the lvm-thin backend wants a thin volume: lvcreate -V SIZE --thinpool POOL"
            raise Invalid("INVALID_FIELD", f"{self.full_name} is of kind {live.kind}; {right}", field="path")
        records = group.named(self.name + RECORDS_SUFFIX)
        view = View(group, self._pool(group, live, records), live, records if _is_ready(records) else None)
        if view.records is not None:
            self._attach(view.records)
        return view

    def surely(self) -> View:
        """The view of a group that must be there."""
        view = self.look()
        if view is None:
            said = f"there is no volume group {self.group_name}: create it, or attach the disks that it is on"
            raise Invalid("INVALID_FIELD", said, field="path")
        return view

    def ready(self) -> View:
        """As `surely`, with a place for records, which is made if it is not there."""
        view = self.surely()
        if view.records is None:
            self._make(view)
            view = self.surely()
        return view

    def again(self, view: View, name: str) -> Lv:
        """A logical volume that has just been made."""
        group = lvm.look(self.group_name)
        found = group.named(name) if group is not None else None
        if found is None:
            raise Damaged("IO_ERROR", f"{view.group.name}/{name} is not there although LVM has made it")
        return found

    def _pool(self, group: Group, live: Lv | None, records: Lv | None) -> Lv | None:
        """The pool of what is there already; else the one that is configured, else the only one."""
        for lv in (live, records):
            if lv is not None and lv.pool:
                return group.named(lv.pool)
        pools = group.pools()
        if self._pool_name:
            return next((pool for pool in pools if pool.name == self._pool_name), None)
        return pools[0] if len(pools) == 1 else None

    def pool_lv(self, view: View) -> Lv:
        """The pool; Invalid if none is there or nobody can say which."""
        if view.pool is not None:
            return view.pool
        names = ", ".join(pool.name for pool in view.group.pools())
        said = f"{self.group_name} has several thin pools ({names}): name one, as {self.group_name}/POOL/{self.name}"
        if not names:
            said = f"{self.group_name} has no thin pool: lvcreate --type thin-pool -L SIZE -n pool {self.group_name}"
        elif self._pool_name:
            said = f"{self.group_name} has no thin pool {self._pool_name}; there are {names}"
        raise Invalid("INVALID_FIELD", said, field="path")

    def pool(self, view: View) -> Pool:
        """The pool, active."""
        return Pool.of(view.group, self.pool_lv(view), self.layout.root / "metadata.json")

    # The records' own volume.

    def _attach(self, records: Lv) -> None:
        """Mounts the records, unless they are."""
        root = self.layout.root
        with self._attaching, disk_errors(root):
            device = lvm.activate(records)
            if root.is_dir() and root.stat().st_dev == device.number:
                return
            self._check_unused()
            make_dir(root)
            lvm.run("mount", "-t", "ext4", "-o", _MOUNT, str(device.node), str(root))
            root.chmod(0o700)

    def _check_unused(self) -> None:
        root = self.layout.root
        if not root.exists():
            return
        if not root.is_dir() or os.path.ismount(root) or any(root.iterdir()):
            said = f"{root} is where the records of {self.full_name} are to be mounted: empty it, or name another one"
            raise Invalid("INVALID_FIELD", said, field="snapshot_dir")

    def _make(self, view: View) -> None:
        """Makes the records' volume; one that was not finished is made anew."""
        pool = self.pool(view)
        name = self.name + RECORDS_SUFFIX
        self._check_unused()
        left = view.group.named(name)
        if left is not None:
            if TAG_MAKING not in left.tags or left.pool != pool.lv.name:
                said = f"{left.full_name} is there and is not ours: rename it, the records of {self.full_name} go there"
                raise Refused("NOT_SUPPORTED", said)
            lvm.remove(left)
        size = min(max(pool.lv.size_bytes // _RECORDS_SHARE, _RECORDS_MIN_BYTES), _RECORDS_MAX_BYTES)
        extents = -(-size // view.group.extent_bytes)
        status = pool.status()
        free = (status.data_total - status.data_used) * pool.lv.chunk_bytes
        if free < 2 * extents * view.group.extent_bytes:
            said = (
                f"the records of {self.full_name} need {size:,} bytes and as many left over, and {free:,} are free in "
                f"{pool.lv.full_name}"
            )
            raise Refused("NO_SPACE", said)
        lvm.lvm(
            "lvcreate", "-y", "-V", f"{extents * view.group.extent_bytes}b", "-n", name, "--thinpool", pool.lv.name,
            "--addtag", TAG_MAKING, view.group.name,
        )  # fmt: skip
        self.step("records.created")
        made = self.again(view, name)
        node = lvm.activate(made).node
        with disk_errors(node):
            fd = os.open(node, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
            try:
                blockdev.write_zeros(fd, 0, blockdev.size_of(fd))
                os.fsync(fd)
            finally:
                os.close(fd)
        lvm.run(*_MKFS, str(node))
        self.step("records.formatted")
        lvm.lvm("lvchange", "--deltag", TAG_MAKING, "--addtag", TAG_RECORDS, made.full_name)

    # Logical volumes.

    def make_snapshot(self, view: View, origin: Lv, name: str, tags: tuple[str, ...], *, read_only: bool) -> Lv:
        """A thin snapshot, marked to be left out when the group is activated."""
        words = [word for tag in (view.tag, *tags) for word in ("--addtag", tag)]
        rights = "r" if read_only else "rw"
        try:
            lvm.lvm("lvcreate", "-y", "-s", "-k", "y", "-p", rights, "-n", name, *words, origin.full_name)
        except Damaged as error:
            if _FROZEN.search(error.message):
                raise _frozen(origin) from error
            raise
        return self.again(view, name)

    def make_empty(self, view: View, size_bytes: int, name: str, tags: tuple[str, ...]) -> Lv:
        words = [word for tag in (view.tag, *tags) for word in ("--addtag", tag)]
        pool = self.pool_lv(view).name
        size = f"{size_bytes}b"
        lvm.lvm("lvcreate", "-y", "-V", size, "-k", "y", "-n", name, "--thinpool", pool, *words, view.group.name)
        return self.again(view, name)

    def snapshot(self, view: View, snapshot_id: str, gone: str) -> Lv:
        """The logical volume of a snapshot; `gone` is the reason if there is none, BASE_MISMATCH if it was touched."""
        directory = self.layout.snapshot(snapshot_id)
        lv = view.kept(load_ref(directory / "data"))
        if lv is None:
            raise Refused(gone, f"the data of snapshot {snapshot_id} is not on this node")
        self._check_untouched(lv, directory)
        return lv

    def _check_untouched(self, lv: Lv, directory: Path) -> None:
        what = ""
        if f"resilver.id={directory.name}" not in lv.tags:
            what = f"has no tag resilver.id={directory.name}"
        elif not lv.read_only:
            what = "was made writable after it was taken"
        elif lv.size_bytes != load_stored(directory).snapshot.size_bytes:
            what = "has another size than when it was taken"
        if what:
            raise Damaged("BASE_MISMATCH", f"{lv.full_name} {what}: it is not that snapshot any more", path=lv.path)


def _is_ready(records: Lv | None) -> bool:
    return records is not None and TAG_RECORDS in records.tags


def _frozen(origin: Lv) -> Refused:
    device = origin.device
    points = blockdev.mounts_of(device.number) if device is not None else []
    thaw = f"fsfreeze -u {points[0]}" if points else ""
    said = (
        f"LVM cannot suspend {origin.full_name}, because what is mounted from it is frozen already, by a hook or by "
        "somebody else: LVM freezes it by itself, and nothing else may"
    )
    return Refused("IN_USE", f"{said}. To thaw it: {thaw}" if thaw else said, next_command=thaw)


def identity_tags(record: Snapshot) -> tuple[str, ...]:
    """What a snapshot is, for whoever looks at its tags."""
    named = (("id", record.id), ("cp", str(record.cp)), ("parent", record.parent))
    return tuple(f"resilver.{key}={value}" for key, value in named if value)
