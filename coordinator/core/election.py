"""Who is to be primary: certain, or refused with every reason and the next command.

The rules, in the order in which they are asked:

1. What reports know and the store does not counts as if the store knew it (`reconcile`).
2. The primary is here, nothing is against it, and nobody else was chosen: it stays, and no epoch is opened.
3. Otherwise an epoch is needed. `ballot` says which replica is the most up-to-date one; what it does not have, and what
   nobody can know of a node that is away, is a loss, counted node by node.
4. Two reasons mean that the rules cannot tell who is right, AMBIGUOUS and PRIMARY_UNCLEAR: only `choose` settles them.
   All others mean that the winner is known, and what it costs: `accept_loss` must name exactly the nodes that pay.

Nothing here depends on the order of reports, on a clock or on chance. Whatever is not certain is a loss to be accepted:
naming a node too many costs an operator a word, naming one too few costs him his data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from coordinator.core.ballot import AMBIGUOUS, NEWEST_COPY_MISSING, Ballot, ballot, bar
from coordinator.core.claims import (
    PRIMARY_AWAY,
    PRIMARY_BEHIND,
    PRIMARY_UNCLEAR,
    Problem,
    exceeds,
    forgotten_branches,
    is_foreign,
    is_here,
    missing_members,
    newest_name,
    next_epoch,
    primary_problems,
    reconcile,
    recovering_problem,
    rivals,
    sorted_replicas,
)
from coordinator.core.cluster import Candidate, Elected, Loss, NotElected, Refusal, ReplicaView, VolumeEntry, VolumeView
from coordinator.core.status import status_of
from coordinator.core.words import age, counted, listed, name_of, span
from resilver.lineage import NO_CP, Lineage, Relation, newest_shared, relate
from resilver.volume import LiveState, VolumeRecord

__all__ = ["elect", "next_epoch", "reconcile"]

LOSS_NOT_NAMED: Final = "LOSS_NOT_NAMED"
NEEDS_CHOICE: Final = frozenset({AMBIGUOUS, PRIMARY_UNCLEAR})


@dataclass(frozen=True, slots=True)
class _Case:
    """One question and what was found, before it is answered."""

    view: VolumeView
    accept_loss: frozenset[str]
    choose: str
    now_ms: int
    ballot: Ballot
    problems: tuple[Problem, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(problem.reason for problem in self.problems))

    @property
    def needs_choice(self) -> bool:
        return not self.choose and (self.ballot.winner is None or not NEEDS_CHOICE.isdisjoint(self.reasons))


def elect(
    view: VolumeView, *, accept_loss: frozenset[str] = frozenset(), choose: str = "", now_ms: int
) -> Elected | NotElected:
    """Decides from fresh reports: those that answered this examine.

    `accept_loss` must be exactly the nodes that the refusal without it lists as losses; `choose` names the winner.
    """
    view = _as_known(view, choose)
    against = primary_problems(view, now_ms)
    primary = view.record.primary
    reigns = bool(view.record.epoch and primary) and choose in ("", primary)
    if reigns and not against + recovering_problem(view, view.replica(primary).lineage):
        return _stays(view, accept_loss)
    found = _chosen(view, choose) if choose else ballot(view)
    recovering = recovering_problem(view, found.winner.lineage if found.winner is not None else Lineage())
    case = _Case(view, accept_loss, choose, now_ms, found, against + found.problems + recovering)
    if found.winner is None:
        return _refused(case, ())
    if case.needs_choice:
        # What it costs is what it would cost if the operator chose the one that the rules point to.
        again = elect(view, choose=found.winner.node, now_ms=now_ms)
        return _refused(case, again.refusal.losses if isinstance(again, NotElected) else ())
    losses = _losses(case, found.winner)
    named = {loss.node for loss in losses} == accept_loss
    if named:
        return Elected(
            winner=found.winner.node,
            fork=found.winner.lineage.tip,
            rule=found.rule,
            new_epoch=True,
            candidates=_candidates(view, found.winner, accept_loss),
            accepted=tuple(sorted(accept_loss)),
        )
    return _refused(case, losses)


def _as_known(view: VolumeView, choose: str) -> VolumeView:
    """The view with all that reports know. Where they are of several volumes, the chosen node says which is meant."""
    report = view.replica(choose).report
    if view.entry is None and report is not None and report.volume_id:
        meant = VolumeRecord(view.name, report.volume_id)
        raised = reconcile(replace(view, entry=VolumeEntry(meant)))
    else:
        raised = reconcile(view)
    return view if raised is None else replace(view, entry=raised)


def _stays(view: VolumeView, accept_loss: frozenset[str]) -> Elected | NotElected:
    primary = view.replica(view.record.primary)
    candidates = _candidates(view, primary, frozenset())
    if accept_loss:
        message = f"{primary.node} stays primary of {view.name}: there is no loss to accept"
        refusal = Refusal((LOSS_NOT_NAMED,), message, next_command=f"resilver elect {view.name}")
        return NotElected(refusal, candidates, primary.node)
    opening = view.entry is not None and view.entry.opening
    rule = "its epoch is being opened" if opening else "the primary is here and has the newest known CP"
    return Elected(primary.node, primary.lineage.tip, rule, new_epoch=False, candidates=candidates)


def _chosen(view: VolumeView, node: str) -> Ballot:
    """The ballot of an operator who names the winner. What others have beyond it is a loss, not a contradiction."""
    reason, text = bar(view, view.replica(node), chosen=True)
    free = ballot(view)
    if reason:
        return Ballot(problems=(Problem(reason, f"{node} {text}: it cannot be chosen"),), standing=free.standing)
    winner, newest = view.replica(node), view.record.newest_id
    lacks = bool(newest) and winner.lineage.find(newest) is None
    missing = tuple(one for one in free.problems if lacks and one.reason == NEWEST_COPY_MISSING)
    return Ballot(winner, "chosen by the operator", missing, free.standing, free.silent)


# Losses.


def _losses(case: _Case, winner: ReplicaView) -> tuple[Loss, ...]:
    return tuple(_loss(case, node, winner) for node in sorted(_losers(case, winner)))


def _losers(case: _Case, winner: ReplicaView) -> set[str]:
    """The nodes of which something is given up that may have been acknowledged, or that nobody can know."""
    view, record = case.view, case.view.record
    nodes = {*missing_members(view), *forgotten_branches(view, winner.lineage), *case.ballot.beyond}
    if PRIMARY_AWAY in case.reasons or PRIMARY_BEHIND in case.reasons:
        nodes.add(record.primary)
    others = [one for one in sorted_replicas(view) if one.node != winner.node and not is_foreign(view, one)]
    if record.newest_id and winner.lineage.find(record.newest_id) is None:
        nodes |= _holders_of_lost(view, winner) or {record.primary or winner.node}
    if case.choose:
        nodes |= {one.node for one in others if exceeds(one.lineage, winner.lineage)}
        claims = {record.primary, *rivals(view)}
        nodes |= {one.node for one in others if one.node in claims and _has_own(view, one, winner)}
    return nodes


def _holders_of_lost(view: VolumeView, winner: ReplicaView) -> set[str]:
    """Who has, or may have, acknowledged CPs that a winner without the newest known one lacks.

    All that was acknowledged stands in the lineage of the newest known CP. If nobody's last report has that lineage,
    every CP that the winner lacks may be in it. A member that was never heard may have anything.
    """
    known = [one for one in sorted_replicas(view) if not is_foreign(view, one)]
    acknowledged = next((line for one in known if (line := one.lineage.since(view.record.newest_id))), None)
    counted_ids = acknowledged.ids() if acknowledged is not None else None
    mine = winner.lineage.ids()
    holders = {node for node in view.record.members if view.replica(node).report is None}
    for one in known:
        lost = one.lineage.ids() - mine
        if lost if counted_ids is None else lost & counted_ids:
            holders.add(one.node)
    return holders


def _has_own(view: VolumeView, one: ReplicaView, winner: ReplicaView) -> bool:
    """Whether somebody with a claim to reign has, or may have, what the winner has not."""
    return not is_here(view, one) or one.live_modified or not winner.lineage.contains(one.lineage)


def _loss(case: _Case, node: str, winner: ReplicaView) -> Loss:
    replica, record = case.view.replica(node), case.view.record
    unseen_ms = max(case.now_ms - replica.report_time_ms, 0) if replica.report is not None else None
    if not replica.lineage.records or node == winner.node:
        acknowledged = node == record.primary and bool(record.newest_id)
        to_name = newest_name(case.view) if acknowledged and record.newest_cp == NO_CP else ""
        to_cp = record.newest_cp if acknowledged else None
        return Loss(node, None, to_cp, None, replica.live_modified, unseen_ms, "", to_name)
    fork = newest_shared(replica.lineage, winner.lineage)
    own = replica.lineage.after(fork.id) if fork is not None else replica.lineage.records
    if not own:
        return Loss(node, None, None, 0, replica.live_modified, unseen_ms)
    first, last = ("" if one.cp != NO_CP else one.name for one in (own[-1], own[0]))
    return Loss(node, own[-1].cp, own[0].cp, len(own), replica.live_modified, unseen_ms, first, last)


def _told(loss: Loss) -> str:
    """`a: 1-3 .. 1-4 (2 CPs), live writes, and what it has written in the 47 s since it was heard`."""
    parts = []
    if loss.lost_cps and loss.from_cp is not None and loss.to_cp is not None:
        first, last = loss.from_name or str(loss.from_cp), loss.to_name or str(loss.to_cp)
        stretch = first if loss.lost_cps == 1 else f"{first} .. {last}"
        what = "snapshot" if loss.from_name or loss.to_name else "CP"
        parts.append(f"{stretch} ({counted(loss.lost_cps, what)})")
    elif loss.to_cp is not None:
        parts.append(f"what is up to {loss.to_name}" if loss.to_name else f"CPs up to {loss.to_cp}")
    if loss.live_modified:
        parts.append("live writes")
    if loss.unseen_ms is None:
        parts.append("whatever it has")
    elif not parts:
        parts.append(f"whatever it has written since it was heard {age(loss.unseen_ms)} ago")
    return f"{loss.node} ({', '.join(parts)})"


# Refusals.


def _refused(case: _Case, losses: tuple[Loss, ...]) -> NotElected:
    view, found = case.view, case.ballot
    reasons, sentences = list(case.reasons), [problem.message for problem in case.problems]
    names = {loss.node for loss in losses}
    if found.winner is not None and ((case.accept_loss and case.accept_loss != names) or not reasons):
        reasons.append(LOSS_NOT_NAMED)
        sentences.append(_not_named(case, losses))
    elif losses and not case.needs_choice and found.winner is not None:
        sentences.append(f"{found.winner.node} would go on without what is only on {listed(map(_told, losses))}")
    if busy := _perhaps_busy(case, names):
        accepted = "".join(f" --accept-loss {node}" for node in sorted(names))
        sentences.append(f"ask again when {listed(busy)} may have answered, before you give that up with{accepted}")
    primary = view.record.primary
    missing = {*found.silent, *missing_members(view)}
    if primary and not view.replica(primary).fresh:
        missing.add(primary)
    refusal = Refusal(
        reasons=tuple(reasons),
        message="; ".join(sentences),
        missing_nodes=tuple(sorted(missing)),
        candidates=found.standing,
        losses=losses,
        next_command=_next_command(case, names),
    )
    would_win = "" if case.needs_choice or found.winner is None else found.winner.node
    return NotElected(refusal, _candidates(view, None, frozenset()), would_win)


def _not_named(case: _Case, losses: tuple[Loss, ...]) -> str:
    winner = case.ballot.winner
    assert winner is not None
    if not losses:
        return f"nothing is lost if {winner.node} becomes primary: there is no loss to accept"
    cost = f"what only these have would be given up for {winner.node}: {listed(map(_told, losses))}"
    if not case.accept_loss:
        return f"{cost}; each must be accepted by name"
    return f"{cost}; but what was accepted is {listed(sorted(case.accept_loss))}"


def _perhaps_busy(case: _Case, names: set[str]) -> list[str]:
    """Whom an operator who has accepted nothing yet should ask again before anything of theirs is given up."""
    if case.accept_loss or case.choose:
        return []
    return sorted(node for node in names if case.view.replica(node).late)


def _next_command(case: _Case, names: set[str]) -> str:
    elect_it = f"resilver elect {case.view.name}"
    winner = case.ballot.winner
    if winner is None:
        return f"{elect_it} --choose NODE" if case.ballot.standing else f"resilver status {case.view.name}"
    if _perhaps_busy(case, names):
        return f"{elect_it} --dry-run"
    choice = f" --choose {winner.node}" if case.choose or case.needs_choice else ""
    return elect_it + choice + "".join(f" --accept-loss {node}" for node in sorted(names))


# Candidates, for those who ask why.


def _candidates(view: VolumeView, winner: ReplicaView | None, accepted: frozenset[str]) -> tuple[Candidate, ...]:
    return tuple(_candidate(view, one, winner, accepted) for one in sorted_replicas(view))


def _candidate(
    view: VolumeView, replica: ReplicaView, winner: ReplicaView | None, accepted: Iterable[str]
) -> Candidate:
    status = status_of(view, replica.node)
    common = status.common or status.fork
    report = replica.report
    return Candidate(
        node=replica.node,
        reported=replica.fresh,
        report_time_ms=replica.report_time_ms,
        cp=replica.lineage.cp,
        snapshot=replica.lineage.tip_id,
        live=report.live.state if report is not None else LiveState.UNKNOWN,
        state=status.state,
        common_cp=common.cp if common is not None else NO_CP,
        priority=replica.priority,
        verdict=_verdict(view, replica, winner, accepted),
        snapshot_name=replica.lineage.tip.name if replica.lineage.tip is not None else "",
    )


def _verdict(view: VolumeView, replica: ReplicaView, winner: ReplicaView | None, accepted: Iterable[str]) -> str:
    if winner is not None and replica.node == winner.node:
        return "won"
    given_up = f"; what only it has was accepted as lost: --accept-loss {replica.node}"
    end = given_up if replica.node in accepted else ""
    _, text = bar(view, replica)
    if text:
        return text + end
    if winner is None:
        return "could go on" + (", its live copy is modified" if replica.live_modified else "")
    return _beside(replica, winner.lineage, winner.node) + end


def _beside(replica: ReplicaView, lineage: Lineage, node: str) -> str:
    mine = replica.lineage
    writes = " and has live writes of its own" if replica.live_modified else ""
    if not mine.records or not lineage.records:
        return f"cannot be compared with {node}"
    match relate(mine, lineage):
        case Relation.EQUAL:
            return f"has the same {'CP as' if mine.cp != NO_CP else 'newest snapshot as'} {node}{writes}"
        case Relation.BEHIND:
            return f"is contained in {node}{writes}"
        case Relation.AHEAD:
            return f"has {span(mine.after(lineage.tip_id))} beyond {node}{writes}"
        case Relation.DIVERGED:
            return _split(mine, lineage, node) + writes
        case Relation.UNRELATED:
            return f"has nothing in common with {node}"


def _split(mine: Lineage, lineage: Lineage, node: str) -> str:
    fork = newest_shared(mine, lineage)
    assert fork is not None
    if fork.id == lineage.tip_id:
        return f"has the snapshots of {node} in another order: {mine.tip_name} is its newest"
    return f"split from {node} at {name_of(fork)}, with {span(mine.after(fork.id))} of its own"
