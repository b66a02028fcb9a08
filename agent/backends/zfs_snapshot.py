"""Taking a consistency point.

A snapshot of ZFS is a point in time under any writer, and holds every write that has returned; what lies in a cache or
was written through a mapping is brought to the file system just before. The snapshot comes first, marked as one that is
being taken; its record, which makes it the tip, when the caller has asked for it. Before that it is debris.
Who uses the live copy is looked for before and after: `closed` is only what nobody used at either time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from agent.backends import rules, zfs_live
from agent.backends.base import NewSnapshot
from agent.backends.zfs_layout import (
    OURS,
    RECORD,
    TAG,
    TAKING,
    Layout,
    State,
    record_property,
    save_tip,
)
from agent.backends.zfs_log import append_records
from agent.disk import zfs
from resilver.errors import Damaged
from resilver.lineage import Consistency, Snapshot

STEPS: Final = (
    "snapshot.logged",
    "snapshot.taken",
    "snapshot.recorded",
    "snapshot.noted",
    "snapshot.pointed",
)


def taken_before(layout: Layout, state: State, new: NewSnapshot) -> Snapshot | None:
    """The record of the same snapshot if it is here; else raises what forbids to take it."""
    known = state.known.get(new.id)
    if known is not None and new.id in state.where and known.parent == new.parent:
        return known
    rules.check_new(state, new, layout.live, live=state.head is not None)
    return None


def take(layout: Layout, state: State, new: NewSnapshot, step: Callable[[str], None]) -> Snapshot:
    """See `ReplicaBackend.take_snapshot`; the caller has checked the space and the tip."""
    assert state.head is not None
    append_records(layout, state.lineage, {}, state)  # adopted ones are what they are now from the first CP on
    step("snapshot.logged")
    found = zfs_live.uses(layout, state.head)
    zfs_live.flush(found)
    mark = "".join(letter for letter in new.id if letter.isalnum())[:12]
    name = f"{layout.live}@{OURS}{new.cp}-{mark}"
    zfs.run("zfs", "snapshot", "-o", f"{TAKING}={new.id}", name)
    try:
        step("snapshot.taken")
        after = zfs_live.uses(layout, state.head)
        closed = not ((found.who or after.who) and found.writable)
        made = new.record(0, Consistency.CLOSED if closed else Consistency.SYNCED)
        zfs.run("zfs", "set", f"{RECORD}={record_property(made, new.volume_id)}", name)
    except BaseException:
        zfs.destroy(name)
        raise
    step("snapshot.recorded")
    taken = zfs.look(name)
    if taken is None:
        raise Damaged("IO_ERROR", f"{name} was destroyed while it was being taken")
    append_records(layout, [made], {made.id: taken.guid}, state)
    step("snapshot.noted")
    zfs.hold(TAG, name)
    save_tip(layout, made.id, new.volume_id)
    step("snapshot.pointed")
    return made
