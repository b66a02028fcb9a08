"""Deliberate faults in the core, in the agent's rules and below them: what shows that the simulation bites.

Each takes one rule away. The suite runs it until a seed breaks, and checks that it is a guarantee that broke.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import agent.replica
import agent.rights
import agent.run
import agent.runs
from agent.identity import Identity
from coordinator.core import ballot, decide, election, events, hearing, pruning
from coordinator.core.context import Context
from coordinator.core.engine import Engine
from coordinator.core.history import History
from tests.simulation.coordinator import Coordinator, ReignEnded, Store
from tests.simulation.disk import Disk, KeptIdentity, Stage
from tests.simulation.guarantees import Guarantees
from tests.simulation.world import FAULTS

Place = tuple[Any, str, Any]


@dataclass(frozen=True)
class Mutation:
    """What is put in place of what. `breaks` are the guarantees that may be the first to break; `harsh` are rates of
    those faults without which the rule is never needed.
    """

    places: Callable[[], tuple[Place, ...]]
    breaks: frozenset[str]
    harsh: Mapping[str, float] = field(default_factory=dict)


@contextmanager
def applied(name: str) -> Iterator[None]:
    """The mutation of that name, for as long as it lasts; nothing for an empty name."""
    with ExitStack() as stack:
        for place, attribute, value in MUTATIONS[name].places() if name else ():
            stack.callback(setattr, place, attribute, place.__dict__[attribute])
            setattr(place, attribute, value)
        yield


def harsh(name: str) -> Mapping[str, float]:
    """The rates of faults that go with a mutation."""
    return MUTATIONS[name].harsh if name else {}


# Whom to obey.


def _term_not_checked() -> tuple[Place, ...]:
    def meet(self: Any, store_id: str, term: int, leader_id: str) -> None:
        self._save(replace(self._pin, store_id=store_id, term=term, leader_id=leader_id))

    return ((Identity, "meet", meet),)


def _term_not_kept() -> tuple[Place, ...]:
    def save(self: Any, pin: Any) -> None:
        self._pin = pin

    return ((KeptIdentity, "_save", save),)


def _lower_epoch_obeyed() -> tuple[Place, ...]:
    def nothing(*_: Any) -> None:
        return

    return ((agent.rights, "compare_epochs", nothing), (agent.replica, "compare_epochs", nothing))


def _record_forgotten() -> tuple[Place, ...]:
    return ((Disk, "save_record", lambda _self, _record: None),)


def _grant_outlives_its_epoch() -> tuple[Place, ...]:
    kept = Disk.save_grant

    def save_grant(self: Disk, grant: Any) -> None:
        if grant is not None:
            kept(self, grant)

    return ((Disk, "save_grant", save_grant),)


def _expected_tip_not_compared() -> tuple[Place, ...]:
    return tuple((module, "check_tip", lambda *_: None) for module in (agent.replica, agent.run, agent.runs))


# What is kept.


def _nothing_preserved() -> tuple[Place, ...]:
    return ((Disk, "preserve", lambda _self, _leaving, _resync_id: ()),)


def _stage_of_another_pair() -> tuple[Place, ...]:
    kept = Disk.open_stage

    def open_stage(self: Disk, base: str, target: str, size: int) -> Stage:
        if self.stage is not None:
            self.stage = replace(self.stage, base=base, target=target)
        return kept(self, base, target, size)

    return ((Disk, "open_stage", open_stage),)


# Elections.


def _primary_away_is_no_loss() -> tuple[Place, ...]:
    return ((election, "PRIMARY_AWAY", "NEVER"),)


def _losses_not_counted() -> tuple[Place, ...]:
    return ((election, "_losers", lambda _case, _winner: set()),)


def _sequences_decide() -> tuple[Place, ...]:
    """Who has the highest sequence is taken for whoever has the newest CP."""

    def as_known(view: Any, choose: str) -> Any:
        seen = kept(view, choose)
        here = [one for one in seen.replicas.values() if one.fresh and one.lineage.records]
        if seen.entry is None or not here:
            return seen
        first = max(here, key=lambda one: (one.lineage.cp.sequence, one.node))
        record = replace(seen.entry.record, newest_id=first.lineage.tip_id, newest_cp=first.lineage.cp)
        return replace(seen, entry=replace(seen.entry, record=record))

    kept = election._as_known
    return ((election, "_as_known", as_known),)


def _newest_not_asked_for() -> tuple[Place, ...]:
    """The newest known CP plays no part in an election."""

    def as_known(view: Any, choose: str) -> Any:
        seen = kept(view, choose)
        if seen.entry is None:
            return seen
        record = replace(seen.entry.record, newest_id="")
        return replace(seen, entry=replace(seen.entry, record=record))

    kept = election._as_known
    return ((election, "_as_known", as_known),)


def _anybody_acknowledges() -> tuple[Place, ...]:
    def acknowledge(context: Context, volume: str, node: str, report: Any) -> None:
        entry, tip = context.entries.get(volume), report.lineage.tip
        if entry is not None and tip is not None and tip.cp > entry.record.newest_cp:
            raised = replace(entry.record, newest_cp=tip.cp, newest_id=tip.id)
            context.put_record(volume, raised, newest_cp_time_ms=tip.create_time_ms, opening=False)

    return ((hearing, "_acknowledge", acknowledge),)


def _opening_not_awaited() -> tuple[Place, ...]:
    def open_at_once(thing: Any, **changes: Any) -> Any:
        return replace(thing, **{key: value for key, value in changes.items() if key != "opening"})

    return ((decide, "replace", open_at_once),)


def _same_number_again() -> tuple[Place, ...]:
    return ((decide, "next_epoch", lambda view: max(1, view.record.epoch)),)


def _first_sight_by_name() -> tuple[Place, ...]:
    """At first sight whoever comes first is taken for one that has what the others have."""
    return ((ballot, "covers", lambda _mine, _other: True),)


def _another_tools_is_ours() -> tuple[Place, ...]:
    """What another tool made counts among ours, and is pinned by nothing but what we need."""
    kept = pruning.pinned_by

    def pinned_by(*about: Any) -> tuple[str, ...]:
        return tuple(reason for reason in kept(*about) if reason != pruning.ANOTHER_TOOLS)

    def prunable(context: Any, view: Any, node: str, keep_last: int) -> tuple[Any, ...]:
        beyond = [one for one in view.replica(node).lineage if one.present][keep_last:]
        return tuple(one for one in reversed(beyond) if not pinned_by(view, context, node, one.id))

    return ((pruning, "pinned_by", pinned_by), (pruning, "prunable", prunable))


# Remembering.


def _acts_before_it_stores() -> tuple[Place, ...]:
    kept = Engine.step

    def step(self: Engine, event: Any, now_ms: int) -> list[Any]:
        # What is told waits with what is stored: this is not about events.
        return sorted(kept(self, event, now_ms), key=lambda action: isinstance(action, events.Persist | events.Tell))

    return ((Engine, "step", step),)


def _failed_commit_ignored() -> tuple[Place, ...]:
    kept = Coordinator._persist

    def persist(self: Coordinator, action: Any) -> None:
        try:
            kept(self, action)
        except ReignEnded:
            return

    # Events would tell of it at once, and this is not about them.
    unseen = tuple((Guarantees, name, lambda *_: None) for name in ("events_stored", "told"))
    return ((Coordinator, "_persist", persist), *unseen)


def _told_apart() -> tuple[Place, ...]:
    """An event has a transaction of its own, after what it tells of."""

    def tell(self: Context, kind: str, message: str, **about: str) -> None:
        event, _ = self.history.add(self.now_ms, kind, message, **about)
        self.emit(events.Persist((event,)), events.Tell(event))

    return ((Context, "tell", tell),)


def _told_before_it_is_stored() -> tuple[Place, ...]:
    kept = Engine.step

    def step(self: Engine, event: Any, now_ms: int) -> list[Any]:
        return sorted(kept(self, event, now_ms), key=lambda action: not isinstance(action, events.Tell))

    return ((Engine, "step", step),)


def _numbered_from_the_start() -> tuple[Place, ...]:
    """A leader counts events anew."""
    kept = History.__init__
    return ((History, "__init__", lambda self, _term, _events: kept(self, 0, ())),)


def _commits_unguarded() -> tuple[Place, ...]:
    kept = Store.commit

    def commit(self: Store, _now: int, _leader_id: str, _expected: Any, records: Any, answered: Any) -> int:
        return kept(self, self.lease_ends - 1, self.leader_id, {}, records, answered)

    return ((Store, "commit", commit),)


def _lock_not_released() -> tuple[Place, ...]:
    return ((Engine, "_release", lambda _self, _prepared: None),)


# Faults that many of them need.
_CALM = dict.fromkeys(FAULTS, 0.0) | {"order held up": 0.1, "jump": 0.008, "agent dies": 0.02}
_LATE = {"order held up": 0.4, "agent dies": 0.05}
_OPENING = _CALM | {"order held up": 0.3, "stream breaks": 0.05}
_DEPOSED = {"coordinator dies": 0.02, "freeze": 0.04}

MUTATIONS = {
    "term not checked": Mutation(_term_not_checked, frozenset({"NO_DEPOSED_COORDINATOR"}), _LATE | _DEPOSED),
    "term not kept over a crash": Mutation(
        _term_not_kept, frozenset({"NO_DEPOSED_COORDINATOR"}), _LATE | {"coordinator dies": 0.02}
    ),
    "lower epoch obeyed": Mutation(_lower_epoch_obeyed, frozenset({"NO_LOWER_EPOCH", "ONLY_UP"}), _CALM | _LATE),
    "record of the volume forgotten": Mutation(
        _record_forgotten, frozenset({"NO_LOWER_EPOCH", "ONE_GRANT", "NO_STUCK_FLOW"}), _CALM | _LATE
    ),
    "grant outlives its epoch": Mutation(_grant_outlives_its_epoch, frozenset({"ONE_GRANT"})),
    "expected tip not compared": Mutation(
        _expected_tip_not_compared, frozenset({"COMPARE_AND_SET"}), _CALM | {"order held up": 0.2}
    ),
    "nothing preserved": Mutation(_nothing_preserved, frozenset({"KEPT"})),
    "stage of another pair": Mutation(
        _stage_of_another_pair, frozenset({"EQUAL_ID_EQUAL_BYTES", "WHOLE_CP"}), _CALM | {"agent dies in an order": 0.1}
    ),
    "primary away is no loss": Mutation(_primary_away_is_no_loss, frozenset({"CERTAIN_OR_REFUSED"})),
    "losses not counted": Mutation(_losses_not_counted, frozenset({"CERTAIN_OR_REFUSED", "NOTHING_ACKNOWLEDGED_LOST"})),
    "sequences decide": Mutation(
        _sequences_decide,
        frozenset({"NOTHING_ACKNOWLEDGED_LOST", "CERTAIN_OR_REFUSED", "CONVERGES"}),
        {"disk restored": 0.02, "agent dies": 0.02},
    ),
    "newest CP plays no part": Mutation(
        _newest_not_asked_for,
        frozenset({"NOTHING_ACKNOWLEDGED_LOST", "CERTAIN_OR_REFUSED", "CONVERGES"}),
        {"disk restored": 0.02, "agent dies": 0.02},
    ),
    "anybody acknowledges": Mutation(_anybody_acknowledges, frozenset({"ACKNOWLEDGED_UNDER_GRANT"}), _OPENING),
    "opening CP not awaited": Mutation(_opening_not_awaited, frozenset({"NOT_BEFORE_OPENING", "CONVERGES"}), _OPENING),
    "the same epoch again": Mutation(_same_number_again, frozenset({"ONE_GRANT"})),
    "first sight by name": Mutation(_first_sight_by_name, frozenset({"CERTAIN_OR_REFUSED"})),
    "another tool's is ours": Mutation(_another_tools_is_ours, frozenset({"KEPT"}), _CALM),
    "acts before it stores": Mutation(
        _acts_before_it_stores,
        frozenset({"ONE_GRANT", "NO_LOWER_EPOCH", "ONLY_UP", "CERTAIN_OR_REFUSED"}),
        _CALM | {"coordinator dies": 0.03, "commit refused": 0.05},
    ),
    "failed commit ignored": Mutation(
        _failed_commit_ignored,
        frozenset({"ONE_GRANT", "NOT_BEFORE_OPENING", "CERTAIN_OR_REFUSED", "NOTHING_ACKNOWLEDGED_LOST", "ONLY_UP"}),
        _CALM | {"commit refused": 0.1},
    ),
    "commits unguarded": Mutation(
        _commits_unguarded, frozenset({"NO_DEPOSED_COORDINATOR", "ONE_GRANT", "ONLY_UP"}), _DEPOSED
    ),
    "told apart from what it tells of": Mutation(_told_apart, frozenset({"TOLD_ONCE"})),
    "told before it is stored": Mutation(_told_before_it_is_stored, frozenset({"TOLD_ONCE"})),
    "events numbered from the start": Mutation(_numbered_from_the_start, frozenset({"TOLD_ONCE"}), _DEPOSED),
    "lock not released": Mutation(_lock_not_released, frozenset({"CONVERGES", "NO_STUCK_FLOW"})),
}
