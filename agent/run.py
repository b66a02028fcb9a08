"""One receiving run: from an order to a new tip, or to the reason why not.

PREPARING -> TRANSFERRING -> VERIFYING -> COMMITTING -> SUCCEEDED, in a thread of its own. The rules:

* Nothing of the replica changes before the commit, and the commit is one step of the backend. So a run may be broken
  off anywhere, by a kill too, and done again from its order.
* What a stage is to become stands in the stage: the map and the journal, and the lineage beside them. A run that finds
  all three asks no source for them again, and does not need the base there.
* The right to go on is checked at the start and again at the commit: both happen on the replica's worker.
* Use, KEEPS_BEING_WRITTEN and PRESERVED_FULL block a run: the stage is kept, and the coordinator plans anew. A full or
  failing disk here, and data that does not read back as it was sent, cost the stage. Every other failure keeps it.
* A live copy in use stands in the way of the commit alone: the stage is filled meanwhile, and waits for it.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import structlog

from agent.backends.base import CommitOrder
from agent.basecheck import check_lineages, compare, digest_ranges, pick_blocks
from agent.disk.durable import read_json, write_json
from agent.lineages import lineage_from_json, lineage_to_json
from agent.peers import Wanted
from agent.rights import check_tip
from agent.stream.frame import Hello
from agent.stream.journal import Journal
from agent.stream.mapfile import JournalKey
from agent.stream.receiver import Counters, SourceAddress, receive, verify
from agent.stream.work import Stopped
from resilver.address import parse_address
from resilver.errors import Refused, ResilverError, Unavailable, error_for
from resilver.lineage import Lineage
from resilver.volume import LiveState, Progress, ResyncState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TypeVar

    from agent.backends.base import Stage
    from agent.delta import DeltaMap, DeltaRange
    from agent.peers import Peers, Source
    from agent.replica import Replica
    from agent.runfile import RunOrder
    from agent.slots import Slots
    from resilver.volume import ReplicaReport

    T = TypeVar("T")

SOURCES_SILENT_MAX_S: Final = 600.0
BACKOFF_MAX_S: Final = 5.0
LINEAGE_FILE: Final = "lineage.json"

BLOCKING: Final = frozenset({"IN_USE", "KEEPS_BEING_WRITTEN", "PRESERVED_FULL"})
COSTS_THE_STAGE: Final = frozenset({"NO_SPACE", "IO_ERROR", "READBACK_MISMATCH", "BASE_MISMATCH"})

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A stage that is open, what it is to become, and how far it is."""

    stage: Stage
    lineage: Lineage
    journal: Journal


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
        capacity_bytes: int | None = None,
    ) -> None:
        self.wanted: Final = wanted
        self.stop: Final = threading.Event()
        self.ended: Final = threading.Event()
        self.capacity_bytes = capacity_bytes
        self._replica = replica
        self._peers = peers
        self._told = told
        self._stopping: ResilverError | None = None
        fresh = Progress(wanted.resync_id, replica.volume, ResyncState.QUEUED)
        self.progress: Progress = fresh if progress is None else progress
        self._goes_on: Final = progress is not None
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
            slots.take(self.stop)
            try:
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
        self._tell(state=ResyncState.PREPARING)
        report = self._on_worker(self._begun)
        if report is None:
            return
        if self.wanted.base == self.wanted.target:
            self._restore(report)
            return
        prepared = self._prepare(report)
        try:
            self._transfer(prepared)
            self._on_worker(lambda: self._commit(prepared.stage, prepared.lineage))
        finally:
            prepared.journal.close()
            prepared.stage.close()

    def _checked(self) -> ReplicaReport:
        wanted = self.wanted
        report = self._replica.check_receive(wanted.order, replaces=wanted.replace_unrelated)
        if report.lineage.find(wanted.target) is None:
            check_tip(wanted.order, report.lineage)
        return report

    def _begun(self) -> ReplicaReport | None:
        """What there is to begin from; None if the goal is there already. One job, so that what it tells is no older
        than what others have told meanwhile.
        """
        report = self._checked()
        if not self._is_done(report):
            return report
        self._succeed(report)
        return None

    def _is_done(self, report: ReplicaReport) -> bool:
        """The goal is in the lineage; only an order to set the live copy right (base and target are one) goes on."""
        held = report.lineage.find(self.wanted.target)
        if held is None:
            return False
        restores = self.wanted.base == self.wanted.target == report.lineage.tip_id
        return not restores or report.live.state is LiveState.UNMODIFIED

    def _restore(self, report: ReplicaReport) -> None:
        """The live copy becomes a clone of its own tip; no source is needed."""
        backend, wanted = self._replica.backend, self.wanted
        tip = report.lineage.tip
        if tip is None or tip.id != wanted.target or not tip.present:
            raise Refused("TARGET_GONE", f"snapshot {wanted.target} is not the tip here, or its data is gone")
        self._tell(total_bytes=0, range_count=0)
        stage = self._on_worker(lambda: backend.open_stage(wanted.base, wanted.target, tip.size_bytes))
        try:
            self._on_worker(lambda: self._commit(stage, report.lineage))
        finally:
            stage.close()

    def _prepare(self, report: ReplicaReport) -> Prepared:
        wanted, backend = self.wanted, self._replica.backend
        known = self._resume()
        if known is not None:
            self._may_replace(report, known.lineage)
            return known
        offer = self._ask(lambda source: self._peers.fetch(source, self._request(), self.stop))
        self._may_replace(report, offer.lineage)
        delta = offer.delta
        self._tell(total_bytes=delta.data_bytes, range_count=len(delta))
        if wanted.base:
            check_lineages(wanted.base, report.lineage, offer.lineage)
            self._compare_sample(report)
        self._on_worker(lambda: backend.check_space(delta))
        self.capacity_bytes = delta.capacity_bytes
        stage = self._on_worker(lambda: backend.open_stage(wanted.base, wanted.target, delta.capacity_bytes))
        try:
            write_json(stage.directory / LINEAGE_FILE, lineage_to_json(offer.lineage))
            journal = Journal.open(stage.directory, JournalKey.of(wanted.base, wanted.target, delta), delta)
        except BaseException:
            stage.close()
            raise
        return Prepared(stage, offer.lineage, journal)

    def _resume(self) -> Prepared | None:
        """What an earlier run of this pair has left, if it is whole."""
        wanted, backend = self.wanted, self._replica.backend
        capacity = self.capacity_bytes
        if capacity is None:
            return None
        stage = self._on_worker(lambda: backend.open_stage(wanted.base, wanted.target, capacity))
        try:
            found = _left_in(stage.directory, wanted) if stage.resumed else None
        except BaseException:
            stage.close()
            raise
        if found is None:
            stage.close()
            return None
        lineage, journal = found
        if self._goes_on:
            # Counts are saved now and then: what the journal has beyond them came since, what it lacks is sent again.
            self._wire_before += max(journal.done_bytes - self.progress.done_bytes, 0)
            self._resent_before += max(self.progress.done_bytes - journal.done_bytes, 0)
        self._tell(
            total_bytes=journal.delta.data_bytes,
            range_count=len(journal.delta),
            done_bytes=journal.done_bytes,
            wire_bytes=self._wire_before,
            resent_bytes=self._resent_before,
        )
        return Prepared(stage, lineage, journal)

    def _transfer(self, prepared: Prepared) -> None:
        wanted, journal = self.wanted, prepared.journal
        delta: DeltaMap = journal.delta
        left = delta.data_bytes - journal.done_bytes
        resumed = delta.data_bytes - left
        self._on_worker(lambda: self._replica.backend.check_space(delta, resumed_bytes=resumed))
        self._tell(state=ResyncState.TRANSFERRING)
        hello = Hello(wanted.ticket, wanted.resync_id, self._replica.volume, wanted.target, self._replica.node)
        receive(
            prepared.stage,
            delta,
            journal,
            [_stream_of(source) for source in wanted.sources],
            hello,
            on_progress=self._count,
            stop=self.stop,
            idle_timeout_s=SOURCES_SILENT_MAX_S,
        )
        self._tell(state=ResyncState.VERIFYING)
        verify(prepared.stage, delta, journal, stop=self.stop)

    def _commit(self, stage: Stage, lineage: Lineage) -> None:
        """On the worker, as one job: nobody sees the new tip before SUCCEEDED has been told."""
        if self.stop.is_set():
            raise Stopped
        wanted, replica = self.wanted, self._replica
        report = self._checked()
        _not_in_use(report)
        self._may_replace(report, lineage)
        self._tell(state=ResyncState.COMMITTING)
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
        self._tell(state=ResyncState.SUCCEEDED, preserved=tuple(copy.id for copy in preserved), message="", reason="")
        replica.took_tip(wanted.target, wanted.order.volume_id)

    def _succeed(self, report: ReplicaReport) -> None:
        """The goal was there already, perhaps by a commit that a kill did not let us tell of."""
        mine = tuple(copy.id for copy in report.preserved if copy.resync_id == self.wanted.resync_id)
        self._tell(state=ResyncState.SUCCEEDED, preserved=mine or self.progress.preserved)
        self._replica.on_report(report)

    def _may_replace(self, report: ReplicaReport, lineage: Lineage) -> None:
        """What the commit would refuse is refused before a byte has moved."""
        wanted = self.wanted
        if wanted.replace_own_data or wanted.replace_unrelated:
            return
        tip = report.lineage.tip
        if tip is not None and lineage.find(tip.id) is None:
            said = f"the tip here is {tip.cp}, which is not in the new lineage; the order does not replace own data"
            raise Refused("TARGET_CHANGED", said, tip=tip.id)

    # Sources.

    def _ask(self, call: Callable[[Source], T]) -> T:
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
        # An error of a source's disk is not one of ours: it must not cost the stage.
        reason = "SOURCE_DAMAGED" if reason in {"IO_ERROR", "NO_SPACE", "READBACK_MISMATCH"} else reason
        raise error_for(reason, f"no source can serve {self._replica.volume}: {told}")

    def _compare_sample(self, report: ReplicaReport) -> None:
        base, replica = self.wanted.base, self._replica
        record = report.lineage.find(base)
        size_bytes = record.size_bytes if record is not None else 0
        blocks, mine = replica.reader.call(lambda: _sample(replica, base, size_bytes))
        theirs = self._ask(lambda source: self._peers.digests(source, self._request(), base, blocks, self.stop))
        compare(base, blocks, mine, theirs)

    def _request(self) -> Wanted:
        wanted = self.wanted
        return Wanted(
            wanted.resync_id, wanted.ticket, self._replica.volume, wanted.base, wanted.target, self._replica.node
        )

    # Telling.

    def _count(self, counters: Counters) -> None:
        most = self.progress.total_bytes if self.progress.total_bytes is not None else counters.total_bytes
        self._tell(
            done_bytes=min(max(counters.done_bytes, self.progress.done_bytes), most),
            wire_bytes=self._wire_before + counters.wire_bytes,
            resent_bytes=self._resent_before + counters.resent_bytes,
            sources=counters.sources,
        )

    def _tell(self, **changes: object) -> None:
        self.progress = replace(self.progress, **changes)  # type: ignore[arg-type]  # fields of Progress by name
        self._told(self)

    def _fail(self, error: Exception) -> None:
        if self.stop.is_set():
            if self._stopping is None:
                return  # the agent is stopping: the run goes on from what is on the disk at the next start
            error = self._stopping
        if self.progress.state is ResyncState.SUCCEEDED:
            _log.error("what follows a commit failed", resync=self.wanted.resync_id, exc_info=error)
            return
        if not isinstance(error, ResilverError):
            _log.error("run failed for an unforeseen reason", resync=self.wanted.resync_id, exc_info=error)
            error = ResilverError("INTERNAL", f"unforeseen: {type(error).__name__}; this node's log says more")
        if error.reason in COSTS_THE_STAGE:
            try:
                self._replica.worker.call(self._replica.backend.discard_stage)
            except ResilverError as second:
                _log.warning("stage not discarded", volume=self._replica.volume, message=second.message)
        state = ResyncState.BLOCKED if error.reason in BLOCKING else ResyncState.FAILED
        if error.reason == "CANCELLED":
            state = ResyncState.CANCELLED
        self._tell(state=state, reason=error.reason, message=error.message)

    def _on_worker(self, job: Callable[[], T]) -> T:
        if self.stop.is_set():
            raise Stopped
        return self._replica.worker.call(job)


