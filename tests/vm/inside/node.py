"""Inside the machine: one volume group with a thin pool, and a replica whose live copy is a thin volume of it."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

from agent.backends.base import CommitOrder, NewSnapshot, Stage
from agent.backends.lvm import LvmBackend
from agent.delta import DeltaMap
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.volume import PreservedCopy
from tests.agent.backends.replica import VOLUME_ID, noise

GROUP = "vg"
DISK = "/dev/ubda"
SIZE = 8 << 20
CHUNK = 64 << 10
ENV = {**os.environ, "LVM_SUPPRESS_FD_WARNINGS": "1"}

__all__ = ["CHUNK", "GROUP", "SIZE", "VOLUME_ID", "Node", "killed", "make_group", "noise", "run"]


def run(*command: str | Path) -> str:
    """Runs a command and answers its output; its errors go into the exception."""
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=ENV, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"{words}: {done.stdout}{done.stderr}")
    return done.stdout


def make_group() -> None:
    """The volume group with the pool `pool`, once for a machine."""
    if not Path("/dev/mapper/vg-pool").exists():
        make_bare_group()
        make_pool("pool", 2048)  # each volume of every test in there leaves 32 MiB of records


def make_bare_group() -> None:
    """The volume group without a pool, once for a machine."""
    assert os.environ.get("RESILVER_MACHINE") == "1", f"not in the machine: {DISK} is somebody's disk"
    if GROUP not in run("vgs", "--noheadings", "-o", "vg_name").split():
        run("pvcreate", DISK)
        run("vgcreate", GROUP, DISK)


def make_pool(name: str, mib: int) -> None:
    run("lvcreate", "-L", f"{mib}m", "--poolmetadatasize", "8m", "-c", "64k", "-T", f"{GROUP}/{name}")


def killed(work: Callable[[Callable[[str], None]], None], at: str) -> bool:
    """Runs the work in a child that SIGKILLs itself at a step; whether it came that far."""
    pid = os.fork()
    if pid == 0:
        try:

            def step(name: str) -> None:
                if name == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            work(step)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


class Node:
    """One node's volume `vm1`, as any program would use it, and as the agent does."""

    def __init__(self, name: str, pool: str = "pool", **options) -> None:
        self.name = name
        self.pool = pool
        self.device = Path(f"/dev/{GROUP}/{name}")
        self.root = Path(f"/mnt/{name}")
        options.setdefault("reserve_min_bytes", 0)
        options.setdefault("reserve_ratio", 0.0)
        path = Path(GROUP) / name if pool == "pool" and "step" not in options else Path(GROUP) / pool / name
        self.backend = LvmBackend("vm1", path, self.root, **options)

    def create(self, size: int = SIZE) -> None:
        run("lvcreate", "-V", f"{size}b", "-n", self.name, "--thinpool", self.pool, GROUP)
        self.write(0, noise(1, 500_000))
        self.write(size // 2, noise(2, 300_000))

    def write(self, offset: int, data: bytes) -> None:
        with self.device.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def discard(self, offset: int, length: int) -> None:
        run("blkdiscard", "-o", str(offset), "-l", str(length), self.device)

    @property
    def content(self) -> bytes | None:
        """What the live copy shows; None if nothing has its name."""
        if not self.exists:
            return None
        if not self.device.exists():
            run("lvchange", "-ay", "-K", f"{GROUP}/{self.name}")
        return self.device.read_bytes()

    @property
    def exists(self) -> bool:
        return self.name in {line.strip() for line in run("lvs", "--noheadings", "-o", "lv_name", GROUP).splitlines()}

    def lvs(self) -> list[str]:
        """The names of everything that belongs to this replica."""
        names = (line.strip() for line in run("lvs", "--noheadings", "-o", "lv_name", GROUP).splitlines())
        return sorted(name for name in names if name.split(".")[0] == self.name)

    @property
    def lineage(self) -> Lineage:
        return self.backend.examine(compare_live=False).lineage

    def snapshot(self, note: str = "", epoch: int = 1, **options) -> Snapshot:
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
                **options,
            )
        )

    def read(self, snapshot_id: str) -> bytes:
        reader = self.backend.open_reader(snapshot_id)
        data = bytearray(reader.size_bytes)
        reader.read_into(0, memoryview(data))
        reader.close()
        return bytes(data)

    def stage_from(self, source, base: str, target: Snapshot) -> tuple[Stage, DeltaMap]:
        """Fills a stage with what the source's delta map names, and nothing else."""
        delta = source.backend.delta_map(base, target.id)
        self.backend.check_space(delta)
        stage = self.backend.open_stage(base, target.id, target.size_bytes)
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
        return CommitOrder(volume_id=VOLUME_ID, lineage=lineage, **options)

    def receive(self, source, base: str = "", **options) -> tuple[PreservedCopy, ...]:
        """Brings this replica to the source's tip."""
        lineage = source.lineage
        stage, _delta = self.stage_from(source, base, lineage.tip)
        try:
            return self.backend.commit(stage, self.order(lineage, **options))
        finally:
            stage.close()
