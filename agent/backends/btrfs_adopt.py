"""Which snapshots there are: ours, by their records, and those that other tools made or received.

Another tool's snapshot is taken into the lineage by what its file system calls it (`Info.native_id`), without a CP.

* Found by themselves: read-only snapshots of the live subvolume, and the read-only subvolumes that it descends from.
  So are those of btrbk and snapper, wherever they keep them.
* Found by the patterns of `adopt`: received ones, whose live copy does not exist on this node.
* Once a CP of ours is there, the adopted records below it are fixed in the log of ancestry, and their data is looked
  for among all read-only subvolumes of the file system. Any others are shown beside, and are never a tip.

Nothing of theirs is ever renamed, removed or written to. One that is writable, or was changed since it came to be, is
left out, and told; so is one that the mount of the live copy does not show, as no delta can be of it and of ours.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from agent.backends.btrfs_layout import SubvolumeLayout, vouched
from agent.backends.btrfs_live import Tip
from agent.backends.image_layout import State, load_state
from agent.disk import btrfs, loops
from resilver.errors import Damaged
from resilver.lineage import Lineage, Origin, Snapshot

MATCHES_MAX: Final = 100_000
_TIME_BEHIND: Final = re.compile(r"[\W_]*\d[\dTZ\W_]*\Z")


@dataclass(frozen=True, slots=True)
class Known:
    """What is here. `adopted`: paths of other tools' snapshots in the lineage, by id; `beside`: those of `others`."""

    layout: SubvolumeLayout
    state: State
    adopted: dict[str, Path]
    others: tuple[Snapshot, ...] = ()
    problems: tuple[str, ...] = ()
    beside: dict[str, Path] = field(default_factory=dict)

    def path(self, snapshot_id: str) -> Path | None:
        """Where a snapshot's data is; None if it is not here."""
        if snapshot_id in self.state.stored:
            data = self.layout.data(snapshot_id)
            return data if data.exists() else None
        return self.adopted.get(snapshot_id)

    @property
    def tip(self) -> Tip | None:
        """The tip's data, None if there is no tip, or its data is not here."""
        path = self.path(self.state.tip) if self.state.tip else None
        return Tip(self.state.tip, path) if path is not None else None


@dataclass(frozen=True, slots=True)
class _Seen:
    info: btrfs.Info
    path: Path


class _View:
    """What the mount shows that the live copy's directory is reached through, and what only other mounts show."""

    def __init__(self, layout: SubvolumeLayout) -> None:
        self._mounts = btrfs.mounts_of(layout.live.parent)
        self._live, self._ours = _where(layout.live), _where(layout.root)
        self._hidden: dict[str, Path] = {}

    def is_ours(self, path: Path) -> bool:
        """By its place in the file system: the same may be reached through several mounts of that."""
        where = _where(path)
        return where == self._live or (where[0] == self._ours[0] and self.holds_ours(where[1]))

    def holds_ours(self, top: str) -> bool:
        """Whether a path from the top of the file system is the snapshot directory's, or below it."""
        return loops.is_within(top, self._ours[1])

    def reach(self, one: btrfs.Found) -> Path | None:
        """A path to a subvolume through that mount; None if it does not show it."""
        path = btrfs.reach(one, self._mounts[:1])
        if path is None:
            elsewhere = btrfs.reach(one, self._mounts[1:])
            if elsewhere is not None:
                self._hidden[one.info.uuid] = elsewhere
        return path

    def shown(self, path: Path, info: btrfs.Info) -> Path | None:
        """The same as `reach`, of one that was found by a path."""
        place = btrfs.place_of(path)
        if place is None or not self._mounts or place[0] == self._mounts[0]:
            return path
        there = self.reach(btrfs.Found(info, place[1])) if place[0] in self._mounts else None
        if there is None:
            self._hidden[info.uuid] = path
        return there

    def told(self) -> tuple[str, ...]:
        """What an operator should know of what is not shown."""
        if not self._hidden:
            return ()
        first, more = min(self._hidden.values()), len(self._hidden) - 1
        what = f"{first} and {more} more snapshots are" if more else f"{first} is"
        said = (
            f"{what} not shown by the mount at {self._mounts[0].point}, through which `path` is reached, and left out: "
            "no delta can be of what lies under two mounts; name `path` by a mount that shows both, such as one of the "
            "topmost subvolume (`-o subvolid=5`)"
        )
        return (said,)


