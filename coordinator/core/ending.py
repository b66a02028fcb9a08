"""How resyncs end: by what their targets tell, or because somebody wants them to, and what is kept of them.

The rules:

* An ended resync stays as it ended. So one that is to be cancelled ends once its target has said what became of the
  run: a commit that has begun is finished, and the resync has succeeded then. Until it says, nothing else is ordered.
* A target that is out of reach is not waited for, unless it was committing. It is told when it is heard of again, and
  again for as long as it goes on; if it had committed by then, an event says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Final

from coordinator.core.cluster import Cancelling, Refusal, Resync
from coordinator.core.context import Context
from coordinator.core.events import Forgotten, SendExamine, Volume
from coordinator.core.orders import OrderResult, StopTransfer
from coordinator.core.tasks import Flow, Wait
from resilver.errors import NotFound, ResilverError
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

RESYNCS_KEPT_MAX: Final = 200
FORGOTTEN_AT_ONCE_MAX: Final = 16
STOP_AGAIN_MS: Final = 5_000
STOP_WAIT_MS: Final = 10_000
LATE_MAX_MS: Final = 24 * 3600 * 1000


# ------------------------------------------------------------ what a target tells


def note_progress(context: Context, node: str, progress: Progress) -> None:
    """Takes on what a target says of its run; figures never go back, and SUCCEEDED waits for the replica's report."""
    resync = context.resyncs.get(progress.resync_id)
    if resync is None or resync.node != node:
        return
    if resync.state.final:
        _goes_on(context, resync, progress)
        return
    if resync.id in context.led:
        context.led[resync.id] = context.now_ms
    progress = _counted(progress, resync.progress)
    if progress.state in (S.FAILED, S.BLOCKED, S.CANCELLED):
        reason = progress.reason or "IO_ERROR"
        message = progress.message or "the run ended without a reason"
        said = Refusal((reason,), message, next_command=after(reason, resync))
        if progress.state is S.CANCELLED and resync.cancelling is not None:
            said = _cancelled(resync.cancelling)
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


def _counted(progress: Progress, old: Progress | None) -> Progress:
    """With figures that do not go back, unless they are those of another whole."""
    done, total = progress.done_bytes, progress.total_bytes
    if old is None:
        return progress
    if total is None or old.done_bytes <= total:
        done = max(done, old.done_bytes)
    return replace(
        progress,
        done_bytes=done if total is None else min(done, total),
        wire_bytes=max(progress.wire_bytes, old.wire_bytes),
        resent_bytes=max(progress.resent_bytes, old.resent_bytes),
    )


def _goes_on(context: Context, resync: Resync, progress: Progress) -> None:
    """A target tells of a run whose resync has ended here."""
    if resync.state is S.SUCCEEDED:
        return
    if progress.state is S.SUCCEEDED:
        known = resync.progress is not None and resync.progress.state is S.SUCCEEDED
        if known or context.now_ms - resync.end_time_ms > LATE_MAX_MS:
            return
        # The record stays as it was stored: whoever watched has been told of its end.
        context.resyncs.put(replace(resync, progress=progress))
        context.changed(resync.volume, resync.id)
        said = f"{resync.node} had finished it: {resync.volume} is at {resync.plan.target_cp} there"
        about = {"volume": resync.volume, "node": resync.node, "resync": resync.id}
        context.tell_once("FINISHED_LATE", f"{said} although the resync has ended as {resync.state.value}", **about)
    elif not progress.state.final and progress.state is not S.COMMITTING:
        stop_again(context, resync)


# ------------------------------------------------------------ ending it


def cancel(context: Context, resync_id: str, wanted: Cancelling) -> Flow[Resync]:
    """Ends a resync, and answers what has become of it; a commit that has begun is finished. Raises NotFound."""
    resync = context.resyncs.get(resync_id)
    if resync is None:
        raise NotFound("RESYNC_NOT_FOUND", f"no resync has the id {resync_id!r}", resync=resync_id)
    if not resync.state.final and not resync.attempt_count:
        finish(context, resync, S.CANCELLED, _cancelled(wanted))  # its target has been told nothing yet
    elif not resync.state.final:
        context.persist(replace(resync, cancelling=wanted))
        yield from stop(context, resync_id)
    return context.resyncs.get(resync_id, resync)


