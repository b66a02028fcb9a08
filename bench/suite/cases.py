"""The cases: what is made for each, who takes part, and what is looked at."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.suite import data, limit, others
from bench.suite.command import DeltaCommand, FirstCommand
from bench.suite.data import BLOCK, GIB, MIB, Disk, Images
from bench.suite.measure import Arena, Competitor, Entry, compete
from bench.suite.ours import Ours, Replica

CHANGED_SHARE: Final = 0.01


@dataclass(frozen=True)
class Asked:
    """What the command line wants."""

    image_bytes: int
    rounds: int
    place: Path
    say: Callable[[str], None]
    without: frozenset[str] = frozenset()
    """Words of competitors' names that are left out: the page says so."""


@dataclass
class Case:
    """What one case has found, as it goes into the JSON."""

    name: str
    title: str
    about: str
    changed_bytes: int
    entries: list[Entry] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return asdict(self)


class LeftOut:
    """A competitor that was not wanted this time."""

    def __init__(self, one: Competitor) -> None:
        self._one, self.name, self.how = one, one.name, one.how

    def missing(self) -> str:
        return "left out by --without"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._one, name)


def wanted(asked: Asked, field_of: list[Any]) -> list[Any]:
    return [LeftOut(one) if any(word in one.name for word in asked.without) else one for one in field_of]


@contextlib.contextmanager
def workplace(asked: Asked) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="resilver-bench-", dir=asked.place) as made:
        yield Path(made)


def delta(asked: Asked) -> Case:
    """One per cent in scattered blocks, cold, from one disk to another."""
    count = max(1, int(asked.image_bytes * CHANGED_SHARE) // BLOCK)
    case = Case(
        "delta",
        "A delta, cold",
        f"1 % of {asked.image_bytes / GIB:g} GiB of incompressible data changed in {count:,} scattered blocks of "
        "4 KiB; caches dropped before each run; from one XFS (for Btrfs: one Btrfs) to another, each on a loop device; "
        "the target's file system is synced within the time.",
        count * BLOCK,
    )
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(workplace(asked))
        size = 4 * asked.image_bytes
        source, target = (stack.enter_context(data.disk(work, name, "xfs", size)) for name in ("source", "target"))
        asked.say("  making the image, its change, and its copies")
        there, here, images = replicas(source, target, asked.image_bytes, count)
        field_of: list[Any] = [*ours_and_limit(work, there, here, images, target)]
        field_of.append(DeltaCommand(work, {"a": source.point / "a", "b": target.point / "b"}, images))
        base = here.data("base")
        kinds = (others.RsyncLocal, others.RsyncDaemon, others.Casync, others.Bdsync)
        field_of.extend(kind(images.after, base, target.point / "copy") for kind in kinds)
        disks, synced = [source, target], {}
        if not any(word in others.BtrfsSend.name for word in asked.without):
            pair = [stack.enter_context(data.disk(work, name, "btrfs", size)) for name in ("btrfs-1", "btrfs-2")]
            field_of.append(stack.enter_context(others.subvolumes(pair[0], pair[1], images)))
            disks += pair
            synced[others.BtrfsSend.name] = pair[1]
        if not any(word in others.ZfsSend.name for word in asked.without):
            field_of.append(stack.enter_context(others.datasets(images, max(size // 2, data.POOL_BYTES_MIN))))
        arena = Arena(
            disks,
            target=lambda one: synced.get(one.name, target),
            settle=data.drop_caches,
            differs=lambda result: data.differing(images.after, result, images.ranges),
        )
        case.entries = compete(wanted(asked, field_of), arena, asked.rounds, asked.say)
    return case


def replicas(source: Disk, target: Disk, size_bytes: int, count: int) -> tuple[Replica, Replica, Images]:
    """A volume on both disks with a snapshot `base`, and on the first one `goal` with the change."""
    there, here = Replica(source.point / "ours"), Replica(target.point / "ours")
    for replica in (there, here):
        replica.directory.mkdir()
    data.fill(there.live, size_bytes)
    data.run("cp", there.live, here.live)
    before = there.snapshot("base", 1)
    here.snapshot("base", 1)
    offsets = data.scattered(size_bytes, count, seed=5)
    data.change(there.live, offsets, seed=6)
    return there, here, Images(before, there.snapshot("goal", 2, "base"), offsets)


def ours_and_limit(work: Path, there: Replica, here: Replica, images: Images, target: Disk) -> tuple[Any, Any]:
    """Both are told the same ranges: those that the backend finds, which are those that were changed."""
    found = there.backend.delta_map("base", "goal")
    if found.data_bytes != len(images.offsets) * BLOCK or not np.array_equal(found.offsets, np.array(images.offsets)):
        raise AssertionError(f"the delta map has {found.data_bytes} bytes in {len(found)} ranges")
    ranges = work / "ranges.npy"
    limit.save_ranges(ranges, found.offsets, found.lengths)
    return (
        limit.Limit(images.after, here.data("base"), target.point / "by-the-limit", ranges),
        Ours(there, here, "base", "goal", ranges),
    )


def first_copy(asked: Asked) -> Case:
    """All of an image that is in memory, to a file system in memory."""
    case = Case(
        "first-copy",
        "A first copy, warm, to memory",
        f"{asked.image_bytes / GIB:g} GiB of incompressible data, read into the cache before each run, from XFS on a "
        "loop device to a tmpfs, where a sync costs nothing.",
        asked.image_bytes,
    )
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(workplace(asked))
        source = stack.enter_context(data.disk(work, "source", "xfs", 4 * asked.image_bytes))
        target = stack.enter_context(data.memory(work, "target", 3 * asked.image_bytes + 64 * MIB))
        asked.say("  making the image")
        there, here = Replica(source.point / "ours"), Replica(target.point / "ours")
        for replica in (there, here):
            replica.directory.mkdir()
        data.fill(there.live, asked.image_bytes)
        image = there.snapshot("goal", 1)
        found = there.backend.delta_map("", "goal")
        ranges = work / "ranges.npy"
        limit.save_ranges(ranges, found.offsets, found.lengths)
        copy = target.point / "copy"
        field_of: list[Any] = [
            limit.Limit(image, None, copy, ranges),
            Ours(there, here, "", "goal", ranges),
            FirstCommand(work, {"a": source.point / "a", "b": target.point / "b"}, image),
            *(kind(image, None, copy) for kind in (others.Nbdcopy, others.QemuImg, others.RsyncWhole, others.Copy)),
        ]
        arena = Arena(
            [source],
            target=lambda _one: target,
            settle=lambda: data.warm(image),
            differs=lambda result: data.differing(image, result, [(0, asked.image_bytes)]),
        )
        case.entries = compete(wanted(asked, field_of), arena, asked.rounds, asked.say)
    return case


CASES: Final[dict[str, Callable[[Asked], Case]]] = {"delta": delta, "first-copy": first_copy}
