"""Each resync, led to its end: it waits for a place, is ordered, and ends by what its target reports.

A resync has a fixed goal, one snapshot, and ends only by what its target reports: the goal in its lineage, or the
reason why not. Orders are idempotent by the resync's id, so a flow here may be started again by a later leader.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from coordinator.core.cluster import (
    Refusal,
    ReplicaPlan,
    Resync,
)
from coordinator.core.context import Context
from coordinator.core.ending import advance, after, finish, note_progress, refusal_of, stop, stop_again
from coordinator.core.orders import PrepareSend, Receive, Source
from coordinator.core.places import Busy, priority_of
from coordinator.core.tasks import Flow, Wait
from resilver.errors import ResilverError, Superseded, Unavailable
from resilver.volume import Progress, ResyncState

S = ResyncState

ORDER_AGAIN_MS: Final = 5_000
COME_BACK_MS: Final = 60_000

BLOCKING_REASONS: Final = frozenset({"IN_USE", "PAUSED", "PRESERVED_FULL", "KEEPS_BEING_WRITTEN"})


def begin(context: Context, volume: str, row: ReplicaPlan, principal: str) -> Resync:
    """Creates a resync and starts leading it; one under way to the same goal is answered instead."""
    running = context.active_resync(volume, row.node)
    same = running is not None and (running.plan.base, running.plan.target) == (row.base, row.target)
    if running is not None and same and running.cancelling is None:
        return running
    if running is not None:
        said = Refusal(("TARGET_CHANGED",), f"replaced by a newer resync of {volume} on {row.node}")
        finish(context, running, S.CANCELLED, said)
        if running.attempt_count:
            stop_again(context, running)
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
    context.led[resync_id] = context.now_ms
    try:
        if (yield from _take_place(context, resync_id)):
            yield from _see_through(context, resync_id)
    finally:
        del context.led[resync_id]
        context.tasks.touch("slots")


def _take_place(context: Context, resync_id: str) -> Flow[bool]:
    """Whether it has one; without one for too long it ends."""

    def place() -> bool:
        known = context.resyncs
        waits = known[resync_id].state is S.QUEUED
        return not waits or context.places.may_begin(resync_id, known, context.settings.resyncs_max)

    wait_ms = context.settings.queued_max_ms
    in_time = yield Wait(frozenset({"slots", f"resync:{resync_id}"}), place, context.now_ms + wait_ms)
    resync = context.resyncs[resync_id]
    if resync.state is S.QUEUED and not in_time:
        finish(context, resync, *_not_begun(context, resync, wait_ms // 3_600_000))
    elif resync.state is S.QUEUED:
        # Whom it asks first is decided now, by what each serves now; the plan has said only who can.
        sources = Busy.with_all(context.resyncs.running()).in_order(resync.plan.sources)
        advance(context, replace(resync, plan=replace(resync.plan, sources=sources)), S.PREPARING)
    return not context.resyncs[resync_id].state.final


def _not_begun(context: Context, resync: Resync, hours: int) -> tuple[ResyncState, Refusal]:
    """How one ends that had no place for so long, and why."""
    again = f"resilver resync {resync.volume}"
    if resync.volume in context.places.held:
        message = f"{resync.volume} has been paused, and this resync has waited for {hours} hours"
        return S.BLOCKED, Refusal(("PAUSED",), message, next_command=f"resilver unpause {resync.volume}")
    if resync.node not in context.places.limits:
        message = f"{resync.node} has not been heard of for {hours} hours"
        return S.FAILED, Refusal(("NODE_OFFLINE",), message, next_command=again)
    message = f"no place has come free on {resync.node} and its sources for {hours} hours"
    return S.FAILED, Refusal(("TOO_MANY_RESYNCS",), message, next_command=again)


def _see_through(context: Context, resync_id: str) -> Flow[None]:
    """From the first order to the end."""
    context.led[resync_id] = context.now_ms
    while not context.resyncs[resync_id].state.final:
        resync = context.resyncs[resync_id]
        boot = context.nodes[resync.node].boot if resync.node in context.nodes else ""
        problem = yield from (_order if resync.cancelling is None else _call_off)(context, resync)
        resync = context.resyncs[resync_id]
        if resync.state.final:
            break
        if problem is not None and problem.reason != "NODE_UNREACHABLE":
            state = S.BLOCKED if problem.reason in BLOCKING_REASONS else S.FAILED
            finish(context, resync, state, refusal_of(problem, after(problem.reason, resync)))
            break
        if problem is not None:
            yield Wait(
                frozenset({f"resync:{resync_id}"}),
                lambda: context.resyncs[resync_id].state.final,
                context.now_ms + ORDER_AGAIN_MS,
            )
        yield from _watch(context, resync_id, boot if problem is None else None)


def _call_off(context: Context, resync: Resync) -> Flow[None]:
    """Has the target end what it was ordered under an earlier leader, or goes on with after a restart."""
    node = resync.node
    yield Wait(frozenset({f"node:{node}"}), lambda: context.reachable(node), context.now_ms + COME_BACK_MS)
    yield from stop(context, resync.id)


def _order(context: Context, resync: Resync) -> Flow[ResilverError | None]:
    """Tells every source to expect the target, then tells the target. A target that needs no source gets none."""
    row, volume = resync.plan, resync.volume
    sources: dict[str, Source] = {}
    problem = _outlived(context, resync)
    if problem is None and row.base != row.target:
        problem = yield from _tell_sources(context, resync, sources)
    # What was decided while the sources were asked counts: nobody is told to receive what is not wanted any more.
    problem = _outlived(context, resync) or problem
    now = context.resyncs[resync.id]
    if problem is not None or now.state.final or now.cancelling is not None:
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


def _watch(context: Context, resync_id: str, boot: str | None) -> Flow[None]:
    """Returns when the resync has ended, or when its orders must be given again.

    `boot` is the start of the target that obeyed them; None: it was not reached.
    """
    node = context.resyncs[resync_id].node

    def again() -> bool:
        known = context.nodes.get(node)
        return context.reachable(node) and known is not None and known.boot != boot

    while True:
        yield Wait(
            frozenset({f"resync:{resync_id}", f"node:{node}"}),
            lambda: context.resyncs[resync_id].state.final or again(),
            context.now_ms + 30_000,
        )
        resync = context.resyncs[resync_id]
        silent_ms = context.now_ms - context.led[resync_id]
        if silent_ms > context.settings.silence_max_ms and not resync.state.final:
            said = Refusal(("NODE_OFFLINE",), f"{node} has said nothing of this resync for 15 minutes")
            finish(context, resync, S.FAILED, said)
        if context.resyncs[resync_id].state.final or again():
            return
