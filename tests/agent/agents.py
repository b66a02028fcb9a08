"""Agents as processes, and a leader who is played by the test: real orders over gRPC, no coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from agent.disk.durable import write_json
from agent.peers import Peers
from agent.replica import Replica
from agent.runfile import SavedRun, run_to_json
from agent.runs import Runs
from agent.tickets import Tickets
from resilver.status_details import to_error
from resilver.v1 import agent_pb2, agent_pb2_grpc, volume_pb2
from resilver.volume import Progress
from tests.cluster import Process, free_port

DEADLINE_S = 20.0
MIB = 1 << 20
FINAL = {
    volume_pb2.RESYNC_STATE_SUCCEEDED,
    volume_pb2.RESYNC_STATE_FAILED,
    volume_pb2.RESYNC_STATE_CANCELLED,
    volume_pb2.RESYNC_STATE_BLOCKED,
}


def until(what: Callable[[], Any], why: str, deadline_s: float = DEADLINE_S) -> Any:
    """The first true answer of another process, which has no event to wait for; fails after the deadline."""
    end = time.monotonic() + deadline_s
    while not (found := what()):
        assert time.monotonic() < end, f"{why}: not within {deadline_s:g} s"
        time.sleep(0.02)
    return found


def write_image(path: Path, size_bytes: int, *, seed: int = 1, holes: bool = True) -> None:
    """An image of which about half is data."""
    chance = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for at in range(0, size_bytes, 256 << 10):
            if not holes or chance.random() < 0.5:
                file.seek(at)
                file.write(chance.randbytes(256 << 10))


def scatter(path: Path, count: int, *, seed: int = 2) -> int:
    """Rewrites some 4 KiB blocks in place; the bytes that this changed."""
    chance = random.Random(seed)
    blocks = {chance.randrange(path.stat().st_size // 4096) for _ in range(count)}
    with path.open("r+b") as file:
        for block in blocks:
            file.seek(block * 4096)
            file.write(chance.randbytes(4096))
    return 4096 * len(blocks)


def resumed_runs(
    directory: Path,
    replica: Replica,
    loop: asyncio.AbstractEventLoop,
    *left: SavedRun,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
) -> Runs:
    """The runs of `vm1` as an agent has them that reads what was left by an earlier start."""
    runs = Runs(
        directory / "runs",
        {"vm1": replica},
        Peers(loop),
        Tickets(directory / "tickets.json"),
        receive_max_count=1,
        spool_max_bytes=0,
        on_progress=on_progress,
    )
    for one in left:
        write_json(directory / "runs" / "vm1.json", run_to_json(one))
    runs.resume()
    return runs


@dataclass
class Leader:
    """Whoever gives orders: every part may be changed to play another one."""

    cluster: str = "test"
    store_id: str = "store-1"
    term: int = 1
    leader_id: str = "leader-1"
    volume: str = "vm1"
    volume_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    epoch: int = 1
    epoch_id: str = "epoch-1"
    resyncs: list[str] = field(default_factory=list)

    def header(self, expected_tip: str | None = None, **changes: Any) -> agent_pb2.OrderHeader:
        made = agent_pb2.OrderHeader(
            cluster=self.cluster,
            store_id=self.store_id,
            term=self.term,
            leader_id=self.leader_id,
            volume=self.volume,
            volume_id=self.volume_id,
            epoch=self.epoch,
            epoch_id=self.epoch_id,
            expected_tip=expected_tip,
        )
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    def record(self, primary: str, **changes: Any) -> volume_pb2.VolumeRecord:
        made = volume_pb2.VolumeRecord(
            volume=self.volume,
            volume_id=self.volume_id,
            epoch=self.epoch,
            epoch_id=self.epoch_id,
            primary=primary,
            members=["a", "b"],
        )
        for name, value in changes.items():
            setattr(made, name, value)
        return made


@dataclass
class AgentProcess:
    """One agent of the program under test, with a volume of its own for each test that shares it."""

    node: str
    directory: Path
    place: Path
    volumes: tuple[str, ...] = ("vm1",)
    coordinator_port: int = field(default_factory=free_port)
    port: int = field(default_factory=free_port)
    stream_port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    extra: str = ""
    volume_extra: str = ""
    volume_extras: dict[str, str] = field(default_factory=dict)
    reached_at: int = 0
    process: Process | None = None
    channel: Any = None

    def image(self, volume: str = "vm1") -> Path:
        return self.place / f"{volume}.img"

    def snapshot_data(self, volume: str, snapshot_id: str) -> Path:
        return self.place / ".resilver" / volume / snapshot_id / "data"

    @property
    def config(self) -> Path:
        return self.directory / f"{self.node}.toml"

    def write_config(self) -> Path:
        self.config.write_text(
            f'node = "{self.node}"\ncluster = "test"\ncoordinators = ["127.0.0.1:{self.coordinator_port}"]\n'
            f'listen = "127.0.0.1:{self.port}"\nstream_listen = "127.0.0.1:{self.stream_port}"\n'
            f'metrics_listen = "127.0.0.1:{self.metrics_port}"\nstate_dir = "{self.directory}/state-{self.node}"\n'
            f"include = []\n{self.extra}\n"
            "[space]\nreserve_ratio = 0.0\nreserve_min_bytes = 1048576\n"
            + "".join(
                f'[[volumes]]\nname = "{volume}"\nbackend = "image"\npath = "{self.image(volume)}"\n'
                f"{self.volume_extra}\n{self.volume_extras.get(volume, '')}\n"
                for volume in self.volumes
            )
        )
        return self.config

    def start(self) -> None:
        self.launch()
        self.connect()

    def launch(self) -> None:
        self.write_config()
        if self.process is None:
            command = [sys.executable, "-m", "agent.app", "--config", str(self.config)]
            self.process = Process(self.node, command, self.directory / f"{self.node}.log")
        self.process.start()

    def connect(self) -> None:
        """Returns when its process serves."""
        self.dial()
        assert self.process is not None
        assert self.process.alive, self.log()

    def dial(self) -> None:
        if self.channel is not None:
            self.channel.close()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        with contextlib.suppress(grpc.FutureTimeoutError):
            grpc.channel_ready_future(self.channel).result(timeout=DEADLINE_S)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
        if self.process is not None:
            self.process.stop()

    def log(self) -> str:
        return (self.directory / f"{self.node}.log").read_text(errors="replace")

    def call(self, name: str, request: Any, service: Any = agent_pb2_grpc.AgentStub) -> Any:
        """Gives an order; raises the agent's own error."""
        try:
            return getattr(service(self.channel), name)(request, timeout=DEADLINE_S)
        except grpc.RpcError as error:
            raise to_error(error, unreachable="NODE_UNREACHABLE", who=self.node) from error

    def stream(self, request: agent_pb2.StreamDeltaRequest, **changes: Any) -> Iterator[agent_pb2.StreamDeltaResponse]:
        """StreamDelta's pages."""
        for name, value in changes.items():
            setattr(request, name, value)
        try:
            yield from agent_pb2_grpc.PeerStub(self.channel).StreamDelta(request, timeout=DEADLINE_S)
        except grpc.RpcError as error:
            raise to_error(error, unreachable="NODE_UNREACHABLE", who=self.node) from error

    # Orders.

    def examine(self, volume: str = "vm1") -> volume_pb2.ReplicaReport:
        return self.call("ExamineReplica", agent_pb2.ExamineReplicaRequest(volume=volume)).replica

    def records(self, volume: str = "vm1") -> list[volume_pb2.SnapshotRecord]:
        return list(self.call("ExamineReplica", agent_pb2.ExamineReplicaRequest(volume=volume)).records)

    def tip(self, volume: str = "vm1") -> str:
        return next((record.id for record in self.records(volume)), "")

    def open_epoch(self, leader: Leader, *, primary: str = "", grant: bool | None = None, **changes: Any) -> None:
        record = leader.record(primary or self.node, **changes)
        grant = (primary or self.node) == self.node if grant is None else grant
        self.call("OpenEpoch", agent_pb2.OpenEpochRequest(header=leader.header(), record=record, grant=grant))

    def snapshot(self, leader: Leader, **options: Any) -> volume_pb2.SnapshotRecord:
        return self.call("TakeSnapshot", agent_pb2.TakeSnapshotRequest(header=leader.header(), **options)).snapshot

    def prepare(self, leader: Leader, resync_id: str, base: str, target: str, node: str, **options: Any) -> Any:
        request = agent_pb2.PrepareSendRequest(
            header=leader.header(),
            resync_id=resync_id,
            base=base,
            target=target,
            target_node=node,
            ticket=resync_id,
            **options,
        )
        return self.call("PrepareSend", request)

    def as_source(self) -> agent_pb2.TransferSource:
        return agent_pb2.TransferSource(
            node=self.node,
            address=f"127.0.0.1:{self.port}",
            stream_address=f"127.0.0.1:{self.reached_at or self.stream_port}",
        )

    def receive(
        self, leader: Leader, resync_id: str, base: str, target: str, *sources: AgentProcess, **options: Any
    ) -> volume_pb2.ResyncProgress:
        expected = options.pop("expected_tip", None)
        request = agent_pb2.ReceiveRequest(
            header=leader.header(expected),
            resync_id=resync_id,
            base=base,
            target=target,
            ticket=resync_id,
            sources=[source.as_source() for source in sources],
            **options,
        )
        return self.call("Receive", request).progress

    def run(self, resync_id: str) -> volume_pb2.ResyncProgress | None:
        runs = self.call("GetAgent", agent_pb2.GetAgentRequest()).runs
        return next((run for run in runs if run.resync_id == resync_id), None)

    def ended(self, resync_id: str, deadline_s: float = DEADLINE_S) -> volume_pb2.ResyncProgress:
        """The run's last word."""

        def final() -> volume_pb2.ResyncProgress | None:
            run = self.run(resync_id)
            return run if run is not None and run.state in FINAL else None

        return until(final, f"run {resync_id} on {self.node} ends", deadline_s)

    def resync(
        self, leader: Leader, source: AgentProcess, base: str, target: str, **options: Any
    ) -> volume_pb2.ResyncProgress:
        """The whole of it: orders to both sides, and the end."""
        resync_id = str(uuid.uuid4())
        leader.resyncs.append(resync_id)
        source.prepare(leader, resync_id, base, target, self.node)
        self.receive(leader, resync_id, base, target, source, **options)
        return self.ended(resync_id)


@contextlib.contextmanager
def agents(directory: Path, disks: Path, *nodes: str, **options: Any) -> Iterator[list[AgentProcess]]:
    """Agents that are running, each with an image path on `disks`; ended with the block."""
    made = []
    for node in nodes:
        place = disks / node
        place.mkdir(exist_ok=True)
        made.append(AgentProcess(node, directory, place, **options))
    try:
        for each in made:
            each.launch()
        for each in made:
            each.connect()
        yield made
    finally:
        for each in made:
            each.close()
