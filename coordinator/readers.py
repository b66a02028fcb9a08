"""Who waits for a reign: watchers, the streams of agents, and readers that wait for a commit.

The rules:

* A reader is shown what is stored: while a commit is under way the engine knows more than the store, and what it knows
  may yet be lost with the reign. So reading waits, and reads in the moment in which the commit is done.
* Nothing waits without a bound, and nothing queues without one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Final, Self

from coordinator.core.events import Changed, RefuseAgent, SendExamine, SendRecord
from resilver.errors import Exhausted, ResilverError, Unavailable

OUTBOX_MAX: Final = 10_000
STORED_WITHIN_S: Final = 10.0
"""How long a reader waits for a commit; a store that takes longer has all but ended the reign."""


class Readers:
    """Those that wait until what the engine shows is stored.

    `storing` is set before a commit, and `stored` says when all is done. `woken`: somebody was answered in this step.
    """

    def __init__(self) -> None:
        self.storing = False
        self.woken = False
        self._waiting: set[asyncio.Future[None]] = set()
        self._ended: ResilverError | None = None

    async def wait(self) -> None:
        """Returns while all is stored. Raises STORE_UNAVAILABLE after `STORED_WITHIN_S`, and what ended the reign."""
        if self._ended is not None:
            raise self._ended
        if not self.storing:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            async with asyncio.timeout(STORED_WITHIN_S):
                await future
        except TimeoutError:
            said = f"the store has not taken a change within {STORED_WITHIN_S:g} s, so what is so is not known"
            raise Unavailable("STORE_UNAVAILABLE", said) from None
        finally:
            self._waiting.discard(future)

    def stored(self) -> bool:
        """Wakes those that wait; whether anybody reads now, for which the loop is to make room."""
        self.storing = False
        waked = self.woken or bool(self._waiting)
        self.woken = False
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        return waked

    def end(self, error: ResilverError) -> None:
        self._ended = error
        for future in self._waiting:
            if not future.done():
                future.set_exception(error)


class Watcher:
    """Merges what changed since it was last asked."""

    def __init__(self, release: Callable[[Watcher], None]) -> None:
        self._release = release
        self._volumes: set[str] = set()
        self._resyncs: set[str] = set()
        self._woken = asyncio.Event()
        self._ended: ResilverError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._release(self)

    def add(self, changed: Changed) -> None:
        self._volumes |= changed.volumes
        self._resyncs |= changed.resyncs
        self._woken.set()

    def end(self, error: ResilverError) -> None:
        self._ended = error
        self._woken.set()

    async def next(self, timeout_s: float) -> Changed | None:
        """What changed, or None after the timeout; raises what ended the reign."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        if self._ended is not None:
            raise self._ended
        if not self._woken.is_set():
            return None
        self._woken.clear()
        changed = Changed(frozenset(self._volumes), frozenset(self._resyncs))
        self._volumes.clear()
        self._resyncs.clear()
        return changed


class Outbox:
    """What is to be sent to one agent's stream."""

    def __init__(self) -> None:
        self._queue: deque[SendExamine | SendRecord | RefuseAgent] = deque()
        self._ended: ResilverError | None = None
        self._woken = asyncio.Event()

    def put(self, message: SendExamine | SendRecord | RefuseAgent) -> None:
        if len(self._queue) < OUTBOX_MAX:
            self._queue.append(message)
            self._woken.set()
        else:
            self.end(Exhausted("TOO_LARGE", "the agent does not take what is sent to it"))

    def end(self, error: ResilverError) -> None:
        self._ended = error
        self._woken.set()

    async def get(self) -> SendExamine | SendRecord | RefuseAgent:
        """The next message; raises what ended the stream, once everything before it was taken."""
        while not self._queue:
            if self._ended is not None:
                raise self._ended
            self._woken.clear()
            await self._woken.wait()
        return self._queue.popleft()
