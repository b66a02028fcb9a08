"""The live copy as it is found: who has it open, and what it is to its tip.

The device mapper counts whoever has it open, so an answer of "nobody" is certain. It is *unmodified* only if nobody
has, its size is the tip's, and the pool maps both to the same blocks. In use, it is modified if anybody could write.

While it is being replaced it is *taken away*: deactivated, which LVM refuses while somebody has it open, and after
which nobody can open it. That it has to be brought back is written down first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent.backends import lvm_delta
from agent.backends.lvm_place import View
from agent.backends.lvm_state import Found, Tools
from agent.disk import blockdev, dm, lvm
from agent.disk.durable import disk_errors, read_json, remove_file, write_json
from agent.disk.inuse import InUseError, User, names
from agent.disk.lvm import Lv
from resilver.volume import LiveCopy, LiveState

SECTOR_BYTES: Final = 512
_WRITES_FIELD: Final = 4


def users(lv: Lv) -> list[User] | None:
    """Who has it open; None if nobody has. Empty if whoever has cannot be seen."""
    device = lv.device
    if device is None or not device.open_count:
        return None
    return blockdev.users_of(device.number)


def check_free(lv: Lv | None) -> None:
    """Raises InUseError if somebody has it open."""
    found = users(lv) if lv is not None else None
    if found is not None:
        raise InUseError(found)


def look(tools: Tools, found: Found, *, compare: bool) -> LiveCopy:
    """The live copy against its tip."""
    path, tip = str(tools.layout.live), found.state.tip
    lv = found.view.live
    if lv is None:
        return LiveCopy(LiveState.ABSENT, path, based_on=tip)
    using = users(lv)
    own: int | None = None
    if using is None:
        state, own = _against_tip(tools, found, lv, compare=compare)
        using = users(lv)
    if using is not None:
        may_write = not using or any(user.writes for user in using)
        state = LiveState.MODIFIED if may_write or _differs(found, lv) else LiveState.UNKNOWN
        own = None
    return LiveCopy(
        state=state,
        path=path,
        size_bytes=lv.size_bytes,
        allocated_bytes=allocated(lv),
        based_on=tip,
        in_use=using is not None,
        in_use_by=names(using) if using is not None else (),
        modified_bytes=own,
    )


def _differs(found: Found, lv: Lv) -> bool:
    tip = found.state.lineage.tip
    return tip is None or tip.size_bytes != lv.size_bytes


def _against_tip(tools: Tools, found: Found, lv: Lv, *, compare: bool) -> tuple[LiveState, int | None]:
    if found.state.lineage.tip is None:
        return LiveState.MODIFIED, None
    tip = found.tip_lv
    if not _differs(found, lv) and not (compare and tip is not None):
        return LiveState.UNKNOWN, None
    own = own_bytes(tools, found.view, lv, tip) if compare else None
    if not _differs(found, lv) and own == 0:
        return LiveState.UNMODIFIED, 0
    return LiveState.MODIFIED, own


def own_bytes(tools: Tools, view: View, lv: Lv, against: Lv | None) -> int | None:
    """How many bytes of a logical volume another one does not share; zero only if the two are equal."""
    if against is None or against.uuid == lv.uuid:  # what it held before it was written to is nowhere
        return None
    if against.size_bytes != lv.size_bytes:
        return max(1, lvm_delta.between(tools.place.pool(view), against, lv, tools.step).data_bytes)
    found = lvm_delta.between(tools.place.pool(view), against, lv, tools.step)
    return found.data_bytes or min(len(found), 1)


def allocated(lv: Lv) -> int:
    """The bytes that the pool holds for it; 0 while it is not active, because only then the kernel tells."""
    if lv.device is None:
        return 0
    with disk_errors(lv.path):
        _kind, words = dm.status(lv.dm_uuid)
    fields = words.split()
    return int(fields[0]) * SECTOR_BYTES if fields and fields[0].isdigit() else 0


def writes_done(device: dm.Device) -> int:
    """How many writes a device has had; it tells whether there was one between two looks."""
    with disk_errors(device.node):
        fields = Path(f"/sys/block/{device.node.name}/stat").read_text().split()
    return int(fields[_WRITES_FIELD])


# Taken away.


@contextlib.contextmanager
def taken_away(tools: Tools, lv: Lv | None) -> Iterator[None]:
    """Nobody can open the live copy for the block; afterwards what has its name is active if this one was.

    Without a live copy the one that comes is activated. Raises InUseError if somebody has it open.
    """
    record = tools.layout.root / "away.json"
    if lv is not None and lv.device is None:
        yield
        return
    if lv is not None:
        check_free(lv)
    write_json(record, {"lv": lv.uuid if lv is not None else ""})
    try:
        if lv is not None and not lvm.deactivate(lv):
            raise InUseError(users(lv) or [])
        yield
    finally:
        bring_back(tools)


def bring_back(tools: Tools) -> None:
    """Activates what has the live copy's name, if it was taken away; again is fine."""
    record = tools.layout.root / "away.json"
    if read_json(record) is None:
        return
    view = tools.place.surely()
    if view.live is not None:
        lvm.activate(view.live)
    remove_file(record)