def _not_in_use(report: ReplicaReport) -> None:
    if report.live.in_use:
        by = ", ".join(report.live.in_use_by) or "somebody who could not be named"
        raise Refused("IN_USE", f"{report.live.path} is in use by {by}; close it, and the resync goes on", by=by)


def _sample(replica: Replica, base: str, size_bytes: int) -> tuple[list[DeltaRange], list[bytes]]:
    blocks = pick_blocks(size_bytes, replica.backend.delta_map("", base), random.Random())  # noqa: S311 - no secret
    return blocks, digest_ranges(replica.backend, base, blocks)


def _left_in(directory: Path, wanted: RunOrder) -> tuple[Lineage, Journal] | None:
    """The lineage and the journal of a stage; None unless both are whole and of this pair."""
    try:
        value = read_json(directory / LINEAGE_FILE)
    except ResilverError:
        return None
    lineage = None if value is None else lineage_from_json(value)
    if lineage is None or lineage.tip_id != wanted.target:
        return None
    journal = Journal.load(directory)
    if journal is None:
        return None
    if (journal.key.base, journal.key.target) != (wanted.base, wanted.target):
        journal.close()
        return None
    return lineage, journal


def _stream_of(source: Source) -> SourceAddress:
    address = parse_address(source.stream_address)
    return SourceAddress(source.node, address.host, address.port)
