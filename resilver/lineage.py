"""Consistency points, snapshots and the order among lineages.

The rules, on which everything else stands:

* Equal id means equal bytes, on every node. Ids alone decide what two replicas have in common.
* A lineage is a chain of records from the tip backwards. Pruning removes data, never a record.
* One replica *contains* another if the other's tip is in its lineage. Sequence numbers never decide between
  lineages that do not contain each other.
* Snapshots that other tools made have no CP, and their parents are each node's own: two nodes may hold different ones
  of the same history. Where two lineages disagree about the order of what they share, neither is the newer one.
* A comparison answers with a value, or with a typed reason that holds both sides.

Pure: no I/O, no clock.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum

_CP = re.compile(r"(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})")


@dataclass(frozen=True, slots=True, order=True)
class ConsistencyPoint:
    """A moment at which the whole volume was consistent on disk; `0-0` for a snapshot adopted from another tool."""

    epoch: int = 0
    sequence: int = 0

    def __str__(self) -> str:
        return f"{self.epoch}-{self.sequence}"

    @classmethod
    def parse(cls, text: str) -> ConsistencyPoint:
        """Reads `"3-42"`; raises ValueError for anything else."""
        match = _CP.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no consistency point: it is written epoch-sequence, such as 3-42")
        return cls(int(match[1]), int(match[2]))


NO_CP = ConsistencyPoint()


class Consistency(Enum):
    """How a snapshot was taken."""

    CRASH = "crash"
    SYNCED = "synced"
    FROZEN = "frozen"
    CLOSED = "closed"


class Origin(Enum):
    """Who made a snapshot."""

    RESILVER = "resilver"
    ADOPTED = "adopted"
    PRESERVED = "preserved"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One record of a lineage. `present` is one node's: whether the data is still there.

    The `note` of an adopted one is the name that the other tool gave it.

    `create_time_ms` is Unix time; `parent` is empty for the first of a lineage. `group_id` is the same for snapshots of
    several volumes that were taken together, while all of them were held; empty for one that was taken alone.
    """

    id: str
    cp: ConsistencyPoint = NO_CP
    parent: str = ""
    present: bool = True
    epoch_id: str = ""
    create_time_ms: int = 0
    size_bytes: int = 0
    consistency: Consistency = Consistency.CRASH
    origin: Origin = Origin.RESILVER
    note: str = ""
    group_id: str = ""

    @property
    def name(self) -> str:
        """What to call it: its CP, or where it has none the name that another tool gave it, or its id."""
        return str(self.cp) if self.cp != NO_CP else self.note or self.id


@dataclass(frozen=True, slots=True)
class Lineage:
    """A chain of records, tip first; each record's parent is the id of the next one.

    Raises ValueError if the records form no chain or an id stands twice.
    """

    records: tuple[Snapshot, ...] = ()

    def __post_init__(self) -> None:
        ids = {record.id for record in self.records}
        if len(ids) != len(self.records):
            raise ValueError("a lineage holds the same snapshot id twice")
        for child, parent in zip(self.records, self.records[1:], strict=False):
            if child.parent != parent.id:
                raise ValueError(f"snapshot {child.id} names {child.parent} as its parent, but {parent.id} follows it")

    @classmethod
    def from_tip(cls, tip: str, known: Mapping[str, Snapshot]) -> Lineage:
        """Walks from the tip through `known` to the oldest record that is known. An unknown tip gives no lineage.

        Raises ValueError if the parents run in a circle.
        """
        records: list[Snapshot] = []
        seen: set[str] = set()
        at = tip
        while at in known:
            if at in seen:
                raise ValueError(f"the parents of snapshot {tip} run in a circle at {at}")
            seen.add(at)
            records.append(known[at])
            at = known[at].parent
        return cls(tuple(records))

    @property
    def tip(self) -> Snapshot | None:
        return self.records[0] if self.records else None

    @property
    def tip_id(self) -> str:
        """The tip's id, empty if there is none."""
        return self.records[0].id if self.records else ""

    @property
    def tip_name(self) -> str:
        """What to call the tip, `none` if there is none."""
        return self.records[0].name if self.records else "none"

    @property
    def cp(self) -> ConsistencyPoint:
        """The tip's CP, `0-0` if there is none."""
        return self.records[0].cp if self.records else NO_CP

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def ids(self) -> frozenset[str]:
        return frozenset(record.id for record in self.records)

    def find(self, snapshot_id: str) -> Snapshot | None:
        return next((record for record in self.records if record.id == snapshot_id), None)

    def contains(self, other: Lineage) -> bool:
        """Whether the other's tip is in this lineage; nothing is contained in every lineage."""
        return not other.records or self.find(other.tip_id) is not None

    def after(self, snapshot_id: str) -> tuple[Snapshot, ...]:
        """The records newer than the one named, tip first; all of them if it is not here."""
        newer: list[Snapshot] = []
        for record in self.records:
            if record.id == snapshot_id:
                break
            newer.append(record)
        return tuple(newer)

    def since(self, snapshot_id: str) -> Lineage:
        """The lineage as it was when that snapshot was its tip; empty if it is not here."""
        for index, record in enumerate(self.records):
            if record.id == snapshot_id:
                return Lineage(self.records[index:])
        return Lineage()

    def with_presence(self, present: Iterable[str]) -> Lineage:
        """The same chain as another node holds it: only the ids given are present."""
        there = frozenset(present)
        return Lineage(tuple(replace(record, present=record.id in there) for record in self.records))


