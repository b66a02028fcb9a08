"""`lvm-thin` in thin pools of the volume group `vg`, one pool for each node; only in the machine of tests/vm.

Extents are 4 KiB, so that a volume may end within a chunk of its pool, and the suite's sizes can be had.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from agent.backends.lvm import STEPS, LvmBackend
from agent.disk.durable import write_json
from resilver.volume import PreservedCopy
from tests.agent.backends.adapter import LIVE, SIZE, VOLUME_ID, BlockReplica, Ground, Kind, Of, Place, Use, noise, text
from tests.agent.backends.kinds.image import process
from tests.agent.backends.transfer import close_stages
from tests.loopfs import attached, run

GROUP = "vg"
CHUNK = 64 << 10
_numbers = itertools.count(1)


def columns(fields: str) -> list[list[str]]:
    """What `lvs` says of every logical volume."""
    rows = run("lvs", "--noheadings", "--separator", "|", "-o", fields, GROUP).splitlines()
    return [[word.strip() for word in row.split("|")] for row in rows]


class LvmReplica(BlockReplica):
    """A thin volume named after its place, node and volume."""

    block = CHUNK

    def __init__(self, place: LvmPlace, node: str, name: str, **options: Any) -> None:
        self.place, self.node, self.name, self.kind = place, node, name, place.kind
        self.volume_id = VOLUME_ID
        self.pool = place.ground.pool(node)
        plain = name if name.isascii() and " " not in name else "odd"
        self.lv = f"{place.name}.{node}.{plain}"
        self.path = Path(f"/dev/{GROUP}/{self.lv}")
        self.root = place.directory / node / name
        options.setdefault("reserve_min_bytes", 0)
        options.setdefault("reserve_ratio", 0.0)
        self.backend = LvmBackend(name, Path(GROUP) / self.pool / self.lv, self.root, **options)

    def again(self, **options: Any) -> LvmReplica:
        return LvmReplica(self.place, self.node, self.name, **options)

    def create(self, seed: int = 1) -> None:
        run("lvcreate", "-V", f"{SIZE}b", "-n", self.lv, "--thinpool", self.pool, GROUP)
        self.write(0, noise(seed, 512 << 10))
        self.write(SIZE // 2, text(seed + 1, 512 << 10))

    def write(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def punch(self, offset: int, length: int) -> None:
        low, high = -(-offset // CHUNK) * CHUNK, (offset + length) // CHUNK * CHUNK
        if low < high:
            run("blkdiscard", "-o", str(low), "-l", str(high - low), self.path)

    def resize(self, size: int) -> None:
        run("lvresize", "-y", "-f", "-L", f"{size}b", f"{GROUP}/{self.lv}")

    def remove_live(self) -> None:
        run("lvremove", "-y", f"{GROUP}/{self.lv}")

    # Looking.

    def mine(self) -> list[list[str]]:
        """Name, UUID, rights and tags of all that belongs to this replica."""
        return sorted(row for row in columns("lv_name,lv_uuid,lv_attr,lv_tags") if self._is_mine(row[0]))

    def _is_mine(self, name: str) -> bool:
        return name == self.lv or name.startswith((f"{self.lv}.r-", f"{self.lv}.resilver"))

    def named(self, snapshot_id: str) -> str | None:
        found = [
            row[0] for row in self.mine() if f"resilver.id={snapshot_id}" in row[3].split(",") and row[2][1] == "r"
        ]
        return found[0] if found else None

    def raw(self, of: Of = LIVE) -> bytes | None:
        name = (
            self.lv if of is LIVE else of.path.rpartition("/")[2] if isinstance(of, PreservedCopy) else self.named(of)
        )
        if name is None or name not in {row[0] for row in self.mine()}:
            return None
        run("lvchange", "-ay", "-K", f"{GROUP}/{name}")
        return Path(f"/dev/{GROUP}/{name}").read_bytes()

    @property
    def export_directory(self) -> Path:
        return self.place.directory

    def exported(self, path: Path) -> str:
        return self.digest(path.read_bytes())

    def traces(self) -> list[str]:
        files = (
            sorted(str(entry.relative_to(self.root)) for entry in self.root.rglob("*")) if self.root.exists() else []
        )
        return [*files, *(f"{row[0]} {row[1]} {row[3]}" for row in self.mine())]

    def debris(self) -> list[str]:
        left = (".new", ".keep", ".trash", "commit.json", "next.json", "away.json", "metadata.json")
        names = [entry.name for entry in self.root.iterdir() if entry.name.startswith(left)]
        known = "".join(path.read_text() for path in self.root.rglob("data"))
        return names + [row[0] for row in self.mine() if ".r-" in row[0] and row[1] not in known]

    # What others do to it.

    def lose(self, snapshot_id: str) -> None:
        run("lvremove", "-y", f"{GROUP}/{self.named(snapshot_id)}")

    def tamper(self, snapshot_id: str) -> None:
        name = self.named(snapshot_id)
        run("lvchange", "-prw", f"{GROUP}/{name}")
        run("lvchange", "-ay", "-K", f"{GROUP}/{name}")
        with Path(f"/dev/{GROUP}/{name}").open("r+b") as file:
            file.seek(1 << 20)
            file.write(b"replayed")

    def stranger(self) -> Callable[[], None]:
        name = f"{self.lv}-nightly"
        run("lvcreate", "-s", "-kn", "-n", name, f"{GROUP}/{self.lv}")
        was = Path(f"/dev/{GROUP}/{name}").read_bytes()

        def check() -> None:
            assert Path(f"/dev/{GROUP}/{name}").read_bytes() == was

        return check

    def litter(self) -> None:
        (records,) = [row[1] for row in self.mine() if row[0] == f"{self.lv}.resilver"]
        name = f"{self.lv}.r-00000000"
        run("lvcreate", "-s", "-n", name, "--addtag", f"resilver.of={records}", f"{GROUP}/{self.lv}")
        half = self.root / ".new-half"
        half.mkdir()
        write_json(half / "data", {"lv": "", "name": name})
        (self.root / ".trash-gone").mkdir()


@contextlib.contextmanager
def device_upon(path: Path) -> Iterator[str]:
    run("dmsetup", "create", "upon", "--table", f"0 {SIZE // 512} linear {path} 0")
    try:
        yield "device upon"
    finally:
        run("dmsetup", "remove", "upon")


@contextlib.contextmanager
def looped(path: Path) -> Iterator[str]:
    with attached(path, read_only=True) as device:
        yield str(device)


class LvmKind(Kind):
    """Thin pools that refuse writes when they are full."""

    name = "lvm-thin"
    shape = "blocks"
    steps = STEPS
    decides: ClassVar[dict[str, str]] = {"snapshot": "snapshot.renamed", "commit": "commit.exchanged"}
    may_be_absent = True
    by_calls = False
    slow = True
    odd_name = "Büro №1, data"
    full_size_bytes = 1 << 30
    uses = (
        Use("writer", lambda replica: process("writer", replica.path), writes=True),
        Use("reader", lambda replica: process("reader", replica.path), writes=False),
        Use("loop", lambda replica: looped(replica.path), writes=False),
        Use("device", lambda replica: device_upon(replica.path), writes=True),
    )

    def available(self) -> str:
        return "" if os.environ.get("RESILVER_MACHINE") == "1" else "only in the machine of tests/vm"

    @contextlib.contextmanager
    def ground(self, size_bytes: int = 1 << 30) -> Iterator[LvmGround]:
        made = LvmGround(self, size_bytes)
        try:
            yield made
        finally:
            made.close()


class LvmGround(Ground):
    """A pool for each node, made when it is first asked for; the records of each volume have 32 MiB of it."""

    def __init__(self, kind: Kind, size_bytes: int) -> None:
        self.kind = kind
        self.name = f"g{next(_numbers)}"
        self.size_bytes = size_bytes
        self.pools: dict[str, str] = {}

    def pool(self, node: str) -> str:
        if node not in self.pools:
            if subprocess.run(["vgs", GROUP], capture_output=True, check=False).returncode != 0:
                run("pvcreate", "/dev/ubda")
                run("vgcreate", "-s", "4k", GROUP, "/dev/ubda")
            pool = self.pools[node] = f"{self.name}{node}"
            size = f"{self.size_bytes}b"
            full = ["--errorwhenfull", "y"]
            run("lvcreate", "-L", size, "--poolmetadatasize", "4m", "-c", "64k", *full, "-T", f"{GROUP}/{pool}")
        return self.pools[node]

    @contextlib.contextmanager
    def place(self) -> Iterator[LvmPlace]:
        made = LvmPlace(self)
        try:
            yield made
        finally:
            close_stages()
            made.close()

    def fill(self, node: str) -> None:
        run("lvcreate", "-V", f"{self.size_bytes}b", "-n", f"{self.name}-filler", "--thinpool", self.pool(node), GROUP)
        fd = os.open(f"/dev/{GROUP}/{self.name}-filler", os.O_WRONLY | os.O_SYNC)
        for step_bytes in (16 * CHUNK, CHUNK):
            with contextlib.suppress(OSError):
                while True:
                    os.write(fd, b"\xff" * step_bytes)
        os.close(fd)

    def make_room(self, node: str) -> None:
        if any(row[0] == f"{self.name}-filler" for row in columns("lv_name")):
            run("lvremove", "-y", f"{GROUP}/{self.name}-filler")

    def close(self) -> None:
        for pool in self.pools.values():
            run("lvremove", "-y", f"{GROUP}/{pool}")


class LvmPlace(Place):
    """A prefix of names, and a directory for mounts."""

    def __init__(self, ground: LvmGround) -> None:
        self.ground = ground
        self.kind = ground.kind
        self.name = f"p{next(_numbers)}"
        self.directory = Path("/mnt") / self.name
        self.directory.mkdir()

    def replica(self, node: str, name: str = "vm1", **options: Any) -> LvmReplica:
        return LvmReplica(self, node, name, **options)

    @contextlib.contextmanager
    def without_disk(self) -> Iterator[LvmReplica]:
        made = self.replica("a")
        made.backend = LvmBackend("vm1", Path("nowhere/vm1"), made.root)
        yield made

    def close(self) -> None:
        for root in self.directory.glob("*/*"):
            if os.path.ismount(root):
                run("umount", root)
        names = [f"{GROUP}/{row[0]}" for row in columns("lv_name") if row[0].startswith(f"{self.name}.")]
        if names:
            run("lvremove", "-y", *names)


KINDS: tuple[Kind, ...] = (LvmKind(),)
