"""Resyncs: planned together, created together, and then each led to its end.

A resync has a fixed goal, one snapshot, and ends only by what its target reports: the goal in its lineage, or the
reason why not. Orders are idempotent by the resync's id, so a flow here may be started again by a later leader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

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
from coordinator.core.events import (
    PlanRequest,
    PrepareSend,
    Receive,
    ResyncRequest,
    Source,
    Taken,
    TakeSnapshot,
    VolumeRefusal,
)
from coordinator.core.planner import plan_volume
from coordinator.core.tasks import Flow, Wait
from resilver.errors import Conflict, ResilverError, Superseded, Unavailable
from resilver.lineage import NO_CP
from resilver.volume import LiveState, Progress, ResyncState, VolumeRecord

S = ResyncState

# Where a resync may go from where it stands. An agent that starts a run again goes back to PREPARING.
TRANSITIONS: Final[Mapping[ResyncState, frozenset[ResyncState]]] = {
    S.QUEUED: frozenset({S.PREPARING, S.SUCCEEDED, S.FAILED, S.CANCELLED, S.BLOCKED}),
    S.PREPARING: frozenset({S.TRANSFERRING, S.VERIFYING, S.COMMITTING, S.SUCCEEDED, S.FAILED, S.CANCELLED, S.BLOCKED}),
    S.TRANSFERRING: frozenset({S.PREPARING, S.VERIFYING, S.COMMITTING, S.SUCCEEDED, S.FAILED, S.CANCELLED, S.BLOCKED}),
    S.VERIFYING: frozenset({S.PREPARING, S.TRANSFERRING, S.COMMITTING, S.SUCCEEDED, S.FAILED, S.CANCELLED, S.BLOCKED}),
    S.COMMITTING: frozenset({S.PREPARING, S.TRANSFERRING, S.SUCCEEDED, S.FAILED, S.CANCELLED, S.BLOCKED}),
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset(),
    S.CANCELLED: frozenset(),
    S.BLOCKED: frozenset(),
}

ORDER_AGAIN_MS: Final = 5_000
BLOCKING_REASONS: Final = frozenset({"IN_USE", "PAUSED", "PRESERVED_FULL", "KEEPS_BEING_WRITTEN"})


@dataclass(frozen=True, slots=True)
class Prepared:
    """One volume, examined, its primary settled or refused. While `locked` its lock is the caller's to release."""

    view: VolumeView
    fresh: frozenset[str]
    plan: VolumePlan
    first: Elected | None = None
    locked: bool = True

    @property
    def volume(self) -> str:
        return self.view.name


def prepare(context: Context, volume: str, request: ResyncRequest | PlanRequest) -> Flow[Prepared]:
    """Takes the volume's lock, examines, and plans what is there now."""
    if not (yield from context.lock(volume)):
        refusal = Refusal(("OPENING",), f"another operation on {volume} has not ended", next_command="resilver status")
        view = context.view(volume)
        return Prepared(view, frozenset(), _refused(view, refusal), locked=False)
    examined = yield from examine(context, volume)
    learn(context, volume, examined.fresh)
    view = context.view(volume, examined.fresh)
    pause = view.entry.pause if view.entry is not None else None
    if isinstance(request, ResyncRequest) and pause is not None:
        said = Refusal(("PAUSED",), f"{volume} is paused: {pause.reason}", next_command=f"resilver unpause {volume}")
        return Prepared(view, examined.fresh, _refused(view, said))
    decision = elect(view, now_ms=context.now_ms)
    if isinstance(decision, Elected) and decision.new_epoch and view.record.epoch:
        decision = would_change(view, decision)
    if isinstance(decision, NotElected):
        if isinstance(request, ResyncRequest) and not request.validate_only:
            refuse(context, view, decision, request.principal)
        return Prepared(view, examined.fresh, _refused(view, decision.refusal))
    if decision.new_epoch:
        imagined = replace(view, entry=_imagined(view, decision))
        plan = _plan(context, imagined, request, takes_snapshot=True)
        return Prepared(view, examined.fresh, plan, decision)
    settle(context, view)
    view = context.view(volume, examined.fresh)
    modified = view.primary is not None and view.primary.live_modified
    plan = _plan(context, view, request, takes_snapshot=modified)
    return Prepared(view, examined.fresh, plan)


