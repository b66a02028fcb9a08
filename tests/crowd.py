"""Many simulated agents in one process: the coordinator's side of a large cluster, without its disks.

    python -m tests.crowd --coordinator HOST:PORT --agents 1000 [--volumes 10] [--copies 3] [--records 16]

Each agent has a connection and a stream of its own and speaks the real protocol by the real stubs: hello, a report of
each volume with its whole lineage, heartbeats, answers to examines, records taken on and reported. Orders come to one
server that listens on a port for each agent. What an agent does with a disk is not here: a size is a made-up figure.

Volumes go round: copies of one are on neighbouring nodes, its first is the primary, and of every tenth volume the
second copy is two CPs behind. Nothing is drawn by chance, so a crowd that starts again is the same cluster.

Lines on stdout say when something has come about: `ready` (ports are open), `reported` (every report of every agent is
acknowledged), `again` (the same after the coordinator was away). Lines on stdin order: `go`, `points RATE` (so many
CPs a second, each followed by its secondaries a second later; 0 ends it), `quit`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

from google.protobuf.timestamp_pb2 import Timestamp
from grpc import aio

from resilver import rpc
from resilver.address import parse_address
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.v1 import agent_pb2, agent_pb2_grpc
from resilver.volume import Grant, LiveCopy, LiveState, Presence, ReplicaReport, VolumeRecord
from resilver.wire import record_from_proto
from resilver.wire_pages import PAGES_TOGETHER_MAX, report_pages

HEARTBEAT_S = 2.0
PAUSE_S = 0.5
FOLLOW_S = 1.0
GIB = 1 << 30
START_MS = 1_700_000_000_000
STALE_EVERY = 10
STALE_CPS = 2


@cache
def known_id(*parts: object) -> str:
    """The same for the same parts, also in another process."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join(map(str, parts))))


