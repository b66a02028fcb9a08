"""One receiving run: from an order to a new tip, or to the reason why not.

PREPARING -> TRANSFERRING -> VERIFYING -> COMMITTING -> SUCCEEDED, in a thread of its own. The rules:

* Nothing of the replica changes before the commit, and the commit is one step of the backend. So a run may be broken
  off anywhere, by a kill too, and done again from its order.
* What brings the stage to its target is a transfer (`block_transfer.py`, `stream_transfer.py`); what of it is there
  already stands in the stage.
* The right to go on is checked at the start and again at the commit: both happen on the replica's worker.
* Use, KEEPS_BEING_WRITTEN and PRESERVED_FULL block a run: the stage is kept, and the coordinator plans anew. A full or
  failing disk here, and data that does not read back as it was sent, cost the stage, and what else is half done is
  finished or undone. Every other failure keeps it.
* A live copy in use stands in the way of the commit alone: the stage is filled meanwhile, and waits for it.
* A run of which nothing is heard for a quarter of an hour counts as gone. So whatever may take longer tells that it
  advances (`agent/disk/advance.py`), and nothing else does: one that hangs is silent.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import structlog

from agent.backends.base import CommitOrder
from agent.block_transfer import BlockTransfer
from agent.disk.advance import told_to
from agent.peers import Wanted
from agent.rights import check_tip
from agent.stream.link import OF_ITS_DISK
from agent.stream.throttle import Throttle
from agent.stream.work import Stopped
from agent.stream_transfer import StreamTransfer
from agent.transfer import SOURCES_SILENT_MAX_S
from resilver.errors import Refused, ResilverError, Unavailable, error_for
from resilver.volume import LiveState, Progress, ResyncState

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from agent.backends.base import AnyStage
    from agent.peers import Peers, Source
    from agent.replica import Replica
    from agent.runfile import RunOrder, StagePlace
    from agent.slots import Slots
    from agent.stream.counters import Counters
    from agent.transfer import Transfer
    from resilver.lineage import Lineage
    from resilver.volume import ReplicaReport

    T = TypeVar("T")

BACKOFF_MAX_S: Final = 5.0
ADVANCE_TOLD_S: Final = 5.0

BLOCKING: Final = frozenset({"IN_USE", "KEEPS_BEING_WRITTEN", "PRESERVED_FULL"})
WELL: Final = frozenset(ResyncState) - {ResyncState.FAILED, ResyncState.BLOCKED}
COSTS_THE_STAGE: Final = frozenset({"NO_SPACE", "IO_ERROR", "READBACK_MISMATCH", "BASE_MISMATCH"})

_log = structlog.get_logger(__name__)


class Run:
    """One run. `told` is called with every progress, in order, from the run's thread or the replica's worker."""

    def __init__(
        self,
        wanted: RunOrder,
        replica: Replica,
        peers: Peers,
        told: Callable[[Run], None],
        *,
        progress: Progress | None = None,
        place: StagePlace | None = None,
        spool_max_bytes: int = 0,
        throttle: Throttle | None = None,
    ) -> None:
        self.wanted: Final = wanted
        self.replica: Final = replica
        self.peers: Final = peers
        self.stop: Final = threading.Event()
        self.ended: Final = threading.Event()
        self.place = place
        self.spool_max_bytes: Final = spool_max_bytes
        self.throttle: Final = throttle or Throttle()
        self._told = told
        self._advance_told_at = -ADVANCE_TOLD_S
        self._stopping: ResilverError | None = None
        fresh = Progress(wanted.resync_id, replica.volume, ResyncState.QUEUED)
        self.progress: Progress = fresh if progress is None else progress
        self.goes_on: Final = progress is not None
        self._wire_before = self.progress.wire_bytes
        self._resent_before = self.progress.resent_bytes

    def end(self, why: ResilverError | None) -> None:
        """Asks the run to end as soon as it can: CANCELLED, or FAILED for a reason that is no cancelling.

        None: the agent is stopping, and will go on with the run when it is started again. The first reason holds.
        """
        if self._stopping is None:
            self._stopping = why
        self.stop.set()

    def work(self, slots: Slots) -> None:
        """The whole run, once there is a slot for it. Returns when it has ended, whatever happened."""
        try:
            slots.take(self.stop, self.wanted.priority)
            try:
                with told_to(self.advanced):
                    self._run()
            finally:
                slots.give_back()
        except ResilverError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the thread's end: whatever it is, the run has to say so
            self._fail(error)
        finally:
            self.ended.set()

    # The steps.

    def _run(self) -> None:
        self.tell(state=ResyncState.PREPARING)
        report = self.on_worker(self._begun)
        if report is None:
            return
        transfer = transfer_for(self)
        try:
            if self.wanted.base == self.wanted.target:
                lineage = self._own_lineage(report)
                self.tell(total_bytes=0, range_count=0)
                transfer.restore(report)
            else:
                lineage = transfer.prepare(report)
                transfer.move()
            self.on_worker(lambda: self._commit(transfer.stage, lineage))
        finally:
            transfer.close()

    def _checked(self, *, compare_live: bool) -> ReplicaReport:
        wanted = self.wanted
        report = self.replica.check_receive(
            wanted.order,
            replaces=wanted.replace_unrelated,
            replaces_lost=wanted.replaces_lost,
            compare_live=compare_live,
        )
        if report.lineage.find(wanted.target) is None:
            check_tip(wanted.order, report.lineage)
        return report

    def _begun(self) -> ReplicaReport | None:
        """What there is to begin from; None if the goal is there already. One job, so that what it tells is no older
        than what others have told meanwhile.
        """
        restores = self.wanted.base == self.wanted.target
        report = self._checked(compare_live=restores)
        if not self._is_done(report):
            return report
        self._succeed(report if restores else self._checked(compare_live=True))
        return None

    def _is_done(self, report: ReplicaReport) -> bool:
        """The goal is in the lineage; only an order to set the live copy right (base and target are one) goes on."""
        held = report.lineage.find(self.wanted.target)
        if held is None:
            return False
        restores = self.wanted.base == self.wanted.target == report.lineage.tip_id
        return not restores or report.live.state is LiveState.UNMODIFIED

    def _own_lineage(self, report: ReplicaReport) -> Lineage:
        """The live copy is to become a clone of its own tip; no source is needed."""
        tip = report.lineage.tip
        if tip is None or tip.id != self.wanted.target or not tip.present:
            raise Refused("TARGET_GONE", f"snapshot {self.wanted.target} is not the tip here, or its data is gone")
        return report.lineage

    def _commit(self, stage: AnyStage, lineage: Lineage) -> None:
        """On the worker, as one job: nobody sees the new tip before SUCCEEDED has been told.

        That is told when the new live copy has been compared: without shared extents that reads all of it once more.
        """
        if self.stop.is_set():
            raise Stopped
        wanted, replica = self.wanted, self.replica
        report = self._checked(compare_live=False)
        _not_in_use(report)
        self.may_replace(report, lineage)
        self.tell(state=ResyncState.COMMITTING)
        preserved = replica.backend.commit(
            stage,
            CommitOrder(
                resync_id=wanted.resync_id,
                volume_id=wanted.order.volume_id,
                lineage=lineage,
                expected_tip=report.lineage.tip_id,
                replace_own_data=wanted.replace_own_data,
                replace_unrelated=wanted.replace_unrelated,
            ),
        )
        seen = None
        try:
            seen = replica.saw_tip(wanted.target, wanted.order.volume_id)
        finally:  # whatever became of the look, the commit is done
            kept = tuple(copy.id for copy in preserved)
            self.tell(state=ResyncState.SUCCEEDED, preserved=kept, message="", reason="")
        if seen is not None:
            replica.on_report(seen)

    def _succeed(self, report: ReplicaReport) -> None:
        """The goal was there already, perhaps by a commit that a kill did not let us tell of."""
        mine = tuple(copy.id for copy in report.preserved if copy.resync_id == self.wanted.resync_id)
        self.tell(state=ResyncState.SUCCEEDED, preserved=mine or self.progress.preserved)
        self.replica.on_report(report)

    def may_replace(self, report: ReplicaReport, lineage: Lineage) -> None:
        """What the commit would refuse is refused before a byte has moved."""
        wanted = self.wanted
        if wanted.replace_own_data or wanted.replace_unrelated:
            return
        tip = report.lineage.tip
        if tip is not None and lineage.find(tip.id) is None:
            said = f"the tip here is {tip.name}, which is not in the new lineage; the order does not replace own data"
            raise Refused("TARGET_CHANGED", said, tip=tip.id)

    # Sources.

    def ask(self, call: Callable[[Source], T]) -> T:
        """The first good answer of a source, in the order given; waits for those that are away, not for ever."""
        left = list(self.wanted.sources)
        problems: dict[str, ResilverError] = {}
        deadline = time.monotonic() + SOURCES_SILENT_MAX_S
        pause_s = 0.2
        while left:
            for source in tuple(left):
                try:
                    return call(source)
                except Stopped:
                    raise
                except Unavailable as error:
                    problems[source.node] = error
                except ResilverError as error:
                    problems[source.node] = error
                    left.remove(source)
            if time.monotonic() > deadline:
                break
            if left and self.stop.wait(pause_s * random.uniform(0.5, 1.0)):  # noqa: S311 - jitter, not a secret
                raise Stopped
            pause_s = min(2 * pause_s, BACKOFF_MAX_S)
        reasons = {error.reason for error in problems.values()}
        told = "; ".join(f"{node}: {error.message}" for node, error in problems.items()) or "the order names none"
        reason = reasons.pop() if len(reasons) == 1 and not left else "NO_SOURCE"
        reason = "SOURCE_DAMAGED" if reason in OF_ITS_DISK else reason
        raise error_for(reason, f"no source can serve {self.replica.volume}: {told}")

    def request(self) -> Wanted:
        wanted = self.wanted
        return Wanted(
            wanted.resync_id, wanted.ticket, self.replica.volume, wanted.base, wanted.target, self.replica.node
        )

    # Telling.

    def received_before(self, *, done_bytes: int) -> None:
        """So much of it stands in the stage already; of a run that goes on, the counts are set right by that.

        They are saved now and then: what the stage has beyond them came since, what it lacks is sent again.
        """
        if self.goes_on:
            self._wire_before += max(done_bytes - self.progress.done_bytes, 0)
            self._resent_before += max(self.progress.done_bytes - done_bytes, 0)
        self.tell(done_bytes=done_bytes, wire_bytes=self._wire_before, resent_bytes=self._resent_before)

    def count(self, counters: Counters) -> None:
        """Takes on what has been received; what is done never falls, and never exceeds what is known of the whole."""
        done, total = max(counters.done_bytes, self.progress.done_bytes), self.progress.total_bytes
        self.tell(
            done_bytes=done if total is None else min(done, total),
            wire_bytes=self._wire_before + counters.wire_bytes,
            resent_bytes=self._resent_before + counters.resent_bytes,
            sources=counters.sources,
        )

    def tell(self, **changes: object) -> None:
        before = self.progress.state
        self.progress = replace(self.progress, **changes)  # type: ignore[arg-type]  # fields of Progress by name
        if self.progress.state is not before:
            self._log_step()
        self._told(self)

    def advanced(self) -> None:
        """Some more is done of what no figure tells. On the run's thread, or one of the replica's that it waits for."""
        now = time.monotonic()
        if now - self._advance_told_at >= ADVANCE_TOLD_S and not self.progress.state.final:
            self._advance_told_at = now
            self.tell()

    def _log_step(self) -> None:
        """Each step once. The volume, the resync and the term are bound to the run's thread."""
        now, wanted = self.progress, self.wanted
        about: dict[str, object] = {"base": wanted.base, "target": wanted.target}
        about |= {"reason": now.reason, "message": now.message}
        if now.state.final:
            about |= {"done_bytes": now.done_bytes, "wire_bytes": now.wire_bytes, "resent_bytes": now.resent_bytes}
        log = _log.info if now.state in WELL else _log.warning
        log(f"resync {now.state.value}", **{name: value for name, value in about.items() if value != ""})

    def _fail(self, error: Exception) -> None:
        if self.stop.is_set():
            if self._stopping is None:
                return  # the agent is stopping: the run goes on from what is on the disk at the next start
            error = self._stopping
        if self.progress.state is ResyncState.SUCCEEDED:
            _log.error("what follows a commit failed", exc_info=error)
            return
        if not isinstance(error, ResilverError):
            _log.error("run failed for an unforeseen reason", exc_info=error)
            error = ResilverError("INTERNAL", f"unforeseen: {type(error).__name__}; this node's log says more")
        if error.reason in COSTS_THE_STAGE:
            self._clear()
        state = ResyncState.BLOCKED if error.reason in BLOCKING else ResyncState.FAILED
        if error.reason == "CANCELLED":
            state = ResyncState.CANCELLED
        self.tell(state=state, reason=error.reason, message=error.message)

    def _clear(self) -> None:
        """Everybody has let go of the stage by now."""
        try:
            self.replica.worker.call(self.replica.clear)
        except ResilverError as error:
            _log.warning("not cleared after a fault", volume=self.replica.volume, message=error.message)

    def on_worker(self, job: Callable[[], T]) -> T:
        if self.stop.is_set():
            raise Stopped
        return self.replica.worker.call(job)


def transfer_for(run: Run) -> Transfer:
    """The way in which this run's kind of volume travels."""
    backend = run.replica.backend
    return BlockTransfer(run, backend) if backend.shape == "blocks" else StreamTransfer(run, backend)


def _not_in_use(report: ReplicaReport) -> None:
    if report.live.in_use:
        by = ", ".join(report.live.in_use_by) or "somebody who could not be named"
        raise Refused("IN_USE", f"{report.live.path} is in use by {by}; close it, and the resync goes on", by=by)
