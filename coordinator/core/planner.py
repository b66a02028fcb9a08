"""What each replica needs to be brought to one snapshot, from whom, what is kept first, and why.

The rules:

* What has nothing of its own (STALE, EMPTY) is replaced without a word. What has (DIVERGED) is replaced by an explicit
  resync, and every row says in words what is preserved. What nobody can place (UNRELATED, FOREIGN, LOST) is
  blocked until its node is named.
* A delta is never turned into a full copy in silence: without a base the row is blocked, and says what would do it.
* The base is the newest snapshot that the replica and a source both still have; every node that has base and target
  is a source, in a fixed order.
* Snapshots that other tools made are a base like any other, and are never preserved, because nothing replaces them.
* Kinds of volume that cannot read each other's deltas do not mix; those that exchange blocks do.
* The primary is settled before a plan is made; reports are fresh.

Pure: no I/O, no clock. Sizes are filled in by whoever asks a source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from coordinator.core.claims import is_here, next_epoch, sorted_replicas
from coordinator.core.cluster import (
    PlanAction,
    Refusal,
    ReplicaPlan,
    ReplicaState,
    ReplicaView,
    VolumePlan,
    VolumeView,
)
from coordinator.core.status import reference_lineage, status_of, unseen
from coordinator.core.words import listed, name_of, silent, span
from resilver.lineage import (
    NO_CP,
    BaseGone,
    ConsistencyPoint,
    Lineage,
    NothingInCommon,
    Origin,
    Snapshot,
    newest_in_common,
    newest_shared,
)
from resilver.volume import LiveCopy, LiveState

ETAG_BYTES: Final = 4

_BLOCKS: Final = ("image", "lvm-thin")
"""Kinds that exchange blocks. Every other kind sends its file system's own stream, which only its own kind reads."""

_S = ReplicaState
_MUST_BE_NAMED: Final = {
    _S.UNRELATED: ("REPLICA_UNRELATED", "its data has nothing in common with the volume"),
    _S.FOREIGN: ("REPLICA_FOREIGN", "its data is another volume's"),
    _S.LOST: ("REPLICA_LOST", "its data was on a disk that is not there"),
}


@dataclass(frozen=True, slots=True)
class _Goal:
    """What all rows of a plan are to reach. `snapshot` None: it is taken first, as a child of `lineage`'s tip."""

    view: VolumeView
    snapshot: Snapshot | None
    cp: ConsistencyPoint
    lineage: Lineage
    full: bool
    replaced: frozenset[str]
    now_ms: int

    @property
    def target(self) -> str:
        return self.snapshot.id if self.snapshot is not None else ""


def plan_volume(
    view: VolumeView,
    *,
    target: Snapshot | None,
    takes_snapshot: bool,
    nodes: frozenset[str] = frozenset(),
    full: bool = False,
    replace: frozenset[str] = frozenset(),
    now_ms: int,
) -> VolumePlan:
    """One row for every replica but the primary, by name; `nodes` empty means all of them.

    `target` None is the primary's tip. While an epoch is being opened its opening CP is still to be taken.
    """
    primary = view.replica(view.record.primary)
    takes_snapshot = takes_snapshot or (view.entry is not None and view.entry.opening)
    tip = target or primary.lineage.tip
    if not is_here(view, primary):
        message = f"the primary {view.record.primary or '(none)'} does not answer with data of {view.name}"
        refusal = Refusal(("PRIMARY_AWAY",), message, next_command=f"resilver elect {view.name}")
        return VolumePlan(view.name, view.record.primary, NO_CP, takes_snapshot, (), refusal)
    if takes_snapshot:
        cp = ConsistencyPoint(view.record.epoch or next_epoch(view), primary.lineage.cp.sequence + 1)
        goal = _Goal(view, None, cp, primary.lineage, full, replace, now_ms)
    elif tip is None:
        message = f"{view.name} has no consistency point yet"
        refusal = Refusal(("NO_DATA",), message, next_command=f"resilver plan {view.name} --snapshot")
        return VolumePlan(view.name, primary.node, NO_CP, takes_snapshot, (), refusal)
    else:
        goal = _Goal(view, tip, tip.cp, _lineage_to(view, tip.id), full, replace, now_ms)
    rows = tuple(
        _row(goal, one)
        for one in sorted_replicas(view)
        if one.node != primary.node and (not nodes or one.node in nodes)
    )
    return VolumePlan(view.name, primary.node, goal.cp, takes_snapshot, rows)


