"""A notation for histories: `a: 1 2 3 | b: 1 2 | c: 1 2' 3'`.

Each replica's CPs, oldest first. `2` is CP 1-2, `2-5` CP 2-5; equal words are equal snapshots, a prime makes another
one of the same CP; `(2)` has been pruned. `g4` is another tool's snapshot: it has no CP, and is called `auto-g4`; `~g4`
is one beside the lineage. Words beside the CPs:

    *  live copy modified      ?  in use, not comparable      !  live copy gone
    away  did not answer       silent  never heard of         empty, lost  as reported
    foreign  of another volume_id     raw  of no volume yet (no volume_id)
    grant=N  holds a grant for epoch N (`grant=Nx`: another epoch of that number); the primary holds its own, unless
             `nogrant`         told=N  was told of epoch N only (`told=Nx`)
    prio=N   priority            kind=K   kept by that backend
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from coordinator.core.cluster import ReplicaView, VolumeEntry, VolumeView
from resilver.lineage import NO_CP, ConsistencyPoint, Lineage, Origin, Snapshot
from resilver.volume import Grant, LiveCopy, LiveState, Presence, ReplicaReport, VolumeRecord

NAME = "vm1"
VOLUME_ID = "V"
NOW_MS = 1_700_000_000_000
HEARD_MS = NOW_MS - 47_000

_CP = re.compile(r"(\()?(?:([0-9]+)-|(g))?([0-9]+)('*)(\))?")
_STRANGERS = {"foreign": "W", "raw": ""}
_LIVE = {"*": LiveState.MODIFIED, "?": LiveState.UNKNOWN, "!": LiveState.ABSENT}


def cp_of(word: str) -> ConsistencyPoint:
    match = _CP.fullmatch(word)
    assert match is not None, word
    return NO_CP if match[3] else ConsistencyPoint(int(match[2] or 1), int(match[4]))


def id_of(word: str) -> str:
    """`3'` is the id of `3'`, written in full: `1-3'`."""
    match = _CP.fullmatch(word)
    assert match is not None, word
    return f"g{match[4]}{match[5]}" if match[3] else f"{match[2] or 1}-{match[4]}{match[5]}"


def lineage(text: str) -> Lineage:
    """`1 2 (3) 2-4` as a lineage."""
    records: list[Snapshot] = []
    parent = ""
    for word in text.split():
        cp, present = cp_of(word), not word.startswith("(")
        snapshot = Snapshot(id_of(word), cp, parent, present, f"e{cp.epoch}", NOW_MS - 3_600_000, size_bytes=4096)
        if cp == NO_CP:
            snapshot = replace(adopted(id_of(word)), parent=parent, present=present)
        records.append(snapshot)
        parent = snapshot.id
    return Lineage(tuple(reversed(records)))


def adopted(name: str) -> Snapshot:
    """A snapshot that another tool made."""
    return Snapshot(name, create_time_ms=NOW_MS - 3_600_000, origin=Origin.ADOPTED, note=f"auto-{name}")


def snapshot(word: str, text: str) -> Snapshot:
    """One record out of a lineage."""
    found = lineage(text).find(id_of(word))
    assert found is not None
    return found


def epoch_of(text: str) -> tuple[int, str]:
    """`2` is epoch 2 with the id `e2`; `2x` another one of that number."""
    return int(text.rstrip("x")), f"e{text}"


@dataclass
class _Words:
    """What the words about one replica say, as they are read."""

    node: str
    told: VolumeRecord | None
    grant: Grant | None
    cps: list[str] = field(default_factory=list)
    live: LiveState = LiveState.UNMODIFIED
    presence: Presence = Presence.PRESENT
    volume_id: str = VOLUME_ID
    priority: int = 0
    fresh: bool = True
    kind: str = "image"
    others: list[str] = field(default_factory=list)

    def take(self, word: str) -> None:
        key, _, value = word.partition("=")
        if _CP.fullmatch(word):
            self.cps.append(word)
        elif word.startswith("~"):
            self.others.append(word[1:])
        elif word in _LIVE:
            self.live = _LIVE[word]
        elif word in ("empty", "lost"):
            self.presence, self.live, self.volume_id = Presence(word), LiveState.ABSENT, ""
        elif word in _STRANGERS:
            self.volume_id, self.told, self.grant = _STRANGERS[word], None, None
        else:
            self.take_fact(key, value)

    def take_fact(self, key: str, value: str) -> None:
        match key:
            case "away":
                self.fresh = False
            case "nogrant":
                self.grant = None
            case "grant":
                self.grant = Grant(VOLUME_ID, *epoch_of(value))
            case "told":
                self.told = VolumeRecord(NAME, VOLUME_ID, *epoch_of(value), self.node)
            case "prio":
                self.priority = int(value)
            case "kind":
                self.kind = value
            case _:
                raise AssertionError(key)


def replica(text: str, *, record: VolumeRecord | None) -> ReplicaView:
    """`a: 1 2 *`; the record is what it was told, and what decides whether it holds a grant."""
    node, _, rest = text.partition(":")
    node = node.strip()
    if rest.split() == ["silent"]:
        return ReplicaView(node)
    told = record if record is not None and record.epoch else None
    reigns = told is not None and node == told.primary
    words = _Words(node, told, Grant(told.volume_id, told.epoch, told.epoch_id) if told and reigns else None)
    for word in rest.split():
        words.take(word)
    report = ReplicaReport(
        NAME,
        words.presence,
        volume_id=words.volume_id,
        lineage=lineage(" ".join(words.cps)),
        live=LiveCopy(words.live),
        record=words.told,
        grant=words.grant,
        backend=words.kind,
        priority=words.priority,
        others=tuple(adopted(name) for name in words.others),
    )
    return ReplicaView(node, report, HEARD_MS, words.fresh)


def view(
    text: str,
    *,
    primary: str = "a",
    newest: str = "",
    epoch: int = 0,
    opening: bool = False,
    recovering: bool = False,
    members: str = "",
    removed: str = "",
) -> VolumeView:
    """A volume whose store agrees with its primary, unless told otherwise.

    The newest known CP is the primary's tip, and the epoch that CP's. `primary=""` is a volume at first sight.
    """
    histories = [part for part in text.split("|") if part.strip()]
    if not primary:
        seen = [replica(part, record=None) for part in histories]
        return VolumeView(NAME, None, {one.node: one for one in seen})
    nodes = [part.partition(":")[0].strip() for part in histories]
    if not newest:
        own = next((part for part in histories if part.partition(":")[0].strip() == primary), "")
        words = [word for word in own.partition(":")[2].split() if _CP.fullmatch(word)]
        newest = words[-1] if words else ""
    cp = cp_of(newest) if newest else NO_CP
    number = epoch or max(cp.epoch, 1)
    record = VolumeRecord(
        NAME,
        VOLUME_ID,
        number,
        f"e{number}",
        primary,
        tuple(sorted(members.split() if members else {*nodes, primary})),
        cp,
        id_of(newest) if newest else "",
    )
    entry = VolumeEntry(record, NOW_MS - 60_000, opening, recovering, tuple(removed.split()))
    made = [replica(part, record=record) for part in histories]
    return VolumeView(NAME, entry, {one.node: one for one in made})
