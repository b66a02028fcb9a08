"""The Reports service: one stream for each agent, reports up, questions and records down.

The rules:

* A stream begins with a hello, and every message is of the hello's boot; numbers grow, and what is not newer is
  dropped.
* Where there are certificates a node reports for itself alone.
* What an agent sends is checked, bounded and slowed down, never trusted: volumes that the hello did not name, pages
  without end, more messages than a working agent has to send.
* A stream on which nothing comes for the node timeout is closed: silence is how a node is known to be away.
* Nothing is acknowledged to an agent of another cluster or store: all that it gets is the refusal.
* A standby, and a leader whose reign has ended, name the leader and end the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Final
from urllib.parse import unquote
from uuid import uuid4

import structlog
from grpc import aio

from coordinator.core.cluster import NodeView
from coordinator.core.events import (
    AgentConnected,
    AgentDisconnected,
    AgentHeard,
    Event,
    ProgressReported,
    RefuseAgent,
    ReplicaReported,
    SendExamine,
    SendRecord,
)
from coordinator.office import Identity, Office, StreamOut
from coordinator.pace import Pace, Silence, first_of
from resilver.access import Caller, caller
from resilver.address import Address, parse_address
from resilver.errors import Conflict, Exhausted, ResilverError, Superseded, Unavailable
from resilver.fields import check_count, check_id, check_name, check_number, check_text, invalid
from resilver.v1 import agent_pb2, agent_pb2_grpc
from resilver.wire import progress_from_proto, record_to_proto
from resilver.wire_limits import limits_from_proto
from resilver.wire_pages import PAGES_TOGETHER_MAX, ReportAssembler, is_whole

STREAMS_MAX: Final = 2000
VOLUMES_MAX: Final = 10_000
VERSION_CHARS_MAX: Final = 64
MESSAGES_PER_SECOND_MAX: Final = 500.0
MESSAGES_BURST_MAX: Final = 2000.0
PAGE_OF_A_MESSAGE: Final = 0.2
"""What a replica that is told among others costs, of what one costs that comes by itself."""
FULL_WAIT_S: Final = 0.2
ACK_WITHIN_S: Final = 0.05

_log = structlog.get_logger(__name__)

Messages = AsyncIterator[agent_pb2.ReportRequest]


class Reports(agent_pb2_grpc.ReportsServicer):
    """Serves agents; what it hears goes to the office as events."""

    def __init__(self, office: Office, *, node_timeout_s: float, streams_max: int = STREAMS_MAX) -> None:
        self._office = office
        self._node_timeout_s = node_timeout_s
        self._streams_max = streams_max
        self._streams = 0

    async def Report(  # noqa: N802 - the method's name in the protocol
        self, request_iterator: Messages, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[agent_pb2.ReportResponse]:
        if self._streams >= self._streams_max:
            raise Exhausted("TOO_LARGE", f"{self._streams} agents are connected, which is all that are served")
        self._streams += 1
        try:
            async with aclosing(self._serve(request_iterator, caller(context))) as responses:
                async for response in responses:
                    yield response
        finally:
            self._streams -= 1

    async def _serve(self, messages: Messages, asking: Caller) -> AsyncGenerator[agent_pb2.ReportResponse, None]:
        opening = await first_of(messages, self._node_timeout_s, "a hello")
        if opening is None:
            return
        try:
            identity = self._office.engine().identity
        except Superseded as error:
            yield _not_leader(error)
            return
        stream = str(uuid4())
        try:
            hello = read_hello(opening, asking.address, stream, self._office.now_ms())
        except ResilverError as error:
            # Told as an answer, so that the agent says it in its log and waits, instead of dialling again at once.
            yield agent_pb2.ReportResponse(
                refusal=agent_pb2.ReportRefusal(reason=error.reason, message=error.message), term=identity.term
            )
            return
        asking.check_node(hello.node.name)
        session = _Session(self._office, hello, opening.seq, self._node_timeout_s)
        async with aclosing(session.run(messages, identity)) as responses:
            async for response in responses:
                yield response


class _Session:
    """One agent's stream, from its hello to its end."""

    def __init__(self, office: Office, hello: AgentConnected, seq: int, node_timeout_s: float) -> None:
        self._office = office
        self._hello = hello
        self._node_timeout_s = node_timeout_s
        self._assembler = ReportAssembler()
        self._heard_seq = self._acked_seq = seq
        self._woken = asyncio.Event()
        self._action: SendExamine | SendRecord | RefuseAgent | None = None
        self._room = asyncio.Event()
        self._acking: asyncio.TimerHandle | None = None
        self._connected = False

    async def run(self, messages: Messages, identity: Identity) -> AsyncGenerator[agent_pb2.ReportResponse, None]:
        """Reads on one side and answers on the other until either has ended."""
        outbox = self._office.open_stream(self._hello.stream)
        tasks: set[asyncio.Task[Any]] = set()

        def begin(coroutine: Any) -> asyncio.Task[Any]:
            task = asyncio.get_running_loop().create_task(coroutine)
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            task.add_done_callback(lambda _: self._woken.set())
            task.add_done_callback(_asked)
            return task

        try:
            self._office.post(self._hello)
            self._connected = True
            if not self._belongs(identity):
                yield self._down(identity, await self._refusal(outbox))
                return
            yield self._ack(identity)
            async for response in self._answers(identity, begin(self._read(messages)), begin(self._take(outbox))):
                yield response
        except (Superseded, Conflict) as error:
            yield _not_leader(error)
        finally:
            self._disconnect()
            self._office.close_stream(self._hello.stream)
            if self._acking is not None:
                self._acking.cancel()
            for task in tuple(tasks):
                task.cancel()

    async def _answers(
        self, identity: Identity, reading: asyncio.Task[Any], taking: asyncio.Task[Any]
    ) -> AsyncGenerator[agent_pb2.ReportResponse, None]:
        """What is to be sent, and an acknowledgement where nothing else tells what was heard."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            action, self._action = self._action, None
            if action is not None:
                yield self._down(identity, action)
                self._room.set()
            elif self._acked_seq < self._heard_seq:
                yield self._ack(identity)
            if isinstance(action, RefuseAgent):
                return
            if taking.done():
                taking.result()
            if reading.done():
                reading.result()
                return

    def _belongs(self, identity: Identity) -> bool:
        """Whether this is the agent's own cluster and store: an acknowledgement from another one would be taken for
        its own by an agent that has none yet, and ends the stream of one that has before it can be told to adopt.
        """
        mine = self._hello.store_id in ("", identity.store_id)
        return mine and self._hello.cluster == identity.cluster

    async def _refusal(self, outbox: StreamOut) -> SendExamine | SendRecord | RefuseAgent:
        try:
            async with asyncio.timeout(self._node_timeout_s):
                return await outbox.get()
        except TimeoutError as error:
            raise Unavailable("DEADLINE", "this coordinator is behind with what it is told; try again") from error

    async def _take(self, outbox: StreamOut) -> None:
        """Hands on what is to be sent, one at a time: the rest waits in the outbox, which has a bound."""
        while True:
            self._action = await outbox.get()
            self._woken.set()
            await self._room.wait()
            self._room.clear()

    async def _read(self, messages: Messages) -> None:
        """Posts what the agent says until it stops, or says something that no agent says."""
        pace = Pace(MESSAGES_PER_SECOND_MAX, MESSAGES_BURST_MAX, asyncio.get_running_loop().time)
        try:
            async with Silence(self._node_timeout_s) as silence:
                async for message in messages:
                    silence.heard()
                    await self._hear(message, pace)
                    silence.listen()
        except ResilverError as error:
            _log.warning("an agent's stream was ended", node=self._hello.node.name, reason=error.message)
            raise
        finally:
            # At once, also while the other side still waits for an agent that does not read.
            self._disconnect()

    async def _hear(self, message: agent_pb2.ReportRequest, pace: Pace) -> None:
        wait_s = pace.wait_s(max(1.0, len(message.pages.pages) * PAGE_OF_A_MESSAGE))
        if wait_s:
            await asyncio.sleep(wait_s)
        if message.boot != self._hello.node.boot:
            raise invalid("boot", f"is {message.boot[:80]!r} in a stream of {self._hello.node.boot}")
        if message.seq > self._heard_seq:
            for event in self._read_events(message):
                await self._post(event)
            self._heard_seq = message.seq
            if self._acking is None:
                # Nobody waits for it, and one does for all that comes in the meantime.
                self._acking = asyncio.get_running_loop().call_later(ACK_WITHIN_S, self._woken.set)

    def _read_events(self, message: agent_pb2.ReportRequest) -> list[Event]:
        stream = self._hello.stream
        examine_id = check_id(message.examine_id, "examine_id", required=False)
        check_number(message.seq, "seq")
        match message.WhichOneof("body"):
            case "replica":
                return [self._reported(message.replica, message.seq, examine_id)]
            case "pages":
                self._check_pages(message.pages.pages)
                return [self._reported(page, message.seq, examine_id) for page in message.pages.pages]
            case "resync":
                progress = progress_from_proto(message.resync)
                self._check_volume(progress.volume, "resync.volume")
                return [ProgressReported(stream, progress)]
            case "heartbeat":
                told = message.heartbeat
                limits = limits_from_proto(told.limits, "heartbeat.limits") if told.HasField("limits") else None
                return [AgentHeard(stream, limits)]
            case "hello":
                raise invalid("hello", "was said before: a stream has one")
            case _:
                raise invalid("body", "is missing: a report is a replica, a resync or a heartbeat")

    def _reported(self, page: agent_pb2.ReplicaPage, seq: int, examine_id: str) -> Event:
        self._check_volume(page.replica.volume, "replica.volume")
        report = self._assembler.add(page)
        stream = self._hello.stream
        return AgentHeard(stream) if report is None else ReplicaReported(stream, seq, report, examine_id)

    def _check_pages(self, pages: Sequence[agent_pb2.ReplicaPage]) -> None:
        """Each is a whole report, of a volume of its own: a number counts for each volume once."""
        check_count(pages, "pages", PAGES_TOGETHER_MAX)
        volumes = [page.replica.volume for page in pages]
        if len(set(volumes)) < len(volumes):
            raise invalid("pages", "have a volume twice: each is of another one")
        if not all(is_whole(page) for page in pages):
            raise invalid("pages", "are not each a whole report: one that takes several pages goes by itself")

    async def _post(self, event: Event) -> None:
        """Hands it on; while the engine is behind, the agent waits too."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._node_timeout_s
        while True:
            try:
                return self._office.post(event)
            except Exhausted:
                if loop.time() >= until:
                    raise
                await asyncio.sleep(FULL_WAIT_S)

    def _check_volume(self, volume: str, field: str) -> None:
        if volume not in self._hello.node.volumes:
            raise invalid(field, f"is {volume[:80]!r}, which was not among the volumes of the hello")

    def _disconnect(self) -> None:
        if self._connected:
            self._connected = False
            self._tell_gone()

    def _tell_gone(self) -> None:
        """Never given up while the reign lasts: a stream that nobody ended would keep its node connected."""
        try:
            self._office.post(AgentDisconnected(self._hello.stream))
        except Exhausted:
            asyncio.get_running_loop().call_later(FULL_WAIT_S, self._tell_gone)
        except (Superseded, Conflict):
            # With the reign, everything that was known of this stream has gone already.
            return

    def _ack(self, identity: Identity) -> agent_pb2.ReportResponse:
        self._acked_seq = self._heard_seq
        if self._acking is not None:
            self._acking.cancel()
            self._acking = None
        return agent_pb2.ReportResponse(
            acked_seq=self._acked_seq,
            term=identity.term,
            leader_id=identity.leader_id,
            store_id=identity.store_id,
            takes_pages=True,
        )

    def _down(self, identity: Identity, action: SendExamine | SendRecord | RefuseAgent) -> agent_pb2.ReportResponse:
        response = self._ack(identity)
        match action:
            case SendExamine():
                response.examine.examine_id = action.examine_id
                response.examine.volumes.extend(action.volumes)
            case SendRecord():
                response.record.CopyFrom(record_to_proto(action.record))
            case RefuseAgent():
                response.refusal.reason = action.reason
                response.refusal.message = action.message
                response.adopt_store = action.adopt
        return response


