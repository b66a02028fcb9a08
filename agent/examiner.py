"""Looks at one replica and says what it is.

The data is believed, with one exception: data that was here and is not is LOST, never EMPTY, so that an unmounted disk
is not taken for room to copy into. Where the data was stands in state_dir, written before it is reported.

A look that leaves the live copy uncompared keeps what the last comparison said of it: whoever must be certain asks for
`compare_live`. A disk that cannot be looked at at all is LOST too, with the disk's own words as the problem.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agent.backends.base import Glancing
from agent.disk.durable import disk_errors
from agent.identity import Remembered
from resilver.config import NO_HOOKS, Hooks
from resilver.errors import ResilverError
from resilver.lineage import Lineage
from resilver.volume import LiveCopy, LiveState, Presence, ReplicaReport

if TYPE_CHECKING:
    from agent.backends.base import Backend, Examined
    from agent.identity import Identity

KEEPS_BEING_WRITTEN_MS: Final = 3_600_000
Problems = tuple[str, ...] | None
_NOTHING_SEEN: Final = (None, None)


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What the configuration says of a volume and may say anew while running."""

    priority: int = 0
    keep_last: int = 16
    group: str = ""
    hooks: Hooks = NO_HOOKS
    resync_priority: int = 0
    snapshot_dir: Path | None = None


def now_ms() -> int:
    """Unix time."""
    return time.time_ns() // 1_000_000


class Examiner:
    """The looks at one replica, on its worker thread; `last` may be read from any."""

    def __init__(self, volume: str, node: str, backend: Backend, identity: Identity, settings: ReplicaSettings) -> None:
        self.settings = settings
        self.last: ReplicaReport | None = None
        self._after_problems: tuple[str, ...] = ()
        self._unread_problems: tuple[str, ...] = ()
        self._volume: Final = volume
        self._node: Final = node
        self._backend: Final = backend
        self._identity: Final = identity
        self._outline: tuple[object, object] = _NOTHING_SEEN
        self._seen: object = None
        self._broken: str | None = "the volume has not been recovered since the agent started"
        self._recovered_on = ""

    def recover(self) -> None:
        """At start; a backend that cannot is tried again before each look, and its words are a problem till then. A
        disk that comes later is recovered by the look that finds it.
        """
        try:
            with disk_errors(self._volume):
                self._recovered_on = self._backend.recover()
        except ResilverError as error:
            self._broken = f"{error.reason}: {error.message}"
            raise
        self._broken = None

    def recover_first(self, error: ResilverError) -> None:
        """The disk has failed in the middle of something: before the next look all is set right, as at a start."""
        self._broken = f"{error.reason}: {error.message}"

    def hooks_told(self, after: str | None, unread: Problems, *, again: bool) -> bool:
        """Takes on why an `after` of the volume failed, empty once it has succeeded, and why records of hooks cannot be
        read, which any volume with hooks might be concerned with; whether that is news. `again`: of one that fails
        again and again, in whatever words, the first stay.
        """
        before = (self._after_problems, self._unread_problems)
        if after is not None and not (after and again and self._after_problems):
            failed = f"HOOK_FAILED: `after`: {after}; it is tried again until it succeeds"
            self._after_problems = (failed,) if after else ()
        if unread is not None:
            told = tuple(f"HOOK_FAILED: {why}; see docs/hooks.md" for why in unread)
            self._unread_problems = told if self.settings.hooks.any else ()
        return before != (self._after_problems, self._unread_problems)

    def examine(self, *, compare_live: bool) -> ReplicaReport:
        """What there is; raises what the disk says if it cannot be looked at."""
        if self._broken is not None:
            self.recover()
        examined = self._look(compare_live=compare_live)
        if examined.file_system_id not in {"", self._recovered_on}:
            self.recover()
            examined = self._look(compare_live=compare_live)
        live, rest = _outline(examined)
        # A change of the live copy that was not compared is left for the next look to find.
        self._outline = (live if compare_live or live == self._outline[0] else None, rest)
        self._seen = None
        self.last = self._report(examined, compared=compare_live)
        return self.last

    def _look(self, *, compare_live: bool) -> Examined:
        with disk_errors(self._volume):
            return self._backend.examine(compare_live=compare_live)

    def examine_surely(self) -> ReplicaReport:
        """As `examine`, comparing; what cannot be looked at is LOST."""
        try:
            return self.examine(compare_live=True)
        except ResilverError as error:
            self._outline, self._seen = _NOTHING_SEEN, None
            self.last = self._unreadable(f"{error.reason}: {error.message}")
            return self.last

    def changed(self, *, surely: bool = False) -> bool:
        """A cheap look: whether anything is other than it was. `surely`: also what a glance might miss."""
        glance = self._glance()
        if glance is not None and glance == self._seen and not surely:
            return False
        before, self._seen = self._outline, None
        try:
            self._outline = _outline(self._look(compare_live=False))
        except ResilverError as error:
            said = f"{error.reason}: {error.message}"
            return self.last is None or said not in self.last.problems
        if before == self._outline:
            self._seen = glance
            return False
        return True

    def _glance(self) -> object | None:
        return self._backend.glance() if isinstance(self._backend, Glancing) else None

    def remember(self, tip: str, volume_id: str) -> None:
        """After an order gave the replica a new tip: also if the next look fails, its absence is then a loss.

        The order was obeyed, whatever becomes of this: the next look tells what could not be written.
        """
        with contextlib.suppress(ResilverError):
            seen = self._identity.remembered(self._volume)
            file_system_id = seen.file_system_id if seen is not None else ""
            self._identity.remember(self._volume, Remembered(file_system_id, tip, volume_id))

    def _report(self, examined: Examined, *, compared: bool) -> ReplicaReport:
        remembered, forgotten = self._remembered(examined)
        made = ReplicaReport(
            volume=self._volume,
            presence=examined.presence,
            volume_id=examined.volume_id,
            lineage=examined.lineage,
            live=examined.live if compared else self._as_compared(examined.live),
            record=examined.record,
            grant=examined.grant,
            backend=self._backend.kind,
            priority=self.settings.priority,
            keep_last=self.settings.keep_last,
            free_bytes=examined.free_bytes,
            reserve_bytes=examined.reserve_bytes,
            reflink=examined.reflink,
            preserved=examined.preserved,
            others=examined.others,
            problems=(*examined.problems, *self._after_problems, *self._unread_problems, *forgotten),
            examine_time_ms=now_ms(),
            group=self.settings.group,
            resync_priority=self.settings.resync_priority,
        )
        lost = "" if remembered is None else _loss(examined, remembered)
        if lost:
            return self._lost(made, remembered, lost)
        if examined.presence is Presence.PRESENT:
            seen = Remembered(examined.file_system_id, examined.lineage.tip_id, examined.volume_id)
            try:
                self._identity.remember(self._volume, seen)
            except ResilverError as error:
                # What is here is here; only a later absence would not be known for a loss.
                said = f"{error.reason}: what is here cannot be remembered: {error.message}"
                made = replace(made, problems=(*made.problems, said))
        if self._written_again(made):
            said = f"KEEPS_BEING_WRITTEN: {keeps_being_written(self._volume, self._node)}"
            return replace(made, problems=(*made.problems, said))
        return made

    def _remembered(self, examined: Examined) -> tuple[Remembered | None, tuple[str, ...]]:
        """What was here, and why that cannot be read: data that has been mirrored is here all the same, and for the
        rest it is not known whether it is what was here.
        """
        try:
            return self._identity.remembered(self._volume), ()
        except ResilverError as error:
            if not examined.lineage.records:
                raise
            return None, (f"{error.reason}: where the data was cannot be read: {error.message}",)

    def _lost(self, made: ReplicaReport, remembered: Remembered | None, why: str) -> ReplicaReport:
        # Neither record nor grant: what stands beside something else says nothing of the data that was here.
        return replace(
            made,
            presence=Presence.LOST,
            volume_id=remembered.volume_id if remembered is not None else "",
            lineage=Lineage(),
            live=LiveCopy(path=made.live.path),
            record=None,
            grant=None,
            others=(),
            problems=(f"REPLICA_LOST: {why}", *made.problems),
        )

    def _unreadable(self, why: str) -> ReplicaReport:
        settings = self.settings
        made = ReplicaReport(self._volume, Presence.LOST, backend=self._backend.kind, priority=settings.priority)
        made = replace(made, group=settings.group, resync_priority=settings.resync_priority)
        return replace(made, problems=(why,), examine_time_ms=now_ms())

    def _as_compared(self, live: LiveCopy) -> LiveCopy:
        last = self.last
        if last is None or live.state is not LiveState.UNKNOWN or last.live.based_on != live.based_on or live.in_use:
            return live
        return replace(live, state=last.live.state, modified_bytes=last.live.modified_bytes)

    def _written_again(self, report: ReplicaReport) -> bool:
        """Whether a secondary was written to within an hour after a commit had to preserve its live copy."""
        return report.live.state is LiveState.MODIFIED and self.preserved_lately(report)

    def preserved_lately(self, report: ReplicaReport) -> bool:
        """Whether a secondary's live copy had to be preserved within the last hour: if it is modified now, that is
        KEEPS_BEING_WRITTEN.
        """
        record = report.record
        if record is None or record.primary in {"", self._node}:
            return False
        since = report.examine_time_ms - KEEPS_BEING_WRITTEN_MS
        return any(copy.live and copy.resync_id and copy.create_time_ms > since for copy in report.preserved)


