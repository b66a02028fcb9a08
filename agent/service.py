"""The Agent service (orders from a coordinator) and the Peer service (a target's questions to a source).

* An order is admitted first: its cluster, store and term are checked, and a higher term is on the disk, before anything
  of it is looked at (`identity.py`). Then comes what one volume has to say (`rights.py`).
* GetAgent and ExamineReplica change nothing; the Peer calls answer whoever shows a ticket. Where there are certificates
  only a coordinator is answered, and a ticket counts in the hands of the node that it is for.
* Nothing blocks the event loop: state_dir has a thread of its own, each volume's disk has two.
* No message is over 1 MiB: lineages and delta maps travel in pages.
"""

# ruff: noqa: N802 - the protocol gives the methods their names
from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from agent import metrics
from agent.basecheck import digest_ranges
from agent.delta import DeltaRange
from agent.deltas import Deltas
from agent.exporting import check_outside
from agent.ordered import ordered
from agent.peers import Source
from agent.runfile import RunOrder
from agent.taking import all_or_why, on_all_threads, take_job
from agent.tickets import Ticket
from agent.together import HOOKS_DIR, Together
from resilver.access import caller
from resilver.address import parse_address
from resilver.config_hooks import GROUP_VOLUMES_MAX
from resilver.errors import NotFound, Refused, ResilverError
from resilver.fields import check_count, check_id, check_name, check_number, check_path, check_text, invalid
from resilver.v1 import agent_pb2, agent_pb2_grpc
from resilver.wire import SOURCES_MAX, order_from_proto, progress_to_proto, record_from_proto, snapshot_to_proto
from resilver.wire_limits import change_from_proto, limits_to_proto
from resilver.wire_pages import record_pages, report_pages

if TYPE_CHECKING:
    from grpc import aio

    from agent.backends.base import StreamBackend
    from agent.delta import DeltaMap
    from agent.identity import Identity
    from agent.limits import Caps
    from agent.replica import Replica
    from agent.runs import Runs
    from agent.tickets import Tickets
    from agent.worker import Worker
    from resilver.volume import Order

    Context = aio.ServicerContext[Any, Any]

P = ParamSpec("P")
R = TypeVar("R")

RANGES_A_PAGE: Final = 16_384
DIGEST_RANGES_MAX: Final = 4_096
DIGEST_BYTES_MAX: Final = 64 << 20
TICKET_SECRET_CHARS_MAX: Final = 128


