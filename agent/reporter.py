"""Keeps one stream open to the coordinator that leads, and tells it all that changes here.

* Hello first, then every run's last word and a full report of every volume, then changes as they occur and a heartbeat
  in between. Only reports tell the coordinator what a replica is.
* Coordinators are tried in turn, with a pause that grows and is never in step with other agents'. A standby names the
  leader, who is tried next. A refusal is logged once, not with every try.
* The leader's store, term and id come with every answer and are checked as those of an order are. A store that this
  agent is told to adopt is adopted, and the stream begins anew.
* A coordinator that hangs is noticed by the channel's keepalive.
* Disks are looked at from here: cheaply every five seconds, with a comparison when something has changed, and once a
  minute in any case where comparing costs no reading. Of more than a thousand volumes 200 are looked at in a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import grpc
import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import aio

from agent import metrics
from agent.few import PACE_S
from agent.outbox import Answer
from resilver.address import Address, parse_address
from resilver.errors import ResilverError, Unavailable
from resilver.fields import check_id, check_number
from resilver.limits import NodeLimits
from resilver.rpc import make_channel, to_error
from resilver.v1 import agent_pb2, agent_pb2_grpc, volume_pb2
from resilver.volume import Progress
from resilver.wire import progress_to_proto, record_from_proto
from resilver.wire_limits import limits_to_proto
from resilver.wire_pages import PAGES_TOGETHER_MAX, bodies_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from agent.few import Few
    from agent.identity import Identity
    from agent.limits import Caps
    from agent.outbox import Outbox
    from agent.replica import Replica
    from agent.runs import Runs
    from agent.worker import Worker
    from resilver.credentials import Credentials

HEARTBEAT_S: Final = 2.0
LOOK_S: Final = 5.0
COMPARE_EVERY_LOOKS: Final = 12
CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 10.0
BACKOFF_FIRST_S: Final = 0.3
BACKOFF_MAX_S: Final = 2.0
REDIRECTS_MAX: Final = 3
LAST_WORDS_S: Final = 1.0
GATHER_S: Final = 0.02
"""How long the first answer to an examine waits for others."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Hello:
    """What an agent says of itself."""

    node: str
    version: str
    address: str
    stream_address: str


class Refusal(ResilverError):
    """The coordinator refuses this agent's stream, and says why."""


