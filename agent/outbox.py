"""What there is to tell a coordinator: the newest state of each thing, and nothing twice.

The queue cannot grow: a volume has one report, a run has one progress, an examine that was asked for has one answer.
A newer state takes the place of one that was not sent yet. What must stay in order does: the last progress of a run
goes before any report of its replica, because the report is what shows the new tip. The reports of one volume go in the
order in which they were made.

Belongs to the event loop; `put_*` may be called from any thread.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilver.volume import Progress, ReplicaReport

PROGRESS_PERIOD_S: Final = 0.2
ANSWERS_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Answer:
    """A report, and the examine that it answers; empty for a report that nobody asked for."""

    report: ReplicaReport
    examine_id: str = ""


class Outbox:
    """Waiting reports and progress."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop: Final = loop
        self._news = asyncio.Event()
        self._progress: OrderedDict[str, Progress] = OrderedDict()
        self._told_at: dict[str, float] = {}
        self._reports: OrderedDict[str, ReplicaReport] = OrderedDict()
        self._newest: dict[str, ReplicaReport] = {}
        self._answers: OrderedDict[tuple[str, str], Answer] = OrderedDict()

    def put_progress(self, progress: Progress) -> None:
        self._call(self._keep_progress, progress)

    def put_report(self, report: ReplicaReport) -> None:
        self._call(self._keep_report, report)

    def put_answer(self, report: ReplicaReport, examine_id: str) -> None:
        self._call(self._keep_answer, Answer(report, examine_id))

    def clear(self) -> None:
        """For a new stream: everything that still holds is put again."""
        self._progress.clear()
        self._told_at.clear()
        self._reports.clear()
        self._answers.clear()

    async def next(self, wait_s: float) -> Progress | Answer | None:
        """The next thing to tell; None if there is none within that time."""
        deadline = self._loop.time() + wait_s
        while True:
            self._news.clear()
            found = self._take()
            if found is not None:
                return found
            left = deadline - self._loop.time()
            if left <= 0:
                return None
            # Progress that is not due yet has no event of its own.
            wait = min(left, PROGRESS_PERIOD_S / 2) if self._progress else left
            try:
                async with asyncio.timeout(wait):
                    await self._news.wait()
            except TimeoutError:
                continue

    def with_others(self, first: Answer, count_max: int) -> list[Answer]:
        """The one that was taken, and what waits next in line and answers the same, each of another volume."""
        told = {first.report.volume: first}
        while len(told) < count_max and not any(progress.state.final for progress in self._progress.values()):
            volume, examine_id = self._next_report()
            if not volume or volume in told or examine_id != first.examine_id:
                break
            answer = self._take_report()
            assert answer is not None
            told[volume] = answer
        return list(told.values())

    def _next_report(self) -> tuple[str, str]:
        """Of which volume, and to which examine; nothing if none waits."""
        return next(iter(self._answers), None) or (next(iter(self._reports), ""), "")

    def _take(self) -> Progress | Answer | None:
        now = self._loop.time()
        for resync_id, progress in self._progress.items():
            if progress.state.final or now - self._told_at.get(resync_id, 0.0) >= PROGRESS_PERIOD_S:
                del self._progress[resync_id]
                self._told_at[resync_id] = now
                if progress.state.final:
                    del self._told_at[resync_id]
                return progress
        return self._take_report()

    def _take_report(self) -> Answer | None:
        if self._answers:
            answer = self._answers.popitem(last=False)[1]
            volume = answer.report.volume
            # What was seen since is an answer too, and an older report must never follow a newer one.
            newest = self._newest.get(volume, answer.report)
            if newest.examine_time_ms >= answer.report.examine_time_ms:
                answer = Answer(newest, answer.examine_id)
            self._reports.pop(volume, None)
            return answer
        if self._reports:
            return Answer(self._reports.popitem(last=False)[1])
        return None

    def _keep_progress(self, progress: Progress) -> None:
        self._progress[progress.resync_id] = progress
        self._news.set()

    def _keep_report(self, report: ReplicaReport) -> None:
        self._reports[report.volume] = report
        self._newest[report.volume] = report
        self._news.set()

    def _keep_answer(self, answer: Answer) -> None:
        self._answers[answer.report.volume, answer.examine_id] = answer
        while len(self._answers) > ANSWERS_MAX:
            self._answers.popitem(last=False)
        self._news.set()

    def _call(self, job: Callable[..., object], *args: object) -> None:
        # A loop that is closed has nobody left to tell.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(job, *args)