@dataclass(frozen=True, slots=True)
class Node:
    """Who serves: what both services share. `control` is the thread of state_dir."""

    name: str
    version: str
    identity: Identity
    replicas: Mapping[str, Replica]
    deltas: Mapping[str, Deltas]
    runs: Runs
    tickets: Tickets
    control: Worker
    caps: Caps

    def replica(self, volume: str) -> Replica:
        """The replica of that name; NotFound suggests the nearest one."""
        found = self.replicas.get(check_name(volume, "volume"))
        if found is None:
            near = difflib.get_close_matches(volume, list(self.replicas), n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise NotFound("VOLUME_NOT_FOUND", f"{self.name} has no volume {volume!r}{hint}", volume=volume)
        return found


class AgentService(agent_pb2_grpc.AgentServicer):
    """Orders, and reading calls."""

    def __init__(self, node: Node) -> None:
        self._node: Final = node

    async def GetAgent(self, request: agent_pb2.GetAgentRequest, context: Context) -> agent_pb2.GetAgentResponse:
        del request, context
        node, pin = self._node, self._node.identity.pin
        return agent_pb2.GetAgentResponse(
            node=node.name,
            cluster=pin.cluster,
            version=node.version,
            boot=node.identity.boot,
            store_id=pin.store_id,
            highest_term=pin.term,
            volumes=sorted(node.replicas),
            runs=[progress_to_proto(progress) for progress in node.runs.progresses()],
        )

    async def ExamineReplica(
        self, request: agent_pb2.ExamineReplicaRequest, context: Context
    ) -> agent_pb2.ExamineReplicaResponse:
        del context
        replica = self._node.replica(request.volume)
        # Shielded, because others may wait for the same look.
        report = await asyncio.shield(asyncio.wrap_future(replica.examine_soon()))
        first = report_pages(report, node=self._node.name)[0]
        return agent_pb2.ExamineReplicaResponse(replica=first.replica, records=first.records, truncated=not first.last)

    @ordered
    async def OpenEpoch(self, request: agent_pb2.OpenEpochRequest, context: Context) -> agent_pb2.OpenEpochResponse:
        del context
        order, replica = await self._admitted(request.header)
        record = record_from_proto(request.record)
        await replica.worker.run(partial(replica.open_epoch, order, record, grant=request.grant))
        return agent_pb2.OpenEpochResponse()

    @ordered
    async def TakeSnapshot(
        self, request: agent_pb2.TakeSnapshotRequest, context: Context
    ) -> agent_pb2.TakeSnapshotResponse:
        del context
        order, replica = await self._admitted(request.header)
        with metrics.SNAPSHOT_SECONDS.time():
            snapshot, taken = await replica.worker.run(take_job(replica, order, request))
        return agent_pb2.TakeSnapshotResponse(snapshot=snapshot_to_proto(snapshot), taken=taken)

    @ordered
    async def TakeSnapshots(
        self, request: agent_pb2.TakeSnapshotsRequest, context: Context
    ) -> agent_pb2.TakeSnapshotsResponse:
        del context
        check_count(request.requests, "requests", GROUP_VOLUMES_MAX)
        group_id = check_id(request.group_id, "group_id")
        admitted = [await self._admitted(one.header) for one in request.requests]
        asked = {replica.volume for _, replica in admitted}
        if not admitted or len(asked) != len(admitted):
            raise invalid("requests", "name no volume, or one of them twice")
        if any(one.opening for one in request.requests):
            raise invalid("requests", "want an opening CP: those are taken one by one")
        node = self._node
        # In the order of the configuration: that is the order of the hooks.
        together = Together(
            [volume for volume in node.replicas if volume in asked],
            node.name,
            node.identity.state_dir / HOOKS_DIR,
            group=admitted[0][1].settings.group,
            group_id=group_id,
        )
        takes = [
            (replica, take_job(replica, order, one, f"requests[{at}].", together))
            for at, ((order, replica), one) in enumerate(zip(admitted, request.requests, strict=True))
        ]
        with metrics.SNAPSHOT_SECONDS.time():
            ended = await asyncio.shield(on_all_threads(takes, together))
        return agent_pb2.TakeSnapshotsResponse(snapshots=all_or_why([one.volume for _, one in admitted], ended))

    @ordered
    async def PrepareSend(
        self, request: agent_pb2.PrepareSendRequest, context: Context
    ) -> agent_pb2.PrepareSendResponse:
        del context
        order, replica = await self._admitted(request.header)
        base = check_id(request.base, "base", required=False)
        target = check_id(request.target, "target")
        ticket = None if request.size_only else _ticket(request, order)
        await replica.worker.run(partial(replica.check_send, order, base, target))
        # Kept before the size is worked out: from here on it pins what is read.
        if ticket is not None:
            await self._node.control.run(partial(self._node.tickets.keep, ticket))
        try:
            size = await replica.reader.run(partial(self._node.deltas[replica.volume].size, base, target))
        except ResilverError:
            if ticket is not None:
                await self._node.control.run(partial(self._node.tickets.drop, ticket.resync_id))
            raise
        return agent_pb2.PrepareSendResponse(
            delta_bytes=size.delta_bytes, range_count=size.range_count, capacity_bytes=size.capacity_bytes
        )

    @ordered
    async def Receive(self, request: agent_pb2.ReceiveRequest, context: Context) -> agent_pb2.ReceiveResponse:
        del context
        order, replica = await self._admitted(request.header)
        wanted = RunOrder(
            order=order,
            resync_id=check_id(request.resync_id, "resync_id"),
            base=check_id(request.base, "base", required=False),
            target=check_id(request.target, "target"),
            ticket=check_id(request.ticket, "ticket", required=False),
            sources=_sources(request),
            replace_own_data=request.replace_own_data,
            replace_unrelated=request.replace_unrelated,
            priority=request.priority,
        )
        if not order.volume_id:
            raise invalid("header.volume_id", "is missing: what is received belongs to a volume")
        progress = await replica.worker.run(partial(self._node.runs.receive, wanted))
        return agent_pb2.ReceiveResponse(progress=progress_to_proto(progress))

    @ordered
    async def StopTransfer(
        self, request: agent_pb2.StopTransferRequest, context: Context
    ) -> agent_pb2.StopTransferResponse:
        del context
        order, _replica = await self._admitted(request.header)
        resync_id = check_id(request.resync_id, "resync_id")
        stop = partial(self._node.runs.stop, order.volume, resync_id, discard_stage=request.discard_stage)
        # It waits for the run to let go, which the run does on the volume's own thread: neither thread may be taken.
        progress = await asyncio.to_thread(stop)
        return agent_pb2.StopTransferResponse(progress=progress_to_proto(progress))

    @ordered
    async def DropSnapshot(
        self, request: agent_pb2.DropSnapshotRequest, context: Context
    ) -> agent_pb2.DropSnapshotResponse:
        del context
        order, replica = await self._admitted(request.header)
        freed = await replica.worker.run(partial(replica.drop, order, check_id(request.id, "id")))
        return agent_pb2.DropSnapshotResponse(freed_bytes=freed)

    @ordered
    async def CloneSnapshot(
        self, request: agent_pb2.CloneSnapshotRequest, context: Context
    ) -> agent_pb2.CloneSnapshotResponse:
        del context
        order, replica = await self._admitted(request.header)
        path = Path(check_path(request.path, "path"))
        ours = [self._node.identity.state_dir, *(one.settings.snapshot_dir for one in self._node.replicas.values())]
        await replica.worker.run(partial(check_outside, path, list(filter(None, ours))))
        export = partial(replica.export, order, check_id(request.id, "id"), path, writable=request.writable)
        size_bytes = await replica.worker.run(export)
        return agent_pb2.CloneSnapshotResponse(path=str(path), size_bytes=size_bytes)

    @ordered
    async def SetLimits(self, request: agent_pb2.SetLimitsRequest, context: Context) -> agent_pb2.SetLimitsResponse:
        del context
        order = order_from_proto(request.header, of_volume=False)
        change = change_from_proto(request.change, "change")
        await self._node.control.run(partial(self._node.identity.admit, order))
        limits = await self._node.control.run(partial(self._node.caps.order, change))
        return agent_pb2.SetLimitsResponse(limits=limits_to_proto(limits))

    async def _admitted(self, header: agent_pb2.OrderHeader) -> tuple[Order, Replica]:
        order = order_from_proto(header)
        await self._node.control.run(partial(self._node.identity.admit, order))
        return order, self._node.replica(order.volume)


class PeerService(agent_pb2_grpc.PeerServicer):
    """What a target asks of this source."""

    def __init__(self, node: Node) -> None:
        self._node: Final = node

    async def StreamDelta(
        self, request: agent_pb2.StreamDeltaRequest, context: Context
    ) -> AsyncIterator[agent_pb2.StreamDeltaResponse]:
        replica = self._node.replica(request.volume)
        ticket = await self._shown(request, context, target=check_id(request.target, "target"))
        if request.base != ticket.base:
            raise Refused("BASE_GONE", f"resync {ticket.resync_id} was prepared from base {ticket.base or 'nothing'}")
        start = check_number(request.starting_offset, "starting_offset")
        lineage = await replica.worker.run(partial(replica.lineage_to, ticket.target))
        if replica.backend.shape == "stream":
            work_out = partial(_origin, replica.backend, self._node.deltas[replica.volume], ticket)
            origin = await replica.reader.run(work_out)
            for records in record_pages(lineage):
                yield agent_pb2.StreamDeltaResponse(records=records, origin=origin)
            return
        delta = await replica.reader.run(partial(self._node.deltas[replica.volume].map, ticket.base, ticket.target))
        if start == 0:
            for records in record_pages(lineage):
                yield agent_pb2.StreamDeltaResponse(capacity_bytes=delta.capacity_bytes, records=records)
        left = delta.starting_at(start)
        for first in range(0, max(len(left), 1), RANGES_A_PAGE):
            ranges = await asyncio.to_thread(_ranges, left, first)
            yield agent_pb2.StreamDeltaResponse(capacity_bytes=delta.capacity_bytes, ranges=ranges)

    async def DigestRanges(
        self, request: agent_pb2.DigestRangesRequest, context: Context
    ) -> agent_pb2.DigestRangesResponse:
        replica = self._node.replica(request.volume)
        check_count(request.ranges, "ranges", DIGEST_RANGES_MAX)
        ranges = [
            DeltaRange(
                check_number(each.offset, f"ranges[{at}].offset"),
                check_number(each.length, f"ranges[{at}].length", least=1),
            )
            for at, each in enumerate(request.ranges)
        ]
        if sum(each.length for each in ranges) > DIGEST_BYTES_MAX:
            raise invalid("ranges", f"have more than {DIGEST_BYTES_MAX} bytes together")
        await self._shown(request, context, snapshot=check_id(request.snapshot, "snapshot"))
        backend = replica.backend
        if backend.shape != "blocks":
            raise Refused(
                "NOT_SUPPORTED", f"{replica.volume} is kept by the {backend.kind} backend, which has no ranges"
            )
        digests = await replica.reader.run(partial(digest_ranges, backend, request.snapshot, ranges))
        return agent_pb2.DigestRangesResponse(digests=digests)

    async def _shown(
        self,
        request: agent_pb2.StreamDeltaRequest | agent_pb2.DigestRangesRequest,
        context: Context,
        *,
        target: str = "",
        snapshot: str = "",
    ) -> Ticket:
        caller(context).check_ticket(request.target_node)
        check = partial(
            self._node.tickets.check,
            secret=check_text(request.ticket, "ticket", chars_max=TICKET_SECRET_CHARS_MAX),
            resync_id=check_id(request.resync_id, "resync_id"),
            volume=request.volume,
            target_node=check_name(request.target_node, "target_node"),
            target=target,
            snapshot=snapshot,
        )
        return await self._node.control.run(check)


def _origin(backend: StreamBackend, deltas: Deltas, ticket: Ticket) -> agent_pb2.StreamOrigin:
    size = deltas.size(ticket.base, ticket.target)  # first: it tells a base that is gone from a target
    return agent_pb2.StreamOrigin(
        native_base=backend.native_id(ticket.base) if ticket.base else "",
        native_target=backend.native_id(ticket.target),
        formats=backend.formats(),
        stream_bytes=size.delta_bytes,
    )


def _ticket(request: agent_pb2.PrepareSendRequest, order: Order) -> Ticket:
    return Ticket(
        secret=check_id(request.ticket, "ticket"),
        resync_id=check_id(request.resync_id, "resync_id"),
        volume=order.volume,
        target_node=check_name(request.target_node, "target_node"),
        base=request.base,
        target=request.target,
        lifetime_s=request.ticket_lifetime_seconds,
    )


def _sources(request: agent_pb2.ReceiveRequest) -> tuple[Source, ...]:
    check_count(request.sources, "sources", SOURCES_MAX)
    found = []
    for at, source in enumerate(request.sources):
        for name in ("address", "stream_address"):
            try:
                parse_address(check_text(getattr(source, name), f"sources[{at}].{name}", chars_max=300))
            except ValueError as error:
                raise invalid(f"sources[{at}].{name}", str(error)) from error
        node = check_name(source.node, f"sources[{at}].node")
        found.append(Source(node, source.address, source.stream_address))
    return tuple(found)


def _ranges(delta: DeltaMap, first: int) -> list[agent_pb2.DeltaRange]:
    page = slice(first, first + RANGES_A_PAGE)
    rows = zip(delta.offsets[page].tolist(), delta.lengths[page].tolist(), delta.zeros[page].tolist(), strict=True)
    return [agent_pb2.DeltaRange(offset=offset, length=length, zero=zero) for offset, length, zero in rows]
