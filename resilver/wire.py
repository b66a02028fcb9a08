"""Values to protobuf and back, in one place.

The rules:

* `x_to_proto` always works; `x_from_proto` trusts nothing: whatever is wrong with a message raises
  `Invalid("INVALID_FIELD", field=...)` and nothing else.
* Names and ids become paths and keys, so they are checked by pattern. Texts, lists and numbers have bounds; a number
  stays below 2^63, so that it fits a file offset and can still grow.
* What is too long to travel is cut on the sending side, newest or first kept.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from resilver.fields import (
    CONSISTENCIES,
    CONSISTENCY_BY_VALUE,
    LIVE_BY_VALUE,
    LIVE_STATES,
    NOTE_CHARS_MAX,
    ORIGIN_BY_VALUE,
    ORIGINS,
    PATH_CHARS_MAX,
    PRESENCE_BY_VALUE,
    PRESENCES,
    RESYNC_BY_VALUE,
    RESYNC_STATES,
    check_count,
    check_cp_number,
    check_enum,
    check_id,
    check_name,
    check_number,
    check_optional,
    check_reason,
    check_text,
    check_texts,
    cut_text,
    cut_texts,
    invalid,
)
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.v1 import agent_pb2, volume_pb2
from resilver.volume import (
    Grant,
    LiveCopy,
    Order,
    PreservedCopy,
    Progress,
    ReplicaReport,
    SourceShare,
    VolumeRecord,
)

PRESERVED_MAX: Final = 256
PRESERVED_BYTES_MAX: Final = 256 << 10
OTHERS_MAX: Final = 500
OTHERS_BYTES_MAX: Final = 64 << 10
MEMBERS_MAX: Final = 256
PROBLEMS_MAX: Final = 32
USERS_MAX: Final = 16
SOURCES_MAX: Final = 64
KEEP_LAST_MAX: Final = 2**32 - 1
_TIME_SECONDS_MAX: Final = 253_402_300_799
"""The last second of the year 9999, where Timestamp ends."""


# Times.


def time_to_proto(time_ms: int) -> Timestamp:
    """Unix time in milliseconds to Timestamp."""
    seconds, milliseconds = divmod(time_ms, 1000)
    return Timestamp(seconds=min(max(seconds, 0), _TIME_SECONDS_MAX), nanos=milliseconds * 1_000_000)


def time_from_proto(message: Timestamp, field: str) -> int:
    """Unix time in milliseconds."""
    if not 0 <= message.seconds <= _TIME_SECONDS_MAX or not 0 <= message.nanos < 1_000_000_000:
        raise invalid(field, "is no time between 1970 and 9999")
    return message.seconds * 1000 + message.nanos // 1_000_000


# Consistency points and snapshots.


def cp_to_proto(cp: ConsistencyPoint) -> volume_pb2.ConsistencyPoint:
    return volume_pb2.ConsistencyPoint(epoch=cp.epoch, sequence=cp.sequence, text=str(cp))


def cp_from_proto(message: volume_pb2.ConsistencyPoint, field: str = "cp") -> ConsistencyPoint:
    """`text` is output only and not read."""
    epoch = check_cp_number(message.epoch, f"{field}.epoch")
    return ConsistencyPoint(epoch, check_cp_number(message.sequence, f"{field}.sequence"))


def snapshot_to_proto(snapshot: Snapshot) -> volume_pb2.SnapshotRecord:
    return volume_pb2.SnapshotRecord(
        id=snapshot.id,
        cp=cp_to_proto(snapshot.cp),
        parent=snapshot.parent,
        present=snapshot.present,
        epoch_id=snapshot.epoch_id,
        create_time=time_to_proto(snapshot.create_time_ms),
        size_bytes=snapshot.size_bytes,
        consistency=CONSISTENCIES[snapshot.consistency],
        origin=ORIGINS[snapshot.origin],
        note=cut_text(snapshot.note, NOTE_CHARS_MAX),
        group_id=snapshot.group_id,
    )


def snapshot_from_proto(message: volume_pb2.SnapshotRecord, field: str = "snapshot") -> Snapshot:
    return Snapshot(
        id=check_id(message.id, f"{field}.id"),
        cp=cp_from_proto(message.cp, f"{field}.cp"),
        parent=check_id(message.parent, f"{field}.parent", required=False),
        present=message.present,
        epoch_id=check_id(message.epoch_id, f"{field}.epoch_id", required=False),
        create_time_ms=time_from_proto(message.create_time, f"{field}.create_time"),
        size_bytes=check_number(message.size_bytes, f"{field}.size_bytes"),
        consistency=check_enum(CONSISTENCY_BY_VALUE, message.consistency, f"{field}.consistency"),
        origin=check_enum(ORIGIN_BY_VALUE, message.origin, f"{field}.origin"),
        note=check_text(message.note, f"{field}.note", chars_max=NOTE_CHARS_MAX),
        group_id=check_id(message.group_id, f"{field}.group_id", required=False),
    )


# What is remembered of a volume.


def record_to_proto(record: VolumeRecord) -> volume_pb2.VolumeRecord:
    return volume_pb2.VolumeRecord(
        volume=record.volume,
        volume_id=record.volume_id,
        epoch=record.epoch,
        epoch_id=record.epoch_id,
        primary=record.primary,
        members=record.members,
        newest_cp=cp_to_proto(record.newest_cp),
        newest_id=record.newest_id,
    )


def record_from_proto(message: volume_pb2.VolumeRecord, field: str = "record") -> VolumeRecord:
    check_count(message.members, f"{field}.members", MEMBERS_MAX)
    return VolumeRecord(
        volume=check_name(message.volume, f"{field}.volume"),
        volume_id=check_id(message.volume_id, f"{field}.volume_id", required=False),
        epoch=check_cp_number(message.epoch, f"{field}.epoch"),
        epoch_id=check_id(message.epoch_id, f"{field}.epoch_id", required=False),
        primary=check_name(message.primary, f"{field}.primary") if message.primary else "",
        members=tuple(check_name(node, f"{field}.members[{index}]") for index, node in enumerate(message.members)),
        newest_cp=cp_from_proto(message.newest_cp, f"{field}.newest_cp"),
        newest_id=check_id(message.newest_id, f"{field}.newest_id", required=False),
    )


def grant_to_proto(grant: Grant) -> volume_pb2.Grant:
    return volume_pb2.Grant(volume_id=grant.volume_id, epoch=grant.epoch, epoch_id=grant.epoch_id)


def grant_from_proto(message: volume_pb2.Grant, field: str = "grant") -> Grant:
    return Grant(
        volume_id=check_id(message.volume_id, f"{field}.volume_id"),
        epoch=check_cp_number(message.epoch, f"{field}.epoch", least=1),
        epoch_id=check_id(message.epoch_id, f"{field}.epoch_id"),
    )


# Replicas.


def live_to_proto(live: LiveCopy) -> volume_pb2.LiveCopy:
    return volume_pb2.LiveCopy(
        state=LIVE_STATES[live.state],
        path=cut_text(live.path, PATH_CHARS_MAX),
        size_bytes=live.size_bytes,
        allocated_bytes=live.allocated_bytes,
        based_on=live.based_on,
        in_use=live.in_use,
        in_use_by=cut_texts(live.in_use_by, USERS_MAX),
        extent_count=live.extent_count,
        modified_bytes=live.modified_bytes,
    )


def live_from_proto(message: volume_pb2.LiveCopy, field: str = "live") -> LiveCopy:
    return LiveCopy(
        state=check_enum(LIVE_BY_VALUE, message.state, f"{field}.state"),
        path=check_text(message.path, f"{field}.path", chars_max=PATH_CHARS_MAX),
        size_bytes=check_number(message.size_bytes, f"{field}.size_bytes"),
        allocated_bytes=check_number(message.allocated_bytes, f"{field}.allocated_bytes"),
        based_on=check_id(message.based_on, f"{field}.based_on", required=False),
        in_use=message.in_use if message.HasField("in_use") else None,
        in_use_by=check_texts(message.in_use_by, f"{field}.in_use_by", USERS_MAX),
        extent_count=check_optional(message, "extent_count", field),
        modified_bytes=check_optional(message, "modified_bytes", field),
    )


def preserved_to_proto(copy: PreservedCopy, *, volume: str = "", node: str = "") -> volume_pb2.PreservedCopy:
    return volume_pb2.PreservedCopy(
        id=copy.id,
        volume=volume,
        node=node,
        path=cut_text(copy.path, PATH_CHARS_MAX),
        based_on=copy.based_on,
        cp=cp_to_proto(copy.cp),
        live=copy.live,
        create_time=time_to_proto(copy.create_time_ms),
        size_bytes=copy.size_bytes,
        exclusive_bytes=copy.exclusive_bytes,
        resync=copy.resync_id,
    )


def preserved_from_proto(message: volume_pb2.PreservedCopy, field: str = "preserved") -> PreservedCopy:
    """Whose copy it is (`volume`, `node`) is told by where the message stands."""
    return PreservedCopy(
        id=check_id(message.id, f"{field}.id"),
        path=check_text(message.path, f"{field}.path", chars_max=PATH_CHARS_MAX),
        based_on=check_id(message.based_on, f"{field}.based_on", required=False),
        cp=cp_from_proto(message.cp, f"{field}.cp"),
        live=message.live,
        create_time_ms=time_from_proto(message.create_time, f"{field}.create_time"),
        size_bytes=check_number(message.size_bytes, f"{field}.size_bytes"),
        exclusive_bytes=check_optional(message, "exclusive_bytes", field),
        resync_id=check_id(message.resync, f"{field}.resync", required=False),
    )


def _preserved_that_fit(report: ReplicaReport, node: str) -> list[volume_pb2.PreservedCopy]:
    newest_first = sorted(report.preserved, key=lambda copy: (-copy.create_time_ms, copy.id))
    fitting: list[volume_pb2.PreservedCopy] = []
    bytes_left = PRESERVED_BYTES_MAX
    for copy in newest_first[:PRESERVED_MAX]:
        message = preserved_to_proto(copy, volume=report.volume, node=node)
        bytes_left -= message.ByteSize() + 8
        if bytes_left < 0:
            break
        fitting.append(message)
    return fitting


def _others_that_fit(report: ReplicaReport) -> list[volume_pb2.SnapshotRecord]:
    newest_first = sorted(report.others, key=lambda snapshot: (-snapshot.create_time_ms, snapshot.id))
    fitting: list[volume_pb2.SnapshotRecord] = []
    bytes_left = OTHERS_BYTES_MAX
    for snapshot in newest_first[:OTHERS_MAX]:
        message = snapshot_to_proto(snapshot)
        bytes_left -= message.ByteSize() + 8
        if bytes_left < 0:
            break
        fitting.append(message)
    return fitting


def report_to_proto(report: ReplicaReport, *, node: str = "") -> volume_pb2.ReplicaReport:
    """The report without its lineage, which travels beside it."""
    return volume_pb2.ReplicaReport(
        volume=report.volume,
        volume_id=report.volume_id,
        presence=PRESENCES[report.presence],
        live=live_to_proto(report.live),
        record=None if report.record is None else record_to_proto(report.record),
        grant=None if report.grant is None else grant_to_proto(report.grant),
        backend=report.backend,
        priority=report.priority,
        keep_last=min(report.keep_last, KEEP_LAST_MAX),
        free_bytes=report.free_bytes,
        reserve_bytes=report.reserve_bytes,
        preserved=_preserved_that_fit(report, node),
        problems=cut_texts(report.problems, PROBLEMS_MAX),
        examine_time=time_to_proto(report.examine_time_ms),
        reflink=report.reflink,
        group=report.group,
        others=_others_that_fit(report),
        resync_priority=report.resync_priority,
    )


def report_from_proto(
    message: volume_pb2.ReplicaReport, lineage: Lineage | None = None, field: str = "replica"
) -> ReplicaReport:
    check_count(message.preserved, f"{field}.preserved", PRESERVED_MAX)
    check_count(message.others, f"{field}.others", OTHERS_MAX)
    return ReplicaReport(
        volume=check_name(message.volume, f"{field}.volume"),
        presence=check_enum(PRESENCE_BY_VALUE, message.presence, f"{field}.presence"),
        volume_id=check_id(message.volume_id, f"{field}.volume_id", required=False),
        lineage=lineage or Lineage(),
        live=live_from_proto(message.live, f"{field}.live") if message.HasField("live") else LiveCopy(),
        record=record_from_proto(message.record, f"{field}.record") if message.HasField("record") else None,
        grant=grant_from_proto(message.grant, f"{field}.grant") if message.HasField("grant") else None,
        backend=check_name(message.backend, f"{field}.backend") if message.backend else "",
        priority=message.priority,
        keep_last=check_number(message.keep_last, f"{field}.keep_last"),
        free_bytes=check_number(message.free_bytes, f"{field}.free_bytes"),
        reserve_bytes=check_number(message.reserve_bytes, f"{field}.reserve_bytes"),
        reflink=message.reflink,
        preserved=tuple(
            preserved_from_proto(copy, f"{field}.preserved[{index}]") for index, copy in enumerate(message.preserved)
        ),
        problems=check_texts(message.problems, f"{field}.problems", PROBLEMS_MAX),
        examine_time_ms=time_from_proto(message.examine_time, f"{field}.examine_time"),
        group=check_name(message.group, f"{field}.group") if message.group else "",
        others=tuple(snapshot_from_proto(one, f"{field}.others[{index}]") for index, one in enumerate(message.others)),
        resync_priority=message.resync_priority,
    )


# Runs and orders.


def progress_to_proto(progress: Progress) -> volume_pb2.ResyncProgress:
    return volume_pb2.ResyncProgress(
        resync_id=progress.resync_id,
        volume=progress.volume,
        state=RESYNC_STATES[progress.state],
        total_bytes=progress.total_bytes,
        range_count=progress.range_count,
        done_bytes=progress.done_bytes,
        wire_bytes=progress.wire_bytes,
        resent_bytes=progress.resent_bytes,
        sources=[
            volume_pb2.ResyncSource(
                node=share.node, wire_bytes=share.wire_bytes, bytes_per_second=share.bytes_per_second
            )
            for share in progress.sources[:SOURCES_MAX]
        ],
        reason=progress.reason,
        message=cut_text(progress.message),
        preserved=progress.preserved[:PRESERVED_MAX],
    )


def progress_from_proto(message: volume_pb2.ResyncProgress, field: str = "resync") -> Progress:
    check_count(message.sources, f"{field}.sources", SOURCES_MAX)
    check_count(message.preserved, f"{field}.preserved", PRESERVED_MAX)
    return Progress(
        resync_id=check_id(message.resync_id, f"{field}.resync_id"),
        volume=check_name(message.volume, f"{field}.volume"),
        state=check_enum(RESYNC_BY_VALUE, message.state, f"{field}.state"),
        total_bytes=check_optional(message, "total_bytes", field),
        range_count=check_optional(message, "range_count", field),
        done_bytes=check_number(message.done_bytes, f"{field}.done_bytes"),
        wire_bytes=check_number(message.wire_bytes, f"{field}.wire_bytes"),
        resent_bytes=check_number(message.resent_bytes, f"{field}.resent_bytes"),
        sources=tuple(
            SourceShare(
                node=check_name(share.node, f"{field}.sources[{index}].node"),
                wire_bytes=check_number(share.wire_bytes, f"{field}.sources[{index}].wire_bytes"),
                bytes_per_second=check_number(share.bytes_per_second, f"{field}.sources[{index}].bytes_per_second"),
            )
            for index, share in enumerate(message.sources)
        ),
        reason=check_reason(message.reason, f"{field}.reason"),
        message=check_text(message.message, f"{field}.message"),
        preserved=tuple(check_id(each, f"{field}.preserved[{index}]") for index, each in enumerate(message.preserved)),
    )


def order_to_proto(order: Order) -> agent_pb2.OrderHeader:
    return agent_pb2.OrderHeader(
        cluster=order.cluster,
        store_id=order.store_id,
        term=order.term,
        leader_id=order.leader_id,
        volume=order.volume,
        volume_id=order.volume_id,
        epoch=order.epoch,
        epoch_id=order.epoch_id,
        expected_tip=order.expected_tip,
    )


def order_from_proto(message: agent_pb2.OrderHeader, field: str = "header", *, of_volume: bool = True) -> Order:
    """Not `of_volume`: it is about the node itself, and names none."""
    return Order(
        cluster=check_name(message.cluster, f"{field}.cluster"),
        store_id=check_id(message.store_id, f"{field}.store_id"),
        term=check_number(message.term, f"{field}.term", least=1),
        leader_id=check_id(message.leader_id, f"{field}.leader_id"),
        volume=check_name(message.volume, f"{field}.volume") if of_volume else "",
        volume_id=check_id(message.volume_id, f"{field}.volume_id", required=False),
        epoch=check_cp_number(message.epoch, f"{field}.epoch"),
        epoch_id=check_id(message.epoch_id, f"{field}.epoch_id", required=False),
        expected_tip=(
            check_id(message.expected_tip, f"{field}.expected_tip", required=False)
            if message.HasField("expected_tip")
            else None
        ),
    )