def take_point(context: Context, prepared: Prepared, principal: str) -> Flow[Refusal | None]:
    """Opens the first epoch, or lets a modified primary take a CP; returns once that CP is recorded."""
    volume = prepared.volume
    problem: ResilverError | None = _outdated(context, prepared)
    if problem is not None:
        return refusal_of(problem)
    if prepared.first is not None:
        problem = yield from first_sight(context, prepared.view, prepared.first, principal)
    elif context.entries[volume].opening:
        problem = yield from establish(context, volume)
    elif prepared.plan.takes_snapshot:
        answer = yield from take_snapshot(context, volume, only_if_modified=True)
        problem = answer if isinstance(answer, ResilverError) else _outdated(context, prepared)
    if problem is None:
        return None
    return refusal_of(problem, next_command=problem.next_command or f"resilver explain {volume}")


def _outdated(context: Context, prepared: Prepared) -> ResilverError | None:
    """Other volumes, or the CP, may have taken their time: whether the primary is still what it was found to be."""
    was, now = prepared.view, context.view(prepared.volume)
    same = _reign(was.entry) == _reign(now.entry)
    if prepared.first is not None:
        same = same and now.replicas.keys() <= was.replicas.keys()
    if same:
        return None
    message = f"more has become known of {prepared.volume} since it was examined"
    return Conflict("PLAN_CHANGED", message, next_command=f"resilver resync {prepared.volume}")


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


def take_snapshot(
    context: Context, volume: str, *, only_if_modified: bool, note: str = ""
) -> Flow[Taken | ResilverError]:
    """Orders a CP from the primary and waits until it is recorded, that is acknowledged."""
    primary = context.entries[volume].record.primary
    tip = context.view(volume).replica(primary).lineage.tip_id
    order = TakeSnapshot(context.header(volume, tip), context.new_id(), only_if_modified=only_if_modified, note=note)
    answer = (yield from context.give({primary: order}))[primary]
    if isinstance(answer, ResilverError):
        return answer
    assert isinstance(answer, Taken)
    if not answer.taken:
        return answer
    recorded = yield Wait(
        frozenset({f"volume:{volume}"}),
        lambda: context.view(volume).record.newest_id == answer.snapshot.id,
        context.now_ms + context.settings.opening_timeout_ms,
    )
    if recorded:
        return answer
    message = f"{primary} took {answer.snapshot.cp} of {volume}, but has not reported it yet: it does not count so far"
    return Unavailable("DEADLINE", message, node=primary)


def create(
    context: Context, prepared: Prepared, request: ResyncRequest
) -> Flow[tuple[tuple[Resync, ...], tuple[VolumeRefusal, ...]]]:
    """Takes the CP, plans against it, and creates one resync for each replica that needs one."""
    volume = prepared.volume
    if prepared.plan.refusal is not None:
        return (), (VolumeRefusal(volume, prepared.plan.refusal),)
    refusal = yield from take_point(context, prepared, request.principal)
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


def begin(context: Context, volume: str, row: ReplicaPlan, principal: str) -> Resync:
    """Creates a resync and starts leading it; one under way to the same goal is answered instead."""
    running = context.active_resync(volume, row.node)
    if running is not None and (running.plan.base, running.plan.target) == (row.base, row.target):
        return running
    if running is not None:
        said = Refusal(("TARGET_CHANGED",), f"replaced by a newer resync of {volume} on {row.node}")
        finish(context, running, S.CANCELLED, said)
    lineage = context.view(volume).replica(row.node).lineage
    resync = Resync(
        id=context.new_id(),
        volume=volume,
        node=row.node,
        plan=row,
        epoch=context.entries[volume].record.epoch,
        principal=principal,
        term=context.identity.term,
        create_time_ms=context.now_ms,
        held_before=lineage.find(row.target) is not None,
    )
    context.persist(resync)
    context.tell(
        "RESYNC_STARTED",
        f"{volume} on {row.node}: {row.action.value} to {row.target_cp}",
        volume=volume,
        node=row.node,
        resync=resync.id,
        principal=principal,
    )
    context.tasks.spawn(lead(context, resync.id))
    return resync


