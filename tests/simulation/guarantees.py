"""What must hold after every step, seen by somebody who sees everything: all disks, the store, every message.

The names are those of the guarantees in docs/ARCHITECTURE.md, in capitals. Whoever changes something tells it here at
that moment, so nothing that was wrong for an instant is missed:

ONE_GRANT                   an epoch has one holder of its grant, and one epoch_id; a grant ends with its epoch
EQUAL_ID_EQUAL_BYTES        a snapshot's id means the same bytes on every node, for ever
WHOLE_CP                    a replica is at one snapshot, whole: its tip is here, and what a commit put there is the CP
NO_DEPOSED_COORDINATOR      what a lower term orders changes nothing once a higher one was obeyed, also after a restart
NO_LOWER_EPOCH              the same for the epochs of one volume
COMPARE_AND_SET             what is replaced is what the order was decided on; a CP continues what it was decided on
NOTHING_ACKNOWLEDGED_LOST   a CP that was acknowledged stays in the lineage of the newest one, unless a node that had
                            it, or could not be asked, was named in an acceptance, and each that showed it was; and
                            the data of the newest one is kept by somebody
CERTAIN_OR_REFUSED          a primary that is away, or has more, is not replaced before its loss was accepted by name;
                            and the first one has all that anybody has
KEPT                        no live copy and no snapshot is replaced that is not preserved there, or contained; what
                            another tool made stays where it is, and nobody here drops it
PRIMARY_NEVER_RECEIVES      who holds the grant of the store's present epoch is not written over
ONLY_UP                     epochs and the newest known CP only go up, in the store and beside the data
ACKNOWLEDGED_UNDER_GRANT    what counts was taken by the primary of the store's epoch, under that epoch's own grant
NOT_BEFORE_OPENING          nothing is copied in an epoch whose opening CP is not recorded
TOLD_ONCE                   a decision, and a resync's end, is stored together with the event that tells of it; events
                            are numbered upwards, each names the one before it, and none is shown that is not stored
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from coordinator.core.cluster import ClusterEvent, ElectionRecord, Resync, VolumeEntry
from coordinator.core.events import Kept, Volume
from coordinator.core.orders import Receive
from resilver.lineage import NO_CP
from resilver.volume import Grant, LiveState

if TYPE_CHECKING:
    from agent.backends.base import CommitOrder
    from resilver.lineage import Snapshot
    from resilver.volume import Order, VolumeRecord
    from tests.simulation.disk import Content, Disk


class Broken(AssertionError):
    """A guarantee that does not hold."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class Was(NamedTuple):
    """A replica before a commit, and the tip that the commit was ordered for."""

    live: Content | None
    stored: dict[str, Content]
    tip: str
    decided_on: str


