"""The `lvm-thin` backend: a volume is a thin logical volume, a snapshot is a thin snapshot of it.

This file is the door: it looks, checks space, and calls what does the work.

========================  =======================================================================
`lvm_place.py`            logical volumes, their names and tags, the file system of the records
`lvm_state.py`            what the records and the volume group say together
`lvm_live.py`             the live copy as it is found: in use by whom, modified or not
`lvm_delta.py`            delta maps from the pool's metadata
`lvm_space.py`            what is free in the pool, data and metadata
`lvm_snapshot.py`         taking a consistency point
`lvm_stage.py`            what is being received
`lvm_commit.py`           the stage becomes the tip, the live copy its clone
`lvm_keep.py`             preserved copies, dropping, sweeping
========================  =======================================================================
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

import numpy as np

from agent.backends import (
    image_layout,
    lvm_commit,
    lvm_delta,
    lvm_keep,
    lvm_live,
    lvm_snapshot,
    lvm_space,
    lvm_stage,
    lvm_state,
    mandate,
)
from agent.backends.base import AnyStage, CommitOrder, Examined, NewSnapshot, SnapshotReader, Stage
from agent.backends.image_copy import remove_tree
from agent.backends.lvm_place import Place, View, load_ref
from agent.backends.lvm_state import Found, Tools
from agent.backends.rules import drop_each
from agent.delta import DeltaMap
from agent.disk import advance, contents, ioctl, lvm, orphans, thin
from agent.disk.claim import Claim
from agent.disk.durable import FILE_MODE, disk_errors, fsync_dir
from agent.disk.inuse import InUseError
from agent.disk.lvm import Lv
from agent.disk.reader import FileReader
from resilver.errors import Invalid, NotFound, Refused
from resilver.lineage import Lineage, Snapshot
from resilver.volume import Grant, LiveCopy, LiveState, Presence, PreservedCopy, VolumeRecord

STEPS: Final = (
    "records.created",
    "records.formatted",
    "metadata.marked",
    "metadata.reserved",
    "metadata.known",
    *lvm_snapshot.STEPS,
    "stage.named",
    "stage.made",
    *lvm_commit.STEPS,
    *lvm_keep.STEPS,
)

_WINDOW_BYTES: Final = 1 << 20
_SNAPSHOT_METADATA_BLOCKS: Final = 8


class LvmBackend:
    """One replica whose live copy is a thin volume. `step` is called by name at the points listed in STEPS."""

    kind = "lvm-thin"
    shape: Literal["blocks"] = "blocks"

    def __init__(
        self,
        volume: str,
        path: Path,
        snapshot_dir: Path,
        *,
        keep_last: int = 16,
        reserve_ratio: float = 0.05,
        reserve_min_bytes: int = 1 << 30,
        preserved_max_count: int = 64,
        preserved_max_bytes: int = 0,
        state_dir: Path | None = None,
        step: Callable[[str], None] = advance.step,
    ) -> None:
        self.keep_last: Final = keep_last
        self._reserve = (reserve_ratio, reserve_min_bytes)
        self._place: Final = Place(volume, path, snapshot_dir, step)
        self._layout: Final = self._place.layout
        self._begun = False
        self._claim: Final = Claim(self._layout.root, state_dir)
        self._tools: Final = Tools(self._place, step, preserved_max_count, preserved_max_bytes)

    def set_reserve(self, ratio: float, min_bytes: int) -> None:
        """Another reserve, from the next look at the space on."""
        self._reserve = (ratio, min_bytes)

    def recover(self) -> str:
        view = self._place.look()
        if view is None or view.records is None:
            return view.group.uuid if view is not None else ""
        with self._alone():
            thin.release_left(self._place.pool(self._place.surely()))
            lvm_commit.settle(self._tools)
            lvm_live.bring_back(self._tools)
            lvm_keep.sweep(self._tools)
        return view.group.uuid

    def examine(self, *, compare_live: bool = True) -> Examined:
        view = self._place.look()
        if view is None:
            return self._nowhere()
        pool = self._place.pool(view)
        with disk_errors(self._layout.root):
            found = lvm_state.load(self._place, view)
            live, told = self._look(found, compare_live=compare_live)
            status = pool.status()
            free, reserve = lvm_space.free_of(pool, status, *self._reserve)
            there = bool(found.state.lineage.records) or live.state is not LiveState.ABSENT
            return Examined(
                presence=Presence.PRESENT if there else Presence.EMPTY,
                volume_id=found.state.volume_id,
                lineage=found.state.lineage,
                live=live,
                record=mandate.load_record(self._layout, found.state.volume_id) if view.records is not None else None,
                grant=mandate.load_grant(self._layout) if view.records is not None else None,
                preserved=lvm_state.preserved(self._place, view),
                free_bytes=free,
                reserve_bytes=reserve,
                reflink=True,
                file_system_id=view.group.uuid,
                problems=(*told, *lvm_space.problems(pool, status), *lvm_state.strangers(self._place, view)),
            )

    def _look(self, found: Found, *, compare_live: bool) -> tuple[LiveCopy, tuple[str, ...]]:
        """The live copy; what keeps it from being compared is told, and hides nothing else."""
        try:
            return lvm_live.look(self._tools, found, compare=compare_live), ()
        except Refused as error:
            return lvm_live.look(self._tools, found, compare=False), (f"not compared with its tip: {error.message}",)

    def _nowhere(self) -> Examined:
        """The volume group is not there: its disks may not be, and the caller knows if it was."""
        name = self._place.group_name
        return Examined(
            presence=Presence.EMPTY,
            volume_id="",
            lineage=Lineage(),
            live=LiveCopy(path=str(self._layout.live)),
            record=None,
            grant=None,
            preserved=(),
            free_bytes=0,
            reserve_bytes=0,
            reflink=False,
            file_system_id="",
            problems=(f"there is no volume group {name}: create it, or attach the disks that it is on",),
        )

    def save_record(self, record: VolumeRecord) -> None:
        self._place.ready()
        with self._alone():
            mandate.save_record(self._layout, record)

    def save_grant(self, grant: Grant | None) -> None:
        if grant is not None:
            self._place.ready()
        elif self._place.surely().records is None:
            return
        with self._alone():
            mandate.save_grant(self._layout, grant)

    def take_snapshot(self, new: NewSnapshot) -> Snapshot:
        with self._settled() as found:
            self._check_free(found.view, 0, _SNAPSHOT_METADATA_BLOCKS, "a consistency point")
            return lvm_snapshot.take(self._tools, found, new)

    def delta_map(self, base: str, target: str) -> DeltaMap:
        for snapshot_id in filter(None, (base, target)):
            image_layout.check_id(snapshot_id)
        place, view = self._place, self._place.surely()
        newer = place.snapshot(view, target, "TARGET_GONE")
        older = place.snapshot(view, base, "BASE_GONE") if base else None
        return lvm_delta.between(place.pool(view), older, newer, self._tools.step)

    def open_reader(self, snapshot_id: str) -> SnapshotReader:
        return _reader(self._find(self._place.surely(), snapshot_id))

    def check_space(self, delta: DeltaMap, *, resumed_bytes: int = 0) -> int:
        view = self._place.surely()
        lvm_stage.check_size(view, delta.capacity_bytes, self._place.full_name)
        need, blocks = lvm_space.needed(delta, self._place.pool_lv(view).chunk_bytes, resumed_bytes)
        self._check_free(view, need, blocks, "receiving this")
        return need

    def open_stage(self, base: str, target: str, size_bytes: int) -> Stage:
        for snapshot_id in filter(None, (base, target)):
            image_layout.check_id(snapshot_id)
        with self._settled() as found:
            self._check_free(found.view, 0, _SNAPSHOT_METADATA_BLOCKS, "a stage")
            return lvm_stage.open_stage(self._tools, found, base, target, size_bytes)

    def discard_stage(self) -> None:
        if self._place.surely().records is None:
            return
        with self._alone():
            lvm_commit.settle(self._tools)  # a commit that was given up in the middle puts its tree back first
            lvm_stage.discard(self._tools)

    def commit(self, stage: AnyStage, order: CommitOrder) -> tuple[PreservedCopy, ...]:
        if not isinstance(stage, lvm_stage.LvmStage):
            raise TypeError("a stage of another backend")
        self._place.surely()
        with self._alone():
            return lvm_commit.commit(self._tools, stage, order)

    def drop(self, snapshot_id: str) -> int:
        with self._settled() as found:
            if snapshot_id in {copy.id for copy in lvm_state.preserved(self._place, found.view)}:
                return lvm_keep.drop_preserved(self._tools, found, snapshot_id)
            self._known(found, snapshot_id)
            if snapshot_id == found.state.tip:
                raise Refused("PINNED", f"{snapshot_id} is the newest snapshot here, which the live copy stands on")
            if snapshot_id not in found.state.stored:
                return 0
            return lvm_keep.drop_snapshot(self._tools, found, snapshot_id)

    def prune(self, keep_last: int, pinned: frozenset[str]) -> tuple[tuple[str, int], ...]:
        with self._settled() as found:
            present = [record.id for record in found.state.lineage if record.id in found.state.stored]
            going = [here for here in present[max(1, keep_last) :] if here not in pinned]
            # Oldest first: whatever interrupts it, the newest ones are there.
            return drop_each(reversed(going), self.drop)

    def export(self, snapshot_id: str, path: Path, *, writable: bool) -> int:
        view = self._place.surely()
        lv = self._find(view, snapshot_id)
        try:
            lvm_live.check_free(lv if not lv.read_only else None)
        except InUseError as error:
            raise error.refused(Path(lv.path)) from error
        ranges = lvm_delta.between(self._place.pool(view), None, lv, self._tools.step)
        return _export(lv, ranges, path, writable=writable)

    def _find(self, view: View, snapshot_id: str) -> Lv:
        """The logical volume of a snapshot or a preserved copy."""
        found = lvm_state.load(self._place, view)
        if snapshot_id in {copy.id for copy in lvm_state.preserved(self._place, view)}:
            lv = view.find(load_ref(self._layout.preserved / snapshot_id / "data"))
            if lv is None:
                raise Refused(
                    "TARGET_GONE", f"the logical volume of preserved copy {snapshot_id} is not there any more"
                )
            return lv
        self._known(found, snapshot_id)
        return self._place.snapshot(view, snapshot_id, "TARGET_GONE")

    def _known(self, found: Found, snapshot_id: str) -> None:
        if snapshot_id not in found.state.known:
            said = f"no snapshot or preserved copy {snapshot_id} of {self._layout.volume}"
            raise NotFound("SNAPSHOT_NOT_FOUND", said, snapshot=snapshot_id)

    @contextlib.contextmanager
    def _settled(self) -> Iterator[Found]:
        """Alone, what is there once a commit that was interrupted in this very process is finished or undone."""
        self._place.ready()
        with self._alone():
            lvm_commit.settle(self._tools)
            # Another agent may have changed the group until it was this one's.
            yield lvm_state.load(self._place, self._place.surely())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other agent works in the records, which are mounted, nor does a command that one has left."""
        with disk_errors(self._layout.root), self._claim.held():
            if not self._begun:
                orphans.wait(self._place.concerns)
                self._begun = True
            yield

    def _check_free(self, view: View, need: int, need_metadata: int, what: str) -> None:
        lvm_space.check(self._place.pool(view), self._reserve, need, need_metadata, what)


