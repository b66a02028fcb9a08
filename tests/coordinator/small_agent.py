"""A small agent that keeps its replicas in memory: it reports, and obeys orders, over the real protocol.

What it lacks of a real one are disks: a snapshot is a record, and a delta is a line in a list.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from dataclasses import dataclass, field, replace

from resilver.address import Address
from resilver.errors import Refused
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.rpc import bind, make_channel, make_server
from resilver.v1 import agent_pb2, agent_pb2_grpc
from resilver.volume import Grant, LiveCopy, LiveState, Presence, Progress, ReplicaReport, ResyncState, SourceShare
from resilver.wire import order_from_proto, progress_to_proto, record_from_proto, snapshot_to_proto
from resilver.wire_pages import report_pages

DELTA_BYTES = 4096


@dataclass
class SmallAgent(agent_pb2_grpc.AgentServicer):
    """One node. `world` is every node by name: a target reads its source's lineage there."""

    node: str
    world: dict[str, SmallAgent]
    cluster: str = "test"
    heartbeat_s: float = 0.5
    replicas: dict[str, ReplicaReport] = field(default_factory=dict)
    boot: str = field(default_factory=lambda: str(uuid.uuid4()))
    store_id: str = ""
    receiving: asyncio.Event = field(default_factory=asyncio.Event)
    answers: asyncio.Queue[agent_pb2.ReportResponse] = field(default_factory=asyncio.Queue)
    connected: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.world[self.node] = self
        self.outgoing: asyncio.Queue[agent_pb2.ReportRequest | None] = asyncio.Queue()
        self.seqs = itertools.count(1)
        self.tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    # ------------------------------------------------------------ life

    @contextlib.asynccontextmanager
    async def running(self, coordinator: str):
        """Serves, reports, and stops."""
        server = make_server()
        agent_pb2_grpc.add_AgentServicer_to_server(self, server)
        self.port = bind(server, Address("127.0.0.1", 0))
        await server.start()
        channel = make_channel(coordinator)
        self._spawn(self._report(channel))
        self._spawn(self._beat())
        try:
            async with asyncio.timeout(40):
                await self.connected.wait()
            yield self
        finally:
            for task in self.tasks:
                task.cancel()
            await channel.close()
            await server.stop(None)

    def _spawn(self, work) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.heartbeat_s)
            self.say(heartbeat=agent_pb2.Heartbeat())

    def say(self, **body) -> None:
        self.outgoing.put_nowait(agent_pb2.ReportRequest(boot=self.boot, seq=next(self.seqs), **body))

    def hello(self) -> agent_pb2.AgentHello:
        return agent_pb2.AgentHello(
            node=self.node,
            cluster=self.cluster,
            store_id=self.store_id,
            version="0.1.0",
            address=f"127.0.0.1:{self.port}",
            stream_address=f"127.0.0.1:{self.port}",
            volumes=list(self.replicas),
        )

    def report(self, volume: str, examine_id: str = "") -> None:
        for page in report_pages(self.replicas[volume], node=self.node):
            self.say(replica=page, examine_id=examine_id)

    def now(self, volume: str, **changes) -> None:
        """The replica is so from now on, and that is reported."""
        self.replicas[volume] = replace(self.replicas[volume], **changes)
        self.report(volume)

    async def _report(self, channel) -> None:
        self.say(hello=self.hello())
        for volume in self.replicas:
            self.report(volume)

        async def messages():
            while (message := await self.outgoing.get()) is not None:
                yield message

        try:
            async for response in agent_pb2_grpc.ReportsStub(channel).Report(messages(), wait_for_ready=True):
                self.answers.put_nowait(response)
                self.connected.set()
                self._hear(response)
        finally:
            self.ended.set()

    def _hear(self, response: agent_pb2.ReportResponse) -> None:
        self.store_id = response.store_id or self.store_id
        match response.WhichOneof("body"):
            case "examine":
                for volume in response.examine.volumes:
                    self.report(volume, response.examine.examine_id)
            case "record":
                record = record_from_proto(response.record)
                self.now(record.volume, record=record, volume_id=record.volume_id)

    # ------------------------------------------------------------ orders

    async def OpenEpoch(self, request, context):  # noqa: N802 - the protocol's name
        record = record_from_proto(request.record)
        grant = Grant(record.volume_id, record.epoch, record.epoch_id) if request.grant else None
        self.now(record.volume, record=record, volume_id=record.volume_id, grant=grant)
        return agent_pb2.OpenEpochResponse()

    async def TakeSnapshot(self, request, context):  # noqa: N802 - as above
        order = order_from_proto(request.header)
        replica = self.replicas[order.volume]
        tip = replica.lineage.tip
        if request.only_if_modified and tip is not None and replica.live.state is LiveState.UNMODIFIED:
            return agent_pb2.TakeSnapshotResponse(snapshot=snapshot_to_proto(tip), taken=False)
        cp = ConsistencyPoint(order.epoch, replica.lineage.cp.sequence + 1)
        made = Snapshot(
            str(uuid.uuid4()),
            cp,
            replica.lineage.tip_id,
            epoch_id=order.epoch_id,
            create_time_ms=int(time.time() * 1000),
            size_bytes=1 << 20,
            note=request.note,
        )
        live = replace(replica.live, state=LiveState.UNMODIFIED, based_on=made.id)
        self.now(order.volume, lineage=Lineage((made, *replica.lineage)), live=live)
        return agent_pb2.TakeSnapshotResponse(snapshot=snapshot_to_proto(made), taken=True)

    async def PrepareSend(self, request, context):  # noqa: N802 - as above
        order = order_from_proto(request.header)
        if self.replicas[order.volume].lineage.find(request.target) is None:
            raise Refused("TARGET_GONE", f"{self.node} has no snapshot {request.target}")
        return agent_pb2.PrepareSendResponse(delta_bytes=DELTA_BYTES, range_count=1, capacity_bytes=1 << 20)

    async def Receive(self, request, context):  # noqa: N802 - as above
        order = order_from_proto(request.header)
        run = Progress(request.resync_id, order.volume, ResyncState.PREPARING, total_bytes=DELTA_BYTES, range_count=1)
        self._spawn(self._receive(run, request))
        return agent_pb2.ReceiveResponse(progress=progress_to_proto(run))

    async def _receive(self, run: Progress, request: agent_pb2.ReceiveRequest) -> None:
        """Half at once; the rest, and the commit, once the test says so."""
        source = self.world[request.sources[0].node]
        share = SourceShare(source.node, DELTA_BYTES // 2, DELTA_BYTES)
        half = replace(run, state=ResyncState.TRANSFERRING, done_bytes=DELTA_BYTES // 2, sources=(share,))
        self.say(resync=progress_to_proto(half))
        await self.receiving.wait()
        lineage = source.replicas[run.volume].lineage.since(request.target)
        present = {one.id for one in self.replicas[run.volume].lineage if one.present} | {request.target}
        live = LiveCopy(LiveState.UNMODIFIED, "/srv/x", 1 << 20, 1 << 20, lineage.tip_id, in_use=False)
        done = replace(run, state=ResyncState.SUCCEEDED, done_bytes=DELTA_BYTES, wire_bytes=DELTA_BYTES + 90)
        self.say(resync=progress_to_proto(done))
        self.now(run.volume, lineage=lineage.with_presence(present), live=live, presence=Presence.PRESENT)

    async def StopTransfer(self, request, context):  # noqa: N802 - as above
        return agent_pb2.StopTransferResponse()

    async def DropSnapshot(self, request, context):  # noqa: N802 - as above
        order = order_from_proto(request.header)
        lineage = self.replicas[order.volume].lineage
        present = {one.id for one in lineage if one.present} - {request.id}
        self.now(order.volume, lineage=lineage.with_presence(present))
        return agent_pb2.DropSnapshotResponse(freed_bytes=4096)

    async def CloneSnapshot(self, request, context):  # noqa: N802 - as above
        return agent_pb2.CloneSnapshotResponse(path=request.path, size_bytes=1 << 20)

    async def GetAgent(self, request, context):  # noqa: N802 - as above
        return agent_pb2.GetAgentResponse(node=self.node)

    async def ExamineReplica(self, request, context):  # noqa: N802 - as above
        return agent_pb2.ExamineReplicaResponse()


def written(volume: str) -> ReplicaReport:
    """A live copy that was never mirrored."""
    live = LiveCopy(LiveState.MODIFIED, f"/srv/{volume}.img", 1 << 20, 1 << 20, in_use=False)
    return ReplicaReport(volume, Presence.PRESENT, live=live, backend="image", free_bytes=1 << 30)


def empty(volume: str) -> ReplicaReport:
    return ReplicaReport(volume, Presence.EMPTY, backend="image", free_bytes=1 << 30)
