"""What reports and store say of epochs: who reigns, whether anything contradicts it, and what the store forgot.

The rules:

* The store's record counts, and so does every record, grant and tip that a report carries: the highest is right.
  Epochs, and within one epoch the newest known CP, only ever go up.
* A primary stays only if it is here, has the newest known CP, holds the grant that the store names, and nobody else
  has a claim. Whatever is against it is said, each thing once, with its reason.
* A replica of another volume_id says nothing about this volume.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final, NamedTuple

from coordinator.core.cluster import ReplicaView, VolumeEntry, VolumeView
from coordinator.core.words import listed, point, silent
from resilver.lineage import Lineage, Relation, relate
from resilver.volume import Grant, LiveState, Presence, ReplicaReport, VolumeRecord

PRIMARY_AWAY: Final = "PRIMARY_AWAY"
PRIMARY_BEHIND: Final = "PRIMARY_BEHIND"
PRIMARY_UNCLEAR: Final = "PRIMARY_UNCLEAR"
RECOVERING: Final = "RECOVERING"


class Problem(NamedTuple):
    """Something an operator should know: its reason code, a sentence, and the command to run next (or empty)."""

    reason: str
    message: str
    next_command: str = ""


def sorted_replicas(view: VolumeView) -> tuple[ReplicaView, ...]:
    """Every replica by name, so that the order in which reports came decides nothing."""
    return tuple(view.replicas[node] for node in sorted(view.replicas))


def is_foreign(view: VolumeView, replica: ReplicaView) -> bool:
    """Whether its data belongs to another volume; only if both sides have an id."""
    known = view.record.volume_id
    return replica.report is not None and bool(known) and replica.report.volume_id not in ("", known)


def has_data(replica: ReplicaView) -> bool:
    """Whether its last report told of snapshots or a live copy."""
    report = replica.report
    if report is None or report.presence is not Presence.PRESENT:
        return False
    return bool(report.lineage) or report.live.state is not LiveState.ABSENT


def is_here(view: VolumeView, replica: ReplicaView) -> bool:
    """Whether it answered, with data of this volume."""
    return replica.fresh and has_data(replica) and not is_foreign(view, replica)


def exceeds(mine: Lineage, theirs: Lineage) -> bool:
    """Whether `mine` has every CP of `theirs` and more. Of no CPs at all nothing can be said."""
    return bool(theirs.records) and relate(mine, theirs) is Relation.AHEAD


def newest_name(view: VolumeView) -> str:
    """What to call the newest known CP; of an adopted snapshot only who has it knows the name."""
    record = view.record
    found = (one.lineage.find(record.newest_id) for one in sorted_replicas(view))
    named = next((one.name for one in found if one is not None), "")
    return named or point(record.newest_cp, record.newest_id)


def next_epoch(view: VolumeView) -> int:
    """One more than any epoch that store, records, grants or tips know of."""
    known = [view.record.epoch]
    for replica in view.replicas.values():
        if replica.report is not None:
            known.extend(_epochs(replica.report, view.record.volume_id))
    return 1 + max(known)


def reconcile(view: VolumeView) -> VolumeEntry | None:
    """The entry as reports show that it must have been, if the store knew less; None if the store is right.

    Records of another volume_id are not listened to; if there is no entry and the records are of several volumes,
    nobody can say which one is meant. The raised entry is `recovering`: what else was forgotten is not known. As long
    as it is, every member counts that a record names, however old and whenever it was told.
    """
    base = view.entry or VolumeEntry(VolumeRecord(view.name))
    best = _highest_told(view, base.record)
    if best is None:
        return None
    if not _higher(best, base.record):
        # Whom a store that has forgotten nothing does not name was removed.
        members = _members_known(view, base, base.record) if base.recovering else ()
        if {*members} <= {*base.record.members}:
            return None
        return replace(base, record=replace(base.record, members=members))
    raised = replace(best, volume=view.name, members=_members_known(view, base, best))
    return replace(
        base,
        record=raised,
        newest_cp_time_ms=_time_of(view, best.newest_id) or base.newest_cp_time_ms,
        opening=_is_opening(view, raised),
        recovering=True,
    )


def _members_known(view: VolumeView, base: VolumeEntry, highest: VolumeRecord) -> tuple[str, ...]:
    """Every member that the store or a record names; those that were removed only if the highest record names them."""
    told = _told(view, highest.volume_id)
    named = {*base.record.members, *(member for record in told for member in record.members)}
    return tuple(sorted(named - ({*base.removed} - {*highest.members})))


def _highest_told(view: VolumeView, known: VolumeRecord) -> VolumeRecord | None:
    told = _told(view, known.volume_id)
    if not told or len({record.volume_id for record in told}) > 1:
        return None
    # Of two epochs of one number the store's own is kept; without one, the choice only has to be the same every time:
    # a number that stands for two epochs makes the election refuse.
    same_epoch_id = [record for record in told if (record.epoch, record.epoch_id) == (known.epoch, known.epoch_id)]
    top = max(record.epoch for record in told)
    among = same_epoch_id if top == known.epoch and same_epoch_id else [one for one in told if one.epoch == top]
    return max(among, key=lambda record: (record.newest_cp, record.epoch_id, record.newest_id, record.primary))


def _told(view: VolumeView, volume_id: str) -> list[VolumeRecord]:
    """The records that reports carry of this volume (of any, if its id is not known)."""
    records = (one.report.record for one in sorted_replicas(view) if one.report is not None)
    return [one for one in records if one is not None and one.epoch and volume_id in ("", one.volume_id)]


def _higher(told: VolumeRecord, known: VolumeRecord) -> bool:
    if told.epoch != known.epoch:
        return told.epoch > known.epoch
    return told.epoch_id == known.epoch_id and told.newest_cp > known.newest_cp


def _time_of(view: VolumeView, snapshot_id: str) -> int:
    found = (replica.lineage.find(snapshot_id) for replica in sorted_replicas(view))
    return next((record.create_time_ms for record in found if record is not None), 0)


def _is_opening(view: VolumeView, record: VolumeRecord) -> bool:
    """Whether no CP of the record's epoch has been seen: its opening CP may never have been taken."""
    seen = (replica.lineage for replica in view.replicas.values() if not is_foreign(view, replica))
    return record.newest_cp.epoch < record.epoch and not any(
        one.epoch_id == record.epoch_id for lineage in seen for one in lineage
    )


