"""Examine, elect, open an epoch: how a volume gets its primary.

The order in `_open` and `establish` is the one that loses nothing: the election and the new epoch are remembered before
anybody is told; every reachable member is told, and drops grants and runs of lower epochs, before the winner gets the
grant; nothing is copied from the winner before its opening CP is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from coordinator.core import bases
from coordinator.core.claims import newest_name, next_epoch, reconcile
from coordinator.core.cluster import (
    Candidate,
    Elected,
    ElectionRecord,
    NotElected,
    Refusal,
    ReplicaState,
    VolumeEntry,
    VolumeView,
)
from coordinator.core.context import Context, Examine
from coordinator.core.election import elect
from coordinator.core.events import Volume
from coordinator.core.orders import OpenEpoch, TakeSnapshot
from coordinator.core.requests import ElectRequest
from coordinator.core.tasks import Flow, Wait
from resilver.errors import Conflict, Refused, ResilverError
from resilver.lineage import NO_CP
from resilver.volume import VolumeRecord

EVIDENCE_RECORDS_MAX = 32


@dataclass(frozen=True, slots=True)
class Examined:
    """What the members answered; `fresh` are the nodes that did."""

    view: VolumeView
    fresh: frozenset[str]


def examine(context: Context, volume: str) -> Flow[Examined]:
    """Asks every connected member, and waits until all have answered or gone, or for the examine timeout.

    One at a time for a volume: a caller that comes while one runs joins it. Of all that begin in one step each node is
    asked at once, by one id.
    """
    running = context.examines.get(volume)
    if running is None:
        view = context.view(volume)
        asked = {node for node in view.replicas if context.reachable(node)}
        running = Examine(context.ask(volume, asked), asked, {})
        context.examines[volume] = running
    mine = running
    yield Wait(
        frozenset({f"examine:{volume}"}),
        lambda: not mine.waiting,
        context.now_ms + context.settings.examine_timeout_ms,
    )
    if context.examines.get(volume) is mine:
        del context.examines[volume]
    # Who has gone since, has begun anew, or turned out to be two, has answered nothing.
    view = context.view(volume, mine.answered)
    return Examined(view, frozenset(node for node, one in view.replicas.items() if one.fresh))


def learn(context: Context, volume: str, fresh: Iterable[str] | None) -> None:
    """Takes on what reports know and the store does not: epochs and the newest known CP only ever go up, and members
    only come.
    """
    raised = reconcile(context.view(volume, fresh))
    if raised is None:
        return
    record = raised.record
    context.persist(Volume(volume, raised))
    context.tell(
        "RECOVERING",
        f"the store knew less of {volume} than its replicas: now epoch {record.epoch}, newest known CP "
        f"{record.newest_cp}, members {', '.join(record.members)}; the next election wants every known member",
        volume=volume,
    )


def election(context: Context, request: ElectRequest) -> Flow[ElectionRecord]:
    """Examines and decides, and opens the epoch if there is a new one. A refusal is a record too."""
    examined = yield from examine(context, request.volume)
    if not request.dry_run:
        learn(context, request.volume, examined.fresh)
    view = context.view(request.volume, examined.fresh)
    decision = elect(view, accept_loss=request.accept_loss, choose=request.choose, now_ms=context.now_ms)
    if request.dry_run:
        return _record(context, view, decision, request.principal)
    if isinstance(decision, NotElected):
        return refuse(context, view, decision, request.principal)
    if not decision.new_epoch:
        settle(context, view)
        record = _record(context, view, decision, request.principal)
        context.persist(record)
        return record
    record = _open(context, view, decision, request.principal)
    problem = yield from establish(context, request.volume)
    if problem is not None:
        context.tell("OPENING", f"{request.volume} stays OPENING: {problem.message}", volume=request.volume)
    return record


def refuse(context: Context, view: VolumeView, decision: NotElected, principal: str) -> ElectionRecord:
    """Stores a refusal, so that `explain` can answer why not."""
    record = _record(context, view, decision, principal)
    context.persist(record)
    context.tell(
        "ELECTION_REFUSED",
        decision.refusal.message,
        volume=view.name,
        reason=decision.refusal.reasons[0] if decision.refusal.reasons else "",
        principal=principal,
    )
    return record


def settle(context: Context, view: VolumeView) -> None:
    """The primary stays and every member that was wanted has answered: nothing is left to recover."""
    entry = view.entry
    if entry is not None and entry.recovering:
        context.persist(Volume(view.name, replace(entry, recovering=False)))
        bases.note(context, view.name, entry.record.primary)


def first_sight(context: Context, view: VolumeView, decision: Elected, principal: str) -> Flow[ResilverError | None]:
    """Opens epoch 1 for a volume that has no primary yet."""
    _open(context, view, decision, principal)
    return (yield from establish(context, view.name))


def _open(context: Context, view: VolumeView, decision: Elected, principal: str) -> ElectionRecord:
    """Step 1: the election record and the new epoch, in one transaction."""
    old = view.record
    winner = view.replica(decision.winner)
    fork = decision.fork
    stamped = winner.report.volume_id if winner.report is not None else ""
    record = VolumeRecord(
        volume=view.name,
        volume_id=old.volume_id or stamped or context.new_id(),
        epoch=next_epoch(view),
        epoch_id=context.new_id(),
        primary=decision.winner,
        members=tuple(sorted({*old.members, decision.winner})),
        newest_cp=fork.cp if fork is not None else NO_CP,
        newest_id=fork.id if fork is not None else "",
    )
    entry = replace(
        view.entry or VolumeEntry(record),
        record=record,
        opening=True,
        recovering=False,
        bases=bases.after_election(view, decision),
    )
    made = replace(
        _record(context, view, decision, principal), epoch=record.epoch, epoch_id=record.epoch_id, cp=record.newest_cp
    )
    context.persist(Volume(view.name, entry), made)
    context.tell(
        "ELECTED",
        f"{decision.winner} is primary of {view.name} in epoch {record.epoch}: {decision.rule}",
        volume=view.name,
        node=decision.winner,
        principal=principal,
    )
    return made


def establish(context: Context, volume: str) -> Flow[ResilverError | None]:
    """Steps 2 to 4: tells the members, grants, takes the opening CP and waits until it is recorded.

    May be run again for the same epoch, also by a later leader: every order in it is idempotent.
    """
    record = context.entries[volume].record
    problem = _fork_gone(context, record) or (yield from _tell_others(context, record))
    if problem is not None:
        return problem
    winner = record.primary
    granted = (yield from context.give({winner: OpenEpoch(context.header(volume), record, grant=True)}))[winner]
    if isinstance(granted, ResilverError):
        return granted
    tip = _winners_tip(context, record)
    opening = TakeSnapshot(context.header(volume, tip), f"open-{record.epoch_id}", opening=True)
    taken = (yield from context.give({winner: opening}))[winner]
    if isinstance(taken, ResilverError):
        return taken
    recorded = yield Wait(
        frozenset({f"volume:{volume}"}),
        lambda: not _awaits(context, record),
        context.now_ms + context.settings.opening_timeout_ms,
    )
    if not recorded:
        return Refused("OPENING", f"{winner} took the opening CP of {volume}, but has not reported it yet")
    entry = context.entries.get(volume)
    if entry is None or entry.record.epoch != record.epoch:
        return Conflict("LEADERSHIP_LOST", f"{volume} was removed, or another epoch of it was opened meanwhile")
    return None


def _awaits(context: Context, record: VolumeRecord) -> bool:
    """Whether the opening CP of that epoch is still to be recorded."""
    entry = context.entries.get(record.volume)
    return entry is not None and entry.opening and entry.record.epoch == record.epoch


def _tell_others(context: Context, record: VolumeRecord) -> Flow[ResilverError | None]:
    """Every reachable member but the winner; a problem only if one of them knows better."""
    volume = record.volume
    others = [node for node in record.members if node != record.primary and context.reachable(node)]
    told = yield from context.give({node: OpenEpoch(context.header(volume), record, grant=False) for node in others})
    for node, answer in told.items():
        if isinstance(answer, ResilverError) and answer.reason in ("STALE_EPOCH", "EPOCH_CONFLICT", "STALE_TERM"):
            return answer
        if isinstance(answer, ResilverError):
            context.tell_once("MEMBER_NOT_TOLD", answer.message, volume=volume, node=node, reason=answer.reason)
    return None


def _fork_gone(context: Context, record: VolumeRecord) -> Refused | None:
    """A run that was not stopped in time may have replaced what the winner was elected for: that is preserved there."""
    winner = context.view(record.volume).replica(record.primary)
    if not record.newest_id or not winner.fresh or winner.lineage.find(record.newest_id) is not None:
        return None
    newest = newest_name(context.view(record.volume))
    message = f"epoch {record.epoch} cannot be opened: {record.primary} is without {newest}, its beginning"
    return Refused("PRIMARY_BEHIND", message, next_command=f"resilver elect {record.volume}")


def _winners_tip(context: Context, record: VolumeRecord) -> str:
    """What the opening CP is taken on: the fork, or what a transfer put on top of it after the winner had answered."""
    lineage = context.view(record.volume).replica(record.primary).lineage
    return lineage.tip_id if lineage.find(record.newest_id) is not None else record.newest_id


def finish_opening(context: Context, volume: str) -> Flow[None]:
    """Goes on with an opening that was interrupted: by a crash of the leader, or of the winner."""
    if not (yield from context.lock(volume)):
        return
    try:
        entry = context.entries.get(volume)
        if entry is not None and entry.opening:
            problem = yield from establish(context, volume)
            if problem is not None:
                context.tell_once("OPENING", problem.message, volume=volume, reason=problem.reason)
    finally:
        context.unlock(volume)


def _record(context: Context, view: VolumeView, decision: Elected | NotElected, principal: str) -> ElectionRecord:
    """The decision as it is remembered; `_open` fills in the id of a new epoch, which a dry run has none of."""
    stays = isinstance(decision, Elected) and not decision.new_epoch
    opens = isinstance(decision, Elected) and decision.new_epoch
    record = view.record
    return ElectionRecord(
        volume=view.name,
        create_time_ms=context.now_ms,
        epoch=next_epoch(view) if opens else record.epoch if stays else 0,
        epoch_id=record.epoch_id if stays else "",
        winner=decision.winner if isinstance(decision, Elected) else "",
        previous_primary=record.primary,
        cp=decision.fork.cp if isinstance(decision, Elected) and decision.fork is not None else NO_CP,
        rule=decision.rule if isinstance(decision, Elected) else "",
        candidates=decision.candidates,
        refusal=None if isinstance(decision, Elected) else decision.refusal,
        accepted=decision.accepted if isinstance(decision, Elected) else (),
        principal=principal,
        term=context.identity.term,
        evidence={
            node: tuple(f"{one.cp} {one.id}" for one in replica.lineage.records[:EVIDENCE_RECORDS_MAX])
            for node, replica in view.replicas.items()
        },
    )


def would_change(view: VolumeView, decision: Elected) -> NotElected:
    """A resync never changes the primary by itself; it says which command would."""
    message = f"the primary of {view.name} would change from {view.record.primary} to {decision.winner}"
    refusal = Refusal(
        ("PRIMARY_UNCLEAR",),
        message,
        candidates=tuple(one.node for one in decision.candidates if _has_data(one)),
        next_command=f"resilver elect {view.name} --choose {decision.winner}",
    )
    return NotElected(refusal, decision.candidates, decision.winner)


def _has_data(candidate: Candidate) -> bool:
    return candidate.state not in (ReplicaState.EMPTY, ReplicaState.LOST, ReplicaState.UNKNOWN)
