"""Many small files on Btrfs: what a first copy and a delta cost, against `btrfs send | btrfs receive` alone.

    python bench/btrfs_files.py [FILES]      as root; two file systems on loop devices, 100,000 files by default

Times are of this machine. In memory: what this process had at most, the children not counted.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.agent.backends.btrfs.nodes import Node, never, pour, same
from tests.loopfs import mounted

DISK_BYTES = 4 << 30


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{what:<42} {time.monotonic() - started:7.2f} s   {peak:5} MiB", flush=True)


def fill(root: Path, count: int) -> None:
    dice = random.Random(1)
    for number in range(count):
        place = root / f"{number // 1000:03}"
        if number % 1000 == 0:
            place.mkdir()
        (place / f"{number:06}").write_bytes(dice.randbytes(dice.randrange(1, 6000)))


def change(root: Path) -> None:
    dice = random.Random(2)
    for path in dice.sample(sorted(root.glob("*/*")), max(1, len(list(root.glob("*/*"))) // 100)):
        path.write_bytes(dice.randbytes(3000))


def transfer(source: Node, target: Node, base: str) -> None:
    tip = source.lineage.tip_id
    with told("  delta_bytes"):
        source.backend.delta_bytes(base, tip)
    origin = source.origin(base, tip)
    stage = target.backend.open_stream_stage(base, tip, origin)
    with told("  send, noted, receive"):
        stage.start(origin.formats[0])
        pour(source, base, tip, origin.formats[0], stage.feed)
        stage.finish()
    with told("  read back from the disk"):
        stage.verify(never())
    with told("  commit"):
        target.backend.commit(stage, target.order(source.lineage))


def plain(source: Path, base: Path | None, into: Path) -> None:
    into.mkdir(exist_ok=True)
    command = ["btrfs", "send", "-q", "--proto", "2", "--compressed-data", *(["-p", base] if base else []), source]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as send:
        subprocess.run(["btrfs", "receive", "-q", into], stdin=send.stdout, check=True)
    os.sync()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with (
        mounted("btrfs", DISK_BYTES) as one,
        mounted("btrfs", DISK_BYTES) as other,
        mounted("btrfs", DISK_BYTES) as bare,
    ):
        source, target = Node(one / "a"), Node(other / "b")
        source.create()
        with told(f"{count:,} files made"):
            fill(source.path, count)
        with told("snapshot"):
            base = source.snapshot().id
        print("first copy")
        transfer(source, target, "")
        with told("  the same by btrfs send | receive alone"):
            plain(source.data(base), None, bare / "1")
        change(source.path)
        with told("snapshot"):
            tip = source.snapshot().id
        print("delta of one file in a hundred")
        transfer(source, target, base)
        with told("  the same by btrfs send | receive alone"):
            plain(source.data(tip), source.data(base), bare / "2")
        with told("examine, nothing changed"):
            target.backend.examine()
        same(source.path, target.path)


if __name__ == "__main__":
    main()