def read_hello(message: agent_pb2.ReportRequest, peer: str, stream: str, now_ms: int) -> AgentConnected:
    """Checks the first message of a stream."""
    if message.WhichOneof("body") != "hello":
        raise invalid("hello", "is missing: the first message of a stream is a hello")
    hello = message.hello
    check_count(hello.volumes, "hello.volumes", VOLUMES_MAX)
    check_number(message.seq, "seq")
    host = peer_host(peer)
    node = NodeView(
        name=check_name(hello.node, "hello.node"),
        boot=check_id(message.boot, "boot"),
        address=reached_at(hello.address, host, "hello.address"),
        stream_address=reached_at(hello.stream_address, host, "hello.stream_address"),
        version=check_text(hello.version, "hello.version", chars_max=VERSION_CHARS_MAX),
        volumes=tuple(check_name(volume, f"hello.volumes[{at}]") for at, volume in enumerate(hello.volumes)),
        connected=True,
        last_heard_ms=now_ms,
    )
    return AgentConnected(
        stream=stream,
        node=node,
        cluster=check_name(hello.cluster, "hello.cluster"),
        store_id=check_id(hello.store_id, "hello.store_id", required=False),
        highest_term=check_number(hello.highest_term, "hello.highest_term"),
        highest_leader_id=check_id(hello.highest_leader_id, "hello.highest_leader_id", required=False),
        limits=limits_from_proto(hello.limits, "hello.limits"),
    )