# What is against the primary.


def primary_problems(view: VolumeView, now_ms: int) -> tuple[Problem, ...]:
    """Why the primary cannot simply stay; empty if it can, or if none is recorded."""
    if not view.record.primary:
        return ()
    away = _away(view, now_ms)
    behind = "" if away else _behind(view)
    unclear = [] if away or behind else _own_grant(view)
    unclear += [sentence for _, sentence in sorted(rivals(view).items())]
    found = []
    if away:
        found.append(Problem(PRIMARY_AWAY, away))
    if behind:
        found.append(Problem(PRIMARY_BEHIND, behind))
    if unclear:
        found.append(Problem(PRIMARY_UNCLEAR, "; ".join(unclear)))
    return tuple(found)


def missing_members(view: VolumeView) -> tuple[str, ...]:
    """While the store is recovering: the members that have not answered. A lost disk answers nothing."""
    if view.entry is None or not view.entry.recovering:
        return ()
    return tuple(node for node in sorted(view.record.members) if not _answered(view.replica(node)))


def forgotten_branches(view: VolumeView, lineage: Lineage) -> tuple[str, ...]:
    """While the store is recovering: who has CPs that are not in the lineage given.

    Usually they were given up long ago. But a store that forgot does not know that: they may as well have been
    acknowledged in a reign of which only they have kept the traces.
    """
    if view.entry is None or not view.entry.recovering:
        return ()
    others = (one for one in sorted_replicas(view) if not is_foreign(view, one))
    return tuple(one.node for one in others if not lineage.contains(one.lineage))


def recovering_problem(view: VolumeView, lineage: Lineage) -> tuple[Problem, ...]:
    """Why the store's gap forbids that the volume goes on with that lineage."""
    missing, branches = missing_members(view), forgotten_branches(view, lineage)
    parts = []
    if missing:
        parts.append(f"every known member must answer, and {listed(missing)} does not")
    if branches:
        parts.append(f"CPs that only {listed(branches)} has may have counted")
    if not parts:
        return ()
    return (Problem(RECOVERING, f"the store knew less than a replica: {'; '.join(parts)}"),)


