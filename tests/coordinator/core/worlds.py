"""Hypothesis strategies: lineages of one world, in which equal ids are equal snapshots, and views of all kinds."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from coordinator.core.cluster import ReplicaView, VolumeEntry, VolumeView
from resilver.lineage import NO_CP, ConsistencyPoint, Lineage, Snapshot
from resilver.volume import Grant, LiveCopy, LiveState, Presence, ReplicaReport, VolumeRecord

NODES = ("a", "b", "c", "d")
NOW_MS = 1_700_000_000_000


@st.composite
def snapshots(draw: st.DrawFn, most: int = 9) -> dict[str, Snapshot]:
    """A forest of snapshots: each but the first descends from an earlier one (rarely from none), epochs only grow."""
    known: dict[str, Snapshot] = {}
    for index in range(draw(st.integers(1, most))):
        root = index == 0 or draw(st.integers(0, 9)) == 0
        parent = None if root else known[draw(st.sampled_from(sorted(known)))]
        epoch = draw(st.integers(0, 1)) + (parent.cp.epoch if parent is not None else 1)
        sequence = parent.cp.sequence + 1 if parent is not None else 1
        cp = ConsistencyPoint(epoch, sequence)
        known[f"s{index}"] = Snapshot(
            f"s{index}", cp, parent.id if parent is not None else "", epoch_id=f"e{epoch}", create_time_ms=1000 + index
        )
    return known


@st.composite
def lineages(draw: st.DrawFn, known: dict[str, Snapshot]) -> Lineage:
    """One branch of the forest, or nothing, with some snapshots pruned but never the tip."""
    tip = draw(st.sampled_from(["", *sorted(known)]))
    full = Lineage.from_tip(tip, known)
    kept = {record.id for record in full if draw(st.booleans())}
    return full.with_presence(kept | {full.tip_id})


@st.composite
def reports(draw: st.DrawFn, known: dict[str, Snapshot], record: VolumeRecord | None) -> ReplicaReport:
    presence = draw(st.sampled_from([Presence.PRESENT] * 6 + [Presence.EMPTY, Presence.LOST]))
    here = presence is Presence.PRESENT
    epochs = st.integers(1, 3)
    told = grant = None
    if record is not None and draw(st.integers(0, 3)):
        told = draw(st.sampled_from([record, record, None]))
        if draw(st.integers(0, 5)) == 0:
            number = draw(epochs)
            told = replace(record, epoch=number, epoch_id=f"e{number}")
        if told is not None and draw(st.integers(0, 4)) == 0:
            told = replace(told, members=tuple(sorted(draw(st.sets(st.sampled_from([*NODES, "x"]))))))
        if draw(st.integers(0, 7)) == 0:
            number = draw(epochs)
            grant = Grant("V", number, draw(st.sampled_from([f"e{number}", "other"])))
    return ReplicaReport(
        "vm1",
        presence,
        volume_id=draw(st.sampled_from(["V"] * 8 + ["", "W"])) if here else "",
        lineage=draw(lineages(known)) if here else Lineage(),
        live=LiveCopy(draw(st.sampled_from([*LiveState, LiveState.UNMODIFIED])) if here else LiveState.ABSENT),
        record=told,
        grant=grant,
        backend="image",
        priority=draw(st.integers(0, 2)),
    )


@st.composite
def views(draw: st.DrawFn) -> VolumeView:
    """Anything that could be seen, and much that could not."""
    known = draw(snapshots())
    nodes = draw(st.lists(st.sampled_from(NODES), min_size=1, max_size=4, unique=True))
    entry = None
    if draw(st.integers(0, 5)):
        newest = known.get(draw(st.sampled_from(["", *sorted(known)])))
        epoch = max(newest.cp.epoch if newest is not None else 1, draw(st.integers(1, 3)))
        record = VolumeRecord(
            "vm1",
            "V",
            epoch,
            f"e{epoch}",
            draw(st.sampled_from([*nodes, *nodes, "d", ""])),
            tuple(sorted(draw(st.sets(st.sampled_from(NODES))))),
            newest.cp if newest is not None else NO_CP,
            newest.id if newest is not None else "",
        )
        entry = VolumeEntry(
            record,
            0,
            draw(st.integers(0, 3)) == 0,
            draw(st.integers(0, 4)) == 0,
            draw(st.sampled_from([(), (), ("c",)])),
        )
    replicas = {}
    for node in nodes:
        report = draw(st.none() if draw(st.integers(0, 9)) == 0 else reports(known, entry.record if entry else None))
        if report is not None and entry is not None and node == entry.record.primary and draw(st.integers(0, 3)):
            # Most primaries hold their grant: else hardly any volume would be in order.
            report = replace(report, grant=Grant("V", entry.record.epoch, entry.record.epoch_id))
        fresh = report is not None and draw(st.integers(0, 3)) > 0
        replicas[node] = ReplicaView(node, report, NOW_MS - draw(st.integers(0, 100_000)), fresh)
    return VolumeView("vm1", entry, replicas)
