"""The `image` backend: a volume is a raw image file, a snapshot is a clone of it.

This file is the door: it checks space, calls what does the work, and turns errors of the disk into ours.

========================  =======================================================================
`image_layout.py`         where everything stands on disk, and how the tip is found
`image_untouched.py`      whether a snapshot's data was written to since
`image_copy.py`           duplicating and comparing, by shared extents or by reading
`image_live.py`           the live copy as it is found: in use by whom, modified or not
`image_snapshot.py`       taking a consistency point
`image_stage.py`          what is being received
`image_scratch.py`        the way of small pieces into a stage on XFS
`image_commit.py`         the stage becomes the tip, the live copy its clone, in one step
`image_finish.py`         what is left of that, and its undoing
`image_keep.py`           preserved copies, the spare, dropping
`image_compact.py`        putting fragments together again
========================  =======================================================================
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from agent.backends import (
    image_commit,
    image_compact,
    image_finish,
    image_keep,
    image_layout,
    image_live,
    image_snapshot,
    image_stage,
    mandate,
)
from agent.backends.base import AnyStage, CommitOrder, Examined, NewSnapshot, SnapshotReader, Stage
from agent.backends.image_copy import Copier, export_file, opened
from agent.backends.image_layout import Layout, State, load_state
from agent.backends.image_untouched import check_untouched
from agent.delta import DeltaMap
from agent.disk import advance, ioctl, quiesce
from agent.disk.claim import Claim
from agent.disk.durable import disk_errors
from agent.disk.reader import FileReader
from resilver.errors import Invalid, NotFound, Refused
from resilver.lineage import Lineage, Snapshot
from resilver.volume import Grant, LiveCopy, LiveState, Presence, PreservedCopy, VolumeRecord

STEPS: Final = (
    *image_snapshot.STEPS,
    *image_commit.STEPS,
    "prune.logged",
    "prune.renamed",
    "prune.removed",
    "drop.renamed",
    *image_compact.STEPS,
)

_EXTENT_BYTES: Final = 17
_SPACE_MARGIN_MIN_BYTES: Final = 64 << 20


class ImageBackend:
    """One replica whose live copy is a raw image file. `step` is called by name at the points listed in STEPS."""

    kind = "image"
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
        seams_max: int = image_compact.SEAMS_MAX,
        state_dir: Path | None = None,
        step: Callable[[str], None] = advance.step,
    ) -> None:
        self.keep_last: Final = keep_last
        self._reserve = (reserve_ratio, reserve_min_bytes)
        self._layout: Final = Layout(volume, path.absolute(), snapshot_dir.absolute())
        self._claim: Final = Claim(self._layout.root, state_dir)
        self._copier: Final = Copier(self._layout)
        self._step: Final = step
        self._compactor: Final = image_compact.Compactor(self._layout, self._copier, step, seams_max)
        self._tools: Final = image_finish.Tools(
            self._layout, self._copier, step, preserved_max_count, preserved_max_bytes
        )

    def set_reserve(self, ratio: float, min_bytes: int) -> None:
        """Another reserve, from the next look at the space on."""
        self._reserve = (ratio, min_bytes)

    def recover(self) -> str:
        layout = self._layout
        with disk_errors(layout.root), self._claim.held():
            where = ioctl.fs_id(layout.live.parent) if layout.live.parent.is_dir() else ""
            if not layout.root.is_dir():
                return where
            quiesce.thaw_recorded(layout.frozen)
            image_finish.settle(self._tools)
            image_keep.sweep(layout, self._copier, load_state(layout))
            self._compactor.recover(load_state(layout))
            if layout.stage.exists() and not (layout.tree / "data").exists():
                image_stage.discard(layout)
        return where

    def examine(self, *, compare_live: bool = True) -> Examined:
        layout = self._layout
        with disk_errors(layout.live):
            if not layout.live.parent.is_dir():
                return self._nowhere()
            state = load_state(layout)
            live, problems = image_live.look(layout, state, self._copier, compare=compare_live)
            free, reserve = self._space()
            there = bool(state.lineage.records) or live.state is not LiveState.ABSENT
            return Examined(
                presence=Presence.PRESENT if there else Presence.EMPTY,
                volume_id=state.volume_id,
                lineage=state.lineage,
                live=live,
                record=mandate.load_record(layout, state.volume_id),
                grant=mandate.load_grant(layout),
                preserved=image_layout.list_preserved(layout),
                free_bytes=free,
                reserve_bytes=reserve,
                reflink=self._copier.reflink,
                file_system_id=ioctl.fs_id(layout.live.parent),
                problems=problems,
            )

    def glance(self) -> object | None:
        try:
            free, reserve = self._space()
        except OSError:
            return None
        # Steps of about 4 %: free space alone is told when it has changed by as much.
        return image_live.glance(self._layout, (free < reserve, int(math.log2(free + 1) * 16)))

    def _nowhere(self) -> Examined:
        """The live copy's directory is not there: its disk may not be mounted, and the caller knows if it was."""
        parent = self._layout.live.parent
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
            problems=(f"{parent} is not there: create it, or mount the disk that it is on",),
        )

    def save_record(self, record: VolumeRecord) -> None:
        with disk_errors(self._layout.root):
            self._layout.make_root()
            with self._claim.held():
                mandate.save_record(self._layout, record)

    def save_grant(self, grant: Grant | None) -> None:
        with disk_errors(self._layout.root):
            if grant is not None:
                self._layout.make_root()
            with self._claim.held():
                mandate.save_grant(self._layout, grant)

    def take_snapshot(self, new: NewSnapshot) -> Snapshot:
        with disk_errors(self._layout.live), self._claim.held():
            state = self._settled()
            stat = image_live.check_live(self._layout.live)
            need = stat.st_blocks * 512 if stat is not None and not self._copier.reflink else 0
            self._check_free(need, "a consistency point")
            return image_snapshot.take(self._layout, self._copier, state, new, self._step)

    def check_untouched(self, *snapshot_ids: str) -> None:
        for snapshot_id in filter(None, snapshot_ids):
            image_layout.check_id(snapshot_id)
            with disk_errors(self._layout.root):
                check_untouched(self._layout.snapshot(snapshot_id))

    def delta_map(self, base: str, target: str) -> DeltaMap:
        layout = self._layout
        self.check_untouched(base, target)
        with disk_errors(layout.root), self._compactor.comparing:
            return self._copier.delta(layout.snapshot(base) if base else None, layout.snapshot(target))

    def open_reader(self, snapshot_id: str) -> SnapshotReader:
        path = self._find(snapshot_id)
        with disk_errors(path):
            check_untouched(path.parent)
            try:
                return FileReader(path)
            except FileNotFoundError:
                raise Refused("TARGET_GONE", f"the data of snapshot {snapshot_id} is not on this node") from None

    def check_space(self, delta: DeltaMap, *, resumed_bytes: int = 0) -> int:
        with disk_errors(self._layout.live):
            need = self._needed(delta, resumed_bytes)
            self._check_free(need, "receiving this")
            return need

    def _needed(self, delta: DeltaMap, resumed_bytes: int) -> int:
        """Changed bytes in whole blocks and the extents of two clones, doubled, and a margin.

        Without shared extents the stage and the new live copy are whole copies of the tip besides.
        """
        block = os.statvfs(self._layout.live.parent).f_bsize
        offsets, ends = delta.offsets // block, -(-(delta.offsets + delta.lengths) // block)
        changed = max(0, int((ends - offsets)[~delta.zeros].sum()) * block - resumed_bytes)
        tip = load_state(self._layout).lineage.tip
        extents = len(delta) + self._extents_of(tip)
        need = 2 * (changed + 2 * _EXTENT_BYTES * extents)
        if not self._copier.reflink and tip is not None and tip.present:
            whole = self._layout.data(tip.id).stat().st_blocks * 512
            staged = self._layout.tree / "data"
            need += 2 * whole - (staged.stat().st_blocks * 512 if staged.exists() else 0)
        return max(0, need) + max(changed // 100, _SPACE_MARGIN_MIN_BYTES)

    def _extents_of(self, tip: Snapshot | None) -> int:
        if tip is None or not tip.present:
            return 0
        with opened(self._layout.data(tip.id)) as fd:
            return ioctl.extent_count(fd) or 0

    def open_stage(self, base: str, target: str, size_bytes: int) -> Stage:
        for snapshot_id in filter(None, (base, target)):
            image_layout.check_id(snapshot_id)
        with disk_errors(self._layout.root), self._claim.held():
            self._settled()
            self._check_free(0, "a stage")
            self._layout.make_root()
            return image_stage.open_stage(self._layout, self._copier, base, target, size_bytes)

    def discard_stage(self) -> None:
        with disk_errors(self._layout.root), self._claim.held():
            image_finish.settle(self._tools)  # a commit that was given up in the middle puts its tree back first
            image_stage.discard(self._layout)

    def commit(self, stage: AnyStage, order: CommitOrder) -> tuple[PreservedCopy, ...]:
        if not isinstance(stage, image_stage.ImageStage):
            raise TypeError("a stage of another backend")
        with disk_errors(self._layout.root), self._claim.held():
            return image_commit.commit(self._tools, stage, order)

    def drop(self, snapshot_id: str) -> int:
        with disk_errors(self._layout.root), self._claim.held():
            state = self._settled()
            if snapshot_id in {copy.id for copy in image_layout.list_preserved(self._layout)}:
                return image_keep.drop_preserved(self._layout, snapshot_id, self._step)
            self._known(state, snapshot_id)
            if snapshot_id == state.tip:
                raise Refused("PINNED", f"{snapshot_id} is the newest snapshot here, which the live copy stands on")
            if snapshot_id not in state.stored:
                return 0
            return image_keep.drop_snapshot(self._layout, self._copier, state, snapshot_id, self._step)

    def prune(self, keep_last: int, pinned: frozenset[str]) -> tuple[tuple[str, int], ...]:
        with disk_errors(self._layout.root), self._claim.held():
            state = self._settled()
            present = [record.id for record in state.lineage if record.id in state.stored]
            going = [here for here in present[max(1, keep_last) :] if here not in pinned]
            # Oldest first: whatever interrupts it, the newest ones are there.
            return tuple((here, self.drop(here)) for here in reversed(going))

    def export(self, snapshot_id: str, path: Path, *, writable: bool) -> int:
        return export_file(self._find(snapshot_id), path, writable=writable)

    def compact(self, go_on: Callable[[], bool]) -> bool:
        with disk_errors(self._layout.live), self._claim.held():
            return self._compactor.run(self._settled(), self._roomy, go_on)

    def _roomy(self, bytes_needed: int) -> bool:
        free, reserve = self._space()
        return free - bytes_needed >= reserve

    def _find(self, snapshot_id: str) -> Path:
        """The data of a snapshot or a preserved copy."""
        with disk_errors(self._layout.root):
            preserved = {copy.id: Path(copy.path) for copy in image_layout.list_preserved(self._layout)}
            if snapshot_id in preserved:
                return preserved[snapshot_id]
            self._known(load_state(self._layout), snapshot_id)
            return self._layout.data(snapshot_id)

    def _known(self, state: State, snapshot_id: str) -> None:
        if snapshot_id not in state.known:
            said = f"no snapshot or preserved copy {snapshot_id} of {self._layout.volume}"
            raise NotFound("SNAPSHOT_NOT_FOUND", said, snapshot=snapshot_id)

    def _settled(self) -> State:
        """The state, once a commit that was interrupted in this very process is finished or undone."""
        with disk_errors(self._layout.root):
            image_finish.settle(self._tools)
            return load_state(self._layout)

    def _space(self) -> tuple[int, int]:
        """Free bytes, and those that are never used up."""
        stat = os.statvfs(self._layout.live.parent)
        ratio, least = self._reserve
        reserve = max(least, int(stat.f_blocks * stat.f_frsize * ratio))
        return stat.f_bavail * stat.f_frsize, reserve

    def _check_free(self, need: int, what: str) -> None:
        if not self._layout.live.parent.is_dir():
            raise Invalid("INVALID_FIELD", f"{self._layout.live.parent} is no directory", field="path")
        free, reserve = self._space()
        if free - need < reserve:
            raise Refused(
                "NO_SPACE",
                f"{what} needs {need:,} bytes above the reserve of {reserve:,}, and {free:,} are free in "
                f"{self._layout.live.parent}; free {need + reserve - free:,} more there",
                need_bytes=str(need),
                free_bytes=str(free),
                reserve_bytes=str(reserve),
            )
