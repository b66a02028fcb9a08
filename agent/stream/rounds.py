"""Sources that are asked one after another, each when the one before it has failed: for a stream of one source.

* A source that is away is passed over and asked again in the next round, after a pause that grows from round to round.
* Whatever happens, the run ends: with the reason why no source is left, or after `idle_timeout_s` of waiting without
  one good frame. Time is counted only while waiting for somebody.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from agent.stream.counters import Counters, Meter
from agent.stream.link import SourceAddress, SourceFailed, Verdict
from agent.stream.sources import Sources
from agent.stream.work import Stopped
from resilver.errors import Unavailable

BACKOFF_FIRST_S: Final = 0.2
BACKOFF_MAX_S: Final = 5.0
PROGRESS_S: Final = 0.25
IDLE_TIMEOUT_S: Final = 600.0
SILENCE_TIMEOUT_S: Final = 6.0
"""A source that lives says something every two seconds, also while its disk is slow."""


def backoff_s(rounds: int) -> float:
    """How long to wait before another try: longer each time, and not in step with others that wait."""
    longest: float = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(rounds - 1, 16))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311  # no secret


class Rounds:
    """The turns of one transfer. `on_progress` is called from the transfer's thread."""

    def __init__(
        self,
        sources: Sequence[SourceAddress],
        meter: Meter,
        *,
        on_progress: Callable[[Counters], None],
        stop: threading.Event,
        idle_timeout_s: float,
    ) -> None:
        self.sources: Final = Sources(sources)
        self._meter: Final = meter
        self._on_progress: Final = on_progress
        self._stop: Final = stop
        self._idle_timeout_s: Final = idle_timeout_s
        self._idle_s = 0.0
        self._told = 0.0

    def check(self) -> None:
        """Raises why the transfer cannot go on, if it cannot."""
        if not self.sources.alive:
            raise self.sources.no_source("no source is left")
        if self._idle_s >= self._idle_timeout_s:
            raise self.sources.no_source(f"no source has sent anything for {self._idle_timeout_s:g} seconds")

    def good(self) -> None:
        """A frame came that was what it should be."""
        self._idle_s = 0.0

    def pause(self, rounds: int) -> None:
        """Waits before another round."""
        started = time.monotonic()
        self._stop.wait(min(backoff_s(rounds), max(0.0, self._idle_timeout_s - self._idle_s)))
        self._idle_s += time.monotonic() - started
        self.tick()

    def waited(self, seconds: float) -> None:
        """After every wait for a source; ends the wait for one that trickles."""
        self._idle_s += seconds
        self.tick()
        if self._idle_s >= self._idle_timeout_s:
            raise SourceFailed(Verdict.AWAY, Unavailable("DEADLINE", "no whole frame came for too long"))

    def tick(self) -> None:
        """Tells progress now and then, and notices a stop."""
        now = time.monotonic()
        if now - self._told >= PROGRESS_S:
            self._told = now
            self._on_progress(self._meter.read())
        if self._stop.is_set():
            raise Stopped
