"""One agent: the real rules of a replica, of its runs and of whom to obey, above disks and a network in memory.

`Replica`, `Examiner`, `Run`, `Runs`, `Tickets` and `Identity` are the agent's own; what is modelled is the disk below
them, the threads (a run goes on step by step when the world says so), the transport, and the outbox. A crash falls at
any step of a disk or of state_dir; what is not on one of these is gone then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from agent.basecheck import check_lineages
from agent.examiner import ReplicaSettings
from agent.identity import Pin
from agent.peers import Source
from agent.replica import Replica
from agent.run import Run
from agent.runfile import RunOrder, SavedRun, StagePlace
from agent.runs import Runs
from agent.stream.work import Stopped
from agent.tickets import Ticket
from coordinator.core import events as e
from coordinator.core.cluster import NodeView, Size
from coordinator.core.orders import (
    AnyOrder,
    Done,
    Dropped,
    DropSnapshot,
    OpenEpoch,
    OrderResult,
    PrepareSend,
    Receive,
    StopTransfer,
    Taken,
    TakeSnapshot,
)
from resilver.errors import NotFound, Refused, ResilverError, Unavailable
from resilver.lineage import Lineage
from resilver.volume import Order, Progress, ReplicaReport, ResyncState, VolumeRecord
from tests.simulation.disk import BLOCKS, Disk, KeptIdentity, KeptTickets, StateDir
from tests.simulation.guarantees import Guarantees

CLUSTER = "demo"
SILENCE_MAX_MS = 600_000
KEEP_LAST = 4


class Crash(BaseException):
    """The agent's process ends here. No rule of the agent may catch it."""


class Inline:
    """A `Worker` without a thread."""

    def __init__(self, _name: str, **_about: str) -> None:
        return

    def call(self, job: Callable[[], Any]) -> Any:
        return job()


class World(Protocol):
    """What an agent has around it."""

    watch: Guarantees

    def next_id(self, kind: str) -> str: ...
    def now_ms(self, who: str) -> int: ...
    def reach(self, node: str, source: str) -> Agent:
        """Another agent that answers now; Unavailable if it does not."""


class StepRun(Run):
    """A run whose steps are taken one by one: `drive` takes the next."""

    def __init__(self, agent: Agent, wanted: RunOrder, replica: Replica, told: Any, **more: Any) -> None:
        super().__init__(wanted, replica, None, told, **more)  # type: ignore[arg-type]  # peers are asked by `fetch`
        self._agent = agent
        self._disk = agent.disks[wanted.order.volume]
        self._steps = self._work()

    def drive(self) -> None:
        try:
            next(self._steps)
        except StopIteration:
            self.ended.set()
        except ResilverError as error:
            self._fail(error)
            self.ended.set()

    def end(self, why: ResilverError | None) -> None:
        super().end(why)
        if not self.ended.is_set():
            self._fail(Stopped())
            self.ended.set()

    def on_worker(self, job: Callable[[], Any]) -> Any:
        if self.stop.is_set():
            raise Stopped
        return job()

    def _work(self) -> Iterator[None]:
        wanted, backend = self.wanted, self._disk
        self.tell(state=ResyncState.PREPARING)
        yield
        report = self.on_worker(self._begun)
        if report is None:
            return
        yield
        if wanted.base == wanted.target:
            lineage = report.lineage
            stage = backend.open_stage(wanted.base, wanted.target, BLOCKS)
        else:
            lineage = yield from self._prepare_stage(report)
            stage = backend.open_stage(wanted.base, wanted.target, BLOCKS)
            yield from self._blocks(stage)
        yield
        backend.decided_on = wanted.order.expected_tip or ""
        self.on_worker(lambda: self._commit(stage, lineage))
        order = wanted.order
        epoch = (order.epoch, order.epoch_id)
        self._agent.world.watch.told_epoch(self._agent.name, order.volume, order.volume_id, epoch, "a commit")

    def _prepare_stage(self, report: ReplicaReport) -> Iterator[None]:
        wanted, disk = self.wanted, self._disk
        known, pair = disk.stage, (wanted.base, wanted.target)
        if self.place is not None and known is not None and (known.base, known.target) == pair and known.lineage:
            self.may_replace(report, known.lineage)
            return known.lineage
        lineage, left = yield from self._asked(self._agent.fetch)
        self.may_replace(report, lineage)
        self.tell(total_bytes=len(left), range_count=len(left))
        if wanted.base:
            check_lineages(wanted.base, report.lineage, lineage)
        self.place = StagePlace(BLOCKS)
        stage = disk.open_stage(wanted.base, wanted.target, BLOCKS)
        stage.lineage, stage.left = lineage, left
        return lineage

    def _blocks(self, stage: Any) -> Iterator[None]:
        self.tell(state=ResyncState.TRANSFERRING)
        while stage.left:
            yield
            if self.stop.is_set():
                raise Stopped
            block = stage.left[0]
            value = yield from self._asked(lambda wanted, source, block=block: self._agent.pull(wanted, source, block))
            stage.content[block] = value
            stage.left.pop(0)
            self.tell(done_bytes=(self.progress.done_bytes or 0) + 1)
        self.tell(state=ResyncState.VERIFYING)

    def _asked(self, call: Callable[[RunOrder, Source], Any]) -> Iterator[None]:
        """The first good answer, as the real run asks: those that are away are waited for, but not for ever."""
        left = list(self.wanted.sources)
        until = self._agent.now_ms() + SILENCE_MAX_MS
        said = "no source"
        while left and self._agent.now_ms() <= until:
            for source in tuple(left):
                try:
                    return call(self.wanted, source)
                except Unavailable as error:
                    said = error.message
                except ResilverError as error:
                    said = error.message
                    left.remove(source)
            if left:
                yield
                if self.stop.is_set():
                    raise Stopped
        raise Refused("NO_SOURCE", said)


