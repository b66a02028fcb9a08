"""Where a dataset's snapshots and records stand, and how the tip is found among them.

Beside the live copy `tank/vm1` stands `tank/vm1.resilver`, on the same pool and never mounted itself::

    tank/vm1@resilver-3-42-1a2b3c4d   a consistency point: its record is a property of the snapshot
    tank/vm1@…                        a snapshot of another tool: adopted below our first CP, only shown after it
    tank/vm1.resilver/records         what stands in files, mounted at the snapshot directory (0700)
        agent.json                    which agent it is that works here (`agent/disk/claim.py`)
        ancestry.jsonl                records and, of those whose snapshots were ever here, the guid
        tip.json                      the tip, in case that its snapshot is destroyed by somebody
        commit.json                   the intention of a commit that is under way
        aside.json                    where the live copy is to be mounted again once that is over
        stage/                        what is known of a stream that is being received, its journal and spool
        preserved/<pid>/              descriptions of preserved copies
        volume.json, grant.json       what the agent was told
    tank/vm1.resilver/stage           what a stream becomes, as a clone of its base, until its commit
    tank/vm1.resilver/kept-<pid>      live copies, with their snapshots, that were replaced

**A snapshot is a CP of ours** if it carries a record of its own (not one inherited from the file system) and its guid
is the one in the log. A snapshot that was destroyed and made again under the same name, with the same properties, has
another guid and is told as a problem, unless its record has long been left out of the log (`ancestry.py`). Between its
creation and its record a snapshot carries a mark, `resilver:taking`: with that and no record it is debris.
`@resilver-incoming` without a record is what a commit is about to verify.

**The tip** is the newest CP of the dataset, whose history is a line by nature. Only where the newest one there is an
ancestor of the tip that `tip.json` names has the tip's snapshot been destroyed by somebody.

**Adoption**: before our first CP the snapshots that other tools made are the lineage, by guid, in the order of the
dataset's own history. The first CP writes them into the log as they are then. They are never renamed, destroyed or
given properties; held they are only while they are being sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import msgspec

from agent.backends import image_layout
from agent.disk import zfs, zfs_mounts
from agent.disk.durable import read_json, read_log, write_json
from agent.lineages import record_from_json, record_to_json
from agent.stored import checked, typed, understood
from resilver.errors import Damaged, Invalid, Refused
from resilver.lineage import Lineage, Origin, Snapshot

RECORD: Final = "resilver:record"
TAKING: Final = "resilver:taking"
OWNER: Final = "resilver:volume"
WAS_READONLY: Final = "resilver:readonly-was"
WAS_CANMOUNT: Final = "resilver:canmount-was"
TAG: Final = "resilver"
SEND_TAG: Final = "resilver-send"
OURS: Final = "resilver-"
INCOMING: Final = "resilver-incoming"
_RECORD_BYTES_MAX: Final = 1000  # zfs-fuse takes 1024


READING: Final = frozenset({"get", "list", "holds", "send", "diff"})
"""Commands of `zfs` that change nothing."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The names and paths of one replica. `live` is the dataset, `files` the paths that image volumes have too,
    `state_dir` that of the agent that works here.
    """

    volume: str
    live: str
    files: image_layout.Layout
    state_dir: Path | None = None

    @property
    def root(self) -> Path:
        return self.files.root

    @property
    def pool(self) -> str:
        return zfs.pool_of(self.live)

    @property
    def parent(self) -> str:
        return self.live.rpartition("/")[0]

    @property
    def group(self) -> str:
        return f"{self.live}.resilver"

    @property
    def records(self) -> str:
        return f"{self.group}/records"

    @property
    def stage(self) -> str:
        return f"{self.group}/stage"

    @property
    def pointer(self) -> Path:
        return self.root / "tip.json"

    @property
    def aside(self) -> Path:
        return self.root / "aside.json"

    def concerns(self, program: str, arguments: list[str]) -> bool:
        """Whether a command changes something of this replica, or of where it is mounted."""
        match program:
            case "zfs":
                words = arguments[1:] if arguments[:1] and arguments[0] not in READING else []
            case "mount" | "umount":
                words = arguments
            case "sh":
                words = arguments if zfs_mounts.MOUNT_AND_UNMOUNT in arguments else []
            case _:
                return False
        names = {word.partition("@")[0] for word in words}
        return any(name in {self.live, self.group} or name.startswith(f"{self.group}/") for name in names)

    def kept(self, pid: str) -> str:
        return f"{self.group}/kept-{pid}"

    def name_of(self, record: Snapshot) -> str:
        """The snapshot's part of the name: ours, or for another tool's snapshot that tool's."""
        if record.origin is Origin.ADOPTED and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _.:-]{0,127}", record.note):
            return record.note
        return f"{OURS}{record.cp}-{re.sub('[^A-Za-z0-9]', '', record.id)[:12]}"


