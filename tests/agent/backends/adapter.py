"""What a kind of backend must show the conformance suite: its file systems, and what a user can do to a replica.

The suite in `conformance/` runs every test against each entry of `registry.KINDS`. It knows a backend only by the
Protocol of `agent/backends/base.py`; everything that happens to a replica from outside (a program writes, somebody has
it open, the disk fills up), and every look at its contents, goes through these classes. So an adapter must never use
the backend that it is about: contents are read by an independent route, debris is found by looking at the disk.

================  ===================================================================================================
`Kind`            one backend on one sort of ground: `image` on XFS and `image` on ext4 are two kinds
`Ground`          the file systems or pools of a kind, a separate one for each node, kept for the session
`Place`           what one test has of a ground: replicas of nodes ``a``, ``b``, ``c`` that no other test shares
`Replica`         one node's replica; `BlockReplica` and `TreeReplica` are what the two shapes have in common
================  ===================================================================================================

To add a kind: write `kinds/<name>.py` with these four, and add it to `registry.py`. A block backend derives from
`BlockReplica` and says how bytes are read and written. A stream backend derives from `TreeReplica` and says at which
path a live copy, a snapshot or a preserved copy can be walked; the trees and their comparison are in `tree.py`.

What the suite takes for granted:

* `again()` is a restart of the agent: another backend on the same data, with nothing remembered. Its options are the
  backend's own: `step`, `reserve_ratio`, `reserve_min_bytes`, `preserved_max_count`, `preserved_max_bytes`.
  Without options a test's backend has no reserve and keeps 64 preserved copies.
* `create(seed)` and the other changes do what the seed says, and are on the disk when they return. Times may differ.
* `contents()` values of two replicas are equal if, and only if, a user could not tell the two apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from agent.backends.base import AnyStage, CommitOrder, NewSnapshot
from agent.delta import DeltaRange
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.volume import LiveState, PreservedCopy
from tests.agent.backends import tree
from tests.agent.backends.transfer import open_stage, transfer

VOLUME_ID = "0b6a3c1e-0000-4000-8000-000000000001"

LIVE: None = None
Of = str | PreservedCopy | None
"""What contents are asked of: a snapshot's id, a preserved copy, or the live copy (LIVE)."""


@dataclass(frozen=True)
class Use:
    """One way in which somebody has a live copy in use. `hold` yields what must be found in the user's name.

    `writes`: the live copy may be changed through it, so that it counts as modified.
    """

    name: str
    hold: Callable[[Any], contextlib.AbstractContextManager[str]]
    writes: bool


class Kind(ABC):
    """One backend on one sort of ground. The class attributes say what is known of it."""

    name: str
    """In the tests' ids, such as ``image-xfs``."""
    shape: Literal["blocks", "stream"]
    steps: tuple[str, ...]
    """All names that the backend calls `step` with: each is killed at, and none is missing."""
    decides: Mapping[str, str | tuple[str, ...]] = {}
    """For ``snapshot`` and ``commit``: the step from which on a crash leaves the new state, where it can be told.

    Several, if not every commit takes each: the first of them that it takes.
    """
    alike: str = ""
    """Another kind that differs only in how contents are compared: left out where that makes no difference."""
    shares: bool = True
    """Snapshots share what they have in common, so that one costs no space."""
    maps_differences: bool = False
    """A delta map names what differs, and never what was written with the bytes that had been there."""
    odd_name: str = "Büro №1, data"
    """A volume's name with everything in it that the file system's names can have."""
    uses: tuple[Use, ...] = ()
    may_be_absent: bool = False
    """The path may be empty between two steps of a commit, until `recover`: the exchange takes two commands."""
    outlives_live: bool = True
    """Snapshots are still there when somebody has removed the live copy."""
    stands_alone: bool = True
    """A snapshot needs no live copy: else one goes with the live copy it is of, and a preserved copy pins its base."""
    full_size_bytes: int = 320 << 20
    """The size of a ground that a test fills up."""
    by_calls: bool = True
    """What the backend does to the disk is done by calls of its own or of its commands, under `Replica.directory`: not
    by a service that is shared with others.
    """
    looks_when_full: bool = True
    """Whether the contents of a replica can be told while its disk is full."""
    slow: bool = False
    """Making a replica takes seconds: a test that kills at every step goes on with the one that it has recovered."""

    @abstractmethod
    def available(self) -> str:
        """Why this kind cannot be had on this machine, in words; empty if it can."""

    @abstractmethod
    def ground(self, size_bytes: int = 0) -> contextlib.AbstractContextManager[Ground]:
        """Makes the file systems; `size_bytes`: of one node's, if it matters. All is undone at the end."""

    def __str__(self) -> str:
        return self.name


