"""What is asked before a replica is changed: the same of every backend, whatever holds the data.

Pure: a backend has found out what is there, and does what is decided. Nothing has changed when one of these raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from agent.backends.base import CommitOrder, NewSnapshot
from resilver.errors import Invalid, Refused
from resilver.lineage import Lineage, Origin, Snapshot, newest_shared
from resilver.volume import PreservedCopy


class Held(Protocol):
    """What a backend has found of a replica."""

    @property
    def lineage(self) -> Lineage: ...

    @property
    def volume_id(self) -> str: ...


def check_new(held: Held, new: NewSnapshot, where: object, *, live: bool) -> None:
    """Raises what forbids to take a snapshot; `where`: what to call the live copy, `live`: whether it is there."""
    tip = held.lineage.tip_id
    if tip != new.parent:
        raise Refused("TARGET_CHANGED", f"the tip here is {tip or 'none'}, not {new.parent or 'none'}", tip=tip)
    if held.volume_id and held.volume_id != new.volume_id:
        raise Refused("REPLICA_FOREIGN", f"the data here is of volume {held.volume_id}, not {new.volume_id}")
    if not live:
        raise Refused("NO_DATA", f"{where} is not there: a consistency point is taken of the live copy")


def check_target(order: CommitOrder, target: str, size_bytes: int | None = None) -> Snapshot:
    """The order's target; Invalid if the stage, of that target and size, is of something else."""
    tip = order.lineage.tip
    if tip is None or tip.id != target or (size_bytes is not None and tip.size_bytes != size_bytes):
        raise Invalid("INVALID_FIELD", f"the stage of {target} is not what the order names", field="lineage")
    return tip


def leaving(held: Held, order: CommitOrder, where: object, *, live: bool, adopted: bool) -> tuple[Snapshot, ...] | None:
    """The records that a commit takes off the lineage, tip first; None if the target is the tip already.

    `adopted`: whether another tool's leave with it; where they stay as they are, nothing of them is replaced. `live`:
    whether there is a live copy, which `where` is what to call it. Raises what forbids the commit.
    """
    mine = held.lineage
    if mine.tip_id != order.expected_tip:
        if mine.tip_id == order.lineage.tip_id:
            return None
        raise Refused(
            "TARGET_CHANGED",
            f"the tip here is {_named(mine.tip)}, and no longer the one that this was decided on",
            tip=mine.tip_id,
        )
    shared = newest_shared(mine, order.lineage)
    if not order.replace_unrelated:
        if held.volume_id and held.volume_id != order.volume_id:
            raise Refused("REPLICA_FOREIGN", f"the data here is of another volume, {held.volume_id}")
        if shared is None and (live or mine.records):
            raise Refused("REPLICA_UNRELATED", f"{where} has data that shares no snapshot with what would replace it")
    newer = mine.after(shared.id) if shared is not None else mine.records
    gone = tuple(record for record in newer if adopted or record.origin is not Origin.ADOPTED)
    if gone and shared is not None and not order.replace_own_data:
        span = f"{_named(gone[-1])} to {_named(gone[0])}"
        raise Refused(
            "TARGET_CHANGED",
            f"snapshots {span} are only here, and nothing said that they may be replaced",
            tip=mine.tip_id,
        )
    return gone


def check_bounds(
    volume: str, there: Sequence[PreservedCopy], more: Sequence[PreservedCopy], count_max: int, bytes_max: int
) -> None:
    """Raises PRESERVED_FULL if `more` copies could not be kept beside those that are.

    One whose own bytes nobody has counted counts as a whole: that is the largest, as a rule. A subvolume has no size
    (0) either, and then only the number of copies bounds it.
    """
    count = len(there) + len(more)
    kept = sum(copy.size_bytes if copy.exclusive_bytes is None else copy.exclusive_bytes for copy in (*there, *more))
    if not more or (count <= count_max and (not bytes_max or kept <= bytes_max)):
        return
    bound = f"{count_max} copies" + (f" or {bytes_max} bytes" if bytes_max else "")
    raise Refused(
        "PRESERVED_FULL",
        f"{len(there)} preserved copies of {volume} are here already; with {len(more)} more they would exceed "
        f"{bound}. Export what is still wanted, and drop the rest",
        next_command=f"resilver preserved {volume}",
    )


def _named(record: Snapshot | None) -> str:
    if record is None:
        return "none"
    return record.name if record.origin is Origin.ADOPTED else f"{record.cp} ({record.id})"


def drop_each(ids: Iterable[str], drop: Callable[[str], int]) -> tuple[tuple[str, int], ...]:
    """Drops one after the other, and passes over what cannot go, so that it holds up no other.

    (id, bytes freed) of each that went.
    """
    done = []
    for one in ids:
        try:
            done.append((one, drop(one)))
        except Refused as error:
            if error.reason not in {"PINNED", "NOT_SUPPORTED"}:
                raise
    return tuple(done)
