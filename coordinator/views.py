"""A volume as an operator sees it: what the view says, with the figures behind each word.

The rules:

* A screen shows the last that was heard of a replica, also while it is away; `reachable` says which it is.
* A figure that nobody has worked out yet is left unset, never guessed.
* A message stays under 1 MiB: lineages are cut at their old end, and texts of agents at theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from coordinator.core.cluster import NodeView, ReplicaState, ReplicaView, Size, Status, VolumeView
from coordinator.core.etag import volume_etag
from coordinator.core.status import (
    Problem,
    problems_of_replica,
    problems_of_volume,
    reference_lineage,
    role_of,
    status_of,
    volume_state,
)
from coordinator.core.words import age
from coordinator.office import Engine
from coordinator.wire import (
    ENTRIES_MAX,
    REPLICA_STATES,
    ROLES,
    VOLUME_STATES,
    cut,
    duration_to_proto,
    first,
    pause_to_proto,
    time_or_unset,
)
from resilver.fields import CONSISTENCIES, NUMBER_MAX, ORIGINS
from resilver.lineage import Snapshot
from resilver.v1 import volume_pb2
from resilver.volume import PreservedCopy
from resilver.wire import cp_to_proto, live_to_proto, preserved_to_proto, snapshot_to_proto

VOLUME_BYTES_MAX: Final = 768 << 10
LINEAGE_RECORDS_SHOWN_MAX: Final = 1000
USERS_SHOWN_MAX: Final = 8
USER_CHARS_MAX: Final = 120
PROBLEMS_SHOWN_MAX: Final = 16


# Volumes and replicas.


def volume_to_proto(engine: Engine, view: VolumeView, now_ms: int, *, full: bool) -> volume_pb2.Volume:
    """The whole volume; with `full` each replica's lineage, newest first."""
    record = view.record
    entry = view.entry
    message = volume_pb2.Volume(
        name=view.name,
        volume_id=record.volume_id,
        state=VOLUME_STATES[volume_state(view)],
        epoch=record.epoch,
        primary=record.primary,
        newest_cp=cp_to_proto(record.newest_cp),
        newest_cp_time=time_or_unset(entry.newest_cp_time_ms) if entry is not None else None,
        replicas=[
            replica_to_proto(engine, view, node, now_ms, full=full) for node in sorted(view.replicas)[:ENTRIES_MAX]
        ],
        pause=pause_to_proto(entry.pause) if entry is not None and entry.pause is not None else None,
        problems=problems_to_proto(problems_of_volume(view, now_ms)),
        etag=volume_etag(view),
        newest_id=record.newest_id,
        epoch_id=record.epoch_id,
    )
    return fitted(message)


def replica_to_proto(engine: Engine, view: VolumeView, node: str, now_ms: int, *, full: bool) -> volume_pb2.Replica:
    replica = view.replica(node)
    status = status_of(view, node)
    lineage = replica.lineage
    report = replica.report
    resync = engine.active_resync(view.name, node)
    behind_ms = behind_duration_ms(view, node, status, now_ms)
    preserved = report.preserved if report is not None else ()
    lacking = out_of_sync(engine, view, node, status)
    message = volume_pb2.Replica(
        volume=view.name,
        node=node,
        role=ROLES[role_of(view, node)],
        state=REPLICA_STATES[status.state],
        reachable=replica.fresh,
        report_time=time_or_unset(_heard_ms(replica, engine.nodes().get(node))),
        cp=cp_to_proto(lineage.cp),
        snapshot=lineage.tip_id,
        common_cp=None if status.common is None else cp_to_proto(status.common.cp),
        common="" if status.common is None else status.common.id,
        behind_cps=status.behind_cps,
        behind_duration=None if behind_ms is None else duration_to_proto(behind_ms),
        out_of_sync_bytes=None if lacking is None else lacking.bytes,
        estimated=lacking is not None and lacking.estimated,
        own_cps=status.own_cps,
        snapshot_name=_name(lineage.tip),
        common_name=_name(status.common),
        backend=report.backend if report is not None else "",
        priority=replica.priority,
        resync_priority=replica.report.resync_priority if replica.report is not None else 0,
        resync=resync.id if resync is not None else "",
        free_bytes=report.free_bytes if report is not None else 0,
        problems=problems_to_proto(problems_of_replica(view, node, now_ms)),
        member=node in view.record.members,
        preserved_bytes=min(sum(_kept_bytes(copy) for copy in preserved), NUMBER_MAX),
        preserved_count=len(preserved),
        lineage=[snapshot_to_proto(one) for one in lineage.records[:LINEAGE_RECORDS_SHOWN_MAX]] if full else (),
    )
    if report is not None:
        message.live.CopyFrom(live_to_proto(report.live))
        users = first(message.live.in_use_by, USERS_SHOWN_MAX)
        del message.live.in_use_by[:]
        message.live.in_use_by.extend(cut(user, USER_CHARS_MAX) for user in users)
    return message