def lead(context: Context, resync_id: str) -> Flow[None]:
    """Leads one resync to its end: waits for a place, gives the orders, and gives them again to a restarted target."""
    running = frozenset({S.PREPARING, S.TRANSFERRING, S.VERIFYING, S.COMMITTING})

    def place() -> bool:
        mine = context.resyncs[resync_id]
        count = sum(one.state in running for one in context.resyncs.values())
        return mine.state is not S.QUEUED or count < context.settings.resyncs_max

    yield Wait(frozenset({"slots", f"resync:{resync_id}"}), place, context.now_ms + context.settings.queued_max_ms)
    resync = context.resyncs[resync_id]
    if resync.state is S.QUEUED:
        advance(context, resync, S.PREPARING)
    heard_ms = context.now_ms
    while not context.resyncs[resync_id].state.final:
        resync = context.resyncs[resync_id]
        boot = context.nodes[resync.node].boot if resync.node in context.nodes else ""
        problem = yield from _order(context, resync)
        resync = context.resyncs[resync_id]
        if resync.state.final:
            break
        if problem is not None and problem.reason != "NODE_UNREACHABLE":
            state = S.BLOCKED if problem.reason in BLOCKING_REASONS else S.FAILED
            finish(context, resync, state, refusal_of(problem, _after(problem.reason, resync)))
            break
        if problem is not None:
            yield Wait(
                frozenset({f"resync:{resync_id}"}),
                lambda: context.resyncs[resync_id].state.final,
                context.now_ms + ORDER_AGAIN_MS,
            )
        heard_ms = yield from _watch(context, resync_id, boot if problem is None else None, heard_ms)
    context.tasks.touch("slots")


def _order(context: Context, resync: Resync) -> Flow[ResilverError | None]:
    """Tells every source to expect the target, then tells the target. A target that needs no source gets none."""
    row, volume = resync.plan, resync.volume
    sources: dict[str, Source] = {}
    problem = _outlived(context, resync)
    if problem is None and row.base != row.target:
        problem = yield from _tell_sources(context, resync, sources)
    # What was decided while the sources were asked counts: nobody is told to receive what is not wanted any more.
    problem = _outlived(context, resync) or problem
    if problem is not None or context.resyncs[resync.id].state.final:
        return problem
    receive = Receive(
        context.header(volume, row.expected_tip),
        resync.id,
        row.base,
        row.target,
        resync.id,
        tuple(sources.values()),
        replace_own_data=row.replace_own_data,
        replace_unrelated=row.replace_unrelated,
    )
    if context.reachable(resync.node):
        context.persist(replace(context.resyncs[resync.id], attempt_count=resync.attempt_count + 1))
    told = context.resyncs[resync.id].progress
    answer = (yield from context.give({resync.node: receive}))[resync.node]
    if isinstance(answer, ResilverError):
        return answer
    # The stream may have told more while the answer was on its way: what it tells is newer.
    if isinstance(answer, Progress) and context.resyncs[resync.id].progress == told:
        note_progress(context, resync.node, answer)
    return None


def _tell_sources(context: Context, resync: Resync, sources: dict[str, Source]) -> Flow[ResilverError | None]:
    """Fills in those that will serve; a problem only if there are none."""
    row, volume = resync.plan, resync.volume
    prepare_send = PrepareSend(context.header(volume), resync.id, row.base, row.target, resync.node, resync.id)
    answers = yield from context.give(dict.fromkeys(row.sources, prepare_send))
    problem: ResilverError | None = None
    for node, answer in answers.items():
        if isinstance(answer, ResilverError):
            problem = problem or answer
        elif context.reachable(node):
            known = context.nodes[node]
            sources[node] = Source(node, known.address, known.stream_address)
    if sources:
        return None
    return problem or Unavailable("NODE_UNREACHABLE", f"no source of {volume} is connected any more")


def _outlived(context: Context, resync: Resync) -> ResilverError | None:
    """A resync is ordered in its own epoch and in no other: what it replaces was weighed against that one's primary."""
    entry = context.entries.get(resync.volume)
    if entry is not None and entry.record.epoch == resync.epoch:
        return None
    now = f"epoch {entry.record.epoch} was opened" if entry is not None else f"{resync.volume} was removed"
    return Superseded("STALE_EPOCH", f"{now} after the resync of {resync.volume} on {resync.node} had been planned")


