"""A cap on what a node sends, or on what it receives: one bucket for each, which all of its transfers share.

The rules:

* Each connection has a share. It moves at most a piece of bytes (`room`), pays for them, and waits for its turn before
  it moves more (`spend`). Turns are taken in the order in which they were asked for and pieces are alike, so none of
  the connections starves, and each of those that are busy gets as much as the others.
* The cap holds over any few seconds: the bucket holds a tenth of a second's worth, and what all shares
  together have moved before they paid is half of that. Nothing else is saved up: no pause is followed by a burst.
* Pieces get smaller with the cap and with the number of shares. Whoever is at the other end of a slow connection sees
  a few bytes every moment, and never takes the wait for a node that hangs.
* What the kernel holds of a connection would come on top of it whenever one side pauses. Under a low cap a connection
  that is opened gets buffers of about a piece (`buffer_bytes`).
* The cap may change at any moment, also for those that wait.
* Whoever gives up waiting has had its bytes, and they are paid for by those that come after it.

`Bucket` is pure: the time is an argument. `Throttle` is what threads wait at.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

BURST_S: Final = 0.1
UNPAID_S: Final = 0.04
LOOK_S: Final = 0.25
BUFFER_S: Final = 0.05
BUFFER_BYTES_MIN: Final = 32 << 10
BUFFER_BYTES_MAX: Final = 4 << 20


class Bucket:
    """What may be moved, and whose turn it is. A cap of 0 is none. Not for several threads."""

    def __init__(self, bytes_s: int, now: float) -> None:
        self._bytes_s = bytes_s
        self._level = 0.0
        self._at = now
        self._turns: deque[tuple[object, int]] = deque()

    @property
    def bytes_s(self) -> int:
        return self._bytes_s

    def set(self, bytes_s: int, now: float) -> None:
        """Another cap; what was saved up under the one before is gone, and so is what was owed."""
        if bytes_s != self._bytes_s:
            self._bytes_s, self._level, self._at = bytes_s, 0.0, now

    def piece_bytes(self, shares: int) -> int:
        """How much each of so many shares may move before it pays."""
        return max(int(self._bytes_s * UNPAID_S / max(shares, 1)), 1)

    @property
    def first(self) -> object | None:
        """Whose turn it is."""
        return self._turns[0][0] if self._turns else None

    def ask(self, who: object, count: int) -> None:
        """Joins the end of the queue, once at a time."""
        self._turns.append((who, count))

    def wait_s(self, who: object, now: float) -> float:
        """0: it has paid, and is out of the queue. Otherwise it has to wait so long at least; inf: for its turn."""
        if not self._bytes_s:
            self.forget(who)
            return 0.0
        self._fill(now)
        first, count = self._turns[0]
        if first is not who:
            return math.inf
        # A piece of a cap that was higher may be more than the bucket ever holds: it is owed.
        lacking = min(count, self._bytes_s * BURST_S) - self._level
        if lacking > 0:
            return max(lacking, 1.0) / self._bytes_s
        self._turns.popleft()
        self._level -= count
        return 0.0

    def forget(self, who: object) -> None:
        """Leaves the queue, if it is in it, having moved what it asked for."""
        for turn in self._turns:
            if turn[0] is who:
                self._turns.remove(turn)
                self._level -= turn[1] if self._bytes_s else 0
                return

    def _fill(self, now: float) -> None:
        held = self._level + (now - self._at) * self._bytes_s
        self._level, self._at = min(held, self._bytes_s * BURST_S), now


class Throttle:
    """One direction of one node. `clock` must not go back."""

    def __init__(self, bytes_s: int = 0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock: Final = clock
        self._bucket: Final = Bucket(bytes_s, clock())
        self._mutex: Final = threading.Lock()
        self._shares: Final[set[Share]] = set()

    @property
    def bytes_s(self) -> int:
        """The cap; 0 is none."""
        return self._bucket.bytes_s

    def set(self, bytes_s: int) -> None:
        with self._mutex:
            self._bucket.set(bytes_s, self._clock())
            for share in self._shares:
                share.turn.notify()

    def share(self) -> Share:
        """For one more connection."""
        return Share(self, self._mutex)

    def opened(self, share: Share) -> None:
        with self._mutex:
            self._shares.add(share)

    def closed(self, share: Share) -> None:
        with self._mutex:
            self._shares.discard(share)

    def room(self, view: memoryview) -> memoryview:
        bytes_s = self._bucket.bytes_s
        return view[: self._bucket.piece_bytes(len(self._shares))] if bytes_s else view

    def buffer_bytes(self) -> int:
        size = int(self._bucket.bytes_s * BUFFER_S)
        return max(size // max(len(self._shares), 1), BUFFER_BYTES_MIN) if 0 < size < BUFFER_BYTES_MAX else 0

    def spend(self, share: Share, count: int, look: Callable[[], None]) -> None:
        if not self._bucket.bytes_s:
            return
        with self._mutex:
            self._bucket.ask(share, count)
        try:
            while self._waits(share):
                look()
        finally:
            with self._mutex:
                self._bucket.forget(share)
                if isinstance(first := self._bucket.first, Share):
                    first.turn.notify()

    def _waits(self, share: Share) -> bool:
        """Waits for a moment; False once it is paid."""
        with self._mutex:
            wait_s = self._bucket.wait_s(share, self._clock())
            if wait_s > 0:
                share.turn.wait(min(wait_s, LOOK_S))
            return wait_s > 0


class Share:
    """One connection's part of a throttle, from `open` to `close`; for one thread. `turn` is told when it has come."""

    def __init__(self, throttle: Throttle, mutex: threading.Lock) -> None:
        self._throttle: Final = throttle
        self.turn: Final = threading.Condition(mutex)

    def room(self, view: memoryview) -> memoryview:
        """As much of the view as may be moved before it is paid for; all of it if there is no cap."""
        return self._throttle.room(view)

    def buffer_bytes(self) -> int:
        """How much of it the kernel should hold; 0 is up to the kernel."""
        return self._throttle.buffer_bytes()

    def spend(self, count: int, look: Callable[[], None]) -> None:
        """Pays for what was moved; returns when more may be. Meanwhile `look` is called now and then, and may raise."""
        self._throttle.spend(self, count, look)

    def open(self) -> None:
        self._throttle.opened(self)

    def close(self) -> None:
        self._throttle.closed(self)