def behind_duration_ms(view: VolumeView, node: str, status: Status, now_ms: int) -> int | None:
    """How long ago the primary took the first CP that the replica lacks; None if it lacks none, or all."""
    since_ms = behind_since_ms(view, node, status)
    return None if since_ms is None else max(now_ms - since_ms, 0)


def behind_since_ms(view: VolumeView, node: str, status: Status) -> int | None:
    """When the primary took the first CP that the replica lacks; None if it lacks none, or all."""
    if status.fork is None or not status.behind_cps or node == view.record.primary:
        return None
    lacking = reference_lineage(view).after(status.fork.id)
    if not lacking or not lacking[-1].create_time_ms:
        return None
    return lacking[-1].create_time_ms


def out_of_sync(engine: Engine, view: VolumeView, node: str, status: Status) -> Size | None:
    """What is to be copied to make the replica the primary's tip; None until a source has worked it out."""
    if status.state is ReplicaState.IN_SYNC or node == view.record.primary:
        return Size(0, 0, 0)
    tip = reference_lineage(view).tip_id
    if status.common is None or not tip:
        return None
    if status.common.id == tip:
        report = view.replica(node).report
        return Size(report.live.modified_bytes, 0, 0) if report is not None else None
    return engine.size(view.name, status.common.id, tip)


def problems_to_proto(problems: Iterable[Problem]) -> list[volume_pb2.Problem]:
    return [
        volume_pb2.Problem(
            reason=problem.reason, message=cut(problem.message, 1000), next_command=cut(problem.next_command, 1000)
        )
        for _, problem in zip(range(PROBLEMS_SHOWN_MAX), problems, strict=False)
    ]


def problems_of_node(node: NodeView, now_ms: int) -> tuple[Problem, ...]:
    """Why nothing can be asked of a node."""
    if node.duplicate:
        message = f"two agents call themselves {node.name}; nothing is believed of either until one is stopped"
        return (Problem("DUPLICATE_NODE", message),)
    if not node.connected:
        heard = f"last heard of {age(now_ms - node.last_heard_ms)} ago" if node.last_heard_ms else "not heard of yet"
        return (Problem("NODE_OFFLINE", f"{node.name} is not connected, {heard}"),)
    return ()


def fitted(message: volume_pb2.Volume) -> volume_pb2.Volume:
    """The same within its bound: first the old ends of lineages go, then what agents said at length."""
    records = LINEAGE_RECORDS_SHOWN_MAX
    while message.ByteSize() > VOLUME_BYTES_MAX and records:
        records //= 2
        for replica in message.replicas:
            del replica.lineage[records:]
    for replica in message.replicas if message.ByteSize() > VOLUME_BYTES_MAX else ():
        del replica.problems[1:]
        del replica.live.in_use_by[1:]
    return message


def _name(snapshot: Snapshot | None) -> str:
    return cut(snapshot.name, USER_CHARS_MAX) if snapshot is not None else ""