def plan_etag(plans: Sequence[VolumePlan]) -> str:
    """Eight hex digits that change with whatever a plan would do, not with sizes, times or free space."""
    facts = [
        (
            plan.volume,
            plan.primary,
            str(plan.target_cp),
            plan.takes_snapshot,
            plan.refusal.reasons if plan.refusal is not None else (),
            sorted(_facts(row) for row in plan.replicas),
        )
        for plan in sorted(plans, key=lambda plan: plan.volume)
    ]
    return hashlib.blake2b(repr(facts).encode(), digest_size=ETAG_BYTES).hexdigest()


def _facts(row: ReplicaPlan) -> tuple[object, ...]:
    return (
        row.node,
        row.state.value,
        row.action.value,
        row.base,
        row.target,
        row.expected_tip,
        row.sources,
        row.preserve,
        row.replace_own_data,
        row.replace_unrelated,
        row.refusal.reasons if row.refusal is not None else (),
    )


def _lineage_to(view: VolumeView, target: str) -> Lineage:
    """The target and what it descends from, as the primary has it, or whoever has it."""
    for lineage in (reference_lineage(view), *(one.lineage for one in sorted_replicas(view) if is_here(view, one))):
        found = lineage.since(target)
        if found.records:
            return found
    return Lineage()


# One row.


def _row(goal: _Goal, replica: ReplicaView) -> ReplicaPlan:
    state = status_of(goal.view, replica.node).state
    report = replica.report
    blank = ReplicaPlan(
        node=replica.node,
        state=state,
        action=PlanAction.BLOCKED,
        why="",
        target=goal.target,
        target_cp=goal.cp,
        expected_tip=replica.lineage.tip_id,
        exact=goal.snapshot is not None,
        free_bytes=report.free_bytes if report is not None else 0,
    )
    if state is _S.UNKNOWN and replica.fresh:
        message = f"{replica.node} cannot be compared: the primary is without the newest known CP"
        return _blocked(blank, "PRIMARY_BEHIND", message, f"resilver elect {goal.view.name}")
    if state is _S.UNKNOWN:
        reason = "DUPLICATE_NODE" if replica.duplicate else "NODE_OFFLINE"
        return _blocked(blank, reason, silent(replica, goal.now_ms), "resilver nodes")
    mismatch = _backend_mismatch(goal.view, replica)
    if mismatch:
        return _blocked(blank, "BACKEND_MISMATCH", mismatch, f"resilver explain {goal.view.name} {replica.node}")
    if state in _MUST_BE_NAMED:
        return _to_be_named(goal, blank, replica)
    if state is _S.EMPTY:
        return _full(goal, replace(blank, why="it is empty: everything that is allocated is copied"))
    return _changed(goal, blank, replica)


def _to_be_named(goal: _Goal, row: ReplicaPlan, replica: ReplicaView) -> ReplicaPlan:
    reason, why = _MUST_BE_NAMED[row.state]
    node = replica.node
    unlooked = unseen(replica) if row.state is _S.LOST else ""
    if unlooked and node not in goal.replaced:
        message = f"{node} cannot look at its copy ({unlooked}); nothing replaces it until {node} is named"
        return _blocked(row, reason, message, f"resilver explain {goal.view.name} {node}")
    if node not in goal.replaced:
        message = f"{why}; nothing replaces it until {node} is named"
        return _blocked(row, reason, message, f"resilver resync {goal.view.name} --replace {node}")
    kept = () if row.state is _S.LOST else _all_it_has(replica)
    # A lost disk has no tip to compare with; the agent looks at what is there when it commits.
    tip = "" if row.state is _S.LOST else row.expected_tip
    named = replace(row, why=f"{why}; named by --replace", preserve=kept, replace_unrelated=True, expected_tip=tip)
    return _full(goal, named)


