"""What each replica is to the primary, what is wrong, and what to run next.

The rules:

* A report that is not fresh decides nothing: UNKNOWN. Its figures are still worked out, as the last that was known,
  because what a member may need is kept for it also while it is away.
* Before there is a primary data is UNKNOWN too: there is nothing to compare it with.
* A secondary whose live copy was written to has data of its own: DIVERGED. One that is in use cannot be compared:
  STALE, so that a resync finds out at its commit, under the lease.
* The primary is compared with nothing but itself; what is wrong with it is the volume's problem.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from coordinator.core.claims import (
    Problem,
    has_data,
    is_foreign,
    is_here,
    newest_name,
    primary_problems,
    recovering_problem,
    sorted_replicas,
)
from coordinator.core.cluster import ReplicaState, ReplicaView, Role, Status, VolumeState, VolumeView
from coordinator.core.words import age, counted_snapshots, listed, name_of, silent, size
from resilver.lineage import Lineage, Relation, Snapshot, newest_in_common, newest_shared, relate
from resilver.volume import LiveCopy, LiveState, Presence, ReplicaReport

__all__ = [
    "Problem",
    "problems_of_replica",
    "problems_of_volume",
    "reference_lineage",
    "role_of",
    "status_of",
    "unseen",
    "volume_state",
]

EXTENTS_WARN_COUNT: Final = 100_000  # an agent compacts above half as many; these it cannot keep up with
EXTENTS_PER_SECOND: Final = 50_000

_RECEIVED_IN_PLACE: Final = ("zfs",)
"""Kinds where what other tools receive changes the live copy; with the others it lies beside."""

_S = ReplicaState


def reference_lineage(view: VolumeView) -> Lineage:
    """What replicas are compared with: the primary's last known lineage, also if it is away.

    If nothing is known of that, the lineage up to the newest known CP as any replica has it; else nothing.
    """
    primary = view.primary
    if primary is not None and not is_foreign(view, primary) and (primary.lineage.records or is_here(view, primary)):
        return primary.lineage
    newest = view.record.newest_id
    holders = [one for one in sorted_replicas(view) if not is_foreign(view, one) and one.lineage.find(newest)]
    holders.sort(key=lambda one: not one.fresh)
    return holders[0].lineage.since(newest) if holders else Lineage()


def status_of(view: VolumeView, node: str) -> Status:
    """The state of any replica, and the figures behind it; worked out once for each view."""
    known = view.compared.get(node)
    if known is None:
        known = view.compared[node] = _status(view, node)
    return known


def _status(view: VolumeView, node: str) -> Status:
    replica = view.replica(node)
    reference = reference_lineage(view)
    state = _state(view, replica, reference)
    mine = replica.lineage
    if not mine.records or not reference.records or is_foreign(view, replica):
        behind = len(reference) if state is _S.EMPTY and reference.records else None
        return Status(state, behind_cps=behind)
    fork = newest_shared(mine, reference)
    if fork is None:
        return Status(state)
    common = newest_in_common(mine, reference)
    return Status(
        state,
        common=common if isinstance(common, Snapshot) else None,
        fork=fork,
        behind_cps=len(reference.after(fork.id)),
        own_cps=len(mine.after(fork.id)),
    )


def _state(view: VolumeView, replica: ReplicaView, reference: Lineage) -> ReplicaState:
    report = replica.report
    if report is None or not replica.fresh:
        return _S.UNKNOWN
    if not has_data(replica):
        return _S.LOST if report.presence is Presence.LOST else _S.EMPTY
    if is_foreign(view, replica):
        return _S.FOREIGN
    if replica.node == view.record.primary:
        return _S.IN_SYNC
    first_sight = not view.record.primary and not view.record.epoch
    if first_sight or (report.lineage.records and not reference.records and view.record.newest_id):
        # Neither the primary nor anybody else shows the newest known CP: what this one is to it cannot be said.
        return _S.UNKNOWN
    return _compared(report.lineage, reference, report.live.state)


def _compared(mine: Lineage, reference: Lineage, live: LiveState) -> ReplicaState:
    relation = relate(mine, reference) if mine.records and reference.records else Relation.UNRELATED
    if relation is Relation.UNRELATED:
        return _S.UNRELATED
    if relation in (Relation.AHEAD, Relation.DIVERGED) or live is LiveState.MODIFIED:
        return _S.DIVERGED
    return _S.IN_SYNC if relation is Relation.EQUAL and live is LiveState.UNMODIFIED else _S.STALE


def role_of(view: VolumeView, node: str) -> Role:
    if node == view.record.primary:
        return Role.PRIMARY
    return Role.SECONDARY if node in view.record.members else Role.NEWCOMER


def volume_state(view: VolumeView) -> VolumeState:
    """One word: the first that holds of UNINITIALIZED, RECOVERING, BLOCKED, OPENING, DEGRADED, HEALTHY."""
    entry = view.entry
    if entry is None or not entry.record.epoch:
        return VolumeState.UNINITIALIZED
    if entry.recovering:
        return VolumeState.RECOVERING
    if not entry.record.primary or primary_problems(view, 0):
        return VolumeState.BLOCKED
    if entry.opening:
        return VolumeState.OPENING
    in_sync = all(status_of(view, node).state is _S.IN_SYNC for node in view.replicas)
    return VolumeState.HEALTHY if in_sync else VolumeState.DEGRADED


# Problems.


def problems_of_volume(view: VolumeView, now_ms: int) -> tuple[Problem, ...]:
    """What is wrong with the volume as a whole; each replica's own problems stand beside it."""
    entry, name = view.entry, view.name
    found: list[Problem] = []
    if entry is None or not entry.record.epoch:
        found.append(_first_sight(view))
    else:
        elect = f"resilver elect {name}"
        found.extend(
            problem._replace(next_command=elect) for problem in recovering_problem(view, reference_lineage(view))
        )
        found.extend(problem._replace(next_command=elect) for problem in primary_problems(view, now_ms))
        if not entry.record.primary:
            found.append(Problem("PRIMARY_AWAY", f"{name} has no primary any more", elect))
        if entry.recovering and not found:
            message = f"the store knew less of {name} than a replica; an election settles what is right"
            found.append(Problem("RECOVERING", message, elect))
        if entry.opening:
            message = f"epoch {entry.record.epoch} is being opened on {entry.record.primary}: its first CP is awaited"
            found.append(Problem("OPENING", message, f"resilver explain {name}"))
    if entry is not None and entry.pause is not None:
        until = "" if entry.pause.until_ms is None else f", for {age(entry.pause.until_ms - now_ms)} more"
        by = f" by {entry.pause.principal}" if entry.pause.principal else ""
        found.append(Problem("PAUSED", f"paused{by}{until}: {entry.pause.reason}", f"resilver unpause {name}"))
    return tuple(found)


