"""Snapshots on request, drops, pruning, exports, pauses and membership: what operators do beside resyncs.

What another tool made is never dropped here, by order or by itself: whoever made it lets it go.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from coordinator.core.cluster import Elected, NodeView, NotElected, Refusal, VolumeView
from coordinator.core.context import Context
from coordinator.core.decide import examine, learn, settle
from coordinator.core.election import elect
from coordinator.core.events import DeletedNode, Volume
from coordinator.core.orders import CloneSnapshot, Dropped, DropSnapshot, Exported, SetLimits, Taken
from coordinator.core.points import groups, take_snapshot, take_together
from coordinator.core.requests import (
    DropRequest,
    ExportRequest,
    LimitRequest,
    PauseRequest,
    Pruned,
    PruneRequest,
    RemoveRequest,
    SnapshotRequest,
    SnapshotsTaken,
    VolumeRefusal,
)
from coordinator.core.resyncs import refusal_of
from coordinator.core.status import status_of
from coordinator.core.tasks import Flow, join
from coordinator.core.words import nearest
from resilver.errors import NotFound, Refused, ResilverError
from resilver.limits import NodeLimits, described
from resilver.lineage import Origin, Snapshot

PRUNED_AT_ONCE_MAX: Final = 4
ANOTHER_TOOLS: Final = "another tool's"


def pinned_by(view: VolumeView, context: Context, node: str, snapshot_id: str) -> tuple[str, ...]:
    """Why a node may not let a snapshot go; empty if it may."""
    reasons: list[str] = []
    held = held_on(view, node, snapshot_id)
    if held is not None and held.origin is Origin.ADOPTED:
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


def prunable(context: Context, view: VolumeView, node: str, keep_last: int) -> tuple[Snapshot, ...]:
    """What is beyond `keep_last` and pinned by nothing, oldest first."""
    present = [one for one in view.replica(node).lineage if one.present and one.origin is not Origin.ADOPTED]
    beyond = present[keep_last:] if keep_last else []
    return tuple(one for one in reversed(beyond) if not pinned_by(view, context, node, one.id))


def snapshot_volumes(context: Context, request: SnapshotRequest) -> Flow[SnapshotsTaken]:
    """A CP on each primary, modified or not; a volume that is taken together with others brings these along."""
    those = groups(context, request.volumes)
    tasks = [context.tasks.spawn(_snapshot_group(context, names, request)) for names in those]
    yield from join(tasks, context.now_ms + 10 * context.settings.order_timeout_ms)
    taken: list[tuple[str, Snapshot]] = []
    refused: list[VolumeRefusal] = []
    for names, task in zip(those, tasks, strict=True):
        if not task.finished:
            late = [Refusal(("NODE_OFFLINE",), f"{name} was not snapshotted in time") for name in names]
            refused += map(VolumeRefusal, names, late)
        elif isinstance(task.result, Refusal):
            refused += [VolumeRefusal(name, task.result) for name in names]
        else:
            taken += task.result.items()
    return SnapshotsTaken(tuple(taken), tuple(refused))


def _snapshot_group(
    context: Context, names: tuple[str, ...], request: SnapshotRequest
) -> Flow[dict[str, Snapshot] | Refusal]:
    """One volume, or those that are taken together: all of them, or none."""
    if not (yield from context.lock(*names)):
        message = f"another operation on {', '.join(names)} has not ended"
        return Refusal(("OPENING",), message, next_command="resilver status")
    try:
        tasks = {name: context.tasks.spawn(examine(context, name)) for name in names}
        yield from join(tasks.values(), context.now_ms + 2 * context.settings.examine_timeout_ms)
        for name, task in tasks.items():
            refusal = _not_ready(context, name, task.result.fresh if task.finished else frozenset())
            if refusal is not None:
                return refusal
        if groups(context, names) != (names,):
            message = f"other volumes are taken together with {', '.join(names)} than before; run it again"
            return Refusal(("TARGET_CHANGED",), message, next_command=f"resilver snapshot {names[0]}")
        if request.validate_only:
            return {}
        for name, task in tasks.items():
            settle(context, context.view(name, task.result.fresh))
        return (yield from _taken(context, names, request.note))
    finally:
        context.unlock(*names)


def _not_ready(context: Context, volume: str, fresh: frozenset[str]) -> Refusal | None:
    """Why no CP can be taken of the volume now, by what its members have answered."""
    learn(context, volume, fresh)
    decision = elect(context.view(volume, fresh), now_ms=context.now_ms)
    if isinstance(decision, NotElected):
        return decision.refusal
    if decision.new_epoch or context.entries[volume].opening:
        return _first_resync(volume, decision)
    return None


def _taken(context: Context, names: tuple[str, ...], note: str) -> Flow[dict[str, Snapshot] | Refusal]:
    answer: dict[str, Taken] | ResilverError
    if len(names) > 1:
        answer = yield from take_together(context, names, only_if_modified=False, note=note)
    else:
        alone = yield from take_snapshot(context, names[0], only_if_modified=False, note=note)
        answer = alone if isinstance(alone, ResilverError) else {names[0]: alone}
    if isinstance(answer, ResilverError):
        return refusal_of(answer, f"resilver explain {names[0]}")
    return {name: one.snapshot for name, one in answer.items()}


def _first_resync(volume: str, decision: Elected) -> Refusal:
    message = f"{volume} has no primary with an open epoch yet; the first resync makes {decision.winner} its primary"
    return Refusal(("OPENING",), message, next_command=f"resilver resync {volume}")


def drop(context: Context, request: DropRequest) -> Flow[Dropped]:
    """Lets a snapshot or a preserved copy go on the nodes named. PINNED and LAST_COPY are refused."""
    found = _holders(context, request.snapshot_id)
    if not found:
        raise _no_snapshot(f"no connected node has a snapshot {request.snapshot_id!r}", request.snapshot_id)
    volume, holders, preserved = found
    nodes = request.nodes or frozenset(holders)
    for node in sorted(nodes - holders):
        raise _no_snapshot(f"node {node} has no snapshot {request.snapshot_id!r}", request.snapshot_id, node=node)
    view = context.view(volume)
    if not preserved:
        for node in sorted(nodes):
            pins = pinned_by(view, context, node, request.snapshot_id)
            if pins:
                raise Refused("PINNED", _why_pinned(view, node, request.snapshot_id, pins), node=node)
        if nodes >= holders:
            raise Refused("LAST_COPY", f"{request.snapshot_id} is on no other node: {', '.join(sorted(nodes))}")
    if request.validate_only:
        return Dropped(0)
    order = DropSnapshot(context.header(volume), request.snapshot_id)
    answers = yield from context.give(dict.fromkeys(sorted(nodes), order))
    freed = 0
    for node, answer in answers.items():
        if isinstance(answer, ResilverError):
            raise answer
        assert isinstance(answer, Dropped)
        freed += answer.freed_bytes
        context.tell(
            "DROPPED", f"{request.snapshot_id} on {node}", volume=volume, node=node, principal=request.principal
        )
    return Dropped(freed)


def _why_pinned(view: VolumeView, node: str, snapshot_id: str, pins: tuple[str, ...]) -> str:
    if ANOTHER_TOOLS not in pins:
        return f"{snapshot_id} on {node} is needed: {', '.join(pins)}"
    held = held_on(view, node, snapshot_id)
    name = held.note if held is not None and held.note else snapshot_id
    return f"{name} on {node} was made by another tool: let it go with that one"


def _holders(context: Context, snapshot_id: str) -> tuple[str, frozenset[str], bool] | None:
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
    """Drops what is beyond `keep_last` on every connected node, but nothing that is pinned."""
    context.require(request.volume)
    view = context.view(request.volume)
    dropped: list[tuple[str, str, int]] = []
    kept: list[tuple[str, str, tuple[str, ...]]] = []
    for node, replica in view.replicas.items():
        if replica.report is None or not replica.fresh:
            continue
        keep_last = request.keep_last or replica.report.keep_last
        going = prunable(context, view, node, keep_last)
        for record in replica.lineage:
            if record.present and record not in going:
                pins = pinned_by(view, context, node, record.id)
                kept.append((node, record.id, pins or (f"among the last {keep_last}",)))
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
    """Keeps a replica to its `keep_last`, a few snapshots at a time, while no member's base is unknown."""
    view = context.view(volume)
    report = view.replica(node).report
    if report is None or view.entry is None or not _bases_known(view):
        return
    for record in prunable(context, view, node, report.keep_last)[:PRUNED_AT_ONCE_MAX]:
        if pinned_by(context.view(volume), context, node, record.id):
            continue
        order = DropSnapshot(context.header(volume), record.id)
        answer = (yield from context.give({node: order}))[node]
        if isinstance(answer, ResilverError):
            context.tell_once("NOT_PRUNED", answer.message, volume=volume, node=node, reason=answer.reason)
            return


