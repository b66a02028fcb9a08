"""Keeping and letting go of logical volumes: preserved copies, dropped snapshots, what was not finished.

* A preserved copy appears in one step, by the rename of its directory, in which `preserved.json` was written before.
* A former live copy is only removed when it is not active, so that nobody can write to it, and the pool then maps it
  as it maps a snapshot that is kept. Otherwise it is preserved.
* A snapshot is let go by a rename; its record is in the log of ancestry before. The logical volume is removed after.
"""

from __future__ import annotations

import uuid
from fnmatch import fnmatch
from pathlib import Path

import structlog

from agent.backends.image_copy import remove_tree
from agent.backends.image_keep import keep_directory, now_ms, overlap
from agent.backends.image_layout import append_records, load_preserved, save_preserved
from agent.backends.lvm_delta import between
from agent.backends.lvm_live import own_bytes
from agent.backends.lvm_place import Ref, View, load_ref, save_ref
from agent.backends.lvm_state import Found, Tools, named_by
from agent.disk import lvm
from agent.disk.durable import DIR_MODE, disk_errors, fsync_dir, make_dir, read_json, remove_file
from agent.disk.lvm import Lv
from resilver.errors import Refused
from resilver.lineage import NO_CP, Snapshot
from resilver.volume import PreservedCopy

_log = structlog.get_logger(__name__)
STEPS = ("prune.logged", "prune.renamed", "prune.removed", "drop.renamed")


def describe(
    tools: Tools, view: View, lv: Lv, snapshot: Snapshot | None, against: Lv | None, *, live: bool, resync_id: str
) -> PreservedCopy:
    """What a logical volume will be as a preserved copy; its own bytes are counted from `against`."""
    return PreservedCopy(
        id=str(uuid.uuid4()),
        path=lv.path,
        based_on=snapshot.id if snapshot is not None else "",
        cp=snapshot.cp if snapshot is not None else NO_CP,
        live=live,
        create_time_ms=now_ms(),
        size_bytes=lv.size_bytes,
        exclusive_bytes=own_bytes(tools, view, lv, against),
        resync_id=resync_id,
    )


def prepare_keep(tools: Tools, copy: PreservedCopy, lv: Lv, name: str) -> None:
    """Makes the directory that a live copy will be preserved in, on the disk; it counts once it is renamed."""
    layout = tools.layout
    directory = layout.keep(copy.id)
    remove_tree(directory)
    directory.mkdir(mode=DIR_MODE)
    save_ref(directory / "data", Ref(name, lv.uuid))
    save_preserved(directory, copy)
    make_dir(layout.preserved)
    fsync_dir(layout.root)


def keep_live(tools: Tools, view: View, lv: Lv, pid: str) -> None:
    """A former live copy becomes a preserved one: marked to be left out, and its directory moved into place."""
    mark(view, lv)
    keep_directory(tools.layout, tools.layout.keep(pid), pid)


def mark(view: View, lv: Lv) -> None:
    """Ours from now on, and left out when the group is activated."""
    words = [*([] if lv.skip else ["-k", "y"]), *([] if view.tag in lv.tags else ["--addtag", view.tag])]
    if words:
        lvm.lvm("lvchange", *words, lv.full_name)


def let_go(tools: Tools, view: View, lv: Lv, equal_to: Lv | None, snapshot: Snapshot | None) -> None:
    """Removes a former live copy if it equals that logical volume, else preserves it."""
    if equal_to is not None and lvm.deactivate(lv) and own_bytes(tools, view, lv, equal_to) == 0 and lvm.remove(lv):
        return
    copy = describe(tools, view, lv, snapshot, equal_to, live=True, resync_id="")
    prepare_keep(tools, copy, lv, lv.name)
    keep_live(tools, view, lv, copy.id)


