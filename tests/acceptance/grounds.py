"""What the same story needs of each kind of file system: where a node's volume is, and what its own tools say of it."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tests import zfsfs
from tests.cluster import Cluster
from tests.loopfs import mounted, run

DISK_BYTES = 8 << 30
MIB = 1 << 20
BLOCK = 4096
IMAGE_BYTES = 1 << 30
JOURNAL_RECORD_BYTES = 48
GROUP = "vg"
POOL_MIB = 2300
_THIN = "lv_tags,thin_id"


class Ground(Protocol):
    """A file system for each of several nodes, for one volume.

    `again_bytes_max` may be sent again after a kill. `features` are the kinds of attributes that files have there.
    `still`: that nobody has written can be told while the live copy is in use. `small_files` is how many it takes in
    its stride.
    """

    backend: str
    still: bool
    small_files: int
    again_bytes_max: int
    features: frozenset[str]

    def volume(self, node: str) -> Path:
        """What the node's configuration calls the volume; its place is made."""

    def create(self, node: str) -> Path:
        """Makes the live copy; the directory in which its files are."""

    def live(self, node: str) -> Path:
        """The files of a live copy, as whoever works on them sees them."""

    def config(self, node: str) -> str:
        """What the node's configuration says of the volume beside its path."""

    def writable(self, node: str) -> Path:
        """As `live`, of a node that was a secondary: what an operator does before he works on it."""

    def leave(self, node: str, name: str) -> Path:
        """Nobody works on the live copy any more; the files of a copy of it, which a tool of its own has made."""

    def view(self, exported: Path, *, writable: bool) -> Path:
        """The files of what was exported."""

    def outside(self, node: str, name: str) -> Path:
        """A path on the node that does not exist yet, for what is exported."""

    def own_send_bytes(self, cluster: Cluster, node: str, base: str, target: str) -> int:
        """What is between two snapshots, by other commands: a stream's length, or the blocks that they do not share."""

    def received_bytes(self, cluster: Cluster, node: str) -> int:
        """About how much of a transfer has come and is kept."""


class Btrfs:
    """Subvolumes, each node on a file system of its own."""

    backend = "btrfs"
    still = True
    small_files = 2_000
    again_bytes_max = 2 * MIB
    features = frozenset({"xattr", "acl"})

    def __init__(self, stack: contextlib.ExitStack, volume: str = "files") -> None:
        self._stack = stack
        self._volume = volume
        self._points: dict[str, Path] = {}

    def volume(self, node: str) -> Path:
        if node not in self._points:
            self._points[node] = self._stack.enter_context(mounted("btrfs", DISK_BYTES))
        return self._points[node] / self._volume

    def create(self, node: str) -> Path:
        path = self.volume(node)
        run("btrfs", "subvolume", "create", path)
        return path

    def live(self, node: str) -> Path:
        return self.volume(node)

    def config(self, node: str) -> str:
        return ""

    def writable(self, node: str) -> Path:
        return self.volume(node)

    def leave(self, node: str, name: str) -> Path:
        return copied(self.live(node), self.outside(node, name))

    def view(self, exported: Path, *, writable: bool) -> Path:
        return exported

    def outside(self, node: str, name: str) -> Path:
        return self._points[node] / name

    def own_send_bytes(self, cluster: Cluster, node: str, base: str, target: str) -> int:
        parent = ["-p", str(cluster.snapshot_data(node, self._volume, base))] if base else []
        return piped_bytes("btrfs", "send", "-q", *parent, str(cluster.snapshot_data(node, self._volume, target)))

    def received_bytes(self, cluster: Cluster, node: str) -> int:
        return _size(cluster.records(node, self._volume) / "stage" / "spool.data")