def _first_sight(view: VolumeView) -> Problem:
    holders = [one.node for one in sorted_replicas(view) if one.fresh and has_data(one)]
    if not holders:
        return Problem("NO_DATA", f"{view.name} has no primary, and no node that answers has data of it")
    if all(_live_state(view.replica(node)) is LiveState.ABSENT for node in holders):
        message = (
            f"{view.name} has no primary, and nobody who answers has a live copy, only snapshots: {listed(holders)}"
        )
        return Problem("NO_DATA", message, "resilver nodes")
    message = f"{view.name} has no primary yet; data is on {listed(holders)}"
    if len(holders) == 1:
        return Problem("UNINITIALIZED", message, f"resilver resync {view.name}")
    return Problem("UNINITIALIZED", message, f"resilver elect {view.name} --dry-run")


def problems_of_replica(view: VolumeView, node: str, now_ms: int) -> tuple[Problem, ...]:
    """Why a replica is not in sync and what else is wrong with it, the state first."""
    replica = view.replica(node)
    status = status_of(view, node)
    found = [] if node == view.record.primary or not view.record.epoch else _of_state(view, replica, status, now_ms)
    if replica.report is not None and replica.fresh:
        found.extend(_of_report(replica.report, node))
    if any(problem.next_command.startswith("resilver resync ") for problem in found) and primary_problems(view, now_ms):
        # A resync would be refused: there is no primary to copy from until an election has settled that.
        elect = f"resilver elect {view.name}"
        found = [
            problem._replace(next_command=elect) if problem.next_command.startswith("resilver resync ") else problem
            for problem in found
        ]
    return tuple(found)


