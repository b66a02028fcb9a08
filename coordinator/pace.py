"""How fast an agent may speak, and for how long it may be silent."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Self, TypeVar

from resilver.errors import Unavailable

M = TypeVar("M")


class Pace:
    """Lets a burst through, and then so many messages a second: the rest waits in the agent, by flow control."""

    def __init__(self, per_second: float, burst: float, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._left = burst
        self._at = clock()

    def wait_s(self, messages: float = 1.0) -> float:
        """Takes one, or what counts as so many, and answers how long to wait before it is used."""
        now = self._clock()
        self._left = min(self._left + (now - self._at) * self._per_second, self._burst) - messages
        self._at = now
        return max(-self._left / self._per_second, 0.0)


class Silence:
    """Ends what waits for messages once none has come for long. One timer does for all of them, of which a large
    cluster sends thousands a second.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._bound = asyncio.timeout(None)

    def heard(self) -> None:
        """A message has come; what is done with it is not the agent's silence."""
        self._heard_at = math.inf

    def listen(self) -> None:
        """The next one is waited for."""
        self._heard_at = self._loop.time()

    async def __aenter__(self) -> Self:
        await self._bound.__aenter__()
        self._timer = self._loop.call_later(self._timeout_s, self._look)
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._timer.cancel()
        try:
            await self._bound.__aexit__(*raised)  # type: ignore[arg-type]  # handed on as it came
        except TimeoutError as error:
            raise _not_heard("a heartbeat", self._timeout_s) from error

    def _look(self) -> None:
        left_s = self._heard_at + self._timeout_s - self._loop.time()
        if left_s <= 0:
            self._bound.reschedule(self._loop.time())
        else:
            self._timer = self._loop.call_later(min(left_s, self._timeout_s), self._look)


async def first_of(messages: AsyncIterator[M], timeout_s: float, what: str) -> M | None:
    """The first message, None if there is none. Raises `Unavailable("DEADLINE")`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await anext(messages, None)
    except TimeoutError as error:
        raise _not_heard(what, timeout_s) from error


def _not_heard(what: str, timeout_s: float) -> Unavailable:
    return Unavailable("DEADLINE", f"{what} was awaited for {timeout_s:g} s and did not come")