def _changed(goal: _Goal, row: ReplicaPlan, replica: ReplicaView) -> ReplicaPlan:
    """A replica of this volume that has data: IN_SYNC, STALE or DIVERGED."""
    lineage, live = replica.lineage, _live(replica)
    holds = bool(goal.target) and lineage.find(goal.target) is not None
    if row.state is not _S.DIVERGED and holds and live is LiveState.UNMODIFIED:
        return replace(row, action=PlanAction.NONE, why="it has the target, and its live copy is unmodified")
    # Only what is newer than the fork is its own: other tools may have let go of older ones on one side alone.
    kept, fork = goal.lineage.ids(), newest_shared(lineage, goal.lineage)
    after = lineage.after(fork.id) if fork is not None else lineage.records
    own = [record for record in after if record.id not in kept]
    if own or row.state is _S.DIVERGED:
        # An agent refuses to replace what keeps being written to, unless an operator has named the node.
        named = row.node in goal.replaced
        ours = [record for record in own if record.origin is not Origin.ADOPTED]
        row = replace(row, preserve=_own_data(ours, live), replace_own_data=True, replace_unrelated=named)
    if goal.full and not holds:
        return _full(goal, replace(row, why=_why(goal, replica, f"a full copy was asked for{_left_alone(own)}")))
    found = newest_in_common(lineage, goal.lineage)
    if isinstance(found, NothingInCommon):
        return _blocked(row, "REPLICA_UNRELATED", str(found), f"resilver explain {goal.view.name} {row.node}")
    sources = _sources(goal, replica)
    base = _base(goal, replica, sources)
    if base is None and isinstance(found, BaseGone):
        next_command = f"resilver resync {goal.view.name} --to {row.node} --full"
        return _blocked(row, "BASE_GONE", str(found), next_command)
    if base is None:
        return _no_source(goal, row)
    able = tuple(one.node for one in sources if _has(one, base.id))
    left = _left_alone(own)
    why = _why(goal, replica, f"{name_of(base)} is the newest snapshot in common{left}")
    named_base = replace(row, base=base.id, base_cp=base.cp, base_name=base.name)
    return replace(named_base, action=PlanAction.DELTA, why=why, sources=able)


def _full(goal: _Goal, row: ReplicaPlan) -> ReplicaPlan:
    sources = _sources(goal, goal.view.replica(row.node))
    if not sources:
        return _no_source(goal, row)
    return replace(row, action=PlanAction.FULL, sources=tuple(one.node for one in sources))


def _no_source(goal: _Goal, row: ReplicaPlan) -> ReplicaPlan:
    name = name_of(goal.snapshot) if goal.snapshot is not None else str(goal.cp)
    message = f"no other node that answers still has {name} and a snapshot to start from"
    return _blocked(row, "NO_SOURCE", message, f"resilver snapshots {goal.view.name}")


def _blocked(row: ReplicaPlan, reason: str, message: str, next_command: str) -> ReplicaPlan:
    """The row with its refusal, and with nothing that it would have replaced."""
    refusal = Refusal((reason,), message, next_command=next_command)
    return replace(
        row,
        action=PlanAction.BLOCKED,
        why=message,
        preserve=(),
        replace_own_data=False,
        replace_unrelated=False,
        refusal=refusal,
    )


# Sources and base.


