"""One reign of this coordinator: an engine, the queue in front of it, and the one loop between the two.

The loop takes an event, steps the engine, and runs the actions in order. A Persist that fails, or whose outcome is
unknown, ends the reign: the engine is dropped with everything that it believed, and the next reign reads the store.
No order leaves once the leadership's own clock says that the lease can have ended. An event is shown once it is stored:
what a reader has seen, the next leader knows too.

A commit takes a while, and events go on coming: those that wait when something is to be stored are stepped as well, and
all that they store is committed together, before anything that any of them does. So what is stored before what acts on
it stays so, and a thousand agents that report at once cost some hundred commits, not ten thousand.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog

from coordinator import counters, records
from coordinator.agents import Agents
from coordinator.core.audited import Asked, AuditEntry, AuditResult
from coordinator.core.cluster import ClusterEvent
from coordinator.core.context import Identity, Settings
from coordinator.core.engine import Engine
from coordinator.core.events import (
    Action,
    Answer,
    Changed,
    Event,
    GiveOrder,
    Persist,
    RaiseTerm,
    Recorded,
    RefuseAgent,
    Requested,
    SendExamine,
    SendRecord,
    Tell,
    Ticked,
)
from coordinator.core.history import EVENTS_MAX
from coordinator.core.requests import Request
from coordinator.readers import Outbox, Readers, Watcher
from coordinator.store.base import ABSENT, WRITES_MAX, Json, Reign, Store, Write
from resilver.errors import Conflict, Exhausted, ResilverError, Unavailable

log = structlog.get_logger()

QUEUE_MAX: Final = 20_000
STEPS_AT_ONCE_MAX: Final = 64
WATCHES_MAX: Final = 1000
COMMIT_CHARS_MAX: Final = 256 << 10
"""How much goes into one commit of many: far below what the store takes, however the characters are written."""
TICK_S: Final = 1.0
SERVE_EVERY_S: Final = 0.005


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Span:
    """Which events are kept: those after `gone`, up to `newest`; both 0 if there has never been one."""

    gone: int
    newest: int


def in_commits(persists: Iterable[Persist]) -> Iterator[dict[str, Json | None]]:
    """What to write in each commit, in order: as many Persists as go into one, and each of them whole.

    Of a record that is written several times only the last is. One that is too large for a commit by itself is still
    given out: the store says so.
    """
    together: dict[str, Json | None] = {}
    chars = 0
    for persist in persists:
        values = {records.key_of(kept): records.to_json(kept) for kept in persist.records}
        more = sum(len(repr(value)) for value in values.values())
        if together and (len(together.keys() | values.keys()) > WRITES_MAX or chars + more > COMMIT_CHARS_MAX):
            yield together
            together, chars = {}, 0
        together.update(values)
        chars += more
    if together:
        yield together


def _without_a_clock(ticking: asyncio.Task[None]) -> ResilverError:
    """What ends a reign whose clock has died."""
    error = None if ticking.cancelled() else ticking.exception()
    log.error("the clock of the reign has stopped", exc_info=error)
    return Conflict("LEADERSHIP_LOST", f"the clock of this reign has stopped: {error!r}")


def _log_order(entry: AuditEntry) -> None:
    """One line for each order that was answered, and for each kind of refusal when it is entered."""
    names = ("principal", "address", "node", "request", "reason", "message")
    about = {name: value for name in names if (value := getattr(entry, name))}
    if entry.volumes:
        about["volumes"] = list(entry.volumes)
    if entry.count > 1:
        about["count"] = entry.count
    say = log.warning if entry.result is AuditResult.REFUSED else log.info
    say("audit", method=entry.method, result=entry.result.value, sequence=entry.sequence, **about)


class CurrentReign:
    """An engine at work. `run` returns never; it raises what ended the reign."""

    def __init__(
        self, store: Store, reign: Reign, agents: Agents, *, settings: Settings, cluster: str, store_id: str
    ) -> None:
        self._store = store
        self._reign = reign
        self._agents = agents
        self._settings = settings
        self._cluster = cluster
        self._store_id = store_id
        self._revisions: dict[str, int] = {}
        self._history: deque[ClusterEvent] = deque(maxlen=EVENTS_MAX)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._ticks_wait = False
        self._readers = Readers()
        self._asked: dict[str, asyncio.Future[object]] = {}
        self._watchers: set[Watcher] = set()
        self._outboxes: dict[str, Outbox] = {}
        self._orders: set[asyncio.Task[None]] = set()
        self._ended: ResilverError | None = None
        self.engine: Engine
        self.term_wanted = 0

    async def load(self) -> None:
        """Reads everything that the store holds. Raises STORE_UNAVAILABLE, IO_ERROR."""
        stored = await self._store.read_all()
        self._revisions = {key: one.revision for key, one in stored.items()}
        leader = self._reign.leader
        identity = Identity(self._cluster, self._store_id, leader.term, leader.leader_id, leader.name)
        loaded = records.load(stored)
        self.engine = Engine(
            identity,
            self._settings,
            loaded,
            now_ms(),
            lambda: str(uuid.uuid4()),
            new_ticket=lambda: secrets.token_hex(16),
            check=records.check,
        )
        self._history.extend(self.engine.events())

    async def run(self, still_leading: Callable[[], bool]) -> None:
        """The one loop."""
        ticking = asyncio.create_task(self._tick())
        # Without a clock no deadline is ever seen: an event, so that the loop looks at once.
        ticking.add_done_callback(lambda _: self._post_own(Ticked()))
        loop = asyncio.get_running_loop()
        served_at = loop.time()
        try:
            while True:
                event = await self._events.get()
                # A queue that is never empty must not keep gRPC from being served.
                if loop.time() - served_at > SERVE_EVERY_S:
                    await asyncio.sleep(0)
                    served_at = loop.time()
                if ticking.done():
                    raise _without_a_clock(ticking)
                actions = self._step(event)
                for together in in_commits(action for action in actions if isinstance(action, Persist)):
                    self._check_leading(still_leading)
                    self._readers.storing = True
                    await self._commit(together)
                for action in actions:
                    self._check_leading(still_leading)
                    self._do(action)
                if self.term_wanted:
                    raise Conflict("LEADERSHIP_LOST", f"an agent has obeyed term {self.term_wanted} already")
                if self._readers.stored():
                    await asyncio.sleep(0)  # they read now, before the next step has anything that is not stored
        finally:
            ticking.cancel()

    def _step(self, event: Event) -> list[Action]:
        """The actions of an event; where something is to be stored, also those of the events that wait behind it."""
        actions = self._stepped(event)
        newest, stores = actions, False
        for _ in range(STEPS_AT_ONCE_MAX):
            stores = stores or any(isinstance(action, Persist) for action in newest)
            # After a term that is to be raised nothing more is decided.
            if not stores or self._events.empty() or any(isinstance(action, RaiseTerm) for action in newest):
                break
            newest = self._stepped(self._events.get_nowait())
            actions = actions + newest
        return actions

    def _stepped(self, event: Event) -> list[Action]:
        if isinstance(event, Ticked):
            self._ticks_wait = False
        return self.engine.step(event, now_ms())

    @staticmethod
    def _check_leading(still_leading: Callable[[], bool]) -> None:
        if not still_leading():
            raise Conflict("LEADERSHIP_LOST", "the lease of the leadership may have ended")

    def end(self, error: ResilverError) -> None:
        """Tells everybody who waits for this reign that it is over."""
        self._ended = error
        self._readers.end(error)
        for future in self._asked.values():
            if not future.done():
                future.set_exception(error)
        for watcher in self._watchers:
            watcher.end(error)
        for outbox in self._outboxes.values():
            outbox.end(error)
        for order in self._orders:
            order.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if not self._ticks_wait:
                self._ticks_wait = True
                self._post_own(Ticked())

    def post(self, event: Event) -> None:
        """Hands an event to the loop; an overfull queue refuses with TOO_LARGE."""
        if self._events.qsize() >= QUEUE_MAX:
            raise Exhausted("TOO_LARGE", "the coordinator is behind with what it is told; try again")
        self._events.put_nowait(event)

    def _post_own(self, event: Event) -> None:
        """What nobody would say again: at most one tick, and the answer of each order that was given."""
        self._events.put_nowait(event)

    async def ask(self, request: Request, timeout_s: float, asked: Asked | None = None) -> object:
        """What the engine answers; raises the error that it answers. `asked` is for the audit trail."""
        if self._ended is not None:
            raise self._ended
        key = str(uuid.uuid4())
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._asked[key] = future
        try:
            self.post(Requested(key, request, asked))
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise Unavailable("DEADLINE", f"no answer within {timeout_s:g} s; the work goes on") from None
        finally:
            del self._asked[key]

    async def settled(self) -> Engine:
        """The engine in a moment in which all that it shows is stored, to be read before anything is awaited.

        Raises STORE_UNAVAILABLE if that takes the store too long, and what ended the reign.
        """
        await self._readers.wait()
        return self.engine

    def watch(self) -> Watcher:
        if len(self._watchers) >= WATCHES_MAX:
            said = f"{len(self._watchers)} watches are open, which is all that are served; end one, or ask without one"
            raise Exhausted("TOO_LARGE", said)
        watcher = Watcher(self._watchers.discard)
        self._watchers.add(watcher)
        return watcher

    def open_stream(self, stream: str) -> Outbox:
        outbox = Outbox()
        self._outboxes[stream] = outbox
        return outbox

    def close_stream(self, stream: str) -> None:
        self._outboxes.pop(stream, None)

    def events_after(self, sequence: int) -> list[ClusterEvent]:
        """What is stored and comes after that one, oldest first."""
        found = list(itertools.takewhile(lambda event: event.sequence > sequence, reversed(self._history)))
        found.reverse()
        return found

    def span(self) -> Span:
        if not self._history:
            return Span(0, 0)
        return Span(self._history[0].previous, self._history[-1].sequence)

    # ------------------------------------------------------------ actions

    def _do(self, action: Action) -> None:
        match action:
            case Persist():
                counters.stored(action.records)  # before any of them was carried out
            case GiveOrder():
                self._spawn(self._give(action))
            case SendExamine() | SendRecord() | RefuseAgent():
                outbox = self._outboxes.get(action.stream)
                if outbox is not None:
                    outbox.put(action)
            case Answer():
                self._settle(action)
            case Tell() | Recorded():
                self._told(action)
            case Changed():
                for watcher in self._watchers:
                    watcher.add(action)
            case RaiseTerm():
                self.term_wanted = max(self.term_wanted, action.above)

    async def _commit(self, values: Mapping[str, Json | None]) -> None:
        writes = [Write(key, value, self._revisions.get(key, ABSENT)) for key, value in values.items()]
        revision = await self._store.commit(self._reign, writes)
        for key, value in values.items():
            if value is None:
                self._revisions.pop(key, None)
            else:
                self._revisions[key] = revision

    def _settle(self, action: Answer) -> None:
        future = self._asked.get(action.key)
        if future is None or future.done():
            return
        self._readers.woken = True
        if isinstance(action.answer, ResilverError):
            future.set_exception(action.answer)
        else:
            future.set_result(action.answer)

    def _told(self, action: Tell | Recorded) -> None:
        if isinstance(action, Recorded):
            _log_order(action.entry)
            return
        event = action.event
        self._history.append(event)
        names = ("volume", "node", "resync", "reason", "principal")
        about = {name: value for name in names if (value := getattr(event, name))}
        log.info(event.message, event_type=event.type, sequence=event.sequence, **about)
        for watcher in self._watchers:
            watcher.add(Changed())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)

    async def _give(self, action: GiveOrder) -> None:
        self._post_own(await self._agents.carry(action))

    async def export(self) -> AsyncIterator[bytes]:
        """Every record of the store as JSON lines, for a backup or a look; secrets are left out."""
        for key, stored in (await self._store.read_all()).items():
            value = records.without_secrets(key, stored.value)
            yield json.dumps({"key": key, "value": value}, sort_keys=True).encode() + b"\n"