@dataclass(frozen=True, slots=True)
class State:
    """What is there. `head` is the live copy, `where` the snapshots of the lineage by id, `every` all, oldest first."""

    lineage: Lineage
    volume_id: str
    known: Mapping[str, Snapshot]
    natives: Mapping[str, str]
    head: zfs.Dataset | None = None
    where: Mapping[str, zfs.Dataset] = field(default_factory=dict)
    every: tuple[zfs.Dataset, ...] = ()
    others: tuple[Snapshot, ...] = ()
    unfinished: tuple[zfs.Dataset, ...] = ()
    children: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def tip(self) -> str:
        return self.lineage.tip_id

    def is_ours(self, snapshot_id: str) -> bool:
        record = self.known.get(snapshot_id)
        return record is not None and record.origin is not Origin.ADOPTED


def make_layout(volume: str, path: Path, root: Path, state_dir: Path | None = None) -> Layout:
    return Layout(volume, str(path), image_layout.Layout(volume, root / "live", root), state_dir)


# Records.


def record_property(record: Snapshot, volume_id: str) -> str:
    """The record as a property's value. A note that is too long is cut: it is whole in the log."""
    note = record.note
    while True:
        value = {**record_to_json(replace(record, note=note)), "volume_id": volume_id}
        text = json.dumps(value, separators=(",", ":"), sort_keys=True)
        if len(text) <= _RECORD_BYTES_MAX or not note:
            return text
        note = note[: len(note) // 2]


def read_record(text: str) -> tuple[Snapshot, str] | None:
    """The record in a property, and its volume_id; None if it is none."""
    try:
        value = json.loads(text)
        return record_from_json(value), msgspec.convert(checked(value["volume_id"], "volume_id"), str)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, Invalid):
        return None


def adopted(snapshots: Iterable[zfs.Dataset]) -> list[Snapshot]:
    """The snapshots of other tools as records, each the child of the one before."""
    made: list[Snapshot] = []
    for one in snapshots:
        parent = made[-1].id if made else ""
        made.append(_foreign(one, parent))
    return made


def _foreign(one: zfs.Dataset, parent: str) -> Snapshot:
    return Snapshot(
        id=one.guid,
        parent=parent,
        create_time_ms=one.create_time_ms,
        origin=Origin.ADOPTED,
        note=one.snapshot,
    )


def read_ancestry(layout: Layout) -> tuple[dict[str, Snapshot], dict[str, str]]:
    """The records of the log, and the guids, by id; `zfs_log.py` adds to it."""
    known: dict[str, Snapshot] = {}
    natives: dict[str, str] = {}
    path = layout.files.ancestry
    for line in read_log(path):
        for record in image_layout.records_of(line, path):
            known.setdefault(record.id, record)
        with understood(path):
            natives.update(typed(path, line["natives"], dict[str, str]))
    return known, natives


def save_tip(layout: Layout, tip: str, volume_id: str) -> None:
    write_json(layout.pointer, {"tip": tip, "volume_id": volume_id})


# Finding the tip.


@dataclass(frozen=True, slots=True)
class _Pointer:
    """What `tip.json` names."""

    tip: str = ""
    volume_id: str = ""


