"""Which resyncs begin, and whom each asks first: no node is swamped, and none is idle while there is work for it.

The rules:

* So many run at once in the cluster (`resyncs_max`), and on a target no more than it takes (`receive_max_count`). One
  begins only if the least busy of its sources has room (`send_max_count`). Those who are passed over for a node that is
  full, or because their volume is paused, do not hold up others.
* The higher priority goes first, and among equals the first come. A volume's is the highest that any node says of it.
* The sources stand in a plan in a fixed order, and are asked in that of what each serves at the moment a resync begins:
  a plan does not change with the load.

Pure: what runs, and what nodes allow, in; ids and names out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from resilver.limits import NOT_KNOWN

if TYPE_CHECKING:
    from coordinator.core.cluster import Resync, VolumeView
    from coordinator.core.rolls import Resyncs
    from resilver.limits import NodeLimits


@dataclass(slots=True)
class Busy:
    """How many resyncs run, and how many of them each node receives and serves."""

    running: int = 0
    receiving: Counter[str] = field(default_factory=Counter)
    serving: Counter[str] = field(default_factory=Counter)

    @classmethod
    def with_all(cls, resyncs: Iterable[Resync]) -> Busy:
        busy = cls()
        for resync in resyncs:
            busy.add(resync, resync.senders)
        return busy

    def add(self, resync: Resync, senders: Iterable[str]) -> None:
        """One that runs."""
        self.running += 1
        self.receiving[resync.node] += 1
        self.serving.update(senders)

    def in_order(self, sources: Sequence[str]) -> tuple[str, ...]:
        """Whoever serves the fewest first; among equals as they stood."""
        return tuple(sorted(sources, key=lambda node: self.serving[node]))

    def has_room(self, resync: Resync, limits: Mapping[str, NodeLimits]) -> bool:
        """Whether its target and its least busy source can take one more; a count of 0 is no bound.

        A target that has said nothing in this reign is waited for: it would hold a place, and cannot be told anything.
        """
        if resync.node not in limits:
            return False
        receive_max = limits[resync.node].receive_max_count
        if receive_max and self.receiving[resync.node] >= receive_max:
            return False
        for node in self.in_order(resync.plan.sources)[:1]:
            send_max = limits.get(node, NOT_KNOWN).send_max_count
            return not send_max or self.serving[node] < send_max
        return True


@dataclass(slots=True)
class Turns:
    """Who begins next, as long as nothing else changes; those who come meanwhile take what room is left."""

    busy: Busy
    limits: Mapping[str, NodeLimits]
    resyncs_max: int
    held: AbstractSet[str] = frozenset()
    begin: set[str] = field(default_factory=set)

    def consider(self, queued: Iterable[Resync]) -> None:
        """In the order in which they go."""
        for resync in queued:
            if self.busy.running >= self.resyncs_max:
                return
            if resync.volume not in self.held and self.busy.has_room(resync, self.limits):
                self.begin.add(resync.id)
                self.busy.add(resync, self.busy.in_order(resync.plan.sources)[:1])


@dataclass(slots=True)
class Places:
    """What nodes allow, and which of the resyncs that wait has a place."""

    limits: dict[str, NodeLimits] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    _turns: Turns | None = None
    _found_at: tuple[int, int] = (0, 0)
    _allowed: int = 0

    def allow(self, node: str, limits: NodeLimits) -> bool:
        """Takes on what a node says is allowed on it; whether that is news."""
        if self.limits.get(node) == limits:
            return False
        self.limits[node] = limits
        self._allowed += 1
        return True

    def hold(self, volume: str, *, held: bool) -> bool:
        """Whether none of a volume's resyncs begins for now; whether that is news."""
        if (volume in self.held) == held:
            return False
        if held:
            self.held.add(volume)
        else:
            self.held.discard(volume)
        self._allowed += 1
        return True

    def may_begin(self, resync_id: str, resyncs: Resyncs, resyncs_max: int) -> bool:
        """Whether a queued resync has its place now; worked out for all of them when that may have changed."""
        now = resyncs.changes, self._allowed
        if self._turns is None or self._found_at != now:
            busy = Busy.with_all(resyncs.running())
            self._turns, self._found_at = Turns(busy, self.limits, resyncs_max, self.held), now
            self._turns.consider(resyncs.queued())
        elif resyncs.come:
            self._turns.consider(one for one in resyncs.come if resyncs.get(one.id) is one)
        resyncs.come.clear()
        return resync_id in self._turns.begin


def priority_of(view: VolumeView) -> int:
    """The highest that any node says of the volume."""
    said = [one.report.resync_priority for one in view.replicas.values() if one.report is not None]
    return max(said, default=0)
