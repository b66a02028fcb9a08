"""Taking a consistency point of a thin volume: one command, which the pool makes a point in time of.

LVM suspends the live copy around it. What the device has not finished is finished first, and a file system that is
mounted from it is frozen meanwhile, by the kernel. So the record says

* `closed` if nobody had it open before or after, and it had no write between;
* `frozen` if one mount of the device itself is all that had it open, before and after;
* `crash` otherwise: what a power cut would have left. A program that has the device open may hold more in its memory,
  and what is mounted from a device upon it was not frozen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from agent.backends import lvm_keep as keeping
from agent.backends import rules
from agent.backends.base import NewSnapshot
from agent.backends.image_copy import fresh_dir
from agent.backends.image_layout import Stored, check_id, save_stored
from agent.backends.lvm_live import writes_done
from agent.backends.lvm_place import Ref, save_ref
from agent.backends.lvm_state import Found, Tools
from agent.disk import blockdev
from agent.disk.durable import disk_errors, fsync_dir
from agent.disk.lvm import Lv
from resilver.lineage import Consistency, Snapshot

STEPS: Final = (
    "snapshot.begun",
    "snapshot.cloned",
    "snapshot.recorded",
    "snapshot.renamed",
    "snapshot.synced",
)


def take(tools: Tools, found: Found, new: NewSnapshot) -> Snapshot:
    """See `ReplicaBackend.take_snapshot`; the caller has checked the space."""
    check_id(new.id)
    state = found.state
    held = state.stored.get(new.id)
    if held is not None and held.snapshot.parent == new.parent:
        return held.snapshot
    live = found.view.live
    rules.check_new(state, new, tools.place.full_name, live=live is not None)
    assert live is not None
    layout = tools.layout
    making = layout.new(new.id)
    with disk_errors(layout.root):
        fresh_dir(making)
        try:
            return _take(tools, found, live, new)
        except BaseException:
            keeping.throw_away(tools, making)
            raise


def _take(tools: Tools, found: Found, live: Lv, new: NewSnapshot) -> Snapshot:
    layout, place = tools.layout, tools.place
    making = layout.new(new.id)
    name = place.new_name()
    save_ref(making / "data", Ref(name))
    tools.step("snapshot.begun")
    named = (
        f"resilver.id={new.id}",
        f"resilver.cp={new.cp}",
        *([f"resilver.parent={new.parent}"] if new.parent else []),
    )
    before = _at_rest(live)
    made = place.make_snapshot(found.view, live, name, named, read_only=True)
    consistency = before if _at_rest(live) == before else (Consistency.CRASH, 0)
    save_ref(making / "data", Ref(name, made.uuid))
    tools.step("snapshot.cloned")
    record = new.record(made.size_bytes, consistency[0])
    save_stored(making, Stored(record, new.volume_id))
    tools.step("snapshot.recorded")
    making.rename(layout.snapshot(new.id))
    tools.step("snapshot.renamed")
    fsync_dir(layout.root)
    tools.step("snapshot.synced")
    return replace(record, present=True)


def _at_rest(live: Lv) -> tuple[Consistency, int]:
    """What the live copy is at this moment, with a number that a write would change while it is closed."""
    device = live.device
    if device is None:
        return Consistency.CLOSED, -1
    if not device.open_count:
        return Consistency.CLOSED, writes_done(device)
    if device.open_count == 1 and blockdev.mounts_of(device.number):
        return Consistency.FROZEN, 0
    return Consistency.CRASH, 0
