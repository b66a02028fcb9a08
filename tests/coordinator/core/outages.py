"""Three nodes and a store that live through outages: a model to hold the election's promise against.

It follows the protocol's own order of steps and may be interrupted between any two. It knows what nobody in the cluster
does: which CPs were acknowledged and never given up, and who has them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace

from coordinator.core.cluster import Elected, NotElected, ReplicaView, VolumeEntry, VolumeView
from coordinator.core.election import elect, next_epoch, reconcile
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.volume import Grant, LiveCopy, LiveState, Presence, ReplicaReport, VolumeRecord

NOW_MS = 1_700_000_000_000
THREE = ("a", "b", "c")


@dataclass
class Disk:
    """What stands on one node's disk, and whether the node is up."""

    chain: list[Snapshot] = field(default_factory=list)
    modified: bool = False
    up: bool = True
    record: VolumeRecord | None = None
    grant: Grant | None = None

    @property
    def lineage(self) -> Lineage:
        return Lineage(tuple(reversed(self.chain)))

    def has(self, snapshot_id: str) -> bool:
        return any(one.id == snapshot_id for one in self.chain)


class Cluster:
    """Every public method is one thing that may happen at any time."""

    def __init__(self) -> None:
        self.ids = itertools.count(1)
        self.told: Counter[str] = Counter()
        self.disks = {node: Disk() for node in THREE}
        self.disks["a"].modified = True
        self.entry: VolumeEntry | None = None
        self.backup: VolumeEntry | None = None
        self.heard: dict[str, ReplicaReport] = {}
        self.acknowledged: set[str] = set()
        self.elect("")

    # What nodes do by themselves.

    def write(self, node: str) -> None:
        self.disks[node].modified = True

    def stop(self, node: str) -> None:
        self.disks[node].up = False

    def start(self, node: str) -> None:
        self.disks[node].up = True
        self.report(node)

    def take_point(self, node: str) -> None:
        """Whoever holds a grant takes CPs, also if it has been deposed and does not know it yet."""
        disk = self.disks[node]
        if disk.grant is not None:
            self.snapshot(disk, disk.grant)

    def snapshot(self, disk: Disk, grant: Grant) -> Snapshot:
        sequence = disk.chain[-1].cp.sequence + 1 if disk.chain else 1
        parent = disk.chain[-1].id if disk.chain else ""
        made = Snapshot(f"s{next(self.ids)}", ConsistencyPoint(grant.epoch, sequence), parent, epoch_id=grant.epoch_id)
        disk.chain.append(made)
        disk.modified = False
        return made

    # What the coordinator does.

    def report(self, node: str) -> None:
        """A node is heard; a CP of the present epoch by the primary is acknowledged; the node is told the record."""
        disk = self.disks[node]
        if not disk.up:
            return
        report = self.heard[node] = self.report_of(disk)
        raised = reconcile(self.view())
        if raised is not None:
            self.entry = raised
        if self.entry is None:
            return
        record, tip = self.entry.record, report.lineage.tip
        mine = Grant("V", record.epoch, record.epoch_id)
        reigns = record.primary == node and disk.grant == mine
        goes_on = not record.newest_id or disk.has(record.newest_id)
        counts = tip is not None and tip.epoch_id == record.epoch_id
        if reigns and goes_on and tip is not None and counts:
            record = replace(record, newest_cp=tip.cp, newest_id=tip.id)
            self.entry = replace(self.entry, record=record, opening=False)
            self.acknowledged.add(tip.id)
        self.tell(disk, record)

    def tell(self, disk: Disk, record: VolumeRecord) -> None:
        known = disk.record
        if known is not None and (known.epoch, known.newest_cp) > (record.epoch, record.newest_cp):
            return
        if known is not None and known.epoch == record.epoch and known.epoch_id != record.epoch_id:
            return
        disk.record = record
        if disk.grant is not None and disk.grant.epoch < record.epoch:
            disk.grant = None

    def resync(self, node: str) -> None:
        """One secondary is brought to the newest known CP, from whoever is up and has it."""
        self.report(node)
        if self.entry is None or self.entry.opening or self.entry.recovering or node == self.entry.record.primary:
            return
        newest = self.entry.record.newest_id
        source = next((one for one in self.disks.values() if one.up and one.has(newest)), None)
        disk = self.disks[node]
        if source is not None and disk.up and newest and not (disk.has(newest) and not disk.modified):
            at = [one.id for one in source.chain].index(newest)
            disk.chain, disk.modified = source.chain[: at + 1], False
            self.report(node)

    def open_epoch(self, told: set[str]) -> None:
        """Members are told, the winner gets its grant, takes the opening CP, and may or may not report it."""
        if self.entry is None or not self.entry.opening:
            return
        record = self.entry.record
        winner = self.disks[record.primary]
        for node in told - {record.primary}:
            if self.disks[node].up:
                self.tell(self.disks[node], record)
        if not winner.up:
            return
        self.tell(winner, record)
        if winner.record is not None and winner.record.epoch_id == record.epoch_id:
            winner.grant = Grant("V", record.epoch, record.epoch_id)
            if not winner.chain or winner.chain[-1].epoch_id != record.epoch_id:
                self.snapshot(winner, winner.grant)
        if record.primary in told:
            self.report(record.primary)

    def new_coordinator(self) -> None:
        """It has heard nobody yet."""
        self.heard.clear()

    def empty_store(self) -> None:
        """The store is gone; what is known is on the nodes' disks. All members know each other from the start."""
        if all(disk.record is not None for disk in self.disks.values()):
            self.entry = None
            self.heard.clear()

    def back_up_store(self) -> None:
        self.backup = self.entry

    def restore_store(self) -> None:
        """From the backup, taken on by an operator who says so: its volumes are recovering."""
        if self.backup is not None:
            self.entry = replace(self.backup, recovering=True)
            self.heard.clear()

    # What befalls disks: the copies that go with them are nobody's fault, and no election's.

    def roll_back_disk(self, node: str) -> None:
        """A node is restored from an old image; its records and its grant are as old as that."""
        del self.disks[node].chain[1:]
        self.forget_what_nobody_has()

    def clone_disk(self, node: str, other: str) -> None:
        """A node is set up from another one's image, with its grant."""
        disk = self.disks[node]
        self.disks[other] = replace(disk, chain=list(disk.chain))
        self.forget_what_nobody_has()

    def forget_what_nobody_has(self) -> None:
        self.acknowledged = {one for one in self.acknowledged if any(disk.has(one) for disk in self.disks.values())}

    def elect(self, choose: str) -> None:
        """Examines who is up and decides; a refusal is answered with what it asks for."""
        for node in THREE:
            self.report(node)
        seen = self.view()
        found = elect(seen, choose=choose, now_ms=NOW_MS)
        if isinstance(found, NotElected):
            named = frozenset(loss.node for loss in found.refusal.losses)
            found = elect(seen, choose=choose, accept_loss=named, now_ms=NOW_MS)
        if isinstance(found, NotElected):
            self.told["refused"] += 1
            return
        self.told[f"elected, accepted {len(found.accepted)}" if found.new_epoch else "stays"] += 1
        self.check(found)
        if not found.new_epoch:
            if self.entry is not None:
                self.entry = replace(self.entry, recovering=False)
            return
        old, fork = self.view().record, found.fork
        epoch = next_epoch(seen)
        record = VolumeRecord(
            "vm1",
            "V",
            epoch,
            f"e{epoch}-{next(self.ids)}",
            found.winner,
            THREE,
            fork.cp if fork is not None else old.newest_cp,
            fork.id if fork is not None else "",
        )
        self.entry = VolumeEntry(record, opening=True)

    def check(self, found: Elected) -> None:
        """The one promise: what was acknowledged is there, or who has it was named."""
        winner = self.disks[found.winner]
        for one in sorted(self.acknowledged):
            if winner.has(one):
                continue
            holders = {node for node in THREE if self.disks[node].has(one)}
            assert holders & {*found.accepted}, f"{one} on {holders} is lost; accepted was {found.accepted}"
            self.acknowledged.discard(one)

    def what_was_acknowledged_is_somewhere(self) -> None:
        for one in self.acknowledged:
            assert any(disk.has(one) for disk in self.disks.values())

    # What is seen.

    def report_of(self, disk: Disk) -> ReplicaReport:
        empty = not disk.chain and not disk.modified
        return ReplicaReport(
            "vm1",
            Presence.EMPTY if empty else Presence.PRESENT,
            volume_id="V" if disk.chain else "",
            lineage=disk.lineage,
            live=LiveCopy(LiveState.ABSENT if empty else LiveState.MODIFIED if disk.modified else LiveState.UNMODIFIED),
            record=disk.record,
            grant=disk.grant,
        )

    def view(self) -> VolumeView:
        replicas = {}
        for node in THREE:
            report = self.heard.get(node)
            replicas[node] = ReplicaView(node, report, NOW_MS, fresh=report is not None and self.disks[node].up)
        return VolumeView("vm1", self.entry, replicas)