def _bases_known(view: VolumeView) -> bool:
    bases = view.entry.bases if view.entry is not None else {}
    return all(
        member == view.record.primary or member in bases or view.replica(member).fresh for member in view.record.members
    )


def export(context: Context, request: ExportRequest) -> Flow[Exported]:
    """Copies a snapshot or a preserved copy to a path of that node."""
    found = _holders(context, request.snapshot_id)
    if found is None:
        raise _no_snapshot(f"no connected node has a snapshot {request.snapshot_id!r}", request.snapshot_id)
    volume, holders, _ = found
    require_node(context, request.node)
    if request.node not in holders:
        where = ", ".join(sorted(holders))
        message = f"{request.snapshot_id} is not on {request.node}, but on {where}"
        raise _no_snapshot(message, request.snapshot_id, node=request.node)
    order = CloneSnapshot(context.header(volume), request.snapshot_id, request.path, request.writable)
    answer = (yield from context.give({request.node: order}))[request.node]
    if isinstance(answer, ResilverError):
        raise answer
    assert isinstance(answer, Exported)
    return answer


def limit(context: Context, request: LimitRequest) -> Flow[NodeLimits]:
    """Caps a node for a while. The node keeps that itself, because it has to hold without a coordinator too."""
    require_node(context, request.node)
    order = SetLimits(context.header(), request.change)
    answer = (yield from context.give({request.node: order}))[request.node]
    if isinstance(answer, ResilverError):
        raise answer
    assert isinstance(answer, NodeLimits)
    context.allow(request.node, answer)
    said = described(request.change)
    context.tell("LIMITED", f"{request.node}: {said}", node=request.node, principal=request.principal)
    return answer


