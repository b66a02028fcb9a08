"""The cases: what is made for each, who takes part, and what is looked at."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from agent.backends.image_copy import opened
from agent.disk import ioctl
from bench.suite import data, limit, others, trouble
from bench.suite.bars import ONE, ONE_DIES, TWO
from bench.suite.command import DeltaCommand, FirstCommand
from bench.suite.data import BLOCK, GIB, KIB, MIB, Disk, Images
from bench.suite.measure import Arena, Competitor, Entry, compete
from bench.suite.ours import Ours, Replica
from bench.suite.selecting import FACTOR, Selecting, changed_count, make

CHANGED_SHARE: Final = 0.01
STORY_ROUNDS: Final = 3
MEMORY_OF_IMAGE: Final = 4
"""Images for which there must be memory: the source's cache, a snapshot and a live copy at the target, and room."""


@dataclass(frozen=True)
class Asked:
    """What the command line wants."""

    image_bytes: int
    rounds: int
    place: Path
    say: Callable[[str], None]
    who: tuple[str, ...] = ()
    """Words of competitors' names: if there are any, the others are left out, and the page says so."""
    without: tuple[str, ...] = ()
    """Words of names that are left out in any case."""

    direct: bool = False
    """Whether loop devices go past the cache of the file system below them."""

    def disk(self, work: Path, name: str, kind: str, size_bytes: int) -> AbstractContextManager[Disk]:
        return data.disk(work, name, kind, size_bytes, direct=self.direct)

    def wants(self, name: str) -> bool:
        named = not self.who or any(word in name for word in self.who)
        return named and not any(word in name for word in self.without)


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
        return "left out by whoever asked for this run"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._one, name)


