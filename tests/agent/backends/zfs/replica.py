"""A node's replica on a pool of its own, used as an agent, an operator and other tools would."""

from __future__ import annotations

import contextlib
import random
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent.backends.base import CommitOrder, NewSnapshot, StreamOrigin
from agent.backends.zfs import ZfsBackend
from agent.backends.zfs_stage import ZfsStage
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.volume import LiveState, PreservedCopy
from tests.loopfs import run
from tests.zfsfs import zfs

VOLUME_ID = "0b6a3c1e-0000-4000-8000-000000000001"
STAGES: list[ZfsStage] = []


class Replica:
    """`dataset` is the live copy; `work` a directory for mount points."""

    def __init__(self, pool: str, work: Path, name: str = "vm1", **options: Any) -> None:
        self.pool, self.work, self.name = pool, work, name
        self.dataset = f"{pool}/{name}"
        self.root = work / f"records of {name}"
        options.setdefault("reserve_min_bytes", 0)
        options.setdefault("reserve_ratio", 0.0)
        self.backend = ZfsBackend(name, Path(self.dataset), self.root, **options)

    def again(self, **options: Any) -> Replica:
        """After a restart of the agent."""
        return Replica(self.pool, self.work, self.name, **options)

    @property
    def point(self) -> Path:
        return self.work / f"live {self.name}"

    def create(self, seed: int = 1) -> None:
        zfs("create", "-o", f"mountpoint={self.point}", self.dataset)
        make_tree(self.point, seed)

    @contextlib.contextmanager
    def walked(self, of: str = "") -> Iterator[Path]:
        """Contents of the live copy or of a snapshot, by a clone of a snapshot: whatever is mounted."""
        mark = uuid.uuid4().hex[:8]
        name = of
        if "@" not in of:
            name = f"{of or self.dataset}@walk{mark}"
            zfs("snapshot", name)
        clone, point = f"{self.pool}/walk{mark}", self.work / f"walk{mark}"
        zfs("clone", "-o", f"mountpoint={point}", "-o", "readonly=on", name, clone)
        try:
            yield point
        finally:
            zfs("destroy", clone)
            if name != of:
                zfs("destroy", name)

    def write(self, seed: int) -> None:
        """As a user who mounts it, changes it and unmounts it."""
        mounted = zfs("get", "-H", "-o", "value", "mounted", self.dataset).strip() == "yes"
        if not mounted:
            zfs("set", "readonly=off", self.dataset)
            zfs("set", "canmount=on", self.dataset)
            zfs("set", f"mountpoint={self.point}", self.dataset)
            if zfs("get", "-H", "-o", "value", "mounted", self.dataset).strip() != "yes":
                zfs("mount", self.dataset)
        change_tree(self.point, seed)
        if not mounted:
            zfs("unmount", self.dataset)

    # What the agent does.

    @property
    def lineage(self) -> Lineage:
        return self.backend.examine(compare_live=False).lineage

    @property
    def tip(self) -> Snapshot:
        tip = self.lineage.tip
        assert tip is not None
        return tip

    @property
    def state(self) -> LiveState:
        return self.backend.examine().live.state

    def snapshot(self, note: str = "", epoch: int = 1) -> Snapshot:
        tip = self.lineage.tip
        return self.backend.take_snapshot(
            NewSnapshot(
                id=str(uuid.uuid4()),
                volume_id=VOLUME_ID,
                cp=ConsistencyPoint(epoch, tip.cp.sequence + 1 if tip else 1),
                parent=tip.id if tip else "",
                epoch_id="e",
                create_time_ms=1,
                note=note,
            )
        )

    def order(self, lineage: Lineage, **options: Any) -> CommitOrder:
        options.setdefault("expected_tip", self.lineage.tip_id)
        options.setdefault("resync_id", "r1")
        return CommitOrder(volume_id=VOLUME_ID, lineage=lineage, **options)

    def open_stage(self, source: Replica, base: str, target: str) -> ZfsStage:
        origin = origin_of(source, base, target)
        if base:
            self.backend.check_base(base, origin.native_base)
        self.backend.check_stream_space(origin.stream_bytes)
        stage = self.backend.open_stream_stage(base, target, origin)
        assert isinstance(stage, ZfsStage)
        STAGES.append(stage)
        return stage

    def fill(self, source: Replica, base: str, target: str) -> ZfsStage:
        stage = self.open_stage(source, base, target)
        if base != target:
            stage.start("zfs")
            for frame in frames(source, base, target):
                stage.feed(memoryview(frame))
            stage.finish()
            stage.verify(threading.Event())
        return stage

    def receive(self, source: Replica, base: str = "", **options: Any) -> tuple[PreservedCopy, ...]:
        lineage = source.lineage
        stage = self.fill(source, base, lineage.tip_id)
        try:
            return self.backend.commit(stage, self.order(lineage, **options))
        finally:
            stage.close()

    def restore(self) -> tuple[PreservedCopy, ...]:
        tip = self.tip
        stage = self.backend.open_stream_stage(tip.id, tip.id, StreamOrigin("", "", ("zfs",)))
        return self.backend.commit(stage, self.order(self.lineage))

    def traces(self) -> list[str]:
        """Every dataset and snapshot of the pool."""
        return zfs("list", "-H", "-r", "-t", "all", "-o", "name", self.pool).split("\n")[:-1]


