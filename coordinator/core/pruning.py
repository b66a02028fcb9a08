"""Letting snapshots go: by order, beyond `keep_last`, and what is pinned against both.

The rules:

* What another tool made is never dropped here, by order or by itself: whoever made it lets it go.
* A member's base stays, also while the member is away; while nobody knows what that is, nothing is pruned.
* That another node has a snapshot too counts only if that node says so now, and nobody else lets it go meanwhile.
"""

from __future__ import annotations

from typing import Final

from coordinator.core.claims import primary_problems
from coordinator.core.cluster import VolumeView
from coordinator.core.context import Context
from coordinator.core.decide import examine
from coordinator.core.orders import Dropped, DropSnapshot
from coordinator.core.requests import DropRequest, Pruned, PruneRequest
from coordinator.core.status import status_of
from coordinator.core.tasks import Flow
from resilver.errors import NotFound, Refused, ResilverError, error_for
from resilver.lineage import Origin, Snapshot

PRUNED_AT_ONCE_MAX: Final = 4
ANOTHER_TOOLS: Final = "another tool's"


def pinned_by(view: VolumeView, context: Context, node: str, snapshot_id: str) -> tuple[str, ...]:
    """Why a node may not let a snapshot go; empty if it may."""
    reasons: list[str] = []
    known = _known_on(view, node, snapshot_id)
    if known is not None and known.origin is Origin.ADOPTED:
        reasons.append(ANOTHER_TOOLS)
    if view.replica(node).lineage.tip_id == snapshot_id:
        reasons.append("tip")
    if snapshot_id == view.record.newest_id:
        reasons.append("newest known CP")
    bases = dict(view.entry.bases) if view.entry is not None else {}
    for member in view.replicas:
        common = status_of(view, member).common
        if (
            snapshot_id in (bases.get(member), common.id if common is not None else None)
            and member != view.record.primary
        ):
            reasons.append(f"base of {member}")
    for resync in context.resyncs.of(view.name):
        if resync.state.final:
            continue
        if snapshot_id in (resync.plan.base, resync.plan.target):
            reasons.append(f"resync of {resync.node}")
    return tuple(dict.fromkeys(reasons))


def held_on(view: VolumeView, node: str, snapshot_id: str) -> Snapshot | None:
    """The snapshot if its data is there, in the lineage or beside it."""
    replica = view.replica(node)
    record = replica.lineage.find(snapshot_id)
    if record is not None and record.present:
        return record
    others = replica.report.others if replica.report is not None else ()
    return next((one for one in others if one.id == snapshot_id), None)


def _known_on(view: VolumeView, node: str, snapshot_id: str) -> Snapshot | None:
    """As `held_on`, or what the lineage has of it: whoever let its data go may put it back before an order comes."""
    return held_on(view, node, snapshot_id) or view.replica(node).lineage.find(snapshot_id)


def prunable(context: Context, view: VolumeView, node: str, keep_last: int) -> tuple[Snapshot, ...]:
    """What is beyond `keep_last` and pinned by nothing, oldest first."""
    present = [one for one in view.replica(node).lineage if one.present and one.origin is not Origin.ADOPTED]
    beyond = present[keep_last:] if keep_last else []
    return tuple(one for one in reversed(beyond) if not pinned_by(view, context, node, one.id))


def drop(context: Context, request: DropRequest) -> Flow[Dropped]:
    """Lets a snapshot or a preserved copy go on the nodes named. PINNED and LAST_COPY are refused."""
    found = holders_of(context, request.snapshot_id)
    if not found:
        raise no_snapshot(f"no connected node has a snapshot {request.snapshot_id!r}", request.snapshot_id)
    volume, holders, preserved = found
    nodes = request.nodes or frozenset(holders)
    for node in sorted(nodes - holders):
        raise no_snapshot(f"node {node} has no snapshot {request.snapshot_id!r}", request.snapshot_id, node=node)
    if preserved or request.validate_only:
        if not preserved:
            here = frozenset(node for node in holders if context.reachable(node))
            _check_droppable(context, volume, request.snapshot_id, nodes, here)
        return Dropped(0) if request.validate_only else (yield from _drop(context, volume, request, nodes))
    if not (yield from context.lock(volume)):
        raise _busy(volume)
    try:
        # Who has it is asked anew, in the volume's turn: whoever is away may have lost it, and whoever let it go a
        # moment ago may not have told yet.
        examined = yield from examine(context, volume)
        here = frozenset(node for node in examined.fresh if held_on(examined.view, node, request.snapshot_id))
        for node in sorted(nodes & (examined.fresh - here)):
            message = f"node {node} has let snapshot {request.snapshot_id!r} go meanwhile"
            raise no_snapshot(message, request.snapshot_id, node=node)
        _check_droppable(context, volume, request.snapshot_id, nodes, here)
        return (yield from _drop(context, volume, request, nodes))
    finally:
        context.unlock(volume)


def _check_droppable(
    context: Context, volume: str, snapshot_id: str, nodes: frozenset[str], here: frozenset[str]
) -> None:
    """Raises PINNED, and LAST_COPY unless another node has answered that it has the snapshot."""
    view = context.view(volume)
    for node in sorted(nodes):
        pins = pinned_by(view, context, node, snapshot_id)
        if pins:
            raise Refused("PINNED", _why_pinned(view, node, snapshot_id, pins), node=node)
    if nodes >= here:
        message = f"{snapshot_id} is on {', '.join(sorted(nodes))} alone of all nodes that answer: it is the last copy"
        raise Refused("LAST_COPY", message)


