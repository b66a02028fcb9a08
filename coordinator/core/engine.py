"""The coordinator's decisions: `step(event, now)` takes one event and a time, and gives the actions to run, in order.

The caller's whole loop is::

    while reigning:
        event = await next_event()
        for action in engine.step(event, now()):
            await run(action)          # a Persist that fails ends the reign, and this engine with it

What must be remembered stands before what acts on it. The engine does no I/O, reads no clock and draws no lots;
`new_id` is given, and `new_ticket`, which nobody can guess. Only reports change what it believes of a replica: an
order's answer tells that it was heard, and the report that follows tells what became of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

from coordinator.core import decide, ending, hearing, points, prepare, pruning, resyncs, upkeep
from coordinator.core.audited import AuditEntry
from coordinator.core.cluster import Cancelling, ClusterEvent, ElectionRecord, NodeView, Resync, Size, VolumeView
from coordinator.core.context import Context, Identity, Settings, accept
from coordinator.core.etag import volume_etag
from coordinator.core.events import (
    Action,
    AgentConnected,
    AgentDisconnected,
    AgentHeard,
    Answer,
    Attempted,
    Event,
    Kept,
    Loaded,
    OrderAnswered,
    ProgressReported,
    ReplicaReported,
    Requested,
    Ticked,
)
from coordinator.core.history import History
from coordinator.core.known import RefusedAgent
from coordinator.core.orders import Done
from coordinator.core.planner import plan_etag
from coordinator.core.requests import (
    AdoptStoreRequest,
    CancelRequest,
    DropRequest,
    ElectRequest,
    ExportRequest,
    LimitRequest,
    PauseRequest,
    Planned,
    PlanRequest,
    PruneRequest,
    RemoveRequest,
    Request,
    ResyncRequest,
    ResyncsStarted,
    SnapshotRequest,
    SnapshotsTaken,
    VolumeRefusal,
)
from coordinator.core.tasks import Flow, Task, at_once, join
from coordinator.core.trail import Trail
from resilver.errors import Conflict, Invalid, Refused, ResilverError
from resilver.limits import NodeLimits

FLOW_MAX_MS: Final = 15 * 60 * 1000


class Engine:
    """One leader's mind for one reign; the next leader begins with what was stored."""

    def __init__(
        self,
        identity: Identity,
        settings: Settings,
        loaded: Loaded,
        now_ms: int,
        new_id: Callable[[], str],
        *,
        new_ticket: Callable[[], str],
        check: Callable[[Kept], None] = accept,
    ) -> None:
        self._context = Context(identity, settings, new_id, new_ticket, History(identity.term, loaded.events), now_ms)
        context = self._context
        context.check = check
        context.trail = Trail(identity.term, loaded.audit)
        context.entries.update(loaded.volumes)
        for volume, entry in loaded.volumes.items():
            context.hold(volume, entry)
        context.elections.update({name: deque(records) for name, records in loaded.elections.items()})
        for resync in loaded.resyncs.values():
            # An export has no tickets: who puts one back goes on with new ones.
            lacks = not (resync.ticket or resync.state.final)
            context.resyncs.put(replace(resync, ticket=new_ticket()) if lacks else resync)
        for node in loaded.nodes.values():
            context.nodes.put(replace(node, connected=False, duplicate=False))
        for resync in loaded.resyncs.values():
            if not resync.state.final:
                context.tasks.spawn(resyncs.lead(context, resync.id))

    # ------------------------------------------------------------ reading

    @property
    def identity(self) -> Identity:
        return self._context.identity

    def volume_names(self) -> tuple[str, ...]:
        return self._context.names()

    def node_names(self) -> frozenset[str]:
        """Every node that is known, or has a replica of any volume."""
        return self._context.node_names()

    def view(self, volume: str) -> VolumeView:
        """The volume as it is now: a report counts while its node is connected. Raises NotFound."""
        self._context.require(volume)
        return self._context.view(volume)

    def nodes(self) -> Mapping[str, NodeView]:
        return self._context.nodes

    def limits(self, node: str) -> NodeLimits | None:
        """What is allowed on a node; None while it is away."""
        return self._context.places.limits.get(node) if self._context.reachable(node) else None

    def refused(self) -> Mapping[str, RefusedAgent]:
        """The agents that were turned away lately, by the names that they gave."""
        return self._context.refused

    def resyncs(self) -> Mapping[str, Resync]:
        return self._context.resyncs

    def active_resync(self, volume: str, node: str) -> Resync | None:
        return self._context.active_resync(volume, node)

    def elections(self, volume: str) -> tuple[ElectionRecord, ...]:
        """Newest first, refusals among them."""
        return tuple(self._context.elections.get(volume, ()))

    def events(self) -> tuple[ClusterEvent, ...]:
        """Oldest first, at most as many as are kept; those of a step only count once its actions are done."""
        return tuple(self._context.history)

    def audit(self) -> tuple[AuditEntry, ...]:
        """Orders and refused attempts, oldest first; those of a step only count once its actions are done."""
        return tuple(self._context.trail)

    def size(self, volume: str, base: str, target: str) -> Size | None:
        return self._context.sizes.get((volume, base, target))

    def pinned_by(self, volume: str, node: str, snapshot_id: str) -> tuple[str, ...]:
        """Why that node may not let the snapshot go."""
        return pruning.pinned_by(self._context.view(volume), self._context, node, snapshot_id)

    # ------------------------------------------------------------ one step

    def step(self, event: Event, now_ms: int) -> list[Action]:
        """Takes on one event; the actions are to be run in order, before the next step."""
        context = self._context
        context.now_ms = now_ms
        context.actions = []
        try:
            self._take(event)
        except ResilverError as error:
            hearing.not_taken(context, event, error)
        context.tasks.settle(now_ms, deadlines=isinstance(event, Ticked))
        for failure in context.tasks.failures():
            context.tell_once("NOT_STORED", failure.message, reason=failure.reason)
        context.send_examines()
        return context.actions

    def _take(self, event: Event) -> None:
        """What the event is by itself. Raises what `Context.persist` does: it costs the event, and not the reign."""
        context = self._context
        match event:
            case AgentConnected():
                hearing.connected(context, event)
            case AgentDisconnected():
                hearing.disconnected(context, event.stream)
            case AgentHeard():
                hearing.heartbeat(context, event)
            case ReplicaReported():
                hearing.reported(context, event)
            case ProgressReported():
                hearing.progressed(context, event)
            case OrderAnswered():
                context.order_answered(event.order_id, event.answer)
            case Requested():
                context.tasks.spawn(self._answer(event))
            case Attempted():
                context.trail.attempt(context.now_ms, event.asked, event.error)
            case Ticked():
                hearing.tick(context)
                context.enter_attempts()

    # ------------------------------------------------------------ requests

    def _answer(self, event: Requested) -> Flow[None]:
        """Runs one request's flow, and answers what it returns or raises."""
        entry = self._context.enter(event.asked) if event.asked is not None else None
        try:
            answer: object = yield from self._serve(event.request)
        except ResilverError as error:
            answer = error
        if entry is not None:
            self._context.enter_answer(entry, answer)
        self._context.emit(Answer(event.key, answer))

    def _serve(self, request: Request) -> Flow[object]:
        handlers: dict[type, Callable[[Any], Flow[object]]] = {
            ResyncRequest: self._resync,
            PlanRequest: self._plan,
            ElectRequest: self._elect,
            SnapshotRequest: self._snapshot,
            CancelRequest: self._cancel,
            DropRequest: partial(pruning.drop, self._context),
            PruneRequest: partial(pruning.prune, self._context),
            ExportRequest: partial(upkeep.export, self._context),
            PauseRequest: self._pause,
            RemoveRequest: self._remove,
            AdoptStoreRequest: self._adopt,
            LimitRequest: partial(upkeep.limit, self._context),
        }
        return (yield from handlers[type(request)](request))

    def _names(self, volumes: tuple[str, ...]) -> tuple[str, ...]:
        for volume in volumes:
            self._context.require(volume)
        return tuple(dict.fromkeys(volumes)) or self._context.names()

    def _snapshot(self, request: SnapshotRequest) -> Flow[SnapshotsTaken]:
        return (
            yield from upkeep.snapshot_volumes(self._context, replace(request, volumes=self._names(request.volumes)))
        )

    def _pause(self, request: PauseRequest) -> Flow[Done]:
        upkeep.pause(self._context, replace(request, volumes=self._names(request.volumes)))
        yield from at_once()
        return Done()

    def _remove(self, request: RemoveRequest) -> Flow[Done]:
        if request.volume:
            self._context.require(request.volume)
            self._check_etag(request.volume, request.etag)
        upkeep.remove(self._context, request)
        yield from at_once()
        return Done()

    def _elect(self, request: ElectRequest) -> Flow[ElectionRecord]:
        context = self._context
        context.require(request.volume)
        for node in sorted({*request.accept_loss, *([request.choose] if request.choose else [])}):
            if node not in context.view(request.volume).replicas:
                upkeep.require_node(context, node)
        if not (yield from context.lock(request.volume)):
            raise Refused(
                "OPENING", f"another operation on {request.volume} has not ended", next_command="resilver status"
            )
        try:
            self._check_etag(request.volume, request.etag)
            return (yield from decide.election(context, request))
        finally:
            context.unlock(request.volume)

    def _check_etag(self, volume: str, etag: str) -> None:
        if etag and etag != volume_etag(self._context.view(volume)):
            raise Conflict(
                "ETAG_MISMATCH",
                f"{volume} has changed since it was looked at",
                next_command=f"resilver status {volume}",
            )

    def _prepare_all(self, request: ResyncRequest | PlanRequest) -> Flow[tuple[prepare.Prepared, ...]]:
        """Examines and plans every volume named; each one's turn lasts until `_release`."""
        context = self._context
        for node in sorted({*request.nodes, *request.replace}):
            upkeep.require_node(context, node)
        names = self._names(request.volumes)
        turns = {
            name: turn
            for group in points.groups(context, names)
            for turn in [points.Turn(group, context.tasks.spawn(context.lock(*group)))]
            for name in group
        }
        tasks = [context.tasks.spawn(prepare.prepare(context, name, request, turns[name])) for name in names]
        yield from self._all(tasks)
        try:
            return tuple(task.result for task in tasks)
        except ResilverError:
            self._release_turns(turns.values())
            raise

    def _all(self, tasks: list[Task[Any]]) -> Flow[None]:
        """Waits for flows under a volume's lock: each has bounds of its own, and none may be left behind with it, also
        not by a clock that jumps.
        """
        while not (yield from join(tasks, self._context.now_ms + FLOW_MAX_MS)):
            pass

    def _release(self, prepared: tuple[prepare.Prepared, ...]) -> None:
        self._release_turns(one.turn for one in prepared)

    def _release_turns(self, turns: Iterable[points.Turn]) -> None:
        for turn in {id(one): one for one in turns}.values():
            if turn.granted:
                self._context.unlock(*turn.volumes)

    def _resync(self, request: ResyncRequest) -> Flow[ResyncsStarted]:
        context = self._context
        prepared = yield from self._prepare_all(request)
        try:
            found = plan_etag([one.plan for one in prepared])
            if request.plan_etag and request.plan_etag != found:
                raise Conflict(
                    "PLAN_CHANGED",
                    f"the plan is no longer {request.plan_etag} but {found}: a replica has changed since",
                    next_command=prepare.plan_again(request),
                )
            if request.validate_only:
                return self._would_start(prepared)
            tasks = [context.tasks.spawn(prepare.create(context, one, request)) for one in prepared]
            yield from self._all(tasks)
        finally:
            self._release(prepared)
        resyncs: list[Resync] = []
        refusals: list[VolumeRefusal] = []
        for task in tasks:
            resyncs.extend(task.result[0])
            refusals.extend(task.result[1])
        return ResyncsStarted(tuple(resyncs), tuple(refusals))

    def _would_start(self, prepared: tuple[prepare.Prepared, ...]) -> ResyncsStarted:
        refusals = [VolumeRefusal(one.volume, one.plan.refusal) for one in prepared if one.plan.refusal is not None]
        for one in prepared:
            refusals.extend(
                VolumeRefusal(one.volume, row.refusal, row.node) for row in one.plan.replicas if row.refusal is not None
            )
        return ResyncsStarted((), tuple(refusals))

    def _plan(self, request: PlanRequest) -> Flow[Planned]:
        context = self._context
        prepared = yield from self._prepare_all(request)
        try:
            plans = [one.plan for one in prepared]
            if request.take_snapshot:
                plans = []
                for one in prepared:
                    plans.append((yield from prepare.plan_with_point(context, one, request)))
            sized = [context.tasks.spawn(prepare.fill_sizes(context, plan)) for plan in plans]
            yield from join(sized, context.now_ms + FLOW_MAX_MS)
        finally:
            self._release(prepared)
        complete = tuple(task.result if task.finished else plan for task, plan in zip(sized, plans, strict=True))
        return Planned(plan_etag(complete), context.now_ms, complete)

    def _cancel(self, request: CancelRequest) -> Flow[Resync]:
        wanted = Cancelling(request.principal, request.discard_stage)
        return (yield from ending.cancel(self._context, request.resync_id, wanted))

    def _adopt(self, request: AdoptStoreRequest) -> Flow[Done]:
        context = self._context
        if request.store_id != context.identity.store_id:
            message = f"this is store {context.identity.store_id}, not {request.store_id!r}"
            raise Invalid("INVALID_FIELD", message, field="store_id")
        context.adopting = True
        context.tell(
            "STORE_ADOPTED", f"agents of another store take on {request.store_id}", principal=request.principal
        )
        yield from at_once()
        return Done()
