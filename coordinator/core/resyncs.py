"""Each resync, led to its end: it waits for a place, is ordered, and ends by what its target reports.

A resync has a fixed goal, one snapshot, and ends only by what its target reports: the goal in its lineage, or the
reason why not. Orders are idempotent by the resync's id, so a flow here may be started again by a later leader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from coordinator.core.cluster import (
    Refusal,
    ReplicaPlan,
    Resync,
)
from coordinator.core.context import Context
from coordinator.core.orders import PrepareSend, Receive, Source
from coordinator.core.places import Busy, priority_of
from coordinator.core.tasks import Flow, Wait
from resilver.errors import ResilverError, Superseded, Unavailable
from resilver.volume import Progress, ResyncState

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
        priority=priority_of(context.view(volume)),
        ticket=context.new_ticket(),
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

    def place() -> bool:
        known = context.resyncs
        waits = known[resync_id].state is S.QUEUED
        return not waits or context.places.may_begin(resync_id, known, context.settings.resyncs_max)

    yield Wait(frozenset({"slots", f"resync:{resync_id}"}), place, context.now_ms + context.settings.queued_max_ms)
    resync = context.resyncs[resync_id]
    if resync.state is S.QUEUED:
        # Whom it asks first is decided now, by what each serves now; the plan has said only who can.
        sources = Busy.with_all(context.resyncs.running()).in_order(resync.plan.sources)
        advance(context, replace(resync, plan=replace(resync.plan, sources=sources)), S.PREPARING)
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
        resync.ticket,
        tuple(sources.values()),
        replace_own_data=row.replace_own_data,
        replace_unrelated=row.replace_unrelated,
        priority=resync.priority,
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
    prepare_send = PrepareSend(context.header(volume), resync.id, row.base, row.target, resync.node, resync.ticket)
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
        before = context.resyncs.changes
        context.resyncs.put(resync)
        if context.resyncs.changes != before:
            context.tasks.touch("slots")
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


def refusal_of(error: ResilverError, next_command: str = "") -> Refusal:
    return Refusal((error.reason,), error.message, next_command=error.next_command or next_command)


def _after(reason: str, resync: Resync) -> str:
    """What to run once a run has ended for that reason; empty where that is not the same every time."""
    commands = {
        "KEEPS_BEING_WRITTEN": f"resilver resync {resync.volume} --replace {resync.node}",
        "NO_SPACE": f"resilver prune {resync.volume}",
        "PRESERVED_FULL": f"resilver preserved {resync.volume}",
    }
    return commands.get(reason, "")
