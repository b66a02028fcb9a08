"""The streams that follow volumes, resyncs and events.

The rules:

* First the whole state, then what changed; an empty message when nothing did for ten seconds, so that a client knows
  that it is still being served.
* A slow client is sent less, not later: changes merge while it reads, at most five messages a second.
* A watch of resyncs ends when all that it watches are final, so that a client needs no rule of its own to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Final, TypeVar

import grpc
from grpc import aio

from coordinator.core.cluster import Resync
from coordinator.office import Engine, Office
from coordinator.paging import chunks
from coordinator.queries import about, found_in, volume
from coordinator.requests import Names
from coordinator.wire import event_to_proto, resync_to_proto
from resilver.errors import Conflict, Invalid, Unavailable
from resilver.fields import check_count, check_id
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2
from resilver.wire import time_to_proto

KEEPALIVE_S: Final = 10.0
PUSH_INTERVAL_S: Final = 0.2
IDS_MAX: Final = 20_000
"""Of one watch; they fit one message."""

M = TypeVar("M")


class KeepAlive:
    """Something is said at once, and then every ten seconds, also where much happens and nothing of what is wanted."""

    def __init__(self) -> None:
        self._said_s = -math.inf

    def at_least(self, parts: list[list[M]]) -> list[list[M]]:
        """What is to be sent now: these, an empty one if it is time for it, or nothing."""
        now_s = time.monotonic()
        if not parts and now_s - self._said_s < KEEPALIVE_S:
            return []
        self._said_s = now_s
        return parts or [[]]


async def watch_volumes(
    office: Office, request: api.WatchVolumesRequest
) -> AsyncGenerator[api.WatchVolumesResponse, None]:
    """The volumes named, or all, also those that come later."""
    named = frozenset(Names.of(office.engine()).some_volumes(request.volumes))
    sent: dict[str, bytes] = {}

    def fresh(names: Iterable[str]) -> list[volume_pb2.Volume]:
        """Those that are not as they were last sent."""
        engine = office.engine()
        known = frozenset(engine.volume_names())
        found = []
        for name in sorted(names):
            if name in known and (not named or name in named):
                message = volume(engine, name, office.now_ms())
                digest = _digest(message)
                if sent.get(name) != digest:
                    sent[name] = digest
                    found.append(message)
        return found

    def gone() -> list[str]:
        known = frozenset(office.engine().volume_names())
        left = sorted(name for name in sent if name not in known)
        for name in left:
            del sent[name]
        return left

    due = KeepAlive()
    with office.watch() as watch:
        names: Iterable[str] = office.engine().volume_names()
        while True:
            await office.settled()
            removed = gone()
            now_time = time_to_proto(office.now_ms())
            parts = list(chunks(fresh(names))) or ([[]] if removed else [])
            for at, part in enumerate(due.at_least(parts)):
                yield api.WatchVolumesResponse(volumes=part, removed=removed if at == 0 else (), now_time=now_time)
            await asyncio.sleep(PUSH_INTERVAL_S)
            changed = await watch.next(KEEPALIVE_S)
            names = changed.volumes if changed is not None else ()


async def watch_resyncs(
    office: Office, request: api.WatchResyncsRequest
) -> AsyncGenerator[api.WatchResyncsResponse, None]:
    """The resyncs named, and the active ones of the volumes named; of neither: every active one."""
    watched = _watched(office.engine(), request)
    # Kept as last seen, because a finished resync may be forgotten before a slow client was told its end.
    last: dict[str, Resync] = {}
    due = KeepAlive()
    with office.watch() as watch:
        while True:
            known = (await office.settled()).resyncs()
            changed = [known[one] for one in watched if one in known and known[one] != last.get(one)]
            last.update((one.id, one) for one in changed)
            now_time = time_to_proto(office.now_ms())
            for part in due.at_least(list(chunks(map(resync_to_proto, changed)))):
                yield api.WatchResyncsResponse(resyncs=part, now_time=now_time)
            if all(one not in known or known[one].state.final for one in watched):
                return
            await asyncio.sleep(PUSH_INTERVAL_S)
            await watch.next(KEEPALIVE_S)
            if not request.ids:
                watched |= _watched(office.engine(), request)


def _watched(engine: Engine, request: api.WatchResyncsRequest) -> dict[str, None]:
    """Ids, in order."""
    check_count(request.ids, "ids", IDS_MAX)
    known = engine.resyncs()
    ids = [found_in(known, check_id(one, f"ids[{at}]")).id for at, one in enumerate(request.ids)]
    volumes = Names.of(engine).some_volumes(request.volumes)
    every = not ids and not volumes
    active = sorted(
        (one for one in known.values() if not one.state.final and (every or one.volume in volumes)),
        key=lambda one: (one.volume, one.node, one.id),
    )
    return dict.fromkeys([*ids, *(one.id for one in active)])


async def watch_events(
    office: Office, request: api.WatchEventsRequest, context: aio.ServicerContext[object, object]
) -> AsyncGenerator[api.WatchEventsResponse, None]:
    """Events after a sequence, from the oldest, or from now on. What is no longer kept is OUT_OF_RANGE.

    The first message comes at once, so that whoever has nothing yet knows what to go on after.
    """
    names = Names.of(office.engine())
    if request.volume and not request.after_sequence:
        names.volume(request.volume)
    if request.node and not request.after_sequence:
        names.node(request.node)
    # Who goes on has asked for them before, and what is removed, or has not come back yet, has events all the same.
    wanted = about(request.volume, request.node)
    span = office.events_span()
    if request.from_oldest and request.after_sequence:
        raise Invalid("INVALID_FIELD", "from_oldest and after_sequence exclude each other", field="from_oldest")
    after = request.after_sequence or (span.gone if request.from_oldest else span.newest)
    if after > span.newest:
        await context.abort(
            grpc.StatusCode.OUT_OF_RANGE,
            f"this store has never had an event {after}, its newest one is {span.newest}: it was put back to an older "
            "copy. List what there is, or watch from 0 for what comes",
        )
    due = KeepAlive()
    with office.watch() as watch:
        while True:
            gone = office.events_span().gone
            if after < gone:
                await context.abort(
                    grpc.StatusCode.OUT_OF_RANGE,
                    f"events after {after} are no longer kept, those after {gone} are. List what there is, or watch "
                    "from 0 for what comes",
                )
            events = office.events_after(after)
            parts = due.at_least(list(chunks(event_to_proto(event) for event in events if wanted(event))))
            after = events[-1].sequence if events else after
            now_time = time_to_proto(office.now_ms())
            for at, part in enumerate(parts):
                up_to = after if at == len(parts) - 1 else part[-1].sequence
                yield api.WatchEventsResponse(events=part, now_time=now_time, up_to_sequence=up_to)
            await asyncio.sleep(PUSH_INTERVAL_S)
            await watch.next(KEEPALIVE_S)


def _digest(message: volume_pb2.Volume) -> bytes:
    """Of everything but the times that pass by themselves."""
    lasting = volume_pb2.Volume()
    lasting.CopyFrom(message)
    for replica in lasting.replicas:
        replica.ClearField("report_time")
        replica.ClearField("behind_duration")
    return hashlib.sha256(lasting.SerializeToString(deterministic=True)).digest()


@contextlib.asynccontextmanager
async def while_leading(answers: AsyncGenerator[M, None]) -> AsyncIterator[AsyncGenerator[M, None]]:
    """The same stream, closed at the end of the block.

    The end of the reign is for the client what any absence of a leader is: to be tried again.
    """
    try:
        async with contextlib.aclosing(answers):
            yield answers
    except Conflict as error:
        raise Unavailable("NO_LEADER", f"this coordinator has ceased to lead: {error.message}") from error