class Elsewhere(Exception):
    """Not the leader; `address` is who is, empty if that is not known."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address: Final = address


class Reporter:
    """Runs until it is cancelled."""

    def __init__(
        self,
        *,
        coordinators: Sequence[Address],
        hello: Callable[[], Hello],
        identity: Identity,
        replicas: Mapping[str, Replica],
        runs: Runs,
        outbox: Outbox,
        control: Worker,
        caps: Caps,
        few: Few,
        look_s: float = LOOK_S,
        tls: Credentials | None = None,
    ) -> None:
        self._tls: Final = tls
        self._coordinators: Final = tuple(coordinators)
        self._hello: Final = hello
        self._identity: Final = identity
        self._replicas: Final = replicas
        self._runs: Final = runs
        self._outbox: Final = outbox
        self._control: Final = control
        self._caps: Final = caps
        self._told_limits = NodeLimits()
        self._few: Final = few
        self._look_s: Final = look_s
        self._seq = 0
        self._said = ""
        self._worked = False
        self._takes_pages = False
        self._looking = 0
        self._asking: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Reports to whoever leads, for ever."""
        turn, pause_s, redirected = 0, BACKOFF_FIRST_S, 0
        address = self._coordinators[0]
        while True:
            worked = False
            try:
                worked = await self._report_to(address)
                self._log_once(f"{address} ended the stream", address)
            except Elsewhere as other:
                leader = _leader(other.address)
                if leader is not None and leader != address and redirected < REDIRECTS_MAX:
                    redirected += 1
                    address = leader
                    continue
                self._log_once(f"{address} does not lead, and knows nobody who does", address)
            except ResilverError as error:
                worked = self._worked
                self._log_once(f"{error.reason}: {error.message}", address)
            except Exception as error:  # noqa: BLE001 - whatever a coordinator made of us, transfers and disks go on
                _log.error("a stream failed for an unforeseen reason", coordinator=str(address), exc_info=error)
            redirected = 0
            pause_s = BACKOFF_FIRST_S if worked else min(pause_s * 2, BACKOFF_MAX_S)
            turn += 1
            address = self._coordinators[turn % len(self._coordinators)]
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret

    async def look(self) -> None:
        """Looks at every disk now and then, for ever; a disk that hangs is asked nothing more meanwhile."""
        waiting: dict[str, asyncio.Future[Any]] = {}
        looks, clock = 0, asyncio.get_running_loop().time
        begun = clock()
        while True:
            await asyncio.sleep(begun + self._look_s - clock())
            begun = clock()
            looks += 1
            for volume, replica in self._replicas.items():
                if volume in waiting and not waiting[volume].done():
                    continue
                last = replica.last
                surely = looks % COMPARE_EVERY_LOOKS == 0
                compare = last is None or (surely and last.reflink and not last.live.in_use)
                job = replica.examine if compare else partial(replica.look, surely=surely)
                future = await self._few.begin(replica.worker, partial(replica.worker.submit, job))
                if future is not None:
                    waiting[volume] = future
                    future.add_done_callback(partial(_log_failure, volume))
                await asyncio.sleep(PACE_S)

    # One stream.

    async def _report_to(self, address: Address) -> bool:
        """One stream to one coordinator, to its end; whether it worked. Elsewhere, Refusal or Unavailable."""
        self._worked = False
        async with make_channel(address, tls=self._tls) as channel:
            call = agent_pb2_grpc.ReportsStub(channel).Report()
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await call.write(self._opening())
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    first = await call.read()
                await self._take(first)
                self._takes_pages = isinstance(first, agent_pb2.ReportResponse) and first.takes_pages
                metrics.CONNECTED.set(1)
                self._log_connected(address)
                self._worked = True
                self._tell_everything()
                self._spawn(self._look_everywhere())
                await self._both_ways(call)
            except TimeoutError as error:
                raise Unavailable("NO_LEADER", f"{address} does not answer") from error
            except aio.AioRpcError as error:
                raise to_error(error, who=f"coordinator {address}") from error
            except asyncio.InvalidStateError as error:
                # The call ended while something was being written; how, only its status says.
                raise await _ended(call, address) from error
            finally:
                metrics.CONNECTED.set(0)
                call.cancel()
                for task in self._asking:
                    task.cancel()
                self._looking = 0  # whoever had not begun by now does not
        return True

    async def _both_ways(self, call: aio.StreamStreamCall[Any, Any]) -> None:
        """Sends and receives until one of both ends; the stream's own status says why."""
        sending = asyncio.create_task(self._send(call))
        receiving = asyncio.create_task(self._receive(call))
        try:
            await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
            # A stream that has ended fails the sender; why it did is what there may still be to read.
            await asyncio.wait({receiving}, timeout=LAST_WORDS_S)
            ended = receiving if receiving.done() else sending
            if ended.cancelled():  # by gRPC: nobody here has done it yet
                raise Unavailable("NO_LEADER", "the stream was cancelled")
            ended.result()
        finally:
            for task in (sending, receiving):
                task.cancel()
            await asyncio.gather(sending, receiving, return_exceptions=True)

    async def _send(self, call: aio.StreamStreamCall[Any, Any]) -> None:
        while True:
            told = await self._outbox.next(HEARTBEAT_S)
            if told is not None and self._told_limits != self._caps.now():
                await call.write(self._message(heartbeat=self._heartbeat()))
            if told is None:
                await call.write(self._message(heartbeat=self._heartbeat()))
            elif isinstance(told, Progress):
                await call.write(self._message(resync=progress_to_proto(told)))
            else:
                await self._send_reports(call, told)

    async def _send_reports(self, call: aio.StreamStreamCall[Any, Any], first: Answer) -> None:
        """That one, and with it, if the coordinator takes several at once, what else answers the same."""
        told = [first]
        if self._takes_pages:
            if first.examine_id and self._looking:
                # The others are looked at in this moment, and a message costs more than what is in it.
                await asyncio.sleep(GATHER_S)
            told = self._outbox.with_others(first, PAGES_TOGETHER_MAX)
        for body in bodies_of((one.report for one in told), node=self._hello().node):
            await call.write(self._message(**body, examine_id=first.examine_id))

    async def _receive(self, call: aio.StreamStreamCall[Any, Any]) -> None:
        while (response := await call.read()) is not aio.EOF:
            await self._take(response)

    async def _take(self, response: Any) -> None:
        """Obeys one message of the coordinator."""
        if response is aio.EOF or not isinstance(response, agent_pb2.ReportResponse):
            raise Unavailable("NO_LEADER", "the coordinator ended the stream without a word")
        kind = response.WhichOneof("body")
        if kind == "not_leader":
            raise Elsewhere(response.not_leader.address)
        if kind == "refusal":
            await self._refused(response)
        await self._control.run(
            partial(
                self._identity.meet,
                check_id(response.store_id, "store_id"),
                check_number(response.term, "term", least=1),
                check_id(response.leader_id, "leader_id"),
            )
        )
        if kind == "examine":
            self._examine(response.examine)
        elif kind == "record":
            await self._store(response.record)

    async def _refused(self, response: agent_pb2.ReportResponse) -> None:
        if response.adopt_store and response.store_id:
            store_id = check_id(response.store_id, "store_id")
            await self._control.run(partial(self._identity.adopt_store, store_id))
            _log.warning("another store was adopted, by an operator's act", store_id=store_id)
            self._worked = True  # it will be welcome at once: no longer pause than after any other end
        raise Refusal(response.refusal.reason, response.refusal.message)

    def _examine(self, examine: agent_pb2.Examine) -> None:
        examine_id = check_id(examine.examine_id, "examine_id")
        asked = [volume for volume in examine.volumes if volume in self._replicas]
        self._looking += len(asked)
        self._spawn(self._examine_all(examine_id, asked))

    async def _examine_all(self, examine_id: str, volumes: list[str]) -> None:
        for volume in volumes:
            replica = self._replicas[volume]
            future = await self._few.begin(replica.worker, replica.examine_soon)
            if future is not None:
                future.add_done_callback(partial(self._examined, volume, examine_id))
            else:  # its disk hangs: no answer is the answer
                self._looking = max(self._looking - 1, 0)

    def _examined(self, volume: str, examine_id: str, future: asyncio.Future[Any]) -> None:
        self._looking = max(self._looking - 1, 0)
        if _log_failure(volume, future):
            self._outbox.put_answer(future.result(), examine_id)

    async def _store(self, message: Any) -> None:
        record = record_from_proto(message)
        replica = self._replicas.get(record.volume)
        if replica is None:
            return
        with contextlib.suppress(Unavailable):  # its disk hangs; the coordinator sends it again with the next stream
            job = asyncio.wrap_future(replica.worker.submit(partial(replica.store_record, record)))
            job.add_done_callback(partial(_log_failure, record.volume))

    # What is said.

    def _tell_everything(self) -> None:
        self._outbox.clear()
        for progress in self._runs.progresses():
            self._outbox.put_progress(progress)
        for replica in self._replicas.values():
            if replica.last is not None:
                self._outbox.put_report(replica.last)

    async def _look_everywhere(self) -> None:
        """Comparing may mean to read the whole volume: once at the start, and then when there is a reason to."""
        for volume, replica in self._replicas.items():
            job = replica.examine if replica.last is None else replica.look
            future = await self._few.begin(replica.worker, partial(replica.worker.submit, job))
            if future is not None:
                future.add_done_callback(partial(_log_failure, volume))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """For as long as the stream lasts."""
        task = asyncio.create_task(work)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    def _opening(self) -> agent_pb2.ReportRequest:
        hello, pin = self._hello(), self._identity.pin
        return self._message(
            hello=agent_pb2.AgentHello(
                node=hello.node,
                cluster=pin.cluster,
                store_id=pin.store_id,
                version=hello.version,
                address=hello.address,
                stream_address=hello.stream_address,
                highest_term=pin.term,
                highest_leader_id=pin.leader_id,
                volumes=sorted(self._replicas),
                limits=self._limits(),
            )
        )

    def _heartbeat(self) -> agent_pb2.Heartbeat:
        """With what is allowed here, if that has changed: a reload, or an order that has ended."""
        changed = self._told_limits != self._caps.now()
        return agent_pb2.Heartbeat(now_time=_now(), limits=self._limits() if changed else None)

    def _limits(self) -> volume_pb2.NodeLimits:
        self._told_limits = self._caps.now()
        return limits_to_proto(self._told_limits)

    def _message(self, **fields: Any) -> agent_pb2.ReportRequest:
        self._seq += 1
        return agent_pb2.ReportRequest(boot=self._identity.boot, seq=self._seq, **fields)

    def _log_once(self, said: str, address: Address) -> None:
        if said != self._said:
            self._said = said
            _log.warning("not reporting to a coordinator", coordinator=str(address), why=said)

    def _log_connected(self, address: Address) -> None:
        self._said = ""
        _log.info("reporting", coordinator=str(address), term=self._identity.pin.term)


async def _ended(call: aio.StreamStreamCall[Any, Any], address: Address) -> ResilverError:
    code, details = await call.code(), await call.details()
    said = f"{code.name if isinstance(code, grpc.StatusCode) else code}: {details}"
    return Unavailable("NO_LEADER", f"coordinator {address} ended the stream: {said}")


def _leader(text: str) -> Address | None:
    try:
        address = parse_address(text)
    except ValueError:
        return None
    return address if address.host and address.port else None


def _log_failure(volume: str, future: asyncio.Future[Any]) -> bool:
    """Whether the job ended well; what went wrong is logged, because nobody waits for it."""
    if future.cancelled():
        return False
    error = future.exception()
    if error is not None:
        reason = error.reason if isinstance(error, ResilverError) else type(error).__name__
        _log.warning("volume not looked at or told", volume=volume, reason=reason, message=str(error))
    return error is None


def _now() -> Timestamp:
    stamp = Timestamp()
    stamp.GetCurrentTime()
    return stamp