def _of_state(view: VolumeView, replica: ReplicaView, status: Status, now_ms: int) -> list[Problem]:
    name, node = view.name, replica.node
    replacing = f"resilver resync {name} --replace {node}"
    found = []
    match status.state:
        case ReplicaState.UNKNOWN if replica.fresh:
            message = f"cannot be compared: the primary does not show the newest known CP {newest_name(view)}"
            found.append(Problem("UNKNOWN", message, f"resilver elect {name}"))
        case ReplicaState.UNKNOWN:
            reason = "DUPLICATE_NODE" if replica.duplicate else "UNKNOWN"
            found.append(Problem(reason, silent(replica, now_ms), "resilver nodes"))
        case ReplicaState.LOST:
            found.append(_lost(view, replica, replacing))
        case ReplicaState.FOREIGN:
            other = replica.report.volume_id if replica.report is not None else ""
            message = f"the data on {node} is another volume's ({other}); nothing replaces it until you name it"
            found.append(Problem("FOREIGN", message, replacing))
        case ReplicaState.UNRELATED:
            message = f"the data on {node} has nothing in common with {name}; nothing replaces it until you name it"
            found.append(Problem("UNRELATED", message, replacing))
        case ReplicaState.EMPTY:
            who = "empty" if node in view.record.members else "a newcomer, empty"
            message = f"{who}: the first resync copies the whole volume"
            found.append(Problem("EMPTY", message, f"resilver resync {name}"))
        case ReplicaState.DIVERGED:
            found.append(Problem("DIVERGED", _split(view, replica, status), f"resilver explain {name} {node}"))
        case ReplicaState.STALE:
            found.append(_stale(view, replica, status, now_ms))
        case ReplicaState.IN_SYNC:
            pass
    return found


def unseen(replica: ReplicaView) -> str:
    """Why a LOST replica could not be looked at, as its agent tells; empty if it has looked, and the data is gone."""
    told = replica.report.problems if replica.report is not None else ()
    return "" if any(problem.startswith("REPLICA_LOST:") for problem in told) else next(iter(told), "")


def _lost(view: VolumeView, replica: ReplicaView, replacing: str) -> Problem:
    node, name = replica.node, view.name
    if unseen(replica):  # which is told besides: to begin anew is no way out of it
        return Problem("LOST", f"{node} cannot look at its copy of {name}, whatever it holds: see what it tells of it")
    return Problem("LOST", f"{node} had data of {name}, and its disk is not there: mount it, or begin anew", replacing)


def _split(view: VolumeView, replica: ReplicaView, status: Status) -> str:
    fork = status.fork
    where = f"split at {name_of(fork)}" if fork is not None else "split"
    after = replica.lineage.after(fork.id) if fork is not None else ()
    if fork is not None and after and fork.id == reference_lineage(view).tip_id and _known_to(view, after):
        return (
            f"it has the primary's snapshots in another order, with {replica.lineage.tip_name} as its newest. "
            "A resync brings it to the primary's order."
        )
    own = [counted_snapshots(after)] if after else []
    live = replica.report.live if replica.report is not None else LiveCopy()
    users = f" It is in use by {listed(live.in_use_by)}." if live.in_use_by else ""
    if live.state is LiveState.MODIFIED and may_only(replica):
        sure = f"{own[0]} {'is' if len(after) == 1 else 'are'} only on {replica.node}, and " if own else ""
        there = "it" if own else replica.node
        return (
            f"{where}; {sure}there may be live writes that only {there} has, because it is open for writing.{users} "
            "Nothing replaces what it has until you say so."
        )
    if live.state is LiveState.MODIFIED:
        amount = f" ({size(live.modified_bytes)})" if live.modified_bytes is not None else ""
        own.append(f"live writes{amount}")
    verb = "is" if own in (["1 CP"], ["1 snapshot"]) else "are"
    if after and live.state is not LiveState.MODIFIED and _others_have(view, after):
        return (
            f"{where}; another tool has gone on to {replica.lineage.tip_name}, which is on {view.record.primary} too, "
            "but off the volume's lineage. Stop that tool's replication, then resync."
        )
    brought = _brought(view, replica, fork)
    return (
        f"{where}; {' and '.join(own)} {verb} only on {replica.node}.{users}{brought} "
        "Nothing replaces them until you say so."
    )


