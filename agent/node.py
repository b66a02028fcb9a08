"""One agent, built and wired: the only place that constructs the agent's parts.

Built in this order, and taken down in the reverse: state_dir (its lock comes first, so that nothing below is touched by
two agents), replicas, tickets and runs, the two servers, the reporter. Ports are taken before any disk is looked at, so
that a mistake in the configuration is told at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog
from structlog.contextvars import bind_contextvars

from agent import metrics
from agent.backends.kinds import make_backend
from agent.deltas import Deltas
from agent.disk.ioprio import io_priority
from agent.examiner import ReplicaSettings
from agent.few import PACE_S, Few
from agent.identity import Identity
from agent.leftovers import Leftovers
from agent.limits import Caps
from agent.outbox import Outbox
from agent.peers import Peers
from agent.replica import Replica
from agent.reporter import LOOK_S, Reporter
from agent.reporter import Hello as AgentHello
from agent.runs import Runs
from agent.service import AgentService, Node, PeerService
from agent.stream.connection import ServedSnapshot, ServedStream
from agent.stream.sender import BlockServer
from agent.tickets import Tickets
from agent.together import HOOKS_DIR
from agent.worker import IDLE_S, Worker
from resilver.address import Address
from resilver.config import AUTO
from resilver.errors import Invalid, Refused, Unavailable
from resilver.rpc import add_health_and_reflection, bind, make_server, stop
from resilver.v1 import agent_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from agent.backends.base import SendStream, SnapshotReader
    from agent.stream.frame import Hello
    from resilver.config import AgentConfig, IoPriority, VolumeConfig
    from resilver.credentials import Credentials
    from resilver.volume import Progress, ReplicaReport

Opened = TypeVar("Opened", bound="SnapshotReader | SendStream")

SERVICES: Final = ("resilver.v1.Agent", "resilver.v1.Peer")
SWEEP_S: Final = 3600.0
CLOSE_S: Final = 4.0
FIRST_LOOK_S: Final = 3.0
AUTHORIZE_TIMEOUT_S: Final = 30.0
RENEW_S: Final = 2.0
LIMITS_LOOK_S: Final = 0.5
COMPACT_REST_S: Final = 1.0
COMPACT_LOOK_S: Final = 60.0
THREADS_KEPT_MAX: Final = 100

_log = structlog.get_logger(__name__)


class AgentNode:
    """Everything of one agent. `start` takes ports and begins to serve; `close` ends in a few seconds at most."""

    def __init__(self, config: AgentConfig, *, look_s: float = LOOK_S, tls: Credentials | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._backends: Final = {volume.name: make_backend(volume, config) for volume in config.volumes}
        self._config = config
        self._tls: Final = tls
        self._look_s: Final = look_s
        self._identity: Final = Identity(config.state_dir, config.cluster, config.node)
        self._control: Final = Worker("state_dir")
        self._replicas: Final = {
            volume.name: Replica(
                volume.name,
                config.node,
                self._backends[volume.name],
                self._identity,
                _settings(volume),
                hooks_dir=config.state_dir / HOOKS_DIR,
                # Of few volumes the threads stay from one look to the next: beginning one costs more than a glance.
                idle_s=2 * look_s if len(config.volumes) <= THREADS_KEPT_MAX else IDLE_S,
            )
            for volume in config.volumes
        }
        self._tickets: Final = Tickets(config.state_dir / "tickets.json")
        self._caps: Final = Caps(config.state_dir / "limits.json", config.limits)
        self._outbox: Final = Outbox(loop)
        self._few: Final = Few(config.limits.disk_threads)
        self._received: Final = metrics.Received()
        self._runs: Final = Runs(
            config.state_dir / "runs",
            self._replicas,
            Peers(loop, tls),
            self._tickets,
            receive_max_count=config.limits.receive_max_count,
            spool_max_bytes=config.space.spool_max_bytes,
            on_progress=self._progressed,
            throttle=self._caps.receive,
        )
        for replica in self._replicas.values():
            replica.transfers = self._runs
            replica.on_report = self._reported
        self._blocks: Final = BlockServer(
            config.stream_listen,
            self._authorize,
            runs_max=config.limits.send_max_count,
            throttle=self._caps.send,
            tls=tls,
        )
        self._set_io_priority(config)
        self._server: Final = make_server(tls=tls)
        self._leftovers: Final = Leftovers(config.state_dir / HOOKS_DIR, self._replicas)
        self._health: Any = None
        self._port = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._starting: asyncio.Task[None] | None = None

    @property
    def config(self) -> AgentConfig:
        return self._config

    async def start(self) -> None:
        """Returns when both ports are served. Invalid names the one that cannot be had."""
        config = self._config
        node = Node(
            name=config.node,
            version=version("resilver"),
            identity=self._identity,
            replicas=self._replicas,
            deltas={volume: Deltas(replica.backend) for volume, replica in self._replicas.items()},
            runs=self._runs,
            tickets=self._tickets,
            control=self._control,
            caps=self._caps,
        )
        agent_pb2_grpc.add_AgentServicer_to_server(AgentService(node), self._server)
        agent_pb2_grpc.add_PeerServicer_to_server(PeerService(node), self._server)
        self._health = await add_health_and_reflection(self._server, SERVICES)
        self._port = bind(self._server, config.listen, tls=self._tls)
        self._blocks.start()
        # Recovery is the first job of each volume's thread: whatever is asked comes after it, and one that hangs holds
        # up nobody else.
        for replica in self._replicas.values():
            replica.worker.submit(replica.recover, later=True)
        looked = [replica.worker.submit(replica.check_config, later=True) for replica in self._replicas.values()]
        self._starting = asyncio.create_task(self._wake(looked))
        await self._refuse_mistakes([asyncio.wrap_future(each) for each in looked])
        await self._control.run(self._runs.resume)
        await self._server.start()
        reporter = Reporter(
            coordinators=config.coordinators,
            hello=self._hello,
            identity=self._identity,
            replicas=self._replicas,
            runs=self._runs,
            outbox=self._outbox,
            control=self._control,
            caps=self._caps,
            few=self._few,
            look_s=self._look_s,
            tls=self._tls,
        )
        jobs = (
            reporter.run(),
            reporter.look(),
            self._sweep(),
            self._end_limits(),
            self._leftovers.run(),
            _compact_all(self._replicas.values(), self._few),
        )
        self._tasks = [asyncio.create_task(job) for job in jobs]
        _log.info("serving", port=self._port, stream_port=self._blocks.port, boot=self._identity.boot)

    async def _wake(self, looked: list[Future[None]]) -> None:
        for replica, last in zip(self._replicas.values(), looked, strict=True):
            await self._few.begin(replica.worker, partial(_woken, replica, last))

    async def _refuse_mistakes(self, looked: list[asyncio.Future[None]]) -> None:
        """A path that can never be served is told at once, unless its disk does not answer."""
        done, _ = await asyncio.wait(looked, timeout=FIRST_LOOK_S) if looked else (set(), set())
        for future in done:
            error = future.exception()
            if isinstance(error, Invalid):
                raise error

    async def failed(self) -> None:
        """Returns never, or raises what ended one of the agent's own tasks: that is a bug, and no agent runs on."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def close(self) -> None:
        """Runs pause where they are, connections end, and nothing waits for a disk that hangs."""
        ending = [*self._tasks, *([self._starting] if self._starting is not None else [])]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        await asyncio.gather(
            asyncio.to_thread(self._runs.close, CLOSE_S / 2),
            asyncio.to_thread(self._blocks.stop, CLOSE_S / 2),
            stop(self._server, self._health, CLOSE_S / 4),
        )
        for replica in self._replicas.values():
            replica.close()
        self._leftovers.close()
        self._control.close()
        self._identity.close()

    def take_on(self, config: AgentConfig) -> None:
        """Takes on what may change while running; the caller has made sure that nothing else has."""
        self._config = config
        self._caps.take_on(config.limits)
        self._set_io_priority(config)
        self._runs.slots.resize(config.limits.receive_max_count)
        self._blocks.resize(config.limits.send_max_count)
        for backend in self._backends.values():
            backend.set_reserve(config.space.reserve_ratio, config.space.reserve_min_bytes)
        for volume in config.volumes:
            replica = self._replicas[volume.name]
            replica.settings = _settings(volume)
            with contextlib.suppress(Unavailable):  # its disk hangs: the next look tells the priority
                replica.examine_soon()

    def _set_io_priority(self, config: AgentConfig) -> None:
        """For transfers that begin from now on."""
        self._runs.io_priority = self._blocks.io_priority = config.limits.io_priority

    # What the parts call.

    def _reported(self, report: ReplicaReport) -> None:
        metrics.REPLICAS.saw(report)
        self._outbox.put_report(report)

    def _progressed(self, progress: Progress) -> None:
        self._received.saw(progress)
        self._outbox.put_progress(progress)

    def _authorize(self, hello: Hello) -> ServedSnapshot | ServedStream:
        """Called by the block server, from the thread of a connection, which is about nothing else from here on."""
        bind_contextvars(volume=hello.volume, resync=hello.resync_id, target_node=hello.target_node)
        replica = self._replicas.get(hello.volume)
        if replica is None:
            raise Refused("TARGET_GONE", f"{self._config.node} has no volume {hello.volume!r}")
        ticket = self._tickets.check(
            secret=hello.ticket,
            resync_id=hello.resync_id,
            volume=hello.volume,
            target_node=hello.target_node,
            target=hello.target,
        )
        backend, on_sent = replica.backend, _Renewal(self._tickets, hello).sent
        if hello.stream is None and backend.shape == "blocks":
            return ServedSnapshot(self._opened(replica, partial(backend.open_reader, hello.target)), on_sent)
        if hello.stream is None or backend.shape == "blocks":
            said = f"{hello.volume} on {self._config.node} is kept by the {backend.kind} backend, which sends otherwise"
            raise Refused("BACKEND_MISMATCH", said)
        chosen = next((each for each in backend.formats() if each in hello.stream.formats), None)
        if chosen is None:
            said = f"{self._config.node} writes {', '.join(backend.formats())}, not {', '.join(hello.stream.formats)}"
            raise Refused("NOT_SUPPORTED", said)
        send = partial(backend.open_send, ticket.base, hello.target, chosen, hello.stream.token)
        return ServedStream(self._opened(replica, send), on_sent)

    def _opened(self, replica: Replica, open_it: Callable[[], Opened]) -> Opened:
        """What is opened on the volume's reading thread; a disk that does not answer is left to itself."""
        opening = replica.reader.submit(partial(_with_priority, self._config.limits.io_priority, open_it))
        try:
            return opening.result(timeout=AUTHORIZE_TIMEOUT_S)
        except TimeoutError as error:
            opening.add_done_callback(_close_late)
            said = f"the disk of {replica.volume} on {self._config.node} does not answer"
            raise Unavailable("DEADLINE", said) from error

    def _hello(self) -> AgentHello:
        config = self._config
        return AgentHello(
            node=config.node,
            version=version("resilver"),
            address=_advertised(config.advertise, config.listen, self._port),
            stream_address=_advertised(config.stream_advertise, config.stream_listen, self._blocks.port),
        )

    async def _end_limits(self) -> None:
        """An order ends in time also with nobody to tell it to."""
        while True:
            self._caps.now()
            await asyncio.sleep(LIMITS_LOOK_S)

    async def _sweep(self) -> None:
        while True:
            for volume, replica in self._replicas.items():
                await self._few.begin(replica.worker, partial(replica.worker.submit, partial(self._runs.sweep, volume)))
            await asyncio.sleep(SWEEP_S)


