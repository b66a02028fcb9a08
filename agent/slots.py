"""So many at once, in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque

from agent.stream.work import Stopped


class Slots:
    """The bound may change while some wait."""

    def __init__(self, count_max: int) -> None:
        self._turn = threading.Condition()
        self._count_max = count_max
        self._count = 0
        self._waiting: deque[object] = deque()

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def resize(self, count_max: int) -> None:
        with self._turn:
            self._count_max = count_max
            self._turn.notify_all()

    def take(self, stop: threading.Event) -> None:
        """Returns with a slot; Stopped if `stop` is set first."""
        me = object()
        with self._turn:
            self._waiting.append(me)
            try:
                while self._waiting[0] is not me or self._count >= self._count_max:
                    self._turn.wait(0.2)
                    if stop.is_set():
                        raise Stopped
                self._count += 1
            finally:
                self._waiting.remove(me)
                self._turn.notify_all()

    def give_back(self) -> None:
        with self._turn:
            self._count -= 1
            self._turn.notify_all()