class Guarantees:
    """Everything that was ever seen. Each method is told of one change, and raises `Broken`."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.store_forgot = False
        self._gone: set[str] = set()
        self.disks: dict[tuple[str, str], Disk] = {}
        self.store: dict[str, VolumeEntry] = {}
        self.acknowledged: dict[str, set[str]] = {}
        self._bytes: dict[str, Content] = {}
        self._made: dict[str, Snapshot] = {}
        self._taker: dict[str, tuple[str, Grant | None]] = {}
        self._holders: dict[tuple[str, int, str], tuple[str, str]] = {}
        self._obeyed: dict[str, tuple[int, str]] = {}
        self._epochs: dict[tuple[str, str, str], tuple[int, str]] = {}
        self._ancestors: dict[str, frozenset[str]] = {}
        self._events: dict[int, ClusterEvent] = {}
        self._ended: set[str] = set()

    # Snapshots.

    def content(self, snapshot_id: str) -> Content:
        return self._bytes[snapshot_id]

    def line(self, snapshot_id: str) -> frozenset[str]:
        """A snapshot and all that it descends from."""
        if not snapshot_id:
            return frozenset()
        known = self._ancestors.get(snapshot_id)
        if known is None:
            known = self._ancestors[snapshot_id] = self.line(self._made[snapshot_id].parent) | {snapshot_id}
        return known

    def took(self, disk: Disk, snapshot: Snapshot, content: Content) -> None:
        self.counts["snapshots"] += 1
        self._made[snapshot.id] = snapshot
        self._taker[snapshot.id] = (disk.node, disk.grant)
        self.stored(disk, snapshot.id, content)

    def adopted(self, disk: Disk, snapshot: Snapshot, content: Content) -> None:
        """Another tool made it: it has no taker, and no grant."""
        self.counts["adopted"] += 1
        self._made[snapshot.id] = snapshot
        self.stored(disk, snapshot.id, content)

    def made(self, snapshot_id: str) -> Snapshot:
        return self._made[snapshot_id]

    def let_go(self, volume: str, snapshot_id: str) -> None:
        """Another tool has dropped one of its own: if that was the last, whoever decides on it now cannot know."""
        if not any(self._keeps(disk, snapshot_id) for (_, one), disk in self.disks.items() if one == volume):
            self._gone.add(snapshot_id)

    def not_ours(self, disk: Disk, snapshot_id: str) -> None:
        raise Broken("KEPT", f"{snapshot_id} of another tool is dropped on {disk.node}")

    def stored(self, disk: Disk, snapshot_id: str, content: Content) -> None:
        known = self._bytes.setdefault(snapshot_id, content)
        if known != content:
            raise Broken("EQUAL_ID_EQUAL_BYTES", f"{snapshot_id} on {disk.node} is {content}, elsewhere {known}")

    def replaced(self, disk: Disk, order: CommitOrder, was: Was) -> None:
        """After a commit: what is there now is on the disk."""
        live, stored, tip, decided_on = was
        self.counts["commits"] += 1
        where, target = f"{disk.volume} on {disk.node}", order.lineage.tip_id
        if decided_on != tip and target not in self.line(tip):
            raise Broken("COMPARE_AND_SET", f"{where}: {tip or 'nothing'} replaced, the order was for {decided_on}")
        entry = self.store.get(disk.volume)
        if entry is not None and disk.grant == _grant(entry.record):
            raise Broken("PRIMARY_NEVER_RECEIVES", f"{where} holds the grant of epoch {disk.grant}")
        kept = [disk.preserved_bytes[copy.id] for copy in disk.preserved]
        lineage = {record.id for record in disk.records}
        contained = any(self._bytes.get(one) == live for one in lineage) or live in disk.beside.values()
        if live is not None and live not in kept and not contained:
            raise Broken("KEPT", f"{where}: the live copy {live} is gone")
        for snapshot_id, content in stored.items():
            if self._made[snapshot_id].cp == NO_CP:
                if snapshot_id not in disk.stored and snapshot_id not in disk.beside:
                    raise Broken("KEPT", f"{where}: {snapshot_id} of another tool is gone")
            elif snapshot_id not in lineage and content not in kept:
                raise Broken("KEPT", f"{where}: {snapshot_id} left the lineage and is not preserved")
        if disk.tip != target or disk.stored.get(target) != self._bytes.get(target):
            raise Broken("WHOLE_CP", f"{where}: {disk.stored.get(target)} for {target} = {self._bytes.get(target)}")
        if disk.live != self._bytes[target]:
            raise Broken("WHOLE_CP", f"{where}: the live copy {disk.live} is no clone of {target}")
        self.counts["preserved"] += len([copy for copy in disk.preserved if copy.resync_id == order.resync_id])
        self.newest_is_kept(disk.volume)

    def newest_is_kept(self, volume: str) -> None:
        entry = self.store.get(volume)
        newest = entry.record.newest_id if entry is not None else ""
        if newest in self._gone or (entry is not None and entry.recovering):
            return  # nobody can be blamed; or the store's newest is an old one, which may be pruned
        if newest and not any(self._keeps(disk, newest) for (_, one), disk in self.disks.items() if one == volume):
            raise Broken("NOTHING_ACKNOWLEDGED_LOST", f"nobody has the data of {newest}, the newest CP of {volume}")

    def _keeps(self, disk: Disk, snapshot_id: str) -> bool:
        """In its lineage or, if a transfer that was still under way has replaced it, among its preserved copies."""
        return (
            snapshot_id in disk.stored
            or snapshot_id in disk.beside
            or self._bytes[snapshot_id] in disk.preserved_bytes.values()
        )

    # What nobody can be blamed for.

    def restored(self, disk: Disk) -> None:
        """A disk is as it was long ago: what was on it alone is gone, and with the records what its node was told."""
        self.counts["disks restored"] += 1
        for key in [key for key in self._epochs if key[:2] == (disk.node, disk.volume)]:
            del self._epochs[key]
        everywhere = {one for other in self.disks.values() for one in other.stored}
        self._gone |= set(self._bytes) - everywhere
        acknowledged = self.acknowledged.get(disk.volume, set())
        acknowledged -= {one for one in acknowledged if not any(other.holds(one) for other in self.disks.values())}

    def store_restored(self, entries: dict[str, VolumeEntry], events: dict[int, ClusterEvent]) -> None:
        """The store is as it was long ago, and whoever restored it said so: its volumes are recovering."""
        self._events, self._ended = events, set()
        self.counts["stores restored"] += 1
        self.store_forgot = True
        self.store.update(entries)
        self._obeyed.pop("the store", None)

    # What agents are told.

    def granted(self, disk: Disk, grant: Grant | None) -> None:
        if grant is None:
            return
        self.counts["grants"] += 1
        key = (grant.volume_id, grant.epoch, grant.epoch_id if self.store_forgot else "")
        holder = self._holders.setdefault(key, (disk.node, grant.epoch_id))
        if holder != (disk.node, grant.epoch_id):
            raise Broken("ONE_GRANT", f"epoch {grant.epoch} of {disk.volume}: {holder} and {disk.node}, {grant}")

    def recorded(self, disk: Disk, old: VolumeRecord | None, new: VolumeRecord) -> None:
        """A volume record was written beside the data."""
        if old is None or old.volume_id != new.volume_id:
            return
        if (new.epoch, new.newest_cp) < (old.epoch, old.newest_cp) and (
            new.epoch < old.epoch or new.epoch_id == old.epoch_id
        ):
            raise Broken("ONLY_UP", f"{disk.node} knew {old.epoch} {old.newest_cp} and is told {new}")

    def met(self, node: str, term: int, leader_id: str, what: str) -> None:
        """Something of that term has taken effect on a node."""
        known = self._obeyed.get(node, (0, ""))
        if term < known[0] or (term == known[0] and leader_id != known[1]):
            raise Broken("NO_DEPOSED_COORDINATOR", f"{node} obeyed term {term} ({what}) after {known}")
        self._obeyed[node] = (term, leader_id)

    def obeyed(self, node: str, order: Order, what: object, *, changed: bool) -> None:
        """An order was admitted, and answered with what it did."""
        self.met(node, order.term, order.leader_id, type(what).__name__)
        if order.epoch and changed:
            self.told_epoch(node, order.volume, order.volume_id, (order.epoch, order.epoch_id), type(what).__name__)
        record = self.store[order.volume].record if order.volume in self.store else None
        if isinstance(what, Receive) and record is not None and record.epoch_id == order.epoch_id:
            newest = self._made.get(record.newest_id)
            if newest is None or newest.epoch_id != record.epoch_id:
                raise Broken("NOT_BEFORE_OPENING", f"{node} receives {what.target}: epoch {record.epoch} is opening")

    def told_epoch(self, node: str, volume: str, volume_id: str, epoch: tuple[int, str], what: str) -> None:
        known = self._epochs.get((node, volume, volume_id), (0, ""))
        if epoch[0] < known[0] or (epoch[0] == known[0] and epoch[1] != known[1]):
            raise Broken("NO_LOWER_EPOCH", f"{node} obeyed {what} of epoch {epoch} of {volume} after {known}")
        if what in ("OpenEpoch", "record"):
            self._epochs[node, volume, volume_id] = epoch
            grant = self.disks[node, volume].grant
            if grant is not None and grant.volume_id == volume_id and grant.epoch < epoch[0]:
                raise Broken(
                    "ONE_GRANT", f"{node} knows epoch {epoch[0]} of {volume}, and has the grant of {grant.epoch}"
                )

    # The store.

    def committed(self, records: tuple[Kept, ...], answered: dict[str, frozenset[str]]) -> None:
        """One transaction of the leader; `answered` are, by volume, the nodes that its last examine heard."""
        elections = {one.epoch_id: one for one in records if isinstance(one, ElectionRecord) and one.refusal is None}
        for kept in records:
            if isinstance(kept, ElectionRecord):
                self.counts["refusals" if kept.refusal is not None else "decisions"] += 1
            if isinstance(kept, Volume) and kept.entry is not None:
                self._volume(kept.name, kept.entry, elections, answered.get(kept.name, frozenset()))

    def events_stored(self, records: tuple[Kept, ...]) -> None:
        """The same transaction, as a reader of events sees it."""
        told = [one for one in records if isinstance(one, ClusterEvent)]
        for event in told:
            last = max(self._events, default=0)
            if event.previous != last or event.sequence <= last:
                raise Broken("TOLD_ONCE", f"event {event.sequence} names {event.previous}, the last one is {last}")
            self._events[event.sequence] = event
        types = {(event.type, event.volume) for event in told}
        elections = {one.epoch_id: one for one in records if isinstance(one, ElectionRecord)}
        ends = {event.resync for event in told if event.type.startswith("RESYNC_") and event.type != "RESYNC_STARTED"}
        for one in records:
            refused = isinstance(one, ElectionRecord) and one.refusal is not None
            if refused and ("ELECTION_REFUSED", one.volume) not in types:
                raise Broken("TOLD_ONCE", f"a refusal of {one.volume} is stored, and no event tells of it")
            opening = isinstance(one, Volume) and one.entry is not None and elections.get(one.entry.record.epoch_id)
            if opening and ("ELECTED", one.name) not in types:
                raise Broken("TOLD_ONCE", f"an epoch of {one.name} is stored, and no event tells of it")
            if isinstance(one, Resync) and one.state.final and one.id not in ends:
                raise Broken("TOLD_ONCE", f"the end of {one.id} is stored, and no event tells of it")
        if ends & self._ended:
            raise Broken("TOLD_ONCE", f"the end of {sorted(ends & self._ended)} is told again")
        self._ended |= ends

    def told(self, event: ClusterEvent) -> None:
        """A reader was shown it."""
        self.counts[event.type] += 1
        if self._events.get(event.sequence) != event and not self.store_forgot:
            raise Broken("TOLD_ONCE", f"{event.type} is shown, and not stored: {event.message}")

    def _volume(
        self, name: str, entry: VolumeEntry, elections: dict[str, ElectionRecord], answered: frozenset[str]
    ) -> None:
        old, new = self.store.get(name), entry.record
        was = old.record if old is not None else None
        self.store[name] = entry
        if was is not None and new.epoch < was.epoch:
            raise Broken("ONLY_UP", f"{name} went from epoch {was.epoch} to {new.epoch}")
        if was is None or (new.epoch, new.epoch_id) != (was.epoch, was.epoch_id):
            if was is not None and new.epoch == was.epoch:
                raise Broken("ONE_GRANT", f"epoch {new.epoch} of {name} is {was.epoch_id} and {new.epoch_id}")
            election = elections.get(new.epoch_id)
            if election is None and entry.recovering and self.store_forgot:
                return  # reports know of it
            if election is None:
                raise Broken("CERTAIN_OR_REFUSED", f"epoch {new.epoch} of {name} began without an election")
            self._opened(name, was, new, election, answered)
        elif new.newest_id != was.newest_id:
            self._acknowledged(name, was, entry)
        self.newest_is_kept(name)

    def _acknowledged(self, name: str, was: VolumeRecord, entry: VolumeEntry) -> None:
        new = entry.record
        self.counts["acknowledged"] += 1
        if new.newest_cp < was.newest_cp:
            raise Broken("ONLY_UP", f"{name} went from {was.newest_cp} to {new.newest_cp}")
        taker = self._taker.get(new.newest_id)
        if taker != (new.primary, _grant(new)) or self._made[new.newest_id].epoch_id != new.epoch_id:
            raise Broken("ACKNOWLEDGED_UNDER_GRANT", f"{new.newest_cp} of {name} was taken by {taker}, not as {new}")
        acknowledged = self.acknowledged.setdefault(name, set())
        lost = acknowledged - self.line(new.newest_id)
        if lost and not entry.recovering:
            raise Broken("NOTHING_ACKNOWLEDGED_LOST", f"{name} goes on at {new.newest_id} without {sorted(lost)}")
        if new.newest_id not in self._gone:  # its disk may have been restored before this was reported
            acknowledged.add(new.newest_id)

    def _holding(self, volume: str, snapshot_id: str) -> set[str]:
        """The nodes that have its record or its data."""
        disks = {node: disk for (node, one), disk in self.disks.items() if one == volume}
        return {node for node, disk in disks.items() if disk.holds(snapshot_id) or self._keeps(disk, snapshot_id)}

    def _first(self, name: str, new: VolumeRecord, election: ElectionRecord) -> None:
        """Before the first epoch nothing is acknowledged, so nobody may have what the first primary has not."""
        self.counts["first elections"] += 1
        for one in election.candidates:
            if one.node in (new.primary, *election.accepted) or not (one.snapshot or one.live is LiveState.MODIFIED):
                continue
            if one.live is LiveState.MODIFIED or one.snapshot not in self.line(new.newest_id):
                message = f"{new.primary} at {new.newest_id} is the first, though {one.node} is at {one.snapshot}"
                raise Broken("CERTAIN_OR_REFUSED", f"{name}: {message}, its live copy {one.live.value}")

    def _opened(
        self, name: str, was: VolumeRecord | None, new: VolumeRecord, election: ElectionRecord, answered: frozenset[str]
    ) -> None:
        self.counts["epochs"] += 1
        accepted = frozenset(election.accepted)
        self.counts[f"epochs, accepted {len(accepted)}"] += 1
        acknowledged = self.acknowledged.setdefault(name, set())
        away = {node for node, one in self.disks if one == name} - answered
        for lost in sorted(acknowledged - self.line(new.newest_id)):
            holders = self._holding(name, lost)
            showed = {one.node for one in election.candidates if one.reported and lost in self.line(one.snapshot)}
            if self._made[lost].cp == NO_CP:  # another tool's name no parents: only who has it can show it
                showed &= holders
            if not accepted & (holders | away) or showed - accepted:
                message = f"{lost} of {name}, on {sorted(holders)}, is given up for {new.primary} at {new.newest_id}"
                raise Broken("NOTHING_ACKNOWLEDGED_LOST", f"{message}; accepted was {sorted(accepted)}")
            acknowledged.discard(lost)
        # Nobody can see that another tool's snapshot is contained in a newer one of it: whoever has it was named, so it
        # is given up, and is missed no more when the newer one is.
        others = [one for one in acknowledged - {new.newest_id} if self._made[one].cp == NO_CP]
        acknowledged -= {one for one in others if set() < self._holding(name, one) <= accepted}
        if new.newest_id and new.newest_id not in self._gone:  # as in `_acknowledged`
            acknowledged.add(new.newest_id)
        if (was is None or not was.primary) and election.rule != "chosen by the operator":
            self._first(name, new, election)
        if was is None or was.primary in ("", new.primary) or was.primary in accepted:
            return
        before = next((one for one in election.candidates if one.node == was.primary), None)
        if was.primary not in answered or before is None or before.snapshot not in self.line(new.newest_id):
            message = f"{new.primary} at {new.newest_id} follows {was.primary} at {before and before.snapshot}"
            raise Broken("CERTAIN_OR_REFUSED", f"{name}: {message}, who was not named; answered: {sorted(answered)}")


def _grant(record: VolumeRecord) -> Grant:
    return Grant(record.volume_id, record.epoch, record.epoch_id)
