"""A transfer from several sources at once: who has a turn, who is too slow, and how it ends.

The rules:

* Each source has one turn, and whoever holds it talks to the source; a source that is alone and has much to give has
  two, because one connection is one processor at either end. There are at most `LANES_MAX` lanes; what is beyond is in
  reserve, in the order given.
* Work is taken as it is done, so the faster gives more. Where nothing is left to take, a lane that has long to go on
  what it was given loses it to those who wait (`SLOW_S`).
* A source that is away gets its turn again after a pause that grows while it brings nothing.
* The transfer ends when all is done; by an error of its own side, at once; with the reason why no source is left; or
  after `idle_timeout_s` without one good frame, not counting the time in which this side's own disk or cap holds it up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from agent.stream.counters import Counters
from agent.stream.lane import Desk, Lane
from agent.stream.link import TICK_S, SourceAddress
from agent.stream.rounds import PROGRESS_S, backoff_s
from agent.stream.work import Stopped

LANES_MAX: Final = 4
ALONE_TWICE_BYTES: Final = 64 << 20
SLOW_S: Final = 3.0


@dataclass(slots=True)
class Turn:
    """The right to talk to a source, from `not_before` on (monotonic seconds)."""

    source: SourceAddress
    not_before: float = 0.0
    fruitless: int = 0


class Lanes:
    """`run` is for the transfer's own thread, everything else for the lanes."""

    def __init__(
        self,
        desk: Desk,
        sources: Sequence[SourceAddress],
        *,
        left_bytes: int,
        on_progress: Callable[[Counters], None],
        stop: threading.Event,
        idle_timeout_s: float,
    ) -> None:
        self._desk: Final = desk
        self._on_progress: Final = on_progress
        self._stop: Final = stop
        self._idle_timeout_s: Final = idle_timeout_s
        self._changed: Final = threading.Condition()
        twice = len(sources) == 1 and left_bytes > ALONE_TWICE_BYTES
        self._turns = [Turn(source) for source in (*sources, *sources[: int(twice)])]
        count = min(LANES_MAX, len(self._turns))
        self._lanes = [Lane(desk, self, number, share=count) for number in range(count)]
        self._ended = False
        self._error: BaseException | None = None
        self._is_good = False
        self._idle_s = 0.0

    def run(self) -> None:
        """Returns when all work is finished; raises what has ended it otherwise."""
        try:
            for lane in self._lanes:
                lane.thread.start()
            at = told = time.monotonic()
            self._on_progress(self._desk.meter.read())
            while not self._desk.work.complete and self._error is None:
                self._check_sources()
                with self._changed:
                    self._changed.wait(TICK_S)
                now = time.monotonic()
                self._count_idle(now - at)
                self._cut_slow(now)
                at = now
                if now - told >= PROGRESS_S:
                    told = now
                    self._on_progress(self._desk.meter.read())
                if self._stop.is_set():
                    raise Stopped
        finally:
            self.end(None)
            for lane in self._lanes:
                if lane.thread.ident is not None:
                    lane.thread.join()
        if self._error is not None:
            raise self._error

    # For the lanes.

    def next_turn(self) -> Turn | None:
        """Waits until there is work and a source for it; None when the transfer is over."""
        with self._changed:
            while not self._ended and not self._desk.work.complete:
                now = time.monotonic()
                due = self._due(now) if self._desk.work.left else []
                if due:
                    self._turns.remove(due[0])
                    return due[0]
                self._changed.wait(TICK_S)
            self._changed.notify_all()
            return None

    def give_back(self, turn: Turn) -> None:
        """There was nothing left to take."""
        turn.fruitless, turn.not_before = 0, 0.0
        with self._changed:
            self._turns.append(turn)
            self._changed.notify_all()

    def failed(self, turn: Turn, *, fruitful: bool) -> None:
        """The source failed; what was known against it has been noted."""
        turn.fruitless = 1 if fruitful else turn.fruitless + 1
        turn.not_before = time.monotonic() + backoff_s(turn.fruitless)
        with self._changed:
            self._turns.append(turn)
            self._changed.notify_all()

    def good(self) -> None:
        """Good frames have come."""
        self._is_good = True

    def check(self) -> None:
        """Stopped if the transfer is over."""
        if self._ended or self._stop.is_set():
            raise Stopped

    def end(self, error: BaseException | None) -> None:
        """Ends all lanes; the first error is the transfer's."""
        with self._changed:
            if self._error is None and not isinstance(error, Stopped):
                self._error = error
            self._ended = True
            self._changed.notify_all()

    def _due(self, now: float) -> list[Turn]:
        alive = self._desk.sources.alive
        return [turn for turn in self._turns if turn.not_before <= now and turn.source in alive]

    def _check_sources(self) -> None:
        sources = self._desk.sources
        if not sources.alive:
            raise sources.no_source("no source is left")
        if self._idle_s >= self._idle_timeout_s:
            raise sources.no_source(f"no source has sent anything for {self._idle_timeout_s:g} seconds")

    def _count_idle(self, passed_s: float) -> None:
        was_good, self._is_good = self._is_good, False
        if was_good:
            self._idle_s = 0.0
        elif not any(lane.busy for lane in self._lanes):
            self._idle_s += passed_s

    def _cut_slow(self, now: float) -> None:
        """Where others wait for work, nobody may sit on it."""
        if self._desk.work.left:
            return
        with self._changed:
            waiting = {turn.source for turn in self._due(now)}
        for lane in self._lanes:
            if waiting - {lane.source} and lane.left_s(now, lanes=len(self._lanes)) > SLOW_S:
                lane.cut()
