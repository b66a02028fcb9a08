"""What a target asks of a source over gRPC: the lineage and the delta map, and digests of a few blocks.

Called from the thread of a run; the calls themselves run on the event loop. Nothing that a source says is believed
before it was checked: the records form a lineage that begins at the target, the ranges are in order and within the
volume, and both are bounded.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from array import array
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
from grpc import aio

from agent.backends.base import StreamOrigin
from agent.delta import DeltaMap
from agent.stream.pump import FORMATS_MAX
from agent.stream.work import Stopped
from resilver import wire, wire_pages
from resilver.errors import Damaged, Exhausted, Unavailable
from resilver.fields import check_count, check_number, check_optional, check_text, check_texts
from resilver.rpc import make_channel, to_error
from resilver.v1 import agent_pb2, agent_pb2_grpc

if TYPE_CHECKING:
    import threading
    from collections.abc import AsyncIterator, Coroutine, Sequence

    from agent.delta import DeltaRange
    from resilver.credentials import Credentials
    from resilver.lineage import Lineage, Snapshot

T = TypeVar("T")

RANGES_MAX: Final = 4_000_000
"""A map of so many takes 70 MB; what needs more is served better by a full copy of its region."""
SILENCE_MAX_S: Final = 120.0
FETCH_MAX_S: Final = 1800.0
"""For all of a delta map, which is 80 MB at most: one page now and then would hold a run, and its slot, for ever."""
DIGEST_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Source:
    """A node that was told to serve this run."""

    node: str
    address: str
    stream_address: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for, and the ticket that allows it."""

    resync_id: str
    ticket: str
    volume: str
    base: str
    target: str
    target_node: str


@dataclass(frozen=True, slots=True)
class Offer:
    """What a source told: the target's lineage, tip first, and the map from the base to it.

    Instead of a map, which is empty then, `origin` where the source's file system writes a stream of its own.
    """

    lineage: Lineage
    delta: DeltaMap
    origin: StreamOrigin | None = None


