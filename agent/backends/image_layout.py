"""Where an image's snapshots and records stand on disk, and how the tip is found among them.

Under the snapshot directory (`.resilver/<volume>/` beside the live copy, 0700, on the same file system)::

    <id>/data, record.json [, table]   a snapshot: made under another name, fsynced, renamed into place in one step
    ancestry.jsonl                     records whose snapshots are no longer here, or never were
    preserved/<pid>/data, preserved.json [, record.json, table]
    stage/stage.json, tree/data        a snapshot that is being received
    commit.json                        the intention of a commit that is under way
    volume.json, grant.json            what the agent was told
    agent.json                         which agent it is that works here (`agent/disk/claim.py`)
    frozen.json                        mounts that are frozen at this moment
    compact.json                       the part of the image that is being compacted
    .live                              the next live copy; after the exchange, the one before
    .spare-<id>                        the live copy before, unmodified and equal to that snapshot
    .new-*, .keep-*, .trash-*          not yet, or no longer, part of anything

**The tip has no pointer.** It is the one snapshot directory that is no ancestor of another one. The tip is never
pruned, so it always has its directory; the log of ancestry only fills the gaps between directories and behind the last,
and its records never are tips, however many branches it has known. So the rename of a new snapshot's directory moves
the tip, and nothing else has to be written for it.

**Commits** add a directory and take others out of the lineage, which is no single step. While `commit.json` is there,
it says which directories count: the inode in `.live` tells whether the exchange of the live copy has happened. If not,
the old tip counts, and what was done so far is undone at the next start. If so, the new one does, and the rest is done.

A damaged record, or directories that form no single lineage, are an error that names them: nothing is guessed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeVar

from agent.backends import ancestry
from agent.backends.image_kept import Kept, Stamp, stamp_of
from agent.disk.durable import Json, append_log, disk_errors, make_dir, read_json, read_log, write_json
from agent.lineages import record_from_json, record_to_json
from agent.stored import checked, typed, understood
from resilver.errors import Damaged, Invalid
from resilver.lineage import Lineage, Snapshot
from resilver.volume import PreservedCopy

T = TypeVar("T")

RECORD_FILE: Final = "volume.json"
GRANT_FILE: Final = "grant.json"

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RESERVED: Final = frozenset({"stage", "preserved", "ancestry.jsonl"})


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one replica."""

    volume: str
    live: Path
    root: Path
    kept: Kept = field(default_factory=Kept, init=False, compare=False, repr=False)

    @property
    def ancestry(self) -> Path:
        return self.root / "ancestry.jsonl"

    @property
    def commit(self) -> Path:
        return self.root / "commit.json"

    @property
    def compacting(self) -> Path:
        return self.root / "compact.json"

    @property
    def frozen(self) -> Path:
        return self.root / "frozen.json"

    @property
    def stage(self) -> Path:
        return self.root / "stage"

    @property
    def tree(self) -> Path:
        return self.stage / "tree"

    @property
    def preserved(self) -> Path:
        return self.root / "preserved"

    @property
    def incoming(self) -> Path:
        return self.root / ".live"

    def snapshot(self, snapshot_id: str) -> Path:
        return self.root / snapshot_id

    def data(self, snapshot_id: str) -> Path:
        return self.root / snapshot_id / "data"

    def spare(self, snapshot_id: str) -> Path:
        return self.root / f".spare-{snapshot_id}"

    def new(self, name: str) -> Path:
        return self.root / f".new-{name}"

    def keep(self, pid: str) -> Path:
        return self.root / f".keep-{pid}"

    def trash(self, name: str) -> Path:
        return self.root / f".trash-{name}"

    def identity(self, path: Path) -> int:
        """What tells what is at a path from anything else that comes to be there."""
        return path.lstat().st_ino

    def make_root(self) -> None:
        """Makes the snapshot directory. The live copy's own directory must be there: it may be an unmounted disk."""
        if not self.live.parent.is_dir():
            raise Invalid(
                "INVALID_FIELD",
                f"{self.live.parent} is no directory: create it, or mount the disk that {self.live.name} is to be on",
                field="path",
            )
        with disk_errors(self.root):
            make_dir(self.root)
            if self.root.stat().st_dev != self.live.parent.stat().st_dev:
                raise Invalid(
                    "INVALID_FIELD",
                    f"{self.root} is on another file system than {self.live}; snapshot_dir must be on the same one",
                    field="snapshot_dir",
                )