def pause(context: Context, request: PauseRequest) -> tuple[str, ...]:
    """Pauses or resumes volumes; answers their names."""
    for volume in request.volumes:
        if volume not in context.entries:
            raise Refused("OPENING", f"{volume} has never been resynced", next_command=f"resilver resync {volume}")
    for volume in request.volumes:
        entry = context.entries[volume]
        context.persist(Volume(volume, replace(entry, pause=request.pause)))
        what = "PAUSED" if request.pause is not None else "RESUMED"
        reason = request.pause.reason if request.pause is not None else ""
        context.tell(what, f"{volume}: {reason}".rstrip(": "), volume=volume, principal=request.principal)
    return request.volumes


def remove(context: Context, request: RemoveRequest) -> tuple[str, ...]:
    """Forgets a replica, a node or a volume. Refused while the node reports; data on disk is never touched."""
    if request.node:
        require_node(context, request.node)
    volumes = (
        (request.volume,)
        if request.volume
        else tuple(name for name, entry in context.entries.items() if request.node in entry.record.members)
    )
    for volume in volumes:
        context.require(volume)
        _check_removable(context, volume, request.node)
    if request.node and not request.volume and context.reachable(request.node):
        raise Refused("NODE_STILL_REPORTS", f"node {request.node} is connected; stop its agent first")
    if request.validate_only:
        return volumes
    for volume in volumes:
        _forget(context, volume, request.node)
        gone = f"{request.node} from {volume}" if request.node else volume
        context.tell("REMOVED", f"{gone}", volume=volume, node=request.node, principal=request.principal)
    if request.node and not request.volume:
        context.persist(DeletedNode(request.node))
        context.drop_node(request.node)
    return volumes


def _check_removable(context: Context, volume: str, node: str) -> None:
    entry = context.entries.get(volume)
    nodes = (node,) if node else tuple(context.view(volume).replicas)
    for one in nodes:
        known = context.nodes.get(one)
        if known is not None and known.connected and volume in known.volumes:
            raise Refused(
                "NODE_STILL_REPORTS",
                f"node {one} still reports {volume}; take it out of its configuration, or stop its agent, first",
            )
    if node and entry is not None and entry.record.primary == node:
        raise Refused(
            "PRIMARY_AWAY",
            f"{node} is the primary of {volume}; elect another one first",
            next_command=f"resilver elect {volume}",
        )
    if node and entry is not None and node not in context.view(volume).replicas:
        raise NotFound("NODE_NOT_FOUND", f"{node} has no replica of {volume}", node=node, volume=volume)


def _forget(context: Context, volume: str, node: str) -> None:
    entry = context.entries.get(volume)
    if not node:
        context.unhear(volume)
        context.persist(Volume(volume, None))
        return
    context.unhear(volume, node)
    if entry is not None:
        kept = tuple(one for one in entry.record.members if one != node)
        bases = {member: base for member, base in entry.bases.items() if member != node}
        removed = tuple(sorted({*entry.removed, node}))
        context.put_record(volume, replace(entry.record, members=kept), removed=removed, bases=bases)


def require_node(context: Context, node: str) -> NodeView:
    known = context.nodes.get(node)
    if known is None:
        raise NotFound("NODE_NOT_FOUND", f"no node is named {node!r}{nearest(node, context.nodes)}", node=node)
    return known


def _no_snapshot(message: str, snapshot_id: str, **about: str) -> NotFound:
    return NotFound("SNAPSHOT_NOT_FOUND", message, snapshot=snapshot_id, **about)