class StepRuns(Runs):
    """The real bookkeeping of runs, above a state_dir in memory, and without threads."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._kept = agent.state.runs
        self._replicas, self._tickets = agent.replicas, agent.tickets
        self._on_progress = agent.outbox.put_progress
        self._mutex = threading.Lock()
        self._runs: dict[str, Any] = {}
        self._saved: dict[str, SavedRun] = {}
        self._stopped: dict[str, None] = {}

    def active(self) -> list[StepRun]:
        return [run for run in self._runs.values() if not run.ended.is_set()]

    def resume(self) -> None:
        for volume, saved in list(self._kept.items()):
            self._saved[volume] = saved
            if saved.progress.state.final:
                continue
            progress = replace(saved.progress, state=ResyncState.QUEUED)
            self._runs[volume] = self._made(saved.wanted, self._replicas[volume], place=saved.place, progress=progress)

    def _made(self, wanted: RunOrder, replica: Replica, **more: Any) -> Any:
        return StepRun(self._agent, wanted, replica, self._told, **more)

    def _start(self, run: Run, before: Run | None) -> None:
        return

    def _save(self, run: Run) -> None:
        self._agent.step("run.begun")
        volume = run.wanted.order.volume
        saved = SavedRun(run.wanted, run.progress, run.place, self._agent.now_ms())
        self._saved[volume] = self._kept[volume] = saved


class Outbox:
    """What there is to tell, in the order of `agent/outbox.py`: runs first, answers, reports; nothing twice."""

    def __init__(self) -> None:
        self.progress: dict[str, Progress] = {}
        self.answers: dict[tuple[str, str], ReplicaReport] = {}
        self.reports: dict[str, ReplicaReport] = {}
        self.newest: dict[str, ReplicaReport] = {}

    def put_progress(self, progress: Progress) -> None:
        self.progress[progress.resync_id] = progress

    def put_report(self, report: ReplicaReport) -> None:
        self.reports[report.volume] = self.newest[report.volume] = report

    def put_answer(self, report: ReplicaReport, examine_id: str) -> None:
        self.answers[report.volume, examine_id] = report

    def clear(self) -> None:
        self.progress.clear()
        self.answers.clear()
        self.reports.clear()

    def take(self) -> list[Progress | tuple[ReplicaReport, str]]:
        told: list[Progress | tuple[ReplicaReport, str]] = [*self.progress.values()]
        for (volume, examine_id), report in self.answers.items():
            newest = self.newest.get(volume, report)
            told.append((newest if newest.examine_time_ms > report.examine_time_ms else report, examine_id))
            self.reports.pop(volume, None)
        told += [(report, "") for report in self.reports.values()]
        self.clear()
        return told


class Agent:
    """A node. `disks` and `state` outlive its crashes."""

    def __init__(self, world: World, name: str, volumes: tuple[str, ...], priority: int) -> None:
        self.world, self.name, self.volumes, self.priority = world, name, volumes, priority
        self.state = StateDir(Pin(CLUSTER))
        self.disks = {volume: Disk(name, volume, world.watch, self) for volume in volumes}
        for volume, disk in self.disks.items():
            world.watch.disks[name, volume] = disk
        self.alive = False
        self.fuse = 0
        self.stream: Any = None
        self.seq = 0

    # What the disks and rules below ask for.

    def next_id(self, kind: str) -> str:
        return self.world.next_id(kind)

    def now_ms(self) -> int:
        return self.world.now_ms(self.name)

    def step(self, _name: str) -> None:
        """Where a crash may fall: `fuse` counts down to it."""
        if self.fuse:
            self.fuse -= 1
            if not self.fuse:
                raise Crash

    # Life.

    def start(self) -> None:
        self.boot = self.next_id(f"{self.name}-boot-")
        self.identity = KeptIdentity(self.state, self.boot, self.step)
        self.tickets = KeptTickets(self.state, lambda: self.now_ms() / 1000)
        self.outbox = Outbox()
        settings = ReplicaSettings(self.priority, KEEP_LAST)
        self.replicas = {
            volume: Replica(volume, self.name, disk, self.identity, settings)  # type: ignore[arg-type]  # no streams
            for volume, disk in self.disks.items()
        }
        self.runs = StepRuns(self)
        for replica in self.replicas.values():
            replica.recover()
            replica.transfers = self.runs
            replica.on_report = self.outbox.put_report
        self.runs.resume()
        self.alive = True

    def crash(self) -> None:
        self.alive, self.fuse = False, 0

    def hello(self, stream: str) -> e.AgentConnected:
        pin, address = self.identity.pin, f"{self.name}:1"
        node = NodeView(self.name, self.boot, address, f"{self.name}:2", "1", self.volumes, connected=True)
        return e.AgentConnected(stream, node, CLUSTER, pin.store_id, pin.term, pin.leader_id)

    def tell_everything(self) -> None:
        """At the beginning of a stream."""
        self.outbox.clear()
        for progress in self.runs.progresses():
            self.outbox.put_progress(progress)
        for replica in self.replicas.values():
            replica.examine()

    def examine(self, volumes: tuple[str, ...], examine_id: str) -> None:
        for volume in volumes:
            if volume in self.replicas:
                self.outbox.put_answer(self.replicas[volume].examine(), examine_id)

    def store(self, record: VolumeRecord) -> None:
        """A record that came by the stream; what forbids it is logged, and nobody is told."""
        if record.volume not in self.replicas:
            return
        try:
            self.replicas[record.volume].store_record(record)
        except ResilverError:
            return
        epoch = (record.epoch, record.epoch_id)
        self.world.watch.told_epoch(self.name, record.volume, record.volume_id, epoch, "record")

    def obey(self, one: AnyOrder) -> OrderResult:
        """Raises what the service would answer, or Crash."""
        order = one.order
        before, was = self.identity.pin, self._look(order.volume)
        try:
            self.identity.admit(order)
            replica = self.replicas.get(order.volume)
            if replica is None:
                raise NotFound("VOLUME_NOT_FOUND", f"{self.name} has no volume {order.volume}")
            answer = self._obeyed(one, order, replica)
        except ResilverError:
            if self.identity.pin != before:
                self.world.watch.met(self.name, order.term, order.leader_id, "admission")
            raise
        self.world.watch.obeyed(self.name, order, one, changed=was != self._look(order.volume))
        return answer

    def _look(self, volume: str) -> object:
        """What an order may change."""
        disk = self.disks.get(volume)
        if disk is None:
            return None
        run = self.state.runs.get(volume)
        return disk.records, disk.record, disk.grant, len(disk.stored), run.wanted.resync_id if run else ""

    def _obeyed(self, one: AnyOrder, order: Order, replica: Replica) -> OrderResult:
        match one:
            case OpenEpoch():
                replica.open_epoch(order, one.record, grant=one.grant)
                return Done()
            case TakeSnapshot():
                return Taken(
                    *replica.take_snapshot(
                        order, one.request_id, only_if_modified=one.only_if_modified, opening=one.opening
                    )
                )
            case PrepareSend():
                replica.check_send(order, one.base, one.target)
                if not one.size_only:
                    names = (one.ticket, one.resync_id, order.volume, one.target_node, one.base, one.target)
                    self.tickets.keep(Ticket(*names, lifetime_s=3600))
                changed = len(self.disks[order.volume].delta(one.base, one.target))
                return Size(changed, changed, BLOCKS)
            case Receive():
                sources = tuple(Source(each.node, each.address, each.stream_address) for each in one.sources)
                ids = (one.resync_id, one.base, one.target, one.ticket)
                flags = (one.replace_own_data, one.replace_unrelated)
                return self.runs.receive(RunOrder(order, *ids, sources, *flags))
            case StopTransfer():
                return self.runs.stop(order.volume, one.resync_id, discard_stage=one.discard_stage)
            case DropSnapshot():
                return Dropped(replica.drop(order, one.snapshot_id))
            case _:
                raise AssertionError(one)

    # As a target, and as a source.

    def fetch(self, wanted: RunOrder, source: Source) -> tuple[Lineage, list[int]]:
        """What the source tells of the delta: the lineage of the target, and the blocks that differ."""
        peer = self.world.reach(self.name, source.node)
        volume = wanted.order.volume
        ticket = peer.shown(wanted, self.name)
        lineage = peer.replicas[volume].lineage_to(ticket.target)
        return lineage, peer.disks[volume].delta(ticket.base, ticket.target)

    def pull(self, wanted: RunOrder, source: Source, block: int) -> int:
        """One block of the target."""
        peer = self.world.reach(self.name, source.node)
        return peer.disks[wanted.order.volume].read(peer.shown(wanted, self.name).target)[block]

    def shown(self, wanted: RunOrder, target_node: str) -> Ticket:
        return self.tickets.check(
            secret=wanted.ticket,
            resync_id=wanted.resync_id,
            volume=wanted.order.volume,
            target_node=target_node,
            target=wanted.target,
        )
