"""Resyncs planned together: volumes examined, CPs taken, what each replica needs, and what that costs.

Everything here is decided in the volume's turn and from one examine; `resyncs.py` leads what is created.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coordinator.core.cluster import (
    Elected,
    NotElected,
    PlanAction,
    Refusal,
    ReplicaPlan,
    Resync,
    Size,
    VolumeEntry,
    VolumePlan,
    VolumeView,
)
from coordinator.core.context import SIZES_MAX, Context
from coordinator.core.decide import establish, examine, first_sight, learn, refuse, settle, would_change
from coordinator.core.election import elect
from coordinator.core.ending import refusal_of
from coordinator.core.orders import PrepareSend
from coordinator.core.planner import plan_volume
from coordinator.core.points import Turn, take_in_turn
from coordinator.core.requests import PlanRequest, ResyncRequest, VolumeRefusal
from coordinator.core.resyncs import begin
from coordinator.core.tasks import Flow
from resilver.errors import Conflict, ResilverError
from resilver.lineage import NO_CP
from resilver.volume import LiveState, VolumeRecord


@dataclass(frozen=True, slots=True)
class Prepared:
    """One volume, examined, its primary settled or refused. Its turn is the caller's to end."""

    turn: Turn
    view: VolumeView
    fresh: frozenset[str]
    plan: VolumePlan
    first: Elected | None = None

    @property
    def volume(self) -> str:
        return self.view.name


def prepare(context: Context, volume: str, request: ResyncRequest | PlanRequest, turn: Turn) -> Flow[Prepared]:
    """Waits for the volume's turn, examines, and plans what is there now."""
    if not (yield from turn.come(context)):
        refusal = Refusal(("OPENING",), f"another operation on {volume} has not ended", next_command="resilver status")
        view = context.view(volume)
        return Prepared(turn, view, frozenset(), _refused(view, refusal))
    examined = yield from examine(context, volume)
    learn(context, volume, examined.fresh)
    view = context.view(volume, examined.fresh)
    paused = _paused(context, volume) if isinstance(request, ResyncRequest) else None
    if paused is not None:
        return Prepared(turn, view, examined.fresh, _refused(view, paused))
    decision = elect(view, now_ms=context.now_ms)
    if isinstance(decision, Elected) and decision.new_epoch and view.record.epoch:
        decision = would_change(view, decision)
    if isinstance(decision, NotElected):
        if isinstance(request, ResyncRequest) and not request.validate_only:
            refuse(context, view, decision, request.principal)
        return Prepared(turn, view, examined.fresh, _refused(view, decision.refusal))
    if decision.new_epoch:
        plan = _plan(context, imagined(view, decision.winner), request, takes_snapshot=True)
        return Prepared(turn, view, examined.fresh, plan, decision)
    settle(context, view)
    view = context.view(volume, examined.fresh)
    modified = view.primary is not None and view.primary.live_modified
    turn.wanted = turn.wanted or modified
    plan = _plan(context, view, request, takes_snapshot=modified)
    return Prepared(turn, view, examined.fresh, plan)


def _paused(context: Context, volume: str) -> Refusal | None:
    """Why none begins, if the volume is paused now."""
    entry = context.entries.get(volume)
    if entry is None or entry.pause is None:
        return None
    said = f"{volume} is paused: {entry.pause.reason}"
    return Refusal(("PAUSED",), said, next_command=f"resilver unpause {volume}")


def take_point(context: Context, prepared: Prepared, principal: str) -> Flow[Refusal | None]:
    """Opens the first epoch, or lets a primary take a CP if it, or one that is taken with it, is modified; returns once
    that CP is recorded. The first epoch is decided again, by what is known once the other volumes took their time.
    """
    volume = prepared.volume
    problem: ResilverError | None = _outdated(context, prepared)
    if problem is not None:
        return refusal_of(problem)
    if prepared.first is not None:
        view = context.view(volume, prepared.fresh)
        decision = elect(view, now_ms=context.now_ms)
        if not isinstance(decision, Elected) or decision.winner != prepared.first.winner:
            return refusal_of(_changed(volume))
        problem = yield from first_sight(context, view, decision, principal)
    elif context.entries[volume].opening:
        problem = yield from establish(context, volume)
    elif prepared.turn.wanted:
        problem = (yield from take_in_turn(context, prepared.turn, volume)) or _outdated(context, prepared)
    if problem is None:
        return None
    return refusal_of(problem, next_command=problem.next_command or f"resilver explain {volume}")


def _outdated(context: Context, prepared: Prepared) -> ResilverError | None:
    """Other volumes, or the CP, may have taken their time: whether the primary is still what it was found to be."""
    same = _reign(prepared.view.entry) == _reign(context.view(prepared.volume).entry)
    return None if same else _changed(prepared.volume)


def _changed(volume: str) -> ResilverError:
    message = f"more has become known of {volume} since it was examined"
    return Conflict("PLAN_CHANGED", message, next_command=f"resilver resync {volume}")


