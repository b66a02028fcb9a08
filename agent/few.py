"""So many disks are looked at at once, and one that hangs takes nobody's place.

A node may have thousands of volumes: all at once would be thousands of threads, and no look would end any sooner. One
that has taken longer than a second is not counted any more: its disk hangs, or its volume has to be read through, and
the others need not wait for that.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, TypeVar

from resilver.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from agent.worker import Worker

T = TypeVar("T")

COUNTED_S: Final = 1.0
PACE_S: Final = 0.005
"""Between one look that nobody asked for and the next: on a node with very many volumes they come round less often."""


class Few:
    """Belongs to the event loop."""

    def __init__(self, at_once: int, *, counted_s: float = COUNTED_S) -> None:
        self._places: Final = asyncio.Semaphore(at_once)
        self._counted_s: Final = counted_s

    async def begin(self, worker: Worker, job: Callable[[], Future[T]]) -> asyncio.Future[T] | None:
        """Waits for a place and begins a job of the worker, which is not waited for; None if it cannot be taken."""
        if worker.busy_s > self._counted_s:  # whatever it is at, this one waits for that
            with contextlib.suppress(Unavailable):
                return asyncio.wrap_future(job())
            return None
        await self._places.acquire()
        try:
            future = asyncio.wrap_future(job())
        except Unavailable:
            self._places.release()
            return None
        except BaseException:
            self._places.release()
            raise
        held = [None]

        def release(_: object = None) -> None:
            if held:
                held.clear()
                self._places.release()

        timer = asyncio.get_running_loop().call_later(self._counted_s, release)
        future.add_done_callback(lambda _: timer.cancel())
        future.add_done_callback(release)
        return future
