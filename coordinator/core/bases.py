"""What each member has in common with the primary: it is remembered, so that it stays pinned while the member is away.

Against a primary that may not stay, such as one that came back from an old image, nothing is noted.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.core.claims import is_foreign, primary_problems
from coordinator.core.cluster import Elected, VolumeView
from coordinator.core.context import Context
from coordinator.core.events import Volume
from coordinator.core.status import status_of
from resilver.lineage import Snapshot, newest_in_common


def after_election(view: VolumeView, decision: Elected) -> dict[str, str]:
    """The members' bases on the winner, as far as they are known: nothing is pruned until all are.

    Of one that is away its last report may be too old to tell: what was pinned for it before stays pinned, if the
    winner has it, and a primary that is away has made what it was followed up to.
    """
    winner, old = view.replica(decision.winner), view.record
    pinned = view.entry.bases if view.entry is not None else {}
    found: dict[str, str] = {}
    for node in old.members:
        if node == decision.winner:
            continue
        replica = view.replica(node)
        before = winner.lineage.find(pinned.get(node, ""))
        common = None if is_foreign(view, replica) else newest_in_common(replica.lineage, winner.lineage)
        if not replica.fresh and node == old.primary and decision.fork is not None:
            found[node] = decision.fork.id
        elif not replica.fresh and before is not None and before.present:
            found[node] = before.id
        elif isinstance(common, Snapshot):
            found[node] = common.id
    return found


def note(context: Context, volume: str, node: str) -> None:
    """What a node's report tells of its own base; of the primary's, of all members' bases."""
    view = context.view(volume)
    entry = view.entry
    if entry is None or not (view.primary is not None and view.primary.fresh):
        return
    found = dict(entry.bases)
    for member in entry.record.members if node == entry.record.primary else (node,):
        if member == entry.record.primary or member not in entry.record.members:
            continue
        status = status_of(view, member)
        if view.replica(member).fresh and status.common is not None:
            found[member] = status.common.id
    doubted = entry.recovering or primary_problems(view, context.now_ms)
    if found != dict(entry.bases) and not doubted:
        context.persist(Volume(volume, replace(entry, bases=found)))