def keeps_being_written(volume: str, node: str) -> str:
    """The sentence for an operator."""
    return (
        f"{volume} on {node} is a secondary, and was written to again within an hour after its live copy "
        "was preserved; find out what writes to it, or have it replaced by name"
    )


def _loss(examined: Examined, remembered: Remembered) -> str:
    """Why the data that was here is gone, empty if it is not."""
    what = f"there was data at {remembered.tip}" if remembered.tip else "there was data"
    if examined.presence is Presence.LOST:
        return f"{what}, and its disk is not there"
    if examined.presence is Presence.EMPTY:
        return f"{what}, and there is none"
    elsewhere = remembered.file_system_id and examined.file_system_id != remembered.file_system_id
    if elsewhere and remembered.tip and not examined.lineage:
        return f"{what}, and what is there now lies on another file system and was never mirrored"
    return ""


def _outline(examined: Examined) -> tuple[object, object]:
    """What a change of is worth a comparison and a report: of the live copy, and of the rest. A copy in use changes all
    the time, and is told by that.
    """
    live = examined.live
    size = () if live.in_use else (live.size_bytes, live.allocated_bytes)
    return (live.path, live.based_on, live.in_use, live.in_use_by, live.state is LiveState.ABSENT, size), (
        examined.presence,
        examined.volume_id,
        examined.lineage,
        examined.record,
        examined.grant,
        examined.preserved,
        examined.problems,
        examined.others,
        examined.file_system_id,
        # Steps of about 4 %: free space alone is told when it has changed by as much.
        int(math.log2(examined.free_bytes + 1) * 16),
        examined.free_bytes < examined.reserve_bytes,
    )