@dataclass(frozen=True, slots=True)
class Stored:
    """A record as it stands beside a snapshot: `table` is the digest of its table of blocks, empty if it has none;
    `data_mtime_ns` the time of the last write to its data, 0 if that is not known.
    """

    snapshot: Snapshot
    volume_id: str
    table: str = ""
    data_mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class Journal:
    """The intention of a commit. `made_target`: the target's directory is this commit's, and goes if it is undone.

    `keeps` are (snapshot id, preserved id) of the snapshots that leave the lineage; `live_pid` is the preserved id of
    the live copy, empty if it held nothing of its own; `spare_of` the snapshot that it equals, empty if it is to go.
    `undoing`: it was given up, and `.live` tells nothing any more.
    """

    resync_id: str
    old_tip: str
    new_tip: str
    new_inode: int
    made_target: bool
    keeps: tuple[tuple[str, str], ...]
    live_pid: str
    spare_of: str
    undoing: bool = False

    def exchanged(self, layout: Layout) -> bool:
        """Whether the new live copy has taken its place: then it is no longer where it was made."""
        if self.undoing:
            return False
        try:
            return layout.identity(layout.incoming) != self.new_inode
        except FileNotFoundError:
            return True


@dataclass(frozen=True, slots=True)
class State:
    """What the directory says. `stored` are the records of the directories that count; `known` adds the log's."""

    lineage: Lineage
    volume_id: str
    stored: dict[str, Stored]
    known: dict[str, Snapshot]
    journal: Journal | None = None

    @property
    def tip(self) -> str:
        return self.lineage.tip_id


def check_id(snapshot_id: str) -> None:
    """Raises Invalid for an id that cannot be a directory's name."""
    if _ID.fullmatch(snapshot_id) is None or snapshot_id in _RESERVED or snapshot_id.endswith(".json"):
        raise Invalid("INVALID_FIELD", f"{snapshot_id!r} cannot be a snapshot's id", field="id")


def load_state(layout: Layout) -> State:
    """Reads every record and finds the lineage. Changes nothing; `Damaged("IO_ERROR")` if it cannot be certain."""
    journal = load_journal(layout)
    left: set[str] = set()
    if journal is not None:
        left = {gone for gone, _pid in journal.keeps} if journal.exchanged(layout) else set()
        if not journal.exchanged(layout) and journal.made_target:
            left = {journal.new_tip}
    return replace(read_state(layout, left), journal=journal)


def read_state(layout: Layout, left: set[str]) -> State:
    """As `load_state`, for a backend whose commits have a journal of another kind: `left` are directories that do not
    count while one is under way.
    """
    kept, root = layout.kept, str(layout.root)
    stored: dict[str, Stored] = {}
    for name, stamp in _directories(layout):
        if name not in left:
            stored[name] = kept.read(f"{root}/{name}/record.json", stamp, _load_record_at)
    ancestry = f"{root}/ancestry.jsonl"
    with disk_errors(layout.root):
        logged = kept.read(ancestry, stamp_of(ancestry), _read_ancestry)
        present = {key for key in stored if stamp_of(f"{root}/{key}/data") is not None}
    facts = (stored, logged, present)
    if kept.state[0] == facts:
        same: State = kept.state[1]
        return same
    kept.forget_all_but({ancestry, RECORD_FILE, GRANT_FILE, *(f"{root}/{key}/record.json" for key in stored)})
    state = _state_of(layout, stored, {**logged, **{key: value.snapshot for key, value in stored.items()}}, present)
    kept.state = facts, state
    return state


def _load_record_at(path: str) -> Stored:
    """The record in a directory that counts, which has its snapshot's name."""
    directory = Path(path).parent
    stored = load_stored(directory)
    if stored.snapshot.id != directory.name:
        said = f"{path} is damaged: it is the record of {stored.snapshot.id}, and does not belong there"
        raise Damaged("IO_ERROR", said, path=path)
    return stored


def _read_ancestry(path: str) -> dict[str, Snapshot]:
    return {record.id: record for line in read_log(Path(path)) for record in records_of(line, path)}


def _state_of(layout: Layout, stored: dict[str, Stored], known: dict[str, Snapshot], present: set[str]) -> State:
    tip = _tip_of(layout, stored, known)
    try:
        lineage = Lineage.from_tip(tip, known).with_presence(present)
    except ValueError as error:
        raise Damaged("IO_ERROR", f"the records in {layout.root} contradict each other: {error}") from error
    return State(lineage, stored[tip].volume_id if tip else "", stored, known)


def _tip_of(layout: Layout, stored: dict[str, Stored], known: dict[str, Snapshot]) -> str:
    ancestors: set[str] = set()
    for value in stored.values():
        at = value.snapshot.parent
        while at in known and at not in ancestors:
            ancestors.add(at)
            at = known[at].parent
        ancestors.add(at)
    tips = sorted(key for key in stored if key not in ancestors)
    if len(tips) == 1 or not stored:
        return tips[0] if tips else ""
    raise Damaged(
        "IO_ERROR",
        f"the snapshots in {layout.root} form no single lineage: {', '.join(tips) or 'their parents run in a circle'}; "
        "move all that do not belong to it out of that directory",
        path=str(layout.root),
    )


