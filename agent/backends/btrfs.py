"""The `btrfs` backend: a volume is a subvolume, a snapshot a read-only one, a delta what `btrfs send` writes.

This file is the door: it checks space, calls what does the work, and turns errors of the disk into ours.

========================  =======================================================================
`btrfs_layout.py`         where everything stands, and by what a snapshot is known again
`btrfs_adopt.py`          which snapshots there are, ours and other tools'
`btrfs_live.py`           the live copy as it is found: in use by whom, modified or not
`btrfs_snapshot.py`       taking a consistency point
`btrfs_stream.py`         reading a send stream
`btrfs_send.py`           writing one; the length of a delta; whether two subvolumes differ
`btrfs_stage.py`          receiving one
`btrfs_verify.py`         what came, read back from the disk
`btrfs_commit.py`         the stage becomes the tip, the live copy a snapshot of it, in one step
`btrfs_keep.py`           preserved copies, dropping
`btrfs_debris.py`         what is left over and cannot be removed
`btrfs_export.py`         a snapshot as a tree elsewhere
========================  =======================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal

from agent.backends import (
    btrfs_commit,
    btrfs_export,
    btrfs_keep,
    btrfs_live,
    btrfs_send,
    btrfs_snapshot,
    btrfs_stage,
    image_layout,
    mandate,
    rules,
)
from agent.backends.base import AnyStage, CommitOrder, Examined, NewSnapshot, SendStream, StreamOrigin, StreamStage
from agent.backends.btrfs_adopt import Finder, Known
from agent.backends.btrfs_debris import Debris
from agent.backends.btrfs_layout import SubvolumeLayout, check_untouched
from agent.disk import advance, btrfs, btrfs_space, ioctl
from agent.disk.claim import Claim
from agent.disk.durable import disk_errors
from resilver.errors import Damaged, Invalid, NotFound, Refused, Unauthenticated
from resilver.lineage import Lineage, Snapshot
from resilver.volume import Grant, LiveCopy, LiveState, Presence, PreservedCopy, VolumeRecord

STEPS: Final = (
    *btrfs_snapshot.STEPS,
    *btrfs_commit.STEPS,
    "prune.logged",
    "prune.renamed",
    "prune.removed",
    "drop.renamed",
)

MEASURE_MAX_S: Final = 60.0
MEASURED_MAX: Final = 256
_SPACE_MARGIN_MIN_BYTES: Final = 64 << 20
_METADATA_MARGIN_BYTES: Final = 32 << 20
_METADATA_SHARE: Final = 50


class BtrfsBackend:
    """One replica whose live copy is a subvolume. `step` is called by name at the points listed in STEPS."""

    kind = "btrfs"
    shape: Literal["stream"] = "stream"

    def __init__(
        self,
        volume: str,
        path: Path,
        snapshot_dir: Path,
        *,
        adopt: Sequence[str] = (),
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
        self._layout: Final = SubvolumeLayout(volume, path.absolute(), snapshot_dir.absolute())
        self._claim: Final = Claim(self._layout.root, state_dir)
        self._finder: Final = Finder(self._layout, adopt)
        self._step: Final = step
        self._debris: Final = Debris()
        self._tools: Final = btrfs_commit.Tools(
            self._layout, self._finder, step, preserved_max_count, preserved_max_bytes, self._debris
        )
        self._measured: dict[tuple[str, str], int | None] = {}

    def set_reserve(self, ratio: float, min_bytes: int) -> None:
        """Another reserve, from the next look at the space on."""
        self._reserve = (ratio, min_bytes)

    def recover(self) -> str:
        layout = self._layout
        with disk_errors(layout.root), self._claim.held():
            if not self._on_btrfs():
                return ""
            where = ioctl.fs_id(layout.live.parent)
            btrfs_live.sweep(layout, self._debris)
            if not layout.root.is_dir():
                return where
            btrfs_commit.settle(self._tools)
            btrfs_keep.sweep(layout, self._debris)
            with self._debris.passed_over(layout.stage):
                self._sweep_stage()
        return where

    def _sweep_stage(self) -> None:
        if not (self._layout.stage / "stage.json").exists():
            btrfs_stage.discard(self._layout)
        elif not btrfs_stage.is_received(self._layout):
            btrfs_stage.sweep(self._layout, self._layout.stage)

    def examine(self, *, compare_live: bool = True) -> Examined:
        layout = self._layout
        with disk_errors(layout.live):
            if not layout.live.parent.is_dir():
                return self._nowhere(f"{layout.live.parent} is not there: create it, or mount the disk that it is on")
            if not self._on_btrfs():
                said = f"{layout.live.parent} is not on Btrfs: mount the disk that {layout.live.name} is on"
                return self._nowhere(said)
            known = self._finder.load()
            lineage = known.state.lineage
            live, problems = btrfs_live.look(layout, lineage.tip_id, known.tip, compare=compare_live)
            space, reserve = self._space()
            there = bool(lineage.records) or live.state is not LiveState.ABSENT
            return Examined(
                presence=Presence.PRESENT if there else Presence.EMPTY,
                volume_id=known.state.volume_id,
                lineage=lineage,
                live=live,
                record=mandate.load_record(layout, known.state.volume_id),
                grant=mandate.load_grant(layout),
                preserved=image_layout.list_preserved(layout),
                free_bytes=space.free,
                reserve_bytes=reserve,
                reflink=True,
                file_system_id=ioctl.fs_id(layout.live.parent),
                problems=(*known.problems, *problems, *self._debris.problems()),
                others=known.others,
            )

    def _on_btrfs(self) -> bool:
        return self._layout.live.parent.is_dir() and btrfs.is_btrfs(self._layout.live.parent)

    def _nowhere(self, problem: str) -> Examined:
        """What the live copy lies on is not there: its disk may not be mounted, and the caller knows if it was."""
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
            problems=(problem,),
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
        with disk_errors(self._layout.root), self._claim.held():
            known = self._settled()
            self._check_free(0, "a consistency point")
            return btrfs_snapshot.take(known, new, self._step)

    # The source's side of a delta.

    def formats(self) -> tuple[str, ...]:
        return btrfs_send.formats()

    def delta_bytes(self, base: str, target: str) -> int | None:
        key = (base, target)
        with disk_errors(self._layout.root):
            old, new = self._ends(base, target)
            if key not in self._measured:
                found = btrfs_send.measure(old, new, MEASURE_MAX_S)
                if len(self._measured) >= MEASURED_MAX:
                    self._measured.clear()
                self._measured[key] = found.data_bytes + found.other_bytes if found is not None else None
            return self._measured.get(key)

    def native_id(self, snapshot_id: str) -> str:
        with disk_errors(self._layout.root):
            if self._is_ours(snapshot_id):
                return check_untouched(self._layout, snapshot_id, "TARGET_GONE").native_id
            self._adopted(snapshot_id, "TARGET_GONE")
            return snapshot_id

    def open_send(self, base: str, target: str, stream_format: str, token: str = "") -> SendStream:
        if token:
            raise Unauthenticated("TICKET_INVALID", "Btrfs has no tokens to go on from")
        with disk_errors(self._layout.root):
            return btrfs_send.open_send(*self._ends(base, target), stream_format)

    def _ends(self, base: str, target: str) -> tuple[Path | None, Path]:
        """Where the two subvolumes are, untouched, and reached through one mount, as `btrfs send` wants it."""
        old = self._end(base, "BASE_GONE") if base else None
        return old, self._end(target, "TARGET_GONE")

    def _end(self, snapshot_id: str, gone: str) -> Path:
        if self._is_ours(snapshot_id):
            check_untouched(self._layout, snapshot_id, gone)
            return self._layout.data(snapshot_id)
        return btrfs.through(self._adopted(snapshot_id, gone), self._layout.live.parent)

    def _is_ours(self, snapshot_id: str) -> bool:
        """Without the lineage: a source is asked while a commit may be moving its directories."""
        image_layout.check_id(snapshot_id)
        return (self._layout.snapshot(snapshot_id) / "native.json").exists()

    def _adopted(self, snapshot_id: str, gone: str) -> Path:
        path = self._finder.load().adopted.get(snapshot_id)
        if path is None:
            raise Refused(gone, f"the data of snapshot {snapshot_id} is not on this node")
        return path

    # The target's side.

    def check_base(self, base: str, native_base: str) -> None:
        with disk_errors(self._layout.root):
            ours = self._is_ours(base)
            found = check_untouched(self._layout, base).native_id if ours else base
            if not ours:
                self._adopted(base, "BASE_GONE")
        if found != native_base:
            raise Damaged(
                "BASE_MISMATCH", f"snapshot {base} is {found} in this file system, and {native_base} at the source"
            )

    def check_stream_space(self, stream_bytes: int | None, *, resumed_bytes: int = 0) -> int:
        """What was received before counts for nothing: a receive begins anew. Names and small files are metadata."""
        _ = resumed_bytes
        data = stream_bytes or 0
        need = data + max(data // 100, _SPACE_MARGIN_MIN_BYTES)
        with disk_errors(self._layout.live):
            self._check_free(need, "receiving this")
            metadata = _METADATA_MARGIN_BYTES + data // _METADATA_SHARE
            free = btrfs_space.space(self._layout.live.parent).metadata_free
            if free < metadata:
                raise Refused(
                    "NO_SPACE",
                    f"receiving this needs about {metadata:,} bytes of metadata, and {free:,} are left for it in "
                    f"{self._layout.live.parent}: delete snapshots there, or `btrfs balance` its data",
                    need_bytes=str(metadata),
                    free_bytes=str(free),
                )
        return need

    def open_stream_stage(self, base: str, target: str, origin: StreamOrigin) -> StreamStage:
        for snapshot_id in filter(None, (base, target)):
            image_layout.check_id(snapshot_id)
        with disk_errors(self._layout.root), self._claim.held():
            self._settled()
            self._check_free(0, "a stage")
            self._layout.make_root()
            return btrfs_stage.open_stage(self._layout, base, target, origin)

    def discard_stage(self) -> None:
        with disk_errors(self._layout.root), self._claim.held():
            btrfs_commit.settle(self._tools)  # a commit that was given up in the middle puts its tree back first
            btrfs_stage.discard(self._layout)

    def commit(self, stage: AnyStage, order: CommitOrder) -> tuple[PreservedCopy, ...]:
        if not isinstance(stage, btrfs_stage.BtrfsStage):
            raise TypeError("a stage of another backend")
        with disk_errors(self._layout.root), self._claim.held():
            return btrfs_commit.commit(self._tools, stage, order)

    # Keeping and letting go.

    def drop(self, snapshot_id: str) -> int:
        with disk_errors(self._layout.root), self._claim.held():
            known = self._settled()
            if snapshot_id in {copy.id for copy in image_layout.list_preserved(self._layout)}:
                return btrfs_keep.drop_preserved(self._layout, snapshot_id, self._step, self._debris)
            if snapshot_id in known.adopted or snapshot_id in known.beside:
                raise Refused("PINNED", f"{snapshot_id} was made by another tool, which is to remove it")
            self._known(known, snapshot_id)
            if snapshot_id == known.state.tip:
                raise Refused("PINNED", f"{snapshot_id} is the newest snapshot here, which the live copy stands on")
            if snapshot_id not in known.state.stored:
                return 0
            return btrfs_keep.drop_snapshot(known, snapshot_id, self._step, self._debris)

    def prune(self, keep_last: int, pinned: frozenset[str]) -> tuple[tuple[str, int], ...]:
        with disk_errors(self._layout.root), self._claim.held():
            state = self._settled().state
            present = [record.id for record in state.lineage if record.id in state.stored]
            going = [here for here in present[max(1, keep_last) :] if here not in pinned]
            # Oldest first: whatever interrupts it, the newest ones are there.
            return rules.drop_each(reversed(going), self.drop)

    def export(self, snapshot_id: str, path: Path, *, writable: bool) -> int:
        with disk_errors(self._layout.root):
            return btrfs_export.export(self._find(snapshot_id), path, writable=writable)

    def _find(self, snapshot_id: str) -> Path:
        """The data of a snapshot, another tool's, or a preserved copy."""
        preserved = {copy.id: Path(copy.path) for copy in image_layout.list_preserved(self._layout)}
        if snapshot_id in preserved:
            return preserved[snapshot_id]
        known = self._finder.load()
        if snapshot_id in known.beside:
            return known.beside[snapshot_id]
        self._known(known, snapshot_id)
        path = known.path(snapshot_id)
        if path is None:
            raise Refused("TARGET_GONE", f"the data of snapshot {snapshot_id} is not on this node")
        return path

    def _known(self, known: Known, snapshot_id: str) -> None:
        if snapshot_id not in known.state.known:
            said = f"no snapshot or preserved copy {snapshot_id} of {self._layout.volume}"
            raise NotFound("SNAPSHOT_NOT_FOUND", said, snapshot=snapshot_id)

    def _settled(self) -> Known:
        """What is here, once a commit that was interrupted in this very process is finished or undone."""
        with disk_errors(self._layout.root):
            if not self._on_btrfs():
                raise Invalid("INVALID_FIELD", f"{self._layout.live.parent} is no directory on Btrfs", field="path")
            btrfs_commit.settle(self._tools)
            return self._finder.load()

    def _space(self) -> tuple[btrfs_space.Space, int]:
        """What is free, and how much of it is never used up."""
        space = btrfs_space.space(self._layout.live.parent)
        ratio, least = self._reserve
        return space, max(least, int(space.total * ratio))

    def _check_free(self, need: int, what: str) -> None:
        parent = self._layout.live.parent
        with disk_errors(parent):
            space, reserve = self._space()
        if space.free - need < reserve:
            raise Refused(
                "NO_SPACE",
                f"{what} needs {need:,} bytes above the reserve of {reserve:,}, and {space.free:,} are free in "
                f"{parent}; free {need + reserve - space.free:,} more there",
                need_bytes=str(need),
                free_bytes=str(space.free),
                reserve_bytes=str(reserve),
            )
