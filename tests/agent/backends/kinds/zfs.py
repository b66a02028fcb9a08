"""`zfs` on zfs-fuse: a pool for each node of each test, all under the test process's own daemon.

Contents are read from clones of snapshots, so that looking at a dataset never changes its access times.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from agent.backends.zfs import STEPS, ZfsBackend
from resilver.volume import PreservedCopy
from tests import zfsfs
from tests.agent.backends import tree
from tests.agent.backends.adapter import LIVE, VOLUME_ID, Ground, Kind, Of, Place, TreeReplica, Use
from tests.agent.backends.kinds.image import process
from tests.agent.backends.transfer import close_stages
from tests.loopfs import attached, run
from tests.zfsfs import zfs


class ZfsReplica(TreeReplica):
    """One node's dataset."""

    features: ClassVar[frozenset[str]] = frozenset({tree.NODES})

    def __init__(self, pool: str, work: Path, node: str, name: str, **options: Any) -> None:
        self.pool, self.work, self.node, self.name = pool, work, node, name
        self.volume_id = VOLUME_ID
        self.dataset = f"{pool}/{name}"
        self.root = work / node / f"records of {name}"
        self.point = work / node / f"live {name}"
        options.setdefault("reserve_min_bytes", 0)
        options.setdefault("reserve_ratio", 0.0)
        self.backend = ZfsBackend(name, Path(self.dataset), self.root, **options)

    def again(self, **options: Any) -> ZfsReplica:
        made = type(self)(self.pool, self.work, self.node, self.name, **options)
        made.kind, made.volume_id = self.kind, self.volume_id
        return made

    # The live copy, as its users would use it.

    def make_live(self) -> None:
        zfs("create", "-o", f"mountpoint={self.point}", "-o", "canmount=noauto", self.dataset)

    def exists(self) -> bool:
        return self.dataset in names(self.pool)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Path]:
        """As its operator would mount it, to write."""
        for setting in ("canmount=noauto", "readonly=off", f"mountpoint={self.point}"):
            zfs("set", setting, self.dataset)
        if not os.path.ismount(self.point):
            zfs("mount", self.dataset)
        try:
            yield self.point
        finally:
            zfs("unmount", self.dataset)

    def on_live(self, work: Callable[[Path], None]) -> None:
        with self.mounted() as path:
            work(path)

    def remove_live(self) -> None:
        pytest.skip("a dataset without its live copy is none")

    # Looking.

    def found(self, snapshot_id: str) -> str:
        """The snapshot's name in the live dataset, by the record that it carries; empty if it is not there."""
        if not self.exists():
            return ""
        for line in zfs("list", "-H", "-r", "-t", "snapshot", "-o", "name,resilver:record", self.dataset).split("\n")[
            :-1
        ]:
            name, text = line.split("\t")
            if text.startswith("{") and json.loads(text)["id"] == snapshot_id:
                return name
        return ""

    def _name(self, of: Of) -> str:
        if isinstance(of, PreservedCopy):
            return of.path if of.path in names(self.pool) else ""
        return (self.dataset if self.exists() else "") if of is LIVE else self.found(of)

    @contextlib.contextmanager
    def walked(self, of: Of = LIVE) -> Iterator[Path | None]:
        name = self._name(of)
        if not name:
            yield None
            return
        mark = uuid.uuid4().hex[:8]
        snapshot = name if "@" in name else f"{name}@walk{mark}"
        clone, point = f"{self.pool}/walk{mark}", self.work / f"walk{mark}"
        if snapshot != name:
            zfs("snapshot", snapshot)
        try:
            zfs("clone", "-o", f"mountpoint={point}", "-o", "readonly=on", snapshot, clone)
            try:
                yield point
            finally:
                zfs("destroy", clone)
        finally:
            if snapshot != name:
                zfs("destroy", snapshot)

    @property
    def export_directory(self) -> Path:
        return self.work

    def exported(self, path: Path) -> str:
        return tree.manifest(path)

    def traces(self) -> list[str]:
        mine = [name for name in names(self.pool) if name.startswith(self.dataset)]
        files = self.root.rglob("*") if os.path.ismount(self.root) else []
        return [*mine, *sorted(str(entry.relative_to(self.root)) for entry in files if entry.name != "ancestry.jsonl")]

    def debris(self) -> list[str]:
        of = [name for name in names(self.pool) if name.startswith((f"{self.dataset}@", f"{self.dataset}.resilver/"))]
        left = [name for name in of if any(mark in name for mark in ("-look-", "incoming", "/export-"))]
        left += [name for name in of if name.endswith("/stage") and not (self.root / "stage").exists()]
        if os.path.ismount(self.root):
            entries = [entry.name for entry in self.root.iterdir()]
            left += [
                name for name in entries if name.startswith((".new", ".trash", ".export")) or name == "commit.json"
            ]
        kept = {copy.path.partition("@")[0] for copy in self.preserved}
        return left + [name for name in of if "/kept-" in name and name.partition("@")[0] not in kept]

    # What others do to it.

    def lose(self, snapshot_id: str) -> None:
        name = self.found(snapshot_id)
        zfs("release", "resilver", name)
        zfs("destroy", name)

    def tamper(self, snapshot_id: str) -> None:
        """A snapshot cannot be written to: it is made again, under its name and with its record."""
        name = self.found(snapshot_id)
        record = zfs("get", "-H", "-o", "value", "resilver:record", name).strip()
        self.lose(snapshot_id)
        self.edit(7)
        zfs("snapshot", "-o", f"resilver:record={record}", name)

    def stranger(self) -> Callable[[], None]:
        name = f"daily {uuid.uuid4().hex[:6]}"
        zfs("snapshot", f"{self.dataset}@{name}")
        guid = zfs("get", "-Hp", "-o", "value", "guid", f"{self.dataset}@{name}")
        was = self.contents()

        def check() -> None:
            (there,) = [one for one in names(self.pool) if one.endswith(f"@{name}")]
            assert zfs("get", "-Hp", "-o", "value", "guid", there) == guid
            copy = PreservedCopy("", there, "", self.tip.cp, live=False, create_time_ms=0, size_bytes=0)
            assert self.contents(copy) == was

        return check

    def litter(self) -> None:
        zfs("snapshot", "-o", "resilver:taking=look", f"{self.dataset}@resilver-look-litter")
        tip = self.found(self.tip.id)
        zfs("clone", "-o", "canmount=noauto", tip, f"{self.dataset}.resilver/export-litter")
        half = self.root / ".new-half"
        half.mkdir(parents=True)
        (half / "data").write_bytes(b"half of it")
        (self.root / ".trash-gone").mkdir()


