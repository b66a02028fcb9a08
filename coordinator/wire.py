"""What the coordinator tells an operator: its own values to protobuf, and never back.

The rules:

* Every conversion works for every value; what has no bound of its own is cut here, so that a message stays under 1 MiB.
* A time that is not known is left unset, and so is a number: a zero on the wire means zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from coordinator.core.cluster import (
    Candidate,
    ClusterEvent,
    ElectionRecord,
    Loss,
    NodeView,
    Pause,
    PlanAction,
    Refusal,
    ReplicaPlan,
    ReplicaState,
    Resync,
    Role,
    VolumePlan,
    VolumeState,
)
from coordinator.core.requests import Planned, Pruned, ResyncsStarted, VolumeRefusal
from resilver.errors import ResilverError
from resilver.fields import LIVE_STATES, NOTE_CHARS_MAX, RESYNC_STATES, TEXT_CHARS_MAX
from resilver.limits import NodeLimits
from resilver.v1 import coordinator_pb2, error_pb2, volume_pb2
from resilver.volume import Progress, ResyncState, SourceShare
from resilver.wire import SOURCES_MAX, cp_to_proto, time_to_proto
from resilver.wire_limits import limits_to_proto

ENTRIES_MAX: Final = 256
"""Nodes, candidates, losses or preserved copies in one message."""
REASONS_MAX: Final = 32
PRUNED_SHOWN_MAX: Final = 1000
STARTED_BYTES_MAX: Final = 900 << 10
SPACE_LEAST_BYTES: Final = 64 << 20
RANGE_BYTES: Final = 34
"""What a changed range costs in metadata: 17 bytes for its extent and as much for the clone's."""

ROLES: Final = {
    Role.PRIMARY: volume_pb2.REPLICA_ROLE_PRIMARY,
    Role.SECONDARY: volume_pb2.REPLICA_ROLE_SECONDARY,
    Role.NEWCOMER: volume_pb2.REPLICA_ROLE_NEWCOMER,
}
REPLICA_STATES: Final = {
    ReplicaState.IN_SYNC: volume_pb2.REPLICA_STATE_IN_SYNC,
    ReplicaState.STALE: volume_pb2.REPLICA_STATE_STALE,
    ReplicaState.DIVERGED: volume_pb2.REPLICA_STATE_DIVERGED,
    ReplicaState.UNRELATED: volume_pb2.REPLICA_STATE_UNRELATED,
    ReplicaState.FOREIGN: volume_pb2.REPLICA_STATE_FOREIGN,
    ReplicaState.EMPTY: volume_pb2.REPLICA_STATE_EMPTY,
    ReplicaState.LOST: volume_pb2.REPLICA_STATE_LOST,
    ReplicaState.UNKNOWN: volume_pb2.REPLICA_STATE_UNKNOWN,
}
VOLUME_STATES: Final = {
    VolumeState.HEALTHY: volume_pb2.VOLUME_STATE_HEALTHY,
    VolumeState.DEGRADED: volume_pb2.VOLUME_STATE_DEGRADED,
    VolumeState.BLOCKED: volume_pb2.VOLUME_STATE_BLOCKED,
    VolumeState.OPENING: volume_pb2.VOLUME_STATE_OPENING,
    VolumeState.RECOVERING: volume_pb2.VOLUME_STATE_RECOVERING,
    VolumeState.UNINITIALIZED: volume_pb2.VOLUME_STATE_UNINITIALIZED,
}
ACTIONS: Final = {
    PlanAction.NONE: volume_pb2.PLAN_ACTION_NONE,
    PlanAction.DELTA: volume_pb2.PLAN_ACTION_DELTA,
    PlanAction.FULL: volume_pb2.PLAN_ACTION_FULL,
    PlanAction.BLOCKED: volume_pb2.PLAN_ACTION_BLOCKED,
}


def time_or_unset(time_ms: int) -> Timestamp | None:
    """None for 0, which is how a time that is not known is kept."""
    return time_to_proto(time_ms) if time_ms > 0 else None