def may_only(replica: ReplicaView) -> bool:
    """Whether its live copy counts as modified only because it is in use: nobody could compare it."""
    live = replica.report.live if replica.report is not None else LiveCopy()
    return live.in_use is True and live.state is LiveState.MODIFIED and live.modified_bytes is None


def _known_to(view: VolumeView, after: Sequence[Snapshot]) -> bool:
    ids = reference_lineage(view).ids()
    return all(one.id in ids for one in after)


def _brought(view: VolumeView, replica: ReplicaView, fork: Snapshot | None) -> str:
    """What another tool has brought here since, as a sentence, where tools receive into the live copy."""
    mine, primary = replica.report, view.replica(view.record.primary).report
    if fork is None or mine is None or primary is None or mine.backend not in _RECEIVED_IN_PLACE:
        return ""
    theirs = {one.id for one in primary.others}
    since = [one for one in mine.others if one.id in theirs and one.create_time_ms > fork.create_time_ms]
    if not since:
        return ""
    newest = max(since, key=lambda one: one.create_time_ms)
    return f" Another tool has brought {newest.name} here from {view.record.primary}: stop its replication."


def _live_state(replica: ReplicaView) -> LiveState:
    return replica.report.live.state if replica.report is not None else LiveState.ABSENT


def _others_have(view: VolumeView, after: Sequence[Snapshot]) -> bool:
    """Whether the primary has all of these too, made by another tool since its epoch was opened."""
    report = view.replica(view.record.primary).report
    others = {one.id for one in report.others} if report is not None else set()
    return all(one.id in others for one in after)


def _stale(view: VolumeView, replica: ReplicaView, status: Status, now_ms: int) -> Problem:
    name, node = view.name, replica.node
    live = replica.report.live if replica.report is not None else LiveCopy()
    behind = _behind(view, status, now_ms)
    resync = f"resilver resync {name}"
    if live.state is LiveState.UNKNOWN:
        users = f" by {listed(live.in_use_by)}" if live.in_use_by else ""
        message = f"{behind}its live copy is in use{users}, so it cannot be compared; a resync waits for it at its end"
        return Problem("IN_USE", message, resync)
    if live.state is LiveState.ABSENT and not status.behind_cps:
        return Problem("STALE", "its snapshots are in sync, but it has no live copy; a resync makes one", resync)
    if status.common is None:
        fork = f" ({name_of(status.fork)})" if status.fork is not None else ""
        message = f"{behind}no common snapshot is left on both sides{fork}; only a full copy is possible"
        return Problem("BASE_GONE", message, f"{resync} --to {node} --full")
    message = f"{behind}common snapshot {name_of(status.common)} is intact, a delta is possible."
    return Problem("STALE", message, resync)


def _behind(view: VolumeView, status: Status, now_ms: int) -> str:
    """`47m behind; `, counted from the first CP that is lacking; the number of CPs where times are not known."""
    if not status.behind_cps or status.fork is None:
        return ""
    lacking = reference_lineage(view).after(status.fork.id)
    if lacking and lacking[-1].create_time_ms:
        return f"{age(now_ms - lacking[-1].create_time_ms)} behind; "
    return f"{counted_snapshots(lacking)} behind; "


def _of_report(report: ReplicaReport, node: str) -> list[Problem]:
    found = []
    if report.reserve_bytes and report.free_bytes < report.reserve_bytes:
        message = (
            f"{size(report.free_bytes)} free is below the reserve of {size(report.reserve_bytes)}: "
            "no snapshot is taken and nothing received"
        )
        found.append(Problem("NO_SPACE", message, f"resilver prune {report.volume}"))
    extents = report.live.extent_count
    if extents is not None and extents >= EXTENTS_WARN_COUNT:
        message = (
            f"the live copy is in {extents:,} extents: each CP stalls a writer for about "
            f"{extents / EXTENTS_PER_SECOND:.1f} s"
        )
        found.append(Problem("FRAGMENTED", message))
    for text in report.problems:
        head, colon, rest = text.partition(": ")
        coded = bool(colon) and head.replace("_", "").isalpha() and head.isupper()
        replacing = f"resilver resync {report.volume} --replace {node}" if head == "KEEPS_BEING_WRITTEN" else ""
        found.append(Problem(head, rest, replacing) if coded else Problem("REPORTED", text))
    return found
