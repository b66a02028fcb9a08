"""Messages to values: whatever a peer sends is a value or `Invalid`, and a value makes the same message again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

from google.protobuf.message import DecodeError, Message

from coordinator import reports, requests
from coordinator.requests import Names
from fuzz.target import target
from resilver import wire, wire_limits
from resilver.errors import Invalid, NotFound, Refused
from resilver.v1 import agent_pb2, coordinator_pb2, volume_pb2
from resilver.wire_pages import ReportAssembler

VALUES: Final[tuple[tuple[type[Message], Callable[[Any], Any], Callable[[Any], Message]], ...]] = (
    (volume_pb2.ConsistencyPoint, wire.cp_from_proto, wire.cp_to_proto),
    (volume_pb2.SnapshotRecord, wire.snapshot_from_proto, wire.snapshot_to_proto),
    (volume_pb2.VolumeRecord, wire.record_from_proto, wire.record_to_proto),
    (volume_pb2.Grant, wire.grant_from_proto, wire.grant_to_proto),
    (volume_pb2.LiveCopy, wire.live_from_proto, wire.live_to_proto),
    (volume_pb2.PreservedCopy, wire.preserved_from_proto, wire.preserved_to_proto),
    (volume_pb2.ResyncProgress, wire.progress_from_proto, wire.progress_to_proto),
    (agent_pb2.OrderHeader, wire.order_from_proto, wire.order_to_proto),
    (volume_pb2.NodeLimits, wire_limits.limits_from_proto, wire_limits.limits_to_proto),
    (volume_pb2.NodeLimitChange, wire_limits.change_from_proto, wire_limits.change_to_proto),
)
NAMES: Final = Names(("vm1", "vm2"), ("a", "b"))
REQUESTS: Final[tuple[tuple[type[Message], Callable[[Any], Any]], ...]] = (
    (coordinator_pb2.PlanResyncRequest, lambda one: requests.plan(one, NAMES, "p")),
    (coordinator_pb2.StartResyncRequest, lambda one: requests.resync(one, NAMES, "p")),
    (coordinator_pb2.ElectPrimaryRequest, lambda one: requests.elect(one, NAMES, "p")),
    (coordinator_pb2.CreateSnapshotRequest, lambda one: requests.snapshot(one, NAMES, "p")),
    (coordinator_pb2.CancelResyncRequest, lambda one: requests.cancel(one, "p")),
    (coordinator_pb2.DeleteSnapshotRequest, lambda one: requests.drop(one, NAMES, "p")),
    (coordinator_pb2.PruneSnapshotsRequest, lambda one: requests.prune(one, NAMES, "p")),
    (coordinator_pb2.ExportSnapshotRequest, lambda one: requests.export(one, NAMES, "p")),
    (coordinator_pb2.PauseVolumeRequest, lambda one: requests.pause(one, NAMES, "p", 0)),
    (coordinator_pb2.ResumeVolumeRequest, lambda one: requests.resume(one, NAMES, "p")),
    (coordinator_pb2.UpdateNodeRequest, lambda one: requests.limit(one, NAMES, "p")),
    (coordinator_pb2.RemoveReplicaRequest, lambda one: requests.remove_replica(one, NAMES, "p")),
    (coordinator_pb2.RemoveNodeRequest, lambda one: requests.remove_node(one, NAMES, "p")),
    (coordinator_pb2.RemoveVolumeRequest, lambda one: requests.remove_volume(one, NAMES, "p")),
    (coordinator_pb2.AdoptStoreRequest, lambda one: requests.adopt_store(one, "p")),
)


@target("wire_values")
def wire_values(data: bytes) -> None:
    """The first byte says which message."""
    if not data:
        return
    kind, read, write = VALUES[data[0] % len(VALUES)]
    with contextlib.suppress(Invalid, DecodeError):
        value = read(kind.FromString(data[1:]))
        assert read(kind.FromString(write(value).SerializeToString())) == value


@target("wire_reports")
def wire_reports(data: bytes) -> None:
    """A row of report messages, each behind its length in two bytes; the first is a hello too."""
    assembler, at = ReportAssembler(), 0
    while at + 2 <= len(data):
        size = int.from_bytes(data[at : at + 2], "big")
        body = data[at + 2 : at + 2 + size]
        at += 2 + size
        with contextlib.suppress(Invalid, DecodeError):
            message = agent_pb2.ReportRequest.FromString(body)
            with contextlib.suppress(Invalid):
                reports.read_hello(message, "ipv4:10.0.0.1:5123", "s1", 0)
            for page in (message.replica, *message.pages.pages):
                with contextlib.suppress(Invalid):
                    found = assembler.add(page)
                    if found is not None:
                        wire.report_to_proto(found).SerializeToString()


@target("wire_requests")
def wire_requests(data: bytes) -> None:
    """What operators ask: the first byte says which."""
    if not data:
        return
    kind, read = REQUESTS[data[0] % len(REQUESTS)]
    with contextlib.suppress(Invalid, NotFound, Refused, DecodeError):
        read(kind.FromString(data[1:]))