async def _compact_all(replicas: Iterable[Replica], few: Few) -> None:
    """Asks each volume now and then whether it has fragments; one that has some is at it until it has none."""
    busy: set[str] = set()
    async with asyncio.TaskGroup() as group:
        while True:
            for replica in replicas:
                if replica.volume not in busy:
                    begun = await few.begin(replica.worker, partial(replica.worker.submit, replica.compact))
                    if begun is not None:
                        busy.add(replica.volume)
                        group.create_task(_compact(replica, begun, busy))
                await asyncio.sleep(PACE_S)
            await asyncio.sleep(COMPACT_LOOK_S)


async def _compact(replica: Replica, first: asyncio.Future[bool], busy: set[str]) -> None:
    """Puts a volume's fragments together, half of the time at most, and only between its other jobs; then it is no
    longer among the busy ones.
    """
    try:
        begun, more = time.monotonic(), await first
        while more:
            await asyncio.sleep(max(COMPACT_REST_S, time.monotonic() - begun))
            begun = time.monotonic()
            more = await replica.worker.run(replica.compact)
    except Unavailable:
        return  # its disk is busy: it is asked again
    except Exception:  # noqa: BLE001 - one volume's trouble would end the task of all
        _log.exception("not compacted", volume=replica.volume)
    finally:
        busy.discard(replica.volume)