def _directories(layout: Layout) -> list[tuple[str, Stamp]]:
    """The snapshots' directories, and what tells their records from others."""
    with disk_errors(layout.root):
        try:
            entries = list(os.scandir(layout.root))
        except (FileNotFoundError, NotADirectoryError):
            return []
        if layout.root.is_symlink():
            raise _linked(layout.root)
        ours = [entry for entry in entries if _ID.fullmatch(entry.name)]
        if linked := next((entry for entry in ours if entry.is_symlink()), None):
            raise _linked(linked.path)
        names = [entry.name for entry in ours if entry.name not in _RESERVED and entry.is_dir(follow_symlinks=False)]
        stamps = [(name, stamp_of(f"{layout.root}/{name}/record.json")) for name in names]
    return [(name, stamp) for name, stamp in stamps if stamp is not None]


def _linked(path: Path | str) -> Damaged:
    """A snapshot that is somewhere else is not the one that was taken, and without it the tip would be another."""
    said = f"{path} is a symbolic link: put back what stood there, or name another snapshot_dir"
    return Damaged("IO_ERROR", said, path=str(path))


def append_records(layout: Layout, records: Iterable[Snapshot], state: State, logged: Iterable[str] = ()) -> None:
    """Adds to the log those records that it does not hold yet; `logged` must go in although a directory has them.

    One that has become long is made shorter first.
    """
    path, records, wanted = str(layout.ancestry), tuple(records), set(logged)
    in_log = layout.kept.read(path, stamp_of(path), _read_ancestry)
    # While a commit is under way two lineages count; whoever begins one has settled the one before.
    if len(in_log) > ancestry.RECORDS_MAX and not layout.commit.exists():
        named = wanted | {copy.based_on for copy in list_preserved(layout)}
        ancestry.shorten(layout.ancestry, in_log, state.lineage, state.stored, named=named, coming=records)
    missing = [
        record
        for record in records
        if record.id not in in_log and (record.id in wanted or record.id not in state.stored)
    ]
    if missing:
        value = {"records": [record_to_json(record) for record in missing]}
        bound = ancestry.bytes_max(state.lineage, state.stored, wanted)
        append_log(layout.ancestry, value, bytes_max=bound, advice=ancestry.ADVICE)


def records_of(line: Json, path: Path | str) -> list[Snapshot]:
    """The records in a line of a log of ancestry; Damaged if it holds none."""
    with understood(path):
        return [record_from_json(record) for record in line["records"]]


def save_stored(directory: Path, stored: Stored) -> None:
    value = {**record_to_json(stored.snapshot), "volume_id": stored.volume_id, "table": stored.table}
    if stored.data_mtime_ns:
        value["data_mtime_ns"] = stored.data_mtime_ns
    write_json(directory / "record.json", value)


def load_stored(directory: Path) -> Stored:
    path = directory / "record.json"
    value = read_json(path)
    if value is None:
        raise Damaged("IO_ERROR", f"{path} is missing", path=str(path))
    with understood(path):
        about = checked({name: value[name] for name in ("volume_id", "table")})
        written_ns = checked(value.get("data_mtime_ns", 0), "data_mtime_ns")
        if not isinstance(written_ns, int):
            raise TypeError("data_mtime_ns is no whole number")
        return Stored(record_from_json(value), about["volume_id"], about["table"], int(written_ns))


def save_journal(layout: Layout, journal: Journal) -> None:
    write_json(layout.commit, {name: getattr(journal, name) for name in Journal.__slots__})


def load_journal(layout: Layout) -> Journal | None:
    value = read_json(layout.commit)
    return None if value is None else typed(layout.commit, value, Journal)


def save_preserved(directory: Path, copy: PreservedCopy) -> None:
    """Writes what a preserved copy is; its path is where it is found."""
    value = {name: getattr(copy, name) for name in PreservedCopy.__slots__ if name != "path"}
    write_json(directory / "preserved.json", {**value, "cp": str(copy.cp)})


def load_preserved(directory: Path) -> PreservedCopy:
    path = directory / "preserved.json"
    value = read_json(path)
    if value is None:
        raise Damaged("IO_ERROR", f"{path} is missing", path=str(path))
    copy = typed(path, {**value, "path": str(directory / "data")}, PreservedCopy)
    if copy.id != directory.name and not directory.name.startswith("."):
        said = f"{path} is damaged: it is of preserved copy {copy.id}, and does not belong there"
        raise Damaged("IO_ERROR", said, path=str(path))
    return copy


def list_preserved(layout: Layout) -> tuple[PreservedCopy, ...]:
    """The preserved copies, oldest first."""
    with disk_errors(layout.preserved):
        try:
            entries = [entry for entry in layout.preserved.iterdir() if (entry / "preserved.json").exists()]
        except (FileNotFoundError, NotADirectoryError):
            return ()
    return tuple(sorted(map(load_preserved, entries), key=lambda copy: (copy.create_time_ms, copy.id)))
