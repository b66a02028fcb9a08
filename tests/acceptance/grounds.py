"""What the same story needs of each kind of file system: where a node's volume is, and what its own tools say of it."""

from __future__ import annotations

import contextlib
import json
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
JOURNAL_RECORD_BYTES = 48


class Ground(Protocol):
    """A file system for each of several nodes, for one volume.

    `streams`: the file system writes its own deltas. `again_bytes_max` may be sent again after a kill. `features` are
    the kinds of attributes that files have there.
    """

    backend: str
    streams: bool
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

    def let_go(self, node: str) -> None:
        """Nobody works on the live copy any more."""

    def view(self, exported: Path) -> Path:
        """The files of what was exported."""

    def outside(self, node: str, name: str) -> Path:
        """A path on the node that does not exist yet, for what is exported."""

    def own_send_bytes(self, cluster: Cluster, node: str, base: str, target: str) -> int:
        """How long the file system's own stream between two snapshots is, by its own command."""

    def received_bytes(self, cluster: Cluster, node: str) -> int:
        """About how much of a transfer has come and is kept."""


class Btrfs:
    """Subvolumes, each node on a file system of its own."""

    backend = "btrfs"
    streams = True
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

    def let_go(self, node: str) -> None: ...

    def view(self, exported: Path) -> Path:
        return exported

    def outside(self, node: str, name: str) -> Path:
        return self._points[node] / name

    def own_send_bytes(self, cluster: Cluster, node: str, base: str, target: str) -> int:
        parent = ["-p", str(cluster.snapshot_data(node, self._volume, base))] if base else []
        return piped_bytes("btrfs", "send", "-q", *parent, str(cluster.snapshot_data(node, self._volume, target)))

    def received_bytes(self, cluster: Cluster, node: str) -> int:
        return _size(cluster.records(node, self._volume) / "stage" / "spool.data")


class Image:
    """Raw images on XFS, with an ext4 in them that is mounted where somebody works on it."""

    backend = "image"
    streams = False
    again_bytes_max = 32 * MIB
    features = frozenset({"xattr", "acl"})

    def __init__(self, stack: contextlib.ExitStack, volume: str = "files") -> None:
        self._disk = stack.enter_context(mounted("xfs", DISK_BYTES))
        self._volume = volume
        self._mounted: dict[str, Path] = {}
        stack.callback(self._end)

    def volume(self, node: str) -> Path:
        (self._disk / node).mkdir(exist_ok=True)
        return self._disk / node / f"{self._volume}.img"

    def config(self, node: str) -> str:
        return ""

    def create(self, node: str) -> Path:
        path = self.volume(node)
        with path.open("wb") as file:
            file.truncate(1 << 30)
        run("mkfs.ext4", "-q", "-F", path)
        return self.writable(node)

    def live(self, node: str) -> Path:
        return self._mounted[node]

    def writable(self, node: str) -> Path:
        return self._mount(self.volume(node), node, "loop")

    def let_go(self, node: str) -> None:
        run("umount", self._mounted.pop(node))

    def view(self, exported: Path) -> Path:
        # Taken while it was frozen, its journal is empty; a replica is not to be changed by looking at it.
        return self._mount(exported, str(exported), "loop,ro,noload") if exported.is_file() else exported

    def outside(self, node: str, name: str) -> Path:
        return self._disk / node / name

    def own_send_bytes(self, cluster: Cluster, node: str, base: str, target: str) -> int:
        raise AssertionError("an image has no stream of its own")

    def received_bytes(self, cluster: Cluster, node: str) -> int:
        return _size(cluster.records(node, self._volume) / "stage" / "journal.bin") // JOURNAL_RECORD_BYTES * MIB

    def _mount(self, image: Path, name: str, options: str) -> Path:
        point = image.with_name(f"{image.name}.mnt")
        point.mkdir(exist_ok=True)
        run("mount", "-o", options, image, point)
        self._mounted[name] = point
        return point

    def _end(self) -> None:
        for point in self._mounted.values():
            subprocess.run(["umount", "--lazy", str(point)], check=False)


class Zfs:
    """Datasets, each node in a pool of its own, under one zfs-fuse."""

    backend = "zfs"
    streams = True
    again_bytes_max = 2 * MIB
    features = frozenset({"xattr"})

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
        zfsfs.zfs("create", "-o", f"mountpoint={self.live(node)}", self.volume(node))
        return self.live(node)

    def live(self, node: str) -> Path:
        return self._work / f"{node}-live"

    def writable(self, node: str) -> Path:
        zfsfs.zfs("set", f"mountpoint={self.live(node)}", self.volume(node))
        if not self.live(node).is_mount():
            zfsfs.zfs("mount", self.volume(node))
        return self.live(node)

    def let_go(self, node: str) -> None: ...

    def view(self, exported: Path) -> Path:
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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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
        yield {"btrfs": Btrfs, "image": Image, "zfs": Zfs}[backend](stack)