class Ground(ABC):
    """The file systems or pools of a kind."""

    @abstractmethod
    def place(self) -> contextlib.AbstractContextManager[Place]:
        """A part of it for one test; removed at its end, with everything in it. Stages are closed before."""

    @abstractmethod
    def fill(self, node: str) -> None:
        """Takes all that is free on a node's file system, as some other program would; again takes the rest."""

    @abstractmethod
    def make_room(self, node: str) -> None:
        """Gives back what `fill` took; nothing if it took nothing."""


class Place(ABC):
    """Replicas that no other test shares. `directory` is empty, and on no file system under test."""

    kind: Kind

    @abstractmethod
    def replica(self, node: str, name: str = "vm1", **options: Any) -> Replica:
        """The replica of that name on a node; there is no live copy before `create` or a commit."""

    @abstractmethod
    def without_disk(self) -> contextlib.AbstractContextManager[Replica]:
        """A replica whose file system or pool is not there: never mounted, or not imported."""


class Replica(ABC):
    """One node's replica of a volume."""

    kind: Kind
    node: str
    name: str
    volume_id: str
    root: Path
    """Where its records stand."""
    directory: Path
    """What has all of it, if its kind is `by_calls`."""
    backend: Any
    """The backend under test. Its type is `Backend`, but tests use what their shape has."""

    # What happens from outside. Each kind says how.

    @abstractmethod
    def again(self, **options: Any) -> Any:
        """The same replica after a restart of the agent."""

    @abstractmethod
    def create(self, seed: int = 1) -> None:
        """Makes the live copy, of about a MiB of data; another seed makes something altogether different."""

    @abstractmethod
    def edit(self, seed: int) -> None:
        """A small change of the live copy, at most 64 KiB, at a place of its own for seeds 0 to 15."""

    @abstractmethod
    def change(self, seed: int) -> None:
        """Changes all over the live copy, in every way that its users have."""

    @abstractmethod
    def contents(self, of: Of = LIVE) -> str | None:
        """What is there, as a value to compare; None if nothing is. Never through the backend."""

    @abstractmethod
    def remove_live(self) -> None:
        """Somebody removes the live copy."""

    @abstractmethod
    def lose(self, snapshot_id: str) -> None:
        """Somebody removes a snapshot's data with the file system's own tools, and leaves whatever record there is."""

    @abstractmethod
    def tamper(self, snapshot_id: str) -> None:
        """Somebody changes a little of a snapshot, with the file system's own tools, and leaves it where it is."""

    @abstractmethod
    def stranger(self) -> Callable[[], None]:
        """Another program makes a snapshot its own way, where ours are or beside them.

        Answers a check that it is as it was: still there, by its name, with its contents.
        """

    @abstractmethod
    def traces(self) -> list[str]:
        """By looking: all that there is of this replica, by name, and which of all live copies is in its place."""

    @abstractmethod
    def litter(self) -> None:
        """Leaves what a kill in the middle of work would leave."""

    @abstractmethod
    def debris(self) -> list[str]:
        """By looking at the disk: what belongs to no live copy, snapshot, preserved copy or whole stage."""

    def export_path(self, name: str) -> Path:
        """Where an export of that name can go."""
        return self.export_directory / name

    @property
    @abstractmethod
    def export_directory(self) -> Path:
        """An existing directory for exports."""

    @abstractmethod
    def exported(self, path: Path) -> str:
        """The contents of an export, as `contents` would tell them."""

    # What the agent does.

    @property
    def lineage(self) -> Lineage:
        return self.backend.examine(compare_live=False).lineage

    @property
    def tip(self) -> Snapshot:
        tip = self.lineage.tip
        assert tip is not None
        return tip

    @property
    def state(self) -> LiveState:
        return self.backend.examine().live.state

    @property
    def preserved(self) -> tuple[PreservedCopy, ...]:
        return self.backend.examine(compare_live=False).preserved

    def snapshot(self, note: str = "", epoch: int = 1) -> Snapshot:
        return self.backend.take_snapshot(self.new_snapshot(note, epoch))

    def new_snapshot(self, note: str = "", epoch: int = 1) -> NewSnapshot:
        """What the agent would ask for: the child of the tip."""
        tip = self.lineage.tip
        sequence = tip.cp.sequence + 1 if tip else 1
        return NewSnapshot(
            id=str(uuid.uuid4()),
            volume_id=self.volume_id,
            cp=ConsistencyPoint(epoch, sequence),
            parent=tip.id if tip else "",
            epoch_id="e",
            create_time_ms=1,
            note=note,
        )

    def order(self, lineage: Lineage, **options: Any) -> CommitOrder:
        options.setdefault("expected_tip", self.lineage.tip_id)
        options.setdefault("resync_id", "r1")
        return CommitOrder(volume_id=self.volume_id, lineage=lineage, **options)

    def fill(self, source: Any, base: str, target: Snapshot) -> AnyStage:
        """A stage that has become the target: all that the source tells has travelled, but without the wire."""
        stage = open_stage(self, source, base, target)
        try:
            if base != target.id:
                transfer(source, self, stage)
        except BaseException:
            stage.close()
            raise
        return stage

    def receive(self, source: Any, base: str = "", **options: Any) -> tuple[PreservedCopy, ...]:
        """Brings this replica to the source's tip."""
        lineage = source.lineage
        stage = self.fill(source, base, lineage.tip)
        try:
            return self.backend.commit(stage, self.order(lineage, **options))
        finally:
            stage.close()


