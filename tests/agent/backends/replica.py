"""A replica for tests: an image backend in a directory, with short ways to write, snapshot and send."""

from __future__ import annotations

import hashlib
import os
import random
import uuid
from pathlib import Path

from agent.backends.base import CommitOrder, NewSnapshot, Stage
from agent.backends.image import ImageBackend
from agent.delta import DeltaMap
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.volume import PreservedCopy

BLOCK = 4096
SIZE = 4 << 20
STAGES: list[Stage] = []  # those that a test has opened; closed at its end, or their mount stays busy
VOLUME_ID = "0b6a3c1e-0000-4000-8000-000000000001"


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def text(seed: int, length: int) -> bytes:
    """Bytes that a file system compresses."""
    return (f"line {seed} of something that repeats itself\n".encode() * (length // 30 + 1))[:length]


class Replica:
    """One node's volume `vm1`."""

    def __init__(self, directory: Path, volume_id: str = VOLUME_ID, **options) -> None:
        self.directory = directory
        self.volume_id = volume_id
        directory.mkdir(exist_ok=True)
        self.path = directory / "vm1.img"
        self.root = directory / ".resilver" / "vm1"
        options.setdefault("reserve_min_bytes", 0)
        options.setdefault("reserve_ratio", 0.0)
        self.backend = ImageBackend("vm1", self.path, self.root, **options)

    # The live copy, as any program would use it.

    def create(self, size: int = SIZE, data: int = 1 << 20) -> None:
        with self.path.open("wb") as file:
            file.truncate(size)
            file.write(noise(1, data // 2))
            file.seek(size // 2)
            file.write(text(2, data // 2))

    def write(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def punch(self, offset: int, length: int) -> None:
        from agent.disk.ioctl import punch_hole

        with self.path.open("r+b") as file:
            punch_hole(file.fileno(), offset, length)

    def resize(self, size: int) -> None:
        os.truncate(self.path, size)

    @property
    def content(self) -> bytes:
        return self.path.read_bytes()

    # Snapshots.

    @property
    def lineage(self) -> Lineage:
        return self.backend.examine(compare_live=False).lineage

    def snapshot(self, note: str = "", epoch: int = 1) -> Snapshot:
        tip = self.lineage.tip
        sequence = tip.cp.sequence + 1 if tip else 1
        return self.backend.take_snapshot(
            NewSnapshot(
                id=str(uuid.uuid4()),
                volume_id=self.volume_id,
                cp=ConsistencyPoint(epoch, sequence),
                parent=tip.id if tip else "",
                epoch_id="e",
                create_time_ms=1,
                note=note,
            )
        )

    def data(self, snapshot_id: str) -> Path:
        return self.root / snapshot_id / "data"

    # A transfer, without the wire.

    def open_stage(self, base: str, target: str, size: int) -> Stage:
        stage = self.backend.open_stage(base, target, size)
        STAGES.append(stage)
        return stage

    def stage_from(self, source: Replica, base: str, target: Snapshot) -> tuple[Stage, DeltaMap]:
        """Fills a stage with what the source's delta map names, and nothing else."""
        delta = source.backend.delta_map(base, target.id)
        stage = self.open_stage(base, target.id, target.size_bytes)
        reader = source.backend.open_reader(target.id)
        for row in delta:
            if row.zero:
                stage.zero(row.offset, row.length)
                continue
            data = memoryview(bytearray(row.length))
            reader.read_into(row.offset, data)
            stage.write(row.offset, data)
        reader.close()
        return stage, delta

    def order(self, lineage: Lineage, **options) -> CommitOrder:
        options.setdefault("expected_tip", self.lineage.tip_id)
        options.setdefault("resync_id", "r1")
        return CommitOrder(volume_id=self.volume_id, lineage=lineage, **options)

    def receive(self, source: Replica, base: str = "", **options) -> tuple[PreservedCopy, ...]:
        """Brings this replica to the source's tip."""
        lineage = source.lineage
        stage, _delta = self.stage_from(source, base, lineage.tip)
        return self.backend.commit(stage, self.order(lineage, **options))
