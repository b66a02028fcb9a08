"""The receiving runs of this node: one for each replica, so many at once, and what of them survives a kill.

* A run's order is on the disk before it begins, its progress with every step, and its counts every few seconds. So an
  agent that is started again goes on by itself, with no coordinator in reach, and answers for a run that has ended.
* The same resync asked for again gets the answer of the run there is. Another resync replaces the run; the stage,
  which belongs to (base, target), is used again where these agree. One that was stopped before it came is not begun.
* Runs beyond the bound wait as QUEUED; the higher priority goes first, and then the first come.
* A stage that no run has used for a day is discarded, at start and once an hour.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from agent.disk.durable import disk_errors, make_own_dir, read_json, write_json
from agent.disk.ioprio import set_io_priority
from agent.examiner import now_ms
from agent.rights import check_tip
from agent.run import Run
from agent.runfile import SavedRun, run_from_json, run_to_json
from agent.slots import Slots
from resilver.errors import NotFound, ResilverError, Superseded
from resilver.telemetry import bound
from resilver.volume import Presence, Progress, ResyncState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from agent.peers import Peers
    from agent.replica import Replica
    from agent.runfile import RunOrder, StagePlace
    from agent.stream.throttle import Throttle
    from agent.tickets import Tickets
    from resilver.config import IoPriority

COUNTS_SAVED_S: Final = 5.0
STOP_TIMEOUT_S: Final = 10.0
STAGE_LIFE_MS: Final = 24 * 3_600_000
STOPPED_KEPT_MAX: Final = 256

_log = structlog.get_logger(__name__)


class Runs:
    """All receiving runs. `on_progress` is called from their threads, with every progress in order."""

    def __init__(
        self,
        directory: Path,
        replicas: Mapping[str, Replica],
        peers: Peers,
        tickets: Tickets,
        *,
        receive_max_count: int,
        spool_max_bytes: int,
        on_progress: Callable[[Progress], None],
        throttle: Throttle | None = None,
    ) -> None:
        self._directory: Final = directory
        self._replicas: Final = replicas
        self._peers: Final = peers
        self._tickets: Final = tickets
        self._spool_max_bytes: Final = spool_max_bytes
        self._on_progress: Final = on_progress
        self._throttle: Final = throttle
        self.io_priority: IoPriority = "normal"
        self._mutex = threading.Lock()
        self._runs: dict[str, Run] = {}
        self._saved: dict[str, SavedRun] = {}
        self._saved_at: dict[str, float] = {}
        self._stopped: dict[str, None] = {}
        self.slots: Final = Slots(receive_max_count)
        with disk_errors(directory):
            make_own_dir(directory)

    # Asked by the services.

    def receive(self, wanted: RunOrder) -> Progress:
        """Begins a run, on the replica's worker; what forbids it at once is raised, the rest travels as progress."""
        volume = wanted.order.volume
        known = self._saved.get(volume)
        if known is not None and known.wanted.resync_id == wanted.resync_id:
            return self._progress_of(volume, known)
        replica = self._replicas[volume]
        report = replica.check_receive(wanted.order, replaces=wanted.replace_unrelated)
        if report.lineage.find(wanted.target) is None:
            check_tip(wanted.order, report.lineage)
        wanted = replace(wanted, replaces_lost=wanted.replace_unrelated and report.presence is Presence.LOST)
        place = None
        if known is not None and (known.wanted.base, known.wanted.target) == (wanted.base, wanted.target):
            place = known.place
        run = self._made(wanted, replica, place=place)
        with self._mutex:
            if wanted.resync_id in self._stopped:
                # The order to stop it has overtaken this one.
                why = _cancelled()
                return replace(run.progress, state=ResyncState.CANCELLED, reason=why.reason, message=why.message)
            self._save(run)
            before = self._runs.get(volume)
            self._runs[volume] = run
        if before is not None:
            before.end(_replaced(wanted))
        self._start(run, before)
        return run.progress

    def stop(self, volume: str, resync_id: str, *, discard_stage: bool) -> Progress:
        """Ends a run and answers what became of it; a commit that has begun is finished. Not on the worker."""
        served = self._tickets.drop(resync_id)
        with self._mutex:
            known = self._saved.get(volume)
            if known is None or known.wanted.resync_id != resync_id:
                known = None
                self._stopped[resync_id] = None
                while len(self._stopped) > STOPPED_KEPT_MAX:
                    del self._stopped[next(iter(self._stopped))]
        if known is None:
            if served:
                return Progress(resync_id, volume, ResyncState.CANCELLED)
            said = f"no transfer of {volume} here belongs to resync {resync_id}"
            raise NotFound("RESYNC_NOT_FOUND", said, resync=resync_id)
        run = self._runs.get(volume)
        if run is not None and not run.ended.is_set():
            run.end(_cancelled())
            run.ended.wait(STOP_TIMEOUT_S)
        progress = self._progress_of(volume, known)
        if discard_stage and progress.state.final and progress.state is not ResyncState.SUCCEEDED:
            self._replicas[volume].worker.call(partial(self._discard, volume, resync_id))
        return progress

    def _discard(self, volume: str, resync_id: str) -> None:
        """On the worker, where runs are begun too: a run that came meanwhile may have that stage already."""
        known = self._saved.get(volume)
        if known is not None and known.wanted.resync_id == resync_id:
            self._replicas[volume].backend.discard_stage()

    def progresses(self) -> tuple[Progress, ...]:
        """The last word on every run that is known here, ended ones too."""
        return tuple(self._progress_of(volume, saved) for volume, saved in tuple(self._saved.items()))

    @property
    def active_count(self) -> int:
        return sum(not run.ended.is_set() for run in tuple(self._runs.values()))

    # Asked by a replica.

    def end_below(self, volume: str, volume_id: str, epoch: int) -> None:
        """Ends the run of a lower epoch: what it would bring is not the volume's newest state any more."""
        run = self._runs.get(volume)
        if run is None or run.ended.is_set():
            return
        order = run.wanted.order
        if order.volume_id == volume_id and order.epoch < epoch:
            run.end(Superseded("STALE_EPOCH", f"epoch {order.epoch} is over: epoch {epoch} was opened"))

    def pinned(self, volume: str) -> frozenset[str]:
        """What the run and the tickets of a volume need."""
        run = self._runs.get(volume)
        wanted = () if run is None or run.ended.is_set() else (run.wanted.base, run.wanted.target)
        return self._tickets.pinned(volume) | {each for each in wanted if each}

    # At start, once an hour, at the end.

    def resume(self) -> None:
        """Reads what was left by the start before, and goes on with what had not ended."""
        for volume, replica in self._replicas.items():
            try:
                value = read_json(self._file(volume))
            except ResilverError as error:
                # Only a coordinator's order was lost, and it gives it again when it sees this start.
                _log.error("run not resumed", volume=volume, reason=error.reason, message=error.message)
                continue
            saved = None if value is None else run_from_json(value)
            if value is not None and (saved is None or saved.wanted.order.volume != volume):
                _log.error("run not resumed", volume=volume, reason="IO_ERROR", message=_strange(self._file(volume)))
                continue
            if saved is None:
                continue
            self._saved[volume] = saved
            if saved.progress.state.final:
                continue
            _log.info("run resumed", volume=volume, resync=saved.wanted.resync_id, term=saved.wanted.order.term)
            progress = replace(saved.progress, state=ResyncState.QUEUED)
            run = self._made(saved.wanted, replica, place=saved.place, progress=progress)
            with self._mutex:
                self._runs[volume] = run
            self._start(run, None)

    def sweep(self, volume: str) -> None:
        """On the worker: discards a stage that no run has used for a day."""
        run, saved = self._runs.get(volume), self._saved.get(volume)
        if run is not None and not run.ended.is_set():
            return
        if saved is None or now_ms() - saved.time_ms > STAGE_LIFE_MS:
            try:
                self._replicas[volume].backend.discard_stage()
            except ResilverError as error:  # tried again; what is wrong with the volume is told with every look
                _log.warning("stage not discarded", volume=volume, reason=error.reason, message=error.message)

    def close(self, deadline_s: float) -> None:
        """Asks every run to pause where it is: they go on at the next start."""
        runs = [run for run in tuple(self._runs.values()) if not run.ended.is_set()]
        for run in runs:
            run.end(None)
        until = time.monotonic() + deadline_s
        for run in runs:
            run.ended.wait(max(0.0, until - time.monotonic()))

    # Inside.

    def _made(
        self,
        wanted: RunOrder,
        replica: Replica,
        *,
        place: StagePlace | None,
        progress: Progress | None = None,
    ) -> Run:
        return Run(
            wanted,
            replica,
            self._peers,
            self._told,
            progress=progress,
            place=place,
            spool_max_bytes=self._spool_max_bytes,
            throttle=self._throttle,
        )

    def _start(self, run: Run, before: Run | None) -> None:
        name = f"run of {run.wanted.order.volume}"
        threading.Thread(target=self._work, args=(run, before), name=name, daemon=True).start()

    def _work(self, run: Run, before: Run | None) -> None:
        """The stage has one owner: the run before must have let go of it."""
        wanted = run.wanted
        about = {"volume": wanted.order.volume, "resync": wanted.resync_id}
        with bound(**about, term=wanted.order.term, epoch=wanted.order.epoch):
            if before is not None:
                before.ended.wait()
            if self.io_priority != "normal":
                set_io_priority(self.io_priority)
            run.work(self.slots)

    def _told(self, run: Run) -> None:
        with self._mutex:
            if self._runs.get(run.wanted.order.volume) is run:
                try:
                    self._save(run)
                except ResilverError as error:
                    # The order is on the disk, and that is enough: a restart begins the run again and finds how far
                    # the replica and the stage are.
                    _log.warning("progress not saved", reason=error.reason, message=error.message)
        self._on_progress(run.progress)

    def _save(self, run: Run) -> None:
        """With every step at once, with counts now and then. Under the mutex, so that a run that was replaced writes
        nothing after its successor.
        """
        volume = run.wanted.order.volume
        known = self._saved.get(volume)
        saved = SavedRun(run.wanted, run.progress, run.place, now_ms())
        same_step = (
            known is not None
            and known.wanted.resync_id == run.wanted.resync_id
            and known.progress.state is run.progress.state
            and known.place == run.place
        )
        if same_step and time.monotonic() - self._saved_at.get(volume, 0.0) < COUNTS_SAVED_S:
            return
        write_json(self._file(volume), run_to_json(saved))
        self._saved[volume] = saved
        self._saved_at[volume] = time.monotonic()

    def _progress_of(self, volume: str, saved: SavedRun) -> Progress:
        run = self._runs.get(volume)
        if run is not None and run.wanted.resync_id == saved.wanted.resync_id:
            return run.progress
        return saved.progress

    def _file(self, volume: str) -> Path:
        return self._directory / f"{volume}.json"


def _strange(path: Path) -> str:
    return f"{path} holds no run of this volume"


def _replaced(wanted: RunOrder) -> ResilverError:
    return ResilverError("CANCELLED", f"replaced by resync {wanted.resync_id}")


def _cancelled() -> ResilverError:
    return ResilverError("CANCELLED", "cancelled by an operator")
