"""So many at once: the higher priority first, and among equals the first come."""

from __future__ import annotations

import heapq
import itertools
import threading

from agent.stream.work import Stopped


class Slots:
    """The bound may change while some wait."""

    def __init__(self, count_max: int) -> None:
        self._turn = threading.Condition()
        self._count_max = count_max
        self._count = 0
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, int]] = []
        """A heap of (minus the priority, number)."""

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def resize(self, count_max: int) -> None:
        with self._turn:
            self._count_max = count_max
            self._turn.notify_all()

    def take(self, stop: threading.Event, priority: int = 0) -> None:
        """Returns with a slot; Stopped if `stop` is set first."""
        with self._turn:
            me = (-priority, next(self._numbers))
            heapq.heappush(self._waiting, me)
            try:
                while self._waiting[0] is not me or self._count >= self._count_max:
                    self._turn.wait(0.2)
                    if stop.is_set():
                        raise Stopped
                self._count += 1
            finally:
                self._waiting.remove(me)
                heapq.heapify(self._waiting)
                self._turn.notify_all()

    def give_back(self) -> None:
        with self._turn:
            self._count -= 1
            self._turn.notify_all()