def _sources(goal: _Goal, replica: ReplicaView) -> tuple[ReplicaView, ...]:
    """Who is here and has the target: the primary first, then by priority, then by name.

    A target that is still to be taken is on the primary alone.
    """
    primary = goal.view.record.primary
    able = [
        one
        for one in sorted_replicas(goal.view)
        if one.node != replica.node
        and is_here(goal.view, one)
        and (_has(one, goal.target) if goal.target else one.node == primary)
        and _exchange(_kind(one), _kind(replica))
    ]
    return tuple(sorted(able, key=lambda one: (one.node != primary, -one.priority, one.node)))


def _base(goal: _Goal, replica: ReplicaView, sources: Sequence[ReplicaView]) -> Snapshot | None:
    """The newest snapshot that the replica and any source both have; its own copy of the target needs no source."""
    held = replica.lineage.find(goal.target)
    if held is not None and held.present:
        return held
    mine = {record.id for record in replica.lineage if record.present}
    for record in goal.lineage:
        if record.id in mine and any(_has(one, record.id) for one in sources):
            return record
    return None


def _has(replica: ReplicaView, snapshot_id: str) -> bool:
    record = replica.lineage.find(snapshot_id)
    return record is not None and record.present


def _backend_mismatch(view: VolumeView, replica: ReplicaView) -> str:
    """Why the replica cannot take what the primary sends, and what would be right; empty if it can."""
    node, primary = replica.node, view.record.primary
    mine, theirs = _kind(replica), _kind(view.replica(primary))
    if _exchange(mine, theirs):
        return ""
    right = _BLOCKS if theirs in _BLOCKS else (theirs,)
    kinds = " or ".join(f'"{kind}"' for kind in right)
    return (
        f"{node} keeps {view.name} as {mine}, the primary {primary} as {theirs}, and neither can read what the other "
        f"sends: configure {view.name} on {node} with backend = {kinds}"
    )


def _exchange(mine: str, theirs: str) -> bool:
    """Whether two kinds read each other's deltas; an agent that tells no kind is given the benefit of the doubt."""
    return "" in (mine, theirs) or mine == theirs or (mine in _BLOCKS and theirs in _BLOCKS)


def _kind(replica: ReplicaView) -> str:
    return replica.report.backend if replica.report is not None else ""


# Words.


def _own_data(own: Sequence[Snapshot], live: LiveState) -> tuple[str, ...]:
    words = []
    if own:
        # A pruned one has left its record only, and is not preserved; the newest is never pruned.
        words.append(span([record for record in own if record.present] or own))
    if live is LiveState.MODIFIED:
        words.append("live writes")
    elif live is LiveState.UNKNOWN:
        words.append("live writes, if there are any")
    return tuple(words)


def _all_it_has(replica: ReplicaView) -> tuple[str, ...]:
    present = [record for record in replica.lineage if record.present and record.origin is not Origin.ADOPTED]
    words = [f"snapshots {span(present)}"] if present else []
    if _live(replica) is not LiveState.ABSENT:
        words.append("the whole live copy")
    return tuple(words)


def _left_alone(own: Sequence[Snapshot]) -> str:
    """What of another tool's is off the new lineage: nothing removes it, but no delta starts there any more."""
    theirs = [record for record in own if record.origin is Origin.ADOPTED and record.present]
    are = "is" if len(theirs) == 1 else "are"
    return f"; another tool's {span(theirs)} {are} kept, off the lineage" if theirs else ""


def _why(goal: _Goal, replica: ReplicaView, text: str) -> str:
    live = replica.report.live if replica.report is not None else LiveCopy()
    if goal.target and replica.lineage.find(goal.target) is not None:
        text = "it has the target; only its live copy is set right" if live.state is not LiveState.UNMODIFIED else text
    if live.in_use or live.state is LiveState.UNKNOWN:
        users = f" by {listed(live.in_use_by)}" if live.in_use_by else ""
        text += f"; its live copy is in use{users}: the commit waits until it is closed"
    return text


def _live(replica: ReplicaView) -> LiveState:
    return replica.report.live.state if replica.report is not None else LiveState.ABSENT
