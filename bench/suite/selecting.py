"""Selecting: what finding the changed ranges costs, in an image and in one of sixteen times its size.

Both images hold the same data in stripes, one beside the other in the first and far apart in the second, with holes
between; the same blocks of that data are changed in both. So both have the same extents and the same changed ranges,
and only what is not there differs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.suite import data
from bench.suite.data import BLOCK, GIB, MIB
from bench.suite.measure import Used
from bench.suite.ours import Replica
from bench.suite.workers import Worker, answer, orders

STRIPE_BYTES: Final = 4 * MIB
FACTOR: Final = 16
_MODULE: Final = "bench.suite.selecting"


class Selecting:
    """As a competitor: `delta_map` of one image, in a process that has started."""

    how = "`ImageBackend.delta_map(base, goal)` in a process that has started"

    def __init__(self, replica: Replica, size_bytes: int, count: int, *, cold: bool) -> None:
        self.name = f"{data.amount(size_bytes)}, {'cold' if cold else 'warm'}"
        self.cold = cold
        self._replica, self._count = replica, count
        self._worker: Worker | None = None

    def missing(self) -> str:
        return ""

    def before(self) -> None:
        self._worker = Worker(_MODULE, "select")
        self._worker.tell(directory=str(self._replica.directory))

    def settle(self) -> None:
        """Once for nothing, so that the program itself is in memory in both cases."""
        assert self._worker is not None
        self._worker.tell(base="base", goal="goal")
        if self.cold:
            data.drop_caches()

    def run(self) -> Used:
        assert self._worker is not None
        before = self._worker.cpu_s
        told = self._worker.tell(base="base", goal="goal")
        if told["ranges"] != self._count or told["bytes"] != self._count * BLOCK:
            raise AssertionError(f"{self.name}: {told}, and {self._count} blocks were changed")
        used = self._worker.cpu_s - before
        return Used(used, self._worker.peak_bytes, wire_bytes=0, time_s=told["select_s"])

    def result(self) -> None:
        return None

    def after(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def spread(offset: int, factor: int) -> int:
    """Where a byte of the data lies in an image that is so many times as large."""
    stripe, within = divmod(offset, STRIPE_BYTES)
    return stripe * factor * STRIPE_BYTES + within


def make(directory: Path, data_bytes: int, factor: int, offsets: Sequence[int]) -> Replica:
    """A volume with that much data, and snapshots before and after the change."""
    directory.mkdir()
    replica = Replica(directory)
    noise = os.urandom(min(STRIPE_BYTES, data_bytes))
    fd = os.open(replica.live, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.ftruncate(fd, data_bytes * factor)
        for at in range(0, data_bytes, len(noise)):
            os.pwrite(fd, noise, spread(at, factor))
        os.fsync(fd)
    finally:
        os.close(fd)
    replica.snapshot("base", 1)
    data.change(replica.live, [spread(offset, factor) for offset in offsets], seed=7)
    replica.snapshot("goal", 2, "base")
    return replica


def changed_count(data_bytes: int) -> int:
    """Ten thousand in 4 GiB, which cut it into twice as many extents; of smaller images as large a share."""
    return max(1, 10_000 * data_bytes // (4 * GIB))


def select() -> None:
    """Answers how long it took to find the ranges, and what they are in sum."""
    replica = Replica(Path())
    for order in orders():
        if "directory" in order:
            replica = Replica(Path(order["directory"]))
            answer()
            continue
        backend = replica.backend
        begun = time.perf_counter()
        found = backend.delta_map(order["base"], order["goal"])
        took = time.perf_counter() - begun
        answer(select_s=took, ranges=len(found), bytes=found.data_bytes)


if __name__ == "__main__":
    {"select": select}[sys.argv[1]]()
