"""Whom a transfer may still ask, and what is known against each.

A source that is away (closed, silent, stopping) may be asked again later. One that says that it has not what is wanted,
or whose frames came damaged three times, is not asked again in this run.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from agent.stream.link import SourceAddress, SourceFailed, Verdict
from resilver.errors import Damaged, ResilverError, error_for

DAMAGED_FRAMES_MAX: Final = 3

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SourceProblem:
    """Why a source was left, for good or for now."""

    node: str
    reason: str
    message: str


class Sources:
    """The sources of one transfer, in the order in which they were given; usable from several threads."""

    def __init__(self, sources: Sequence[SourceAddress]) -> None:
        self._lock: Final = threading.Lock()
        self._alive = tuple(sources)
        self._problems: dict[str, SourceProblem] = {}
        self._damaged = dict.fromkeys(sources, 0)

    @property
    def alive(self) -> tuple[SourceAddress, ...]:
        """Those that may still be asked, now or later."""
        return self._alive

    @property
    def problems(self) -> tuple[SourceProblem, ...]:
        """The last one of each source that had any."""
        with self._lock:
            return tuple(self._problems.values())

    def leave(self, source: SourceAddress, failed: SourceFailed) -> None:
        """Notes why a source failed, and whether it may be asked again."""
        error = failed.error
        with self._lock:
            gone = failed.verdict is Verdict.GONE
            if failed.verdict is Verdict.DAMAGED:
                self._damaged[source] += 1
                gone = self._damaged[source] >= DAMAGED_FRAMES_MAX
                if gone:
                    said = f"{DAMAGED_FRAMES_MAX} frames of {source.node} came damaged"
                    error = Damaged("SOURCE_DAMAGED", said, node=source.node)
            problem = SourceProblem(source.node, error.reason, error.message)
            is_new = self._problems.get(source.node) != problem
            if gone or source in self._alive:
                self._problems[source.node] = problem
            if gone:
                self._alive = tuple(one for one in self._alive if one != source)
        if is_new:
            log.warning("stream.source_left", source=source.node, reason=error.reason, why=error.message, for_good=gone)

    def damaged_payload(self, source: SourceAddress, error: Damaged) -> None:
        """The stream is still in step: the same connection is asked again, unless it has been so too often."""
        with self._lock:
            if self._damaged[source] + 1 >= DAMAGED_FRAMES_MAX:
                raise SourceFailed(Verdict.DAMAGED, error)
            self._damaged[source] += 1
            self._problems[source.node] = SourceProblem(source.node, error.reason, error.message)

    def no_source(self, why: str) -> ResilverError:
        """The error that ends a run without sources: the one reason they all gave, or the gravest word for many."""
        told = self.problems
        text = "; ".join(f"{problem.node}: {problem.message}" for problem in told)
        if not text:
            text = "none has said why" if self._alive else "none was given"
        reasons = {problem.reason for problem in told}
        reason = "NO_SOURCE"
        if not self._alive and len(reasons) == 1:
            reason = reasons.pop()
        elif not self._alive and "SOURCE_DAMAGED" in reasons:
            reason = "SOURCE_DAMAGED"
        return error_for(reason, f"{why}: {text}", sources=",".join(problem.node for problem in told))
