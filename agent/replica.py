"""One replica's life: looked at, told of epochs, made to take consistency points.

* Every method that touches the disk runs on the volume's own worker thread, one after another; delta maps and readers
  have a second one, because they may run beside the others.
* A consistency point is taken under the grant of the order's own epoch only; its id is minted here, its sequence is the
  parent's plus one.
* A record of a higher epoch ends the grant and the runs of lower ones, and stands on the disk before it counts.
* Nothing is pruned here unasked: which snapshots the other members need is known to the coordinator, who is told how
  many this node keeps and drops the rest. Never the tip, the newest known CP, or what a transfer needs.
* What an order has done is told at once. If the look at it fails, the order stands and the next look tells.
"""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from agent.backends.base import Compacting, Glancing, NewSnapshot
from agent.examiner import Examiner, Problems, ReplicaSettings, keeps_being_written, now_ms
from agent.hooks import Hooked
from agent.leftovers import recover as recover_hooks
from agent.rights import (
    check_epoch,
    check_grant,
    check_secondary,
    check_tip,
    check_volume,
    compare_epochs,
    merge_record,
)
from agent.together import Member, Together
from agent.worker import IDLE_S, Worker
from resilver.errors import Invalid, NotFound, Refused, ResilverError, Superseded
from resilver.lineage import ConsistencyPoint
from resilver.volume import Grant, LiveState, Presence

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path

    from agent.backends.base import Backend
    from agent.identity import Identity
    from resilver.lineage import Lineage, Snapshot
    from resilver.volume import Order, ReplicaReport, VolumeRecord

REQUESTS_MAX: Final = 256
COMPACT_S: Final = 0.5
FAULTS: Final = frozenset({"NO_SPACE", "IO_ERROR"})

_log = structlog.get_logger(__name__)


class Transfers(Protocol):
    """What a replica needs to know of those who write to it and read from it."""

    def end_below(self, volume: str, volume_id: str, epoch: int) -> None:
        """Ends the volume's receiving run if its order is of a lower epoch."""

    def pinned(self, volume: str) -> frozenset[str]:
        """Snapshots that a transfer needs."""


