"""Compacting: what scattered writes have torn apart is put together again, and nobody can tell but by the speed.

A consistency point costs its writer about a second for 50,000 extents. So the newest snapshot's worst parts, 4 MiB
each, are copied to where they lie in one piece, and then *every* file that shares those blocks is made to share the
copy: the live copy, the snapshot, all older ones, preserved copies, the spare. What two files share they go on to
share, so that a delta between any two of them stays exactly what it was, and the old blocks are free.

* Only FIDEDUPERANGE moves a file to the copy. The kernel compares both under their locks and does nothing where they
  differ: no byte of any file changes, whoever writes to it meanwhile, and whatever interrupts this.
* In each part the live copy comes first, and a range of it that was written to meanwhile is halved until every block
  is decided. If it cannot be moved at all, nothing has been changed yet.
* A crash within a part leaves files that are equal there but do not share: a delta between them would name too much.
  The part is written down before (`compact.json`) and joined again at the next start, by contents.
* No comparison of maps runs beside it (`comparing`), because blocks that it frees may come back elsewhere.
* Btrfs keeps a whole extent while anything of it is used: there the older snapshots' own blocks in such a part are
  moved as well, or the old extents would stay beside the new ones.
* Defragmenters do none of this: they would make the next delta the whole image.

Parts with fewer than GAIN_MIN seams are left as they are: to copy 4 MiB for less is not worth it. So an image that is
written at random all over stays at up to one extent for each 64 KiB, however often this runs.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from agent.backends.image_copy import NO_MAPS, Copier, create, opened
from agent.backends.image_layout import Layout, State, list_preserved
from agent.disk import contents, ioctl
from agent.disk.durable import read_json, remove_file, write_json
from agent.disk.places import Mask, Places, places, seams_by_part
from agent.stored import typed
from resilver.errors import Damaged, ResilverError

STEPS = (
    "compact.marked",
    "compact.copied",
    "compact.live",
    "compact.tip",
    "compact.others",
    "compact.synced",
    "compact.closed",
)

SEAMS_MAX: Final = 50_000  # above it compacting begins, and ends below half of it
PART_BYTES: Final = 4 << 20
GAIN_MIN: Final = 64
_READ_BYTES: Final = 1 << 20
_LOCKED_BYTES: Final = 256 << 10  # for as long as comparing so much takes, writers of the live copy wait


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where the part begins that is being compacted."""

    offset: int


@dataclass(frozen=True, slots=True)
class _File:
    """One of those that share blocks."""

    path: Path
    fd: int

    def map(self, low: int, block: int) -> Places:
        return places(self.fd, low, low + PART_BYTES, block)


@dataclass(frozen=True, slots=True)
class _Family:
    """All files of the volume that may share blocks with the tip."""

    live: tuple[_File, ...]
    tip: _File
    snapshots: tuple[_File, ...]
    others: tuple[_File, ...]
    block: int

    @property
    def every(self) -> tuple[_File, ...]:
        return (*self.live, self.tip, *self.snapshots, *self.others)


