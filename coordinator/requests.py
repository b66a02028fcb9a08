"""What operators ask, checked field by field, as the engine's requests.

The rules:

* A field that is wrong is `Invalid("INVALID_FIELD")` and names itself; a volume or a node that nobody knows is
  `NotFound` with the nearest name. Nothing that is not checked here reaches the engine.
* "All volumes" is said, never meant by leaving a list empty, and never together with a list.
* Where an operator takes responsibility (`accept_loss_nodes`, `choose_node`, `replace_nodes`) it is for nodes by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from google.protobuf.duration_pb2 import Duration

from coordinator.core.claims import Problem
from coordinator.core.cluster import Pause
from coordinator.core.requests import (
    AdoptStoreRequest,
    CancelRequest,
    DropRequest,
    ElectRequest,
    ExportRequest,
    LimitRequest,
    PauseRequest,
    PlanRequest,
    PruneRequest,
    RemoveRequest,
    ResyncRequest,
    SnapshotRequest,
)
from coordinator.core.words import nearest
from coordinator.office import Engine
from resilver.errors import NotFound, Refused
from resilver.fields import (
    NOTE_CHARS_MAX,
    ORIGIN_BY_VALUE,
    check_count,
    check_enum,
    check_id,
    check_name,
    check_number,
    check_path,
    check_text,
    invalid,
)
from resilver.limits import LimitChange
from resilver.lineage import Origin
from resilver.v1 import coordinator_pb2
from resilver.wire_limits import change_from_proto

VOLUMES_MAX: Final = 1000
NODES_MAX: Final = 256
KEEP_LAST_MAX: Final = 10_000
PAUSE_SECONDS_MAX: Final = 10 * 365 * 24 * 3600
_ETAG_CHARS_MAX: Final = 127


@dataclass(frozen=True, slots=True)
class Names:
    """What a request may name. `elsewhere`: volumes whose agents belong to another store, and how to have them."""

    volumes: tuple[str, ...]
    nodes: frozenset[str]
    elsewhere: Mapping[str, Problem] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: Engine) -> Names:
        volumes = engine.volume_names()
        wrong_store = [one for one in engine.refused().values() if one.problem.reason == "WRONG_STORE"]
        elsewhere = {volume: one.problem for one in wrong_store for volume in one.node.volumes}
        return cls(volumes, engine.node_names(), elsewhere)

    def volume(self, name: str, field: str = "volume") -> str:
        if check_name(name, field) not in self.volumes:
            problem = self.elsewhere.get(name)
            if problem is not None:
                raise Refused(problem.reason, problem.message, next_command=problem.next_command, volume=name)
            message = f"no volume is named {name!r}{nearest(name, self.volumes)}"
            raise NotFound("VOLUME_NOT_FOUND", message, volume=name, field=field)
        return name

    def node(self, name: str, field: str = "node") -> str:
        if check_name(name, field) not in self.nodes:
            message = f"no node is named {name!r}{nearest(name, self.nodes)}"
            raise NotFound("NODE_NOT_FOUND", message, node=name, field=field)
        return name

    def some_volumes(self, volumes: Sequence[str], field: str = "volumes") -> tuple[str, ...]:
        """Each one once, in the order given; may be empty."""
        check_count(volumes, field, VOLUMES_MAX)
        return tuple(dict.fromkeys(self.volume(name, f"{field}[{at}]") for at, name in enumerate(volumes)))

    def volumes_or_all(self, volumes: Sequence[str], *, every: bool) -> tuple[str, ...]:
        if volumes and every:
            raise invalid("all", "is set together with volumes: name volumes, or ask for all of them")
        if every:
            return self.volumes
        if not volumes:
            raise invalid("volumes", "is empty: name at least one volume, or set all to mean every one")
        return self.some_volumes(volumes)

    def some_nodes(self, nodes: Sequence[str], field: str = "nodes") -> frozenset[str]:
        check_count(nodes, field, NODES_MAX)
        return frozenset(self.node(name, f"{field}[{at}]") for at, name in enumerate(nodes))


def check_request_id(request_id: str) -> str:
    """A UUID, in its usual form; empty for a request that is not to be recognised again."""
    if not request_id:
        return ""
    try:
        well_formed = str(UUID(request_id)) == request_id.lower()
    except ValueError:
        well_formed = False
    if not well_formed:
        raise invalid("request_id", f"is {request_id[:80]!r}; it is a UUID, or empty")
    return request_id.lower()


def check_etag(etag: str, field: str = "etag") -> str:
    return check_text(etag, field, chars_max=_ETAG_CHARS_MAX)


def plan(message: coordinator_pb2.PlanResyncRequest, names: Names, principal: str) -> PlanRequest:
    return PlanRequest(
        volumes=names.volumes_or_all(message.volumes, every=message.all),
        nodes=names.some_nodes(message.nodes),
        full=message.full,
        replace=names.some_nodes(message.replace_nodes, "replace_nodes"),
        take_snapshot=message.take_snapshot,
        principal=principal,
    )


def resync(message: coordinator_pb2.StartResyncRequest, names: Names, principal: str) -> ResyncRequest:
    return ResyncRequest(
        volumes=names.volumes_or_all(message.volumes, every=message.all),
        nodes=names.some_nodes(message.nodes),
        plan_etag=check_etag(message.plan_etag, "plan_etag"),
        full=message.full,
        replace=names.some_nodes(message.replace_nodes, "replace_nodes"),
        validate_only=message.validate_only,
        principal=principal,
    )


def elect(message: coordinator_pb2.ElectPrimaryRequest, names: Names, principal: str) -> ElectRequest:
    return ElectRequest(
        volume=names.volume(message.volume),
        choose=names.node(message.choose_node, "choose_node") if message.choose_node else "",
        accept_loss=names.some_nodes(message.accept_loss_nodes, "accept_loss_nodes"),
        dry_run=message.validate_only,
        etag=check_etag(message.etag),
        principal=principal,
    )


def snapshot(message: coordinator_pb2.CreateSnapshotRequest, names: Names, principal: str) -> SnapshotRequest:
    return SnapshotRequest(
        volumes=names.volumes_or_all(message.volumes, every=message.all),
        note=check_text(message.note, "note", chars_max=NOTE_CHARS_MAX),
        validate_only=message.validate_only,
        principal=principal,
    )


def cancel(message: coordinator_pb2.CancelResyncRequest, principal: str) -> CancelRequest:
    return CancelRequest(check_id(message.id, "id"), message.discard_stage, principal)


def drop(message: coordinator_pb2.DeleteSnapshotRequest, names: Names, principal: str) -> DropRequest:
    return DropRequest(
        snapshot_id=check_id(message.id, "id"),
        nodes=names.some_nodes(message.nodes),
        validate_only=message.validate_only,
        principal=principal,
    )


def prune(message: coordinator_pb2.PruneSnapshotsRequest, names: Names, principal: str) -> PruneRequest:
    if check_number(message.keep_last, "keep_last") > KEEP_LAST_MAX:
        raise invalid("keep_last", f"is {message.keep_last}; at most {KEEP_LAST_MAX} is allowed")
    return PruneRequest(names.volume(message.volume), message.keep_last, message.validate_only, principal)


def export(message: coordinator_pb2.ExportSnapshotRequest, names: Names, principal: str) -> ExportRequest:
    return ExportRequest(
        snapshot_id=check_id(message.id, "id"),
        node=names.node(message.node),
        path=check_path(message.path, "path"),
        writable=message.writable,
        principal=principal,
    )


def pause(message: coordinator_pb2.PauseVolumeRequest, names: Names, principal: str, now_ms: int) -> PauseRequest:
    volumes = names.volumes_or_all(message.volumes, every=message.all)
    reason = check_text(message.reason, "reason", chars_max=NOTE_CHARS_MAX)
    if not reason.strip():
        raise invalid("reason", "is empty: say why, for whoever finds the volume paused")
    until_ms = None
    if message.HasField("pause_duration"):
        until_ms = now_ms + _check_duration_ms(message.pause_duration, "pause_duration")
    return PauseRequest(volumes, Pause(reason, until_ms, principal), principal)


def resume(message: coordinator_pb2.ResumeVolumeRequest, names: Names, principal: str) -> PauseRequest:
    return PauseRequest(names.volumes_or_all(message.volumes, every=message.all), None, principal)


def limit(message: coordinator_pb2.UpdateNodeRequest, names: Names, principal: str) -> LimitRequest:
    node, change = names.node(message.node), change_from_proto(message.limits)
    if change == LimitChange(duration_s=change.duration_s):
        raise invalid("limits", "change nothing: set a cap, or clear to end what was ordered before")
    return LimitRequest(node, change, principal)


def remove_replica(message: coordinator_pb2.RemoveReplicaRequest, names: Names, principal: str) -> RemoveRequest:
    return RemoveRequest(
        volume=names.volume(message.volume),
        node=names.node(message.node),
        etag=check_etag(message.etag),
        validate_only=message.validate_only,
        principal=principal,
    )


def remove_node(message: coordinator_pb2.RemoveNodeRequest, names: Names, principal: str) -> RemoveRequest:
    return RemoveRequest(node=names.node(message.node), validate_only=message.validate_only, principal=principal)


def remove_volume(message: coordinator_pb2.RemoveVolumeRequest, names: Names, principal: str) -> RemoveRequest:
    return RemoveRequest(
        volume=names.volume(message.volume),
        etag=check_etag(message.etag),
        validate_only=message.validate_only,
        principal=principal,
    )


def adopt_store(message: coordinator_pb2.AdoptStoreRequest, principal: str) -> AdoptStoreRequest:
    return AdoptStoreRequest(check_id(message.store_id, "store_id"), principal)


def check_origins(origins: Sequence[int]) -> frozenset[Origin]:
    check_count(origins, "origins", len(ORIGIN_BY_VALUE))
    return frozenset(check_enum(ORIGIN_BY_VALUE, value, f"origins[{at}]") for at, value in enumerate(origins))


def _check_duration_ms(duration: Duration, field: str) -> int:
    duration_ms = duration.seconds * 1000 + duration.nanos // 1_000_000
    if not 0 < duration_ms <= PAUSE_SECONDS_MAX * 1000:
        raise invalid(field, f"is {duration_ms / 1000:g} s; it must be more than 0 and at most ten years")
    return duration_ms