def origin_of(source: Replica, base: str, target: str) -> StreamOrigin:
    backend = source.backend
    return StreamOrigin(
        native_base=backend.native_id(base) if base else "",
        native_target=backend.native_id(target),
        formats=backend.formats(),
        stream_bytes=backend.delta_bytes(base, target),
    )


def frames(source: Replica, base: str, target: str, frame_bytes: int = 1 << 20) -> Iterator[bytes]:
    stream = source.backend.open_send(base, target, "zfs")
    try:
        view = memoryview(bytearray(frame_bytes))
        while got := stream.read_into(view):
            yield bytes(view[:got])
    finally:
        stream.close()


def close_stages() -> None:
    while STAGES:
        STAGES.pop().close()


def differences(one: Path, other: Path) -> str:
    """What an independent tool finds, by contents and metadata."""
    return run("rsync", "-nacAXHi", "--delete", f"{one}/", f"{other}/")


def equal(one: Replica, other: Replica, of_one: str = "", of_other: str = "") -> bool:
    with one.walked(of_one) as here, other.walked(of_other) as there:
        return differences(here, there) == ""


def make_tree(root: Path, seed: int) -> None:
    """Files of many sizes, holes, links, odd names, attributes."""
    chance = random.Random(seed)
    for number in range(12):
        directory = root / f"d{number % 3}"
        directory.mkdir(exist_ok=True)
        (directory / f"file {number} №").write_bytes(chance.randbytes(chance.choice([0, 100, 5000, 70_000, 300_000])))
    with (root / "holes").open("wb") as file:
        file.seek(3 << 20)
        file.write(chance.randbytes(4096))
        file.truncate(5 << 20)
    (root / "zeros").write_bytes(bytes(400_000))
    (root / "hard").hardlink_to(root / "holes")
    (root / "soft").symlink_to("d0/file 0 №")
    (root / "d0").chmod(0o750)


def change_tree(root: Path, seed: int) -> None:
    chance = random.Random(seed)
    (root / f"new {seed}").write_bytes(chance.randbytes(100_000))
    with (root / "holes").open("r+b") as file:
        file.seek(chance.randrange(0, 4 << 20))
        file.write(chance.randbytes(20_000))
        file.truncate((5 << 20) + seed * 1000)
    old = sorted(root.glob("d1/*"))
    if old and seed % 2:
        old[0].unlink()
    victim = root / "d2" / "file 2 №"
    if victim.exists():
        victim.rename(root / f"moved {seed}")
    (root / f"sub {seed}").mkdir(exist_ok=True)
    (root / f"sub {seed}" / "x").write_text("x" * seed)
