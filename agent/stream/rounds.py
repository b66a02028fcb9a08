"""Whom a transfer may still ask, and what is known against each.

* A source that is away (closed, silent, stopping) is passed over and asked again in the next round, after a pause that
  grows from round to round. One that says that it has not what is wanted, or whose frames came damaged three times, is
  not asked again in this run.
* Whatever happens, the run ends: with the reason why no source is left, or after `idle_timeout_s` of waiting without
  one good frame. Time is counted only while waiting for somebody.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from agent.stream.counters import Counters, Meter
from agent.stream.link import SourceAddress, SourceFailed, Verdict
from agent.stream.work import Stopped
from resilver.errors import Damaged, ResilverError, Unavailable, error_for

DAMAGED_FRAMES_MAX: Final = 3
BACKOFF_FIRST_S: Final = 0.2
BACKOFF_MAX_S: Final = 5.0
PROGRESS_S: Final = 0.25
IDLE_TIMEOUT_S: Final = 600.0
SILENCE_TIMEOUT_S: Final = 6.0
"""A source that lives says something every two seconds, also while its disk is slow."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SourceProblem:
    """Why a source was left, for good or for now."""

    node: str
    reason: str
    message: str


class Rounds:
    """The sources of one transfer. `on_progress` is called from the transfer's thread."""

    def __init__(
        self,
        sources: Sequence[SourceAddress],
        meter: Meter,
        *,
        on_progress: Callable[[Counters], None],
        stop: threading.Event,
        idle_timeout_s: float,
    ) -> None:
        self.alive: Final = list(sources)
        self.problems: Final[dict[str, SourceProblem]] = {}
        self._meter: Final = meter
        self._on_progress: Final = on_progress
        self._stop: Final = stop
        self._idle_timeout_s: Final = idle_timeout_s
        self._damaged = dict.fromkeys(sources, 0)
        self._idle_s = 0.0
        self._told = 0.0

    def check(self) -> None:
        """Raises why the transfer cannot go on, if it cannot."""
        if not self.alive:
            raise self._no_source("no source is left")
        if self._idle_s >= self._idle_timeout_s:
            raise self._no_source(f"no source has sent anything for {self._idle_timeout_s:g} seconds")

    def good(self) -> None:
        """A frame came that was what it should be."""
        self._idle_s = 0.0

    def leave(self, source: SourceAddress, failed: SourceFailed) -> None:
        """Notes why a source failed, and whether it may be asked again."""
        error = failed.error
        gone = failed.verdict is Verdict.GONE
        if failed.verdict is Verdict.DAMAGED:
            self._damaged[source] += 1
            gone = self._damaged[source] >= DAMAGED_FRAMES_MAX
            if gone:
                error = Damaged(
                    "SOURCE_DAMAGED", f"{DAMAGED_FRAMES_MAX} frames of {source.node} came damaged", node=source.node
                )
        problem = SourceProblem(source.node, error.reason, error.message)
        if self.problems.get(source.node) != problem:
            log.warning("stream.source_left", source=source.node, reason=error.reason, why=error.message, for_good=gone)
        self.problems[source.node] = problem
        if gone:
            self.alive.remove(source)

    def damaged_payload(self, source: SourceAddress, error: Damaged) -> None:
        """The stream is still in step: the same connection is asked again, unless it has been so too often."""
        if self._damaged[source] + 1 >= DAMAGED_FRAMES_MAX:
            raise SourceFailed(Verdict.DAMAGED, error)
        self._damaged[source] += 1
        self.problems[source.node] = SourceProblem(source.node, error.reason, error.message)

    def pause(self, rounds: int) -> None:
        """Waits before another round; longer each time, and not in step with others that wait."""
        longest = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(rounds - 1, 16))
        jittered = longest * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
        started = time.monotonic()
        self._stop.wait(min(jittered, max(0.0, self._idle_timeout_s - self._idle_s)))
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

    def _no_source(self, why: str) -> ResilverError:
        """The error that ends a run without sources: the one reason they all gave, or the gravest word for many."""
        told = list(self.problems.values())
        text = "; ".join(f"{problem.node}: {problem.message}" for problem in told) or "none was given"
        reasons = {problem.reason for problem in told}
        reason = "NO_SOURCE"
        if not self.alive and len(reasons) == 1:
            reason = reasons.pop()
        elif not self.alive and "SOURCE_DAMAGED" in reasons:
            reason = "SOURCE_DAMAGED"
        return error_for(reason, f"{why}: {text}", sources=",".join(problem.node for problem in told))
