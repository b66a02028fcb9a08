"""Consistency points by order: of one volume, or of several at one instant, and whose turn it is to take one.

Which volumes are taken together is told by the primaries' reports: those of one node that name the same group. One
order goes to that node for all of them, and a request for one is a request for all. A volume that has no primary yet
belongs to no group, and an epoch's opening CP is always taken alone.

The locks of a group are taken all at once: two operations never wait for each other while each has what the other
wants.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.core.context import Context
from coordinator.core.orders import Taken, TakenTogether, TakeSnapshot, TakeSnapshots
from coordinator.core.tasks import Flow, Task, Wait, join
from resilver.errors import Refused, ResilverError, Unavailable

JOIN_MS = 15 * 60 * 1000


@dataclass(slots=True)
class Turn:
    """The locks of volumes that are taken together, and the one CP of a request that is taken under them.

    `wanted`: one of the volumes that were asked for is modified. `lock` answers whether the turn has come.
    """

    volumes: tuple[str, ...]
    lock: Task[bool]
    wanted: bool = False
    taking: Task[dict[str, Taken] | ResilverError] | None = None

    @property
    def granted(self) -> bool:
        return self.lock.finished and self.lock.result

    def come(self, context: Context) -> Flow[bool]:
        """Waits for the turn; False if it has not come in time, by the lock's own bound."""
        while not (yield from join([self.lock], context.now_ms + JOIN_MS)):
            pass
        return self.granted


def groups(context: Context, volumes: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """The volumes named, each with those that are taken together with it, in order; none stands in two."""
    together: dict[tuple[str, str], list[str]] = {}
    for name in sorted(context.entries):
        key = _group_of(context, name)
        if key is not None:
            together.setdefault(key, []).append(name)
    found: dict[tuple[str, ...], None] = {}
    for name in volumes:
        key = _group_of(context, name)
        found[(name,) if key is None else tuple(together[key])] = None
    return tuple(found)


def _group_of(context: Context, volume: str) -> tuple[str, str] | None:
    """The primary's node and the group that it names; None for a volume that is taken alone."""
    entry = context.entries.get(volume)
    if entry is None or not entry.record.primary:
        return None
    heard = context.heard.get(volume, {}).get(entry.record.primary)
    return (entry.record.primary, heard.report.group) if heard is not None and heard.report.group else None


def take_in_turn(context: Context, turn: Turn, volume: str) -> Flow[ResilverError | None]:
    """Takes the CP of the turn if one of its volumes is modified; whoever comes later waits for the same one."""
    primary = context.entries[volume].record.primary
    those = tuple(
        name
        for name in turn.volumes
        if (entry := context.entries.get(name)) is not None and entry.record.primary == primary
    )
    if len(those) == 1:
        alone = yield from take_snapshot(context, volume, only_if_modified=True)
        return alone if isinstance(alone, ResilverError) else None
    if turn.taking is None:
        turn.taking = context.tasks.spawn(take_together(context, those, only_if_modified=True))
    while not (yield from join([turn.taking], context.now_ms + JOIN_MS)):
        pass
    return turn.taking.result if isinstance(turn.taking.result, ResilverError) else None


def take_snapshot(
    context: Context, volume: str, *, only_if_modified: bool, note: str = ""
) -> Flow[Taken | ResilverError]:
    """Orders a CP from the primary and waits until it is recorded, that is acknowledged."""
    primary = context.entries[volume].record.primary
    order = _order(context, volume, only_if_modified=only_if_modified, note=note)
    answer = (yield from context.give({primary: order}))[primary]
    if isinstance(answer, ResilverError):
        return answer
    assert isinstance(answer, Taken)
    return (yield from _recorded(context, primary, {volume: answer})) or answer


def take_together(
    context: Context, volumes: tuple[str, ...], *, only_if_modified: bool, note: str = ""
) -> Flow[dict[str, Taken] | ResilverError]:
    """Orders a CP of all of them from the node that is primary of each, and waits until every one is recorded."""
    for volume in volumes:
        if context.entries[volume].opening:
            message = f"{volume} is taken together with {', '.join(volumes)}, and its epoch is still being opened"
            return Refused("OPENING", message, next_command=f"resilver status {volume}")
    primary = context.entries[volumes[0]].record.primary
    orders = tuple(_order(context, volume, only_if_modified=only_if_modified, note=note) for volume in volumes)
    answer = (yield from context.give({primary: TakeSnapshots(orders, context.new_id())}))[primary]
    if isinstance(answer, ResilverError):
        return answer
    assert isinstance(answer, TakenTogether)
    taken = dict(zip(volumes, answer.taken, strict=True))
    return (yield from _recorded(context, primary, taken)) or taken


def _order(context: Context, volume: str, *, only_if_modified: bool, note: str) -> TakeSnapshot:
    tip = context.view(volume).replica(context.entries[volume].record.primary).lineage.tip_id
    return TakeSnapshot(context.header(volume, tip), context.new_id(), only_if_modified=only_if_modified, note=note)


def _recorded(context: Context, primary: str, taken: dict[str, Taken]) -> Flow[ResilverError | None]:
    """Waits until what was taken counts."""
    new = {volume: answer.snapshot for volume, answer in taken.items() if answer.taken}
    if not new:
        return None
    recorded = yield Wait(
        frozenset(f"volume:{volume}" for volume in new),
        lambda: all(context.view(volume).record.newest_id == snapshot.id for volume, snapshot in new.items()),
        context.now_ms + context.settings.opening_timeout_ms,
    )
    if recorded:
        return None
    what = ", ".join(f"{snapshot.cp} of {volume}" for volume, snapshot in new.items())
    message = f"{primary} took {what}, but has not reported it yet: it does not count so far"
    return Unavailable("DEADLINE", message, node=primary)
