"""`btrfs` on three file systems of its own, one of which compresses: nodes never share one, as in real life."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.backends.btrfs import STEPS, BtrfsBackend
from resilver.volume import PreservedCopy
from tests import loopfs
from tests.agent.backends import tree
from tests.agent.backends.adapter import LIVE, VOLUME_ID, Ground, Kind, Of, Place, TreeReplica, Use
from tests.agent.backends.kinds.image import mapped_closed, process
from tests.agent.backends.transfer import close_stages
from tests.loopfs import attached, mounted, run

TOP_INODE = 256  # of every subvolume


class BtrfsReplica(TreeReplica):
    """One node's subvolume in a directory of its own."""

    def __init__(self, kind: Kind, directory: Path, node: str, name: str, **options: Any) -> None:
        self.kind, self.directory, self.node, self.name = kind, directory, node, name
        self.volume_id = VOLUME_ID
        directory.mkdir(exist_ok=True)
        self.path = directory / name
        self.root = directory / ".resilver" / name
        self.backend = BtrfsBackend(
            name, self.path, self.root, **{"reserve_min_bytes": 0, "reserve_ratio": 0.0, **options}
        )

    def again(self, **options: Any) -> BtrfsReplica:
        made = type(self)(self.kind, self.directory, self.node, self.name, **options)
        made.volume_id = self.volume_id
        return made

    # The live copy, as any program would use it.

    def make_live(self) -> None:
        run("btrfs", "subvolume", "create", self.path)

    def sync(self) -> None:
        run("btrfs", "filesystem", "sync", self.directory)

    def remove_live(self) -> None:
        run("btrfs", "subvolume", "delete", self.path)

    # Looking.

    def data(self, snapshot_id: str) -> Path:
        return self.root / snapshot_id / "data"

    @contextlib.contextmanager
    def walked(self, of: Of = LIVE) -> Iterator[Path | None]:
        path = self.path if of is LIVE else Path(of.path) if isinstance(of, PreservedCopy) else self.data(of)
        yield path if path.is_dir() else None

    @property
    def export_directory(self) -> Path:
        return self.directory

    def exported(self, path: Path) -> str:
        return tree.manifest(path)

    def traces(self) -> list[str]:
        names = [str(path.relative_to(self.directory)) for path in around(self.directory) if path != self.path]
        shown = run("btrfs", "subvolume", "show", self.path) if self.path.exists() else ""
        return [*names, *(line.strip() for line in shown.splitlines() if "Subvolume ID" in line)]

    def debris(self) -> list[str]:
        """What is hidden, an intention, and what a receive has not ended."""
        names = [path.name for path in around(self.root)] if self.root.exists() else []
        return [name for name in names if name.startswith((".", "in-")) or name == "commit.json"]

    # What others do to it.

    def lose(self, snapshot_id: str) -> None:
        run("btrfs", "subvolume", "delete", self.data(snapshot_id))

    def tamper(self, snapshot_id: str) -> None:
        data = self.data(snapshot_id)
        run("btrfs", "property", "set", "-f", data, "ro", "false")
        (data / "attributes").write_bytes(b"has more")
        run("btrfs", "property", "set", data, "ro", "true")
        self.sync()

    def stranger(self) -> Callable[[], None]:
        """Two snapshots by another tool, beside the live copy and where ours are; one is writable."""
        copies = [self.directory / f"{self.name}.20261125T0300", self.root / "daily 2026-11-25"]
        was = self.contents()
        run("btrfs", "subvolume", "snapshot", "-r", self.path, copies[0])
        run("btrfs", "subvolume", "snapshot", self.path, copies[1])
        shown = [self._shown(copy) for copy in copies]

        def check() -> None:
            assert [tree.manifest(copy) for copy in copies] == [was, was]
            assert [self._shown(copy) for copy in copies] == shown

        return check

    @staticmethod
    def _shown(path: Path) -> list[str]:
        """What says that it is still the same one, and still as writable."""
        kept = ("Name:", "UUID:", "Parent UUID:", "Received UUID:", "Flags:")
        return [
            line.strip()
            for line in run("btrfs", "subvolume", "show", path).splitlines()
            if line.strip().startswith(kept)
        ]

    def litter(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for name in (".new-half", ".trash-gone"):
            (self.root / name).mkdir()
            run("btrfs", "subvolume", "create", self.root / name / "data")
            (self.root / name / "data" / "half").write_bytes(b"half of it")
        run("btrfs", "subvolume", "create", self.root / ".live")


def around(top: Path) -> list[Path]:
    """Every file, directory and subvolume, but nothing that is within a subvolume."""
    found = []
    for folder, folders, files in os.walk(top):
        here = Path(folder)
        found += [here / name for name in (*folders, *files)]
        folders[:] = [name for name in folders if (here / name).lstat().st_ino != TOP_INODE]
    return sorted(found)


@contextlib.contextmanager
def standing_in(path: Path) -> Iterator[str]:
    """A process whose working directory is within, and that has nothing else open there."""
    child = subprocess.Popen(["sleep", "600"], cwd=path)
    try:
        yield f"pid {child.pid}"
    finally:
        child.kill()
        child.wait()


@contextlib.contextmanager
def mounted_elsewhere(replica: BtrfsReplica) -> Iterator[str]:
    """The subvolume by itself at another mount point, as a container would have it."""
    point = replica.directory / "point"
    point.mkdir()
    device = run("findmnt", "-n", "-o", "SOURCE", "--target", replica.directory).strip().partition("[")[0]
    number = run("btrfs", "inspect-internal", "rootid", replica.path).strip()
    run("mount", "-o", f"subvolid={number}", device, point)
    try:
        yield str(point)
    finally:
        run("umount", point)
        point.rmdir()


@contextlib.contextmanager
def looped(replica: BtrfsReplica) -> Iterator[str]:
    """A disk image within it, attached to a loop device."""
    with attached(replica.path / "sparse", read_only=True) as device:
        yield str(device)


USES = (
    Use("writer", lambda replica: process("writer", replica.path / "attributes"), writes=True),
    Use("reader", lambda replica: process("reader", replica.path / "attributes"), writes=False),
    Use("mapped", lambda replica: mapped_closed(replica.path / "attributes"), writes=True),
    Use("directory", lambda replica: standing_in(replica.path), writes=False),
    Use("mount", mounted_elsewhere, writes=False),
    Use("loop", looped, writes=False),
)


class BtrfsKind(Kind):
    """Subvolumes."""

    name = "btrfs"
    shape = "stream"
    steps = STEPS
    decides: Mapping[str, str | tuple[str, ...]] = {
        "snapshot": "snapshot.renamed",
        "commit": ("commit.swapped", "commit.exchanged"),  # nothing is swapped where there was no live copy
    }
    uses = USES
    full_size_bytes = 1 << 30

    def available(self) -> str:
        if os.geteuid() != 0:
            return "only root can mount file systems"
        return "" if shutil.which("btrfs") else "there is no btrfs command"

    @contextlib.contextmanager
    def ground(self, size_bytes: int = 1 << 30) -> Iterator[BtrfsGround]:
        with contextlib.ExitStack() as stack:
            on = {"a": "btrfs", "b": "btrfs-compressed", "c": "btrfs"}
            yield BtrfsGround(self, {node: stack.enter_context(mounted(fs, size_bytes)) for node, fs in on.items()})


class BtrfsGround(Ground):
    """A mounted file system for each node."""

    def __init__(self, kind: Kind, points: dict[str, Path]) -> None:
        self.kind, self.points = kind, points

    @contextlib.contextmanager
    def place(self) -> Iterator[BtrfsPlace]:
        name = f"größe {uuid.uuid4().hex[:8]}"
        made = {node: point / name for node, point in self.points.items()}
        for directory in made.values():
            directory.mkdir()
        try:
            yield BtrfsPlace(self.kind, made)
        finally:
            close_stages()
            for directory in made.values():
                cleared(directory)

    def fill(self, node: str) -> None:
        loopfs.fill(self.points[node])

    def make_room(self, node: str) -> None:
        loopfs.make_room(self.points[node])


def cleared(directory: Path) -> None:
    """Removes all that is there; subvolumes go by their own command, whatever made them."""
    for path in reversed(around(directory)):
        if not path.is_symlink() and path.is_dir() and path.stat().st_ino == TOP_INODE:
            run("btrfs", "subvolume", "delete", path)
    shutil.rmtree(directory)


class BtrfsPlace(Place):
    """A directory on each."""

    def __init__(self, kind: Kind, directories: dict[str, Path]) -> None:
        self.kind, self.directories = kind, directories

    def replica(self, node: str, name: str = "vm1", **options: Any) -> BtrfsReplica:
        return BtrfsReplica(self.kind, self.directories[node], node, name, **options)

    @contextlib.contextmanager
    def without_disk(self) -> Iterator[BtrfsReplica]:
        directory = self.directories["a"] / "unmounted"
        made = BtrfsReplica(self.kind, directory, "a", "vm1")
        directory.rmdir()
        yield made


KINDS: tuple[Kind, ...] = (BtrfsKind(),)