def wanted(asked: Asked, field_of: list[Any]) -> list[Any]:
    return [one if asked.wants(one.name) else LeftOut(one) for one in field_of]


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
        f"1 % of {data.amount(asked.image_bytes)} of incompressible data changed in {count:,} scattered blocks of "
        "4 KiB; caches dropped before each run; from one XFS (for Btrfs: one Btrfs) to another, each on a loop device; "
        "the target's file system is synced within the time.",
        count * BLOCK,
    )
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(workplace(asked))
        size = 8 * asked.image_bytes
        source, target = (stack.enter_context(asked.disk(work, name, "xfs", size)) for name in ("source", "target"))
        asked.say("  making the image, its change, and its copies")
        there, here, images = replicas(source, target, asked.image_bytes, count)
        field_of: list[Any] = [*ours_and_limit(work, there, here, images, target)]
        field_of.append(DeltaCommand(work, {"a": source.point / "a", "b": target.point / "b"}, images))
        base = here.data("base")
        kinds = (others.RsyncLocal, others.RsyncDaemon, others.Casync, others.Bdsync)
        field_of.extend(kind(images.after, base, target.point / "copy") for kind in kinds)
        disks, synced = [source, target], {}
        if asked.wants(others.BtrfsSend.name):
            pair = [stack.enter_context(asked.disk(work, name, "btrfs", size)) for name in ("btrfs-1", "btrfs-2")]
            field_of.append(stack.enter_context(others.subvolumes(pair[0], pair[1], images)))
            disks += pair
            synced[others.BtrfsSend.name] = pair[1]
        if asked.wants(others.ZfsSend.name):
            field_of.append(stack.enter_context(others.datasets(work, images, max(size // 4, data.POOL_BYTES_MIN))))
        arena = Arena(
            disks,
            target=lambda one: synced.get(one.name, target),
            settle=lambda _one: data.drop_caches(),
            differs=lambda result: data.differing(images.after, result, images.ranges),
        )
        case.entries = compete(wanted(asked, field_of), arena, asked.rounds, asked.say, warm_up=True)
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


def newcomer(work: Path, source: Disk, target: Disk, size_bytes: int) -> tuple[Replica, Replica, Path, Path]:
    """A volume on the one disk with a snapshot `goal`, and nothing on the other; its image, and its ranges."""
    there, here = Replica(source.point / "ours"), Replica(target.point / "ours")
    for replica in (there, here):
        replica.directory.mkdir()
    data.fill(there.live, size_bytes)
    image = there.snapshot("goal", 1)
    found = there.backend.delta_map("", "goal")
    ranges = work / "ranges.npy"
    limit.save_ranges(ranges, found.offsets, found.lengths)
    return there, here, image, ranges


def first_copy(asked: Asked) -> Case:
    """All of an image that is in memory, to a file system in memory."""
    size = min(asked.image_bytes, data.memory_available_bytes() // MEMORY_OF_IMAGE // MIB * MIB)
    case = Case(
        "first-copy",
        "A first copy, warm, to memory",
        f"{data.amount(size)} of incompressible data, read into the cache before each run, from XFS on a "
        "loop device to a tmpfs, where a sync costs nothing.",
        size,
    )
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(workplace(asked))
        source = stack.enter_context(asked.disk(work, "source", "xfs", 4 * size))
        target = stack.enter_context(data.memory(work, "target", 3 * size + 64 * MIB))
        asked.say("  making the image")
        there, here, image, ranges = newcomer(work, source, target, size)
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
            settle=lambda _one: data.warm(image),
            differs=lambda result: data.differing(image, result, [(0, size)]),
        )
        case.entries = compete(wanted(asked, field_of), arena, asked.rounds, asked.say)
    return case


def selecting(asked: Asked) -> Case:
    """What finding the changed ranges costs."""
    count = changed_count(asked.image_bytes)
    offsets = data.scattered(asked.image_bytes, count, seed=8)
    case = Case(
        "selecting",
        "Selecting the changed ranges",
        f"An image on XFS with {data.amount(asked.image_bytes)} of data, in which {count:,} scattered blocks were "
        f"changed between two snapshots, and one of {FACTOR} times its size with the same data and the same changes; "
        "the second snapshot has two extents for each change. Cold: the caches were dropped.",
        count * BLOCK,
    )
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(workplace(asked))
        source = stack.enter_context(asked.disk(work, "source", "xfs", 4 * asked.image_bytes))
        asked.say("  making the images")
        made = [
            (factor, make(source.point / f"x{factor}", asked.image_bytes, factor, offsets)) for factor in (1, FACTOR)
        ]
        field_of = [
            Selecting(replica, asked.image_bytes * factor, count, cold=cold)
            for cold in (True, False)
            for factor, replica in made
        ]
        arena = Arena([source], target=lambda _one: source, settle=lambda one: one.settle(), differs=lambda _result: "")
        case.entries = compete(wanted(asked, field_of), arena, asked.rounds, asked.say)
        for (_, replica), name in zip(made, ("extents", "extents_of_large"), strict=True):
            with opened(replica.data("goal")) as fd:
                case.facts[name] = ioctl.extent_count(fd)
    return case


def killed(asked: Asked) -> Case:
    """The target is killed at half."""
    size = min(asked.image_bytes, GIB)
    case = Case(
        "killed",
        "The target is killed at half",
        f"A volume of {data.amount(size)} on a cluster of a coordinator and two agents, from one XFS to another. Once "
        "half of a delta has arrived the target is killed with SIGKILL and started again; it goes on where its journal "
        "ends. The source is capped, so that there is a half to wait for.",
        size // 4,
    )
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(workplace(asked))
        disks = [stack.enter_context(asked.disk(work, name, "xfs", 8 * size)) for name in ("source", "target")]
        asked.say("  making the cluster")
        places = {node: disk.point / node for node, disk in zip("ab", disks, strict=True)}
        stage = stack.enter_context(trouble.standing(work / "cluster", places, size, max(size // 20, MIB)))
        field_of = [
            trouble.Killed(f"killed, pieces of {piece // KIB} KiB", stage, case.changed_bytes, piece)
            for piece in (min(MIB, size // 8), 4 * KIB)
        ]
        arena = Arena(disks, target=lambda _one: disks[1], settle=_unsettled, differs=_alike)
        case.entries = compete(wanted(asked, field_of), arena, min(asked.rounds, STORY_ROUNDS), asked.say)
    return case


def sources(asked: Asked) -> Case:
    """Two sources that are capped, against one."""
    size = min(asked.image_bytes, GIB)
    cap = min(trouble.CAP_BYTES_S, size // 20)
    case = Case(
        "sources",
        "Two sources against one",
        f"A volume of {data.amount(size)} on a cluster of a coordinator and three agents, each of which sends at most "
        f"{cap / 1e6:g} MB/s; half of it has changed while the target was away. The rate is that of the middle part.",
        size // 2,
    )
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(workplace(asked))
        disks = [stack.enter_context(asked.disk(work, name, "xfs", 8 * size)) for name in ("first", "second", "target")]
        asked.say("  making the cluster")
        places = {node: disk.point / node for node, disk in zip("abc", disks, strict=True)}
        stage = stack.enter_context(trouble.standing(work / "cluster", places, size, cap))
        field_of = [
            trouble.Sourced(ONE, stage, case.changed_bytes, ("a",)),
            trouble.Sourced(TWO, stage, case.changed_bytes, ("a", "b")),
            trouble.Sourced(ONE_DIES, stage, case.changed_bytes, ("a", "b"), killed="b"),
        ]
        arena = Arena(disks, target=lambda _one: disks[2], settle=_unsettled, differs=_alike)
        case.entries = compete(wanted(asked, field_of), arena, min(asked.rounds, STORY_ROUNDS), asked.say)
    return case


def _unsettled(_one: object) -> None:
    """Neither cold nor warm: the caps decide."""


def _alike(_result: Path) -> str:
    """Stories compare by themselves."""
    return ""


CASES: Final[dict[str, Callable[[Asked], Case]]] = {
    "selecting": selecting,
    "delta": delta,
    "first-copy": first_copy,
    "killed": killed,
    "sources": sources,
}