def stop(context: Context, resync_id: str) -> Flow[None]:
    """Has a resync's target end its run. Returns once that has ended, or while it is still committing."""
    resync = context.resyncs[resync_id]
    wanted = resync.cancelling or Cancelling()
    order = StopTransfer(context.header(resync.volume), resync_id, wanted.discard_stage)
    answer = (yield from context.give({resync.node: order}))[resync.node]
    if isinstance(answer, Progress):
        note_progress(context, resync.node, answer)
        if answer.state is S.SUCCEEDED:
            context.emit(SendExamine(context.stream_of(resync.node), context.new_id(), (resync.volume,)))
        # It ends as soon as it can, and tells so; after a commit its report does.
        ended = partial(_has_ended, context, resync_id)
        yield Wait(frozenset({f"resync:{resync_id}"}), ended, context.now_ms + STOP_WAIT_MS)
    now = context.resyncs.get(resync_id)
    if now is None or now.state.final or (now.state is S.COMMITTING and _may_have_committed(answer)):
        return
    said = _cancelled(wanted)
    if not context.reachable(now.node):
        said = replace(said, message=f"{said.message}; {now.node} is out of reach, and is told when it is back")
    finish(context, now, S.CANCELLED, said)


def stop_again(context: Context, resync: Resync) -> None:
    """Has a target end the run of a resync that has ended here: one order at a time, and a pause after each."""
    if resync.id not in context.stopping:
        context.stopping.add(resync.id)
        context.tasks.spawn(_stop_once(context, resync))


def _stop_once(context: Context, resync: Resync) -> Flow[None]:
    discard = resync.cancelling is not None and resync.cancelling.discard_stage
    order = StopTransfer(context.header(resync.volume), resync.id, discard)
    answer = (yield from context.give({resync.node: order}))[resync.node]
    if isinstance(answer, Progress) and answer.state is S.SUCCEEDED:
        note_progress(context, resync.node, answer)
    yield Wait(frozenset({"tick"}), lambda: False, context.now_ms + STOP_AGAIN_MS)
    context.stopping.discard(resync.id)


def _has_ended(context: Context, resync_id: str) -> bool:
    resync = context.resyncs.get(resync_id)
    return resync is None or resync.state.final


def _may_have_committed(answer: OrderResult | ResilverError) -> bool:
    """Of a target that was last heard to commit: whether it may have done so, by what it answered to StopTransfer."""
    if isinstance(answer, ResilverError):
        return answer.reason != "RESYNC_NOT_FOUND"
    return isinstance(answer, Progress)


def _cancelled(wanted: Cancelling) -> Refusal:
    return Refusal(("CANCELLED",), f"cancelled by {wanted.principal or 'an operator'}")


# ------------------------------------------------------------ the record


def advance(context: Context, resync: Resync, state: ResyncState) -> None:
    """Moves a resync along the table of transitions, and remembers it."""
    assert state in TRANSITIONS[resync.state], f"{resync.state} to {state}"
    start = resync.start_time_ms or (context.now_ms if state is not S.QUEUED else 0)
    context.persist(replace(resync, state=state, start_time_ms=start))


def finish(context: Context, resync: Resync, state: ResyncState, refusal: Refusal | None, *also: Volume) -> None:
    """Ends a resync, once; what else its end means is stored with it."""
    assert state in TRANSITIONS[resync.state], f"{resync.state} to {state}"
    ended = replace(resync, state=state, end_time_ms=context.now_ms, refusal=refusal)
    context.persist(ended, *also)
    context.tasks.touch("slots")
    context.tell(
        f"RESYNC_{state.value.upper()}",
        refusal.message if refusal is not None else f"{resync.volume} on {resync.node} is at {resync.plan.target_cp}",
        volume=resync.volume,
        node=resync.node,
        resync=resync.id,
        reason=refusal.reasons[0] if refusal is not None else "",
    )
    _forget_old(context, resync.volume)


def _forget_old(context: Context, volume: str) -> None:
    """Keeps so many that have ended, the newest; whatever still leads one looks it up."""
    ended = sorted((one for one in context.resyncs.of(volume) if one.state.final), key=lambda one: one.end_time_ms)
    beyond = max(0, len(ended) - RESYNCS_KEPT_MAX)
    old = [one for one in ended[:beyond] if one.id not in context.led][:FORGOTTEN_AT_ONCE_MAX]
    for resync in old:
        context.resyncs.drop(resync.id)
    if old:
        context.persist(*(Forgotten(one) for one in old))


def refusal_of(error: ResilverError, next_command: str = "") -> Refusal:
    return Refusal((error.reason,), error.message, next_command=error.next_command or next_command)


def after(reason: str, resync: Resync) -> str:
    """What to run once a run has ended for that reason; empty where that is not the same every time."""
    commands = {
        "KEEPS_BEING_WRITTEN": f"resilver resync {resync.volume} --replace {resync.node}",
        "NO_SPACE": f"resilver prune {resync.volume}",
        "PRESERVED_FULL": f"resilver preserved {resync.volume}",
    }
    return commands.get(reason, "")
