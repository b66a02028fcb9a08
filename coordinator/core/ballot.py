"""Which replica is the most up-to-date one, or why that cannot be said.

The rules:

* Containment decides. Where two replicas share a record and neither contains the other, the tip of the higher epoch
  wins; within one epoch nothing does, and sequences never do.
* Who has the newest known CP goes before everybody who has not.
* Equal tips: the present primary, then a live copy that is not modified (what was written without a grant is not to
  become the volume by chance), then priority, then name.
* A replica whose live copy is gone cannot reign, but what it has still counts: nothing goes over it in silence.
* Before the first epoch nothing is known to be acknowledged, so nothing is known to be worthless either: only a replica
  that contains all others wins, live writes included, and a known node that is silent forbids the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.core.claims import Problem, exceeds, has_data, is_foreign, is_here, newest_name, sorted_replicas
from coordinator.core.cluster import ReplicaView, VolumeView
from coordinator.core.words import listed
from resilver.lineage import NO_CP, Lineage, Relation, Snapshot, newest_shared, relate
from resilver.volume import LiveState, Presence

NEWEST_COPY_MISSING: Final = "NEWEST_COPY_MISSING"
AMBIGUOUS: Final = "AMBIGUOUS"
NO_DATA: Final = "NO_DATA"


@dataclass(frozen=True, slots=True)
class Ballot:
    """The winner and the rule that made it one, or nobody and the problems; a winner may have problems too.

    `standing` are the nodes that could win; `silent` those that may know more but say nothing; `beyond` those that
    have CPs after the winner's tip and cannot reign.
    """

    winner: ReplicaView | None = None
    rule: str = ""
    problems: tuple[Problem, ...] = ()
    standing: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    beyond: tuple[str, ...] = ()


def bar(view: VolumeView, replica: ReplicaView, *, chosen: bool = False) -> tuple[str, str]:
    """Why a replica cannot win, as a reason and the end of a sentence; two empty texts if it can.

    One that is `chosen` by name need not be related to what is known; before the first epoch nobody need be.
    """
    for reason, text, holds in (
        ("NODE_OFFLINE", "does not answer", not replica.fresh or replica.report is None),
        ("REPLICA_LOST", "has lost its disk", _presence(replica) is Presence.LOST),
        ("NO_DATA", "has no data", not has_data(replica)),
        ("REPLICA_FOREIGN", "has the data of another volume", is_foreign(view, replica)),
        ("NO_DATA", "has no live copy, only snapshots", _live(replica) is LiveState.ABSENT),
    ):
        if holds:
            return reason, text
    if chosen or not view.record.epoch:
        return "", ""
    if view.entry is not None and replica.node in view.entry.removed:
        return "NODE_OFFLINE", "was removed from the volume"
    if not _related(view, replica.lineage):
        return "REPLICA_UNRELATED", "has nothing in common with the volume"
    return "", ""


def ballot(view: VolumeView) -> Ballot:
    """Compares what is here, as the volume's epoch demands."""
    return _known(view) if view.record.epoch else _first_sight(view)


def beats(mine: ReplicaView, other: ReplicaView) -> bool:
    """Whether `mine` is at least as up to date as the other."""
    match relate(mine.lineage, other.lineage):
        case Relation.EQUAL | Relation.AHEAD:
            return True
        case Relation.DIVERGED:
            return mine.lineage.cp.epoch > other.lineage.cp.epoch
        case _:
            return False


def covers(mine: ReplicaView, other: ReplicaView) -> bool:
    """Whether `mine` has everything that the other has, live writes included."""
    if mine.report is None or other.report is None:
        return False
    if "" not in (mine.report.volume_id, other.report.volume_id) and mine.report.volume_id != other.report.volume_id:
        return False
    contains = relate(mine.lineage, other.lineage) in (Relation.EQUAL, Relation.AHEAD)
    return bool(other.lineage.records) and contains and not other.live_modified


def _known(view: VolumeView) -> Ballot:
    here = [one for one in sorted_replicas(view) if not bar(view, one)[0]]
    newest = view.record.newest_id
    having = [one for one in here if not newest or one.lineage.find(newest) is not None]
    problems = []
    if not having and newest:
        problems.append(_newest_missing(view))
    pool = having or here
    winner, rule = _best(view, pool, beats)
    if not here:
        problems.append(Problem(NO_DATA, f"no node that answers has data that {view.name} could go on from"))
    elif winner is None:
        problems.append(_ambiguous(pool))
    beyond: tuple[str, ...] = ()
    if winner is not None:
        beyond = _beyond(view, winner)
        if beyond and not problems:
            problems.append(_beyond_problem(beyond, winner))
    return Ballot(winner, rule, tuple(problems), tuple(one.node for one in here), (), beyond)


def _first_sight(view: VolumeView) -> Ballot:
    replicas = sorted_replicas(view)
    here = [one for one in replicas if is_here(view, one)]
    able = [one for one in here if not bar(view, one)[0]]
    silent = tuple(one.node for one in replicas if not one.fresh or _presence(one) is Presence.LOST)
    if not able:
        return Ballot(problems=(_nothing(view, here, silent),), silent=silent)
    problems = []
    if silent:
        message = f"{listed(silent)} may have data of {view.name} too, and does not show it"
        problems.append(Problem(AMBIGUOUS, message))
    winner, rule = _best(view, able, covers)
    beyond: tuple[str, ...] = ()
    if winner is None:
        problems.append(_ambiguous(able))
    else:
        beyond = tuple(one.node for one in here if one is not winner and not covers(winner, one))
        if beyond:
            problems.append(_not_covered(view, beyond, winner))
    return Ballot(winner, rule, tuple(problems), tuple(one.node for one in able), silent, beyond)