class Image:
    """Raw images, each node's on an XFS of its own, with an ext4 in them that is mounted where somebody works on it."""

    backend = "image"
    still = False
    small_files = 2_000
    again_bytes_max = 32 * MIB
    features = frozenset({"xattr", "acl"})

    def __init__(self, stack: contextlib.ExitStack, volume: str = "files") -> None:
        self._stack = stack
        self._volume = volume
        self._points: dict[str, Path] = {}
        self._mounts: list[Path] = []

    def volume(self, node: str) -> Path:
        if node not in self._points:
            self._points[node] = self._stack.enter_context(mounted("xfs", DISK_BYTES))
            self._stack.callback(self._unmount, self._points[node])
        return self._points[node] / f"{self._volume}.img"

    def create(self, node: str) -> Path:
        path = self.volume(node)
        with path.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        run("mkfs.ext4", "-q", "-F", path)
        return self.writable(node)

    def live(self, node: str) -> Path:
        return _point(self.volume(node))

    def config(self, node: str) -> str:
        return ""

    def writable(self, node: str) -> Path:
        return self._mount(self.volume(node), "loop")

    def leave(self, node: str, name: str) -> Path:
        run("umount", self.live(node))
        self._mounts.remove(self.live(node))
        # The image, and not its files: the same ACL is other bytes on XFS.
        run("cp", "--reflink=never", "--sparse=always", self.volume(node), self.outside(node, name))
        return self.view(self.outside(node, name), writable=False)

    def view(self, exported: Path, *, writable: bool) -> Path:
        # Nothing is replayed: a point that was taken while its mount was frozen needs nothing.
        return self._mount(exported, "loop" if writable else "loop,ro,noload")

    def outside(self, node: str, name: str) -> Path:
        return self._points[node] / name

    def own_send_bytes(self, cluster: Cluster, node: str, base: str, target: str) -> int:
        older, newer = (blocks_of(cluster.snapshot_data(node, self._volume, snapshot)) for snapshot in (base, target))
        return sum(older.get(block) != place for block, place in newer.items()) * BLOCK

    def received_bytes(self, cluster: Cluster, node: str) -> int:
        journal = cluster.records(node, self._volume) / "stage" / "journal.bin"
        return _size(journal) // JOURNAL_RECORD_BYTES * MIB

    def _mount(self, image: Path, options: str) -> Path:
        point = _point(image)
        point.mkdir(exist_ok=True)
        run("mount", "-o", options, image, point)
        self._mounts.append(point)
        return point

    def _unmount(self, below: Path) -> None:
        for point in [point for point in self._mounts if point.is_relative_to(below)]:
            run("umount", "--lazy", point)
            self._mounts.remove(point)


def _point(image: Path) -> Path:
    return image.with_name(f"{image.name}.mnt")


def copied(tree: Path, to: Path) -> Path:
    """Every file of a tree as it is, by a tool of its own."""
    run("cp", "-a", tree, to)
    return to


class Zfs:
    """Datasets, each node in a pool of its own, under one zfs-fuse.

    There are no attributes: the daemon has them off by default, and where they are on it soon denies those of a clone.
    Nor are there access times, so that a comparison changes nothing.
    """

    backend = "zfs"
    still = True
    small_files = 400
    again_bytes_max = 2 * MIB
    features: frozenset[str] = frozenset()

    def __init__(self, stack: contextlib.ExitStack, volume: str = "files") -> None:
        self._stack = stack
        self._service = stack.enter_context(zfsfs.running())
        self._work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zfsfs-")))
        self._volume = volume
        self._pools: dict[str, str] = {}

    def volume(self, node: str) -> Path:
        if node not in self._pools:
            self._pools[node] = self._stack.enter_context(self._service.pool(DISK_BYTES))
        return Path(self._pools[node]) / self._volume

    def config(self, node: str) -> str:
        return f'snapshot_dir = "{self._records(node)}"'

    def create(self, node: str) -> Path:
        zfsfs.zfs("create", "-o", f"mountpoint={self.live(node)}", "-o", "atime=off", self.volume(node))
        return self.live(node)

    def live(self, node: str) -> Path:
        return self._work / f"{node}-live"

    def writable(self, node: str) -> Path:
        zfsfs.zfs("set", f"mountpoint={self.live(node)}", self.volume(node))
        if not self.live(node).is_mount():
            zfsfs.zfs("mount", self.volume(node))
        return self.live(node)

    def leave(self, node: str, name: str) -> Path:
        return copied(self.live(node), self.outside(node, name))

    def view(self, exported: Path, *, writable: bool) -> Path:
        return exported

    def outside(self, node: str, name: str) -> Path:
        return self._work / f"{node}-{name}"

    def own_send_bytes(self, cluster: Cluster, node: str, base: str, target: str) -> int:
        names = {}
        dataset = str(self.volume(node))
        for line in zfsfs.zfs("list", "-H", "-t", "snapshot", "-o", "name,resilver:record").splitlines():
            name, record = line.split("\t", 1)
            if name.startswith(f"{dataset}@") and record != "-":
                names[json.loads(record)["id"]] = name
        return piped_bytes("zfs", "send", *(["-i", names[base]] if base else []), names[target])

    def received_bytes(self, cluster: Cluster, node: str) -> int:
        return _size(self._records(node) / "stage" / "spool.data")

    def _records(self, node: str) -> Path:
        return self._work / f"{node}-records"


