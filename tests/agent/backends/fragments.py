"""Images that scattered writes have torn, and what must be the same after they were put together."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

from agent.backends.image_compact import PART_BYTES
from agent.backends.image_copy import differing
from agent.delta import DeltaRange
from agent.disk.places import seams_by_part
from tests.agent.backends.replica import BLOCK, Replica, digest, noise

SIZE = 2 * PART_BYTES + 3 * BLOCK + 1000
SEAMS_MAX = 300


def fresh(path: Path) -> Path:
    path.mkdir()
    return path


def made(directory: Path, step=lambda _name: None) -> Replica:
    return Replica(directory, seams_max=SEAMS_MAX, step=step)


def torn(directory: Path, cycles: int = 4) -> Replica:
    """An image with data, holes and scattered rewrites between consistency points, some of them back to what was."""
    replica = made(directory)
    replica.create(size=SIZE, data=0)
    chance = random.Random(7)
    replica.write(0, noise(1, PART_BYTES + 500_000))
    replica.write(SIZE - 300_000, noise(2, 300_000))
    replica.snapshot()
    for cycle in range(cycles):
        for _ in range(120):
            at = chance.randrange(SIZE // BLOCK)
            replica.write(at * BLOCK, noise(cycle * 1000 + at, BLOCK))
        replica.punch(chance.randrange(SIZE // BLOCK) * BLOCK, 3 * BLOCK)
        replica.snapshot()
    return replica


def seams(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return int(seams_by_part(fd, PART_BYTES).sum())
    finally:
        os.close(fd)


def files(replica: Replica) -> list[Path]:
    """Everything that shares blocks with the live copy."""
    paths = [replica.path, *sorted(replica.root.glob("**/data")), *replica.root.glob(".spare-*")]
    return [path for path in paths if path.exists()]


class Picture:
    """What every file holds, its times, and what differs between any two of them."""

    def __init__(self, replica: Replica) -> None:
        paths = files(replica)
        self.digests = {path: digest(path) for path in paths}
        self.times = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in paths}
        self.deltas = {pair: delta(*pair) for pair in itertools.permutations(paths, 2)}


def delta(base: Path, target: Path) -> list[DeltaRange]:
    with base.open("rb") as old, target.open("rb") as new:
        return list(differing(old.fileno(), new.fileno()))


def compact(replica: Replica, limit: int = 100) -> None:
    """Until there is no more to do."""
    for _turn in range(limit):
        if not replica.backend.compact(lambda: False):
            return
    raise AssertionError("it does not come to an end")


def used(place: Path) -> int:
    os.sync()
    stat = os.statvfs(place)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


def check_same(replica: Replica, before: Picture) -> None:
    after = Picture(replica)
    assert after.digests == before.digests
    assert after.deltas == before.deltas
    assert after.times == before.times