# What the two shapes have in common.

BLOCK = 4096
SIZE = 4 << 20


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def text(seed: int, length: int) -> bytes:
    """Bytes that a file system compresses."""
    return (f"line {seed} of something that repeats itself\n".encode() * (length // 30 + 1))[:length]


def blocks_of(ranges: list[DeltaRange], block: int = BLOCK) -> set[int]:
    return {number for row in ranges for number in range(row.offset // block, -(-(row.offset + row.length) // block))}


class BlockReplica(Replica):
    """A replica whose live copy is one stretch of bytes."""

    block: ClassVar[int] = BLOCK
    """What the delta map counts in."""

    @abstractmethod
    def write(self, offset: int, data: bytes) -> None: ...

    @abstractmethod
    def punch(self, offset: int, length: int) -> None:
        """Makes a hole of whole blocks within it, as far as there is a way to."""

    @abstractmethod
    def resize(self, size: int) -> None: ...

    @abstractmethod
    def raw(self, of: Of = LIVE) -> bytes | None:
        """All bytes of what is there, None if nothing is."""

    def contents(self, of: Of = LIVE) -> str | None:
        raw = self.raw(of)
        return None if raw is None else self.digest(raw)

    @staticmethod
    def digest(raw: bytes) -> str:
        return f"{len(raw)} {hashlib.sha256(raw).hexdigest()}"

    def edit(self, seed: int) -> None:
        self.write((seed % 16) * (SIZE // 16) + 1000 + seed, noise(seed, 5000))

    def change(self, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(12):
            at = chance.randrange(0, SIZE - 20_000)
            what = chance.randrange(4)
            if what == 0:
                self.punch(at, chance.randrange(1, 20_000))
            else:
                self.write(at, chance.choice([noise, text])(at + seed, chance.randrange(1, 20_000)))


class TreeReplica(Replica):
    """A replica whose live copy is a file system's tree."""

    features: ClassVar[frozenset[str]] = tree.ALL
    """What of `tree.ALL` the file system can hold."""

    @abstractmethod
    def walked(self, of: Of = LIVE) -> contextlib.AbstractContextManager[Path | None]:
        """A path at which it can be walked, writable for LIVE; None if there is nothing. Leaves nothing mounted."""

    @abstractmethod
    def make_live(self) -> None:
        """Makes an empty live copy."""

    def sync(self) -> None:
        """Returns when what was written to the live copy is on the disk."""

    def create(self, seed: int = 1) -> None:
        self.make_live()
        self.on_live(lambda path: tree.create(path, seed, self.features))

    def edit(self, seed: int) -> None:
        self.on_live(lambda path: tree.edit(path, seed))

    def change(self, seed: int) -> None:
        self.on_live(lambda path: tree.change(path, seed, self.features))

    def on_live(self, work: Callable[[Path], None]) -> None:
        with self.walked() as path:
            assert path is not None, "there is no live copy"
            work(path)
        self.sync()

    def contents(self, of: Of = LIVE) -> str | None:
        with self.walked(of) as path:
            return None if path is None else tree.manifest(path)