def names(pool: str) -> list[str]:
    return zfs("list", "-H", "-r", "-t", "all", "-o", "name", pool).split("\n")[:-1]


@contextlib.contextmanager
def held(replica: ZfsReplica, how: str) -> Iterator[str]:
    with replica.mounted() as path, process(how, path / "sparse") as name:
        yield name


@contextlib.contextmanager
def stood_in(replica: ZfsReplica) -> Iterator[str]:
    with replica.mounted() as path:
        child = subprocess.Popen(["sleep", "600"], cwd=path)
        try:
            yield f"sleep pid {child.pid}"
        finally:
            child.kill()
            child.wait()


@contextlib.contextmanager
def bound(replica: ZfsReplica) -> Iterator[str]:
    point = replica.work / "bound"
    point.mkdir(exist_ok=True)
    with replica.mounted() as path:
        run("mount", "--bind", path, point)
        try:
            yield f"a mount at {point}"
        finally:
            run("umount", point)


@contextlib.contextmanager
def looped(replica: ZfsReplica) -> Iterator[str]:
    with replica.mounted() as path, attached(path / "sparse", read_only=True) as device:
        yield str(device)


class ZfsKind(Kind):
    """zfs-fuse. Whether a mounted dataset is read-only it does not tell, so any use counts as a writer."""

    name = "zfs"
    shape = "stream"
    steps = STEPS
    by_calls = False
    decides: ClassVar[dict[str, str]] = {"snapshot": "snapshot.recorded"}
    odd_name = "vm 1_a:b-c.d"
    may_be_absent = True
    outlives_live = False
    stands_alone = False
    slow = True
    looks_when_full = False
    full_size_bytes = 224 << 20
    uses = (
        Use("writer", lambda replica: held(replica, "writer"), writes=True),
        Use("mapped", lambda replica: held(replica, "mapped"), writes=True),
        Use("directory", stood_in, writes=True),
        Use("bind-mount", bound, writes=True),
        Use("loop", looped, writes=True),
    )

    def available(self) -> str:
        return zfsfs.unavailable()

    @contextlib.contextmanager
    def ground(self, size_bytes: int = zfsfs.POOL_BYTES) -> Iterator[ZfsGround]:
        with zfsfs.running() as service:
            yield ZfsGround(self, service, size_bytes)


class ZfsGround(Ground):
    """The daemon; `pools` are those of the present place, by node."""

    def __init__(self, kind: Kind, service: zfsfs.Zfs, size_bytes: int) -> None:
        self.kind, self.service, self.size_bytes = kind, service, size_bytes
        self.pools: dict[str, str] = {}
        self.work = service.work

    @contextlib.contextmanager
    def place(self) -> Iterator[ZfsPlace]:
        work = self.service.work / f"place {uuid.uuid4().hex[:8]}"
        work.mkdir()
        with contextlib.ExitStack() as stack:
            try:
                yield ZfsPlace(self, work, stack)
            finally:
                close_stages()
                self.pools.clear()

    def fill(self, node: str) -> None:
        pool = self.pools[node]
        if f"{pool}/filler" not in names(pool):
            zfs("create", "-o", f"mountpoint={self.work / pool}.filler", f"{pool}/filler")
        zfsfs.fill(self.work / f"{pool}.filler" / "data")

    def make_room(self, node: str) -> None:
        pool = self.pools[node]
        if f"{pool}/filler" in names(pool):
            zfs("destroy", f"{pool}/filler")


class ZfsPlace(Place):
    """A pool for each node."""

    def __init__(self, ground: ZfsGround, work: Path, stack: contextlib.ExitStack) -> None:
        self.kind, self.ground, self.work, self.stack = ground.kind, ground, work, stack

    @property
    def directory(self) -> Path:
        return self.work

    def replica(self, node: str, name: str = "vm1", **options: Any) -> ZfsReplica:
        pools = self.ground.pools
        if node not in pools:
            pools[node] = self.stack.enter_context(self.ground.service.pool(self.ground.size_bytes))
            (self.work / node).mkdir()
        made = ZfsReplica(pools[node], self.work, node, name, **options)
        made.kind = self.kind
        return made

    @contextlib.contextmanager
    def without_disk(self) -> Iterator[ZfsReplica]:
        made = ZfsReplica("nowhere", self.work, "a", "vm1")
        made.kind = self.kind
        yield made


KINDS: tuple[Kind, ...] = (ZfsKind(),)
