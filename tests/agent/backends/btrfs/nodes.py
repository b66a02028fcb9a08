"""A node's volume on Btrfs for tests: a subvolume, its backend, and short ways to write, snapshot and send."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.backends.base import CommitOrder, NewSnapshot, StreamOrigin, StreamStage
from agent.backends.btrfs import BtrfsBackend
from agent.disk import btrfs
from resilver.errors import ResilverError
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.volume import PreservedCopy
from tests.loopfs import run

VOLUME_ID = "0b6a3c1e-0000-4000-8000-000000000002"


class Node:
    """One node's volume, in a directory of a Btrfs."""

    def __init__(self, directory: Path, name: str = "vm1", **options) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.path = directory / name
        self.root = directory / ".resilver" / name
        options.setdefault("reserve_min_bytes", 0)
        options.setdefault("reserve_ratio", 0.0)
        self.backend = BtrfsBackend(name, self.path, self.root, **options)

    # The live copy, as any program would use it.

    def create(self) -> None:
        btrfs.create(self.path)
        self.write("a", b"a" * 5000)
        (self.path / "d").mkdir()
        self.write("d/b", os.urandom(300_000))

    def write(self, name: str, data: bytes) -> None:
        (self.path / name).write_bytes(data)

    # Snapshots.

    @property
    def lineage(self) -> Lineage:
        return self.backend.examine(compare_live=False).lineage

    def snapshot(self, epoch: int = 1, **options) -> Snapshot:
        tip = self.lineage.tip
        same = tip is not None and tip.cp.epoch == epoch
        return self.backend.take_snapshot(
            NewSnapshot(
                id=str(uuid.uuid4()),
                volume_id=VOLUME_ID,
                cp=ConsistencyPoint(epoch, tip.cp.sequence + 1 if same else 1),
                parent=tip.id if tip else "",
                epoch_id="e",
                create_time_ms=1,
                **options,
            )
        )

    def data(self, snapshot_id: str) -> Path:
        return self.root / snapshot_id / "data"

    # A transfer, without the wire.

    def origin(self, base: str, target: str) -> StreamOrigin:
        backend = self.backend
        return StreamOrigin(
            backend.native_id(base) if base else "",
            backend.native_id(target),
            backend.formats(),
            backend.delta_bytes(base, target),
        )

    def stage_from(self, source: Node, base: str, stream_format: str = "", limit: int | None = None) -> StreamStage:
        """Gives the source's stream to a stage; with a limit, no more bytes than that, and without finishing."""
        target = source.lineage.tip_id
        origin = source.origin(base, target)
        if base:
            self.backend.check_base(base, origin.native_base)
        self.backend.check_stream_space(origin.stream_bytes)
        stage = self.backend.open_stream_stage(base, target, origin)
        chosen = stream_format or origin.formats[0]
        stage.start(chosen)
        pour(source, base, target, chosen, stage.feed, limit=limit)
        if limit is None:
            stage.finish()
        return stage

    def order(self, lineage: Lineage, **options) -> CommitOrder:
        options.setdefault("expected_tip", self.lineage.tip_id)
        options.setdefault("resync_id", "r1")
        return CommitOrder(volume_id=VOLUME_ID, lineage=lineage, **options)

    def receive(self, source: Node, base: str = "", stream_format: str = "", **options) -> tuple[PreservedCopy, ...]:
        """Brings this node to the source's tip."""
        stage = self.stage_from(source, base, stream_format)
        stage.verify(never())
        return self.backend.commit(stage, self.order(source.lineage, **options))


def pour(
    source: Node,
    base: str,
    target: str,
    stream_format: str,
    feed: Callable[[memoryview], None],
    *,
    limit: int | None = None,
) -> int:
    """The source's stream, piece by piece; the bytes that there were."""
    send = source.backend.open_send(base, target, stream_format)
    buffer = memoryview(bytearray(1 << 20))
    given = 0
    try:
        while limit is None or given < limit:
            count = send.read_into(buffer[: None if limit is None else min(len(buffer), limit - given)])
            if not count:
                break
            feed(buffer[:count])
            given += count
    finally:
        send.close()
    return given


def never():
    import threading

    return threading.Event()


def same(one: Path, other: Path) -> None:
    """By an independent tool, in both directions: contents, owners, modes, times, links, ACLs and attributes."""
    for source, target in ((one, other), (other, one)):
        out = run("rsync", "-nacAXHi", "--delete", "--numeric-ids", f"{source}/", f"{target}/")
        assert out == "", out


def listed(point: Path) -> list[str]:
    """What subvolumes there are, by btrfs-progs: all but `gen`, which grows when a snapshot is made of one."""
    return sorted(
        re.sub(r"gen \d+ ", "", line) for line in run("btrfs", "subvolume", "list", "-uqR", point).splitlines()
    )


def refused(work) -> ResilverError:
    with pytest.raises(ResilverError) as caught:
        work()
    return caught.value


def pair(node: Node, other: Node) -> str:
    """Both at one CP, and the first one ahead; the id of what they have in common."""
    node.create()
    base = node.snapshot()
    other.receive(node)
    node.write("a", b"newer")
    node.snapshot()
    return base.id


def reason(work) -> str:
    return refused(work).reason