def throw_away(tools: Tools, directory: Path) -> None:
    """Removes a directory that is part of nothing, and the logical volume that it names, if that is ours alone: not
    the live copy by now, because somebody renamed it, nor what another directory names.
    """
    inside = (directory, directory / "tree")
    refs = [ref for path in inside if (ref := load_ref(path / "data")) is not None]
    if refs:
        view = tools.place.surely()
        others = {ref.uuid for path, ref in named_by(tools.layout).items() if path not in inside}
        for ref in refs:
            lv = view.kept(ref)
            if lv is not None and view.tag in lv.tags and lv.uuid not in others and not lvm.remove(lv):
                raise Refused("IN_USE", f"{lv.full_name} is no longer needed, but somebody has it open")
    remove_tree(directory)


def sweep(tools: Tools) -> None:
    """At start: finishes what was being preserved, and removes what is part of nothing. A logical volume of those that
    somebody has open waits for the next start: it keeps nobody from the replica.
    """
    layout = tools.layout
    for entry in sorted(layout.root.iterdir()):
        name = entry.name
        if name.startswith((".new-", ".trash-")):
            try:
                throw_away(tools, entry)
            except Refused as error:
                if error.reason != "IN_USE":
                    raise
                _log.warning("not removed yet", volume=layout.volume, reason=error.reason, message=error.message)
        elif name.startswith(".keep-") or fnmatch(name, ".*.tmp"):
            remove_tree(entry)
    forget_next(tools)
    if layout.stage.exists() and read_json(layout.tree / "data") is None:
        remove_tree(layout.stage)


def forget_next(tools: Tools) -> bool:
    """Removes the next live copy of a commit that never came to its intention; False if somebody has it open, and its
    name stays written down.
    """
    path = tools.layout.root / "next.json"
    ref = load_ref(path)
    if ref is None:
        return True
    view = tools.place.surely()
    lv = view.find(ref)
    if lv is not None and view.tag in lv.tags and lv.name != tools.place.name and not lvm.remove(lv):
        return False
    remove_file(path)
    return True


def drop_preserved(tools: Tools, found: Found, pid: str) -> int:
    """Lets a preserved copy go; the bytes that it held alone."""
    layout = tools.layout
    copy = load_preserved(layout.preserved / pid)
    _check_closed(found.view.find(load_ref(layout.preserved / pid / "data")))
    with disk_errors(layout.preserved):
        gone = layout.trash(pid)
        throw_away(tools, gone)
        (layout.preserved / pid).rename(gone)
        fsync_dir(layout.preserved)
        fsync_dir(layout.root)
        tools.step("drop.renamed")
        throw_away(tools, gone)
    return copy.exclusive_bytes or 0


def drop_snapshot(tools: Tools, found: Found, snapshot_id: str) -> int:
    """Lets a snapshot that is not the tip go; the bytes that no neighbour shares."""
    layout, state = tools.layout, found.state
    lv = found.lv(snapshot_id)
    _check_closed(lv)
    with disk_errors(layout.snapshot(snapshot_id)):
        freed = _alone(tools, found, snapshot_id, lv)
        append_records(layout, [state.known[snapshot_id]], state, logged=[snapshot_id])
        tools.step("prune.logged")
        gone = layout.trash(snapshot_id)
        throw_away(tools, gone)
        layout.snapshot(snapshot_id).rename(gone)
        fsync_dir(layout.root)
        tools.step("prune.renamed")
        throw_away(tools, gone)
        tools.step("prune.removed")
    return freed


def _check_closed(lv: Lv | None) -> None:
    device = lv.device if lv is not None else None
    if lv is not None and device is not None and device.open_count:
        raise Refused("PINNED", f"{lv.full_name} is open: a transfer or a program reads it")


def _alone(tools: Tools, found: Found, snapshot_id: str, lv: Lv | None) -> int:
    """Bytes that neither the next older nor the next newer snapshot that is here has: what dropping it gives back."""
    here = [record.id for record in found.state.lineage if record.present]
    if lv is None or snapshot_id not in here:
        return 0
    at = here.index(snapshot_id)
    pool = tools.place.pool(found.view)
    near = [found.lv(one) for one in (*here[max(0, at - 1) : at], *here[at + 1 : at + 2])]
    maps = [between(pool, other, lv, tools.step) for other in near if other is not None]
    return overlap(maps[0], maps[1]) if len(maps) == 2 else sum(each.data_bytes for each in maps)