class Relation(Enum):
    """What one lineage is to another."""

    EQUAL = "equal"
    BEHIND = "behind"
    AHEAD = "ahead"
    DIVERGED = "diverged"
    UNRELATED = "unrelated"


def newest_shared(mine: Lineage, theirs: Lineage) -> Snapshot | None:
    """The newest record that stands in both lineages, present or not: where they fork."""
    if mine.records and mine.tip_id == theirs.tip_id:
        return theirs.tip
    ids = mine.ids()
    return next((record for record in theirs if record.id in ids), None)


def relate(mine: Lineage, theirs: Lineage) -> Relation:
    """What `mine` is to `theirs`: BEHIND if my tip is in their lineage, and is the newest there that I have.

    They are DIVERGED if their orders of what they share disagree: that of adopted snapshots is each node's own.
    A lineage without records is EQUAL to another such, and BEHIND any other.
    """
    if mine.tip_id == theirs.tip_id:
        return Relation.EQUAL
    if not mine.records or not theirs.records:
        return Relation.AHEAD if mine.records else Relation.BEHIND
    there, here = newest_shared(mine, theirs), newest_shared(theirs, mine)
    if there is None or here is None:
        return Relation.UNRELATED
    if there.id == mine.tip_id:
        return Relation.BEHIND
    return Relation.AHEAD if here.id == theirs.tip_id else Relation.DIVERGED


@dataclass(frozen=True, slots=True)
class NothingInCommon:
    """The two lineages share no record."""

    mine: Lineage
    theirs: Lineage

    def __str__(self) -> str:
        return f"no snapshot in common: {_names(self.mine)} here, {_names(self.theirs)} there"


@dataclass(frozen=True, slots=True)
class BaseGone:
    """They share records, but none whose data both still have."""

    mine: Lineage
    theirs: Lineage
    newest_shared: Snapshot

    def __str__(self) -> str:
        shared = self.newest_shared.name
        return (
            f"the newest snapshot in common is {shared}, but its data, or that of any older one, is not on both sides: "
            f"{_names(self.mine)} here, {_names(self.theirs)} there"
        )


def newest_in_common(mine: Lineage, theirs: Lineage) -> Snapshot | NothingInCommon | BaseGone:
    """The newest snapshot that both lineages hold and whose data both still have, or why there is none."""
    shared = newest_shared(mine, theirs)
    if shared is None:
        return NothingInCommon(mine, theirs)
    if shared is theirs.tip and shared.present and mine.tip == shared:
        return shared
    here = {record.id for record in mine if record.present}
    for record in theirs:
        if record.present and record.id in here:
            return record
    return BaseGone(mine, theirs, shared)


def _names(lineage: Lineage) -> str:
    present = [record.name for record in lineage if record.present]
    if not present:
        return "nothing"
    return ", ".join(present[:8]) + (f" and {len(present) - 8} more" if len(present) > 8 else "")