def reached_at(text: str, host: str, field: str) -> str:
    """The address under which others reach the agent: its own word, its connection's host where it names none."""
    try:
        address = parse_address(check_text(text, field, chars_max=300))
    except ValueError as error:
        raise invalid(field, f"cannot be read: {error}") from error
    if address.port == 0:
        raise invalid(field, f"is {text!r}, and port 0 is no port that can be dialled")
    if address.every_interface:
        return str(Address(host, address.port))
    if address.loopback and host and not Address(host, 0).loopback:
        raise invalid(field, f"is {text!r}, but the agent is on {host}: set `advertise` to what others can reach")
    return str(address)


def peer_host(peer: str) -> str:
    """The host of `ipv4:10.0.0.1:5123` or `ipv6:%5B::1%5D:5123`; for anything else what there is."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return rest or kind
    host = rest.rpartition(":")[0].strip("[]")
    # An IPv4 caller of a socket that serves both appears mapped into IPv6.
    return host.removeprefix("::ffff:") if "." in host else host


def _asked(task: asyncio.Task[Any]) -> None:
    """Of two that fail at once one is told; asyncio would log the other as forgotten."""
    if not task.cancelled():
        task.exception()


def _not_leader(error: ResilverError) -> agent_pb2.ReportResponse:
    address = error.metadata.get("leader_address", "")
    return agent_pb2.ReportResponse(not_leader=agent_pb2.NotLeader(address=address))
