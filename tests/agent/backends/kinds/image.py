"""`image` on four file systems: two that share extents, one that shares and compresses them, one that copies.

The two nodes' replicas stand on one file system: nothing in an image backend looks outside of its own directories.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from agent.backends import image_compact
from agent.backends.image import STEPS, ImageBackend
from agent.disk.ioctl import punch_hole
from resilver.volume import PreservedCopy
from tests import loopfs
from tests.agent.backends.adapter import LIVE, SIZE, VOLUME_ID, BlockReplica, Ground, Kind, Of, Place, Use, noise, text
from tests.agent.backends.transfer import close_stages
from tests.loopfs import attached


class ImageReplica(BlockReplica):
    """One node's volume in a directory of its own."""

    kind: Kind

    def __init__(self, directory: Path, volume_id: str = VOLUME_ID, *, name: str = "vm1", **options: Any) -> None:
        self.directory = directory
        self.name = name
        self.volume_id = volume_id
        self.node = directory.name
        directory.mkdir(exist_ok=True)
        self.path = directory / f"{name}.img"
        self.root = directory / ".resilver" / name
        options.setdefault("reserve_min_bytes", 0)
        options.setdefault("reserve_ratio", 0.0)
        self.backend = ImageBackend(name, self.path, self.root, **options)

    def again(self, **options: Any) -> ImageReplica:
        made = type(self)(self.directory, self.volume_id, name=self.name, **options)
        made.kind = self.kind
        return made

    # The live copy, as any program would use it.

    def create(self, seed: int = 1, *, size: int = SIZE, data: int = 1 << 20) -> None:
        with self.path.open("wb") as file:
            file.truncate(size)
            file.write(noise(seed, data // 2))
            file.seek(size // 2)
            file.write(text(seed + 1, data // 2))

    def write(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def punch(self, offset: int, length: int) -> None:
        with self.path.open("r+b") as file:
            punch_hole(file.fileno(), offset, length)

    def resize(self, size: int) -> None:
        os.truncate(self.path, size)

    def remove_live(self) -> None:
        self.path.unlink()

    # Looking.

    def data(self, snapshot_id: str) -> Path:
        return self.root / snapshot_id / "data"

    def raw(self, of: Of = LIVE) -> bytes | None:
        path = self.path if of is LIVE else Path(of.path) if isinstance(of, PreservedCopy) else self.data(of)
        return path.read_bytes() if path.exists() else None

    @property
    def export_directory(self) -> Path:
        return self.directory

    def exported(self, path: Path) -> str:
        return self.digest(path.read_bytes())

    def traces(self) -> list[str]:
        names = sorted(str(entry.relative_to(self.directory)) for entry in self.directory.rglob("*"))
        return [*names, f"inode {self.path.stat().st_ino}" if self.path.exists() else "no live copy"]

    def debris(self) -> list[str]:
        names = [entry.name for entry in self.root.iterdir()]
        return [
            name for name in names if name.startswith((".new", ".keep", ".trash", ".live")) or name == "commit.json"
        ]

    # What others do to it.

    def lose(self, snapshot_id: str) -> None:
        self.data(snapshot_id).unlink()

    def tamper(self, snapshot_id: str) -> None:
        """Some time after it was taken: the clock that files are stamped by has moved since."""
        data = self.data(snapshot_id)
        taken_ns = data.with_name("record.json").stat().st_mtime_ns
        written_ns = 0
        while written_ns <= taken_ns:
            with data.open("r+b") as file:
                file.seek(1 << 20)
                file.write(b"replayed")
            written_ns = data.stat().st_mtime_ns

    def stranger(self) -> Callable[[], None]:
        """A copy beside the live copy, and one where our snapshots are."""
        copies = [self.directory / f"{self.name}.img.bak", self.root / "daily 2026-11-25" / "data"]
        was = self.path.read_bytes()
        for copy in copies:
            copy.parent.mkdir(exist_ok=True, parents=True)
            copy.write_bytes(was)

        def check() -> None:
            assert [copy.read_bytes() == was for copy in copies] == [True, True]

        return check

    def litter(self) -> None:
        half = self.root / ".new-half"
        half.mkdir(parents=True)
        (half / "data").write_bytes(b"half of it")
        (self.root / ".trash-gone").mkdir()
        (self.root / ".live").write_bytes(b"next")


HOLDER = """
import mmap, os, sys
how, path = sys.argv[1:]
fd = os.open(path, os.O_RDWR if how != "reader" else os.O_RDONLY)
if how.startswith("mapped"):
    mode = mmap.PROT_READ | (mmap.PROT_WRITE if how == "mapped" else 0)
    held = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mode)
    os.close(fd)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def process(how: str, path: Path) -> Iterator[str]:
    """A process that holds a file; its name as a user. `mmap` keeps a descriptor of its own: the holder closes both."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, how, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"held\n"
    try:
        yield f"pid {child.pid}"
    finally:
        child.communicate()


@contextlib.contextmanager
def mapped_closed(path: Path) -> Iterator[str]:
    """Mapped by a process that has no descriptor on it any more."""
    code = (
        "import ctypes, os, sys\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.mmap.restype = ctypes.c_void_p\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "assert libc.mmap(None, 4096, 3, 1, fd, 0) not in (None, 2**64 - 1)\n"
        "os.close(fd)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    assert not any(os.path.samestat(fd.stat(), path.stat()) for fd in Path(f"/proc/{child.pid}/fd").iterdir())
    try:
        yield f"pid {child.pid}"
    finally:
        child.communicate()


@contextlib.contextmanager
def looped_through_hard_link(path: Path) -> Iterator[str]:
    link = path.with_name("another-name")
    link.hardlink_to(path)
    try:
        with attached(link, read_only=True) as device:
            yield str(device)
    finally:
        link.unlink()


USES = (
    Use("writer", lambda replica: process("writer", replica.path), writes=True),
    Use("reader", lambda replica: process("reader", replica.path), writes=False),
    Use("mapped", lambda replica: mapped_closed(replica.path), writes=True),
    Use("loop", lambda replica: looped_through_hard_link(replica.path), writes=False),
)


class ImageKind(Kind):
    """Image files on one of `loopfs.KINDS`."""

    shape = "blocks"
    steps = tuple(step for step in STEPS if step not in image_compact.STEPS)
    decides: ClassVar[dict[str, str]] = {"snapshot": "snapshot.renamed", "commit": "commit.exchanged"}
    uses = USES

    def __init__(self, on: str, alike: str = "") -> None:
        self.on = on
        self.name = f"image-{on}"
        self.alike = alike
        self.shares = on != "ext4"
        self.maps_differences = not self.shares

    def available(self) -> str:
        return "" if os.geteuid() == 0 else "only root can mount file systems"

    @contextlib.contextmanager
    def ground(self, size_bytes: int = 1 << 30) -> Iterator[ImageGround]:
        with loopfs.mounted(self.on, size_bytes) as point:
            yield ImageGround(self, point)


class ImageGround(Ground):
    """One mounted file system."""

    def __init__(self, kind: Kind, point: Path) -> None:
        self.kind = kind
        self.point = point

    @contextlib.contextmanager
    def place(self) -> Iterator[ImagePlace]:
        directory = self.point / uuid.uuid4().hex
        directory.mkdir()
        try:
            yield ImagePlace(self.kind, directory)
        finally:
            close_stages()
            shutil.rmtree(directory)

    def fill(self, node: str) -> None:
        """Takes all that is free."""
        loopfs.fill(self.point)

    def make_room(self, node: str) -> None:
        loopfs.make_room(self.point)


class ImagePlace(Place):
    """A directory on it."""

    def __init__(self, kind: Kind, directory: Path) -> None:
        self.kind = kind
        self.directory = directory

    def replica(self, node: str, name: str = "vm1", **options: Any) -> ImageReplica:
        made = ImageReplica(self.directory / node, name=name, **options)
        made.kind = self.kind
        return made

    @contextlib.contextmanager
    def without_disk(self) -> Iterator[ImageReplica]:
        made = self.replica("unmounted")
        made.directory.rmdir()
        yield made


KINDS: tuple[Kind, ...] = (
    ImageKind("xfs"),
    ImageKind("btrfs"),
    ImageKind("btrfs-compressed", alike="image-btrfs"),
    ImageKind("ext4"),
)
