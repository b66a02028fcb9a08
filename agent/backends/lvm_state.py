"""What there is, put together: the volume group, the records beside it, and a commit that may be under way.

A commit's intention (`commit.json`) names the old and the next live copy by UUID. Which of them has the live copy's
name decides: if the next one, the new tip counts and the rest is done at the next start; else the old tip counts, and
what was done is undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from agent.backends.image_layout import Layout, State, list_preserved, read_state
from agent.backends.lvm_place import Place, Ref, View, load_ref
from agent.disk.durable import read_json, write_json
from agent.disk.lvm import Lv
from agent.stored import typed
from resilver.volume import PreservedCopy


@dataclass(frozen=True, slots=True)
class Tools:
    """What the parts need of their backend."""

    place: Place
    step: Callable[[str], None]
    preserved_max_count: int
    preserved_max_bytes: int

    @property
    def layout(self) -> Layout:
        return self.place.layout


@dataclass(frozen=True, slots=True)
class Journal:
    """The intention of a commit. `made_target`: the target's directory is this commit's, and goes if it is undone.

    `keeps` are (snapshot id, preserved id) of the snapshots that leave the lineage; `live_pid` is the preserved id of
    the old live copy, empty if it held nothing of its own; `old` is its UUID, empty if there was none, and `old_name`
    what it will be called; `next` is the UUID of the new one.
    """

    resync_id: str
    old_tip: str
    new_tip: str
    made_target: bool
    keeps: tuple[tuple[str, str], ...]
    live_pid: str
    old: str
    old_name: str
    next: str

    def exchanged(self, view: View) -> bool:
        """Whether the new live copy has taken its place."""
        return view.live is not None and view.live.uuid == self.next


@dataclass(frozen=True, slots=True)
class Found:
    """The view, and what the records say: `present` of the lineage means that the logical volume is there too."""

    view: View
    state: State
    journal: Journal | None
    refs: dict[str, Ref]

    @property
    def tip_lv(self) -> Lv | None:
        tip = self.state.lineage.tip
        return self.lv(tip.id) if tip is not None else None

    def lv(self, snapshot_id: str) -> Lv | None:
        """None also of one that somebody has made the live copy, by its name: it is no snapshot any more."""
        return self.view.kept(self.refs.get(snapshot_id))


def load(place: Place, view: View) -> Found:
    """Reads every record. Changes nothing."""
    layout = place.layout
    if view.records is None:
        return Found(view, read_state(replace(layout, root=layout.root / "nothing"), set()), None, {})
    journal = load_journal(layout)
    left: set[str] = set()
    if journal is not None:
        if journal.exchanged(view):
            left = {gone for gone, _pid in journal.keeps}
        elif journal.made_target:
            left = {journal.new_tip}
    state = read_state(layout, left)
    refs = {key: ref for key in state.stored if (ref := load_ref(layout.data(key))) is not None}
    there = {key for key, ref in refs.items() if view.kept(ref) is not None}
    lineage = state.lineage.with_presence({record.id for record in state.lineage if record.present} & there)
    return Found(view, replace(state, lineage=lineage), journal, refs)


def save_journal(layout: Layout, journal: Journal) -> None:
    write_json(layout.commit, {name: getattr(journal, name) for name in Journal.__slots__})


def load_journal(layout: Layout) -> Journal | None:
    value = read_json(layout.commit)
    return None if value is None else typed(layout.commit, value, Journal)


def preserved(place: Place, view: View) -> tuple[PreservedCopy, ...]:
    """The preserved copies, with the path of the logical volume that each is."""
    if view.records is None:
        return ()
    return tuple(replace(copy, path=_path(place, view, copy)) for copy in list_preserved(place.layout))


def _path(place: Place, view: View, copy: PreservedCopy) -> str:
    ref = load_ref(place.layout.preserved / copy.id / "data")
    lv = view.find(ref)
    return lv.path if lv is not None else f"/dev/{view.group.name}/{ref.name if ref is not None else copy.id}"


def named_by(layout: Layout) -> dict[Path, Ref]:
    """The directories that name a logical volume: of snapshots, of preserved copies, of the stage."""
    directories = [entry for entry in layout.root.iterdir() if entry.is_dir()]
    directories += [layout.tree, *(layout.preserved.iterdir() if layout.preserved.is_dir() else ())]
    return {entry: ref for entry in directories if (ref := load_ref(entry / "data")) is not None}


def strangers(place: Place, view: View) -> tuple[str, ...]:
    """Logical volumes with our tag that no record names."""
    layout = place.layout
    if view.records is None:
        return ()
    refs = [*named_by(layout).values(), *filter(None, (load_ref(layout.root / "next.json"),))]
    known = {lv.uuid for ref in refs if (lv := view.find(ref)) is not None}
    journal = load_journal(layout)
    known |= {journal.old, journal.next} if journal is not None else set()
    live = view.live.uuid if view.live is not None else ""
    return tuple(
        f"{lv.full_name} has our tag, and no record names it: what is in it is not known here. Look, then lvremove it"
        for lv in view.group.volumes
        if view.tag in lv.tags and lv.uuid not in known and lv.uuid != live
    )