@dataclass(frozen=True)
class Shape:
    """How large a cluster is."""

    agents: int
    volumes: int = 10
    copies: int = 3
    records: int = 16

    @property
    def volume_count(self) -> int:
        return -(-self.agents * self.volumes // self.copies)

    @property
    def stale_count(self) -> int:
        """Volumes of which one copy is behind; the last volume may have too few copies."""
        return sum(len(self.members(at)) > 1 for at in range(0, self.volume_count, STALE_EVERY))

    def members(self, volume: int) -> list[str]:
        slots = range(volume * self.copies, min((volume + 1) * self.copies, self.agents * self.volumes))
        return [node_name(slot % self.agents) for slot in slots]

    def volumes_of(self, agent: int) -> list[int]:
        return sorted({slot // self.copies for slot in range(agent, self.agents * self.volumes, self.agents)})

    def history(self, volume: int, count: int) -> Lineage:
        ids = [known_id("snapshot", volume, at) for at in range(count)]
        return Lineage(tuple(_snapshot(volume, at, ids) for at in reversed(range(count))))

    def report(self, volume: int, node: str) -> ReplicaReport:
        """What that node says of it at the start."""
        members, whole = self.members(volume), self.history(volume, self.records)
        behind = volume % STALE_EVERY == 0 and members.index(node) == 1
        lineage = self.history(volume, self.records - STALE_CPS) if behind else whole
        tip = whole.records[0]
        record = VolumeRecord(
            volume_name(volume), known_id("volume", volume), 1, known_id("epoch", volume), members[0],
            tuple(sorted(members)), tip.cp, tip.id,
        )  # fmt: skip
        live = LiveCopy(
            LiveState.UNMODIFIED, f"/srv/{record.volume}.img", 8 * GIB, 3 * GIB, lineage.tip_id,
            in_use=node == members[0], extent_count=1234,
        )  # fmt: skip
        grant = Grant(record.volume_id, record.epoch, record.epoch_id) if node == members[0] else None
        return ReplicaReport(
            record.volume, Presence.PRESENT, record.volume_id, lineage, live, record, grant, "image",
            free_bytes=100 * GIB, reserve_bytes=GIB, reflink=True, examine_time_ms=START_MS,
        )  # fmt: skip


def node_name(agent: int) -> str:
    return f"n{agent:04d}"


def volume_name(volume: int) -> str:
    return f"v{volume:05d}"


def _snapshot(volume: int, at: int, ids: list[str]) -> Snapshot:
    return Snapshot(
        ids[at], ConsistencyPoint(1, at + 1), ids[at - 1] if at else "", epoch_id=known_id("epoch", volume),
        create_time_ms=START_MS + at * 60_000, size_bytes=8 * GIB,
    )  # fmt: skip


@dataclass(eq=False)
class Agent:
    """One node. `page` keeps each report as it travels until it changes."""

    name: str
    address: str
    coordinator: str
    cluster: str
    reports: dict[str, ReplicaReport]
    on_reported: Callable[[], None]
    boot: str = field(default_factory=lambda: str(uuid.uuid4()))
    pin: tuple[str, int, str] = ("", 0, "")
    pages: dict[str, list[agent_pb2.ReplicaPage]] = field(default_factory=dict)
    outbox: asyncio.Queue[tuple[str, str]] = field(default_factory=asyncio.Queue)
    seq: int = 0
    wanted_seq: int = 0
    streams: int = 0
    reports_sent: int = 0

    async def run(self) -> None:
        while True:
            try:
                async with rpc.make_channel(self.coordinator) as channel:
                    await self._stream(agent_pb2_grpc.ReportsStub(channel).Report())
            except (aio.AioRpcError, asyncio.InvalidStateError, EOFError):
                pass
            await asyncio.sleep(PAUSE_S * random.uniform(0.5, 1.5))

    async def _stream(self, call: aio.StreamStreamCall) -> None:
        self.outbox = asyncio.Queue()
        await call.write(self._message(hello=self._hello()))
        self._take(await call.read())
        self.streams += 1
        sending = asyncio.create_task(self._send(call))
        try:
            while True:
                self._take(await call.read())
        finally:
            self.wanted_seq = 0
            sending.cancel()
            call.cancel()

    async def _send(self, call: aio.StreamStreamCall) -> None:
        for volumes in _batched(list(self.reports)):
            await self._report(call, volumes, "")
        self.wanted_seq = self.seq
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    volume, examine_id = await self.outbox.get()
            except TimeoutError:
                now = Timestamp()
                now.GetCurrentTime()
                await call.write(self._message(heartbeat=agent_pb2.Heartbeat(now_time=now)))
                continue
            volumes = {volume: None}
            while not self.outbox.empty() and len(volumes) < PAGES_TOGETHER_MAX:
                other, asked_by = self.outbox.get_nowait()
                if asked_by != examine_id or other in volumes:
                    await self._report(call, [*volumes], examine_id)
                    volumes, examine_id = {}, asked_by
                volumes[other] = None
            await self._report(call, [*volumes], examine_id)

    async def _report(self, call: aio.StreamStreamCall, volumes: list[str], examine_id: str) -> None:
        """In one message, as an agent does whose disks have all answered: a report of these agents is one page."""
        pages = [page for volume in volumes for page in self._pages_of(volume)]
        self.reports_sent += len(pages)
        if len(pages) == 1:
            await call.write(self._message(replica=pages[0], examine_id=examine_id))
        else:
            await call.write(self._message(pages=agent_pb2.ReplicaPages(pages=pages), examine_id=examine_id))

    def _pages_of(self, volume: str) -> list[agent_pb2.ReplicaPage]:
        if volume not in self.pages:
            self.pages[volume] = report_pages(self.reports[volume], node=self.name)
        return self.pages[volume]

    def _take(self, response: agent_pb2.ReportResponse) -> None:
        if response is aio.EOF or response.WhichOneof("body") in ("not_leader", "refusal"):
            raise EOFError
        self.pin = (response.store_id, response.term, response.leader_id)
        if response.HasField("examine"):
            for volume in response.examine.volumes:
                self.outbox.put_nowait((volume, response.examine.examine_id))
        elif response.HasField("record"):
            record = record_from_proto(response.record)
            self.change(record.volume, record=record)
        if self.wanted_seq and response.acked_seq >= self.wanted_seq:
            self.wanted_seq = 0
            self.on_reported()

    def change(self, volume: str, **changes: object) -> None:
        """Something is otherwise on the disk, and is reported."""
        self.reports[volume] = replace(self.reports[volume], **changes)
        self.pages.pop(volume, None)
        self.outbox.put_nowait((volume, ""))

    def _hello(self) -> agent_pb2.AgentHello:
        store_id, term, leader_id = self.pin
        return agent_pb2.AgentHello(
            node=self.name, cluster=self.cluster, store_id=store_id, version="0", address=self.address,
            stream_address=self.address, highest_term=term, highest_leader_id=leader_id, volumes=sorted(self.reports),
        )  # fmt: skip

    def _message(self, **fields: object) -> agent_pb2.ReportRequest:
        self.seq += 1
        return agent_pb2.ReportRequest(boot=self.boot, seq=self.seq, **fields)


class Orders(agent_pb2_grpc.AgentServicer):
    """What a plan orders: sizes."""

    sizes = 0

    async def PrepareSend(self, request, context):  # noqa: N802 - the method's name in the protocol
        Orders.sizes += 1
        return agent_pb2.PrepareSendResponse(delta_bytes=64 << 20, range_count=4096, capacity_bytes=8 * GIB)


@dataclass
class Crowd:
    """All the agents of this process, and what is said of them on stdout."""

    shape: Shape
    coordinator: str
    cluster: str
    agents: list[Agent] = field(default_factory=list)
    tasks: set[asyncio.Task] = field(default_factory=set)
    reported: int = 0
    said: str = "reported"
    points: asyncio.Task | None = None
    turn: int = 0

    async def start(self) -> aio.Server:
        """Opens a port for each agent; nobody reports yet."""
        server = aio.server()
        agent_pb2_grpc.add_AgentServicer_to_server(Orders(), server)
        for number in range(self.shape.agents):
            name, port = node_name(number), server.add_insecure_port("127.0.0.1:0")
            reports = {volume_name(at): self.shape.report(at, name) for at in self.shape.volumes_of(number)}
            address = f"127.0.0.1:{port}"
            self.agents.append(Agent(name, address, self.coordinator, self.cluster, reports, self.one_reported))
        await server.start()
        return server

    def go(self) -> None:
        for agent in self.agents:
            self.spawn(agent.run())

    def spawn(self, work) -> asyncio.Task:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def one_reported(self) -> None:
        self.reported += 1
        if self.reported == self.shape.agents:
            self.reported = 0
            say(self.said)
            self.said = "again"

    def take_points(self, rate: float) -> None:
        if self.points is not None:
            self.points.cancel()
        self.points = self.spawn(self._points(rate)) if rate else None

    async def _points(self, rate: float) -> None:
        by_name = {agent.name: agent for agent in self.agents}
        while True:
            await asyncio.sleep(1 / rate)
            volume = self.turn % self.shape.volume_count
            self.turn += 1
            name, members = volume_name(volume), self.shape.members(volume)
            primary = by_name[members[0]]
            lineage = next_point(primary.reports[name].lineage)
            primary.change(name, lineage=lineage)
            self.spawn(self._follow([by_name[one] for one in members[1:]], name, lineage))

    async def _follow(self, secondaries: list[Agent], volume: str, lineage: Lineage) -> None:
        await asyncio.sleep(FOLLOW_S)
        for agent in secondaries:
            agent.change(volume, lineage=lineage)


def _batched(volumes: list[str]) -> list[list[str]]:
    return [volumes[at : at + PAGES_TOGETHER_MAX] for at in range(0, len(volumes), PAGES_TOGETHER_MAX)]


def next_point(lineage: Lineage) -> Lineage:
    """One CP more, and the oldest record gone."""
    tip = lineage.records[0]
    at = tip.cp.sequence
    new = replace(
        tip, id=str(uuid.uuid4()), cp=ConsistencyPoint(1, at + 1), parent=tip.id, create_time_ms=START_MS + at * 60_000
    )
    return Lineage((new, *lineage.records[:-1]))


def say(what: str) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--cluster", default="test")
    parser.add_argument("--agents", type=int, required=True)
    parser.add_argument("--volumes", type=int, default=10)
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--records", type=int, default=16)
    asked = parser.parse_args()
    shape = Shape(asked.agents, asked.volumes, asked.copies, asked.records)
    crowd = Crowd(shape, str(parse_address(asked.coordinator)), asked.cluster)
    server = await crowd.start()
    say("ready")
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while words := (await orders.readline()).decode().split():
        match words:
            case ["go"]:
                crowd.go()
            case ["points", rate]:
                crowd.take_points(float(rate))
            case ["sent"]:
                say(f"sent {sum(agent.reports_sent for agent in crowd.agents)} sizes {Orders.sizes}")
            case _:
                break
    for task in list(crowd.tasks):
        task.cancel()
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