def load_state(layout: Layout, *, there: bool) -> State:
    """Looks at all snapshots and finds the lineage. Changes nothing; `there`: the records are (`zfs_records.ready`)."""
    known, natives = read_ancestry(layout) if there else ({}, {})
    pointer = typed(layout.pointer, (read_json(layout.pointer) if there else None) or {}, _Pointer)
    found = zfs.family(layout.live, RECORD, TAKING)
    head = found.get(layout.live)
    if head is None:
        return State(Lineage(), "", known, natives, where={})
    if head.kind != "filesystem":
        raise Invalid(
            "INVALID_FIELD",
            f"{layout.live} is a {head.kind}: the zfs backend wants a file system; zvols are not supported",
            field="path",
        )
    every = zfs.snapshots_of(found, layout.live)
    sorted_out = _sort_out(every, natives)
    problems = sorted_out.problems
    known = {**{key: record for key, (record, _volume) in sorted_out.records.items()}, **known}
    tip = _tip_of(sorted_out, known, pointer)
    if not tip:
        chain = adopted(sorted_out.foreign)
        known = {**known, **{record.id: record for record in chain}}
        tip = chain[-1].id if chain else ""
    where = dict(sorted_out.where)
    where.update({one.guid: one for one in sorted_out.foreign if one.guid in known})
    try:
        lineage = Lineage.from_tip(tip, known)
    except ValueError as error:
        said = f"the records of {layout.live} contradict each other: {error}"
        raise Damaged("IO_ERROR", said) from error
    ids = lineage.ids()
    where = {key: one for key, one in where.items() if key in ids}
    volume_id = _volume_of(tip, sorted_out, pointer)
    others = tuple(_foreign(one, "") for one in sorted_out.foreign if one.guid not in ids)
    children = tuple(sorted(name for name in found if name.startswith(f"{layout.live}/")))
    return State(
        lineage.with_presence(where),
        volume_id,
        known,
        natives,
        head,
        where,
        tuple(every),
        others,
        sorted_out.unfinished,
        children,
        problems,
    )


@dataclass(frozen=True, slots=True)
class _SortedOut:
    """The snapshots by what they are; `where` are CPs of ours, `order` their ids, oldest first."""

    records: dict[str, tuple[Snapshot, str]]
    where: dict[str, zfs.Dataset]
    order: list[str]
    foreign: list[zfs.Dataset]
    unfinished: tuple[zfs.Dataset, ...]
    problems: tuple[str, ...]


def _sort_out(every: Iterable[zfs.Dataset], natives: Mapping[str, str]) -> _SortedOut:
    records: dict[str, tuple[Snapshot, str]] = {}
    where: dict[str, zfs.Dataset] = {}
    foreign, unfinished, problems = [], [], []
    for one in every:
        text = one.own.get(RECORD)
        read = read_record(text) if text is not None else None
        if text is None and (TAKING in one.own or one.snapshot == INCOMING):
            unfinished.append(one)
        elif text is None:
            foreign.append(one)
        elif read is None:
            problems.append(f"the record of {one.name} cannot be read: it is left out")
        elif read[0].id in where or natives.get(read[0].id, one.guid) != one.guid:
            problems.append(f"{one.name} is not the snapshot {read[0].cp} that it says it is: it is left out")
        else:
            records[read[0].id] = read
            where[read[0].id] = one
    return _SortedOut(records, where, list(where), foreign, tuple(unfinished), tuple(problems))


def _tip_of(found: _SortedOut, known: Mapping[str, Snapshot], pointer: _Pointer) -> str:
    newest = found.order[-1] if found.order else ""
    told = pointer.tip
    if told not in known or newest == told:
        return newest
    at = known[told].parent
    for _step in range(len(known)):
        if not newest or at == newest:
            return str(told)
        if at not in known:
            return newest
        at = known[at].parent
    return newest


def _volume_of(tip: str, found: _SortedOut, pointer: _Pointer) -> str:
    if tip in found.records:
        return found.records[tip][1]
    return pointer.volume_id if tip and tip == pointer.tip else ""


def find(layout: Layout, state: State, snapshot_id: str, reason: str) -> zfs.Dataset:
    """The snapshot of that id; refused for that reason if it is not here."""
    found = state.where.get(snapshot_id)
    if found is None:
        raise Refused(reason, f"snapshot {snapshot_id} of {layout.volume} is not on this node")
    return found
