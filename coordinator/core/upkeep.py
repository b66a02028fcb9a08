"""Snapshots on request, exports, limits, pauses and membership: what operators do beside resyncs."""

from __future__ import annotations

from dataclasses import replace

from coordinator.core.cluster import Elected, ElectionRecord, NodeView, NotElected, Refusal, Resync
from coordinator.core.context import RECORDS_AT_ONCE_MAX, Context
from coordinator.core.decide import examine, learn, settle
from coordinator.core.election import elect
from coordinator.core.ending import finish, refusal_of
from coordinator.core.events import DeletedNode, Forgotten, Volume
from coordinator.core.orders import CloneSnapshot, Exported, SetLimits, Taken
from coordinator.core.points import groups, take_snapshot, take_together
from coordinator.core.pruning import holders_of, no_snapshot
from coordinator.core.requests import (
    ExportRequest,
    LimitRequest,
    PauseRequest,
    RemoveRequest,
    SnapshotRequest,
    SnapshotsTaken,
    VolumeRefusal,
)
from coordinator.core.tasks import Flow, join
from coordinator.core.words import nearest
from resilver.errors import NotFound, Refused, ResilverError
from resilver.limits import NodeLimits, described
from resilver.lineage import Snapshot
from resilver.volume import ResyncState


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


def export(context: Context, request: ExportRequest) -> Flow[Exported]:
    """Copies a snapshot or a preserved copy to a path of that node."""
    found = holders_of(context, request.snapshot_id)
    if found is None:
        raise no_snapshot(f"no connected node has a snapshot {request.snapshot_id!r}", request.snapshot_id)
    volume, holders, _ = found
    require_node(context, request.node)
    if request.node not in holders:
        where = ", ".join(sorted(holders))
        message = f"{request.snapshot_id} is not on {request.node}, but on {where}"
        raise no_snapshot(message, request.snapshot_id, node=request.node)
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
        _forget_decisions(context, volume)
        context.persist(Volume(volume, None))
        return
    context.unhear(volume, node)
    if entry is not None:
        kept = tuple(one for one in entry.record.members if one != node)
        bases = {member: base for member, base in entry.bases.items() if member != node}
        removed = tuple(sorted({*entry.removed, node}))
        context.put_record(volume, replace(entry.record, members=kept), removed=removed, bases=bases)


def _forget_decisions(context: Context, volume: str) -> None:
    """Elections and resyncs go before their volume, so that a new one of its name begins without any, and a leader that
    ends in between leaves a volume that can be removed again.
    """
    gone: list[ElectionRecord | Resync] = list(context.elections.pop(volume, ()))
    removed = Refusal(("CANCELLED",), f"{volume} was removed")
    for resync in context.resyncs.of(volume):
        if resync.id not in context.resyncs:
            continue  # let go as the oldest when another ended
        if not resync.state.final:
            finish(context, resync, ResyncState.CANCELLED, removed)
        elif context.over(resync):
            context.resyncs.drop(resync.id)
            gone.append(resync)
        elif resync.state is ResyncState.BLOCKED:
            context.persist(replace(resync, refusal=removed))  # else it would be tried again
    for at in range(0, len(gone), RECORDS_AT_ONCE_MAX):
        context.persist(*map(Forgotten, gone[at : at + RECORDS_AT_ONCE_MAX]))


def require_node(context: Context, node: str) -> NodeView:
    known = context.nodes.get(node)
    if known is None:
        raise NotFound("NODE_NOT_FOUND", f"no node is named {node!r}{nearest(node, context.nodes)}", node=node)
    return known