class Compactor:
    """Compacts one volume, part after part; what is to be done is worked out anew for each tip."""

    def __init__(self, layout: Layout, copier: Copier, step: Callable[[str], None], seams_max: int) -> None:
        self.comparing: Final = threading.Lock()
        self._layout: Final = layout
        self._copier: Final = copier
        self._step: Final = step
        self._seams_max: Final = seams_max
        self._tip = ""
        self._failed = ""
        self._parts: list[int] = []

    def run(self, state: State, roomy: Callable[[int], bool], go_on: Callable[[], bool]) -> bool:
        """Does a part and more while `go_on`; whether more can be done now. `roomy`: so many bytes are free.

        An error ends it until there is another tip.
        """
        layout = self._layout
        tip = state.lineage.tip
        if tip is None or not tip.present or tip.id == self._failed:
            return False
        if not self._copier.reflink or layout.stage.exists():
            return False
        if tip.id != self._tip:
            self._parts = _plan(layout.data(tip.id), self._seams_max, under_way=bool(self._parts))
            self._tip = tip.id
        if not self._parts and not layout.compacting.exists():
            return False
        self._failed = tip.id
        parts, self._parts, busy = self._parts, [], False
        with contextlib.ExitStack() as stack:
            family = _family(layout, state, stack)
            self._join_again(family)
            while parts and not busy:
                busy = not roomy(4 * PART_BYTES) or not self.comparing.acquire(blocking=False)
                if busy:
                    break
                try:
                    gained = self._part(family, parts[0])
                finally:
                    self.comparing.release()
                parts = parts[1:] if gained else []  # else free space is in pieces as well
                if not go_on():
                    break
        self._parts, self._failed = parts, ""
        return bool(parts) and not busy

    def recover(self, state: State) -> None:
        """At start: finishes the part that a run before this one was at; where that fails, deltas are only larger."""
        tip = state.lineage.tip
        if tip is not None and tip.present and self._layout.compacting.exists():
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError, ResilverError):
                self._join_again(_family(self._layout, state, stack))

    def _join_again(self, family: _Family) -> None:
        """What is equal in an interrupted part is shared again: with the tip, as whatever was being moved was its."""
        mark = read_json(self._layout.compacting)
        if mark is None:
            return
        offset = typed(self._layout.compacting, mark, _Mark).offset // PART_BYTES * PART_BYTES
        with self.comparing:
            tip = family.tip.map(offset, family.block)
            for file in family.every:
                if file is not family.tip:
                    apart = tip.data & ~tip.shared(file.map(offset, family.block))
                    self._move(family.tip.fd, file, tip, apart)
            self._close(family.every)

    def _part(self, family: _Family, low: int) -> bool:
        """Compacts [low, low + PART_BYTES) of all files; False if the copy is in as many pieces."""
        maps = {file: file.map(low, family.block) for file in family.every}
        moved = {file: np.zeros_like(at.data) for file, at in maps.items()}
        write_json(self._layout.compacting, {"offset": low})
        self._step("compact.marked")
        whole_extents = ioctl.fs_magic(family.tip.fd) == ioctl.BTRFS_MAGIC
        for mover in (family.tip, *(family.snapshots if whole_extents else ())):
            own = maps[mover].data & ~moved[mover]
            if not own.any():
                continue
            with self._copied(mover, maps[mover], own) as copy_fd:
                self._step("compact.copied")
                if mover is family.tip:
                    copied = places(copy_fd, low, low + PART_BYTES, family.block)
                    if 2 * copied.seams(own) > maps[mover].seams(own):
                        remove_file(self._layout.compacting)
                        return False
                self._share(family, mover, copy_fd, maps, moved)
        self._close(tuple(file for file in family.every if moved[file].any()))
        return True

    def _share(
        self, family: _Family, mover: _File, copy_fd: int, maps: dict[_File, Places], moved: dict[_File, Mask]
    ) -> None:
        """Moves all files that share the mover's blocks to the copy of them."""
        first = mover is family.tip
        own = maps[mover].data & ~moved[mover]
        rest = tuple(file for file in (*family.snapshots, *family.others) if file is not mover)
        for step, files in (("compact.live", family.live), ("compact.tip", (mover,)), ("compact.others", rest)):
            for file in files:
                shared = own & maps[mover].shared(maps[file]) & ~moved[file]
                done = self._move(copy_fd, file, maps[mover], shared)
                moved[file] |= shared
                if file is mover and done != int(shared.sum()) * family.block:
                    raise Damaged("IO_ERROR", f"{file.path} does not read twice as the same", path=str(file.path))
            if first:
                self._step(step)

    def _move(self, source_fd: int, file: _File, at: Places, mask: Mask) -> int:
        """Makes a file share these blocks of the source where they are the same; bytes that are."""
        if not mask.any():
            return 0
        buffer = bytearray(_READ_BYTES)
        for offset in range(at.low, at.low + PART_BYTES, _READ_BYTES):
            # The kernel reads what it compares page by page, unless it has been read.
            os.preadv(file.fd, [buffer], offset)
        return sum(
            _same_shared(source_fd, file.fd, offset, length, at.block)
            for offset, length in at.ranges(mask, _LOCKED_BYTES)
        )

    @contextlib.contextmanager
    def _copied(self, file: _File, at: Places, mask: Mask) -> Iterator[int]:
        """A file without a name that has these blocks of a file, where they are in it, and nothing else."""
        path = self._layout.new("compact")
        path.unlink(missing_ok=True)
        fd = create(path)
        try:
            path.unlink()
            ioctl.copy_nocow(file.fd, fd)
            os.ftruncate(fd, os.fstat(file.fd).st_size)
            buffer = memoryview(bytearray(_READ_BYTES))
            for offset, length in at.ranges(mask, _READ_BYTES):
                contents.read_exactly(file.fd, offset, buffer[:length])
                contents.write_all(fd, offset, buffer[:length])
            os.fdatasync(fd)
            yield fd
        finally:
            os.close(fd)

    def _close(self, files: tuple[_File, ...]) -> None:
        """The part is done: what was moved is on the disk before the mark goes."""
        for file in files:
            os.fsync(file.fd)
        self._step("compact.synced")
        remove_file(self._layout.compacting)
        self._step("compact.closed")


