"""What a transfer has moved so far: one owner counts, everybody else gets a frozen copy.

`done_bytes` counts data bytes that are in the stage (journaled, or received and checked): it never falls and never
exceeds `total_bytes`. `wire_bytes` counts everything that came in on the sockets. `resent_bytes` counts the volume's
bytes that had to be asked for again because they came damaged; what a crash has cost is added by whoever goes on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from resilver.volume import SourceShare

RATE_WINDOW_S: Final = 5.0
_SAMPLE_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class Counters:
    """One look at a transfer; `sources` are in the order in which they were given."""

    done_bytes: int = 0
    total_bytes: int = 0
    wire_bytes: int = 0
    resent_bytes: int = 0
    sources: tuple[SourceShare, ...] = ()


class Rate:
    """Bytes per second over the last few seconds, from samples a quarter of a second apart."""

    def __init__(self) -> None:
        self.total = 0
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, count: int, now: float) -> None:
        if not self._samples or now - self._samples[-1][0] >= _SAMPLE_S:
            self._samples.append((now, self.total))
        self.total += count

    def per_second(self, now: float) -> int:
        # The newest sample from before the window stays, or a slow source would seem to stand still.
        while len(self._samples) > 1 and self._samples[1][0] <= now - RATE_WINDOW_S:
            self._samples.popleft()
        if not self._samples:
            return 0
        since, before = self._samples[0]
        return int((self.total - before) / max(now - since, _SAMPLE_S))


class Meter:
    """Counts; usable from several threads."""

    def __init__(self, nodes: Sequence[str], *, done_bytes: int, total_bytes: int, clock: Callable[[], float]) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._done = done_bytes
        self._total = total_bytes
        self._resent = 0
        self._rates = {node: Rate() for node in nodes}

    def came(self, node: str, count: int) -> None:
        """Bytes read from a source's socket."""
        with self._lock:
            self._rates[node].add(count, self._clock())

    def done(self, count: int) -> None:
        """Data bytes written to the stage for the first time."""
        with self._lock:
            self._done += count

    def resent(self, count: int) -> None:
        """Data bytes that came damaged."""
        with self._lock:
            self._resent += count

    def read(self) -> Counters:
        with self._lock:
            now = self._clock()
            shares = tuple(SourceShare(node, rate.total, rate.per_second(now)) for node, rate in self._rates.items())
            wire = sum(share.wire_bytes for share in shares)
            return Counters(self._done, self._total, wire, self._resent, shares)
