"""Orders to agents: one call for each, and always one answer.

The rules:

* An order is answered within its deadline: by what the agent says, by the error that it raises, or by
  `Unavailable("NODE_UNREACHABLE")`. An order without an answer may have been obeyed: the report tells.
* One channel for a node at an address, shared by all calls to it; channels that nothing uses are closed, and their
  number is bounded. With new certificate files every channel is made anew, and an old one ends with its last call.
* Nothing is tried again here: the engine decides what is ordered anew.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import grpc
import structlog

from coordinator.core.cluster import Size
from coordinator.core.events import GiveOrder, OrderAnswered
from coordinator.core.orders import (
    AnyOrder,
    CloneSnapshot,
    Done,
    Dropped,
    DropSnapshot,
    Exported,
    OpenEpoch,
    OrderResult,
    PrepareSend,
    Receive,
    SetLimits,
    StopTransfer,
    Taken,
    TakenTogether,
    TakeSnapshot,
    TakeSnapshots,
)
from resilver.errors import Exhausted, ResilverError, Unavailable
from resilver.fields import check_number, check_optional, check_text, invalid
from resilver.rpc import to_error
from resilver.telemetry import bound
from resilver.v1 import agent_pb2, agent_pb2_grpc
from resilver.wire import order_to_proto, progress_from_proto, record_to_proto, snapshot_from_proto
from resilver.wire_limits import change_to_proto, limits_from_proto

DEADLINES_S: Final[dict[type, float]] = {
    OpenEpoch: 20.0,
    TakeSnapshot: 150.0,  # its hooks may take a minute before and a minute after
    TakeSnapshots: 300.0,
    PrepareSend: 60.0,
    Receive: 20.0,
    StopTransfer: 20.0,
    DropSnapshot: 60.0,
    CloneSnapshot: 600.0,
    SetLimits: 20.0,
}
TICKET_LIFETIME_S: Final = 3600
CHANNELS_MAX: Final = 256
IDLE_S: Final = 300.0

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Line:
    """A channel, of which state of the certificate files it is, the calls on it now, and when the last one ended."""

    channel: grpc.aio.Channel
    number: int
    calls: int = 0
    used_at: float = 0.0


class Agents:
    """Calls agents. `dial` makes a channel to an address, on which that node answers.

    `number` grows when channels are to be made anew. One event loop's; `close` it at the end.
    """

    def __init__(
        self,
        dial: Callable[[str, str], grpc.aio.Channel],
        *,
        clock: Callable[[], float],
        number: Callable[[], int] = lambda: 0,
        channels_max: int = CHANNELS_MAX,
        idle_s: float = IDLE_S,
    ) -> None:
        self._dial = dial
        self._number = number
        self._clock = clock
        self._channels_max = channels_max
        self._idle_s = idle_s
        self._lines: OrderedDict[tuple[str, str], _Line] = OrderedDict()

    async def carry(self, given: GiveOrder) -> OrderAnswered:
        """Gives the order and answers what became of it; raises nothing but cancellation."""
        with bound(**_about(given)):
            try:
                answer: OrderResult | ResilverError = await self.give(given.node, given.address, given.order)
                _log.debug("order obeyed")
            except ResilverError as error:
                # One that is not reached is told every few seconds, and that it is away is known.
                log = _log.debug if isinstance(error, Unavailable) else _log.warning
                log("order not obeyed", reason=error.reason, message=error.message)
                answer = error
            except Exception as error:  # noqa: BLE001 - the engine waits for an answer: a bug here must be one too
                _log.exception("an order could not be given")
                answer = ResilverError("INTERNAL", f"the order to {given.node} could not be given: {error!r}")
        return OrderAnswered(given.order_id, answer)

    async def give(self, node: str, address: str, order: AnyOrder) -> OrderResult:
        """What the agent answers. Raises what it raises, or `Unavailable("NODE_UNREACHABLE")`."""
        timeout_s = DEADLINES_S[type(order)]
        if not address:
            raise Unavailable("NODE_UNREACHABLE", f"node {node} has told no address", node=node)
        try:
            async with self._line(address, node) as channel, asyncio.timeout(timeout_s + 1.0):
                return await _call(agent_pb2_grpc.AgentStub(channel), order, timeout_s)
        except TimeoutError as error:
            raise _silent(node, address, timeout_s) from error
        except grpc.aio.AioRpcError as error:
            raise _error_of(node, address, timeout_s, error) from error

    async def close(self) -> None:
        lines, self._lines = self._lines, OrderedDict()
        for line in lines.values():
            await line.channel.close()

    @asynccontextmanager
    async def _line(self, address: str, node: str) -> AsyncIterator[grpc.aio.Channel]:
        key, number = (address, node), self._number()
        line = self._lines.get(key)
        closing: list[grpc.aio.Channel] = []
        if line is not None and line.number != number:
            del self._lines[key]
            closing = [] if line.calls else [line.channel]
            line = None
        if line is None:
            closing += self._make_room()
            line = self._lines[key] = _Line(self._dial(address, node), number)
        line.calls += 1
        try:
            for channel in closing:
                await channel.close()
            yield line.channel
        finally:
            line.calls -= 1
            line.used_at = self._clock()
            if self._lines.get(key) is line:
                self._lines.move_to_end(key)
            elif not line.calls:
                await line.channel.close()

    def _make_room(self) -> list[grpc.aio.Channel]:
        """Takes out channels that have been idle for long, and the longest idle one if there are too many."""
        now = self._clock()
        idle = [(key, line) for key, line in self._lines.items() if line.calls == 0]
        full = len(self._lines) >= self._channels_max
        if full and not idle:
            raise Exhausted("TOO_LARGE", f"orders to {len(self._lines)} agents are under way; no more are given now")
        taken: list[grpc.aio.Channel] = []
        for key, line in idle:
            if now - line.used_at > self._idle_s or (full and not taken):
                del self._lines[key]
                taken.append(line.channel)
        return taken


def _about(given: GiveOrder) -> dict[str, object]:
    """What stands on each line that is about an order."""
    header, order = given.order.order, given.order
    found: dict[str, object] = {
        "order": type(order).__name__, "node": given.node, "volume": header.volume,
        "term": header.term, "epoch": header.epoch,
    }  # fmt: skip
    if isinstance(order, SetLimits):
        del found["volume"], found["epoch"]
    if isinstance(order, TakeSnapshots):
        del found["volume"]
        found["volumes"] = [one.order.volume for one in order.orders]
    resync = getattr(order, "resync_id", "")
    return found | {"resync": resync} if resync else found


async def _call(  # noqa: PLR0911 - one return for each kind of order
    stub: agent_pb2_grpc.AgentStub, order: AnyOrder, timeout_s: float
) -> OrderResult:
    header = order_to_proto(order.order)
    match order:
        case OpenEpoch():
            await stub.OpenEpoch(
                agent_pb2.OpenEpochRequest(header=header, record=record_to_proto(order.record), grant=order.grant),
                timeout=timeout_s,
            )
            return Done()
        case TakeSnapshot():
            return _taken(await stub.TakeSnapshot(_take_snapshot(header, order), timeout=timeout_s))
        case TakeSnapshots():
            return await _take_snapshots(stub, order, timeout_s)
        case PrepareSend():
            return _size(await stub.PrepareSend(_prepare_send(header, order), timeout=timeout_s))
        case Receive():
            received = await stub.Receive(_receive(header, order), timeout=timeout_s)
            return progress_from_proto(received.progress, "progress")
        case StopTransfer():
            stopped = await stub.StopTransfer(
                agent_pb2.StopTransferRequest(
                    header=header, resync_id=order.resync_id, discard_stage=order.discard_stage
                ),
                timeout=timeout_s,
            )
            # A run that the agent does not have has nothing to tell.
            return progress_from_proto(stopped.progress, "progress") if stopped.progress.resync_id else Done()
        case DropSnapshot():
            dropped = await stub.DropSnapshot(
                agent_pb2.DropSnapshotRequest(header=header, id=order.snapshot_id), timeout=timeout_s
            )
            return Dropped(check_number(dropped.freed_bytes, "freed_bytes"))
        case CloneSnapshot():
            cloned = await stub.CloneSnapshot(
                agent_pb2.CloneSnapshotRequest(
                    header=header, id=order.snapshot_id, path=order.path, writable=order.writable
                ),
                timeout=timeout_s,
            )
            return Exported(check_text(cloned.path, "path"), check_number(cloned.size_bytes, "size_bytes"))
        case SetLimits():
            wanted = agent_pb2.SetLimitsRequest(header=header, change=change_to_proto(order.change))
            return limits_from_proto((await stub.SetLimits(wanted, timeout=timeout_s)).limits)


def _take_snapshot(header: agent_pb2.OrderHeader, order: TakeSnapshot) -> agent_pb2.TakeSnapshotRequest:
    return agent_pb2.TakeSnapshotRequest(
        header=header,
        request_id=order.request_id,
        only_if_modified=order.only_if_modified,
        opening=order.opening,
        note=order.note,
    )


def _taken(answer: agent_pb2.TakeSnapshotResponse) -> Taken:
    return Taken(snapshot_from_proto(answer.snapshot), answer.taken)


async def _take_snapshots(stub: agent_pb2_grpc.AgentStub, order: TakeSnapshots, timeout_s: float) -> TakenTogether:
    requests = [_take_snapshot(order_to_proto(one.order), one) for one in order.orders]
    wanted = agent_pb2.TakeSnapshotsRequest(requests=requests, group_id=order.group_id)
    answer = await stub.TakeSnapshots(wanted, timeout=timeout_s)
    if len(answer.snapshots) != len(requests):
        raise invalid("snapshots", f"are {len(answer.snapshots)}, and {len(requests)} were ordered")
    return TakenTogether(tuple(_taken(one) for one in answer.snapshots))


def _prepare_send(header: agent_pb2.OrderHeader, order: PrepareSend) -> agent_pb2.PrepareSendRequest:
    return agent_pb2.PrepareSendRequest(
        header=header,
        resync_id=order.resync_id,
        base=order.base,
        target=order.target,
        target_node=order.target_node,
        ticket=order.ticket,
        ticket_lifetime_seconds=0 if order.size_only else TICKET_LIFETIME_S,
        size_only=order.size_only,
    )


def _size(answer: agent_pb2.PrepareSendResponse) -> Size:
    """Blocks that differ are told with their ranges; what is told without is a file system's estimate of its stream."""
    delta_bytes = check_optional(answer, "delta_bytes", "size")
    range_count = check_number(answer.range_count, "range_count")
    streams = delta_bytes is None or (delta_bytes > 0 and not range_count)
    return Size(delta_bytes, None if streams else range_count, check_number(answer.capacity_bytes, "capacity_bytes"))


def _receive(header: agent_pb2.OrderHeader, order: Receive) -> agent_pb2.ReceiveRequest:
    return agent_pb2.ReceiveRequest(
        header=header,
        resync_id=order.resync_id,
        base=order.base,
        target=order.target,
        ticket=order.ticket,
        sources=[
            agent_pb2.TransferSource(node=source.node, address=source.address, stream_address=source.stream_address)
            for source in order.sources
        ],
        replace_own_data=order.replace_own_data,
        replace_unrelated=order.replace_unrelated,
        priority=order.priority,
    )


def _error_of(node: str, address: str, timeout_s: float, error: grpc.aio.AioRpcError) -> ResilverError:
    """What the agent raised; where it did not answer, that the node is out of reach."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return _silent(node, address, timeout_s)
    return to_error(error, unreachable="NODE_UNREACHABLE", who=f"node {node} at {address}")


def _silent(node: str, address: str, timeout_s: float) -> Unavailable:
    message = f"node {node} at {address} did not answer within {timeout_s:g} s"
    return Unavailable("NODE_UNREACHABLE", message, node=node)