def _reign(entry: VolumeEntry | None) -> tuple[object, ...]:
    if entry is None:
        return ()
    return entry.record.volume_id, entry.record.epoch, entry.record.epoch_id, entry.record.primary, entry.recovering


def plan_again(request: ResyncRequest) -> str:
    """The command that plans what this request asked for."""
    words = [*(request.volumes or ("--all",)), *(f"--to {node}" for node in sorted(request.nodes))]
    words += ["--full"] if request.full else []
    return " ".join(["resilver plan", *words, *(f"--replace {node}" for node in sorted(request.replace))])


def plan_with_point(context: Context, prepared: Prepared, request: PlanRequest) -> Flow[VolumePlan]:
    """Takes the CP first, so that the plan's bytes are exact."""
    if prepared.plan.refusal is not None:
        return prepared.plan
    refusal = yield from take_point(context, prepared, request.principal)
    view = context.view(prepared.volume, prepared.fresh)
    if refusal is not None:
        return _refused(view, refusal)
    return _plan(context, view, request, takes_snapshot=False)


def create(
    context: Context, prepared: Prepared, request: ResyncRequest
) -> Flow[tuple[tuple[Resync, ...], tuple[VolumeRefusal, ...]]]:
    """Takes the CP, plans against it, and creates one resync for each replica that needs one."""
    volume = prepared.volume
    if prepared.plan.refusal is not None:
        return (), (VolumeRefusal(volume, prepared.plan.refusal),)
    # Other volumes, and the CP, may have taken their time.
    refusal = _paused(context, volume) or (yield from take_point(context, prepared, request.principal))
    refusal = refusal or _paused(context, volume)
    if refusal is not None:
        return (), (VolumeRefusal(volume, refusal),)
    plan = _plan(context, context.view(volume, prepared.fresh), request, takes_snapshot=False)
    made: list[Resync] = []
    refused: list[VolumeRefusal] = []
    for row in plan.replicas:
        if row.action is PlanAction.BLOCKED and row.refusal is not None:
            refused.append(VolumeRefusal(volume, row.refusal, row.node))
        elif row.action in (PlanAction.DELTA, PlanAction.FULL):
            made.append(begin(context, volume, row, request.principal))
    return tuple(made), tuple(refused)


def fill_sizes(context: Context, plan: VolumePlan) -> Flow[VolumePlan]:
    """Asks a source what each delta costs, and a diverged replica what preserving its own data costs."""
    if plan.refusal is not None:
        return plan
    tip = context.view(plan.volume).replica(plan.primary).lineage.tip_id
    rows: list[ReplicaPlan] = []
    for row in plan.replicas:
        if row.action not in (PlanAction.DELTA, PlanAction.FULL) or not row.sources:
            rows.append(row)
            continue
        target = row.target or tip
        size = yield from size_of(context, plan.volume, row.sources[0], row.base, target)
        rows.append(replace(row, size=size, preserve_bytes=(yield from _own_bytes(context, plan.volume, row))))
    return replace(plan, replicas=tuple(rows))


def size_of(context: Context, volume: str, node: str, base: str, target: str) -> Flow[Size | None]:
    """What the delta costs, asked once; None if the node cannot tell, or there is no target yet."""
    if not target:
        return None
    if base == target:
        return Size(0, 0, 0)
    known = context.sizes.get((volume, base, target))
    if known is not None:
        return known
    order = PrepareSend(context.header(volume), "", base, target, node, size_only=True)
    answer = (yield from context.give({node: order}))[node]
    if not isinstance(answer, Size):
        return None
    while len(context.sizes) >= SIZES_MAX:
        del context.sizes[next(iter(context.sizes))]
    context.sizes[volume, base, target] = answer
    context.changed(volume)
    return answer


def _own_bytes(context: Context, volume: str, row: ReplicaPlan) -> Flow[int | None]:
    if not row.preserve:
        return 0
    report = context.view(volume).replica(row.node).report
    if report is None:
        return None
    live = report.live.modified_bytes if report.live.state is LiveState.MODIFIED else 0
    own = yield from size_of(context, volume, row.node, row.base, report.lineage.tip_id)
    if own is None or own.bytes is None or live is None:
        return report.live.allocated_bytes or None
    return own.bytes + live


def _plan(
    context: Context, view: VolumeView, request: ResyncRequest | PlanRequest, *, takes_snapshot: bool
) -> VolumePlan:
    return plan_volume(
        view,
        target=None,
        takes_snapshot=takes_snapshot,
        nodes=request.nodes,
        full=request.full,
        replace=request.replace,
        now_ms=context.now_ms,
    )


def imagined(view: VolumeView, winner: str) -> VolumeView:
    """The view as it would be after a first election, to plan against; never stored."""
    report = view.replica(winner).report
    record = VolumeRecord(view.name, report.volume_id if report is not None else "", primary=winner, members=(winner,))
    return replace(view, entry=VolumeEntry(record))


def _refused(view: VolumeView, refusal: Refusal) -> VolumePlan:
    return VolumePlan(view.name, view.record.primary, NO_CP, takes_snapshot=False, replicas=(), refusal=refusal)