def _watch(context: Context, resync_id: str, boot: str | None, heard_ms: int) -> Flow[int]:
    """Returns when the resync has ended, or when its orders must be given again; answers when it last moved.

    `boot` is the start of the target that obeyed them; None: it was not reached.
    """
    node = context.resyncs[resync_id].node

    def again() -> bool:
        known = context.nodes.get(node)
        return context.reachable(node) and known is not None and known.boot != boot

    while True:
        before = context.resyncs[resync_id].progress
        yield Wait(
            frozenset({f"resync:{resync_id}", f"node:{node}"}),
            lambda: context.resyncs[resync_id].state.final or again(),
            context.now_ms + 30_000,
        )
        resync = context.resyncs[resync_id]
        if resync.progress != before:
            heard_ms = context.now_ms
        elif context.now_ms - heard_ms > context.settings.silence_max_ms and not resync.state.final:
            said = Refusal(("NODE_OFFLINE",), f"{node} has said nothing of this resync for 15 minutes")
            finish(context, resync, S.FAILED, said)
        if context.resyncs[resync_id].state.final or again():
            return heard_ms


def note_progress(context: Context, node: str, progress: Progress) -> None:
    """Takes on what a target says of its run; figures never go back, and SUCCEEDED waits for the replica's report."""
    resync = context.resyncs.get(progress.resync_id)
    if resync is None or resync.state.final or resync.node != node:
        return
    old = resync.progress
    if old is not None:
        progress = replace(
            progress,
            done_bytes=max(progress.done_bytes, old.done_bytes),
            wire_bytes=max(progress.wire_bytes, old.wire_bytes),
            resent_bytes=max(progress.resent_bytes, old.resent_bytes),
        )
    if progress.state in (S.FAILED, S.BLOCKED, S.CANCELLED):
        reason = progress.reason or "IO_ERROR"
        message = progress.message or "the run ended without a reason"
        said = Refusal((reason,), message, next_command=_after(reason, resync))
        finish(context, replace(resync, progress=progress), progress.state, said)
        return
    resync = replace(resync, progress=progress)
    state = S.COMMITTING if progress.state is S.SUCCEEDED else progress.state
    if state is not resync.state and state in TRANSITIONS[resync.state]:
        advance(context, resync, state)
    else:
        context.resyncs[resync.id] = resync
        context.changed(resync.volume, resync.id)


def advance(context: Context, resync: Resync, state: ResyncState) -> None:
    """Moves a resync along the table of transitions, and remembers it."""
    assert state in TRANSITIONS[resync.state], f"{resync.state} to {state}"
    start = resync.start_time_ms or (context.now_ms if state is not S.QUEUED else 0)
    context.persist(replace(resync, state=state, start_time_ms=start))


def finish(context: Context, resync: Resync, state: ResyncState, refusal: Refusal | None) -> None:
    """Ends a resync, once."""
    assert state in TRANSITIONS[resync.state], f"{resync.state} to {state}"
    ended = replace(resync, state=state, end_time_ms=context.now_ms, refusal=refusal)
    context.persist(ended)
    context.tasks.touch("slots")
    context.tell(
        f"RESYNC_{state.value.upper()}",
        refusal.message if refusal is not None else f"{resync.volume} on {resync.node} is at {resync.plan.target_cp}",
        volume=resync.volume,
        node=resync.node,
        resync=resync.id,
        reason=refusal.reasons[0] if refusal is not None else "",
    )


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
    if own is None or live is None:
        return report.live.allocated_bytes
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


def _imagined(view: VolumeView, decision: Elected) -> VolumeEntry:
    """The entry as it would be after a first election, to plan against; never stored."""
    report = view.replica(decision.winner).report
    record = VolumeRecord(
        view.name, report.volume_id if report is not None else "", primary=decision.winner, members=(decision.winner,)
    )
    return VolumeEntry(record)


def _refused(view: VolumeView, refusal: Refusal) -> VolumePlan:
    return VolumePlan(view.name, view.record.primary, NO_CP, takes_snapshot=False, replicas=(), refusal=refusal)


def _after(reason: str, resync: Resync) -> str:
    """What to run once a run has ended for that reason; empty where that is not the same every time."""
    commands = {
        "KEEPS_BEING_WRITTEN": f"resilver resync {resync.volume} --replace {resync.node}",
        "NO_SPACE": f"resilver prune {resync.volume}",
        "PRESERVED_FULL": f"resilver preserved {resync.volume}",
    }
    return commands.get(reason, "")


def refusal_of(error: ResilverError, next_command: str = "") -> Refusal:
    return Refusal((error.reason,), error.message, next_command=error.next_command or next_command)