class _Renewal:
    """Renews a ticket while bytes flow, now and then: one lock for each buffer would be too many."""

    def __init__(self, tickets: Tickets, hello: Hello) -> None:
        self._tickets = tickets
        self._hello = hello
        self._at = time.monotonic()

    def sent(self, count: int) -> None:
        del count
        now = time.monotonic()
        if now - self._at >= RENEW_S:
            self._at = now
            self._tickets.renew(self._hello.resync_id, self._hello.target_node)


def _with_priority(priority: IoPriority, open_it: Callable[[], Opened]) -> Opened:
    """Where a file system's own command is started, which reads for the whole transfer."""
    with io_priority(priority):
        return open_it()


def _woken(replica: Replica, last: Future[None]) -> Future[None]:
    """Has what waits for its thread worked off, of which that is the last."""
    replica.worker.wake()
    return last


def _close_late(opening: Any) -> None:
    """Nobody waits any more for a reader that a slow disk gives at last."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _settings(volume: VolumeConfig) -> ReplicaSettings:
    return ReplicaSettings(
        volume.priority, volume.keep_last, volume.group, volume.hooks, volume.resync_priority, volume.snapshot_dir
    )


def _advertised(stated: str, listen: Address, port: int) -> str:
    """What others are told to dial. With `auto` and every interface the host is left to the coordinator, who sees from
    which address this agent's connection comes.
    """
    return stated if stated != AUTO else str(Address(listen.host, port))
