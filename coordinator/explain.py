"""Why this primary, why this state, why this action: one volume's last decision and its next one, in words.

The rules:

* What was decided is told from the decision's own record, not worked out again from what is known now.
* What would be decided is worked out by the same functions that decide, and changes nothing.
* Every explanation that ends in a choice names the command that makes it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from coordinator.core.cluster import (
    Candidate,
    Elected,
    ElectionRecord,
    NotElected,
    PlanAction,
    ReplicaPlan,
    ReplicaState,
    Size,
    VolumePlan,
    VolumeView,
)
from coordinator.core.election import elect
from coordinator.core.planner import plan_volume
from coordinator.core.prepare import imagined
from coordinator.core.status import may_only, reference_lineage, status_of, unseen
from coordinator.core.words import name_of, size, span
from coordinator.office import Engine
from resilver.lineage import NO_CP, ConsistencyPoint

TEXT_CHARS_MAX: Final = 64 << 10
CANDIDATES_SHOWN_MAX: Final = 64
_ACTIONS: Final = {
    PlanAction.NONE: "nothing",
    PlanAction.DELTA: "delta",
    PlanAction.FULL: "full copy",
    PlanAction.BLOCKED: "nothing: it is blocked",
}


@dataclass(frozen=True, slots=True)
class Explained:
    """`decided` is the decision that made the present primary, else the last refusal, else nothing."""

    decided: ElectionRecord | None
    would_be: ElectionRecord
    plan: VolumePlan
    text: str


def explain(engine: Engine, view: VolumeView, node: str, now_ms: int) -> Explained:
    """One volume, or one replica of it."""
    elections = engine.elections(view.name)
    decided = _decided(view, elections)
    would_be = _would_be(view, now_ms)
    plan = _planned(engine, view, now_ms)
    refused = next((one for one in elections[:1] if one.refusal is not None), None)
    nodes = [node] if node else [name for name in sorted(view.replicas) if name != view.record.primary]
    parts = [_heading(engine, view, node, decided)]
    if decided is not None and decided.refusal is None:
        parts.append(_why_primary(decided))
    if refused is not None:
        parts.append(_why_refused("LAST ASKED", refused))
    if would_be.refusal is not None:
        parts.append(_why_refused("IF ASKED NOW", would_be))
    elif would_be.winner != view.record.primary:
        parts.append(f"IF ASKED NOW   {would_be.winner} would be elected; rule: {would_be.rule}")
    if not view.record.epoch:
        parts.append(_first_step(view, would_be, now_ms))
    for name in nodes:
        parts.append(_why_state(view, name))
        if view.record.epoch:
            parts.extend(_next_steps(view, plan, name, now_ms))
    text = "\n".join(part for part in parts if part)
    return Explained(decided or refused, would_be, plan, text[:TEXT_CHARS_MAX])


# What was decided, and what would be.


def _decided(view: VolumeView, elections: Sequence[ElectionRecord]) -> ElectionRecord | None:
    """The decision that opened the present epoch: the oldest that names it."""
    named = [one for one in elections if one.refusal is None and one.epoch_id == view.record.epoch_id]
    return named[-1] if named and view.record.epoch_id else None


def _would_be(view: VolumeView, now_ms: int) -> ElectionRecord:
    decision = elect(view, now_ms=now_ms)
    record = ElectionRecord(
        volume=view.name,
        create_time_ms=now_ms,
        previous_primary=view.record.primary,
        candidates=decision.candidates,
    )
    if not isinstance(decision, Elected):
        return replace(record, refusal=decision.refusal)
    return replace(
        record,
        winner=decision.winner,
        rule=decision.rule,
        cp=decision.fork.cp if decision.fork is not None else NO_CP,
        accepted=decision.accepted,
        epoch=0 if decision.new_epoch else view.record.epoch,
        epoch_id="" if decision.new_epoch else view.record.epoch_id,
    )


def _planned(engine: Engine, view: VolumeView, now_ms: int) -> VolumePlan:
    primary = view.primary
    takes_snapshot = primary is not None and primary.live_modified
    plan = plan_volume(view, target=None, takes_snapshot=takes_snapshot, now_ms=now_ms)
    tip = primary.lineage.tip_id if primary is not None else ""
    rows = tuple(
        replace(row, size=engine.size(view.name, row.base, row.target or tip)) if row.size is None else row
        for row in plan.replicas
    )
    return replace(plan, replicas=rows)


# Words.


def _heading(engine: Engine, view: VolumeView, node: str, decided: ElectionRecord | None) -> str:
    state = f"{view.name} on {node} is {status_of(view, node).state.value}." if node else ""
    record = view.record
    if not record.primary:
        return f"{state} {view.name} has no primary yet.".lstrip()
    what = f"{state} Primary" if node else f"{view.name}: primary"
    if decided is None:
        return f"{what} is {record.primary}: epoch {record.epoch}; the decision is no longer kept."
    leader = f"coordinator {engine.identity.name} (term {decided.term})"
    by = leader if decided.term == engine.identity.term and engine.identity.name else f"term {decided.term}"
    asked = f", asked by {decided.principal}" if decided.principal else ""
    since = _clock(decided.create_time_ms)
    return f"{what} is {record.primary} since {since}: epoch {decided.epoch}, by {by}{asked}."


def _why_primary(decided: ElectionRecord) -> str:
    lines = [f"WHY {decided.winner}     rule: {decided.rule}"]
    rows: list[tuple[str, ...]] = [("NODE", "ANSWERED", "NEWEST CP", "LIVE COPY", "VERDICT")]
    rows += [_candidate_row(one) for one in decided.candidates[:CANDIDATES_SHOWN_MAX]]
    return "\n".join(lines + _table(rows))


def _candidate_row(candidate: Candidate) -> tuple[str, ...]:
    if candidate.reported:
        answered = "yes"
    elif candidate.report_time_ms:
        answered = f"no, last report {_clock(candidate.report_time_ms)}"
    else:
        answered = "no, never"
    newest = candidate.snapshot_name or _cp(candidate.cp)
    return (candidate.node, answered, newest, candidate.live.value, candidate.verdict)


def _why_refused(title: str, election: ElectionRecord) -> str:
    refusal = election.refusal
    assert refusal is not None
    when = f" {_clock(election.create_time_ms)}" if title != "IF ASKED NOW" else ""
    lines = [f"{title}{when}   refused: {', '.join(refusal.reasons)}", *_wrapped(refusal.message)]
    if refusal.next_command:
        lines.append(f"  next: {refusal.next_command}")
    return "\n".join(lines)


def _why_state(view: VolumeView, node: str) -> str:
    status = status_of(view, node)
    replica = view.replica(node)
    head = f"WHY {node} IS {status.state.value}"
    if replica.report is None:
        return f"{head}   it has not been heard of since this coordinator leads"
    away = "" if replica.fresh else f"; it is not connected, its last report is of {_clock(replica.report_time_ms)}"
    match status.state:
        case ReplicaState.IN_SYNC:
            said = f"its newest CP is the primary's, {replica.lineage.tip_name}"
        case ReplicaState.EMPTY:
            said = "it has no data yet"
        case ReplicaState.LOST:
            why = unseen(replica)
            said = f"it cannot be looked at: {why}" if why else "it had data, and its disk is not there"
        case ReplicaState.FOREIGN:
            said = f"its data is of another volume ({replica.report.volume_id}) of the same name"
        case ReplicaState.UNRELATED:
            said = "it has data, and no snapshot in common with the primary"
        case ReplicaState.UNKNOWN:
            said = _unknown(view, node)
        case ReplicaState.STALE | ReplicaState.DIVERGED:
            said = _fork(view, node)
    return f"{head}   {said}{away}"


def _unknown(view: VolumeView, node: str) -> str:
    newest = view.replica(node).lineage.tip_name
    if not view.record.primary and view.replica(node).fresh:
        return f"there is no primary yet to compare it with; its newest snapshot: {newest}"
    forked = status_of(view, node).fork is not None and node != view.record.primary
    return f"its newest CP was {newest}" + (f"; {_fork(view, node)}" if forked else "")


def _fork(view: VolumeView, node: str) -> str:
    """Where primary and replica part, and what each has after it."""
    status = status_of(view, node)
    replica, reference = view.replica(node), reference_lineage(view)
    fork = status.fork
    if fork is None:
        return "nothing is known to be in common"
    if status.common is None:
        common = f"they part at {name_of(fork)}, but no snapshot in common is left on both"
    else:
        intact = ", ".join(_holding(view, status.common.id))
        common = f"common {name_of(status.common)} (intact on {intact})"
    theirs = span(reference.after(fork.id))
    mine = span(replica.lineage.after(fork.id))
    wrote = replica.live_modified and node != view.record.primary
    writes = "live writes, if there are any" if wrote and may_only(replica) else "live writes" if wrote else ""
    own = " and ".join(part for part in (mine, writes) if part)
    parts = [common]
    if theirs:
        parts.append(f"{view.record.primary} went on {theirs}")
    if own:
        parts.append(f"{node} went on {own}")
    return "; ".join(parts)


def _first_step(view: VolumeView, would_be: ElectionRecord, now_ms: int) -> str:
    if would_be.refusal is not None:
        return "WHAT RESYNC WOULD DO   nothing: there is no primary, and none can be told"
    plan = plan_volume(imagined(view, would_be.winner), target=None, takes_snapshot=True, now_ms=now_ms)
    lines = [f"WHAT RESYNC WOULD DO   make {would_be.winner} the primary, which takes {plan.target_cp}; then"]
    lines += [f"  {row.node}: {_would_do(row)}" for row in plan.replicas]
    return "\n".join([*lines, f"  next: resilver resync {view.name}"])


def _next_steps(view: VolumeView, plan: VolumePlan, node: str, now_ms: int) -> Iterable[str]:
    if plan.refusal is not None:
        yield f"WHAT RESYNC WOULD DO   nothing: {plan.refusal.message}"
        if plan.refusal.next_command:
            yield f"  next: {plan.refusal.next_command}"
        return
    row = next((one for one in plan.replicas if one.node == node), None)
    if row is None:
        return
    first = f"{plan.primary} takes {plan.target_cp} first; then " if plan.takes_snapshot else ""
    yield f"WHAT RESYNC WOULD DO   {first}{_would_do(row)}"
    if row.refusal is not None and row.refusal.next_command:
        yield f"  next: {row.refusal.next_command}"
    if status_of(view, node).state is ReplicaState.DIVERGED:
        yield _to_keep(view, node, now_ms)


def _would_do(row: ReplicaPlan) -> str:
    said = _ACTIONS[row.action]
    copies = row.action in (PlanAction.DELTA, PlanAction.FULL)
    if row.action is PlanAction.DELTA:
        said += f" from {row.base_name or _cp(row.base_cp)}"
    if row.size is not None and copies:
        said += f", {'' if row.exact else '>= '}{_cost(row.size)}"
    if row.sources and copies:
        said += f", from {' or '.join(row.sources)}"
    if row.preserve:
        said += f"; preserved first: {', '.join(row.preserve)}"
    return f"{said} ({row.why})" if row.why else said


def _cost(cost: Size) -> str:
    if cost.bytes is None:
        return "an unknown amount"
    return f"{'about ' if cost.estimated else ''}{size(cost.bytes)}"


def _to_keep(view: VolumeView, node: str, now_ms: int) -> str:
    """The command that elects this replica instead, with exactly the losses that it would have to accept."""
    decision = elect(view, choose=node, now_ms=now_ms)
    losses = decision.refusal.losses if isinstance(decision, NotElected) else ()
    accepted = "".join(f" --accept-loss {loss.node}" for loss in losses)
    line = f"TO KEEP {node}'s DATA INSTEAD   resilver elect {view.name} --choose {node}{accepted}"
    fork = status_of(view, node).fork
    theirs = span(reference_lineage(view).after(fork.id)) if fork is not None else ""
    kept = [loss.node for loss in losses if view.replica(loss.node).fresh]
    return f"{line}   ({theirs} would be preserved on {' and '.join(kept)})" if theirs and kept else line


def _holding(view: VolumeView, snapshot_id: str) -> list[str]:
    found = []
    for name in sorted(view.replicas):
        record = view.replicas[name].lineage.find(snapshot_id)
        if record is not None and record.present:
            found.append(name)
    return found


def _cp(cp: ConsistencyPoint) -> str:
    return str(cp) if cp != NO_CP else "-"


def _clock(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip() for row in rows
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="  ")