def rivals(view: VolumeView) -> dict[str, str]:
    """Nodes whose grant, tip or record contradicts the store's epoch, and how; the primary may be one of them.

    A higher epoch counts however long ago it was heard; the same one only from a node that is here, so that a
    clone that has been shut down does not block for ever. Before the first epoch there is nothing to contradict.
    """
    found: dict[str, str] = {}
    record = view.record
    for replica in sorted_replicas(view):
        report = replica.report
        if report is None or not record.epoch or is_foreign(view, replica):
            continue
        claim = _claim(record, replica.node, report, fresh=replica.fresh)
        if claim:
            found[replica.node] = claim
    return found


def _claim(record: VolumeRecord, node: str, report: ReplicaReport, *, fresh: bool) -> str:
    highest = max(_epochs(report, record.volume_id))
    if highest > record.epoch:
        return f"{node} knows of epoch {highest}, the store only of epoch {record.epoch}"
    if not fresh:
        return ""
    grant = report.grant
    same = grant is not None and (grant.volume_id, grant.epoch) == (record.volume_id, record.epoch)
    if node != record.primary and same:
        return f"{node} holds a grant for epoch {record.epoch}, but the store names {record.primary} as primary"
    if any(epoch_id not in ("", record.epoch_id) for epoch_id in _epoch_ids(report, record)):
        return f"{node} knows another epoch of the number {record.epoch} than the store does"
    return ""


def _epochs(report: ReplicaReport, volume_id: str) -> Iterable[int]:
    """The epochs that a report knows of; a grant or record left over from another volume of that name is none."""
    yield report.lineage.cp.epoch
    for told in (report.grant, report.record):
        if told is not None and volume_id in ("", told.volume_id):
            yield told.epoch


def _epoch_ids(report: ReplicaReport, record: VolumeRecord) -> Iterable[str]:
    """What the report calls the epoch of the record's number."""
    tip, told = report.lineage.tip, report.record
    if tip is not None and tip.cp.epoch == record.epoch:
        yield tip.epoch_id
    if told is not None and told.epoch == record.epoch and told.volume_id == record.volume_id:
        yield told.epoch_id


def _answered(replica: ReplicaView) -> bool:
    return replica.fresh and replica.report is not None and replica.report.presence is not Presence.LOST


def _away(view: VolumeView, now_ms: int) -> str:
    node = view.record.primary
    replica = view.replica(node)
    report = replica.report
    if not replica.fresh or report is None:
        said = silent(replica, now_ms)
        return said if replica.duplicate else f"the primary {said}"
    if report.presence is Presence.LOST:
        return f"the primary {node} answers, but the disk with its data is not there"
    if report.presence is Presence.EMPTY or not has_data(replica):
        return f"the primary {node} answers, but has no data"
    if is_foreign(view, replica):
        return f"the primary {node} answers, but with the data of another volume ({report.volume_id})"
    if report.live.state is LiveState.ABSENT:
        return f"the primary {node} answers, but its live copy is gone; its last CP is {report.lineage.tip_name}"
    return ""


def _behind(view: VolumeView) -> str:
    record, entry = view.record, view.entry
    mine = view.replica(record.primary).lineage
    if record.newest_id and mine.find(record.newest_id) is None:
        newest = newest_name(view)
        return f"the primary {record.primary} is here at {mine.tip_name}, without the newest known CP {newest}"
    if entry is not None and entry.opening:
        # Whoever reigned before may have CPs after the fork; they were given up when this epoch was opened.
        return ""
    ahead = [one for one in sorted_replicas(view) if is_here(view, one) and exceeds(one.lineage, mine)]
    if ahead:
        names = listed(f"{one.node} at {one.lineage.tip_name}" for one in ahead)
        return f"the primary {record.primary} is here at {mine.tip_name}, but others have all of that and more: {names}"
    return ""


def _own_grant(view: VolumeView) -> list[str]:
    """What is wrong with the grant of a primary that is here."""
    record, entry = view.record, view.entry
    report = view.replica(record.primary).report
    grant = report.grant if report is not None else None
    if grant == Grant(record.volume_id, record.epoch, record.epoch_id):
        return []
    if entry is not None and entry.opening and (grant is None or grant.epoch < record.epoch):
        return []  # the order that opens the epoch brings the grant, and may still be on its way
    if grant is None:
        return [f"the primary {record.primary} is here, but holds no grant for epoch {record.epoch}"]
    if grant.epoch > record.epoch:
        return []  # said by rivals()
    held = f"epoch {grant.epoch}" if grant.epoch != record.epoch else f"another epoch {grant.epoch}"
    return [f"the primary {record.primary} holds a grant for {held}, but the store is in epoch {record.epoch}"]