def _plan(tip: Path, seams_max: int, *, under_way: bool) -> list[int]:
    """The offsets of the parts to be compacted: the worst, until half of what may be is left; in order."""
    with opened(tip) as fd:
        extent_count = ioctl.extent_count(fd)
        begin = seams_max // 2 if under_way else seams_max
        if extent_count is not None and extent_count <= begin:
            return []
        try:
            seams = seams_by_part(fd, PART_BYTES)
        except OSError as error:
            if error.errno in NO_MAPS:
                return []
            raise
    total = int(seams.sum())
    if total <= begin:
        return []
    worst = np.argsort(-seams, kind="stable")
    left_before = total - np.concatenate(([0], np.cumsum(seams[worst])[:-1]))
    wanted = worst[(left_before > seams_max // 2) & (seams[worst] >= GAIN_MIN)]
    return sorted(int(part) * PART_BYTES for part in wanted)


def _family(layout: Layout, state: State, stack: contextlib.ExitStack) -> _Family:
    def files(paths: list[Path]) -> tuple[_File, ...]:
        there = [path for path in paths if path.exists()]
        return tuple(_File(path, stack.enter_context(opened(path, os.O_RDONLY | os.O_NONBLOCK))) for path in there)

    (tip,) = files([layout.data(state.tip)])
    older = [layout.data(snapshot_id) for snapshot_id in state.stored if snapshot_id != state.tip]
    kept = [Path(copy.path) for copy in list_preserved(layout)]
    return _Family(
        live=files([layout.live]),
        tip=tip,
        snapshots=files(older),
        others=files([*kept, *layout.root.glob(".spare-*")]),
        block=os.fstatvfs(tip.fd).f_bsize,
    )


def _same_shared(source_fd: int, target_fd: int, offset: int, length: int, block: int) -> int:
    """Shares what is the same in a range; a range that differs is halved until it is one block. Bytes shared."""
    shared, end = 0, offset + length
    while offset < end:
        done = ioctl.dedupe(target_fd, source_fd, offset, end - offset)
        if done is None or done == 0:
            half = (end - offset) // 2 // block * block
            if not half:
                return shared
            return (
                shared
                + _same_shared(source_fd, target_fd, offset, half, block)
                + _same_shared(source_fd, target_fd, offset + half, end - offset - half, block)
            )
        shared, offset = shared + done, offset + done
    return shared
