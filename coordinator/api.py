"""The Coordinator service: what operators ask, and what they order.

The rules:

* Every field is checked before anything is asked of the engine (`requests.py`); what reads is in `queries.py`, what
  follows is in `watches.py`, and here stands what changes something.
* A change with a `request_id` is carried out once, and goes on when its caller has gone; `validate_only` answers what
  would be, and changes nothing.
* What changes something is `@audited`: entered into the audit trail, refused or not (`audit.py`).
* An `etag` that no longer fits is `ETAG_MISMATCH`, before anything is done.
* A standby answers `NOT_LEADER` to everything.
"""

# ruff: noqa: N802, ARG002 - the protocol gives the methods their names, and gRPC gives each of them both arguments

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, TypeVar

from google.protobuf.message import Message
from grpc import aio

from coordinator import queries, requests, views, watches
from coordinator.audit import Auditor, audited, entering, list_audit_entries
from coordinator.core.cluster import ElectionRecord, Resync
from coordinator.core.etag import volume_etag
from coordinator.core.orders import Dropped, Exported
from coordinator.core.requests import Planned, Pruned, Request, ResyncsStarted, SnapshotsTaken
from coordinator.idempotency import Answered
from coordinator.office import Engine, Office
from coordinator.paging import MESSAGE_BYTES_MAX, chunks
from coordinator.plans import Plans
from coordinator.reports import peer_host
from coordinator.requests import Names, check_request_id
from coordinator.shown import Shown
from coordinator.wire import (
    election_to_proto,
    pruned_to_proto,
    resync_to_proto,
    started_to_proto,
    volume_refusal_to_proto,
)
from resilver.access import caller
from resilver.errors import Conflict, Exhausted, Invalid, Refused, Unavailable
from resilver.limits import NodeLimits
from resilver.lineage import Snapshot
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import coordinator_pb2_grpc, volume_pb2

ASK_TIMEOUT_S: Final = 900.0
"""How long a caller waits for the engine; its own deadline is usually shorter, and ends only its waiting, too."""
WORK_TIMEOUT_S: Final = 24 * 3600.0
"""How long an order is waited for that has a `request_id`, by nobody or by whoever asks again."""
EXPORT_CHUNK_BYTES: Final = 256 << 10

Context = aio.ServicerContext[Any, Any]


M = TypeVar("M", bound=Message)
A = TypeVar("A")