class Lvm:
    """Thin volumes, each node's in a pool of its own, with an ext4 that is mounted where somebody works on it.

    Only where there is a volume group `GROUP` for it: in the machine of tests/vm.
    """

    backend = "lvm-thin"
    still = False
    small_files = 300
    again_bytes_max = 32 * MIB
    features = frozenset({"xattr", "acl"})

    def __init__(self, stack: contextlib.ExitStack, volume: str = "files") -> None:
        self._stack = stack
        self._volume = volume
        self._work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thin-", dir="/mnt")))
        self._work.chmod(0o755)
        self._pools: set[str] = set()
        stack.callback(self._unmount)

    def volume(self, node: str) -> Path:
        if node not in self._pools:
            run("lvcreate", "-L", f"{POOL_MIB}m", "-c", "64k", "-T", f"{GROUP}/pool-{node}")
            self._pools.add(node)
        return Path(GROUP) / f"pool-{node}" / self._lv(node)

    def _lv(self, node: str) -> str:
        return f"{self._volume}-{node}"

    def _device(self, node: str) -> Path:
        return Path(f"/dev/{GROUP}/{self._lv(node)}")

    def config(self, node: str) -> str:
        return f'snapshot_dir = "{self._records(node)}"'

    def create(self, node: str) -> Path:
        self.volume(node)
        run("lvcreate", "-V", f"{IMAGE_BYTES}b", "-n", self._lv(node), "--thinpool", f"pool-{node}", GROUP)
        run("mkfs.ext4", "-q", "-F", self._device(node))
        return self.writable(node)

    def live(self, node: str) -> Path:
        return self._work / f"{node}-live"

    def writable(self, node: str) -> Path:
        return self._mount(self._device(node), self.live(node), "rw")

    def leave(self, node: str, name: str) -> Path:
        run("umount", self.live(node))
        run("cp", "--sparse=always", self._device(node), self.outside(node, name))
        return self.view(self.outside(node, name), writable=False)

    def view(self, exported: Path, *, writable: bool) -> Path:
        point = exported.with_name(f"{exported.name}.mnt")
        return self._mount(exported, point, "loop" if writable else "loop,ro,noload")

    def outside(self, node: str, name: str) -> Path:
        return self._work / f"{node}-{name}"

    def own_send_bytes(self, cluster: Cluster, node: str, base: str, target: str) -> int:
        rows = [line.split("|") for line in run("lvs", "--noheadings", "--separator", "|", "-o", _THIN, GROUP).split()]
        ids = {key: number for tags, number in rows for key in (base, target) if key in tags}
        pool = f"{GROUP}-pool--{node}"
        run("dmsetup", "message", f"{pool}-tpool", "0", "reserve_metadata_snap")
        try:
            words = ["--snap1", ids[base], "--snap2", ids[target]] if base else ["--snap1", ids[target]]
            told = run("thin_delta", "-m", *words, f"/dev/mapper/{pool}_tmeta")
        finally:
            run("dmsetup", "message", f"{pool}-tpool", "0", "release_metadata_snap")
        found = re.findall(r"<(?:different|right_only)[^>]* length=\"(\d+)\"", told)
        return sum(int(length) for length in found) * (64 << 10)

    def received_bytes(self, cluster: Cluster, node: str) -> int:
        return _size(self._records(node) / "stage" / "journal.bin") // JOURNAL_RECORD_BYTES * MIB

    def _records(self, node: str) -> Path:
        return self._work / f"{node}-records"

    def _mount(self, what: Path, point: Path, options: str) -> Path:
        point.mkdir(exist_ok=True)
        run("mount", "-o", options, what, point)
        return point

    def _unmount(self) -> None:
        for point in self._work.iterdir():
            while point.is_mount():
                run("umount", "--lazy", point)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def blocks_of(path: Path) -> dict[int, int]:
    """Where each block of a file stands on the disk, as filefrag tells; what was never written is not among them."""
    found = {}
    for line in run("filefrag", "-s", "-v", f"-b{BLOCK}", path).splitlines():
        words = line.replace("..", " ").replace(":", " ").split()
        if words and words[0].isdigit() and "unwritten" not in words[-1]:
            first, last, place = (int(word) for word in words[1:4])
            found.update(zip(range(first, last + 1), range(place, place + last + 1 - first), strict=True))
    assert found, path
    return found


def piped_bytes(*command: str) -> int:
    """How much a command writes to its standard output."""
    count = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while piece := process.stdout.read(1 << 20):
            count += len(piece)
    assert process.returncode == 0, command
    return count


@contextlib.contextmanager
def ground(backend: str) -> Iterator[Ground]:
    with contextlib.ExitStack() as stack:
        yield {"btrfs": Btrfs, "image": Image, "lvm-thin": Lvm, "zfs": Zfs}[backend](stack)