def _reader(lv: Lv) -> FileReader:
    """Its device stays until it is dropped."""
    node = lvm.activate(lv).node
    with disk_errors(lv.path):
        return FileReader(Path(lv.path), Path(node), lv.size_bytes)


def _export(lv: Lv, ranges: DeltaMap, path: Path, *, writable: bool) -> int:
    """Copies what is mapped and not zero to a new sparse file; whole or not at all."""
    temporary = path.with_name(f".{path.name}.resilver-{os.getpid()}")
    if os.path.lexists(path):
        raise Invalid("INVALID_FIELD", f"{path} is there already; name a path that is not", field="path")
    if not path.parent.is_dir():
        raise Invalid("INVALID_FIELD", f"{path.parent} is no directory; create it first", field="path")
    reader = _reader(lv)
    with disk_errors(path):
        remove_tree(temporary)
        try:
            mode = FILE_MODE if writable else FILE_MODE & ~0o222
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            try:
                os.ftruncate(fd, lv.size_bytes)
                buffer = memoryview(bytearray(_WINDOW_BYTES))
                for row in ranges:
                    for at in range(row.offset, row.offset + row.length, _WINDOW_BYTES):
                        view = buffer[: min(_WINDOW_BYTES, row.offset + row.length - at)]
                        reader.read_into(at, view)
                        if np.frombuffer(view, np.uint8).any():
                            contents.write_all(fd, at, view)
                os.fsync(fd)
            finally:
                os.close(fd)
            ioctl.rename_new(temporary, path)
        finally:
            reader.close()
            remove_tree(temporary)
        fsync_dir(path.parent)
    return lv.size_bytes