def _drop(context: Context, volume: str, request: DropRequest, nodes: frozenset[str]) -> Flow[Dropped]:
    """Of several nodes some may refuse: the error then says in `done` which have let it go all the same."""
    order = DropSnapshot(context.header(volume), request.snapshot_id)
    answers = yield from context.give(dict.fromkeys(sorted(nodes), order))
    done = {node: answer for node, answer in answers.items() if isinstance(answer, Dropped)}
    for node in done:
        context.tell(
            "DROPPED", f"{request.snapshot_id} on {node}", volume=volume, node=node, principal=request.principal
        )
    error = next((answer for answer in answers.values() if isinstance(answer, ResilverError)), None)
    if error is not None and done:
        message = f"{error.message}; it is gone from {', '.join(done)}"
        about = {**error.metadata, "done": ",".join(done)}
        raise error_for(error.reason, message, next_command=error.next_command, **about)
    if error is not None:
        raise error
    return Dropped(sum(answer.freed_bytes for answer in done.values()))


def _busy(volume: str) -> Refused:
    return Refused("OPENING", f"another operation on {volume} has not ended", next_command="resilver status")


def _why_pinned(view: VolumeView, node: str, snapshot_id: str, pins: tuple[str, ...]) -> str:
    if ANOTHER_TOOLS not in pins:
        return f"{snapshot_id} on {node} is needed: {', '.join(pins)}"
    known = _known_on(view, node, snapshot_id)
    name = known.note if known is not None and known.note else snapshot_id
    return f"{name} on {node} was made by another tool: let it go with that one"


def holders_of(context: Context, snapshot_id: str) -> tuple[str, frozenset[str], bool] | None:
    """The volume that a snapshot or preserved copy belongs to, who has its data, and whether it is preserved."""
    for volume in context.names():
        view = context.view(volume)
        have = frozenset(node for node in view.replicas if held_on(view, node, snapshot_id) is not None)
        if have:
            return volume, have, False
        kept = frozenset(
            node
            for node, replica in view.replicas.items()
            if replica.report is not None and any(one.id == snapshot_id for one in replica.report.preserved)
        )
        if kept:
            return volume, kept, True
    return None


def prune(context: Context, request: PruneRequest) -> Flow[Pruned]:
    """Drops what is beyond `keep_last` on every connected node, but nothing that is pinned or may be a base."""
    context.require(request.volume)
    if request.validate_only:
        return (yield from _pruned(context, request))
    if not (yield from context.lock(request.volume)):
        raise _busy(request.volume)
    try:
        return (yield from _pruned(context, request))
    finally:
        context.unlock(request.volume)


def _pruned(context: Context, request: PruneRequest) -> Flow[Pruned]:
    view = context.view(request.volume)
    unknown = tuple(f"the base of {member} is not known" for member in _without_base(view))
    dropped: list[tuple[str, str, int]] = []
    kept: list[tuple[str, str, tuple[str, ...]]] = []
    for node, replica in view.replicas.items():
        if replica.report is None or not replica.fresh:
            continue
        keep_last = request.keep_last or replica.report.keep_last
        beyond = prunable(context, view, node, keep_last)
        going = () if unknown else beyond
        for record in replica.lineage:
            if record.present and record not in going:
                pins = pinned_by(view, context, node, record.id)
                why = unknown if record in beyond else (f"among the last {keep_last}",)
                kept.append((node, record.id, pins or why))
        for record in going:
            if request.validate_only:
                dropped.append((node, record.id, 0))
                continue
            order = DropSnapshot(context.header(request.volume), record.id)
            answer = (yield from context.give({node: order}))[node]
            if isinstance(answer, Dropped):
                dropped.append((node, record.id, answer.freed_bytes))
            elif isinstance(answer, ResilverError):
                # The node knows what it is reading from at this moment, and the coordinator does not.
                kept.append((node, record.id, (answer.metadata.get("pinned_by", answer.message),)))
    return Pruned(tuple(dropped), tuple(kept))


def prune_by_itself(context: Context, volume: str, node: str) -> Flow[None]:
    """Keeps a replica to its `keep_last`, a few snapshots at a time, while no member's base is unknown.

    Nor while the primary may not stay: whoever comes after it may need other bases.
    """
    view = context.view(volume)
    report = view.replica(node).report
    if report is None or view.entry is None or view.entry.recovering:
        return
    if _without_base(view) or primary_problems(view, context.now_ms):
        return
    for record in prunable(context, view, node, report.keep_last)[:PRUNED_AT_ONCE_MAX]:
        if pinned_by(context.view(volume), context, node, record.id):
            continue
        order = DropSnapshot(context.header(volume), record.id)
        answer = (yield from context.give({node: order}))[node]
        if isinstance(answer, ResilverError):
            context.tell_once("NOT_PRUNED", answer.message, volume=volume, node=node, reason=answer.reason)
            return


def _without_base(view: VolumeView) -> tuple[str, ...]:
    """The members that are away, and of which nobody knows what they have in common with the primary."""
    bases = view.entry.bases if view.entry is not None else {}
    return tuple(
        member
        for member in view.record.members
        if member != view.record.primary and member not in bases and not view.replica(member).fresh
    )


def no_snapshot(message: str, snapshot_id: str, **about: str) -> NotFound:
    return NotFound("SNAPSHOT_NOT_FOUND", message, snapshot=snapshot_id, **about)