def duration_to_proto(duration_ms: int) -> Duration:
    seconds, milliseconds = divmod(max(duration_ms, 0), 1000)
    return Duration(seconds=seconds, nanos=milliseconds * 1_000_000)


def cut(text: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    return text if len(text) <= chars_max else f"{text[: chars_max - 1]}…"


def first(items: Iterable[str], count_max: int = ENTRIES_MAX) -> list[str]:
    return [cut(item) for _, item in zip(range(count_max), items, strict=False)]


# Refusals and decisions.


def loss_to_proto(loss: Loss) -> error_pb2.Loss:
    return error_pb2.Loss(
        node=loss.node,
        from_cp="" if loss.from_cp is None else cut(loss.from_name or str(loss.from_cp)),
        to_cp="" if loss.to_cp is None else cut(loss.to_name or str(loss.to_cp)),
        lost_cps=loss.lost_cps,
        live_modified=loss.live_modified,
        unseen_seconds=None if loss.unseen_ms is None else loss.unseen_ms / 1000,
    )


def refusal_to_proto(refusal: Refusal) -> error_pb2.Refusal:
    return error_pb2.Refusal(
        reasons=first(refusal.reasons, REASONS_MAX),
        message=cut(refusal.message),
        missing_nodes=first(refusal.missing_nodes),
        candidates=first(refusal.candidates),
        losses=[loss_to_proto(loss) for loss in refusal.losses[:ENTRIES_MAX]],
        next_command=cut(refusal.next_command),
    )


def refusal_or_unset(refusal: Refusal | None) -> error_pb2.Refusal | None:
    return None if refusal is None else refusal_to_proto(refusal)


def refusal_of(error: ResilverError) -> Refusal:
    """An error as data, for an answer about several volumes."""
    return Refusal((error.reason,), error.message, next_command=error.next_command)


def volume_refusal_to_proto(refused: VolumeRefusal) -> coordinator_pb2.VolumeRefusal:
    return coordinator_pb2.VolumeRefusal(
        volume=refused.volume, refusal=refusal_to_proto(refused.refusal), node=refused.node
    )


def started_to_proto(started: ResyncsStarted) -> coordinator_pb2.StartResyncResponse:
    """Of many, only what a resync is found by: `GetResync` has the rest. What does not fit even so is counted at the
    end, in a refusal of no volume: what is begun is begun, however long the answer is.
    """
    message = coordinator_pb2.StartResyncResponse(
        resyncs=map(resync_to_proto, started.resyncs), refusals=map(volume_refusal_to_proto, started.refusals)
    )
    if message.ByteSize() <= STARTED_BYTES_MAX:
        return message
    short = coordinator_pb2.StartResyncResponse()
    left = STARTED_BYTES_MAX - 1024
    for one in message.resyncs:
        named = volume_pb2.Resync(id=one.id, volume=one.volume, node=one.node, state=one.state)
        left -= named.ByteSize() + 8
        if left < 0:
            break
        short.resyncs.append(named)
    for refused in message.refusals:
        left -= refused.ByteSize() + 8
        if left < 0:
            break
        short.refusals.append(refused)
    untold = len(message.resyncs) - len(short.resyncs), len(message.refusals) - len(short.refusals)
    if any(untold):
        said = f"{untold[0]} more resyncs and {untold[1]} more refusals do not fit one answer"
        refusal = Refusal(("TOO_LARGE",), said, next_command="resilver resyncs --active")
        short.refusals.append(volume_refusal_to_proto(VolumeRefusal("", refusal)))
    return short


def candidate_to_proto(candidate: Candidate) -> volume_pb2.Candidate:
    return volume_pb2.Candidate(
        node=candidate.node,
        reported=candidate.reported,
        report_time=time_or_unset(candidate.report_time_ms),
        cp=cp_to_proto(candidate.cp),
        snapshot=candidate.snapshot,
        live=LIVE_STATES[candidate.live],
        state=REPLICA_STATES[candidate.state],
        common_cp=cp_to_proto(candidate.common_cp),
        verdict=cut(candidate.verdict),
        priority=candidate.priority,
        snapshot_name=cut(candidate.snapshot_name, NOTE_CHARS_MAX),
    )


def election_to_proto(election: ElectionRecord) -> volume_pb2.Election:
    return volume_pb2.Election(
        volume=election.volume,
        epoch=election.epoch,
        epoch_id=election.epoch_id,
        create_time=time_or_unset(election.create_time_ms),
        winner=election.winner,
        previous_primary=election.previous_primary,
        cp=cp_to_proto(election.cp),
        rule=cut(election.rule),
        candidates=[candidate_to_proto(candidate) for candidate in election.candidates[:ENTRIES_MAX]],
        refusal=refusal_or_unset(election.refusal),
        accepted_losses=first(election.accepted),
        principal=cut(election.principal),
        term=election.term,
    )


# Plans and resyncs.


def need_bytes(plan: ReplicaPlan) -> int | None:
    """The room that a replica needs before its first byte: the data, the metadata of its ranges, and a margin.

    None where nobody can say how much will come.
    """
    if plan.action not in (PlanAction.DELTA, PlanAction.FULL) or plan.size is None:
        return 0
    if plan.size.bytes is None:
        return None
    data = plan.size.bytes + (plan.size.range_count or 0) * RANGE_BYTES
    return data + max(data // 100, SPACE_LEAST_BYTES)


def replica_plan_to_proto(plan: ReplicaPlan) -> volume_pb2.ReplicaPlan:
    estimated = plan.size is not None and plan.size.estimated
    return volume_pb2.ReplicaPlan(
        node=plan.node,
        state=REPLICA_STATES[plan.state],
        action=ACTIONS[plan.action],
        base_cp=cp_to_proto(plan.base_cp),
        base=plan.base,
        base_name=cut(plan.base_name, NOTE_CHARS_MAX),
        target_cp=cp_to_proto(plan.target_cp),
        target=plan.target,
        sources=first(plan.sources),
        copy_bytes=None if plan.size is None else plan.size.bytes,
        range_count=None if plan.size is None else plan.size.range_count,
        exact=plan.exact and not estimated,
        estimated=estimated,
        preserve_bytes=plan.preserve_bytes,
        preserve=first(plan.preserve),
        need_bytes=need_bytes(plan),
        free_bytes=max(plan.free_bytes, 0),
        refusal=refusal_or_unset(plan.refusal),
        why=cut(plan.why),
    )


def volume_plan_to_proto(plan: VolumePlan) -> volume_pb2.VolumePlan:
    return volume_pb2.VolumePlan(
        volume=plan.volume,
        primary=plan.primary,
        target_cp=cp_to_proto(plan.target_cp),
        takes_snapshot=plan.takes_snapshot,
        refusal=refusal_or_unset(plan.refusal),
        replicas=[replica_plan_to_proto(row) for row in plan.replicas[:ENTRIES_MAX]],
    )


def plan_to_proto(planned: Planned) -> volume_pb2.Plan:
    return volume_pb2.Plan(
        etag=planned.etag,
        create_time=time_or_unset(planned.create_time_ms),
        volumes=[volume_plan_to_proto(plan) for plan in planned.volumes],
    )


def source_to_proto(share: SourceShare) -> volume_pb2.ResyncSource:
    return volume_pb2.ResyncSource(
        node=share.node, wire_bytes=share.wire_bytes, bytes_per_second=share.bytes_per_second
    )


def remaining_ms(resync: Resync) -> int | None:
    """How long the rest takes at the present rate; None while that cannot be said, or an estimate is used up."""
    progress = resync.progress
    if progress is None or progress.total_bytes is None or resync.state.final:
        return None
    rate = sum(share.bytes_per_second for share in progress.sources)
    left = max(progress.total_bytes - progress.done_bytes, 0)
    if left == 0:
        return None if is_estimated(progress) else 0
    return left * 1000 // rate if rate > 0 else None


def is_estimated(progress: Progress) -> bool:
    """Whether the total is a file system's estimate of its own stream: blocks are told with their ranges."""
    arriving = progress.state in (ResyncState.PREPARING, ResyncState.TRANSFERRING)
    return arriving and progress.range_count == 0 and progress.total_bytes != 0


def resync_to_proto(resync: Resync) -> volume_pb2.Resync:
    progress = resync.progress
    size = resync.plan.size
    planned = size is not None and resync.plan.exact and not size.estimated
    total_bytes = size.bytes if size is not None and planned else None
    range_count = size.range_count if size is not None and planned else None
    estimated = progress is not None and is_estimated(progress)
    if progress is not None and progress.range_count is not None:
        # A stream has no ranges; where nothing at all is to be copied, there are none.
        range_count = progress.range_count if progress.range_count or progress.total_bytes == 0 else None
    remaining = remaining_ms(resync)
    shares = progress.sources if progress is not None else ()
    return volume_pb2.Resync(
        id=resync.id,
        volume=resync.volume,
        node=resync.node,
        state=RESYNC_STATES[resync.state],
        plan=replica_plan_to_proto(resync.plan),
        sources=[
            source_to_proto(share)
            for share in shares or [SourceShare(node) for node in resync.plan.sources][:SOURCES_MAX]
        ],
        total_bytes=total_bytes if progress is None or progress.total_bytes is None else progress.total_bytes,
        range_count=range_count,
        estimated=estimated,
        priority=resync.priority,
        done_bytes=None if progress is None else progress.done_bytes,
        wire_bytes=None if progress is None else progress.wire_bytes,
        resent_bytes=None if progress is None else progress.resent_bytes,
        remaining_duration=None if remaining is None else duration_to_proto(remaining),
        create_time=time_or_unset(resync.create_time_ms),
        start_time=time_or_unset(resync.start_time_ms),
        end_time=time_or_unset(resync.end_time_ms),
        attempt_count=resync.attempt_count,
        preserved=first(progress.preserved) if progress is not None else (),
        refusal=refusal_or_unset(resync.refusal),
        principal=cut(resync.principal),
        term=resync.term,
        epoch=resync.epoch,
    )


# The rest.


def pause_to_proto(pause: Pause) -> volume_pb2.Pause:
    return volume_pb2.Pause(
        reason=cut(pause.reason),
        until_time=None if pause.until_ms is None else time_to_proto(pause.until_ms),
        principal=cut(pause.principal),
    )


def event_to_proto(event: ClusterEvent) -> volume_pb2.Event:
    return volume_pb2.Event(
        sequence=event.sequence,
        create_time=time_or_unset(event.create_time_ms),
        type=event.type,
        volume=event.volume,
        node=event.node,
        resync=event.resync,
        reason=event.reason,
        message=cut(event.message),
        principal=cut(event.principal),
        previous_sequence=event.previous,
    )


def node_to_proto(
    node: NodeView, problems: Iterable[volume_pb2.Problem] = (), limits: NodeLimits | None = None
) -> volume_pb2.Node:
    return volume_pb2.Node(
        name=node.name,
        reachable=node.reachable,
        address=node.address,
        stream_address=node.stream_address,
        version=node.version,
        report_time=time_or_unset(node.last_heard_ms),
        volume_count=len(node.volumes),
        problems=problems,
        limits=None if limits is None else limits_to_proto(limits),
    )


def pruned_to_proto(pruned: Pruned) -> coordinator_pb2.PruneSnapshotsResponse:
    return coordinator_pb2.PruneSnapshotsResponse(
        dropped=[
            coordinator_pb2.PrunedSnapshot(id=snapshot_id, node=node, freed_bytes=freed_bytes)
            for node, snapshot_id, freed_bytes in pruned.dropped[:PRUNED_SHOWN_MAX]
        ],
        kept=[
            coordinator_pb2.PrunedSnapshot(id=snapshot_id, node=node, pinned_by=first(why))
            for node, snapshot_id, why in pruned.kept[:PRUNED_SHOWN_MAX]
        ],
    )
