"""Fifty cycles of scattered writes and consistency points on one image, without and with compacting, on XFS or Btrfs.

    sudo .venv/bin/python bench/fragments.py [--kind xfs] [--mib 1024] [--cycles 50] [--keep 16] [--above 50000]

In each cycle 1.9 % of the image's blocks are rewritten at random, then a consistency point is taken and the oldest
snapshot beyond `--keep` is dropped. Beside it a process writes one block every few milliseconds and notes how long its
longest write took: that is the stall. Every delta is compared with the blocks that were written: from the snapshot
before, and from the oldest one that is kept (1.0000 is exact). Absolute times are of this machine; what to look at is
what grows.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent.backends.image_compact import SEAMS_MAX
from agent.disk import ioctl
from agent.disk.places import seams_by_part
from tests.agent.backends.replica import BLOCK, Replica
from tests.loopfs import mounted

MIB = 1 << 20
SHARE = 0.019
SHOWN_EVERY = 5

FEELER = """
import os, select, sys, time
fd, number, longest = os.open(sys.argv[1], os.O_RDWR), 0, 0.0
print("going", flush=True)
while True:
    if select.select([0], [], [], 0.003)[0]:
        if not os.read(0, 1):
            break
        print(longest, flush=True)
        longest = 0.0
    number += 1
    begun = time.perf_counter()
    os.pwrite(fd, number.to_bytes(4096, "little"), 0)
    longest = max(longest, time.perf_counter() - begun)
"""


class Feeler:
    """A writer of block 0 that tells how long its longest write took since it was asked before."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FEELER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def longest_s(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"?")
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@dataclass
class Cycle:
    """What one cycle showed."""

    extents: int
    stall_s: float
    took_s: float
    cpu_s: float
    compact_s: float
    compact_stall_s: float
    used_bytes: int
    over_newest: float
    over_oldest: float


class Volume:
    """The image, and what was written to it between its consistency points."""

    def __init__(self, place: Path, size_bytes: int, keep: int, above: int) -> None:
        self.place = place
        self.size_bytes = size_bytes
        self.keep = keep
        self.replica = Replica(place / "a", seams_max=above)
        with self.replica.path.open("wb") as file:
            for _ in range(size_bytes // MIB):
                file.write(os.urandom(MIB))
        self.ids = [self.replica.snapshot().id]
        self.written: list[set[int]] = [set()]
        self.chance = random.Random(1)

    def write(self) -> None:
        blocks = self.size_bytes // BLOCK
        chosen = {self.chance.randrange(blocks) for _ in range(int(blocks * SHARE))}
        fd = os.open(self.replica.path, os.O_RDWR)
        for block in chosen:
            os.pwrite(fd, os.urandom(BLOCK), block * BLOCK)
        os.fsync(fd)
        os.close(fd)
        self.written.append({0, *chosen})

    def snapshot(self) -> None:
        self.ids.append(self.replica.snapshot().id)

    def over(self, base: int) -> float:
        """Bytes of the delta from that snapshot to the newest, over those of the blocks written since."""
        delta = self.replica.backend.delta_map(self.ids[base], self.ids[-1])
        changed = set().union(*self.written[base + 1 :])
        return (delta.data_bytes + delta.zero_bytes) / (len(changed) * BLOCK)

    def extents(self) -> int:
        """As XFS counts them; elsewhere what the live copy could do without, and one for each 128 KiB."""
        fd = os.open(self.replica.path, os.O_RDONLY)
        try:
            return ioctl.extent_count(fd) or int(seams_by_part(fd, 4 * MIB).sum()) + self.size_bytes // (128 << 10)
        finally:
            os.close(fd)

    def used_bytes(self) -> int:
        fd = os.open(self.place, os.O_RDONLY)
        ioctl.syncfs(fd)
        os.close(fd)
        stat = os.statvfs(self.place)
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize

    def cycle(self, feeler: Feeler, *, compacting: bool) -> Cycle:
        self.write()
        feeler.longest_s()
        begun, cpu = time.perf_counter(), time.process_time()
        self.snapshot()
        took_s, cpu_s, stall_s = time.perf_counter() - begun, time.process_time() - cpu, feeler.longest_s()
        self.replica.backend.prune(self.keep, frozenset())
        extents = self.extents()
        feeler.longest_s()
        begun = time.perf_counter()
        while compacting and self.replica.backend.compact(lambda: True):
            pass
        compact_s, compact_stall_s = time.perf_counter() - begun, feeler.longest_s()
        return Cycle(
            extents,
            stall_s,
            took_s,
            cpu_s,
            compact_s if compacting else 0.0,
            compact_stall_s if compacting else 0.0,
            self.used_bytes(),
            self.over(-2),
            self.over(max(-self.keep, -len(self.ids))),
        )


COLUMNS = (
    *("cycle", "extents", "CP took", "of it CPU", "writer waited", "compacting", "writer waited"),
    *("used", "newest delta", "oldest delta"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


def row(name: str, found: Cycle) -> str:
    cells = (
        name,
        f"{found.extents:,}",
        *(f"{each:.2f} s" for each in (found.took_s, found.cpu_s, found.stall_s)),
        f"{found.compact_s:.1f} s",
        f"{found.compact_stall_s:.2f} s",
        f"{found.used_bytes / MIB:,.0f} MiB",
        *(f"{each:.4f}" for each in (found.over_newest, found.over_oldest)),
    )
    return f"| {' | '.join(cells)} |"


@contextlib.contextmanager
def volume(kind: str, size_bytes: int, keep: int, above: int) -> Iterator[tuple[Volume, Feeler]]:
    with mounted(kind, 5 * size_bytes) as place:
        made = Volume(place, size_bytes, keep, above)
        feeler = Feeler(made.replica.path)
        try:
            yield made, feeler
        finally:
            feeler.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="xfs", choices=["xfs", "btrfs", "btrfs-compressed"])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--above", type=int, default=SEAMS_MAX, help="compact above so many extents")
    parser.add_argument("--only", choices=["without", "with"])
    asked = parser.parse_args()
    for compacting in (False, True):
        if asked.only and (asked.only == "with") is not compacting:
            continue
        what = f"with compacting above {asked.above:,}" if compacting else "without compacting"
        print(f"\n{asked.kind}, {asked.mib} MiB, {what}\n\n{HEAD}", flush=True)
        seen = []
        with volume(asked.kind, asked.mib * MIB, asked.keep, asked.above) as (made, feeler):
            for number in range(1, asked.cycles + 1):
                seen.append(made.cycle(feeler, compacting=compacting))
                if number % SHOWN_EVERY == 0 or number == 1:
                    print(row(str(number), seen[-1]), flush=True)
        worst = Cycle(*(max(getattr(each, name) for each in seen) for name in Cycle.__dataclass_fields__))
        print(row("most", worst), flush=True)


if __name__ == "__main__":
    main()