def _heard_ms(replica: ReplicaView, node: NodeView | None) -> int:
    """When the replica was last known to be so: a heartbeat says that nothing has changed since the report."""
    if replica.fresh and node is not None:
        return max(replica.report_time_ms, node.last_heard_ms)
    return replica.report_time_ms


def _kept_bytes(copy: PreservedCopy) -> int:
    return copy.size_bytes if copy.exclusive_bytes is None else copy.exclusive_bytes


# Snapshots and preserved copies.


@dataclass(slots=True)
class Held:
    """One snapshot, and the nodes that have its data; `off_lineage` those of them whose lineage it is not in."""

    volume: str
    snapshot: Snapshot
    nodes: list[str] = field(default_factory=list)
    off_lineage: set[str] = field(default_factory=set)

    @property
    def key(self) -> str:
        """Orders by volume, newest first."""
        cp = self.snapshot.cp
        newest_first = (descending(cp.epoch), descending(cp.sequence), descending(self.snapshot.create_time_ms))
        return "\0".join((self.volume, *newest_first, self.snapshot.id))


def held_snapshots(view: VolumeView, node: str = "") -> list[Held]:
    """Every snapshot whose data some node has, or that one node has, newest first; those of other tools too."""
    held: dict[str, Held] = {}
    for name in sorted(view.replicas):
        for record in view.replicas[name].lineage:
            if record.present:
                held.setdefault(record.id, Held(view.name, record)).nodes.append(name)
    for name in sorted(view.replicas):
        report = view.replicas[name].report
        for other in report.others if report is not None else ():
            one = held.setdefault(other.id, Held(view.name, other))
            if name not in one.nodes:
                one.nodes.append(name)
                one.off_lineage.add(name)
    return sorted((one for one in held.values() if not node or node in one.nodes), key=lambda one: one.key)


def snapshot_to_view(engine: Engine, held: Held) -> volume_pb2.Snapshot:
    record = held.snapshot
    return volume_pb2.Snapshot(
        id=record.id,
        volume=held.volume,
        cp=cp_to_proto(record.cp),
        parent=record.parent,
        create_time=time_or_unset(record.create_time_ms),
        size_bytes=record.size_bytes,
        origin=ORIGINS[record.origin],
        consistency=CONSISTENCIES[record.consistency],
        note=cut(record.note),
        group_id=record.group_id,
        copies=[
            volume_pb2.SnapshotCopy(
                node=node,
                pinned_by=first(engine.pinned_by(held.volume, node, record.id)),
                off_lineage=node in held.off_lineage,
            )
            for node in held.nodes[:ENTRIES_MAX]
        ],
    )


@dataclass(frozen=True, slots=True)
class Preserved:
    """One preserved copy, and whose it is."""

    volume: str
    node: str
    copy: PreservedCopy

    @property
    def key(self) -> str:
        """Orders by volume and node, newest first."""
        return "\0".join((self.volume, self.node, descending(self.copy.create_time_ms), self.copy.id))

    def to_proto(self) -> volume_pb2.PreservedCopy:
        return preserved_to_proto(self.copy, volume=self.volume, node=self.node)


def preserved_copies(view: VolumeView, node: str = "") -> list[Preserved]:
    found = [
        Preserved(view.name, name, copy)
        for name, replica in view.replicas.items()
        if replica.report is not None and (not node or name == node)
        for copy in replica.report.preserved
    ]
    return sorted(found, key=lambda one: one.key)


def holders(view: VolumeView, snapshot_id: str) -> tuple[str, ...]:
    """The nodes that have a snapshot's, or a preserved copy's, data."""
    snapshots = {node for one in held_snapshots(view) if one.snapshot.id == snapshot_id for node in one.nodes}
    preserved = {one.node for one in preserved_copies(view) if one.copy.id == snapshot_id}
    return tuple(sorted(snapshots | preserved))


def descending(number: int) -> str:
    """A text that sorts the other way round."""
    return f"{2**64 - 1 - number:020d}"