class Coordinator(coordinator_pb2_grpc.CoordinatorServicer):
    """Serves operators from what the office knows."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self._answered = Answered(office.now_ms)
        self._shown = Shown()
        self._plans = Plans(office.now_ms)
        self.auditor: Final = Auditor(office, principal_of)

    # ------------------------------------------------------------ reading

    async def GetCluster(self, request: api.GetClusterRequest, context: Context) -> api.GetClusterResponse:
        return await queries.get_cluster(self._office)

    async def ListNodes(self, request: api.ListNodesRequest, context: Context) -> api.ListNodesResponse:
        return queries.list_nodes(await self._office.settled(), request, self._office.now_ms())

    async def GetNode(self, request: api.GetNodeRequest, context: Context) -> api.GetNodeResponse:
        return queries.get_node(await self._office.settled(), request, self._office.now_ms())

    async def ListVolumes(self, request: api.ListVolumesRequest, context: Context) -> api.ListVolumesResponse:
        return queries.list_volumes(await self._office.settled(), self._shown, request, self._office.now_ms())

    async def GetVolume(self, request: api.GetVolumeRequest, context: Context) -> api.GetVolumeResponse:
        return queries.get_volume(await self._office.settled(), request, self._office.now_ms())

    async def ListSnapshots(self, request: api.ListSnapshotsRequest, context: Context) -> api.ListSnapshotsResponse:
        return queries.list_snapshots(await self._office.settled(), request)

    async def ListPreserved(self, request: api.ListPreservedRequest, context: Context) -> api.ListPreservedResponse:
        return queries.list_preserved(await self._office.settled(), request)

    async def ListElections(self, request: api.ListElectionsRequest, context: Context) -> api.ListElectionsResponse:
        return queries.list_elections(await self._office.settled(), request)

    async def ExplainVolume(self, request: api.ExplainVolumeRequest, context: Context) -> api.ExplainVolumeResponse:
        return bounded(queries.explain_volume(await self._office.settled(), request, self._office.now_ms()))

    async def GetResync(self, request: api.GetResyncRequest, context: Context) -> api.GetResyncResponse:
        return api.GetResyncResponse(resync=resync_to_proto(queries.resync(await self._office.settled(), request.id)))

    async def ListResyncs(self, request: api.ListResyncsRequest, context: Context) -> api.ListResyncsResponse:
        return queries.list_resyncs(await self._office.settled(), request)

    async def ListEvents(self, request: api.ListEventsRequest, context: Context) -> api.ListEventsResponse:
        return queries.list_events(self._office, request)

    async def ListAuditEntries(
        self, request: api.ListAuditEntriesRequest, context: Context
    ) -> api.ListAuditEntriesResponse:
        await self._office.settled()
        return list_audit_entries(self._office, request)

    # ------------------------------------------------------------ following

    async def WatchVolumes(
        self, request: api.WatchVolumesRequest, context: Context
    ) -> AsyncIterator[api.WatchVolumesResponse]:
        async with watches.while_leading(watches.watch_volumes(self._office, request)) as answers:
            async for answer in answers:
                yield answer

    async def WatchResyncs(
        self, request: api.WatchResyncsRequest, context: Context
    ) -> AsyncIterator[api.WatchResyncsResponse]:
        async with watches.while_leading(watches.watch_resyncs(self._office, request)) as answers:
            async for answer in answers:
                yield answer

    async def WatchEvents(
        self, request: api.WatchEventsRequest, context: Context
    ) -> AsyncIterator[api.WatchEventsResponse]:
        async with watches.while_leading(watches.watch_events(self._office, request, context)) as answers:
            async for answer in answers:
                yield answer

    # ------------------------------------------------------------ resyncs

    @audited
    async def PlanResync(self, request: api.PlanResyncRequest, context: Context) -> api.PlanResyncResponse:
        asked = requests.plan(request, self._names(), principal_of(context))
        return bounded(await self._plans.answer(request, lambda: self._ask(asked, Planned, ASK_TIMEOUT_S)))

    @audited
    async def StartResync(self, request: api.StartResyncRequest, context: Context) -> api.StartResyncResponse:
        asked = requests.resync(request, self._names(), principal_of(context))

        async def run() -> api.StartResyncResponse:
            return started_to_proto(await self._ask(asked, ResyncsStarted))

        return await self._once(request, run)

    @audited
    async def CancelResync(self, request: api.CancelResyncRequest, context: Context) -> api.CancelResyncResponse:
        asked = requests.cancel(request, principal_of(context))

        async def run() -> api.CancelResyncResponse:
            found = queries.resync(self._office.engine(), asked.resync_id)
            if not request.validate_only:
                found = await self._ask(asked, Resync)
            return api.CancelResyncResponse(resync=resync_to_proto(found))

        return await self._once(request, run)

    # ------------------------------------------------------------ snapshots

    @audited
    async def CreateSnapshot(self, request: api.CreateSnapshotRequest, context: Context) -> api.CreateSnapshotResponse:
        asked = requests.snapshot(request, self._names(), principal_of(context))

        async def run() -> api.CreateSnapshotResponse:
            taken = await self._ask(asked, SnapshotsTaken)
            return bounded(
                api.CreateSnapshotResponse(
                    snapshots=[self._snapshot(volume, snapshot) for volume, snapshot in taken.snapshots],
                    refusals=map(volume_refusal_to_proto, taken.refusals),
                )
            )

        return await self._once(request, run)

    @audited
    async def DeleteSnapshot(self, request: api.DeleteSnapshotRequest, context: Context) -> api.DeleteSnapshotResponse:
        asked = requests.drop(request, self._names(), principal_of(context))

        async def run() -> api.DeleteSnapshotResponse:
            return api.DeleteSnapshotResponse(freed_bytes=(await self._ask(asked, Dropped)).freed_bytes)

        return await self._once(request, run)

    @audited
    async def PruneSnapshots(self, request: api.PruneSnapshotsRequest, context: Context) -> api.PruneSnapshotsResponse:
        asked = requests.prune(request, self._names(), principal_of(context))

        async def run() -> api.PruneSnapshotsResponse:
            return pruned_to_proto(await self._ask(asked, Pruned))

        return await self._once(request, run)

    @audited
    async def ExportSnapshot(self, request: api.ExportSnapshotRequest, context: Context) -> api.ExportSnapshotResponse:
        asked = requests.export(request, self._names(), principal_of(context))

        async def run() -> api.ExportSnapshotResponse:
            if request.validate_only:
                size_bytes = queries.size_on(self._office.engine(), asked.snapshot_id, asked.node)
                return api.ExportSnapshotResponse(path=asked.path, size_bytes=size_bytes)
            exported = await self._ask(asked, Exported)
            return api.ExportSnapshotResponse(path=exported.path, size_bytes=exported.size_bytes)

        return await self._once(request, run)

    # ------------------------------------------------------------ decisions, pauses, membership

    @audited
    async def ElectPrimary(self, request: api.ElectPrimaryRequest, context: Context) -> api.ElectPrimaryResponse:
        asked = requests.elect(request, self._names(), principal_of(context))

        async def run() -> api.ElectPrimaryResponse:
            self._check_etag(asked.volume, asked.etag)
            return api.ElectPrimaryResponse(election=election_to_proto(await self._ask(asked, ElectionRecord)))

        return await self._once(request, run)

    @audited
    async def PauseVolume(self, request: api.PauseVolumeRequest, context: Context) -> api.PauseVolumeResponse:
        engine = self._office.engine()
        names = Names.of(engine)
        if request.all:
            # A volume that was never mirrored has nothing that could be paused.
            kept = tuple(name for name in names.volumes if engine.view(name).entry is not None)
            names = replace(names, volumes=kept)
        asked = requests.pause(request, names, principal_of(context), self._office.now_ms())

        async def run() -> api.PauseVolumeResponse:
            self._check_mirrored(asked.volumes)
            if asked.volumes and not request.validate_only:
                await self._ask(asked, object)
            return api.PauseVolumeResponse(volumes=self._volumes(asked.volumes))

        return await self._once(request, run)

    @audited
    async def ResumeVolume(self, request: api.ResumeVolumeRequest, context: Context) -> api.ResumeVolumeResponse:
        engine = self._office.engine()
        names = Names.of(engine)
        if request.all:
            names = replace(names, volumes=tuple(name for name in names.volumes if _paused(engine, name)))
        asked = requests.resume(request, names, principal_of(context))

        async def run() -> api.ResumeVolumeResponse:
            self._check_mirrored(asked.volumes)
            if asked.volumes and not request.validate_only:
                await self._ask(asked, object)
            return api.ResumeVolumeResponse(volumes=self._volumes(asked.volumes))

        return await self._once(request, run)

    @audited
    async def UpdateNode(self, request: api.UpdateNodeRequest, context: Context) -> api.UpdateNodeResponse:
        asked = requests.limit(request, self._names(), principal_of(context))

        async def run() -> api.UpdateNodeResponse:
            if not request.validate_only:
                await self._ask(asked, NodeLimits)
            found = queries.get_node(self._office.engine(), api.GetNodeRequest(node=asked.node), self._office.now_ms())
            return api.UpdateNodeResponse(node=found.node)

        return await self._once(request, run)

    @audited
    async def RemoveReplica(self, request: api.RemoveReplicaRequest, context: Context) -> api.RemoveReplicaResponse:
        asked = requests.remove_replica(request, self._names(), principal_of(context))

        async def run() -> api.RemoveReplicaResponse:
            self._check_etag(asked.volume, asked.etag)
            await self._ask(asked, object)
            return api.RemoveReplicaResponse(volumes=self._volumes((asked.volume,)))

        return await self._once(request, run)

    @audited
    async def RemoveNode(self, request: api.RemoveNodeRequest, context: Context) -> api.RemoveNodeResponse:
        asked = requests.remove_node(request, self._names(), principal_of(context))

        async def run() -> api.RemoveNodeResponse:
            engine = self._office.engine()
            concerned = tuple(name for name in engine.volume_names() if asked.node in engine.view(name).record.members)
            await self._ask(asked, object)
            return api.RemoveNodeResponse(volumes=self._volumes(concerned))

        return await self._once(request, run)

    @audited
    async def RemoveVolume(self, request: api.RemoveVolumeRequest, context: Context) -> api.RemoveVolumeResponse:
        asked = requests.remove_volume(request, self._names(), principal_of(context))

        async def run() -> api.RemoveVolumeResponse:
            self._check_etag(asked.volume, asked.etag)
            before = self._volumes((asked.volume,))
            await self._ask(asked, object)
            return api.RemoveVolumeResponse(volumes=before)

        return await self._once(request, run)

    # ------------------------------------------------------------ the store

    @audited
    async def AdoptStore(self, request: api.AdoptStoreRequest, context: Context) -> api.AdoptStoreResponse:
        asked = requests.adopt_store(request, principal_of(context))

        async def run() -> api.AdoptStoreResponse:
            present = self._office.engine().identity.store_id
            if asked.store_id != present:
                message = f"this coordinator's store is {present}, not {asked.store_id}"
                raise Invalid("INVALID_FIELD", message, field="store_id")
            if not request.validate_only:
                await self._ask(asked, object)
            return api.AdoptStoreResponse(store_id=present)

        return await self._once(request, run)

    async def ExportStore(
        self, request: api.ExportStoreRequest, context: Context
    ) -> AsyncIterator[api.ExportStoreResponse]:
        self._office.engine()
        held = bytearray()
        async for part in self._office.export_store():
            held += part
            while len(held) >= EXPORT_CHUNK_BYTES:
                yield api.ExportStoreResponse(chunk=bytes(held[:EXPORT_CHUNK_BYTES]))
                del held[:EXPORT_CHUNK_BYTES]
        if held:
            yield api.ExportStoreResponse(chunk=bytes(held))

    # ------------------------------------------------------------ what they share

    def _names(self) -> Names:
        return Names.of(self._office.engine())

    async def _ask(self, request: Request, answer: type[A], timeout_s: float = WORK_TIMEOUT_S) -> A:
        answered = await self._office.ask(request, timeout_s, entering())
        assert isinstance(answered, answer), f"{type(request).__name__} was answered by {type(answered).__name__}"
        return answered

    async def _once(self, request: Message, run: Callable[[], Awaitable[M]]) -> M:
        identified: Any = request
        request_id = check_request_id(identified.request_id)
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                return await self._answered.once(request_id, request, run)
        except TimeoutError:
            again = f"; ask again with request_id {request_id} for its answer" if request_id else ""
            message = f"no answer within {ASK_TIMEOUT_S:g} s; the work goes on{again}"
            raise Unavailable("DEADLINE", message) from None

    def _check_etag(self, volume: str, etag: str) -> None:
        present = volume_etag(self._office.engine().view(volume))
        if etag and etag != present:
            message = f"{volume} has changed: its etag is {present}, not {etag}; look at it again"
            raise Conflict("ETAG_MISMATCH", message, next_command=f"resilver explain {volume}", volume=volume)

    def _check_mirrored(self, volumes: tuple[str, ...]) -> None:
        for volume in volumes:
            if self._office.engine().view(volume).entry is None:
                message = f"{volume} has never been resynced, so there is nothing to pause"
                raise Refused("OPENING", message, next_command=f"resilver resync {volume}", volume=volume)

    def _volumes(self, names: tuple[str, ...]) -> list[volume_pb2.Volume]:
        """As many as one message holds: what was done is done, and an answer that is too long would hide it."""
        engine, now_ms = self._office.engine(), self._office.now_ms()
        known = frozenset(engine.volume_names())
        found = chunks(queries.volume(engine, name, now_ms) for name in names if name in known)
        return next(iter(found), [])

    def _snapshot(self, volume: str, snapshot: Snapshot) -> volume_pb2.Snapshot:
        """As the cluster knows it; the primary's report may not have come yet."""
        engine = self._office.engine()
        view = engine.view(volume)
        held = next((one for one in views.held_snapshots(view) if one.snapshot.id == snapshot.id), None)
        return views.snapshot_to_view(engine, held or views.Held(volume, snapshot, [view.record.primary]))


def principal_of(context: Context) -> str:
    """Who asks: the name in the certificate, or, where nobody has to prove one, the host that the call comes from."""
    with contextlib.suppress(ValueError):  # one that names nobody, or several, and so was refused
        name = caller(context).name
        if name is not None:
            return str(name)
    return peer_host(context.peer())


def bounded(message: M) -> M:
    """The answer, if it fits one message."""
    size = message.ByteSize()
    if size > MESSAGE_BYTES_MAX - 1024:
        raise Exhausted("TOO_LARGE", f"the answer has {size} bytes, more than one message holds; ask for fewer volumes")
    return message


def _paused(engine: Engine, volume: str) -> bool:
    entry = engine.view(volume).entry
    return entry is not None and entry.pause is not None