def _best(
    view: VolumeView, pool: Sequence[ReplicaView], over: Callable[[ReplicaView, ReplicaView], bool]
) -> tuple[ReplicaView | None, str]:
    """The one that goes over all others, and by what rule."""
    top = [one for one in pool if all(one is other or over(one, other) for other in pool)]
    if not top:
        return None, ""
    top.sort(key=lambda one: _tie(view, one))
    winner = top[0]
    if len(pool) == 1:
        return winner, "the only candidate"
    if len(top) > 1:
        what = "newest snapshot" if winner.lineage and winner.lineage.cp == NO_CP else "CP"
        return winner, f"equal {what}, then {_tie_rule(view, winner, top[1])}"
    contained = all(winner.lineage.contains(one.lineage) for one in pool)
    return winner, "contains every other candidate" if contained else "the tip of the higher epoch"


def _tie(view: VolumeView, one: ReplicaView) -> tuple[bool, bool, int, str]:
    return one.node != view.record.primary, one.live_modified, -one.priority, one.node


def _tie_rule(view: VolumeView, winner: ReplicaView, second: ReplicaView) -> str:
    if winner.node == view.record.primary:
        return "the present primary"
    if winner.live_modified != second.live_modified:
        return "a live copy that is not modified"
    if winner.priority != second.priority:
        return f"priority ({winner.node} {winner.priority}, {second.node} {second.priority})"
    return f"name ({winner.node}, {second.node})"


def _related(view: VolumeView, lineage: Lineage) -> bool:
    """Whether it shares a record with what is known of the volume: the primary's lineage, or any with the newest CP.

    If nothing of it is known, every lineage may be it; data without a lineage never is.
    """
    if not lineage.records:
        return False
    record = view.record
    known = [
        one.lineage
        for one in view.replicas.values()
        if (one.node == record.primary or one.lineage.find(record.newest_id)) and not is_foreign(view, one)
    ]
    known = [one for one in known if one.records]
    return not known or any(newest_shared(lineage, one) is not None for one in known)


def _beyond(view: VolumeView, winner: ReplicaView) -> tuple[str, ...]:
    """Who is here with all that the winner has and more, but cannot reign."""
    return tuple(
        one.node
        for one in sorted_replicas(view)
        if is_here(view, one) and exceeds(one.lineage, winner.lineage)
        if _live(one) is LiveState.ABSENT
    )


def _nothing(view: VolumeView, here: Sequence[ReplicaView], silent: Sequence[str]) -> Problem:
    message = f"no node that answers has data of {view.name}"
    if here:
        message = f"nobody has a live copy of {view.name}; snapshots are on {listed(one.node for one in here)}"
    if silent:
        message += f"; {listed(silent)} cannot say"
    return Problem(NO_DATA, message)


def _newest_missing(view: VolumeView) -> Problem:
    record = view.record
    newest = newest_name(view)
    holders = [one.node for one in sorted_replicas(view) if one.lineage.find(record.newest_id) is not None]
    last = f"it was last seen on {listed(holders)}" if holders else f"{record.primary or 'its primary'} took it"
    return Problem(NEWEST_COPY_MISSING, f"nobody who could go on has the newest known CP {newest}; {last}")


def _beyond_problem(beyond: Sequence[str], winner: ReplicaView) -> Problem:
    tip = winner.lineage.tip_name
    return Problem(
        NEWEST_COPY_MISSING, f"{listed(beyond)} has more than {winner.node} at {tip}, but no live copy to go on with"
    )


def _not_covered(view: VolumeView, beyond: Sequence[str], winner: ReplicaView) -> Problem:
    """At first sight: who has no live copy to go on with, but what the only one that could go on has not."""
    if all(exceeds(view.replica(node).lineage, winner.lineage) for node in beyond):
        return _beyond_problem(beyond, winner)
    lacks = listed(f"{node} at {view.replica(node).lineage.tip_name}" for node in beyond)
    common = _in_common([winner, *(view.replica(node) for node in beyond)])
    message = f"{winner.node} at {winner.lineage.tip_name} is without what others have that no live copy descends from"
    return Problem(NEWEST_COPY_MISSING, f"{message}: {lacks}; {common}")


def _in_common(pool: Sequence[ReplicaView]) -> str:
    """How far their histories agree."""
    newest = _newest_in_all(pool)
    return f"the newest that all of them have is {newest.name}" if newest is not None else "nothing is in all of them"


def _newest_in_all(pool: Sequence[ReplicaView]) -> Snapshot | None:
    rest = [one.lineage.ids() for one in pool[1:]]
    return next((record for record in pool[0].lineage if all(record.id in ids for ids in rest)), None)


def _ambiguous(pool: Sequence[ReplicaView]) -> Problem:
    each = listed(_described(one) for one in pool)
    message = f"several replicas have data, and none contains all others: {each}"
    # Of snapshots that other tools made no number tells how far they agree.
    adopted = any(one.lineage and one.lineage.cp == NO_CP for one in pool)
    return Problem(AMBIGUOUS, f"{message}; {_in_common(pool)}" if adopted else message)


def _described(one: ReplicaView) -> str:
    return f"{one.node} at {one.lineage.tip_name}{', with live writes' if one.live_modified else ''}"


def _presence(replica: ReplicaView) -> Presence | None:
    return replica.report.presence if replica.report is not None else None


def _live(replica: ReplicaView) -> LiveState | None:
    return replica.report.live.state if replica.report is not None else None
