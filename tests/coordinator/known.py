"""A real engine that has heard a story: volumes with histories, some nodes connected and some away."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

from coordinator.core.cluster import ElectionRecord, NodeView, Resync, VolumeEntry
from coordinator.core.context import Identity, Settings
from coordinator.core.engine import Engine
from coordinator.core.events import AgentConnected, AgentDisconnected, Loaded, ReplicaReported
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.volume import Grant, LiveCopy, LiveState, Presence, PreservedCopy, ReplicaReport, VolumeRecord

NOW_MS = 1_800_000_000_000
MINUTE_MS = 60_000


def epoch_id(epoch: int) -> str:
    return f"eid{epoch}"


def snapshot(text: str, parent: str = "") -> Snapshot:
    """`3-42` is present, `-3-42` is pruned; taken `42` minutes into its epoch. Its id is `s3-42`."""
    cp = ConsistencyPoint.parse(text.lstrip("-"))
    taken_ms = NOW_MS - 1000 * MINUTE_MS + cp.sequence * MINUTE_MS
    return Snapshot(f"s{cp}", cp, parent, not text.startswith("-"), epoch_id(cp.epoch), taken_ms, 1 << 30)


def lineage(text: str) -> Lineage:
    """`3-40 3-41 3-42`, oldest first."""
    records: list[Snapshot] = []
    for word in text.split():
        records.insert(0, snapshot(word, records[0].id if records else ""))
    return Lineage(tuple(records))


def report(
    volume: str,
    history: str,
    live: LiveState = LiveState.UNMODIFIED,
    *,
    presence: Presence = Presence.PRESENT,
    preserved: Iterable[PreservedCopy] = (),
    **changes: object,
) -> ReplicaReport:
    known = lineage(history)
    made = ReplicaReport(
        volume,
        presence,
        volume_id="vid" if known.records else "",
        lineage=known,
        live=LiveCopy(live, f"/srv/{volume}.img", 1 << 30, 1 << 20, known.tip_id, in_use=False),
        backend="image",
        free_bytes=96 << 30,
        preserved=tuple(preserved),
    )
    return replace(made, **changes)


class Known:
    """The engine, and what it is told."""

    def __init__(
        self,
        entries: Iterable[VolumeEntry] = (),
        elections: Iterable[ElectionRecord] = (),
        resyncs: Iterable[Resync] = (),
    ) -> None:
        numbers = itertools.count(1)
        chosen: dict[str, tuple[ElectionRecord, ...]] = {}
        for election in elections:
            chosen[election.volume] = (*chosen.get(election.volume, ()), election)
        loaded = Loaded(
            {entry.record.volume: entry for entry in entries}, chosen, {resync.id: resync for resync in resyncs}, {}
        )
        self.engine = Engine(
            Identity("demo", "st1", 12, "lead1", "c1"),
            Settings(),
            loaded,
            NOW_MS,
            lambda: f"i{next(numbers)}",
            new_ticket=lambda: "ticket",
        )
        self._seqs = itertools.count(1)

    def connect(self, node: str, *volumes: str) -> None:
        view = NodeView(node, f"boot-{node}", f"{node}:1", f"{node}:2", "0.1", volumes)
        self.engine.step(AgentConnected(f"stream-{node}", view, "demo", "st1", 0), NOW_MS)

    def disconnect(self, node: str) -> None:
        self.engine.step(AgentDisconnected(f"stream-{node}"), NOW_MS)

    def hear(self, node: str, told: ReplicaReport) -> None:
        if node not in self.engine.nodes():
            self.connect(node, told.volume)
        self.engine.step(ReplicaReported(f"stream-{node}", next(self._seqs), told), NOW_MS)


def entry(volume: str, primary: str, members: str, newest: str, **changes: object) -> VolumeEntry:
    """`members` by letters; the newest CP is of the volume's present epoch."""
    cp = ConsistencyPoint.parse(newest)
    record = VolumeRecord(volume, "vid", cp.epoch, epoch_id(cp.epoch), primary, tuple(members), cp, f"s{newest}")
    return replace(VolumeEntry(record, newest_cp_time_ms=snapshot(newest).create_time_ms), **changes)


def granted(known: VolumeEntry) -> dict[str, object]:
    """What the primary's report holds beside its history."""
    record = known.record
    return {"record": record, "grant": Grant(record.volume_id, record.epoch, record.epoch_id)}