class Finder:
    """Finds them. What was looked at is remembered until it changes: not every heartbeat looks at every inode."""

    def __init__(self, layout: SubvolumeLayout, patterns: Sequence[str]) -> None:
        self._layout = layout
        self._patterns = tuple(patterns)
        self._verdicts: dict[tuple[str, str, int], bool] = {}

    def load(self) -> Known:
        """All records and the lineage. Changes nothing."""
        layout = self._layout
        state = load_state(layout)
        problems: list[str] = []
        if not layout.live.parent.is_dir():
            return Known(layout, state, {})
        every = btrfs.subvolumes(layout.live.parent)
        view = _View(layout)
        found = list(self._found(every, view, problems))
        if not state.lineage.records:
            return _only_adopted(layout, state, found, (*problems, *view.told(), *_mixed(found)))
        wanted = {record.id for record in state.lineage if record.origin is Origin.ADOPTED}
        there = dict(self._among(every, wanted, view))
        there.update({seen.info.native_id: seen.path for seen in found if seen.info.native_id in wanted})
        present = {record.id for record in state.lineage if record.present} | set(there)
        beside = [seen for seen in reversed(found) if seen.info.native_id not in state.lineage.ids()]
        return Known(
            layout,
            replace(state, lineage=state.lineage.with_presence(present)),
            there,
            tuple(_record(seen, "") for seen in beside),
            (*problems, *view.told()),
            {seen.info.native_id: seen.path for seen in beside},
        )

    def _found(self, every: list[btrfs.Found], view: _View, problems: list[str]) -> Iterator[_Seen]:
        """Other tools' snapshots, oldest first, each id once."""
        seen = {one.info.tree: one for one in self._by_pattern(view, problems)}
        for one in self._related(every, view):
            seen.setdefault(one.info.tree, one)
        ids = set()
        for one in sorted(seen.values(), key=_age(seen.values())):
            if one.info.native_id not in ids and self._sound(one):
                ids.add(one.info.native_id)
                yield one
            elif one.info.native_id not in ids:
                problems.append(f"{one.path} was changed since it came to be: it is left out")

    def _by_pattern(self, view: _View, problems: list[str]) -> Iterator[_Seen]:
        count = 0
        for pattern in self._patterns:
            within = Path(glob.escape(str(self._layout.live.parent)), pattern)
            for name in sorted(glob.glob(str(within))):  # noqa: PTH207 - it may be absolute
                path = Path(name)
                if not btrfs.is_subvolume(path) or view.is_ours(path):
                    continue
                count += 1
                if count > MATCHES_MAX:
                    raise Damaged("IO_ERROR", f"{pattern!r} matches more than {MATCHES_MAX:,} subvolumes")
                info = btrfs.info(path)
                if info.read_only:
                    shown = view.shown(path, info)
                    if shown is not None:
                        yield _Seen(info, shown)
                else:
                    problems.append(f"{path} is writable: half received, or made writable since; it is left out")

    def _related(self, every: list[btrfs.Found], view: _View) -> Iterator[_Seen]:
        """Snapshots of the live copy, and what it descends from."""
        if not btrfs.is_subvolume(self._layout.live):
            return
        live = btrfs.info(self._layout.live)
        by_uuid = {one.info.uuid: one for one in every}
        line, at = set(), live.parent_uuid
        while at in by_uuid and at not in line:
            line.add(at)
            at = by_uuid[at].info.parent_uuid
        for one in every:
            if one.info.read_only and (one.info.parent_uuid == live.uuid or one.info.uuid in line):
                path = view.reach(one) if not view.holds_ours(one.path) else None
                if path is not None:
                    yield _Seen(one.info, path)

    def _among(self, every: list[btrfs.Found], wanted: set[str], view: _View) -> Iterator[tuple[str, Path]]:
        for one in every:
            if one.info.native_id in wanted and one.info.read_only:
                path = view.reach(one)
                if path is not None and self._sound(_Seen(one.info, path)):
                    yield one.info.native_id, path

    def _sound(self, one: _Seen) -> bool:
        key = (one.info.uuid, one.info.received_uuid, one.info.ctransid)
        if key not in self._verdicts:
            if len(self._verdicts) >= MATCHES_MAX:
                self._verdicts.clear()
            self._verdicts[key] = vouched(one.path, one.info)
        return self._verdicts[key]


def _where(path: Path) -> tuple[str, str]:
    """The file system that a path lies on, as mountinfo writes it, and the path from its top. Nothing need be there."""
    place = btrfs.place_of(path)
    return ("", str(path.resolve())) if place is None else (place[0].device, place[1])


def _age(seen: Iterable[_Seen]) -> Callable[[_Seen], tuple[int, int]]:
    """The order in which they came to be. Received ones may have come in another order than they were taken in: if all
    are, the transactions of the file system that they were sent from count.
    """
    if all(one.info.received_uuid for one in seen):
        return lambda one: (one.info.stransid, one.info.otransid)
    return lambda one: (one.info.otransid, one.info.tree)


def _mixed(found: list[_Seen]) -> Iterator[str]:
    """A hint if they may be of several subvolumes: names that differ before the time in them, and nothing in common."""
    groups: dict[str, list[btrfs.Info]] = {}
    for one in found:
        groups.setdefault(_TIME_BEHIND.sub("", one.path.name), []).append(one.info)
    apart = [
        name
        for name, infos in groups.items()
        if not any(_are_kin(mine, other) for mine in infos for one in groups if one != name for other in groups[one])
    ]
    if len(groups) > 1 and apart:
        every, strange = (", ".join(f"{name}…" for name in sorted(names)) for names in (groups, apart))
        yield (
            f"`adopt` finds snapshots called {every}, and none of {strange} was made from one of the others: if they "
            "are of another subvolume, narrow the pattern (`home.2*` for `home.*`), or the copies will be AMBIGUOUS"
        )


def _are_kin(one: btrfs.Info, other: btrfs.Info) -> bool:
    """Whether one was made from the other, or both from a third."""
    return bool({one.uuid, one.parent_uuid} & ({other.uuid, other.parent_uuid} - {""}))


def _only_adopted(layout: SubvolumeLayout, state: State, found: list[_Seen], problems: tuple[str, ...]) -> Known:
    """Nothing of ours yet: the newest of theirs is the tip."""
    records: list[Snapshot] = []
    for seen in found:
        records.append(_record(seen, records[-1].id if records else ""))
    lineage = Lineage(tuple(reversed(records)))
    known = {**state.known, **{record.id: record for record in records}}
    adopted = {seen.info.native_id: seen.path for seen in found}
    return Known(layout, replace(state, lineage=lineage, known=known), adopted, (), problems)


def _record(seen: _Seen, parent: str) -> Snapshot:
    name = seen.path.name
    if name == "snapshot":  # snapper's all have this one, in a directory with a number
        name = f"{seen.path.parent.name}/{name}"
    return Snapshot(
        id=seen.info.native_id, parent=parent, create_time_ms=seen.info.otime_ms, origin=Origin.ADOPTED, note=name
    )