class Peers:
    """Blocking calls to other agents. `loop` is the agent's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, tls: Credentials | None = None) -> None:
        self._loop: Final = loop
        self.tls: Final = tls

    def fetch(self, source: Source, wanted: Wanted, stop: threading.Event) -> Offer:
        """The lineage and the delta map of what is wanted; raises what the source says, or Stopped."""
        return self._wait(_fetch(source, wanted, self.tls), stop)

    def digests(
        self, source: Source, wanted: Wanted, snapshot: str, ranges: Sequence[DeltaRange], stop: threading.Event
    ) -> list[bytes]:
        """The BLAKE3 of some stretches of a snapshot, as the source reads them."""
        return self._wait(_digests(source, wanted, snapshot, ranges, self.tls), stop)

    def _wait(self, call: Coroutine[Any, Any, T], stop: threading.Event) -> T:
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        while True:
            try:
                return future.result(timeout=0.2)
            except concurrent.futures.TimeoutError:
                if future.done():
                    raise
                if stop.is_set():
                    future.cancel()
                    raise Stopped from None
            except concurrent.futures.CancelledError:
                # The event loop ends: the agent is stopping.
                raise Stopped from None


@asynccontextmanager
async def _peer(source: Source, tls: Credentials | None) -> AsyncIterator[agent_pb2_grpc.PeerStub]:
    async with make_channel(source.address, source.node, tls=tls) as channel:
        try:
            yield agent_pb2_grpc.PeerStub(channel)
        except aio.AioRpcError as error:
            raise to_error(error, unreachable="NODE_UNREACHABLE", who=f"node {source.node}") from error


async def _fetch(source: Source, wanted: Wanted, tls: Credentials | None) -> Offer:
    try:
        async with asyncio.timeout(FETCH_MAX_S):
            return await _fetch_pages(source, wanted, tls)
    except TimeoutError as error:
        said = f"node {source.node} was not done telling the delta after {FETCH_MAX_S:g} s"
        raise Unavailable("DEADLINE", said) from error


async def _fetch_pages(source: Source, wanted: Wanted, tls: Credentials | None) -> Offer:
    request = agent_pb2.StreamDeltaRequest(
        resync_id=wanted.resync_id,
        ticket=wanted.ticket,
        volume=wanted.volume,
        base=wanted.base,
        target=wanted.target,
        target_node=wanted.target_node,
    )
    records: list[Snapshot] = []
    columns = array("q"), array("q"), array("b")
    capacity = 0
    origin: StreamOrigin | None = None
    async with _peer(source, tls) as peer:
        call = peer.StreamDelta(request)
        while (page := await _next_page(call, source)) is not None:
            capacity = check_number(page.capacity_bytes, "capacity_bytes")
            records += [wire.snapshot_from_proto(record, "records") for record in page.records]
            check_count(records, "records", wire_pages.LINEAGE_RECORDS_MAX)
            if page.HasField("origin"):
                origin = _origin(page.origin)
            for each in page.ranges:
                columns[0].append(check_number(each.offset, "ranges.offset"))
                columns[1].append(check_number(each.length, "ranges.length"))
                columns[2].append(each.zero)
            if len(columns[0]) > RANGES_MAX:
                raise Exhausted("TOO_LARGE", f"the delta has more than {RANGES_MAX} ranges; resync with a full copy")
    lineage = wire_pages.lineage_of(records)
    if lineage.tip_id != wanted.target:
        raise Damaged("SOURCE_DAMAGED", f"{source.node} told a lineage of {lineage.tip_id}, not of {wanted.target}")
    delta = DeltaMap(
        capacity,
        np.frombuffer(columns[0], dtype=np.int64) if columns[0] else np.zeros(0, np.int64),
        np.frombuffer(columns[1], dtype=np.int64) if columns[1] else np.zeros(0, np.int64),
        np.frombuffer(columns[2], dtype=np.int8).astype(np.bool_) if columns[2] else np.zeros(0, np.bool_),
    )
    try:
        delta.check()
    except ValueError as error:
        raise Damaged("SOURCE_DAMAGED", f"{source.node} told a delta that is none: {error}") from error
    return Offer(lineage, delta, origin)


def _origin(told: agent_pb2.StreamOrigin) -> StreamOrigin:
    return StreamOrigin(
        native_base=check_text(told.native_base, "origin.native_base"),
        native_target=check_text(told.native_target, "origin.native_target"),
        formats=check_texts(told.formats, "origin.formats", FORMATS_MAX),
        stream_bytes=check_optional(told, "stream_bytes", "origin"),
    )


async def _next_page(
    call: aio.UnaryStreamCall[agent_pb2.StreamDeltaRequest, agent_pb2.StreamDeltaResponse], source: Source
) -> agent_pb2.StreamDeltaResponse | None:
    """The next message, None at the end; a source that works on the map for too long counts as silent."""
    try:
        async with asyncio.timeout(SILENCE_MAX_S):
            page = await call.read()
    except TimeoutError as error:
        call.cancel()
        raise Unavailable(
            "DEADLINE", f"node {source.node} told nothing of the delta for {SILENCE_MAX_S:g} s"
        ) from error
    return page if isinstance(page, agent_pb2.StreamDeltaResponse) else None


async def _digests(
    source: Source, wanted: Wanted, snapshot: str, ranges: Sequence[DeltaRange], tls: Credentials | None
) -> list[bytes]:
    request = agent_pb2.DigestRangesRequest(
        resync_id=wanted.resync_id,
        ticket=wanted.ticket,
        volume=wanted.volume,
        snapshot=snapshot,
        target_node=wanted.target_node,
        ranges=[agent_pb2.DeltaRange(offset=each.offset, length=each.length) for each in ranges],
    )
    async with _peer(source, tls) as peer:
        answer = await peer.DigestRanges(request, timeout=SILENCE_MAX_S)
    if len(answer.digests) != len(ranges) or any(len(each) != DIGEST_BYTES for each in answer.digests):
        raise Damaged(
            "SOURCE_DAMAGED", f"{source.node} answered {len(answer.digests)} digests for {len(ranges)} ranges"
        )
    return list(answer.digests)