class Replica:
    """One volume on this node. `transfers` and `on_report` are set by whoever wires the agent, before it serves."""

    def __init__(
        self,
        volume: str,
        node: str,
        backend: Backend,
        identity: Identity,
        settings: ReplicaSettings,
        *,
        hooks_dir: Path | None = None,
        idle_s: float = IDLE_S,
    ) -> None:
        self.volume: Final = volume
        self.node: Final = node
        self.backend: Final = backend
        self.worker: Final = Worker(f"disk of {volume}", idle_s=idle_s, volume=volume)
        self.reader: Final = Worker(f"reads of {volume}", volume=volume)
        self.transfers: Transfers | None = None
        self.on_report: Callable[[ReplicaReport], None] = lambda _report: None
        self._examiner = Examiner(volume, node, backend, identity, settings)
        self._hooks_dir = hooks_dir
        self._not_compacted = ""
        self._compacted: object = None
        self._queued: Future[ReplicaReport] | None = None
        self._requests: OrderedDict[str, tuple[object, Snapshot, bool]] = OrderedDict()

    # From any thread.

    @property
    def last(self) -> ReplicaReport | None:
        """The report that was made last; None before the first."""
        return self._examiner.last

    @property
    def settings(self) -> ReplicaSettings:
        return self._examiner.settings

    @settings.setter
    def settings(self, settings: ReplicaSettings) -> None:
        self._examiner.settings = settings

    def examine_soon(self) -> Future[ReplicaReport]:
        """A full examine on the worker; those who ask before it has begun share one."""
        queued = self._queued
        if queued is None or queued.running() or queued.done():
            queued = self._queued = self.worker.submit(self.examine)
        return queued

    def close(self) -> None:
        """Lets the threads end; they are not waited for, because a disk may hang."""
        self.worker.close()
        self.reader.close()

    # On the worker.

    def recover(self) -> None:
        """At start. A volume that cannot be recovered is reported with its problem and tried again."""
        try:
            if self._hooks_dir is not None:
                self.hooks_told(recover_hooks(self._hooks_dir, self.volume).get(self.volume, ""))
        except ResilverError as error:
            _log.error("hooks not ended", volume=self.volume, reason=error.reason, message=error.message)
        try:
            self._examiner.recover()
        except ResilverError as error:
            _log.error("volume not recovered", volume=self.volume, reason=error.reason, message=error.message)

    def clear(self) -> None:
        """After a fault of the disk, when no run has the stage open: it goes, and what was half done is finished or
        undone as at a start. What the disk does not let happen now is tried again before the next look.
        """
        try:
            self.backend.discard_stage()
        finally:
            self._examiner.recover()

    def check_config(self) -> None:
        """At start: raises Invalid if the path is nothing that its backend can ever serve, such as a directory."""
        try:
            self.backend.examine(compare_live=False)
        except Invalid as error:
            said = f"volume {self.volume}: {error.message}"
            raise Invalid("CONFIG_INVALID", said, field="volumes.path") from error
        except ResilverError:
            return

    def examine(self) -> ReplicaReport:
        """Looks at everything, compares the live copy with its tip, and tells."""
        report = self._examiner.examine_surely()
        self.on_report(report)
        return report

    def look(self, *, surely: bool = False) -> None:
        """Looks at what is cheap to see, and examines if something has changed."""
        if self._examiner.changed(surely=surely):
            self.examine()

    def compact(self) -> bool:
        """Compacts for half a second, or until another job waits; whether more is to be done."""
        backend, until = self.backend, time.monotonic() + COMPACT_S
        if not isinstance(backend, Compacting):
            return False
        glance = backend.glance() if isinstance(backend, Glancing) else None
        if glance is not None and glance == self._compacted:
            return False
        try:
            more = backend.compact(lambda: time.monotonic() < until and not self.worker.waiting)
        except ResilverError as error:
            if error.message != self._not_compacted:  # told once, not with every try
                _log.warning("not compacted", volume=self.volume, reason=error.reason, message=error.message)
            self._not_compacted = error.message
            return False
        if more:
            self._not_compacted = ""
        self._compacted = None if more else glance
        return more

    def store_record(self, told: VolumeRecord) -> None:
        """Takes on a volume record; a higher epoch ends the grant and the runs of lower ones."""
        report = self._examiner.examine(compare_live=False)
        self._not_lost(report)
        merged = merge_record(report.record, told, report)
        grant = report.grant
        if grant is not None and grant.volume_id == merged.volume_id:
            compare_epochs(merged.epoch, merged.epoch_id, grant.epoch, grant.epoch_id)
        if self.transfers is not None:
            self.transfers.end_below(self.volume, merged.volume_id, merged.epoch)
        if grant is not None and (grant.volume_id, grant.epoch) != (merged.volume_id, merged.epoch):
            self.backend.save_grant(None)
        if merged != report.record:
            self.backend.save_record(merged)
            self._tell()

    def open_epoch(self, order: Order, record: VolumeRecord, *, grant: bool) -> None:
        """Takes on the record of a new epoch and, as its winner, the grant. The same again changes nothing."""
        asked = (order.volume, order.volume_id, order.epoch, order.epoch_id)
        if asked != (record.volume, record.volume_id, record.epoch, record.epoch_id) or not record.volume_id:
            raise Invalid("INVALID_FIELD", "record is not of the order's volume and epoch", field="record")
        if grant and record.primary != self.node:
            said = f"grant is ordered for {self.node}, but the record names {record.primary!r} as the primary"
            raise Invalid("INVALID_FIELD", said, field="grant")
        report = self._examiner.examine(compare_live=False)
        check_volume(order, report)
        check_epoch(order, report.record)
        wanted = Grant(record.volume_id, record.epoch, record.epoch_id)
        # Given already: the winner may have taken its opening CP since, so its tip proves nothing any more.
        if grant and report.grant != wanted:
            check_tip(order, report.lineage)
        self.store_record(record)
        if grant and report.grant != wanted:
            self.backend.save_grant(wanted)
            self._tell()

    def take_snapshot(
        self,
        order: Order,
        request_id: str,
        *,
        only_if_modified: bool = False,
        opening: bool = False,
        note: str = "",
        together: Together | None = None,
    ) -> tuple[Snapshot, bool]:
        """Takes a CP under the order's epoch; answers the tip and False where none is needed.

        With others `together`, each on its own thread: one is needed if one of them needs it, and if one fails, all do.
        """
        asked = (order.volume_id, order.epoch, order.epoch_id, only_if_modified, opening, note)
        those = together or Together([self.volume], self.node, self._hooks_dir)
        try:
            answer = self._answered(request_id, asked)
            if answer is None:
                answer = self._take_together(
                    order, those, only_if_modified=only_if_modified, opening=opening, note=note
                )
                self._answer(request_id, asked, *answer)
        except BaseException as error:
            self.hooks_told(those.leave(self.volume, error))
            raise
        self.hooks_told(those.leave(self.volume))
        return answer

    def _take_together(
        self, order: Order, those: Together, *, only_if_modified: bool, opening: bool, note: str
    ) -> tuple[Snapshot, bool]:
        report = self._examiner.examine(compare_live=only_if_modified)
        check_volume(order, report)
        check_epoch(order, report.record)
        check_grant(order, report.grant, self.node)
        tip = report.lineage.tip
        if opening and tip is not None and tip.epoch_id == order.epoch_id:
            return tip, False
        check_tip(order, report.lineage)
        unmodified = tip is not None and report.live.state is LiveState.UNMODIFIED
        new = replace(self._new(order, tip, note), group_id=those.group_id, settle=partial(those.settle, self.volume))
        hooked = Hooked(self.volume, self.settings.hooks, str(new.cp))
        needed = opening or not (only_if_modified and unmodified)
        if not those.arrive(Member(hooked, report.live.path, needed)) and tip is not None:
            return tip, False
        try:
            taken = self.backend.take_snapshot(new)
        except ResilverError as error:
            if error.reason in FAULTS:
                self._examiner.recover_first(error)
            raise
        self.took_tip(taken.id, order.volume_id)
        return taken, True

    def drop(self, order: Order, snapshot_id: str) -> int:
        """Lets the data of a snapshot or a preserved copy go; bytes freed. PINNED says by what."""
        report = self._examiner.examine(compare_live=False)
        check_volume(order, report)
        check_epoch(order, report.record)
        record = report.lineage.find(snapshot_id)
        if record is None and all(copy.id != snapshot_id for copy in report.preserved):
            said = f"{self.volume} on {self.node} has no snapshot {snapshot_id}"
            raise NotFound("SNAPSHOT_NOT_FOUND", said, snapshot=snapshot_id)
        reason = "" if record is None else self._pinned_by(snapshot_id, report)
        if record is not None and reason:
            raise Refused("PINNED", f"snapshot {record.cp} of {self.volume} is {reason}", pinned_by=reason)
        freed = self.backend.drop(snapshot_id)
        self._tell()
        return freed

    def export(self, order: Order, snapshot_id: str, path: Path, *, writable: bool) -> int:
        """Copies a snapshot or a preserved copy out; its size in bytes."""
        check_volume(order, self._examiner.examine(compare_live=False))
        return self.backend.export(snapshot_id, path, writable=writable)

    def check_receive(
        self, order: Order, *, replaces: bool, replaces_lost: bool | None = None, compare_live: bool = False
    ) -> ReplicaReport:
        """What there is, if a run may write here under this order; `replaces`: the operator named this node.

        The live copy is compared with its tip where the answer depends on it: when the caller asks for that, and where
        one that is modified would be KEEPS_BEING_WRITTEN. Whether it has to be preserved is not decided here: the
        commit compares for itself, while nobody can write, whatever was found before.
        """
        report = self._examiner.examine(compare_live=compare_live)
        if not compare_live and not replaces and self._examiner.preserved_lately(report):
            report = self._examiner.examine(compare_live=True)
        check_volume(order, report, replaces=replaces, replaces_lost=replaces_lost)
        check_epoch(order, report.record)
        check_secondary(order, report.record, self.node)
        grant = report.grant
        if grant is not None and grant.volume_id == order.volume_id:
            if grant.epoch >= order.epoch:
                said = f"{self.node} has the grant of epoch {grant.epoch} of {self.volume}: a primary never receives"
                raise Refused("PRIMARY_UNCLEAR", said)
            self.backend.save_grant(None)  # the order tells of a higher epoch, whatever was missed before it
        if not replaces and any(problem.startswith("KEEPS_BEING_WRITTEN") for problem in report.problems):
            raise Refused("KEEPS_BEING_WRITTEN", keeps_being_written(self.volume, self.node))
        return report

    def check_send(self, order: Order, base: str, target: str) -> None:
        """Whether a delta from base to target can be served: BASE_GONE, TARGET_GONE."""
        report = self._examiner.examine(compare_live=False)
        check_volume(order, report)
        check_epoch(order, report.record)
        self._lineage_to(report, target)
        held = report.lineage.find(base) if base else None
        if base and (held is None or not held.present):
            raise Refused("BASE_GONE", f"snapshot {base} of {self.volume} is not on {self.node} any more")

    def lineage_to(self, target: str) -> Lineage:
        """The lineage as it was when that snapshot was the tip; TARGET_GONE if its data is not here."""
        return self._lineage_to(self._examiner.examine(compare_live=False), target)

    def took_tip(self, tip: str, volume_id: str) -> None:
        """As `saw_tip`, and told."""
        seen = self.saw_tip(tip, volume_id)
        if seen is not None:
            self.on_report(seen)

    def saw_tip(self, tip: str, volume_id: str) -> ReplicaReport | None:
        """After a CP or a commit: the new tip is remembered, so that its absence would be a loss, and compared.

        None if the disk does not let it be looked at.
        """
        self._examiner.remember(tip, volume_id)
        return self._looked(compare_live=True)

    def hooks_told(self, after: str | None, unread: Problems = None, *, again: bool = False) -> None:
        """What became of each `after` that was due, see `Examiner.hooks_told`; told if that is news."""
        if self._examiner.hooks_told(after, unread, again=again):
            self._tell()

    # Inside.

    def _new(self, order: Order, tip: Snapshot | None, note: str) -> NewSnapshot:
        if tip is not None and tip.cp.epoch > order.epoch:
            raise Superseded("STALE_EPOCH", f"the tip of {self.volume} is {tip.cp}: epoch {order.epoch} is over")
        return NewSnapshot(
            id=str(uuid.uuid4()),
            volume_id=order.volume_id,
            cp=ConsistencyPoint(order.epoch, (tip.cp.sequence if tip is not None else 0) + 1),
            parent=tip.id if tip is not None else "",
            epoch_id=order.epoch_id,
            create_time_ms=now_ms(),
            note=note,
        )

    def _lineage_to(self, report: ReplicaReport, target: str) -> Lineage:
        lineage = report.lineage.since(target)
        if lineage.tip is None or not lineage.tip.present:
            raise Refused("TARGET_GONE", f"snapshot {target} of {self.volume} is not on {self.node} any more")
        return lineage

    def _pinned_by(self, snapshot_id: str, report: ReplicaReport) -> str:
        if snapshot_id == report.lineage.tip_id:
            return "the tip"
        if report.record is not None and snapshot_id == report.record.newest_id:
            return "the newest known CP"
        if self.transfers is not None and snapshot_id in self.transfers.pinned(self.volume):
            return "needed by a transfer, or was within the last two minutes"
        return ""

    def _not_lost(self, report: ReplicaReport) -> None:
        if report.presence is Presence.LOST:
            raise Refused("REPLICA_LOST", f"nothing is written for {self.volume} while its disk is not there")

    def _tell(self) -> None:
        seen = self._looked(compare_live=False)
        if seen is not None:
            self.on_report(seen)

    def _looked(self, *, compare_live: bool) -> ReplicaReport | None:
        try:
            return self._examiner.examine(compare_live=compare_live)
        except ResilverError as error:
            _log.warning("look failed", volume=self.volume, reason=error.reason, message=error.message)
            return None

    def _answered(self, request_id: str, asked: object) -> tuple[Snapshot, bool] | None:
        known = self._requests.get(request_id) if request_id else None
        if known is None:
            return None
        if known[0] != asked:
            raise Invalid("REQUEST_ID_REUSED", f"request {request_id} was another one", field="request_id")
        return known[1], known[2]

    def _answer(self, request_id: str, asked: object, snapshot: Snapshot, taken: bool) -> None:
        if request_id:
            self._requests[request_id] = (asked, snapshot, taken)
            while len(self._requests) > REQUESTS_MAX:
                self._requests.popitem(last=False)
