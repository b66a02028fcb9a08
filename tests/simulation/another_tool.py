"""Another tool that mirrors the same data: what it had made before anybody came, and what it goes on doing.

It takes snapshots of the first node's live copy, sends them to the others, and lets old ones go on each node as it
likes, so that no two hold the same ones. Nobody tells it of epochs and grants. It never writes to a replica that is at
a CP of ours: what it sends there lies beside.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from resilver.lineage import NO_CP, Origin, Snapshot
from tests.simulation.disk import Disk


class AnotherTool:
    """Of one volume; `first` is the node whose data it copies."""

    def __init__(self, world: Any, volume: str, first: str) -> None:
        self.world, self.volume = world, volume
        self.disks: list[Disk] = [agent.disks[volume] for agent in world.agents]
        self.source = world.node[first].disks[volume]

    def lay_out(self) -> None:
        """Some snapshots, sent now and then; a target has no live copy, or one that nobody has written to."""
        chance = self.world.random
        for _ in range(chance.randrange(2, 6)):
            self.world.write(self.source)
            self._take()
            for disk in self.disks:
                if chance.random() < 0.6:
                    self._send(disk)
        for disk in self.disks:
            if disk is not self.source and disk.records and chance.random() < 0.5:
                disk.live = disk.stored[disk.tip]
            for _ in range(3):
                self._prune(disk)
        if chance.random() < 0.2:
            self.world.write(chance.choice([disk for disk in self.disks if disk.live is not None]))
        if chance.random() < 0.7:
            self.world.write(self.source)

    def goes_on(self) -> None:
        """One of the things that it does by its timer."""
        chance = self.world.random
        draw, disk = chance.random(), chance.choice(self.disks)
        if draw < 0.4:
            self._take()
        elif draw < 0.7:
            self._send(disk)
        else:
            self._prune(disk)

    def _take(self) -> None:
        disk = self.source
        if disk.live is None or not disk.mounted or disk.user:
            return
        name = self.world.next_id("g")
        made = Snapshot(name, parent=self._newest(), origin=Origin.ADOPTED, note=f"auto-{name}")
        self.world.watch.adopted(disk, made, disk.live)
        self._put(disk, made, disk.live)

    def _newest(self) -> str:
        """Of its own at the source: what its next one descends from."""
        return max(self._held(self.source), key=_number, default="")

    def _send(self, disk: Disk) -> None:
        """The newest that it has at the source, if the two still have one in common; the first is sent whole."""
        newest = self._newest()
        mine, theirs = self._held(disk), self._held(self.source)
        busy = disk.user or not disk.mounted or not self.source.mounted or disk is self.source
        if busy or not newest or newest in mine or (mine and not mine & theirs):
            return
        if disk.live is not None and disk.live != disk.stored.get(disk.tip):
            return
        content = self.source.stored.get(newest) or self.source.beside[newest]
        made = self.world.watch.made(newest)
        self._put(disk, made, content)
        if disk.live is not None and disk.tip == newest:
            disk.live = content

    def _put(self, disk: Disk, made: Snapshot, content: Any) -> None:
        self.world.log(lambda: f"another tool puts {made.id} on {disk.node}")
        ours = any(one.cp != NO_CP for one in disk.records)
        stranger = disk is not self.source and disk.live is not None and not disk.records
        if ours or stranger:
            disk.beside[made.id] = content
            return
        disk.records = (replace(made, parent=disk.tip), *disk.records)
        disk.stored[made.id] = content

    def _prune(self, disk: Disk) -> None:
        """Lets an older one go. Of a lineage that is ours the record stays; before that nobody keeps one."""
        newest = max(self._held(disk), key=_number, default="")
        entry = self.world.watch.store.get(self.volume)
        needed = {newest, disk.tip, entry.record.newest_id if entry is not None else ""}
        old = sorted(self._held(disk) - needed)
        if not old or not disk.mounted:
            return
        gone = self.world.random.choice(old)
        self.world.log(lambda: f"another tool lets {gone} go on {disk.node}")
        disk.beside.pop(gone, None)
        disk.stored.pop(gone, None)
        if all(one.cp == NO_CP for one in disk.records):
            kept = [one for one in disk.records if one.id != gone]
            parents = [one.id for one in kept[1:]] + ["" for _ in kept[:1]]
            disk.records = tuple(replace(one, parent=parent) for one, parent in zip(kept, parents, strict=True))
        self.world.watch.let_go(self.volume, gone)

    def _held(self, disk: Disk) -> set[str]:
        """Its own snapshots whose data is there."""
        return {
            *disk.beside,
            *(one.id for one in disk.records if one.origin is Origin.ADOPTED and one.id in disk.stored),
        }


def _number(snapshot_id: str) -> int:
    return int(snapshot_id.removeprefix("g"))
