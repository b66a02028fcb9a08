"""Keeping and letting go of subvolumes: preserved copies, what was a live copy, dropped snapshots.

As in `image_keep.py`: a preserved copy appears by the rename of its directory, in which `preserved.json` was written
before; a snapshot is let go by a rename, its record in the log of ancestry before; what was once a live copy is only
removed if nobody uses it and it is what a snapshot is that stays. Otherwise it is preserved.

**For good.** Who uses a subvolume is looked for among processes, and what has it open may be none. So it is made
read-only first: nothing can be opened for writing any more, while what is open stays so, and writes still. Then each of
its files is asked whether it is open for writing, and only then it is compared: what is the same now stays the same.
Where there are too many files for that (`ASKED_MAX_S`), it is *set aside*::

    .aside-<time>-<ctransid>-<tip>    the time in Unix milliseconds, its last change's transaction, what it equals

and compared once more when it has stood there for `ASIDE_S`: before the next thing that is done here, or at a start. If
it was changed it is preserved then. At most `ASIDE_MAX` stand there; beyond that the oldest is looked at earlier.

Removing a subvolume frees its space later, while the kernel walks through it; the bytes that are told are an estimate.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from agent.backends import btrfs_send
from agent.backends.btrfs_adopt import Known
from agent.backends.btrfs_debris import Debris
from agent.backends.btrfs_layout import SubvolumeLayout, remove, unused
from agent.backends.btrfs_live import Tip, is_tip, own_bytes
from agent.backends.image_keep import keep_directory, keep_file, now_ms
from agent.backends.image_layout import append_records, load_preserved, save_preserved
from agent.disk import btrfs, leases
from agent.disk.btrfs_use import users_of
from agent.disk.durable import DIR_MODE, disk_errors, fsync_dir, make_dir
from agent.disk.inuse import names
from resilver.errors import Refused
from resilver.lineage import NO_CP, Snapshot
from resilver.volume import PreservedCopy

ESTIMATE_MAX_S: Final = 10.0
FREED_MAX_S: Final = 2.0  # of each snapshot that goes: one call drops many
ASKED_MAX_S: Final = 2.0
ASIDE_S: Final = 600.0
ASIDE_MAX: Final = 16
_ASIDE: Final = ".aside-"


def describe_live(
    layout: SubvolumeLayout, path: Path, snapshot: Snapshot | None, against: Tip | None, resync_id: str
) -> PreservedCopy:
    """What a live copy will be as a preserved one; `against` is the snapshot that its own bytes are counted from."""
    return _describe(path, snapshot, own_bytes(path, against, layout, ESTIMATE_MAX_S), live=True, resync_id=resync_id)


def describe_snapshot(path: Path, snapshot: Snapshot, older: Path | None, resync_id: str) -> PreservedCopy:
    """What a snapshot that leaves the lineage will be; `older` is its newest ancestor that is here."""
    own = btrfs_send.estimate(older, path, ESTIMATE_MAX_S)
    return _describe(path, snapshot, own, live=False, resync_id=resync_id)


def _describe(path: Path, snapshot: Snapshot | None, own: int | None, *, live: bool, resync_id: str) -> PreservedCopy:
    return PreservedCopy(
        id=str(uuid.uuid4()),
        path=str(path),
        based_on=snapshot.id if snapshot is not None else "",
        cp=snapshot.cp if snapshot is not None else NO_CP,
        live=live,
        create_time_ms=now_ms(),
        size_bytes=0,
        exclusive_bytes=own,
        resync_id=resync_id,
    )


def prepare_keep(layout: SubvolumeLayout, copy: PreservedCopy) -> None:
    """Makes the directory that a live copy will be preserved in, on the disk, without its data."""
    directory = layout.keep(copy.id)
    remove(directory)
    directory.mkdir(mode=DIR_MODE)
    save_preserved(directory, copy)
    make_dir(layout.preserved)
    fsync_dir(layout.root)


def shut(path: Path) -> str | None:
    """Lets nobody open anything in a subvolume for writing any more. A file that is open so, by its path in there;
    empty if there is none, None if not all could be asked.
    """
    btrfs.set_read_only(path, read_only=True)
    return leases.open_for_writing(path, ASKED_MAX_S)


def let_go(
    layout: SubvolumeLayout,
    path: Path,
    equal_to: Tip | None,
    snapshot: Snapshot | None,
    asked: Callable[[Path], str | None] = shut,
) -> None:
    """Removes a former live copy, in the snapshot directory, if it is that snapshot and stays so; else preserves it.

    Set aside if it is that snapshot, and `asked` could not say of all of its files whether they are open for writing.
    """
    if not path.exists():
        return
    if not users_of(path) and not btrfs.nested(path):
        written = asked(path)
        btrfs.sync(path)
        change = btrfs.info(path).ctransid
        if not written and _is(layout, path, equal_to):
            if written is None and equal_to is not None:
                path.rename(layout.root / f"{_ASIDE}{now_ms()}-{change}-{equal_to.id}")
                fsync_dir(layout.root)
            else:
                remove(path)
            return
    _preserve(layout, path, equal_to, snapshot)


def _preserve(layout: SubvolumeLayout, path: Path, against: Tip | None, snapshot: Snapshot | None) -> None:
    btrfs.set_read_only(path, read_only=False)  # else it cannot be moved into another directory
    copy = describe_live(layout, path, snapshot, against, "")
    prepare_keep(layout, copy)
    keep_file(layout, path, copy.id)


def look_aside(layout: SubvolumeLayout, load: Callable[[], Known], debris: Debris) -> None:
    """Of what was set aside long enough ago: preserves what was changed since, and removes what was not."""
    found = sorted(layout.root.glob(f"{_ASIDE}*"))
    for place, entry in enumerate(found):
        parts = entry.name.removeprefix(_ASIDE).split("-", 2)
        if len(parts) < 3 or not (parts[0].isdecimal() and parts[1].isdecimal()):
            continue  # none of ours
        age_s = (now_ms() - int(parts[0])) / 1000
        # A clock that was set back says nothing: it counts as long enough.
        if 0 <= age_s < ASIDE_S and len(found) - place <= ASIDE_MAX:
            continue
        if users_of(entry):
            continue
        with debris.passed_over(entry):
            _end_aside(layout, entry, int(parts[1]), parts[2], load)


def _end_aside(layout: SubvolumeLayout, entry: Path, change: int, equal_to: str, load: Callable[[], Known]) -> None:
    btrfs.sync(entry)
    if btrfs.info(entry).ctransid == change:
        remove(entry)
        return
    known = load()
    tip = known.path(equal_to)
    _preserve(layout, entry, Tip(equal_to, tip) if tip is not None else None, known.state.known.get(equal_to))


def _is(layout: SubvolumeLayout, path: Path, tip: Tip | None) -> bool:
    if tip is None or not tip.path.exists():
        return False
    try:
        return is_tip(path, tip, layout)
    except TimeoutError:
        return False


def sweep(layout: SubvolumeLayout, debris: Debris) -> None:
    """At start: finishes what was being preserved, and removes what is part of nothing, as far as that can be done."""
    if not layout.root.is_dir():
        return
    for entry in sorted(layout.root.iterdir()):
        name = entry.name
        if name.startswith(".keep-") and (entry / "data").exists():
            with debris.passed_over(entry):
                keep_directory(layout, entry, name.removeprefix(".keep-"))
        elif name.startswith((".keep-", ".new-")) or name == ".live" or fnmatch(name, ".*.tmp"):
            debris.remove(entry)
    empty_trash(layout, debris)


def drop_preserved(layout: SubvolumeLayout, pid: str, step: Callable[[str], None], debris: Debris) -> int:
    """Lets a preserved copy go; the bytes that it held alone."""
    copy = load_preserved(layout.preserved / pid)
    with disk_errors(layout.preserved):
        _refuse_used(layout.preserved / pid / "data")
        _refuse_nested(layout.preserved / pid / "data")
        _trash(layout, layout.preserved / pid, pid, debris)
        step("drop.renamed")
        empty_trash(layout, debris)
    return copy.exclusive_bytes or 0


def drop_snapshot(known: Known, snapshot_id: str, step: Callable[[str], None], debris: Debris) -> int:
    """Lets a snapshot of ours that is not the tip go; about the bytes that no neighbour shares."""
    layout, state = known.layout, known.state
    with disk_errors(layout.snapshot(snapshot_id)):
        _refuse_used(layout.data(snapshot_id))
        _refuse_nested(layout.data(snapshot_id))
        freed = _alone(known, snapshot_id)
        append_records(layout, [state.known[snapshot_id]], state, logged=[snapshot_id])
        step("prune.logged")
        _trash(layout, layout.snapshot(snapshot_id), snapshot_id, debris)
        step("prune.renamed")
        empty_trash(layout, debris)
        step("prune.removed")
    return freed


def _trash(layout: SubvolumeLayout, path: Path, name: str, debris: Debris) -> None:
    empty_trash(layout, debris)
    path.rename(layout.trash(unused(f"{name}-")))
    fsync_dir(path.parent)
    fsync_dir(layout.root)


def empty_trash(layout: SubvolumeLayout, debris: Debris) -> None:
    """Removes what was let go, as far as that can be done now."""
    for entry in sorted(layout.root.glob(".trash-*")):
        debris.remove(entry)


def _refuse_used(path: Path) -> None:
    """Before anything is renamed: PINNED while somebody has it open or mounted.

    Not what is being sent: the kernel keeps that until it is over (`empty_trash`). Nor by an export of what lies above
    it: on an NFS server nothing could ever be let go.
    """
    if not btrfs.is_subvolume(path):
        return
    users = [user for user in users_of(path, from_above=False) if not user.name.startswith("btrfs pid ")]
    if users:
        who = ", ".join(names(users))
        raise Refused("PINNED", f"{path} is in use by {who}; it is kept until that ends", in_use_by=who)


def _refuse_nested(path: Path) -> None:
    """Before anything is renamed: what holds another subvolume cannot be removed."""
    if btrfs.is_subvolume(path) and btrfs.nested(path):
        remove(path)  # raises, and removes nothing


def _alone(known: Known, snapshot_id: str) -> int:
    """At most the bytes that dropping a snapshot gives back: what it added, or what was replaced after it.

    0 where that is not known.
    """
    here = [record.id for record in known.state.lineage if record.present]
    mine = known.path(snapshot_id)
    if snapshot_id not in here or mine is None:
        return 0
    at = here.index(snapshot_id)
    pairs = [(here[at + 1], snapshot_id)] if at + 1 < len(here) else []
    pairs += [(snapshot_id, here[at - 1])] if at else []
    found = [_between(known, *pair) for pair in pairs]
    counted = [count for count in found if count is not None]
    return min(counted) if len(counted) == len(pairs) and counted else 0


def _between(known: Known, base: str, target: str) -> int | None:
    older, newer = known.path(base), known.path(target)
    return None if older is None or newer is None else btrfs_send.estimate(older, newer, FREED_MAX_S)
