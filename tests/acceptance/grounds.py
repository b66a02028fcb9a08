"""What the same story needs of each kind of file system: where a node's volume is, and what its own tools say of it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tests.cluster import Cluster
from tests.loopfs import mounted, run

DISK_BYTES = 8 << 30
MIB = 1 << 20


class Ground(Protocol):
    """A file system for each of several nodes, for one volume.

    `again_bytes_max` may be sent again after a kill. `features` are the kinds of attributes that files have there.
    """

    backend: str
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

    def outside(self, node: str, name: str) -> Path:
        """A path on the node that does not exist yet, for what is exported."""

    def own_send_bytes(self, cluster: Cluster, node: str, base: str, target: str) -> int:
        """How long the file system's own stream between two snapshots is, by its own command."""

    def received_bytes(self, cluster: Cluster, node: str) -> int:
        """About how much of a transfer has come and is kept."""


class Btrfs:
    """Subvolumes, each node on a file system of its own."""

    backend = "btrfs"
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

    def outside(self, node: str, name: str) -> Path:
        return self._points[node] / name

    def own_send_bytes(self, cluster: Cluster, node: str, base: str, target: str) -> int:
        parent = ["-p", str(cluster.snapshot_data(node, self._volume, base))] if base else []
        return piped_bytes("btrfs", "send", "-q", *parent, str(cluster.snapshot_data(node, self._volume, target)))

    def received_bytes(self, cluster: Cluster, node: str) -> int:
        return _size(cluster.records(node, self._volume) / "stage" / "spool.data")


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
        yield {"btrfs": Btrfs}[backend](stack)
